// SpinWait: for how long, and when not at all; SpinHistory: how often.
#include "vm/sync/spin_wait.h"

#include <cstdint>

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

// How many waits pass until one spins.
std::uint32_t Passed(SpinHistory& history) {
  for (std::uint32_t passed = 0;; ++passed) {
    if (history.SpinsNow()) return passed;
  }
}

TEST(SpinHistoryTest, SpinsEachTimeWhereThatIsInTime) {
  SpinHistory history;
  for (int i = 0; i < 10; ++i) {
    EXPECT_TRUE(history.SpinsNow());
    history.Note(true);
  }
}

TEST(SpinHistoryTest, VainAttemptsGetRare) {
  SpinHistory history;
  for (const std::uint32_t expected : {0u, 3u, 15u, 63u, 255u, 1023u, SpinHistory::kMostPassed}) {
    EXPECT_EQ(Passed(history), expected);
    history.Note(false);
  }
}

TEST(SpinHistoryTest, AttemptsInTimeBringItBack) {
  SpinHistory history;
  for (int i = 0; i < 3; ++i) history.Note(false);
  for (const std::uint32_t expected : {63u, 31u, 15u, 7u, 3u, 1u, 0u, 0u}) {
    EXPECT_EQ(Passed(history), expected);
    history.Note(true);
  }
}

}  // namespace
}  // namespace freehold::vm::sync
