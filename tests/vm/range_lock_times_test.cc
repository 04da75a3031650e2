// AddressSpace::RangeLockTimes: which verb's waits and holds count under which operation.
#include <cstddef>
#include <cstdint>
#include <functional>
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
using LockedFor = sync::Operation;

class RangeLockTimesTest : public PolicyTest {
 protected:
  static AddressSpaceOptions Recorded() {
    AddressSpaceOptions options = Options();
    options.record_range_locks = true;
    return options;
  }
  static std::vector<std::uint64_t> Holds(const AddressSpace& space) {
    std::vector<std::uint64_t> counts;
    for (std::size_t i = 0; i < sync::kOperations; ++i) {
      const sync::LockTimes times = space.RangeLockTimes(static_cast<LockedFor>(i));
      EXPECT_EQ(times.waits.count(), times.holds.count()) << "no verb is running";
      counts.push_back(times.holds.count());
    }
    return counts;
  }
  // Performs `verb`, and expects that it took range locks for `operation`, and for nothing else.
  static void ExpectOnly(LockedFor operation, const AddressSpace& space, const std::function<void()>& verb) {
    SCOPED_TRACE(sync::ToString(operation));
    const std::vector<std::uint64_t> before = Holds(space);
    verb();
    const std::vector<std::uint64_t> after = Holds(space);
    for (std::size_t i = 0; i < sync::kOperations; ++i) {
      if (i == static_cast<std::size_t>(operation)) {
        EXPECT_GT(after[i], before[i]);
      } else {
        EXPECT_EQ(after[i], before[i]) << sync::ToString(static_cast<LockedFor>(i));
      }
    }
  }

  FakeKernel kernel_;
};

TEST_P(RangeLockTimesTest, AreEmptyUnlessAskedFor) {
  TestSpace space(kernel_, Options());
  const PageRange range = Part(space->reservation(), 0, 8);
  MustMapAt(*space, range);
  ASSERT_TRUE(space->Protect(range, Protection::kRead).ok());
  ASSERT_TRUE(space->Unmap(range).ok());
  for (const std::uint64_t holds : Holds(*space)) EXPECT_EQ(holds, 0u);
}

TEST_P(RangeLockTimesTest, EveryVerbCountsUnderItsOperation) {
  TestSpace space(kernel_, Recorded());
  const PageRange range = Part(space->reservation(), 0, 8);
  const PageRange elsewhere = Part(space->reservation(), 100, 8);
  ExpectOnly(LockedFor::kMap, *space, [&] { MustMapAt(*space, range); });
  ExpectOnly(LockedFor::kPopulate, *space, [&] { ASSERT_TRUE(space->Populate(range).ok()); });
  ExpectOnly(LockedFor::kProtect, *space, [&] { ASSERT_TRUE(space->Protect(range, Protection::kRead).ok()); });
  ExpectOnly(LockedFor::kProtect, *space, [&] { ASSERT_TRUE(space->Protect(range, Protection::kReadWrite).ok()); });
  ExpectOnly(LockedFor::kPurge, *space, [&] { ASSERT_TRUE(space->Discard({&range, 1}).ok()); });
  ExpectOnly(LockedFor::kAdvise, *space, [&] { ASSERT_TRUE(space->Advise(range, Advice::kFree).ok()); });
  ExpectOnly(LockedFor::kMemoryLock, *space,
             [&] { ASSERT_TRUE(space->LockMemory(range, os::MemoryLock::kOnFault).ok()); });
  ExpectOnly(LockedFor::kMemoryLock, *space, [&] { ASSERT_TRUE(space->UnlockMemory(range).ok()); });
  ExpectOnly(LockedFor::kRemap, *space, [&] { ASSERT_TRUE(space->Remap(range, {12}).ok()); });
  ExpectOnly(LockedFor::kUnmap, *space, [&] { ASSERT_TRUE(space->Unmap(Part(range, 2, 3)).ok()); });
  ExpectOnly(LockedFor::kFork, *space, [&] {
    space->PrepareFork();
    space->ParentAfterFork();
  });
  MustMapAt(*space, elsewhere);
  const std::uint64_t remaps = space->RangeLockTimes(LockedFor::kRemap).holds.count();
  ASSERT_TRUE(space->Remap(elsewhere, {8}, {.may_move = true, .keep_source = true}).ok());
  EXPECT_EQ(space->RangeLockTimes(LockedFor::kRemap).holds.count(), remaps + 2) << "source and target";
}

FREEHOLD_INSTANTIATE_POLICIES(RangeLockTimesTest);

}  // namespace
}  // namespace freehold::vm
