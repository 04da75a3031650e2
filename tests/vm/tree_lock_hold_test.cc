// DESIGN §4, rule (d): nothing that grows with pages or VMAs happens in one hold of a region's tree lock. Verbs
// over many VMAs hold it often, and do what they do over few.
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
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

AddressSpaceOptions Recorded(AddressSpaceOptions options) {
  options.record_tree_lock_holds = true;
  return options;
}

TEST(TreeLockHoldsTest, AreEmptyUnlessAskedFor) {
  FakeKernel kernel;
  TestSpace space(kernel);
  MustMap(*space, 4);
  EXPECT_EQ(space->TreeLockHolds().count(), 0u);
}

TEST(TreeLockHoldsTest, CountWhatTheVerbsHeld) {
  FakeKernel kernel;
  TestSpace space(kernel, Recorded(SmallOptions()));
  const std::uint64_t before = space->TreeLockHolds().count();
  const PageRange range = MustMap(*space, 4);
  const std::uint64_t mapped = space->TreeLockHolds().count();
  EXPECT_GT(mapped, before);
  EXPECT_TRUE(space->Lookup(range.first).ok());
  EXPECT_EQ(space->TreeLockHolds().count(), mapped) << "a lookup takes no lock";
  EXPECT_TRUE(space->Populate(range).ok());
  EXPECT_EQ(space->TreeLockHolds().count(), mapped + 1) << "populate looks once a VMA and chunk";
  EXPECT_TRUE(space->Advise(range, Advice::kDontNeed).ok());
  EXPECT_EQ(space->TreeLockHolds().count(), mapped + 2) << "advice looks once a piece";
  EXPECT_TRUE(space->Unmap(range).ok());
  EXPECT_GT(space->TreeLockHolds().count(), mapped);
  EXPECT_GT(space->TreeLockHolds().Percentile(1), Nanoseconds{0});
}

// Forty VMAs and more, in the heap and in the mapping zone: every batch of a verb has borders somewhere.
class ManyVmasTest : public PolicyTest {
 protected:
  static constexpr std::size_t kVmas = 40;
  // No hold may visit more than this many extents (Region::kExtentsPerHold).
  static constexpr std::size_t kPerHold = 16;

  PageRange P(std::size_t first, std::size_t count) const { return Part(zone_, first, count); }
  std::string Line(std::size_t count) const { return Draw(*space_, P(0, count)); }
  bool heap() const { return zone_ == ZoneRange(*space_, Zone::kPlain); }

  // `kVmas` mappings of a page each, from page 1 on; every `hole`-th is missing.
  void MapRow(std::size_t hole = kVmas + 1) {
    for (std::size_t i = 1; i <= kVmas; ++i) {
      if (i % hole != 0) MustMapAt(*space_, P(i, 1), own());
    }
  }
  // How Draw shows the `i`-th mapping of the zone's own protection.
  char Letter(std::size_t i) const { return static_cast<char>((heap() ? 'A' : 'a') + i); }
  Protection own() const { return heap() ? Protection::kReadWrite : Protection::kReadExec; }

  // Calls `verb` and expects it to take the lock as often as so many extents need.
  template <typename Verb>
  void ExpectBatches(std::size_t extents, const Verb& verb) {
    const std::uint64_t before = space_->TreeLockHolds().count();
    verb();
    EXPECT_GE(space_->TreeLockHolds().count() - before, extents / kPerHold);
    space_->CheckInvariants();
  }
  void ForBothZones(const std::function<void()>& body) {
    for (const Zone zone : {Zone::kPlain, Zone::kMapping}) {
      SCOPED_TRACE(static_cast<int>(zone));
      zone_ = ZoneRange(*space_, zone);
      body();
      EXPECT_TRUE(space_->Unmap(space_->reservation()).ok());
      (void)space_->Purge(PurgeScope::kAll);
      EXPECT_EQ(space_->Stats().vmas, 0u);
      EXPECT_EQ(space_->Stats().mapped, Bytes{0});
      space_->CheckInvariants();
    }
  }

  FakeKernel kernel_;
  TestSpace space_{kernel_, Recorded(Options())};
  PageRange zone_;
};

TEST_P(ManyVmasTest, Unmap) {
  ForBothZones([&] {
    MapRow();
    ExpectBatches(kVmas, [&] { EXPECT_TRUE(space_->Unmap(P(0, kVmas + 4)).ok()); });
    EXPECT_EQ(Line(kVmas + 4), std::string(kVmas + 4, '.'));
  });
}

