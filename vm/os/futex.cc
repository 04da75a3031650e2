#include "vm/os/futex.h"

#include <linux/futex.h>
#include <time.h>

#include <cerrno>

#include "vm/os/check.h"
#include "vm/os/raw_syscall.h"

namespace freehold::vm::os {

static_assert(sizeof(std::atomic<std::uint32_t>) == 4 &&
              std::atomic<std::uint32_t>::is_always_lock_free);

FutexResult FutexWait(std::atomic<std::uint32_t>* word, std::uint32_t expected,
                      const Nanoseconds* absolute_deadline) {
  timespec deadline;
  if (absolute_deadline != nullptr) {
    deadline.tv_sec = static_cast<time_t>(absolute_deadline->value / 1'000'000'000);
    deadline.tv_nsec = static_cast<long>(absolute_deadline->value % 1'000'000'000);
  }
  // FUTEX_WAIT_BITSET, unlike FUTEX_WAIT, takes an absolute time; without FUTEX_CLOCK_REALTIME it
  // is CLOCK_MONOTONIC.
  const long result = RawSyscall(SYS_futex, word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, expected,
                                 absolute_deadline != nullptr ? &deadline : nullptr, nullptr,
                                 FUTEX_BITSET_MATCH_ANY);
  if (!SyscallFailed(result)) return FutexResult::kWoken;
  switch (SyscallErrno(result)) {
    case EAGAIN:
      return FutexResult::kChanged;
    case ETIMEDOUT:
      return FutexResult::kTimeout;
    case EINTR:
      return FutexResult::kInterrupted;
  }
  const CheckValue values[] = {{"word", reinterpret_cast<std::uintptr_t>(word)},
                               {"errno", static_cast<std::uint64_t>(SyscallErrno(result))}};
  CheckFailed(__FILE__, __LINE__, "futex wait failed", values, 2);
}

int FutexWake(std::atomic<std::uint32_t>* word, int count) {
  const long result = RawSyscall(SYS_futex, word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, count);
  // EFAULT: the word's memory is gone with the waiter that owned it.
  return SyscallFailed(result) ? 0 : static_cast<int>(result);
}

}  // namespace freehold::vm::os
