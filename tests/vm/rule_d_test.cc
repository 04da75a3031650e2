// DESIGN §4, rule (d): under a region's tree lock there is no system call, no page touch, no wait and no
// allocation of metadata. Every entry that could break it refuses to be called under a short lock, and all verbs
// run without ever being refused.
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/file_fixture.h"
#include "tests/vm/space_fixture.h"
#include "vm/address_space.h"
#include "vm/metadata_arena.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"
#include "vm/purge_stage.h"
#include "vm/sync/lock_rank.h"
#include "vm/sync/parking.h"
#include "vm/sync/range_lock.h"
#include "vm/sync/spin_lock.h"

namespace freehold::vm {
namespace {

#if !defined(FREEHOLD_DEBUG_CHECKS)

TEST(RuleDTest, IsCheckedInDebugBuildsOnly) { GTEST_SKIP() << "this build does not check lock ranks"; }

#else

using namespace test;  // NOLINT: the fixture's words
using os::FakeKernel;
using os::LinuxKernel;
using os::Protection;
using sync::LockRank;
using sync::SpinLock;
using sync::SpinLockHolder;

constexpr const char* kMessage = "while holding the short lock kRegion";

class RuleDDeathTest : public testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }

  // `call` stops the program under a lock ranked kRegion, and does not without.
  void ExpectRefused(const char* name, const std::function<void()>& call) {
    SCOPED_TRACE(name);
    call();
    EXPECT_DEATH(
        {
          SpinLockHolder holder(tree_lock_);
          call();
        },
        kMessage);
  }

  SpinLock tree_lock_{LockRank::kRegion};
};

void ExpectKernelRefuses(os::Kernel& kernel,
                         const std::function<void(const char*, const std::function<void()>&)>& expect) {
  const Result<PageRange> reserved = kernel.Reserve({64}, {1});
  ASSERT_TRUE(reserved.ok());
  const PageRange range = *reserved;
  const PageRange part = Part(range, 8, 4);
  const PageRange two[] = {Part(range, 0, 1), Part(range, 4, 1)};
  expect("Protect", [&] { (void)kernel.Protect(range, Protection::kReadWrite); });
  expect("Reserve", [&] {
    const Result<PageRange> more = kernel.Reserve({1}, {1});
    if (more.ok()) (void)kernel.Release(*more);
  });
  expect("Discard", [&] { (void)kernel.Discard({&part, 1}); });
  expect("Discard of two", [&] { (void)kernel.Discard(two); });
  expect("AdviseHugePages", [&] { (void)kernel.AdviseHugePages(part, os::HugePages::kAvoid); });
  expect("InstallGuard", [&] { (void)kernel.InstallGuard(part); });
  expect("RemoveGuard", [&] { (void)kernel.RemoveGuard(part); });
  expect("Move", [&] { (void)kernel.Move(Part(range, 2, 1), Part(range, 5, 1)); });
  expect("Copy", [&] { kernel.Copy(Part(range, 2, 1), Part(range, 6, 1)); });
  expect("LockMemory", [&] { (void)kernel.LockMemory(part); });
  expect("UnlockMemory", [&] { (void)kernel.UnlockMemory(part); });
  expect("CountResident", [&] { (void)kernel.CountResident(part); });
  expect("QueryResident", [&] {
    std::uint8_t resident[4];
    (void)kernel.QueryResident(part, absl::MakeSpan(resident));
  });
  expect("Advise", [&] { (void)kernel.Advise(part, MADV_NORMAL); });
  expect("AdviseReclaim", [&] { (void)kernel.AdviseReclaim(part, os::ReclaimHint::kCold); });
  expect("TouchForWrite", [&] { kernel.TouchForWrite(part); });
  expect("Zero", [&] { kernel.Zero(part); });
  const NumberedFile file(4);
  const os::FileView view = {.descriptor = file.fd()};
  const PageRange mapped = Part(range, 16, 2);
  expect("IdentifyFile", [&] { (void)kernel.IdentifyFile(file.fd()); });
  expect("InspectFile", [&] { (void)kernel.InspectFile(file.fd()); });
  expect("MapFile", [&] { (void)kernel.MapFile(mapped, view); });
  expect("ReplaceByFile", [&] { (void)kernel.ReplaceByFile(mapped, view); });
  expect("ExtendFile", [&] { (void)kernel.ExtendFile(Part(range, 18, 1)); });
  expect("MoveFile", [&] { (void)kernel.MoveFile(mapped, Part(range, 20, 2)); });
  expect("Sync", [&] { (void)kernel.Sync(mapped, {}); });
  expect("FaultIn", [&] { (void)kernel.FaultIn(mapped, os::Access::kRead); });
  expect("Reset", [&] { (void)kernel.Reset(part); });
  std::size_t released = 32;
  expect("Release", [&] { (void)kernel.Release(Part(range, released++, 1)); });
  // What the header declares free is free.
  SpinLock tree_lock(LockRank::kRegion);
  SpinLockHolder holder(tree_lock);
  (void)kernel.Now();
  (void)kernel.CurrentCpu();
  (void)kernel.CpuCount();
  (void)kernel.features();
}