TEST_P(ManyVmasTest, UnmapWithHoles) {
  ForBothZones([&] {
    MapRow(3);
    EXPECT_TRUE(space_->Unmap(P(2, kVmas - 2)).ok());
    EXPECT_EQ(Line(kVmas + 4), std::string(".") + Letter(0) + std::string(kVmas - 2, '.') + Letter(1) + "...");
    EXPECT_EQ(space_->Stats().vmas, 2u);
  });
}

// The range ends within VMAs; the rest of them stays, and is theirs.
TEST_P(ManyVmasTest, UnmapCutsAtBothEnds) {
  ForBothZones([&] {
    MustMapAt(*space_, P(0, 60), own());
    for (std::size_t i = 10; i < 50; ++i) {
      MustMap(*space_, 1, At(P(i, 1).first, Placement::kReplace, own()));
    }
    ExpectBatches(kVmas, [&] { EXPECT_TRUE(space_->Unmap(P(5, 50)).ok()); });
    EXPECT_EQ(Line(62), std::string(5, Letter(0)) + std::string(50, '.') + std::string(5, Letter(0)) + "..");
  });
}

TEST_P(ManyVmasTest, UnmapThatFailsLeavesAllMapped) {
  zone_ = ZoneRange(*space_, Zone::kMapping);
  MapRow(7);
  const std::string line = Line(kVmas + 4);
  const AddressSpaceStats stats = space_->Stats();
  kernel_.FailNth(Operation::kReset, 1, ENOMEM);
  EXPECT_EQ(space_->Unmap(P(0, kVmas + 4)), Error::System(ENOMEM));
  EXPECT_EQ(Line(kVmas + 4), line);
  EXPECT_EQ(space_->Stats().vmas, stats.vmas);
  EXPECT_EQ(space_->Stats().unmaps, stats.unmaps);
  space_->CheckInvariants();
}

TEST_P(ManyVmasTest, ProtectAndBack) {
  ForBothZones([&] {
    MapRow();
    const std::string line = Line(kVmas + 2);
    ExpectBatches(2 * kVmas, [&] { EXPECT_TRUE(space_->Protect(P(1, kVmas), Protection::kRead).ok()); });
    for (std::size_t i = 1; i <= kVmas; ++i) {
      ASSERT_EQ(space_->Lookup(P(i, 1).first)->protection, Protection::kRead) << i;
      ASSERT_EQ(kernel_.At(P(i, 1).first).protection, Protection::kRead) << i;
    }
    EXPECT_TRUE(space_->Protect(P(1, kVmas), own()).ok());
    EXPECT_EQ(Line(kVmas + 2), line);
    EXPECT_EQ(space_->Stats().vmas, kVmas);
  });
}

// Parts of one mapping that differ become one again, also where one batch ends and the next begins.
TEST_P(ManyVmasTest, ProtectMergesWhatItMakesEqual) {
  ForBothZones([&] {
    MustMapAt(*space_, P(0, 100), own());
    for (std::size_t i = 10; i < 90; i += 2) {
      EXPECT_TRUE(space_->Protect(P(i, 1), Protection::kRead).ok());
    }
    EXPECT_EQ(space_->Stats().vmas, 81u);
    EXPECT_TRUE(space_->Protect(P(5, 90), own()).ok());
    EXPECT_EQ(space_->Stats().vmas, 1u);
  });
}

TEST_P(ManyVmasTest, ProtectThatFailsChangesNothing) {
  ForBothZones([&] {
    MapRow();
    const std::string line = Line(kVmas + 2);
    kernel_.FailNth(Operation::kProtect, 1, ENOMEM);
    EXPECT_EQ(space_->Protect(P(1, kVmas), Protection::kRead), Error::System(ENOMEM));
    kernel_.StopFailing();
    EXPECT_EQ(Line(kVmas + 2), line);
    EXPECT_EQ(space_->Protect(P(1, kVmas + 1), Protection::kRead).code, ErrorCode::kNotMapped);
    EXPECT_EQ(Line(kVmas + 2), line);
    EXPECT_EQ(space_->Stats().vmas, kVmas);
  });
}

