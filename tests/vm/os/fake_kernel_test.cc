// The test double itself: that it behaves as memory, that its model agrees with the real kernel,
// and that it fails, and stops the test, when it must.
#include "vm/os/fake_kernel.h"

#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "vm/os/futex.h"
#include "vm/sync/lock_rank.h"

namespace freehold::vm::os {
namespace {

using Operation = FakeKernel::Operation;

PageRange Part(PageRange range, std::size_t first, std::size_t count) {
  return PageRange::Of(range.first + Pages{first}, Pages{count});
}

PageRange ReserveWritable(FakeKernel& kernel, std::size_t pages) {
  const Result<PageRange> range = kernel.Reserve(Pages{pages}, Pages{1});
  EXPECT_TRUE(range.ok());
  EXPECT_TRUE(kernel.Protect(*range, Protection::kReadWrite).ok());
  return *range;
}

bool IsFilledWith(PageRange range, int value) {
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(range.address());
  for (std::size_t i = 0; i < range.bytes().value; ++i) {
    if (bytes[i] != value) return false;
  }
  return true;
}

void Fill(PageRange range, int value) { std::memset(range.address(), value, range.bytes().value); }

// ---- Memory and model ----

TEST(FakeKernelTest, MemoryIsReal) {
  FakeKernel kernel;
  const PageRange range = ReserveWritable(kernel, 8);
  Fill(range, 9);
  const std::vector<PageRange> dropped = {Part(range, 0, 1), Part(range, 2, 2)};
  ASSERT_TRUE(kernel.Discard(dropped).ok());
  EXPECT_TRUE(IsFilledWith(dropped[0], 0));
  EXPECT_TRUE(IsFilledWith(dropped[1], 0));
  EXPECT_TRUE(IsFilledWith(Part(range, 1, 1), 9));
  kernel.Zero(Part(range, 5, 1));
  kernel.TouchForWrite(Part(range, 6, 1));
  EXPECT_TRUE(IsFilledWith(Part(range, 5, 1), 0));
  EXPECT_TRUE(IsFilledWith(Part(range, 6, 1), 9));
  ASSERT_TRUE(kernel.Reset(range).ok());
  ASSERT_TRUE(kernel.Protect(range, Protection::kReadWrite).ok());
  EXPECT_TRUE(IsFilledWith(range, 0));
  EXPECT_TRUE(kernel.Release(range).ok());
}

TEST(FakeKernelTest, ModelsEveryOperation) {
  FakeKernel kernel;
  const Result<PageRange> reserved = kernel.Reserve(Pages{8}, Pages{4});
  ASSERT_TRUE(reserved.ok());
  const PageRange range = *reserved;
  EXPECT_EQ(range.first.value % 4, 0u);
  EXPECT_EQ(kernel.ReservedPages(), Pages{8});
  EXPECT_EQ(kernel.At(range.first), (PageState{.reservation = 1}));
  EXPECT_EQ(kernel.At(range.end).reservation, 0u);

  ASSERT_TRUE(kernel.Protect(Part(range, 0, 6), Protection::kReadWrite).ok());
  EXPECT_EQ(kernel.At(range.first).protection, Protection::kReadWrite);
  EXPECT_EQ(kernel.CommittedPages(), Pages{6});

  kernel.TouchForWrite(Part(range, 0, 3));
  kernel.Zero(Part(range, 3, 1));
  EXPECT_EQ(kernel.ResidentPages(range), Pages{4});
  EXPECT_EQ(*kernel.CountResident(range), Pages{4});

  ASSERT_TRUE(kernel.Discard({{Part(range, 0, 1)}}).ok());
  EXPECT_EQ(kernel.ResidentPages(range), Pages{3});
  EXPECT_EQ(*kernel.CountResident(range), Pages{3});

  if (kernel.features().guard_regions) {
    ASSERT_TRUE(kernel.InstallGuard(Part(range, 3, 2)).ok());
    EXPECT_EQ(kernel.GuardPages(range), Pages{2});
    EXPECT_EQ(kernel.ResidentPages(range), Pages{2});
    ASSERT_TRUE(kernel.Discard({{range}}).ok());
    EXPECT_EQ(kernel.GuardPages(range), Pages{2}) << "guards outlive a discard";
    ASSERT_TRUE(kernel.RemoveGuard(Part(range, 4, 1)).ok());
    EXPECT_TRUE(kernel.At(Part(range, 3, 1).first).guard);
    EXPECT_FALSE(kernel.At(Part(range, 4, 1).first).guard);
  }

  ASSERT_TRUE(kernel.AdviseHugePages(range, HugePages::kPrefer).ok());
  EXPECT_EQ(kernel.At(range.first).advice, PageState::Advice::kPreferHuge);
  ASSERT_TRUE(kernel.AdviseHugePages(range, HugePages::kAvoid).ok());
  EXPECT_EQ(kernel.At(range.first).advice, PageState::Advice::kAvoidHuge);

  kernel.AdviseCoreDumps(range, CoreDumps::kOmit);
  EXPECT_TRUE(kernel.At(range.first).undumped);
  kernel.AdviseCoreDumps(Part(range, 0, 2), CoreDumps::kInclude);
  EXPECT_FALSE(kernel.At(range.first).undumped);
  EXPECT_TRUE(kernel.At(Part(range, 2, 1).first).undumped);

  ASSERT_TRUE(kernel.Protect(range, Protection::kNone).ok());
  EXPECT_EQ(kernel.CommittedPages(), Pages{6}) << "only Reset and Release give the commitment back";
  ASSERT_TRUE(kernel.Reset(range).ok());
  EXPECT_EQ(kernel.At(range.first), (PageState{.reservation = 1}));
  EXPECT_EQ(kernel.CommittedPages(), Pages{0});

  ASSERT_TRUE(kernel.Release(Part(range, 0, 3)).ok());
  EXPECT_EQ(kernel.ReservedPages(), Pages{5});
  EXPECT_EQ(kernel.At(range.first).reservation, 0u);
}

// The entries of /proc/self/maps that meet `range`.
std::size_t VmasIn(PageRange range) {
  std::ifstream maps("/proc/self/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    std::uintptr_t first = 0;
    std::uintptr_t end = 0;
    if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR, &first, &end) != 2) continue;
    count += range.Overlaps({PageNumber{first >> kPageShift}, PageNumber{end >> kPageShift}});
  }
  return count;
}

