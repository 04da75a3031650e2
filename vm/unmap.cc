// Unmap: lock the range exclusively, take the VMAs away from lookups, kExtentsPerHold in a critical section,
// downgrade, do the kernel's work, let the extents be re-used.
//
// In heap zones there is usually no kernel's work: pages stay resident and the extent goes to a bin. Strict
// unmap, protections of their own and the mapping zone have some; then the extents are kDetached meanwhile,
// which only this verb's range guard protects.
#include <algorithm>

#include "vm/backing.h"
#include "vm/os/check.h"
#include "vm/region.h"

namespace freehold::vm {
namespace {

// A guard takes an entry in a page table for each page: 2 MiB of tables for this.
constexpr Bytes kMostGuarded = GiB(1);

}  // namespace

inline bool Region::WantsSample(RegionPage count) {
  return is_heap() && !shared_.options->strict_unmap && ABSL_TS_UNCHECKED_READ(free_).WantsSample(count);
}

// Whoever holds the range has looked at the tree under its lock since (LookupHeld), or will. If that was before,
// the lock makes the holder visible here; if it comes after, it finds nothing mapped.
ABSL_ATTRIBUTE_ALWAYS_INLINE inline bool Region::UnmapWhole(RegionPage first, RegionPage count, bool& over_limit) {
  sync::SpinLockHolder holder(tree_lock_);
  if (range_lock_.MayBeHeld(ToAbsolute(first, count)) || IsPinnedLocked(ToAbsolute(first, count))) return false;
  if (!RetireWholeLocked(first, count, kNoSample)) return false;
  unmaps_.Add(1);
  over_limit = OverFreeLimit();
  return true;
}

Error Region::Unmap(PageRange part, const VmaInfo* only) {
  bool over_limit = false;
  // Not as a range: GCC would put that into memory and read both halves at once, which waits for the two stores.
  const RegionPage first = ToRegion(part.first);
  const RegionPage count = ToRegion(part.end) - first;
  const bool sample = WantsSample(count);
  bool whole = !sample && shared_.notifiers->empty() && only == nullptr;
  // Of small ones, the caches have seen the map.
  if (ABSL_PREDICT_FALSE(count >= kPagesPerHugePage)) {
    whole = whole && range_lock_.KnowsHolders(part);
    PrefetchHoldCode();
    Warm(part.first);
  }
  if (ABSL_PREDICT_FALSE(!whole || !UnmapWhole(first, count, over_limit))) {
    if (const Error error = UnmapHeld(part, only, sample, over_limit); !error.ok()) return error;
  }
  if (ABSL_PREDICT_FALSE(over_limit)) TrimFree();
  return Error::Ok();
}

Error Region::UnmapHeld(PageRange part, const VmaInfo* only, bool sample, bool& over_limit) {
  bool pinned = false;
  const bool notified = !shared_.notifiers->empty();
  const RegionPage first = ToRegion(part.first);
  const auto count = static_cast<RegionPage>(part.count().value);
  {
    Guard guard(range_lock_, part, Mode::kExclusive, sync::Operation::kUnmap);
    if (only != nullptr && !IsStill(part, *only, guard)) return {ErrorCode::kReplaced};
    if (notified) Invalidate(part, Invalidation::kUnmap, guard);
    const std::size_t sampled = sample ? SampleResidency(part) : kNoSample;
    Detachment detachment;
    for (bool started = false, done = false; !done;) {
      Warm(started ? range_.first + Pages{detachment.next} : part.first);
      {
        sync::SpinLockHolder holder(tree_lock_);
        if (!started) {
          // No pin comes while the range is held exclusively.
          pinned = IsPinnedLocked(part);
          done = !pinned && !notified && RetireWholeLocked(first, count, sampled);
          started = done || HasMetadataLocked() || !IsCutLocked(part);
          if (started && !done) detachment = StartDetachLocked(part, pinned, notified);
        }
        if (started && !done) done = DetachLocked(detachment);
        over_limit = OverFreeLimit();
        if (done) unmaps_.Add(1);
      }
      if (started) continue;
      if (const Error error = Refill(); !error.ok()) return error;
    }
    if (detachment.zap) {
      if (notified) shared_.notifiers->Close(part);
      guard.Downgrade();
      if (const Error error = ZapDetached(part, detachment, guard); !error.ok()) {
        RemapDetached(part);
        if (notified) TakeBackClose(part, guard);
        return error;
      }
    }
  }
  // What lies beside the pinned extents waits for nobody.
  if (pinned) RetryDeferred();
  return Error::Ok();
}

std::size_t Region::SampleResidency(PageRange part) {
  const Pages pages = {SampledPages(part.count().value)};
  const Result<Pages> resident = shared_.kernel->CountResident(PageRange::Of(part.first, pages));
  return resident.ok() ? resident->value : kNoSample;
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
Region::Detachment Region::StartDetachLocked(PageRange part, bool pinned, bool notified) {
  const RegionPage first = ToRegion(part.first);
  const RegionPage end = ToRegion(part.end);
  // Free extents that cross the borders stay as they are.
  for (const RegionPage border : {first, end}) {
    if (border == range_.count().value) break;
    Vma* vma = tree_.Find(border).vma();
    if (vma->Is(VmaState::kMapped) && vma->first_page() < border) SplitLocked(vma, border);
  }
  return {.next = first, .end = end, .newest = last_generation_, .pinned = pinned, .notified = notified};
}

// Whoever maps in a hole of the range needs no range lock (MapOnce): such a mapping has a newer generation.
bool Region::DetachLocked(Detachment& detachment) {
  RegionPage page = detachment.next;
  for (int visits = 0; page < detachment.end && visits < kExtentsPerHold; ++visits) {
    Vma* vma = tree_.Find(page).vma();
    page = vma->end_page();
    // The reset takes it away from the kernel, or a part of it.
    if (vma->Is(VmaState::kWindow)) AbandonWindowLocked(vma);
    if (!vma->Is(VmaState::kMapped) || vma->generation.load(std::memory_order_relaxed) > detachment.newest) {
      continue;
    }
    vma->busy = false;
    if (!detachment.pinned && !detachment.notified && !NeedsZap(*vma)) {
      RetireLocked(vma);
      continue;
    }
    changes_.Add(1);
    mapped_pages_.Subtract(vma->page_count());
    vmas_.Subtract(1);
    if (detachment.pinned) {
      if (IsPinnedLocked(RangeOf(*vma))) {
        DeferLocked(vma);
      } else {
        RetryLaterLocked(vma);
      }
      continue;
    }
    SetStateLocked(vma, VmaState::kDetached);
    NoteDetached(*vma, detachment);
  }
  detachment.next = page;
  if (page >= detachment.end) return true;
  // Its neighbour beyond the range may be a part of the same mapping, and somebody may merge there meanwhile.
  Vma* last = tree_.Find(detachment.end - 1).vma();
  if (last->Is(VmaState::kMapped) && last->generation.load(std::memory_order_relaxed) <= detachment.newest) {
    last->busy = true;
  }
  return false;
}

// Holes are nobody's mapping.
void Region::TakeBackClose(PageRange range, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(range, Mode::kShared));
  for (PageNumber page = range.first; page < range.end;) {
    VmaState state;
    const PageRange extent = LookupExtent(page, state).range;
    if (state == VmaState::kMapped) shared_.notifiers->Map(extent.Intersect(range));
    page = extent.end;
  }
}

void Region::Invalidate(PageRange range, Invalidation what, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(range, Mode::kShared));
  for (PageNumber page = range.first; page < range.end;) {
    VmaState state;
    const PageRange extent = LookupExtent(page, state).range;
    if (state == VmaState::kMapped) shared_.notifiers->Invalidate(extent.Intersect(range), what);
    page = extent.end;
  }
}

