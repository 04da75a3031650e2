// LinuxKernel against the kernel that runs the test: contents, protections and VMAs are looked at
// from outside, and the fallbacks are forced by switching features off and by seccomp filters.
#include "vm/os/linux_kernel.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/os/syscall_filter.h"
#include "vm/os/raw_syscall.h"
#include "vm/sync/lock_rank.h"

namespace freehold::vm::os {
namespace {

constinit LinuxKernel constant_initialized;
static_assert(std::is_trivially_destructible_v<LinuxKernel>);

constexpr long kSysProcessMadvise = 440;
constexpr std::uint32_t kMadvGuardInstall = 102;

Features Without(bool Features::*feature) {
  Features features = LinuxKernel::kAllFeatures;
  features.*feature = false;
  return features;
}

PageRange Part(PageRange range, std::size_t first, std::size_t count) {
  return PageRange::Of(range.first + Pages{first}, Pages{count});
}

std::byte* PageAt(PageRange range, std::size_t page) {
  return (range.first + Pages{page}).address();
}

// A futex wait that cannot match reads its word: it finds out whether a page can be read without a
// signal.
bool CanRead(const void* address) {
  const timespec none = {0, 0};
  return RawSyscall(SYS_futex, address, FUTEX_WAIT_PRIVATE, 1, &none, nullptr, 0) != -EFAULT;
}

// Overwrites the first bytes.
bool CanWrite(void* address) {
  return RawSyscall(SYS_clock_gettime, CLOCK_MONOTONIC, address) == 0;
}

// Not by mlock's symbol: sanitizers make that do nothing.
bool LockInMemory(PageRange range) {
  return RawSyscall(SYS_mlock, range.address(), range.bytes().value) == 0;
}

bool IsFilledWith(PageRange range, int value) {
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(range.address());
  return std::all_of(bytes, bytes + range.bytes().value,
                     [value](unsigned char b) { return b == value; });
}

void Fill(PageRange range, int value) { std::memset(range.address(), value, range.bytes().value); }

// A reservation that goes with its scope.
class Reservation {
 public:
  Reservation(Kernel& kernel, std::size_t pages, Protection protection, std::size_t alignment = 1)
      : kernel_(kernel) {
    const Result<PageRange> reserved = kernel.Reserve(Pages{pages}, Pages{alignment});
    EXPECT_TRUE(reserved.ok());
    range_ = *reserved;
    if (protection != Protection::kNone) {
      EXPECT_TRUE(kernel.Protect(range_, protection).ok());
    }
  }
  ~Reservation() { EXPECT_TRUE(kernel_.Release(range_).ok()); }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  PageRange range() const { return range_; }
  PageRange part(std::size_t first, std::size_t count) const { return Part(range_, first, count); }
  std::byte* page(std::size_t page) const { return PageAt(range_, page); }

 private:
  Kernel& kernel_;
  PageRange range_;
};

// The line `key` of /proc/self/smaps for the VMA that holds `address`; "" if there is none.
std::string SmapsLine(const void* address, const std::string& key) {
  std::ifstream smaps("/proc/self/smaps");
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    std::uintptr_t first = 0;
    std::uintptr_t end = 0;
    char dash = 0;
    std::istringstream header(line);
    if (line.find(':') != line.find(' ') - 1 && header >> std::hex >> first >> dash >> end &&
        dash == '-') {
      const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(address);
      inside = first <= at && at < end;
    } else if (inside && line.compare(0, key.size() + 1, key + ":") == 0) {
      return line;
    }
  }
  return "";
}

bool HasVmFlag(const void* address, const std::string& flag) {
  return (SmapsLine(address, "VmFlags") + " ").find(" " + flag + " ") != std::string::npos;
}

// ---- Reserve, Release, Protect, Reset ----

TEST(LinuxKernelTest, ServesAsAConstantInitializedGlobal) {
  const Reservation memory(constant_initialized, 4, Protection::kReadWrite);
  Fill(memory.range(), 7);
  EXPECT_TRUE(IsFilledWith(memory.range(), 7));
}

TEST(LinuxKernelTest, ReservesAlignedAndInaccessible) {
  LinuxKernel kernel;
  constexpr std::size_t kAlignments[] = {1, 2, kPagesPerHugePage, std::size_t{1} << 18};
  constexpr std::size_t kSizes[] = {1, 3, kPagesPerHugePage + 1};
  for (const std::size_t alignment : kAlignments) {
    for (const std::size_t pages : kSizes) {
      const Reservation memory(kernel, pages, Protection::kNone, alignment);
      EXPECT_EQ(memory.range().first.value % alignment, 0u);
      EXPECT_EQ(memory.range().count(), Pages{pages});
      EXPECT_FALSE(CanRead(memory.page(0)));
      EXPECT_FALSE(CanRead(memory.page(pages - 1)));
    }
  }
}

// The size of this process's address space, by a call that does not change it.
Pages AddressSpaceSize() {
  char statm[128] = {};
  const long fd = RawSyscall(SYS_openat, AT_FDCWD, "/proc/self/statm", O_RDONLY | O_CLOEXEC, 0);
  EXPECT_GT(RawSyscall(SYS_read, fd, statm, sizeof(statm) - 1), 0);
  RawSyscall(SYS_close, fd);
  return Pages{std::strtoull(statm, nullptr, 10)};
}

TEST(LinuxKernelTest, AlignedReserveKeepsNothingBesideTheRange) {
  LinuxKernel kernel;
  const Pages before = AddressSpaceSize();
  const Result<PageRange> range = kernel.Reserve(Pages{4}, Pages{std::size_t{1} << 18});
  const Pages after = AddressSpaceSize();
  ASSERT_TRUE(range.ok());
  EXPECT_EQ(after - before, Pages{4});
  EXPECT_TRUE(kernel.Release(*range).ok());
}

TEST(LinuxKernelTest, ReserveTakesNoCommitCharge) {
  LinuxKernel kernel;
  // 64 GiB: no test may fill that, and sanitizers leave room for it.
  const Result<PageRange> huge =
      kernel.Reserve(Pages{std::size_t{1} << 24}, Pages{kPagesPerHugePage});
  ASSERT_TRUE(huge.ok());
  EXPECT_FALSE(HasVmFlag(huge->address(), "ac"));
  EXPECT_TRUE(HasVmFlag(huge->address(), "nr"));
  EXPECT_TRUE(kernel.Release(*huge).ok());
}

TEST(LinuxKernelTest, ReserveSaysWhyItFails) {
  LinuxKernel kernel;
  const Pages more_than_fits{std::size_t{1} << 44};  // 2^56 bytes
  EXPECT_EQ(kernel.Reserve(more_than_fits, Pages{1}).error(), Error::System(ENOMEM));
  const Pages all{~std::size_t{0} >> kPageShift};
  EXPECT_EQ(kernel.Reserve(all, Pages{2}).error().code, ErrorCode::kOverflow);
  EXPECT_EQ(kernel.Reserve(Pages{~std::size_t{0}}, Pages{1}).error().code, ErrorCode::kOverflow);
}

TEST(LinuxKernelTest, ReleasesPartOfAReservation) {
  LinuxKernel kernel;
  const Result<PageRange> range = kernel.Reserve(Pages{4}, Pages{1});
  ASSERT_TRUE(range.ok());
  ASSERT_TRUE(kernel.Protect(*range, Protection::kReadWrite).ok());
  Fill(*range, 1);
  EXPECT_TRUE(kernel.Release(Part(*range, 1, 2)).ok());
  EXPECT_TRUE(IsFilledWith(Part(*range, 0, 1), 1));
  EXPECT_FALSE(CanRead(PageAt(*range, 1)));
  EXPECT_FALSE(CanRead(PageAt(*range, 2)));
  EXPECT_TRUE(IsFilledWith(Part(*range, 3, 1), 1));
  EXPECT_TRUE(kernel.Release(Part(*range, 0, 1)).ok());
  EXPECT_TRUE(kernel.Release(Part(*range, 3, 1)).ok());
}

TEST(LinuxKernelTest, ProtectKeepsContentAndChangesAccess) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 2, Protection::kReadWrite);
  Fill(memory.range(), 5);
  ASSERT_TRUE(kernel.Protect(memory.range(), Protection::kRead).ok());
  EXPECT_TRUE(IsFilledWith(memory.range(), 5));
  EXPECT_FALSE(CanWrite(memory.page(0)));
  ASSERT_TRUE(kernel.Protect(memory.range(), Protection::kNone).ok());
  EXPECT_FALSE(CanRead(memory.page(0)));
  ASSERT_TRUE(kernel.Protect(memory.range(), Protection::kReadExec).ok());
  EXPECT_TRUE(HasVmFlag(memory.page(0), "ex"));
  EXPECT_TRUE(IsFilledWith(memory.range(), 5));
}

