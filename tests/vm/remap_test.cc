// AddressSpace::Remap: in place, by copying and by the kernel; what is kept, what is refused, and the kernel VMAs
// that it costs.
#include <cerrno>
#include <cstdint>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/address_space.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"

namespace freehold::vm {
namespace {

using namespace test;  // NOLINT: the fixture's words
using os::FakeKernel;
using os::MemoryLock;
using os::Protection;

constexpr RemapOptions kMayMove = {.may_move = true};

class RemapTest : public PolicyTest {
 protected:
  PageRange P(std::size_t first, std::size_t count) const { return Part(space_->reservation(), first, count); }
  std::string Line(std::size_t count) const { return Draw(*space_, P(0, count)); }
  static RemapOptions To(PageRange target, Placement placement = Placement::kFixed) {
    return {.placement = placement, .address = target.address()};
  }

  FakeKernel kernel_;
  TestSpace space_{kernel_, Options()};
};

// ---- In place ----

TEST_P(RemapTest, ShrinksAndStays) {
  MustMapAt(*space_, P(0, 8));
  Fill(P(0, 8), 0xaa);
  EXPECT_EQ(*space_->Remap(P(0, 8), {8}), P(0, 8));
  EXPECT_EQ(*space_->Remap(P(0, 8), {3}), P(0, 3));
  EXPECT_EQ(Line(10), "AAA.......");
  EXPECT_TRUE(IsFilledWith(P(0, 3), 0xaa));
}

TEST_P(RemapTest, GrowsIntoFreeAndCachedPages) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(4, 4));
  Fill(P(0, 8), 0xaa);
  const std::uint64_t generation = space_->Lookup(P(0, 1).first)->generation;
  ASSERT_TRUE(space_->Unmap(P(4, 4)).ok());
  EXPECT_EQ(*space_->Remap(P(0, 4), {100}), P(0, 100));
  EXPECT_EQ(Line(101), std::string(100, 'A') + ".");
  EXPECT_EQ(space_->Stats().vmas, 1u);
  EXPECT_EQ(space_->Lookup(P(50, 1).first)->generation, generation);
  EXPECT_TRUE(IsFilledWith(P(0, 4), 0xaa));
  EXPECT_TRUE(IsZero(P(4, 96)));
  EXPECT_EQ(space_->Stats().remap_moves, 0u);
}

TEST_P(RemapTest, GrowsWithItsProtectionAndLock) {
  MustMapAt(*space_, P(0, 4), Protection::kRead);
  EXPECT_EQ(*space_->Remap(P(0, 4), {6}), P(0, 6));
  EXPECT_EQ(Line(8), "aaaaaa..");
  EXPECT_EQ(kernel_.At(P(5, 1).first).protection, Protection::kRead);
  const PageRange mapping = MustMap(*space_, 4, {.protection = Protection::kReadWriteExec});
  Fill(mapping, 0xaa);
  const PageRange grown = *space_->Remap(mapping, {8});
  EXPECT_EQ(grown.first, mapping.first);
  EXPECT_EQ(Draw(*space_, grown), "aaaaaaaa");
  EXPECT_TRUE(IsZero(Part(grown, 4, 4)));
  const PageRange locked = MustMap(*space_, 4, {.alignment = {64}, .lock = MemoryLock::kLocked});
  const PageRange more = *space_->Remap(locked, {8});
  EXPECT_EQ(more.first, locked.first);
  EXPECT_EQ(Draw(*space_, more), "AAAAAAAA");
  EXPECT_EQ(kernel_.LockedPages(), Pages{8});
  EXPECT_EQ(kernel_.ResidentPages(more), Pages{8}) << "populated";
}

TEST_P(RemapTest, APartGrowsOnlyAtTheEnd) {
  MustMapAt(*space_, P(0, 8));
  EXPECT_EQ(space_->Remap(P(0, 4), {6}).error().code, ErrorCode::kNoRoom);
  EXPECT_EQ(*space_->Remap(P(4, 4), {6}), P(4, 6));
  EXPECT_EQ(Line(12), "AAAAAAAAAA..");
  EXPECT_EQ(space_->Stats().vmas, 1u);
}

