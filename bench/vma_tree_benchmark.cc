// The index of VMAs: which one holds an address, putting one in, taking one out, finding room. Freehold against
// ordered maps under a reader-writer lock: `btree_shared_mutex` is absl::btree_map, `map` is std::map, both
// under std::shared_mutex.
//
//   vma_lookup/IMPL/N        which VMA holds an address, among N of two pages. threads:1 looks up alone; with more,
//                            thread 0 writes all the time: it unmaps every second VMA in random order and maps
//                            another. `freehold` is a whole AddressSpace: Lookup, Map, Unmap.
//   vma_lookup_churn/IMPL/N  the same with a writer that changes the structure at every step: VMAs come and go in
//                            the gaps between those that are looked up. `freehold` is the VmaTree itself under a
//                            region's kind of lock, since an AddressSpace mostly re-uses extents where they are.
//   vma_map/IMPL/N           a VMA of one page comes into the middle of a gap; an iteration is 64 of them
//   vma_unmap/IMPL/N         it goes
//   vma_gap/IMPL/N           the lowest gap of 4 pages, where all gaps have 3 but the last. Only `freehold` has an
//                            index of gaps; the maps look at every VMA
//
// What is measured. Wall-clock time. Items are lookups, the readers' only, or operations. Counters: `lookup_ns` is
// a reader's time for one lookup, `writes_per_second` what the writer got done beside them, `bytes_per_vma` what
// the index itself takes for a VMA (nodes, records, spare ones; not the memory that is mapped).
//
// What is the same for all. The addresses looked up are computed, so that nobody pays for fetching them; all are
// mapped. A found VMA's range, protection and generation are copied out. What is not: `freehold` tiles its region,
// so that vma_map splits a free extent (two insertions) where a map inserts once. It pays for the gap index.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/strings/str_cat.h"
#include "bench/support/cpu.h"
#include "bench/support/random.h"
#include "bench/support/runner.h"
#include "bench/support/spaces.h"
#include "bench/support/tick_clock.h"
#include "vm/address_space.h"
#include "vm/os/kernel.h"
#include "vm/sync/spin_lock.h"
#include "vm/vma_tree.h"

namespace freehold::bench {
namespace {

using vm::PageNumber;
using vm::PageRange;
using vm::Pages;
using vm::RegionPage;
using vm::Vma;
using vm::VmaState;
using vm::VmaTree;

// ---- The indexes. -------------------------------------------------------------------------------
//
// Each holds VMAs 0 to N - 1. Lookup(i) finds VMA i by an address in it; Remap(i) unmaps it and maps another
// in its place in the numbering. Where VMAs have gaps behind them, Map(i) and Unmap(i) put a VMA into the one
// behind VMA i and take it out, and FindGap() looks for kWanted pages.

// Where VMAs have gaps, VMA i takes the first page of this many.
constexpr RegionPage kStride = 4;
constexpr RegionPage kWanted = 4;

class SpaceIndex {
 public:
  static constexpr const char* kName = "freehold";

  explicit SpaceIndex(std::size_t vmas) : moved_(vmas) {
    const std::size_t before = space_.space().Stats().metadata.value;
    for (std::size_t i = 0; i < vmas; ++i) {
      moved_[i] = space_.Map(kBytes);
      if (i == 0) base_ = PageNumber::Of(moved_[0]);
      if (PageNumber::Of(moved_[i]) != PageOf(i)) Die("VMAs are not in a row");
    }
    bytes_per_vma_ = static_cast<double>(space_.space().Stats().metadata.value - before) /
                     static_cast<double>(vmas);
  }

  // REQUIRES: `i` was never remapped.
  bool Lookup(std::size_t i) {
    const vm::Result<vm::VmaInfo> vma = space_.space().Lookup(PageOf(i));
    benchmark::DoNotOptimize(vma);
    return vma.ok();
  }
  void Remap(std::size_t i) {
    space_.Unmap(moved_[i], kBytes);
    moved_[i] = space_.Map(kBytes);
  }
  double bytes_per_vma() const { return bytes_per_vma_; }

 private:
  static constexpr std::size_t kBytes = 2 * vm::kPageSize;

  [[noreturn]] static void Die(const char* what) {
    std::fprintf(stderr, "vma_tree_benchmark: %s\n", what);
    std::exit(1);
  }
  PageNumber PageOf(std::size_t i) const { return base_ + Pages{2 * i}; }

  FreeholdSpace space_;
  PageNumber base_;
  std::vector<std::byte*> moved_;  // where VMA i is now; the writer's
  double bytes_per_vma_ = 0;
};

class TreeIndex {
 public:
  static constexpr const char* kName = "freehold";

