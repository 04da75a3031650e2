#include "allocator/thread_cache.h"

#include <cerrno>
#include <set>
#include <thread>
#include <vector>

#include "allocator/misuse.h"
#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"

namespace freehold::allocator {
namespace {

class ThreadCacheTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(heap_.ok() && cache_.get() != nullptr); }

  std::uint64_t Spans(std::size_t object_size) {
    struct Query {
      std::size_t size;
      std::uint64_t spans;
    } query{object_size, 0};
    heap_->ForEachSizeClass(
        [](void* context, const SizeClassStats& stats) {
          auto* query = static_cast<Query*>(context);
          if (stats.object_size == query->size) query->spans = stats.spans;
        },
        &query);
    return query.spans;
  }

  // Bytes, of all threads.
  std::uint64_t AtHand() {
    std::uint64_t bytes = 0;
    heap_->ForEachCache([](void* sum, const CacheStats& stats) { *static_cast<std::uint64_t*>(sum) += stats.at_hand.value; },
                        &bytes);
    return bytes;
  }

  TestHeap heap_;
  AttachedThread cache_{*heap_};
};

TEST_F(ThreadCacheTest, ObjectsOfEverySizeKeepTheirContent) {
  std::vector<std::pair<void*, std::size_t>> objects;
  for (std::size_t size = 0; size <= 2 * kMaxClassSize; size += size < 4096 ? 1 : 509) {
    void* p = cache_->Allocate(size);
    ASSERT_NE(p, nullptr);
    ASSERT_TRUE(IsAligned(p, kMinAlignment));
    ASSERT_GE(heap_->UsableSize(p), size);
    ASSERT_TRUE(heap_->Owns(p));
    Fill(p, size, size);
    objects.emplace_back(p, size);
  }
  for (const auto& [p, size] : objects) {
    ASSERT_TRUE(HasContent(p, size, size)) << size;
    cache_->Free(p);
  }
}

TEST_F(ThreadCacheTest, ObjectsDoNotOverlap) {
  std::set<std::uintptr_t> starts;
  for (int i = 0; i < 20000; ++i) {
    const auto start = reinterpret_cast<std::uintptr_t>(cache_->Allocate(48));
    const auto next = starts.lower_bound(start);
    if (next != starts.end()) {
      ASSERT_GE(*next, start + 48);
    }
    if (next != starts.begin()) {
      ASSERT_LE(*std::prev(next) + 48, start);
    }
    starts.insert(start);
  }
}

TEST_F(ThreadCacheTest, FreedObjectIsTheNextOneAllocated) {
  void* p = cache_->Allocate(100);
  cache_->Free(p);
  EXPECT_EQ(cache_->Allocate(100), p);
}

TEST_F(ThreadCacheTest, ObjectsThatWereFreedLastAreAllocatedFirst) {
  for (const std::size_t size : {1, 100, 1000, 1100, 5000, 16000, 20000, 100000}) {
    void* first = cache_->Allocate(size);
    void* second = cache_->Allocate(size);
    cache_->Free(first);
    cache_->Free(second);
    EXPECT_EQ(cache_->Allocate(size), second);
    EXPECT_EQ(cache_->Allocate(size), first);
    cache_->Free(first);
    cache_->Free(second);
    heap_->CheckInvariants();
  }
}

TEST_F(ThreadCacheTest, WhatIsKeptAtHandIsBounded) {
  std::vector<void*> objects;
  for (std::size_t size = 1100; size <= 131072; size += 1024) {
    for (int i = 0; i < 30; ++i) objects.push_back(cache_->Allocate(size));
  }
  const std::size_t held = heap_->Stats().allocated.value;
  for (void* p : objects) cache_->Free(p);
  heap_->CheckInvariants();
  // At hand, and counted as held: 8 MiB; current spans; an eighth of full ones.
  EXPECT_LE(heap_->Stats().allocated.value, held / 8 + (16 << 20));
  // Of one class alone, nothing that was only freed, and a span.
  AttachedThread other(*heap_);
  objects.clear();
  const std::size_t before = heap_->Stats().allocated.value;
  for (int i = 0; i < 1000; ++i) objects.push_back(other->Allocate(8192));
  for (void* p : objects) other->Free(p);
  EXPECT_LE(heap_->Stats().allocated.value, before + 8 * 8192 + kUnitSize);
}