TEST_P(ManyVmasTest, LockAndUnlock) {
  ForBothZones([&] {
    MapRow();
    const std::string line = Line(kVmas + 2);
    ExpectBatches(2 * kVmas,
                  [&] { EXPECT_TRUE(space_->LockMemory(P(1, kVmas), os::MemoryLock::kOnFault).ok()); });
    EXPECT_EQ(kernel_.LockedPages(), Pages{kVmas});
    for (std::size_t i = 1; i <= kVmas; ++i) {
      ASSERT_EQ(space_->Lookup(P(i, 1).first)->lock, os::MemoryLock::kOnFault) << i;
    }
    EXPECT_TRUE(space_->UnlockMemory(P(1, kVmas)).ok());
    EXPECT_EQ(kernel_.LockedPages(), Pages{0});
    EXPECT_EQ(Line(kVmas + 2), line);
    EXPECT_EQ(space_->Stats().vmas, kVmas);
  });
}

TEST_P(ManyVmasTest, LockMergesWhatItMakesEqual) {
  ForBothZones([&] {
    MustMapAt(*space_, P(0, 100), own());
    for (std::size_t i = 10; i < 90; i += 2) {
      EXPECT_TRUE(space_->LockMemory(P(i, 1), os::MemoryLock::kOnFault).ok());
    }
    EXPECT_EQ(space_->Stats().vmas, 81u);
    EXPECT_TRUE(space_->LockMemory(P(5, 90), os::MemoryLock::kOnFault).ok());
    EXPECT_EQ(space_->Stats().vmas, 3u);
    EXPECT_EQ(kernel_.LockedPages(), Pages{90});
    EXPECT_TRUE(space_->UnlockMemory(P(0, 100)).ok());
    EXPECT_EQ(space_->Stats().vmas, 1u);
    EXPECT_EQ(kernel_.LockedPages(), Pages{0});
  });
}

TEST_P(ManyVmasTest, LockThatFailsChangesNothing) {
  ForBothZones([&] {
    MapRow();
    EXPECT_TRUE(space_->LockMemory(P(20, 1), os::MemoryLock::kOnFault).ok());
    const std::string line = Line(kVmas + 2);
    kernel_.FailNth(Operation::kLockMemory, 1, ENOMEM);
    EXPECT_EQ(space_->LockMemory(P(1, kVmas), os::MemoryLock::kOnFault), Error::System(ENOMEM));
    kernel_.StopFailing();
    EXPECT_EQ(Line(kVmas + 2), line);
    EXPECT_EQ(kernel_.LockedPages(), Pages{1});
    EXPECT_EQ(space_->LockMemory(P(1, kVmas + 1), os::MemoryLock::kOnFault).code, ErrorCode::kNotMapped);
    EXPECT_EQ(kernel_.LockedPages(), Pages{1});
    EXPECT_EQ(space_->Stats().vmas, kVmas);
    space_->CheckInvariants();
  });
}

// What the batches beyond the first find locked is unlocked too.
TEST_P(ManyVmasTest, ReplaceUnlocks) {
  ForBothZones([&] {
    MapRow(5);
    EXPECT_TRUE(space_->LockMemory(P(kVmas - 2, 1), os::MemoryLock::kOnFault).ok());
    MustMap(*space_, kVmas + 2, At(P(0, 1).first, Placement::kReplace, own()));
    EXPECT_EQ(kernel_.LockedPages(), Pages{0});
    EXPECT_EQ(space_->Lookup(P(kVmas - 2, 1).first)->lock, os::MemoryLock::kNone);
  });
}

TEST_P(ManyVmasTest, RemapGrowsOverCachedExtents) {
  ForBothZones([&] {
    MapRow();
    for (std::size_t i = 2; i <= kVmas; ++i) EXPECT_TRUE(space_->Unmap(P(i, 1)).ok());
    const std::uint64_t generation = space_->Lookup(P(1, 1).first)->generation;
    ExpectBatches(heap() ? 2 * kVmas : 0, [&] { EXPECT_EQ(*space_->Remap(P(1, 1), {kVmas + 1}), P(1, kVmas + 1)); });
    EXPECT_EQ(Line(kVmas + 3), "." + std::string(kVmas + 1, Letter(0)) + ".");
    EXPECT_EQ(space_->Stats().vmas, 1u);
    EXPECT_EQ(space_->Stats().mapped, Pages{kVmas + 1}.bytes());
    EXPECT_EQ(space_->Lookup(P(kVmas, 1).first)->generation, generation);
  });
}

