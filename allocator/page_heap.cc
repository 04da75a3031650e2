#include "allocator/page_heap.h"

#include <algorithm>
#include <bit>
#include <cerrno>

#include "absl/types/span.h"
#include "vm/os/check.h"
#include "vm/page_range.h"

namespace freehold::allocator {
namespace {

constexpr vm::Pages kChunkPages = vm::PagesFor({kChunkSize});
// MADV_COLLAPSE, which headers may be too old for.
constexpr int kCollapse = 25;

vm::PageRange RangeOf(const ChunkRecord* chunk, unsigned first, unsigned units) {
  return vm::PageRange::FromBytes(reinterpret_cast<void*>(chunk->start + first * kUnitSize),
                                  {units * kUnitSize});
}

unsigned UnitOf(const ChunkRecord* chunk, std::uintptr_t address) {
  return static_cast<unsigned>((address - chunk->start) >> kUnitShift);
}

}  // namespace

// Small enough for the stack of any thread: allocations purge too.
struct PageHeap::PurgeBatch {
  static constexpr std::size_t kMaxRanges = 32;

  struct Part {
    ChunkRecord* chunk;
    UnitSet units;
  };
  std::array<Part, kMaxRanges> parts;
  std::size_t part_count = 0;
  std::array<vm::PageRange, kMaxRanges> ranges;
  std::size_t range_count = 0;

  bool full() const { return range_count == kMaxRanges; }
  // Adds the runs of `units` until full; returns what was added.
  UnitSet Add(ChunkRecord* chunk, UnitSet units) {
    UnitSet added;
    while (!units.empty() && !full()) {
      const unsigned first = units.first();
      const unsigned count = units.RunAt(first);
      const UnitSet run = UnitSet::Of(first, count);
      ranges[range_count++] = RangeOf(chunk, first, count);
      added = added | run;
      units = units - run;
    }
    if (!added.empty()) parts[part_count++] = {chunk, added};
    return added;
  }
  vm::Pages pages() const {
    vm::Pages sum{0};
    for (std::size_t i = 0; i < range_count; ++i) sum += ranges[i].count();
    return sum;
  }
};

struct PageHeap::Candidate {
  ChunkRecord* chunk;
  unsigned block;

