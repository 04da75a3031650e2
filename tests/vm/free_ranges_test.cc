// The bins of cached extents, alone: what goes in comes out, at its size, in the order that is promised.
#include "vm/free_ranges.h"

#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace freehold::vm {
namespace {

using enum Knowledge;

// Bins and the extents that go into them.
class Harness {
 public:
  Vma* New(RegionPage first, RegionPage count, Knowledge knowledge = kUnknown) {
    Vma* vma = &vmas_.emplace_back();
    VmaWriter writer(*vma);
    writer.SetRange(first, count);
    writer.SetState(VmaState::kCached);
    vma->knowledge = knowledge;
    return vma;
  }
  Vma* Push(RegionPage first, RegionPage count, Knowledge knowledge = kUnknown, std::uint32_t now = 0) {
    Vma* vma = New(first, count, knowledge);
    bins.Push(vma, now);
    bins.CheckInvariants();
    return vma;
  }
  Vma* Take(RegionPage count, Knowledge knowledge = kUnknown, std::uint64_t alignment = 1,
            std::uint64_t origin = 0) {
    Vma* vma = bins.Take(count, knowledge, alignment, origin);
    bins.CheckInvariants();
    return vma;
  }

  FreeRanges bins;

 private:
  std::deque<Vma> vmas_;
};

// ---- Bins ----

TEST(FreeRangesBinTest, SmallSizesHaveBinsOfTheirOwn) {
  for (RegionPage count = 1; count <= FreeRanges::kExactPages; ++count) {
    EXPECT_EQ(FreeRanges::BinOf(count), static_cast<int>(count) - 1);
  }
}

//   pages   64 | 65 .. 79 | 80 .. 95 | 96 .. 111 | 112 .. 127 | 128 .. 159 | ...
//   bin     63 |    64    |    65    |    66     |     67     |     68     | ...
TEST(FreeRangesBinTest, LargeSizesHaveFourBinsADoubling) {
  EXPECT_EQ(FreeRanges::BinOf(65), 64);
  EXPECT_EQ(FreeRanges::BinOf(79), 64);
  EXPECT_EQ(FreeRanges::BinOf(80), 65);
  EXPECT_EQ(FreeRanges::BinOf(96), 66);
  EXPECT_EQ(FreeRanges::BinOf(112), 67);
  EXPECT_EQ(FreeRanges::BinOf(127), 67);
  EXPECT_EQ(FreeRanges::BinOf(128), 68);
  EXPECT_EQ(FreeRanges::BinOf(159), 68);
  EXPECT_EQ(FreeRanges::BinOf(160), 69);
}

TEST(FreeRangesBinTest, BinsAscendWithSizesAndAllExist) {
  int last = -1;
  for (std::uint64_t count = 1; count <= UINT32_MAX; count += 1 + count / 64) {
    const int bin = FreeRanges::BinOf(static_cast<RegionPage>(count));
    ASSERT_GE(bin, last) << count;
    ASSERT_LE(bin, last + 1) << count << ": a bin that no size has";
    last = bin;
  }
  EXPECT_EQ(FreeRanges::BinOf(UINT32_MAX), FreeRanges::kBinCount - 1);
  EXPECT_EQ(last, FreeRanges::kBinCount - 1);
}

// ---- Pushing and taking ----

TEST(FreeRangesTest, StartsEmpty) {
  Harness h;
  h.bins.CheckInvariants();
  EXPECT_EQ(h.bins.extents(), 0u);
  EXPECT_EQ(h.bins.dirty_pages(), 0u);
  EXPECT_EQ(h.Take(1), nullptr);
  EXPECT_EQ(h.bins.Oldest(0, kUnknown), nullptr);
}

TEST(FreeRangesTest, TakesTheNewestAndKnowsTheOldest) {
  Harness h;
  Vma* a = h.Push(0, 4, kUnknown, 10);
  Vma* b = h.Push(8, 4, kUnknown, 11);
  Vma* c = h.Push(16, 4, kUnknown, 12);
  const int bin = FreeRanges::BinOf(4);
  EXPECT_EQ(h.bins.Oldest(bin, kUnknown), a);
  EXPECT_EQ(h.bins.ListSize(bin, kUnknown), 3u);
  EXPECT_EQ(a->freed_at, 10u);
  EXPECT_EQ(h.Take(4), c);
  EXPECT_EQ(h.Take(4), b);
  EXPECT_EQ(h.bins.Oldest(bin, kUnknown), a);
  EXPECT_EQ(h.Take(4), a);
  EXPECT_EQ(h.Take(4), nullptr);
  EXPECT_EQ(h.bins.Oldest(bin, kUnknown), nullptr);
}

TEST(FreeRangesTest, RemovesTheNewest) {
  Harness h;
  EXPECT_EQ(h.bins.Newest(4, kUnknown), nullptr);
  Vma* a = h.Push(0, 4);
  Vma* b = h.Push(8, 4);
  Vma* clean = h.Push(16, 4, kClean);
  for (Vma* vma : {b, a}) {
    EXPECT_EQ(h.bins.Newest(4, kUnknown), vma);
    h.bins.RemoveNewest(4, kUnknown);
    h.bins.CheckInvariants();
  }
  EXPECT_EQ(h.bins.Newest(4, kUnknown), nullptr);
  EXPECT_EQ(h.bins.dirty_pages(), 0u);
  EXPECT_EQ(h.bins.Newest(4, kClean), clean);
  h.bins.RemoveNewest(4, kClean);
  h.bins.CheckInvariants();
  EXPECT_EQ(h.bins.extents(), 0u);
}

TEST(FreeRangesTest, TakesTheOldestOfABin) {
  Harness h;
  Vma* taken[4] = {};
  EXPECT_EQ(h.bins.TakeOldest(4, kUnknown, 4, taken), 0u);
  Vma* vmas[5];
  for (RegionPage i = 0; i < 5; ++i) vmas[i] = h.Push(8 * i, 4, kUnknown, i);
  ASSERT_EQ(h.bins.TakeOldest(4, kUnknown, 2, taken), 2u);
  EXPECT_EQ(taken[0], vmas[0]);
  EXPECT_EQ(taken[1], vmas[1]);
  h.bins.CheckInvariants();
  EXPECT_EQ(h.bins.extents(), 3u);
  EXPECT_EQ(h.bins.dirty_pages(), 12u);
  ASSERT_EQ(h.bins.TakeOldest(4, kUnknown, 4, taken), 3u) << "all that is left";
  EXPECT_EQ(taken[2], vmas[4]);
  h.bins.CheckInvariants();
  EXPECT_EQ(h.bins.dirty_pages(), 0u);
  // What was taken goes in again like any other.
  h.bins.Push(vmas[1], 9);
  h.bins.CheckInvariants();
  EXPECT_EQ(h.Take(4), vmas[1]);
}

TEST(FreeRangesTest, RemovesFromEverywhereInAList) {
  Harness h;
  Vma* a = h.Push(0, 4);
  Vma* b = h.Push(8, 4);
  Vma* c = h.Push(16, 4);
  Vma* d = h.Push(24, 4);
  const int bin = FreeRanges::BinOf(4);
  for (Vma* vma : {b, a, d}) {  // the middle, the oldest, the newest
    h.bins.Remove(vma);
    h.bins.CheckInvariants();
    EXPECT_EQ(h.bins.Oldest(bin, kUnknown), vma == b ? a : c);
  }
  h.bins.Remove(c);
  h.bins.CheckInvariants();
  EXPECT_EQ(h.bins.extents(), 0u);
}

TEST(FreeRangesTest, KeepsKnowledgeApart) {
  Harness h;
  Vma* clean = h.Push(0, 4, kClean);
  Vma* resident = h.Push(8, 4, kResident);
  EXPECT_EQ(h.Take(4, kUnknown), nullptr);
  EXPECT_EQ(h.Take(4, kClean), clean);
  EXPECT_EQ(h.Take(4, kClean), nullptr);
  EXPECT_EQ(h.Take(4, kResident), resident);
}

TEST(FreeRangesTest, CountsPagesOfSmallExtents) {
  Harness h;
  EXPECT_EQ(h.bins.small_pages(), 0u);
  h.Push(0, 1, kClean);
  h.Push(8, FreeRanges::kExactPages, kClean);
  h.Push(100, 7, kClean);
  Vma* second = h.Push(108, 7, kClean);
  EXPECT_EQ(h.bins.small_pages(), 1 + FreeRanges::kExactPages + 14);
  h.Push(200, 5, kResident);
  h.Push(208, 100, kUnknown);
  EXPECT_EQ(h.bins.small_pages(), 1 + FreeRanges::kExactPages + 14 + 5);
  h.bins.Remove(second);
  EXPECT_EQ(h.bins.small_pages(), 1 + FreeRanges::kExactPages + 7 + 5);
}

TEST(FreeRangesTest, CountsPagesThatMayBeResident) {
  Harness h;
  h.Push(0, 4, kClean);
  EXPECT_EQ(h.bins.dirty_pages(), 0u);
  Vma* resident = h.Push(8, 5, kResident);
  h.Push(16, 6, kUnknown);
  EXPECT_EQ(h.bins.dirty_pages(), 11u);
  EXPECT_EQ(h.bins.extents(), 3u);
  h.bins.Remove(resident);
  EXPECT_EQ(h.bins.dirty_pages(), 6u);
  h.Take(6);
  EXPECT_EQ(h.bins.dirty_pages(), 0u);
  EXPECT_EQ(h.bins.extents(), 1u);
}

TEST(FreeRangesTest, TakesExactlyTheSizeOfASmallBin) {
  Harness h;
  h.Push(0, 5);
  h.Push(8, 3);
  EXPECT_EQ(h.Take(4), nullptr);
}

// A bin of several sizes has extents that are too small, and larger ones that serve.
TEST(FreeRangesTest, TakesAtLeastTheSizeFromALargeBin) {
  Harness h;
  Vma* large = h.Push(0, 79);
  h.Push(100, 66);
  ASSERT_EQ(FreeRanges::BinOf(66), FreeRanges::BinOf(79));
  EXPECT_EQ(h.Take(70), large);
  EXPECT_EQ(h.Take(70), nullptr);
  EXPECT_NE(h.Take(66), nullptr);
}

// More than the exact bins hold is taken from larger bins too, the smallest that serves; less is not.
TEST(FreeRangesTest, TakesFromLargerBinsAboveTheExactOnes) {
  Harness h;
  Vma* huge = h.Push(0, 5000);
  Vma* large = h.Push(5000, 300);
  EXPECT_EQ(h.Take(64), nullptr) << "a bin of its own";
  EXPECT_EQ(h.Take(65), large);
  EXPECT_EQ(h.Take(5001), nullptr);
  EXPECT_EQ(h.Take(65), huge);
}

TEST(FreeRangesTest, FindsTheLargestOfThoseThatAreTooSmall) {
  Harness h;
  h.Push(0, 64);                     // has a bin of its own
  h.Push(1000, 300, kClean);         // holds nothing
  Vma* small = h.Push(2000, 66);
  Vma* middle = h.Push(3000, 200, kResident);
  h.Push(4000, 500);                 // large enough
  const auto any = [](const Vma*) { return true; };
  EXPECT_EQ(h.bins.FindSmaller(400, any), middle);
  EXPECT_EQ(h.bins.FindSmaller(400, [&](const Vma* vma) { return vma != middle; }), small);
  EXPECT_EQ(h.bins.FindSmaller(66, any), nullptr);
  EXPECT_EQ(h.bins.FindSmaller(400, [](const Vma*) { return false; }), nullptr);
  h.bins.CheckInvariants();
}

TEST(FreeRangesTest, LooksForSmallerOnesAtAFewOnly) {
  Harness h;
  Vma* far = h.Push(0, 100);
  for (RegionPage i = 1; i <= 20; ++i) h.Push(i * 1000, 200);
  int seen = 0;
  const auto is_far = [&](const Vma* vma) { return ++seen, vma == far; };
  EXPECT_EQ(h.bins.FindSmaller(400, is_far), nullptr);
  EXPECT_GT(seen, 1);
  EXPECT_LT(seen, 20);
}

TEST(FreeRangesTest, KnowsTheSmallestLargeOne) {
  Harness h;
  EXPECT_EQ(h.bins.SmallestLarge(), nullptr);
  h.Push(0, 64);
  h.Push(100, 70, kClean);
  EXPECT_EQ(h.bins.SmallestLarge(), nullptr);
  Vma* large = h.Push(1000, 300, kResident);
  EXPECT_EQ(h.bins.SmallestLarge(), large);
  Vma* oldest = h.Push(2000, 100);
  h.Push(3000, 100);
  EXPECT_EQ(h.bins.SmallestLarge(), oldest);
  Vma* smaller = h.Push(4000, 65, kResident);
  EXPECT_EQ(h.bins.SmallestLarge(), smaller);
}

TEST(FreeRangesTest, PutsAnOldExtentInItsPlace) {
  Harness h;
  const int bin = FreeRanges::BinOf(4);
  Vma* c = h.Push(0, 4, kUnknown, 30);
  Vma* a = h.Push(8, 4, kUnknown, 10);   // older than all
  Vma* d = h.Push(16, 4, kUnknown, 40);  // newer than all
  Vma* b = h.Push(24, 4, kUnknown, 20);  // in between
  EXPECT_EQ(h.bins.Oldest(bin, kUnknown), a);
  for (Vma* vma : {d, c, b, a}) EXPECT_EQ(h.Take(4), vma);
  EXPECT_EQ(h.Take(4), nullptr);
}

//   origin 3:  region page   0   1   2   3   4   5   6   7   8   9
//              address page  3   4   5   6   7   8   9  10  11  12
TEST(FreeRangesTest, CountsAlignmentFromTheOrigin) {
  Harness h;
  Vma* at_5 = h.Push(5, 2);
  Vma* at_4 = h.Push(4, 1);
  Vma* at_8 = h.Push(8, 2);
  EXPECT_EQ(h.Take(2, kUnknown, 4, 3), at_5) << "address page 8; the newer one is at 11";
  EXPECT_EQ(h.Take(2, kUnknown, 4, 3), nullptr);
  EXPECT_EQ(h.Take(2, kUnknown, 4, 0), at_8);
  EXPECT_EQ(h.Take(1, kUnknown, 4, 0), at_4);
}

TEST(FreeRangesTest, SearchesAFewForAnAlignment) {
  Harness h;
  Vma* aligned = h.Push(16, 2);
  for (RegionPage i = 0; i < 7; ++i) h.Push(101 + 4 * i, 2);
  EXPECT_EQ(h.Take(2, kUnknown, 16), aligned) << "the eighth";
}

// The same pushes, takes and removals on a map of lists.
TEST(FreeRangesTest, AgreesWithAMapOfLists) {
  for (const unsigned seed : {1u, 2u, 3u}) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    Harness h;
    std::map<std::pair<int, Knowledge>, std::list<Vma*>> model;  // newest first
    std::vector<Vma*> idle;
    for (RegionPage i = 0; i < 200; ++i) {
      idle.push_back(h.New(1000 * i, 1 + random() % 100, static_cast<Knowledge>(random() % 3)));
    }
    for (int step = 0; step < 20'000; ++step) {
      const auto count = static_cast<RegionPage>(1 + random() % 100);
      const auto knowledge = static_cast<Knowledge>(random() % 3);
      std::list<Vma*>& list = model[{FreeRanges::BinOf(count), knowledge}];
      if (random() % 2 == 0 && !idle.empty()) {
        std::swap(idle[random() % idle.size()], idle.back());
        Vma* vma = idle.back();
        idle.pop_back();
        h.bins.Push(vma, 0);
        model[{FreeRanges::BinOf(vma->page_count()), vma->knowledge}].push_front(vma);
      } else if (random() % 4 == 0) {
        if (list.empty()) continue;
        Vma* vma = list.back();
        ASSERT_EQ(h.bins.Oldest(FreeRanges::BinOf(count), knowledge), vma);
        h.bins.Remove(vma);
        list.pop_back();
        idle.push_back(vma);
      } else {
        Vma* expected = nullptr;
        const int own = FreeRanges::BinOf(count);
        const int last = count <= FreeRanges::kExactPages ? own : FreeRanges::kBinCount - 1;
        for (int bin = own; bin <= last && expected == nullptr; ++bin) {
          int looks = 0;
          for (Vma* vma : model[{bin, knowledge}]) {
            if (expected == nullptr && looks++ < 8 && vma->page_count() >= count) expected = vma;
          }
        }
        ASSERT_EQ(h.bins.Take(count, knowledge, 1, 0), expected) << "step " << step;
        if (expected == nullptr) continue;
        model[{FreeRanges::BinOf(expected->page_count()), knowledge}].remove(expected);
        idle.push_back(expected);
      }
      if (step % 100 == 0) h.bins.CheckInvariants();
      ASSERT_EQ(h.bins.extents() + idle.size(), 200u);
    }
  }
}

