#include "allocator/large_object.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"
#include "vm/os/fake_kernel.h"

namespace freehold::allocator {
namespace {

constexpr std::size_t KiB(std::size_t n) { return n << 10; }
constexpr std::size_t MiB(std::size_t n) { return n << 20; }

class LargeObjectTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(heap_.ok() && cache_.get() != nullptr); }

  // What growing objects have ahead.
  std::uint64_t Ahead() {
    std::uint64_t bytes = UINT64_MAX;
    heap_->ForEachMetric(
        [](void* context, const vm::Metric& metric) {
          if (metric.name != "heap_large_ahead_bytes") return;
          *static_cast<std::uint64_t*>(context) =
              static_cast<const std::atomic<std::uint64_t>*>(metric.first)->load() * metric.scale;
        },
        &bytes);
    return bytes;
  }

  // One CPU, so that placement is the same every time.
  vm::os::FakeKernel kernel_{{.cpu_count = 1}};
  TestHeap heap_{kernel_, {}};
  AttachedThread cache_{*heap_};
};

TEST_F(LargeObjectTest, SizesAreExactToThePage) {
  for (const std::size_t size : {kMaxClassSize + 1, KiB(129), KiB(500), MiB(1), MiB(1) + 1, MiB(7) + 123}) {
    void* p = cache_->Allocate(size);
    ASSERT_NE(p, nullptr);
    EXPECT_TRUE(IsAligned(p, vm::kPageSize));
    EXPECT_EQ(heap_->UsableSize(p), vm::PagesFor({size}).bytes().value);
    Fill(p, size, 5);
    EXPECT_TRUE(HasContent(p, size, 5));
    cache_->Free(p);
  }
  EXPECT_EQ(heap_->Stats().large_objects, 0u);
  EXPECT_EQ(heap_->Stats().large.value, 0u);
}

TEST_F(LargeObjectTest, ImpossibleSizesAreRefused) {
  for (const std::size_t size : {std::size_t{SIZE_MAX}, std::size_t{PTRDIFF_MAX}, std::size_t{PTRDIFF_MAX} + 1,
                                 heap_.space().reservation().bytes().value, MiB(1) << 24}) {
    EXPECT_EQ(cache_->Allocate(size), nullptr);
    EXPECT_EQ(cache_->AllocateZeroed(size), nullptr);
    EXPECT_EQ(cache_->AllocateAligned(64, size), nullptr);
    EXPECT_EQ(cache_->AllocateAligned(MiB(1), size), nullptr);
    void* p = cache_->Allocate(10);
    EXPECT_EQ(cache_->Reallocate(p, size), nullptr);
    cache_->Free(p);
    p = cache_->Allocate(MiB(2));
    Fill(p, 100, 1);
    EXPECT_EQ(cache_->Reallocate(p, size), nullptr);
    EXPECT_TRUE(HasContent(p, 100, 1));
    cache_->Free(p);
  }
}

TEST_F(LargeObjectTest, AnyPowerOfTwoAlignment) {
  std::vector<void*> objects;
  for (std::size_t alignment = 1; alignment <= MiB(256); alignment *= 2) {
    for (const std::size_t size : {std::size_t{1}, std::size_t{1000}, KiB(200), MiB(3)}) {
      void* p = cache_->AllocateAligned(alignment, size);
      ASSERT_NE(p, nullptr) << alignment << " " << size;
      EXPECT_TRUE(IsAligned(p, alignment));
      EXPECT_GE(heap_->UsableSize(p), size);
      Fill(p, size, alignment);
      objects.push_back(p);
    }
  }
  for (void* p : objects) cache_->Free(p);
}

TEST_F(LargeObjectTest, ZeroedMemoryIsZeroHoweverItWasUsed) {
  for (const std::size_t size : {KiB(130), KiB(700), MiB(1), MiB(2), MiB(9)}) {
    for (int round = 0; round < 4; ++round) {
      void* p = cache_->AllocateZeroed(size);
      ASSERT_TRUE(IsZero(p, size)) << size;
      Fill(p, size, 3);
      cache_->Free(p);
    }
  }
}

