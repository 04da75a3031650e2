// How free memory goes back to the kernel: on request, by age, above a limit; and what the statistics say.
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/address_space.h"
#include "vm/os/fake_kernel.h"

namespace freehold::vm {
namespace {

using namespace test;  // NOLINT: the fixture's words
using os::FakeKernel;
using os::Protection;

class PurgeTest : public PolicyTest {
 protected:
  static AddressSpaceOptions PurgeOptions() {
    AddressSpaceOptions options = Options();
    options.free_resident_limit = MiB(4);
    options.decay = Milliseconds(1000);
    return options;
  }
  // Maps, makes resident, fills and unmaps.
  PageRange Free(std::size_t pages) {
    const PageRange range = MustMap(*space_, pages, {.populate = true});
    Fill(range, 0xaa);
    EXPECT_TRUE(space_->Unmap(range).ok());
    return range;
  }
  Pages Resident() const { return kernel_.ResidentPages(space_->reservation()); }
  void TickAfter(Nanoseconds time) {
    kernel_.AdvanceTime(time);
    space_->Tick();
  }

  FakeKernel kernel_;
  TestSpace space_{kernel_, PurgeOptions()};
};

TEST_P(PurgeTest, AllGivesEverythingBack) {
  std::vector<PageRange> ranges;
  for (const std::size_t pages : {1, 3, 64, 65, 100, 300}) {
    ranges.push_back(MustMap(*space_, pages, {.populate = true}));
  }
  const PageRange kept = MustMap(*space_, 10, {.populate = true});
  Fill(kept, 0xaa);
  for (const PageRange range : ranges) ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(Resident(), Pages{533 + 10});
  EXPECT_EQ(space_->Stats().free_resident, Pages{533}.bytes());
  EXPECT_EQ(space_->Purge(PurgeScope::kAll), Pages{533});
  EXPECT_EQ(Resident(), Pages{10});
  EXPECT_EQ(space_->Stats().free_resident, Bytes{0});
  EXPECT_EQ(space_->Stats().purged_pages, 533u);
  EXPECT_TRUE(IsFilledWith(kept, 0xaa));
  EXPECT_EQ(space_->Purge(PurgeScope::kAll), Pages{0});
  space_->CheckInvariants();
}

TEST_P(PurgeTest, NeighboursGoInOneVectoredCall) {
  std::vector<PageRange> ranges;
  for (int i = 0; i < 40; ++i) ranges.push_back(MustMap(*space_, 4, {.populate = true}));
  for (const PageRange range : ranges) ASSERT_TRUE(space_->Unmap(range).ok());
  kernel_.ClearCalls();
  EXPECT_EQ(space_->Purge(PurgeScope::kAll), Pages{160});
  EXPECT_EQ(kernel_.CallCount(), 1u);
  EXPECT_EQ(kernel_.CallCount(Operation::kDiscard), 1u);
  EXPECT_EQ(space_->Stats().purge_calls, 1u);
}

// After a purge the memory is clean: mapping it costs neither memset nor call.
TEST_P(PurgeTest, PurgedMemoryIsCleanAndMerged) {
  for (int i = 0; i < 8; ++i) (void)MustMap(*space_, 8, {.populate = true});
  ASSERT_TRUE(space_->Unmap(Part(space_->reservation(), 0, 64)).ok());
  (void)space_->Purge(PurgeScope::kAll);
  kernel_.ClearCalls();
  const PageRange range = MustMap(*space_, 64);
  EXPECT_EQ(range, Part(space_->reservation(), 0, 64)) << "the extents became one";
  EXPECT_EQ(kernel_.CallCount(), 0u);
  EXPECT_TRUE(IsZero(range));
}

TEST_P(PurgeTest, WhatTheKernelRefusesStaysAndGoesLater) {
  const PageRange range = Free(16);
  kernel_.FailAlways(Operation::kDiscard, ENOMEM);
  EXPECT_EQ(space_->Purge(PurgeScope::kAll), Pages{0});
  space_->CheckInvariants();
  EXPECT_EQ(space_->Stats().free_resident, Pages{16}.bytes());
  MustMapAt(*space_, range);
  EXPECT_TRUE(IsZero(range));
  ASSERT_TRUE(space_->Unmap(range).ok());
  kernel_.StopFailing();
  EXPECT_EQ(space_->Purge(PurgeScope::kAll), Pages{16});
}

// ---- Decay ----

//   time   0        0.5 s     1 s      1.1 s
//   free   16 pages
//   ticks           nothing   nothing  16 pages
TEST_P(PurgeTest, TicksPurgeWhatIsOldEnough) {
  space_->Tick();
  Free(16);
  TickAfter(Milliseconds(500));
  EXPECT_EQ(Resident(), Pages{16});
  TickAfter(Milliseconds(480));
  EXPECT_EQ(Resident(), Pages{16});
  TickAfter(Milliseconds(120));
  EXPECT_EQ(Resident(), Pages{0});
}

TEST_P(PurgeTest, TicksPurgeTheOldAndKeepTheYoung) {
  space_->Tick();
  const PageRange old = Free(16);
  TickAfter(Milliseconds(700));
  const PageRange young = Free(32);
  TickAfter(Milliseconds(500));
  EXPECT_EQ(kernel_.ResidentPages(old), Pages{0});
  EXPECT_EQ(kernel_.ResidentPages(young), Pages{32});
  EXPECT_EQ(space_->Purge(PurgeScope::kDecayed), Pages{0});
  TickAfter(Milliseconds(700));
  EXPECT_EQ(Resident(), Pages{0});
}

TEST_P(PurgeTest, ReuseStartsTheClockAgain) {
  space_->Tick();
  PageRange range = Free(16);
  for (int i = 0; i < 10; ++i) {
    TickAfter(Milliseconds(600));
    EXPECT_EQ(Resident(), Pages{16}) << i;
    range = MustMap(*space_, 16, {.content = Content::kAnything});
    ASSERT_TRUE(space_->Unmap(range).ok());
  }
}

// Ticks may pause, where nobody allocates: what was freed a moment ago is young all the same.
TEST_P(PurgeTest, MemoryFreedAfterALongPauseIsYoung) {
  space_->Tick();
  kernel_.AdvanceTime(Milliseconds(60'000));
  Free(16);
  TickAfter(Milliseconds(10));
  EXPECT_EQ(Resident(), Pages{16});
  TickAfter(Milliseconds(1100));
  EXPECT_EQ(Resident(), Pages{0});
}

// An old extent that was cut is old still.
//   cached at 0 s   |        16        |
//   at 0.7 s        | 4 |  mapped  | 4 |
TEST_P(PurgeTest, PartsOfACachedExtentKeepTheirAge) {
  space_->Tick();
  const PageRange range = Free(16);
  TickAfter(Milliseconds(700));
  Free(4);  // as young as can be, in the bin of the parts
  MustMapAt(*space_, Part(range, 4, 8));
  TickAfter(Milliseconds(500));
  EXPECT_EQ(kernel_.ResidentPages(Part(range, 0, 4)), Pages{0});
  EXPECT_EQ(kernel_.ResidentPages(Part(range, 12, 4)), Pages{0});
}

// ---- The limit ----

TEST_P(PurgeTest, FreeMemoryAboveTheLimitGoesAtOnce) {
  const std::size_t limit = MiB(4).value / kPageSize;
  std::vector<PageRange> ranges;
  for (std::size_t i = 0; i < 40; ++i) ranges.push_back(MustMap(*space_, 64, {.populate = true}));
  for (const PageRange range : ranges) {
    ASSERT_TRUE(space_->Unmap(range).ok());
    ASSERT_LE(space_->Stats().free_resident, MiB(4));
  }
  EXPECT_LE(Resident(), Pages{limit});
  EXPECT_GT(Resident(), Pages{0}) << "but not all of it";
  EXPECT_GT(space_->Stats().purge_calls, 0u);
}

TEST_P(PurgeTest, OneExtentAboveTheLimitGoesAtOnce) {
  Free(MiB(8).value / kPageSize);
  EXPECT_EQ(Resident(), Pages{0});
}

// ---- More than was ever mapped, and a quarter ----

// Extents that nothing larger fits into, since mapped pages lie between.
class ExcessTest : public PolicyTest {
 protected:
  static constexpr std::size_t kExtent = MiB(4).value / kPageSize;

  static AddressSpaceOptions ExcessOptions() {
    AddressSpaceOptions options = Options();
    options.reserve = GiB(1);
    return options;
  }
  PageRange MapLarge(std::size_t pages, Content content = Content::kAnything) {
    const PageRange range = MustMap(*space_, pages, {.content = content});
    MustMap(*space_, 1);
    return range;
  }
  // Maps `count` of them at once and frees them.
  void Cache(std::size_t count) {
    std::vector<PageRange> ranges;
    for (std::size_t i = 0; i < count; ++i) ranges.push_back(MapLarge(kExtent));
    for (const PageRange range : ranges) {
      Fill(range, 0xaa);
      ASSERT_TRUE(space_->Unmap(range).ok());
    }
    ASSERT_EQ(Cached(), count * kExtent);
  }
  std::size_t Cached() const { return PagesFor(space_->Stats().free_resident).value; }

  FakeKernel kernel_;
  TestSpace space_{kernel_, ExcessOptions()};
};

TEST_P(ExcessTest, GoesWhenSomethingFreshIsMapped) {
  Cache(10);
  MapLarge(2 * kExtent);  // 2 mapped and 10 cached: as much as was mapped, and a quarter of that
  EXPECT_EQ(Cached(), 10 * kExtent);
  MapLarge(2 * kExtent);
  EXPECT_EQ(Cached(), 8 * kExtent);
  EXPECT_EQ(space_->Stats().purged_pages, 2 * kExtent);
  MapLarge(kExtent / 2);  // finds a place in one of them
  EXPECT_EQ(Cached(), 8 * kExtent - kExtent / 2);
  space_->CheckInvariants();
}

TEST_P(ExcessTest, SmallExtentsGoFirst) {
  Cache(10);
  const PageRange small = MapLarge(kExtent / 2);
  ASSERT_TRUE(space_->Unmap(small).ok());
  const std::size_t before = Cached();
  MapLarge(2 * kExtent);
  MapLarge(kExtent + kExtent / 4);
  EXPECT_LT(Cached(), before);
  EXPECT_GE(Cached(), before - kExtent);
}

TEST_P(ExcessTest, LittleIsNotTooMuch) {
  Cache(1);
  MapLarge(2 * kExtent);  // 8 MiB are
  EXPECT_EQ(Cached(), kExtent);
  MapLarge(8 * kExtent);
  EXPECT_EQ(Cached(), kExtent) << "so much was mapped by now";
}

TEST_P(ExcessTest, ZeroedMappingsKeepToTheLimit) {
  Cache(10);
  for (int i = 0; i < 4; ++i) MapLarge(2 * kExtent, Content::kZeroed);
  EXPECT_EQ(Cached(), 10 * kExtent);
}

TEST_P(ExcessTest, WhatWasMappedLongAgoCountsForLess) {
  Cache(10);
  for (int i = 0; i < 40; ++i) {
    space_->Tick();
    EXPECT_EQ(Cached(), 10 * kExtent) << "no time has passed";
  }
  MapLarge(2 * kExtent);
  EXPECT_LT(Cached(), 10 * kExtent);
}

TEST_P(ExcessTest, StaysIfTheKernelRefuses) {
  Cache(10);
  kernel_.FailAlways(Operation::kDiscard, ENOMEM);
  for (int i = 0; i < 4; ++i) MapLarge(2 * kExtent);
  EXPECT_EQ(Cached(), 10 * kExtent);
  kernel_.StopFailing();
  MapLarge(2 * kExtent);
  EXPECT_LT(Cached(), 10 * kExtent);
  space_->CheckInvariants();
}

FREEHOLD_INSTANTIATE_POLICIES(ExcessTest);

// ---- Bins that nobody touches are cleaned in batches ----

TEST_P(PurgeTest, MappingsThatNobodyTouchesCostFewCalls) {
  kernel_.ClearCalls();
  for (int i = 0; i < 2000; ++i) {
    const PageRange range = MustMap(*space_, 16);
    ASSERT_TRUE(space_->Unmap(range).ok());
  }
  EXPECT_EQ(kernel_.CallCount(Operation::kZero), 0u) << "nothing was dirty";
  EXPECT_LE(kernel_.CallCount(), 150u);
  EXPECT_EQ(space_->Stats().zeroed_pages, 0u);
  space_->CheckInvariants();
}

FREEHOLD_INSTANTIATE_POLICIES(PurgeTest);

// ---- Statistics ----

class StatsTest : public PolicyTest {};

TEST_P(StatsTest, AddUp) {
  FakeKernel kernel;
  TestSpace space(kernel, Options());
  AddressSpaceStats stats = space->Stats();
  EXPECT_EQ(stats.reserved, MiB(256));
  EXPECT_EQ(stats.mapped, Bytes{0});
  EXPECT_EQ(stats.vmas + stats.maps + stats.unmaps + stats.reuses + stats.zeroed_pages, 0u);

  const PageRange a = MustMap(*space, 10);
  const PageRange b = MustMap(*space, 5, {.protection = Protection::kRead});
  const PageRange c = MustMap(*space, 512, {.populate = true});
  stats = space->Stats();
  EXPECT_EQ(stats.mapped, Pages{527}.bytes());
  EXPECT_EQ(stats.vmas, 3u);
  EXPECT_EQ(stats.maps, 3u);

  ASSERT_TRUE(space->Unmap(Part(a, 2, 3)).ok());
  ASSERT_TRUE(space->Unmap(b).ok());
  ASSERT_TRUE(space->Unmap(c).ok());
  stats = space->Stats();
  EXPECT_EQ(stats.mapped, Pages{7}.bytes());
  EXPECT_EQ(stats.vmas, 2u);
  EXPECT_EQ(stats.unmaps, 3u);
  EXPECT_EQ(stats.free_resident, Pages{515}.bytes());

  (void)space->Purge(PurgeScope::kAll);
  stats = space->Stats();
  EXPECT_EQ(stats.free_resident, Bytes{0});
  EXPECT_EQ(stats.purged_pages, 515u);
}

FREEHOLD_INSTANTIATE_POLICIES(StatsTest);

// ---- Visiting ----

class ForEachVmaTest : public PolicyTest {
 protected:
  PageRange P(std::size_t first, std::size_t count) const { return Part(space_->reservation(), first, count); }

  FakeKernel kernel_;
  TestSpace space_{kernel_, Options()};
};

TEST_P(ForEachVmaTest, VisitsNothingOfAnEmptySpace) { EXPECT_TRUE(Vmas(*space_).empty()); }

TEST_P(ForEachVmaTest, VisitsAllInOrderAcrossBatchesAndRegions) {
  std::vector<PageRange> expected;
  // 63, 64, 65 and more in a region: around the size of a batch.
  const std::size_t counts[] = {63, 64, 65, 500};
  for (std::size_t region = 0; region < 4; ++region) {
    for (std::size_t i = 0; i < counts[region]; ++i) {
      const PageRange range = P(region * kSmallRegionPages + 3 * i, 1 + i % 3);
      MustMapAt(*space_, range, i % 2 == 0 ? Protection::kReadWrite : Protection::kNone);
      expected.push_back(range);
    }
  }
  const std::vector<VmaInfo> vmas = Vmas(*space_);
  ASSERT_EQ(vmas.size(), expected.size());
  for (std::size_t i = 0; i < vmas.size(); ++i) {
    EXPECT_EQ(vmas[i].range, expected[i]);
    const Result<VmaInfo> lookup = space_->Lookup(expected[i].first);
    EXPECT_EQ(lookup->range, vmas[i].range);
    EXPECT_EQ(lookup->generation, vmas[i].generation);
    EXPECT_EQ(lookup->protection, vmas[i].protection);
    EXPECT_EQ(lookup->zone, vmas[i].zone);
  }
}

TEST_P(ForEachVmaTest, VisitorsMayUseTheSpace) {
  for (std::size_t i = 0; i < 200; ++i) MustMapAt(*space_, P(2 * i, 1));
  struct Context {
    AddressSpace& space;
    std::size_t visits = 0;
  } context{*space_};
  space_->ForEachVma([](void* c, const VmaInfo& vma) {
    auto& [space, visits] = *static_cast<Context*>(c);
    ++visits;
    EXPECT_TRUE(space.Unmap(vma.range).ok());
  }, &context);
  EXPECT_EQ(context.visits, 200u);
  EXPECT_TRUE(Vmas(*space_).empty());
}

// A mapping that comes between two batches, across the page where the second one starts.
//   visited   ... 124|125|126|      batch of 64 ends
//   now                  |126 127|
TEST_P(ForEachVmaTest, NeverGoesBack) {
  for (std::size_t i = 0; i < 100; ++i) MustMapAt(*space_, P(2 * i, 1));
  struct Context {
    AddressSpace& space;
    PageRange moves;
    std::vector<PageRange> visited;
  } context{*space_, P(126, 2), {}};
  space_->ForEachVma([](void* c, const VmaInfo& vma) {
    auto& [space, moves, visited] = *static_cast<Context*>(c);
    visited.push_back(vma.range);
    if (vma.range == Part(moves, 0, 1)) {
      EXPECT_TRUE(space.Unmap(vma.range).ok());
      MustMapAt(space, moves);
    }
  }, &context);
  for (std::size_t i = 1; i < context.visited.size(); ++i) {
    EXPECT_LE(context.visited[i - 1].end, context.visited[i].first) << i;
  }
  EXPECT_GE(context.visited.size(), 100u);
}

FREEHOLD_INSTANTIATE_POLICIES(ForEachVmaTest);

}  // namespace
}  // namespace freehold::vm