bool Region::NeedsZap(const Vma& vma) const {
  return !is_heap() || !vma.is_zones_own() || shared_.options->strict_unmap;
}

void Region::NoteDetached(const Vma& vma, Detachment& detachment) const {
  detachment.zap = true;
  detachment.backed = detachment.backed || vma.attributes().backing != nullptr;
  detachment.reset = detachment.reset || (!is_heap() && !vma.is_zones_own());
}

Error Region::ZapDetached(PageRange part, const Detachment& detachment, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(part, Mode::kShared));
  // In the mapping zone one call resets all of the part, or fails, and then nothing is lost. Nothing but this verb's
  // own extents has pages or protections in the part: others map under the range. Without anything that was ever
  // accessible there is no call.
  if (detachment.backed) FlushBackings(part, guard);
  if (detachment.reset) {
    if (const Error error = shared_.kernel->Reset(part); !error.ok()) return error;
    PrefetchHoldCode();
  }
  for (PageNumber page = part.first; page < part.end;) {
    VmaState state;
    const VmaInfo detached = LookupExtent(page, state);
    const PageRange extent = detached.range;
    page = extent.end;
    if (state != VmaState::kDetached) continue;
    Vma* vma;
    bool foreign;
    bool needs_zap;
    {
      sync::SpinLockHolder holder(tree_lock_);
      vma = tree_.Find(ToRegion(extent.first)).vma();
      foreign = vma->foreign || vma->unrestored;
      needs_zap = NeedsZap(*vma);
    }
    // A reset drops content and locks: that of the whole part, or the extent's own.
    bool clean = !is_heap();
    bool restored = true;
    bool unlocked = true;
    if (needs_zap && is_heap()) {
      const bool replaced = foreign && ReplaceForeign(extent).ok();
      foreign = foreign && !replaced;
      clean = replaced;
      if (!replaced && detached.lock != os::MemoryLock::kNone) unlocked = shared_.kernel->UnlockMemory(extent).ok();
      restored = shared_.kernel->Protect(extent, os::Protection::kReadWrite).ok();
      if (shared_.options->strict_unmap) clean = Trap(extent) || clean;
      PrefetchHoldCode();
    }
    DroppedPages<1> dropped;
    Warm(extent.first);
    sync::SpinLockHolder holder(tree_lock_);
    dropped.Add(detached.backing, vma->page_count());
    vma->kernel_vma = !restored;
    vma->foreign = foreign && is_heap();
    vma->unrestored = false;
    VmaWriter(*vma).SetBacking(nullptr, 0);
    if (unlocked) VmaWriter(*vma).SetLock(os::MemoryLock::kNone);
    if (clean && vma->is_zones_own()) {
      FreeLocked(vma);
    } else {
      CacheLocked(vma, Knowledge::kUnknown);
    }
  }
  return Error::Ok();
}