TEST_P(RemapTest, DoesNotGrowIntoOthersOrBeyondItsRegion) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(6, 4));
  EXPECT_EQ(*space_->Remap(P(0, 4), {6}), P(0, 6));
  EXPECT_EQ(space_->Remap(P(0, 6), {7}).error().code, ErrorCode::kNoRoom);
  MustMapAt(*space_, P(kSmallRegionPages - 2, 2));
  EXPECT_EQ(space_->Remap(P(kSmallRegionPages - 2, 2), {4}).error().code, ErrorCode::kNoRoom);
  EXPECT_EQ(Line(10), "AAAAAABBBB");
}

// ---- Moves ----

TEST_P(RemapTest, SmallOnesAreCopied) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(4, 4));
  Fill(P(1, 2), 0xaa);
  const std::uint64_t generation = space_->Lookup(P(0, 1).first)->generation;
  const std::size_t kernel_vmas = kernel_.KernelVmaCount();
  const Result<PageRange> moved = space_->Remap(P(0, 4), {8}, kMayMove);
  ASSERT_TRUE(moved.ok());
  EXPECT_EQ(moved->count(), Pages{8});
  EXPECT_FALSE(moved->Overlaps(P(0, 8)));
  EXPECT_EQ(Line(8), "....AAAA");
  EXPECT_EQ(Draw(*space_, *moved), "AAAAAAAA");
  EXPECT_EQ(space_->Lookup(moved->first)->generation, generation);
  EXPECT_TRUE(IsFilledWith(Part(*moved, 1, 2), 0xaa));
  EXPECT_TRUE(IsZero(Part(*moved, 0, 1)));
  EXPECT_TRUE(IsZero(Part(*moved, 3, 5)));
  EXPECT_EQ(kernel_.CallCount(Operation::kMove), 0u);
  EXPECT_EQ(kernel_.KernelVmaCount(), kernel_vmas);
  EXPECT_EQ(space_->Stats().remap_moves, 1u);
  EXPECT_EQ(space_->Stats().kernel_moves, 0u);
  MustMapAt(*space_, P(0, 4));
  EXPECT_TRUE(IsZero(P(0, 4)));
}

TEST_P(RemapTest, LargeOnesAreMovedByTheKernelAndHealed) {
  MustMapAt(*space_, P(0, 100));
  MustMapAt(*space_, P(100, 1));
  Fill(P(3, 2), 0xaa);
  const std::size_t kernel_vmas = kernel_.KernelVmaCount();
  const Result<PageRange> moved = space_->Remap(P(0, 100), {200}, kMayMove);
  ASSERT_TRUE(moved.ok());
  EXPECT_EQ(kernel_.CallCount(Operation::kMove), 1u);
  EXPECT_EQ(space_->Stats().kernel_moves, 1u);
  EXPECT_TRUE(IsFilledWith(Part(*moved, 3, 2), 0xaa));
  EXPECT_TRUE(IsZero(Part(*moved, 5, 195)));
  EXPECT_GT(kernel_.KernelVmaCount(), kernel_vmas) << "split as long as it lives";
  Fill(*moved, 0xbb);
  MustMapAt(*space_, P(0, 100));
  EXPECT_TRUE(IsZero(P(0, 100)));
  ASSERT_TRUE(space_->Unmap(Part(*moved, 10, 10)).ok());
  ASSERT_TRUE(space_->Unmap(*moved).ok());
  EXPECT_EQ(kernel_.KernelVmaCount(), kernel_vmas) << "one again";
  MustMapAt(*space_, *moved);
  EXPECT_TRUE(IsZero(*moved));
}

