#include "allocator/guarded_objects.h"

#include <sys/uio.h>

#include <atomic>
#include <cerrno>
#include <initializer_list>
#include <set>
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

using vm::os::FakeKernel;
using Operation = FakeKernel::Operation;

// Stacks of one frame: what a test says that its thread is doing.
thread_local std::uintptr_t doing = 1;
unsigned CaptureDoing(void** frames, unsigned) {
  frames[0] = reinterpret_cast<void*>(doing);
  return 1;
}

// Where the report goes that a death test looks at.
void Explain(const GuardedObject& object) {
  std::string text = "allocated by " + std::to_string(object.allocation.thread != 0) + " at " +
                     std::to_string(reinterpret_cast<std::uintptr_t>(object.allocation.frames[0]));
  if (object.freed) text += ", freed at " + std::to_string(reinterpret_cast<std::uintptr_t>(object.free.frames[0]));
  text += "\n";
  (void)!write(STDERR_FILENO, text.data(), text.size());
}

ObjectHeapOptions Guarding(vm::Bytes interval, std::uint32_t slots = 64) {
  return {.decay = vm::Milliseconds(5),
          .guards = {.interval = interval, .slots = slots, .capture = CaptureDoing, .explain = Explain}};
}

// Asks the kernel, which does not trap.
bool IsAccessible(const void* address) {
  char byte;
  const iovec local = {&byte, 1};
  const iovec remote = {const_cast<void*>(address), 1};
  const ssize_t got = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
  EXPECT_TRUE(got == 1 || errno == EFAULT);
  return got == 1;
}

char* At(void* p, std::ptrdiff_t offset) { return static_cast<char*>(p) + offset; }
std::uintptr_t SlotOf(const void* p) { return AddressOf(p) / kUnitSize; }

// Whether all of the object may be accessed, and nothing beyond its pages.
void ExpectGuarded(void* p, std::size_t size) {
  const std::uintptr_t begin = AddressOf(p) & ~(vm::kPageSize - 1);
  const std::size_t pages = vm::PagesFor({size}).bytes().value;
  for (std::size_t i = 0; i < size; i += i + 1 < size ? std::min<std::size_t>(999, size - 1 - i) : 1) {
    EXPECT_TRUE(IsAccessible(At(p, static_cast<std::ptrdiff_t>(i)))) << i;
  }
  for (std::size_t away : {1, 5000, 16384}) {
    EXPECT_FALSE(IsAccessible(reinterpret_cast<void*>(begin - away))) << away;
    EXPECT_FALSE(IsAccessible(reinterpret_cast<void*>(begin + pages + away - 1))) << away;
  }
}

std::uint64_t MetricOf(ObjectHeap& heap, std::string_view name) {
  struct Context {
    std::string_view name;
    std::uint64_t value = ~std::uint64_t{0};
  } context = {name};
  heap.ForEachMetric(
      [](void* to, const vm::Metric& metric) {
        auto& context = *static_cast<Context*>(to);
        if (metric.name == context.name) context.value = *static_cast<const std::uint64_t*>(metric.first);
      },
      &context);
  return context.value;
}

TEST(GuardedObjectsTest, NoneByDefault) {
  TestHeap heap;
  EXPECT_EQ(heap->guards(), nullptr);
  AttachedThread cache(*heap);
  void* p = cache->Allocate(30);
  EXPECT_FALSE(heap->IsGuarded(p));
  cache->Free(p);
}