// Sixteen objects at hand could each keep a span from going back.
TEST_F(ThreadCacheTest, NothingIsKeptAtHandOfWhatIsOnlyFreed) {
  for (const bool by_another : {false, true}) {
    std::vector<void*> objects;
    for (int i = 0; i < 1000; ++i) objects.push_back(cache_->Allocate(8192));
    const std::uint64_t spans = Spans(8192);
    // In an order in which the last objects are of as many spans.
    const auto free_all = [&](ThreadCache& cache) {
      for (std::size_t first = 0; first < 8; ++first) {
        for (std::size_t i = first; i < objects.size(); i += 8) cache.Free(objects[i]);
      }
    };
    if (by_another) {
      std::thread([&] { free_all(*AttachedThread(*heap_).get()); }).join();
      void* p = cache_->Allocate(9000);  // a slow path, which takes in what came back
      cache_->Free(p);
      heap_->Trim();
    } else {
      free_all(*cache_);
    }
    EXPECT_GE(spans, 120u);
    EXPECT_LE(Spans(8192), 2u) << by_another;
    heap_->CheckInvariants();
  }
}

// A class that was only freed to is kept at hand again once it is allocated from.
TEST_F(ThreadCacheTest, WhatIsAskedForIsKeptAtHandAgain) {
  std::vector<void*> objects;
  for (int i = 0; i < 100; ++i) objects.push_back(cache_->Allocate(8192));
  for (void* p : objects) cache_->Free(p);
  void* first = cache_->Allocate(8192);
  void* second = cache_->Allocate(8192);
  cache_->Free(second);
  cache_->Free(first);
  EXPECT_EQ(cache_->Allocate(8192), first);
  EXPECT_EQ(cache_->Allocate(8192), second);
  cache_->Free(first);
  cache_->Free(second);
}

// What one phase allocates and the next one frees is more than there is room for at first.
TEST_F(ThreadCacheTest, WhatPhasesNeedIsKeptAtHand) {
  constexpr std::size_t kCount = 4000;
  std::set<void*> before;
  for (int round = 0; round < 6; ++round) {
    std::set<void*> objects;
    for (std::size_t i = 0; i < kCount; ++i) objects.insert(cache_->Allocate(48));
    ASSERT_EQ(objects.size(), kCount);
    if (round >= 4) {
      EXPECT_EQ(objects, before);
    }
    for (void* p : objects) cache_->Free(p);
    if (round >= 3) {
      EXPECT_GE(AtHand(), kCount * 48 * 3 / 4);
    }
    heap_->CheckInvariants();
    before = std::move(objects);
  }
  // Once it is only freed to, nothing is.
  std::vector<void*> many;
  for (int i = 0; i < 50000; ++i) many.push_back(cache_->Allocate(48));
  for (void* p : many) cache_->Free(p);
  EXPECT_EQ(AtHand(), 0u);
  EXPECT_LE(Spans(48), 1u);
}

// Objects of a closed class and of others, in turn: each goes where it belongs.
TEST_F(ThreadCacheTest, ClosedAndOpenClassesAreFreedToInTurn) {
  for (int round = 0; round < 4; ++round) {
    std::vector<void*> closed;
    std::vector<void*> open;
    for (int i = 0; i < 20000; ++i) closed.push_back(cache_->Allocate(256));
    for (int i = 0; i < 1000; ++i) open.push_back(cache_->Allocate(48));
    for (std::size_t i = 0; i < closed.size(); ++i) {
      cache_->Free(closed[i]);
      if (i % 20 == 0) cache_->Free(open[i / 20]);
      if (i % 1000 == 0) heap_->CheckInvariants();
    }
    EXPECT_LE(Spans(256), 1u);
    EXPECT_LE(Spans(48), 1u);
  }
  // What another thread allocated goes to its owner.
  std::vector<void*> others;
  std::thread([&] {
    AttachedThread other(*heap_);
    for (int i = 0; i < 20000; ++i) others.push_back(other->Allocate(256));
  }).join();
  for (void* p : others) cache_->Free(p);
  heap_->CheckInvariants();
  heap_->Trim(cache_.get());
  EXPECT_EQ(heap_->Stats().allocated.value, 0u);
}

