// LockMemory, UnlockMemory, LockAll, UnlockAll and locked maps: the kernel's locks, populating, limits, what unmaps
// and forks leave.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/address_space.h"
#include "vm/os/check.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"

namespace freehold::vm {
namespace {

using namespace test;  // NOLINT: the fixture's words
using os::FakeKernel;
using os::MemoryLock;
using os::Protection;

class LockMemoryTest : public PolicyTest {
 protected:
  PageRange P(std::size_t first, std::size_t count) const { return Part(space_->reservation(), first, count); }

  // `range` as a line: L locked, O on fault, a dot not locked, a blank not mapped. Checks the kernel's idea of it.
  std::string Locks(PageRange range) const {
    std::string line;
    for (PageNumber page = range.first; page < range.end; page = page + Pages{1}) {
      const Result<VmaInfo> vma = space_->Lookup(page);
      const MemoryLock lock = vma.ok() ? vma->lock : MemoryLock::kNone;
      EXPECT_EQ(kernel_.At(page).locked, lock != MemoryLock::kNone) << "the kernel knows";
      line += !vma.ok() ? ' ' : lock == MemoryLock::kLocked ? 'L' : lock == MemoryLock::kOnFault ? 'O' : '.';
    }
    return line;
  }

  FakeKernel kernel_;
  TestSpace space_{kernel_, Options()};
};

// ---- LockMemory ----

TEST_P(LockMemoryTest, LocksPopulatesAndUnlocks) {
  MustMapAt(*space_, P(0, 8));
  Fill(P(3, 1), 0xaa);
  const std::size_t kernel_vmas = kernel_.KernelVmaCount();
  EXPECT_EQ(space_->LockMemory(P(2, 4)), Error::Ok());
  EXPECT_EQ(Locks(P(0, 8)), "..LLLL..");
  EXPECT_EQ(kernel_.ResidentPages(P(0, 8)), Pages{4});
  EXPECT_TRUE(IsFilledWith(P(3, 1), 0xaa));
  EXPECT_EQ(space_->Stats().vmas, 3u);
  EXPECT_EQ(space_->Stats().heap_splits, 1u);
  EXPECT_EQ(kernel_.KernelVmaCount(), kernel_vmas + 2);
  EXPECT_EQ(space_->UnlockMemory(P(0, 8)), Error::Ok());
  EXPECT_EQ(Locks(P(0, 8)), "........");
  EXPECT_EQ(space_->Stats().vmas, 1u) << "one again";
  EXPECT_EQ(kernel_.KernelVmaCount(), kernel_vmas) << "for the kernel too";
  EXPECT_EQ(space_->Stats().heap_splits, 1u);
}

TEST_P(LockMemoryTest, OnFaultPopulatesNothing) {
  MustMapAt(*space_, P(0, 8));
  EXPECT_EQ(space_->LockMemory(P(0, 8), MemoryLock::kOnFault), Error::Ok());
  EXPECT_EQ(Locks(P(0, 8)), "OOOOOOOO");
  EXPECT_EQ(kernel_.ResidentPages(P(0, 8)), Pages{0});
}

TEST_P(LockMemoryTest, TheKernelIsAskedOnlyForWhatChanges) {
  MustMapAt(*space_, P(0, 8));
  ASSERT_TRUE(space_->LockMemory(P(0, 8), MemoryLock::kOnFault).ok());
  kernel_.ClearCalls();
  EXPECT_EQ(space_->LockMemory(P(0, 8), MemoryLock::kOnFault), Error::Ok());
  EXPECT_EQ(kernel_.CallCount(), 0u);
  EXPECT_EQ(space_->LockMemory(P(0, 4), MemoryLock::kLocked), Error::Ok());
  EXPECT_EQ(Locks(P(0, 8)), "LLLLOOOO");
  EXPECT_EQ(kernel_.CallCount(Operation::kLockMemory), 0u) << "both kinds are one to the kernel";
  EXPECT_EQ(kernel_.ResidentPages(P(0, 8)), Pages{4});
  EXPECT_EQ(space_->UnlockMemory(P(2, 4)), Error::Ok());
  EXPECT_EQ(Locks(P(0, 8)), "LL....OO") << "locks do not nest";
}

TEST_P(LockMemoryTest, AcrossMappingsRegionsAndZones) {
  const std::size_t border = kSmallRegionPages;
  MustMapAt(*space_, P(border - 4, 2));
  MustMapAt(*space_, P(border - 2, 2));
  MustMapAt(*space_, P(border, 4));
  EXPECT_EQ(space_->LockMemory(P(border - 3, 5)), Error::Ok());
  EXPECT_EQ(Locks(P(border - 4, 8)), ".LLLLL..");
  EXPECT_EQ(space_->Stats().heap_splits, 2u) << "one a region";
  const PageRange mapping = MustMap(*space_, 4, {.protection = Protection::kReadExec});
  EXPECT_EQ(space_->LockMemory(Part(mapping, 1, 2)), Error::Ok());
  EXPECT_EQ(Locks(mapping), ".LL.");
  EXPECT_EQ(kernel_.ResidentPages(mapping), Pages{0}) << "nothing to write, nothing to make present";
  EXPECT_EQ(space_->Stats().heap_splits, 2u) << "its kernel VMA was its own";
}

TEST_P(LockMemoryTest, ProtectionsAndLocksMix) {
  MustMapAt(*space_, P(0, 8));
  Fill(P(0, 8), 0xaa);
  ASSERT_TRUE(space_->LockMemory(P(0, 6)).ok());
  ASSERT_TRUE(space_->Protect(P(4, 4), Protection::kRead).ok());
  EXPECT_EQ(Locks(P(0, 8)), "LLLLLL..");
  EXPECT_EQ(Draw(*space_, P(0, 8)), "AAAAaa|aa");
  ASSERT_TRUE(space_->UnlockMemory(P(0, 8)).ok());
  EXPECT_EQ(Draw(*space_, P(0, 8)), "AAAAaaaa");
  EXPECT_TRUE(IsFilledWith(P(0, 8), 0xaa));
}

TEST_P(LockMemoryTest, AHoleIsRefusedAndNothingChanges) {
  MustMapAt(*space_, P(2, 4));
  MustMapAt(*space_, P(8, 4));
  kernel_.ClearCalls();
  for (const PageRange range : {P(2, 5), P(1, 3), P(4, 6), P(6, 2), P(0, 14)}) {
    EXPECT_EQ(space_->LockMemory(range).code, ErrorCode::kNotMapped);
    EXPECT_EQ(space_->UnlockMemory(range).code, ErrorCode::kNotMapped);
  }
  EXPECT_EQ(Locks(P(0, 14)), "  ....  ....  ");
  EXPECT_EQ(kernel_.CallCount(), 0u);
  EXPECT_EQ(space_->Stats().vmas, 2u);
}

TEST_P(LockMemoryTest, RefusesWhatIsNoRangeOfTheSpace) {
  const PageRange all = space_->reservation();
  EXPECT_EQ(space_->LockMemory(P(2, 0)).code, ErrorCode::kEmpty);
  EXPECT_EQ(space_->LockMemory(P(2, 1), MemoryLock::kNone).code, ErrorCode::kEmpty);
  EXPECT_EQ(space_->LockMemory({P(3, 1).first, P(1, 1).first}).code, ErrorCode::kOverflow);
  EXPECT_EQ(space_->LockMemory(PageRange::Of(all.end, {1})).code, ErrorCode::kOutsideReservation);
  EXPECT_EQ(space_->UnlockMemory(P(2, 0)).code, ErrorCode::kEmpty);
  EXPECT_EQ(space_->UnlockMemory({P(3, 1).first, P(1, 1).first}).code, ErrorCode::kOverflow);
  EXPECT_EQ(space_->UnlockMemory(PageRange::Of(all.end, {1})).code, ErrorCode::kOutsideReservation);
}

TEST_P(LockMemoryTest, AboveTheLimitNothingChanges) {
  MustMapAt(*space_, P(0, 12));
  ASSERT_TRUE(space_->LockMemory(P(0, 2)).ok());
  kernel_.FailLockBeyond(Pages{4}.bytes());
  EXPECT_EQ(space_->LockMemory(P(1, 8)), Error::System(ENOMEM));
  EXPECT_EQ(Locks(P(0, 12)), "LL..........");
  EXPECT_EQ(space_->Stats().vmas, 2u);
  EXPECT_EQ(space_->Map({4}, {.lock = MemoryLock::kLocked}).error(), Error::System(ENOMEM));
  EXPECT_EQ(space_->Map({4}, {.protection = Protection::kRead, .lock = MemoryLock::kOnFault}).error(),
            Error::System(ENOMEM));
  EXPECT_EQ(space_->LockAll({.current = true, .future = true}), Error::System(ENOMEM));
  EXPECT_EQ(space_->Lookup(MustMap(*space_, 1).first)->lock, MemoryLock::kNone) << "future maps are as they were";
  EXPECT_EQ(space_->Stats().mapped, Pages{13}.bytes());
  EXPECT_EQ(space_->LockMemory(P(0, 4)), Error::Ok());
}

TEST_P(LockMemoryTest, LockedMemoryIsNotAdvisedAway) {
  MustMapAt(*space_, P(0, 8));
  Fill(P(0, 8), 0xaa);
  ASSERT_TRUE(space_->LockMemory(P(4, 4)).ok());
  for (const Advice advice : {Advice::kFree, Advice::kCold, Advice::kPageOut, Advice::kDontNeed}) {
    EXPECT_EQ(space_->Advise(P(4, 2), advice), Error::System(EINVAL));
  }
  EXPECT_EQ(space_->Advise(P(2, 4), Advice::kDontNeed), Error::System(EINVAL));
  EXPECT_TRUE(IsZero(P(2, 2))) << "what comes before is advised";
  EXPECT_TRUE(IsFilledWith(P(4, 4), 0xaa));
  EXPECT_EQ(space_->Advise(P(4, 2), Advice::kWillNeed), Error::Ok());
  // Discard is the caller's own wish, whatever is locked.
  const PageRange range = P(4, 1);
  EXPECT_EQ(space_->Discard({&range, 1}), Error::Ok());
  EXPECT_TRUE(IsZero(range));
}

// ---- Maps ----

TEST_P(LockMemoryTest, MapsLocked) {
  const PageRange locked = MustMap(*space_, 4, {.lock = MemoryLock::kLocked});
  const PageRange on_fault = MustMap(*space_, 4, {.lock = MemoryLock::kOnFault});
  const PageRange read_only = MustMap(*space_, 4, {.protection = Protection::kRead, .lock = MemoryLock::kLocked});
  EXPECT_EQ(Locks(locked), "LLLL");
  EXPECT_EQ(Locks(on_fault), "OOOO");
  EXPECT_EQ(Locks(read_only), "LLLL");
  EXPECT_EQ(kernel_.ResidentPages(locked), Pages{4});
  EXPECT_EQ(kernel_.ResidentPages(on_fault), Pages{0});
  EXPECT_EQ(space_->Stats().heap_splits, 2u);
  EXPECT_TRUE(IsZero(locked));
}

TEST_P(LockMemoryTest, ReplacementsHaveTheirOwnLock) {
  MustMapAt(*space_, P(0, 8));
  ASSERT_TRUE(space_->LockMemory(P(2, 4)).ok());
  MustMap(*space_, 2, At(P(3, 1).first, Placement::kReplace));
  EXPECT_EQ(Locks(P(0, 10)), "..L..L..  ");
  MapOptions options = At(P(1, 1).first, Placement::kReplace);
  options.lock = MemoryLock::kOnFault;
  MustMap(*space_, 8, options);
  EXPECT_EQ(Locks(P(0, 10)), ".OOOOOOOO ");
  MustMap(*space_, 10, At(P(0, 1).first, Placement::kReplace));
  EXPECT_EQ(Locks(P(0, 10)), "..........");
}

// ---- Unmap ----

TEST_P(LockMemoryTest, UnmapUnlocks) {
  const std::size_t kernel_vmas = [&] {
    MustMapAt(*space_, P(0, 8));
    return kernel_.KernelVmaCount();
  }();
  Fill(P(0, 8), 0xaa);
  ASSERT_TRUE(space_->LockMemory(P(1, 6)).ok());
  EXPECT_TRUE(space_->Unmap(P(2, 2)).ok());
  EXPECT_EQ(Locks(P(0, 8)), ".L  LLL.");
  EXPECT_TRUE(space_->Unmap(P(0, 8)).ok());
  EXPECT_EQ(Locks(P(0, 8)), "        ");
  EXPECT_EQ(kernel_.KernelVmaCount(), kernel_vmas);
  EXPECT_EQ(kernel_.LockedPages(), Pages{0});
  MustMapAt(*space_, P(0, 8));
  EXPECT_EQ(Locks(P(0, 8)), "........");
  EXPECT_TRUE(IsZero(P(0, 8)));
}

TEST_P(LockMemoryTest, UnmapUnlocksInTheMappingZone) {
  for (const Protection protection : {Protection::kNone, Protection::kRead}) {
    const PageRange range = MustMap(*space_, 4, {.protection = protection});
    ASSERT_TRUE(space_->LockMemory(range).ok());
    ASSERT_TRUE(space_->Unmap(range).ok());
    EXPECT_EQ(kernel_.LockedPages(), Pages{0});
  }
}

// The kernel may refuse to unlock. The memory is unmapped all the same, and whoever gets it next gets it unlocked.
TEST_P(LockMemoryTest, WhatCouldNotBeUnlockedIsUnlockedLater) {
  MustMapAt(*space_, P(0, 8));
  ASSERT_TRUE(space_->LockMemory(P(0, 8)).ok());
  kernel_.FailAlways(Operation::kUnlockMemory, ENOMEM);
  EXPECT_EQ(space_->Unmap(P(0, 8)), Error::Ok());
  EXPECT_EQ(kernel_.LockedPages(), Pages{8});
  (void)space_->Purge(PurgeScope::kAll);
  space_->CheckInvariants();
  EXPECT_EQ(space_->Map({8}, At(P(0, 1).first)).error(), Error::System(ENOMEM));
  kernel_.StopFailing();
  MustMapAt(*space_, P(0, 4));
  EXPECT_EQ(kernel_.LockedPages(), Pages{4});
  (void)space_->Purge(PurgeScope::kAll);
  EXPECT_EQ(kernel_.LockedPages(), Pages{0});
  MustMapAt(*space_, P(4, 4));
  EXPECT_EQ(Locks(P(0, 8)), "........");
}

// A verb that fails locks nothing, even where the way back is refused, too: not for good.
TEST_P(LockMemoryTest, AFailedVerbLeavesNoLockBehind) {
  for (const bool purge : {true, false}) {
    MustMapAt(*space_, P(0, 8));
    ASSERT_TRUE(space_->Unmap(P(4, 4)).ok());  // cached, and dirty: its protection is set
    ASSERT_TRUE(space_->LockMemory(P(0, 4)).ok());
    kernel_.FailNth(Operation::kProtect, 1, ENOMEM);
    kernel_.FailNth(Operation::kUnlockMemory, 1, ENOMEM);
    EXPECT_EQ(space_->Remap(P(0, 4), {6}).error(), Error::System(ENOMEM));
    EXPECT_EQ(Locks(P(0, 4)), "LLLL");
    EXPECT_EQ(kernel_.LockedPages(), Pages{6}) << "no more than the kernel kept";
    space_->CheckInvariants();
    ASSERT_TRUE(space_->Unmap(P(0, 4)).ok());
    if (purge) {
      (void)space_->Purge(PurgeScope::kAll);
      EXPECT_EQ(kernel_.LockedPages(), Pages{0});
    }
    MustMapAt(*space_, P(0, 8));
    EXPECT_EQ(Locks(P(0, 8)), "........");
    EXPECT_TRUE(IsZero(P(0, 8)));
    ASSERT_TRUE(space_->Unmap(P(0, 8)).ok());
  }
}

// The same of what is mapped, and stays so.
TEST_P(LockMemoryTest, WhatAFailedLockOfMappedMemoryLeavesGoesWithIt) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(4, 4));
  kernel_.FailLockBeyond(Bytes{0});
  EXPECT_FALSE(space_->LockMemory(P(0, 8)).ok());
  kernel_.StopFailing();
  EXPECT_EQ(Locks(P(0, 8)), "........");
  MapOptions options = At(P(2, 1).first, Placement::kReplace);
  options.lock = MemoryLock::kLocked;
  kernel_.FailNth(Operation::kProtect, 1, ENOMEM);
  kernel_.FailNth(Operation::kUnlockMemory, 1, ENOMEM);
  EXPECT_EQ(space_->Map({4}, options).error(), Error::System(ENOMEM));
  EXPECT_EQ(Draw(*space_, P(0, 8)), "AAAABBBB");
  EXPECT_EQ(kernel_.LockedPages(), Pages{2});
  ASSERT_TRUE(space_->Unmap(P(0, 8)).ok());
  EXPECT_EQ(kernel_.LockedPages(), Pages{0});
}

