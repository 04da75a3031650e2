// What the shim has and this machine's libc lacks, or does otherwise: C23's sized frees, functions
// that old programs still ask for, and C17's rule for aligned_alloc.
#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>

#include "tests/runtime/programs/require.h"

extern void free_sized(void* p, size_t size);
extern void free_aligned_sized(void* p, size_t alignment, size_t size);
extern void cfree(void* p);
extern int __posix_memalign(void** result, size_t alignment, size_t size);

static size_t Hide(size_t n) {
  __asm__ volatile("" : "+r"(n));
  return n;
}

int main(void) {
  static const size_t kSizes[] = {0, 1, 8, 100, 1000, 10000, 100000, 1000000, 50000000};
  for (unsigned i = 0; i < sizeof(kSizes) / sizeof(kSizes[0]); ++i) {
    const size_t size = kSizes[i];
    for (int round = 0; round < 3; ++round) {
      errno = 77;
      free_sized(malloc(size), size);
      free_sized(calloc(1, size), size);
      free_sized(realloc(malloc(10), size + 1), size + 1);
      free_aligned_sized(aligned_alloc(256, size), 256, size);
      cfree(malloc(size));
      void* p = NULL;
      REQUIRE(__posix_memalign(&p, 512, size) == 0 && (uintptr_t)p % 512 == 0);
      free(p);
      REQUIRE(errno == 77);
    }
  }
  free_sized(NULL, 10);
  free_aligned_sized(NULL, 64, 10);
  cfree(NULL);
  static const size_t kBad[] = {0, 3, 24, SIZE_MAX};
  for (unsigned i = 0; i < sizeof(kBad) / sizeof(kBad[0]); ++i) {
    errno = 0;
    REQUIRE(aligned_alloc(Hide(kBad[i]), 100) == NULL && errno == EINVAL);
  }
  puts("ok");
  return 0;
}
