// AddressSpace::Advise and Residency: content, residency, holes, kernel VMAs, and which calls it takes.
#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <fstream>
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

constexpr Advice kAllAdvice[] = {Advice::kDontNeed,    Advice::kFree, Advice::kWillNeed, Advice::kHugePages,
                                 Advice::kNoHugePages, Advice::kCold, Advice::kPageOut};

// The residency of `range` as a line: R or a dot.
std::string Residents(const AddressSpace& space, PageRange range) {
  std::vector<std::uint8_t> resident(range.count().value, 0xff);
  if (const Error error = space.Residency(range, absl::MakeSpan(resident)); !error.ok()) return ToString(error.code);
  std::string line;
  for (const std::uint8_t page : resident) line += page == 1 ? 'R' : page == 0 ? '.' : '?';
  return line;
}

class AdviseTest : public PolicyTest {
 protected:
  PageRange P(std::size_t first, std::size_t count) const { return Part(space_->reservation(), first, count); }
  std::string Residents(PageRange range) const { return vm::Residents(*space_, range); }

  FakeKernel kernel_;
  TestSpace space_{kernel_, Options()};
};

// ---- Residency ----

TEST_P(AdviseTest, ResidencyPageByPage) {
  MustMapAt(*space_, P(0, 8));
  EXPECT_EQ(Residents(P(0, 8)), "........");
  Fill(P(1, 2), 1);
  Fill(P(7, 1), 1);
  EXPECT_EQ(Residents(P(0, 8)), ".RR....R");
  EXPECT_EQ(Residents(P(2, 2)), "R.");
  ASSERT_TRUE(space_->Protect(P(2, 2), Protection::kNone).ok());
  EXPECT_EQ(Residents(P(0, 8)), ".RR....R") << "of several VMAs, readable or not";
}

TEST_P(AdviseTest, ResidencyOfMappingsWithoutAccess) {
  const PageRange range = MustMap(*space_, 4, {.protection = Protection::kNone});
  EXPECT_EQ(Residents(range), "....");
}

TEST_P(AdviseTest, ResidencyAcrossRegions) {
  const std::size_t border = kSmallRegionPages;
  MustMapAt(*space_, P(border - 2, 2));
  MustMapAt(*space_, P(border, 2));
  Fill(P(border - 1, 2), 1);
  EXPECT_EQ(Residents(P(border - 2, 4)), ".RR.");
}

TEST_P(AdviseTest, ResidencyRefusesHoles) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(6, 4));
  Fill(P(0, 4), 1);
  ASSERT_TRUE(space_->Unmap(P(0, 1)).ok());
  for (const PageRange range : {P(0, 2), P(2, 4), P(2, 8), P(4, 2), P(8, 4)}) {
    std::vector<std::uint8_t> resident(range.count().value, 7);
    EXPECT_EQ(space_->Residency(range, absl::MakeSpan(resident)).code, ErrorCode::kNotMapped);
    EXPECT_EQ(resident, std::vector<std::uint8_t>(range.count().value, 7));
  }
}

TEST_P(AdviseTest, ResidencyReportsTheKernelsError) {
  MustMapAt(*space_, P(0, 4));
  std::uint8_t resident[4];
  kernel_.FailNth(Operation::kQueryResident, 1, EAGAIN);
  EXPECT_EQ(space_->Residency(P(0, 4), absl::MakeSpan(resident)), Error::System(EAGAIN));
}

// ---- Each advice ----

TEST_P(AdviseTest, DontNeedDropsJustThePages) {
  MustMapAt(*space_, P(0, 8));
  Fill(P(0, 8), 0xaa);
  const std::uint64_t purges = space_->Stats().purge_calls;
  EXPECT_EQ(space_->Advise(P(2, 3), Advice::kDontNeed), Error::Ok());
  EXPECT_EQ(Residents(P(0, 8)), "RR...RRR");
  EXPECT_TRUE(IsZero(P(2, 3)));
  EXPECT_TRUE(IsFilledWith(P(0, 2), 0xaa));
  EXPECT_TRUE(IsFilledWith(P(5, 3), 0xaa));
  EXPECT_EQ(space_->Stats().purge_calls, purges + 1) << "through the purge stage";
  EXPECT_EQ(space_->Stats().vmas, 1u);
}

