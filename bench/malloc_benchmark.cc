// Allocating and freeing: Freehold's object heap against glibc, mimalloc, jemalloc and tcmalloc, with the same
// operations in the same order (support/allocators.h tells how they come to stand side by side).
//
//   small_lifo/IMPL/64B     allocate 32 objects of 64 bytes, free them in reverse order
//   small_lifo/IMPL/mixed   the same with 8 to 512 bytes
//   small_fifo/IMPL         512 live objects of 8 to 512 bytes: free the oldest, allocate one
//   mixed_random/IMPL       4096 live objects of 8 B to 16 KiB: free a random one, allocate one
//   pareto_random/IMPL      the same, sizes from 16 B to 64 KiB with Pareto's distribution
//   producer_consumer/IMPL  even threads allocate, odd threads free, in batches of 64 objects of 8 to 512 bytes
//   asymmetric/IMPL         one thread allocates 64 objects of 16 B to 2 KiB for each of the others, which free them and
//                           allocate and free as many of their own
//   exchange/IMPL           every thread allocates a batch of 64 objects of 8 B to 4 KiB for the next thread, and frees
//                           the one that it got
//   random_elsewhere/IMPL   1024 live objects of 8 to 16 000 bytes for each thread: replace a random one; every fourth is
//                           freed by the next thread
//   burst/IMPL/{lifo,fifo,random}
//                           allocate 100 000 objects of 16 B to 1 KiB, free all in that order
//   generations/IMPL        a new thread allocates 20 000 objects of 16 B to 2 KiB, frees what its predecessor left, and
//                           half of its own
//   fragmentation/IMPL      32 MiB of live objects in sizes that shift every phase, from 16 bytes to 64 KiB; random ones
//                           are freed for those that come
//   vector_growth/IMPL      64 live std::vectors: replace the oldest by one of 4 to 16 384 elements, one after the other
//   strings/IMPL            4096 live strings: replace a random one by one of 8 to 512 characters, appended in pieces
//   hash_map/IMPL/{std_unordered,absl_flat,absl_node}
//                           insert 4096 strings of 0 to 47 characters, find each, erase each
//   large_buffers/IMPL/5-25MiB
//                           4 live buffers: free the oldest, allocate one, write to all its pages
//   realloc_growth/IMPL/{1MiB,1GiB}
//                           grow one object from 4 KiB by an eighth at a time, write to new pages; once more before the
//                           clock runs
//   calloc/IMPL/{64B,4KiB,1MiB}
//                           16 live objects: free the oldest, calloc one, write to all its pages
//   thread_churn/IMPL       start a thread that allocates 32 objects and frees 24, join it, free the others
//   successor_threads/IMPL  1000 live objects of 8 B to 1 KiB, passed on to a new thread after every 5000 random
//                           replacements
//   false_sharing/IMPL/{active,passive}
//                           allocate 8 bytes, write to them 1000 times, free them; passive: after each thread freed one
//                           of several neighbours
//   idle_rss/IMPL/1GiB      idle for 2 s, allocate 1 GiB in objects of 16 B to 4 KiB, free all, idle for 2 s; the counter
//                           rss_percent is what then is still resident of the burst
//
// What is measured. Wall-clock time of all threads together, for an item: an object allocated and freed, a buffer, a
// vector, a whole growth, a thread. Every thread is pinned to a processor. Sizes are spread evenly over their logarithm
// unless the case says otherwise. Every object is written to. Sequences of sizes and slots are written before the clock
// runs, from seeds that depend on the thread only: every implementation gets the same.
//
// Counters. peak_rss_mib: the largest resident set of the process up to the end of the case; of the case itself in a
// process that runs nothing else (`bench/isolated`). page_faults: of the process, for an iteration. rss_growth_kib, for
// cases with a thread an iteration: what the resident set grew by from the first of them to the last; what threads leave
// behind. idle_rss_mib, with --idle_seconds: the resident set after the case is over and that time has passed.
//
// An allocator serves all its cases in the same process, one after the other, so later cases find what earlier ones left
// behind; `bench/isolated` gives every case a process of its own.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "bench/malloc/cases.h"
#include "bench/support/tick_clock.h"

ABSL_FLAG(double, idle_seconds, 0, "after each case, idle that long and report idle_rss_mib");