TEST_F(LargeObjectTest, GrowsInPlaceWhereNothingIsBehind) {
  void* p = cache_->Allocate(MiB(2));
  Fill(p, MiB(2), 9);
  std::size_t size = MiB(2);
  while (size < MiB(512)) {
    const bool becomes_huge = size < LargeObjects::kMinHugeSize && size + size / 4 >= LargeObjects::kMinHugeSize;
    size += size / 4;
    void* to = cache_->Reallocate(p, size);
    ASSERT_EQ(to != p, becomes_huge) << size;
    p = to;
    EXPECT_GE(heap_->UsableSize(p), size);
    static_cast<char*>(p)[size - 1] = 1;
  }
  EXPECT_TRUE(HasContent(p, MiB(2), 9));
  cache_->Free(p);
  EXPECT_EQ(heap_->Stats().large.value, 0u);
}

// ---- huge pages ----

vm::Zone ZoneOf(TestHeap& heap, const void* p) {
  return heap.space().ZoneAt(vm::PageNumber::Of(const_cast<void*>(p)));
}

TEST_F(LargeObjectTest, WhatGrowsLargeMovesToHugePagesOnce) {
  constexpr std::size_t kHuge = LargeObjects::kMinHugeSize;
  void* plain = cache_->Allocate(MiB(20));  // what was never grown may be sparse
  EXPECT_EQ(ZoneOf(heap_, plain), vm::Zone::kPlain);
  void* p = cache_->Allocate(MiB(3));
  Fill(p, MiB(3), 5);
  p = cache_->Reallocate(p, kHuge - vm::kPageSize);
  EXPECT_EQ(ZoneOf(heap_, p), vm::Zone::kPlain);
  p = cache_->Reallocate(p, kHuge);
  EXPECT_EQ(ZoneOf(heap_, p), vm::Zone::kDense);
  EXPECT_TRUE(IsAligned(p, vm::kHugePageSize));
  EXPECT_TRUE(HasContent(p, MiB(3), 5));
  Fill(p, kHuge, 6);
  EXPECT_EQ(cache_->Reallocate(p, kHuge * 3 / 2), p);
  // It shrinks where it is, and is large again.
  EXPECT_EQ(cache_->Reallocate(p, MiB(4)), p);
  EXPECT_EQ(heap_->UsableSize(p), MiB(4));
  EXPECT_EQ(cache_->Reallocate(p, kHuge + 1), p);
  EXPECT_TRUE(HasContent(p, MiB(4), 6));
  // Freed, it serves no object that was not grown.
  cache_->Free(p);
  void* other = cache_->Allocate(kHuge);
  EXPECT_EQ(ZoneOf(heap_, other), vm::Zone::kPlain);
  cache_->Free(plain);
  cache_->Free(other);
  EXPECT_EQ(heap_->Stats().large.value, 0u);
  heap_->CheckInvariants();
}

TEST_F(LargeObjectTest, ExpandingInPlaceNeverMoves) {
  void* p = cache_->Allocate(MiB(12));
  Fill(p, MiB(12), 5);
  ASSERT_TRUE(cache_->TryExpand(p, MiB(20)));
  EXPECT_GE(heap_->UsableSize(p), MiB(20));
  EXPECT_EQ(ZoneOf(heap_, p), vm::Zone::kPlain);
  EXPECT_TRUE(HasContent(p, MiB(12), 5));
  cache_->Free(p);
}

// The move is refused by the kernel: it grows where it is.
TEST_F(LargeObjectTest, WhatCannotMoveToHugePagesGrowsInPlace) {
  void* p = cache_->Allocate(MiB(12));
  Fill(p, MiB(12), 5);
  // Plain memory of the region is committed already; the dense zone's is not.
  kernel_.FailAlways(vm::os::FakeKernel::Operation::kProtect, ENOMEM);
  void* to = cache_->Reallocate(p, MiB(16));
  EXPECT_GT(kernel_.InjectedFailures(), 0u);
  kernel_.StopFailing();
  ASSERT_NE(to, nullptr);
  EXPECT_TRUE(HasContent(to, MiB(12), 5));
  cache_->Free(to);
  EXPECT_EQ(heap_->Stats().large.value, 0u);
}

TEST_F(LargeObjectTest, WithoutHugePagesWhatGrowsStaysInPlainMemory) {
  vm::os::FakeKernel kernel({.cpu_count = 1});
  vm::os::Features features = kernel.features();
  features.huge_pages = false;
  kernel.SetFeatures(features);
  TestHeap heap(kernel, {});
  AttachedThread cache(*heap);
  void* p = cache->Allocate(MiB(3));
  Fill(p, MiB(3), 5);
  p = cache->Reallocate(p, LargeObjects::kMinHugeSize * 2);
  EXPECT_EQ(ZoneOf(heap, p), vm::Zone::kPlain);
  EXPECT_TRUE(HasContent(p, MiB(3), 5));
  cache->Free(p);
}