TEST(LinuxKernelTest, ResetForgetsContentProtectionAndAdvice) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 8, Protection::kReadWrite);
  Fill(memory.range(), 5);
  ASSERT_TRUE(kernel.AdviseHugePages(memory.range(), HugePages::kAvoid).ok());
  ASSERT_TRUE(kernel.Reset(memory.part(2, 4)).ok());
  EXPECT_FALSE(CanRead(memory.page(2)));
  EXPECT_FALSE(CanRead(memory.page(5)));
  EXPECT_FALSE(HasVmFlag(memory.page(2), "nh"));
  EXPECT_TRUE(HasVmFlag(memory.page(2), "nr"));
  EXPECT_TRUE(IsFilledWith(memory.part(0, 2), 5));
  EXPECT_TRUE(IsFilledWith(memory.part(6, 2), 5));
  ASSERT_TRUE(kernel.Protect(memory.range(), Protection::kReadWrite).ok());
  EXPECT_TRUE(IsFilledWith(memory.part(2, 4), 0));
}

TEST(LinuxKernelTest, CoreDumpsOmitWhatTheyAreTold) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 8, Protection::kReadWrite);
  EXPECT_FALSE(HasVmFlag(memory.page(0), "dd"));
  kernel.AdviseCoreDumps(memory.range(), CoreDumps::kOmit);
  kernel.AdviseCoreDumps(memory.part(0, 3), CoreDumps::kInclude);
  EXPECT_FALSE(HasVmFlag(memory.page(2), "dd"));
  EXPECT_TRUE(HasVmFlag(memory.page(3), "dd"));
  ASSERT_TRUE(kernel.Reset(memory.part(4, 1)).ok());
  EXPECT_FALSE(HasVmFlag(memory.page(4), "dd")) << "what is fresh has no advice";
  EXPECT_TRUE(HasVmFlag(memory.page(5), "dd"));
}

// Nobody is told; nothing changes.
TEST(LinuxKernelTest, ARefusalToOmitFromCoreDumpsIsNobodysConcern) {
  LinuxKernel kernel;
  const Result<PageRange> range = kernel.Reserve(Pages{2}, Pages{1});
  ASSERT_TRUE(range.ok());
  ASSERT_TRUE(kernel.Release(*range).ok());
  kernel.AdviseCoreDumps(*range, CoreDumps::kOmit);
  kernel.AdviseCoreDumps(*range, CoreDumps::kInclude);
}

TEST(LinuxKernelTest, ErrorsOfTheKernelComeBack) {
  LinuxKernel kernel;
  const Result<PageRange> range = kernel.Reserve(Pages{2}, Pages{1});
  ASSERT_TRUE(range.ok());
  ASSERT_TRUE(kernel.Release(*range).ok());
  EXPECT_EQ(kernel.Protect(*range, Protection::kRead), Error::System(ENOMEM));
  EXPECT_EQ(kernel.AdviseHugePages(*range, HugePages::kPrefer), Error::System(ENOMEM));
  EXPECT_EQ(kernel.Discard({&*range, 1}), Error::System(ENOMEM));
  EXPECT_EQ(kernel.CountResident(*range).error(), Error::System(ENOMEM));
  const PageRange beyond = PageRange::Of(PageNumber{std::size_t{1} << 50}, Pages{1});
  EXPECT_EQ(kernel.Release(beyond), Error::System(EINVAL));
  EXPECT_EQ(kernel.Reset(beyond), Error::System(ENOMEM));
}

// ---- Discard ----

class LinuxKernelDiscardTest : public ::testing::TestWithParam<bool> {
 protected:
  LinuxKernel kernel_{GetParam() ? LinuxKernel::kAllFeatures
                                 : Without(&Features::vectored_discard)};
};

