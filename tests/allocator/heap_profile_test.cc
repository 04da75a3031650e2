#include "allocator/heap_profile.h"


#include <atomic>
#include <cmath>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"
#include "tests/allocator/heap_fork.h"
#include "tests/allocator/heap_model.h"
#include "vm/os/fake_kernel.h"

namespace freehold::allocator {
namespace {

// Stacks of one frame: what a test says that its thread is doing.
thread_local std::uintptr_t doing = 1;
unsigned CaptureDoing(void** frames, unsigned) {
  frames[0] = reinterpret_cast<void*>(doing);
  return 1;
}

ObjectHeapOptions Sampling(vm::Bytes interval) {
  return {.decay = vm::Milliseconds(5), .profile = {.interval = interval, .capture = CaptureDoing}};
}

using Key = std::pair<std::uintptr_t, std::size_t>;  // frame, size
std::map<Key, HeapProfile::Counts> Sites(ObjectHeap& heap) {
  std::map<Key, HeapProfile::Counts> sites;
  for (const AllocationSite* site = heap.profile()->sites(); site != nullptr; site = site->next) {
    EXPECT_EQ(site->depth, 1u);
    const Key key{reinterpret_cast<std::uintptr_t>(site->stack()[0]), site->object_size};
    EXPECT_EQ(sites.count(key), 0u) << "two sites of one stack and size";
    sites[key] = HeapProfile::CountsOf(*site);
  }
  return sites;
}
std::uint64_t Live(ObjectHeap& heap) {
  std::uint64_t live = 0;
  for (const auto& [key, counts] : Sites(heap)) live += counts.live;
  return live;
}
std::uint64_t Allocated(ObjectHeap& heap) {
  std::uint64_t allocated = 0;
  for (const auto& [key, counts] : Sites(heap)) allocated += counts.allocated;
  return allocated;
}

TEST(HeapProfileTest, NoneByDefault) {
  TestHeap heap;
  EXPECT_EQ(heap->profile(), nullptr);
}

TEST(HeapProfileTest, EveryObjectAtAnIntervalOfOne) {
  TestHeap heap(Sampling({1}));
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  for (const std::size_t size : {1, 100, 1000, 3000, 60000, 131072, 200000, 3 << 20}) {
    doing = size;
    for (int i = 0; i < 5; ++i) {
      objects.push_back(i % 2 == 0 ? cache->Allocate(size) : cache->AllocateZeroed(size));
      ASSERT_NE(objects.back(), nullptr);
      if (i % 2 != 0) {
        ASSERT_TRUE(IsZero(objects.back(), size)) << size;
      }
      Fill(objects.back(), size, i);
      ASSERT_EQ(Sites(*heap).at({size, heap->UsableSize(objects.back())}).allocated, i + 1u);
    }
  }
  doing = 7;
  objects.push_back(cache->AllocateAligned(64, 90));
  EXPECT_TRUE(IsAligned(objects.back(), 64));
  objects.push_back(cache->AllocateAligned(1 << 21, 90));
  EXPECT_TRUE(IsAligned(objects.back(), 1 << 21));
  EXPECT_EQ(Live(*heap), objects.size());
  heap->CheckInvariants();
  for (void* p : objects) cache->Free(p);
  EXPECT_EQ(Live(*heap), 0u);
  EXPECT_EQ(Allocated(*heap), objects.size());
  heap->CheckInvariants();
}

TEST(HeapProfileTest, FreesAreNoticedWhoeverFrees) {
  TestHeap heap(Sampling({1}));
  AttachedThread cache(*heap);
  void* small[3];
  void* large[3];
  for (int i = 0; i < 3; ++i) {
    small[i] = cache->Allocate(40);
    large[i] = cache->Allocate(400000);
  }
  EXPECT_EQ(Live(*heap), 6u);
  cache->FreeSized(small[0], 40);
  cache->Free(large[0]);
  EXPECT_EQ(Live(*heap), 4u);
  std::thread([&] {
    AttachedThread other(*heap);
    other->Free(small[1]);
    other->Free(large[1]);
  }).join();
  EXPECT_EQ(Live(*heap), 2u);
  heap->Free(small[2]);
  heap->Free(large[2]);
  EXPECT_EQ(Live(*heap), 0u);
}

TEST(HeapProfileTest, ReallocateMovesTheCount) {
  TestHeap heap(Sampling({1}));
  AttachedThread cache(*heap);
  doing = 1;
  void* p = cache->Allocate(100);
  Fill(p, 100, 3);
  doing = 2;
  p = cache->Reallocate(p, 1000);
  EXPECT_TRUE(HasContent(p, 100, 3));
  EXPECT_EQ(Sites(*heap).at({1, 112}).live, 0u);
  EXPECT_EQ(Sites(*heap).at({2, 1024}).live, 1u);
  doing = 3;
  p = cache->Reallocate(p, 1 << 20);
  doing = 4;
  p = cache->Reallocate(p, 2 << 20);  // a mapping of its own, with room to grow
  doing = 5;
  void* grown = cache->Reallocate(p, 3 << 20);
  EXPECT_EQ(grown, p);
  EXPECT_TRUE(HasContent(p, 100, 3));
  EXPECT_EQ(Sites(*heap).at({4, 2 << 20}).live, 0u);
  EXPECT_EQ(Sites(*heap).at({5, 3 << 20}).live, 1u);
  EXPECT_EQ(Live(*heap), 1u);
  cache->Free(p);
  EXPECT_EQ(Live(*heap), 0u);
}

TEST(HeapProfileTest, ThreadsThatDieKeepTheirCounts) {
  TestHeap heap(Sampling({1}));
  void* p = nullptr;
  std::thread([&] {
    doing = 77;
    AttachedThread cache(*heap);
    p = cache->Allocate(500);
    cache->Free(cache->Allocate(500));
  }).join();
  EXPECT_EQ(Sites(*heap).at({77, 512}).live, 1u);
  EXPECT_EQ(Sites(*heap).at({77, 512}).allocated, 2u);
  heap->Free(p);
  EXPECT_EQ(Live(*heap), 0u);
}

// What capturing a stack allocates is no sample, and works.
TEST(HeapProfileTest, CaptureMayAllocate) {
  static TestHeap* heap_of_capture = nullptr;
  static ThreadCache* cache_of_capture = nullptr;
  static int captures = 0;
  TestHeap heap({.profile = {.interval = {1}, .capture = [](void** frames, unsigned) {
                               ++captures;
                               void* p = cache_of_capture->Allocate(64);
                               void* large = cache_of_capture->Allocate(1 << 20);
                               EXPECT_TRUE(p != nullptr && large != nullptr);
                               cache_of_capture->Free(p);
                               cache_of_capture->Free(large);
                               frames[0] = heap_of_capture;
                               return 1u;
                             }}});
  AttachedThread cache(*heap);
  heap_of_capture = &heap;
  cache_of_capture = cache.get();
  void* p = cache->Allocate(64);
  void* large = cache->Allocate(1 << 20);
  EXPECT_EQ(captures, 2);
  EXPECT_EQ(Live(*heap), 2u);
  cache->Free(p);
  cache->Free(large);
}

// ---- What profiles say about a program ----

// As pprof does it.
double Unsampled(std::uint64_t count, std::size_t size, vm::Bytes interval) {
  return static_cast<double>(count) / (1 - std::exp(-static_cast<double>(size) / static_cast<double>(interval.value)));
}

// A mix of sizes and lifetimes: every site's estimate is right within six standard deviations.
TEST(HeapProfileTest, EstimatesAreRight) {
  const vm::Bytes interval = vm::KiB(16);
  TestHeap heap(Sampling(interval));
  AttachedThread cache(*heap);
  struct Kind {
    std::size_t size;
    std::uint64_t allocated;
    std::uint64_t keep;  // one in so many
  };
  const Kind kinds[] = {{16, 2'000'000, 3},    {64, 500'000, 2}, {64, 500'000, 1000}, {640, 50'000, 5},
                        {5120, 10'000, 4},     {57344, 4'000, 100}, {262144, 2'000, 50}};
  std::vector<std::vector<void*>> kept(std::size(kinds));
  // All of them take turns, in proportion.
  for (std::uint64_t step = 0; step < 2000; ++step) {
    for (std::size_t k = 0; k < std::size(kinds); ++k) {
      doing = k + 1;
      const std::uint64_t each = kinds[k].allocated / 2000;
      for (std::uint64_t i = 0; i < each; ++i) {
        void* p = cache->Allocate(kinds[k].size);
        ASSERT_NE(p, nullptr);
        if ((step * each + i) % kinds[k].keep == 0) {
          kept[k].push_back(p);
        } else {
          cache->Free(p);
        }
      }
    }
  }
  const auto sites = Sites(*heap);
  for (std::size_t k = 0; k < std::size(kinds); ++k) {
    SCOPED_TRACE(k);
    const HeapProfile::Counts counts = sites.at({k + 1, kinds[k].size});
    const auto expect = [&](std::uint64_t samples, std::uint64_t objects) {
      const double p = 1 / Unsampled(1, kinds[k].size, interval);
      const double deviation = std::sqrt(static_cast<double>(objects) * p * (1 - p)) / p;
      EXPECT_NEAR(Unsampled(samples, kinds[k].size, interval), static_cast<double>(objects), 6 * deviation + 1);
    };
    expect(counts.allocated, kinds[k].allocated);
    expect(counts.live, kept[k].size());
  }
  for (auto& objects : kept) {
    for (void* p : objects) cache->Free(p);
  }
  EXPECT_EQ(Live(*heap), 0u);
  heap->CheckInvariants();
}

// Two sites of one size whose calls are in step with each other and with frees: the next object after a list ends must
// not always be the same one's.
TEST(HeapProfileTest, RegularProgramsAreNotMisjudged) {
  const vm::Bytes interval = vm::KiB(4);
  TestHeap heap(Sampling(interval));
  AttachedThread cache(*heap);
  std::vector<void*> held;
  constexpr int kRounds = 200'000;
  for (int i = 0; i < kRounds; ++i) {
    doing = 1;
    for (int j = 0; j < 3; ++j) cache->Free(cache->Allocate(64));
    doing = 2;
    held.push_back(cache->Allocate(64));
  }
  const auto sites = Sites(*heap);
  const double p = 1 / Unsampled(1, 64, interval);
  EXPECT_NEAR(sites.at({1, 64}).allocated, 3 * kRounds * p, 6 * std::sqrt(3 * kRounds * p));
  EXPECT_NEAR(sites.at({2, 64}).allocated, kRounds * p, 6 * std::sqrt(kRounds * p));
  for (void* p : held) cache->Free(p);
}

// ---- With everything else that a heap does ----

#if defined(FREEHOLD_DEBUG_CHECKS)
constexpr int kOperations = 10'000;
#else
constexpr int kOperations = 60'000;
#endif

TEST(HeapProfileTest, ModelOfOneThread) {
  for (const std::size_t interval : {1, 100, 5000, 1 << 20}) {
    SCOPED_TRACE(interval);
    TestHeap heap(Sampling({interval}));
    ModelExchange exchange;
    {
      HeapModel model(*heap, exchange);
      ASSERT_EQ(model.Run(interval, kOperations), "");
      heap->CheckInvariants();
      ASSERT_EQ(model.Finish(), "");
    }
    for (const ModelObject& object : exchange.TakeAll()) heap->Free(object.p);
    EXPECT_GT(Allocated(*heap), 0u);
    EXPECT_EQ(Live(*heap), 0u);
    EXPECT_EQ(heap->Stats().large_objects, 0u);
    heap->CheckInvariants();
  }
}

TEST(HeapProfileTest, ModelsOfThreadsThatComeAndGo) {
  constexpr int kThreads = 4;
  TestHeap heap(Sampling({2000}));
  ModelExchange exchange;
  std::atomic<bool> done = false;
  std::thread reader([&] {
    while (!done) {
      for (const AllocationSite* site = heap->profile()->sites(); site != nullptr; site = site->next) {
        const HeapProfile::Counts counts = HeapProfile::CountsOf(*site);
        ASSERT_LE(counts.live, counts.allocated);
      }
      heap->Stats();
    }
  });
  std::vector<std::string> errors(kThreads);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int generation = 0; generation < 20 && errors[t].empty(); ++generation) {
        doing = 100 + t;
        HeapModel model(*heap, exchange);
        errors[t] = model.Run(t * 100 + generation, kOperations / 20);
        if (errors[t].empty()) errors[t] = model.Finish();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  done = true;
  reader.join();
  for (const std::string& error : errors) ASSERT_EQ(error, "");
  for (const ModelObject& object : exchange.TakeAll()) heap->Free(object.p);
  EXPECT_GT(Allocated(*heap), 0u);
  EXPECT_EQ(Live(*heap), 0u);
  heap->CheckInvariants();
}

// Forks of a process whose other threads take and free samples: the child's profile goes on.
TEST(HeapProfileTest, Fork) {
  TestHeap heap(Sampling({1000}));
  AttachedThread cache(*heap);
  std::atomic<bool> done = false;
  std::vector<std::thread> threads;
  ModelExchange exchange;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      for (std::uint64_t seed = t; !done; seed += 2) {
        HeapModel model(*heap, exchange);
        ASSERT_EQ(model.Run(seed, 500), "");
        ASSERT_EQ(model.Finish(), "");
      }
    });
  }
  doing = 9;
  std::vector<void*> objects;
  for (int i = 0; i < 2000; ++i) objects.push_back(cache->Allocate(48 + i % 500));
  const auto live_of_mine = [&] {
    std::uint64_t live = 0;
    for (const auto& [key, counts] : Sites(*heap)) live += key.first == 9 ? counts.live : 0;
    return live;
  };
  const std::uint64_t live = live_of_mine();
  EXPECT_GT(live, 0u);
  for (int i = 0; i < 20; ++i) {
    ForkAndRun(heap, cache.get(), [&]() -> std::string {
      if (live_of_mine() != live) return "live before";
      for (void* p : objects) cache->Free(p);
      if (live_of_mine() != 0) return "live after";
      return RunModel(*heap, i);
    });
  }
  done = true;
  for (std::thread& thread : threads) thread.join();
  for (void* p : objects) cache->Free(p);
  for (const ModelObject& object : exchange.TakeAll()) heap->Free(object.p);
  EXPECT_EQ(Live(*heap), 0u);
}

using HeapProfileDeathTest = testing::Test;

TEST(HeapProfileDeathTest, WrongFreesOfSamplesAreFound) {
  TestHeap heap(Sampling({1}));
  AttachedThread cache(*heap);
  auto* p = static_cast<char*>(cache->Allocate(64));
  EXPECT_DEATH(cache->Free(p + 16), "interior pointer");
  EXPECT_DEATH(cache->FreeSized(p, 100), "size 100 given for a 64-byte object");
  cache->Free(p);
  EXPECT_DEATH(cache->Free(p), "double free of a 64-byte object");
  EXPECT_DEATH(heap->Free(p), "double free of a 64-byte object");
  auto* large = static_cast<char*>(cache->Allocate(1 << 20));
  cache->Free(large);
  EXPECT_DEATH(cache->Free(large), "not an object");
}

// An overwritten link is found in a front, too.
TEST(HeapProfileDeathTest, WriteAfterFreeIsFound) {
  TestHeap heap(Sampling(vm::MiB(100)));
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  for (int i = 0; i < 2000; ++i) objects.push_back(cache->Allocate(64));
  for (void* p : objects) cache->Free(p);
  EXPECT_DEATH(
      {
        for (void* p : objects) static_cast<std::uint64_t*>(p)[0] ^= std::uint64_t{1} << 50;
        for (int i = 0; i < 2000; ++i) cache->Allocate(64);
      },
      "was written to after it was freed");
}

// ---- Out of memory ----

TEST(HeapProfileTest, WithoutMemoryForTheProfileTheHeapServes) {
  EXPECT_GT(HeapsWithout(Sampling({1}), [](const ObjectHeap& heap) { return heap.profile() != nullptr; }), 0u);
}

TEST(HeapProfileTest, WhatHasNoRoomInTheProfileIsServedAllTheSame) {
  vm::os::FakeKernel kernel;
  TestHeap heap(kernel, Sampling({1}), vm::MiB(256));  // whose arena is the smallest
  ASSERT_TRUE(heap.ok() && heap->profile() != nullptr);
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  constexpr int kObjects = 100'000;
  for (int i = 0; i < kObjects; ++i) {
    doing = static_cast<std::uintptr_t>(i);  // a site each
    objects.push_back(cache->Allocate(i % 100 == 0 ? 140000 : 32));
    ASSERT_NE(objects.back(), nullptr);
    if (i % 100 == 0) {
      cache->Free(objects.back());
      objects.pop_back();
    }
  }
  std::uint64_t samples = 0;
  std::uint64_t dropped = 0;
  struct Sums {
    std::uint64_t* samples;
    std::uint64_t* dropped;
  } sums = {&samples, &dropped};
  heap->ForEachMetric(
      [](void* context, const vm::Metric& metric) {
        const auto& sums = *static_cast<const Sums*>(context);
        const auto* value = static_cast<const std::atomic<std::uint64_t>*>(metric.first);
        if (metric.name == "heap_samples_total") *sums.samples = value->load();
        if (metric.name == "heap_samples_dropped_total") *sums.dropped = value->load();
      },
      &sums);
  EXPECT_GT(samples, 1000u);
  EXPECT_GT(dropped, 1000u);
  EXPECT_EQ(samples + dropped, std::uint64_t{kObjects});
  for (void* p : objects) cache->Free(p);
  EXPECT_EQ(Live(*heap), 0u);
  heap->CheckInvariants();
}

TEST(HeapProfileTest, EveryKernelCallMayFail) {
  for (std::size_t n = 1;; ++n) {
    SCOPED_TRACE(n);
    vm::os::FakeKernel kernel;
    TestHeap heap(kernel, Sampling({500}), vm::GiB(1));
    ASSERT_TRUE(heap.ok() && heap->profile() != nullptr);
    kernel.FailNthOfAny(n, ENOMEM);
    ModelExchange exchange;
    {
      HeapModel model(*heap, exchange, /*may_fail=*/true);
      ASSERT_EQ(model.Run(3, 300), "");
      kernel.StopFailing();
      ASSERT_EQ(model.Finish(), "");
    }
    for (const ModelObject& object : exchange.TakeAll()) heap->Free(object.p);
    EXPECT_EQ(Live(*heap), 0u);
    heap->CheckInvariants();
    if (kernel.InjectedFailures() == 0) break;
    ASSERT_LT(n, 1000u);
  }
}

}  // namespace
}  // namespace freehold::allocator