TEST(GuardedObjectsTest, EveryObjectAtAnIntervalOfOne) {
  TestHeap heap(Guarding({1}));
  AttachedThread cache(*heap);
  std::vector<std::pair<void*, std::size_t>> objects;
  std::set<std::uintptr_t> slots;
  for (const std::size_t size : {1, 15, 16, 30, 100, 1000, 1025, 4096, 4097, 20000, 32768}) {
    for (int i = 0; i < 4; ++i) {
      void* p = i % 2 == 0 ? cache->Allocate(size) : cache->AllocateZeroed(size);
      ASSERT_NE(p, nullptr);
      ASSERT_TRUE(heap->IsGuarded(p)) << size;
      EXPECT_TRUE(IsAligned(p, kMinAlignment));
      EXPECT_TRUE(IsZero(p, size));
      EXPECT_EQ(heap->UsableSize(p), size);
      EXPECT_TRUE(slots.insert(SlotOf(p)).second);
      Fill(p, size, size + i);
      ExpectGuarded(p, size);
      objects.push_back({p, size});
    }
  }
  heap->CheckInvariants();
  EXPECT_EQ(MetricOf(*heap, "heap_guarded_objects"), objects.size());
  for (std::size_t i = 0; i < objects.size(); ++i) {
    const auto [p, size] = objects[i];
    EXPECT_TRUE(HasContent(p, size, size + i % 4));
    if (i % 2 == 0) {
      cache->Free(p);
    } else {
      cache->FreeSized(p, size);
    }
    EXPECT_FALSE(IsAccessible(p));
    EXPECT_FALSE(IsAccessible(At(p, static_cast<std::ptrdiff_t>(size) - 1)));
  }
  EXPECT_EQ(MetricOf(*heap, "heap_guarded_objects"), 0u);
  EXPECT_EQ(MetricOf(*heap, "heap_guarded_bytes"), 0u);
  EXPECT_EQ(MetricOf(*heap, "heap_guarded_total"), objects.size());
  EXPECT_EQ(MetricOf(*heap, "heap_guarded_dropped_total"), 0u);
  heap->CheckInvariants();
}

TEST(GuardedObjectsTest, AnObjectOfNoBytesHasOne) {
  TestHeap heap(Guarding({1}));
  AttachedThread cache(*heap);
  void* p = cache->Allocate(0);
  ASSERT_TRUE(heap->IsGuarded(p));
  EXPECT_EQ(heap->UsableSize(p), 1u);
  EXPECT_TRUE(IsAccessible(p));
  cache->Free(p);
}

// Half of them end where their pages end, as near as alignment lets them, and the others begin there.
TEST(GuardedObjectsTest, EitherEndAtRandom) {
  TestHeap heap(Guarding({1}));
  AttachedThread cache(*heap);
  int at_end = 0;
  for (int i = 0; i < 200; ++i) {
    void* p = cache->Allocate(40);
    const std::uintptr_t offset = AddressOf(p) % vm::kPageSize;
    EXPECT_TRUE(offset == 0 || offset == vm::kPageSize - 48) << offset;
    at_end += offset != 0;
    cache->Free(p);
  }
  EXPECT_GT(at_end, 60);
  EXPECT_LT(at_end, 140);
}

TEST(GuardedObjectsTest, AlignedObjects) {
  TestHeap heap(Guarding({1}));
  AttachedThread cache(*heap);
  for (std::size_t alignment = 32; alignment <= 65536; alignment *= 2) {
    for (const std::size_t size : {10, 100, 5000}) {
      for (int i = 0; i < 8; ++i) {
        void* p = cache->AllocateAligned(alignment, size);
        ASSERT_TRUE(IsAligned(p, alignment)) << alignment;
        EXPECT_EQ(heap->IsGuarded(p), alignment <= GuardedObjects::kMaxAlignment) << alignment;
        Fill(p, size, 1);
        cache->Free(p);
      }
    }
  }
}

TEST(GuardedObjectsTest, WhatDoesNotFitIsOrdinary) {
  TestHeap heap(Guarding({1}));
  AttachedThread cache(*heap);
  for (const std::size_t size : {32769, 131072, 131073, 1 << 20}) {
    void* p = cache->Allocate(size);
    ASSERT_NE(p, nullptr);
    EXPECT_FALSE(heap->IsGuarded(p)) << size;
    cache->Free(p);
  }
}

// What was freed first is used again first, so that it traps for as long as can be.
TEST(GuardedObjectsTest, SlotsWaitInLine) {
  constexpr std::uint32_t kSlots = 8;
  TestHeap heap(Guarding({1}, kSlots));
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  for (std::uint32_t i = 0; i < kSlots; ++i) objects.push_back(cache->Allocate(100));
  for (const int i : {3, 0, 7, 1}) cache->Free(objects[i]);
  for (const int i : {3, 0, 7, 1}) {
    EXPECT_FALSE(IsAccessible(objects[i]));
    void* p = cache->Allocate(200);
    EXPECT_EQ(SlotOf(p), SlotOf(objects[i])) << i;
    objects[i] = p;
  }
  heap->CheckInvariants();
  for (void* p : objects) cache->Free(p);
}

