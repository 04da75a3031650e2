// Protect: lock the range exclusively, check that all of it is mapped, cut at its borders, let the kernel change
// the protection under the range lock only, record it.
//
// In a heap zone this splits the zone's kernel VMA until the memory is unmapped or made read-write again:
// correctness comes first, and AddressSpaceStats::heap_splits counts it. Memory that is meant to be protected
// should be mapped so from the start, in the mapping zone.
#include "vm/backing.h"
#include "vm/file_mapping.h"
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
  if (const Error error = shared_.kernel->Protect(part, protection); !error.ok()) {
    RestoreProtection(part, guard);
    EndBusy(first, end);
    return error;
  }
  PrefetchHoldCode();
  for (RegionPage page = first; page < end;) {
    Warm(range_.first + Pages{page});
    sync::SpinLockHolder holder(tree_lock_);
    RecordProtectionLocked(first, end, protection, page);
  }
  return Error::Ok();
}

Result<bool> Region::ProtectionDiffers(RegionPage first, RegionPage end, os::Protection protection) const {
  const bool writable = Has(protection, os::Protection::kWrite);
  bool differs = false;
  const Error error = LookAtMapped(first, end, [&](const Vma& vma) {
    const VmaAttributes now = vma.attributes();
    if (now.backing != nullptr && !now.backing->Allows(protection)) return Error{ErrorCode::kDenied};
    if (now.protection == protection) return Error::Ok();
    NoteChange(now.backing, writable ? FileChange::kWritable : FileChange::kAttributes);
    differs = true;
    return Error::Ok();
  });
  if (!error.ok()) return error;
  return differs;
}

void Region::RecordProtectionLocked(RegionPage first, RegionPage end, os::Protection protection, RegionPage& page) {
  const bool splits = is_heap() && protection != os::Protection::kReadWrite;
  ChangeBusyLocked(first, end, page, [&](Vma& vma) {
    VmaWriter(vma).SetProtection(protection);
    // In the mapping zone, content stays behind a protection of kNone: it needs a reset like any other.
    vma.kernel_vma = splits || !is_heap();
  });
  if (splits && page >= end) heap_splits_.Add(1);
}

}  // namespace freehold::vm