class FakeKernelSeededTest : public ::testing::TestWithParam<std::uint32_t> {};
INSTANTIATE_TEST_SUITE_P(Seeds, FakeKernelSeededTest, ::testing::Range(1u, 6u));

// Untouched memory: then Linux merges all that it may.
TEST_P(FakeKernelSeededTest, CountsTheVmasThatLinuxHas) {
  constexpr std::size_t kPages = 64;
  std::mt19937 random(GetParam());
  FakeKernel kernel;
  const Result<PageRange> range = kernel.Reserve(Pages{kPages}, Pages{1});
  ASSERT_TRUE(range.ok());
  ASSERT_EQ(VmasIn(*range), 1u);
  for (int step = 0; step < 300; ++step) {
    const std::size_t first = random() % kPages;
    const PageRange part = Part(*range, first, 1 + random() % (kPages - first));
    switch (random() % 7) {
      case 0:
        kernel.AdviseCoreDumps(part, CoreDumps::kInclude);
        ASSERT_TRUE(kernel.Protect(part, Protection::kReadWrite).ok());
        break;
      case 1:
        ASSERT_TRUE(kernel.Protect(part, Protection::kRead).ok());
        break;
      case 2:
        ASSERT_TRUE(kernel.Protect(part, Protection::kNone).ok());
        break;
      case 3:
        ASSERT_TRUE(kernel.Reset(part).ok());
        break;
      case 4:
        ASSERT_TRUE(kernel.Discard({{part}}).ok());
        break;
      case 5:
        if (!kernel.features().huge_pages) break;
        ASSERT_TRUE(
            kernel.AdviseHugePages(part, random() % 2 == 0 ? HugePages::kPrefer : HugePages::kAvoid)
                .ok());
        break;
      case 6:
        kernel.AdviseCoreDumps(part, random() % 2 == 0 ? CoreDumps::kOmit : CoreDumps::kInclude);
        break;
    }
    ASSERT_EQ(kernel.KernelVmaCount(), VmasIn(*range))
        << "seed " << GetParam() << " step " << step << ": " << ToString(kernel.Calls().back());
  }
}

