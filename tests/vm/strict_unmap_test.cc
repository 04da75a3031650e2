// AddressSpaceOptions::strict_unmap: what is unmapped traps at once, with guard regions and without, and serves
// again when it is mapped.
#include <cerrno>
#include <cstddef>
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
using os::Features;
using os::LinuxKernel;
using os::Protection;

enum class Means { kGuards, kProtection };

Features FeaturesWith(Means means) {
  Features features = LinuxKernel::kAllFeatures;
  features.guard_regions = means == Means::kGuards;
  return features;
}

struct Param {
  sync::LockPolicy policy;
  Means means;
};
void PrintTo(const Param& param, std::ostream* out) { *out << sync::ToString(param.policy); }

std::string ParamName(const testing::TestParamInfo<Param>& info) {
  return std::string(sync::ToString(info.param.policy)) +
         (info.param.means == Means::kGuards ? "Guards" : "Protection");
}

class StrictTest : public testing::TestWithParam<Param> {
 protected:
  static AddressSpaceOptions StrictOptions() {
    AddressSpaceOptions options = SmallOptions(GetParam().policy);
    options.strict_unmap = true;
    return options;
  }
};

// ---- Accesses trap ----

class StrictDeathTest : public StrictTest {
 protected:
  LinuxKernel kernel_{FeaturesWith(GetParam().means)};
};

TEST_P(StrictDeathTest, AccessToUnmappedMemoryTraps) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  TestSpace space(kernel_, StrictOptions());
  for (const std::size_t pages : {1, 8, 600}) {
    const PageRange range = MustMap(*space, pages);
    Fill(range, 0xaa);
    auto* bytes = reinterpret_cast<volatile char*>(range.address());
    ASSERT_TRUE(space->Unmap(range).ok());
    EXPECT_DEATH((void)bytes[0], "");
    EXPECT_DEATH(bytes[range.bytes().value - 1] = 1, "");
  }
}

TEST_P(StrictDeathTest, AccessToAnUnmappedPartTrapsAndTheRestDoesNot) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  TestSpace space(kernel_, StrictOptions());
  const PageRange range = MustMap(*space, 8);
  Fill(range, 0xaa);
  auto* bytes = reinterpret_cast<volatile char*>(range.address());
  ASSERT_TRUE(space->Unmap(Part(range, 3, 2)).ok());
  EXPECT_EQ(Draw(*space, range), "AAA..AAA");
  EXPECT_DEATH((void)bytes[3 * kPageSize], "");
  EXPECT_DEATH(bytes[4 * kPageSize] = 1, "");
  EXPECT_TRUE(IsFilledWith(Part(range, 0, 3), 0xaa));
  EXPECT_TRUE(IsFilledWith(Part(range, 5, 3), 0xaa));
}

TEST_P(StrictDeathTest, AccessToTheMappingZoneTraps) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  TestSpace space(kernel_, StrictOptions());
  const PageRange range = MustMap(*space, 4, {.protection = Protection::kRead});
  auto* bytes = reinterpret_cast<volatile char*>(range.address());
  ASSERT_TRUE(space->Unmap(range).ok());
  EXPECT_DEATH((void)bytes[0], "");
}

// ---- By the model ----

class StrictUnmapTest : public StrictTest {
 protected:
  void SetUp() override {
    if (GetParam().means == Means::kGuards && !kernel_.features().guard_regions) {
      GTEST_SKIP() << "no guard regions in this kernel";
    }
  }

  PageRange P(std::size_t first, std::size_t count) const { return Part(space_->reservation(), first, count); }
  bool Traps(PageNumber page) const {
    const os::PageState state = kernel_.At(page);
    return state.guard || state.protection == Protection::kNone;
  }
  // A character a page: '!' traps, 'w' writable.
  std::string Traps(PageRange range) const {
    std::string line;
    for (PageNumber page = range.first; page < range.end; page = page + Pages{1}) {
      line += Traps(page) ? '!' : kernel_.At(page).protection == Protection::kReadWrite ? 'w' : 'r';
    }
    return line;
  }

  FakeKernel kernel_{{.features = FeaturesWith(GetParam().means)}};
  TestSpace space_{kernel_, StrictOptions()};
};

TEST_P(StrictUnmapTest, MapsUnmapsAndMapsAgain) {
  for (int round = 0; round < 5; ++round) {
    for (const std::size_t pages : {1, 64, 65, 600}) {
      const PageRange range = MustMap(*space_, pages);
      ASSERT_TRUE(IsZero(range)) << round << "/" << pages;
      Fill(range, 0xaa);
      ASSERT_TRUE(space_->Unmap(range).ok());
      EXPECT_EQ(Traps(range), std::string(pages, '!'));
      EXPECT_EQ(kernel_.CountResident(range)->value, 0u) << "nothing is kept";
    }
    space_->CheckInvariants();
  }
  EXPECT_EQ(space_->Stats().free_resident, Bytes{0});
}

TEST_P(StrictUnmapTest, FixedMapsLiftTraps) {
  MustMapAt(*space_, P(0, 12));
  Fill(P(0, 12), 0xaa);
  ASSERT_TRUE(space_->Unmap(P(2, 8)).ok());
  EXPECT_EQ(Traps(P(0, 12)), "ww!!!!!!!!ww");
  MustMapAt(*space_, P(4, 2));
  EXPECT_EQ(Traps(P(0, 12)), "ww!!ww!!!!ww");
  EXPECT_TRUE(IsZero(P(4, 2)));
  MustMap(*space_, 6, At(P(5, 1).first, Placement::kReplace));
  EXPECT_EQ(Traps(P(0, 12)), "ww!!wwwwwwww");
  EXPECT_EQ(Draw(*space_, P(0, 12)), "AA..BCCCCCCA");
  Fill(P(4, 8), 0xbb);
}