  std::uint8_t bit() const { return static_cast<std::uint8_t>(1u << block); }
  static UnitSet Units(unsigned block) { return UnitSet::Of(block * kBlockUnits, kBlockUnits); }
  vm::PageRange range() const { return RangeOf(chunk, block * kBlockUnits, kBlockUnits); }
};

PageHeap::PageHeap(vm::AddressSpace& space, const HeapMetadata& metadata, unsigned shards, const Options& options)
    : space_(space),
      metadata_(metadata),
      shard_count_(shards),
      limit_(options.limit),
      collapses_(options.huge_pages == vm::os::HugePages::kPrefer) {
  FREEHOLD_CHECK(shards >= 1 && shards <= kMaxShards);
}

PageHeap::Run PageHeap::Allocate(unsigned home, unsigned units) {
  Shard& shard = HomeShard(home);
  Run run = AllocateFrom(shard, units, Memory::kDirty, units);
  // What other threads freed lately is in their caches, and they will soon want it again.
  if (run.start == 0) run = AllocateElsewhere(shard, units, Memory::kDirty, kKeptDirtyUnits);
  if (run.start != 0) return run;
  const Admission admission(limit_, {units * kUnitSize});
  if (!admission.granted()) return AllocateElsewhere(shard, units, Memory::kDirty, 0);
  run = AllocateFrom(shard, units, Memory::kAny, units);
  if (run.start == 0) run = AllocateNewChunk(shard, units);
  if (run.start == 0) run = AllocateElsewhere(shard, units, Memory::kAny, 0);
  return run;
}

PageHeap::Run PageHeap::AllocateWithRoom(unsigned home, unsigned units, unsigned room) {
  Shard& shard = HomeShard(home);
  Run run = AllocateFrom(shard, units, Memory::kDirty, room);
  if (run.start == 0) {
    const Admission admission(limit_, {units * kUnitSize});
    if (admission.granted()) run = AllocateFrom(shard, units, Memory::kAny, room);
  }
  return run.start != 0 ? run : Allocate(home, units);
}

PageHeap::Run PageHeap::AllocateFrom(Shard& shard, unsigned units, Memory memory, unsigned room) {
  const auto& hint = memory == Memory::kDirty ? shard.dirty_units : shard.free_units;
  if (hint.load(std::memory_order_relaxed) < room) return {};
  vm::sync::SpinLockHolder holder(shard.lock);
  const RunIndex& index = memory == Memory::kDirty ? shard.by_dirty : shard.by_free;
  // The shortest run that fits: long ones stay whole, and full chunks fill up while others come empty.
  const std::uint64_t fitting = index.occupied >> (room - 1) << (room - 1);
  if (fitting == 0) return {};
  ChunkRecord* chunk = metadata_.chunks().Named(index.lists[std::countr_zero(fitting)]);
  const UnitSet choice = memory == Memory::kDirty ? chunk->dirty : chunk->free;
  // Who needs room goes to the end, far from those that come without.
  return TakeLocked(shard, chunk, room == units ? choice.FindRun(room) : choice.FindLastRun(room), units);
}

PageHeap::Run PageHeap::AllocateElsewhere(const Shard& home, unsigned units, Memory memory, std::uint64_t kept) {
  for (unsigned i = 0; i < shard_count_; ++i) {
    if (&shards_[i] == &home || shards_[i].dirty_units.load(std::memory_order_relaxed) < kept) continue;
    const Run run = AllocateFrom(shards_[i], units, memory, units);
    if (run.start != 0) return run;
  }
  return {};
}

PageHeap::Run PageHeap::AllocateNewChunk(Shard& shard, unsigned units) {
  const vm::Result<vm::PageRange> mapped = space_.Map(kChunkPages, {.alignment = kChunkPages});
  if (!mapped.ok()) return {};
  const std::uintptr_t start = AddressOf(mapped->address());
  ChunkRecord* chunk = metadata_.chunks().At(start);
  if (!metadata_.Commit(metadata_.spans().At(start), kChunkUnits * sizeof(Span)).ok() ||
      !metadata_.Commit(chunk, sizeof(ChunkRecord)).ok()) {
    static_cast<void>(space_.Unmap(*mapped));  // nothing is lost but address space
    return {};
  }
  vm::sync::SpinLockHolder holder(shard.lock);
  *chunk = ChunkRecord{.start = start};
  chunk->shard = static_cast<std::uint8_t>(&shard - shards_.data());
  AddChunkLocked(shard, chunk);
  return TakeLocked(shard, chunk, 0, units);
}

PageHeap::Run PageHeap::TakeLocked(Shard& shard, ChunkRecord* chunk, unsigned first, unsigned units) {
  const UnitSet taken = UnitSet::Of(first, units);
  const bool clean = !chunk->dirty.Overlaps(taken);
  chunk->aged = chunk->aged - taken;
  chunk->idle = false;
  UpdateLocked(shard, chunk, chunk->free - taken, chunk->dirty - taken);
  return {chunk->start + first * kUnitSize, clean};
}

unsigned PageHeap::Extend(std::uintptr_t start, unsigned units, unsigned more, unsigned most) {
  ChunkRecord* chunk = metadata_.chunks().At(start);
  const unsigned first = UnitOf(chunk, start) + units;
  if (first + more > kChunkUnits) return 0;
  most = std::min(most, kChunkUnits - first);
  {
    const Admission admission(limit_, {most * kUnitSize});
    if (admission.granted()) return ExtendAdmitted(chunk, first, more, most);
  }
  const Admission admission(limit_, {more * kUnitSize});
  return admission.granted() ? ExtendAdmitted(chunk, first, more, more) : 0;
}

unsigned PageHeap::ExtendAdmitted(ChunkRecord* chunk, unsigned first, unsigned more, unsigned most) {
  Shard& shard = shards_[chunk->shard];
  vm::sync::SpinLockHolder holder(shard.lock);
  const unsigned taken = std::min(chunk->free.RunAt(first), most);
  if (taken < more) return 0;
  TakeLocked(shard, chunk, first, taken);
  return taken;
}

void PageHeap::Free(std::uintptr_t start, unsigned units) {
  ChunkRecord* chunk = metadata_.chunks().At(start);
  Shard& shard = shards_[chunk->shard];
  const UnitSet freed = UnitSet::Of(UnitOf(chunk, start), units);
  vm::sync::SpinLockHolder holder(shard.lock);
  FREEHOLD_CHECK(!chunk->free.Overlaps(freed));
  UpdateLocked(shard, chunk, chunk->free | freed, chunk->dirty | freed);
}

void PageHeap::AddChunkLocked(Shard& shard, ChunkRecord* chunk) {
  Push<&ChunkRecord::all>(shard.all, chunk);
  shard.chunks.fetch_add(1, std::memory_order_relaxed);
  UpdateLocked(shard, chunk, UnitSet::All(), UnitSet());
}

void PageHeap::RemoveChunkLocked(Shard& shard, ChunkRecord* chunk) {
  UpdateLocked(shard, chunk, UnitSet(), UnitSet());
  Remove<&ChunkRecord::all>(shard.all, chunk);
  shard.chunks.fetch_sub(1, std::memory_order_relaxed);
}

void PageHeap::UpdateLocked(Shard& shard, ChunkRecord* chunk, UnitSet free, UnitSet dirty) {
  // Modulo 2^64, so that differences may be negative.
  const std::uint64_t free_change = std::uint64_t{free.count()} - chunk->free.count();
  const std::uint64_t dirty_change = std::uint64_t{dirty.count()} - chunk->dirty.count();
  shard.free_units.store(shard.free_units.load(std::memory_order_relaxed) + free_change,
                         std::memory_order_relaxed);
  shard.dirty_units.store(shard.dirty_units.load(std::memory_order_relaxed) + dirty_change,
                          std::memory_order_relaxed);
  shard.clean_units.store(
      shard.free_units.load(std::memory_order_relaxed) - shard.dirty_units.load(std::memory_order_relaxed),
      std::memory_order_relaxed);
  chunk->free = free;
  chunk->dirty = dirty;
  Reindex<&ChunkRecord::by_free>(shard.by_free, chunk, chunk->free_run, free.LongestRun());
  Reindex<&ChunkRecord::by_dirty>(shard.by_dirty, chunk, chunk->dirty_run, dirty.LongestRun());
}

template <ChunkLink ChunkRecord::*kLink>
void PageHeap::Push(ChunkList& list, ChunkRecord* chunk) {
  const std::uint32_t name = metadata_.chunks().NameOf(chunk);
  (chunk->*kLink) = {.next = list};
  if (list != 0) (metadata_.chunks().Named(list)->*kLink).previous = name;
  list = name;
}

template <ChunkLink ChunkRecord::*kLink>
void PageHeap::Remove(ChunkList& list, ChunkRecord* chunk) {
  const ChunkLink link = chunk->*kLink;
  if (link.next != 0) (metadata_.chunks().Named(link.next)->*kLink).previous = link.previous;
  if (link.previous != 0) {
    (metadata_.chunks().Named(link.previous)->*kLink).next = link.next;
  } else {
    list = link.next;
  }
}

template <ChunkLink ChunkRecord::*kLink>
void PageHeap::Reindex(RunIndex& index, ChunkRecord* chunk, std::uint8_t& run, unsigned new_run) {
  if (run == new_run) return;
  if (run != 0) {
    Remove<kLink>(index.lists[run - 1], chunk);
    if (index.lists[run - 1] == 0) index.occupied &= ~(std::uint64_t{1} << (run - 1));
  }
  run = static_cast<std::uint8_t>(new_run);
  if (new_run != 0) {
    Push<kLink>(index.lists[new_run - 1], chunk);
    index.occupied |= std::uint64_t{1} << (new_run - 1);
  }
}

vm::Pages PageHeap::Age() {
  vm::sync::SpinLockTryHolder holder(purge_lock_);
  if (!holder.owns()) return {0};
  purge_lock_.AssertHeld();
  const vm::Pages pages = PurgeShards(Scope::kAged);
  if (collapses_) CollapseBlocks();
  return pages;
}

vm::Pages PageHeap::Trim() {
  vm::sync::SpinLockHolder holder(purge_lock_);
  return PurgeShards(Scope::kAll);
}

vm::Pages PageHeap::PurgeShards(Scope scope) {
  vm::Pages pages{0};
  for (unsigned i = 0; i < shard_count_; ++i) {
    pages += PurgeShard(shards_[i], scope);
    UnmapIdleChunks(shards_[i], scope);
  }
  purged_pages_.fetch_add(pages.value, std::memory_order_relaxed);
  return pages;
}

vm::Pages PageHeap::PurgeShard(Shard& shard, Scope scope) {
  vm::Pages pages{0};
  ChunkRecord* cursor = nullptr;
  {
    vm::sync::SpinLockHolder holder(shard.lock);
    if (shard.all != 0) cursor = metadata_.chunks().Named(shard.all);
  }
  // Chunks are added at the list's head only, and removed by the holder of the purge lock: the cursor stays
  // valid while the shard's lock is not held.
  while (cursor != nullptr) {
    PurgeBatch batch;
    {
      vm::sync::SpinLockHolder holder(shard.lock);
      CollectLocked(shard, scope, cursor, batch);
    }
    if (batch.range_count == 0) break;
    const bool dropped = space_.Discard({batch.ranges.data(), batch.range_count}).ok();
    if (dropped) pages += batch.pages();
    vm::sync::SpinLockHolder holder(shard.lock);
    for (std::size_t i = 0; i < batch.part_count; ++i) {
      ChunkRecord* chunk = batch.parts[i].chunk;
      const UnitSet units = batch.parts[i].units;
      UpdateLocked(shard, chunk, chunk->free | units, dropped ? chunk->dirty : chunk->dirty | units);
    }
  }
  return pages;
}

void PageHeap::CollectLocked(Shard& shard, Scope scope, ChunkRecord*& cursor, PurgeBatch& batch) {
  while (cursor != nullptr) {
    ChunkRecord* chunk = cursor;
    const UnitSet due = ChooseDue(chunk, scope == Scope::kAll ? chunk->dirty : chunk->aged, scope);
    const UnitSet taken = batch.Add(chunk, due);
    UpdateLocked(shard, chunk, chunk->free - taken, chunk->dirty - taken);
    chunk->aged = chunk->aged - taken;
    if (taken != due) return;  // the batch is full; the chunk's rest is next
    chunk->aged = chunk->dirty;
    cursor = chunk->all.next == 0 ? nullptr : metadata_.chunks().Named(chunk->all.next);
    if (batch.full()) return;
  }
}

UnitSet PageHeap::ChooseDue(ChunkRecord* chunk, UnitSet due, Scope scope) {
  if (chunk->huge == 0) return due;
  for (unsigned block = 0; block < kChunkBlocks; ++block) {
    const Candidate candidate = {chunk, block};
    const UnitSet units = Candidate::Units(block);
    if ((chunk->huge & candidate.bit()) == 0 || !due.Overlaps(units)) continue;
    if (scope == Scope::kAged && (chunk->free & units).count() <= kHugeFree) {
      due = due - units;
    } else {
      // The kernel splits it, and it may become one again.
      chunk->huge &= ~candidate.bit();
      chunk->judged &= ~candidate.bit();
      chunk->dense &= ~candidate.bit();
    }
  }
  return due;
}

void PageHeap::CollapseBlocks() {
  unsigned left = kBlocksAtOnce;
  for (unsigned i = 0; i < shard_count_ && left != 0; ++i) {
    Candidate candidates[kBlocksAtOnce];
    unsigned count = 0;
    {
      vm::sync::SpinLockHolder holder(shards_[i].lock);
      count = FindDenseLocked(shards_[i], candidates, left);
    }
    left -= count;
    for (unsigned next = 0; next < count; ++next) {
      // Units of it may come and go meanwhile; nobody but this thread takes pages or the chunk away.
      if (!Collapse(candidates[next])) continue;
      ChunkRecord* chunk = candidates[next].chunk;
      vm::sync::SpinLockHolder holder(shards_[i].lock);
      chunk->huge |= candidates[next].bit();
      // All of it is resident now.
      const UnitSet free = chunk->free & Candidate::Units(candidates[next].block);
      UpdateLocked(shards_[i], chunk, chunk->free, chunk->dirty | free);
    }
  }
}

unsigned PageHeap::FindDenseLocked(Shard& shard, Candidate* candidates, unsigned capacity) {
  unsigned count = 0;
  for (ChunkList name = shard.all; name != 0; name = metadata_.chunks().Named(name)->all.next) {
    ChunkRecord* chunk = metadata_.chunks().Named(name);
    for (unsigned block = 0; block < kChunkBlocks; ++block) {
      const Candidate candidate = {chunk, block};
      const std::uint8_t bit = candidate.bit();
      if ((chunk->huge & bit) != 0) continue;
      if ((chunk->free & Candidate::Units(block)).count() > kDenseFree) {
        chunk->dense &= ~bit;
        chunk->judged &= ~bit;
      } else if ((chunk->dense & bit) == 0) {
        chunk->dense |= bit;
      } else if ((chunk->judged & bit) == 0 && count != capacity) {
        chunk->judged |= bit;
        candidates[count++] = candidate;
      }
    }
  }
  return count;
}

bool PageHeap::Collapse(const Candidate& candidate) {
  const vm::PageRange range = candidate.range();
  std::array<std::uint8_t, vm::kPagesPerHugePage> resident;
  if (!space_.Residency(range, absl::MakeSpan(resident)).ok()) return false;
  const auto absent = std::count_if(resident.begin(), resident.end(), [](std::uint8_t page) { return (page & 1) == 0; });
  if (static_cast<std::size_t>(absent) > kMostAbsentPages) return false;
  const vm::Error error = space_.AdviseKernel(range, kCollapse, vm::AdviceEffect::kOnce);
  // Before Linux 6.1 there is no such advice.
  if (!error.ok() && error.sys_errno == EINVAL) collapses_ = false;
  if (error.ok()) collapsed_blocks_.fetch_add(1, std::memory_order_relaxed);
  return error.ok();
}

void PageHeap::UnmapIdleChunks(Shard& shard, Scope scope) {
  while (ChunkRecord* chunk = TakeIdleChunk(shard, scope)) {
    if (space_.Unmap(RangeOf(chunk, 0, kChunkUnits)).ok()) continue;
    vm::sync::SpinLockHolder holder(shard.lock);
    AddChunkLocked(shard, chunk);
    break;
  }
  // Those that are free as a whole now go when they still are the next time.
  vm::sync::SpinLockHolder holder(shard.lock);
  for (ChunkList name = shard.by_free.lists[kChunkUnits - 1]; name != 0;) {
    ChunkRecord* chunk = metadata_.chunks().Named(name);
    chunk->idle = chunk->dirty.empty();
    name = chunk->by_free.next;
  }
}

ChunkRecord* PageHeap::TakeIdleChunk(Shard& shard, Scope scope) {
  vm::sync::SpinLockHolder holder(shard.lock);
  for (ChunkList name = shard.by_free.lists[kChunkUnits - 1]; name != 0;) {
    ChunkRecord* chunk = metadata_.chunks().Named(name);
    if (scope == Scope::kAll ? chunk->dirty.empty() : chunk->idle) {
      RemoveChunkLocked(shard, chunk);
      return chunk;
    }
    name = chunk->by_free.next;
  }
  return nullptr;
}

void PageHeap::UnmapAll() {
  vm::sync::SpinLockHolder purging(purge_lock_);
  for (unsigned i = 0; i < shard_count_; ++i) {
    Shard& shard = shards_[i];
    for (;;) {
      ChunkRecord* chunk = nullptr;
      {
        vm::sync::SpinLockHolder holder(shard.lock);
        if (shard.all == 0) break;
        chunk = metadata_.chunks().Named(shard.all);
        RemoveChunkLocked(shard, chunk);
      }
      const vm::PageRange range = RangeOf(chunk, 0, kChunkUnits);
      // As for a large object: at worst addresses are lost.
      if (!space_.Unmap(range).ok()) static_cast<void>(space_.Discard({&range, 1}));
    }
  }
}

void PageHeap::ForEachUsedUnit(void (*visit)(void* context, std::uintptr_t unit), void* context) {
  for (unsigned i = 0; i < shard_count_; ++i) {
    vm::sync::SpinLockHolder holder(shards_[i].lock);
    for (ChunkList name = shards_[i].all; name != 0; name = metadata_.chunks().Named(name)->all.next) {
      const ChunkRecord* chunk = metadata_.chunks().Named(name);
      UnitSet used = UnitSet::All() - chunk->free;
      for (; !used.empty(); used = used - UnitSet::Of(used.first(), 1)) {
        visit(context, chunk->start + used.first() * kUnitSize);
      }
    }
  }
}

void PageHeap::PrepareFork() {
  purge_lock_.LockForFork();
  for (unsigned i = 0; i < shard_count_; ++i) shards_[i].lock.LockForFork();
}

void PageHeap::UnlockAfterFork() {
  for (unsigned i = 0; i < shard_count_; ++i) shards_[i].lock.UnlockAfterFork();
  purge_lock_.UnlockAfterFork();
}

void PageHeap::ForEachMetric(vm::MetricVisitor visit, void* context) const {
  const auto of_shards = [&](std::string_view name, std::string_view help, const void* first, std::size_t unit) {
    visit(context, {.name = name,
                    .help = help,
                    .kind = vm::Metric::Kind::kGauge,
                    .first = first,
                    .count = shard_count_,
                    .stride = sizeof(Shard),
                    .scale = unit});
  };
  of_shards("heap_chunk_bytes", "Mapped for small objects.", &shards_[0].chunks, kChunkSize);
  of_shards("heap_free_bytes", "Of that, in free spans.", &shards_[0].free_units, kUnitSize);
  of_shards("heap_free_dirty_bytes", "Of that, possibly resident.", &shards_[0].dirty_units, kUnitSize);
  visit(context,
        {.name = "heap_purged_pages_total", .help = "Pages given back to the kernel.", .first = &purged_pages_});
  visit(context, {.name = "heap_collapsed_blocks_total",
                  .help = "Blocks of 2 MiB that were made huge pages.",
                  .first = &collapsed_blocks_});
}

PageHeap::Stats PageHeap::GetStats() const {
  Stats stats;
  for (unsigned i = 0; i < shard_count_; ++i) {
    stats.chunks += shards_[i].chunks.load(std::memory_order_relaxed);
    stats.free_units += shards_[i].free_units.load(std::memory_order_relaxed);
    stats.dirty_units += shards_[i].dirty_units.load(std::memory_order_relaxed);
  }
  stats.purged_pages = purged_pages_.load(std::memory_order_relaxed);
  stats.collapsed_blocks = collapsed_blocks_.load(std::memory_order_relaxed);
  return stats;
}

vm::Bytes PageHeap::clean() const {
  std::uint64_t units = 0;
  for (unsigned i = 0; i < shard_count_; ++i) units += shards_[i].clean_units.load(std::memory_order_relaxed);
  return {units * kUnitSize};
}

void PageHeap::CheckInvariants() {
  for (unsigned i = 0; i < shard_count_; ++i) {
    Shard& shard = shards_[i];
    vm::sync::SpinLockHolder holder(shard.lock);
    Stats sum;
    for (ChunkList name = shard.all; name != 0; name = metadata_.chunks().Named(name)->all.next) {
      const ChunkRecord* chunk = metadata_.chunks().Named(name);
      FREEHOLD_CHECK(chunk->shard == i);
      FREEHOLD_CHECK(chunk->free.Contains(chunk->dirty) && chunk->dirty.Contains(chunk->aged));
      FREEHOLD_CHECK((chunk->huge & ~chunk->judged) == 0 && (chunk->judged & ~chunk->dense) == 0);
      FREEHOLD_CHECK(chunk->free_run == chunk->free.LongestRun());
      FREEHOLD_CHECK(chunk->dirty_run == chunk->dirty.LongestRun());
      ++sum.chunks;
      sum.free_units += chunk->free.count();
      sum.dirty_units += chunk->dirty.count();
    }
    FREEHOLD_CHECK(sum.chunks == shard.chunks.load(std::memory_order_relaxed));
    FREEHOLD_CHECK(sum.free_units == shard.free_units.load(std::memory_order_relaxed));
    FREEHOLD_CHECK(sum.dirty_units == shard.dirty_units.load(std::memory_order_relaxed));
    FREEHOLD_CHECK(sum.free_units - sum.dirty_units == shard.clean_units.load(std::memory_order_relaxed));
  }
}

}  // namespace freehold::allocator