TEST_F(RuleDDeathTest, EveryKernelEntryRefuses) {
  LinuxKernel kernel;
  ExpectKernelRefuses(kernel, [this](const char* name, const std::function<void()>& call) {
    ExpectRefused(name, call);
  });
}

TEST_F(RuleDDeathTest, EveryFakeKernelEntryRefuses) {
  FakeKernel kernel;
  ExpectKernelRefuses(kernel, [this](const char* name, const std::function<void()>& call) {
    ExpectRefused(name, call);
  });
}

// Also where this very allocation would need no system call: the next one may.
TEST_F(RuleDDeathTest, TheMetadataArenaRefuses) {
  LinuxKernel kernel;
  MetadataArena* arena = *MetadataArena::Create(kernel, {1024});
  ExpectRefused("Allocate", [&] { (void)arena->Allocate({8}, 8); });
  MetadataArena::Destroy(arena);
}

TEST_F(RuleDDeathTest, WaitingRefuses) {
  ExpectRefused("Park", [] {
    sync::Parker parker;
    parker.Unpark();
    parker.Park();
  });
  for (const sync::LockPolicy policy :
       {sync::LockPolicy::kAdaptive, sync::LockPolicy::kTree, sync::LockPolicy::kCoarse}) {
    sync::RangeLock lock(policy);
    const PageRange range = {{1}, {5}};
    SpinLockHolder holder(tree_lock_);
    EXPECT_DEATH((sync::RangeLock::Guard(lock, range, sync::RangeLock::Mode::kShared, sync::Operation::kTest)),
                 "rank out of order");
  }
}

TEST_F(RuleDDeathTest, ThePurgeStageRefuses) {
  LinuxKernel kernel;
  PurgeStage stage(kernel);
  const PageRange range = *kernel.Reserve({8}, {1});
  SpinLockHolder holder(tree_lock_);
  EXPECT_DEATH((void)stage.Discard({&range, 1}), "lock order");
  EXPECT_DEATH((void)stage.DiscardNow({&range, 1}), "lock order");
}

TEST_F(RuleDDeathTest, EveryVerbRefuses) {
  LinuxKernel kernel;
  TestSpace space(kernel);
  const PageRange range = MustMap(*space, 8);
  SpinLockHolder holder(tree_lock_);
  EXPECT_DEATH((void)space->Map({8}), "lock order");
  EXPECT_DEATH((void)space->Map({8}, At(range.first, Placement::kReplace)), "lock order");
  EXPECT_DEATH((void)space->Unmap(range), "lock order");
  EXPECT_DEATH((void)space->Protect(range, Protection::kRead), "lock order");
  EXPECT_DEATH((void)space->Populate(range), "lock order");
  EXPECT_DEATH((void)space->Discard({&range, 1}), "lock order");
  EXPECT_DEATH((void)space->Remap(range, {16}), "lock order");
  EXPECT_DEATH((void)space->Remap(range, {8}, {.placement = Placement::kFixed, .address = range.end.address()}),
               "lock order");
  EXPECT_DEATH((void)space->LockMemory(range), "lock order");
  EXPECT_DEATH((void)space->UnlockMemory(range), "lock order");
  EXPECT_DEATH((void)space->Advise(range, Advice::kDontNeed), "lock order");
  EXPECT_DEATH((void)space->MapFile({8}, {}), "lock order");
  EXPECT_DEATH(space->PrepareFork(), "lock order");
}

