// Stacks for threads and fibers, out of an address space: slots with guard pages that are carved once and used again
// and again, so that in steady state no kernel VMA changes and a stack costs no system call.
//
// A slot, and how it lies among others of its span:
//
//     low                                                                            high
//     ... top of the slot below | guard | slack | stack, `size` bytes as asked for | guard of the next ...
//                               ^       ^------- readable and writable -----------^
//                               traps, planted when the slot was carved            hot: the last kHotPages
//
// Slots come in size classes, sixteen to a doubling. What is the class's and not the caller's lies between guard and
// stack, and is usable.
//
// Thread safety:  thread-safe; Find is async-signal-safe too.
// Lock order:     LockRank::kRuntime. The lock of a free list is held for a few loads and stores; that of carving over
//                 system calls, but only who carves takes it.
// Waiting:        Acquire waits for others that carve, if it has to carve.
// Allocation:     none from malloc: its records come from the address space too.
// Errors:         values.
// Invariants:     P1. A slot is free, in one list, or in use, or belongs to the one thread that moves it in between.
//                 P2. The lowest `guard` of a slot traps from when it is first handed out; everything above is readable
//                     and writable.
//                 P3. Kernel VMAs: at most two an arena, plus one for each size class whose last span is not used up;
//                     independent of the number of slots. Not where guards have to be made by mprotect.
#ifndef FREEHOLD_RUNTIME_STACK_POOL_H_
#define FREEHOLD_RUNTIME_STACK_POOL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/types/span.h"
#include "vm/address_space.h"
#include "vm/page_range.h"
#include "vm/result.h"
#include "vm/sync/spin_lock.h"
#include "vm/units.h"

namespace freehold::runtime {

// One stack. Its address is constant, and so is its place; owned by whoever acquired it.
class alignas(vm::kCacheLineSize) StackSlot {
 public:
  // What its user may keep beside the stack, out of the stack's reach; zero at first, and kept from user to user.
  static constexpr std::size_t kRecordBytes = 64;

  // As asked for; ends at the top of the slot.
  vm::PageRange stack() const { return {range_.end - stack_pages_, range_.end}; }
  // At least as much as was asked for.
  vm::PageRange guard() const { return {range_.first, range_.first + guard_pages_}; }
  void* record() { return record_; }

 private:
  friend class StackPool;
  enum class State : std::uint8_t { kFree, kInUse };

  vm::PageRange range_;  // written when it is carved, before anybody else can know it
  StackSlot* next_ = nullptr;  // of its list, under that list's lock
  vm::Pages guard_pages_;      // written by the owner, as the next
  vm::Pages stack_pages_;
  std::uint32_t size_class_ = 0;
  bool guarded_by_protection_ = false;
  // kInUse is released by Acquire, after everything above was written, and acquired by Find.
  std::atomic<State> state_{State::kFree};
  alignas(16) std::byte record_[kRecordBytes] = {};
};

struct StackPoolStats {
  std::uint64_t slots = 0;     // carved
  std::uint64_t in_use = 0;
  std::uint64_t arenas = 0;
  std::uint64_t discards = 0;  // of released stacks' memory
};

class StackPool {
 public:
  // What the last user may have left resident below the hot top.
  enum class Residue : std::uint8_t { kUnknown, kNone };
  // Of a free stack, this much stays resident at its top for the next user.
  static constexpr std::size_t kHotPages = 16;
  // And only of so many in each list; more are given back whole.
  static constexpr std::uint32_t kHotSlots = 32;

  // Errors: kNoRoom, kNoMetadata, kSystem. REQUIRES: `space` outlives the pool.
  static vm::Result<StackPool*> Create(vm::AddressSpace& space);
  // Gives everything back. REQUIRES: nobody uses the pool or a stack of it any more.
  static void Destroy(StackPool* pool);
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;

  // A stack of `size` bytes, with `guard` bytes below that trap. There is always a guard of at least a page. Contents
  // are whatever they are. Errors: kEmpty (size), kUnaligned (to pages), kOverflow, kNoRoom, kNoMetadata, kSystem (the
  // kernel refused memory, or the guard); nothing is lost then.
  vm::Result<StackSlot*> Acquire(vm::Bytes size, vm::Bytes guard = {vm::kPageSize});

  // Gives `slot` back, and, unless `residue` says that there is nothing, what is resident of it below the hot top.
  // REQUIRES: in use, and nothing runs on it any more; else the program stops.
  void Release(StackSlot* slot, Residue residue = Residue::kUnknown);

  // Gives back what is resident of a stack in use, from `limit` down; for its user, who knows that nothing below
  // matters.
  void DiscardBelow(StackSlot* slot, vm::PageNumber limit);

  // The stack in use that holds `address`, its guard included; null if there is none.
  StackSlot* Find(const void* address) const;