TEST(FakeKernelTest, GivesBackWhatIsLeft) {
  PageRange range;
  {
    FakeKernel kernel;
    range = ReserveWritable(kernel, 4);
    ASSERT_TRUE(kernel.Release(Part(range, 1, 1)).ok());
    EXPECT_EQ(VmasIn(range), 2u);
  }
  EXPECT_EQ(VmasIn(range), 0u);
}

// ---- Failures ----

// Every operation that can fail, on `range`, which it leaves reserved and writable.
std::vector<std::pair<Operation, std::function<Error(FakeKernel&, PageRange)>>>
FallibleOperations() {
  return {
      {Operation::kProtect,
       [](FakeKernel& kernel, PageRange range) {
         return kernel.Protect(range, Protection::kRead);
       }},
      {Operation::kReset, [](FakeKernel& kernel, PageRange range) { return kernel.Reset(range); }},
      {Operation::kLockMemory,
       [](FakeKernel& kernel, PageRange range) { return kernel.LockMemory(range); }},
      {Operation::kUnlockMemory,
       [](FakeKernel& kernel, PageRange range) { return kernel.UnlockMemory(range); }},
      {Operation::kDiscard,
       [](FakeKernel& kernel, PageRange range) { return kernel.Discard({{range}}); }},
      {Operation::kAdviseHugePages,
       [](FakeKernel& kernel, PageRange range) {
         return kernel.AdviseHugePages(range, HugePages::kAvoid);
       }},
      {Operation::kInstallGuard,
       [](FakeKernel& kernel, PageRange range) { return kernel.InstallGuard(range); }},
      {Operation::kRemoveGuard,
       [](FakeKernel& kernel, PageRange range) { return kernel.RemoveGuard(range); }},
      {Operation::kCountResident,
       [](FakeKernel& kernel, PageRange range) { return kernel.CountResident(range).error(); }},
      {Operation::kAdviseReclaim,
       [](FakeKernel& kernel, PageRange range) {
         return kernel.AdviseReclaim(range, ReclaimHint::kCold);
       }},
      {Operation::kAdvise,
       [](FakeKernel& kernel, PageRange range) { return kernel.Advise(range, MADV_DONTDUMP); }},
      {Operation::kQueryResident,
       [](FakeKernel& kernel, PageRange range) {
         std::vector<std::uint8_t> resident(range.count().value);
         return kernel.QueryResident(range, absl::MakeSpan(resident));
       }},
      {Operation::kRelease,
       [](FakeKernel& kernel, PageRange range) { return kernel.Release(range); }},
  };
}

TEST(FakeKernelFailureTest, TheNthCallFailsAndChangesNothing) {
  for (const auto& [operation, perform] : FallibleOperations()) {
    FakeKernel kernel;
    const PageRange range = ReserveWritable(kernel, 2);
    Fill(range, 9);
    kernel.TouchForWrite(range);
    const PageState before = kernel.At(range.first);
    kernel.FailNth(operation, 1, EAGAIN);
    EXPECT_EQ(perform(kernel, range), Error::System(EAGAIN)) << ToString(operation);
    EXPECT_EQ(kernel.InjectedFailures(), 1u);
    EXPECT_EQ(kernel.At(range.first), before) << ToString(operation);
    EXPECT_TRUE(IsFilledWith(range, 9)) << ToString(operation);
    // Once only.
    EXPECT_NE(perform(kernel, range), Error::System(EAGAIN)) << ToString(operation);
    EXPECT_EQ(kernel.InjectedFailures(), 1u);
  }
}

