// SpinLock and Parker, every interleaving of a few threads. A spin lock is a short lock, so
// schedules go on inside it.
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/sync/sched/scheduler.h"
#include "vm/sync/parking.h"
#include "vm/sync/spin_lock.h"

namespace freehold::vm::sync {
namespace {

using sched::Exhaustive;
using sched::Outcome;
using sched::PreemptOnRequest;
using sched::Scheduler;
using sched::Seeded;

// Threads that each take the lock `rounds` times, and check that they are alone.
class Contest {
 public:
  Contest(Scheduler& scheduler, std::size_t threads, int rounds)
      : scheduler_(scheduler), rounds_(rounds), bodies_(threads, [this] { Compete(); }) {}

  Outcome Run(sched::Chooser& chooser) {
    const Outcome outcome = scheduler_.Run(bodies_, chooser);
    EXPECT_EQ(entered_, static_cast<int>(bodies_.size()) * rounds_);
    return outcome;
  }

 private:
  void Compete() {
    for (int round = 0; round < rounds_; ++round) {
      SpinLockHolder holder(lock_);
      if (++inside_ != 1) scheduler_.Fail("two inside");
      scheduler_.Yield("inside");
      --inside_;
      ++entered_;
    }
  }

  Scheduler& scheduler_;
  const int rounds_;
  const std::vector<Scheduler::Body> bodies_;
  SpinLock lock_{LockRank::kLeaf};
  int inside_ = 0;
  int entered_ = 0;
};

void RunAll(std::size_t threads, int rounds, int max_preemptions) {
  Scheduler scheduler({.threads = threads, .inside_short_locks = true});
  Exhaustive schedules(max_preemptions);
  do {
    const Outcome outcome = Contest(scheduler, threads, rounds).Run(schedules);
    ASSERT_TRUE(outcome.ok()) << outcome;
  } while (schedules.Next());
  ::testing::Test::RecordProperty("schedules", static_cast<int>(schedules.schedules()));
}

TEST(SpinLockSchedTest, TwoThreadsOnce) { RunAll(2, 1, Exhaustive::kUnlimited); }
TEST(SpinLockSchedTest, TwoThreadsTwice) { RunAll(2, 2, 5); }
TEST(SpinLockSchedTest, ThreeThreadsOnce) {
#if defined(FREEHOLD_TSAN) || defined(FREEHOLD_ASAN)
  RunAll(3, 1, 3);  // sanitizers take ten times as long
#else
  RunAll(3, 1, 4);
#endif
}

TEST(SpinLockSchedTest, RandomSchedules) {
  Scheduler scheduler({.threads = 4, .inside_short_locks = true, .spurious_wakes = 3});
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Seeded schedule(seed);
    const Outcome outcome = Contest(scheduler, 4, 4).Run(schedule);
    ASSERT_TRUE(outcome.ok()) << outcome;
  }
}

// The first thread releases the lock and has it again before any other, which it woke, gets to run;
// it lets them run while it holds the lock. Returns how often it was inside while each of the
// others waited.
std::vector<int> CountPasses(std::size_t others) {
  Scheduler scheduler({.threads = 1 + others, .inside_short_locks = true});
  SpinLock lock(LockRank::kLeaf);
  std::vector<int> passes(others, 0);
  std::vector<bool> started(others, false);
  std::vector<bool> entered(others, false);
  PreemptOnRequest schedule;
  std::vector<Scheduler::Body> bodies;
  bodies.push_back([&] {
    for (int round = 0; round < 200; ++round) {
      SpinLockHolder holder(lock);
      for (std::size_t other = 0; other < others; ++other)
        passes[other] += started[other] && !entered[other];
      for (std::size_t other = 0; other < others; ++other) {
        if (entered[other]) continue;
        // Whoever was woken runs. They start one by one, so that some have lost more often than
        // others.
        const bool woken = started[other] && !scheduler.IsWaiting(1 + other);
        const bool starts = !started[other] && round >= 4 * static_cast<int>(other);
        if (woken || starts) schedule.Request();
        scheduler.Yield("inside");
      }
    }
  });
  for (std::size_t other = 0; other < others; ++other) {
    bodies.push_back([&, other] {
      started[other] = true;
      SpinLockHolder holder(lock);
      entered[other] = true;
    });
  }
  const Outcome outcome = scheduler.Run(bodies, schedule);
  EXPECT_TRUE(outcome.ok()) << outcome;
  return passes;
}

TEST(SpinLockSchedTest, AWaiterIsPassedABoundedNumberOfTimes) {
  const std::vector<int> passes = CountPasses(1);
  EXPECT_GT(passes[0], 0);
  EXPECT_LT(passes[0], 12);
}

// Where one waiter has reserved the lock, another one that was woken in its place must not lose the
// wake.
TEST(SpinLockSchedTest, SeveralWaitersArePassedABoundedNumberOfTimes) {
  for (const int passes : CountPasses(2)) EXPECT_TRUE(passes > 0 && passes < 24) << passes;
  for (const int passes : CountPasses(3)) EXPECT_TRUE(passes > 0 && passes < 36) << passes;
}

// The parker dies as soon as its owner has seen the signal, as a guard on a stack does. What the
// signaller does after that must not depend on it: AddressSanitizer watches.
void ParkAndDie(bool with_deadline, std::size_t spurious_wakes) {
  Scheduler scheduler({.threads = 2, .spurious_wakes = spurious_wakes});
  Exhaustive schedules;
  do {
    auto parker = std::make_unique<Parker>();
    Parker* const address = parker.get();
    int message = 0;
    const Nanoseconds deadline{1};
    const Outcome outcome =
        scheduler.Run({[&] {
                         // A signal is on its way, so the owner has to stay for it: after a timeout
                         // it waits again.
                         while (!parker->Park(with_deadline ? &deadline : nullptr))
                           scheduler.Yield("again");
                         if (message != 1) scheduler.Fail("signal before its message");
                         parker.reset();
                       },
                       [&] {
                         message = 1;
                         address->Unpark();
                       }},
                      schedules);
    ASSERT_TRUE(outcome.ok()) << outcome;
  } while (schedules.Next());
}

TEST(ParkerSchedTest, SignalComesOnce) { ParkAndDie(false, 0); }
TEST(ParkerSchedTest, SpuriousWakesAreNoSignal) { ParkAndDie(false, 2); }

TEST(ParkerSchedTest, DeadlineOrSignal) {
  Scheduler scheduler({.threads = 2});
  Exhaustive schedules;
  int expired = 0;
  do {
    Parker parker;
    const Nanoseconds deadline{1};
    const Outcome outcome = scheduler.Run({[&] {
                                             if (parker.Park(&deadline)) return;
                                             ++expired;
                                             if (!parker.Park())
                                               scheduler.Fail("a signal got lost");
                                           },
                                           [&] { parker.Unpark(); }},
                                          schedules);
    ASSERT_TRUE(outcome.ok()) << outcome;
  } while (schedules.Next());
  EXPECT_GT(expired, 0);
}

}  // namespace
}  // namespace freehold::vm::sync
