// AddressSpace::Map: every placement, option and error, with the address line before and after.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/address_space.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"
#include "vm/pin.h"

namespace freehold::vm {
namespace {

using namespace test;  // NOLINT: the fixture's words
using os::FakeKernel;
using os::LinuxKernel;
using os::Protection;

constexpr Protection kUnusual[] = {Protection::kNone,     Protection::kRead,     Protection::kWrite,
                                   Protection::kExec,     Protection::kReadExec, Protection::kReadWriteExec};

class MapTest : public PolicyTest {
 protected:
  // Pages of the first plain region.
  PageRange P(std::size_t first, std::size_t count) const { return Part(space_->reservation(), first, count); }
  std::string Line(std::size_t count) const { return Draw(*space_, P(0, count)); }
  Error MapError(std::size_t pages, const MapOptions& options = {}) {
    const Result<PageRange> range = space_->Map({pages}, options);
    EXPECT_FALSE(range.ok());
    return range.error();
  }

  FakeKernel kernel_;
  TestSpace space_{kernel_, Options()};
};

// ---- Anywhere ----

TEST_P(MapTest, GivesZeroedWritablePages) {
  const PageRange range = MustMap(*space_, 5);
  EXPECT_EQ(range.count(), Pages{5});
  EXPECT_TRUE(space_->reservation().Contains(range));
  EXPECT_TRUE(IsZero(range));
  Fill(range, 0xaa);
  EXPECT_TRUE(IsFilledWith(range, 0xaa));
}

TEST_P(MapTest, IsFoundByLookups) {
  const PageRange range = MustMap(*space_, 5);
  for (PageNumber page = range.first; page < range.end; page = page + Pages{1}) {
    const Result<VmaInfo> vma = space_->Lookup(page);
    ASSERT_TRUE(vma.ok());
    EXPECT_EQ(vma->range, range);
    EXPECT_EQ(vma->protection, Protection::kReadWrite);
    EXPECT_EQ(vma->zone, Zone::kPlain);
    EXPECT_NE(vma->generation, 0u);
  }
  EXPECT_EQ(space_->Lookup(range.end).error().code, ErrorCode::kNotMapped);
  EXPECT_EQ(space_->Lookup(space_->reservation().end).error().code, ErrorCode::kOutsideReservation);
  EXPECT_EQ(space_->Lookup(PageNumber{0}).error().code, ErrorCode::kOutsideReservation);
}

TEST_P(MapTest, NeverGivesAPageTwice) {
  constexpr unsigned kSeed = 11;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937 random(kSeed);
  std::vector<PageRange> ranges;
  std::set<std::uint64_t> generations;
  for (int i = 0; i < 1000; ++i) {
    ranges.push_back(MustMap(*space_, 1 + random() % 20));
    generations.insert(space_->Lookup(ranges.back().first)->generation);
    Fill(Part(ranges.back(), 0, 1), i % 255 + 1);
  }
  for (int i = 0; i < 1000; ++i) {
    EXPECT_TRUE(IsFilledWith(Part(ranges[static_cast<std::size_t>(i)], 0, 1), i % 255 + 1)) << i;
  }
  std::sort(ranges.begin(), ranges.end(), [](PageRange a, PageRange b) { return a.first < b.first; });
  for (std::size_t i = 1; i < ranges.size(); ++i) ASSERT_LE(ranges[i - 1].end, ranges[i].first);
  EXPECT_EQ(generations.size(), 1000u) << "each mapping of a region has a generation of its own";
}

TEST_P(MapTest, RefusesNothingAndTooMuch) {
  EXPECT_EQ(MapError(0).code, ErrorCode::kEmpty);
  EXPECT_EQ(MapError(kSmallRegionPages + 1).code, ErrorCode::kNoRoom);
  EXPECT_EQ(MapError(4 * kSmallRegionPages).code, ErrorCode::kNoRoom);
  EXPECT_EQ(MapError(4 * kSmallRegionPages + 1).code, ErrorCode::kNoRoom);
  EXPECT_EQ(MapError(SIZE_MAX).code, ErrorCode::kNoRoom);
  EXPECT_EQ(MapError(SIZE_MAX >> kPageShift).code, ErrorCode::kNoRoom);
  EXPECT_EQ(space_->Stats().maps, 0u);
  EXPECT_TRUE(Vmas(*space_).empty());
}

TEST_P(MapTest, FillsARegionToTheLastPage) {
  const PageRange whole = MustMap(*space_, kSmallRegionPages);
  EXPECT_EQ((whole.first - space_->reservation().first).value % kSmallRegionPages, 0u);
  Fill(Part(whole, 0, 1), 1);
  Fill(Part(whole, kSmallRegionPages - 1, 1), 2);
}

// ---- Alignment ----

TEST_P(MapTest, AlignsTheStart) {
  MustMap(*space_, 1);
  for (std::size_t alignment = 1; alignment <= kSmallRegionPages; alignment *= 2) {
    SCOPED_TRACE("alignment " + std::to_string(alignment));
    const PageRange range = MustMap(*space_, 3, {.alignment = {alignment}});
    EXPECT_EQ(range.first.value % alignment, 0u);
    EXPECT_TRUE(IsZero(range));
    EXPECT_TRUE(space_->Unmap(range).ok());
    // Cached now, and served again.
    const PageRange again = MustMap(*space_, 3, {.alignment = {alignment}});
    EXPECT_EQ(again.first.value % alignment, 0u);
  }
}

TEST_P(MapTest, RefusesAlignmentsThatAreNoPowersOfTwo) {
  for (const std::size_t alignment : {std::size_t{0}, std::size_t{3}, std::size_t{6}, SIZE_MAX}) {
    EXPECT_EQ(MapError(1, {.alignment = {alignment}}).code, ErrorCode::kUnaligned) << alignment;
  }
}

TEST_P(MapTest, RefusesAlignmentsThatNoPageHas) {
  EXPECT_EQ(MapError(1, {.alignment = {std::size_t{1} << 50}}).code, ErrorCode::kNoRoom);
  EXPECT_EQ(MapError(1, {.alignment = {std::size_t{1} << 63}}).code, ErrorCode::kNoRoom);
}

//   before   A...A...A...    every gap is long enough, and none is aligned
//   after    A...A...A... and the new one after them
TEST_P(MapTest, SkipsGapsThatAreMisaligned) {
  const std::size_t shift = space_->reservation().first.value % 4;
  ASSERT_EQ(shift, 0u);
  for (std::size_t page = 0; page < 64; page += 4) MustMapAt(*space_, P(page, 1));
  EXPECT_EQ(Line(12), "A...B...C...");
  const PageRange range = MustMap(*space_, 3, {.alignment = {4}});
  EXPECT_GE(range.first, P(64, 1).first);
  EXPECT_EQ(range.first.value % 4, 0u);
  EXPECT_EQ(Line(12), "A...B...C...");
}

// ---- Cached extents that are too small ----

// An extent of kCached pages that were written to, between free pages and mapped ones.
class ExtendTest : public MapTest {
 protected:
  static constexpr std::size_t kCached = 100;

