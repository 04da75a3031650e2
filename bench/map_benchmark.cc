// Mapping and unmapping anonymous memory: the kernel's system calls (`kernel`) against an
// AddressSpace (`freehold`), an AddressSpace under one lock for the whole space (`coarse`), and one whose range lock is
// an interval tree (`tree`).
//
//   map_unmap/IMPL/SIZE            map, unmap: no page is touched
//   map_touch4_unmap/IMPL/SIZE     map, write to the first 4 pages, unmap
//   map_touch_all_unmap/IMPL/SIZE  map, write to every page, unmap
//   map_populate_unmap/IMPL/SIZE   map with all pages present, unmap
//   map_mixed/IMPL/live64          a live set of 64 mappings a thread, 4 KiB to 1 MiB: replace a
//                                  random one, write to up to 4 pages of the new one
//   populate/IMPL/SIZE             make the pages of a mapping present that has none
//                                  (MADV_POPULATE_WRITE); dropping them again is not timed
//   protect/IMPL/4KiB              first page of a mapping of 16 pages: no access, then read-write
//   remap_move/IMPL/SIZE           move a mapping, all pages of it present, to another place and back (one
//                                  thread; `freehold`: AddressSpace::Remap to a fixed place, where it was before;
//                                  `kernel`: mremap; `kernel/SIZE_dontunmap`: mremap(MREMAP_DONTUNMAP) into a
//                                  mapping without pages, the call that Remap makes above 256 KiB)
//   lookup/IMPL/1000               which VMA holds an address, among 1000 (kernel: PROCMAP_QUERY)
//
// What is measured. Wall-clock time of all threads together: with threads:<n> the reported time is
// that between two completions by whichever thread, and items_per_second counts all of them. Every
// thread is pinned to a processor. Every run starts with a fresh AddressSpace: what steady state
// costs is measured, and what one case leaves behind does not reach the next. Creating it is not
// timed.
//
// What is the same for all. Memory reads as zero when it is mapped: an AddressSpace that re-uses
// resident memory has to clear it within the time measured. Protection is read-write. Huge pages
// are off for the whole process. What is not: after unmap the kernel has the pages back, while an
// AddressSpace keeps some resident (AddressSpaceOptions::free_resident_limit); that is what it is
// for.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bench/support/cpu.h"
#include "bench/support/kernel_memory.h"
#include "bench/support/random.h"
#include "bench/support/runner.h"
#include "bench/support/spaces.h"
#include "bench/support/tick_clock.h"

