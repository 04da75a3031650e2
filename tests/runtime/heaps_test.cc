// Heaps of the program's own, through freehold.h, in a process whose malloc is somebody else's: so under the sanitizers
// too.
#include "runtime/heaps.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "runtime/freehold.h"
#include "runtime/runtime.h"
#include "vm/os/fake_kernel.h"

namespace freehold::runtime {
namespace {

constexpr std::size_t MiB(std::size_t n) { return n << 20; }

// One heap, destroyed at the end unless that was done.
class Heap {
 public:
  explicit Heap(freehold_space* space = nullptr) {
    freehold_heap_options options = {};
    options.size = sizeof(options);
    options.space = space;
    EXPECT_EQ(freehold_heap_create(&options, &heap_), 0);
  }
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;
  ~Heap() {
    if (heap_ != nullptr) Destroy();
  }
  void Destroy() { EXPECT_EQ(freehold_heap_destroy(std::exchange(heap_, nullptr)), 0); }
  freehold_heap* get() const { return heap_; }
  freehold_heap_statistics Statistics() const {
    freehold_heap_statistics statistics = {};
    statistics.size = sizeof(statistics);
    EXPECT_EQ(freehold_heap_get_statistics(heap_, &statistics), 0);
    return statistics;
  }

 private:
  freehold_heap* heap_ = nullptr;
};

void* Filled(freehold_heap* heap, std::size_t size, int value) {
  void* p = freehold_heap_allocate(heap, size);
  return p != nullptr ? std::memset(p, value, size) : nullptr;
}
bool HasContent(const void* p, std::size_t size, int value) {
  const auto* bytes = static_cast<const unsigned char*>(p);
  return std::all_of(bytes, bytes + size, [&](unsigned char byte) { return byte == static_cast<unsigned char>(value); });
}

std::uint64_t MappedBytes() {
  freehold_statistics statistics = {};
  statistics.size = sizeof(statistics);
  EXPECT_EQ(freehold_get_statistics(freehold_process_space(), &statistics), 0);
  return statistics.mapped;
}

TEST(HeapsTest, ObjectsOfEverySize) {
  const Heap heap;
  std::vector<std::pair<void*, std::size_t>> objects;
  for (std::size_t size = 1; size < MiB(40); size = size * 3 / 2 + 1) {
    void* p = Filled(heap.get(), size, static_cast<int>(size));
    ASSERT_NE(p, nullptr) << size;
    EXPECT_GE(freehold_heap_usable_size(heap.get(), p), size);
    EXPECT_EQ(freehold_heap_usable_size(heap.get(), p), freehold_good_size(size)) << size;
    objects.emplace_back(p, size);
  }
  for (const auto& [p, size] : objects) {
    EXPECT_TRUE(HasContent(p, size, static_cast<int>(size)));
    freehold_heap_free_sized(heap.get(), p, size);
  }
  freehold_heap_free(heap.get(), nullptr);
  EXPECT_EQ(freehold_heap_usable_size(heap.get(), nullptr), 0u);
  EXPECT_EQ(heap.Statistics().large, 0u);
  std::size_t bytes = 0;
  EXPECT_EQ(freehold_heap_trim(heap.get(), &bytes), 0);
  EXPECT_GT(bytes, 0u);
  EXPECT_EQ(heap.Statistics().mapped, 0u);
}

TEST(HeapsTest, ZeroedAlignedAndReallocated) {
  const Heap heap;
  freehold_heap_free(heap.get(), Filled(heap.get(), 5000, 1));
  void* p = freehold_heap_allocate_zeroed(heap.get(), 5000);
  EXPECT_TRUE(HasContent(p, 5000, 0));
  for (std::size_t alignment = 1; alignment <= MiB(4); alignment *= 2) {
    void* q = freehold_heap_allocate_aligned(heap.get(), alignment, 100);
    ASSERT_NE(q, nullptr);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(q) % alignment, 0u);
    freehold_heap_free(heap.get(), q);
  }
  EXPECT_EQ(freehold_heap_allocate_aligned(heap.get(), 24, 100), nullptr);
  EXPECT_EQ(freehold_heap_allocate_aligned(heap.get(), 0, 100), nullptr);
  std::memset(p, 7, 5000);
  for (const std::size_t size : {std::size_t{100000}, MiB(3), MiB(1), std::size_t{5000}}) {
    p = freehold_heap_reallocate(heap.get(), p, size);
    ASSERT_NE(p, nullptr);
    EXPECT_TRUE(HasContent(p, 5000, 7));
  }
  EXPECT_EQ(freehold_heap_allocate(heap.get(), SIZE_MAX / 2), nullptr);
  EXPECT_EQ(freehold_heap_reallocate(heap.get(), p, SIZE_MAX / 2), nullptr);
  EXPECT_TRUE(HasContent(p, 5000, 7));
}

TEST(HeapsTest, GoodSizes) {
  EXPECT_EQ(freehold_good_size(0), 16u);
  EXPECT_EQ(freehold_good_size(17), 32u);
  EXPECT_EQ(freehold_good_size(SIZE_MAX), 0u);
  EXPECT_EQ(freehold_good_size(PTRDIFF_MAX), 0u);
  EXPECT_EQ(freehold_good_size(MiB(1) + 1), MiB(1) + 4096);
  for (std::size_t size = 1; size < MiB(3); size += size / 7 + 1) {
    const std::size_t good = freehold_good_size(size);
    EXPECT_GE(good, size);
    EXPECT_EQ(freehold_good_size(good), good);
  }
}

TEST(HeapsTest, TryExpand) {
  const Heap heap;
  void* small = Filled(heap.get(), 100, 1);
  const std::size_t usable = freehold_heap_usable_size(heap.get(), small);
  EXPECT_EQ(freehold_heap_try_expand(heap.get(), small, usable), 1);
  EXPECT_EQ(freehold_heap_try_expand(heap.get(), small, usable + 1), 0);
  EXPECT_EQ(freehold_heap_try_expand(heap.get(), nullptr, 1), 0);
}

// In a space of its own: behind the first object is nothing.
TEST(HeapsTest, TryExpandLargeObjects) {
  freehold_space_options options = {};
  options.size = sizeof(options);
  options.reserve = MiB(1024);
  freehold_space* space = nullptr;
  ASSERT_EQ(freehold_space_create(&options, &space), 0);
  {
    const Heap heap(space);
    void* large = Filled(heap.get(), MiB(2), 2);
    EXPECT_EQ(freehold_heap_try_expand(heap.get(), large, 100), 1);
    EXPECT_EQ(freehold_heap_usable_size(heap.get(), large), MiB(2)) << "it does not shrink";
    EXPECT_EQ(freehold_heap_try_expand(heap.get(), large, MiB(4)), 1);
    EXPECT_EQ(freehold_heap_usable_size(heap.get(), large), MiB(4));
    EXPECT_TRUE(HasContent(large, MiB(2), 2));
    EXPECT_EQ(freehold_heap_try_expand(heap.get(), large, SIZE_MAX / 2), 0);
    EXPECT_EQ(freehold_heap_usable_size(heap.get(), large), MiB(4));
  }
  EXPECT_EQ(freehold_space_destroy(space), 0);
}

TEST(HeapsTest, DestroyUnmapsEverything) {
  Heap other;
  void* kept = Filled(other.get(), MiB(2), 3);
  void* kept_small = Filled(other.get(), 100, 4);
  const std::uint64_t before = MappedBytes();
  Heap heap;
  for (const std::size_t size : {std::size_t{40}, std::size_t{5000}, std::size_t{100000}, std::size_t{500000}, MiB(9)}) {
    for (int i = 0; i < 20; ++i) ASSERT_NE(Filled(heap.get(), size, i), nullptr);
  }
  EXPECT_NE(freehold_heap_allocate_aligned(heap.get(), MiB(2), 10), nullptr);
  EXPECT_GE(MappedBytes(), before + MiB(180));
  heap.Destroy();
  EXPECT_EQ(MappedBytes(), before);
  EXPECT_TRUE(HasContent(kept, MiB(2), 3));
  EXPECT_TRUE(HasContent(kept_small, 100, 4));
}

TEST(HeapsTest, InASpaceOfTheProgramsOwn) {
  freehold_space_options options = {};
  options.size = sizeof(options);
  options.reserve = MiB(1024);
  freehold_space* space = nullptr;
  ASSERT_EQ(freehold_space_create(&options, &space), 0);
  {
    const Heap heap(space);
    const void* p = Filled(heap.get(), 1000, 1);
    EXPECT_EQ(freehold_space_contains(space, p), 1);
    EXPECT_EQ(freehold_space_contains(freehold_process_space(), p), 0);
  }
  EXPECT_EQ(freehold_space_destroy(space), 0);
}

TEST(HeapsTest, Arguments) {
  freehold_heap* heap = nullptr;
  freehold_heap_options options = {};
  EXPECT_EQ(freehold_heap_create(nullptr, nullptr), EINVAL);
  EXPECT_EQ(freehold_heap_create(&options, &heap), EINVAL) << "no size";
  EXPECT_EQ(freehold_heap_destroy(nullptr), EINVAL);
  EXPECT_EQ(freehold_heap_trim(nullptr, nullptr), EINVAL);
  EXPECT_EQ(freehold_heap_get_statistics(nullptr, nullptr), EINVAL);
  EXPECT_EQ(freehold_heap_allocate(nullptr, 1), nullptr);
  EXPECT_EQ(freehold_heap_allocate_zeroed(nullptr, 1), nullptr);
  EXPECT_EQ(freehold_heap_allocate_aligned(nullptr, 16, 1), nullptr);
  EXPECT_EQ(freehold_heap_reallocate(nullptr, nullptr, 1), nullptr);
  EXPECT_EQ(freehold_heap_usable_size(nullptr, &heap), 0u);
  EXPECT_EQ(freehold_heap_try_expand(nullptr, &heap, 1), 0);
  ASSERT_EQ(freehold_heap_create(nullptr, &heap), 0);
  EXPECT_EQ(freehold_heap_get_statistics(heap, nullptr), EINVAL);
  EXPECT_EQ(freehold_heap_destroy(heap), 0);
  // As long as no other heap has taken its place.
  EXPECT_EQ(freehold_heap_destroy(heap), EINVAL);
  EXPECT_EQ(freehold_heap_allocate(heap, 1), nullptr);
}

// In the process that is to die, whose heaps are its own.
template <typename Wrong>
void WithTwoHeaps(Wrong wrong) {
  const Heap heap;
  const Heap other;
  wrong(heap.get(), other.get());
}

TEST(HeapsDeathTest, ObjectsBelongToOneHeap) {
  using H = freehold_heap*;
  constexpr char kNoObject[] = "freehold: free\\(0x[0-9a-f]+\\): not an object";
  const auto free_elsewhere = [](std::size_t size) {
    WithTwoHeaps([=](H heap, H other) { freehold_heap_free(other, freehold_heap_allocate(heap, size)); });
  };
  EXPECT_DEATH(free_elsewhere(100), kNoObject);
  EXPECT_DEATH(free_elsewhere(MiB(3)), kNoObject);
  EXPECT_DEATH(WithTwoHeaps([](H heap, H) { freehold_heap_free(heap, std::malloc(100)); }), "not from this heap");
  EXPECT_DEATH(WithTwoHeaps([](H heap, H other) {
                 freehold_heap_reallocate(other, freehold_heap_allocate(heap, 100), 200);
               }),
               "realloc.*not an object");
  EXPECT_DEATH(WithTwoHeaps([](H heap, H other) {
                 freehold_heap_usable_size(other, freehold_heap_allocate(heap, 100));
               }),
               "not an object");
  EXPECT_DEATH(WithTwoHeaps([](H heap, H) {
                 freehold_heap_free_sized(heap, freehold_heap_allocate(heap, 100), 1000);
               }),
               "size 1000 given for a 112-byte object");
  EXPECT_DEATH(WithTwoHeaps([](H heap, H) {
                 void* p = freehold_heap_allocate(heap, 100);
                 freehold_heap_free(heap, p);
                 freehold_heap_free(heap, p);
               }),
               "double free");
}

// ---- threads ----

TEST(HeapsTest, ThreadsComeAndGo) {
  const Heap heap;
  std::vector<void*> objects;
  for (int i = 0; i < 20; ++i) {
    std::thread([&] {
      for (int j = 0; j < 1000; ++j) objects.push_back(Filled(heap.get(), 200, i));
      for (int j = 0; j < 500; ++j) {
        freehold_heap_free(heap.get(), objects.back());
        objects.pop_back();
      }
      EXPECT_EQ(heap.Statistics().threads, 1u);
    }).join();
    EXPECT_EQ(heap.Statistics().threads, 0u);
  }
  for (void* p : objects) freehold_heap_free(heap.get(), p);
  EXPECT_EQ(heap.Statistics().threads, 1u);
  freehold_heap_trim(heap.get(), nullptr);
  EXPECT_EQ(heap.Statistics().allocated, 0u) << "nothing is stranded";
}

// A handle serves one heap after another; what a thread remembers of one is not the other's.
TEST(HeapsTest, ThreadsOutliveHeaps) {
  std::barrier<> step(2);
  freehold_heap* heap = nullptr;
  std::thread other([&] {
    for (int i = 0; i < 100; ++i) {
      step.arrive_and_wait();
      const void* p = Filled(heap, 1000 + static_cast<std::size_t>(i), i);
      EXPECT_TRUE(HasContent(p, 1000, i));
      step.arrive_and_wait();
      step.arrive_and_wait();
    }
  });
  for (int i = 0; i < 100; ++i) {
    Heap next;
    heap = next.get();
    EXPECT_NE(Filled(heap, 300, i), nullptr);
    step.arrive_and_wait();
    step.arrive_and_wait();
    EXPECT_EQ(next.Statistics().threads, 2u);
    step.arrive_and_wait();
    next.Destroy();
  }
  other.join();
}

// More heaps than a thread's list has room for, most of them gone.
TEST(HeapsTest, ManyHeaps) {
  std::vector<std::unique_ptr<Heap>> heaps;
  std::vector<void*> objects;
  for (std::size_t i = 0; i < 300; ++i) {
    heaps.push_back(std::make_unique<Heap>());
    objects.push_back(Filled(heaps.back()->get(), 100, static_cast<int>(i)));
    if (i % 3 != 0) {
      const std::size_t gone = i * 7 % heaps.size();
      heaps.erase(heaps.begin() + static_cast<std::ptrdiff_t>(gone));
      objects.erase(objects.begin() + static_cast<std::ptrdiff_t>(gone));
    }
  }
  for (std::size_t i = 0; i < heaps.size(); ++i) {
    freehold_heap_free(heaps[i]->get(), objects[i]);
    EXPECT_EQ(heaps[i]->Statistics().threads, 1u);
  }
}

// Destructors of thread-specific data that run after ours still use the heap; nothing is left attached.
freehold_heap* late_heap = nullptr;
pthread_key_t late_key;
int late_calls = 0;

void UseHeapLate(void* object) {
  ++late_calls;
  freehold_heap_free(late_heap, object);
  void* next = freehold_heap_allocate(late_heap, 50);
  EXPECT_NE(next, nullptr);
  // To the last round of destructors; what then remains is the heap's to end.
  pthread_setspecific(late_key, next);
}

TEST(HeapsTest, ThreadsThatEndMayGoOn) {
#if defined(FREEHOLD_TSAN)
  GTEST_SKIP() << "to TSan a thread has ended before the last of these destructors";
#endif
  const Heap heap;
  late_heap = heap.get();
  ASSERT_EQ(pthread_key_create(&late_key, UseHeapLate), 0);
  std::thread([&] { pthread_setspecific(late_key, freehold_heap_allocate(heap.get(), 50)); }).join();
  EXPECT_GE(late_calls, 3);
  EXPECT_EQ(heap.Statistics().threads, 0u);
  pthread_key_delete(late_key);
}

// Threads that are done with the heap end while another destroys it, and makes the next one.
TEST(HeapsTest, ThreadsEndWhileHeapsAreDestroyed) {
  for (int round = 0; round < 200; ++round) {
    Heap heap;
    std::atomic<int> done{0};
    std::vector<std::thread> threads;
    for (int id = 0; id < 3; ++id) {
      threads.emplace_back([&] {
        for (int i = 0; i < 20; ++i) Filled(heap.get(), 64 << i % 10, i);
        done.fetch_add(1);
      });
    }
    while (done.load() < 3) std::this_thread::yield();
    heap.Destroy();
    Heap next;
    EXPECT_NE(Filled(next.get(), 100, 1), nullptr);
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(next.Statistics().threads, 1u);
  }
}

// Several heaps, all threads in all of them, objects freed by whoever finds them; generation after generation.
TEST(HeapsTest, Stress) {
  constexpr int kThreads = 4;
  constexpr int kHeaps = 3;
  constexpr std::size_t kSlots = 64;
  std::array<freehold_heap*, kHeaps> heaps = {};
  std::array<std::array<std::atomic<void*>, kSlots>, kHeaps> slots = {};
  std::barrier<> step(kThreads);
  const auto run = [&](int id) {
    std::uint64_t random = 88172645463325252u + static_cast<std::uint64_t>(id);
    for (int generation = 0; generation < 20; ++generation) {
      if (id < kHeaps) {
        ASSERT_EQ(freehold_heap_create(nullptr, &heaps[static_cast<std::size_t>(id)]), 0);
        for (auto& slot : slots[static_cast<std::size_t>(id)]) slot.store(nullptr, std::memory_order_relaxed);
      }
      step.arrive_and_wait();
      for (int i = 0; i < 3000; ++i) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        const std::size_t which = random % kHeaps;
        const std::size_t size = random % 97 == 0 ? (random >> 8) % 2000000 : (random >> 8) % 2000 + 1;
        void* p = Filled(heaps[which], size, id);
        ASSERT_NE(p, nullptr);
        freehold_heap_free(heaps[which], slots[which][(random >> 40) % kSlots].exchange(p));
        if (random % 1000 == 0) freehold_heap_trim(heaps[which], nullptr);
      }
      step.arrive_and_wait();
      if (id < kHeaps) {
        ASSERT_EQ(freehold_heap_destroy(heaps[static_cast<std::size_t>(id)]), 0);
      }
    }
  };
  const std::uint64_t before = MappedBytes();
  std::vector<std::thread> threads;
  for (int id = 0; id < kThreads; ++id) threads.emplace_back(run, id);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(MappedBytes(), before);
}

