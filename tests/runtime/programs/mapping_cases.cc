// Prints what the mmap family does in the cases of its manual pages: results, errno, and what memory is like
// afterwards. The test runs it on the kernel's own and under the shim, and compares.
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <setjmp.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cstdlib>
#include <initializer_list>

#include "tests/runtime/programs/mapping_probe.h"

namespace {

constexpr int kAnonymous = MAP_PRIVATE | MAP_ANONYMOUS;
constexpr int kReadWrite = PROT_READ | PROT_WRITE;
constexpr int kUntouchedErrno = 77;
constexpr int kDontunmap = 4;
constexpr size_t kMiB = size_t{1} << 20;

AccessProbe* probe;

// Prints the result of a call that gives 0 or -1.
#define SHOW(call)                                                                     \
  do {                                                                                 \
    errno = kUntouchedErrno;                                                           \
    const int result = (call);                                                         \
    printf("  %s: %d %s\n", #call, result,                                             \
           errno == kUntouchedErrno ? "untouched" : ErrorName(errno));                 \
  } while (0)

// And of one that gives an address: relative to `base`, if it is near there.
#define SHOW_ADDRESS(base, call)                                                         \
  ({                                                                                     \
    errno = kUntouchedErrno;                                                             \
    void* result = (call);                                                               \
    const int error = errno;                                                             \
    printf("  %s: ", #call);                                                             \
    PrintAddress(base, result);                                                          \
    printf(" %s\n", error == kUntouchedErrno ? "untouched" : ErrorName(error));          \
    result;                                                                              \
  })

void PrintAddress(void* base, void* result) {
  const long pages = (static_cast<char*>(result) - static_cast<char*>(base)) / static_cast<long>(kPage);
  if (result == MAP_FAILED) {
    printf("failed");
  } else if (base != nullptr && 0 <= pages && pages < 16) {
    printf("page %ld", pages);
  } else {
    printf("elsewhere");
  }
}

void ShowPages(void* base, size_t count) {
  printf("  pages:");
  for (size_t i = 0; i < count; ++i) {
    char text[16];
    DescribePage(*probe, At(base, i), text, sizeof(text));
    printf(" %s", text);
  }
  printf("\n");
}

void Fill(void* base, size_t first, size_t count, int value) { memset(At(base, first), value, count * kPage); }

char* MapPages(size_t count, int protection = kReadWrite) {
  void* p = mmap(nullptr, count * kPage, protection, kAnonymous, -1, 0);
  REQUIRE(p != MAP_FAILED);
  return static_cast<char*>(p);
}

bool IsZero(const char* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    if (p[i] != 0) return false;
  }
  return true;
}

// A file of `pages` pages, each filled with its number and one.
int MakeFile(size_t pages, int flags = O_RDWR) {
  char path[] = "/tmp/freehold-mapping-XXXXXX";
  int file = mkstemp(path);
  REQUIRE(file >= 0);
  char page[kPage];
  for (size_t i = 0; i < pages; ++i) {
    memset(page, static_cast<int>(i + 1), sizeof(page));
    REQUIRE(write(file, page, sizeof(page)) == static_cast<ssize_t>(sizeof(page)));
  }
  const int reopened = open(path, flags);
  REQUIRE(reopened >= 0);
  unlink(path);
  close(file);
  return reopened;
}

void Refusals() {
  char* p = MapPages(4);
  SHOW_ADDRESS(p, mmap(nullptr, 0, kReadWrite, kAnonymous, -1, 0));
  SHOW_ADDRESS(p, mmap(nullptr, SIZE_MAX, kReadWrite, kAnonymous, -1, 0));
  SHOW_ADDRESS(p, mmap(nullptr, size_t{1} << 60, kReadWrite, kAnonymous, -1, 0));
  SHOW_ADDRESS(p, mmap(nullptr, kPage, kReadWrite, MAP_ANONYMOUS, -1, 0));
  SHOW_ADDRESS(p, mmap(nullptr, kPage, kReadWrite, kAnonymous, -1, 1));
  SHOW_ADDRESS(p, mmap(nullptr, kPage, kReadWrite, MAP_PRIVATE, -1, 0));
  SHOW_ADDRESS(p, mmap(nullptr, kPage, kReadWrite, MAP_PRIVATE, 1000, 0));
  SHOW_ADDRESS(p, mmap(p + 1, kPage, kReadWrite, kAnonymous | MAP_FIXED, -1, 0));
  SHOW_ADDRESS(p, mmap(p, kPage, kReadWrite, MAP_PRIVATE | MAP_FIXED, -1, 0));
  SHOW_ADDRESS(p, mmap(p, size_t{1} << 50, kReadWrite, kAnonymous | MAP_FIXED, -1, 0));
  SHOW_ADDRESS(p, mmap(p, kPage, kReadWrite, kAnonymous | MAP_FIXED_NOREPLACE, -1, 0));
  SHOW(munmap(p + 1, kPage));
  SHOW(munmap(p, 0));
  SHOW(munmap(p, SIZE_MAX));
  SHOW(munmap(p, size_t{1} << 50));
  SHOW(mprotect(p + 1, kPage, PROT_READ));
  SHOW(mprotect(p, 0, PROT_READ));
  SHOW(mprotect(p, SIZE_MAX - kPage, PROT_READ));
  SHOW(mprotect(p, kPage, 0x40));
  SHOW(mprotect(p, kPage, PROT_READ | PROT_GROWSDOWN));
  SHOW(mprotect(p, kPage, PROT_READ | PROT_GROWSDOWN | PROT_GROWSUP));
  SHOW(madvise(p + 1, kPage, MADV_NORMAL));
  SHOW(madvise(p, 0, MADV_DONTNEED));
  SHOW(madvise(p, 0, 9999));
  SHOW(madvise(p, kPage, 9999));
  SHOW(madvise(p, SIZE_MAX - kPage, MADV_NORMAL));
  SHOW(posix_madvise(p, kPage, 9999));
  SHOW(posix_madvise(p + 1, kPage, POSIX_MADV_NORMAL));
  SHOW(msync(p + 1, kPage, MS_SYNC));
  SHOW(msync(p, kPage, MS_SYNC | MS_ASYNC));
  SHOW(msync(p, kPage, 64));
  SHOW(msync(p, 0, MS_SYNC));
  SHOW(mlock2(p, kPage, 2));
  SHOW(mlock(p, 0));
  SHOW(mlock(p, SIZE_MAX));
  SHOW(mlockall(0));
  SHOW(mlockall(MCL_ONFAULT));
  SHOW(mlockall(64));
  unsigned char resident[8];
  SHOW(mincore(p + 1, kPage, resident));
  SHOW(mincore(p, 0, resident));
  SHOW(mincore(p, kPage, nullptr));
  SHOW(mincore(p, SIZE_MAX - kPage, resident));
  Fill(p, 0, 4, 0x55);
  ShowPages(p, 4);
  SHOW(munmap(p, 4 * kPage));
}

void Anonymous() {
  char* p = MapPages(16);
  printf("  zero: %d\n", IsZero(p, 16 * kPage));
  Fill(p, 0, 16, 0xaa);
  SHOW(munmap(p + 4 * kPage, 4 * kPage));
  SHOW(munmap(p + 4 * kPage, 4 * kPage));
  ShowPages(p, 16);
  SHOW_ADDRESS(p, mmap(p + 4 * kPage, 2 * kPage, kReadWrite, kAnonymous | MAP_FIXED_NOREPLACE, -1, 0));
  SHOW_ADDRESS(p, mmap(p + 5 * kPage, 2 * kPage, kReadWrite, kAnonymous | MAP_FIXED_NOREPLACE, -1, 0));
  ShowPages(p, 16);
  SHOW_ADDRESS(p, mmap(p + 2 * kPage, 8 * kPage, PROT_READ, kAnonymous | MAP_FIXED, -1, 0));
  ShowPages(p, 16);
  SHOW_ADDRESS(p, mmap(p + 3 * kPage, 100, kReadWrite, kAnonymous | MAP_FIXED, -1, 0));
  ShowPages(p, 16);
  SHOW(munmap(p + kPage, 1));
  ShowPages(p, 4);
  SHOW(munmap(p, 16 * kPage));
  // Memory that was used before comes back zeroed.
  for (int i = 0; i < 200; ++i) {
    char* q = MapPages(8);
    REQUIRE(IsZero(q, 8 * kPage));
    Fill(q, 0, 8, i + 1);
    REQUIRE(munmap(q, 8 * kPage) == 0);
  }
  // A length that is no number of pages.
  char* odd = static_cast<char*>(mmap(nullptr, 5000, kReadWrite, kAnonymous, -1, 0));
  odd[8191] = 1;
  SHOW(munmap(odd, 4097));
}

void Flags() {
  const int flags[] = {MAP_NORESERVE, MAP_STACK, MAP_POPULATE, MAP_POPULATE | MAP_NONBLOCK, MAP_LOCKED,
                       MAP_DENYWRITE, MAP_EXECUTABLE, MAP_32BIT, MAP_GROWSDOWN, MAP_NORESERVE | MAP_STACK};
  for (const int flag : flags) {
    char* p = static_cast<char*>(mmap(nullptr, 8 * kPage, kReadWrite, kAnonymous | flag, -1, 0));
    printf("  flags %x: %s", static_cast<unsigned>(flag), p == MAP_FAILED ? ErrorName(errno) : "mapped");
    if (p != MAP_FAILED) {
      unsigned char resident[8] = {};
      mincore(p, 8 * kPage, resident);
      int count = 0;
      for (const unsigned char one : resident) count += one & 1;
      // What nobody asked to have present may be so all the same.
      const int asked = (flag & (MAP_POPULATE | MAP_LOCKED)) != 0 && (flag & MAP_NONBLOCK) == 0 ? count : 0;
      REQUIRE(IsZero(p, 8 * kPage));
      Fill(p, 0, 8, 1);
      printf(", %d resident, low %d, unmap %d", asked, reinterpret_cast<uintptr_t>(p) >> 32 == 0,
             munmap(p, 8 * kPage));
    }
    printf("\n");
  }
  char* shared = static_cast<char*>(mmap(nullptr, 4 * kPage, kReadWrite, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  REQUIRE(shared != MAP_FAILED);
  if (fork() == 0) {
    shared[0] = 42;
    _exit(0);
  }
  wait(nullptr);
  printf("  shared: %d\n", shared[0]);
  SHOW(munmap(shared, 4 * kPage));
  SHOW_ADDRESS(nullptr, mmap(nullptr, 2 * kMiB, kReadWrite, kAnonymous | MAP_HUGETLB, -1, 0));
  SHOW_ADDRESS(nullptr, mmap(nullptr, kPage, kReadWrite, MAP_SHARED_VALIDATE | MAP_ANONYMOUS, -1, 0));
}

void Sparse() {
  for (const size_t size : {size_t{1} << 36, size_t{1} << 39, size_t{1} << 42}) {
    char* p = static_cast<char*>(mmap(nullptr, size, kReadWrite, kAnonymous | MAP_NORESERVE, -1, 0));
    printf("  %zx: %s\n", size, p == MAP_FAILED ? ErrorName(errno) : "mapped");
    if (p == MAP_FAILED) continue;
    p[0] = 1;
    p[size / 2] = 2;
    p[size - 1] = 3;
    printf("  %d %d %d %d\n", p[0], p[size / 2], p[size - 1], p[size / 4]);
    SHOW(munmap(p, size));
  }
}

void ReserveAndCommit() {
  char* p = MapPages(64, PROT_NONE);
  SHOW(mprotect(p + 8 * kPage, 8 * kPage, kReadWrite));
  Fill(p, 8, 8, 0x11);
  ShowPages(p + 6 * kPage, 12);
  SHOW(mprotect(p + 10 * kPage, 2 * kPage, PROT_READ));
  SHOW(mprotect(p + 12 * kPage, 2 * kPage, PROT_NONE));
  ShowPages(p + 6 * kPage, 12);
  // Decommit, in the three ways that allocators use.
  SHOW(madvise(p + 8 * kPage, 2 * kPage, MADV_DONTNEED));
  SHOW_ADDRESS(p, mmap(p + 14 * kPage, 2 * kPage, PROT_NONE, kAnonymous | MAP_FIXED | MAP_NORESERVE, -1, 0));
  SHOW(mprotect(p + 8 * kPage, 8 * kPage, kReadWrite));
  ShowPages(p + 6 * kPage, 12);
  SHOW(munmap(p, 64 * kPage));
  // Protections of memory that began as readable and writable.
  char* q = MapPages(16);
  Fill(q, 0, 16, 0x22);
  SHOW(mprotect(q + 3 * kPage, 4 * kPage, PROT_NONE));
  SHOW(mprotect(q + 5 * kPage, kPage, PROT_READ));
  SHOW(mprotect(q + 5 * kPage, kPage, PROT_READ | PROT_EXEC));
  SHOW(mprotect(q + 6 * kPage, kPage, kReadWrite | PROT_EXEC));
  ShowPages(q, 16);
  SHOW(munmap(q + 4 * kPage, 2 * kPage));
  SHOW(mprotect(q + 2 * kPage, 8 * kPage, PROT_READ));
  ShowPages(q, 16);
  SHOW(munmap(q, 16 * kPage));
  for (int i = 0; i < 50; ++i) {
    char* again = MapPages(16);
    REQUIRE(IsZero(again, 16 * kPage));
    Fill(again, 0, 16, 0x33);
    REQUIRE(mprotect(again + kPage, kPage, PROT_NONE) == 0);
    REQUIRE(munmap(again, 16 * kPage) == 0);
  }
}

void Keys() {
  char* p = MapPages(8);
  Fill(p, 0, 8, 0x12);
  SHOW(pkey_mprotect(p, kPage, PROT_READ, -1));
  SHOW(pkey_mprotect(p + kPage, kPage, PROT_READ, 9999));
  SHOW(pkey_mprotect(p + 1, kPage, PROT_READ, 0));
  SHOW(pkey_mprotect(p + 2 * kPage, kPage, PROT_READ, 0));
  ShowPages(p, 8);
  const int key = pkey_alloc(0, 0);
  if (key > 0) {
    SHOW(pkey_mprotect(p + 3 * kPage, 2 * kPage, kReadWrite, key));
    SHOW(pkey_set(key, PKEY_DISABLE_ACCESS));
    ShowPages(p, 8);
    SHOW(pkey_set(key, 0));
    ShowPages(p, 8);
    SHOW(mprotect(p + 4 * kPage, kPage, PROT_READ));
    ShowPages(p, 8);
    SHOW(pkey_set(key, PKEY_DISABLE_ACCESS));
  }
  SHOW(munmap(p, 8 * kPage));
  // Without the key, or a protection.
  for (int i = 0; i < 20; ++i) {
    char* q = MapPages(8);
    REQUIRE(IsZero(q, 8 * kPage));
    Fill(q, 0, 8, 0x13);
    REQUIRE(munmap(q, 8 * kPage) == 0);
  }
  if (key > 0) SHOW(pkey_free(key));
}

void Code() {
#if defined(__x86_64__)
  const unsigned char code[] = {0xb8, 0x2a, 0x00, 0x00, 0x00, 0xc3};  // mov eax, 42; ret
#else
  const unsigned char code[] = {0x40, 0x05, 0x80, 0x52, 0xc0, 0x03, 0x5f, 0xd6};
#endif
  char* p = MapPages(2);
  memcpy(p, code, sizeof(code));
  SHOW(mprotect(p, kPage, PROT_READ | PROT_EXEC));
  __builtin___clear_cache(p, p + sizeof(code));
  printf("  %d\n", reinterpret_cast<int (*)()>(p)());
  SHOW(munmap(p, 2 * kPage));
  char* q = MapPages(2, kReadWrite | PROT_EXEC);
  memcpy(q, code, sizeof(code));
  __builtin___clear_cache(q, q + sizeof(code));
  printf("  %d\n", reinterpret_cast<int (*)()>(q)());
  SHOW(munmap(q, 2 * kPage));
}

void Hints() {
  char* p = MapPages(32);
  REQUIRE(munmap(p + 8 * kPage, 8 * kPage) == 0);
  SHOW_ADDRESS(p, mmap(p + 8 * kPage, 2 * kPage, kReadWrite, kAnonymous, -1, 0));
  char* taken = static_cast<char*>(SHOW_ADDRESS(nullptr, mmap(p, 2 * kPage, kReadWrite, kAnonymous, -1, 0)));
  printf("  elsewhere: %d\n", taken != p);
  SHOW(munmap(taken, 2 * kPage));
  // Far from everything: followed.
  char* far = reinterpret_cast<char*>(uintptr_t{0x100000000000});
  SHOW_ADDRESS(far, mmap(far, 2 * kPage, kReadWrite, kAnonymous, -1, 0));
  SHOW_ADDRESS(far, mmap(far + 3 * kPage, kPage, kReadWrite, kAnonymous | MAP_FIXED, -1, 0));
  SHOW_ADDRESS(far, mmap(far, kPage, kReadWrite, kAnonymous | MAP_FIXED_NOREPLACE, -1, 0));
  ShowPages(far, 4);
  SHOW(munmap(far, 4 * kPage));
  SHOW(munmap(p, 32 * kPage));
}

void Remaps() {
  // Between pages that stay, so that nothing else comes here.
  char* all = MapPages(48);
  char* p = At(all, 16);
  for (size_t i = 0; i < 16; ++i) Fill(p, i, 1, static_cast<int>(i + 1));
  SHOW_ADDRESS(p, mremap(p, 16 * kPage, 12 * kPage, 0));
  ShowPages(p, 16);
  SHOW_ADDRESS(p, mremap(p, 12 * kPage, 16 * kPage, 0));
  ShowPages(p, 16);
  SHOW_ADDRESS(p, mremap(p, 4 * kPage, 8 * kPage, 0));
  SHOW_ADDRESS(p, mremap(p, 0, kPage, MREMAP_MAYMOVE));
  SHOW_ADDRESS(p, mremap(p, kPage, 0, MREMAP_MAYMOVE));
  SHOW_ADDRESS(p, mremap(p + 1, kPage, kPage, MREMAP_MAYMOVE));
  SHOW_ADDRESS(p, mremap(p, kPage, kPage, 128));
  SHOW_ADDRESS(p, mremap(p, kPage, kPage, MREMAP_FIXED, p + 8 * kPage));
  SHOW_ADDRESS(p, mremap(p, kPage, kPage, kDontunmap));
  SHOW_ADDRESS(p, mremap(p, kPage, 2 * kPage, kDontunmap | MREMAP_MAYMOVE));
  SHOW_ADDRESS(p, mremap(p, 4 * kPage, 4 * kPage, MREMAP_MAYMOVE | MREMAP_FIXED, p + 2 * kPage));
  SHOW_ADDRESS(p, mremap(p, 4 * kPage, 4 * kPage, MREMAP_MAYMOVE | MREMAP_FIXED, p + 8 * kPage + 1));
  SHOW_ADDRESS(p, mremap(p, 2 * kPage, 2 * kPage, MREMAP_MAYMOVE | MREMAP_FIXED, p + 8 * kPage));
  ShowPages(p, 16);
  SHOW_ADDRESS(p, mremap(p, 2 * kPage, 2 * kPage, MREMAP_MAYMOVE));
  char* moved = static_cast<char*>(SHOW_ADDRESS(p, mremap(p + 2 * kPage, 2 * kPage, 600 * kPage, MREMAP_MAYMOVE)));
  ShowPages(moved, 4);
  ShowPages(p, 16);
  SHOW_ADDRESS(p, mremap(moved, 600 * kPage, 3 * kPage, MREMAP_MAYMOVE | MREMAP_FIXED, p));
  ShowPages(p, 16);
  char* kept = static_cast<char*>(SHOW_ADDRESS(p, mremap(p, 2 * kPage, 2 * kPage, MREMAP_MAYMOVE | kDontunmap, nullptr)));
  ShowPages(p, 4);
  ShowPages(kept, 2);
  SHOW(munmap(kept, 2 * kPage));
  SHOW(munmap(all, 48 * kPage));
  // Through a protection, and large enough for the kernel to move page tables.
  char* large = MapPages(512);
  Fill(large, 0, 512, 0x66);
  SHOW(mprotect(large, 512 * kPage, PROT_READ));
  char* grown = static_cast<char*>(SHOW_ADDRESS(nullptr, mremap(large, 512 * kPage, 1024 * kPage, MREMAP_MAYMOVE)));
  ShowPages(grown + 510 * kPage, 4);
  SHOW(munmap(grown, 1024 * kPage));
  // What is mapped far away comes here, and goes back.
  char* far = reinterpret_cast<char*>(uintptr_t{0x110000000000});
  char* here = MapPages(8);
  SHOW_ADDRESS(far, mmap(far, 4 * kPage, kReadWrite, kAnonymous | MAP_FIXED, -1, 0));
  Fill(far, 0, 4, 0x77);
  SHOW_ADDRESS(here, mremap(far, 4 * kPage, 4 * kPage, MREMAP_MAYMOVE | MREMAP_FIXED, here + 2 * kPage));
  ShowPages(here, 8);
  ShowPages(far, 4);
  SHOW(mprotect(here + 3 * kPage, kPage, PROT_READ));
  ShowPages(here, 8);
  SHOW_ADDRESS(far, mremap(here, 2 * kPage, 4 * kPage, MREMAP_MAYMOVE | MREMAP_FIXED, far));
  ShowPages(here, 8);
  ShowPages(far, 4);
  SHOW_ADDRESS(far, mremap(here + 6 * kPage, 2 * kPage, kPage, MREMAP_MAYMOVE | MREMAP_FIXED, far + kPage));
  ShowPages(here, 8);
  ShowPages(far, 4);
  SHOW(munmap(here, 8 * kPage));
  SHOW(munmap(far, 4 * kPage));
  SHOW_ADDRESS(here, mremap(here, kPage, 2 * kPage, MREMAP_MAYMOVE));
}

void AdviseAll() {
  char* p = MapPages(8);
  Fill(p, 0, 8, 0x44);
  SHOW(madvise(p + 2 * kPage, 2 * kPage, MADV_DONTNEED));
  SHOW(madvise(p + 5 * kPage, 1, MADV_DONTNEED));
  ShowPages(p, 8);
  SHOW(munmap(p + 4 * kPage, kPage));
  SHOW(madvise(p, 8 * kPage, MADV_DONTNEED));
  ShowPages(p, 8);
  SHOW(munmap(p, 8 * kPage));
  const int advices[] = {MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_DONTNEED, MADV_FREE,
                         MADV_REMOVE, MADV_DONTFORK, MADV_DOFORK, MADV_MERGEABLE, MADV_UNMERGEABLE, MADV_HUGEPAGE,
                         MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_DODUMP, MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_COLD,
                         MADV_PAGEOUT, 22, 23, 24, 102, 103};
  for (const int advice : advices) {
    char* q = MapPages(8);
    Fill(q, 0, 8, 0x45);
    const int whole = madvise(q, 8 * kPage, advice);
    const int error = whole == 0 ? 0 : errno;
    REQUIRE(munmap(q + 6 * kPage, kPage) == 0);
    const int hole = madvise(q + 4 * kPage, 4 * kPage, advice);
    const int hole_error = hole == 0 ? 0 : errno;
    REQUIRE(mprotect(q, kPage, PROT_NONE) == 0);
    const int none = madvise(q, kPage, advice);
    const int none_error = none == 0 ? 0 : errno;
    printf("  advice %d: %s, with a hole %s, no access %s\n", advice, ErrorName(error), ErrorName(hole_error),
           ErrorName(none_error));
    REQUIRE(munmap(q, 8 * kPage) == 0);
    // Nothing of it is left.
    char* again = MapPages(8);
    REQUIRE(IsZero(again, 8 * kPage));
    Fill(again, 0, 8, 0x46);
    const pid_t child = fork();
    if (child == 0) _exit(again[0] == 0x46 && again[7 * kPage] == 0x46 ? 0 : 1);
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child && status == 0);
    REQUIRE(munmap(again, 8 * kPage) == 0);
  }
  const int posix[] = {POSIX_MADV_NORMAL, POSIX_MADV_RANDOM, POSIX_MADV_SEQUENTIAL, POSIX_MADV_WILLNEED,
                       POSIX_MADV_DONTNEED};
  char* q = MapPages(2);
  Fill(q, 0, 2, 0x47);
  for (const int advice : posix) SHOW(posix_madvise(q, 2 * kPage, advice));
  ShowPages(q, 2);
  SHOW(munmap(q, 2 * kPage));
}

void Forks() {
  char* p = MapPages(8);
  Fill(p, 0, 8, 0x48);
  SHOW(madvise(p, 2 * kPage, MADV_WIPEONFORK));
  SHOW(madvise(p + 2 * kPage, 2 * kPage, MADV_DONTFORK));
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    const bool wiped = p[0] == 0 && p[kPage] == 0;
    const bool kept = p[4 * kPage] == 0x48 && p[7 * kPage] == 0x48;
    const bool left_out = !probe->CanRead(p + 2 * kPage);
    char* q = MapPages(16);
    const bool zero = IsZero(q, 16 * kPage);
    Fill(q, 0, 16, 1);
    const bool done = munmap(q, 16 * kPage) == 0 && munmap(p, 8 * kPage) == 0;
    printf("  child: %d %d %d %d %d\n", wiped, kept, left_out, zero, done);
    fflush(stdout);
    _exit(0);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  printf("  status %d\n", status);
  ShowPages(p, 8);
  SHOW(munmap(p, 8 * kPage));
  // A child that shares all memory, until it ends.
  char* shared = MapPages(4);
  const pid_t borrowed = vfork();
  if (borrowed == 0) {
    munmap(shared + kPage, kPage);
    _exit(3);
  }
  REQUIRE(waitpid(borrowed, &status, 0) == borrowed);
  printf("  vfork: %d\n", WEXITSTATUS(status));
  ShowPages(shared, 4);
  SHOW(munmap(shared, 4 * kPage));
}

void Locks() {
  char* p = MapPages(8);
  SHOW(mlock(p + 100, kPage));
  unsigned char resident[8];
  SHOW(mincore(p, 8 * kPage, resident));
  // The locked ones; the others may be present too.
  printf("  %d %d\n", resident[0] & 1, resident[1] & 1);
  SHOW(mlock2(p + 4 * kPage, kPage, MLOCK_ONFAULT));
  SHOW(madvise(p, kPage, MADV_DONTNEED));
  SHOW(msync(p, kPage, MS_SYNC | MS_INVALIDATE));
  SHOW(munlock(p, 8 * kPage));
  SHOW(madvise(p, kPage, MADV_DONTNEED));
  SHOW(msync(p, kPage, MS_SYNC | MS_INVALIDATE));
  SHOW(munmap(p + 2 * kPage, kPage));
  SHOW(mlock(p, 4 * kPage));
  SHOW(munlock(p, 4 * kPage));
  SHOW(mprotect(p, kPage, PROT_NONE));
  SHOW(mlock(p, kPage));
  SHOW(munlock(p, kPage));
  SHOW(munmap(p, 8 * kPage));
  SHOW(mlock(p, kPage));
  SHOW(munlock(p, kPage));
  SHOW(mlockall(MCL_FUTURE | MCL_ONFAULT));
  char* later = MapPages(4);
  SHOW(madvise(later, kPage, MADV_DONTNEED));
  SHOW(munlockall());
  SHOW(madvise(later, kPage, MADV_DONTNEED));
  SHOW(munmap(later, 4 * kPage));
}

void Files() {
  for (const int mode : {O_RDONLY, O_RDWR}) {
    const int file = MakeFile(8, mode);
    for (const int type : {MAP_PRIVATE, MAP_SHARED}) {
      for (const int protection : {PROT_NONE, PROT_READ, kReadWrite}) {
        printf("  mode %d type %d protection %d\n", mode, type, protection);
        char* p = static_cast<char*>(
            SHOW_ADDRESS(nullptr, mmap(nullptr, 4 * kPage, protection, type, file, 2 * kPage)));
        if (p == MAP_FAILED) continue;
        ShowPages(p, 4);
        SHOW(mprotect(p + kPage, kPage, kReadWrite));
        SHOW(mprotect(p + 2 * kPage, kPage, PROT_READ | PROT_EXEC));
        ShowPages(p, 4);
        if (mode == O_RDWR && (protection & PROT_WRITE) != 0) Fill(p, 0, 1, 0x50);
        SHOW(msync(p, 4 * kPage, MS_SYNC));
        SHOW(msync(p, 4 * kPage, MS_ASYNC | MS_INVALIDATE));
        SHOW(madvise(p, 4 * kPage, MADV_RANDOM));
        SHOW(madvise(p, 4 * kPage, MADV_WILLNEED));
        SHOW(madvise(p, kPage, MADV_DONTNEED));
        SHOW(madvise(p, kPage, MADV_FREE));
        ShowPages(p, 4);
        char* moved = static_cast<char*>(SHOW_ADDRESS(nullptr, mremap(p, 4 * kPage, 4 * kPage, MREMAP_MAYMOVE)));
        SHOW(munmap(moved + kPage, kPage));
        ShowPages(moved, 4);
        SHOW(msync(moved, 4 * kPage, MS_SYNC));
        SHOW(munmap(moved, 4 * kPage));
      }
    }
    close(file);
  }
  const int file = MakeFile(2, O_RDONLY);
  SHOW_ADDRESS(nullptr, mmap(nullptr, kPage, PROT_READ, MAP_PRIVATE, file, 1));
  SHOW_ADDRESS(nullptr, mmap(nullptr, kPage, PROT_READ, MAP_PRIVATE, file, static_cast<off_t>(SIZE_MAX - kPage + 1)));
  SHOW_ADDRESS(nullptr, mmap(nullptr, 4 * kPage, PROT_READ, 0, file, 0));
  for (int i = 0; i < 20; ++i) {
    char* p = static_cast<char*>(mmap(nullptr, 2 * kPage, PROT_READ, MAP_SHARED, file, 0));
    REQUIRE(p != MAP_FAILED && p[0] == 1 && p[kPage] == 2);
    REQUIRE(munmap(p, 2 * kPage) == 0);
  }
  close(file);
  const int directory = open("/tmp", O_RDONLY);
  SHOW_ADDRESS(nullptr, mmap(nullptr, kPage, PROT_READ, MAP_PRIVATE, directory, 0));
  close(directory);
  const int written = open("/dev/null", O_WRONLY);
  SHOW_ADDRESS(nullptr, mmap(nullptr, kPage, PROT_READ, MAP_PRIVATE, written, 0));
  close(written);
  const int zero = open("/dev/zero", O_RDWR);
  char* zeroes = static_cast<char*>(SHOW_ADDRESS(nullptr, mmap(nullptr, kPage, kReadWrite, MAP_PRIVATE, zero, 0)));
  Fill(zeroes, 0, 1, 1);
  SHOW(munmap(zeroes, kPage));
  close(zero);
}

// Over memory that is served otherwise.
void FilesInPlace() {
  const int file = MakeFile(16);
  char* p = MapPages(16);
  Fill(p, 0, 16, 0xee);
  SHOW_ADDRESS(p, mmap(p + 2 * kPage, 4 * kPage, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, 4 * kPage));
  SHOW_ADDRESS(p, mmap(p + 7 * kPage, 2 * kPage, kReadWrite, MAP_SHARED | MAP_FIXED, file, 0));
  SHOW_ADDRESS(p, mmap(p + 10 * kPage, 2 * kPage, kReadWrite, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
  ShowPages(p, 16);
  SHOW_ADDRESS(p, mmap(p, kPage, PROT_READ, MAP_PRIVATE | MAP_FIXED, 1000, 0));
  SHOW_ADDRESS(p, mmap(p + 3 * kPage, kPage, PROT_READ, MAP_PRIVATE | MAP_FIXED_NOREPLACE, file, 0));
  ShowPages(p, 16);
  Fill(p, 7, 1, 0x99);
  char first = 0;
  REQUIRE(pread(file, &first, 1, 0) == 1);
  printf("  in the file: %02x\n", static_cast<unsigned char>(first));
  SHOW(msync(p, 16 * kPage, MS_SYNC));
  SHOW(mprotect(p + 2 * kPage, 8 * kPage, kReadWrite));
  ShowPages(p, 16);
  SHOW(madvise(p, 16 * kPage, MADV_DONTNEED));
  ShowPages(p, 16);
  SHOW(mlock(p, 16 * kPage));
  SHOW(munlock(p, 16 * kPage));
  SHOW_ADDRESS(p, mremap(p + 7 * kPage, 2 * kPage, 2 * kPage, MREMAP_MAYMOVE | MREMAP_FIXED, p + 13 * kPage));
  ShowPages(p, 16);
  char* dup = static_cast<char*>(SHOW_ADDRESS(nullptr, mremap(p + 13 * kPage, 0, kPage, MREMAP_MAYMOVE)));
  ShowPages(dup, 1);
  SHOW(munmap(dup, kPage));
  char* grown = static_cast<char*>(SHOW_ADDRESS(nullptr, mremap(p + 13 * kPage, 2 * kPage, 64 * kPage, MREMAP_MAYMOVE)));
  ShowPages(grown, 8);
  ShowPages(p, 16);
  SHOW(munmap(grown, 64 * kPage));
  const pid_t child = fork();
  if (child == 0) {
    p[10 * kPage] = 0x31;
    _exit(0);
  }
  REQUIRE(waitpid(child, nullptr, 0) == child);
  printf("  from the child: %02x\n", static_cast<unsigned char>(p[10 * kPage]));
  SHOW_ADDRESS(p, mmap(p + kPage, 12 * kPage, kReadWrite, kAnonymous | MAP_FIXED, -1, 0));
  ShowPages(p, 16);
  SHOW(munmap(p, 16 * kPage));
  char* q = MapPages(16);
  printf("  zero: %d\n", IsZero(q, 16 * kPage));
  Fill(q, 0, 16, 1);
  SHOW(munmap(q, 16 * kPage));
  close(file);
  // A ring: the same pages twice, side by side.
  const int ring = memfd_create("ring", 0);
  REQUIRE(ring >= 0 && ftruncate(ring, 4 * kPage) == 0);
  char* r = MapPages(8, PROT_NONE);
  SHOW_ADDRESS(r, mmap(r, 4 * kPage, kReadWrite, MAP_SHARED | MAP_FIXED, ring, 0));
  SHOW_ADDRESS(r, mmap(r + 4 * kPage, 4 * kPage, kReadWrite, MAP_SHARED | MAP_FIXED, ring, 0));
  strcpy(r + 4 * kPage - 4, "wrapped");
  printf("  %s\n", r + 4 * kPage - 4);
  printf("  %c%c%c\n", r[0], r[1], r[2]);
  SHOW(munmap(r, 8 * kPage));
  close(ring);
}

// Ranges with parts on both sides of wherever this library's memory ends: of neighbours far away and here.
void AcrossEverything() {
  char* far = reinterpret_cast<char*>(uintptr_t{0x120000000000});
  char* p = MapPages(4);
  Fill(p, 0, 4, 0x21);
  REQUIRE(mmap(far, 4 * kPage, kReadWrite, kAnonymous | MAP_FIXED, -1, 0) == far);
  Fill(far, 0, 4, 0x22);
  char* low = far < p ? far : p;
  char* high = far < p ? p : far;
  const size_t length = static_cast<size_t>(high - low) + 2 * kPage;
  SHOW(mprotect(low, length, PROT_READ));
  ShowPages(low, 4);
  ShowPages(high, 4);
  SHOW(mprotect(low, 4 * kPage, kReadWrite));
  SHOW(munmap(far, 4 * kPage));
  SHOW(munmap(p, 4 * kPage));
}

sigjmp_buf jump;
char* volatile trapped;

void OpenPage(int, siginfo_t* info, void*) {
  char* page = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(info->si_addr) & ~(kPage - 1));
  if (page != trapped) siglongjmp(jump, 1);
  REQUIRE(mprotect(page, kPage, kReadWrite) == 0);
}

void Signals() {
  struct sigaction action = {};
  action.sa_sigaction = OpenPage;
  action.sa_flags = SA_SIGINFO;
  struct sigaction before;
  REQUIRE(sigaction(SIGSEGV, &action, &before) == 0);
  char* p = MapPages(256, PROT_NONE);
  for (size_t i = 0; i < 256; ++i) {
    trapped = At(p, i);
    *static_cast<volatile char*>(At(p, i)) = static_cast<char>(i);
  }
  trapped = nullptr;
  SHOW(mprotect(p, 256 * kPage, PROT_READ));
  volatile int caught = 0;
  if (sigsetjmp(jump, 1) == 0) {
    *static_cast<volatile char*>(p) = 1;
  } else {
    caught = 1;
  }
  printf("  caught %d, %d\n", caught, static_cast<unsigned char>(p[255 * kPage]));
  REQUIRE(sigaction(SIGSEGV, &before, nullptr) == 0);
  SHOW(munmap(p, 256 * kPage));
}

void* InThread(void* result) {
  for (int round = 0; round < 300; ++round) {
    const size_t pages = 1 + static_cast<size_t>(round % 40);
    char* p = MapPages(pages);
    REQUIRE(IsZero(p, pages * kPage));
    Fill(p, 0, pages, round);
    if (round % 3 == 0) REQUIRE(mprotect(p, kPage, PROT_NONE) == 0);
    // Another thread may get the hole.
    const bool cut = round % 5 == 0 && pages > 2;
    if (cut) REQUIRE(munmap(p + kPage, kPage) == 0);
    if (round % 7 == 0) {
      REQUIRE(mmap(p, kPage, kReadWrite, kAnonymous | MAP_FIXED, -1, 0) == p);
      REQUIRE(IsZero(p, kPage));
    }
    REQUIRE(munmap(p, cut ? kPage : pages * kPage) == 0);
    if (cut) REQUIRE(munmap(p + 2 * kPage, (pages - 2) * kPage) == 0);
  }
  *static_cast<int*>(result) = 1;
  return nullptr;
}

void Threads() {
  constexpr int kThreads = 6;
  pthread_t threads[kThreads];
  int done[kThreads] = {};
  for (int i = 0; i < kThreads; ++i) REQUIRE(pthread_create(&threads[i], nullptr, InThread, &done[i]) == 0);
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      int result = 0;
      InThread(&result);
      _exit(result == 1 ? 0 : 1);
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child && status == 0);
  }
  int sum = 0;
  for (int i = 0; i < kThreads; ++i) {
    REQUIRE(pthread_join(threads[i], nullptr) == 0);
    sum += done[i];
  }
  printf("  %d\n", sum);
}

void AtTheEnd() {
  char* p = MapPages(4);
  Fill(p, 0, 4, 1);
  printf("at exit: %d\n", munmap(p, 4 * kPage));
}

__attribute__((constructor)) void AtTheStart() {
  char* p = MapPages(4);
  REQUIRE(IsZero(p, 4 * kPage));
  REQUIRE(munmap(p, 4 * kPage) == 0);
}

struct Case {
  const char* name;
  void (*run)();
};

constexpr Case kCases[] = {
    {"Refusals", Refusals},   {"Anonymous", Anonymous}, {"Flags", Flags},
    {"Sparse", Sparse},       {"ReserveAndCommit", ReserveAndCommit},
    {"Keys", Keys},           {"Code", Code},           {"Hints", Hints},         {"Remaps", Remaps},
    {"AdviseAll", AdviseAll}, {"Forks", Forks},         {"Locks", Locks},
    {"Files", Files},         {"FilesInPlace", FilesInPlace},
    {"AcrossEverything", AcrossEverything},             {"Signals", Signals},
    {"Threads", Threads},
};

}  // namespace

int main() {
  static char buffer[1 << 16];
  setvbuf(stdout, buffer, _IOFBF, sizeof(buffer));
  AccessProbe access;
  probe = &access;
  for (const Case& one : kCases) {
    printf("%s\n", one.name);
    fflush(stdout);
    one.run();
    fflush(stdout);
  }
  atexit(AtTheEnd);
  return 0;
}