  //   0        1           1 + before            1 + before + kCached             end
  //   | mapped |   free    |       cached        |             free               | mapped |
  PageRange Make(std::size_t before, std::size_t behind) {
    MustMapAt(*space_, P(0, 1));
    MustMapAt(*space_, P(1 + before + kCached + behind, 1));
    const PageRange cached = P(1 + before, kCached);
    MustMapAt(*space_, cached);
    Fill(cached, 0xaa);
    EXPECT_TRUE(space_->Unmap(cached).ok());
    return cached;
  }
  PageRange MapAnything(std::size_t pages, std::uint64_t alignment = 1) {
    return MustMap(*space_, pages, {.alignment = {alignment}, .content = Content::kAnything});
  }
};

TEST_P(ExtendTest, TakesWhatIsFreeBehind) {
  const PageRange cached = Make(0, 60);
  const PageRange range = MapAnything(150);
  EXPECT_EQ(range, P(1, 150));
  EXPECT_TRUE(IsFilledWith(cached, 0xaa));
  EXPECT_EQ(space_->Stats().free_resident, Bytes{0});
  EXPECT_EQ(MapAnything(10), P(151, 10)) << "what is left is free";
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_TRUE(IsZero(MustMap(*space_, 150)));
  space_->CheckInvariants();
}

TEST_P(ExtendTest, TakesWhatIsFreeBefore) {
  const PageRange cached = Make(80, 0);
  EXPECT_EQ(MapAnything(150), P(31, 150));
  EXPECT_TRUE(IsFilledWith(cached, 0xaa));
  EXPECT_EQ(MapAnything(10), P(1, 10)) << "what is left is free";
  space_->CheckInvariants();
}

TEST_P(ExtendTest, TakesAllThereIs) {
  Make(30, 20);
  EXPECT_EQ(MapAnything(150), P(1, 150));
  space_->CheckInvariants();
}

TEST_P(ExtendTest, TakesTheLowestPlaceOnBothSides) {
  Make(80, 60);
  EXPECT_EQ(MapAnything(150), P(31, 150));
}

TEST_P(ExtendTest, FollowsTheAlignment) {
  Make(80, 60);
  EXPECT_EQ(MapAnything(150, 16), P(32, 150));
}

TEST_P(ExtendTest, LeavesAloneWhatHasNoPlaceForTheAlignment) {
  const PageRange cached = Make(80, 0);
  const PageRange range = MapAnything(150, 16);  // would begin at page 32, and end one page too far
  EXPECT_GT(range.first, cached.end);
  EXPECT_EQ(space_->Stats().free_resident, Pages{kCached}.bytes());
}

TEST_P(ExtendTest, LeavesAloneWhatHasTooLittleAround) {
  const PageRange cached = Make(20, 20);
  EXPECT_GT(MapAnything(150).first, cached.end);
  EXPECT_EQ(space_->Stats().free_resident, Pages{kCached}.bytes());
}

// Nobody would know what to clear.
TEST_P(ExtendTest, IsNotForZeroedMemory) {
  const PageRange cached = Make(80, 60);
  const PageRange range = MustMap(*space_, 150);
  EXPECT_GT(range.first, cached.end);
  EXPECT_TRUE(IsZero(range));
}

TEST_P(ExtendTest, IsNotForSmallMappings) {
  const PageRange cached = Make(0, 60);
  const PageRange range = MapAnything(60);
  EXPECT_FALSE(range.Overlaps(cached));
}

FREEHOLD_INSTANTIATE_POLICIES(ExtendTest);

// ---- Protections and zones ----

TEST_P(MapTest, ReadWriteIsPlain) {
  const PageRange range = MustMap(*space_, 700);
  EXPECT_EQ(space_->Lookup(range.first)->zone, Zone::kPlain);
  EXPECT_TRUE(ZoneRange(*space_, Zone::kPlain).Contains(range));
}

TEST_P(MapTest, OtherProtectionsAreInTheMappingZone) {
  for (const Protection protection : kUnusual) {
    SCOPED_TRACE("protection " + std::to_string(static_cast<int>(protection)));
    const PageRange range = MustMap(*space_, 5, {.protection = protection});
    const Result<VmaInfo> vma = space_->Lookup(range.first);
    ASSERT_TRUE(vma.ok());
    EXPECT_EQ(vma->zone, Zone::kMapping);
    EXPECT_EQ(vma->protection, protection);
    EXPECT_TRUE(ZoneRange(*space_, Zone::kMapping).Contains(range));
    for (std::size_t i = 0; i < 5; ++i) EXPECT_EQ(kernel_.At(Part(range, i, 1).first).protection, protection);
  }
  EXPECT_EQ(space_->Stats().heap_splits, 0u);
}

TEST_P(MapTest, ReadOnlyReadsAsZero) {
  const PageRange range = MustMap(*space_, 5, {.protection = Protection::kRead});
  EXPECT_TRUE(IsZero(range));
}

TEST_P(MapTest, LargePopulatedOrHugeIsDense) {
  struct Case {
    std::size_t pages;
    os::HugePages huge_pages;
    bool populate;
    Zone zone;
  };
  for (const Case c : {Case{kPagesPerHugePage, os::HugePages::kAvoid, true, Zone::kDense},
                       Case{kPagesPerHugePage + 100, os::HugePages::kPrefer, false, Zone::kDense},
                       Case{kPagesPerHugePage, os::HugePages::kAvoid, false, Zone::kPlain},
                       Case{kPagesPerHugePage - 1, os::HugePages::kPrefer, true, Zone::kPlain}}) {
    SCOPED_TRACE(std::to_string(c.pages) + (c.populate ? " populated" : ""));
    const PageRange range =
        MustMap(*space_, c.pages, {.huge_pages = c.huge_pages, .populate = c.populate});
    EXPECT_EQ(space_->Lookup(range.first)->zone, c.zone);
    EXPECT_TRUE(ZoneRange(*space_, c.zone).Contains(range));
    EXPECT_TRUE(c.zone != Zone::kDense || range.first.value % kPagesPerHugePage == 0);
    EXPECT_TRUE(IsZero(range));
  }
}

TEST_P(MapTest, OnlyTheDenseZoneIsAdvised) {
  if (!kernel_.features().huge_pages) GTEST_SKIP() << "no huge pages by advice here";
  using Advice = os::PageState::Advice;
  const PageRange dense = ZoneRange(*space_, Zone::kDense);
  EXPECT_EQ(kernel_.At(dense.first).advice, Advice::kPreferHuge);
  EXPECT_EQ(kernel_.At(PageNumber{dense.end.value - 1}).advice, Advice::kPreferHuge);
  EXPECT_EQ(kernel_.At(PageNumber{dense.first.value - 1}).advice, Advice::kNone);
  EXPECT_EQ(kernel_.At(dense.end).advice, Advice::kNone);
}

TEST_P(MapTest, DenseOverflowsIntoPlain) {
  const std::size_t pages = kSmallRegionPages / 2;
  for (int i = 0; i < 2; ++i) {
    const PageRange range = MustMap(*space_, pages, {.huge_pages = os::HugePages::kPrefer});
    EXPECT_EQ(space_->Lookup(range.first)->zone, Zone::kDense);
  }
  const PageRange range = MustMap(*space_, pages, {.huge_pages = os::HugePages::kPrefer});
  EXPECT_EQ(space_->Lookup(range.first)->zone, Zone::kPlain);
}

// ---- Content ----

// Whatever the size, and whatever way it takes: memset, a discard, or a fresh extent.
TEST_P(MapTest, ZeroedIsZeroAfterDirtyUse) {
  for (const std::size_t pages : {1, 2, 4, 63, 64, 65, 200, 512, 1000, 5000}) {
    SCOPED_TRACE(std::to_string(pages) + " pages");
    for (int round = 0; round < 12; ++round) {
      const PageRange range = MustMap(*space_, pages);
      ASSERT_TRUE(IsZero(range)) << "round " << round;
      // Users of every kind: all of it, one page, nothing.
      if (round % 3 == 0) Fill(range, 0xaa);
      if (round % 3 == 1) Fill(Part(range, pages / 2, 1), 0xaa);
      ASSERT_TRUE(space_->Unmap(range).ok());
    }
  }
}

TEST_P(MapTest, ZeroedIsZeroWhateverTheExtentWas) {
  constexpr unsigned kSeed = 5;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937 random(kSeed);
  std::vector<PageRange> live;
  for (int step = 0; step < (kSanitized ? 1500 : 6000); ++step) {
    if (live.size() < 20 || random() % 2 == 0) {
      const std::size_t pages = 1 + random() % 80;
      const PageRange range = MustMap(*space_, pages, {.alignment = {std::size_t{1} << random() % 4}});
      ASSERT_TRUE(IsZero(range)) << "step " << step;
      if (random() % 2 == 0) Fill(range, 0xaa);
      live.push_back(range);
    } else {
      std::swap(live[random() % live.size()], live.back());
      const PageRange range = live.back();
      live.pop_back();
      // In two parts, now and then: extents of sizes that nobody mapped.
      const std::size_t cut = random() % range.count().value;
      ASSERT_TRUE(cut == 0 || space_->Unmap(Part(range, 0, cut)).ok());
      ASSERT_TRUE(space_->Unmap({range.first + Pages{cut}, range.end}).ok());
    }
    if (step % 500 == 0) (void)space_->Purge(PurgeScope::kAll);
  }
}

TEST_P(MapTest, ReadOnlyIsZeroAfterDirtyUse) {
  const PageRange range = MustMap(*space_, 8, {.protection = Protection::kReadWriteExec});
  Fill(range, 0xaa);
  ASSERT_TRUE(space_->Unmap(range).ok());
  const PageRange again = MustMap(*space_, 8, {.protection = Protection::kRead});
  EXPECT_EQ(again, range);
  EXPECT_TRUE(IsZero(again));
}

TEST_P(MapTest, AnythingSparesTheZeroing) {
  const PageRange range = MustMap(*space_, 8);
  Fill(range, 0xaa);
  ASSERT_TRUE(space_->Unmap(range).ok());
  kernel_.ClearCalls();
  const PageRange again = MustMap(*space_, 8, {.content = Content::kAnything});
  EXPECT_EQ(again, range) << "the resident extent serves best";
  EXPECT_TRUE(IsFilledWith(again, 0xaa));
  EXPECT_EQ(kernel_.CallCount(), 0u);
  EXPECT_EQ(space_->Stats().zeroed_pages, 0u);
}

// An extent that was dirtied by a user of kAnything is not clean for the next.
TEST_P(MapTest, ZeroedAfterAnything) {
  PageRange range = MustMap(*space_, 8, {.content = Content::kAnything});
  Fill(range, 0xaa);
  ASSERT_TRUE(space_->Unmap(range).ok());
  range = MustMap(*space_, 8, {.content = Content::kAnything});
  ASSERT_TRUE(space_->Unmap(range).ok());
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(IsZero(MustMap(*space_, 8)));
}

TEST_P(MapTest, FreshMemoryIsNotZeroedAgain) {
  MustMap(*space_, 100);
  kernel_.ClearCalls();
  MustMap(*space_, 100);
  EXPECT_EQ(kernel_.CallCount(), 0u) << "committed ahead, and clean";
  EXPECT_EQ(space_->Stats().zeroed_pages, 0u);
}

TEST_P(MapTest, ReuseOfTouchedMemoryIsAMemset) {
  const PageRange range = MustMap(*space_, 8);
  Fill(range, 0xaa);
  ASSERT_TRUE(space_->Unmap(range).ok());
  kernel_.ClearCalls();
  EXPECT_EQ(MustMap(*space_, 8), range);
  EXPECT_EQ(kernel_.CallCount(), 1u);
  EXPECT_EQ(kernel_.CallCount(Operation::kZero), 1u);
  EXPECT_EQ(space_->Stats().zeroed_pages, 8u);
  EXPECT_EQ(space_->Stats().reuses, 1u);
}

// ---- Populate ----

TEST_P(MapTest, PopulatedIsResident) {
  for (const std::size_t pages : {1, 100, 512, 1300}) {
    const PageRange range = MustMap(*space_, pages, {.populate = true});
    EXPECT_EQ(kernel_.ResidentPages(range), Pages{pages});
    EXPECT_EQ(kernel_.CountResident(range)->value, pages);
    EXPECT_TRUE(IsZero(range));
  }
}

TEST_P(MapTest, PopulateOfReadOnlyStopsQuietly) {
  const PageRange range = MustMap(*space_, 8, {.protection = Protection::kRead, .populate = true});
  EXPECT_EQ(kernel_.ResidentPages(range), Pages{0});
}

TEST_P(MapTest, PopulatesFixedAndReplaced) {
  MustMapAt(*space_, P(0, 4));
  MapOptions options = At(P(2, 4).first, Placement::kReplace);
  options.populate = true;
  MustMap(*space_, 4, options);
  EXPECT_EQ(Line(8), "AABBBB..");
  EXPECT_EQ(kernel_.ResidentPages(P(2, 4)), Pages{4});
}

// ---- Fixed ----

TEST_P(MapTest, FixedIsExactlyThere) {
  EXPECT_EQ(Line(16), "................");
  EXPECT_EQ(*space_->Map({3}, At(P(5, 3).first)), P(5, 3));
  EXPECT_EQ(Line(16), ".....AAA........");
  EXPECT_TRUE(IsZero(P(5, 3)));
  EXPECT_EQ(*space_->Map({2}, At(P(8, 2).first)), P(8, 2));
  EXPECT_EQ(Line(16), ".....AAABB......");
  EXPECT_EQ(*space_->Map({5}, At(P(0, 5).first)), P(0, 5));
  EXPECT_EQ(Line(16), "AAAAABBBCC......");
  EXPECT_EQ(*space_->Map({1}, At(P(15, 1).first)), P(15, 1));
  EXPECT_EQ(Line(16), "AAAAABBBCC.....D");
}

TEST_P(MapTest, FixedWorksAtTheEndsOfEveryRegion) {
  for (std::size_t region = 0; region < 4; ++region) {
    MustMapAt(*space_, P(region * kSmallRegionPages, 2));
    MustMapAt(*space_, P((region + 1) * kSmallRegionPages - 2, 2));
    MustMapAt(*space_, P(region * kSmallRegionPages + 2, kSmallRegionPages - 4));
  }
  EXPECT_EQ(Vmas(*space_).size(), 12u);
  EXPECT_EQ(space_->Stats().mapped, space_->reservation().bytes());
}

TEST_P(MapTest, FixedTakesAnyProtectionInAnyZone) {
  for (const Zone zone : {Zone::kPlain, Zone::kDense, Zone::kMapping}) {
    std::size_t page = 100;
    for (const Protection protection : {Protection::kReadWrite, Protection::kNone, Protection::kRead,
                                        Protection::kReadExec, Protection::kReadWriteExec}) {
      SCOPED_TRACE(std::to_string(static_cast<int>(zone)) + "/" + std::to_string(static_cast<int>(protection)));
      const PageRange range = Part(ZoneRange(*space_, zone), page += 10, 4);
      MustMapAt(*space_, range, protection);
      EXPECT_EQ(space_->Lookup(range.first)->protection, protection);
      EXPECT_EQ(space_->Lookup(range.first)->zone, zone);
      for (std::size_t i = 0; i < 4; ++i) {
        EXPECT_EQ(kernel_.At(Part(range, i, 1).first).protection, protection);
      }
      EXPECT_TRUE(protection != Protection::kReadWrite || IsZero(range));
    }
  }
}

TEST_P(MapTest, FixedRefusesWhatIsNotInOneRegion) {
  const PageRange all = space_->reservation();
  const auto error_at = [&](PageNumber page, std::size_t pages) { return MapError(pages, At(page)).code; };
  EXPECT_EQ(error_at(PageNumber{all.first.value - 1}, 1), ErrorCode::kOutsideReservation);
  EXPECT_EQ(error_at(PageNumber{all.first.value - 1}, 2), ErrorCode::kOutsideReservation);
  EXPECT_EQ(error_at(all.end, 1), ErrorCode::kOutsideReservation);
  EXPECT_EQ(error_at(PageNumber{all.end.value - 1}, 2), ErrorCode::kOutsideReservation);
  EXPECT_EQ(error_at(P(kSmallRegionPages - 1, 1).first, 2), ErrorCode::kOutsideReservation);
  EXPECT_EQ(error_at(PageNumber{0}, 1), ErrorCode::kOutsideReservation);
  EXPECT_EQ(error_at(PageNumber{SIZE_MAX >> kPageShift}, 1), ErrorCode::kOutsideReservation);
  EXPECT_EQ(error_at(PageNumber{SIZE_MAX >> kPageShift}, 100), ErrorCode::kOutsideReservation);
  EXPECT_TRUE(Vmas(*space_).empty());
}

TEST_P(MapTest, FixedRefusesUnalignedAddresses) {
  std::byte* address = P(4, 1).address();
  for (const std::size_t offset : {1, 8, 4095}) {
    MapOptions options = At(P(4, 1).first);
    options.address = address + offset;
    EXPECT_EQ(MapError(1, options).code, ErrorCode::kUnaligned);
    options.placement = Placement::kReplace;
    EXPECT_EQ(MapError(1, options).code, ErrorCode::kUnaligned);
  }
}

TEST_P(MapTest, FixedRefusesToOverlap) {
  MustMapAt(*space_, P(4, 4));
  Fill(P(4, 4), 0xaa);
  const std::uint64_t generation = space_->Lookup(P(4, 1).first)->generation;
  struct Case {
    std::size_t first, count;
  };
  // Before, within, after, around, exactly; each meets at least one page.
  for (const Case c : {Case{2, 3}, Case{5, 2}, Case{7, 4}, Case{0, 12}, Case{4, 4}}) {
    EXPECT_EQ(Line(12), "....AAAA....");
    EXPECT_EQ(MapError(c.count, At(P(c.first, 1).first)).code, ErrorCode::kOverlap) << c.first;
    EXPECT_EQ(Line(12), "....AAAA....");
  }
  EXPECT_EQ(space_->Lookup(P(4, 1).first)->generation, generation);
  EXPECT_EQ(space_->Lookup(P(4, 1).first)->range, P(4, 4)) << "still one VMA";
  EXPECT_TRUE(IsFilledWith(P(4, 4), 0xaa));
}

// ---- Replace ----

TEST_P(MapTest, ReplaceCutsTheMiddleOut) {
  MustMapAt(*space_, P(0, 12));
  Fill(P(0, 12), 0xaa);
  const std::uint64_t old = space_->Lookup(P(0, 1).first)->generation;
  EXPECT_EQ(Line(12), "AAAAAAAAAAAA");
  EXPECT_EQ(*space_->Map({4}, At(P(4, 4).first, Placement::kReplace)), P(4, 4));
  EXPECT_EQ(Line(12), "AAAABBBBAAAA");
  EXPECT_TRUE(IsZero(P(4, 4)));
  EXPECT_TRUE(IsFilledWith(P(0, 4), 0xaa));
  EXPECT_TRUE(IsFilledWith(P(8, 4), 0xaa));
  EXPECT_EQ(space_->Lookup(P(0, 1).first)->generation, old) << "parts keep it";
  EXPECT_EQ(space_->Lookup(P(8, 1).first)->generation, old);
  EXPECT_NE(space_->Lookup(P(4, 1).first)->generation, old);
  EXPECT_EQ(space_->Stats().vmas, 3u);
  EXPECT_EQ(space_->Stats().mapped, Pages{12}.bytes());
}

TEST_P(MapTest, ReplaceGoesOverMappingsHolesAndFreeExtents) {
  MustMapAt(*space_, P(2, 3));
  MustMapAt(*space_, P(5, 2));
  MustMapAt(*space_, P(9, 2), Protection::kRead);
  MustMapAt(*space_, P(13, 3));
  MustMapAt(*space_, P(17, 3));
  for (const PageRange dirty : {P(2, 3), P(5, 2), P(13, 3), P(17, 3)}) Fill(dirty, 0xaa);
  ASSERT_TRUE(space_->Unmap(P(13, 3)).ok());  // cached, dirty
  EXPECT_EQ(Line(24), "..AAABB..cc......DDD....");
  MustMap(*space_, 14, At(P(4, 14).first, Placement::kReplace));
  EXPECT_EQ(Line(24), "..AABBBBBBBBBBBBBBCC....");
  EXPECT_TRUE(IsZero(P(4, 14)));
  EXPECT_TRUE(IsFilledWith(P(2, 2), 0xaa));
  EXPECT_TRUE(IsFilledWith(P(18, 2), 0xaa));
  EXPECT_EQ(space_->Lookup(P(4, 1).first)->range, P(4, 14));
  Fill(P(4, 14), 0xbb);
  EXPECT_EQ(space_->Stats().vmas, 3u);
}

TEST_P(MapTest, ReplaceOfNothingIsFixed) {
  EXPECT_EQ(Line(8), "........");
  MustMap(*space_, 4, At(P(2, 4).first, Placement::kReplace));
  EXPECT_EQ(Line(8), "..AAAA..");
}

TEST_P(MapTest, ReplaceSeveralTimesOver) {
  for (int round = 0; round < 20; ++round) {
    MustMap(*space_, 8, At(P(4, 8).first, Placement::kReplace));
    ASSERT_TRUE(IsZero(P(4, 8))) << round;
    Fill(P(4, 8), 0xaa);
    EXPECT_EQ(Line(16), "....AAAAAAAA....");
    space_->CheckInvariants();
  }
  EXPECT_EQ(space_->Stats().vmas, 1u);
}

TEST_P(MapTest, ReplaceChangesProtections) {
  MustMapAt(*space_, P(0, 8));
  Fill(P(0, 8), 0xaa);
  MustMap(*space_, 4, At(P(2, 4).first, Placement::kReplace, Protection::kRead));
  EXPECT_EQ(Line(8), "AAbbbbAA");
  EXPECT_TRUE(IsZero(P(2, 4)));
  EXPECT_EQ(kernel_.At(P(1, 1).first).protection, Protection::kReadWrite);
  EXPECT_EQ(kernel_.At(P(2, 1).first).protection, Protection::kRead);
  EXPECT_EQ(kernel_.At(P(6, 1).first).protection, Protection::kReadWrite);
  MustMap(*space_, 4, At(P(2, 4).first, Placement::kReplace));
  EXPECT_EQ(Line(8), "AABBBBAA");
  Fill(P(2, 4), 0xbb);
  EXPECT_EQ(kernel_.At(P(2, 1).first).protection, Protection::kReadWrite);
}

TEST_P(MapTest, ReplaceWorksInTheMappingZone) {
  const PageRange zone = ZoneRange(*space_, Zone::kMapping);
  const auto line = [&] { return Draw(*space_, Part(zone, 0, 12)); };
  MustMapAt(*space_, Part(zone, 0, 8), Protection::kReadWriteExec);
  Fill(Part(zone, 0, 8), 0xaa);
  EXPECT_EQ(line(), "aaaaaaaa....");
  MustMap(*space_, 6, At(Part(zone, 4, 6).first, Placement::kReplace, Protection::kRead));
  EXPECT_EQ(line(), "aaaabbbbbb..");
  EXPECT_TRUE(IsZero(Part(zone, 4, 6)));
  EXPECT_TRUE(IsFilledWith(Part(zone, 0, 4), 0xaa));
  MustMap(*space_, 2, At(Part(zone, 6, 2).first, Placement::kReplace, Protection::kNone));
  EXPECT_EQ(line(), "aaaabb33bb..");
}

// Large content goes by discard, not by memset.
TEST_P(MapTest, ReplaceOfMuchIsZero) {
  const PageRange range = P(100, 3000);
  MustMapAt(*space_, range);
  Fill(range, 0xaa);
  kernel_.ClearCalls();
  MustMap(*space_, 3000, At(range.first, Placement::kReplace));
  EXPECT_TRUE(IsZero(range));
  EXPECT_EQ(kernel_.CallCount(Operation::kZero), 0u);
  EXPECT_GE(kernel_.CallCount(Operation::kDiscard), 1u);
}

TEST_P(MapTest, ReplaceWithAnythingKeepsPages) {
  MustMapAt(*space_, P(0, 4));
  Fill(P(0, 4), 0xaa);
  MapOptions options = At(P(0, 4).first, Placement::kReplace);
  options.content = Content::kAnything;
  kernel_.ClearCalls();
  MustMap(*space_, 4, options);
  EXPECT_EQ(kernel_.CallCount(Operation::kZero), 0u);
  EXPECT_EQ(kernel_.CallCount(Operation::kDiscard), 0u);
  // The next one is zeroed all the same.
  ASSERT_TRUE(space_->Unmap(P(0, 4)).ok());
  MustMapAt(*space_, P(0, 4));
  EXPECT_TRUE(IsZero(P(0, 4)));
}

TEST_P(MapTest, ReplaceOfDirtyByNoAccessIsZeroLater) {
  const PageRange zone = ZoneRange(*space_, Zone::kMapping);
  const PageRange range = Part(zone, 0, 4);
  MustMapAt(*space_, range, Protection::kReadWriteExec);
  Fill(range, 0xaa);
  MapOptions options = At(range.first, Placement::kReplace, Protection::kNone);
  options.content = Content::kAnything;
  MustMap(*space_, 4, options);
  ASSERT_TRUE(space_->Unmap(range).ok());
  MustMapAt(*space_, range, Protection::kRead);
  EXPECT_TRUE(IsZero(range));
}

// Atomic to lookups: a page that is replaced over and over is mapped at every moment.
TEST_P(MapTest, ReplacedIsNeverSeenUnmapped) {
  MustMapAt(*space_, P(0, 8));
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> lookups{0};
  std::thread reader([&] {
    std::mt19937 random(1);
    std::uint64_t newest = 0;
    while (!stop.load()) {
      const PageNumber page = P(random() % 8, 1).first;
      const Result<VmaInfo> vma = space_->Lookup(page);
      ASSERT_TRUE(vma.ok()) << "page " << (page - P(0, 1).first).value;
      ASSERT_TRUE(vma->range.Contains(page));
      if (page == P(3, 1).first) {
        ASSERT_GE(vma->generation, newest) << "one page never goes back";
        newest = vma->generation;
      }
      lookups.fetch_add(1);
    }
  });
  while (lookups.load() == 0) std::this_thread::yield();
  std::mt19937 random(2);
  for (int i = 0; i < (kSanitized ? 1000 : 5000); ++i) {
    const std::size_t first = random() % 8;
    const std::size_t count = 1 + random() % (8 - first);
    const Protection protection = random() % 4 == 0 ? Protection::kRead : Protection::kReadWrite;
    MustMap(*space_, count, At(P(first, 1).first, Placement::kReplace, protection));
  }
  stop.store(true);
  reader.join();
}

// ---- Regions, CPUs, room ----

class MapRoomTest : public PolicyTest {
 protected:
  // Two CPUs: zones of 4, 2 and 2 regions of 8 MiB.
  static AddressSpaceOptions TwoCpus() {
    AddressSpaceOptions options = Options();
    options.reserve = MiB(64);
    options.regions_per_zone = 2;
    return options;
  }
  static constexpr std::size_t kRegionPages = MiB(8).value / kPageSize;
  static constexpr std::size_t kPlainRegions = 4;
  static constexpr std::size_t kHeapRegions = 6;  // with the dense ones
  ~MapRoomTest() override { FakeKernel::SetCpu(0); }