TEST_P(AdviseTest, DontNeedWhateverTheProtection) {
  for (const Protection protection : {Protection::kRead, Protection::kNone, Protection::kReadWriteExec}) {
    const PageRange range = MustMap(*space_, 4, {.protection = Protection::kReadWriteExec});
    Fill(range, 0xaa);
    ASSERT_TRUE(space_->Protect(range, protection).ok());
    EXPECT_EQ(space_->Advise(range, Advice::kDontNeed), Error::Ok());
    ASSERT_TRUE(space_->Protect(range, Protection::kRead).ok());
    EXPECT_TRUE(IsZero(range));
  }
}

TEST_P(AdviseTest, FreePagesAreOldOrZeroAndWritesStay) {
  MustMapAt(*space_, P(0, 8));
  Fill(P(0, 8), 0xaa);
  kernel_.ClearCalls();
  EXPECT_EQ(space_->Advise(P(0, 6), Advice::kFree), Error::Ok());
  ASSERT_EQ(kernel_.Calls().size(), 1u);
  EXPECT_EQ(kernel_.Calls()[0].operation, Operation::kAdviseReclaim);
  EXPECT_EQ(kernel_.Calls()[0].reclaim, os::ReclaimHint::kFree);
  EXPECT_EQ(kernel_.Calls()[0].ranges, std::vector<PageRange>{P(0, 6)});
  Fill(P(1, 1), 0xbb);
  for (std::size_t page = 0; page < 8; ++page) {
    EXPECT_TRUE(IsFilledWith(P(page, 1), page == 1 ? 0xbb : 0xaa) || (page != 1 && page < 6 && IsZero(P(page, 1))));
  }
  // Free pages of a freed mapping are nobody's zeroes.
  ASSERT_TRUE(space_->Advise(P(0, 8), Advice::kFree).ok());
  ASSERT_TRUE(space_->Unmap(P(0, 8)).ok());
  MustMapAt(*space_, P(0, 8));
  EXPECT_TRUE(IsZero(P(0, 8)));
}

TEST_P(AdviseTest, WillNeedPopulates) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(4, 4));
  Fill(P(0, 1), 0xaa);
  EXPECT_EQ(space_->Advise(P(0, 6), Advice::kWillNeed), Error::Ok());
  EXPECT_EQ(Residents(P(0, 8)), "RRRRRR..");
  EXPECT_TRUE(IsFilledWith(P(0, 1), 0xaa));
}

TEST_P(AdviseTest, WillNeedOfWhatCannotBeWrittenIsNoError) {
  const PageRange range = MustMap(*space_, 4, {.protection = Protection::kRead});
  EXPECT_EQ(space_->Advise(range, Advice::kWillNeed), Error::Ok());
  EXPECT_EQ(Residents(range), "....");
}

TEST_P(AdviseTest, ColdAndPageOutKeepContent) {
  MustMapAt(*space_, P(0, 8));
  Fill(P(0, 8), 0xaa);
  kernel_.ClearCalls();
  EXPECT_EQ(space_->Advise(P(0, 8), Advice::kCold), Error::Ok());
  EXPECT_EQ(space_->Advise(P(0, 8), Advice::kPageOut), Error::Ok());
  ASSERT_EQ(kernel_.Calls().size(), 2u);
  EXPECT_EQ(kernel_.Calls()[0].reclaim, os::ReclaimHint::kCold);
  EXPECT_EQ(kernel_.Calls()[1].reclaim, os::ReclaimHint::kPageOut);
  EXPECT_TRUE(IsFilledWith(P(0, 8), 0xaa));
}

// The kind of pages is the zone's: kernel VMAs never differ in it.
TEST_P(AdviseTest, HugePageAdviceNeverReachesTheKernel) {
  const PageRange plain = MustMap(*space_, 1024);
  const PageRange dense = MustMap(*space_, 1024, {.huge_pages = os::HugePages::kPrefer});
  ASSERT_EQ(space_->Lookup(dense.first)->zone, Zone::kDense);
  const PageRange mapping = MustMap(*space_, 1024, {.protection = Protection::kRead});
  kernel_.ClearCalls();
  const std::size_t kernel_vmas = kernel_.KernelVmaCount();
  EXPECT_EQ(space_->Advise(dense, Advice::kHugePages), Error::Ok());
  EXPECT_EQ(space_->Advise(plain, Advice::kNoHugePages), Error::Ok());
  EXPECT_EQ(space_->Advise(mapping, Advice::kNoHugePages), Error::Ok());
  EXPECT_EQ(space_->Stats().ignored_advice, 0u) << "their zones hold it anyway";
  EXPECT_EQ(space_->Advise(Part(dense, 0, 512), Advice::kNoHugePages), Error::Ok());
  EXPECT_EQ(space_->Advise(plain, Advice::kHugePages), Error::Ok());
  EXPECT_EQ(space_->Advise(mapping, Advice::kHugePages), Error::Ok());
  EXPECT_EQ(space_->Stats().ignored_advice, 3u);
  EXPECT_EQ(kernel_.CallCount(), 0u);
  EXPECT_EQ(kernel_.KernelVmaCount(), kernel_vmas);
  EXPECT_EQ(space_->Stats().vmas, 3u);
}

