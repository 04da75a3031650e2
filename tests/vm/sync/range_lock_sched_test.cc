// RangeLock under chosen schedules: every interleaving of small scripts, random ones of larger
// scripts. After every step: the lock's own invariants; at every grant: mutual exclusion, and
// nobody asleep was passed.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <ostream>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/sync/sched/scheduler.h"
#include "vm/page_range.h"
#include "vm/sync/range_lock.h"

namespace freehold::vm::sync {
namespace {

using sched::Exhaustive;
using sched::Outcome;
using sched::Scheduler;
using sched::Seeded;

constexpr LockMode kS = LockMode::kShared;
constexpr LockMode kX = LockMode::kExclusive;

// Sanitizers take ten times as long.
#if defined(FREEHOLD_TSAN) || defined(FREEHOLD_ASAN)
constexpr bool kThorough = false;
#else
constexpr bool kThorough = true;
#endif

constexpr PageRange Range(std::size_t first, std::size_t end) { return {{first}, {end}}; }

// What a thread does with one guard.
struct Action {
  enum class How { kWait, kTry, kUntil };

  LockMode mode;
  PageRange range;
  How how = How::kWait;
  bool downgrade = false;  // in the middle, if exclusive

  friend std::ostream& operator<<(std::ostream& out, const Action& action) {
    static constexpr const char* kNames[] = {"", "try ", "until "};
    return out << kNames[static_cast<int>(action.how)] << (action.mode == kX ? "X" : "S")
               << (action.downgrade ? ">S" : "") << "[" << action.range.first.value << ","
               << action.range.end.value << ")";
  }
};
using Script = std::vector<Action>;

// What is held and wanted, as seen from outside.
class Observer {
 public:
  Observer(Scheduler& scheduler, std::size_t threads, std::size_t passes_allowed)
      : scheduler_(scheduler), passes_allowed_(passes_allowed), threads_(threads) {}

  // Passing is judged for sleepers only, and only where sleeping means being queued: not while the
  // sleep may be for the lock's internal lock.
  void Requests(const Action& action, bool sleepers_are_queued) {
    Thread& self = threads_[Scheduler::CurrentThread()];
    self.state = State::kRequesting;
    self.action = action;
    self.mode = action.mode;
    self.passed = 0;
    self.sleeping_before.clear();
    for (std::size_t i = 0; sleepers_are_queued && i < threads_.size(); ++i) {
      if (threads_[i].state == State::kRequesting && scheduler_.IsWaiting(i) &&
          threads_[i].action.how == Action::How::kWait && Conflicts(self, threads_[i])) {
        self.sleeping_before.emplace_back(i, threads_[i].request);
      }
    }
  }
  void Granted() {
    Thread& self = threads_[Scheduler::CurrentThread()];
    self.state = State::kHolding;
    for (const Thread& other : threads_) {
      if (&other != &self && other.state == State::kHolding && Conflicts(self, other)) {
        scheduler_.Fail("two conflicting holders");
      }
    }
    for (const auto& [index, request] : self.sleeping_before) {
      Thread& other = threads_[index];
      if (other.state != State::kRequesting || other.request != request) continue;
      if (++other.passed > passes_allowed_) scheduler_.Fail("a sleeper was passed too often");
    }
  }
  void Downgraded() { threads_[Scheduler::CurrentThread()].mode = kS; }
  void Ended() {
    Thread& self = threads_[Scheduler::CurrentThread()];
    self.state = State::kIdle;
    ++self.request;
  }

 private:
  enum class State { kIdle, kRequesting, kHolding };
  struct Thread {
    State state = State::kIdle;
    Action action{};
    LockMode mode = kS;
    std::size_t request = 0;
    std::size_t passed = 0;
    std::vector<std::pair<std::size_t, std::size_t>> sleeping_before;  // thread and request
  };

  static bool Conflicts(const Thread& a, const Thread& b) {
    return a.action.range.Overlaps(b.action.range) && Conflict(a.mode, b.mode);
  }