INSTANTIATE_TEST_SUITE_P(WithAndWithoutVectors, LinuxKernelDiscardTest, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Vectored" : "OneByOne"; });

TEST_P(LinuxKernelDiscardTest, NothingIsDroppedForNoRanges) {
  EXPECT_TRUE(kernel_.Discard({}).ok());
}

TEST_P(LinuxKernelDiscardTest, DropsJustTheRangesInAnyOrder) {
  // More than two vectors full, every other page, shuffled.
  constexpr std::size_t kRanges = 2 * LinuxKernel::kDiscardVector + 100;
  const Reservation memory(kernel_, 2 * kRanges, Protection::kReadWrite);
  Fill(memory.range(), 9);
  std::vector<PageRange> ranges;
  for (std::size_t i = 0; i < kRanges; ++i) ranges.push_back(memory.part(2 * i, 1));
  std::shuffle(ranges.begin(), ranges.end(), std::mt19937(1));
  ASSERT_TRUE(kernel_.Discard(ranges).ok());
  const Result<Pages> resident = kernel_.CountResident(memory.range());
  ASSERT_TRUE(resident.ok());
  EXPECT_EQ(*resident, Pages{kRanges});
  for (std::size_t i = 0; i < kRanges; ++i) {
    ASSERT_TRUE(IsFilledWith(memory.part(2 * i, 1), 0)) << i;
    ASSERT_TRUE(IsFilledWith(memory.part(2 * i + 1, 1), 9)) << i;
  }
}

TEST_P(LinuxKernelDiscardTest, DropsAdjacentRanges) {
  // 0 1 1 2 3 . 4 4: the neighbours become one stretch, whichever of them comes first.
  const Reservation memory(kernel_, 9, Protection::kReadWrite);
  Fill(memory.range(), 9);
  const std::vector<PageRange> ranges = {memory.part(0, 1), memory.part(1, 2), memory.part(3, 1),
                                         memory.part(7, 2), memory.part(4, 1)};
  ASSERT_TRUE(kernel_.Discard(ranges).ok());
  EXPECT_TRUE(IsFilledWith(memory.part(0, 5), 0));
  EXPECT_TRUE(IsFilledWith(memory.part(5, 2), 9));
  EXPECT_TRUE(IsFilledWith(memory.part(7, 2), 0));
}

TEST_P(LinuxKernelDiscardTest, DropsLockedMemoryToo) {
  const Reservation memory(kernel_, 8, Protection::kReadWrite);
  Fill(memory.range(), 9);
  ASSERT_TRUE(LockInMemory(memory.part(2, 2)));
  const std::vector<PageRange> ranges = {memory.part(0, 1), memory.part(2, 2), memory.part(5, 1),
                                         memory.part(7, 1)};
  ASSERT_TRUE(kernel_.Discard(ranges).ok());
  for (const PageRange range : ranges) EXPECT_TRUE(IsFilledWith(range, 0));
  EXPECT_TRUE(IsFilledWith(memory.part(1, 1), 9));
  EXPECT_TRUE(IsFilledWith(memory.part(6, 1), 9));
}

TEST_P(LinuxKernelDiscardTest, ReportsAHoleInTheMiddle) {
  const Reservation memory(kernel_, 8, Protection::kReadWrite);
  Fill(memory.range(), 9);
  ASSERT_TRUE(kernel_.Release(memory.part(4, 1)).ok());
  const std::vector<PageRange> ranges = {memory.part(0, 1), memory.part(2, 1), memory.part(4, 1),
                                         memory.part(6, 1)};
  EXPECT_EQ(kernel_.Discard(ranges), Error::System(ENOMEM));
  EXPECT_TRUE(IsFilledWith(memory.part(0, 1), 0));
  EXPECT_TRUE(IsFilledWith(memory.part(2, 1), 0));
  EXPECT_TRUE(IsFilledWith(memory.part(7, 1), 9));
}

TEST(LinuxKernelTest, DiscardMakesOneCallAVectorOfMergedRanges) {
  LinuxKernel kernel;
  if (!kernel.features().vectored_discard) GTEST_SKIP() << "this kernel has no vectored discard";
  EXPECT_TRUE(PassesInChild([&] {
    const Reservation memory(kernel, 4 * LinuxKernel::kDiscardVector + 4, Protection::kReadWrite);
    Fill(memory.range(), 9);
    // Two ranges a stretch: 512 stretches and one more of a single range.
    std::vector<PageRange> ranges;
    for (std::size_t i = 0; i < LinuxKernel::kDiscardVector; ++i) {
      ranges.push_back(memory.part(4 * i, 1));
      ranges.push_back(memory.part(4 * i + 1, 2));
    }
    ScriptSyscall({.number = kSysProcessMadvise}, {});
    CHILD_CHECK(kernel.Discard(ranges).ok());
    CHILD_CHECK(ScriptedCalls() == 1);
    for (const PageRange range : ranges) CHILD_CHECK(IsFilledWith(range, 0));
    CHILD_CHECK(IsFilledWith(memory.part(3, 1), 9));

    // The same and one stretch more, which alone needs no vector.
    Fill(memory.range(), 9);
    ranges.push_back(memory.part(4 * LinuxKernel::kDiscardVector, 1));
    CHILD_CHECK(kernel.Discard(ranges).ok());
    CHILD_CHECK(ScriptedCalls() == 2);
    CHILD_CHECK(IsFilledWith(ranges.back(), 0));
    ::_exit(0);  // past ~Reservation: its EXPECT belongs to the parent
  }));
}

TEST(LinuxKernelTest, DiscardFallsBackOnceVectorsAreRefused) {
  LinuxKernel probed;
  LinuxKernel unprobed;
  if (!probed.features().vectored_discard) GTEST_SKIP() << "this kernel has no vectored discard";
  for (const int refusal : {EPERM, ENOSYS}) {
    for (LinuxKernel* kernel : {&probed, &unprobed}) {
      EXPECT_TRUE(PassesInChild([&] {
        const Reservation memory(*kernel, 8, Protection::kReadWrite);
        Fill(memory.range(), 9);
        RefuseSyscall({.number = kSysProcessMadvise}, refusal);
        const std::vector<PageRange> ranges = {memory.part(0, 2), memory.part(3, 1),
                                               memory.part(5, 3)};
        CHILD_CHECK(kernel->Discard(ranges).ok());
        for (const PageRange range : ranges) CHILD_CHECK(IsFilledWith(range, 0));
        CHILD_CHECK(IsFilledWith(memory.part(2, 1), 9));
        // It remembers: a call now would kill the child.
        CHILD_CHECK(!kernel->features().vectored_discard);
        KillOnSyscall({.number = kSysProcessMadvise});
        CHILD_CHECK(kernel->Discard(ranges).ok());
        CHILD_CHECK(kernel->features().guard_regions == probed.features().guard_regions);
        ::_exit(0);
      }));
    }
  }
}

TEST(LinuxKernelTest, DiscardRepeatsWhatWasInterruptedOrRefusedForTheMoment) {
  LinuxKernel kernel;
  EXPECT_TRUE(PassesInChild([&] {
    const Reservation memory(kernel, 1, Protection::kReadWrite);
    Fill(memory.range(), 9);
    const long answers[] = {-EINTR, -EAGAIN, -EINTR, -EAGAIN, kReachKernel};
    // This range only: a sanitizer's own madvise is not meant.
    const auto address =
        static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(memory.page(0)));
    ScriptSyscall({.number = SYS_madvise, .argument = {{0, address}}}, answers);
    CHILD_CHECK(kernel.Discard({{memory.range()}}).ok());
    CHILD_CHECK(ScriptedCalls() == 5);
    CHILD_CHECK(IsFilledWith(memory.range(), 0));
    ::_exit(0);
  }));
}