  explicit TreeIndex(std::size_t vmas) : end_(static_cast<RegionPage>(vmas) * kStride + kWanted) {
    AddNodes();
    Vma* all = NewVma(0, end_, VmaState::kFree);
    tree_.Init(all);
    for (std::size_t i = 0; i < vmas; ++i) Insert(PageOf(i));
  }

  bool Lookup(std::size_t i) {
    VmaTree::View view;
    while (!tree_.Lookup(PageOf(i), view)) vm::sync::SpinLockHolder holder(lock_);
    benchmark::DoNotOptimize(view);
    return view.state == VmaState::kMapped;
  }
  void Map(std::size_t i) {
    const vm::sync::SpinLockHolder holder(lock_);
    Insert(PageOf(i) + 2);
  }
  void Unmap(std::size_t i) {
    const vm::sync::SpinLockHolder holder(lock_);
    Erase(PageOf(i) + 2);
  }
  bool FindGap() {
    const vm::sync::SpinLockHolder holder(lock_);
    VmaTree::Path path;
    return tree_.FindGap(kWanted, 1, 0, path);
  }

 private:
  static RegionPage PageOf(std::size_t i) { return static_cast<RegionPage>(i) * kStride; }

  //   before   |      free       |
  //                 page
  //   after    |free|  V  | free |      the left part is missing where `page` is its first
  void Insert(RegionPage page) {
    AddNodes();
    Vma* gap = tree_.Find(page).vma();
    Vma* vma = gap;
    if (gap->first_page() < page) vma = Split(gap, page);
    Split(vma, page + 1);
    vm::VmaWriter(*vma).SetState(VmaState::kMapped);
    tree_.RefreshGap(tree_.Find(page));
  }
  void Erase(RegionPage page) {
    VmaTree::Path path = tree_.Find(page);
    vm::VmaWriter(*path.vma()).SetState(VmaState::kFree);
    tree_.Previous(path);
    AbsorbNext(path.vma());
    AbsorbNext(path.vma());
  }
  Vma* Split(Vma* vma, RegionPage page) {
    Vma* upper = NewVma(page, vma->end_page() - page, vma->state.load(std::memory_order_relaxed));
    const VmaTree::Path path = tree_.Find(vma->first_page());
    vm::VmaWriter(*vma).SetRange(vma->first_page(), page - vma->first_page());
    tree_.RefreshGap(path);
    tree_.InsertAfter(path, upper);
    return upper;
  }
  void AbsorbNext(Vma* vma) {
    VmaTree::Path path = tree_.Find(vma->first_page());
    tree_.Next(path);
    Vma* next = path.vma();
    vm::VmaWriter(*vma).SetRange(vma->first_page(), vma->page_count() + next->page_count());
    tree_.Erase(path);
    spare_.push_back(next);
    tree_.RefreshGap(tree_.Find(vma->first_page()));
  }

  void AddNodes() {
    while (tree_.NeedsNodes()) tree_.AddNode(&nodes_.emplace_back());
  }
  Vma* NewVma(RegionPage first, RegionPage count, VmaState state) {
    if (spare_.empty()) spare_.push_back(&vmas_.emplace_back());
    Vma* vma = spare_.back();
    spare_.pop_back();
    vm::VmaWriter writer(*vma);
    writer.SetRange(first, count);
    writer.SetState(state);
    return vma;
  }

  const RegionPage end_;
  vm::sync::SpinLock lock_{vm::sync::LockRank::kRegion};
  VmaTree tree_;
  std::deque<VmaTree::Node> nodes_;
  std::deque<Vma> vmas_;
  std::vector<Vma*> spare_;
};

// What all containers of the process have from their allocators now.
std::size_t container_bytes = 0;

template <typename T>
struct CountingAllocator {
  using value_type = T;
  CountingAllocator() = default;
  template <typename U>
  CountingAllocator(const CountingAllocator<U>&) {}  // NOLINT: converts, as allocators do

  T* allocate(std::size_t count) {
    container_bytes += count * sizeof(T);
    return std::allocator<T>().allocate(count);
  }
  void deallocate(T* memory, std::size_t count) {
    container_bytes -= count * sizeof(T);
    std::allocator<T>().deallocate(memory, count);
  }
  friend bool operator==(CountingAllocator, CountingAllocator) { return true; }
  friend bool operator!=(CountingAllocator, CountingAllocator) { return false; }
};

// What a lookup copies out.
struct MappedVma {
  std::uint64_t end;
  vm::os::Protection protection;
  std::uint64_t generation;
};
using Allocation = std::pair<const std::uint64_t, MappedVma>;
using StdMap = std::map<std::uint64_t, MappedVma, std::less<>, CountingAllocator<Allocation>>;
using BtreeMap = absl::btree_map<std::uint64_t, MappedVma, std::less<>, CountingAllocator<Allocation>>;

// VMAs by their first page, without those that are free.
template <typename Container>
class MapIndex {
 public:
  static constexpr const char* kName = std::is_same_v<Container, StdMap> ? "map" : "btree_shared_mutex";

