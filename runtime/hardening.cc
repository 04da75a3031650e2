#include "runtime/hardening.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#include "allocator/object_heap.h"
#include "allocator/size_class.h"
#include "vm/sync/clock.h"

namespace freehold::runtime {
namespace {

using allocator::kMaxClassSize;
using allocator::kSizeClassCount;
using allocator::ObjectHeap;
using allocator::ThreadCache;

// Objects that a thread holds back at most, whatever their size.
constexpr std::size_t kMaxHeld = 4096;
// Of each class, objects to choose the next one from.
constexpr std::size_t kSpares = 16;
// What is filled of an object that is held back, behind the words that mark it as free.
constexpr std::size_t kMarked = 16;
constexpr std::size_t kMaxFilled = 4096;
constexpr unsigned char kFill = 0xdf;

constinit HardeningOptions options;

// The state of SplitMix64, as in allocator/object_heap.cc.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::size_t Below(std::size_t end) {
    std::uint64_t n = state_ += 0x9e3779b97f4a7c15;
    n = (n ^ (n >> 30)) * 0xbf58476d1ce4e5b9;
    n = (n ^ (n >> 27)) * 0x94d049bb133111eb;
    return static_cast<std::size_t>((static_cast<unsigned __int128>(n ^ (n >> 31)) * end) >> 64);
  }

 private:
  std::uint64_t state_;
};

struct Held {
  void* object;
  std::size_t size;
};

// A thread's part. Lies in an object of the heap.
struct ThreadState {
  explicit ThreadState(std::uint64_t seed) : random(seed) {}

  Random random;
  std::size_t held_count = 0;
  std::size_t held_bytes = 0;
  std::array<Held, kMaxHeld> held;
  std::array<std::array<void*, kSpares>, kSizeClassCount> spares = {};
};

constinit thread_local ThreadState* thread_state __attribute__((tls_model("initial-exec"))) = nullptr;

unsigned char FillByte() { return options.zero_on_free ? 0 : kFill; }

std::pair<unsigned char*, std::size_t> Filled(const Held& held) {
  return {static_cast<unsigned char*>(held.object) + kMarked, std::min(held.size - kMarked, kMaxFilled)};
}

// Null where there is none: for threads with a borrowed cache, and without memory.
ThreadState* StateOf(ThreadCache& cache, bool attached) {
  if (!attached || thread_state != nullptr) return thread_state;
  void* memory = cache.Allocate(sizeof(ThreadState));
  if (memory == nullptr) return nullptr;
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  return thread_state = new (memory) ThreadState(vm::sync::MonotonicNow().value ^ (address << 20));
}

void FreeHeld(ThreadCache& cache, const Held& held) {
  const auto [from, count] = Filled(held);
  const unsigned char fill = FillByte();
  const bool intact = std::all_of(from, from + count, [fill](unsigned char byte) { return byte == fill; });
  cache.heap().Release(held.object, intact);
  cache.Free(held.object);
}

// Out of the middle, so that nobody knows whose turn it is.
void FreeRandomHeld(ThreadCache& cache, ThreadState& state) {
  const std::size_t which = state.random.Below(state.held_count);
  const Held held = std::exchange(state.held[which], state.held[state.held_count - 1]);
  --state.held_count;
  state.held_bytes -= held.size;
  FreeHeld(cache, held);
}

// Whether `p` is held back; else it is to be freed.
bool Hold(ThreadCache& cache, ThreadState& state, void* p, std::size_t size) {
  if (size > kMaxClassSize || size > options.quarantine.value / 4) return false;
  while (state.held_count == kMaxHeld || state.held_bytes + size > options.quarantine.value) {
    FreeRandomHeld(cache, state);
  }
  const Held held = {p, size};
  if (!cache.heap().Hold(p)) return false;
  const auto [from, count] = Filled(held);
  std::memset(from, FillByte(), count);
  state.held[state.held_count++] = held;
  state.held_bytes += size;
  return true;
}

// Null: none for now. A guarded object is not as aligned as others of its size.
void* NewSpare(ThreadCache& cache, std::size_t size) {
  void* p = cache.Allocate(size);
  if (p == nullptr || !cache.heap().IsGuarded(p)) return p;
  cache.Free(p);
  return nullptr;
}

// `p`, or a spare of its class in exchange for it.
void* Placed(ThreadCache& cache, bool attached, void* p) {
  if (!options.random_placement || p == nullptr) return p;
  // It lies at random already, and has no more room than it was asked for.
  if (cache.heap().IsGuarded(p)) return p;
  ThreadState* state = StateOf(cache, attached);
  if (state == nullptr) return p;
  const std::size_t size = cache.heap().UsableSize(p);
  if (size > kMaxClassSize) return p;
  auto& spares = state->spares[allocator::ClassOf(size)];
  // All of them at the first object of a class, so that the second may be any.
  for (void*& spare : spares) {
    if (spare == nullptr) spare = NewSpare(cache, size);
  }
  void*& chosen = spares[state->random.Below(kSpares)];
  return chosen != nullptr ? std::exchange(chosen, p) : p;
}

}  // namespace

void SetHardening(const HardeningOptions& chosen) { options = chosen; }

bool IsHardened() { return options.any(); }

void* HardenedAllocate(ThreadCache& cache, bool attached, std::size_t size) {
  return Placed(cache, attached, cache.Allocate(size));
}

// A spare may be anything.
void* HardenedAllocateZeroed(ThreadCache& cache, bool attached, std::size_t size) {
  void* p = cache.AllocateZeroed(size);
  void* placed = Placed(cache, attached, p);
  return placed != p ? std::memset(placed, 0, size) : p;
}

void* HardenedAllocateAligned(ThreadCache& cache, bool attached, std::size_t alignment, std::size_t size) {
  // All objects of a class are as aligned as its size.
  return Placed(cache, attached, cache.AllocateAligned(alignment, size));
}

// What stays where it is needs nothing; the rest is allocated and freed as everything else.
void* HardenedReallocate(ThreadCache& cache, bool attached, void* p, std::size_t size) {
  if (p == nullptr) return HardenedAllocate(cache, attached, size);
  const std::size_t usable = cache.heap().UsableSize(p);
  if (size <= usable && size > usable / 2) return p;
  if (size > usable && cache.TryExpand(p, size)) return p;
  void* to = HardenedAllocate(cache, attached, size);
  if (to == nullptr) return size > usable ? nullptr : p;
  std::memcpy(to, p, std::min(size, usable));
  HardenedFree(cache, attached, p);
  return to;
}

void HardenedFree(ThreadCache& cache, bool attached, void* p) {
  if (p == nullptr) return;
  const std::size_t size = cache.heap().CheckFree(p);
  if (options.zero_on_free) std::memset(p, 0, size);
  if (options.quarantine.value != 0) {
    ThreadState* state = StateOf(cache, attached);
    if (state != nullptr && Hold(cache, *state, p, size)) return;
  }
  cache.Free(p);
}

void ReleaseHeld(ThreadCache& cache) {
  while (thread_state != nullptr && thread_state->held_count > 0) FreeRandomHeld(cache, *thread_state);
}

void ReleaseHardening(ThreadCache& cache) {
  ReleaseHeld(cache);
  ThreadState* state = std::exchange(thread_state, nullptr);
  if (state == nullptr) return;
  for (auto& spares : state->spares) {
    for (void* spare : spares) cache.Free(spare);
  }
  cache.Free(state);
}

}  // namespace freehold::runtime
