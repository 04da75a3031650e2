// Prints what malloc's family does in every case that the manual pages define: return values,
// errno, alignment, content. The test runs it against libc's own malloc and under the shim, and
// compares.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void __libc_free(void*);
extern void* __libc_memalign(size_t, size_t);
extern void* __libc_valloc(size_t);
extern void* __libc_pvalloc(size_t);

static const int kNoError = 77;  // what errno is set to before each call

// Keeps the compiler from knowing sizes, and from removing pairs of malloc and free.
static void* Hide(void* p) {
  __asm__ volatile("" : "+r"(p));
  return p;
}
static size_t HideSize(size_t n) {
  __asm__ volatile("" : "+r"(n));
  return n;
}

static const char* ErrnoName(void) {
  if (errno == kNoError) return "unchanged";
  if (errno == ENOMEM) return "ENOMEM";
  if (errno == EINVAL) return "EINVAL";
  return "other";
}

// Prints whether the call gave memory and what it did to errno; the errno of a success is not
// specified by C but programs rely on it being left alone.
#define SHOW(call)                                                                        \
  do {                                                                                    \
    errno = kNoError;                                                                     \
    void* result = Hide(call);                                                            \
    printf("%s: %s, errno %s\n", #call, result == NULL ? "null" : "memory", ErrnoName()); \
    free(result);                                                                         \
  } while (0)

static void Fail(const char* what, size_t size, size_t detail) {
  printf("WRONG: %s, size %zu, %zu\n", what, size, detail);
}

static int IsFilled(const unsigned char* p, size_t size, unsigned char value) {
  for (size_t i = 0; i < size; ++i) {
    if (p[i] != value) return 0;
  }
  return 1;
}

// The alignment that an object of `size` bytes may need.
static size_t NeededAlignment(size_t size) {
  size_t alignment = _Alignof(max_align_t);
  while (alignment > 1 && alignment > size) alignment /= 2;
  return alignment;
}

static void CheckBlock(const char* what, void* p, size_t size, size_t alignment) {
  if (p == NULL) {
    Fail(what, size, 0);
    return;
  }
  if ((uintptr_t)p % alignment != 0) Fail("alignment", size, alignment);
  const size_t usable = malloc_usable_size(p);
  if (usable < size) Fail("usable size", size, usable);
  memset(p, 0xa5, usable);  // all of it may be used
}

static const size_t kSizes[] = {
    0,      1,      7,      8,      15,      16,      17,      24,      32,      48,
    64,     100,    127,    128,    129,     255,     256,     1000,    1024,    2000,
    4095,   4096,   4097,   8192,   9999,    16384,   32768,   50000,   65536,   100000,
    131072, 200000, 262144, 524288, 1000000, 1048576, 2097152, 2097153, 5000000, 33554432};
enum { kSizeCount = sizeof(kSizes) / sizeof(kSizes[0]) };

static void CheckSizes(void) {
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < kSizeCount; ++i) {
      const size_t size = kSizes[i];
      void* p = Hide(malloc(size));
      CheckBlock("malloc", p, size, NeededAlignment(size));
      free(p);
      // Memory that was just written and freed must come back as zeroes.
      unsigned char* zeroed = Hide(calloc(1, size));
      if (!IsFilled(zeroed, size, 0)) Fail("calloc zeroes", size, 0);
      CheckBlock("calloc", zeroed, size, NeededAlignment(size));
      free(zeroed);
    }
  }
  puts("sizes: done");
}

static void CheckAlignments(void) {
  for (size_t alignment = 1; alignment <= 4u << 20; alignment *= 2) {
    for (int i = 0; i < kSizeCount; i += 3) {
      const size_t size = kSizes[i];
      if (size > 1u << 20 && alignment != 4096) continue;
      void* aligned = Hide(aligned_alloc(alignment, size));
      CheckBlock("aligned_alloc", aligned, size, alignment);
      void* other = Hide(memalign(alignment, size));
      CheckBlock("memalign", other, size, alignment);
      if (aligned == other) Fail("distinct", size, alignment);
      free(aligned);
      free(other);
      if (alignment < sizeof(void*)) continue;
      void* posix = NULL;
      if (posix_memalign(&posix, alignment, size) != 0) Fail("posix_memalign", size, alignment);
      CheckBlock("posix_memalign", posix, size, alignment);
      // What was aligned is reallocated and freed like the rest.
      posix = Hide(realloc(posix, size + 1));
      CheckBlock("realloc of aligned", posix, size + 1, NeededAlignment(size + 1));
      free(posix);
    }
  }
  void* page = Hide(valloc(100));
  CheckBlock("valloc", page, 100, 4096);
  free(page);
  page = Hide(pvalloc(100));
  CheckBlock("pvalloc", page, 4096, 4096);
  free(page);
  puts("alignments: done");
}