TEST(LinuxKernelTest, ARefusalForTheMomentThatLastsIsAnError) {
  LinuxKernel kernel;
  EXPECT_TRUE(PassesInChild([&] {
    const Reservation memory(kernel, 1, Protection::kReadWrite);
    RefuseSyscall({.number = SYS_madvise, .argument = {{2, MADV_HUGEPAGE}}}, EAGAIN);
    CHILD_CHECK(kernel.AdviseHugePages(memory.range(), HugePages::kPrefer) ==
                Error::System(EAGAIN));
    ::_exit(0);
  }));
}

TEST(LinuxKernelTest, DiscardGoesOnAfterAPartialVector) {
  LinuxKernel kernel;
  if (!kernel.features().vectored_discard) GTEST_SKIP() << "this kernel has no vectored discard";
  EXPECT_TRUE(PassesInChild([&] {
    const Reservation memory(kernel, 12, Protection::kReadWrite);
    Fill(memory.range(), 9);
    const std::vector<PageRange> ranges = {memory.part(0, 2), memory.part(3, 1), memory.part(5, 3),
                                           memory.part(9, 1)};
    // "Two pages done": the first range, which stays as it is since the kernel never sees that
    // call. Then "one page done", and then nothing at all, although no error: each time the rest
    // must follow.
    const long answers[] = {2 * kPageSize, kPageSize, 0};
    ScriptSyscall({.number = kSysProcessMadvise}, answers);
    CHILD_CHECK(kernel.Discard(ranges).ok());
    CHILD_CHECK(IsFilledWith(ranges[0], 9) && IsFilledWith(ranges[1], 9));
    CHILD_CHECK(IsFilledWith(ranges[2], 0) && IsFilledWith(ranges[3], 0));
    ::_exit(0);
  }));
}

// PIDFD_SELF_THREAD_GROUP would name the dead main thread here.
TEST(LinuxKernelTest, VectoredDiscardWorksAfterTheMainThreadExited) {
  LinuxKernel kernel;
  if (!kernel.features().vectored_discard) GTEST_SKIP() << "this kernel has no vectored discard";
  EXPECT_TRUE(PassesInChild([&] {
    std::thread([&] {
      const std::string stat_path = "/proc/self/task/" + std::to_string(::getpid()) + "/stat";
      for (std::string stat; stat.find(") Z") == std::string::npos;) {
        std::getline(std::ifstream(stat_path), stat);
        ::sched_yield();
      }
      const Reservation memory(kernel, 4, Protection::kReadWrite);
      Fill(memory.range(), 9);
      const std::vector<PageRange> ranges = {memory.part(0, 1), memory.part(2, 1)};
      CHILD_CHECK(kernel.Discard(ranges).ok());
      CHILD_CHECK(IsFilledWith(ranges[0], 0) && IsFilledWith(ranges[1], 0));
      CHILD_CHECK(kernel.features().vectored_discard);
      ::_exit(0);
    }).detach();
    RawSyscall(SYS_exit,
               0);  // this thread only; pthread_exit would unwind through the test framework
  }));
}

// ---- Huge pages, guards, residency ----

TEST(LinuxKernelTest, HugePageAdviceReachesTheVma) {
  LinuxKernel kernel;
  if (!kernel.features().huge_pages) GTEST_SKIP() << "this kernel has no transparent huge pages";
  const Reservation memory(kernel, 4 * kPagesPerHugePage, Protection::kReadWrite,
                           kPagesPerHugePage);
  ASSERT_TRUE(kernel.AdviseHugePages(memory.range(), HugePages::kPrefer).ok());
  EXPECT_TRUE(HasVmFlag(memory.page(0), "hg"));
  ASSERT_TRUE(kernel.AdviseHugePages(memory.part(0, kPagesPerHugePage), HugePages::kAvoid).ok());
  EXPECT_TRUE(HasVmFlag(memory.page(0), "nh"));
  EXPECT_TRUE(HasVmFlag(memory.page(kPagesPerHugePage), "hg"));
}

TEST(LinuxKernelTest, GuardsTrapAndDropContent) {
  LinuxKernel kernel;
  if (!kernel.features().guard_regions) GTEST_SKIP() << "this kernel has no guard regions";
  const Reservation memory(kernel, 4, Protection::kReadWrite);
  Fill(memory.range(), 9);
  const std::string size_before = SmapsLine(memory.page(0), "Size");
  ASSERT_TRUE(kernel.InstallGuard(memory.part(1, 2)).ok());
  EXPECT_EQ(SmapsLine(memory.page(0), "Size"), size_before) << "a guard must not split the VMA";
  EXPECT_FALSE(CanRead(memory.page(1)));
  EXPECT_FALSE(CanWrite(memory.page(2)));
  EXPECT_TRUE(IsFilledWith(memory.part(0, 1), 9));
  EXPECT_TRUE(IsFilledWith(memory.part(3, 1), 9));
  // Guards outlive a discard.
  ASSERT_TRUE(kernel.Discard({{memory.range()}}).ok());
  EXPECT_FALSE(CanRead(memory.page(1)));
  ASSERT_TRUE(kernel.RemoveGuard(memory.part(1, 2)).ok());
  EXPECT_TRUE(IsFilledWith(memory.range(), 0));
}

