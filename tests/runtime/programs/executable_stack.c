// A nested function whose address is taken runs on the stack of the thread: the program says that it needs stacks that
// can be executed.
#include <pthread.h>

#include "tests/runtime/programs/require.h"

static int apply(int (*function)(int), int value) { return function(value); }

static void* run(void* argument) {
  int base = *(int*)argument;
  int add(int value) { return value + base; }
  int (*volatile function)(int) = add;
  REQUIRE(apply(function, 5) == base + 5);
  return argument;
}

int main(void) {
  int base = 37;
  pthread_t thread;
  void* result = 0;
  REQUIRE(pthread_create(&thread, 0, run, &base) == 0);
  REQUIRE(pthread_join(thread, &result) == 0 && result == &base);
  puts("ok");
  return 0;
}
