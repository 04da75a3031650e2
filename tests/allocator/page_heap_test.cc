#include "allocator/page_heap.h"

#include <cerrno>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <vector>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"
#include "vm/os/fake_kernel.h"

namespace freehold::allocator {
namespace {

using Operation = vm::os::FakeKernel::Operation;

class PageHeapTest : public testing::Test {
 protected:
  void SetUp() override { Make(1); }
  void TearDown() override { Drop(); }

  void Make(unsigned shards, const PageHeap::Options& options = {}) {
    Drop();
    const auto space =
        vm::AddressSpace::Create(kernel_, {.reserve = vm::GiB(4), .min_reserve = vm::MiB(64)});
    ASSERT_TRUE(space.ok());
    space_ = *space;
    const auto metadata = HeapMetadata::Create(*space_, {.header_bytes = 4096, .cache_bytes = 4096});
    ASSERT_TRUE(metadata.ok());
    metadata_ = *metadata;
    heap_.emplace(*space_, metadata_, shards, options);
  }
  void Drop() {
    if (space_ == nullptr) return;
    heap_->CheckInvariants();
    heap_.reset();
    metadata_.Release();
    vm::AddressSpace::Destroy(space_);
    space_ = nullptr;
  }
  static void Dirty(std::uintptr_t start, unsigned units) {
    std::memset(reinterpret_cast<void*>(start), 0xab, units * kUnitSize);
  }
  vm::Pages Resident(std::uintptr_t start, unsigned units) {
    return *kernel_.CountResident(
        vm::PageRange::FromBytes(reinterpret_cast<void*>(start), {units * kUnitSize}));
  }

