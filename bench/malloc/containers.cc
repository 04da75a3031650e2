// Containers whose memory an allocator serves: what C++ programs spend most of their allocations on.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/node_hash_map.h"
#include "absl/hash/hash.h"
#include "bench/malloc/cases.h"

namespace freehold::bench {
namespace {

template <typename T, const Allocator& allocator>
struct StdAllocator {
  using value_type = T;
  template <typename U>
  struct rebind {
    using other = StdAllocator<U, allocator>;
  };

  StdAllocator() = default;
  template <typename U>
  explicit(false) StdAllocator(const StdAllocator<U, allocator>&) {}

  T* allocate(std::size_t count) {
    void* memory = allocator.malloc(count * sizeof(T));
    RequireMemory(memory);
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, std::size_t) { allocator.free(memory); }

  friend bool operator==(const StdAllocator&, const StdAllocator&) { return true; }
};

template <const Allocator& allocator>
void VectorGrowth(benchmark::State& state) {
  constexpr std::size_t kLive = 64;
  using Vector = std::vector<std::uint64_t, StdAllocator<std::uint64_t, allocator>>;
  const ScopedPin pin(state.thread_index());
  const Sizes lengths = RandomSizes(state.thread_index(), 1024, 4, 16 * kKiB);
  std::vector<Vector> live(kLive);
  std::size_t next = 0;
  for (auto _ : state) {
    Vector vector;
    const std::size_t length = lengths[next % lengths.size()];
    for (std::uint64_t i = 0; i < length; ++i) vector.push_back(i);
    live[next++ % kLive] = std::move(vector);
  }
  CountItems(state, 1);
}

// Replaces a random one of 4096 strings by one that is appended to in up to eight pieces.
template <const Allocator& allocator>
void Strings(benchmark::State& state) {
  constexpr std::size_t kLive = 4096;
  using String = std::basic_string<char, std::char_traits<char>, StdAllocator<char, allocator>>;
  const ScopedPin pin(state.thread_index());
  const auto replacements =
      RandomReplacements(state.thread_index(), kLive, RandomSizes(state.thread_index(), kOperations, 8, 512));
  const std::string text(64, 'x');
  std::vector<String> live(kLive);
  std::size_t next = 0;
  for (auto _ : state) {
    const Replacement replacement = replacements[next++ % kOperations];
    String string;
    for (std::size_t i = 0; i < replacement.size; i += text.size()) {
      string.append(text, 0, std::min<std::size_t>(text.size(), replacement.size - i));
    }
    live[replacement.slot] = std::move(string);
  }
  CountItems(state, 1);
}

// Inserts 4096 random keys, looks each up, and erases them in another order.
template <typename Map>
void HashMap(benchmark::State& state) {
  constexpr std::size_t kKeys = 4096;
  const ScopedPin pin(state.thread_index());
  Random random(static_cast<std::uint64_t>(state.thread_index()) + 7);
  std::vector<std::uint64_t> keys(kKeys);
  for (std::uint64_t& key : keys) key = random.Next();
  const std::vector<std::uint32_t> erase_order = random.Permutation(kKeys);
  for (auto _ : state) {
    Map map;
    for (const std::uint64_t key : keys) map[key].resize(key % 48, 'x');
    std::size_t bytes = 0;
    for (const std::uint64_t key : keys) bytes += map.find(key)->second.size();
    benchmark::DoNotOptimize(bytes);
    for (const std::uint32_t i : erase_order) map.erase(keys[i]);
  }
  CountItems(state, kKeys);
}

template <const Allocator& allocator>
struct Maps {
  using Key = std::uint64_t;
  using String = std::basic_string<char, std::char_traits<char>, StdAllocator<char, allocator>>;
  using Allocate = StdAllocator<std::pair<const Key, String>, allocator>;
  using StdUnordered = std::unordered_map<Key, String, std::hash<Key>, std::equal_to<Key>, Allocate>;
  using AbslFlat = absl::flat_hash_map<Key, String, absl::Hash<Key>, std::equal_to<Key>, Allocate>;
  using AbslNode = absl::node_hash_map<Key, String, absl::Hash<Key>, std::equal_to<Key>, Allocate>;
};

}  // namespace

void RegisterContainers() {
  const CaseOptions microseconds = {.unit = benchmark::kMicrosecond};
  ForEachAllocator([&]<const Allocator& allocator>() {
    RegisterCase<allocator>("vector_growth", "", VectorGrowth<allocator>, microseconds);
  });
  ForEachAllocator([]<const Allocator& allocator>() { RegisterCase<allocator>("strings", "", Strings<allocator>); });
  ForEachAllocator([&]<const Allocator& allocator>() {
    RegisterCase<allocator>("hash_map", "std_unordered", HashMap<typename Maps<allocator>::StdUnordered>, microseconds);
  });
  ForEachAllocator([&]<const Allocator& allocator>() {
    RegisterCase<allocator>("hash_map", "absl_flat", HashMap<typename Maps<allocator>::AbslFlat>, microseconds);
  });
  ForEachAllocator([&]<const Allocator& allocator>() {
    RegisterCase<allocator>("hash_map", "absl_node", HashMap<typename Maps<allocator>::AbslNode>, microseconds);
  });
}

}  // namespace freehold::bench