  std::size_t RegionOf(PageRange range) const {
    return (range.first - space_->reservation().first).value / kRegionPages;
  }

  FakeKernel kernel_;
  TestSpace space_{kernel_, TwoCpus()};
};

TEST_P(MapRoomTest, CpusMapFromRegionsOfTheirOwn) {
  std::set<std::size_t> regions;
  for (unsigned cpu = 0; cpu < 4; ++cpu) {
    FakeKernel::SetCpu(cpu);
    const std::size_t region = RegionOf(MustMap(*space_, 4));
    regions.insert(region);
    EXPECT_EQ(RegionOf(MustMap(*space_, 40)), region) << "cpu " << cpu;
  }
  EXPECT_EQ(regions, (std::set<std::size_t>{0, 1, 2, 3}));
  FakeKernel::SetCpu(1000 * 4 + 1);
  EXPECT_EQ(RegionOf(MustMap(*space_, 4)), 1u) << "CPUs that came later share";
}

TEST_P(MapRoomTest, FullRegionsOverflowIntoOthers) {
  std::set<std::size_t> regions;
  for (std::size_t i = 0; i < kPlainRegions; ++i) regions.insert(RegionOf(MustMap(*space_, kRegionPages)));
  EXPECT_EQ(regions, (std::set<std::size_t>{0, 1, 2, 3}));
  // Plain memory overflows into the dense zone, dense memory into none.
  EXPECT_GE(RegionOf(MustMap(*space_, 1)), kPlainRegions);
  EXPECT_GE(RegionOf(MustMap(*space_, kRegionPages)), kPlainRegions);
  EXPECT_TRUE(space_->Map({512}, {.huge_pages = os::HugePages::kPrefer}).ok());
  EXPECT_EQ(space_->Map({kRegionPages}).error().code, ErrorCode::kNoRoom);
  EXPECT_EQ(space_->Map({kRegionPages}, {.huge_pages = os::HugePages::kPrefer}).error().code, ErrorCode::kNoRoom);
  EXPECT_TRUE(space_->Map({1}, {.protection = Protection::kRead}).ok()) << "the mapping zone is apart";
  space_->CheckInvariants();
}

//   all of a zone in small cached extents:  |c|c|c|c|c|c|c|c|...
//   one large map:                          |mmmmmmmmmmmmmmmm...
TEST_P(MapRoomTest, CachedExtentsMergeWhenRoomIsShort) {
  std::vector<PageRange> ranges;
  for (;;) {
    const Result<PageRange> range = space_->Map({16});
    if (!range.ok()) break;
    Fill(Part(*range, 0, 1), 0xaa);
    ranges.push_back(*range);
  }
  EXPECT_EQ(ranges.size(), kHeapRegions * kRegionPages / 16);
  for (const PageRange range : ranges) ASSERT_TRUE(space_->Unmap(range).ok());
  const PageRange large = MustMap(*space_, kRegionPages);
  EXPECT_TRUE(IsZero(large));
  for (int i = 0; i + 1 < static_cast<int>(kHeapRegions); ++i) MustMap(*space_, kRegionPages);
  EXPECT_EQ(space_->Map({1}).error().code, ErrorCode::kNoRoom);
  ASSERT_TRUE(space_->Unmap(Part(large, 5, 1)).ok());
  EXPECT_EQ(MustMap(*space_, 1), Part(large, 5, 1)) << "the one page there is";
}

TEST_P(MapRoomTest, NoRoomChangesNothing) {
  for (int i = 0; i < static_cast<int>(kHeapRegions); ++i) MustMap(*space_, kRegionPages - 1);
  const AddressSpaceStats before = space_->Stats();
  for (int i = 0; i < 10; ++i) EXPECT_EQ(space_->Map({2}).error().code, ErrorCode::kNoRoom);
  EXPECT_EQ(space_->Stats().mapped, before.mapped);
  EXPECT_EQ(space_->Stats().vmas, before.vmas);
  space_->CheckInvariants();
  for (int i = 0; i < static_cast<int>(kHeapRegions); ++i) MustMap(*space_, 1);
}

// ---- Strict overcommit ----

TEST_P(MapTest, CommitsAheadInLargeSteps) {
  EXPECT_EQ(space_->Stats().committed, Bytes{0});
  MustMap(*space_, 1);
  const Bytes first = space_->Stats().committed;
  EXPECT_GE(first, MiB(4));
  kernel_.ClearCalls();
  // To the end of the region, a page at a time, is few calls.
  for (std::size_t i = 0; i < kSmallRegionPages / 64 - 1; ++i) MustMap(*space_, 64);
  EXPECT_LE(kernel_.CallCount(Operation::kProtect), 2u);
  EXPECT_EQ(space_->Stats().committed, MiB(64));
}

// Steps grow with what one region was seen to need, and so does the first step of another.
TEST(CommitTest, GoesAheadAsFarAsTheRegionThatGotFurthest) {
  FakeKernel kernel;
  AddressSpaceOptions options = SmallOptions();
  options.reserve = GiB(64);
  options.regions_per_zone = 2;
  const TestSpace space(kernel, options);
  // What making room for `size` commits.
  const auto step = [&](Bytes size) {
    const Bytes before = space->Stats().committed;
    MustMap(*space, PagesFor(size).value);
    return Bytes{space->Stats().committed.value - before.value};
  };
  EXPECT_EQ(step(MiB(4)), MiB(4 + 64)) << "at least";
  EXPECT_EQ(step(MiB(64)), Bytes{0});
  for (const Bytes before : {MiB(68), MiB(140), MiB(284), MiB(572)}) {
    EXPECT_EQ(step(MiB(4)), MiB(4) + before) << "twice what there was";
    EXPECT_EQ(step(before), Bytes{0});
  }
  EXPECT_EQ(step(MiB(4)), MiB(4) + GiB(1)) << "at most";
  FakeKernel::SetCpu(1);
  EXPECT_EQ(step(MiB(4)), MiB(4) + GiB(1));
  FakeKernel::SetCpu(0);
}

// A cached extent where what is committed ends.
class ExtendAtEndTest : public testing::Test {
 protected:
  static AddressSpaceOptions Options() {
    AddressSpaceOptions options = SmallOptions();
    options.reserve = GiB(4);
    return options;
  }
  void SetUp() override {
    MustMap(*space_, 1);
    committed_ = PagesFor(space_->Stats().committed).value;
    MustMapAt(*space_, Part(space_->reservation(), committed_ - 101, 1));
    const PageRange cached = Part(space_->reservation(), committed_ - 100, 100);
    MustMapAt(*space_, cached);
    Fill(cached, 0xaa);
    ASSERT_TRUE(space_->Unmap(cached).ok());
    ASSERT_EQ(PagesFor(space_->Stats().committed).value, committed_);
  }