TEST(FakeKernelFailureTest, TheNthIsCountedFromNowAndPerOperation) {
  FakeKernel kernel;
  const PageRange range = ReserveWritable(kernel, 2);
  kernel.FailNth(Operation::kProtect, 3, ENOMEM);
  EXPECT_TRUE(kernel.Protect(range, Protection::kRead).ok());
  EXPECT_TRUE(kernel.Discard({{range}}).ok());
  EXPECT_TRUE(kernel.Protect(range, Protection::kReadWrite).ok());
  EXPECT_TRUE(kernel.Discard({{range}}).ok());
  EXPECT_EQ(kernel.Protect(range, Protection::kRead), Error::System(ENOMEM));
  EXPECT_TRUE(kernel.Protect(range, Protection::kRead).ok());
}

TEST(FakeKernelFailureTest, AReserveThatFailsReservesNothing) {
  FakeKernel kernel;
  kernel.FailNth(Operation::kReserve, 1, ENOMEM);
  EXPECT_EQ(kernel.Reserve(Pages{2}, Pages{1}).error(), Error::System(ENOMEM));
  EXPECT_EQ(kernel.ReservedPages(), Pages{0});
  EXPECT_TRUE(kernel.Reserve(Pages{2}, Pages{1}).ok());
}

TEST(FakeKernelFailureTest, TheNthOfAnyCountsWhatCanFail) {
  FakeKernel kernel;
  const PageRange range = ReserveWritable(kernel, 2);
  kernel.FailNthOfAny(3, ENOMEM);
  EXPECT_TRUE(kernel.Discard({{range}}).ok());
  kernel.TouchForWrite(range);
  kernel.Zero(range);
  EXPECT_TRUE(kernel.Protect(range, Protection::kRead).ok());
  EXPECT_EQ(kernel.CountResident(range).error(), Error::System(ENOMEM));
  EXPECT_TRUE(kernel.CountResident(range).ok());
  EXPECT_EQ(kernel.InjectedFailures(), 1u);
}

TEST(FakeKernelFailureTest, FailAlwaysFailsUntilStopped) {
  FakeKernel kernel;
  const PageRange range = ReserveWritable(kernel, 2);
  kernel.FailAlways(Operation::kDiscard, EINVAL);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(kernel.Discard({{range}}), Error::System(EINVAL));
  EXPECT_TRUE(kernel.Protect(range, Protection::kRead).ok());
  EXPECT_EQ(kernel.InjectedFailures(), 3u);
  kernel.StopFailing();
  EXPECT_TRUE(kernel.Discard({{range}}).ok());
}

// "On error some ranges may have been dropped": here the first half was.
TEST(FakeKernelFailureTest, ADiscardThatFailsDidPartOfItsWork) {
  FakeKernel kernel;
  const PageRange range = ReserveWritable(kernel, 4);
  Fill(range, 9);
  kernel.TouchForWrite(range);
  const std::vector<PageRange> pages = {Part(range, 0, 1), Part(range, 1, 1), Part(range, 2, 1),
                                        Part(range, 3, 1)};
  kernel.FailNth(Operation::kDiscard, 1, ENOMEM);
  EXPECT_EQ(kernel.Discard(pages), Error::System(ENOMEM));
  EXPECT_TRUE(IsFilledWith(Part(range, 0, 2), 0));
  EXPECT_TRUE(IsFilledWith(Part(range, 2, 2), 9));
  EXPECT_EQ(kernel.ResidentPages(range), Pages{2});
}