// The line `key` of each kernel VMA's entry in smaps that lies in `range`, added up, in bytes; and how many there are.
struct Smaps {
  std::size_t bytes = 0;
  int vmas = 0;
};
Smaps SmapsOf(vm::PageRange range, const std::string& key) {
  Smaps sum;
  bool inside = false;
  std::ifstream smaps("/proc/self/smaps");
  for (std::string line; std::getline(smaps, line);) {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) {
      inside = range.Overlaps(vm::PageRange::FromBytes(reinterpret_cast<void*>(begin), {end - begin}));
      sum.vmas += inside ? 1 : 0;
    } else if (inside && line.starts_with(key + ":")) {
      sum.bytes += std::strtoull(line.c_str() + key.size() + 1, nullptr, 10) << 10;
    }
  }
  return sum;
}

// Whether memory that is advised for huge pages has them: not where they are switched off, and where no memory is free in
// one piece.
bool GivesHugePages() {
  constexpr std::size_t kSize = MiB(64);
  void* p = mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return false;
  madvise(p, kSize, MADV_HUGEPAGE);
  for (std::size_t i = 0; i < kSize; i += vm::kPageSize) static_cast<char*>(p)[i] = 1;
  const std::size_t huge = SmapsOf(vm::PageRange::FromBytes(p, {kSize}), "AnonHugePages").bytes;
  munmap(p, kSize);
  return huge >= kSize * 3 / 4;
}

TEST(HugeLargeObjectTest, TheKernelBacksWhatGrowsWithHugePages) {
  if (!GivesHugePages()) GTEST_SKIP() << "no transparent huge pages here";
  const OnOneCpu on_one_cpu;  // placement goes by CPU
  vm::os::LinuxKernel kernel;
  TestHeap heap(kernel, {}, vm::GiB(256));  // one region has room for all
  AttachedThread cache(*heap);
  const auto grow = [&] {
    void* p = cache->Allocate(MiB(2));
    std::size_t touched = 0;
    for (std::size_t size = MiB(2); size < MiB(64); size += size / 4) {
      p = cache->Reallocate(p, size);
      for (; touched < size; touched += vm::kPageSize) static_cast<char*>(p)[touched] = 1;
    }
    return p;
  };
  const vm::PageRange space = heap.space().reservation();
  std::vector<void*> objects = {grow()};
  const int vmas = SmapsOf(space, "Rss").vmas;
  for (int i = 0; i < 7; ++i) objects.push_back(grow());
  EXPECT_EQ(SmapsOf(space, "Rss").vmas, vmas) << "kernel VMAs do not multiply with objects";
  const std::size_t resident = SmapsOf(space, "Rss").bytes;
  const std::size_t huge = SmapsOf(space, "AnonHugePages").bytes;
  EXPECT_GT(huge, resident / 2);
  EXPECT_LE(resident, objects.size() * MiB(64) + MiB(64));
  for (void* p : objects) cache->Free(p);
  heap->Trim(cache.get());
  static_cast<void>(heap.space().Purge(vm::PurgeScope::kAll));
  EXPECT_LT(SmapsOf(space, "Rss").bytes, MiB(8));
}

TEST_F(LargeObjectTest, MovesOnceThenGrowsInPlaceBetweenNeighbours) {
  void* p = cache_->Allocate(MiB(2));
  Fill(p, MiB(2), 9);
  void* neighbour = cache_->Allocate(MiB(2));
  void* moved = cache_->Reallocate(p, MiB(3));
  ASSERT_NE(moved, nullptr);
  EXPECT_TRUE(HasContent(moved, MiB(2), 9));
  void* second_neighbour = cache_->Allocate(MiB(2));
  EXPECT_EQ(cache_->Reallocate(moved, MiB(5)), moved);  // the address space that it was given for this
  EXPECT_TRUE(HasContent(moved, MiB(2), 9));
  cache_->Free(moved);
  cache_->Free(neighbour);
  cache_->Free(second_neighbour);
}

