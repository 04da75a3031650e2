#include "vm/address_space.h"

#include <algorithm>
#include <bit>
#include <new>

#include "vm/backing.h"
#include "vm/file_mapping.h"
#include "vm/metadata_arena.h"
#include "vm/os/check.h"
#include "vm/purge_stage.h"
#include "vm/region.h"
#include "vm/sync/range_lock.h"

namespace freehold::vm {
namespace {

// A unit of the coarse clock: about 17 ms.
constexpr unsigned kClockShift = 24;

// Below this many pages a region is not worth having: a small reservation gets fewer regions.
constexpr std::size_t kMinRegionPages = MiB(4).value / kPageSize;

// Enough for an extent a page: a record takes 64 bytes, its place in the tree 20 to 50. Reserving it costs
// nothing, and whoever has a million VMAs commits a hundred megabytes of it.
constexpr std::size_t kMetadataShare = 32;
constexpr std::size_t kMinMetadataPages = MiB(8).value / kPageSize;

bool IsAligned(const void* address) {
  return (reinterpret_cast<std::uintptr_t>(address) & (kPageSize - 1)) == 0;
}

}  // namespace

Result<AddressSpace*> AddressSpace::Create(os::Kernel& kernel, const AddressSpaceOptions& options) {
  if (options.reserve.value == 0) return ErrorCode::kEmpty;
  // Regions are powers of two, in fours: two parts plain, one dense, one mapping.
  Error last = {ErrorCode::kNoRoom};
  for (std::size_t bytes = std::bit_floor(options.reserve.value);
       bytes >= options.min_reserve.value && bytes >= 4 * kMinRegionPages * kPageSize; bytes /= 2) {
    const Pages size = PagesFor({bytes});
    const Result<PageRange> reservation = kernel.Reserve(size, {kPagesPerHugePage});
    if (!reservation.ok()) {
      last = reservation.error();
      continue;
    }
    const Result<MetadataArena*> arena = MetadataArena::Create(
        kernel, {std::max(size.value / kMetadataShare, kMinMetadataPages)});
    if (!arena.ok()) {
      last = arena.error();
      (void)kernel.Release(*reservation);
      continue;
    }
    void* memory = (*arena)->Allocate({sizeof(AddressSpace)}, alignof(AddressSpace));
    last = {ErrorCode::kNoMetadata};
    if (memory != nullptr) {
      AddressSpace* space = new (memory) AddressSpace(kernel, options);
      last = space->Init(*reservation, *arena);
      if (last.ok()) return space;
    }
    MetadataArena::Destroy(*arena);
    (void)kernel.Release(*reservation);
    // Metadata was refused, not address space: a smaller space would fare no better.
    return last;
  }
  return last;
}

Error AddressSpace::Init(PageRange reservation, MetadataArena* arena) {
  reservation_ = reservation;
  arena_ = arena;
  clock_.store(static_cast<std::uint32_t>(kernel_->Now().value >> kClockShift),
               std::memory_order_relaxed);
  void* stage = arena->Allocate({sizeof(PurgeStage)}, alignof(PurgeStage));
  void* files = arena->Allocate({sizeof(FileBackingPool)}, alignof(FileBackingPool));
  if (stage == nullptr || files == nullptr) return {ErrorCode::kNoMetadata};
  purge_stage_ = new (stage) PurgeStage(*kernel_);
  file_backings_ = new (files) FileBackingPool(*arena, epochs_);

  const std::size_t pages = reservation.count().value;
  const std::size_t wanted = options_.regions_per_zone != 0 ? options_.regions_per_zone
                                                            : kernel_->CpuCount();
  const std::size_t per_zone =
      std::min({std::bit_ceil(std::max<std::size_t>(wanted, 1)), kMaxRegions / 4,
                std::bit_floor(pages / 4 / kMinRegionPages)});
  region_count_ = 4 * per_zone;
  region_shift_ = static_cast<unsigned>(std::countr_zero(pages / region_count_));
  zone_begin_[1] = 2 * per_zone;
  zone_begin_[2] = 3 * per_zone;
  zone_begin_[3] = 4 * per_zone;

  const std::size_t lock_count = options_.lock_policy == sync::LockPolicy::kCoarse ? 1 : region_count_;
  void* locks = arena->Allocate({lock_count * sizeof(PaddedRangeLock)}, alignof(PaddedRangeLock));
  void* memory = arena->Allocate({region_count_ * sizeof(Region)}, alignof(Region));
  regions_ = arena->New<Region*>(region_count_);
  if (locks == nullptr || memory == nullptr || regions_ == nullptr) return {ErrorCode::kNoMetadata};
  range_locks_ = static_cast<PaddedRangeLock*>(locks);
  for (std::size_t i = 0; i < lock_count; ++i) new (range_locks_ + i) PaddedRangeLock(options_.lock_policy);
  if (options_.record_range_locks) {
    lock_times_ = arena->New<sync::LockTimesRecorder>();
    if (lock_times_ == nullptr) return {ErrorCode::kNoMetadata};
    for (std::size_t i = 0; i < lock_count; ++i) range_locks_[i].lock.InstallRecorder(lock_times_);
  }

  const Region::Shared shared{kernel_,  arena_,           purge_stage_, &options_,
                              &clock_, &most_committed_, &notifiers_,  &fault_hooks_};
  const Pages region_pages = {std::size_t{1} << region_shift_};
  for (std::size_t i = 0; i < region_count_; ++i) {
    const Zone zone = i < zone_begin_[1] ? Zone::kPlain : i < zone_begin_[2] ? Zone::kDense : Zone::kMapping;
    const PageRange range = PageRange::Of(reservation.first + Pages{i * region_pages.value}, region_pages);
    regions_[i] = new (static_cast<Region*>(memory) + i)
        Region(shared, zone, range, range_locks_[lock_count == 1 ? 0 : i].lock);
    if (const Error error = regions_[i]->Init(); !error.ok()) return error;
  }
  // Debuggers write whatever is not omitted, gigabytes of nothing too.
  kernel_->AdviseCoreDumps(reservation, os::CoreDumps::kOmit);
  // Advice belongs to kernel VMAs and would split them later: it is given once, to the zone as a whole. A
  // kernel without huge pages serves the zone as well, in small ones.
  if (kernel_->features().huge_pages) {
    const absl::Span<Region* const> dense = RegionsOf(Zone::kDense);
    (void)kernel_->AdviseHugePages({dense.front()->range().first, dense.back()->range().end},
                                   os::HugePages::kPrefer);
  }
  return InitFork();
}

void AddressSpace::Destroy(AddressSpace* space) {
  os::Kernel& kernel = space->kernel();
  const PageRange reservation = space->reservation();
  MetadataArena* arena = space->arena_;
  // Everything else lies in the arena and owns nothing outside it.
  space->~AddressSpace();
  MetadataArena::Destroy(arena);
  (void)kernel.Release(reservation);
}

absl::Span<Region* const> AddressSpace::RegionsOf(Zone zone) const {
  const auto index = static_cast<std::size_t>(zone);
  return {regions_ + zone_begin_[index], zone_begin_[index + 1] - zone_begin_[index]};
}

Error AddressSpace::CheckRange(PageRange range) const {
  if (range.first == range.end) return {ErrorCode::kEmpty};
  if (range.first > range.end) return {ErrorCode::kOverflow};
  if (!reservation_.Contains(range)) return {ErrorCode::kOutsideReservation};
  return Error::Ok();
}

// In the region of this CPU, if that has room.
Result<PageRange> AddressSpace::MapInZone(Zone zone, Pages count, const MapOptions& options) {
  const absl::Span<Region* const> regions = RegionsOf(zone);
  const std::size_t own = kernel_->CurrentCpu() & (regions.size() - 1);
  Result<PageRange> mapped = regions[own]->MapAnywhere(static_cast<RegionPage>(count.value), options);
  if (ABSL_PREDICT_FALSE(mapped.error().code == ErrorCode::kNoRoom)) {
    mapped = MapElsewhere(zone, own, count, options);
  }
  return mapped;
}

Result<PageRange> AddressSpace::Map(Pages count, const MapOptions& options) {
  if (count.value == 0) return ErrorCode::kEmpty;
  // No region is as large as the reservation, so every count that fits one fits RegionPage.
  if (count >= reservation_.count()) return ErrorCode::kNoRoom;
  const std::size_t alignment = options.alignment.value;
  if (alignment == 0 || (alignment & (alignment - 1)) != 0) return ErrorCode::kUnaligned;

  // Almost every call is ordinary. One field after another: of a chain of && GCC makes one wide load, which waits for
  // the narrow stores that filled the options a moment ago.
  bool special = options.placement != Placement::kAnywhere;
  if (options.protection != os::Protection::kReadWrite) special = true;
  if (options.huge_pages != os::HugePages::kAvoid) special = true;
  if (options.populate) special = true;
  if (options.lock != os::MemoryLock::kNone) special = true;
  if (ABSL_PREDICT_FALSE(special || options.backing != nullptr || !notifiers_.empty() ||
                         future_lock_.load(std::memory_order_relaxed) != os::MemoryLock::kNone)) {
    return MapSpecial(count, options);
  }
  return MapOrdinary(count, options);
}

// Its one variable is built in the caller's frame, where Map's own returns would have it copied.
inline Result<PageRange> AddressSpace::MapOrdinary(Pages count, const MapOptions& options) {
  const absl::Span<Region* const> regions = RegionsOf(Zone::kPlain);
  const std::size_t own = kernel_->CurrentCpu() & (regions.size() - 1);
  Result<PageRange> mapped = regions.data()[own]->MapOrdinary(static_cast<RegionPage>(count.value), options);
  if (ABSL_PREDICT_FALSE(mapped.error().code == ErrorCode::kNoRoom)) {
    mapped = MapElsewhere(Zone::kPlain, own, count, options);
  }
  return mapped;
}

Result<PageRange> AddressSpace::MapSpecial(Pages count, MapOptions options) {
  options.lock = LockOf(options.lock);
  if (options.backing != nullptr) {
    if (!options.backing->Allows(options.protection)) return ErrorCode::kDenied;
    // While somebody may find the mapping, its pages are counted.
    options.backing->AddPages(count.value);
  }
  const Result<PageRange> mapped = Place(count, options);
  if (!mapped.ok()) {
    if (options.backing != nullptr) options.backing->DropPages(count.value);
    return mapped;
  }
  if (!notifiers_.empty()) notifiers_.Map(*mapped);
  if (options.populates()) PopulateMapped(*mapped);
  return mapped;
}

// As in Linux, an error here is not the map's: a later fault reports it.
void AddressSpace::PopulateMapped(PageRange mapped) {
  const Result<VmaInfo> vma = Lookup(mapped.first);
  if (vma.ok()) (void)PopulateVma(mapped, vma->generation, {}, {0});
}

Result<PageRange> AddressSpace::Place(Pages count, const MapOptions& options) {
  if (options.placement == Placement::kHint) return MapNear(count, options);
  if (options.placement != Placement::kAnywhere) return MapAt(count, options);
  if (options.protection != os::Protection::kReadWrite || options.backing != nullptr) {
    return MapInZone(Zone::kMapping, count, options);
  }
  if (count.value >= kPagesPerHugePage && (options.populates() || options.huge_pages == os::HugePages::kPrefer)) {
    MapOptions dense = options;
    dense.alignment = {std::max(options.alignment.value, kPagesPerHugePage)};
    const Result<PageRange> mapped = MapInZone(Zone::kDense, count, dense);
    if (mapped.ok() || mapped.error().code != ErrorCode::kNoRoom) return mapped;
  }
  return MapInZone(Zone::kPlain, count, options);
}

// In the zone's other regions; for plain memory, in dense ones; at last with all free memory given back, so that
// address space merges.
Result<PageRange> AddressSpace::MapElsewhere(Zone zone, std::size_t own, Pages count, const MapOptions& options) {
  const Zone zones[] = {zone, Zone::kDense};
  for (const bool purge : {false, true}) {
    for (const Zone from : absl::MakeConstSpan(zones, zone == Zone::kPlain ? 2 : 1)) {
      const absl::Span<Region* const> regions = RegionsOf(from);
      if (count > regions[0]->range().count()) continue;
      for (std::size_t i = 0; i < regions.size(); ++i) {
        Region* region = regions[(own + i) & (regions.size() - 1)];
        if (purge) {
          (void)region->PurgeWindows(UINT32_MAX, {0});
          (void)region->PurgeFree(UINT32_MAX, {0});
        }
        const Result<PageRange> mapped = region->MapAnywhere(static_cast<RegionPage>(count.value), options);
        if (mapped.error().code != ErrorCode::kNoRoom) return mapped;
      }
    }
  }
  return ErrorCode::kNoRoom;
}

Result<PageRange> AddressSpace::MapAt(Pages count, const MapOptions& options) {
  if (!IsAligned(options.address)) return ErrorCode::kUnaligned;
  const PageRange range = PageRange::Of(PageNumber::Of(options.address), count);
  if (const Error error = CheckRange(range); !error.ok()) return error;
  Region* region = RegionOf(range.first);
  if (!region->range().Contains(range)) return ErrorCode::kOutsideReservation;
  FaultHooks* hooks = options.placement == Placement::kReplace ? HooksFor(range) : nullptr;
  if (hooks == nullptr) return region->MapFixed(range, options);
  hooks->BeforeDrop(range);
  const Result<PageRange> mapped = region->MapFixed(range, options);
  hooks->AfterDrop(range);
  return mapped;
}

// The hint is followed where memory of this kind lives, if all of it is free.
Result<PageRange> AddressSpace::MapNear(Pages count, const MapOptions& options) {
  MapOptions placed = options;
  placed.placement = Placement::kFixed;
  const PageNumber first = PageNumber::Of(options.address);
  placed.address = first.address();
  const bool mapping = options.protection != os::Protection::kReadWrite || options.backing != nullptr;
  if (reservation_.Contains(first) && mapping == !RegionOf(first)->is_heap()) {
    const Result<PageRange> mapped = MapAt(count, placed);
    switch (mapped.error().code) {
      case ErrorCode::kOverlap:
      case ErrorCode::kPinned:
      case ErrorCode::kOverflow:
      case ErrorCode::kOutsideReservation: break;
      default: return mapped;
    }
  }
  placed.placement = Placement::kAnywhere;
  return Place(count, placed);
}

Error AddressSpace::Unmap(PageRange range) {
  if (const Error error = CheckRange(range); !error.ok()) return error;
  FaultHooks* hooks = HooksFor(range);
  if (ABSL_PREDICT_TRUE(hooks == nullptr)) return UnmapParts(range);
  hooks->BeforeDrop(range);
  const Error error = UnmapParts(range);
  hooks->AfterDrop(range);
  return error;
}

Error AddressSpace::UnmapParts(PageRange range) {
  if (Region* region = RegionOf(range.first); ABSL_PREDICT_TRUE(region->range().Contains(range))) {
    return region->Unmap(range);
  }
  for (PageNumber page = range.first; page < range.end;) {
    Region* region = RegionOf(page);
    const PageRange part = region->range().Intersect(range);
    if (const Error error = region->Unmap(part); !error.ok()) return error;
    page = part.end;
  }
  return Error::Ok();
}

// Pagers map in the mapping zone only, which is the last one.
FaultHooks* AddressSpace::HooksFor(PageRange range) const {
  FaultHooks* hooks = fault_hooks_.load(std::memory_order_acquire);
  if (ABSL_PREDICT_TRUE(hooks == nullptr)) return nullptr;
  return RegionOf(range.end - Pages{1})->zone() == Zone::kMapping ? hooks : nullptr;
}

void AddressSpace::SetFaultHooks(FaultHooks* hooks) {
  FREEHOLD_CHECK((hooks == nullptr) != (fault_hooks_.load(std::memory_order_relaxed) == nullptr));
  fault_hooks_.store(hooks, std::memory_order_release);
}

Error AddressSpace::Protect(PageRange range, os::Protection protection) {
  if (const Error error = CheckRange(range); !error.ok()) return error;
  for (PageNumber page = range.first; page < range.end;) {
    Region* region = RegionOf(page);
    const PageRange part = region->range().Intersect(range);
    if (const Error error = region->Protect(part, protection); !error.ok()) return error;
    page = part.end;
  }
  return Error::Ok();
}

Result<VmaInfo> AddressSpace::Lookup(PageNumber page) const {
  if (!reservation_.Contains(page)) return ErrorCode::kOutsideReservation;
  VmaState state;
  const VmaInfo info = RegionOf(page)->LookupExtent(page, state);
  if (state != VmaState::kMapped) return ErrorCode::kNotMapped;
  return info;
}

Result<VmaInfo> AddressSpace::LookupNext(PageNumber page) const {
  if (!reservation_.Contains(page)) return ErrorCode::kOutsideReservation;
  while (page < reservation_.end) {
    VmaState state;
    const VmaInfo info = RegionOf(page)->LookupExtent(page, state);
    if (state == VmaState::kMapped) return info;
    page = info.range.end;
  }
  return ErrorCode::kNotMapped;
}

Result<VmaInfo> AddressSpace::LookupHeld(PageNumber page, const sync::RangeLock::Guard& guard) const {
  VmaState state;
  const VmaInfo info = RegionOf(page)->LookupHeld(page, state, guard);
  if (state != VmaState::kMapped) return ErrorCode::kNotMapped;
  return info;
}

Pages AddressSpace::Purge(PurgeScope scope) {
  std::uint32_t until = UINT32_MAX;
  if (scope == PurgeScope::kDecayed) {
    const std::uint64_t now = kernel_->Now().value;
    const std::uint64_t then = now > options_.decay.value ? now - options_.decay.value : 0;
    // What was freed since the last Tick bears its time: it may be younger than it looks.
    const std::uint32_t last_tick = clock_.load(std::memory_order_relaxed);
    until = std::min(static_cast<std::uint32_t>(then >> kClockShift), last_tick - std::min(last_tick, 1u));
  }
  Pages purged;
  for (Region* region : regions()) {
    purged += region->PurgeWindows(until, {0});
    purged += region->PurgeFree(until, {0});
  }
  return purged;
}

void AddressSpace::Tick() {
  for (Region* region : regions()) {
    region->RetryDeferred();
    region->ForgetMost();
  }
  (void)Purge(PurgeScope::kDecayed);
  clock_.store(static_cast<std::uint32_t>(kernel_->Now().value >> kClockShift), std::memory_order_relaxed);
  epochs_.Poll();
}

AddressSpaceStats AddressSpace::Stats() const {
  AddressSpaceStats stats;
  for (const Region* region : regions()) region->AddStats(stats);
  stats.purge_calls = purge_stage_->calls();
  stats.purged_pages = purge_stage_->pages();
  stats.metadata = arena_->used();
  stats.remap_moves = remap_moves_.load(std::memory_order_relaxed);
  stats.kernel_moves = kernel_moves_.load(std::memory_order_relaxed);
  stats.ignored_advice = ignored_advice_.load(std::memory_order_relaxed);
  return stats;
}

sync::TimeHistogram AddressSpace::TreeLockHolds() const {
  sync::TimeHistogram holds;
  for (const Region* region : regions()) holds += region->TreeLockHolds();
  return holds;
}

sync::LockTimes AddressSpace::RangeLockTimes(sync::Operation operation) const {
  return lock_times_ != nullptr ? lock_times_->Read(operation) : sync::LockTimes();
}

void AddressSpace::CheckInvariants() const {
  for (const Region* region : regions()) region->CheckInvariants();
}

}  // namespace freehold::vm
