// AddressSpace::Protect: parts, several VMAs, holes, merging, content, and the kernel VMAs that it costs.
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
using os::Protection;

class ProtectTest : public PolicyTest {
 protected:
  PageRange P(std::size_t first, std::size_t count) const { return Part(space_->reservation(), first, count); }
  std::string Line(std::size_t count) const { return Draw(*space_, P(0, count)); }
  void Protect(PageRange range, Protection protection) {
    ASSERT_EQ(space_->Protect(range, protection), Error::Ok());
    for (PageNumber page = range.first; page < range.end; page = page + Pages{1}) {
      ASSERT_EQ(kernel_.At(page).protection, protection) << "the kernel knows";
    }
  }

  FakeKernel kernel_;
  TestSpace space_{kernel_, Options()};
};

TEST_P(ProtectTest, WholeAndBack) {
  MustMapAt(*space_, P(2, 4));
  Fill(P(2, 4), 0xaa);
  EXPECT_EQ(Line(8), "..AAAA..");
  Protect(P(2, 4), Protection::kRead);
  EXPECT_EQ(Line(8), "..aaaa..");
  EXPECT_TRUE(IsFilledWith(P(2, 4), 0xaa));
  Protect(P(2, 4), Protection::kNone);
  EXPECT_EQ(Line(8), "..1111..");
  Protect(P(2, 4), Protection::kReadWrite);
  EXPECT_EQ(Line(8), "..AAAA..");
  EXPECT_TRUE(IsFilledWith(P(2, 4), 0xaa));
  Fill(P(2, 4), 0xbb);
}

TEST_P(ProtectTest, PartsSplitAndMergeAgain) {
  MustMapAt(*space_, P(2, 10));
  Fill(P(2, 10), 0xaa);
  EXPECT_EQ(Line(14), "..AAAAAAAAAA..");
  Protect(P(5, 3), Protection::kRead);
  EXPECT_EQ(Line(14), "..AAAaaaAAAA..");
  EXPECT_EQ(space_->Stats().vmas, 3u);
  Protect(P(2, 1), Protection::kNone);
  EXPECT_EQ(Line(14), "..1AAaaaAAAA..");
  Protect(P(10, 2), Protection::kReadExec);
  EXPECT_EQ(Line(14), "..1AAaaaAAaa..");
  EXPECT_EQ(space_->Stats().vmas, 5u);
  Protect(P(2, 1), Protection::kReadWrite);
  EXPECT_EQ(Line(14), "..AAAaaaAAaa..");
  Protect(P(4, 8), Protection::kReadWrite);
  EXPECT_EQ(Line(14), "..AAAAAAAAAA..");
  EXPECT_EQ(space_->Stats().vmas, 1u) << "one again";
  EXPECT_EQ(space_->Lookup(P(2, 1).first)->range, P(2, 10));
  EXPECT_TRUE(IsFilledWith(P(2, 10), 0xaa));
}

TEST_P(ProtectTest, AcrossMappingsThatStayApart) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(4, 4));
  MustMapAt(*space_, P(8, 4), Protection::kRead);
  EXPECT_EQ(Line(12), "AAAABBBBcccc");
  Protect(P(2, 8), Protection::kRead);
  EXPECT_EQ(Line(12), "AAaabbbbcccc");
  Protect(P(0, 12), Protection::kReadWrite);
  EXPECT_EQ(Line(12), "AAAABBBBCCCC");
  EXPECT_EQ(space_->Stats().vmas, 3u) << "mappings of their own do not merge";
}

TEST_P(ProtectTest, AHoleIsRefusedAndNothingChanges) {
  MustMapAt(*space_, P(2, 4));
  MustMapAt(*space_, P(8, 4));
  Fill(P(2, 4), 0xaa);
  for (const PageRange range : {P(2, 5), P(1, 3), P(4, 6), P(10, 3), P(6, 2), P(0, 14)}) {
    EXPECT_EQ(space_->Protect(range, Protection::kRead).code, ErrorCode::kNotMapped);
    EXPECT_EQ(Line(14), "..AAAA..BBBB..");
  }
  EXPECT_EQ(kernel_.At(P(4, 1).first).protection, Protection::kReadWrite);
  EXPECT_EQ(space_->Stats().vmas, 2u);
  Fill(P(2, 4), 0xbb);
}

TEST_P(ProtectTest, ACachedExtentIsAHole) {
  MustMapAt(*space_, P(0, 4));
  ASSERT_TRUE(space_->Unmap(P(0, 4)).ok());
  EXPECT_EQ(space_->Protect(P(0, 4), Protection::kRead).code, ErrorCode::kNotMapped);
}

TEST_P(ProtectTest, RefusesWhatIsNoRangeOfTheSpace) {
  const PageRange all = space_->reservation();
  const auto error = [&](PageRange range) { return space_->Protect(range, Protection::kRead).code; };
  EXPECT_EQ(error(P(2, 0)), ErrorCode::kEmpty);
  EXPECT_EQ(error({P(3, 1).first, P(1, 1).first}), ErrorCode::kOverflow);
  EXPECT_EQ(error(PageRange::Of(all.end, {1})), ErrorCode::kOutsideReservation);
  EXPECT_EQ(error({PageNumber{all.first.value - 1}, P(1, 1).first}), ErrorCode::kOutsideReservation);
}

TEST_P(ProtectTest, AcrossRegions) {
  const std::size_t border = kSmallRegionPages;
  MustMapAt(*space_, P(border - 4, 4));
  MustMapAt(*space_, P(border, 4));
  Protect(P(border - 2, 4), Protection::kRead);
  EXPECT_EQ(space_->Lookup(P(border - 3, 1).first)->protection, Protection::kReadWrite);
  EXPECT_EQ(space_->Lookup(P(border - 1, 1).first)->protection, Protection::kRead);
  EXPECT_EQ(space_->Lookup(P(border, 1).first)->protection, Protection::kRead);
  EXPECT_EQ(space_->Lookup(P(border + 2, 1).first)->protection, Protection::kReadWrite);
}

