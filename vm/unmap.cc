// Unmap: lock the range exclusively, take the VMAs away from lookups in one critical section, downgrade, do
// the kernel's work, let the extents be re-used.
//
// In heap zones there is usually no kernel's work: pages stay resident and the extent goes to a bin. Strict
// unmap, protections of their own and the mapping zone have some; then the extents are kDetached meanwhile,
// which only this verb's range guard protects.
#include <algorithm>

#include "vm/os/check.h"
#include "vm/region.h"

namespace freehold::vm {
namespace {

// Pages that one residency sample looks at.
constexpr std::size_t kSamplePages = 512;

}  // namespace

Error Region::Unmap(PageRange part) {
  bool over_limit = false;
  const bool sample = WantsSample(part);
  if (sample || !UnmapWhole(part, over_limit)) {
    Guard guard(range_lock_, part, Mode::kExclusive, sync::Operation::kUnmap);
    const std::size_t sampled = sample ? SampleResidency(part) : kNoSample;
    bool zap = false;
    for (;;) {
      {
        sync::SpinLockHolder holder(tree_lock_);
        bool done = RetireWholeLocked(part, sampled);
        if (!done && (HasMetadataLocked() || !IsCutLocked(part))) {
          zap = DetachLocked(part);
          done = true;
        }
        over_limit = OverFreeLimit();
        if (done) {
          unmaps_.Add(1);
          break;
        }
      }
      if (const Error error = Refill(); !error.ok()) return error;
    }
    if (zap) {
      guard.Downgrade();
      if (const Error error = ZapDetached(part, guard); !error.ok()) return error;
    }
  }
  if (over_limit) {
    (void)PurgeFree(UINT32_MAX, {PagesFor(shared_.options->free_resident_limit).value / 2});
  }
  return Error::Ok();
}

// Whoever holds the range has looked at the tree under its lock since (LookupHeld), or will. If that was before,
// the lock makes the holder visible here; if it comes after, it finds nothing mapped.
bool Region::UnmapWhole(PageRange part, bool& over_limit) {
  sync::SpinLockHolder holder(tree_lock_);
  if (range_lock_.MayBeHeld(part) || !RetireWholeLocked(part, kNoSample)) return false;
  unmaps_.Add(1);
  over_limit = OverFreeLimit();
  return true;
}

bool Region::WantsSample(PageRange part) {
  return is_heap() && !shared_.options->strict_unmap &&
         ABSL_TS_UNCHECKED_READ(free_).WantsSample(static_cast<RegionPage>(part.count().value));
}

std::size_t Region::SampleResidency(PageRange part) {
  const Pages pages = {std::min(part.count().value, kSamplePages)};
  const Result<Pages> resident = shared_.kernel->CountResident(PageRange::Of(part.first, pages));
  return resident.ok() ? resident->value : kNoSample;
}

bool Region::RetireWholeLocked(PageRange part, std::size_t sampled) {
  Vma* vma = tree_.Find(ToRegion(part.first)).vma();
  if (!vma->Is(VmaState::kMapped) || RangeOf(*vma) != part || !is_heap() || vma->kernel_vma ||
      shared_.options->strict_unmap) {
    return false;
  }
  // What Map itself filled with zeroes is resident anyway: only other extents tell what users do.
  if (vma->knowledge == Knowledge::kResident) {
    free_.SkipSample(vma->page_count());
  } else if (sampled != kNoSample) {
    free_.AddSample(vma->page_count(), sampled, std::min<std::size_t>(vma->page_count(), kSamplePages));
  }
  RetireLocked(vma);
  return true;
}

void Region::RetireLocked(Vma* vma) {
  mapped_pages_.Subtract(vma->page_count());
  vmas_.Subtract(1);
  CacheLocked(vma, vma->knowledge == Knowledge::kResident ? Knowledge::kResident : Knowledge::kUnknown);
}

bool Region::IsCutLocked(PageRange part) const {
  for (const PageNumber border : {part.first, part.end}) {
    if (border == range_.end) break;
    const Vma* vma = tree_.Find(ToRegion(border)).vma();
    if (vma->Is(VmaState::kMapped) && vma->first_page() < ToRegion(border)) return true;
  }
  return false;
}

//   before   |  A  |  hole  |  B     |        A, B mapped
//               part.first      part.end
//   after    | A|d |  hole  | d |  B |        d: detached, or free at once
bool Region::DetachLocked(PageRange part) {
  const RegionPage first = ToRegion(part.first);
  const RegionPage end = ToRegion(part.end);
  // Free extents that cross the borders stay as they are.
  for (const RegionPage border : {first, end}) {
    if (border == range_.count().value) break;
    Vma* vma = tree_.Find(border).vma();
    if (vma->Is(VmaState::kMapped) && vma->first_page() < border) SplitLocked(vma, border);
  }
  // In the mapping zone one call resets all of the part, or fails, and then all of it is mapped again: nothing
  // is free before. Without anything that was ever accessible there is no call.
  bool reset = false;
  for (const Vma* vma = tree_.Find(first).vma(); !is_heap() && vma != nullptr && vma->first_page() < end;
       vma = NextLocked(vma)) {
    reset = reset || (vma->Is(VmaState::kMapped) && vma->kernel_vma);
  }
  bool zap = false;
  for (RegionPage page = first; page < end;) {
    Vma* vma = tree_.Find(page).vma();
    page = vma->end_page();
    if (!vma->Is(VmaState::kMapped)) continue;
    if (is_heap() && !vma->kernel_vma && !shared_.options->strict_unmap) {
      RetireLocked(vma);
      continue;
    }
    mapped_pages_.Subtract(vma->page_count());
    vmas_.Subtract(1);
    if (!is_heap() && !reset) {
      FreeLocked(vma);
      continue;
    }
    SetStateLocked(vma, VmaState::kDetached);
    zap = true;
  }
  return zap;
}

Error Region::ZapDetached(PageRange part, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(part, Mode::kShared));
  // Nothing but this verb's own extents has pages or protections in the part: others map under the range.
  if (!is_heap()) {
    if (const Error error = shared_.kernel->Reset(part); !error.ok()) {
      RemapDetached(part);
      return error;
    }
  }
  for (PageNumber page = part.first; page < part.end;) {
    VmaState state;
    const PageRange extent = LookupExtent(page, state).range;
    page = extent.end;
    if (state != VmaState::kDetached) continue;
    bool clean = !is_heap();
    bool restored = true;
    if (is_heap()) {
      restored = shared_.kernel->Protect(extent, os::Protection::kReadWrite).ok();
      if (shared_.options->strict_unmap) clean = Trap(extent);
    }
    sync::SpinLockHolder holder(tree_lock_);
    Vma* vma = tree_.Find(ToRegion(extent.first)).vma();
    vma->kernel_vma = !restored;
    if (clean && restored) {
      FreeLocked(vma);
    } else {
      CacheLocked(vma, Knowledge::kUnknown);
    }
  }
  return Error::Ok();
}

// Strict unmap: accesses to `range` trap from now on; its content is gone. False when the kernel refuses.
bool Region::Trap(PageRange range) {
  if (shared_.kernel->features().guard_regions && shared_.kernel->InstallGuard(range).ok()) return true;
  return shared_.purge_stage->Discard({&range, 1}).ok() &&
         shared_.kernel->Protect(range, os::Protection::kNone).ok();
}

// A failed Unmap: everything is mapped as it was.
void Region::RemapDetached(PageRange part) {
  sync::SpinLockHolder holder(tree_lock_);
  const RegionPage end = ToRegion(part.end);
  for (Vma* vma = tree_.Find(ToRegion(part.first)).vma(); vma != nullptr && vma->first_page() < end;
       vma = NextLocked(vma)) {
    if (!vma->Is(VmaState::kDetached)) continue;
    SetStateLocked(vma, VmaState::kMapped);
    mapped_pages_.Add(vma->page_count());
    vmas_.Add(1);
  }
  unmaps_.Subtract(1);
  MergeMappedLocked(ToRegion(part.first), end);
}

}  // namespace freehold::vm