static void CheckRealloc(void) {
  for (int i = 0; i < kSizeCount; ++i) {
    for (int j = 0; j < kSizeCount; ++j) {
      const size_t from = kSizes[i], to = kSizes[j];
      if (to == 0 || from + to > 6u << 20) continue;
      if (from + to > 500000 && (i + j) % 7 != 0) continue;
      unsigned char* p = Hide(malloc(from));
      memset(p, 0x5a, from);
      p = Hide(realloc(p, to));
      const size_t kept = from < to ? from : to;
      if (!IsFilled(p, kept, 0x5a)) Fail("realloc content", from, to);
      CheckBlock("realloc", p, to, NeededAlignment(to));
      free(p);
    }
  }
  // Growth step by step, as a vector or a string buffer does it.
  unsigned char* p = NULL;
  for (size_t size = 1; size < 3u << 20; size += size / 3 + 1) {
    p = Hide(realloc(p, size));
    p[size - 1] = (unsigned char)size;
    if (p[0] != 1) Fail("growth", size, p[0]);
  }
  free(p);
  puts("realloc: done");
}

static void ShowFailures(void) {
  const size_t too_large = HideSize((size_t)PTRDIFF_MAX + 1);
  const size_t largest = HideSize(PTRDIFF_MAX);
  const size_t all = HideSize(SIZE_MAX);
  SHOW(malloc(too_large));
  SHOW(malloc(largest));
  SHOW(malloc(all));
  SHOW(calloc(all / 2, 3));
  SHOW(calloc(HideSize((size_t)1 << 32), HideSize((size_t)1 << 32)));
  SHOW(calloc(1, too_large));
  SHOW(calloc(all, all));
  SHOW(realloc(NULL, too_large));
  SHOW(reallocarray(NULL, all / 2, 3));
  SHOW(reallocarray(NULL, HideSize((size_t)1 << 32), HideSize((size_t)1 << 32)));
  SHOW(aligned_alloc(64, all));
  SHOW(aligned_alloc(4096, too_large));
  SHOW(memalign(64, all - 32));
  SHOW(memalign(4096, largest));
  SHOW(memalign(HideSize((size_t)1 << 62), HideSize((size_t)1 << 62)));
  SHOW(memalign(all, 1));
  SHOW(memalign(all / 2 + 2, 1));
  SHOW(valloc(all));
  SHOW(valloc(all - 4000));
  SHOW(pvalloc(all));
  SHOW(pvalloc(all - 4000));
  SHOW(__libc_malloc(too_large));
  SHOW(__libc_calloc(all / 2, 3));
  SHOW(__libc_realloc(NULL, too_large));
  SHOW(__libc_memalign(64, all));
  SHOW(__libc_valloc(all));
  SHOW(__libc_pvalloc(all));
}

static void ShowSuccesses(void) {
  SHOW(malloc(0));
  SHOW(malloc(1));
  SHOW(malloc(100000));
  SHOW(malloc(50 << 20));
  SHOW(calloc(0, 8));
  SHOW(calloc(8, 0));
  SHOW(calloc(0, 0));
  SHOW(calloc(1000, 1000));
  SHOW(realloc(NULL, 0));
  SHOW(realloc(NULL, 10));
  SHOW(reallocarray(NULL, 10, 10));
  SHOW(aligned_alloc(64, 0));
  SHOW(aligned_alloc(64, 65));
  SHOW(memalign(HideSize(0), 10));
  SHOW(memalign(1, 10));
  SHOW(memalign(HideSize(3), 10));
  SHOW(memalign(HideSize(48), 10));
  SHOW(valloc(0));
  SHOW(pvalloc(1));
  SHOW(__libc_malloc(10));
  SHOW(__libc_calloc(10, 10));
  SHOW(__libc_realloc(NULL, 10));
  SHOW(__libc_memalign(64, 10));
  SHOW(__libc_valloc(10));
  SHOW(__libc_pvalloc(10));
  void* a = Hide(malloc(0));
  void* b = Hide(malloc(0));
  printf("malloc(0) twice: %s\n", a != b ? "distinct" : "the same");
  free(a);
  free(b);
}

// realloc and reallocarray on live memory: failure leaves it alone, a size of zero frees it. The
// second name of the block keeps the compiler from warning of a use after realloc, which is the
// point here.
static void ShowReallocOfLive(void) {
  char* const p = Hide(malloc(100));
  char* const same = Hide(p);
  strcpy(p, "kept");
  errno = kNoError;
  const void* failed = Hide(realloc(p, HideSize((size_t)PTRDIFF_MAX + 1)));
  printf("realloc(p, PTRDIFF_MAX + 1): %s, errno %s, content %s\n",
         failed == NULL ? "null" : "memory", ErrnoName(), same);
  char* const still = Hide(same);
  errno = kNoError;
  failed = Hide(reallocarray(same, HideSize(SIZE_MAX / 2), 3));
  printf("reallocarray(p, overflow): %s, errno %s, content %s\n",
         failed == NULL ? "null" : "memory", ErrnoName(), still);
  errno = kNoError;
  const void* freed = Hide(realloc(still, HideSize(0)));
  printf("realloc(p, 0): %s, errno %s\n", freed == NULL ? "null" : "memory", ErrnoName());
  void* const other = Hide(malloc(100));
  errno = kNoError;
  freed = Hide(reallocarray(other, HideSize(0), 5));
  printf("reallocarray(p, 0, 5): %s, errno %s\n", freed == NULL ? "null" : "memory", ErrnoName());
  void* const large = Hide(malloc(1 << 20));
  errno = kNoError;
  freed = Hide(realloc(large, HideSize(0)));
  printf("realloc(large, 0): %s, errno %s\n", freed == NULL ? "null" : "memory", ErrnoName());
}