  Scheduler& scheduler_;
  const std::size_t passes_allowed_;
  std::vector<Thread> threads_;
};

class RangeLockSchedTest : public ::testing::TestWithParam<LockPolicy> {
 protected:
  // Runs one schedule of `scripts`, one per thread, on a fresh lock.
  Outcome RunOnce(Scheduler& scheduler, const std::vector<Script>& scripts, sched::Chooser& chooser,
                  bool inside_short_locks) {
    RangeLock lock(GetParam());
    const std::size_t passes_allowed =
        GetParam() == LockPolicy::kCoarse ? CoarseLock::kMaxSteals * scripts.size() : 0;
    Observer observer(scheduler, scripts.size(), passes_allowed);
    std::vector<Scheduler::Body> bodies;
    for (const Script& script : scripts) {
      bodies.push_back([&, inside_short_locks] {
        for (const Action& action : script)
          Perform(action, lock, observer, scheduler, inside_short_locks);
      });
    }
    const Outcome outcome = scheduler.Run(bodies, chooser, [&] { lock.CheckInvariants(); });
    lock.CheckInvariants();
    EXPECT_EQ(lock.Holders(Range(0, 100'000)).total, 0u);
    return outcome;
  }

  // All schedules with at most `max_preemptions`. Returns their number.
  std::size_t RunAll(const std::vector<Script>& scripts,
                     int max_preemptions = Exhaustive::kUnlimited,
                     bool inside_short_locks = false) {
    Scheduler scheduler({.threads = scripts.size(), .inside_short_locks = inside_short_locks});
    Exhaustive schedules(max_preemptions);
    do {
      const Outcome outcome = RunOnce(scheduler, scripts, schedules, inside_short_locks);
      if (!outcome.ok()) {
        ADD_FAILURE() << Describe(scripts) << outcome;
        break;
      }
      waits_ += outcome.waits;
    } while (schedules.Next());
    schedules_ += schedules.schedules();
    return schedules.schedules();
  }

  void TearDown() override { RecordProperty("schedules", static_cast<int>(schedules_)); }

  static std::string Describe(const std::vector<Script>& scripts) {
    std::ostringstream text;
    for (const Script& script : scripts) {
      text << "thread:";
      for (const Action& action : script) text << " " << action;
      text << "\n";
    }
    return text.str();
  }

  std::size_t waits_ = 0;

 private:
  static void Perform(const Action& action, RangeLock& lock, Observer& observer,
                      Scheduler& scheduler, bool inside_short_locks) {
    observer.Requests(action, !inside_short_locks);
    RangeLock::Guard guard = Acquire(action, lock);
    if (guard.held()) {
      observer.Granted();
      scheduler.Yield("holds");
      if (action.downgrade) {
        observer.Downgraded();
        guard.Downgrade();
        scheduler.Yield("holds on");
      }
    } else if (action.how == Action::How::kWait) {
      scheduler.Fail("gave up without a deadline");
    }
    observer.Ended();
  }

  static RangeLock::Guard Acquire(const Action& action, RangeLock& lock) {
    switch (action.how) {
      case Action::How::kWait: break;
      case Action::How::kTry:
        return RangeLock::Guard::Try(lock, action.range, action.mode, Operation::kTest);
      case Action::How::kUntil:
        return RangeLock::Guard::Until(lock, action.range, action.mode, Operation::kTest,
                                       Nanoseconds{1});
    }
    return RangeLock::Guard(lock, action.range, action.mode, Operation::kTest);
  }

  std::size_t schedules_ = 0;
};

INSTANTIATE_TEST_SUITE_P(Policies, RangeLockSchedTest,
                         ::testing::Values(LockPolicy::kCoarse, LockPolicy::kTree,
                                           LockPolicy::kAdaptive),
                         [](const auto& info) { return ToString(info.param); });

constexpr Action::How kWait = Action::How::kWait;
constexpr Action::How kTry = Action::How::kTry;
constexpr Action::How kUntil = Action::How::kUntil;

// [0, 8) against the same, an overlapping, an enclosed and a disjoint range; for kAdaptive also one
// that shares nothing but its lock word, one of two granules and two long ones, with and without
// it.
constexpr PageRange kOthers[] = {Range(0, 8),
                                 Range(4, 12),
                                 Range(2, 4),
                                 Range(8, 16),
                                 Range(33 * 512, 33 * 512 + 8),
                                 Range(4, 1000),
                                 Range(4, 10'000),
                                 Range(512, 10'000)};

TEST_P(RangeLockSchedTest, TwoThreadsEveryInterleaving) {
  for (const PageRange other : kOthers) {
    for (const auto& [a, b] : {std::pair{kS, kX}, {kX, kX}, {kS, kS}}) {
      RunAll({{{a, Range(0, 8)}}, {{b, other}}});
    }
  }
}

TEST_P(RangeLockSchedTest, TwoThreadsWithDeadlinesEveryInterleaving) {
  for (const auto& [a, b] : {std::pair{kS, kX}, {kX, kS}, {kX, kX}}) {
    for (const auto& [how_a, how_b] : {std::pair{kWait, kUntil}, {kUntil, kUntil}, {kWait, kTry}}) {
      RunAll({{{a, Range(0, 8), how_a}}, {{b, Range(4, 12), how_b}}});
    }
  }
}

TEST_P(RangeLockSchedTest, TwoThreadsTwice) {
  RunAll({{{kX, Range(0, 8)}, {kS, Range(4, 6)}}, {{kS, Range(4, 12)}, {kX, Range(0, 16)}}},
         kThorough ? 6 : 3);
  RunAll({{{kX, Range(0, 8)}, {kX, Range(0, 8), kUntil}},
          {{kX, Range(4, 12), kUntil}, {kS, Range(4, 12)}}},
         kThorough ? 4 : 2);
}

// Six steps a thread: lock, downgrade, unlock, twice.
TEST_P(RangeLockSchedTest, TwoThreadsSixSteps) {
  constexpr int kBound = kThorough ? 4 : 2;
  RunAll({{{kX, Range(0, 8), kWait, true}, {kX, Range(4, 12), kWait, true}},
          {{kX, Range(4, 12), kWait, true}, {kX, Range(0, 16), kUntil, true}}},
         kBound);
  RunAll({{{kX, Range(0, 8), kWait, true}, {kX, Range(4, 10'000), kWait, true}},
          {{kX, Range(4, 10'000), kWait, true}, {kX, Range(0, 8), kTry, true}}},
         kBound);
}

TEST_P(RangeLockSchedTest, TwoThreadsPreemptedInsideInternalLocks) {
  constexpr int kInside = kThorough ? 6 : 4;
  RunAll({{{kX, Range(0, 8)}}, {{kX, Range(4, 12)}}}, kInside, true);
  RunAll({{{kS, Range(0, 8)}}, {{kX, Range(4, 12), kUntil}}}, kInside - 2, true);
}

TEST_P(RangeLockSchedTest, DowngradeLetsReadersInAndNoWriter) {
  RunAll({{{kX, Range(0, 8), kWait, true}}, {{kS, Range(4, 12)}}});
  RunAll({{{kX, Range(0, 8), kWait, true}}, {{kX, Range(4, 12)}}});
  RunAll({{{kX, Range(0, 8), kWait, true}}, {{kS, Range(4, 12)}}, {{kX, Range(4, 12)}}},
         kThorough ? 3 : 2);
}

TEST_P(RangeLockSchedTest, ThreeThreads) {
  RunAll({{{kX, Range(0, 8)}}, {{kX, Range(4, 12)}}, {{kX, Range(0, 12)}}}, kThorough ? 3 : 2);
  RunAll({{{kS, Range(0, 8)}}, {{kX, Range(4, 12)}}, {{kS, Range(0, 12)}}}, kThorough ? 3 : 2);
  // The first and the last do not overlap; the one in the middle overlaps both.
  RunAll({{{kX, Range(0, 4)}}, {{kX, Range(0, 8)}}, {{kX, Range(4, 8)}}}, kThorough ? 3 : 2);
}

// Four steps a thread: lock and unlock, twice.
TEST_P(RangeLockSchedTest, ThreeThreadsFourSteps) {
  constexpr int kBound = kThorough ? 2 : 1;
  RunAll({{{kX, Range(0, 8)}, {kS, Range(4, 12)}},
          {{kS, Range(4, 12)}, {kX, Range(0, 8)}},
          {{kX, Range(0, 12)}, {kS, Range(0, 8)}}},
         kBound);
  RunAll({{{kX, Range(0, 8)}, {kX, Range(4, 10'000)}},
          {{kS, Range(0, 8)}, {kX, Range(4, 12), kUntil}},
          {{kX, Range(4, 10'000)}, {kS, Range(0, 8), kTry}}},
         kBound);
}

TEST_P(RangeLockSchedTest, ThreeThreadsWithDeadlines) {
  // When the writer gives up, the reader behind it must get in beside the first one.
  RunAll({{{kS, Range(0, 8)}}, {{kX, Range(4, 12), kUntil}}, {{kS, Range(0, 12)}}},
         kThorough ? 3 : 2);
  RunAll({{{kX, Range(0, 8)}}, {{kX, Range(4, 12), kUntil}}, {{kX, Range(0, 12), kUntil}}},
         kThorough ? 3 : 2);
}

// Many granules against one: under kAdaptive the former raises the gate that the latter looks at.
TEST_P(RangeLockSchedTest, LongRangesAndShortOnes) {
  if (GetParam() == LockPolicy::kCoarse) GTEST_SKIP() << "all ranges are one to it";
  constexpr PageRange kShort = Range(0, 8);
  constexpr PageRange kLong = Range(4, 10'000);
  for (const auto& [a, b] : {std::pair{kX, kX}, {kS, kX}, {kX, kS}}) {
    for (const auto& [how_a, how_b] : {std::pair{kTry, kWait},
                                       {kWait, kTry},
                                       {kUntil, kWait},
                                       {kWait, kUntil},
                                       {kUntil, kTry}}) {
      RunAll({{{a, kShort, how_a}}, {{b, kLong, how_b}}});
    }
  }
  RunAll({{{kX, kShort, kWait, true}}, {{kX, kLong}}});
  RunAll({{{kX, kShort, kWait, true}}, {{kS, kLong}}});
  RunAll({{{kX, kShort}, {kS, kShort}}, {{kX, kLong}, {kX, kLong}}}, kThorough ? 5 : 3);
}

// The long one moves readers, or one that has not looked at the gate yet, into the tree; the third
// finds them there.
TEST_P(RangeLockSchedTest, LongRangesAndTwoShortOnes) {
  if (GetParam() == LockPolicy::kCoarse) GTEST_SKIP() << "all ranges are one to it";
  constexpr PageRange kLong = Range(4, 10'000);
  constexpr int kBound = kThorough ? 3 : 2;
  for (const LockMode mode : {kX, kS}) {
    RunAll({{{kX, kLong}}, {{mode, Range(0, 8)}}, {{mode, Range(0, 8)}}}, kBound);
    RunAll({{{kX, kLong}}, {{mode, Range(0, 8)}}, {{kX, Range(8, 16)}}}, kBound);
    RunAll({{{kS, kLong}}, {{mode, Range(0, 8)}}, {{kX, Range(4, 1000)}}}, kBound);
    RunAll({{{kX, kLong}}, {{mode, Range(0, 8), kTry}}, {{kX, Range(2, 6), kUntil}}}, kBound);
  }
  RunAll({{{kX, kLong}}, {{kS, Range(5'000, 20'000)}}, {{kX, Range(0, 8)}}}, kBound);
}

TEST_P(RangeLockSchedTest, LongRangesPreemptedInsideInternalLocks) {
  if (GetParam() == LockPolicy::kCoarse) GTEST_SKIP() << "all ranges are one to it";
  constexpr int kInside = kThorough ? 3 : 2;
  RunAll({{{kX, Range(0, 8)}}, {{kX, Range(4, 10'000)}}}, kInside, true);
  RunAll({{{kS, Range(0, 8)}}, {{kS, Range(0, 8)}}, {{kX, Range(4, 10'000)}}}, kInside - 1, true);
  RunAll({{{kX, Range(0, 8)}}, {{kX, Range(8, 16)}}, {{kX, Range(4, 10'000)}}}, kInside - 1, true);
}

TEST_P(RangeLockSchedTest, DisjointRangesNeverWait) {
  if (GetParam() == LockPolicy::kCoarse) GTEST_SKIP() << "all ranges are one to it";
  RunAll({{{kX, Range(0, 8)}, {kS, Range(0, 4)}}, {{kX, Range(8, 16)}, {kX, Range(10, 11)}}},
         kThorough ? Exhaustive::kUnlimited : 4);
  // In one lock word, and beside a long one.
  constexpr int kBound = kThorough ? 4 : 2;
  RunAll({{{kX, Range(0, 8)}, {kX, Range(2, 4)}}, {{kX, Range(33 * 512, 33 * 512 + 8)}}}, kBound);
  RunAll({{{kX, Range(0, 8)}, {kS, Range(0, 8)}}, {{kX, Range(8, 10'000)}}}, kBound);
  EXPECT_EQ(waits_, 0u);
}

// The holder releases, and has the lock again before the waiter that it woke gets to run.
TEST_P(RangeLockSchedTest, TheHeadOfTheQueueIsPassedABoundedNumberOfTimes) {
  const std::size_t allowed = GetParam() == LockPolicy::kCoarse ? CoarseLock::kMaxSteals : 0;
  for (const LockMode mode : {kX, kS}) {
    Scheduler scheduler({.threads = 2});
    RangeLock lock(GetParam());
    sched::PreemptOnRequest schedule;
    std::size_t passed = 0;
    bool granted = false;
    const Outcome outcome =
        scheduler.Run({[&] {
                         for (int round = 0; round < 50; ++round) {
                           const RangeLock::Guard guard(lock, Range(0, 8), mode, Operation::kTest);
                           if (round != 0 && !granted) ++passed;
                           schedule.Request();
                           scheduler.Yield("holds");
                         }
                       },
                       [&] {
                         const RangeLock::Guard guard(lock, Range(4, 12), kX, Operation::kTest);
                         granted = true;
                       }},
                      schedule);
    EXPECT_TRUE(outcome.ok()) << outcome;
    EXPECT_EQ(passed, allowed) << outcome;
  }
}

// Two guards a thread, in ascending order. Under kCoarse they are one holder; either way there is
// no deadlock.
TEST_P(RangeLockSchedTest, TwoGuardsAThread) {
  const auto body = [](RangeLock& lock, LockMode low, LockMode high, std::size_t from) {
    return [&lock, low, high, from] {
      RangeLock::Guard first(lock, Range(from, 8), low, Operation::kTest);
      RangeLock::Guard second(lock, Range(8, 16), high, Operation::kTest);
      if (low == kX) first.Downgrade();
      first.Release();
    };
  };
  for (const auto& [low, high] : {std::pair{kX, kX}, {kX, kS}, {kS, kS}}) {
    Scheduler scheduler({.threads = 2});
    Exhaustive schedules(kThorough ? 4 : 2);
    do {
      RangeLock lock(GetParam());
      const Outcome outcome = scheduler.Run({body(lock, low, high, 0), body(lock, kX, kX, 4)},
                                            schedules, [&] { lock.CheckInvariants(); });
      ASSERT_TRUE(outcome.ok()) << outcome;
    } while (schedules.Next());
  }
}

TEST_P(RangeLockSchedTest, RandomScriptsAndSchedules) {
  Scheduler scheduler({.threads = 5, .spurious_wakes = 2});
  for (std::uint64_t seed = 0; seed < 600; ++seed) {
    std::mt19937_64 random(seed);
    // Ranges within a granule, across a few, across many.
    constexpr std::size_t kScales[] = {1, 200, 2'000};
    const std::size_t scale = kScales[seed % 3];
    std::vector<Script> scripts(5);
    for (Script& script : scripts) {
      for (int i = 0; i < 4; ++i) {
        const std::size_t first = random() % 12;
        const std::size_t end = first + 1 + random() % 6;
        const LockMode mode = random() % 2 == 0 ? kX : kS;
        const bool short_one = scale != 1 && random() % 2 == 0;
        script.push_back({.mode = mode,
                          .range = short_one ? Range(first * scale, first * scale + 1)
                                             : Range(first * scale, end * scale),
                          .how = static_cast<Action::How>(random() % 3),
                          .downgrade = mode == kX && random() % 4 == 0});
      }
    }
    Seeded schedule(seed);
    const Outcome outcome = RunOnce(scheduler, scripts, schedule, false);
    ASSERT_TRUE(outcome.ok()) << "seed " << seed << "\n" << Describe(scripts) << outcome;
  }
}

}  // namespace
}  // namespace freehold::vm::sync
