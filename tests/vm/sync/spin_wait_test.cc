// SpinWait: for how long, and when not at all.
#include "vm/sync/spin_wait.h"

#include "gtest/gtest.h"
#include "vm/sync/clock.h"
#include "vm/sync/sync_point.h"
#include "vm/units.h"

namespace freehold::vm::sync {
namespace {

TEST(SpinWaitTest, LastsAsLongAsItIsTold) {
  for (const Nanoseconds limit : {kShortSpin, Microseconds(200), Milliseconds(5)}) {
    const Nanoseconds start = MonotonicNow();
    unsigned pauses = 0;
    for (SpinWait spin(limit); spin.Once();) ++pauses;
    EXPECT_GE(MonotonicNow() - start, limit);
    EXPECT_GE(pauses, 1u);
  }
}

TEST(SpinWaitTest, OfNoTimeIsOverAtOnce) {
  SpinWait spin({0});
  EXPECT_FALSE(spin.Once());
}

// Whoever is waited for runs only once this thread waits in a way that the scheduler sees.
TEST(SpinWaitTest, NeverSpinsUnderASchedule) {
  constexpr ScheduleHooks kHooks = {
      .controls = [] { return true; }, .reach = nullptr, .wait = nullptr, .wake = nullptr};
  SetScheduleHooks(&kHooks);
  SpinWait spin(Milliseconds(1));
  EXPECT_FALSE(spin.Once());
  SetScheduleHooks(nullptr);
  EXPECT_TRUE(SpinWait(Milliseconds(1)).Once());
}

}  // namespace
}  // namespace freehold::vm::sync