// ---- Samples ----

TEST(FreeRangesSampleTest, ExpectsNothingBeforeTheFirst) {
  Harness h;
  EXPECT_FALSE(h.bins.ExpectsResident(4));
  EXPECT_TRUE(h.bins.WantsSample(4));
}

TEST(FreeRangesSampleTest, SmallExtentsAreExpectedResidentWhenALittleIs) {
  Harness h;
  h.bins.AddSample(32, 1, 32);
  EXPECT_TRUE(h.bins.ExpectsResident(32));
  h.bins.AddSample(31, 0, 31);
  EXPECT_FALSE(h.bins.ExpectsResident(31));
  EXPECT_FALSE(h.bins.ExpectsResident(33)) << "a bin of its own";
}

TEST(FreeRangesSampleTest, LargeExtentsAreExpectedResidentWhenHalfIs) {
  Harness h;
  h.bins.AddSample(1024, 255, 512);
  EXPECT_FALSE(h.bins.ExpectsResident(1024));
  h.bins.AddSample(2048, 256, 512);
  EXPECT_TRUE(h.bins.ExpectsResident(2048));
}

TEST(FreeRangesSampleTest, ForgetsSlowly) {
  Harness h;
  h.bins.AddSample(1024, 512, 512);
  h.bins.AddSample(1024, 0, 512);
  EXPECT_TRUE(h.bins.ExpectsResident(1024)) << "three quarters";
  h.bins.AddSample(1024, 0, 512);
  EXPECT_TRUE(h.bins.ExpectsResident(1024)) << "nine sixteenths";
  h.bins.AddSample(1024, 0, 512);
  EXPECT_FALSE(h.bins.ExpectsResident(1024));
}