// ---- LockAll ----

TEST_P(LockMemoryTest, CurrentAndFuture) {
  MustMapAt(*space_, P(0, 4));
  const PageRange mapping = MustMap(*space_, 4, {.protection = Protection::kRead});
  EXPECT_EQ(space_->LockAll({.current = true}), Error::Ok());
  EXPECT_EQ(Locks(P(0, 4)), "LLLL");
  EXPECT_EQ(Locks(mapping), "LLLL");
  EXPECT_EQ(kernel_.ResidentPages(P(0, 4)), Pages{4});
  MustMapAt(*space_, P(4, 2));
  EXPECT_EQ(Locks(P(0, 6)), "LLLL..");
  EXPECT_EQ(space_->LockAll({.future = true, .lock = MemoryLock::kOnFault}), Error::Ok());
  MustMapAt(*space_, P(6, 2));
  EXPECT_EQ(Locks(P(0, 8)), "LLLL..OO");
  EXPECT_EQ(kernel_.ResidentPages(P(4, 4)), Pages{0});
  EXPECT_EQ(space_->LockAll({.current = true, .lock = MemoryLock::kOnFault}), Error::Ok());
  EXPECT_EQ(Locks(P(0, 8)), "OOOOOOOO");
  MustMapAt(*space_, P(8, 2));
  EXPECT_EQ(Locks(P(0, 10)), "OOOOOOOO..") << "the future was taken back";
  EXPECT_EQ(space_->LockAll({.future = true}), Error::Ok());
  EXPECT_EQ(kernel_.ResidentPages(MustMap(*space_, 3)), Pages{3});
  EXPECT_EQ(space_->UnlockAll(), Error::Ok());
  EXPECT_EQ(Locks(P(0, 10)), "..........");
  EXPECT_EQ(Locks(mapping), "....");
  EXPECT_EQ(Locks(MustMap(*space_, 3)), "...");
  EXPECT_EQ(kernel_.LockedPages(), Pages{0});
}