TEST_P(AdviseTest, LongRangesGoInPieces) {
  const PageRange range = MustMap(*space_, 10'000);
  Fill(Part(range, 9'999, 1), 0xaa);
  kernel_.ClearCalls();
  EXPECT_EQ(space_->Advise(range, Advice::kCold), Error::Ok());
  std::vector<PageRange> advised;
  for (const FakeKernel::Call& call : kernel_.Calls()) advised.push_back(call.ranges[0]);
  EXPECT_EQ(advised, (std::vector<PageRange>{Part(range, 0, 4096), Part(range, 4096, 4096), Part(range, 8192, 1808)}));
  EXPECT_EQ(space_->Advise(range, Advice::kDontNeed), Error::Ok());
  EXPECT_TRUE(IsZero(Part(range, 9'999, 1)));
}

// ---- Errors ----

//   before   |..AAAA..BBBB..|
TEST_P(AdviseTest, HolesAreToldAfterTheRestWasAdvised) {
  for (const Advice advice : kAllAdvice) {
    ASSERT_TRUE(space_->Unmap(space_->reservation()).ok());
    MustMapAt(*space_, P(2, 4));
    MustMapAt(*space_, P(8, 4));
    Fill(P(2, 4), 0xaa);
    Fill(P(8, 4), 0xbb);
    for (const PageRange range : {P(0, 14), P(3, 8), P(0, 2), P(6, 2), P(12, 2)}) {
      EXPECT_EQ(space_->Advise(range, advice).code, ErrorCode::kNotMapped);
    }
    EXPECT_EQ(Draw(*space_, P(0, 14)), "..AAAA..BBBB..");
    if (advice == Advice::kDontNeed) {
      EXPECT_TRUE(IsZero(P(2, 4)));
      EXPECT_TRUE(IsZero(P(8, 4)));
    }
  }
}

// What is free and resident is not the caller's to drop: it stays for re-use.
TEST_P(AdviseTest, CachedExtentsAreHoles) {
  MustMapAt(*space_, P(0, 4));
  Fill(P(0, 4), 0xaa);
  ASSERT_TRUE(space_->Unmap(P(0, 4)).ok());
  kernel_.ClearCalls();
  for (const Advice advice : kAllAdvice) EXPECT_EQ(space_->Advise(P(0, 4), advice).code, ErrorCode::kNotMapped);
  EXPECT_EQ(kernel_.CallCount(), 0u);
}

TEST_P(AdviseTest, AcrossRegions) {
  const std::size_t border = kSmallRegionPages;
  MustMapAt(*space_, P(border - 4, 4));
  MustMapAt(*space_, P(border, 4));
  Fill(P(border - 4, 8), 0xaa);
  EXPECT_EQ(space_->Advise(P(border - 2, 4), Advice::kDontNeed), Error::Ok());
  EXPECT_TRUE(IsFilledWith(P(border - 4, 2), 0xaa));
  EXPECT_TRUE(IsZero(P(border - 2, 4)));
  EXPECT_TRUE(IsFilledWith(P(border + 2, 2), 0xaa));
}

TEST_P(AdviseTest, RefusesWhatIsNoRangeOfTheSpace) {
  const PageRange all = space_->reservation();
  for (const Advice advice : kAllAdvice) {
    EXPECT_EQ(space_->Advise(P(2, 0), advice).code, ErrorCode::kEmpty);
    EXPECT_EQ(space_->Advise({P(3, 1).first, P(1, 1).first}, advice).code, ErrorCode::kOverflow);
    EXPECT_EQ(space_->Advise(PageRange::Of(all.end, {1}), advice).code, ErrorCode::kOutsideReservation);
  }
  EXPECT_EQ(space_->Residency(P(2, 0), {}).code, ErrorCode::kEmpty);
  EXPECT_EQ(space_->Residency({P(3, 1).first, P(1, 1).first}, {}).code, ErrorCode::kOverflow);
  EXPECT_EQ(space_->Residency(PageRange::Of(all.end, {1}), {}).code, ErrorCode::kOutsideReservation);
}

TEST_P(AdviseTest, StopsAtTheKernelsError) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(4, 4));
  kernel_.FailNth(Operation::kAdviseReclaim, 1, ENOMEM);
  EXPECT_EQ(space_->Advise(P(0, 8), Advice::kFree), Error::System(ENOMEM));
  kernel_.FailNth(Operation::kDiscard, 2, EINVAL);
  Fill(P(0, 8), 0xaa);
  EXPECT_EQ(space_->Advise(P(0, 8), Advice::kDontNeed), Error::System(EINVAL));
  EXPECT_TRUE(IsZero(P(0, 4)));
  EXPECT_TRUE(IsFilledWith(P(4, 4), 0xaa));
}

// ---- Advice for the kernel ----

TEST_P(AdviseTest, OneTimeAdviceGoesToTheKernelPieceByPiece) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(4, 2 * kPagesPerHugePage));
  kernel_.ClearCalls();
  EXPECT_EQ(space_->AdviseKernel(P(1, kPagesPerHugePage + 2), MADV_WILLNEED, AdviceEffect::kOnce), Error::Ok());
  ASSERT_EQ(kernel_.Calls().size(), 3u) << "two VMAs, and a border of 2 MiB";
  for (const auto& call : kernel_.Calls()) {
    EXPECT_EQ(call.operation, Operation::kAdvise);
    EXPECT_EQ(call.advice, MADV_WILLNEED);
  }
  EXPECT_EQ(kernel_.Calls()[0].ranges, std::vector<PageRange>{P(1, 3)});
  EXPECT_EQ(kernel_.Calls()[1].ranges, std::vector<PageRange>{P(4, kPagesPerHugePage - 4)});
  EXPECT_EQ(kernel_.Calls()[2].ranges, std::vector<PageRange>{P(kPagesPerHugePage, 3)});
  kernel_.ClearCalls();
  ASSERT_TRUE(space_->Unmap(P(0, 4)).ok());
  EXPECT_EQ(kernel_.CallCount(Operation::kReset), 0u) << "nothing to take back";
}

TEST_P(AdviseTest, LastingAdviceEndsWithTheMapping) {
  MustMapAt(*space_, P(0, 8));
  Fill(P(0, 8), 0xaa);
  kernel_.ClearCalls();
  EXPECT_EQ(space_->AdviseKernel(P(2, 3), MADV_DONTDUMP, AdviceEffect::kLasting), Error::Ok());
  ASSERT_EQ(kernel_.Calls().size(), 1u);
  EXPECT_EQ(kernel_.Calls()[0].ranges, std::vector<PageRange>{P(2, 3)});
  EXPECT_TRUE(IsFilledWith(P(0, 8), 0xaa));
  kernel_.ClearCalls();
  ASSERT_TRUE(space_->Unmap(P(0, 8)).ok());
  EXPECT_EQ(kernel_.CallCount(Operation::kReset), 1u) << "before anybody else can have the addresses";
  MustMapAt(*space_, P(0, 8));
  EXPECT_TRUE(IsZero(P(0, 8)));
  Fill(P(0, 8), 0xbb);
}

TEST_P(AdviseTest, LastingAdviceEndsWhereSomethingElseIsMapped) {
  for (const Protection protection : {Protection::kReadWrite, Protection::kReadWriteExec}) {
    const PageRange range = MustMap(*space_, 8, {.protection = protection});
    Fill(range, 0xaa);
    EXPECT_EQ(space_->AdviseKernel(Part(range, 0, 4), MADV_DONTDUMP, AdviceEffect::kLasting), Error::Ok());
    kernel_.ClearCalls();
    MustMap(*space_, 2, At(Part(range, 1, 2).first, Placement::kReplace, protection));
    EXPECT_EQ(kernel_.CallCount(Operation::kReset), 1u);
    EXPECT_TRUE(IsZero(Part(range, 1, 2)));
    EXPECT_TRUE(IsFilledWith(Part(range, 0, 1), 0xaa));
    EXPECT_TRUE(IsFilledWith(Part(range, 3, 5), 0xaa));
  }
}

TEST_P(AdviseTest, AdviceForTheKernelTellsOfHolesAndErrors) {
  MustMapAt(*space_, P(0, 2));
  MustMapAt(*space_, P(4, 2));
  for (const AdviceEffect effect : {AdviceEffect::kOnce, AdviceEffect::kLasting}) {
    kernel_.ClearCalls();
    EXPECT_EQ(space_->AdviseKernel(P(0, 6), MADV_DODUMP, effect).code, ErrorCode::kNotMapped);
    EXPECT_EQ(kernel_.CallCount(Operation::kAdvise), 2u) << "the rest is advised";
    kernel_.FailNth(Operation::kAdvise, 1, ENOMEM);
    EXPECT_EQ(space_->AdviseKernel(P(0, 2), MADV_DODUMP, effect), Error::System(ENOMEM));
    EXPECT_EQ(space_->AdviseKernel(P(0, 0), MADV_DODUMP, effect).code, ErrorCode::kEmpty);
  }
}

FREEHOLD_INSTANTIATE_POLICIES(AdviseTest);

// ---- On the real kernel ----

TEST(AdviseLinuxTest, EveryAdviceInEveryZone) {
  os::LinuxKernel kernel;
  TestSpace space(kernel);
  const PageRange ranges[] = {MustMap(*space, 1024), MustMap(*space, 1024, {.huge_pages = os::HugePages::kPrefer}),
                              MustMap(*space, 1024, {.protection = Protection::kReadWriteExec})};
  for (const PageRange range : ranges) {
    for (const Advice advice : kAllAdvice) {
      Fill(range, 0xaa);
      EXPECT_EQ(space->Advise(Part(range, 1, 1000), advice), Error::Ok());
      EXPECT_TRUE(IsFilledWith(Part(range, 0, 1), 0xaa));
      EXPECT_TRUE(IsFilledWith(Part(range, 1001, 23), 0xaa));
      if (advice == Advice::kDontNeed) {
        EXPECT_TRUE(IsZero(Part(range, 1, 1000)));
      }
      if (advice == Advice::kCold) {
        EXPECT_TRUE(IsFilledWith(range, 0xaa));
      }
    }
    ASSERT_TRUE(space->Advise(range, Advice::kDontNeed).ok());
    ASSERT_TRUE(space->Advise(Part(range, 0, 600), Advice::kWillNeed).ok());
    const std::string line = Residents(*space, range);
    EXPECT_EQ(line.substr(0, 600), std::string(600, 'R'));
  }
}

// Flags of the kernel VMA that holds `range`, from /proc/self/smaps.
std::string KernelFlags(PageRange range) {
  std::ifstream smaps("/proc/self/smaps");
  bool here = false;
  for (std::string line; std::getline(smaps, line);) {
    std::size_t first = 0;
    std::size_t end = 0;
    if (std::sscanf(line.c_str(), "%zx-%zx", &first, &end) == 2) {
      here = first <= range.first.value * kPageSize && range.end.value * kPageSize <= end;
    }
    if (here && line.starts_with("VmFlags:")) return line + " ";
  }
  return "";
}

TEST(AdviseLinuxTest, LastingAdviceInEveryZone) {
  os::LinuxKernel kernel;
  TestSpace space(kernel);
  const MapOptions kinds[] = {
      {}, {.huge_pages = os::HugePages::kPrefer}, {.protection = Protection::kReadWriteExec}};
  for (const MapOptions& kind : kinds) {
    const PageRange range = MustMap(*space, 1024, kind);
    const PageRange part = Part(range, 1, 1000);
    Fill(range, 0xaa);
    EXPECT_EQ(space->AdviseKernel(part, MADV_WIPEONFORK, AdviceEffect::kLasting), Error::Ok());
    EXPECT_NE(KernelFlags(part).find(" wf "), std::string::npos);
    MapOptions again = kind;
    again.placement = Placement::kReplace;
    again.address = part.address();
    ASSERT_TRUE(space->Map(Part(part, 0, 500).count(), again).ok());
    EXPECT_EQ(KernelFlags(Part(part, 0, 500)).find(" wf "), std::string::npos);
    ASSERT_TRUE(space->Unmap(range).ok());
    again.placement = Placement::kFixed;
    again.address = range.address();
    ASSERT_TRUE(space->Map(range.count(), again).ok());
    EXPECT_EQ(KernelFlags(part).find(" wf "), std::string::npos);
    EXPECT_TRUE(IsZero(range));
    Fill(range, 0xbb);
  }
}

}  // namespace
}  // namespace freehold::vm