TEST_F(ThreadCacheTest, RoomThatGrowsIsBounded) {
  for (int round = 0; round < 4; ++round) {
    for (SizeClass size_class = 0; size_class < kSizeClassCount; ++size_class) {
      const std::size_t size = kSizeClasses[size_class].size;
      for (const std::size_t bytes : {100 << 10, 300 << 10, 500 << 10, 600 << 10}) {
        std::vector<void*> objects;
        for (std::size_t i = 0; i < bytes / size; ++i) objects.push_back(cache_->Allocate(size));
        for (void* p : objects) cache_->Free(p);
      }
    }
    heap_->CheckInvariants();  // of a class, too
    EXPECT_LE(AtHand(), 8u << 20);
  }
  heap_->Trim(cache_.get());
  EXPECT_EQ(AtHand(), 0u);
  EXPECT_EQ(heap_->Stats().allocated.value, 0u);
}

TEST_F(ThreadCacheTest, ReallocationsThatGoOnSeldomMove) {
  std::size_t size = 4096;
  void* p = cache_->Allocate(size);
  Fill(p, size, 5);
  int moves = 0;
  while (size < 900 << 10) {
    const std::size_t grown = size + size / 8;
    void* to = cache_->Reallocate(p, grown);
    ASSERT_NE(to, nullptr);
    ASSERT_TRUE(HasContent(to, 4096, 5));
    if (size > 16384 && to != p) ++moves;
    cache_->Allocate(3000);  // neighbours come meanwhile
    p = to;
    size = grown;
  }
  EXPECT_LE(moves, 1);
  ASSERT_EQ(cache_->Reallocate(p, 20000), p);
  EXPECT_GE(heap_->UsableSize(p), 20000u);
  EXPECT_LT(heap_->UsableSize(p), 25000u);
  EXPECT_TRUE(HasContent(p, 4096, 5));
  void* small = cache_->Reallocate(p, 4096);
  EXPECT_TRUE(HasContent(small, 4096, 5));
  EXPECT_EQ(heap_->UsableSize(small), 4096u);
}

TEST_F(ThreadCacheTest, FreeOfNull) {
  cache_->Free(nullptr);
  cache_->FreeSized(nullptr, 100);
  heap_->Free(nullptr);
  EXPECT_EQ(heap_->UsableSize(nullptr), 0u);
}

TEST_F(ThreadCacheTest, ErrnoIsNeverTouched) {
  errno = 77;
  EXPECT_EQ(cache_->Allocate(SIZE_MAX), nullptr);
  void* p = cache_->Allocate(1000);
  p = cache_->Reallocate(p, 5 << 20);
  cache_->Free(p);
  EXPECT_EQ(errno, 77);
}

TEST_F(ThreadCacheTest, ZeroedObjectsAreZeroWhateverWasThereBefore) {
  for (const std::size_t size : {1, 16, 17, 100, 1024, 1025, 3000, 5000, 9000, 40000, 131072}) {
    std::vector<void*> objects;
    for (int round = 0; round < 3; ++round) {
      for (int i = 0; i < 100; ++i) {
        void* p = cache_->AllocateZeroed(size);
        ASSERT_TRUE(IsZero(p, size)) << size;
        Fill(p, size, 0xff);
        objects.push_back(p);
      }
      for (void* p : objects) cache_->Free(p);
      objects.clear();
    }
  }
}

TEST_F(ThreadCacheTest, EveryAlignment) {
  std::vector<void*> objects;
  for (std::size_t alignment = 1; alignment <= kUnitSize; alignment *= 2) {
    for (std::size_t size = 0; size <= kMaxClassSize; size += 1021) {
      void* p = cache_->AllocateAligned(alignment, size);
      ASSERT_TRUE(IsAligned(p, alignment)) << alignment << " " << size;
      ASSERT_GE(heap_->UsableSize(p), size);
      Fill(p, size, alignment + size);
      objects.push_back(p);
    }
    for (void* p : objects) cache_->Free(p);
    objects.clear();
  }
}

