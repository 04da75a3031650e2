// Frees what must not be freed: `wrong_free KIND`. Nothing after it may run.
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "tests/runtime/programs/require.h"

static void* Hide(void* p) {
  __asm__ volatile("" : "+r"(p));
  return p;
}

int main(int argc, char** argv) {
  REQUIRE(argc == 2);
  const char* kind = argv[1];
  char* small = Hide(malloc(100));
  char* large = Hide(malloc(1 << 20));
  char* const small_again = Hide(small);
  char* const large_again = Hide(large);
  char on_stack[64];
  if (strcmp(kind, "double") == 0) {
    free(small);
    free(small_again);
  } else if (strcmp(kind, "double-large") == 0) {
    free(large);
    free(large_again);
  } else if (strcmp(kind, "stack") == 0) {
    free(Hide(on_stack + 16));
  } else if (strcmp(kind, "inside") == 0) {
    free(Hide(small + 16));
  } else if (strcmp(kind, "inside-large") == 0) {
    free(Hide(large + 4096));
  } else if (strcmp(kind, "mapped") == 0) {
    void* page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(page != MAP_FAILED);
    free(Hide(page));
  } else if (strcmp(kind, "realloc-foreign") == 0) {
    large = realloc(Hide(on_stack), 1000);
  } else if (strcmp(kind, "number") == 0) {
    free(Hide((void*)(uintptr_t)0x1000));
  }
  puts("still here");
  return 0;
}
