// Pins, and unmaps that wait for them.
//
// The pins of a region are an interval tree under its tree lock. A pin enters while it holds its range shared, and
// after it has seen under the tree lock that all of it is mapped; every verb that takes pages away looks for pins
// under the tree lock while it holds the range exclusively, or sees there that nobody holds it (UnmapWhole). So one
// of the two comes first, and the other sees it.
//
// What an Unmap finds pinned becomes kDeferred: out of every lookup and of every bin. Whoever removes the last pin
// does what Unmap left undone. So does the Unmap itself, at its end, for the extents beside those that are pinned. What
// the kernel refuses then stays deferred, and Tick tries again.
#include "vm/pin.h"

#include <algorithm>

#include "vm/address_space.h"
#include "vm/os/check.h"
#include "vm/os/thread_id.h"
#include "vm/region.h"

namespace freehold::vm {

Pin::Pin(AddressSpace& space, PageRange range)
    : request_(range, sync::LockMode::kShared, sync::Operation::kPin, os::CurrentThreadId()) {
  error_ = space.CheckRange(range);
  if (!error_.ok()) return;
  Region* region = space.RegionOf(range.first);
  error_ = region->range().Contains(range) ? region->Enter(*this) : Error{ErrorCode::kOutsideReservation};
  if (error_.ok()) region_ = region;
}

Pin::~Pin() {
  if (region_ != nullptr) region_->Leave(*this);
}

Error Region::Enter(Pin& pin) {
  const PageRange range = pin.range();
  const Guard guard(range_lock_, range, Mode::kShared, sync::Operation::kPin);
  const RegionPage end = ToRegion(range.end);
  for (RegionPage page = ToRegion(range.first);;) {
    sync::SpinLockHolder holder(tree_lock_);
    for (int visits = 0; page < end && visits < kExtentsPerHold; ++visits) {
      const Vma* vma = tree_.Find(page).vma();
      if (!vma->Is(VmaState::kMapped)) return {ErrorCode::kNotMapped};
      page = vma->end_page();
    }
    if (page < end) continue;
    (void)pins_.Enter(pin.request_);
    pin.forks_ = forks_;
    return Error::Ok();
  }
}

void Region::Leave(Pin& pin) {
  {
    sync::SpinLockHolder holder(tree_lock_);
    if (pin.forks_ != forks_) return;  // it was the parent's
    (void)pins_.Leave(pin.request_);
    if (deferred_extents_.get() == 0) return;
  }
  // Of a deferred extent that the pin overlaps, nothing else may be pinned any more.
  const PageRange range = pin.range();
  for (PageNumber page = range.first; page < range.end;) {
    VmaState state;
    const PageRange extent = LookupExtent(page, state).range;
    page = extent.end;
    if (state == VmaState::kDeferred) FinishDeferred(extent);
  }
}

bool Region::IsPinned(PageRange range) const {
  sync::SpinLockHolder holder(tree_lock_);
  return IsPinnedLocked(range);
}

void Region::DeferLocked(Vma* vma) {
  SetStateLocked(vma, VmaState::kDeferred);
  deferred_extents_.Add(1);
}

// Nobody's pin will finish it: RetryDeferred has to.
void Region::RetryLaterLocked(Vma* vma) {
  DeferLocked(vma);
  vma->older = unfinished_;
  unfinished_ = vma;
}

// Does nothing if a pin is left, or somebody else was faster. Deferred extents are never cut or merged.
void Region::FinishDeferred(PageRange extent) {
  FinishDeferredHeld(extent);
  FaultHooks* hooks = is_heap() ? nullptr : shared_.fault_hooks->load(std::memory_order_acquire);
  if (hooks != nullptr) hooks->AfterDrop(extent);
}

void Region::FinishDeferredHeld(PageRange extent) {
  const Guard guard(range_lock_, extent, Mode::kExclusive, sync::Operation::kUnmap);
  Detachment detachment;
  {
    sync::SpinLockHolder holder(tree_lock_);
    Vma* vma = tree_.Find(ToRegion(extent.first)).vma();
    if (!vma->Is(VmaState::kDeferred) || RangeOf(*vma) != extent || IsPinnedLocked(extent)) return;
    deferred_extents_.Subtract(1);
    SetStateLocked(vma, VmaState::kDetached);
    NoteDetached(*vma, detachment);
  }
  if (!shared_.notifiers->empty()) shared_.notifiers->Close(extent);
  if (ZapDetached(extent, detachment, guard).ok()) return;
  sync::SpinLockHolder holder(tree_lock_);
  RetryLaterLocked(tree_.Find(ToRegion(extent.first)).vma());
}

void Region::RetryDeferred() {
  Vma* vma;
  {
    sync::SpinLockHolder holder(tree_lock_);
    vma = unfinished_;
    unfinished_ = nullptr;
  }
  while (vma != nullptr) {
    // Still deferred: nobody else finishes what is in the list. Finished, it may be anybody's.
    Vma* const next = vma->older;
    vma->older = nullptr;
    FinishDeferred(RangeOf(*vma));
    vma = next;
  }
}

}  // namespace freehold::vm
