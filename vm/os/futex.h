// Sleeping until a 32-bit word changes: the one place where Freehold's locks wait.
//
// Thread safety: thread-safe; async-signal-safe.
// Waiting:       FutexWait sleeps; FutexWake never does.
// Allocation:    none; errno of the caller is kept.
// Ordering:      none is promised: the callers' own atomics on the word carry acquire and release.
#ifndef FREEHOLD_VM_OS_FUTEX_H_
#define FREEHOLD_VM_OS_FUTEX_H_

#include <atomic>
#include <cstdint>

#include "vm/units.h"

namespace freehold::vm::os {

enum class FutexResult : std::uint8_t {
  kWoken,        // by a wake, or spuriously: check the word again
  kChanged,      // the word was not `expected` when the kernel looked
  kTimeout,      // the deadline passed
  kInterrupted,  // by a signal handler
};

// Sleeps while `*word == expected`, until a FutexWake of the same word or until CLOCK_MONOTONIC
// reaches `*absolute_deadline` (null: forever). The word is private to this process: after fork,
// parent and child do not wake each other.
FutexResult FutexWait(std::atomic<std::uint32_t>* word, std::uint32_t expected,
                      const Nanoseconds* absolute_deadline = nullptr);

// Wakes up to `count` threads that sleep on `word`, oldest first, and returns how many. Only the
// address is used: the word may already be gone, as when the thread that owned it was faster.
int FutexWake(std::atomic<std::uint32_t>* word, int count);

}  // namespace freehold::vm::os

#endif  // FREEHOLD_VM_OS_FUTEX_H_