TEST(GuardedObjectsTest, WithoutAFreeSlotObjectsAreOrdinary) {
  TestHeap heap(Guarding({1}, 3));
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  for (int i = 0; i < 10; ++i) {
    objects.push_back(cache->Allocate(100));
    EXPECT_EQ(heap->IsGuarded(objects.back()), i < 3);
  }
  EXPECT_EQ(MetricOf(*heap, "heap_guarded_dropped_total"), 7u);
  cache->Free(objects[1]);
  void* p = cache->Allocate(100);
  EXPECT_EQ(SlotOf(p), SlotOf(objects[1]));
  objects[1] = p;
  for (void* object : objects) cache->Free(object);
  heap->CheckInvariants();
}

TEST(GuardedObjectsTest, WhoeverFrees) {
  TestHeap heap(Guarding({1}));
  AttachedThread cache(*heap);
  void* objects[3];
  for (void*& p : objects) p = cache->Allocate(3000);
  std::thread([&] {
    AttachedThread other(*heap);
    other->Free(objects[0]);
    heap->Free(objects[1]);
  }).join();
  heap->Free(objects[2]);
  for (void* p : objects) EXPECT_FALSE(IsAccessible(p));
  EXPECT_EQ(MetricOf(*heap, "heap_guarded_objects"), 0u);
}

TEST(GuardedObjectsTest, Reallocate) {
  TestHeap heap(Guarding({1}));
  AttachedThread cache(*heap);
  void* p = cache->Allocate(100);
  Fill(p, 100, 3);
  EXPECT_TRUE(cache->TryExpand(p, 100));
  EXPECT_FALSE(cache->TryExpand(p, 101));
  void* larger = cache->Reallocate(p, 101);
  ASSERT_NE(larger, p);
  EXPECT_FALSE(IsAccessible(p));
  EXPECT_TRUE(HasContent(larger, 100, 3));
  EXPECT_EQ(heap->UsableSize(larger), 101u);
  void* huge = cache->Reallocate(larger, 1 << 20);
  EXPECT_FALSE(heap->IsGuarded(huge));
  EXPECT_TRUE(HasContent(huge, 100, 3));
  void* small = cache->Reallocate(huge, 10);
  EXPECT_TRUE(heap->IsGuarded(small));
  EXPECT_TRUE(HasContent(small, 10, 3));
  cache->Free(small);
}

// Every byte is chosen with the same probability, whatever the size of its object.
TEST(GuardedObjectsTest, AsManyAsTheIntervalSays) {
  for (const std::size_t size : {16, 200, 5000}) {
    TestHeap heap(Guarding({20000}));
    AttachedThread cache(*heap);
    constexpr double kBytes = 20e6;
    const int count = static_cast<int>(kBytes / static_cast<double>(size));
    for (int i = 0; i < count; ++i) cache->Free(cache->Allocate(size));
    const auto guarded = static_cast<double>(MetricOf(*heap, "heap_guarded_total"));
    const double expected = kBytes / 20000 * (size == 5000 ? 0.9 : 1.0);  // two bytes of one object are one sample
    EXPECT_GT(guarded, expected * 0.8) << size;
    EXPECT_LT(guarded, expected * 1.25) << size;
  }
}

// With both, an object may be a sample of either, or of both.
TEST(GuardedObjectsTest, BesideAHeapProfile) {
  ObjectHeapOptions options = Guarding({1}, 8);
  options.profile = {.interval = {1}, .capture = CaptureDoing};
  TestHeap heap(options);
  AttachedThread cache(*heap);
  doing = 77;
  std::vector<void*> objects;
  for (int i = 0; i < 20; ++i) objects.push_back(cache->Allocate(100));
  EXPECT_TRUE(heap->IsGuarded(objects[0]));
  EXPECT_FALSE(heap->IsGuarded(objects[19]));
  const auto counts = [&] {
    HeapProfile::Counts sum;
    for (const AllocationSite* site = heap->profile()->sites(); site != nullptr; site = site->next) {
      EXPECT_EQ(site->object_size, 112u);
      EXPECT_EQ(site->stack()[0], reinterpret_cast<void*>(77));
      sum.live += HeapProfile::CountsOf(*site).live;
      sum.allocated += HeapProfile::CountsOf(*site).allocated;
    }
    return sum;
  };
  EXPECT_EQ(counts().live, 20u);
  for (void* p : objects) cache->Free(p);
  EXPECT_EQ(counts().live, 0u);
  EXPECT_EQ(counts().allocated, 20u);
}

