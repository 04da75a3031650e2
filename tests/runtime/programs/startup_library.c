// Its constructor runs before those of the program and, without help, before a preloaded library's;
// so its fork handlers would run after the shim's in a fork, when the heap must not be used any
// more.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { kBlocks = 200 };
void* library_blocks[kBlocks];
int library_fork_handlers_ran;

static void OnFork(void) {
  for (size_t size = 1; size < 3000000; size *= 3) free(malloc(size));
  ++library_fork_handlers_ran;
}

__attribute__((constructor(101))) static void Construct(void) {
  pthread_atfork(OnFork, OnFork, OnFork);
  for (int i = 0; i < kBlocks; ++i) {
    library_blocks[i] = malloc((size_t)i * 40 + 1);
    if (library_blocks[i] != NULL) memset(library_blocks[i], 0x33, (size_t)i * 40 + 1);
  }
}
