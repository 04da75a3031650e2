// Waits and holds of range locks, by operation: what counts, under which operation, and what does not.
#include "vm/sync/lock_times.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "vm/sync/clock.h"
#include "vm/sync/range_lock.h"
#include "vm/units.h"

namespace freehold::vm::sync {
namespace {

using Guard = RangeLock::Guard;

constexpr LockMode kS = LockMode::kShared;
constexpr LockMode kX = LockMode::kExclusive;
constexpr Nanoseconds kLong = Milliseconds(20);

constexpr PageRange Range(std::size_t first, std::size_t end) { return {{first}, {end}}; }

void Sleep(Nanoseconds time) {
  const Nanoseconds end = MonotonicNow() + time;
  while (MonotonicNow() < end) std::this_thread::yield();
}

class LockTimesTest : public ::testing::TestWithParam<LockPolicy> {
 protected:
  LockTimesTest() { lock_.InstallRecorder(recorder_.get()); }

  // Waits and holds that were counted for `operation`.
  std::array<std::uint64_t, 2> Counts(Operation operation) const {
    const LockTimes times = recorder_->Read(operation);
    return {times.waits.count(), times.holds.count()};
  }
  // Of all operations.
  std::array<std::uint64_t, 2> Counts() const {
    std::array<std::uint64_t, 2> sum = {};
    for (std::size_t i = 0; i < kOperations; ++i) {
      const auto counts = Counts(static_cast<Operation>(i));
      sum[0] += counts[0];
      sum[1] += counts[1];
    }
    return sum;
  }
  using Counted = std::array<std::uint64_t, 2>;

  void TearDown() override { lock_.CheckInvariants(); }