TEST(FakeKernelFailureTest, CommitmentHasALimit) {
  FakeKernel kernel;
  const Result<PageRange> reserved = kernel.Reserve(Pages{10}, Pages{1});
  ASSERT_TRUE(reserved.ok());
  const PageRange range = *reserved;
  kernel.FailProtectBeyond(Pages{6}.bytes());
  EXPECT_TRUE(kernel.Protect(Part(range, 0, 4), Protection::kReadWrite).ok());
  EXPECT_EQ(kernel.Protect(Part(range, 4, 3), Protection::kReadWrite), Error::System(ENOMEM));
  EXPECT_EQ(kernel.InjectedFailures(), 1u);
  // Neither what is committed already nor what cannot be written counts.
  EXPECT_TRUE(kernel.Protect(Part(range, 0, 6), Protection::kReadWrite).ok());
  EXPECT_TRUE(kernel.Protect(range, Protection::kRead).ok());
  EXPECT_TRUE(kernel.Protect(Part(range, 0, 6), Protection::kReadWrite).ok());
  EXPECT_EQ(kernel.CommittedPages(), Pages{6});
  // Reset gives back, Protect does not.
  EXPECT_EQ(kernel.Protect(range, Protection::kReadWrite), Error::System(ENOMEM));
  EXPECT_TRUE(kernel.Reset(Part(range, 0, 5)).ok());
  EXPECT_TRUE(kernel.Protect(Part(range, 5, 5), Protection::kReadWrite).ok());
  EXPECT_EQ(kernel.CommittedPages(), Pages{5});
  kernel.FailProtectBeyond(Bytes{0});
  EXPECT_TRUE(kernel.Protect(Part(range, 5, 5), Protection::kReadWrite).ok()) << "commits nothing";
  kernel.StopFailing();
  EXPECT_TRUE(kernel.Protect(range, Protection::kReadWrite).ok());
}

TEST(FakeKernelFailureTest, FeaturesCanBeTakenAway) {
  FakeKernel kernel;
  const Features real = kernel.features();
  const PageRange range = ReserveWritable(kernel, 4);
  kernel.SetFeatures(Features{});
  EXPECT_FALSE(kernel.features().guard_regions);
  EXPECT_FALSE(kernel.features().vectored_discard);
  EXPECT_EQ(kernel.InstallGuard(range).code, ErrorCode::kUnsupported);
  EXPECT_EQ(kernel.RemoveGuard(range).code, ErrorCode::kUnsupported);
  Fill(range, 9);
  const std::vector<PageRange> ends = {Part(range, 0, 1), Part(range, 3, 1)};
  EXPECT_TRUE(kernel.Discard(ends).ok());
  EXPECT_TRUE(IsFilledWith(ends[0], 0));
  EXPECT_TRUE(IsFilledWith(ends[1], 0));
  kernel.SetFeatures(LinuxKernel::kAllFeatures);
  EXPECT_EQ(kernel.features().guard_regions, real.guard_regions);

  FakeKernel without({.features = Features{}});
  EXPECT_FALSE(without.features().guard_regions);
}

// ---- Misuse ----

TEST(FakeKernelDeathTest, StopsOnMisuse) {
  FakeKernel kernel;
  const PageRange range = ReserveWritable(kernel, 4);
  const PageRange outside = {range.first, range.end + Pages{1}};
  const PageRange empty = {range.first, range.first};
  for (const auto& [operation, perform] : FallibleOperations()) {
    const std::string prefix = std::string("fake kernel: ") + ToString(operation);
    EXPECT_DEATH((void)perform(kernel, outside), prefix + ": not inside one reservation first=0x");
    EXPECT_DEATH((void)perform(kernel, empty), prefix + ": empty range");
  }
  EXPECT_DEATH(kernel.TouchForWrite(outside), "TouchForWrite: not inside one reservation");
  EXPECT_DEATH(kernel.Zero(outside), "Zero: not inside one reservation");
  EXPECT_DEATH((void)kernel.Reserve(Pages{0}, Pages{1}), "check failed");
  FakeKernel omitting;
  const PageRange omitted = ReserveWritable(omitting, 2);
  omitting.AdviseCoreDumps(Part(omitted, 1, 1), CoreDumps::kOmit);
  EXPECT_DEATH((void)omitting.Protect(omitted, Protection::kReadWrite), "Protect: core dumps omit it");
  EXPECT_TRUE(omitting.Protect(omitted, Protection::kRead).ok()) << "nobody writes there";
  EXPECT_DEATH((void)kernel.Reserve(Pages{1}, Pages{3}), "check failed");
}