TEST_F(ThreadCacheTest, ReallocateKeepsContent) {
  for (const std::size_t from : {1, 16, 100, 1000, 10000, 100000, 200000, 2000000}) {
    for (const std::size_t to : {1, 16, 100, 1000, 10000, 100000, 200000, 2000000}) {
      void* p = cache_->Allocate(from);
      Fill(p, from, 11);
      void* q = cache_->Reallocate(p, to);
      ASSERT_NE(q, nullptr);
      ASSERT_TRUE(HasContent(q, std::min(from, to), 11)) << from << " to " << to;
      ASSERT_GE(heap_->UsableSize(q), to);
      Fill(q, to, 12);
      cache_->Free(q);
    }
  }
  EXPECT_EQ(heap_->Stats().large_objects, 0u);
}

TEST_F(ThreadCacheTest, ReallocateInPlaceWhereItFits) {
  void* p = cache_->Allocate(100);
  EXPECT_EQ(cache_->Reallocate(p, 112), p);
  EXPECT_EQ(cache_->Reallocate(p, 60), p);
  void* smaller = cache_->Reallocate(p, 20);  // too much would be wasted
  EXPECT_NE(smaller, p);
  EXPECT_LT(heap_->UsableSize(smaller), 60u);
  EXPECT_EQ(heap_->UsableSize(cache_->Reallocate(nullptr, 100)), 112u);
}

TEST_F(ThreadCacheTest, FreeSized) {
  for (const std::size_t size : {1, 100, 5000, 100000, 300000, 3000000}) {
    cache_->FreeSized(cache_->Allocate(size), size);
  }
}

TEST_F(ThreadCacheTest, EmptySpansGoBack) {
  std::vector<void*> objects;
  for (int i = 0; i < 100000; ++i) objects.push_back(cache_->Allocate(64));
  EXPECT_EQ(Spans(64), (100000 + 1023) / 1024u);
  for (void* p : objects) cache_->Free(p);
  EXPECT_LE(Spans(64), 1u);
  EXPECT_GE(heap_->Stats().free_dirty.value, 90 * kUnitSize);
}

TEST_F(ThreadCacheTest, FullSpansServeAgainOnceEnoughCameFree) {
  constexpr std::size_t kPerSpan = kUnitSize / 64;
  std::vector<void*> objects;
  for (std::size_t i = 0; i < 20 * kPerSpan; ++i) objects.push_back(cache_->Allocate(64));
  const std::uint64_t spans = Spans(64);
  // An eighth of every span: no new one is needed for as many objects.
  for (std::size_t i = 0; i < objects.size(); i += 8) cache_->Free(objects[i]);
  for (std::size_t i = 0; i < objects.size(); i += 8) objects[i] = cache_->Allocate(64);
  EXPECT_LE(Spans(64), spans + 1);
  for (void* p : objects) cache_->Free(p);
}

TEST_F(ThreadCacheTest, MemoryIsTouchedOnlyWhenItIsUsed) {
  void* p = cache_->Allocate(16);
  const auto resident = heap_.space().kernel().CountResident(
      vm::PageRange::FromBytes(reinterpret_cast<void*>(AddressOf(p) & ~(kUnitSize - 1)), {kUnitSize}));
  ASSERT_TRUE(resident.ok());
  EXPECT_LE(resident->value, 1u);
}

TEST_F(ThreadCacheTest, ClassesThatAreIdleGiveTheirSpanBack) {
  std::vector<void*> objects;
  for (int i = 0; i < 50; ++i) objects.push_back(cache_->Allocate(40000));
  for (void* p : objects) cache_->Free(p);
  EXPECT_GE(Spans(40960), 1u);
  for (int i = 0; i < 2000; ++i) {  // slow paths of another class: it needs more than there is room for at hand
    for (int k = 0; k < 50; ++k) objects[k] = cache_->Allocate(30000);
    for (int k = 0; k < 50; ++k) cache_->Free(objects[k]);
  }
  EXPECT_EQ(Spans(40960), 0u);
}

// ---- other threads ----

