// Protect: lock the range exclusively, check that all of it is mapped, cut at its borders, let the kernel change
// the protection under the range lock only, record it.
//
// In a heap zone this splits the zone's kernel VMA until the memory is unmapped or made read-write again:
// correctness comes first, and AddressSpaceStats::heap_splits counts it. Memory that is meant to be protected
// should be mapped so from the start, in the mapping zone.
#include <algorithm>

#include "vm/backing.h"
#include "vm/os/check.h"
#include "vm/region.h"

namespace freehold::vm {

Error Region::Protect(PageRange part, os::Protection protection) {
  const Guard guard(range_lock_, part, Mode::kExclusive, sync::Operation::kProtect);
  const RegionPage first = ToRegion(part.first);
  const RegionPage end = ToRegion(part.end);
  const Result<bool> differs = ProtectionDiffers(first, end, protection);
  if (!differs.ok()) return differs.error();
  if (!*differs) return Error::Ok();
  if (!shared_.notifiers->empty()) Invalidate(part, Invalidation::kProtect, guard);
  if (const Error error = MakeBusy(first, end); !error.ok()) return error;
  const Error error = shared_.kernel->Protect(part, protection);
  if (error.ok()) {
    RecordProtection(first, end, protection);
    return error;
  }
  RestoreProtection(part, guard);
  EndBusy(first, end);
  return error;
}

// The range is held: what is mapped stays so from one hold of the tree lock to the next.
Result<bool> Region::ProtectionDiffers(RegionPage first, RegionPage end, os::Protection protection) const {
  bool differs = false;
  for (RegionPage page = first; page < end;) {
    sync::SpinLockHolder holder(tree_lock_);
    for (int visits = 0; page < end && visits < kExtentsPerHold; ++visits) {
      const Vma* vma = tree_.Find(page).vma();
      page = vma->end_page();
      if (!vma->Is(VmaState::kMapped)) return ErrorCode::kNotMapped;
      const Backing* backing = vma->attributes().backing;
      if (backing != nullptr && !backing->Allows(protection)) return ErrorCode::kDenied;
      differs = differs || vma->protection.load(std::memory_order_relaxed) != protection;
    }
  }
  return differs;
}

void Region::RecordProtection(RegionPage first, RegionPage end, os::Protection protection) {
  for (RegionPage page = first; page < end;) {
    sync::SpinLockHolder holder(tree_lock_);
    RecordProtectionLocked(first, end, protection, page);
  }
}

// Up to kExtentsPerHold extents from `page` on. Ends SetBusyLocked when it has come to the end.
void Region::RecordProtectionLocked(RegionPage first, RegionPage end, os::Protection protection, RegionPage& page) {
  const bool kernel_vma =
      is_heap() ? protection != os::Protection::kReadWrite : protection != os::Protection::kNone;
  const RegionPage from = page;
  for (int visits = 0; page < end && visits < kExtentsPerHold; ++visits) {
    Vma* vma = tree_.Find(page).vma();
    page = vma->end_page();
    VmaWriter(*vma).SetProtection(protection);
    changes_.Add(1);
    // In the mapping zone, content stays behind a protection of kNone: it needs a reset like any other.
    vma->kernel_vma = kernel_vma || !is_heap();
  }
  if (page >= end) {
    SetBusyLocked(first, end, false);
    if (is_heap() && kernel_vma) heap_splits_.Add(1);
    MergeMappedLocked(first, first + 1);
  }
  MergeMappedLocked(from, std::min(page, end));
}

}  // namespace freehold::vm