TEST_P(RemapTest, MovedOnesGrowMoveProtectAndAreReplaced) {
  MustMapAt(*space_, P(0, 100));
  MustMapAt(*space_, P(100, 1));
  Fill(P(0, 100), 0xaa);
  const std::size_t kernel_vmas = kernel_.KernelVmaCount();
  PageRange range = *space_->Remap(P(0, 100), {110}, kMayMove);
  range = *space_->Remap(range, {120});
  EXPECT_EQ(Draw(*space_, range), std::string(120, 'A'));
  const PageRange part = *space_->Remap(Part(range, 0, 90), {91}, kMayMove);
  EXPECT_TRUE(IsFilledWith(Part(part, 0, 90), 0xaa));
  EXPECT_TRUE(IsFilledWith(Part(range, 90, 10), 0xaa));
  ASSERT_TRUE(space_->Protect(Part(part, 0, 10), Protection::kRead).ok());
  MustMap(*space_, 20, At(Part(part, 5, 1).first, Placement::kReplace));
  EXPECT_TRUE(IsZero(Part(part, 5, 20)));
  EXPECT_TRUE(IsFilledWith(Part(part, 25, 65), 0xaa));
  ASSERT_TRUE(space_->LockMemory(Part(part, 20, 10)).ok());
  ASSERT_TRUE(space_->Unmap(space_->reservation()).ok());
  EXPECT_EQ(kernel_.LockedPages(), Pages{0});
  EXPECT_EQ(kernel_.KernelVmaCount(), kernel_vmas);
  space_->CheckInvariants();
}

TEST_P(RemapTest, EveryProtectionMoves) {
  for (const Protection protection :
       {Protection::kNone, Protection::kRead, Protection::kReadExec, Protection::kReadWriteExec, Protection::kWrite}) {
    SCOPED_TRACE(static_cast<int>(protection));
    for (const bool kernel_refuses : {false, true}) {
      const PageRange range = MustMap(*space_, 4, {.protection = Protection::kReadWriteExec});
      Fill(range, 0xaa);
      ASSERT_TRUE(space_->Protect(range, protection).ok());
      const PageRange behind = MustMap(*space_, 1, {.protection = protection});
      if (kernel_refuses) kernel_.FailAlways(Operation::kMove, EFAULT);
      const Result<PageRange> moved = space_->Remap(range, {8}, kMayMove);
      kernel_.StopFailing();
      ASSERT_TRUE(moved.ok());
      for (std::size_t i = 0; i < 8; ++i) EXPECT_EQ(kernel_.At(Part(*moved, i, 1).first).protection, protection);
      EXPECT_EQ(space_->Lookup(moved->first)->protection, protection);
      ASSERT_TRUE(space_->Protect(*moved, Protection::kRead).ok());
      EXPECT_TRUE(IsFilledWith(Part(*moved, 0, 4), 0xaa));
      EXPECT_TRUE(IsZero(Part(*moved, 4, 4)));
      ASSERT_TRUE(space_->Unmap(*moved).ok());
      ASSERT_TRUE(space_->Unmap(behind).ok());
      EXPECT_EQ(kernel_.At(range.first).protection, Protection::kNone);
    }
  }
}

TEST_P(RemapTest, WhatTheKernelWillNotMoveIsCopied) {
  MustMapAt(*space_, P(0, 100));
  MustMapAt(*space_, P(100, 1));
  Fill(P(10, 20), 0xaa);
  kernel_.FailNth(Operation::kMove, 1, EFAULT);
  const Result<PageRange> moved = space_->Remap(P(0, 100), {200}, kMayMove);
  ASSERT_TRUE(moved.ok());
  EXPECT_EQ(space_->Stats().kernel_moves, 0u);
  EXPECT_TRUE(IsFilledWith(Part(*moved, 10, 20), 0xaa));
  EXPECT_TRUE(IsZero(Part(*moved, 30, 170)));
  Fill(*moved, 0xbb);
}

TEST_P(RemapTest, LockedMemoryMovesLocked) {
  MustMapAt(*space_, P(0, 100));
  MustMapAt(*space_, P(100, 1));
  Fill(P(0, 100), 0xaa);
  ASSERT_TRUE(space_->LockMemory(P(0, 100)).ok());
  const Result<PageRange> moved = space_->Remap(P(0, 100), {120}, kMayMove);
  ASSERT_TRUE(moved.ok());
  EXPECT_EQ(space_->Lookup(moved->first)->lock, MemoryLock::kLocked);
  EXPECT_EQ(kernel_.LockedPages(), Pages{120});
  EXPECT_TRUE(kernel_.At(moved->first).locked);
  EXPECT_TRUE(IsFilledWith(Part(*moved, 0, 100), 0xaa));
  EXPECT_EQ(kernel_.ResidentPages(*moved), Pages{120});
}

