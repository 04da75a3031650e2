// Allocating and freeing: Freehold's object heap against glibc and mimalloc, in one process, with
// the same operations in the same order (support/allocators.h tells how they come to stand side by
// side).
//
//   small_lifo/IMPL/64B     allocate 32 objects of 64 bytes, free them in reverse order
//   small_lifo/IMPL/mixed   the same with 8 to 512 bytes
//   small_fifo/IMPL         512 live objects of 8 to 512 bytes: free the oldest, allocate one
//   mixed_random/IMPL       4096 live objects of 8 B to 16 KiB: free a random one, allocate one
//   producer_consumer/IMPL  even threads allocate, odd threads free, in batches of 64 objects of
//                           8 to 512 bytes
//   exchange/IMPL           every thread allocates a batch of 64 objects of 8 B to 4 KiB for the
//                           next thread, and frees the one that it got
//   burst/IMPL/{lifo,fifo,random}
//                           allocate 100 000 objects of 16 B to 1 KiB, free all in that order
//   large_buffers/IMPL/5-25MiB
//                           4 live buffers: free the oldest, allocate one, write to all its pages
//   realloc_growth/IMPL/{1MiB,1GiB}
//                           grow one object from 4 KiB by an eighth at a time, write to new pages
//   calloc/IMPL/{64B,4KiB,1MiB}
//                           16 live objects: free the oldest, calloc one, write to all its pages
//   thread_churn/IMPL       start a thread that allocates 32 objects and frees 24, join it, free
//                           the others
//   successor_threads/IMPL  1000 live objects of 8 B to 1 KiB, passed on to a new thread after
//   every
//                           5000 random replacements
//   idle_rss/IMPL/1GiB      idle for 2 s, allocate 1 GiB in objects of 16 B to 4 KiB, free all,
//   idle
//                           for 2 s; the counter rss_percent is what then is still resident of the
//                           burst
//
// What is measured. Wall-clock time of all threads together, for an item: an object allocated and
// freed, a buffer, a whole growth, a thread. Every thread is pinned to a processor. Sizes are
// spread evenly over their logarithm. Every object is written to. Sequences of sizes and slots are
// written before the clock runs, from seeds that depend on the thread only: every implementation
// gets the same.
//
// An allocator serves all its cases in the same process, one after the other, so later cases find
// what earlier ones left behind. That is how programs live, and
// --benchmark_enable_random_interleaving shuffles it.
#include <benchmark/benchmark.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bench/support/allocators.h"
#include "bench/support/cpu.h"
#include "bench/support/kernel_memory.h"
#include "bench/support/random.h"
#include "bench/support/runner.h"
#include "bench/support/tick_clock.h"

namespace freehold::bench {
namespace {

constexpr std::size_t kKiB = 1024;
constexpr std::size_t kMiB = 1024 * kKiB;
constexpr std::size_t kGiB = 1024 * kMiB;

// ---- Operations and objects. --------------------------------------------------------------------

// The length of most sequences, after which they start again: a power of two, so that where one is
// costs an `and`.
constexpr std::size_t kOperations = 8192;

using Sizes = std::vector<std::uint32_t>;
using Objects = std::vector<void*>;

// `count` sizes from `low` to `high`, the same for every implementation.
Sizes RandomSizes(int thread, std::size_t count, std::size_t low, std::size_t high) {
  Random random(static_cast<std::uint64_t>(thread) * 1000 + low + high);
  Sizes sizes(count);
  for (std::uint32_t& size : sizes) size = static_cast<std::uint32_t>(random.LogUniform(low, high));
  return sizes;
}

void RequireMemory(void* object) {
  if (object != nullptr) [[likely]]
    return;
  std::fputs("malloc_benchmark: out of memory\n", stderr);
  std::exit(1);
}

// The first thing that programs do with an object.
void* Written(void* object) {
  RequireMemory(object);
  *static_cast<volatile char*>(object) = 1;
  return object;
}

void WritePages(void* object, std::size_t from, std::size_t to) {
  RequireMemory(object);
  auto* bytes = static_cast<volatile char*>(object);
  for (std::size_t at = from; at < to; at += kBytesPerPage) bytes[at] = 1;
}

template <const Allocator& allocator>
void* New(std::size_t size) {
  return Written(allocator.malloc(size));
}

template <const Allocator& allocator>
void FreeAll(const Objects& objects) {
  for (void* object : objects) allocator.free(object);
}

void CountItems(benchmark::State& state, std::size_t items_per_iteration) {
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations() * items_per_iteration));
}

