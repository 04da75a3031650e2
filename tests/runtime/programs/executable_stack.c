// Code on the stack of a thread, as nested functions of C have it: the program says that it needs stacks that can be
// executed.
#include <pthread.h>

#include "tests/runtime/programs/require.h"

#if defined(__x86_64__)
static const unsigned char return_42[] = {0xb8, 42, 0, 0, 0, 0xc3};  // mov $42, %eax; ret
#else
static const unsigned char return_42[] = {0x40, 0x05, 0x80, 0x52, 0xc0, 0x03, 0x5f, 0xd6};  // mov w0, #42; ret
#endif

static void* run(void* argument) {
  volatile unsigned char code[sizeof(return_42)] __attribute__((aligned(16)));
  for (unsigned i = 0; i < sizeof(return_42); ++i) code[i] = return_42[i];
  __builtin___clear_cache((char*)code, (char*)code + sizeof(code));
  int (*volatile function)(void) = (int (*)(void))(void*)code;
  REQUIRE(function() == 42);
  return argument;
}

int main(void) {
  int here = 0;
  pthread_t thread;
  void* result = 0;
  REQUIRE(pthread_create(&thread, 0, run, &here) == 0);
  REQUIRE(pthread_join(thread, &result) == 0 && result == &here);
  puts("ok");
  return 0;
}