  explicit MapIndex(std::size_t vmas) : end_(vmas * kStride + kWanted) {
    const std::size_t before = container_bytes;
    for (std::size_t i = 0; i < vmas; ++i) Insert(PageOf(i));
    bytes_per_vma_ = static_cast<double>(container_bytes - before) / static_cast<double>(vmas);
  }

  bool Lookup(std::size_t i) {
    const std::uint64_t page = PageOf(i);
    const std::shared_lock lock(mutex_);
    auto it = vmas_.upper_bound(page);
    if (it == vmas_.begin()) return false;
    --it;
    const MappedVma vma = it->second;
    benchmark::DoNotOptimize(vma);
    return page < vma.end;
  }
  void Remap(std::size_t i) {
    Erase(PageOf(i));
    const std::unique_lock lock(mutex_);
    Insert(PageOf(i));
  }
  void Map(std::size_t i) {
    const std::unique_lock lock(mutex_);
    Insert(PageOf(i) + 2);
  }
  void Unmap(std::size_t i) { Erase(PageOf(i) + 2); }
  bool FindGap() {
    const std::shared_lock lock(mutex_);
    std::uint64_t last_end = 0;
    for (const auto& [first, vma] : vmas_) {
      if (first - last_end >= kWanted) return true;
      last_end = vma.end;
    }
    return end_ - last_end >= kWanted;
  }
  double bytes_per_vma() const { return bytes_per_vma_; }

 private:
  static std::uint64_t PageOf(std::size_t i) { return i * kStride; }

  void Insert(std::uint64_t page) {
    vmas_.emplace(page, MappedVma{page + 1, vm::os::Protection::kReadWrite, ++last_generation_});
  }
  void Erase(std::uint64_t page) {
    const std::unique_lock lock(mutex_);
    vmas_.erase(page);
  }

  const std::uint64_t end_;
  std::shared_mutex mutex_;
  Container vmas_;
  std::uint64_t last_generation_ = 0;
  double bytes_per_vma_ = 0;
};

// ---- Lookups. -----------------------------------------------------------------------------------

// Readers look at the time, and tell the writer that they are alive, this often.
constexpr std::size_t kBatch = 256;

// What the threads of a run share.
template <typename Index>
struct Run {
  static inline std::unique_ptr<Index> index;        // thread 0's; others see it from within the loop
  static inline std::atomic<std::uint64_t> batches;  // that thread 1 has looked up
};

// Readers take the even VMAs, writers the odd ones: what is looked up is there.
std::size_t Even(Random& random, std::size_t vmas) { return 2 * random.Below(vmas / 2); }
std::size_t Odd(Random& random, std::size_t vmas) { return Even(random, vmas) + 1; }

// Writes until thread 1 has done as many batches as this thread has iterations.
template <typename Index, typename Write>
void WriteBeside(benchmark::State& state, const Write& write) {
  std::uint64_t writes = 0;
  std::uint64_t iteration = 0;
  for (auto _ : state) {
    ++iteration;
    while (Run<Index>::batches.load(std::memory_order_relaxed) < iteration) {
      write();
      ++writes;
    }
  }
  state.counters["writes_per_second"] =
      benchmark::Counter(static_cast<double>(writes), benchmark::Counter::kIsRate);
}

template <typename Index>
void Read(benchmark::State& state, std::size_t vmas) {
  const int readers = std::max(state.threads() - 1, 1);
  const bool paces = state.thread_index() == 1;
  Random random(static_cast<std::uint64_t>(state.thread_index()) + 1);
  std::uint64_t misses = 0;
  std::uint64_t start = 0;
  for (auto _ : state) {
    if (start == 0) start = MonotonicNanoseconds();
    Index& index = *Run<Index>::index;
    for (std::size_t i = 0; i < kBatch; ++i) {
      if (!index.Lookup(Even(random, vmas))) ++misses;
    }
    if (paces) Run<Index>::batches.fetch_add(1, std::memory_order_relaxed);
  }
  const auto lookups = static_cast<double>(state.iterations() * kBatch);
  const auto nanoseconds = static_cast<double>(MonotonicNanoseconds() - start);
  if (misses != 0) state.SkipWithError("a mapped address was not found");
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations() * kBatch));
  state.counters["lookup_ns"] = nanoseconds / lookups / readers;  // the library adds threads up
}

enum class Writer { kRemaps, kChurns };