namespace freehold::bench {
namespace {

constexpr std::size_t kKiB = 1024;
constexpr std::size_t kMiB = 1024 * kKiB;

std::string SizeName(std::size_t bytes) {
  if (bytes % kMiB == 0) return absl::StrCat(bytes / kMiB, "MiB");
  return absl::StrCat(bytes / kKiB, "KiB");
}

// ---- Map, touch, unmap. -------------------------------------------------------------------------

struct Shape {
  std::size_t bytes;
  std::size_t touched_pages;
};

template <typename Space>
void MapTouchUnmap(benchmark::State& state, Shape shape) {
  const ScopedPin pin(state.thread_index());
  Space& space = PerRun<Space>::Get();
  for (auto _ : state) {
    std::byte* memory = space.Map(shape.bytes);
    benchmark::DoNotOptimize(memory);
    TouchPages(memory, shape.touched_pages);
    space.Unmap(memory, shape.bytes);
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}

template <typename Space>
void MapPopulatedUnmap(benchmark::State& state, std::size_t bytes) {
  const ScopedPin pin(state.thread_index());
  Space& space = PerRun<Space>::Get();
  for (auto _ : state) {
    std::byte* memory = space.MapPopulated(bytes);
    benchmark::DoNotOptimize(memory);
    space.Unmap(memory, bytes);
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}

// ---- A live set. --------------------------------------------------------------------------------

constexpr std::size_t kLiveMappings = 64;
constexpr std::size_t kReplacements = 8192;  // a power of two: where one is costs an `and`

struct Replacement {
  std::size_t slot;
  std::size_t bytes;
};

// The same sequence for every implementation: a function of the thread's index.
std::vector<Replacement> Replacements(int thread) {
  Random random(static_cast<std::uint64_t>(thread) + 1);
  std::vector<Replacement> result(kReplacements);
  for (Replacement& replacement : result) {
    const std::size_t pages = random.LogUniform(1, kMiB / kBytesPerPage);
    replacement = {.slot = random.Below(kLiveMappings), .bytes = pages * kBytesPerPage};
  }
  return result;
}

template <typename Space>
void MapMixed(benchmark::State& state) {
  const ScopedPin pin(state.thread_index());
  Space& space = PerRun<Space>::Get();
  const std::vector<Replacement> replacements = Replacements(state.thread_index());
  struct Mapping {
    std::byte* memory = nullptr;
    std::size_t bytes = 0;
  };
  std::array<Mapping, kLiveMappings> live;
  std::size_t next = 0;
  for (auto _ : state) {
    const Replacement& replacement = replacements[next++ % kReplacements];
    Mapping& mapping = live[replacement.slot];
    if (mapping.memory != nullptr) space.Unmap(mapping.memory, mapping.bytes);
    mapping = {.memory = space.Map(replacement.bytes), .bytes = replacement.bytes};
    TouchPages(mapping.memory, std::min<std::size_t>(4, replacement.bytes / kBytesPerPage));
  }
  for (const Mapping& mapping : live) {
    if (mapping.memory != nullptr) space.Unmap(mapping.memory, mapping.bytes);
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}

// ---- Populate, protect, lookup. -----------------------------------------------------------------

template <typename Space>
void Populate(benchmark::State& state, std::size_t bytes) {
  const ScopedPin pin(state.thread_index());
  Space& space = PerRun<Space>::Get();
  std::byte* memory = space.Map(bytes);
  for (auto _ : state) {
    space.Discard(memory, bytes);
    const std::uint64_t start = MonotonicNanoseconds();
    space.Populate(memory, bytes);
    state.SetIterationTime(static_cast<double>(MonotonicNanoseconds() - start) * 1e-9);
  }
  space.Unmap(memory, bytes);
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * bytes));
}

template <typename Space>
void ProtectPair(benchmark::State& state) {
  constexpr std::size_t kMapped = 16 * kBytesPerPage;
  const ScopedPin pin(state.thread_index());
  Space& space = PerRun<Space>::Get();
  std::byte* memory = space.Map(kMapped);
  TouchPages(memory, kMapped / kBytesPerPage);
  for (auto _ : state) {
    space.ProtectNone(memory, kBytesPerPage);
    space.ProtectReadWrite(memory, kBytesPerPage);
  }
  space.Unmap(memory, kMapped);
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}

// ---- Moves. -------------------------------------------------------------------------------------

// Two places for `bytes` each, of memory that nobody else uses, 2 MiB aligned as a large mapping is.
constexpr std::size_t kMoveAlignment = 2 * kMiB;
std::byte* AlignUp(std::byte* memory) {
  return memory + (-reinterpret_cast<std::uintptr_t>(memory) & (kMoveAlignment - 1));
}
std::size_t PlaceBytes(std::size_t bytes) { return (bytes + kMoveAlignment - 1) & ~(kMoveAlignment - 1); }

void CountMoves(benchmark::State& state, std::size_t bytes) {
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * bytes));
}

template <typename Space>
void MoveBackAndForth(benchmark::State& state, std::size_t bytes) {
  const ScopedPin pin(state.thread_index());
  Space& space = PerRun<Space>::Get();
  const std::size_t mapped = 2 * PlaceBytes(bytes) + kMoveAlignment;
  std::byte* const memory = space.Map(mapped);
  std::byte* from = AlignUp(memory);
  std::byte* to = from + PlaceBytes(bytes);
  space.Unmap(to, bytes);
  TouchPages(from, bytes / kBytesPerPage);
  for (auto _ : state) {
    space.Move(from, to, bytes);
    std::swap(from, to);
  }
  CountMoves(state, bytes);
  space.Unmap(memory, mapped);
}

void MoveInKernel(benchmark::State& state, std::size_t bytes, MoveSource source) {
  const ScopedPin pin(state.thread_index());
  const std::size_t mapped = 2 * PlaceBytes(bytes) + kMoveAlignment;
  std::byte* const memory = KernelMap(mapped);
  std::byte* from = AlignUp(memory);
  std::byte* to = from + PlaceBytes(bytes);
  TouchPages(from, bytes / kBytesPerPage);
  for (auto _ : state) {
    KernelMove(from, to, bytes, source);
    std::swap(from, to);
  }
  CountMoves(state, bytes);
  KernelUnmap(memory, mapped);
}

// PROCMAP_QUERY of Linux 6.11, whose header Debian 12 does not have yet: the VMA at an address,
// through /proc/self/maps.
class ProcMapQuery {
 public:
  ProcMapQuery() : descriptor_(open("/proc/self/maps", O_RDONLY | O_CLOEXEC)) {}
  ~ProcMapQuery() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  ProcMapQuery(const ProcMapQuery&) = delete;
  ProcMapQuery& operator=(const ProcMapQuery&) = delete;