  // Calls visit(slot) for every stack in use. REQUIRES: nobody else uses the pool, as in the child of a fork.
  template <typename Visit>
  void ForEachInUse(Visit visit) {
    for (Span* span = spans_; span != nullptr; span = span->older) {
      for (StackSlot* slot = span->slots; slot != span->slots + span->carved; ++slot) {
        if (slot->state_.load(std::memory_order_relaxed) == StackSlot::State::kInUse) visit(slot);
      }
    }
  }

  // A hint while others use the pool.
  StackPoolStats Stats() const;

  // fork(2): to be called before those of heap and space, and after them in parent and child. The child has all
  // stacks in use that the parent has: who knows which of them belong to threads, which it does not have, releases
  // those (ForEachInUse). A slot that another thread was just acquiring or releasing is abandoned there.
  void PrepareFork();
  void ParentAfterFork();
  void ChildAfterFork();

 private:
  // What arenas are cut into: spans begin and end at units.
  static constexpr std::size_t kUnitPages = vm::MiB(1).value / vm::kPageSize;
  static constexpr std::size_t kClassSteps = 16;
  static constexpr std::size_t kClasses = 352;
  static constexpr std::size_t kMaxShards = 16;

  // A row of slots of one class.
  struct Span {
    Span* older = nullptr;
    vm::PageRange range;
    vm::Pages slot_pages;
    StackSlot* slots = nullptr;
    std::size_t slot_count = 0;
    std::size_t carved = 0;  // under carve_lock_
  };

  // One mapping of the space: readable and writable up to `used`, without access above.
  struct Arena {
    Arena* older = nullptr;
    vm::PageRange range;
    vm::PageRange table;  // what `units` lies in
    // By unit, the span there; stored with release when the span is complete.
    std::atomic<Span*>* units = nullptr;
    vm::PageNumber used;  // under carve_lock_
  };

  // Memory for records.
  struct Block {
    Block* older;
    vm::PageRange range;
  };

  // The free slots of one class: resident ones first.
  struct FreeList {
    // Read without the lock, to pass over an empty list.
    std::atomic<StackSlot*> hot{nullptr};
    std::atomic<StackSlot*> cold{nullptr};
    std::uint32_t hot_count = 0;
  };
  struct alignas(vm::kCacheLineSize) Shard {
    vm::sync::SpinLock lock{vm::sync::LockRank::kRuntime};
    FreeList lists[kClasses];  // contents under `lock`
    // Acquired minus released here: only the sum over all shards means anything. Relaxed.
    std::atomic<std::int64_t> in_use{0};
  };

  static std::size_t ClassOf(vm::Pages pages);
  static vm::Pages PagesOf(std::size_t size_class);

  StackPool(vm::AddressSpace& space, std::size_t shard_count) : space_(space), shard_count_(shard_count) {}

  Shard& OwnShard() { return shards_[space_.kernel().CurrentCpu() & (shard_count_ - 1)]; }
  StackSlot* Take(std::size_t size_class);
  static StackSlot* TakeFrom(Shard& shard, std::size_t size_class);
  void Put(StackSlot* slot);

  vm::Result<StackSlot*> Carve(std::size_t size_class);
  vm::Result<Span*> AddSpan(std::size_t size_class) ABSL_EXCLUSIVE_LOCKS_REQUIRED(carve_lock_);
  vm::Result<Span*> AddSpanOf(std::size_t size_class, std::size_t slot_count)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(carve_lock_);
  // The newest arena, with room for `pages` more.
  vm::Result<Arena*> ArenaFor(vm::Pages pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(carve_lock_);
  // Zeroed; null when there is no memory.
  void* AllocateRecord(std::size_t bytes, std::size_t alignment) ABSL_EXCLUSIVE_LOCKS_REQUIRED(carve_lock_);

  // Gives a slot that nobody else knows a guard of at least `guard` pages that leaves `stack` pages. Errors: kSystem;
  // then it is as it was.
  vm::Error FitGuard(StackSlot* slot, vm::Pages guard, vm::Pages stack);
  vm::Error SetGuard(StackSlot* slot, vm::Pages pages);
  void Discard(vm::PageRange range);

  vm::AddressSpace& space_;
  const std::size_t shard_count_;  // a power of two
  vm::PageRange memory_;           // where the pool itself lies

  // Held over system calls.
  vm::sync::SpinLock carve_lock_{vm::sync::LockRank::kRuntime};
  // Written under carve_lock_; release, for Find.
  std::atomic<Arena*> arenas_{nullptr};
  Span* spans_ = nullptr;  // under carve_lock_; newest first
  Span* open_spans_[kClasses] ABSL_GUARDED_BY(carve_lock_) = {};
  std::uint64_t carved_by_class_[kClasses] ABSL_GUARDED_BY(carve_lock_) = {};
  Block* blocks_ = nullptr;  // under carve_lock_
  std::size_t block_used_ ABSL_GUARDED_BY(carve_lock_) = 0;

  std::atomic<std::uint64_t> slots_{0};   // written under carve_lock_
  std::atomic<std::uint64_t> arena_count_{0};
  std::atomic<std::uint64_t> discards_{0};  // relaxed, any thread

  Shard shards_[];
};

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_STACK_POOL_H_