TEST_F(LargeObjectTest, ShrinkGivesTheTailBack) {
  void* p = cache_->Allocate(MiB(64));
  Fill(p, MiB(8), 2);
  const std::size_t mapped = heap_->Stats().mapped.value;
  ASSERT_EQ(cache_->Reallocate(p, MiB(8)), p);
  EXPECT_EQ(heap_->UsableSize(p), MiB(8));
  EXPECT_EQ(heap_->Stats().mapped.value, mapped - MiB(56));
  EXPECT_TRUE(HasContent(p, MiB(8), 2));
  ASSERT_EQ(cache_->Reallocate(p, KiB(300)), p);
  EXPECT_TRUE(HasContent(p, KiB(300), 2));
  cache_->Free(p);
}

TEST_F(LargeObjectTest, RunsGrowAndShrinkWithinTheirChunk) {
  void* p = cache_->Allocate(KiB(200));
  Fill(p, KiB(200), 4);
  ASSERT_EQ(cache_->Reallocate(p, KiB(900)), p);
  EXPECT_TRUE(HasContent(p, KiB(200), 4));
  void* behind = cache_->Allocate(KiB(150));
  ASSERT_EQ(cache_->Reallocate(p, KiB(500)), p);
  void* in_tail = cache_->Allocate(KiB(150));
  EXPECT_GT(in_tail, p);
  EXPECT_LT(in_tail, behind);
  EXPECT_TRUE(HasContent(p, KiB(200), 4));
  void* moved = cache_->Reallocate(p, MiB(4));
  EXPECT_NE(moved, p);
  EXPECT_TRUE(HasContent(moved, KiB(200), 4));
  cache_->Free(moved);
  cache_->Free(behind);
  cache_->Free(in_tail);
  EXPECT_EQ(heap_->Stats().large_objects, 0u);
}

TEST_F(LargeObjectTest, WhatGrowsStepByStepMovesTwiceAndIsCountedInTheEnd) {
  std::size_t size = KiB(4);
  void* p = cache_->Allocate(size);
  Fill(p, size, 6);
  int moves = 0;
  while (size < MiB(1)) {
    const std::size_t grown = std::min(MiB(1), size + size / 8);
    void* to = cache_->Reallocate(p, grown);
    ASSERT_NE(to, nullptr);
    if (to != p) ++moves;
    p = to;
    size = grown;
    EXPECT_GE(heap_->UsableSize(p), size);
    EXPECT_LT(heap_->UsableSize(p), size + vm::kPageSize);
    static_cast<char*>(p)[size - 1] = 1;
    EXPECT_LE(heap_->Stats().large.value, size + vm::kPageSize);
  }
  EXPECT_LE(moves, 2);
  EXPECT_TRUE(HasContent(p, KiB(4), 6));
  // What came since it took units the last time passes for ahead.
  EXPECT_GT(heap_->Stats().large.value + Ahead(), MiB(1) - kUnitSize);
  EXPECT_LE(heap_->Stats().large.value + Ahead(), MiB(1));
  cache_->Free(p);
  EXPECT_EQ(heap_->Stats().large.value, 0u);
  EXPECT_EQ(heap_->Stats().large_objects, 0u);
}

TEST_F(LargeObjectTest, WhatIsAheadIsBounded) {
  std::vector<void*> objects;
  const auto grow = [&](std::size_t from, std::size_t to) {
    void* p = cache_->Reallocate(cache_->Allocate(from), to);
    Fill(p, to, objects.size());
    objects.push_back(p);
  };
  for (int i = 0; i < 200; ++i) grow(KiB(5), KiB(6));
  // Then size classes have to do, as for what is smaller.
  EXPECT_EQ(heap_->Stats().large_objects, LargeObjects::kAheadUnits);
  EXPECT_EQ(Ahead(), LargeObjects::kAheadUnits * kUnitSize);
  grow(KiB(3), KiB(6));
  EXPECT_EQ(heap_->Stats().large_objects, LargeObjects::kAheadUnits);
  // And runs take what they need.
  grow(KiB(100), KiB(150));
  void*& last = objects.back();
  ASSERT_EQ(cache_->Reallocate(last, KiB(200)), last);
  EXPECT_EQ(Ahead(), LargeObjects::kAheadUnits * kUnitSize);
  for (std::size_t i = 0; i < objects.size(); ++i) {
    EXPECT_TRUE(HasContent(objects[i], KiB(5), i)) << i;
    cache_->Free(objects[i]);
  }
  EXPECT_EQ(Ahead(), 0u);
  EXPECT_EQ(heap_->Stats().large.value, 0u);
}