  // The start of the VMA that holds `address`; 0 when the kernel cannot tell.
  std::uint64_t VmaStart(const void* address) const {
    Query query = {};
    query.size = sizeof(query);
    query.query_addr = reinterpret_cast<std::uint64_t>(address);
    return ioctl(descriptor_, _IOWR('f', 17, Query), &query) == 0 ? query.vma_start : 0;
  }

 private:
  struct Query {
    std::uint64_t size, query_flags, query_addr;
    std::uint64_t vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
    std::uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
    std::uint64_t vma_name_addr, build_id_addr;
  };
  int descriptor_;
};

// A thread looks up with one of these.
class KernelLookup {
 public:
  explicit KernelLookup(KernelSpace&) {}
  bool Find(const std::byte* address) { return query_.VmaStart(address) != 0; }

 private:
  ProcMapQuery query_;
};

template <typename Space>
class SpaceLookup {
 public:
  explicit SpaceLookup(Space& space) : space_(space.space()) {}
  bool Find(const std::byte* address) { return space_.Lookup(vm::PageNumber::Of(address)).ok(); }

 private:
  vm::AddressSpace& space_;
};

// Mappings that the kernel does not merge: every second one is read-only there. An AddressSpace
// never merges.
constexpr std::size_t kLookedUp = 1000;
constexpr std::size_t kLookedUpBytes = 4 * kBytesPerPage;

template <typename Space>
std::vector<std::byte*> MapApart(Space& space) {
  std::vector<std::byte*> mappings(kLookedUp);
  for (std::byte*& memory : mappings) memory = space.Map(kLookedUpBytes);
  if constexpr (std::is_same_v<Space, KernelSpace>) {
    std::sort(mappings.begin(), mappings.end());
    for (std::size_t i = 0; i < mappings.size(); i += 2)
      KernelProtect(mappings[i], kLookedUpBytes, PROT_READ);
  }
  return mappings;
}

template <typename Space, typename Lookup>
void LookUp(benchmark::State& state) {
  static std::vector<std::byte*> mappings;  // thread 0's, read by all between the loop's barriers
  const ScopedPin pin(state.thread_index());
  Space& space = PerRun<Space>::Get();
  if (state.thread_index() == 0) mappings = MapApart(space);
  Lookup lookup(space);
  Random random(static_cast<std::uint64_t>(state.thread_index()) + 1);
  std::uint64_t misses = 0;
  for (auto _ : state) {
    const std::byte* address = mappings[random.Below(kLookedUp)] + kBytesPerPage;
    if (!lookup.Find(address)) ++misses;
  }
  if (misses != 0) state.SkipWithError("a mapped address was not found");
  if (state.thread_index() == 0) {
    for (std::byte* memory : mappings) space.Unmap(memory, kLookedUpBytes);
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}

// ---- Registration. ------------------------------------------------------------------------------

template <typename Space>
std::string Name(const std::string& operation, const std::string& argument) {
  return absl::StrCat(operation, "/", Space::kName, "/", argument);
}

template <typename Space>
constexpr CaseOptions FreshSpace() {
  return {.set_up = PerRun<Space>::SetUp, .tear_down = PerRun<Space>::TearDown};
}

// Registers a case for every space, next to each other: what disturbs the machine for a while then
// disturbs all of them. `register_one` is called as register_one.operator()<Space>().
template <typename RegisterOne>
void ForEachSpace(RegisterOne register_one) {
  register_one.template operator()<FreeholdSpace>();
  register_one.template operator()<CoarseSpace>();
  register_one.template operator()<TreeSpace>();
  register_one.template operator()<KernelSpace>();
}

void RegisterMapUnmap() {
  for (const std::size_t bytes : {16 * kKiB, 64 * kKiB, 1 * kMiB}) {
    const std::pair<const char*, std::size_t> touches[] = {
        {"map_unmap", 0}, {"map_touch4_unmap", 4}, {"map_touch_all_unmap", bytes / kBytesPerPage}};
    for (const auto& [operation, pages] : touches) {
      const Shape shape = {.bytes = bytes, .touched_pages = pages};
      ForEachSpace([shape, operation = operation]<typename Space>() {
        Register(
            Name<Space>(operation, SizeName(shape.bytes)),
            [shape](benchmark::State& state) { MapTouchUnmap<Space>(state, shape); },
            FreshSpace<Space>());
      });
    }
  }
  ForEachSpace([]<typename Space>() {
    Register(
        Name<Space>("map_populate_unmap", SizeName(kMiB)),
        [](benchmark::State& state) { MapPopulatedUnmap<Space>(state, kMiB); },
        FreshSpace<Space>());
  });
  ForEachSpace([]<typename Space>() {
    Register(Name<Space>("map_mixed", absl::StrCat("live", kLiveMappings)), MapMixed<Space>,
             FreshSpace<Space>());
  });
}

void RegisterPopulate() {
  const bool has_populate_write = HasPopulateWrite();
  if (!has_populate_write) NoteLeftOut("populate/kernel", "this kernel lacks MADV_POPULATE_WRITE");
  for (const std::size_t bytes : {2 * kMiB, 64 * kMiB}) {
    ForEachSpace([bytes, has_populate_write]<typename Space>() {
      if (std::is_same_v<Space, KernelSpace> && !has_populate_write) return;
      CaseOptions options = FreshSpace<Space>();
      options.manual_time = true;
      Register(
          Name<Space>("populate", SizeName(bytes)),
          [bytes](benchmark::State& state) { Populate<Space>(state, bytes); }, options);
    });
  }
}

void RegisterProtect() {
  ForEachSpace([]<typename Space>() {
    Register(Name<Space>("protect", SizeName(kBytesPerPage)), ProtectPair<Space>,
             FreshSpace<Space>());
  });
}

void RegisterMoves() {
  for (const std::size_t bytes : {64 * kKiB, 256 * kKiB, 1 * kMiB, 64 * kMiB}) {
    CaseOptions options = FreshSpace<FreeholdSpace>();
    options.max_threads = 1;
    Register(
        Name<FreeholdSpace>("remap_move", SizeName(bytes)),
        [bytes](benchmark::State& state) { MoveBackAndForth<FreeholdSpace>(state, bytes); }, options);
    for (const auto& [suffix, source] :
         {std::pair{"", MoveSource::kUnmapped}, {"_dontunmap", MoveSource::kKeptEmpty}}) {
      Register(
          Name<KernelSpace>("remap_move", SizeName(bytes) + suffix),
          [bytes, source = source](benchmark::State& state) { MoveInKernel(state, bytes, source); },
          {.max_threads = 1});
    }
  }
}

template <typename Space, typename Lookup>
void RegisterLookup() {
  Register(Name<Space>("lookup", absl::StrCat(kLookedUp)), LookUp<Space, Lookup>,
           FreshSpace<Space>());
}

void RegisterLookups() {
  RegisterLookup<FreeholdSpace, SpaceLookup<FreeholdSpace>>();
  RegisterLookup<CoarseSpace, SpaceLookup<CoarseSpace>>();
  RegisterLookup<TreeSpace, SpaceLookup<TreeSpace>>();
  const int on_stack = 0;
  if (ProcMapQuery().VmaStart(&on_stack) != 0) {
    RegisterLookup<KernelSpace, KernelLookup>();
  } else {
    NoteLeftOut("lookup/kernel", "this kernel lacks PROCMAP_QUERY");
  }
}

bool RegisterCases() {
  RegisterMapUnmap();
  RegisterPopulate();
  RegisterProtect();
  RegisterMoves();
  RegisterLookups();
  return true;
}

}  // namespace
}  // namespace freehold::bench

int main(int argc, char** argv) {
  const freehold::bench::ScopedNoHugePages no_huge_pages;
  return freehold::bench::RunBenchmarks(argc, argv, freehold::bench::RegisterCases);
}
