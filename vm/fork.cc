// fork(2): the child's copy of the space must be consistent, whatever other threads were doing.
//
// PrepareFork takes the fork lock (one thread forks at a time), keeps deferred callbacks from running, then takes
// every range exclusively, so that no verb is between its tree change and its kernel work, then the turn of the purge
// stage, then every tree lock, the pool of file backings and the list of notifiers. What is left half-done belongs to
// threads that hold no range yet: kPending extents whose Map still waits, and kPurging extents on their way to or from
// the stage. The parent's threads go on; the child takes those extents back.
#include "absl/base/thread_annotations.h"
#include "vm/address_space.h"
#include "vm/file_mapping.h"
#include "vm/os/thread_id.h"
#include "vm/region.h"

namespace freehold::vm {

// The guards of one fork, in the space's own metadata: no stack frame lives from prepare to the end.
struct AddressSpace::ForkGuards {
  alignas(sync::RangeLock::Guard) std::byte storage[kMaxRegions][sizeof(sync::RangeLock::Guard)];
  std::size_t size = 0;

  void Add(sync::RangeLock& lock, PageRange range) {
    new (storage[size++])
        sync::RangeLock::Guard(lock, range, sync::RangeLock::Mode::kExclusive, sync::Operation::kFork);
  }
  void Clear() {
    while (size > 0) {
      reinterpret_cast<sync::RangeLock::Guard*>(storage[--size])->~Guard();
    }
  }
};

Error AddressSpace::InitFork() {
  fork_guards_ = arena_->New<ForkGuards>();
  return fork_guards_ != nullptr ? Error::Ok() : Error{ErrorCode::kNoMetadata};
}

void AddressSpace::PrepareFork() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  // Threads may fork at the same time: libc runs fork handlers side by side.
  fork_lock_.LockForFork();
  epochs_.LockForFork();
  if (options_.lock_policy == sync::LockPolicy::kCoarse) {
    fork_guards_->Add(range_locks_->lock, reservation_);
  } else {
    for (Region* region : regions()) fork_guards_->Add(region->range_lock(), region->range());
  }
  purge_stage_->PrepareFork();
  for (Region* region : regions()) region->PrepareFork();
  file_backings_->PrepareFork();
  notifiers_.PrepareFork();
}

void AddressSpace::ParentAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  notifiers_.EndFork();
  file_backings_->AfterFork();
  for (Region* region : regions()) region->ParentAfterFork();
  purge_stage_->ParentAfterFork();
  fork_guards_->Clear();
  epochs_.UnlockAfterFork();
  fork_lock_.UnlockAfterFork();
}

void AddressSpace::ChildAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  os::ForgetThreadIdAfterFork();
  future_lock_.store(os::MemoryLock::kNone, std::memory_order_relaxed);
  notifiers_.EndFork();
  file_backings_->AfterFork();
  for (Region* region : regions()) region->ChildAfterFork();
  purge_stage_->ChildAfterFork();
  if (options_.lock_policy == sync::LockPolicy::kCoarse) {
    range_locks_->lock.ReinitAfterFork();
  } else {
    for (Region* region : regions()) region->range_lock().ReinitAfterFork();
  }
  fork_guards_->Clear();
  epochs_.ReinitAfterFork();
  fork_lock_.UnlockAfterFork();
  if (FaultHooks* hooks = fault_hooks_.load(std::memory_order_relaxed); hooks != nullptr) hooks->ChildAfterFork();
}

void Region::PrepareFork() ABSL_NO_THREAD_SAFETY_ANALYSIS { tree_lock_.LockForFork(); }

void Region::ParentAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS { tree_lock_.UnlockAfterFork(); }

// Still under the tree lock of PrepareFork. The child inherits no memory locks from the kernel, and no pins from us:
// their nodes lie on stacks and in objects of threads that it does not have.
void Region::ChildAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  ++forks_;
  pins_.Clear();
  unfinished_ = nullptr;
  for (RegionPage page = 0; page < range_.count().value;) {
    Vma* vma = tree_.Find(page).vma();
    page = vma->end_page();
    if (vma->locked()) VmaWriter(*vma).SetLock(os::MemoryLock::kNone);
    if (vma->Is(VmaState::kPending) || vma->Is(VmaState::kPurging)) GiveBackLocked(vma);
    if (!vma->Is(VmaState::kDeferred)) continue;
    vma->older = unfinished_;
    unfinished_ = vma;
  }
  MergeMappedLocked(0, static_cast<RegionPage>(range_.count().value));
  purges_in_flight_.store(0, std::memory_order_relaxed);
  tree_lock_.UnlockAfterFork();
}

}  // namespace freehold::vm