  const std::unique_ptr<LockTimesRecorder> recorder_ = std::make_unique<LockTimesRecorder>();
  RangeLock lock_{GetParam()};
};

INSTANTIATE_TEST_SUITE_P(Policies, LockTimesTest,
                         ::testing::Values(LockPolicy::kCoarse, LockPolicy::kTree, LockPolicy::kAdaptive),
                         [](const auto& info) { return ToString(info.param); });

TEST_P(LockTimesTest, NothingIsCountedBeforeAnythingIsLocked) { EXPECT_EQ(Counts(), (Counted{0, 0})); }

TEST_P(LockTimesTest, AGuardIsAWaitWhenGrantedAndAHoldWhenReleased) {
  {
    const Guard guard(lock_, Range(0, 8), kX, Operation::kMap);
    EXPECT_EQ(Counts(Operation::kMap), (Counted{1, 0}));
  }
  EXPECT_EQ(Counts(Operation::kMap), (Counted{1, 1}));
  EXPECT_EQ(Counts(), (Counted{1, 1}));
}

TEST_P(LockTimesTest, EveryOperationHasItsOwn) {
  for (std::size_t i = 0; i < kOperations; ++i) {
    for (std::size_t guards = 0; guards <= i; ++guards) {
      const Guard guard(lock_, Range(8 * i, 8 * i + 8), guards % 2 == 0 ? kX : kS, static_cast<Operation>(i));
    }
  }
  for (std::size_t i = 0; i < kOperations; ++i) {
    EXPECT_EQ(Counts(static_cast<Operation>(i)), (Counted{i + 1, i + 1})) << ToString(static_cast<Operation>(i));
  }
}

TEST_P(LockTimesTest, EveryWayToAGuardCounts) {
  { const Guard guard = Guard::Try(lock_, Range(0, 8), kX, Operation::kMap); }
  { const Guard guard = Guard::Until(lock_, Range(0, 8), kS, Operation::kMap, {0}); }
  { const Guard guard = Guard::WholeSpace(lock_, kX, Operation::kMap); }
  { const Guard guard(lock_, Range(0, 100'000), kX, Operation::kMap); }
  {
    Guard guard(lock_, Range(0, 8), kX, Operation::kMap);
    guard.Release();
    EXPECT_EQ(Counts(Operation::kMap), (Counted{5, 5})) << "not again by its destructor";
  }
  EXPECT_EQ(Counts(), (Counted{5, 5}));
}

TEST_P(LockTimesTest, WhatIsRefusedOrGivesUpDoesNotCount) {
  const Guard guard(lock_, Range(0, 8), kX, Operation::kMap);
  std::thread([&] {
    EXPECT_FALSE(Guard::Try(lock_, Range(0, 8), kX, Operation::kUnmap).held());
    EXPECT_FALSE(Guard::Until(lock_, Range(0, 8), kX, Operation::kUnmap, MonotonicNow() + Milliseconds(1)).held());
  }).join();
  EXPECT_EQ(Counts(), (Counted{1, 0}));
}

// One that was fast when it came and had to be moved into the tree, included.
TEST_P(LockTimesTest, TheWaiterHasTheWaitAndTheHolderTheHold) {
  std::atomic<bool> held{false};
  std::thread holder([&] {
    const Guard guard(lock_, Range(0, 8), kX, Operation::kUnmap);
    held.store(true);
    while (lock_.Holders(Range(0, 8)).total < 2) std::this_thread::yield();
    Sleep(kLong);
  });
  while (!held.load()) std::this_thread::yield();
  { const Guard waiter(lock_, Range(4, 12), kX, Operation::kProtect); }
  holder.join();
  EXPECT_EQ(Counts(Operation::kUnmap), (Counted{1, 1}));
  EXPECT_EQ(Counts(Operation::kProtect), (Counted{1, 1}));
  EXPECT_GE(recorder_->Read(Operation::kUnmap).holds.Percentile(1), kLong);
  EXPECT_GE(recorder_->Read(Operation::kProtect).waits.Percentile(1), kLong);
  EXPECT_EQ(Counts(), (Counted{2, 2}));
}

TEST_P(LockTimesTest, AHoldGoesOnThroughADowngrade) {
  {
    Guard guard(lock_, Range(0, 8), kX, Operation::kUnmap);
    Sleep(kLong);
    guard.Downgrade();
    Sleep(kLong);
  }
  EXPECT_EQ(Counts(), (Counted{1, 1}));
  EXPECT_GE(recorder_->Read(Operation::kUnmap).holds.Percentile(1), kLong + kLong);
}

TEST_P(LockTimesTest, GuardsOfOneThreadCountOneByOne) {
  {
    const Guard first(lock_, Range(0, 8), kX, Operation::kRemap);
    const Guard second(lock_, Range(8, 16), kX, Operation::kRemap);
    const Guard third(lock_, Range(100'000, 200'000), kS, Operation::kFork);
    EXPECT_EQ(Counts(Operation::kRemap), (Counted{2, 0}));
  }
  EXPECT_EQ(Counts(Operation::kRemap), (Counted{2, 2}));
  EXPECT_EQ(Counts(Operation::kFork), (Counted{1, 1}));
}

TEST_P(LockTimesTest, OneRecorderServesSeveralLocks) {
  RangeLock other(GetParam());
  other.InstallRecorder(recorder_.get());
  { const Guard guard(lock_, Range(0, 8), kX, Operation::kMap); }
  { const Guard guard(other, Range(0, 8), kX, Operation::kMap); }
  EXPECT_EQ(Counts(Operation::kMap), (Counted{2, 2}));
}

// On the same pages, beside each other and over all of them: nothing is lost, whichever path a guard took.
TEST_P(LockTimesTest, CountsTheGuardsOfAllThreads) {
  constexpr std::uint64_t kThreads = 4;
  constexpr std::uint64_t kRounds = 2'000;
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (std::uint64_t round = 0; round < kRounds; ++round) {
        { const Guard own(lock_, Range(1000 * i, 1000 * i + 8), kX, Operation::kMap); }
        { const Guard shared(lock_, Range(0, 8), kS, Operation::kFault); }
        { const Guard contended(lock_, Range(0, 8), kX, Operation::kUnmap); }
        if (round % 64 == 0) const Guard whole = Guard::WholeSpace(lock_, kX, Operation::kFork);
      }
    });
  }
  while (recorder_->Read(Operation::kMap).holds.count() < 100) std::this_thread::yield();  // Beside the writers.
  for (std::thread& thread : threads) thread.join();
  constexpr std::uint64_t kWhole = kThreads * ((kRounds + 63) / 64);
  EXPECT_EQ(Counts(Operation::kMap), (Counted{kThreads * kRounds, kThreads * kRounds}));
  EXPECT_EQ(Counts(Operation::kFault), (Counted{kThreads * kRounds, kThreads * kRounds}));
  EXPECT_EQ(Counts(Operation::kUnmap), (Counted{kThreads * kRounds, kThreads * kRounds}));
  EXPECT_EQ(Counts(Operation::kFork), (Counted{kWhole, kWhole}));
}

}  // namespace
}  // namespace freehold::vm::sync
