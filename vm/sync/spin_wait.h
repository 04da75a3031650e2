// Spinning for a bounded time. The clock bounds it, since a pause takes five times as long on one processor as on
// another.
//
//   for (SpinWait spin(kLimit); spin.Once();) {
//     if (word.load(...) == ...) return true;
//   }
#ifndef FREEHOLD_VM_SYNC_SPIN_WAIT_H_
#define FREEHOLD_VM_SYNC_SPIN_WAIT_H_

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

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_SPIN_WAIT_H_