  FakeKernel kernel_;
  TestSpace space_{kernel_, Options()};
  std::size_t committed_ = 0;
};

TEST_F(ExtendAtEndTest, CommitsWhatIsBehind) {
  const PageRange range = MustMap(*space_, 150, {.content = Content::kAnything});
  EXPECT_EQ(range, Part(space_->reservation(), committed_ - 100, 150));
  EXPECT_GT(PagesFor(space_->Stats().committed).value, committed_);
  EXPECT_TRUE(IsFilledWith(Part(range, 0, 100), 0xaa));
  Fill(range, 0xbb);
}

TEST_F(ExtendAtEndTest, IsElsewhereIfThatIsRefused) {
  kernel_.FailAlways(Operation::kProtect, ENOMEM);
  const PageRange range = MustMap(*space_, 150, {.content = Content::kAnything});
  kernel_.StopFailing();
  EXPECT_LT(range.end, Part(space_->reservation(), committed_ - 100, 1).first);
  EXPECT_EQ(PagesFor(space_->Stats().committed).value, committed_);
  EXPECT_EQ(space_->Stats().free_resident, Pages{100}.bytes());
  EXPECT_TRUE(IsZero(range));
}

// A region with more room than it commits at first, most of which was cut into extents that no mapping of kWhole pages
// can use.
class GrowthTest : public testing::Test {
 protected:
  static constexpr std::size_t kWhole = 16;
  static constexpr std::size_t kPart = 5;