// Refuses everything while it is set.
class Refusal final : public MemoryLimit {
 public:
  Refusal() = default;
  void Set(bool set) { is_set_.store(set); }
  bool Admit(vm::Bytes) override { return false; }
  void Settle(vm::Bytes) override {}
  void Relieve() override {}
  bool MakeRoom(vm::Bytes, unsigned) override { return ++asked, false; }

  int asked = 0;
};

TEST(LimitedLargeObjectTest, SmallObjectsGrowInClassesWhereALimitHasNoRoomForARun) {
  vm::os::FakeKernel kernel({.cpu_count = 1});
  Refusal limit;
  TestHeap heap(kernel, {.limit = &limit});
  AttachedThread cache(*heap);
  void* room = cache->Allocate(KiB(6));  // of the class, whose span is there
  void* p = cache->Allocate(KiB(5));
  Fill(p, KiB(5), 1);
  limit.Set(true);
  p = cache->Reallocate(p, KiB(6));
  ASSERT_NE(p, nullptr);
  EXPECT_TRUE(HasContent(p, KiB(5), 1));
  EXPECT_EQ(heap->Stats().large_objects, 0u);
  EXPECT_EQ(limit.asked, 0) << "nobody had to make room";
  EXPECT_EQ(cache->Reallocate(p, KiB(200)), nullptr);
  EXPECT_GT(limit.asked, 0);
  EXPECT_TRUE(HasContent(p, KiB(5), 1));
  limit.Set(false);
  cache->Free(p);
  cache->Free(room);
}

// A huge page makes more resident than was asked for, which the limit must allow.
TEST(LimitedLargeObjectTest, WhatGrowsStaysInPlainMemoryWhereALimitHasNoRoomForBoth) {
  class Some final : public MemoryLimit {
   public:
    void Set() { is_set_.store(true); }
    bool Admit(vm::Bytes bytes) override { return bytes.value < LargeObjects::kMinHugeSize; }
    void Settle(vm::Bytes) override {}
    void Relieve() override {}
    bool MakeRoom(vm::Bytes, unsigned) override { return false; }
  };
  vm::os::FakeKernel kernel({.cpu_count = 1});
  Some limit;
  TestHeap heap(kernel, {.limit = &limit});
  AttachedThread cache(*heap);
  void* p = cache->Allocate(MiB(12));
  Fill(p, MiB(12), 1);
  limit.Set();
  ASSERT_EQ(cache->Reallocate(p, LargeObjects::kMinHugeSize), p) << "grows by less than what is too much";
  EXPECT_EQ(ZoneOf(heap, p), vm::Zone::kPlain);
  EXPECT_TRUE(HasContent(p, MiB(12), 1));
  cache->Free(p);
}

// What is ahead is not worth making room for either.
TEST(LimitedLargeObjectTest, RunsTakeWhatTheyNeedWhereALimitHasNoRoomAhead) {
  class AUnit final : public MemoryLimit {
   public:
    AUnit() { is_set_.store(true); }
    bool Admit(vm::Bytes bytes) override { return bytes.value <= most; }
    void Settle(vm::Bytes) override {}
    void Relieve() override {}
    bool MakeRoom(vm::Bytes, unsigned) override { return false; }

    std::size_t most = SIZE_MAX;
  };
  vm::os::FakeKernel kernel({.cpu_count = 1});
  AUnit limit;
  TestHeap heap(kernel, {.limit = &limit});
  AttachedThread cache(*heap);
  void* p = cache->Reallocate(cache->Allocate(KiB(50)), KiB(60));
  ASSERT_EQ(heap->Stats().large_objects, 1u);
  limit.most = kUnitSize;
  ASSERT_EQ(cache->Reallocate(p, KiB(100)), p);  // two units, not four
  limit.most = 0;
  EXPECT_EQ(cache->Reallocate(p, KiB(150)), nullptr);
  EXPECT_EQ(cache->Reallocate(p, KiB(128)), p);
  limit.most = SIZE_MAX;
  cache->Free(p);
  EXPECT_EQ(heap->Stats().large.value, 0u);
}