TEST(FreeRangesSampleTest, WantsTheFirstFewThenOneInManyUnmaps) {
  Harness h;
  for (int i = 0; i < 4; ++i) {
    ASSERT_TRUE(h.bins.WantsSample(4)) << i;
    h.bins.AddSample(4, 4, 4);
  }
  for (int period = 0; period < 3; ++period) {
    for (int i = 0; i < 256; ++i) ASSERT_FALSE(h.bins.WantsSample(4)) << period << "/" << i;
    ASSERT_TRUE(h.bins.WantsSample(4));
    h.bins.AddSample(4, 4, 4);
  }
  EXPECT_TRUE(h.bins.WantsSample(5)) << "a bin of its own";
}

TEST(FreeRangesSampleTest, SkippingPutsOff) {
  Harness h;
  ASSERT_TRUE(h.bins.WantsSample(4));
  h.bins.SkipSample(4);
  for (int i = 0; i < 256; ++i) ASSERT_FALSE(h.bins.WantsSample(4));
  EXPECT_TRUE(h.bins.WantsSample(4));
}

// ---- The checker fails when it must ----

TEST(FreeRangesDeathTest, CheckerFindsAnAgeOutOfOrder) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Harness h;
  Vma* old = h.Push(0, 4, kUnknown, 10);
  h.Push(8, 4, kUnknown, 20);
  old->freed_at = 30;
  EXPECT_DEATH(h.bins.CheckInvariants(), "check failed");
}

TEST(FreeRangesDeathTest, CheckerFindsWhatChangedInABin) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Harness h;
  Vma* vma = h.Push(0, 4);
  h.Push(8, 4);

  VmaWriter(*vma).SetState(VmaState::kMapped);
  EXPECT_DEATH(h.bins.CheckInvariants(), "check failed");
  VmaWriter(*vma).SetState(VmaState::kCached);

  VmaWriter(*vma).SetRange(0, 5);
  EXPECT_DEATH(h.bins.CheckInvariants(), "check failed");
  VmaWriter(*vma).SetRange(0, 4);

  vma->knowledge = kClean;
  EXPECT_DEATH(h.bins.CheckInvariants(), "check failed");
  vma->knowledge = kUnknown;

  vma->newer = nullptr;
  EXPECT_DEATH(h.bins.CheckInvariants(), "check failed");
}

}  // namespace
}  // namespace freehold::vm