TEST_P(LockMemoryTest, LockAllNeedsSomethingToLock) {
  EXPECT_EQ(space_->LockAll({}).code, ErrorCode::kEmpty);
  EXPECT_EQ(space_->LockAll({.current = true, .lock = MemoryLock::kNone}).code, ErrorCode::kEmpty);
  EXPECT_EQ(space_->LockAll({.current = true, .future = true}), Error::Ok()) << "of an empty space";
}

FREEHOLD_INSTANTIATE_POLICIES(LockMemoryTest);

// ---- On the real kernel ----

// Memory locked by this process, in KiB, as the kernel says.
std::size_t LockedKiB() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmLck:", 0) == 0) return std::stoul(line.substr(6));
  }
  return SIZE_MAX;
}

TEST(LockMemoryLinuxTest, TheKernelLocksJustThat) {
  os::LinuxKernel kernel;
  TestSpace space(kernel);
  const std::size_t before = LockedKiB();
  const PageRange range = MustMap(*space, 16);
  if (!space->LockMemory(Part(range, 4, 8)).ok()) GTEST_SKIP() << "memory cannot be locked here";
  EXPECT_EQ(LockedKiB(), before + 32);
  EXPECT_EQ(*kernel.CountResident(range), Pages{8});
  ASSERT_TRUE(space->Unmap(Part(range, 0, 6)).ok());
  EXPECT_EQ(LockedKiB(), before + 24);
  ASSERT_TRUE(space->Unmap(range).ok());
  EXPECT_EQ(LockedKiB(), before);
}