template <typename Index, Writer writer>
void LookUp(benchmark::State& state, std::size_t vmas) {
  const ScopedPin pin(state.thread_index());
  const bool first = state.thread_index() == 0;
  if (first) {
    Run<Index>::index = std::make_unique<Index>(vmas);
    Run<Index>::batches.store(0);
  }
  if (!first || state.threads() == 1) {
    Read<Index>(state, vmas);
  } else {
    Index& index = *Run<Index>::index;
    Random random(99);
    WriteBeside<Index>(state, [&] {
      if constexpr (writer == Writer::kRemaps) {
        index.Remap(Odd(random, vmas));
      } else {
        const std::size_t i = Odd(random, vmas);
        index.Map(i);
        index.Unmap(i);
      }
    });
  }
  if (!first) return;
  if constexpr (writer == Writer::kRemaps) {
    state.counters["bytes_per_vma"] = Run<Index>::index->bytes_per_vma();
  }
  Run<Index>::index.reset();
}

// ---- One operation at a time. -------------------------------------------------------------------

constexpr std::size_t kOperations = 64;  // an iteration of vma_map and vma_unmap

enum class Operation { kMap, kUnmap };

// Puts VMAs into kOperations gaps and takes them out again; times one of the two.
template <typename Index, Operation operation>
void MapOrUnmap(benchmark::State& state, std::size_t vmas) {
  const ScopedPin pin(state.thread_index());
  Index index(vmas);
  Random random(1);
  const std::vector<std::uint32_t> order = random.Permutation(vmas);
  std::size_t next = 0;
  for (auto _ : state) {
    const std::size_t first = next;
    next += kOperations;
    const std::uint64_t start = MonotonicNanoseconds();
    for (std::size_t i = first; i < next; ++i) index.Map(order[i % vmas]);
    const std::uint64_t middle = MonotonicNanoseconds();
    for (std::size_t i = first; i < next; ++i) index.Unmap(order[i % vmas]);
    const std::uint64_t end = MonotonicNanoseconds();
    state.SetIterationTime(
        static_cast<double>(operation == Operation::kMap ? middle - start : end - middle) * 1e-9);
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations() * kOperations));
}

template <typename Index>
void FindGap(benchmark::State& state, std::size_t vmas) {
  const ScopedPin pin(state.thread_index());
  Index index(vmas);
  for (auto _ : state) {
    if (!index.FindGap()) state.SkipWithError("no room");
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}

// ---- Registration. ------------------------------------------------------------------------------

using Function = void (*)(benchmark::State&, std::size_t vmas);

template <typename Index>
void RegisterOne(const char* operation, std::size_t vmas, Function function,
                 const CaseOptions& options = {}) {
  // Fewer VMAs than operations of an iteration would not do.
  const std::size_t scaled = Scaled(vmas, std::min<std::size_t>(vmas, 1000));
  Register(
      absl::StrCat(operation, "/", Index::kName, "/", vmas),
      [function, scaled](benchmark::State& state) { function(state, scaled); }, options);
}

// Freehold and its baselines next to each other: what disturbs the machine disturbs all of them.
// `register_one` is called as register_one.operator()<Index>().
template <typename Freehold, typename RegisterIndex>
void ForEachIndex(RegisterIndex register_one) {
  register_one.template operator()<Freehold>();
  register_one.template operator()<MapIndex<BtreeMap>>();
  register_one.template operator()<MapIndex<StdMap>>();
}

bool RegisterCases() {
  for (const std::size_t vmas : {100, 10'000, 100'000, 1'000'000}) {
    ForEachIndex<SpaceIndex>([vmas]<typename Index>() {
      RegisterOne<Index>("vma_lookup", vmas, LookUp<Index, Writer::kRemaps>);
    });
  }
  ForEachIndex<TreeIndex>([]<typename Index>() {
    RegisterOne<Index>("vma_lookup_churn", 100'000, LookUp<Index, Writer::kChurns>, {.min_threads = 2});
  });
  for (const std::size_t vmas : {100, 10'000, 1'000'000}) {
    ForEachIndex<TreeIndex>([vmas]<typename Index>() {
      const CaseOptions timed = {.max_threads = 1, .manual_time = true};
      RegisterOne<Index>("vma_map", vmas, MapOrUnmap<Index, Operation::kMap>, timed);
      RegisterOne<Index>("vma_unmap", vmas, MapOrUnmap<Index, Operation::kUnmap>, timed);
      RegisterOne<Index>("vma_gap", vmas, FindGap<Index>, {.max_threads = 1});
    });
  }
  return true;
}

}  // namespace
}  // namespace freehold::bench

int main(int argc, char** argv) {
  return freehold::bench::RunBenchmarks(argc, argv, freehold::bench::RegisterCases);
}
