// AddressSpace::Unmap: parts, several VMAs, holes, regions, zones, with the address line before and after.
#include <cstdint>
#include <random>
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

class UnmapTest : public PolicyTest {
 protected:
  PageRange P(std::size_t first, std::size_t count) const { return Part(space_->reservation(), first, count); }
  std::string Line(std::size_t count) const { return Draw(*space_, P(0, count)); }
  void Unmap(PageRange range) { ASSERT_EQ(space_->Unmap(range), Error::Ok()); }

  FakeKernel kernel_;
  TestSpace space_{kernel_, Options()};
};

TEST_P(UnmapTest, Whole) {
  const PageRange range = MustMap(*space_, 4);
  Unmap(range);
  EXPECT_EQ(Draw(*space_, range), "....");
  EXPECT_EQ(space_->Stats().mapped, Bytes{0});
  EXPECT_EQ(space_->Stats().vmas, 0u);
  EXPECT_EQ(space_->Stats().unmaps, 1u);
}

TEST_P(UnmapTest, FrontMiddleAndBack) {
  MustMapAt(*space_, P(2, 12));
  Fill(P(2, 12), 0xaa);
  const std::uint64_t generation = space_->Lookup(P(2, 1).first)->generation;
  EXPECT_EQ(Line(16), "..AAAAAAAAAAAA..");
  Unmap(P(2, 2));
  EXPECT_EQ(Line(16), "....AAAAAAAAAA..");
  Unmap(P(12, 2));
  EXPECT_EQ(Line(16), "....AAAAAAAA....");
  Unmap(P(7, 2));
  EXPECT_EQ(Line(16), "....AAA..AAA....");
  EXPECT_EQ(space_->Lookup(P(4, 1).first)->range, P(4, 3));
  EXPECT_EQ(space_->Lookup(P(9, 1).first)->range, P(9, 3));
  EXPECT_EQ(space_->Lookup(P(4, 1).first)->generation, generation);
  EXPECT_EQ(space_->Lookup(P(9, 1).first)->generation, generation);
  EXPECT_TRUE(IsFilledWith(P(4, 3), 0xaa));
  EXPECT_TRUE(IsFilledWith(P(9, 3), 0xaa));
  EXPECT_EQ(space_->Stats().mapped, Pages{6}.bytes());
  EXPECT_EQ(space_->Stats().vmas, 2u);
}

TEST_P(UnmapTest, AcrossMappingsAndHoles) {
  MustMapAt(*space_, P(1, 4));
  MustMapAt(*space_, P(5, 2));
  MustMapAt(*space_, P(9, 2), Protection::kRead);
  MustMapAt(*space_, P(13, 5));
  Fill(P(1, 4), 0xaa);
  Fill(P(13, 5), 0xaa);
  EXPECT_EQ(Line(20), ".AAAABB..cc..DDDDD..");
  Unmap(P(3, 12));
  EXPECT_EQ(Line(20), ".AA............BBB..");
  EXPECT_TRUE(IsFilledWith(P(1, 2), 0xaa));
  EXPECT_TRUE(IsFilledWith(P(15, 3), 0xaa));
  // All of the hole serves again, whatever its pieces were.
  MustMapAt(*space_, P(3, 12));
  EXPECT_EQ(Line(20), ".AABBBBBBBBBBBBCCC..");
  EXPECT_TRUE(IsZero(P(3, 12)));
  Fill(P(3, 12), 0xbb);
}

TEST_P(UnmapTest, HolesOnly) {
  EXPECT_EQ(Line(12), "............");
  Unmap(P(0, 12));
  EXPECT_EQ(Line(12), "............");
  MustMapAt(*space_, P(4, 4));
  Unmap(P(0, 4));
  Unmap(P(8, 4));
  EXPECT_EQ(Line(12), "....AAAA....");
  Unmap(P(4, 4));
  Unmap(P(4, 4));
  EXPECT_EQ(Line(12), "............");
}

TEST_P(UnmapTest, AcrossRegions) {
  const std::size_t border = kSmallRegionPages;
  MustMapAt(*space_, P(border - 6, 6));
  MustMapAt(*space_, P(border, 6));
  MustMapAt(*space_, P(3 * border, 2), Protection::kRead);
  const PageRange around = P(border - 8, 16);
  EXPECT_EQ(Draw(*space_, around), "..AAAAAABBBBBB..");
  Unmap(P(border - 3, 5));
  EXPECT_EQ(Draw(*space_, around), "..AAA.....BBBB..");
  Unmap(space_->reservation());
  EXPECT_TRUE(Vmas(*space_).empty());
  EXPECT_EQ(space_->Stats().mapped, Bytes{0});
}

TEST_P(UnmapTest, RefusesWhatIsNoRangeOfTheSpace) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(4 * kSmallRegionPages - 4, 4));
  const PageRange all = space_->reservation();
  EXPECT_EQ(space_->Unmap(P(2, 0)).code, ErrorCode::kEmpty);
  EXPECT_EQ(space_->Unmap({PageNumber{0}, PageNumber{0}}).code, ErrorCode::kEmpty);
  EXPECT_EQ(space_->Unmap({P(3, 1).first, P(1, 1).first}).code, ErrorCode::kOverflow);
  EXPECT_EQ(space_->Unmap(PageRange::Of(P(1, 1).first, {SIZE_MAX})).code, ErrorCode::kOverflow);
  EXPECT_EQ(space_->Unmap({PageNumber{all.first.value - 1}, P(4, 0).first}).code, ErrorCode::kOutsideReservation);
  EXPECT_EQ(space_->Unmap(PageRange::Of(PageNumber{all.end.value - 4}, {5})).code, ErrorCode::kOutsideReservation);
  EXPECT_EQ(space_->Unmap(PageRange::Of(all.end, {1})).code, ErrorCode::kOutsideReservation);
  EXPECT_EQ(space_->Unmap(PageRange::Of(PageNumber{1}, {1})).code, ErrorCode::kOutsideReservation);
  EXPECT_EQ(space_->Stats().mapped, Pages{8}.bytes());
  EXPECT_EQ(Line(5), "AAAA.");
}