TEST_F(LargeObjectTest, TheShareOfLargeObjectsThatMayBeAheadGrowsWithThem) {
  void* large = cache_->Allocate(MiB(16) * LargeObjects::kAheadShare);
  std::vector<void*> objects;
  for (int i = 0; i < 600; ++i) objects.push_back(cache_->Reallocate(cache_->Allocate(KiB(5)), KiB(6)));
  EXPECT_GE(Ahead(), (LargeObjects::kAheadUnits * kUnitSize) + MiB(16));
  EXPECT_LE(Ahead(), (LargeObjects::kAheadUnits * kUnitSize) + MiB(17));
  for (void* p : objects) cache_->Free(p);
  cache_->Free(large);
  EXPECT_EQ(Ahead(), 0u);
}

TEST_F(LargeObjectTest, RunsThatShrinkGoOnGrowingWhereTheyAre) {
  void* p = cache_->Reallocate(cache_->Allocate(KiB(60)), KiB(70));
  Fill(p, KiB(60), 8);
  ASSERT_EQ(cache_->Reallocate(p, KiB(300)), p);  // takes units ahead
  EXPECT_GT(Ahead(), 0u);
  ASSERT_EQ(cache_->Reallocate(p, KiB(60)), p);
  EXPECT_EQ(Ahead(), 0u);
  EXPECT_EQ(heap_->UsableSize(p), KiB(60));
  ASSERT_EQ(cache_->Reallocate(p, KiB(900)), p);
  EXPECT_TRUE(HasContent(p, KiB(60), 8));
  void* small = cache_->Reallocate(p, KiB(10));
  EXPECT_NE(small, p);  // in its class, which takes less
  EXPECT_TRUE(HasContent(small, KiB(10), 8));
  EXPECT_EQ(heap_->Stats().large_objects, 0u);
  EXPECT_EQ(Ahead(), 0u);
  cache_->Free(small);
}

TEST_F(LargeObjectTest, BuffersAreReusedWithoutKernelCalls) {
  void* first = cache_->Allocate(MiB(10));
  Fill(first, MiB(10), 1);
  cache_->Free(first);
  EXPECT_EQ(cache_->Allocate(MiB(10)), first);
  cache_->Free(first);
}

TEST_F(LargeObjectTest, MappingsEndWhereUnitsEnd) {
  const std::size_t before = heap_->Stats().mapped.value;
  void* p = cache_->Allocate(MiB(1) + 1);
  EXPECT_EQ(heap_->UsableSize(p), MiB(1) + vm::kPageSize);
  EXPECT_EQ(heap_->Stats().mapped.value, before + MiB(1) + kUnitSize);
  EXPECT_EQ(heap_->absent().value, 0u) << "who knows what is in the rest of the unit";
  ASSERT_EQ(cache_->Reallocate(p, MiB(1) + kUnitSize), p);
  EXPECT_EQ(heap_->Stats().mapped.value, before + MiB(1) + kUnitSize);
  ASSERT_EQ(cache_->Reallocate(p, MiB(1) + kUnitSize + 1), p);
  EXPECT_EQ(heap_->Stats().mapped.value, before + MiB(1) + 2 * kUnitSize);
  ASSERT_EQ(cache_->Reallocate(p, MiB(1) + kUnitSize), p);
  EXPECT_EQ(heap_->Stats().mapped.value, before + MiB(1) + kUnitSize);
  cache_->Free(p);
  EXPECT_EQ(heap_->Stats().mapped.value, before);
  EXPECT_EQ(heap_->absent().value, 0u);
}

// As in bench/malloc_benchmark's large_buffers.
TEST_F(LargeObjectTest, BuffersOfChangingSizesKeepLittleMoreThanTheyHadAtMost) {
  std::vector<void*> live(4);
  std::vector<std::size_t> sizes(4);
  std::size_t peak = 0;
  std::uint64_t random = 1;
  for (int i = 0; i < 1000; ++i) {
    const std::size_t slot = static_cast<std::size_t>(i) % live.size();
    random = random * 6364136223846793005 + 1442695040888963407;
    cache_->Free(live[slot]);
    sizes[slot] = MiB(5) + (random >> 40) % MiB(20);
    live[slot] = cache_->Allocate(sizes[slot]);
    ASSERT_NE(live[slot], nullptr);
    peak = std::max(peak, heap_->Stats().mapped.value);
    const std::size_t held = heap_->Stats().mapped.value + heap_.space().Stats().free_resident.value;
    // And what is left of the last extent that went.
    ASSERT_LE(held, peak + std::max(peak / 4, MiB(8)) + MiB(1)) << i;
  }
  for (void* p : live) cache_->Free(p);
}

}  // namespace
}  // namespace freehold::allocator