// ---- limits, fork, errors ----

TEST(HeapsTest, CountAgainstTheLimit) {
  Heap heap;
  Filled(heap.get(), 100, 1);
  freehold_purge(freehold_process_space(), nullptr);
  freehold_memory_usage usage = {};
  usage.size = sizeof(usage);
  ASSERT_EQ(freehold_get_memory_usage(&usage), 0);
  freehold_memory_limits limits = {};
  limits.size = sizeof(limits);
  limits.hard = usage.in_use + MiB(16);
  ASSERT_EQ(freehold_set_memory_limits(&limits), 0);
  EXPECT_EQ(freehold_heap_allocate(heap.get(), MiB(20)), nullptr);
  std::size_t got = 0;
  while (Filled(heap.get(), 50000, 1) != nullptr) got += 50000;
  EXPECT_GE(got, MiB(12));
  EXPECT_LE(got, MiB(16));
  heap.Destroy();
  {
    // What was the heap's is another's, whatever of it is still resident.
    const Heap next;
    EXPECT_NE(Filled(next.get(), MiB(10), 1), nullptr);
  }
  limits.hard = 0;
  EXPECT_EQ(freehold_set_memory_limits(&limits), 0);
}

TEST(HeapsTest, Fork) {
  Heap heap;
  void* p = Filled(heap.get(), 100, 5);
  const pid_t child = fork();
  if (child == 0) {
    freehold_heap_statistics statistics = {};
    statistics.size = sizeof(statistics);
    bool ok = HasContent(p, 100, 5);
    ok = ok && freehold_heap_allocate(heap.get(), 10) == nullptr;
    ok = ok && freehold_heap_usable_size(heap.get(), p) == 0;
    ok = ok && freehold_heap_get_statistics(heap.get(), &statistics) == EOPNOTSUPP;
    ok = ok && freehold_heap_trim(heap.get(), nullptr) == EOPNOTSUPP;
    freehold_heap_free(heap.get(), p);
    ok = ok && HasContent(p, 100, 5);
    ok = ok && freehold_heap_destroy(heap.get()) == EOPNOTSUPP;
    // Its own heaps work.
    freehold_heap* own = nullptr;
    ok = ok && freehold_heap_create(nullptr, &own) == 0;
    ok = ok && HasContent(Filled(own, 1000, 6), 1000, 6);
    std::thread([&] { ok = ok && Filled(own, 3000000, 7) != nullptr; }).join();
    ok = ok && freehold_heap_destroy(own) == 0;
    _exit(ok ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  freehold_heap_free(heap.get(), p);
  EXPECT_NE(Filled(heap.get(), 100, 5), nullptr);
}

TEST(HeapsTest, EveryKernelCallOfCreateMayFail) {
  vm::os::FakeKernel kernel;
  const auto space = vm::AddressSpace::Create(kernel, {.reserve = vm::GiB(4), .min_reserve = vm::MiB(64)});
  ASSERT_TRUE(space.ok());
  const vm::Pages reserved = kernel.ReservedPages();
  for (std::size_t n = 1;; ++n) {
    ASSERT_LT(n, 100u);
    const std::size_t before = kernel.InjectedFailures();
    kernel.FailNthOfAny(n, ENOMEM);
    const auto handle = CreateHeap(**space, {}, nullptr);
    void* p = nullptr;
    if (handle.ok()) {
      const HeapCall call(*handle);
      if (call.cache() != nullptr) p = call.cache()->Allocate(3000000);
    }
    kernel.StopFailing();
    const bool failed = kernel.InjectedFailures() != before;
    if (handle.ok()) {
      // Refused or not, it goes on.
      {
        const HeapCall call(*handle);
        ASSERT_NE(call.cache(), nullptr);
        EXPECT_NE(call.cache()->Allocate(3000000), nullptr);
      }
      EXPECT_TRUE(DestroyHeap(*handle, nullptr));
    }
    EXPECT_EQ(kernel.ReservedPages(), reserved) << n;
    if (failed) continue;
    EXPECT_NE(p, nullptr);
    break;
  }
  EXPECT_EQ((*space)->Stats().mapped.value, 0u);
  vm::AddressSpace::Destroy(*space);
}

TEST(HeapsTest, MoreThreadsThanAHeapTakes) {
  ASSERT_NE(freehold_process_space(), nullptr);
  const auto handle = CreateHeap(process_runtime.space(), {.max_threads = 1}, nullptr);
  ASSERT_TRUE(handle.ok());
  {
    const HeapCall call(*handle);
    ASSERT_NE(call.cache(), nullptr);
    EXPECT_NE(call.cache()->Allocate(10), nullptr);
  }
  std::thread([&] {
    const HeapCall call(*handle);
    EXPECT_EQ(call.cache(), nullptr);
  }).join();
  EXPECT_TRUE(DestroyHeap(*handle, nullptr));
  EXPECT_FALSE(DestroyHeap(*handle, nullptr));
}

}  // namespace
}  // namespace freehold::runtime
