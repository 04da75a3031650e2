#include "runtime/stack_pool.h"

#include <algorithm>
#include <bit>
#include <new>

#include "absl/base/optimization.h"
#include "vm/os/check.h"

namespace freehold::runtime {
namespace {

using vm::Bytes;
using vm::Error;
using vm::ErrorCode;
using vm::PageNumber;
using vm::PageRange;
using vm::Pages;
using vm::Result;
using vm::os::Protection;

// Address space costs nothing: one arena serves ten thousand threads. Of a small space it takes a share only.
constexpr Bytes kMaxArena = vm::GiB(128);
constexpr Bytes kMinArena = vm::MiB(4);
constexpr std::size_t kArenaShare = 64;
// What becomes readable and writable, and is counted where memory is not overcommitted, ahead of use.
constexpr Bytes kMaxSpan = vm::MiB(64);
constexpr std::size_t kFirstSlots = 4;
constexpr Bytes kRecordBlock = vm::KiB(64);

constexpr std::size_t RoundUp(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

// Classes 0 to 15 are 1 to 16 pages; from there on each doubling is cut into sixteen.
std::size_t StackPool::ClassOf(Pages pages) {
  const std::size_t last = pages.value - 1;
  if (last < kClassSteps) return last;
  const unsigned shift = static_cast<unsigned>(std::bit_width(last)) - 5;
  return shift * kClassSteps + (last >> shift);
}

Pages StackPool::PagesOf(std::size_t size_class) {
  if (size_class < kClassSteps) return {size_class + 1};
  const std::size_t shift = size_class / kClassSteps - 1;
  return {(size_class % kClassSteps + kClassSteps + 1) << shift};
}

Result<StackPool*> StackPool::Create(vm::AddressSpace& space) {
  const std::size_t shards = std::min<std::size_t>(std::bit_ceil(space.kernel().CpuCount()), kMaxShards);
  const Result<PageRange> memory = space.Map(vm::PagesFor({sizeof(StackPool) + shards * sizeof(Shard)}));
  if (!memory.ok()) return memory.error();
  auto* pool = new (memory->address()) StackPool(space, shards);
  pool->memory_ = *memory;
  for (std::size_t i = 0; i < shards; ++i) new (pool->shards_ + i) Shard;
  return pool;
}

void StackPool::Destroy(StackPool* pool) {
  vm::AddressSpace& space = pool->space_;
  // Arenas and their tables before the records that describe them. What cannot be unmapped stays, unused.
  for (Arena* arena = pool->arenas_.load(std::memory_order_relaxed); arena != nullptr; arena = arena->older) {
    space.kernel().AdviseCoreDumps(arena->range, vm::os::CoreDumps::kInclude);
    (void)space.Unmap(arena->range);
    (void)space.Unmap(arena->table);
  }
  for (Block* block = pool->blocks_; block != nullptr;) {
    const PageRange range = block->range;
    block = block->older;
    (void)space.Unmap(range);
  }
  const PageRange memory = pool->memory_;
  pool->~StackPool();
  (void)space.Unmap(memory);
}

// ---- Acquire and release ----

Result<StackSlot*> StackPool::Acquire(Bytes size, Bytes guard) {
  if (size.value == 0) return ErrorCode::kEmpty;
  if (size.value % vm::kPageSize != 0 || guard.value % vm::kPageSize != 0) return ErrorCode::kUnaligned;
  if (size.value + guard.value < size.value) return ErrorCode::kOverflow;
  const Pages stack_pages = vm::PagesFor(size);
  const Pages guard_pages = std::max(Pages{1}, vm::PagesFor(guard));
  // The slot has one page for a guard; a larger one comes out of the rest.
  const Pages pages = stack_pages + guard_pages - Pages{1};
  if (pages > PagesOf(kClasses - 1)) return ErrorCode::kNoRoom;
  const std::size_t size_class = ClassOf(pages);

  StackSlot* slot = Take(size_class);
  if (slot == nullptr) {
    const Result<StackSlot*> carved = Carve(size_class);
    if (!carved.ok()) return carved.error();
    slot = *carved;
  }
  if (const Error error = FitGuard(slot, guard_pages, stack_pages); ABSL_PREDICT_FALSE(!error.ok())) {
    Put(slot);
    return error;
  }
  slot->stack_pages_ = stack_pages;
  slot->state_.store(StackSlot::State::kInUse, std::memory_order_release);
  OwnShard().in_use.fetch_add(1, std::memory_order_relaxed);
  return slot;
}

void StackPool::Release(StackSlot* slot, Residue residue) {
  auto in_use = StackSlot::State::kInUse;
  FREEHOLD_CHECK(slot->state_.compare_exchange_strong(in_use, StackSlot::State::kFree, std::memory_order_acq_rel));
  if (residue == Residue::kUnknown) DiscardBelow(slot, slot->range_.end - Pages{kHotPages});
  OwnShard().in_use.fetch_sub(1, std::memory_order_relaxed);
  Put(slot);
}

void StackPool::DiscardBelow(StackSlot* slot, PageNumber limit) {
  const PageRange deep = {slot->range_.first + slot->guard_pages_, limit};
  if (!deep.empty()) Discard(deep);
}

// An error leaves memory resident, and there is nobody to tell.
void StackPool::Discard(PageRange range) {
  discards_.fetch_add(1, std::memory_order_relaxed);
  (void)space_.Discard({&range, 1});
}

StackSlot* StackPool::Take(std::size_t size_class) {
  const std::size_t own = space_.kernel().CurrentCpu();
  for (std::size_t i = 0; i < shard_count_; ++i) {
    StackSlot* slot = TakeFrom(shards_[(own + i) & (shard_count_ - 1)], size_class);
    if (slot != nullptr) return slot;
  }
  return nullptr;
}

StackSlot* StackPool::TakeFrom(Shard& shard, std::size_t size_class) {
  FreeList& list = shard.lists[size_class];
  // What is missed here is what another thread puts in at this moment, or later.
  if (list.hot.load(std::memory_order_relaxed) == nullptr && list.cold.load(std::memory_order_relaxed) == nullptr) {
    return nullptr;
  }
  const vm::sync::SpinLockHolder holder(shard.lock);
  for (std::atomic<StackSlot*>* head : {&list.hot, &list.cold}) {
    StackSlot* slot = head->load(std::memory_order_relaxed);
    if (slot == nullptr) continue;
    head->store(slot->next_, std::memory_order_relaxed);
    if (head == &list.hot) --list.hot_count;
    return slot;
  }
  return nullptr;
}

void StackPool::Put(StackSlot* slot) {
  Shard& shard = OwnShard();
  FreeList& list = shard.lists[slot->size_class_];
  {
    const vm::sync::SpinLockHolder holder(shard.lock);
    if (list.hot_count < kHotSlots) {
      slot->next_ = list.hot.load(std::memory_order_relaxed);
      list.hot.store(slot, std::memory_order_relaxed);
      ++list.hot_count;
      return;
    }
  }
  DiscardBelow(slot, slot->range_.end);
  const vm::sync::SpinLockHolder holder(shard.lock);
  slot->next_ = list.cold.load(std::memory_order_relaxed);
  list.cold.store(slot, std::memory_order_relaxed);
}

StackSlot* StackPool::Find(const void* address) const {
  const PageNumber page = PageNumber::Of(address);
  // Acquire pairs with the releases of AddSpanOf and ArenaFor.
  for (const Arena* arena = arenas_.load(std::memory_order_acquire); arena != nullptr; arena = arena->older) {
    if (!arena->range.Contains(page)) continue;
    const Span* span = arena->units[(page - arena->range.first).value / kUnitPages].load(std::memory_order_acquire);
    if (span == nullptr) return nullptr;
    const std::size_t index = (page - span->range.first).value / span->slot_pages.value;
    if (index >= span->slot_count) return nullptr;
    StackSlot* slot = span->slots + index;
    return slot->state_.load(std::memory_order_acquire) == StackSlot::State::kInUse ? slot : nullptr;
  }
  return nullptr;
}

// ---- Guards ----

Error StackPool::FitGuard(StackSlot* slot, Pages guard, Pages stack) {
  const Pages most = slot->range_.count() - stack;
  if (ABSL_PREDICT_TRUE(guard <= slot->guard_pages_ && slot->guard_pages_ <= most)) return Error::Ok();
  return SetGuard(slot, guard);
}

Error StackPool::SetGuard(StackSlot* slot, Pages pages) {
  const PageRange now = slot->guard();
  const PageRange wanted = PageRange::Of(slot->range_.first, pages);
  if (wanted.count() < now.count()) {
    const PageRange open = {wanted.end, now.end};
    const Error error = slot->guarded_by_protection_ ? space_.Protect(open, Protection::kReadWrite)
                                                     : space_.kernel().RemoveGuard(open);
    if (error.ok()) slot->guard_pages_ = pages;
    return error;
  }
  const PageRange closed = {now.end, wanted.end};
  Error error = {ErrorCode::kUnsupported};
  if (!slot->guarded_by_protection_) error = space_.kernel().InstallGuard(closed);
  if (error.code == ErrorCode::kUnsupported) {
    // One kind for the whole guard, so that it can be taken back.
    const bool mixed = !now.empty() && !slot->guarded_by_protection_;
    error = space_.Protect(mixed ? wanted : closed, Protection::kNone);
    if (error.ok() && mixed) (void)space_.kernel().RemoveGuard(now);
    if (error.ok()) slot->guarded_by_protection_ = true;
  }
  if (error.ok()) slot->guard_pages_ = pages;
  return error;
}

// ---- Carving ----

Result<StackSlot*> StackPool::Carve(std::size_t size_class) {
  const vm::sync::SpinLockHolder holder(carve_lock_);
  Span* span = open_spans_[size_class];
  if (span == nullptr || span->carved == span->slot_count) {
    const Result<Span*> added = AddSpan(size_class);
    if (!added.ok()) return added.error();
    span = *added;
    open_spans_[size_class] = span;
  }
  StackSlot* slot = span->slots + span->carved;
  slot->range_ = PageRange::Of(span->range.first + Pages{span->carved * span->slot_pages.value}, span->slot_pages);
  slot->size_class_ = static_cast<std::uint32_t>(size_class);
  if (const Error error = SetGuard(slot, {1}); !error.ok()) return error;
  ++span->carved;
  ++carved_by_class_[size_class];
  slots_.store(slots_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  return slot;
}

// As many slots as there are already, so that a program of few stacks commits few; one if there is no more to be had.
Result<StackPool::Span*> StackPool::AddSpan(std::size_t size_class) {
  const std::size_t slot_bytes = (PagesOf(size_class) + Pages{1}).bytes().value;
  const std::size_t most = std::max<std::size_t>(kMaxSpan.value / slot_bytes, 1);
  const std::size_t wanted = std::max<std::size_t>(carved_by_class_[size_class], kFirstSlots);
  const Result<Span*> span = AddSpanOf(size_class, std::min(most, wanted));
  return span.ok() || most == 1 ? span : AddSpanOf(size_class, 1);
}

Result<StackPool::Span*> StackPool::AddSpanOf(std::size_t size_class, std::size_t slot_count) {
  const Pages slot_pages = PagesOf(size_class) + Pages{1};
  const Pages pages = {RoundUp(slot_pages.value * slot_count, kUnitPages)};
  const Result<Arena*> found = ArenaFor(pages);
  if (!found.ok()) return found.error();
  Arena* arena = *found;

  // What is made writable and then has no record is found writable by the next try.
  const PageRange range = PageRange::Of(arena->used, pages);
  space_.kernel().AdviseCoreDumps(range, vm::os::CoreDumps::kInclude);
  if (const Error error = space_.Protect(range, Protection::kReadWrite); !error.ok()) return error;
  // Stacks grow page by page, also where huge pages come unasked. A hint.
  if (space_.kernel().features().huge_pages) {
    (void)space_.kernel().AdviseHugePages(range, vm::os::HugePages::kAvoid);
  }
  const std::size_t header = RoundUp(sizeof(Span), alignof(StackSlot));
  void* record = AllocateRecord(header + sizeof(StackSlot) * slot_count, alignof(StackSlot));
  if (record == nullptr) return ErrorCode::kNoMetadata;
  auto* slots = reinterpret_cast<StackSlot*>(static_cast<std::byte*>(record) + header);
  for (std::size_t i = 0; i < slot_count; ++i) new (slots + i) StackSlot;
  auto* span = new (record)
      Span{.older = spans_, .range = range, .slot_pages = slot_pages, .slots = slots, .slot_count = slot_count};
  spans_ = span;
  const std::size_t first = (range.first - arena->range.first).value / kUnitPages;
  for (std::size_t i = 0; i < pages.value / kUnitPages; ++i) {
    arena->units[first + i].store(span, std::memory_order_release);
  }
  arena->used = range.end;
  return span;
}

Result<StackPool::Arena*> StackPool::ArenaFor(Pages pages) {
  Arena* newest = arenas_.load(std::memory_order_relaxed);
  if (newest != nullptr && newest->range.end - newest->used >= pages) return newest;
  const std::size_t share = RoundUp(space_.reservation().count().value / kArenaShare, kUnitPages);
  std::size_t size = std::clamp(share, vm::PagesFor(kMinArena).value, vm::PagesFor(kMaxArena).value);
  Result<PageRange> range = ErrorCode::kNoRoom;
  for (size = std::max(size, pages.value); !range.ok();
       size = std::max(size / 2 / kUnitPages * kUnitPages, pages.value)) {
    range = space_.Map({size}, {.protection = Protection::kNone});
    if (!range.ok() && (range.error().code != ErrorCode::kNoRoom || size == pages.value)) return range.error();
  }
  const std::size_t units = range->count().value / kUnitPages;
  const Result<PageRange> table = space_.Map(vm::PagesFor({units * sizeof(std::atomic<Span*>)}));
  void* record = table.ok() ? AllocateRecord(sizeof(Arena), alignof(Arena)) : nullptr;
  if (record == nullptr) {
    if (table.ok()) (void)space_.Unmap(*table);
    (void)space_.Unmap(*range);
    return table.ok() ? Error{ErrorCode::kNoMetadata} : table.error();
  }
  space_.kernel().AdviseCoreDumps(*range, vm::os::CoreDumps::kOmit);
  // Mapped memory is zero, which is what null pointers are.
  auto* arena = new (record) Arena{.older = newest,
                                   .range = *range,
                                   .table = *table,
                                   .units = reinterpret_cast<std::atomic<Span*>*>(table->address()),
                                   .used = range->first};
  arenas_.store(arena, std::memory_order_release);
  arena_count_.fetch_add(1, std::memory_order_relaxed);
  return arena;
}

void* StackPool::AllocateRecord(std::size_t bytes, std::size_t alignment) {
  std::size_t offset = RoundUp(block_used_, alignment);
  if (blocks_ == nullptr || offset + bytes > blocks_->range.bytes().value) {
    const std::size_t header = RoundUp(sizeof(Block), alignment);
    const Result<PageRange> range = space_.Map(vm::PagesFor({std::max(kRecordBlock.value, header + bytes)}));
    if (!range.ok()) return nullptr;
    blocks_ = new (range->address()) Block{blocks_, *range};
    offset = header;
  }
  block_used_ = offset + bytes;
  return blocks_->range.address() + offset;
}

// ---- The rest ----

StackPoolStats StackPool::Stats() const {
  StackPoolStats stats;
  stats.slots = slots_.load(std::memory_order_relaxed);
  stats.arenas = arena_count_.load(std::memory_order_relaxed);
  stats.discards = discards_.load(std::memory_order_relaxed);
  std::int64_t in_use = 0;
  for (std::size_t i = 0; i < shard_count_; ++i) in_use += shards_[i].in_use.load(std::memory_order_relaxed);
  stats.in_use = in_use > 0 ? static_cast<std::uint64_t>(in_use) : 0;
  return stats;
}

void StackPool::PrepareFork() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  carve_lock_.LockForFork();
  for (std::size_t i = 0; i < shard_count_; ++i) shards_[i].lock.LockForFork();
}

void StackPool::ParentAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  for (std::size_t i = 0; i < shard_count_; ++i) shards_[i].lock.UnlockAfterFork();
  carve_lock_.UnlockAfterFork();
}

void StackPool::ChildAfterFork() {
  ParentAfterFork();
  // Other threads may have been about to count.
  std::int64_t in_use = 0;
  ForEachInUse([&](StackSlot*) { ++in_use; });
  for (std::size_t i = 0; i < shard_count_; ++i) shards_[i].in_use.store(0, std::memory_order_relaxed);
  shards_[0].in_use.store(in_use, std::memory_order_relaxed);
}

}  // namespace freehold::runtime
