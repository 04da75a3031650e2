// LockMemory, UnlockMemory and their forms for the whole space: the same steps as Protect, with the lock as the
// attribute. Pages are made present afterwards, chunk by chunk, when every lock is dropped (DESIGN §7).
//
// In a heap zone this splits the zone's kernel VMA until the memory is unlocked or unmapped, which unlocks it
// before the extent can be used again: AddressSpaceStats::heap_splits counts it.
#include <algorithm>

#include "vm/address_space.h"
#include "vm/os/check.h"
#include "vm/region.h"

namespace freehold::vm {

using os::MemoryLock;

Error AddressSpace::LockMemory(PageRange range, MemoryLock lock) {
  if (lock == MemoryLock::kNone) return {ErrorCode::kEmpty};
  if (const Error error = SetMemoryLock(range, lock); !error.ok()) return error;
  // What somebody unmapped meanwhile is no error here.
  if (lock == MemoryLock::kLocked) (void)Advise(range, Advice::kWillNeed);
  return Error::Ok();
}

Error AddressSpace::UnlockMemory(PageRange range) { return SetMemoryLock(range, MemoryLock::kNone); }

Error AddressSpace::SetMemoryLock(PageRange range, MemoryLock lock) {
  if (const Error error = CheckRange(range); !error.ok()) return error;
  for (PageNumber page = range.first; page < range.end;) {
    Region* region = RegionOf(page);
    const PageRange part = region->range().Intersect(range);
    if (const Error error = region->SetMemoryLock(part, lock); !error.ok()) return error;
    page = part.end;
  }
  return Error::Ok();
}

Error AddressSpace::LockAll(const LockAllOptions& options) {
  if (options.lock == MemoryLock::kNone || !(options.current || options.future)) return {ErrorCode::kEmpty};
  // Future first: what is mapped while the walk goes on is locked either way.
  const MemoryLock before = future_lock_.exchange(options.future ? options.lock : MemoryLock::kNone,
                                                  std::memory_order_relaxed);
  if (!options.current) return Error::Ok();
  if (const Error error = SetMemoryLockOfAll(options.lock); !error.ok()) {
    future_lock_.store(before, std::memory_order_relaxed);
    return error;
  }
  if (options.lock == MemoryLock::kLocked) (void)Advise(reservation_, Advice::kWillNeed);
  return Error::Ok();
}

Error AddressSpace::UnlockAll() {
  future_lock_.store(MemoryLock::kNone, std::memory_order_relaxed);
  return SetMemoryLockOfAll(MemoryLock::kNone);
}

Error AddressSpace::SetMemoryLockOfAll(MemoryLock lock) {
  for (PageNumber page = reservation_.first; page < reservation_.end;) {
    VmaState state;
    const PageRange extent = RegionOf(page)->LookupExtent(page, state).range;
    if (state == VmaState::kMapped) {
      const Error error = SetMemoryLock({page, extent.end}, lock);
      // Part of it went before it was held: look again.
      if (error.code == ErrorCode::kNotMapped) continue;
      if (!error.ok()) return error;
    }
    page = extent.end;
  }
  return Error::Ok();
}

Error Region::SetMemoryLock(PageRange part, MemoryLock lock) {
  const Guard guard(range_lock_, part, Mode::kExclusive, sync::Operation::kMemoryLock);
  const RegionPage first = ToRegion(part.first);
  const RegionPage end = ToRegion(part.end);
  const Result<LockChange> change = LockDiffers(first, end, lock);
  if (!change.ok()) return change.error();
  if (!change->attribute) return Error::Ok();
  if (const Error error = MakeBusy(first, end); !error.ok()) return error;
  if (change->in_kernel) {
    if (const Error error = LockInKernel(part, lock); !error.ok()) {
      RestoreLocks(part, guard);
      EndBusy(first, end);
      return error;
    }
    if (is_heap() && lock != MemoryLock::kNone) {
      sync::SpinLockHolder holder(tree_lock_);
      heap_splits_.Add(1);
    }
  }
  RecordLock(first, end, lock);
  return Error::Ok();
}

// The range is held: what is mapped stays so from one hold of the tree lock to the next.
Result<Region::LockChange> Region::LockDiffers(RegionPage first, RegionPage end, MemoryLock lock) const {
  LockChange change;
  for (RegionPage page = first; page < end;) {
    sync::SpinLockHolder holder(tree_lock_);
    for (int visits = 0; page < end && visits < kExtentsPerHold; ++visits) {
      const Vma* vma = tree_.Find(page).vma();
      page = vma->end_page();
      if (!vma->Is(VmaState::kMapped)) return ErrorCode::kNotMapped;
      change.attribute = change.attribute || vma->lock.load(std::memory_order_relaxed) != lock;
      change.in_kernel = change.in_kernel || vma->locked() != (lock != MemoryLock::kNone);
    }
  }
  return change;
}

// Ends SetBusyLocked when it has come to the end.
void Region::RecordLock(RegionPage first, RegionPage end, MemoryLock lock) {
  for (RegionPage page = first; page < end;) {
    sync::SpinLockHolder holder(tree_lock_);
    const RegionPage from = page;
    for (int visits = 0; page < end && visits < kExtentsPerHold; ++visits) {
      Vma* vma = tree_.Find(page).vma();
      page = vma->end_page();
      VmaWriter(*vma).SetLock(lock);
      changes_.Add(1);
      // In the mapping zone the reset of an unmap is what unlocks.
      vma->kernel_vma = vma->kernel_vma || !is_heap();
    }
    if (page >= end) {
      SetBusyLocked(first, end, false);
      MergeMappedLocked(first, first + 1);
    }
    MergeMappedLocked(from, std::min(page, end));
  }
}

Error Region::LockInKernel(PageRange range, MemoryLock lock) {
  return lock == MemoryLock::kNone ? shared_.kernel->UnlockMemory(range) : shared_.kernel->LockMemory(range);
}

// A refusal leaves more locked than promised or less: nothing better is left to do.
void Region::RestoreLocks(PageRange range, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(range, Mode::kExclusive));
  for (PageNumber page = range.first; page < range.end;) {
    VmaState state;
    const VmaInfo extent = LookupExtent(page, state);
    (void)LockInKernel(extent.range.Intersect(range), extent.lock);
    page = extent.range.end;
  }
}

}  // namespace freehold::vm
