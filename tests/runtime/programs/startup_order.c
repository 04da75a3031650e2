// Allocates wherever a process runs code before main: in the resolver of an indirect function, in
// early constructors of the program and of a library, in a library that is loaded at run time, in
// fork handlers that were registered there. What was allocated must still be there at the end.
// `startup_order PLUGIN`.
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/wait.h>

#include "tests/runtime/programs/require.h"

enum { kBlocks = 200 };

// From startup_library.c.
extern void* library_blocks[kBlocks];
extern int library_fork_handlers_ran;

static void* resolver_block;
static void* blocks[kBlocks];
static int constructed;

static int Answer(void) { return 42; }

__attribute__((used)) static int (*ResolveAnswer(void))(void) {
  resolver_block = malloc(1000);
  if (resolver_block != NULL) memset(resolver_block, 0x11, 1000);
  free(malloc(100));
  return Answer;
}
int IndirectAnswer(void) __attribute__((ifunc("ResolveAnswer")));

__attribute__((constructor(101))) static void Construct(void) {
  for (int i = 0; i < kBlocks; ++i) {
    blocks[i] = malloc((size_t)i * 40 + 1);
    REQUIRE(blocks[i] != NULL);
    memset(blocks[i], 0x22, (size_t)i * 40 + 1);
  }
  constructed = 1;
}

static void CheckFilled(const void* block, size_t size, unsigned char value) {
  REQUIRE(block != NULL);
  for (size_t i = 0; i < size; ++i) REQUIRE(((const unsigned char*)block)[i] == value);
}

int main(int argc, char** argv) {
  REQUIRE(argc == 2);
  REQUIRE(constructed);
  REQUIRE(IndirectAnswer() == 42);
  CheckFilled(resolver_block, 1000, 0x11);
  free(resolver_block);
  for (int i = 0; i < kBlocks; ++i) {
    CheckFilled(blocks[i], (size_t)i * 40 + 1, 0x22);
    CheckFilled(library_blocks[i], (size_t)i * 40 + 1, 0x33);
    blocks[i] = realloc(blocks[i], 5000);
    free(blocks[i]);
    free(library_blocks[i]);
  }
  for (int round = 0; round < 20; ++round) {
    void* plugin = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    REQUIRE(plugin != NULL);
    char* (*text)(void) = (char* (*)(void))dlsym(plugin, "PluginText");
    REQUIRE(text != NULL && strcmp(text(), "from the constructor") == 0);
    REQUIRE(dlclose(plugin) == 0);
  }
  REQUIRE(dlopen("/no/such/library", RTLD_NOW) == NULL && dlerror() != NULL);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) _exit(library_fork_handlers_ran == 2 ? 0 : 1);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child && status == 0);
  REQUIRE(library_fork_handlers_ran == 2);
  puts("ok");
  return 0;
}
