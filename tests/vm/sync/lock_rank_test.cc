// The rank checker allows what the order allows and names both sites of what it does not.
#include "vm/sync/lock_rank.h"

#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "gtest/gtest.h"
#include "vm/page_range.h"
#include "vm/sync/range_lock.h"
#include "vm/sync/spin_lock.h"

namespace freehold::vm::sync {
namespace {

using Guard = RangeLock::Guard;

constexpr PageRange Range(std::size_t first, std::size_t end) { return {{first}, {end}}; }

std::string violation;

class LockRankTest : public ::testing::Test {
 protected:
  void SetUp() override {
    violation.clear();
    SetRankViolationHandlerForTest([](const char* message) { violation = message; });
  }
  void TearDown() override { SetRankViolationHandlerForTest(nullptr); }

  static bool Violated(const std::string& part) {
    return violation.find(part) != std::string::npos;
  }

  RangeLock ranges_{LockPolicy::kTree};
  RangeLock other_ranges_{LockPolicy::kTree};
  SpinLock heap_{LockRank::kHeap};
  SpinLock region_{LockRank::kRegion};
  SpinLock leaf_{LockRank::kLeaf};
};

TEST_F(LockRankTest, AscendingRanksPass) {
  SpinLockHolder heap(heap_);
  const Guard guard(ranges_, Range(0, 8), LockMode::kExclusive, Operation::kTest);
  SpinLockHolder region(region_);
  SpinLockHolder leaf(leaf_);
  EXPECT_EQ(violation, "");
}

TEST_F(LockRankTest, InversionNamesBothSites) {
  SpinLockHolder region(region_);
  const int held_line = __LINE__ - 1;
  SpinLockHolder heap(heap_);
  const int wanted_line = __LINE__ - 1;
  EXPECT_TRUE(Violated("acquiring kHeap")) << violation;
  EXPECT_TRUE(Violated("lock_rank_test.cc:" + std::to_string(wanted_line))) << violation;
  EXPECT_TRUE(Violated("while holding kRegion")) << violation;
  EXPECT_TRUE(Violated("lock_rank_test.cc:" + std::to_string(held_line))) << violation;
  EXPECT_TRUE(Violated("rank out of order")) << violation;
}

TEST_F(LockRankTest, EveryHeldLockCountsNotOnlyTheLast) {
  SpinLockHolder leaf(leaf_);
  SpinLockTryHolder heap(heap_);
  EXPECT_EQ(violation, "");
  SpinLockHolder region(region_);
  EXPECT_TRUE(Violated("while holding kLeaf")) << violation;
}

TEST_F(LockRankTest, OneRankTwiceIsRefused) {
  SpinLock second(LockRank::kLeaf);
  SpinLockHolder leaf(leaf_);
  SpinLockHolder another(second);
  EXPECT_TRUE(Violated("two locks of one rank")) << violation;
}

TEST_F(LockRankTest, OneRankAscendingWhereAllowed) {
  struct {
    SpinLock low{LockRank::kLeaf, SameRank::kAscendingAddress};
    SpinLock high{LockRank::kLeaf, SameRank::kAscendingAddress};
  } locks;
  {
    SpinLockHolder low(locks.low);
    SpinLockHolder high(locks.high);
    EXPECT_EQ(violation, "");
  }
  SpinLockHolder high(locks.high);
  SpinLockHolder low(locks.low);
  EXPECT_TRUE(Violated("addresses not ascending")) << violation;
}

TEST_F(LockRankTest, RangesAscend) {
  const Guard first(ranges_, Range(0, 4), LockMode::kExclusive, Operation::kTest);
  const Guard second(ranges_, Range(4, 8), LockMode::kExclusive, Operation::kTest);
  EXPECT_EQ(violation, "");
  const Guard below =
      Guard::Until(ranges_, Range(2, 3), LockMode::kShared, Operation::kTest, Nanoseconds{1});
  EXPECT_FALSE(below.held());
  EXPECT_TRUE(Violated("ranges not ascending")) << violation;
  EXPECT_TRUE(Violated("[0x2, 0x3)")) << violation;
}

TEST_F(LockRankTest, OverlappingRangesOfOneThreadAreRefused) {
  const Guard first(ranges_, Range(0, 4), LockMode::kShared, Operation::kTest);
  const Guard second(ranges_, Range(3, 8), LockMode::kShared, Operation::kTest);
  EXPECT_TRUE(Violated("ranges not ascending")) << violation;
}

TEST_F(LockRankTest, RangesOfTwoLocksAscendToo) {
  const Guard first(ranges_, Range(4, 8), LockMode::kShared, Operation::kTest);
  const Guard second(other_ranges_, Range(8, 12), LockMode::kShared, Operation::kTest);
  EXPECT_EQ(violation, "");
  const Guard below(other_ranges_, Range(0, 4), LockMode::kShared, Operation::kTest);
  EXPECT_TRUE(Violated("ranges not ascending")) << violation;
}

TEST_F(LockRankTest, PagesOfAPagerComeBeforeEverything) {
  RangeLock pages(LockPolicy::kAdaptive, LockRank::kPager);
  {
    const Guard pager(pages, Range(100, 108), LockMode::kShared, Operation::kTest);
    SpinLockHolder heap(heap_);
    const Guard memory(ranges_, Range(0, 8), LockMode::kExclusive, Operation::kTest);
    EXPECT_EQ(violation, "") << "their numbers have nothing to do with those of memory";
  }
  const Guard memory(ranges_, Range(0, 8), LockMode::kExclusive, Operation::kTest);
  const Guard pager(pages, Range(100, 108), LockMode::kShared, Operation::kTest);
  EXPECT_TRUE(Violated("acquiring kPager")) << violation;
  EXPECT_TRUE(Violated("rank out of order")) << violation;
}

TEST_F(LockRankTest, TryMayGoAgainstTheOrderButIsRemembered) {
  SpinLockHolder region(region_);
  const Guard guard = Guard::Try(ranges_, Range(0, 4), LockMode::kShared, Operation::kTest);
  EXPECT_TRUE(guard.held());
  EXPECT_EQ(violation, "");
  SpinLockHolder heap(heap_);
  EXPECT_NE(violation, "");
}

TEST_F(LockRankTest, ReleaseForgets) {
  { SpinLockHolder leaf(leaf_); }
  { const Guard guard(ranges_, Range(0, 4), LockMode::kShared, Operation::kTest); }
  {
    Guard late =
        Guard::Until(ranges_, Range(0, 4), LockMode::kShared, Operation::kTest, Nanoseconds{1});
    late.Release();
  }
  SpinLockHolder heap(heap_);
  EXPECT_EQ(violation, "");
}

TEST_F(LockRankTest, ThreadsAreIndependent) {
  SpinLockHolder leaf(leaf_);
  std::thread([&] { SpinLockHolder heap(heap_); }).join();
  EXPECT_EQ(violation, "");
}

TEST_F(LockRankTest, NothingSlowUnderAShortLock) {
  SpinLockHolder heap(heap_);
  CheckNoShortLockHeld("system call");
  EXPECT_EQ(violation, "");
  SpinLockHolder region(region_);
  CheckNoShortLockHeld("system call");
  EXPECT_TRUE(Violated("system call while holding the short lock kRegion")) << violation;
}

TEST_F(LockRankTest, WaitingOrSignallingUnderAShortLockIsFound) {
  Guard guard(ranges_, Range(0, 4), LockMode::kShared, Operation::kTest);
  SpinLockHolder region(region_);
  guard.Release();
  EXPECT_TRUE(Violated("range unlock while holding the short lock kRegion")) << violation;
}

TEST_F(LockRankTest, AssertHeldKnowsTheOwner) {
  {
    SpinLockHolder leaf(leaf_);
    leaf_.AssertHeld();
    EXPECT_EQ(violation, "");
  }
  leaf_.AssertHeld();
  EXPECT_TRUE(Violated("is not held")) << violation;
}

// What the analysis cannot see: fork handlers acquire in one function and release in another.
void LockForFork(SpinLock& lock) ABSL_NO_THREAD_SAFETY_ANALYSIS { lock.LockForFork(); }
void UnlockAfterFork(SpinLock& lock) ABSL_NO_THREAD_SAFETY_ANALYSIS { lock.UnlockAfterFork(); }

TEST_F(LockRankTest, ForkHandlersTakeEverythingInRankOrder) {
  SpinLock second(LockRank::kRegion);
  LockForFork(heap_);
  LockForFork(region_);
  LockForFork(second);
  EXPECT_EQ(violation, "");
  CheckNoShortLockHeld("fork");
  EXPECT_NE(violation, "");
  violation.clear();
  SpinLock snapshot(LockRank::kSnapshot);
  LockForFork(snapshot);
  EXPECT_TRUE(Violated("rank out of order")) << violation;
  for (SpinLock* lock : {&heap_, &region_, &second, &snapshot}) UnlockAfterFork(*lock);
  violation.clear();
  CheckNoShortLockHeld("fork");
  EXPECT_EQ(violation, "");
}

TEST(LockRankDeathTest, InversionAborts) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  SpinLock region(LockRank::kRegion);
  SpinLock heap(LockRank::kHeap);
  EXPECT_DEATH(
      {
        SpinLockHolder outer(region);
        SpinLockHolder inner(heap);
      },
      "lock order: acquiring kHeap 0x[0-9a-f]+ at .*lock_rank_test.cc:[0-9]+ while holding "
      "kRegion");
}

}  // namespace
}  // namespace freehold::vm::sync