TEST(FakeKernelDeathTest, StopsOnASecondRelease) {
  FakeKernel kernel;
  const PageRange range = ReserveWritable(kernel, 4);
  ASSERT_TRUE(kernel.Release(Part(range, 1, 1)).ok());
  EXPECT_DEATH((void)kernel.Release(Part(range, 1, 1)), "Release: not inside one reservation");
  EXPECT_DEATH((void)kernel.Release(range), "Release: not inside one reservation")
      << "half of it is gone";
}

TEST(FakeKernelTest, DiscardTakesRangesThatOverlap) {
  FakeKernel kernel;
  const PageRange range = ReserveWritable(kernel, 4);
  kernel.TouchForWrite(range);
  EXPECT_TRUE(kernel.Discard({{Part(range, 2, 2), Part(range, 0, 3)}}).ok());
  EXPECT_EQ(kernel.ResidentPages(range), Pages{0});
}

TEST(FakeKernelDeathTest, StopsOnTouchesThatWouldFault) {
  FakeKernel kernel;
  const PageRange range = ReserveWritable(kernel, 2 * kPagesPerHugePage);
  ASSERT_TRUE(kernel.Protect(Part(range, 1, 1), Protection::kRead).ok());
  EXPECT_DEATH(kernel.TouchForWrite(Part(range, 0, 2)), "TouchForWrite: pages not writable");
  EXPECT_DEATH(kernel.Zero(Part(range, 1, 1)), "Zero: pages not writable");
  EXPECT_DEATH(kernel.TouchForWrite(Part(range, 2, kPagesPerHugePage + 1)),
               "more than a huge page's worth");
  if (kernel.features().guard_regions) {
    ASSERT_TRUE(kernel.InstallGuard(Part(range, 4, 1)).ok());
    EXPECT_DEATH(kernel.TouchForWrite(Part(range, 2, 4)), "TouchForWrite: guarded pages");
  }
}

TEST(FakeKernelDeathTest, StopsOnFailuresThatCannotHappen) {
  FakeKernel kernel;
  EXPECT_DEATH(kernel.FailNth(Operation::kZero, 1, ENOMEM), "check failed");
  EXPECT_DEATH(kernel.FailAlways(Operation::kTouchForWrite, ENOMEM), "check failed");
  EXPECT_DEATH(kernel.FailNth(Operation::kReset, 0, ENOMEM), "check failed");
  EXPECT_DEATH(kernel.FailNthOfAny(0, ENOMEM), "check failed");
}

#if defined(FREEHOLD_DEBUG_CHECKS)
std::atomic<int> violations{0};

TEST(FakeKernelTest, EveryOperationRefusesToRunUnderAShortLock) {
  for (const auto& [operation, perform] : FallibleOperations()) {
    FakeKernel kernel;
    const PageRange range = ReserveWritable(kernel, 2);
    // Fails before it reaches the real kernel, which checks for itself.
    kernel.FailAlways(operation, ENOMEM);
    violations = 0;
    sync::SetRankViolationHandlerForTest([](auto...) { ++violations; });
    const int lock = 0;
    sync::AcquireRank(sync::LockRank::kRegion, &lock, sync::RankCheck::kOrdered,
                      sync::AcquisitionSite::Here());
    (void)perform(kernel, range);
    const int violations_of_operation = violations;
    kernel.FailAlways(Operation::kReserve, ENOMEM);
    (void)kernel.Reserve(Pages{1}, Pages{1});
    sync::ReleaseRank(&lock);
    sync::SetRankViolationHandlerForTest(nullptr);
    EXPECT_GE(violations_of_operation, 1) << ToString(operation);
    EXPECT_GT(violations, violations_of_operation) << "Reserve";
  }
}
#endif

// ---- Log, clock, CPUs, threads ----