TEST(GuardedObjectsTest, AProfileCountsTheSameWithThem) {
  ObjectHeapOptions options = Guarding({3000});
  options.profile = {.interval = {10000}, .capture = CaptureDoing};
  TestHeap heap(options);
  AttachedThread cache(*heap);
  for (int i = 0; i < 200'000; ++i) cache->Free(cache->Allocate(96));
  std::uint64_t samples = 0;
  for (const AllocationSite* site = heap->profile()->sites(); site != nullptr; site = site->next) {
    samples += HeapProfile::CountsOf(*site).allocated;
  }
  const double expected = 200'000 * 96 / 10000.0;
  EXPECT_NEAR(static_cast<double>(samples), expected, 6 * 44);  // six standard deviations
}

// ---- What is known of an address ----

TEST(GuardedObjectsTest, FindTellsWhatHappened) {
  TestHeap heap(Guarding({1}));
  AttachedThread cache(*heap);
  GuardedObject found;
  doing = 5;
  void* p = cache->Allocate(100);
  ASSERT_TRUE(heap->guards()->Find(At(p, 5000), found));
  EXPECT_EQ(found.object, p);
  EXPECT_EQ(found.size, 100u);
  EXPECT_FALSE(found.freed);
  EXPECT_EQ(found.allocation.stack()[0], reinterpret_cast<void*>(5));
  EXPECT_EQ(found.allocation.thread, static_cast<std::uint32_t>(gettid()));
  // The slot behind it has held nothing: it was an overflow.
  ASSERT_TRUE(heap->guards()->Find(At(p, kUnitSize), found));
  EXPECT_EQ(found.object, p);
  std::thread([&] {
    doing = 6;
    heap->Free(p);
  }).join();
  ASSERT_TRUE(heap->guards()->Find(p, found));
  EXPECT_TRUE(found.freed);
  EXPECT_EQ(found.free.stack()[0], reinterpret_cast<void*>(6));
  EXPECT_NE(found.free.thread, found.allocation.thread);
  EXPECT_FALSE(heap->guards()->Find(At(p, 5 * kUnitSize), found));
  EXPECT_FALSE(heap->guards()->Find(&found, found));
  EXPECT_FALSE(heap->guards()->Find(nullptr, found));
}

// ---- Wrong frees ----

using GuardedObjectsDeathTest = testing::Test;

TEST(GuardedObjectsDeathTest, WrongFrees) {
  TestHeap heap(Guarding({1}));
  AttachedThread cache(*heap);
  doing = 11;
  auto* p = static_cast<char*>(cache->Allocate(64));
  EXPECT_DEATH(cache->Free(p + 16), "^freehold: free.0x[0-9a-f]+.: interior pointer .16 bytes into a 64-byte object at "
                                    "0x[0-9a-f]+.\nallocated by 1 at 11\n");
  EXPECT_DEATH(cache->Free(p + kUnitSize), "not an object");
  EXPECT_DEATH(cache->Free(p + 64), "not an object");
  EXPECT_DEATH(cache->FreeSized(p, 65), "size 65 given for a 64-byte object");
  doing = 12;
  cache->Free(p);
  const char* const twice = "free.0x[0-9a-f]+.: double free of a 64-byte object\nallocated by 1 at 11, freed at 12\n";
  EXPECT_DEATH(cache->Free(p), twice);
  EXPECT_DEATH(heap->Free(p), twice);
  EXPECT_DEATH(cache->Reallocate(p, 10), "realloc.0x[0-9a-f]+.: double free of a 64-byte object\n");
  EXPECT_DEATH(heap->UsableSize(p), "malloc_usable_size");
}

// Writes that stay within the object's pages are found when it is freed.
TEST(GuardedObjectsDeathTest, StrayWritesAreFoundByFree) {
  TestHeap heap(Guarding({1}));
  AttachedThread cache(*heap);
  char* begins = nullptr;  // with its page
  char* ends = nullptr;
  while (begins == nullptr || ends == nullptr) {
    auto* p = static_cast<char*>(cache->Allocate(100));
    (AddressOf(p) % vm::kPageSize == 0 ? begins : ends) = p;
  }
  EXPECT_DEATH((begins[100] = 0, cache->Free(begins)),
               "free.0x[0-9a-f]+.: 0 bytes after the 100-byte object was written to\nallocated");
  EXPECT_DEATH((begins[4095] = 0, cache->Free(begins)), "3995 bytes after the 100-byte object");
  EXPECT_DEATH((ends[-1] = 0, cache->Free(ends)), "1 bytes before the 100-byte object");
  EXPECT_DEATH((ends[-7] = 0, ends[111] = 0, cache->Free(ends)), "11 bytes after the 100-byte object");
  EXPECT_DEATH((ends[-7] = 0, heap->Free(ends)), "7 bytes before the 100-byte object");
}

// ---- Threads and fork ----

void RunModels(ObjectHeap& heap, int threads, int operations) {
  ModelExchange exchange;
  std::vector<std::string> errors(static_cast<std::size_t>(threads));
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t) {
    running.emplace_back([&, t] {
      HeapModel model(heap, exchange);
      errors[t] = model.Run(static_cast<std::uint64_t>(t) + 1, operations);
      if (errors[t].empty()) errors[t] = model.Finish();
    });
  }
  for (std::thread& thread : running) thread.join();
  for (const std::string& error : errors) EXPECT_EQ(error, "");
  for (const ModelObject& object : exchange.TakeAll()) heap.Free(object.p);
}

