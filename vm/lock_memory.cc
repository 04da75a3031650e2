// LockMemory, UnlockMemory and their forms for the whole space: the same steps as Protect, with the lock as the
// attribute. Pages are made present afterwards, chunk by chunk, when every lock is dropped (DESIGN §7).
//
// In a heap zone this splits the zone's kernel VMA until the memory is unlocked or unmapped, which unlocks it
// before the extent can be used again: AddressSpaceStats::heap_splits counts it.
#include <algorithm>

#include "vm/address_space.h"
#include "vm/file_mapping.h"
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
  const bool locks = lock != MemoryLock::kNone;
  bool differs = false;
  bool differs_in_kernel = false;  // to which both kinds of lock are one
  const Error refusal = LookAtMapped(first, end, [&](const Vma& vma) {
    if (locks) NoteChange(vma.attributes().backing, FileChange::kLocked);
    differs = differs || vma.attributes().lock != lock;
    differs_in_kernel = differs_in_kernel || vma.locked() != locks;
    return Error::Ok();
  });
  if (!refusal.ok() || !differs) return refusal;
  if (const Error error = MakeBusy(first, end); !error.ok()) return error;
  if (differs_in_kernel) {
    if (const Error error = LockInKernel(part, lock); !error.ok()) {
      RestoreLocks(part, guard);
      EndBusy(first, end);
      return error;
    }
    if (is_heap() && locks) {
      sync::SpinLockHolder holder(tree_lock_);
      heap_splits_.Add(1);
    }
  }
  ChangeBusy(first, end, [&](Vma& vma) {
    VmaWriter(vma).SetLock(lock);
    // In the mapping zone the reset of an unmap is what unlocks.
    vma.kernel_vma = vma.kernel_vma || !is_heap();
  });
  return Error::Ok();
}

Error Region::LockInKernel(PageRange range, MemoryLock lock) {
  return lock == MemoryLock::kNone ? shared_.kernel->UnlockMemory(range) : shared_.kernel->LockMemory(range);
}

// A refusal leaves more locked than promised or less, until it is unmapped or used again.
void Region::RestoreLocks(PageRange range, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(range, Mode::kExclusive));
  for (PageNumber page = range.first; page < range.end;) {
    VmaState state;
    const VmaInfo extent = LookupExtent(page, state);
    const PageRange part = extent.range.Intersect(range);
    page = part.end;
    if (!LockInKernel(part, extent.lock).ok()) ResetLater(part, guard);
  }
}

}  // namespace freehold::vm