TEST(LinuxKernelTest, GuardsAreUnsupportedWhereSwitchedOff) {
  LinuxKernel kernel(Without(&Features::guard_regions));
  EXPECT_FALSE(kernel.features().guard_regions);
  const Reservation memory(kernel, 2, Protection::kReadWrite);
  EXPECT_EQ(kernel.InstallGuard(memory.range()).code, ErrorCode::kUnsupported);
  EXPECT_EQ(kernel.RemoveGuard(memory.range()).code, ErrorCode::kUnsupported);
  EXPECT_TRUE(CanWrite(memory.page(0)));
}

TEST(LinuxKernelTest, GuardsAreUnsupportedOnceRefused) {
  LinuxKernel probed;
  LinuxKernel unprobed;
  if (!probed.features().guard_regions) GTEST_SKIP() << "this kernel has no guard regions";
  const SyscallMatch guard_install = {.number = SYS_madvise, .argument = {{2, kMadvGuardInstall}}};
  for (LinuxKernel* kernel : {&probed, &unprobed}) {
    for (const int refusal : {EPERM, ENOSYS, EINVAL}) {
      EXPECT_TRUE(PassesInChild([&] {
        const Reservation memory(*kernel, 2, Protection::kReadWrite);
        RefuseSyscall(guard_install, refusal);
        CHILD_CHECK(kernel->InstallGuard(memory.range()).code == ErrorCode::kUnsupported);
        CHILD_CHECK(CanWrite(memory.page(0)));
        // EINVAL after a successful probe is about these pages, not about the kernel.
        const bool remembers = refusal != EINVAL || kernel == &unprobed;
        CHILD_CHECK(kernel->features().guard_regions == !remembers);
        ::_exit(0);
      }));
    }
  }
}

// qemu-user and other emulators say yes to every advice.
TEST(LinuxKernelTest, AGuardThatDoesNotTrapIsNoGuard) {
  LinuxKernel kernel;
  EXPECT_TRUE(PassesInChild([&] {
    RefuseSyscall({.number = SYS_madvise, .argument = {{2, kMadvGuardInstall}}}, 0);
    CHILD_CHECK(!kernel.features().guard_regions);
  }));
}

TEST(LinuxKernelTest, LockedMemoryCannotHaveGuardsButOtherMemoryCan) {
  LinuxKernel kernel;
  if (!kernel.features().guard_regions) GTEST_SKIP() << "this kernel has no guard regions";
  const Reservation memory(kernel, 2, Protection::kReadWrite);
  ASSERT_TRUE(LockInMemory(memory.part(0, 1)));
  EXPECT_EQ(kernel.InstallGuard(memory.part(0, 1)).code, ErrorCode::kUnsupported);
  EXPECT_TRUE(kernel.InstallGuard(memory.part(1, 1)).ok());
  EXPECT_TRUE(kernel.features().guard_regions);
}

TEST(LinuxKernelTest, CountsResidentPagesOfLongRanges) {
  LinuxKernel kernel;
  // Several mincore chunks, the last one partial; a page at each border.
  const Reservation memory(kernel, 2 * 4096 + 10, Protection::kReadWrite);
  ASSERT_TRUE(kernel.AdviseHugePages(memory.range(), HugePages::kAvoid).ok());
  EXPECT_EQ(*kernel.CountResident(memory.range()), Pages{0});
  for (const std::size_t page : {0, 4095, 4096, 8191, 8192, 8201})
    *memory.page(page) = std::byte{1};
  EXPECT_EQ(*kernel.CountResident(memory.range()), Pages{6});
  EXPECT_EQ(*kernel.CountResident(memory.part(1, 4095)), Pages{1});
  EXPECT_EQ(*kernel.CountResident(memory.part(1, 4094)), Pages{0});
}

// ---- TouchForWrite, Zero ----

TEST(LinuxKernelTest, LocksWithoutPopulatingAndJoinsAgain) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 16, Protection::kReadWrite);
  Fill(memory.part(4, 1), 9);
  const std::string size = SmapsLine(memory.page(0), "Size");
  if (!kernel.LockMemory(memory.part(4, 4)).ok()) GTEST_SKIP() << "memory cannot be locked here";
  EXPECT_TRUE(HasVmFlag(memory.page(4), "lo"));
  EXPECT_FALSE(HasVmFlag(memory.page(0), "lo"));
  EXPECT_FALSE(HasVmFlag(memory.page(8), "lo"));
  EXPECT_EQ(*kernel.CountResident(memory.range()), Pages{1});
  EXPECT_TRUE(IsFilledWith(memory.part(4, 1), 9));
  EXPECT_TRUE(kernel.UnlockMemory(memory.part(2, 8)).ok());
  EXPECT_FALSE(HasVmFlag(memory.page(4), "lo"));
  EXPECT_EQ(SmapsLine(memory.page(4), "Size"), size) << "one VMA again";
  ASSERT_TRUE(kernel.LockMemory(memory.part(4, 4)).ok());
  ASSERT_TRUE(kernel.Reset(memory.part(0, 8)).ok());
  EXPECT_FALSE(HasVmFlag(memory.page(4), "lo")) << "a reset unlocks";
}

TEST(LinuxKernelTest, MovesPagesAndLeavesTheSourceMapped) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 64, Protection::kReadWrite);
  Fill(memory.part(4, 4), 9);
  Fill(memory.part(32, 8), 1);
  ASSERT_TRUE(kernel.Move(memory.part(2, 8), memory.part(32, 8)).ok());
  EXPECT_TRUE(IsFilledWith(memory.part(34, 4), 9));
  EXPECT_TRUE(IsFilledWith(memory.part(32, 2), 0));
  EXPECT_TRUE(IsFilledWith(memory.part(2, 8), 0)) << "mapped, and empty";
  EXPECT_TRUE(CanWrite(memory.page(4)));
  // A reset, and all is one VMA again.
  ASSERT_TRUE(kernel.Reset(memory.part(32, 8)).ok());
  ASSERT_TRUE(kernel.Protect(memory.range(), Protection::kReadWrite).ok());
  EXPECT_EQ(SmapsLine(memory.page(0), "Size"), SmapsLine(memory.page(63), "Size"));
  EXPECT_NE(SmapsLine(memory.page(33), "Size").find("256 kB"), std::string::npos);
}

