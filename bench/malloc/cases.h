// What the cases of malloc_benchmark share: sizes, objects, and how a case is registered for every allocator.
#ifndef FREEHOLD_BENCH_MALLOC_CASES_H_
#define FREEHOLD_BENCH_MALLOC_CASES_H_

#include <benchmark/benchmark.h>
#include <pthread.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bench/support/allocators.h"
#include "bench/support/cpu.h"
#include "bench/support/kernel_memory.h"
#include "bench/support/random.h"
#include "bench/support/runner.h"

namespace freehold::bench {

inline constexpr std::size_t kKiB = 1024;
inline constexpr std::size_t kMiB = 1024 * kKiB;
inline constexpr std::size_t kGiB = 1024 * kMiB;

// ---- Operations and objects. ----

// The length of most sequences, after which they start again: a power of two, so that where one is costs an `and`.
inline constexpr std::size_t kOperations = 8192;

using Sizes = std::vector<std::uint32_t>;
using Objects = std::vector<void*>;

// `count` sizes from `low` to `high`, every doubling equally likely; the same for every implementation.
inline Sizes RandomSizes(int thread, std::size_t count, std::size_t low, std::size_t high) {
  Random random(static_cast<std::uint64_t>(thread) * 1000 + low + high);
  Sizes sizes(count);
  for (std::uint32_t& size : sizes) size = static_cast<std::uint32_t>(random.LogUniform(low, high));
  return sizes;
}

inline void RequireMemory(const void* object) {
  if (object != nullptr) [[likely]]
    return;
  std::fputs("malloc_benchmark: out of memory\n", stderr);
  std::exit(1);
}

// The first thing that programs do with an object.
inline void* Written(void* object) {
  RequireMemory(object);
  *static_cast<volatile char*>(object) = 1;
  return object;
}

inline void WritePages(void* object, std::size_t from, std::size_t to) {
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

inline void CountItems(benchmark::State& state, std::size_t items_per_iteration) {
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations() * items_per_iteration));
}

// ---- Random replacement in a live set. ----

struct Replacement {
  std::uint32_t slot;
  std::uint32_t size;
};

inline std::vector<Replacement> RandomReplacements(int thread, std::size_t slots, const Sizes& sizes) {
  Random random(static_cast<std::uint64_t>(thread) + 1);
  std::vector<Replacement> replacements(sizes.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) {
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

// ---- Objects that cross threads. ----

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

// ---- Threads that come and go. ----

// Runs `work(argument)` on a new thread until it ends; pthread_create itself uses the process's malloc.
inline void RunOnNewThread(void* (*work)(void*), void* argument) {
  pthread_t thread;
  if (pthread_create(&thread, nullptr, work, argument) != 0) DieOfErrno("pthread_create");
  pthread_join(thread, nullptr);
}

// What the resident set of the process grows by once the first thread has come and gone.
class ResidentGrowth {
 public:
  // After each thread.
  void Sample() {
    if (after_first_ == 0) after_first_ = ResidentMemory();
  }
  void Report(benchmark::State& state) const {
    if (state.thread_index() != 0) return;
    const std::size_t now = ResidentMemory();
    state.counters["rss_growth_kib"] =
        now > after_first_ ? static_cast<double>(now - after_first_) / kKiB : 0.0;
  }

 private:
  std::size_t after_first_ = 0;
};

// ---- Registration. ----

using Case = std::function<void(benchmark::State&)>;

// Runs the case, and tells what the process took (see malloc_benchmark.cc).
void RunMeasured(benchmark::State& state, const Allocator& allocator, const Case& run);

template <const Allocator& allocator>
void RegisterCase(const char* operation, const std::string& argument, Case run, const CaseOptions& options = {}) {
  const std::string name = absl::StrCat(operation, "/", allocator.name, argument.empty() ? "" : "/", argument);
  const auto run_loaded = [run = std::move(run)](benchmark::State& state) {
    static const char* const failure = allocator.load();
    if (failure != nullptr) return state.SkipWithError(failure);
    RunMeasured(state, allocator, run);
  };
  Register(name, run_loaded, options);
}

// Registers a case for every allocator, next to each other: what disturbs the machine for a while then disturbs all of
// them. `register_one` is called as register_one.operator()<allocator>().
template <typename RegisterOne>
void ForEachAllocator(RegisterOne register_one) {
  register_one.template operator()<freehold_heap>();
  register_one.template operator()<glibc>();
  register_one.template operator()<mimalloc>();
  register_one.template operator()<jemalloc>();
  register_one.template operator()<tcmalloc>();
}

// Cases that have a file of their own.
void RegisterContainers();  // containers.cc
void RegisterPrograms();    // programs.cc

}  // namespace freehold::bench

#endif  // FREEHOLD_BENCH_MALLOC_CASES_H_