TEST(GuardedObjectsTest, ThreadsThatExchangeObjects) {
  for (const vm::Bytes interval : {vm::Bytes{1}, vm::Bytes{10000}}) {
    for (const std::uint32_t slots : {4u, 1000u}) {
      TestHeap heap(Guarding(interval, slots));
      RunModels(*heap, 4, 20000);
      EXPECT_EQ(MetricOf(*heap, "heap_guarded_objects"), 0u);
      EXPECT_GT(MetricOf(*heap, "heap_guarded_total"), 100u);
      EXPECT_EQ(heap->Stats().allocated.value, 0u);
      heap->CheckInvariants();
    }
  }
}

TEST(GuardedObjectsTest, TheChildOfAForkHasThemToo) {
#if defined(FREEHOLD_TSAN)
  GTEST_SKIP() << "no fork of a process with threads under ThreadSanitizer";
#endif
  TestHeap heap(Guarding({2000}, 256));
  AttachedThread cache(*heap);
  std::atomic<bool> done{false};
  ModelExchange exchange;
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      for (std::uint64_t seed = 1; !done; ++seed) {
        HeapModel model(*heap, exchange);
        EXPECT_EQ(model.Run(seed * 10 + t, 2000), "");
        EXPECT_EQ(model.Finish(), "");
      }
    });
  }
  const auto next_guarded = [&](std::size_t size) {
    void* p;
    while (!heap->IsGuarded(p = cache->Allocate(size))) {
    }
    return p;
  };
  for (int i = 0; i < 20; ++i) {
    void* live = next_guarded(500);
    Fill(live, 500, i);
    void* freed = next_guarded(500);
    cache->Free(freed);
    ForkAndRun(heap, cache.get(), [&]() -> std::string {
      if (!HasContent(live, 500, i)) return "content";
      if (IsAccessible(freed)) return "open when freed";
      if (IsAccessible(At(live, 4096)) || IsAccessible(At(live, -4096))) return "no guards";
      cache->Free(live);
      if (IsAccessible(live)) return "open after free";
      cache->Free(next_guarded(100));
      return RunModel(*heap, i);
    });
    cache->Free(live);
  }
  done = true;
  for (std::thread& thread : threads) thread.join();
}

// ---- What the system refuses ----

TEST(GuardedObjectsTest, OneKernelVmaWithGuardRegions) {
  FakeKernel kernel;
  if (!kernel.features().guard_regions) GTEST_SKIP() << "this kernel has none";
  TestHeap heap(kernel, Guarding({1}));
  AttachedThread cache(*heap);
  void* first = cache->Allocate(100);
  const std::size_t vmas = kernel.KernelVmaCount();
  std::vector<void*> objects;
  for (int i = 0; i < 30; ++i) objects.push_back(cache->Allocate(100));
  for (int i = 0; i < 30; i += 2) cache->Free(objects[i]);
  EXPECT_EQ(kernel.KernelVmaCount(), vmas);
  for (int i = 1; i < 30; i += 2) cache->Free(objects[i]);
  cache->Free(first);
}