  vm::os::FakeKernel kernel_;
  vm::AddressSpace* space_ = nullptr;
  HeapMetadata metadata_;
  std::optional<PageHeap> heap_;
};

TEST_F(PageHeapTest, FreshMemoryIsCleanAndItsRecordsAreWritable) {
  const PageHeap::Run run = heap_->Allocate(0, 5);
  ASSERT_NE(run.start, 0u);
  EXPECT_EQ(run.start % kUnitSize, 0u);
  EXPECT_TRUE(run.clean);
  EXPECT_TRUE(IsZero(reinterpret_cast<void*>(run.start), 5 * kUnitSize));
  for (unsigned i = 0; i < 5; ++i) metadata_.spans().At(run.start + i * kUnitSize)->units = 1;
  EXPECT_EQ(heap_->GetStats().chunks, 1u);
  EXPECT_EQ(heap_->GetStats().free_units, kChunkUnits - 5);
}

TEST_F(PageHeapTest, FreedMemoryIsUsedAgainBeforeFreshMemory) {
  const PageHeap::Run first = heap_->Allocate(0, 3);
  const PageHeap::Run second = heap_->Allocate(0, 3);
  heap_->Free(second.start, 3);
  EXPECT_EQ(heap_->GetStats().dirty_units, 3u);
  const PageHeap::Run again = heap_->Allocate(0, 2);
  EXPECT_EQ(again.start, second.start);
  EXPECT_FALSE(again.clean);
  EXPECT_NE(first.start, second.start);
}

TEST_F(PageHeapTest, TightestRunIsTaken) {
  //   | a:4 | b:1 | c:2 | d:1 | rest
  const std::uintptr_t a = heap_->Allocate(0, 4).start;
  heap_->Allocate(0, 1);
  const std::uintptr_t c = heap_->Allocate(0, 2).start;
  heap_->Allocate(0, 1);
  heap_->Free(a, 4);
  heap_->Free(c, 2);
  EXPECT_EQ(heap_->Allocate(0, 3).start, a);
  EXPECT_EQ(heap_->Allocate(0, 2).start, c);
}

TEST_F(PageHeapTest, RoomBehindARunIsFoundAndLeftFree) {
  //   | a:4 | b:1 | c:2 | d:1 | rest
  const std::uintptr_t a = heap_->Allocate(0, 4).start;
  heap_->Allocate(0, 1);
  const std::uintptr_t c = heap_->Allocate(0, 2).start;
  heap_->Allocate(0, 1);
  heap_->Free(a, 4);
  heap_->Free(c, 2);
  EXPECT_EQ(heap_->AllocateWithRoom(0, 1, 3).start, a + kUnitSize);  // dirty before clean
  EXPECT_EQ(heap_->Extend(a + kUnitSize, 1, 2, 2), 2u);
  const std::uintptr_t last = heap_->AllocateWithRoom(0, 1, 3).start;  // as far from others as can be
  EXPECT_EQ(last, a + (kChunkUnits - 3) * kUnitSize);
  EXPECT_EQ(heap_->Extend(last, 1, 2, 2), 2u);
  EXPECT_EQ(heap_->AllocateWithRoom(0, 2, kChunkUnits).start, c);  // nowhere is so much: as Allocate
}

TEST_F(PageHeapTest, FullerChunksFillUpFirst) {
  const std::uintptr_t full = heap_->Allocate(0, kChunkUnits - 1).start;
  const std::uintptr_t other = heap_->Allocate(0, kChunkUnits).start;
  heap_->Free(other, kChunkUnits);
  heap_->Trim();
  const std::uintptr_t unit = heap_->Allocate(0, 1).start;
  EXPECT_EQ(unit, full + (kChunkUnits - 1) * kUnitSize);
}

TEST_F(PageHeapTest, NeighboursMerge) {
  const std::uintptr_t start = heap_->Allocate(0, kChunkUnits).start;
  for (unsigned i = 0; i < kChunkUnits; i += 2) heap_->Free(start + i * kUnitSize, 1);
  for (unsigned i = 1; i < kChunkUnits; i += 2) heap_->Free(start + i * kUnitSize, 1);
  EXPECT_EQ(heap_->Allocate(0, kChunkUnits).start, start);
}

TEST_F(PageHeapTest, ExtendTakesWhatIsFreeBehind) {
  const std::uintptr_t start = heap_->Allocate(0, 4).start;
  EXPECT_EQ(heap_->Extend(start, 4, 1, 2), 2u);
  const std::uintptr_t next = heap_->Allocate(0, 1).start;
  EXPECT_EQ(next, start + 6 * kUnitSize);
  EXPECT_EQ(heap_->Extend(start, 6, 1, 1), 0u);
  EXPECT_EQ(heap_->Extend(next, 1, kChunkUnits, kChunkUnits), 0u);
  EXPECT_EQ(heap_->GetStats().free_units, kChunkUnits - 7);
}

TEST_F(PageHeapTest, ExtendTakesLessThanTheMostButNotThanTheLeast) {
  //   | start:4 | 3 free | next:1 | rest
  const std::uintptr_t start = heap_->Allocate(0, 7).start;
  const std::uintptr_t next = heap_->Allocate(0, 1).start;
  heap_->Free(start + 4 * kUnitSize, 3);
  EXPECT_EQ(heap_->Extend(start, 4, 4, 8), 0u);
  EXPECT_EQ(heap_->Extend(start, 4, 2, 8), 3u);
  EXPECT_EQ(heap_->Extend(next, 1, 1, kChunkUnits), kChunkUnits - 8);  // to the end of the chunk
  EXPECT_EQ(heap_->GetStats().free_units, 0u);
}

TEST_F(PageHeapTest, AgeGivesBackWhatStayedFree) {
  const std::uintptr_t start = heap_->Allocate(0, 8).start;
  const std::uintptr_t rest = heap_->Allocate(0, 8).start;
  Dirty(start, 8);
  Dirty(rest, 8);
  heap_->Free(start, 8);
  EXPECT_EQ(heap_->Age().value, 0u);  // free for less than a period
  EXPECT_EQ(Resident(start, 8), vm::PagesFor({8 * kUnitSize}));
  EXPECT_EQ(heap_->Age(), vm::PagesFor({8 * kUnitSize}));
  EXPECT_EQ(Resident(start, 8).value, 0u);
  EXPECT_EQ(Resident(rest, 8), vm::PagesFor({8 * kUnitSize}));
  const PageHeap::Run again = heap_->Allocate(0, 8);
  EXPECT_EQ(again.start, start);
  EXPECT_TRUE(again.clean);
  EXPECT_TRUE(IsZero(reinterpret_cast<void*>(start), 8 * kUnitSize));
}

TEST_F(PageHeapTest, MemoryInUseBetweenTwoTicksIsKept) {
  const std::uintptr_t start = heap_->Allocate(0, 8).start;
  for (int i = 0; i < 5; ++i) {
    heap_->Free(start, 8);
    EXPECT_EQ(heap_->Age().value, 0u);
    ASSERT_EQ(heap_->Allocate(0, 8).start, start);
  }
}

TEST_F(PageHeapTest, TrimGivesBackEverything) {
  std::vector<std::uintptr_t> units;
  for (unsigned i = 0; i < 5 * kChunkUnits; ++i) units.push_back(heap_->Allocate(0, 1).start);
  for (const std::uintptr_t unit : units) Dirty(unit, 1);
  for (std::size_t i = 0; i < units.size(); i += 2) heap_->Free(units[i], 1);
  const vm::Pages given = heap_->Trim();
  EXPECT_EQ(given, vm::PagesFor({units.size() / 2 * kUnitSize}));
  for (std::size_t i = 0; i < units.size(); i += 2) EXPECT_EQ(Resident(units[i], 1).value, 0u);
  for (std::size_t i = 1; i < units.size(); i += 2) heap_->Free(units[i], 1);
  heap_->Trim();
  EXPECT_EQ(heap_->GetStats().chunks, 0u);  // and address space goes back as well
  EXPECT_EQ(space_->Stats().mapped.value, 0u);
}

TEST_F(PageHeapTest, IdleChunksAreUnmappedByAge) {
  const std::uintptr_t start = heap_->Allocate(0, kChunkUnits).start;
  heap_->Free(start, kChunkUnits);
  heap_->Age();  // ages
  heap_->Age();  // gives pages back
  EXPECT_EQ(heap_->GetStats().chunks, 1u);
  heap_->Age();
  heap_->Age();
  EXPECT_EQ(heap_->GetStats().chunks, 0u);
}

TEST_F(PageHeapTest, ShardsKeepWhatTheirThreadsFreed) {
  Make(2);
  const std::uintptr_t zero = heap_->Allocate(0, 1).start;
  heap_->Free(zero, 1);
  const std::uintptr_t one = heap_->Allocate(1, 1).start;
  EXPECT_NE(one, zero);
  EXPECT_EQ(heap_->GetStats().chunks, 2u);
  EXPECT_EQ(heap_->Allocate(0, 1).start, zero);
}

TEST_F(PageHeapTest, MuchDirtyMemoryIsForAllShards) {
  Make(2);
  constexpr std::uint64_t kChunks = PageHeap::kKeptDirtyUnits / kChunkUnits;
  std::vector<std::uintptr_t> chunks;
  for (std::uint64_t i = 0; i < kChunks; ++i) chunks.push_back(heap_->Allocate(0, kChunkUnits).start);
  for (std::uint64_t i = 0; i + 1 < kChunks; ++i) heap_->Free(chunks[i], kChunkUnits);
  EXPECT_TRUE(heap_->Allocate(1, kChunkUnits).clean);
  EXPECT_EQ(heap_->GetStats().chunks, kChunks + 1);
  heap_->Free(chunks.back(), kChunkUnits);
  EXPECT_FALSE(heap_->Allocate(1, kChunkUnits).clean);
  EXPECT_EQ(heap_->GetStats().chunks, kChunks + 1);
}

TEST_F(PageHeapTest, ShardsHelpOutWhenTheSpaceIsFull) {
  Make(2);
  std::uintptr_t last = 0;
  while (const std::uintptr_t start = heap_->Allocate(0, kChunkUnits).start) last = start;
  EXPECT_EQ(heap_->Allocate(1, 1).start, 0u);
  heap_->Free(last, kChunkUnits);
  EXPECT_EQ(heap_->Allocate(1, 1).start, last);
}

TEST_F(PageHeapTest, FailedDiscardLeavesMemoryDirty) {
  const std::uintptr_t start = heap_->Allocate(0, 8).start;
  Dirty(start, 8);
  heap_->Free(start, 8);
  kernel_.FailNth(Operation::kDiscard, 1, EAGAIN);
  EXPECT_EQ(heap_->Trim().value, 0u);
  EXPECT_EQ(heap_->GetStats().dirty_units, 8u);
  EXPECT_FALSE(heap_->Allocate(0, 8).clean);
}

TEST_F(PageHeapTest, OutOfMemoryLeavesTheHeapAsItWas) {
  for (std::size_t n = 1; n <= 4; ++n) {
    kernel_.FailNth(Operation::kProtect, n, ENOMEM);
    std::vector<std::uintptr_t> chunks;
    for (int i = 0; i < 40; ++i) {
      const PageHeap::Run run = heap_->Allocate(0, kChunkUnits);
      if (run.start != 0) chunks.push_back(run.start);
    }
    heap_->CheckInvariants();
    for (const std::uintptr_t chunk : chunks) heap_->Free(chunk, kChunkUnits);
    heap_->Trim();
    EXPECT_EQ(space_->Stats().mapped.value, 0u);
    kernel_.StopFailing();
  }
}

TEST_F(PageHeapTest, AllocatesUntilTheSpaceIsFull) {
  std::vector<std::uintptr_t> chunks;
  for (;;) {
    const PageHeap::Run run = heap_->Allocate(0, kChunkUnits);
    if (run.start == 0) break;
    chunks.push_back(run.start);
  }
  EXPECT_GT(chunks.size(), 64u);
  EXPECT_EQ(heap_->Allocate(0, 1).start, 0u);
  heap_->Free(chunks.back(), kChunkUnits);
  EXPECT_NE(heap_->Allocate(0, 1).start, 0u);
}

TEST_F(PageHeapTest, ForEachUsedUnitVisitsWhatIsNotFree) {
  const std::uintptr_t start = heap_->Allocate(0, 4).start;
  heap_->Free(start + kUnitSize, 1);
  std::set<std::uintptr_t> seen;
  heap_->ForEachUsedUnit(
      [](void* context, std::uintptr_t unit) { static_cast<std::set<std::uintptr_t>*>(context)->insert(unit); },
      &seen);
  EXPECT_EQ(seen, (std::set<std::uintptr_t>{start, start + 2 * kUnitSize, start + 3 * kUnitSize}));
}

// Seeded operations against a map of runs: nothing overlaps, clean means zero, sums hold.
TEST_F(PageHeapTest, RandomOperationsKeepRunsApart) {
  for (unsigned seed = 1; seed <= 4; ++seed) {
    SCOPED_TRACE(seed);
    Make(seed % 3 + 1, {.huge_pages = seed % 2 == 0 ? vm::os::HugePages::kPrefer : vm::os::HugePages::kAvoid});
    std::mt19937 random(seed);
    std::map<std::uintptr_t, unsigned> runs;
    for (int step = 0; step < 4000; ++step) {
      const unsigned choice = random() % 100;
      if (choice < 50) {
        const unsigned units = random() % 10 == 0 ? 1 + random() % kChunkUnits : 1 + random() % 8;
        const PageHeap::Run run = heap_->Allocate(random(), units);
        ASSERT_NE(run.start, 0u);
        const auto next = runs.lower_bound(run.start);
        if (next != runs.end()) {
          ASSERT_LE(run.start + units * kUnitSize, next->first);
        }
        if (next != runs.begin()) {
          const auto before = std::prev(next);
          ASSERT_LE(before->first + before->second * kUnitSize, run.start);
        }
        auto* words = reinterpret_cast<std::uint64_t*>(run.start);
        for (unsigned i = 0; i < units; ++i) {
          if (run.clean) {
            ASSERT_EQ(words[i * (kUnitSize / 8)], 0u);
          }
          words[i * (kUnitSize / 8)] = 1;
        }
        runs[run.start] = units;
      } else if (choice < 95 && !runs.empty()) {
        const auto it = std::next(runs.begin(), random() % runs.size());
        heap_->Free(it->first, it->second);
        runs.erase(it);
      } else if (choice < 98) {
        heap_->Age();
      } else {
        heap_->Trim();
      }
      if (step % 100 == 0) heap_->CheckInvariants();
    }
  }
}

// ---- Huge pages ----

// Every unit of a few chunks in use and resident.
class HugeBlocksTest : public PageHeapTest {
 protected:
  void SetUp() override { Make(1, {.huge_pages = vm::os::HugePages::kPrefer}); }