TEST(LinuxKernelTest, AMoveThatFailsLeavesNoHole) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 64, Protection::kReadWrite);
  Fill(memory.range(), 9);
  const PageRange gone = *kernel.Reserve(Pages{8}, Pages{1});
  ASSERT_TRUE(kernel.Release(gone).ok());
  EXPECT_EQ(kernel.Move(gone, memory.part(32, 8)), Error::System(EFAULT));
  EXPECT_TRUE(IsFilledWith(memory.part(0, 32), 9));
  EXPECT_TRUE(IsFilledWith(memory.part(40, 24), 9));
  EXPECT_TRUE(kernel.CountResident(memory.range()).ok()) << "no hole";
  EXPECT_FALSE(CanRead(memory.page(32)));
}

TEST(LinuxKernelTest, CopyLeavesPagesOfZeroesOut) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 16, Protection::kReadWrite);
  Fill(memory.part(1, 1), 9);
  memory.page(3)[kPageSize - 1] = std::byte{7};
  (void)*static_cast<volatile std::byte*>(memory.page(4));
  kernel.Copy(memory.part(0, 8), memory.part(8, 8));
  EXPECT_TRUE(IsFilledWith(memory.part(9, 1), 9));
  EXPECT_EQ(memory.page(11)[kPageSize - 1], std::byte{7});
  std::vector<std::uint8_t> resident(8);
  ASSERT_TRUE(kernel.QueryResident(memory.part(8, 8), absl::MakeSpan(resident)).ok());
  EXPECT_EQ(resident, (std::vector<std::uint8_t>{0, 1, 0, 1, 0, 0, 0, 0}));
}

TEST(LinuxKernelTest, TheLockLimitIsToldAsAnError) {
  EXPECT_TRUE(PassesInChild([] {
    LinuxKernel kernel;
    const PageRange range = *kernel.Reserve(Pages{64}, Pages{1});
    CHILD_CHECK(kernel.Protect(range, Protection::kReadWrite).ok());
    // Without the privilege, which root has.
    if (geteuid() == 0) CHILD_CHECK(setresuid(65534, 65534, 65534) == 0);
    const rlimit limit = {16 * kPageSize, 16 * kPageSize};
    CHILD_CHECK(setrlimit(RLIMIT_MEMLOCK, &limit) == 0);
    CHILD_CHECK(kernel.LockMemory(Part(range, 0, 16)).ok());
    CHILD_CHECK(kernel.LockMemory(Part(range, 16, 1)) == Error::System(ENOMEM));
    CHILD_CHECK(kernel.UnlockMemory(range).ok());
    CHILD_CHECK(kernel.LockMemory(Part(range, 16, 1)).ok());
    const rlimit none = {0, 0};
    CHILD_CHECK(setrlimit(RLIMIT_MEMLOCK, &none) == 0);
    CHILD_CHECK(kernel.LockMemory(Part(range, 32, 1)) == Error::System(EPERM));
  }));
}

TEST(LinuxKernelTest, SaysWhichPagesAreResident) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 8, Protection::kReadWrite);
  for (const std::size_t page : {1, 2, 6}) *memory.page(page) = std::byte{1};
  std::vector<std::uint8_t> resident(8, 0xff);
  ASSERT_TRUE(kernel.QueryResident(memory.range(), absl::MakeSpan(resident)).ok());
  EXPECT_EQ(resident, (std::vector<std::uint8_t>{0, 1, 1, 0, 0, 0, 1, 0}));
  ASSERT_TRUE(kernel.QueryResident(memory.part(2, 2), absl::MakeSpan(resident)).ok());
  EXPECT_EQ(resident, (std::vector<std::uint8_t>{1, 0, 1, 0, 0, 0, 1, 0})) << "two bytes only";
}

TEST(LinuxKernelTest, ReclaimHintsLeaveTheVmaInOnePiece) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 16, Protection::kReadWrite);
  Fill(memory.range(), 9);
  const std::string flags = SmapsLine(memory.page(0), "VmFlags");
  for (const ReclaimHint hint : {ReclaimHint::kCold, ReclaimHint::kPageOut, ReclaimHint::kFree}) {
    EXPECT_EQ(kernel.AdviseReclaim(memory.part(4, 4), hint), Error::Ok());
    for (const std::size_t page : {0, 4, 8}) {
      EXPECT_EQ(SmapsLine(memory.page(page), "Size"), SmapsLine(memory.page(0), "Size"));
      EXPECT_EQ(SmapsLine(memory.page(page), "VmFlags"), flags);
    }
  }
  EXPECT_TRUE(IsFilledWith(memory.part(0, 4), 9));
  EXPECT_TRUE(IsFilledWith(memory.part(8, 8), 9));
  // Each page that may go is the old one or zero; once written it stays.
  Fill(memory.part(5, 1), 7);
  for (const std::size_t page : {4, 6, 7}) {
    EXPECT_TRUE(IsFilledWith(memory.part(page, 1), 9) || IsFilledWith(memory.part(page, 1), 0));
  }
  EXPECT_TRUE(IsFilledWith(memory.part(5, 1), 7));
}

TEST(LinuxKernelTest, ReclaimHintsAreRefusedForLockedMemory) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 4, Protection::kReadWrite);
  if (!LockInMemory(memory.part(0, 2))) GTEST_SKIP() << "memory cannot be locked here";
  for (const ReclaimHint hint : {ReclaimHint::kCold, ReclaimHint::kPageOut, ReclaimHint::kFree}) {
    EXPECT_EQ(kernel.AdviseReclaim(memory.part(0, 2), hint), Error::System(EINVAL));
    EXPECT_EQ(kernel.AdviseReclaim(memory.part(2, 2), hint), Error::Ok());
  }
}

