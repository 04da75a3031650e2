// Buckets and percentiles of hold times, and the lock that feeds them.
#include "vm/sync/time_histogram.h"

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "vm/sync/clock.h"
#include "vm/sync/spin_lock.h"

namespace freehold::vm::sync {
namespace {

TimeHistogram Of(const std::vector<std::uint64_t>& holds) {
  TimeHistogram histogram;
  for (const std::uint64_t held : holds) histogram.Add(TimeHistogram::BucketOf({held}), 1);
  return histogram;
}

//   nanoseconds   0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 9 | 10 11 | 12 13 | 14 15 | 16 .. 19 | ...
TEST(TimeHistogramTest, BucketsAreAQuarterOfADoublingWide) {
  for (std::uint64_t held = 0; held < 8; ++held) EXPECT_EQ(TimeHistogram::BucketOf({held}), held);
  EXPECT_EQ(TimeHistogram::BucketOf({8}), TimeHistogram::BucketOf({9}));
  EXPECT_EQ(TimeHistogram::LastOf(TimeHistogram::BucketOf({8})), Nanoseconds{9});
  EXPECT_EQ(TimeHistogram::LastOf(TimeHistogram::BucketOf({17})), Nanoseconds{19});
  std::size_t bucket = 0;
  for (std::uint64_t held = 1; held < 1'500'000'000; held += 1 + held / 16) {
    const std::size_t now = TimeHistogram::BucketOf({held});
    ASSERT_LE(bucket, now) << held;
    bucket = now;
    ASSERT_LE(held, TimeHistogram::LastOf(now).value) << held;
    ASSERT_LE(TimeHistogram::LastOf(now).value, held + held / 4) << held;
    ASSERT_EQ(TimeHistogram::BucketOf(TimeHistogram::LastOf(now)), now) << held;
    ASSERT_EQ(TimeHistogram::BucketOf(TimeHistogram::LastOf(now) + Nanoseconds{1}), now + 1) << held;
  }
}

TEST(TimeHistogramTest, WhatIsTooLongCountsInTheLastBucket) {
  EXPECT_EQ(TimeHistogram::BucketOf({UINT64_MAX}), TimeHistogram::kBuckets - 1);
  EXPECT_GE(TimeHistogram::LastOf(TimeHistogram::kBuckets - 1), Nanoseconds{2'000'000'000});
}

TEST(TimeHistogramTest, Percentiles) {
  EXPECT_EQ(TimeHistogram().count(), 0u);
  EXPECT_EQ(TimeHistogram().Percentile(0.5), Nanoseconds{0});
  const TimeHistogram histogram = Of({1, 2, 3, 4, 5, 6, 7, 7, 7, 1000});
  EXPECT_EQ(histogram.count(), 10u);
  EXPECT_EQ(histogram.Percentile(0.1), Nanoseconds{1});
  EXPECT_EQ(histogram.Percentile(0.5), Nanoseconds{5});
  EXPECT_EQ(histogram.Percentile(0.9), Nanoseconds{7});
  EXPECT_EQ(histogram.Percentile(1), Nanoseconds{1023});
}

TEST(TimeHistogramTest, CopiesAddAndSubtract) {
  TimeHistogram histogram = Of({3, 5});
  histogram += Of({7});
  EXPECT_EQ(histogram.count(), 3u);
  histogram -= Of({3, 5});
  EXPECT_EQ(histogram.count(), 1u);
  EXPECT_EQ(histogram.Percentile(0.01), Nanoseconds{7});
}

TEST(RecordedSpinLockTest, RecordsNothingUntilAsked) {
  RecordedSpinLock lock(LockRank::kLeaf);
  EXPECT_EQ(lock.recorder(), nullptr);
  { SpinLockHolder holder(lock); }
  TimeRecorder recorder;
  lock.InstallRecorder(&recorder);
  EXPECT_EQ(recorder.Read().count(), 0u);
  { SpinLockHolder holder(lock); }
  EXPECT_EQ(recorder.Read().count(), 1u);
}

TEST(RecordedSpinLockTest, RecordsHowLongItWasHeldAndNotHowLongItWasWaitedFor) {
  constexpr Nanoseconds kLong = Milliseconds(20);
  RecordedSpinLock lock(LockRank::kLeaf);
  TimeRecorder recorder;
  lock.InstallRecorder(&recorder);
  std::atomic<bool> held{false};
  std::thread holder([&] {
    SpinLockHolder holder(lock);
    held.store(true);
    const Nanoseconds end = MonotonicNow() + kLong;
    while (MonotonicNow() < end) {
    }
  });
  while (!held.load()) std::this_thread::yield();
  { SpinLockHolder waiter(lock); }
  holder.join();
  const TimeHistogram holds = recorder.Read();
  EXPECT_EQ(holds.count(), 2u);
  EXPECT_GE(holds.Percentile(1), kLong);
  EXPECT_LT(holds.Percentile(0.5), kLong);
}

TEST(RecordedSpinLockTest, CountsTheHoldsOfAllThreads) {
  constexpr int kThreads = 4;
  constexpr int kHolds = 20'000;
  RecordedSpinLock lock(LockRank::kLeaf);
  TimeRecorder recorder;
  lock.InstallRecorder(&recorder);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      for (int hold = 0; hold < kHolds; ++hold) SpinLockHolder holder(lock);
    });
  }
  while (recorder.Read().count() < 100) std::this_thread::yield();  // Beside the writers.
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(recorder.Read().count(), std::uint64_t{kThreads} * kHolds);
}

}  // namespace
}  // namespace freehold::vm::sync
