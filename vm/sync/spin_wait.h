// Spinning for a bounded time, and where it is worth it. The clock bounds it, since a pause takes five times as long on
// one processor as on another.
//
//   for (SpinWait spin(kLimit); spin.Once();) {
//     if (word.load(...) == ...) return true;
//   }
#ifndef FREEHOLD_VM_SYNC_SPIN_WAIT_H_
#define FREEHOLD_VM_SYNC_SPIN_WAIT_H_

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "vm/os/thread_id.h"
#include "vm/sync/clock.h"
#include "vm/sync/sync_point.h"
#include "vm/units.h"

namespace freehold::vm::sync {

// By then a running holder of a short section is done; and it is less than a sleep costs.
inline constexpr Nanoseconds kShortSpin = Microseconds(1);

class SpinWait {
 public:
  explicit SpinWait(Nanoseconds limit) : limit_(limit) {}

  // Pauses for a moment, or returns false: the time is over, or the schedule is controlled.
  bool Once() {
    if (!MaySpin()) return false;
    if (pauses_++ % kPausesPerReading == 0 && !InTime()) return false;
    os::CpuRelax();
    return true;
  }

 private:
  // 0.1 to 0.5 us of pauses.
  static constexpr unsigned kPausesPerReading = 8;

  bool InTime() {
    const Nanoseconds now = MonotonicNow();
    if (pauses_ == 1) end_ = now + limit_;
    return now < end_;
  }

  Nanoseconds limit_;
  Nanoseconds end_ = {0};  // from the first pause on
  unsigned pauses_ = 0;
};

// Whether to spin before a wait of one kind, learnt from how it went. Where spinning is mostly in vain, few waits try:
// a vain attempt makes four times as many of the next ones pass, one in time half as many.
//
//   if (history.SpinsNow()) history.Note(<spun, and it was over in time>);
//
// Thread safety: thread-safe; threads that meet may lose each other's news, so what it says is a hint.
class SpinHistory {
 public:
  // Between two that spin so many pass at most.
  static constexpr std::uint32_t kMostPassed = 1023;

  constexpr SpinHistory() = default;
  // Counts a wait.
  bool SpinsNow() {
    const std::uint32_t left = left_.load(std::memory_order_relaxed);
    if (left != 0) left_.store(left - 1, std::memory_order_relaxed);
    return left == 0;
  }
  void Note(bool in_time) {
    const std::uint32_t before = passed_.load(std::memory_order_relaxed);
    const std::uint32_t pass = in_time ? before / 2 : std::min(4 * before + 3, kMostPassed);
    if (pass == before && pass == 0) return;
    passed_.store(pass, std::memory_order_relaxed);
    left_.store(pass, std::memory_order_relaxed);
  }

 private:
  std::atomic<std::uint32_t> passed_{0};  // waits between two that spin
  std::atomic<std::uint32_t> left_{0};    // of these
};

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_SPIN_WAIT_H_