TEST_P(ManyVmasTest, RemapThatMeetsAVmaFarBehindLeavesAllFree) {
  ForBothZones([&] {
    MapRow();
    for (std::size_t i = 2; i < kVmas; ++i) EXPECT_TRUE(space_->Unmap(P(i, 1)).ok());
    EXPECT_EQ(space_->Remap(P(1, 1), {kVmas}).error().code, ErrorCode::kNoRoom);
    space_->CheckInvariants();
    EXPECT_EQ(Line(kVmas + 2), "." + std::string(1, Letter(0)) + std::string(kVmas - 2, '.') + Letter(1) + ".");
    MustMapAt(*space_, P(2, kVmas - 2), own());
  });
}

TEST_P(ManyVmasTest, Replace) {
  ForBothZones([&] {
    MapRow(5);
    ExpectBatches(2 * kVmas, [&] {
      MustMap(*space_, kVmas + 2, At(P(0, 1).first, Placement::kReplace, own()));
    });
    EXPECT_EQ(Line(kVmas + 4), std::string(kVmas + 2, Letter(0)) + "..");
    EXPECT_EQ(space_->Stats().vmas, 1u);
    EXPECT_EQ(space_->Stats().mapped, Pages{kVmas + 2}.bytes());
  });
}

TEST_P(ManyVmasTest, ReplaceThatFailsChangesNothing) {
  ForBothZones([&] {
    MapRow(5);
    const std::string line = Line(kVmas + 4);
    const AddressSpaceStats stats = space_->Stats();
    kernel_.FailNth(Operation::kProtect, 1, ENOMEM);
    EXPECT_EQ(space_->Map({kVmas + 2}, At(P(0, 1).first, Placement::kReplace, Protection::kRead)).error(),
              Error::System(ENOMEM));
    kernel_.StopFailing();
    EXPECT_EQ(Line(kVmas + 4), line);
    EXPECT_EQ(space_->Stats().vmas, stats.vmas);
    EXPECT_EQ(space_->Stats().mapped, stats.mapped);
    space_->CheckInvariants();
  });
}

// What is in the way lies beyond what the first hold looks at.
TEST_P(ManyVmasTest, FixedMapThatMeetsAVmaFarBehindLeavesAllFree) {
  ForBothZones([&] {
    MapRow();
    for (std::size_t i = 1; i < kVmas; ++i) EXPECT_TRUE(space_->Unmap(P(i, 1)).ok());
    EXPECT_EQ(space_->Map({kVmas + 2}, At(P(0, 1).first, Placement::kFixed, own())).error().code,
              ErrorCode::kOverlap);
    space_->CheckInvariants();
    EXPECT_EQ(Line(kVmas + 2), std::string(kVmas, '.') + Letter(0) + ".");
    // What was claimed is free again.
    MustMapAt(*space_, P(0, kVmas), own());
  });
}

TEST_P(ManyVmasTest, FixedMapOverCachedExtents) {
  ForBothZones([&] {
    MapRow();
    for (std::size_t i = 1; i <= kVmas; ++i) EXPECT_TRUE(space_->Unmap(P(i, 1)).ok());
    ExpectBatches(kVmas, [&] { MustMapAt(*space_, P(0, kVmas + 2), own()); });
    EXPECT_TRUE(!heap() || IsZero(P(0, kVmas + 2)));
  });
}

TEST_P(ManyVmasTest, Purge) {
  ForBothZones([&] {
    MapRow();
    if (heap()) Fill(P(1, kVmas), 7);
    for (std::size_t i = 1; i <= kVmas; ++i) EXPECT_TRUE(space_->Unmap(P(i, 1)).ok());
    ExpectBatches(heap() ? 2 * kVmas : 0, [&] { (void)space_->Purge(PurgeScope::kAll); });
    EXPECT_EQ(space_->Stats().free_resident, Bytes{0});
    EXPECT_EQ(kernel_.ResidentPages(P(0, kVmas + 2)), Pages{0});
  });
}

TEST_P(ManyVmasTest, ForEachVmaPassesLongRunsOfFreeExtents) {
  zone_ = ZoneRange(*space_, Zone::kPlain);
  for (std::size_t i = 0; i < 300; ++i) MustMapAt(*space_, P(i, 1));
  for (std::size_t i = 1; i < 299; ++i) EXPECT_TRUE(space_->Unmap(P(i, 1)).ok());
  const std::vector<VmaInfo> vmas = Vmas(*space_);
  ASSERT_EQ(vmas.size(), 2u);
  EXPECT_EQ(vmas[0].range, P(0, 1));
  EXPECT_EQ(vmas[1].range, P(299, 1));
}

FREEHOLD_INSTANTIATE_POLICIES(ManyVmasTest);

}  // namespace
}  // namespace freehold::vm