// ---- What happens to pages ----

TEST_P(UnmapTest, HeapPagesStayResidentForReuse) {
  const PageRange range = MustMap(*space_, 8, {.populate = true});
  kernel_.ClearCalls();
  Unmap(range);
  EXPECT_EQ(kernel_.ResidentPages(range), Pages{8});
  EXPECT_EQ(space_->Stats().free_resident, Pages{8}.bytes());
  EXPECT_EQ(kernel_.CallCount(Operation::kDiscard), 0u);
  EXPECT_EQ(kernel_.CallCount(Operation::kProtect), 0u);
  EXPECT_EQ(MustMap(*space_, 8), range);
  EXPECT_EQ(space_->Stats().free_resident, Bytes{0});
}

// In steady state, an unmap makes no system call at all.
TEST_P(UnmapTest, SteadyStateIsFree) {
  PageRange range = MustMap(*space_, 8, {.populate = true});
  for (int i = 0; i < 10; ++i) {
    Unmap(range);
    range = MustMap(*space_, 8);
  }
  kernel_.ClearCalls();
  for (int i = 0; i < 50; ++i) {
    Unmap(range);
    range = MustMap(*space_, 8, {.content = Content::kAnything});
  }
  EXPECT_EQ(kernel_.CallCount(), 0u);
}

TEST_P(UnmapTest, MappingZoneIsReset) {
  const PageRange range = MustMap(*space_, 8, {.protection = Protection::kReadWriteExec, .populate = true});
  const std::size_t vmas = kernel_.KernelVmaCount();
  Unmap(Part(range, 2, 3));
  EXPECT_EQ(Draw(*space_, range), "aa...aaa");
  EXPECT_EQ(kernel_.ResidentPages(range), Pages{5});
  EXPECT_EQ(kernel_.At(Part(range, 2, 1).first).protection, Protection::kNone);
  EXPECT_EQ(kernel_.At(Part(range, 1, 1).first).protection, Protection::kReadWriteExec);
  EXPECT_EQ(kernel_.KernelVmaCount(), vmas + 2);
  Unmap(range);
  EXPECT_EQ(kernel_.ResidentPages(range), Pages{0});
  EXPECT_EQ(kernel_.KernelVmaCount(), vmas - 1 - (range.first == ZoneRange(*space_, Zone::kMapping).first ? 0 : 1));
  EXPECT_EQ(space_->Stats().free_resident, Bytes{0});
}

TEST_P(UnmapTest, ReservedWithoutAccessCostsNothing) {
  const PageRange range = MustMap(*space_, 8, {.protection = Protection::kNone});
  kernel_.ClearCalls();
  Unmap(range);
  EXPECT_EQ(kernel_.CallCount(), 0u);
  EXPECT_EQ(MustMap(*space_, 8, {.protection = Protection::kNone}), range);
  EXPECT_EQ(kernel_.CallCount(), 0u);
}

// A heap mapping that was protected gets its zone's protection back, so that the next one can be given it.
TEST_P(UnmapTest, ProtectedHeapPagesAreRestored) {
  const PageRange range = MustMap(*space_, 8);
  Fill(range, 0xaa);
  const std::size_t vmas = kernel_.KernelVmaCount();
  ASSERT_TRUE(space_->Protect(Part(range, 2, 3), Protection::kNone).ok());
  EXPECT_EQ(kernel_.KernelVmaCount(), vmas + 2);
  Unmap(range);
  EXPECT_EQ(kernel_.KernelVmaCount(), vmas) << "merged again";
  MustMapAt(*space_, range);
  EXPECT_TRUE(IsZero(range));
  Fill(range, 0xbb);
}

// ---- Many parts ----

// Random unmaps of random mappings, against a line of letters.
TEST_P(UnmapTest, AgreesWithALine) {
  constexpr std::size_t kLine = 200;
  constexpr unsigned kSeed = 21;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937 random(kSeed);
  std::string model(kLine, '.');
  for (int step = 0; step < (kSanitized ? 600 : 3000); ++step) {
    const std::size_t first = random() % kLine;
    const std::size_t count = 1 + random() % std::min<std::size_t>(kLine - first, 30);
    if (random() % 2 == 0) {
      Unmap(P(first, count));
      model.replace(first, count, std::string(count, '.'));
    } else {
      MustMap(*space_, count, At(P(first, 1).first, Placement::kReplace));
      ASSERT_TRUE(IsZero(P(first, count))) << "step " << step;
      Fill(P(first, count), 0xaa);
      model.replace(first, count, std::string(count, 'm'));
    }
    std::string line;
    for (std::size_t page = 0; page < kLine; ++page) {
      line += space_->Lookup(P(page, 1).first).ok() ? 'm' : '.';
    }
    ASSERT_EQ(line, model) << "step " << step;
    if (step % 100 == 0) space_->CheckInvariants();
  }
}

FREEHOLD_INSTANTIATE_POLICIES(UnmapTest);

}  // namespace
}  // namespace freehold::vm