// Objects of `sizes` in turn, so many that slots are used again.
void UseInTurn(ObjectHeap& heap, ThreadCache& cache, int count, std::initializer_list<std::size_t> sizes) {
  for (int i = 0; i < count; ++i) {
    const std::size_t size = sizes.begin()[i % sizes.size()];
    void* p = cache.AllocateZeroed(size);
    ASSERT_TRUE(heap.IsGuarded(p));
    EXPECT_TRUE(IsZero(p, size));
    Fill(p, size, i);
    ExpectGuarded(p, size);
    cache.Free(p);
    EXPECT_FALSE(IsAccessible(p));
  }
  heap.CheckInvariants();
}

TEST(GuardedObjectsTest, ByProtectionWithoutGuardRegions) {
  FakeKernel kernel;
  vm::os::Features features = kernel.features();
  features.guard_regions = false;
  kernel.SetFeatures(features);
  TestHeap heap(kernel, Guarding({1}, 4));
  AttachedThread cache(*heap);
  UseInTurn(*heap, *cache, 20, {9000, 100, 100});
  EXPECT_EQ(kernel.CallCount(Operation::kInstallGuard), 0u);
}

// As for memory that is locked.
TEST(GuardedObjectsTest, AGuardThatIsRefusedBecomesAProtection) {
  FakeKernel kernel;
  TestHeap heap(kernel, Guarding({1}, 2));
  AttachedThread cache(*heap);
  kernel.FailAlways(Operation::kInstallGuard, EINVAL);
  UseInTurn(*heap, *cache, 8, {100, 20000});
}

TEST(GuardedObjectsTest, WhatCannotBeClosedIsNotUsedAgain) {
  FakeKernel kernel;
  TestHeap heap(kernel, Guarding({1}, 4));
  AttachedThread cache(*heap);
  for (const Operation operation : {Operation::kProtect, Operation::kRemoveGuard}) {
    kernel.FailAlways(Operation::kInstallGuard, ENOMEM);
    void* p = cache->Allocate(100);
    ASSERT_TRUE(heap->IsGuarded(p));
    kernel.FailAlways(operation, ENOMEM);
    cache->Free(p);
    kernel.StopFailing();
    heap->CheckInvariants();
    for (int i = 0; i < 8; ++i) {
      void* other = cache->Allocate(100);
      ASSERT_TRUE(heap->IsGuarded(other));
      EXPECT_NE(SlotOf(other), SlotOf(p));
      cache->Free(other);
    }
  }
}

TEST(GuardedObjectsTest, WhatCannotBeOpenedIsOrdinary) {
  FakeKernel kernel;
  TestHeap heap(kernel, Guarding({1}, 2));
  AttachedThread cache(*heap);
  kernel.FailNth(Operation::kRemoveGuard, 1, ENOMEM);
  void* p = cache->Allocate(100);
  ASSERT_NE(p, nullptr);
  EXPECT_FALSE(heap->IsGuarded(p));
  EXPECT_EQ(MetricOf(*heap, "heap_guarded_dropped_total"), 1u);
  cache->Free(p);
  heap->CheckInvariants();
  p = cache->Allocate(100);
  EXPECT_TRUE(heap->IsGuarded(p));
  cache->Free(p);
}

TEST(GuardedObjectsTest, WithoutMemoryForThemTheHeapServes) {
  EXPECT_GT(HeapsWithout(Guarding({1}), [](const ObjectHeap& heap) { return heap.guards() != nullptr; }), 0u);
}

// Nothing stays mapped behind a heap that goes.
TEST(GuardedObjectsTest, TheirMemoryGoesWithTheHeap) {
  vm::os::LinuxKernel kernel;
  const auto space = vm::AddressSpace::Create(kernel, {.reserve = vm::GiB(4), .min_reserve = vm::MiB(64)});
  ASSERT_TRUE(space.ok());
  for (int i = 0; i < 100; ++i) {
    const auto heap = ObjectHeap::Create(**space, Guarding({1}, 1024));
    ASSERT_TRUE(heap.ok());
    ASSERT_NE((*heap)->guards(), nullptr);
    ObjectHeap::DestroyWithMemory(*heap);
  }
  EXPECT_EQ((*space)->Stats().vmas, 0u);
  vm::AddressSpace::Destroy(*space);
}

}  // namespace
}  // namespace freehold::allocator
