// Many threads in the heap's slow paths at once, for TSan above all.
#include <atomic>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"

namespace freehold::allocator {
namespace {

#if defined(FREEHOLD_DEBUG_CHECKS)
constexpr int kRounds = 20;
#else
constexpr int kRounds = 200;
#endif

// Owner and others free the same spans' objects; the owner leaves in the middle of it.
TEST(ObjectHeapStressTest, ThreadsLeaveWhileOthersFreeTheirObjects) {
  TestHeap heap(ObjectHeapOptions{.decay = vm::Milliseconds(1), .remote_batch = {500}});
  for (int round = 0; round < kRounds; ++round) {
    constexpr int kObjects = 3000;
    std::vector<std::atomic<void*>> objects(kObjects);
    std::atomic<int> freed = 0;
    std::vector<std::thread> threads;
    threads.emplace_back([&] {
      AttachedThread owner(*heap);
      for (int i = 0; i < kObjects; ++i) objects[i].store(owner->Allocate(16 + i % 700));
    });
    for (int t = 0; t < 2; ++t) {
      threads.emplace_back([&] {
        AttachedThread cache(*heap);
        while (freed.load() < kObjects) {
          for (auto& object : objects) {
            if (void* p = object.exchange(nullptr)) {
              cache->Free(p);
              ++freed;
            }
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    ASSERT_EQ(heap->Stats().allocated.value, 0u);
    ASSERT_EQ(heap->Stats().active.value, 0u);
  }
  heap->CheckInvariants();
}

TEST(ObjectHeapStressTest, EverythingAtOnce) {
  TestHeap heap(ObjectHeapOptions{.decay = vm::Milliseconds(1), .shards = 2, .remote_batch = {2000}});
  constexpr int kThreads = 4;
  std::vector<std::atomic<void*>> objects(2000);
  std::atomic<int> running = kThreads;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::uint64_t random = 88172645463325252u + t;
      for (int generation = 0; generation < kRounds; ++generation) {
        AttachedThread cache(*heap);
        for (int i = 0; i < 2000; ++i) {
          random ^= random << 13;
          random ^= random >> 7;
          random ^= random << 17;
          const std::size_t size = random % 100 == 0 ? (random >> 8) % 300000 : (random >> 8) % 1500;
          if (random % 3000 == 0) heap->Trim(cache.get());
          auto* p = static_cast<char*>(cache->Allocate(size));
          if (p != nullptr) p[0] = 1;
          cache->Free(objects[(random >> 32) % objects.size()].exchange(p));
        }
      }
      --running;
    });
  }
  // A keeper and an observer.
  threads.emplace_back([&] {
    while (running.load() > 0) {
      heap->Tick(heap.space().kernel().Now());
      heap->Trim();
      const HeapStats stats = heap->Stats();
      EXPECT_LE(stats.threads, std::uint64_t{kThreads});
    }
  });
  for (std::thread& thread : threads) thread.join();
  for (auto& object : objects) heap->Free(object.exchange(nullptr));
  EXPECT_EQ(heap->Stats().allocated.value, 0u);
  heap->CheckInvariants();
}

}  // namespace
}  // namespace freehold::allocator