TEST(FakeKernelTest, LogsAndCountsCalls) {
  FakeKernel kernel;
  const PageRange range = ReserveWritable(kernel, 4);
  kernel.FailNth(Operation::kReset, 1, ENOMEM);
  (void)kernel.Reset(range);
  (void)kernel.Discard({{Part(range, 0, 1), Part(range, 2, 2)}});
  (void)kernel.AdviseHugePages(range, HugePages::kPrefer);
  const std::vector<FakeKernel::Call> calls = kernel.Calls();
  ASSERT_EQ(calls.size(), 5u);
  EXPECT_EQ(calls[0].operation, Operation::kReserve);
  EXPECT_EQ(calls[0].ranges, std::vector<PageRange>{range});
  EXPECT_EQ(calls[1].operation, Operation::kProtect);
  EXPECT_EQ(calls[1].protection, Protection::kReadWrite);
  EXPECT_EQ(calls[2].result, Error::System(ENOMEM));
  EXPECT_EQ(calls[3].ranges, (std::vector<PageRange>{Part(range, 0, 1), Part(range, 2, 2)}));
  EXPECT_EQ(calls[4].huge_pages, HugePages::kPrefer);
  EXPECT_EQ(kernel.CallCount(), 5u);
  EXPECT_EQ(kernel.CallCount(Operation::kReset), 1u);
  kernel.ClearCalls();
  EXPECT_TRUE(kernel.Calls().empty());
  EXPECT_EQ(kernel.CallCount(), 0u);
}

TEST(FakeKernelTest, CountsWithoutALog) {
  FakeKernel kernel({.log_calls = false});
  (void)ReserveWritable(kernel, 1);
  EXPECT_TRUE(kernel.Calls().empty());
  EXPECT_EQ(kernel.CallCount(), 2u);
}

TEST(FakeKernelTest, CallsReadAsText) {
  const PageRange range = PageRange::Of(PageNumber{0x7f000}, Pages{2});
  EXPECT_EQ(
      ToString(FakeKernel::Call{.operation = Operation::kReset, .ranges = {range}, .result = {}}),
      "Reset [0x7f000000,0x7f002000) = ok");
  EXPECT_EQ(ToString(FakeKernel::Call{
                .operation = Operation::kReserve, .ranges = {}, .result = Error::System(ENOMEM)}),
            "Reserve = system call failed (errno 12)");
}

TEST(FakeKernelTest, ModelsMemoryLocksAndTheirLimit) {
  FakeKernel kernel;
  const PageRange range = ReserveWritable(kernel, 8);
  EXPECT_EQ(kernel.KernelVmaCount(), 1u);
  ASSERT_TRUE(kernel.LockMemory(Part(range, 2, 2)).ok());
  EXPECT_TRUE(kernel.At(Part(range, 2, 1).first).locked);
  EXPECT_FALSE(kernel.At(range.first).locked);
  EXPECT_EQ(kernel.LockedPages(), Pages{2});
  EXPECT_EQ(kernel.KernelVmaCount(), 3u);
  EXPECT_EQ(kernel.ResidentPages(range), Pages{0}) << "nothing is populated";
  kernel.FailLockBeyond(Pages{4}.bytes());
  EXPECT_EQ(kernel.LockMemory(Part(range, 3, 4)), Error::System(ENOMEM));
  EXPECT_EQ(kernel.LockedPages(), Pages{2});
  EXPECT_EQ(kernel.InjectedFailures(), 1u);
  ASSERT_TRUE(kernel.LockMemory(Part(range, 3, 3)).ok()) << "what is locked already does not count twice";
  ASSERT_TRUE(kernel.UnlockMemory(Part(range, 0, 8)).ok());
  EXPECT_EQ(kernel.KernelVmaCount(), 1u);
  ASSERT_TRUE(kernel.LockMemory(Part(range, 0, 4)).ok());
  ASSERT_TRUE(kernel.Reset(range).ok());
  EXPECT_EQ(kernel.LockedPages(), Pages{0}) << "a reset unlocks";
}