TEST_P(RemapTest, ToAFixedPlace) {
  MustMapAt(*space_, P(0, 8));
  MustMapAt(*space_, P(16, 4));
  Fill(P(0, 8), 0xaa);
  EXPECT_EQ(space_->Remap(P(0, 8), {8}, To(P(12, 8))).error().code, ErrorCode::kOverlap);
  EXPECT_EQ(Line(20), "AAAAAAAA........BBBB");
  EXPECT_EQ(*space_->Remap(P(0, 8), {8}, To(P(12, 8), Placement::kReplace)), P(12, 8));
  EXPECT_EQ(Line(20), "............AAAAAAAA");
  EXPECT_TRUE(IsFilledWith(P(12, 8), 0xaa));
  EXPECT_EQ(*space_->Remap(P(12, 8), {4}, To(P(0, 4))), P(0, 4)) << "shorter";
  EXPECT_EQ(Line(20), "AAAA................");
  EXPECT_EQ(*space_->Remap(P(0, 4), {8}, To(P(4, 8))), P(4, 8)) << "longer";
  EXPECT_TRUE(IsFilledWith(P(4, 4), 0xaa));
  EXPECT_TRUE(IsZero(P(8, 4)));
  const PageRange other = P(kSmallRegionPages + 10, 8);
  EXPECT_EQ(*space_->Remap(P(4, 8), {8}, To(other)), other) << "in another region";
  EXPECT_TRUE(IsFilledWith(Part(other, 0, 4), 0xaa));
  const PageRange mapping = Part(ZoneRange(*space_, Zone::kMapping), 4, 8);
  EXPECT_EQ(*space_->Remap(other, {8}, To(mapping)), mapping) << "in another zone";
  EXPECT_EQ(*space_->Remap(mapping, {8}, To(P(0, 8))), P(0, 8)) << "and back";
  EXPECT_TRUE(IsFilledWith(P(0, 4), 0xaa));
  EXPECT_EQ(space_->Stats().vmas, 1u);
}

// It brings its generation, which may be newer than any of the region that it comes to: an unmap that spares what
// others map in its holes meanwhile does not spare it.
TEST_P(RemapTest, FromARegionThatHasSeenMore) {
  const PageRange elsewhere = Part(space_->reservation(), kSmallRegionPages, kSmallRegionPages);
  for (int i = 0; i < 20; ++i) {
    MustMapAt(*space_, P(0, 8));
    ASSERT_TRUE(space_->Unmap(P(0, 8)).ok());
  }
  MustMapAt(*space_, P(0, 8));
  const std::uint64_t generation = space_->Lookup(P(0, 1).first)->generation;
  const PageRange target = Part(elsewhere, 0, 8);
  ASSERT_EQ(*space_->Remap(P(0, 8), {8}, To(target)), target);
  EXPECT_EQ(space_->Lookup(target.first)->generation, generation);
  MustMapAt(*space_, Part(elsewhere, 8, 1));
  EXPECT_GT(space_->Lookup(Part(elsewhere, 8, 1).first)->generation, generation);
  ASSERT_TRUE(space_->Unmap(Part(elsewhere, 2, 3)).ok());
  EXPECT_EQ(Draw(*space_, Part(elsewhere, 0, 10)), "AA...AAAB.");
  ASSERT_TRUE(space_->Unmap(Part(elsewhere, 0, 16)).ok());
  EXPECT_EQ(Draw(*space_, Part(elsewhere, 0, 10)), "..........");
  EXPECT_EQ(space_->Stats().vmas, 0u);
  space_->CheckInvariants();
}

TEST_P(RemapTest, KeepsTheSourceMapped) {
  for (const std::size_t pages : {8, 100}) {
    const PageRange range = MustMap(*space_, pages);
    Fill(range, 0xaa);
    const Result<PageRange> moved = space_->Remap(range, {pages}, {.may_move = true, .keep_source = true});
    ASSERT_TRUE(moved.ok());
    EXPECT_TRUE(IsFilledWith(*moved, 0xaa));
    EXPECT_EQ(Draw(*space_, range), std::string(pages, 'A'));
    EXPECT_TRUE(IsZero(range));
    EXPECT_NE(space_->Lookup(range.first)->generation, space_->Lookup(moved->first)->generation);
    Fill(range, 0xbb);
    EXPECT_TRUE(IsFilledWith(*moved, 0xaa));
  }
}

