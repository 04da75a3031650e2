#include "allocator/object_heap.h"

#include <atomic>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"
#include "vm/os/fake_kernel.h"

namespace freehold::allocator {
namespace {

constexpr std::size_t MiB(std::size_t n) { return n << 20; }

// How much of the space's memory is resident.
std::size_t Resident(const vm::AddressSpace& space) {
  struct Sum {
    vm::os::Kernel& kernel;
    std::size_t bytes = 0;
  } sum{space.kernel()};
  space.ForEachVma(
      [](void* context, const vm::VmaInfo& vma) {
        auto* sum = static_cast<Sum*>(context);
        const auto resident = sum->kernel.CountResident(vma.range);
        if (resident.ok()) sum->bytes += resident->bytes().value;
      },
      &sum);
  return sum.bytes;
}

TEST(ObjectHeapTest, CreateAndDestroy) {
  TestHeap heap;
  ASSERT_TRUE(heap.ok());
  EXPECT_EQ(heap->Stats().mapped.value, 0u);
  heap->CheckInvariants();
}

TEST(ObjectHeapTest, SmallReservation) {
  vm::os::LinuxKernel kernel;
  TestHeap heap(kernel, {.max_threads = 16}, vm::MiB(64));
  ASSERT_TRUE(heap.ok());
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  while (void* p = cache->Allocate(1000)) objects.push_back(p);
  EXPECT_GT(objects.size(), 4000u);
  for (void* p : objects) cache->Free(p);
  EXPECT_NE(cache->Allocate(1000), nullptr);
}

TEST(ObjectHeapTest, ThreadsAreLimited) {
  vm::os::LinuxKernel kernel;
  TestHeap heap(kernel, {.max_threads = 3});
  ThreadCache* first = heap->AttachThread();
  heap->AttachThread();
  heap->AttachThread();
  EXPECT_EQ(heap->AttachThread(), nullptr);
  heap->DetachThread(first);
  EXPECT_EQ(heap->AttachThread(), first);
}

TEST(ObjectHeapTest, CacheOfAThreadThatIsGoneIsTakenOver) {
  TestHeap heap;
  ThreadCache* cache = heap->AttachThread();
  void* p = cache->Allocate(100);
  heap->DetachThread(cache);
  EXPECT_EQ(heap->Stats().orphans, 1u);
  EXPECT_EQ(heap->AttachThread(), cache);
  EXPECT_EQ(heap->Stats().orphans, 0u);
  EXPECT_EQ(heap->Stats().threads, 1u);
  cache->Free(p);
  heap->DetachThread(cache);
  EXPECT_EQ(heap->Stats().allocated.value, 0u);
  heap->CheckInvariants();
}

TEST(ObjectHeapTest, StatsCountObjects) {
  TestHeap heap;
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  for (int i = 0; i < 1024 * 10; ++i) objects.push_back(cache->Allocate(64));
  objects.push_back(cache->Allocate(MiB(3)));
  const HeapStats stats = heap->Stats();
  EXPECT_EQ(stats.allocated.value, 64 * 1024 * 10 + MiB(3));
  EXPECT_EQ(stats.large.value, MiB(3));
  EXPECT_EQ(stats.large_objects, 1u);
  EXPECT_GE(stats.active.value, stats.allocated.value);
  EXPECT_EQ(stats.mapped, stats.active + stats.free_clean + stats.free_dirty);
  EXPECT_GT(stats.metadata.value, 0u);
  for (void* p : objects) cache->Free(p);
}

// ---- nothing is stranded ----

TEST(ObjectHeapTest, ThreadExitStrandsNothing) {
  TestHeap heap;
  std::vector<void*> kept;
  for (int round = 0; round < 10; ++round) {
    std::thread([&] {
      AttachedThread cache(*heap);
      std::vector<void*> objects;
      for (int i = 0; i < 20000; ++i) objects.push_back(cache->Allocate(16 + i % 2000));
      for (std::size_t i = 0; i < objects.size(); ++i) {
        if (i % 100 != 0) {
          cache->Free(objects[i]);
        } else {
          kept.push_back(objects[i]);
        }
      }
    }).join();
  }
  {
    AttachedThread cache(*heap);
    for (void* p : kept) cache->Free(p);
  }
  const HeapStats stats = heap->Stats();
  EXPECT_EQ(stats.allocated.value, 0u);
  EXPECT_EQ(stats.active.value, 0u);
  heap->CheckInvariants();
}

TEST(ObjectHeapTest, ObjectsOfThreadsThatAreGoneComeFreeThroughAnyThread) {
  TestHeap heap;
  std::vector<void*> objects;
  std::vector<std::thread> threads;
  std::atomic<int> running = 4;
  std::vector<std::vector<void*>> parts(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      AttachedThread cache(*heap);
      for (int i = 0; i < 10000; ++i) parts[t].push_back(cache->Allocate(200));
      --running;
      while (running.load() > 0) std::this_thread::yield();  // each has a cache of its own
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(heap->Stats().orphans, 4u);
  // By a thread without a cache, without any of the orphans being attached again.
  for (const auto& part : parts) {
    for (void* p : part) heap->Free(p);
  }
  EXPECT_EQ(heap->Stats().allocated.value, 0u);
  EXPECT_EQ(heap->Stats().active.value, 0u);
  heap->CheckInvariants();
}

TEST(ObjectHeapTest, SpansOfThreadsThatAreGoneServeOthers) {
  const OnOneCpu on_one_cpu;
  TestHeap heap;
  std::vector<void*> kept;
  ThreadCache* gone = heap->AttachThread();
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  for (int i = 0; i < 100000; ++i) objects.push_back(gone->Allocate(64));
  for (std::size_t i = 0; i < objects.size(); ++i) {
    if (i % 2 == 0) gone->Free(objects[i]);
  }
  heap->DetachThread(gone);
  const std::size_t mapped = heap->Stats().mapped.value;
  for (std::size_t i = 0; i < objects.size(); i += 2) objects[i] = cache->Allocate(64);
  EXPECT_EQ(heap->Stats().mapped.value, mapped);  // the gaps were filled
  heap->CheckInvariants();
  for (void* p : objects) cache->Free(p);
  for (int i = 0; i < 100000; ++i) objects[i] = cache->Allocate(64);
  for (void* p : objects) cache->Free(p);
  heap->CheckInvariants();
}

TEST(ObjectHeapTest, ProducerAndConsumerUseBoundedMemory) {
  TestHeap heap;
  constexpr int kRounds = 300;
  constexpr int kObjects = 2000;
  std::atomic<std::vector<void*>*> mail{nullptr};
  std::thread consumer([&] {
    AttachedThread cache(*heap);
    for (int round = 0; round < kRounds; ++round) {
      std::vector<void*>* objects;
      while ((objects = mail.exchange(nullptr)) == nullptr) std::this_thread::yield();
      for (void* p : *objects) cache->Free(p);
      delete objects;
    }
  });
  {
    AttachedThread cache(*heap);
    for (int round = 0; round < kRounds; ++round) {
      auto* objects = new std::vector<void*>;
      for (int i = 0; i < kObjects; ++i) objects->push_back(cache->Allocate(100));
      std::vector<void*>* expected = nullptr;
      while (!mail.compare_exchange_weak(expected, objects)) {
        expected = nullptr;
        std::this_thread::yield();
      }
    }
    consumer.join();
    EXPECT_LE(heap->Stats().mapped.value, MiB(16));  // of 60 MB that went through
  }
  EXPECT_EQ(heap->Stats().allocated.value, 0u);
}

// ---- giving back ----

TEST(ObjectHeapTest, TrimGivesMemoryBack) {
  TestHeap heap;
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  for (std::size_t size : {100, 3000, 20000, 500000}) {
    for (std::size_t i = 0; i < MiB(8) / size; ++i) {
      objects.push_back(cache->Allocate(size));
      Fill(objects.back(), size, i);
    }
  }
  EXPECT_GE(Resident(heap.space()), MiB(31));
  for (void* p : objects) cache->Free(p);
  EXPECT_GE(heap->Trim(), MiB(28));
  EXPECT_LE(Resident(heap.space()), MiB(2));
  EXPECT_EQ(heap->Trim(), 0u);
}

// Down to the last span, with the thread's own help.
TEST(ObjectHeapTest, TrimGivesBackWhatTheThreadHasAtHand) {
  TestHeap heap;
  AttachedThread cache(*heap);
  const auto use_every_class = [&] {
    std::vector<void*> objects;
    for (std::size_t size = 16; size <= kMaxClassSize; size += size / 4) {
      for (int i = 0; i < 20; ++i) objects.push_back(cache->Allocate(size));
    }
    return objects;
  };
  std::vector<void*> objects = use_every_class();
  for (void* p : objects) cache->Free(p);
  EXPECT_GT(heap->Trim(), 0u);
  EXPECT_GT(heap->Stats().active.value, MiB(1)) << "current spans";
  EXPECT_GT(heap->Trim(cache.get()), MiB(1));
  EXPECT_EQ(heap->Stats().active.value, 0u);
  EXPECT_EQ(heap->Stats().mapped.value, 0u);
  EXPECT_EQ(heap->Trim(cache.get()), 0u);
  // It goes on; what is in use stays.
  objects = use_every_class();
  for (std::size_t i = 0; i < objects.size(); ++i) Fill(objects[i], 16, i);
  heap->Trim(cache.get());
  for (std::size_t i = 0; i < objects.size(); ++i) {
    EXPECT_TRUE(HasContent(objects[i], 16, i));
    cache->Free(objects[i]);
  }
  heap->CheckInvariants();
}

// What this thread freed of others is on its way, and there is nobody to take it in but the heap.
TEST(ObjectHeapTest, TrimTakesInWhatThreadsThatAreGoneWillNot) {
  TestHeap heap;
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  std::thread([&] {
    AttachedThread other(*heap);
    for (int i = 0; i < 100; ++i) objects.push_back(other->Allocate(500));
  }).join();
  for (void* p : objects) cache->Free(p);
  EXPECT_GT(heap->Stats().active.value, 0u);
  EXPECT_GT(heap->Trim(cache.get()), 0u);
  EXPECT_EQ(heap->Stats().active.value, 0u);
  heap->CheckInvariants();
}

TEST(ObjectHeapTest, IdleMemoryGoesBackWithTime) {
  TestHeap heap(ObjectHeapOptions{.decay = vm::Milliseconds(100)});
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  for (int i = 0; i < 100000; ++i) {
    objects.push_back(cache->Allocate(300));
    Fill(objects.back(), 300, i);
  }
  for (void* p : objects) cache->Free(p);
  const std::size_t burst = Resident(heap.space());
  vm::Nanoseconds now = heap.space().kernel().Now();
  EXPECT_GE(burst, MiB(29));
  heap->Tick(now = now + vm::Milliseconds(100));
  heap->Tick(now + vm::Milliseconds(50));  // not due
  EXPECT_GE(Resident(heap.space()), burst - MiB(1));
  heap->Tick(now = now + vm::Milliseconds(100));
  EXPECT_LE(Resident(heap.space()), burst / 20);
  // The address space goes back as well.
  for (int i = 0; i < 3; ++i) heap->Tick(now = now + vm::Milliseconds(100));
  EXPECT_LE(heap->Stats().mapped.value, MiB(8));
  heap->CheckInvariants();
}

TEST(ObjectHeapTest, AllocationsTickByThemselves) {
  TestHeap heap(ObjectHeapOptions{.decay = vm::Milliseconds(1)});
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  for (int i = 0; i < 10000; ++i) objects.push_back(cache->Allocate(3000));
  for (void* p : objects) cache->Free(p);
  const vm::Nanoseconds start = heap.space().kernel().Now();
  while (heap->Stats().purged_pages == 0 &&
         heap.space().kernel().Now() < start + vm::Milliseconds(20000)) {
    objects.clear();
    for (int i = 0; i < 200; ++i) objects.push_back(cache->Allocate(20000));  // spans come and go
    for (void* p : objects) cache->Free(p);
  }
  EXPECT_GT(heap->Stats().purged_pages, 0u);
}

TEST(ObjectHeapTest, LiveObjectsSurviveTrim) {
  TestHeap heap;
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  for (int i = 0; i < 20000; ++i) {
    objects.push_back(cache->Allocate(16 + i % 3000));
    Fill(objects.back(), 16 + i % 3000, i);
  }
  for (int i = 0; i < 20000; ++i) {
    if (i % 3 == 0) continue;
    cache->Free(objects[i]);
    if (i % 1000 == 1) heap->Trim();
  }
  for (int i = 0; i < 20000; i += 3) {
    ASSERT_TRUE(HasContent(objects[i], 16 + i % 3000, i));
    cache->Free(objects[i]);
  }
}

}  // namespace
}  // namespace freehold::allocator