  static AddressSpaceOptions Options() {
    AddressSpaceOptions options = SmallOptions();
    options.reserve = GiB(4);
    return options;
  }
  // Maps all that is committed.
  std::vector<PageRange> MapAll() {
    std::vector<PageRange> mapped = {MustMap(*space_, kWhole)};
    while (mapped.size() * kWhole < PagesFor(space_->Stats().committed).value) {
      mapped.push_back(MustMap(*space_, kWhole));
    }
    return mapped;
  }
  // And leaves of every `period`th mapping two extents.
  void CutEvery(std::size_t period) {
    const std::vector<PageRange> mapped = MapAll();
    for (std::size_t i = 0; i < mapped.size(); i += period) {
      Fill(mapped[i], 0xaa);
      ASSERT_TRUE(space_->Unmap(Part(mapped[i], 0, kPart)).ok());
      ASSERT_TRUE(space_->Unmap(Part(mapped[i], kPart, kWhole - kPart)).ok());
    }
    committed_ = space_->Stats().committed;
    kernel_.ClearCalls();
  }

  FakeKernel kernel_;
  TestSpace space_{kernel_, Options()};
  Bytes committed_;
};

TEST_F(GrowthTest, UsesFirstWhatWasUnmapped) {
  CutEvery(1);
  for (std::size_t used = 0; used + kWhole <= PagesFor(committed_).value; used += kWhole) {
    const PageRange range = MustMap(*space_, kWhole);
    // Some of them suffice.
    if (used % (16 * kWhole) == 0) {
      ASSERT_TRUE(IsZero(range));
    }
  }
  EXPECT_EQ(space_->Stats().committed, committed_);
  EXPECT_EQ(kernel_.CallCount(Operation::kProtect), 0u);
  EXPECT_EQ(space_->Stats().free_resident, Bytes{0});
  MustMap(*space_, kWhole);
  EXPECT_GT(space_->Stats().committed, committed_) << "now all of it is used";
}

TEST_F(GrowthTest, LeavesAloneWhatIsLittle) {
  CutEvery(5);
  const Bytes cached = space_->Stats().free_resident;
  MustMap(*space_, kWhole);
  EXPECT_GT(space_->Stats().committed, committed_);
  EXPECT_EQ(space_->Stats().free_resident, cached);
  EXPECT_EQ(kernel_.CallCount(Operation::kDiscard), 1u) << "of the page that primes what is new";
}

// Twice as large as all that is cached: giving it back is tried once, and does not help.
TEST_F(GrowthTest, GrowsWhereThatIsNotEnough) {
  CutEvery(3);
  const std::size_t pages = 2 * PagesFor(committed_).value;
  MustMap(*space_, pages);
  EXPECT_GE(PagesFor(space_->Stats().committed).value, PagesFor(committed_).value + pages);
  EXPECT_EQ(space_->Stats().free_resident, Bytes{0});
}

TEST_F(GrowthTest, GrowsWhereTheKernelTakesNothingBack) {
  CutEvery(1);
  const Bytes cached = space_->Stats().free_resident;
  kernel_.FailAlways(Operation::kDiscard, ENOMEM);
  MustMap(*space_, kWhole);
  EXPECT_GT(space_->Stats().committed, committed_);
  EXPECT_EQ(space_->Stats().free_resident, cached);
  EXPECT_EQ(kernel_.InjectedFailures(), 2u) << "the purge, and the page that primes what is new";
  kernel_.StopFailing();
}

// The kernel counts committed memory and refuses the large step: the small one serves.
TEST_P(MapTest, ServesUnderAStrictLimit) {
  const Pages committed = kernel_.CommittedPages();
  kernel_.FailProtectBeyond(committed.bytes() + MiB(8));
  MustMap(*space_, MiB(4).value / kPageSize);
  MustMap(*space_, MiB(4).value / kPageSize);
  EXPECT_EQ(MapError(MiB(4).value / kPageSize), Error::System(ENOMEM));
  space_->CheckInvariants();
  kernel_.StopFailing();
  MustMap(*space_, MiB(4).value / kPageSize);
}

// ---- What is where ----

//   | -- | AA | ---- ... | BB |        of the first region, and the next
TEST_P(MapTest, LookupNextPassesOverFreeMemory) {
  const PageRange a = P(2, 2);
  const PageRange b = P(kSmallRegionPages + 10, 2);
  MustMapAt(*space_, a);
  MustMapAt(*space_, b);
  const auto next = [&](std::size_t page) { return space_->LookupNext(P(page, 1).first); };
  for (const std::size_t page : {0, 2, 3}) EXPECT_EQ(next(page)->range, a) << page;
  for (const std::size_t page : {4, 1000}) EXPECT_EQ(next(page)->range, b) << page;
  EXPECT_EQ(next(kSmallRegionPages + 12).error().code, ErrorCode::kNotMapped);
  EXPECT_EQ(space_->LookupNext(space_->reservation().end).error().code, ErrorCode::kOutsideReservation);
}

TEST_P(MapTest, RegionAtIsWhereAMappingHasToEnd) {
  EXPECT_EQ(space_->RegionAt(P(0, 1).first), P(0, kSmallRegionPages));
  EXPECT_EQ(space_->RegionAt(P(kSmallRegionPages - 1, 1).first), P(0, kSmallRegionPages));
  EXPECT_EQ(space_->RegionAt(P(kSmallRegionPages, 1).first), P(kSmallRegionPages, kSmallRegionPages));
  EXPECT_EQ(MapError(2, At(P(kSmallRegionPages - 1, 1).first)).code, ErrorCode::kOutsideReservation);
}

FREEHOLD_INSTANTIATE_POLICIES(MapTest);
FREEHOLD_INSTANTIATE_POLICIES(MapRoomTest);

// ---- Hints ----

class MapHintTest : public testing::Test {
 protected:
  Result<PageRange> Hint(Pages count, const void* address, Protection protection = Protection::kReadWrite) {
    MapOptions options;
    options.placement = Placement::kHint;
    options.address = const_cast<void*>(address);
    options.protection = protection;
    return space_->Map(count, options);
  }