// ---- Errors ----

TEST_P(RemapTest, RefusesWhatIsNotOneVma) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(4, 4));
  MustMapAt(*space_, P(10, 4));
  ASSERT_TRUE(space_->Protect(P(12, 2), Protection::kRead).ok());
  for (const PageRange range : {P(0, 8), P(2, 4), P(8, 2), P(4, 6), P(10, 4)}) {
    EXPECT_EQ(space_->Remap(range, {20}, kMayMove).error().code, ErrorCode::kNotMapped);
    EXPECT_EQ(space_->Remap(range, {1}).error().code, ErrorCode::kNotMapped);
  }
  EXPECT_EQ(Line(14), "AAAABBBB..CCcc");
}

TEST_P(RemapTest, RefusesWhatIsNoRangeOfTheSpace) {
  const PageRange all = space_->reservation();
  MustMapAt(*space_, P(0, 8));
  EXPECT_EQ(space_->Remap(P(2, 0), {4}).error().code, ErrorCode::kEmpty);
  EXPECT_EQ(space_->Remap(P(0, 8), {0}).error().code, ErrorCode::kEmpty);
  EXPECT_EQ(space_->Remap({P(3, 1).first, P(1, 1).first}, {4}).error().code, ErrorCode::kOverflow);
  EXPECT_EQ(space_->Remap(PageRange::Of(all.end, {1}), {4}).error().code, ErrorCode::kOutsideReservation);
  EXPECT_EQ(space_->Remap(P(0, 8), {SIZE_MAX}, kMayMove).error().code, ErrorCode::kNoRoom);
  EXPECT_EQ(space_->Remap(P(0, 8), {kSmallRegionPages + 1}, kMayMove).error().code, ErrorCode::kNoRoom);
  RemapOptions unaligned = To(P(20, 1));
  unaligned.address = P(20, 1).address() + 8;
  EXPECT_EQ(space_->Remap(P(0, 8), {8}, unaligned).error().code, ErrorCode::kUnaligned);
  EXPECT_EQ(space_->Remap(P(0, 8), {8}, To(P(4, 8))).error().code, ErrorCode::kOverlap);
  EXPECT_EQ(space_->Remap(P(0, 8), {8}, To(P(kSmallRegionPages - 4, 8))).error().code, ErrorCode::kOutsideReservation);
  EXPECT_EQ(space_->Remap(P(0, 8), {8}, {.keep_source = true}).error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(space_->Remap(P(0, 8), {9}, {.may_move = true, .keep_source = true}).error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(Line(10), "AAAAAAAA..");
}

FREEHOLD_INSTANTIATE_POLICIES(RemapTest);

// ---- On the real kernel ----

TEST(RemapLinuxTest, GrowsStepByStepInEveryZone) {
  os::LinuxKernel kernel;
  TestSpace space(kernel);
  for (const MapOptions& options :
       {MapOptions{}, MapOptions{.huge_pages = os::HugePages::kPrefer}, MapOptions{.protection = Protection::kReadWriteExec}}) {
    PageRange range = MustMap(*space, 512, options);
    Fill(range, 1);
    for (std::size_t step = 2; step < 8; ++step) {
      // Something in the way every other time.
      if (step % 2 == 0) (void)space->Map({1}, At(range.end));
      const PageRange before = range;
      const Result<PageRange> grown = space->Remap(range, range.count() + Pages{300}, kMayMove);
      ASSERT_TRUE(grown.ok()) << step;
      range = *grown;
      EXPECT_EQ(range.first == before.first, step % 2 != 0) << step;
      EXPECT_TRUE(IsFilledWith(Part(range, 0, 512), 1));
      const PageRange added = Part(range, before.count().value, 300);
      EXPECT_TRUE(IsZero(added));
      Fill(added, static_cast<int>(step));
    }
    ASSERT_TRUE(space->Unmap(range).ok());
    MustMapAt(*space, range);
    EXPECT_TRUE(IsZero(range));
  }
}

}  // namespace
}  // namespace freehold::vm