// ---- All verbs are clean ----

std::atomic<int> violations{0};

struct Config {
  const char* name;
  sync::LockPolicy policy;
  bool strict_unmap;
};

class CleanTest : public testing::TestWithParam<Config> {
 protected:
  void SetUp() override {
    violations.store(0);
    sync::SetRankViolationHandlerForTest([](const char* message) {
      violations.fetch_add(1);
      std::fprintf(stderr, "%s\n", message);
    });
  }
  void TearDown() override {
    sync::SetRankViolationHandlerForTest(nullptr);
    EXPECT_EQ(violations.load(), 0);
  }
};

TEST_P(CleanTest, AllVerbs) {
  FakeKernel kernel;
  AddressSpaceOptions options = SmallOptions(GetParam().policy);
  options.strict_unmap = GetParam().strict_unmap;
  options.free_resident_limit = MiB(1);
  options.decay = Milliseconds(1);
  TestSpace space(kernel, options);
  for (int round = 0; round < 3; ++round) {
    std::vector<PageRange> ranges;
    for (const std::size_t pages : {1, 16, 64, 100, 600}) {
      ranges.push_back(MustMap(*space, pages));
      ranges.push_back(MustMap(*space, pages, {.alignment = {8}, .populate = true}));
      ranges.push_back(MustMap(*space, pages, {.protection = Protection::kRead}));
    }
    for (const PageRange range : ranges) {
      EXPECT_TRUE(space->Lookup(range.first).ok());
      (void)space->Populate(range);
      EXPECT_TRUE(space->Discard({&range, 1}).ok());
      for (const Advice advice : {Advice::kDontNeed, Advice::kWillNeed, Advice::kFree, Advice::kCold}) {
        EXPECT_TRUE(space->Advise(range, advice).ok());
      }
      EXPECT_TRUE(space->Protect(range, Protection::kReadExec).ok());
      const Result<PageRange> remapped = space->Remap(range, {1000}, {.may_move = true});
      EXPECT_TRUE(remapped.ok());
      EXPECT_TRUE(space->Unmap(*remapped).ok());
      MustMapAt(*space, range);
      (void)space->LockMemory(range);
      MustMap(*space, 1, At(range.first, Placement::kReplace));
      MustMap(*space, 1, At(range.first, Placement::kReplace, Protection::kRead));
      EXPECT_TRUE(space->Protect(Part(range, 0, 1), Protection::kReadWrite).ok());
    }
    EXPECT_TRUE(space->Discard(ranges).ok());
    (void)space->LockAll({.current = true, .future = true, .lock = os::MemoryLock::kOnFault});
    (void)space->Map({3});
    (void)space->UnlockAll();
    (void)space->Stats();
    (void)Vmas(*space);
    for (const PageRange range : ranges) EXPECT_TRUE(space->Unmap(range).ok());
    EXPECT_TRUE(space->Unmap(space->reservation()).ok());
    space->PrepareFork();
    space->ParentAfterFork();
    kernel.AdvanceTime(Milliseconds(100));
    space->Tick();
    (void)space->Purge(PurgeScope::kAll);
    space->CheckInvariants();
  }
}