TEST_P(StrictUnmapTest, ProtectedPagesTrapAndAreRestored) {
  const PageRange range = MustMap(*space_, 6);
  Fill(range, 0xaa);
  ASSERT_TRUE(space_->Protect(Part(range, 2, 2), Protection::kRead).ok());
  EXPECT_EQ(Traps(range), "wwrrww");
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(Traps(range), "!!!!!!");
  MustMapAt(*space_, range);
  EXPECT_EQ(Traps(range), "wwwwww");
  EXPECT_TRUE(IsZero(range));
}

// The kernel refuses the guard, as it does for locked memory: the fallback is the protection, and the next
// mapping of the same pages is usable.
TEST_P(StrictUnmapTest, ARefusedGuardFallsBackAndTheMemoryServesAgain) {
  if (GetParam().means == Means::kProtection) GTEST_SKIP() << "no guards are asked for";
  PageRange range = MustMap(*space_, 8);
  Fill(range, 0xaa);
  kernel_.FailNth(Operation::kInstallGuard, 1, ENOMEM);
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(Traps(range), "!!!!!!!!");
  range = MustMap(*space_, 8);
  ASSERT_EQ(Traps(range), "wwwwwwww");
  EXPECT_TRUE(IsZero(range));
  Fill(range, 0xbb);
}

TEST_P(StrictUnmapTest, NeighboursOfARefusedGuardServeAgain) {
  if (GetParam().means == Means::kProtection) GTEST_SKIP() << "no guards are asked for";
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(4, 4));
  kernel_.FailNth(Operation::kInstallGuard, 1, ENOMEM);
  ASSERT_TRUE(space_->Unmap(P(0, 8)).ok());
  EXPECT_EQ(Traps(P(0, 8)), "!!!!!!!!");
  const PageRange range = MustMap(*space_, 8);
  EXPECT_EQ(Traps(range), "wwwwwwww");
}

// Every call that an unmap makes fails once: the pages are gone all the same, or trap later; what comes next
// never sees old content.
TEST_P(StrictUnmapTest, RefusalsNeverShowOldContent) {
  for (std::size_t n = 1; n <= 4; ++n) {
    SCOPED_TRACE("call " + std::to_string(n));
    const PageRange range = MustMap(*space_, 8);
    Fill(range, 0xaa);
    kernel_.FailNthOfAny(n, ENOMEM);
    const Error error = space_->Unmap(range);
    kernel_.StopFailing();
    space_->CheckInvariants();
    ASSERT_TRUE(error.ok() || space_->Unmap(range).ok());
    const PageRange again = MustMap(*space_, 8);
    ASSERT_EQ(Traps(again), "wwwwwwww");
    EXPECT_TRUE(IsZero(again));
    ASSERT_TRUE(space_->Unmap(again).ok());
    (void)space_->Purge(PurgeScope::kAll);
  }
}

// A fixed map that fails leaves the free pages of its range trapping, as they were.
TEST_P(StrictUnmapTest, AFailedFixedMapLeavesTraps) {
  for (std::size_t n = 1; n <= 4; ++n) {
    SCOPED_TRACE("call " + std::to_string(n));
    const PageRange line = P(100 * n, 12);
    MustMapAt(*space_, line);
    Fill(line, 0xaa);
    ASSERT_TRUE(space_->Unmap(Part(line, 4, 4)).ok());
    ASSERT_EQ(Traps(line), "wwww!!!!wwww");
    kernel_.FailNthOfAny(n, ENOMEM);
    const Result<PageRange> mapped =
        space_->Map({8}, At(Part(line, 2, 1).first, Placement::kReplace, Protection::kRead));
    kernel_.StopFailing();
    if (mapped.ok()) break;
    EXPECT_EQ(Draw(*space_, line), "AAAA....AAAA");
    EXPECT_EQ(Traps(line), "wwww!!!!wwww");
    EXPECT_TRUE(IsFilledWith(Part(line, 0, 4), 0xaa));
  }
}

// A map anywhere that fails leaves the pages that it had chosen trapping.
TEST_P(StrictUnmapTest, AFailedMapLeavesTraps) {
  MustMapAt(*space_, P(0, 8));
  ASSERT_TRUE(space_->Unmap(P(0, 8)).ok());
  for (std::size_t n = 1; n <= 4; ++n) {
    SCOPED_TRACE("call " + std::to_string(n));
    ASSERT_EQ(Traps(P(0, 8)), "!!!!!!!!");
    kernel_.FailNthOfAny(n, ENOMEM);
    const Result<PageRange> mapped = space_->Map({8});
    kernel_.StopFailing();
    if (mapped.ok()) break;
    space_->CheckInvariants();
    EXPECT_EQ(Traps(P(0, 8)), "!!!!!!!!");
  }
}

constexpr Param kParams[] = {{sync::LockPolicy::kAdaptive, Means::kGuards},
                             {sync::LockPolicy::kAdaptive, Means::kProtection},
                             {sync::LockPolicy::kTree, Means::kGuards},
                             {sync::LockPolicy::kTree, Means::kProtection},
                             {sync::LockPolicy::kCoarse, Means::kGuards},
                             {sync::LockPolicy::kCoarse, Means::kProtection}};
INSTANTIATE_TEST_SUITE_P(Means, StrictDeathTest, testing::ValuesIn(kParams), ParamName);
INSTANTIATE_TEST_SUITE_P(Means, StrictUnmapTest, testing::ValuesIn(kParams), ParamName);

}  // namespace
}  // namespace freehold::vm