static void ShowPosixMemalign(void) {
  static const size_t kBad[] = {0, 1, 2, 3, 4, 6, 7, 9, 12, 24, 1000, 4097, SIZE_MAX};
  for (unsigned i = 0; i < sizeof(kBad) / sizeof(kBad[0]); ++i) {
    void* p = &p;
    errno = kNoError;
    const int result = posix_memalign(&p, HideSize(kBad[i]), 8);
    printf("posix_memalign(%zu): %s, errno %s, pointer %s\n", kBad[i],
           result == EINVAL ? "EINVAL" : "other", ErrnoName(), p == &p ? "unchanged" : "changed");
  }
  void* p = &p;
  const int result = posix_memalign(&p, 64, HideSize(SIZE_MAX));
  printf("posix_memalign(64, SIZE_MAX): %s, pointer %s\n", result == ENOMEM ? "ENOMEM" : "other",
         p == &p ? "unchanged" : "changed");
  errno = kNoError;
  const int zero = posix_memalign(&p, 64, 0);
  printf("posix_memalign(64, 0): %d, errno %s\n", zero, ErrnoName());
  free(p);
}

static void ShowFree(void) {
  errno = kNoError;
  free(NULL);
  printf("free(NULL): errno %s\n", ErrnoName());
  for (int i = 0; i < kSizeCount; ++i) {
    void* p = Hide(malloc(kSizes[i]));
    errno = kNoError;
    free(p);
    if (errno != kNoError) Fail("errno of free", kSizes[i], (size_t)errno);
  }
  printf("malloc_usable_size(NULL): %zu\n", malloc_usable_size(NULL));
  // Blocks of the twins and of the plain functions mix.
  free(Hide(__libc_malloc(10)));
  __libc_free(Hide(malloc(10)));
  void* p = Hide(__libc_realloc(Hide(malloc(10)), 5000));
  CheckBlock("twins mix", p, 5000, 16);
  free(p);
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
static struct mallinfo Mallinfo(void) { return mallinfo(); }
#pragma GCC diagnostic pop

static void ShowControls(void) {
  const int trimmed = malloc_trim(0);
  printf("malloc_trim: %s\n", trimmed == 0 || trimmed == 1 ? "0 or 1" : "other");
  printf("mallopt(M_TRIM_THRESHOLD): %d\n", mallopt(M_TRIM_THRESHOLD, 1 << 20));
  printf("mallopt(M_MMAP_THRESHOLD): %d\n", mallopt(M_MMAP_THRESHOLD, 1 << 20));
  printf("mallopt(M_ARENA_MAX): %d\n", mallopt(M_ARENA_MAX, 2));
  const size_t before = mallinfo2().uordblks + mallinfo2().hblkhd;
  void* p = Hide(malloc(3 << 20));
  const size_t during = mallinfo2().uordblks + mallinfo2().hblkhd;
  free(p);
  const size_t after = mallinfo2().uordblks + mallinfo2().hblkhd;
  printf("mallinfo2: %s\n",
         during - before >= 3u << 20 && during - before < 6u << 20 && after < during
             ? "follows"
             : "does not follow");
  const struct mallinfo small = Mallinfo();
  printf("mallinfo: %s\n", small.uordblks >= 0 ? "plausible" : "negative");
  char* text = NULL;
  size_t length = 0;
  FILE* stream = open_memstream(&text, &length);
  printf("malloc_info: %d\n", malloc_info(0, stream));
  fclose(stream);
  printf("malloc_info: %s\n",
         strncmp(text, "<malloc version=\"1\">", 20) == 0 && strstr(text, "</malloc>") != NULL
             ? "xml"
             : text);
  free(text);
  printf("malloc_info(1): %s\n", malloc_info(1, stdout) != 0 ? "refused" : "accepted");
}

int main(void) {
  setvbuf(stdout, NULL, _IOLBF, 0);
  CheckSizes();
  CheckAlignments();
  CheckRealloc();
  ShowFailures();
  ShowSuccesses();
  ShowReallocOfLive();
  ShowPosixMemalign();
  ShowFree();
  ShowControls();
  return 0;
}