TEST(FakeKernelTest, ModelsMovesAndCopies) {
  FakeKernel kernel;
  const PageRange range = ReserveWritable(kernel, 16);
  kernel.TouchForWrite(Part(range, 0, 2));
  Fill(Part(range, 0, 2), 9);
  ASSERT_TRUE(kernel.Move(Part(range, 0, 4), Part(range, 8, 4)).ok());
  EXPECT_TRUE(IsFilledWith(Part(range, 8, 2), 9));
  EXPECT_EQ(kernel.ResidentPages(Part(range, 8, 4)), Pages{2});
  EXPECT_EQ(kernel.ResidentPages(Part(range, 0, 4)), Pages{0});
  EXPECT_EQ(*kernel.CountResident(range), Pages{2});
  EXPECT_TRUE(IsFilledWith(Part(range, 0, 8), 0));
  EXPECT_EQ(kernel.KernelVmaCount(), 3u) << "it does not merge";
  kernel.Copy(Part(range, 8, 2), Part(range, 0, 2));
  EXPECT_TRUE(IsFilledWith(Part(range, 0, 2), 9));
  kernel.FailNth(Operation::kMove, 1, EFAULT);
  EXPECT_EQ(kernel.Move(Part(range, 0, 4), Part(range, 8, 4)), Error::System(EFAULT));
  EXPECT_EQ(kernel.At(Part(range, 8, 1).first), (PageState{.reservation = 1})) << "reset";
  EXPECT_TRUE(IsFilledWith(Part(range, 0, 2), 9));
  ASSERT_TRUE(kernel.Protect(range, Protection::kReadWrite).ok());
  EXPECT_EQ(kernel.KernelVmaCount(), 1u);
}

TEST(FakeKernelTest, TimeMovesByHandOnly) {
  FakeKernel kernel;
  const Nanoseconds start = kernel.Now();
  EXPECT_LE(start, LinuxKernel().Now());
  std::atomic<std::uint32_t> word{0};
  const Nanoseconds soon = start + Milliseconds(2);
  EXPECT_EQ(FutexWait(&word, 0, &soon), FutexResult::kTimeout) << "real time went on";
  EXPECT_EQ(kernel.Now(), start);
  kernel.AdvanceTime(Milliseconds(5));
  EXPECT_EQ(kernel.Now(), start + Milliseconds(5));
}

TEST(FakeKernelTest, EachThreadRunsWhereItIsTold) {
  FakeKernel kernel({.cpu_count = 8});
  EXPECT_EQ(kernel.CpuCount(), 8u);
  EXPECT_EQ(kernel.CurrentCpu(), 0u);
  FakeKernel::SetCpu(3);
  std::thread([&] {
    EXPECT_EQ(kernel.CurrentCpu(), 0u);
    FakeKernel::SetCpu(5);
    EXPECT_EQ(kernel.CurrentCpu(), 5u);
  }).join();
  EXPECT_EQ(kernel.CurrentCpu(), 3u);
  FakeKernel::SetCpu(0);
}

TEST(FakeKernelTest, ThreadsShareOneKernel) {
  FakeKernel kernel;
  constexpr std::size_t kThreads = 4;
  constexpr std::size_t kRounds = 200;
  const PageRange range = ReserveWritable(kernel, 4 * kThreads);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      const PageRange own = Part(range, 4 * t, 4);
      for (std::size_t i = 0; i < kRounds; ++i) {
        kernel.TouchForWrite(own);
        Fill(own, static_cast<int>(t + 1));
        EXPECT_TRUE(kernel.Discard({{Part(own, 0, 1)}}).ok());
        EXPECT_TRUE(IsFilledWith(Part(own, 0, 1), 0));
        EXPECT_TRUE(IsFilledWith(Part(own, 1, 3), static_cast<int>(t + 1)));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(kernel.CallCount(Operation::kDiscard), kThreads * kRounds);
  EXPECT_EQ(kernel.ResidentPages(range), Pages{3 * kThreads});
}

}  // namespace
}  // namespace freehold::vm::os
