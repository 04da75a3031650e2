// The scheduler finds what it must find: each lock here is broken in a way that only some schedules
// show.
#include "tests/vm/sync/sched/scheduler.h"

#include <atomic>
#include <cstdint>
#include <set>
#include <string>

#include "gtest/gtest.h"
#include "vm/sync/sync_point.h"

namespace freehold::sched {
namespace {

using vm::sync::ReachSyncPoint;
using vm::sync::SyncPoint;
using vm::sync::WaitOnWord;
using vm::sync::WakeWord;

// Binomial coefficient of 2n over n: the interleavings of two threads of n steps each.
std::size_t Interleavings(std::size_t n) {
  std::size_t result = 1;
  for (std::size_t i = 1; i <= n; ++i) result = result * (n + i) / i;
  return result;
}

TEST(SchedulerTest, EnumeratesEveryInterleavingOnce) {
  for (const std::size_t steps : {1, 2, 3, 4}) {
    Scheduler scheduler({.threads = 2});
    std::set<std::string> seen;
    Exhaustive schedules;
    do {
      std::string order;
      auto body = [&](char name) {
        return [&, name] {
          // The first `steps - 1` points separate `steps` steps.
          for (std::size_t i = 0; i < steps; ++i) {
            if (i != 0) scheduler.Yield("step");
            order += name;
          }
        };
      };
      ASSERT_TRUE(scheduler.Run({body('a'), body('b')}, schedules).ok());
      EXPECT_TRUE(seen.insert(order).second) << order;
    } while (schedules.Next());
    EXPECT_EQ(seen.size(), Interleavings(steps));
    EXPECT_EQ(schedules.schedules(), seen.size());
  }
}

TEST(SchedulerTest, PreemptionBoundLimitsSwitchesAwayFromRunnableThreads) {
  Scheduler scheduler({.threads = 2});
  std::set<std::string> seen;
  Exhaustive schedules(/*max_preemptions=*/1);
  do {
    std::string order;
    auto body = [&](char name) {
      return [&, name] {
        order += name;
        scheduler.Yield("step");
        order += name;
      };
    };
    ASSERT_TRUE(scheduler.Run({body('a'), body('b')}, schedules).ok());
    seen.insert(order);
  } while (schedules.Next());
  EXPECT_EQ(seen, (std::set<std::string>{"aabb", "abba", "bbaa", "baab"}));
}

TEST(SchedulerTest, SameSeedSameSchedule) {
  Scheduler scheduler({.threads = 3});
  auto run = [&](std::uint64_t seed) {
    std::string order;
    auto body = [&](char name) {
      return [&, name] {
        for (int i = 0; i < 5; ++i) {
          order += name;
          scheduler.Yield("step");
        }
      };
    };
    Seeded schedule(seed);
    EXPECT_TRUE(scheduler.Run({body('a'), body('b'), body('c')}, schedule).ok());
    return order;
  };
  EXPECT_EQ(run(1), run(1));
  std::set<std::string> orders;
  for (std::uint64_t seed = 0; seed < 20; ++seed) orders.insert(run(seed));
  EXPECT_GT(orders.size(), 15u);
}

// Looks, then acts: two threads can both find it free.
class LookThenAct {
 public:
  void Lock() {
    while (true) {
      ReachSyncPoint(SyncPoint::kAcquire, this);
      if (word_.load() == 0) break;
      WaitOnWord(&word_, 1);
    }
    ReachSyncPoint(SyncPoint::kAcquire, this);
    word_.store(1);
  }
  void Unlock() {
    ReachSyncPoint(SyncPoint::kRelease, this);
    word_.store(0);
    WakeWord(&word_, 1);
  }

 private:
  std::atomic<std::uint32_t> word_{0};
};

TEST(SchedulerTest, FindsMissingMutualExclusion) {
  Scheduler scheduler({.threads = 2});
  Exhaustive schedules;
  std::size_t failures = 0;
  do {
    LookThenAct lock;
    int inside = 0;
    auto body = [&] {
      lock.Lock();
      if (++inside != 1) scheduler.Fail("two inside");
      scheduler.Yield("inside");
      --inside;
      lock.Unlock();
    };
    const Outcome outcome = scheduler.Run({body, body}, schedules);
    failures += outcome.failure == "two inside";
  } while (schedules.Next());
  EXPECT_GT(failures, 0u);
  EXPECT_LT(failures, schedules.schedules());
}

// Sleeps without telling the kernel what it saw, so a wake in between is lost.
class LostWake {
 public:
  void Lock() {
    ReachSyncPoint(SyncPoint::kAcquire, this);
    while (word_.exchange(1) != 0) {
      waiting_.store(1);
      ReachSyncPoint(SyncPoint::kAcquire, this);
      WaitOnWord(&waiting_, 1);
    }
  }
  void Unlock() {
    ReachSyncPoint(SyncPoint::kRelease, this);
    word_.store(0);
    WakeWord(&waiting_, 1);
  }

 private:
  std::atomic<std::uint32_t> word_{0};
  std::atomic<std::uint32_t> waiting_{0};
};

TEST(SchedulerTest, FindsLostWake) {
  Scheduler scheduler({.threads = 2, .unwind_deadlocks = true});
  Exhaustive schedules;
  std::size_t deadlocks = 0;
  do {
    LostWake lock;
    auto body = [&] {
      lock.Lock();
      lock.Unlock();
    };
    deadlocks += scheduler.Run({body, body}, schedules).deadlock;
  } while (schedules.Next());
  EXPECT_GT(deadlocks, 0u);
  EXPECT_LT(deadlocks, schedules.schedules());
}

TEST(SchedulerTest, RandomSchedulesFindItToo) {
  Scheduler scheduler({.threads = 2, .unwind_deadlocks = true});
  std::size_t deadlocks = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    Seeded schedule(seed);
    LostWake lock;
    auto body = [&] {
      lock.Lock();
      lock.Unlock();
    };
    deadlocks += scheduler.Run({body, body}, schedule).deadlock;
  }
  EXPECT_GT(deadlocks, 0u);
}

TEST(SchedulerTest, DeadlineAndSpuriousWakesAreChoices) {
  Scheduler scheduler({.threads = 1, .spurious_wakes = 1});
  std::set<vm::os::FutexResult> results;
  Exhaustive schedules;
  do {
    std::atomic<std::uint32_t> word{0};
    const vm::Nanoseconds deadline{1};
    const Outcome outcome =
        scheduler.Run({[&] { results.insert(WaitOnWord(&word, 0, &deadline)); }}, schedules);
    EXPECT_TRUE(outcome.ok());
    EXPECT_EQ(outcome.waits, 1u);
  } while (schedules.Next());
  EXPECT_EQ(results, (std::set<vm::os::FutexResult>{vm::os::FutexResult::kTimeout,
                                                    vm::os::FutexResult::kInterrupted}));
}

TEST(SchedulerDeathTest, UnexpectedDeadlockPrintsTheSchedule) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(
      {
        Scheduler scheduler({.threads = 1});
        Exhaustive schedule;
        std::atomic<std::uint32_t> word{0};
        scheduler.Run({[&] { WaitOnWord(&word, 0); }}, schedule);
      },
      "deadlock\nchoices");
}

}  // namespace
}  // namespace freehold::sched