  std::uintptr_t FillChunk(unsigned dirty_units = kChunkUnits) {
    const std::uintptr_t start = heap_->Allocate(0, kChunkUnits).start;
    Dirty(start, dirty_units);
    return start;
  }
  void Age(int times) {
    for (int i = 0; i < times; ++i) heap_->Age();
    heap_->CheckInvariants();
  }
  std::size_t Collapses() const { return kernel_.CallCount(Operation::kAdvise); }
  // Whether the kernel made any.
  bool Works() const { return heap_->GetStats().collapsed_blocks != 0; }
};

#define FREEHOLD_NEEDS_HUGE_PAGES() \
  if (!Works()) GTEST_SKIP() << "the kernel makes no huge pages here"

TEST_F(HugeBlocksTest, StayInUseAtTwoTicks) {
  const std::uintptr_t start = FillChunk();
  Age(1);
  EXPECT_EQ(Collapses(), 0u);
  Age(1);
  EXPECT_EQ(Collapses(), kChunkBlocks);
  EXPECT_EQ(kernel_.Calls().back().ranges[0].count().value, vm::kPagesPerHugePage);
  Age(3);
  EXPECT_EQ(Collapses(), kChunkBlocks) << "once each";
  for (std::size_t i = 0; i < kChunkSize; i += 4096) ASSERT_EQ(reinterpret_cast<unsigned char*>(start)[i], 0xab);
  FREEHOLD_NEEDS_HUGE_PAGES();
  EXPECT_EQ(heap_->GetStats().collapsed_blocks, kChunkBlocks);
}

TEST_F(HugeBlocksTest, AreResidentBefore) {
  FillChunk(kBlockUnits + kBlockUnits / 2);
  Age(4);
  EXPECT_EQ(Collapses(), 1u);
}

TEST_F(HugeBlocksTest, HaveHardlyAnythingFree) {
  const std::uintptr_t start = FillChunk();
  heap_->Free(start, PageHeap::kDenseFree + 1);
  Age(4);
  EXPECT_EQ(Collapses(), 1u);
  EXPECT_EQ(heap_->Allocate(0, PageHeap::kDenseFree + 1).start, start);
  Dirty(start, PageHeap::kDenseFree + 1);
  Age(2);
  EXPECT_EQ(Collapses(), 2u) << "dense again";
}

// Or nobody would give it back.
TEST_F(HugeBlocksTest, MakeWhatIsFreeInThemResident) {
  const std::uintptr_t start = FillChunk();
  heap_->Free(start, 1);
  ASSERT_EQ(heap_->Trim(), vm::PagesFor({kUnitSize}));
  EXPECT_EQ(heap_->GetStats().dirty_units, 0u);
  Age(2);
  FREEHOLD_NEEDS_HUGE_PAGES();
  EXPECT_EQ(heap_->GetStats().collapsed_blocks, kChunkBlocks);
  EXPECT_EQ(heap_->GetStats().dirty_units, 1u);
  EXPECT_FALSE(heap_->Allocate(0, 1).clean);
}

TEST_F(HugeBlocksTest, KeepTheLittleThatIsFree) {
  const std::uintptr_t start = FillChunk();
  Age(2);
  FREEHOLD_NEEDS_HUGE_PAGES();
  heap_->Free(start, PageHeap::kHugeFree);
  Age(4);
  EXPECT_EQ(heap_->GetStats().dirty_units, PageHeap::kHugeFree);
  EXPECT_EQ(heap_->GetStats().purged_pages, 0u);
  heap_->Free(start + PageHeap::kHugeFree * kUnitSize, 1);
  Age(2);
  EXPECT_EQ(heap_->GetStats().dirty_units, 0u) << "that is no longer little";
  EXPECT_EQ(heap_->Allocate(0, PageHeap::kHugeFree + 1).start, start);
  Dirty(start, PageHeap::kHugeFree + 1);
  Age(2);
  EXPECT_EQ(heap_->GetStats().collapsed_blocks, kChunkBlocks + 1);
}

TEST_F(HugeBlocksTest, GiveEverythingBackWhenAsked) {
  const std::uintptr_t start = FillChunk();
  Age(2);
  FREEHOLD_NEEDS_HUGE_PAGES();
  heap_->Free(start, 1);
  EXPECT_EQ(heap_->Trim(), vm::PagesFor({kUnitSize}));
  EXPECT_EQ(heap_->GetStats().dirty_units, 0u);
  heap_->Free(start + kUnitSize, kChunkUnits - 1);
  heap_->Trim();
  EXPECT_EQ(heap_->GetStats().chunks, 0u);
}

TEST_F(HugeBlocksTest, ComeAFewAtOnce) {
  for (int i = 0; i < 3; ++i) FillChunk();
  Age(2);
  EXPECT_EQ(Collapses(), PageHeap::kBlocksAtOnce);
  Age(1);
  EXPECT_EQ(Collapses(), 3 * kChunkBlocks);
}

TEST_F(HugeBlocksTest, AreNotAskedForWhereTheKernelHasNone) {
  kernel_.FailAlways(Operation::kAdvise, EINVAL);
  for (int i = 0; i < 3; ++i) FillChunk();
  Age(2);
  EXPECT_EQ(Collapses(), PageHeap::kBlocksAtOnce);
  Age(4);
  EXPECT_EQ(Collapses(), PageHeap::kBlocksAtOnce);
  EXPECT_EQ(heap_->GetStats().collapsed_blocks, 0u);
}

TEST_F(HugeBlocksTest, AreNotAskedForAgainWhenThereIsNoMemory) {
  kernel_.FailNth(Operation::kAdvise, 1, ENOMEM);
  FillChunk();
  Age(2);
  EXPECT_EQ(Collapses(), kChunkBlocks);
  Age(4);
  EXPECT_EQ(Collapses(), kChunkBlocks);
  FREEHOLD_NEEDS_HUGE_PAGES();
  EXPECT_EQ(heap_->GetStats().collapsed_blocks, kChunkBlocks - 1);
}

TEST_F(PageHeapTest, MakesNoHugePagesUnlessAsked) {
  const std::uintptr_t start = heap_->Allocate(0, kChunkUnits).start;
  Dirty(start, kChunkUnits);
  for (int i = 0; i < 4; ++i) heap_->Age();
  EXPECT_EQ(kernel_.CallCount(Operation::kAdvise), 0u);
}

}  // namespace
}  // namespace freehold::allocator
