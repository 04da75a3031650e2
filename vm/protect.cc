// Protect: lock the range exclusively, check that all of it is mapped, cut at its borders, let the kernel change
// the protection under the range lock only, record it.
//
// In a heap zone this splits the zone's kernel VMA until the memory is unmapped or made read-write again:
// correctness comes first, and AddressSpaceStats::heap_splits counts it. Memory that is meant to be protected
// should be mapped so from the start, in the mapping zone.
#include "vm/os/check.h"
#include "vm/region.h"

namespace freehold::vm {

Error Region::Protect(PageRange part, os::Protection protection) {
  const Guard guard(range_lock_, part, Mode::kExclusive, sync::Operation::kProtect);
  const RegionPage first = ToRegion(part.first);
  const RegionPage end = ToRegion(part.end);
  for (bool ready = false; !ready;) {
    {
      sync::SpinLockHolder holder(tree_lock_);
      bool changes = false;
      for (const Vma* vma = tree_.Find(first).vma(); vma != nullptr && vma->first_page() < end;
           vma = NextLocked(vma)) {
        if (!vma->Is(VmaState::kMapped)) return {ErrorCode::kNotMapped};
        changes = changes || vma->protection.load(std::memory_order_relaxed) != protection;
      }
      if (!changes) return Error::Ok();
      ready = HasMetadataLocked();
      if (ready) {
        IsolateLocked(first, end);
        SetBusyLocked(first, end, true);
      }
    }
    if (ready) break;
    if (const Error error = Refill(); !error.ok()) return error;
  }
  const Error error = shared_.kernel->Protect(part, protection);
  if (!error.ok()) RestoreProtection(part, guard);
  sync::SpinLockHolder holder(tree_lock_);
  SetBusyLocked(first, end, false);
  if (error.ok()) {
    const bool kernel_vma =
        is_heap() ? protection != os::Protection::kReadWrite : protection != os::Protection::kNone;
    for (Vma* vma = tree_.Find(first).vma(); vma != nullptr && vma->first_page() < end;
         vma = NextLocked(vma)) {
      VmaWriter(*vma).SetProtection(protection);
      // In the mapping zone, content stays behind a protection of kNone: it needs a reset like any other.
      vma->kernel_vma = kernel_vma || !is_heap();
    }
    if (is_heap() && kernel_vma) heap_splits_.Add(1);
  }
  MergeMappedLocked(first, end);
  return error;
}

}  // namespace freehold::vm