// The kernel gives the child of a fork no locks, and the child's space knows.
TEST(LockMemoryLinuxTest, TheChildOfAForkHasNoLocks) {
  os::LinuxKernel kernel;
  TestSpace space(kernel);
  const PageRange range = MustMap(*space, 16);
  if (!space->LockMemory(Part(range, 4, 8)).ok()) GTEST_SKIP() << "memory cannot be locked here";
  ASSERT_TRUE(space->LockAll({.future = true, .lock = MemoryLock::kOnFault}).ok());
  Fork(*space, [&] {
    FREEHOLD_CHECK(space->Lookup(Part(range, 4, 1).first)->lock == MemoryLock::kNone);
    FREEHOLD_CHECK(space->Lookup(range.first)->range == range && LockedKiB() == 0);
    FREEHOLD_CHECK(space->Map({4}).ok() && LockedKiB() == 0);
    space->CheckInvariants();
  });
  EXPECT_EQ(space->Lookup(Part(range, 4, 1).first)->lock, MemoryLock::kLocked);
}

TEST(LockMemoryLinuxTest, TheLimitIsTold) {
  // In a child: limits and privileges cannot be taken back.
  const pid_t child = fork();
  if (child == 0) {
    os::LinuxKernel kernel;
    AddressSpace* space = *AddressSpace::Create(kernel, SmallOptions());
    const PageRange range = *space->Map({64});
    if (geteuid() == 0 && setresuid(65534, 65534, 65534) != 0) _exit(2);
    const rlimit limit = {16 * kPageSize, 16 * kPageSize};
    if (setrlimit(RLIMIT_MEMLOCK, &limit) != 0) _exit(3);
    if (!space->LockMemory(Part(range, 0, 16)).ok()) _exit(4);
    if (space->LockMemory(Part(range, 8, 16)) != Error::System(ENOMEM)) _exit(5);
    if (space->Lookup(Part(range, 20, 1).first)->lock != MemoryLock::kNone) _exit(6);
    if (space->Map({4}, {.lock = MemoryLock::kLocked}).error() != Error::System(ENOMEM)) _exit(7);
    if (!space->UnlockMemory(range).ok() || !space->LockMemory(Part(range, 8, 16)).ok()) _exit(8);
    space->CheckInvariants();
    _exit(0);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace freehold::vm
