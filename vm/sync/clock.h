// CLOCK_MONOTONIC, for deadlines and for stamping waiters. Not system calls: libc reads the clock
// from the vDSO.
#ifndef FREEHOLD_VM_SYNC_CLOCK_H_
#define FREEHOLD_VM_SYNC_CLOCK_H_

#include <cstdint>
#include <ctime>

#include "vm/units.h"

namespace freehold::vm::sync {

namespace internal {
inline Nanoseconds ReadClock(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return {static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 +
          static_cast<std::uint64_t>(now.tv_nsec)};
}
}  // namespace internal

inline Nanoseconds MonotonicNow() { return internal::ReadClock(CLOCK_MONOTONIC); }

// At the resolution of the kernel's tick, milliseconds behind, and cheaper: for ages that people
// read.
inline Nanoseconds CoarseNow() { return internal::ReadClock(CLOCK_MONOTONIC_COARSE); }

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_CLOCK_H_