namespace freehold::bench {

void RunMeasured(benchmark::State& state, const Allocator& allocator, const Case& run) {
  if (state.thread_index() != 0) return run(state);
  const std::uint64_t faults_before = MinorFaults();
  run(state);
  const auto faults = static_cast<double>(MinorFaults() - faults_before);
  state.counters["page_faults"] = faults / static_cast<double>(state.iterations());
  state.counters["peak_rss_mib"] = static_cast<double>(PeakResidentMemory()) / kMiB;
  const double idle_seconds = absl::GetFlag(FLAGS_idle_seconds);
  if (idle_seconds <= 0) return;
  allocator.idle(idle_seconds);
  state.counters["idle_rss_mib"] = static_cast<double>(ResidentMemory()) / kMiB;
}

namespace {

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

// ---- Random replacement in a live set. ----

template <const Allocator& allocator>
void ReplaceRandom(benchmark::State& state, std::size_t (Random::*draw)(std::size_t low, std::size_t high),
                   std::size_t low, std::size_t high) {
  constexpr std::size_t kLive = 4096;
  constexpr std::size_t kReplacements = 16 * kLive;  // a power of two as well
  const ScopedPin pin(state.thread_index());
  Random random(static_cast<std::uint64_t>(state.thread_index()) * 1000 + low + high);
  Sizes sizes(kReplacements);
  for (std::uint32_t& size : sizes) size = static_cast<std::uint32_t>((random.*draw)(low, high));
  const auto replacements = RandomReplacements(state.thread_index(), kLive, sizes);
  Objects live(kLive, nullptr);
  std::size_t next = 0;
  for (auto _ : state) Replace<allocator>(live, replacements[next++ % kReplacements]);
  FreeAll<allocator>(live);
  CountItems(state, 1);
}

// ---- Objects that cross threads. ----------------------------------------------------------------

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
  const auto grow_and_free = [limit] {
    void* object = nullptr;
    std::size_t size = 0;
    while (size < limit) {
      const std::size_t grown = std::min(limit, std::max(4 * kKiB, size + size / 8));
      object = allocator.realloc(object, grown);
      WritePages(object, size, grown);
      size = grown;
    }
    allocator.free(object);
  };
  // In a virtual machine memory that is touched for the first time may cost more than all the rest.
  grow_and_free();
  for (auto _ : state) grow_and_free();
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
  ResidentGrowth growth;
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
    growth.Sample();
  }
  growth.Report(state);
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
                   RandomReplacements(state.thread_index(), kLive,
                                      RandomSizes(state.thread_index(), kReplacementsPerThread, 8, kKiB)),
               .live = Objects(kLive, nullptr)};
  ResidentGrowth growth;
  for (auto _ : state) {
    RunOnNewThread(
        [](void* argument) -> void* {
          auto& [replacements, live] = *static_cast<Work*>(argument);
          for (const Replacement replacement : replacements) Replace<allocator>(live, replacement);
          return nullptr;
        },
        &work);
    growth.Sample();
  }
  growth.Report(state);
  FreeAll<allocator>(work.live);
  CountItems(state, kReplacementsPerThread);
}

// ---- Registration. ------------------------------------------------------------------------------

void RegisterSmall() {
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("small_lifo", "64B",
             [](benchmark::State& state) { SmallLifo<allocator>(state, 64, 64); });
  });
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("small_lifo", "mixed",
             [](benchmark::State& state) { SmallLifo<allocator>(state, 8, 512); });
  });
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("small_fifo", "", SmallFifo<allocator>);
  });
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("mixed_random", "", [](benchmark::State& state) {
      ReplaceRandom<allocator>(state, &Random::LogUniform, 8, 16 * kKiB);
    });
  });
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("pareto_random", "", [](benchmark::State& state) {
      ReplaceRandom<allocator>(state, &Random::Pareto, 16, 64 * kKiB);
    });
  });
}

void RegisterBursts() {
  for (const Order order : {Order::kLifo, Order::kFifo, Order::kRandom}) {
    ForEachAllocator([order]<const Allocator& allocator>() {
      RegisterCase<allocator>("burst", ToString(order),
               [order](benchmark::State& state) { Burst<allocator>(state, order); },
               {.unit = benchmark::kMicrosecond});
    });
  }
}

void RegisterThreads() {
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("producer_consumer", "", ProducerConsumer<allocator>,
             {.min_threads = 2,
              .thread_multiple = 2,
              .set_up = Rings::SetUp,
              .tear_down = Rings::TearDown});
  });
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("exchange", "", Exchange<allocator>,
             {.min_threads = 2, .set_up = Rings::SetUp, .tear_down = Rings::TearDown});
  });
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("thread_churn", "", ThreadChurn<allocator>,
             {.unit = benchmark::kMicrosecond});
  });
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("successor_threads", "", SuccessorThreads<allocator>,
             {.unit = benchmark::kMicrosecond});
  });
}

void RegisterLarge() {
  const std::pair<const char*, std::size_t> calloc_sizes[] = {
      {"64B", 64}, {"4KiB", 4 * kKiB}, {"1MiB", kMiB}};
  for (const auto& [name, bytes] : calloc_sizes) {
    ForEachAllocator([name = name, bytes = bytes]<const Allocator& allocator>() {
      RegisterCase<allocator>("calloc", name,
               [bytes](benchmark::State& state) { Calloc<allocator>(state, bytes); });
    });
  }
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("large_buffers", "5-25MiB", LargeBuffers<allocator>,
             {.unit = benchmark::kMicrosecond});
  });
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("realloc_growth", "1MiB",
             [](benchmark::State& state) { ReallocGrowth<allocator>(state, kMiB); },
             {.unit = benchmark::kMicrosecond});
  });
}

void RegisterGiB() {
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("realloc_growth", "1GiB",
        [](benchmark::State& state) { ReallocGrowth<allocator>(state, Scaled(kGiB, 4 * kMiB)); },
        {.max_threads = 1, .unit = benchmark::kMillisecond});
  });
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("idle_rss", "1GiB", IdleRss<allocator>,
        {.max_threads = 1, .manual_time = true, .iterations = 1, .unit = benchmark::kMillisecond});
  });
}

bool RegisterCases() {
  RegisterSmall();
  RegisterBursts();
  RegisterThreads();
  RegisterPrograms();
  RegisterContainers();
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
  freehold::bench::MakeRoomForLibraries(argv);
  return freehold::bench::RunBenchmarks(argc, argv, freehold::bench::RegisterCases);
}