TEST_P(CleanTest, AllVerbsOnFiles) {
  const NumberedFile file(8);
  // From no failure on to one at every call.
  for (std::size_t n = 0; n <= 6; ++n) {
    FakeKernel kernel;
    AddressSpaceOptions options = SmallOptions(GetParam().policy);
    options.strict_unmap = GetParam().strict_unmap;
    options.window_limit = Pages{8}.bytes();
    TestSpace space(kernel, options);
    const PageRange kept = MustMapFile(*space, 4, Of(file, 0, os::Sharing::kShared, Protection::kReadWrite));
    const std::function<void()> verbs[] = {
        [&] {
          const Result<PageRange> range = space->MapFile({3}, Of(file));
          if (range.ok()) (void)space->Unmap(*range);
        },
        [&] { (void)space->MapFile({2}, OfAt(file, Part(kept, 1, 1).first, Placement::kReplace)); },
        [&] { (void)space->Map({1}, At(Part(kept, 2, 1).first, Placement::kReplace)); },
        [&] { (void)space->Populate(Part(kept, 0, 1)); },
        [&] { (void)space->Sync(kept); },
        [&] { (void)space->Protect(kept, Protection::kRead); },
        [&] { (void)space->Remap(Part(kept, 3, 1), {3}); },
        [&] { (void)space->Remap(Part(kept, 0, 1), {2}, {.may_move = true}); },
        [&] { (void)space->Unmap(kept); },
        [&] { (void)space->Purge(PurgeScope::kAll); },
    };
    // Twice: the second time, windows are there.
    for (int round = 0; round < 2; ++round) {
      for (const auto& verb : verbs) {
        if (n != 0) kernel.FailNthOfAny(n, ENOMEM);
        verb();
        kernel.StopFailing();
      }
      space->PrepareFork();
      space->ParentAfterFork();
      space->Tick();
    }
  }
}

// Errors and their way back take the same locks.
TEST_P(CleanTest, FailingVerbs) {
  for (std::size_t n = 1; n <= 6; ++n) {
    FakeKernel kernel;
    AddressSpaceOptions options = SmallOptions(GetParam().policy);
    options.strict_unmap = GetParam().strict_unmap;
    TestSpace space(kernel, options);
    const PageRange range = MustMap(*space, 100, {.populate = true});
    const PageRange other = MustMap(*space, 100, {.protection = Protection::kReadWriteExec});
    const std::function<void()> verbs[] = {
        [&] { (void)space->Map({700}, {.populate = true}); },
        [&] { (void)space->Map({8}, At(Part(range, 4, 1).first, Placement::kReplace, Protection::kRead)); },
        [&] { (void)space->Map({80}, At(Part(range, 4, 1).first, Placement::kReplace)); },
        [&] { (void)space->Protect(Part(range, 10, 3), Protection::kNone); },
        [&] { (void)space->Discard({&range, 1}); },
        [&] { (void)space->Advise(range, Advice::kDontNeed); },
        [&] { (void)space->Remap(Part(range, 90, 10), {100}, {.may_move = true}); },
        [&] { (void)space->Remap(Part(other, 90, 10), {100}, {.may_move = true}); },
        [&] { (void)space->LockMemory(Part(range, 2, 3)); },
        [&] { (void)space->Unmap(Part(range, 1, 3)); },
        [&] { (void)space->Map({3}, {.lock = os::MemoryLock::kOnFault}); },
        [&] { (void)space->Unmap(Part(range, 20, 20)); },
        [&] { (void)space->Unmap(Part(other, 20, 20)); },
        [&] { (void)space->Purge(PurgeScope::kAll); },
        [&] { EXPECT_EQ(space->Map({4 * kSmallRegionPages}).error().code, ErrorCode::kNoRoom); },
    };
    for (const auto& verb : verbs) {
      kernel.FailNthOfAny(n, 12);
      verb();
      kernel.StopFailing();
    }
  }
}

constexpr Config kConfigs[] = {{"adaptive", sync::LockPolicy::kAdaptive, false},
                               {"adaptiveStrict", sync::LockPolicy::kAdaptive, true},
                               {"tree", sync::LockPolicy::kTree, false},
                               {"treeStrict", sync::LockPolicy::kTree, true},
                               {"coarse", sync::LockPolicy::kCoarse, false},
                               {"coarseStrict", sync::LockPolicy::kCoarse, true}};
INSTANTIATE_TEST_SUITE_P(Configs, CleanTest, testing::ValuesIn(kConfigs),
                         [](const testing::TestParamInfo<Config>& info) { return std::string(info.param.name); });

// With as many regions as there can be, the fork hooks hold a range of each.
TEST(RuleDForkTest, ForksWithTheMostRegions) {
  FakeKernel kernel({.cpu_count = 1000});
  AddressSpaceOptions options = SmallOptions();
  options.reserve = GiB(4);
  options.regions_per_zone = 0;
  TestSpace space(kernel, options);
  space->PrepareFork();
  space->ParentAfterFork();
  MustMap(*space, 4);
}

#endif

}  // namespace
}  // namespace freehold::vm