// ---- Small objects. -----------------------------------------------------------------------------

template <const Allocator& allocator>
void SmallLifo(benchmark::State& state, std::size_t low, std::size_t high) {
  constexpr std::size_t kDepth = 32;
  const ScopedPin pin(state.thread_index());
  const Sizes sizes = RandomSizes(state.thread_index(), 64 * kDepth, low, high);
  std::array<void*, kDepth> stack;
  std::size_t next = 0;
  for (auto _ : state) {
    for (void*& object : stack) object = New<allocator>(sizes[next++]);
    for (std::size_t i = kDepth; i-- > 0;) allocator.free(stack[i]);
    if (next == sizes.size()) next = 0;
  }
  CountItems(state, kDepth);
}

template <const Allocator& allocator>
void SmallFifo(benchmark::State& state) {
  constexpr std::size_t kLive = 512;
  const ScopedPin pin(state.thread_index());
  const Sizes sizes = RandomSizes(state.thread_index(), kOperations, 8, 512);
  Objects queue(kLive, nullptr);
  std::size_t next = 0;
  for (auto _ : state) {
    void*& oldest = queue[next % kLive];
    allocator.free(oldest);
    oldest = New<allocator>(sizes[next % kOperations]);
    ++next;
  }
  FreeAll<allocator>(queue);
  CountItems(state, 1);
}

// ---- Random replacement in a live set. ----------------------------------------------------------

struct Replacement {
  std::uint32_t slot;
  std::uint32_t size;
};

std::vector<Replacement> RandomReplacements(int thread, std::size_t count, std::size_t slots,
                                            std::size_t low, std::size_t high) {
  const Sizes sizes = RandomSizes(thread, count, low, high);
  Random random(static_cast<std::uint64_t>(thread) + 1);
  std::vector<Replacement> replacements(count);
  for (std::size_t i = 0; i < count; ++i) {
    replacements[i] = {.slot = static_cast<std::uint32_t>(random.Below(slots)), .size = sizes[i]};
  }
  return replacements;
}

template <const Allocator& allocator>
void Replace(Objects& objects, Replacement replacement) {
  void*& object = objects[replacement.slot];
  allocator.free(object);
  object = New<allocator>(replacement.size);
}

template <const Allocator& allocator>
void MixedRandom(benchmark::State& state) {
  constexpr std::size_t kLive = 4096;
  constexpr std::size_t kReplacements = 16 * kLive;  // a power of two as well
  const ScopedPin pin(state.thread_index());
  const auto replacements =
      RandomReplacements(state.thread_index(), kReplacements, kLive, 8, 16 * kKiB);
  Objects live(kLive, nullptr);
  std::size_t next = 0;
  for (auto _ : state) Replace<allocator>(live, replacements[next++ % kReplacements]);
  FreeAll<allocator>(live);
  CountItems(state, 1);
}

// ---- Objects that cross threads. ----------------------------------------------------------------

// Batches of objects on their way from one thread to another: one pushes, one pops.
class BatchRing {
 public:
  static constexpr std::size_t kBatchObjects = 64;
  using Batch = std::array<void*, kBatchObjects>;