TEST_F(ThreadCacheTest, ObjectsFreedElsewhereComeBackToTheirThread) {
  std::vector<void*> objects;
  for (int round = 0; round < 50; ++round) {
    for (int i = 0; i < 10000; ++i) objects.push_back(cache_->Allocate(128));
    std::thread([&] {
      AttachedThread other(*heap_);
      for (void* p : objects) other->Free(p);
    }).join();
    objects.clear();
  }
  EXPECT_LE(Spans(128), 3 * 10000 * 128 / kUnitSize);
}

// Whoever frees an object may have it again; when its thread ends, it goes home.
TEST_F(ThreadCacheTest, ObjectsOfOthersAreKeptAtHandAndGoHome) {
  for (const std::size_t size : {48, 1000, 5000, 40000}) {
    const std::size_t object_size = kSizeClasses[ClassOf(size)].size;
    std::set<void*> objects;
    while (objects.size() < 100) objects.insert(cache_->Allocate(size));
    const std::uint64_t spans = Spans(object_size);
    std::thread([&] {
      AttachedThread other(*heap_);
      void* own = other->Allocate(size);  // what a thread never asks for it does not keep
      const std::vector<void*> some(objects.begin(), std::next(objects.begin(), 3));
      for (void* p : some) other->Free(p);
      void* again = other->Allocate(size);
      EXPECT_EQ(again, some.back());
      other->Free(again);
      for (auto p = std::next(objects.begin(), 3); p != objects.end(); ++p) other->Free(*p);
      other->Free(own);
    }).join();
    heap_->CheckInvariants();
    std::set<void*> all;
    while (all.size() < 100) EXPECT_TRUE(all.insert(cache_->Allocate(size)).second);
    EXPECT_LE(Spans(object_size), spans + 1) << size;
    for (void* p : all) cache_->Free(p);
  }
}

// Two threads that hand objects to and fro: after a while nothing goes home, and nobody waits for the other's inbox.
TEST_F(ThreadCacheTest, WhatGoesToAndFroStaysWithWhoeverFreesIt) {
  AttachedThread other(*heap_);
  std::set<void*> seen;
  const auto round = [&] {
    void* to[10];
    void* fro[10];
    for (int i = 0; i < 10; ++i) {
      seen.insert(to[i] = cache_->Allocate(200));
      seen.insert(fro[i] = other->Allocate(200));
    }
    for (int i = 0; i < 10; ++i) {
      other->Free(to[i]);
      cache_->Free(fro[i]);
    }
  };
  round();
  const std::size_t objects = seen.size();
  for (int i = 0; i < 1000; ++i) round();
  EXPECT_EQ(seen.size(), objects);
  heap_->CheckInvariants();
}

TEST_F(ThreadCacheTest, BatchesOfOtherThreadsAreBounded) {
  void* p[64];
  for (void*& object : p) object = cache_->Allocate(8192);
  std::thread([&] {
    AttachedThread other(*heap_);
    for (void* object : p) other->Free(object);  // 512 KiB: many batches
    const std::size_t held = heap_->Stats().allocated.value;
    EXPECT_GE(held, 0u);
  }).join();
  // What is left in the inbox is taken in by the next slow path.
  for (int i = 0; i < 200; ++i) cache_->Free(cache_->Allocate(9000 + i * 100));
  EXPECT_LE(Spans(8192), 9u);
}

TEST_F(ThreadCacheTest, ThreadWithoutCacheCanFree) {
  std::vector<void*> objects;
  for (int i = 0; i < 5000; ++i) objects.push_back(cache_->Allocate(i % 3 == 0 ? 100 : 20000));
  objects.push_back(cache_->Allocate(1 << 20));
  objects.push_back(cache_->Allocate(5 << 20));
  std::thread([&] {
    for (void* p : objects) heap_->Free(p);
  }).join();
  EXPECT_EQ(heap_->Stats().large_objects, 0u);
  for (int i = 0; i < 5000; ++i) objects[i] = cache_->Allocate(100);
  for (int i = 0; i < 5000; ++i) cache_->Free(objects[i]);
}

}  // namespace
}  // namespace freehold::allocator