  LinuxKernel kernel_;
  TestSpace space_{kernel_};
};

TEST_F(MapHintTest, IsFollowedWhereThereIsRoom) {
  const PageRange wanted = Part(ZoneRange(*space_, Zone::kPlain), 500, 4);
  EXPECT_EQ(*Hint({4}, wanted.first.address()), wanted);
  EXPECT_TRUE(IsZero(wanted));
  // Rounded down to a page.
  const PageRange next = Part(ZoneRange(*space_, Zone::kPlain), 600, 4);
  EXPECT_EQ(*Hint({4}, next.first.address() + 123), next);
  const PageRange mapping = Part(ZoneRange(*space_, Zone::kMapping), 500, 4);
  EXPECT_EQ(*Hint({4}, mapping.first.address(), Protection::kRead), mapping);
}

TEST_F(MapHintTest, IsDroppedWhereItCannotBeFollowed) {
  const PageRange taken = MustMap(*space_, 4);
  const auto expect_elsewhere = [&](const char* what, const void* address, Protection protection) {
    SCOPED_TRACE(what);
    const Result<PageRange> mapped = Hint({4}, address, protection);
    ASSERT_TRUE(mapped.ok());
    EXPECT_NE(mapped->first, PageNumber::Of(address));
    const bool heap = protection == Protection::kReadWrite;
    EXPECT_EQ(ZoneRange(*space_, Zone::kMapping).Contains(*mapped), !heap);
  };
  expect_elsewhere("taken", (taken.first + Pages{2}).address(), Protection::kReadWrite);
  expect_elsewhere("null", nullptr, Protection::kReadWrite);
  expect_elsewhere("outside", space_->reservation().end.address(), Protection::kReadWrite);
  expect_elsewhere("across a border", (ZoneRange(*space_, Zone::kPlain).end - Pages{2}).address(),
                   Protection::kReadWrite);
  expect_elsewhere("another kind", Part(ZoneRange(*space_, Zone::kPlain), 900, 1).address(), Protection::kRead);
  expect_elsewhere("another kind", Part(ZoneRange(*space_, Zone::kMapping), 900, 1).address(), Protection::kReadWrite);
  {
    const PageRange pinned = MustMap(*space_, 4);
    const Pin pin(*space_, pinned);
    ASSERT_TRUE(space_->Unmap(pinned).ok());
    expect_elsewhere("pinned", pinned.first.address(), Protection::kReadWrite);
  }
  RemapOptions remap;
  remap.placement = Placement::kHint;
  EXPECT_EQ(space_->Remap(taken, {4}, remap).error().code, ErrorCode::kUnsupported);
}

}  // namespace
}  // namespace freehold::vm