  // The pushing thread: waits for room, fills the batch, publishes it.
  Batch& AwaitRoom() {
    const std::uint64_t pushed = pushed_.load(std::memory_order_relaxed);
    SpinUntil([&] { return pushed - popped_.load(std::memory_order_acquire) < kBatches; });
    return batches_[pushed % kBatches];
  }
  void Push() {
    pushed_.store(pushed_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }

  // The popping thread: waits for a batch, empties it, gives the room back.
  Batch& AwaitBatch() {
    const std::uint64_t popped = popped_.load(std::memory_order_relaxed);
    SpinUntil([&] { return pushed_.load(std::memory_order_acquire) != popped; });
    return batches_[popped % kBatches];
  }
  void Pop() {
    popped_.store(popped_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }

 private:
  static constexpr std::size_t kBatches = 16;

  std::array<Batch, kBatches> batches_;
  alignas(64) std::atomic<std::uint64_t> pushed_{0};  // written by the pushing thread
  alignas(64) std::atomic<std::uint64_t> popped_{0};  // written by the popping thread
};

// One ring per thread for the run at hand.
class Rings {
 public:
  static void SetUp(const benchmark::State& state) {
    rings_ = std::make_unique<BatchRing[]>(static_cast<std::size_t>(state.threads()));
  }
  static void TearDown(const benchmark::State&) { rings_.reset(); }
  static BatchRing& Of(int thread) { return rings_[static_cast<std::size_t>(thread)]; }

 private:
  static inline std::unique_ptr<BatchRing[]> rings_;
};

template <const Allocator& allocator>
void PushBatch(BatchRing& ring, const Sizes& sizes, std::size_t& next) {
  for (void*& object : ring.AwaitRoom()) object = New<allocator>(sizes[next++ % kOperations]);
  ring.Push();
}

template <const Allocator& allocator>
void PopBatch(BatchRing& ring) {
  for (void* object : ring.AwaitBatch()) allocator.free(object);
  ring.Pop();
}

// Threads 2k and 2k + 1 are a pair. Both go round equally often, so every batch is freed.
template <const Allocator& allocator>
void ProducerConsumer(benchmark::State& state) {
  const ScopedPin pin(state.thread_index());
  const Sizes sizes = RandomSizes(state.thread_index(), kOperations, 8, 512);
  const bool produces = state.thread_index() % 2 == 0;
  BatchRing& ring = Rings::Of(state.thread_index() / 2);
  std::size_t next = 0;
  for (auto _ : state) {
    if (produces) {
      PushBatch<allocator>(ring, sizes, next);
    } else {
      PopBatch<allocator>(ring);
    }
  }
  // An item is an object allocated by one and freed by the other.
  if (produces) CountItems(state, BatchRing::kBatchObjects);
}

// No ring fills up: a thread is never more than one batch ahead of the one that it gets batches
// from.
template <const Allocator& allocator>
void Exchange(benchmark::State& state) {
  const ScopedPin pin(state.thread_index());
  const Sizes sizes = RandomSizes(state.thread_index(), kOperations, 8, 4 * kKiB);
  BatchRing& to_next = Rings::Of((state.thread_index() + 1) % state.threads());
  BatchRing& to_this = Rings::Of(state.thread_index());
  std::size_t next = 0;
  for (auto _ : state) {
    PushBatch<allocator>(to_next, sizes, next);
    PopBatch<allocator>(to_this);
  }
  CountItems(state, BatchRing::kBatchObjects);
}

// ---- Bursts. ------------------------------------------------------------------------------------

enum class Order { kLifo, kFifo, kRandom };

constexpr const char* ToString(Order order) {
  switch (order) {
    case Order::kLifo:
      return "lifo";
    case Order::kFifo:
      return "fifo";
    case Order::kRandom:
      return "random";
  }
  return "unknown";
}

// In which order the objects of a burst are freed.
std::vector<std::uint32_t> FreeOrder(Order order, std::size_t count) {
  std::vector<std::uint32_t> result = Random(count).Permutation(count);
  if (order == Order::kRandom) return result;
  std::sort(result.begin(), result.end());
  if (order == Order::kLifo) std::reverse(result.begin(), result.end());
  return result;
}

template <const Allocator& allocator>
void Burst(benchmark::State& state, Order order) {
  const std::size_t count = Scaled(100'000, 1000);
  const ScopedPin pin(state.thread_index());
  const Sizes sizes = RandomSizes(state.thread_index(), count, 16, kKiB);
  const std::vector<std::uint32_t> free_order = FreeOrder(order, count);
  Objects objects(count);
  for (auto _ : state) {
    for (std::size_t i = 0; i < count; ++i) objects[i] = New<allocator>(sizes[i]);
    for (const std::uint32_t i : free_order) allocator.free(objects[i]);
  }
  CountItems(state, count);
}

template <const Allocator& allocator>
void AllocateBurst(Objects& objects, const Sizes& sizes, std::size_t burst) {
  for (std::size_t bytes = 0; bytes < burst;) {
    const std::size_t size = sizes[objects.size() % sizes.size()];
    objects.push_back(New<allocator>(size));
    bytes += size;
  }
}

// What is resident of a burst after it was freed and the program idled, in percent of the burst.
// `before`, `peak` and `after`: resident memory of the process. A burst that found memory which the
// allocator kept from earlier adds less than its size at its peak, but all of it counts as held;
// else an allocator that keeps everything would keep nothing at the second time.
double RetainedPercent(std::size_t burst, std::size_t before, std::size_t peak, std::size_t after) {
  const auto held =
      std::max(static_cast<double>(burst), static_cast<double>(peak) - static_cast<double>(before));
  const double given_back = static_cast<double>(peak) - static_cast<double>(after);
  return std::max(0.0, held - given_back) * 100 / static_cast<double>(burst);
}

template <const Allocator& allocator>
void IdleRss(benchmark::State& state) {
  const std::size_t burst = Scaled(kGiB, kMiB);
  const double idle_seconds = Smoke() ? 0.1 : 2.0;
  const Sizes sizes = RandomSizes(0, 65536, 16, 4 * kKiB);
  Objects objects(burst / 256);  // more than enough, and resident before the burst
  objects.clear();
  double rss_percent = 0;
  for (auto _ : state) {
    allocator.idle(idle_seconds);  // what earlier cases left behind goes where it goes
    const std::size_t before = ResidentMemory();
    const std::uint64_t start = MonotonicNanoseconds();
    AllocateBurst<allocator>(objects, sizes, burst);
    const std::size_t peak = ResidentMemory();
    FreeAll<allocator>(objects);
    state.SetIterationTime(static_cast<double>(MonotonicNanoseconds() - start) * 1e-9);
    allocator.idle(idle_seconds);
    rss_percent = RetainedPercent(burst, before, peak, ResidentMemory());
  }
  state.counters["rss_percent"] = rss_percent;
}

// ---- Large objects. -----------------------------------------------------------------------------

template <const Allocator& allocator>
void LargeBuffers(benchmark::State& state) {
  constexpr std::size_t kLive = 4;
  const ScopedPin pin(state.thread_index());
  const std::size_t unit = Scaled(kMiB, 64 * kKiB);
  const Sizes sizes = RandomSizes(state.thread_index(), 256, 5 * unit, 25 * unit);
  Objects queue(kLive, nullptr);
  std::size_t next = 0;
  for (auto _ : state) {
    void*& oldest = queue[next % kLive];
    const std::size_t size = sizes[next % sizes.size()];
    ++next;
    allocator.free(oldest);
    oldest = allocator.malloc(size);
    WritePages(oldest, 0, size);
  }
  FreeAll<allocator>(queue);
  CountItems(state, 1);
}

template <const Allocator& allocator>
void ReallocGrowth(benchmark::State& state, std::size_t limit) {
  const ScopedPin pin(state.thread_index());
  for (auto _ : state) {
    void* object = nullptr;
    std::size_t size = 0;
    while (size < limit) {
      const std::size_t grown = std::min(limit, std::max(4 * kKiB, size + size / 8));
      object = allocator.realloc(object, grown);
      WritePages(object, size, grown);
      size = grown;
    }
    allocator.free(object);
  }
  CountItems(state, 1);
}

template <const Allocator& allocator>
void Calloc(benchmark::State& state, std::size_t size) {
  constexpr std::size_t kLive = 16;
  const ScopedPin pin(state.thread_index());
  Objects queue(kLive, nullptr);
  std::size_t next = 0;
  for (auto _ : state) {
    void*& oldest = queue[next++ % kLive];
    allocator.free(oldest);
    oldest = allocator.calloc(1, size);
    WritePages(oldest, 0, size);
  }
  FreeAll<allocator>(queue);
  CountItems(state, 1);
}

// ---- Threads that come and go. ------------------------------------------------------------------

// Runs `work(argument)` on a new thread until it ends; pthread_create itself uses the process's
// malloc.
void RunOnNewThread(void* (*work)(void*), void* argument) {
  pthread_t thread;
  if (pthread_create(&thread, nullptr, work, argument) != 0) DieOfErrno("pthread_create");
  pthread_join(thread, nullptr);
}

template <const Allocator& allocator>
void ThreadChurn(benchmark::State& state) {
  constexpr std::size_t kObjects = 32;
  constexpr std::size_t kLeft = 8;
  struct Work {
    Sizes sizes;
    std::array<void*, kObjects> objects;
  };
  const ScopedPin pin(state.thread_index());
  Work work = {.sizes = RandomSizes(state.thread_index(), kObjects, 16, kKiB), .objects = {}};
  for (auto _ : state) {
    RunOnNewThread(
        [](void* argument) -> void* {
          auto& [sizes, objects] = *static_cast<Work*>(argument);
          for (std::size_t i = 0; i < kObjects; ++i) objects[i] = New<allocator>(sizes[i]);
          for (std::size_t i = kLeft; i < kObjects; ++i) allocator.free(objects[i]);
          return nullptr;
        },
        &work);
    for (std::size_t i = 0; i < kLeft; ++i) allocator.free(work.objects[i]);
  }
  CountItems(state, 1);
}

template <const Allocator& allocator>
void SuccessorThreads(benchmark::State& state) {
  constexpr std::size_t kLive = 1000;
  constexpr std::size_t kReplacementsPerThread = 5000;
  struct Work {
    std::vector<Replacement> replacements;
    Objects live;
  };
  const ScopedPin pin(state.thread_index());
  Work work = {.replacements =
                   RandomReplacements(state.thread_index(), kReplacementsPerThread, kLive, 8, kKiB),
               .live = Objects(kLive, nullptr)};
  for (auto _ : state) {
    RunOnNewThread(
        [](void* argument) -> void* {
          auto& [replacements, live] = *static_cast<Work*>(argument);
          for (const Replacement replacement : replacements) Replace<allocator>(live, replacement);
          return nullptr;
        },
        &work);
  }
  FreeAll<allocator>(work.live);
  CountItems(state, kReplacementsPerThread);
}

// ---- Registration. ------------------------------------------------------------------------------

template <const Allocator& allocator>
std::string Name(const char* operation, const std::string& argument = "") {
  return absl::StrCat(operation, "/", allocator.name, argument.empty() ? "" : "/", argument);
}

// Registers a case for every allocator, next to each other: what disturbs the machine for a while
// then disturbs all of them. `register_one` is called as register_one.operator()<allocator>().
template <typename RegisterOne>
void ForEachAllocator(RegisterOne register_one) {
  register_one.template operator()<kFreehold>();
  register_one.template operator()<kGlibc>();
  if (mimalloc.name != nullptr) register_one.template operator()<mimalloc>();
}

void RegisterSmall() {
  ForEachAllocator([]<const Allocator & allocator>() {
    Register(Name<allocator>("small_lifo", "64B"),
             [](benchmark::State& state) { SmallLifo<allocator>(state, 64, 64); });
  });
  ForEachAllocator([]<const Allocator & allocator>() {
    Register(Name<allocator>("small_lifo", "mixed"),
             [](benchmark::State& state) { SmallLifo<allocator>(state, 8, 512); });
  });
  ForEachAllocator([]<const Allocator & allocator>() {
    Register(Name<allocator>("small_fifo"), SmallFifo<allocator>);
  });
  ForEachAllocator([]<const Allocator & allocator>() {
    Register(Name<allocator>("mixed_random"), MixedRandom<allocator>);
  });
}

void RegisterBursts() {
  for (const Order order : {Order::kLifo, Order::kFifo, Order::kRandom}) {
    ForEachAllocator([order]<const Allocator & allocator>() {
      Register(Name<allocator>("burst", ToString(order)),
               [order](benchmark::State& state) { Burst<allocator>(state, order); },
               {.unit = benchmark::kMicrosecond});
    });
  }
}

void RegisterThreads() {
  ForEachAllocator([]<const Allocator & allocator>() {
    Register(Name<allocator>("producer_consumer"), ProducerConsumer<allocator>,
             {.min_threads = 2,
              .thread_multiple = 2,
              .set_up = Rings::SetUp,
              .tear_down = Rings::TearDown});
  });
  ForEachAllocator([]<const Allocator & allocator>() {
    Register(Name<allocator>("exchange"), Exchange<allocator>,
             {.min_threads = 2, .set_up = Rings::SetUp, .tear_down = Rings::TearDown});
  });
  ForEachAllocator([]<const Allocator & allocator>() {
    Register(Name<allocator>("thread_churn"), ThreadChurn<allocator>,
             {.unit = benchmark::kMicrosecond});
  });
  ForEachAllocator([]<const Allocator & allocator>() {
    Register(Name<allocator>("successor_threads"), SuccessorThreads<allocator>,
             {.unit = benchmark::kMicrosecond});
  });
}

void RegisterLarge() {
  const std::pair<const char*, std::size_t> calloc_sizes[] = {
      {"64B", 64}, {"4KiB", 4 * kKiB}, {"1MiB", kMiB}};
  for (const auto& [name, bytes] : calloc_sizes) {
    ForEachAllocator([name = name, bytes = bytes]<const Allocator & allocator>() {
      Register(Name<allocator>("calloc", name),
               [bytes](benchmark::State& state) { Calloc<allocator>(state, bytes); });
    });
  }
  ForEachAllocator([]<const Allocator & allocator>() {
    Register(Name<allocator>("large_buffers", "5-25MiB"), LargeBuffers<allocator>,
             {.unit = benchmark::kMicrosecond});
  });
  ForEachAllocator([]<const Allocator & allocator>() {
    Register(Name<allocator>("realloc_growth", "1MiB"),
             [](benchmark::State& state) { ReallocGrowth<allocator>(state, kMiB); },
             {.unit = benchmark::kMicrosecond});
  });
}

void RegisterGiB() {
  ForEachAllocator([]<const Allocator & allocator>() {
    Register(
        Name<allocator>("realloc_growth", "1GiB"),
        [](benchmark::State& state) { ReallocGrowth<allocator>(state, Scaled(kGiB, 4 * kMiB)); },
        {.max_threads = 1, .unit = benchmark::kMillisecond});
  });
  ForEachAllocator([]<const Allocator & allocator>() {
    Register(
        Name<allocator>("idle_rss", "1GiB"), IdleRss<allocator>,
        {.max_threads = 1, .manual_time = true, .iterations = 1, .unit = benchmark::kMillisecond});
  });
}

bool RegisterCases() {
  if (const char* reason = LoadMimalloc()) NoteLeftOut("cases of mimalloc", reason);
  RegisterSmall();
  RegisterBursts();
  RegisterThreads();
  RegisterLarge();
  // mimalloc holds the old and the new object while it copies.
  if (Smoke() || AvailableMemory() >= 7 * kGiB / 2) {
    RegisterGiB();
  } else {
    NoteLeftOut("realloc_growth and idle_rss of 1 GiB",
                "less than 3.5 GiB of memory are available");
  }
  return true;
}

}  // namespace
}  // namespace freehold::bench

int main(int argc, char** argv) {
  return freehold::bench::RunBenchmarks(argc, argv, freehold::bench::RegisterCases);
}
