#include "allocator/chunk.h"

#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace freehold::allocator {
namespace {

using Bits = std::vector<bool>;

UnitSet ToSet(const Bits& bits) {
  UnitSet set;
  for (unsigned i = 0; i < kChunkUnits; ++i) {
    if (bits[i]) set = set | UnitSet::Of(i, 1);
  }
  return set;
}

unsigned RunAt(const Bits& bits, unsigned first) {
  unsigned end = first;
  while (end < kChunkUnits && bits[end]) ++end;
  return end - first;
}

TEST(UnitSetTest, OfAndCount) {
  EXPECT_TRUE(UnitSet().empty());
  EXPECT_TRUE(UnitSet::All().full());
  EXPECT_EQ(UnitSet::Of(0, kChunkUnits), UnitSet::All());
  EXPECT_EQ(UnitSet::Of(3, 5).count(), 5u);
  EXPECT_EQ(UnitSet::Of(3, 5).first(), 3u);
  EXPECT_EQ(UnitSet::Of(63, 1).first(), 63u);
}

TEST(UnitSetTest, Algebra) {
  const UnitSet low = UnitSet::Of(0, 8);
  const UnitSet high = UnitSet::Of(4, 8);
  EXPECT_EQ(low & high, UnitSet::Of(4, 4));
  EXPECT_EQ(low | high, UnitSet::Of(0, 12));
  EXPECT_EQ(low - high, UnitSet::Of(0, 4));
  EXPECT_TRUE(low.Overlaps(high));
  EXPECT_FALSE(low.Contains(high));
  EXPECT_TRUE((low | high).Contains(high));
}

TEST(UnitSetTest, RunsAgreeWithLooking) {
  std::mt19937 random(20260731);
  for (int round = 0; round < 3000; ++round) {
    const unsigned density = random() % 101;
    Bits bits(kChunkUnits);
    for (unsigned i = 0; i < kChunkUnits; ++i) bits[i] = random() % 100 < density;
    const UnitSet set = ToSet(bits);
    unsigned longest = 0;
    for (unsigned i = 0; i < kChunkUnits; ++i) longest = std::max(longest, RunAt(bits, i));
    ASSERT_EQ(set.LongestRun(), longest);
    for (unsigned length = 1; length <= kChunkUnits; ++length) {
      unsigned first = 0;
      while (first < kChunkUnits && RunAt(bits, first) < length) ++first;
      ASSERT_EQ(set.FindRun(length), first) << length;
      if (first == kChunkUnits) continue;
      unsigned last = kChunkUnits - 1;
      while (RunAt(bits, last) < length) --last;
      ASSERT_EQ(set.FindLastRun(length), last) << length;
    }
    if (!set.empty()) {
      ASSERT_EQ(set.RunAt(set.first()), RunAt(bits, set.first()));
    }
  }
}

TEST(UnitSetTest, FullSet) {
  EXPECT_EQ(UnitSet::All().LongestRun(), kChunkUnits);
  EXPECT_EQ(UnitSet::All().FindRun(kChunkUnits), 0u);
  EXPECT_EQ(UnitSet::All().RunAt(0), kChunkUnits);
  EXPECT_EQ(UnitSet().LongestRun(), 0u);
  EXPECT_EQ(UnitSet().FindRun(1), kChunkUnits);
}

}  // namespace
}  // namespace freehold::allocator
