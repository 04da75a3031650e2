// For programs that print what the mmap family does, to be compared between two runs: results without addresses, and
// what memory is like, found out without a signal.
#ifndef FREEHOLD_TESTS_RUNTIME_PROGRAMS_MAPPING_PROBE_H_
#define FREEHOLD_TESTS_RUNTIME_PROGRAMS_MAPPING_PROBE_H_

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/runtime/programs/require.h"

constexpr size_t kPage = 4096;

inline char* At(void* base, size_t page) { return static_cast<char*>(base) + page * kPage; }

// A pipe tells by EFAULT whether the kernel could read or write a byte in the program's place.
class AccessProbe {
 public:
  AccessProbe() { REQUIRE(pipe(ends_) == 0); }
  ~AccessProbe() {
    close(ends_[0]);
    close(ends_[1]);
  }
  AccessProbe(const AccessProbe&) = delete;
  AccessProbe& operator=(const AccessProbe&) = delete;

  bool CanRead(const void* p) {
    if (write(ends_[1], p, 1) != 1) return false;
    char byte;
    REQUIRE(read(ends_[0], &byte, 1) == 1);
    return true;
  }
  // Writes back what was there, if that can be read, else 0.
  bool CanWrite(void* p) {
    char byte = 0;
    if (write(ends_[1], p, 1) != 1) REQUIRE(write(ends_[1], &byte, 1) == 1);
    if (read(ends_[0], p, 1) == 1) return true;
    REQUIRE(read(ends_[0], &byte, 1) == 1);
    return false;
  }

 private:
  int ends_[2];
};

// Whether something is mapped at the page of `p`. Does not touch it: Freehold keeps unmapped memory for a while.
inline bool IsMapped(const void* p) {
  unsigned char resident;
  return mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p) & ~(kPage - 1)), kPage, &resident) == 0;
}

// "-" unmapped; else r, w or both, or "n", and the first byte where it can be read.
inline void DescribePage(AccessProbe& probe, char* page, char* text, size_t size) {
  if (!IsMapped(page)) {
    snprintf(text, size, "-");
    return;
  }
  const bool readable = probe.CanRead(page);
  const bool writable = probe.CanWrite(page);
  int used = snprintf(text, size, "%s%s", readable ? "r" : "", writable ? "w" : "");
  if (!readable && !writable) used = snprintf(text, size, "n");
  if (readable) {
    snprintf(text + used, size - static_cast<size_t>(used), "%02x", static_cast<unsigned char>(*page));
  }
}

inline const char* ErrorName(int error) {
  switch (error) {
    case 0: return "0";
    case EINVAL: return "EINVAL";
    case ENOMEM: return "ENOMEM";
    case EEXIST: return "EEXIST";
    case EACCES: return "EACCES";
    case EPERM: return "EPERM";
    case EBADF: return "EBADF";
    case EFAULT: return "EFAULT";
    case EBUSY: return "EBUSY";
    case EAGAIN: return "EAGAIN";
    case ENODEV: return "ENODEV";
    case EOVERFLOW: return "EOVERFLOW";
    case EOPNOTSUPP: return "EOPNOTSUPP";
    default: return "another";
  }
}

#endif  // FREEHOLD_TESTS_RUNTIME_PROGRAMS_MAPPING_PROBE_H_