// A kernel without huge pages does without the advice.
Error Region::ReplaceForeign(PageRange range) {
  if (const Error error = shared_.kernel->Reset(range); !error.ok()) return error;
  if (zone_ == Zone::kDense && shared_.kernel->features().huge_pages) {
    (void)shared_.kernel->AdviseHugePages(range, os::HugePages::kPrefer);
  }
  return Error::Ok();
}

// Strict unmap: accesses to `range` trap from now on; its content is gone. False when the kernel refuses.
bool Region::Trap(PageRange range) {
  const bool guards = shared_.kernel->features().guard_regions && range.count().bytes() <= kMostGuarded;
  if (guards && shared_.kernel->InstallGuard(range).ok()) return true;
  return shared_.purge_stage->Discard({&range, 1}).ok() &&
         shared_.kernel->Protect(range, os::Protection::kNone).ok();
}

// A failed Unmap: everything is mapped as it was.
void Region::RemapDetached(PageRange part) {
  const RegionPage end = ToRegion(part.end);
  for (RegionPage page = ToRegion(part.first); page < end;) {
    sync::SpinLockHolder holder(tree_lock_);
    const RegionPage from = page;
    for (int visits = 0; page < end && visits < kExtentsPerHold; ++visits) {
      Vma* vma = tree_.Find(page).vma();
      page = vma->end_page();
      if (!vma->Is(VmaState::kDetached)) continue;
      SetStateLocked(vma, VmaState::kMapped);
      changes_.Add(1);
      mapped_pages_.Add(vma->page_count());
      vmas_.Add(1);
    }
    MergeMappedLocked(from, std::min(page, end));
    if (page >= end) unmaps_.Subtract(1);
  }
}

}  // namespace freehold::vm