TEST_P(ProtectTest, TheSameProtectionIsFree) {
  const PageRange heap = MustMap(*space_, 4);
  const PageRange read_only = MustMap(*space_, 4, {.protection = Protection::kRead});
  kernel_.ClearCalls();
  EXPECT_TRUE(space_->Protect(Part(heap, 1, 2), Protection::kReadWrite).ok());
  EXPECT_TRUE(space_->Protect(read_only, Protection::kRead).ok());
  EXPECT_EQ(kernel_.CallCount(), 0u);
  EXPECT_EQ(space_->Stats().vmas, 2u);
  EXPECT_EQ(space_->Stats().heap_splits, 0u);
}

TEST_P(ProtectTest, CountsHeapSplits) {
  MustMapAt(*space_, P(0, 8));
  Protect(P(2, 2), Protection::kRead);
  EXPECT_EQ(space_->Stats().heap_splits, 1u);
  Protect(P(2, 2), Protection::kReadWrite);
  EXPECT_EQ(space_->Stats().heap_splits, 1u) << "that healed it";
}

TEST_P(ProtectTest, InTheMappingZoneKeepsContentAndIsZeroLater) {
  const PageRange range = MustMap(*space_, 4, {.protection = Protection::kReadWriteExec});
  Fill(range, 0xaa);
  Protect(range, Protection::kNone);
  Protect(range, Protection::kRead);
  EXPECT_TRUE(IsFilledWith(range, 0xaa));
  Protect(range, Protection::kNone);
  ASSERT_TRUE(space_->Unmap(range).ok());
  // Behind no access, the content was still there; the next user must not see it.
  const PageRange again = MustMap(*space_, 4, {.protection = Protection::kRead});
  EXPECT_EQ(again, range);
  EXPECT_TRUE(IsZero(again));
}

// A verb fails, and the kernel refuses the way back: whoever gets the pages next has access to them.
TEST_P(ProtectTest, WhatCouldNotBeTakenBackIsReset) {
  for (const bool mapped : {true, false}) {
    MustMapAt(*space_, P(0, 100));
    Fill(P(0, 100), 0xaa);
    ASSERT_TRUE(mapped || space_->Unmap(P(0, 100)).ok());
    MapOptions options = At(P(0, 1).first, mapped ? Placement::kReplace : Placement::kFixed);
    options.protection = Protection::kNone;
    kernel_.FailNth(FakeKernel::Operation::kDiscard, 1, ENOMEM);
    kernel_.FailNth(FakeKernel::Operation::kProtect, 2, ENOMEM);
    EXPECT_EQ(space_->Map({100}, options).error(), Error::System(ENOMEM));
    EXPECT_EQ(Line(1), mapped ? "A" : ".");
    EXPECT_EQ(kernel_.At(P(0, 1).first).protection, Protection::kNone) << "it was refused";
    ASSERT_TRUE(!mapped || space_->Unmap(P(0, 100)).ok());
    ASSERT_EQ(MustMap(*space_, 100), P(0, 100)) << "what was cached";
    EXPECT_TRUE(IsZero(P(0, 100)));
    Fill(P(0, 100), 0xbb);
    ASSERT_TRUE(space_->Unmap(P(0, 100)).ok());
    (void)space_->Purge(PurgeScope::kAll);
  }
}

TEST_P(ProtectTest, OfPartsThenUnmapAndReuse) {
  for (const Protection protection : {Protection::kNone, Protection::kRead, Protection::kReadExec}) {
    const PageRange range = MustMap(*space_, 12);
    Fill(range, 0xaa);
    ASSERT_TRUE(space_->Protect(Part(range, 3, 3), protection).ok());
    ASSERT_TRUE(space_->Protect(Part(range, 9, 3), protection).ok());
    ASSERT_TRUE(space_->Unmap(Part(range, 2, 8)).ok());
    ASSERT_TRUE(space_->Unmap(range).ok());
    MustMapAt(*space_, range);
    EXPECT_TRUE(IsZero(range));
    Fill(range, 0xbb);
    ASSERT_TRUE(space_->Unmap(range).ok());
    space_->CheckInvariants();
  }
}

FREEHOLD_INSTANTIATE_POLICIES(ProtectTest);

// ---- Accesses that trap ----

class ProtectDeathTest : public PolicyTest {};

TEST_P(ProtectDeathTest, ForbiddenAccessesTrap) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  os::LinuxKernel kernel;
  TestSpace space(kernel, Options());
  const PageRange range = MustMap(*space, 4);
  Fill(range, 0xaa);
  auto* bytes = reinterpret_cast<volatile char*>(range.address());
  ASSERT_TRUE(space->Protect(Part(range, 1, 1), Protection::kRead).ok());
  ASSERT_TRUE(space->Protect(Part(range, 2, 1), Protection::kNone).ok());
  EXPECT_DEATH(bytes[kPageSize] = 1, "");
  EXPECT_DEATH(bytes[2 * kPageSize] = 1, "");
  EXPECT_DEATH((void)bytes[2 * kPageSize], "");
  EXPECT_EQ(bytes[kPageSize], static_cast<char>(0xaa));
  bytes[0] = 1;
  bytes[3 * kPageSize] = 1;
}

FREEHOLD_INSTANTIATE_POLICIES(ProtectDeathTest);

}  // namespace
}  // namespace freehold::vm