TEST(LinuxKernelTest, TouchForWriteMakesPagesPresentAndKeepsContent) {
  LinuxKernel kernel;
  const Reservation memory(kernel, kPagesPerHugePage + 2, Protection::kReadWrite);
  ASSERT_TRUE(kernel.AdviseHugePages(memory.range(), HugePages::kAvoid).ok());
  Fill(memory.part(0, 2), 9);
  // Read faults map the zero page: present, but not writable without another fault.
  ASSERT_TRUE(IsFilledWith(memory.part(2, 8), 0));
  kernel.TouchForWrite(memory.part(0, kPagesPerHugePage));
  EXPECT_EQ(*kernel.CountResident(memory.range()), Pages{kPagesPerHugePage});
  EXPECT_TRUE(IsFilledWith(memory.part(0, 2), 9));
  EXPECT_TRUE(IsFilledWith(memory.part(2, kPagesPerHugePage), 0));
  // Not the shared zero page, which the last line has mapped behind the touched pages.
  const std::string anonymous = SmapsLine(memory.page(0), "Anonymous");
  EXPECT_NE(anonymous.find(" 2048 kB"), std::string::npos) << anonymous;
}

TEST(LinuxKernelTest, TouchForWriteLosesNoConcurrentWrite) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 1, Protection::kReadWrite);
  // The counter shares the touched byte.
  auto* counter = new (memory.page(0)) std::atomic<std::uint32_t>(0);
  constexpr std::uint32_t kIncrements = 3'000'000;
  std::atomic<bool> done{false};
  std::thread writer([&] {
    for (std::uint32_t i = 0; i < kIncrements; ++i) {
      counter->fetch_add(1, std::memory_order_relaxed);
    }
    done = true;
  });
  while (!done) kernel.TouchForWrite(memory.range());
  writer.join();
  EXPECT_EQ(counter->load(), kIncrements);
}

TEST(LinuxKernelTest, ZeroFillsJustTheRange) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 20, Protection::kReadWrite);
  Fill(memory.range(), 9);
  kernel.Zero(memory.part(1, 1));
  kernel.Zero(memory.part(3, 16));
  EXPECT_TRUE(IsFilledWith(memory.part(0, 1), 9));
  EXPECT_TRUE(IsFilledWith(memory.part(1, 1), 0));
  EXPECT_TRUE(IsFilledWith(memory.part(2, 1), 9));
  EXPECT_TRUE(IsFilledWith(memory.part(3, 16), 0));
  EXPECT_TRUE(IsFilledWith(memory.part(19, 1), 9));
}

// ---- Time and CPUs ----

TEST(LinuxKernelTest, NowIsTheMonotonicClock) {
  LinuxKernel kernel;
  timespec before;
  timespec after;
  ASSERT_EQ(::clock_gettime(CLOCK_MONOTONIC, &before), 0);
  const Nanoseconds now = kernel.Now();
  ASSERT_EQ(::clock_gettime(CLOCK_MONOTONIC, &after), 0);
  const auto value = [](const timespec& t) {
    return static_cast<std::uint64_t>(t.tv_sec) * 1'000'000'000 +
           static_cast<std::uint64_t>(t.tv_nsec);
  };
  EXPECT_LE(value(before), now.value);
  EXPECT_LE(now.value, value(after));
}

TEST(LinuxKernelTest, CurrentCpuIsWhereTheThreadWasPinned) {
  LinuxKernel kernel;
  cpu_set_t allowed;
  ASSERT_EQ(::sched_getaffinity(0, sizeof(allowed), &allowed), 0);
  std::thread([&] {
    for (unsigned cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      ASSERT_EQ(::sched_setaffinity(0, sizeof(one), &one), 0);
      EXPECT_EQ(kernel.CurrentCpu(), cpu);
      EXPECT_LT(cpu, kernel.CpuCount());
    }
  }).join();
}

TEST(LinuxKernelTest, CpuCountCoversOnlineAndAllowedCpus) {
  LinuxKernel kernel;
  EXPECT_GE(kernel.CpuCount(), std::thread::hardware_concurrency());
  EXPECT_LE(kernel.CpuCount(), LinuxKernel::kMaxCpus);
  EXPECT_EQ(kernel.CpuCount(), LinuxKernel().CpuCount());
  // A sandbox without /sys.
  cpu_set_t allowed;
  ASSERT_EQ(::sched_getaffinity(0, sizeof(allowed), &allowed), 0);
  unsigned end = CPU_SETSIZE;
  while (!CPU_ISSET(end - 1, &allowed)) --end;
  EXPECT_TRUE(PassesInChild([end] {
    RefuseSyscall({.number = SYS_openat}, EACCES);
    CHILD_CHECK(LinuxKernel().CpuCount() == end);
    RefuseSyscall({.number = SYS_sched_getaffinity}, EPERM);
    CHILD_CHECK(LinuxKernel().CpuCount() == 1);
  }));
}

// ---- Features, errno, rule (d) ----

TEST(LinuxKernelTest, FeaturesSwitchedOffAreNotThere) {
  const LinuxKernel kernel{Features{}};
  const Features features = kernel.features();
  EXPECT_FALSE(features.guard_regions);
  EXPECT_FALSE(features.vectored_discard);
  EXPECT_FALSE(features.userfaultfd);
  EXPECT_FALSE(features.huge_pages);
  EXPECT_FALSE(features.membarrier);
}

