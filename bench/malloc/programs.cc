// Patterns of whole programs: objects that live long and die elsewhere, threads with unequal work, threads that come and
// go, sizes that change over time, and objects that share cache lines.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "bench/malloc/cases.h"

namespace freehold::bench {
namespace {

// ---- Random sizes, partly freed by the next thread. ----

template <const Allocator& allocator>
void RandomElsewhere(benchmark::State& state) {
  constexpr std::size_t kLive = 1024;
  constexpr std::size_t kReplacementsPerObject = 4;  // that moves on
  const ScopedPin pin(state.thread_index());
  Random random(static_cast<std::uint64_t>(state.thread_index()) + 3);
  Sizes sizes(16 * kOperations);
  for (std::uint32_t& size : sizes) size = static_cast<std::uint32_t>(random.Uniform(8, 16'000));
  const auto replacements = RandomReplacements(state.thread_index(), kLive, sizes);
  BatchRing& to_next = Rings::Of((state.thread_index() + 1) % state.threads());
  BatchRing& to_this = Rings::Of(state.thread_index());
  Objects live(kLive, nullptr);
  std::size_t next = 0;
  for (auto _ : state) {
    for (void*& moved : to_next.AwaitRoom()) {
      for (std::size_t i = 1; i < kReplacementsPerObject; ++i) {
        Replace<allocator>(live, replacements[next++ % replacements.size()]);
      }
      const Replacement last = replacements[next++ % replacements.size()];
      moved = std::exchange(live[last.slot], New<allocator>(last.size));
    }
    to_next.Push();
    PopBatch<allocator>(to_this);
  }
  FreeAll<allocator>(live);
  CountItems(state, BatchRing::kBatchObjects * kReplacementsPerObject);
}

// ---- One thread allocates for all others, which have objects of their own. ----

template <const Allocator& allocator>
void Asymmetric(benchmark::State& state) {
  const ScopedPin pin(state.thread_index());
  const Sizes sizes = RandomSizes(state.thread_index(), kOperations, 16, 2 * kKiB);
  const bool dispatches = state.thread_index() == 0;
  std::array<void*, BatchRing::kBatchObjects> own;
  std::size_t next = 0;
  for (auto _ : state) {
    if (dispatches) {
      for (int worker = 1; worker < state.threads(); ++worker) PushBatch<allocator>(Rings::Of(worker), sizes, next);
    } else {
      for (void*& object : own) object = New<allocator>(sizes[next++ % kOperations]);
      PopBatch<allocator>(Rings::Of(state.thread_index()));
      for (void* object : own) allocator.free(object);
    }
  }
  // An item is an object that was allocated by the one and freed by another, and one that stayed.
  if (!dispatches) CountItems(state, BatchRing::kBatchObjects);
}

// ---- Generations: a thread frees what the one before it left, and leaves half of its own. ----

struct Generation {
  Sizes sizes;
  Objects inherited;
  Objects left;
};

template <const Allocator& allocator>
void* LiveAndDie(void* argument) {
  auto& [sizes, inherited, left] = *static_cast<Generation*>(argument);
  Objects own(sizes.size());
  for (std::size_t i = 0; i < own.size(); ++i) own[i] = New<allocator>(sizes[i]);
  FreeAll<allocator>(inherited);
  left.clear();
  for (std::size_t i = 0; i < own.size(); ++i) {
    if (i % 2 == 0) {
      left.push_back(own[i]);
    } else {
      allocator.free(own[i]);
    }
  }
  std::swap(inherited, left);
  return nullptr;
}

template <const Allocator& allocator>
void Generations(benchmark::State& state) {
  const std::size_t count = Scaled(20'000, 200);
  const ScopedPin pin(state.thread_index());
  Generation generation = {
      .sizes = RandomSizes(state.thread_index(), count, 16, 2 * kKiB), .inherited = {}, .left = {}};
  ResidentGrowth growth;
  for (auto _ : state) {
    RunOnNewThread(LiveAndDie<allocator>, &generation);
    growth.Sample();
  }
  growth.Report(state);
  FreeAll<allocator>(generation.inherited);
  CountItems(state, count);
}

// ---- Sizes that shift. ----

// An iteration is a round of phases. In each, objects of that phase's sizes come, and random ones go while more bytes
// than the limit are live: so what is left of earlier phases lies scattered between what comes now.
template <const Allocator& allocator>
void Fragmentation(benchmark::State& state) {
  constexpr std::pair<std::size_t, std::size_t> kPhases[] = {
      {16, 64}, {4 * kKiB, 32 * kKiB}, {64, 512}, {512, 4 * kKiB}, {24, 24}, {1 * kKiB, 64 * kKiB}, {16, 4 * kKiB}};
  const std::size_t limit = Scaled(32 * kMiB, 256 * kKiB);
  const ScopedPin pin(state.thread_index());
  Random random(static_cast<std::uint64_t>(state.thread_index()) + 11);
  struct Live {
    void* object;
    std::uint32_t size;
  };
  std::vector<Live> live;
  live.reserve(limit / 16);
  std::size_t live_bytes = 0;
  std::size_t items = 0;
  for (auto _ : state) {
    for (const auto& [low, high] : kPhases) {
      // Each phase turns over half of the live bytes.
      for (std::size_t bytes = 0; bytes < limit / 2;) {
        const std::size_t size = random.LogUniform(low, high);
        live.push_back({New<allocator>(size), static_cast<std::uint32_t>(size)});
        bytes += size;
        live_bytes += size;
        ++items;
        while (live_bytes > limit) {
          Live& victim = live[random.Below(live.size())];
          live_bytes -= victim.size;
          allocator.free(victim.object);
          victim = live.back();
          live.pop_back();
        }
      }
    }
  }
  for (const Live& each : live) allocator.free(each.object);
  state.SetItemsProcessed(static_cast<std::int64_t>(items));
}

// ---- False sharing. ----

// Objects that one thread allocated one after the other, for one thread each.
class Neighbours {
 public:
  static void SetUp(const benchmark::State& state) {
    objects_.assign(static_cast<std::size_t>(state.threads()), nullptr);
    placed_.store(false, std::memory_order_relaxed);
  }
  template <const Allocator& allocator>
  static void Place() {
    for (void*& object : objects_) object = New<allocator>(8);
    placed_.store(true, std::memory_order_release);
  }
  // Waits until they are there.
  static void* Of(int thread) {
    SpinUntil([] { return placed_.load(std::memory_order_acquire); });
    return objects_[static_cast<std::size_t>(thread)];
  }

 private:
  static inline Objects objects_;
  static inline std::atomic<bool> placed_;
};

// Allocates an object, writes to it many times, frees it. If two threads' objects share a cache line, it shows.
template <const Allocator& allocator>
void WriteOften(benchmark::State& state) {
  constexpr int kWrites = 1000;
  for (auto _ : state) {
    auto* counter = static_cast<volatile std::uint64_t*>(New<allocator>(8));
    for (int i = 0; i < kWrites; ++i) *counter = *counter + 1;
    allocator.free(const_cast<std::uint64_t*>(counter));
  }
  CountItems(state, 1);
}

template <const Allocator& allocator>
void FalseSharingActive(benchmark::State& state) {
  const ScopedPin pin(state.thread_index());
  WriteOften<allocator>(state);
}

// Each thread first frees an object that lies beside those that the others free.
template <const Allocator& allocator>
void FalseSharingPassive(benchmark::State& state) {
  const ScopedPin pin(state.thread_index());
  if (state.thread_index() == 0) Neighbours::Place<allocator>();
  allocator.free(Neighbours::Of(state.thread_index()));
  WriteOften<allocator>(state);
}

}  // namespace

void RegisterPrograms() {
  const CaseOptions microseconds = {.unit = benchmark::kMicrosecond};
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("random_elsewhere", "", RandomElsewhere<allocator>,
                            {.set_up = Rings::SetUp, .tear_down = Rings::TearDown, .unit = benchmark::kMicrosecond});
  });
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("asymmetric", "", Asymmetric<allocator>,
                            {.min_threads = 2, .set_up = Rings::SetUp, .tear_down = Rings::TearDown});
  });
  ForEachAllocator([&]<const Allocator& allocator>() {
    RegisterCase<allocator>("generations", "", Generations<allocator>, microseconds);
  });
  ForEachAllocator([&]<const Allocator& allocator>() {
    RegisterCase<allocator>("fragmentation", "", Fragmentation<allocator>,
                            {.iterations = Smoke() ? 1 : 3, .unit = benchmark::kMillisecond});
  });
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("false_sharing", "active", FalseSharingActive<allocator>, {.min_threads = 2});
  });
  ForEachAllocator([]<const Allocator& allocator>() {
    RegisterCase<allocator>("false_sharing", "passive", FalseSharingPassive<allocator>,
                            {.min_threads = 2, .set_up = Neighbours::SetUp});
  });
}

}  // namespace freehold::bench