TEST(LinuxKernelTest, ThreadsThatProbeTogetherAgree) {
  const Features expected = LinuxKernel().features();
  for (int round = 0; round < 20; ++round) {
    LinuxKernel kernel;
    std::atomic<int> agreeing{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&] {
        const Features found = kernel.features();
        agreeing += found.guard_regions == expected.guard_regions &&
                    found.vectored_discard == expected.vectored_discard &&
                    found.userfaultfd == expected.userfaultfd &&
                    found.huge_pages == expected.huge_pages &&
                    found.membarrier == expected.membarrier;
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(agreeing.load(), 4);
  }
}

// A sandbox may kill for a system call that it does not expect: nobody makes it before it is
// needed.
TEST(LinuxKernelTest, OperationsTryOnlyTheFeatureThatTheyNeed) {
  EXPECT_TRUE(PassesInChild([] {
    KillOnSyscall({.number = SYS_userfaultfd});
    KillOnSyscall({.number = SYS_membarrier});
    LinuxKernel kernel;
    const Reservation memory(kernel, 4, Protection::kReadWrite);
    (void)kernel.InstallGuard(memory.part(1, 1));
    const std::vector<PageRange> ranges = {memory.part(0, 1), memory.part(2, 1)};
    CHILD_CHECK(kernel.Discard(ranges).ok());
    KillOnSyscall({.number = kSysProcessMadvise});
    LinuxKernel single;
    CHILD_CHECK(single.Discard({{memory.part(0, 1)}}).ok());
    ::_exit(0);
  }));
}

// Every operation once, on a kernel whose features are still to be tried.
std::vector<std::pair<const char*, std::function<void()>>> AllOperations(LinuxKernel& kernel,
                                                                         PageRange range) {
  return {
      {"Reserve",
       [&kernel] {
         const Result<PageRange> reserved = kernel.Reserve(Pages{2}, Pages{2});
         if (reserved.ok()) (void)kernel.Release(*reserved);
       }},
      {"Protect", [&kernel, range] { (void)kernel.Protect(range, Protection::kReadWrite); }},
      {"TouchForWrite", [&kernel, range] { kernel.TouchForWrite(range); }},
      {"Zero", [&kernel, range] { kernel.Zero(range); }},
      {"Discard one", [&kernel, range] { (void)kernel.Discard({{range}}); }},
      {"Discard many",
       [&kernel, range] {
         (void)kernel.Discard({{Part(range, 0, 1), Part(range, 2, 1)}});
       }},
      {"AdviseHugePages",
       [&kernel, range] { (void)kernel.AdviseHugePages(range, HugePages::kAvoid); }},
      {"InstallGuard", [&kernel, range] { (void)kernel.InstallGuard(range); }},
      {"RemoveGuard", [&kernel, range] { (void)kernel.RemoveGuard(range); }},
      {"CountResident", [&kernel, range] { (void)kernel.CountResident(range); }},
      {"Move",
       [&kernel, range] {
         (void)kernel.Move(Part(range, 0, 1), Part(range, 1, 1));
         (void)kernel.Reset(Part(range, 1, 1));
         (void)kernel.Protect(range, Protection::kReadWrite);
       }},
      {"Copy", [&kernel, range] { kernel.Copy(Part(range, 0, 1), Part(range, 2, 1)); }},
      {"LockMemory", [&kernel, range] { (void)kernel.LockMemory(range); }},
      {"UnlockMemory", [&kernel, range] { (void)kernel.UnlockMemory(range); }},
      {"QueryResident",
       [&kernel, range] {
         std::vector<std::uint8_t> resident(range.count().value);
         (void)kernel.QueryResident(range, absl::MakeSpan(resident));
       }},
      {"AdviseReclaim",
       [&kernel, range] { (void)kernel.AdviseReclaim(range, ReclaimHint::kCold); }},
      {"Advise", [&kernel, range] { (void)kernel.Advise(range, MADV_NORMAL); }},
      {"Reset", [&kernel, range] { (void)kernel.Reset(range); }},
      // Files: refused, with the range left as it is or reset.
      {"IdentifyFile", [&kernel] { (void)kernel.IdentifyFile(-1); }},
      {"InspectFile", [&kernel] { (void)kernel.InspectFile(-1); }},
      {"MapFile", [&kernel, range] { (void)kernel.MapFile(range, {}); }},
      {"ReplaceByFile", [&kernel, range] { (void)kernel.ReplaceByFile(range, {}); }},
      {"ExtendFile", [&kernel, range] { (void)kernel.ExtendFile({range.end - Pages{1}, range.end}); }},
      {"MoveFile",
       [&kernel, range] { (void)kernel.MoveFile(Part(range, 0, 1), Part(range, 2, 2)); }},
      {"Sync", [&kernel, range] { (void)kernel.Sync(range, {}); }},
      {"FaultIn", [&kernel, range] { (void)kernel.FaultIn(range, Access::kRead); }},
  };
}

TEST(LinuxKernelTest, KeepsErrno) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 4, Protection::kReadWrite);
  for (const auto& [name, operation] : AllOperations(kernel, memory.range())) {
    errno = 4711;
    operation();
    EXPECT_EQ(errno, 4711) << name;
  }
  errno = 4711;
  (void)kernel.features();
  (void)kernel.Now();
  (void)kernel.CurrentCpu();
  (void)kernel.CpuCount();
  EXPECT_EQ(errno, 4711);
  // Calls that fail, too.
  const PageRange beyond = PageRange::Of(PageNumber{std::size_t{1} << 50}, Pages{1});
  EXPECT_FALSE(kernel.Release(beyond).ok());
  EXPECT_FALSE(kernel.Protect(beyond, Protection::kRead).ok());
  EXPECT_FALSE(kernel.Reset(beyond).ok());
  EXPECT_FALSE(kernel.Discard({{beyond}}).ok());
  EXPECT_FALSE(kernel.AdviseHugePages(beyond, HugePages::kAvoid).ok());
  EXPECT_FALSE(kernel.CountResident(beyond).ok());
  EXPECT_FALSE(kernel.Reserve(Pages{std::size_t{1} << 44}, Pages{1}).ok());
  EXPECT_EQ(errno, 4711);
}

#if defined(FREEHOLD_DEBUG_CHECKS)
std::atomic<int> violations{0};

TEST(LinuxKernelTest, EveryOperationRefusesToRunUnderAShortLock) {
  LinuxKernel kernel;
  const Reservation memory(kernel, 4, Protection::kReadWrite);
  const auto operations = AllOperations(kernel, memory.range());
  sync::SetRankViolationHandlerForTest([](auto...) { ++violations; });
  const int lock = 0;
  sync::AcquireRank(sync::LockRank::kRegion, &lock, sync::RankCheck::kOrdered,
                    sync::AcquisitionSite::Here());
  std::vector<std::string> unchecked;
  for (const auto& [name, operation] : operations) {
    violations = 0;
    operation();
    if (violations == 0) unchecked.push_back(name);
  }
  // Where am I and what time is it may be asked anywhere.
  violations = 0;
  (void)kernel.Now();
  (void)kernel.CurrentCpu();
  EXPECT_EQ(violations, 0);
  sync::ReleaseRank(&lock);
  sync::SetRankViolationHandlerForTest(nullptr);
  EXPECT_EQ(unchecked, std::vector<std::string>());
}
#endif

}  // namespace
}  // namespace freehold::vm::os
