// Transactions: lock all ranges; do of every step what can be undone; drop the content that is mapped over; make all
// of it visible under the tree locks of all regions concerned, hidden from lookups meanwhile; zap what was unmapped.
//
// Atomic to lookups: before the first step takes effect, every tree concerned is hidden, and none is shown again
// before the last step has. A lookup that begins in between waits for the tree lock of its region, and finds
// everything done. One that began before may find old or new; it runs beside the transaction, and may count as before
// or after it.
#include "vm/transaction.h"

#include <algorithm>
#include <new>
#include <optional>

#include "vm/backing.h"
#include "vm/os/check.h"
#include "vm/region.h"

namespace freehold::vm {

using Guard = sync::RangeLock::Guard;
using Mode = sync::RangeLock::Mode;

void Transaction::Add(const Step& step) {
  if (size_ < kMaxSteps) steps_[size_] = step;
  ++size_;
}

void Transaction::Map(PageRange range, const MapOptions& options) {
  Step step = {.verb = Verb::kMap, .range = range, .options = options};
  step.options.address = range.first.address();
  if (options.placement != Placement::kReplace) step.options.placement = Placement::kFixed;
  Add(step);
}

void Transaction::Unmap(PageRange range) { Add({.verb = Verb::kUnmap, .range = range, .options = {}}); }

void Transaction::Protect(PageRange range, os::Protection protection) {
  Step step = {.verb = Verb::kProtect, .range = range, .options = {}};
  step.options.protection = protection;
  Add(step);
}

// One Commit.
class Transaction::Run {
 public:
  Run(AddressSpace& space, Step* steps, std::size_t size) : space_(space), steps_(steps), size_(size) {}

  Error Check() const;
  Error Commit();

 private:
  Region& RegionOf(std::size_t i) const { return *space_.RegionOf(steps_[i].range.first); }
  // The lock is held for all the ranges of a region together: who waits for one while it holds another of the same
  // lock may be waited for by a request for both.
  const Guard& GuardOf(std::size_t i) const { return *guards_[guard_of_[i]]; }
  // Pages of pagers are only unmapped here: no Map replaces a backing.
  FaultHooks* HooksOf(std::size_t i) const {
    return steps_[i].verb == Verb::kUnmap ? space_.HooksFor(steps_[i].range) : nullptr;
  }
  void LockRanges();
  Error Prepare();
  Error PrepareStep(std::size_t i);
  void Cancel(std::size_t i);
  void Publish();

  AddressSpace& space_;
  Step* const steps_;
  const std::size_t size_;
  Region::Change changes_[kMaxSteps];
  std::optional<Guard> guards_[kMaxSteps];
  std::size_t guard_of_[kMaxSteps] = {};
};

Error Transaction::Run::Check() const {
  for (std::size_t i = 0; i < size_; ++i) {
    const Step& step = steps_[i];
    if (const Error error = space_.CheckRange(step.range); !error.ok()) return error;
    if (!RegionOf(i).range().Contains(step.range)) return {ErrorCode::kOutsideReservation};
    if (i > 0 && step.range.first < steps_[i - 1].range.end) return {ErrorCode::kOverlap};
    const Backing* backing = step.options.backing;
    if (backing != nullptr && !backing->Allows(step.options.protection)) return {ErrorCode::kDenied};
  }
  return Error::Ok();
}

void Transaction::Run::LockRanges() {
  std::size_t guards = 0;
  for (std::size_t i = 0; i < size_;) {
    sync::RangeLock& lock = RegionOf(i).range_lock();
    const std::size_t first = i;
    for (; i < size_ && &RegionOf(i).range_lock() == &lock; ++i) guard_of_[i] = guards;
    guards_[guards++].emplace(lock, PageRange{steps_[first].range.first, steps_[i - 1].range.end}, Mode::kExclusive,
                              sync::Operation::kTransaction);
  }
}

Error Transaction::Run::Prepare() {
  std::size_t done = 0;
  Error error;
  for (; done < size_ && error.ok(); ++done) error = PrepareStep(done);
  // The step that failed has undone what it did.
  if (!error.ok()) --done;
  // What of the content that is mapped over is dropped can only be lost.
  for (std::size_t i = 0; i < size_ && error.ok(); ++i) {
    if (steps_[i].verb == Verb::kMap) error = RegionOf(i).PrepareContent(changes_[i], steps_[i].options);
  }
  if (error.ok()) return error;
  while (done > 0) Cancel(--done);
  return error;
}

Error Transaction::Run::PrepareStep(std::size_t i) {
  const Step& step = steps_[i];
  Region& region = RegionOf(i);
  changes_[i].range = step.range;
  switch (step.verb) {
    case Verb::kMap: return region.PrepareMap(changes_[i], step.options, GuardOf(i));
    case Verb::kUnmap: return region.PrepareUnmap(changes_[i], GuardOf(i));
    case Verb::kProtect: return region.PrepareProtect(changes_[i], step.options.protection, GuardOf(i));
  }
  return Error::Ok();
}

void Transaction::Run::Cancel(std::size_t i) {
  switch (steps_[i].verb) {
    case Verb::kMap: RegionOf(i).CancelMap(changes_[i], steps_[i].options, GuardOf(i)); break;
    case Verb::kUnmap: RegionOf(i).CancelUnmap(changes_[i]); break;
    case Verb::kProtect: RegionOf(i).CancelProtect(changes_[i], GuardOf(i)); break;
  }
}

void Transaction::Run::Publish() {
  std::optional<Region::Hidden> hidden[kMaxSteps];
  for (std::size_t i = 0; i < size_; ++i) {
    if (i == 0 || &RegionOf(i) != &RegionOf(i - 1)) hidden[i].emplace(RegionOf(i));
  }
  for (std::size_t i = 0; i < size_; ++i) {
    switch (steps_[i].verb) {
      case Verb::kMap: RegionOf(i).PublishMap(changes_[i], steps_[i].options); break;
      case Verb::kUnmap: RegionOf(i).PublishUnmap(changes_[i]); break;
      case Verb::kProtect: RegionOf(i).PublishProtect(changes_[i], steps_[i].options.protection); break;
    }
  }
}

Error Transaction::Run::Commit() {
  for (std::size_t i = 0; i < size_; ++i) {
    if (steps_[i].options.backing != nullptr) steps_[i].options.backing->AddPages(steps_[i].range.count().value);
  }
  for (std::size_t i = 0; i < size_; ++i) {
    if (FaultHooks* hooks = HooksOf(i); hooks != nullptr) hooks->BeforeDrop(steps_[i].range);
  }
  LockRanges();
  const Error error = Prepare();
  if (error.ok()) {
    Publish();
    for (std::size_t i = 0; i < size_; ++i) RegionOf(i).FinishChange(changes_[i], GuardOf(i));
  }
  for (std::optional<Guard>& guard : guards_) guard.reset();
  for (std::size_t i = 0; i < size_; ++i) {
    // What lies beside pinned extents waits for nobody.
    if (changes_[i].detachment.pinned) RegionOf(i).RetryDeferred();
    const Step& step = steps_[i];
    if (FaultHooks* hooks = HooksOf(i); hooks != nullptr) hooks->AfterDrop(step.range);
    if (step.verb != Verb::kMap) continue;
    if (!error.ok()) {
      if (step.options.backing != nullptr) step.options.backing->DropPages(step.range.count().value);
      continue;
    }
    if (!space_.notifiers().empty()) space_.notifiers().Map(step.range);
    if (step.options.populates()) (void)space_.Populate(step.range);
  }
  return error;
}

Error Transaction::Commit() {
  const std::size_t size = std::exchange(size_, 0);
  if (size == 0) return {ErrorCode::kEmpty};
  if (size > kMaxSteps) return {ErrorCode::kUnsupported};
  const os::MemoryLock future = space_.future_lock_.load(std::memory_order_relaxed);
  for (std::size_t i = 0; i < size; ++i) {
    MapOptions& options = steps_[i].options;
    if (steps_[i].verb == Verb::kMap && options.lock == os::MemoryLock::kNone) options.lock = future;
  }
  std::sort(steps_, steps_ + size, [](const Step& a, const Step& b) { return a.range.first < b.range.first; });
  Run run(space_, steps_, size);
  const Error error = run.Check();
  return error.ok() ? run.Commit() : error;
}

// ---- What a step does to its region. All of it under the range's guard. ----

Error Region::CheckExtentCount(PageRange range) const {
  sync::SpinLockHolder holder(tree_lock_);
  RegionPage page = ToRegion(range.first);
  for (int visits = 0; visits < kExtentsPerHold; ++visits) {
    page = tree_.Find(page).vma()->end_page();
    if (page >= ToRegion(range.end)) return Error::Ok();
  }
  return {ErrorCode::kUnsupported};
}

Error Region::PrepareMap(Change& change, const MapOptions& options, const Guard& guard) {
  if (const Error error = CheckExtentCount(change.range); !error.ok()) return error;
  Result<Claim> claim = ClaimFixed(ToRegion(change.range.first), ToRegion(change.range.end), options.placement);
  if (!claim.ok()) return claim.error();
  change.claim = *claim;
  Error error;
  if (change.claim.occupied && (change.claim.backed || options.backing != nullptr)) error = {ErrorCode::kUnsupported};
  if (error.ok()) error = PrepareAccess(change.range, options, change.claim, guard);
  if (!error.ok()) Unclaim(change.claim);
  if (error.ok() && change.claim.occupied && !shared_.notifiers->empty()) {
    Invalidate(change.range, Invalidation::kReplace, guard);
  }
  return error;
}

Error Region::PrepareContent(Change& change, const MapOptions& options) {
  return PrepareContent(change.range, options, change.claim);
}

void Region::CancelMap(Change& change, const MapOptions& options, const Guard& guard) {
  UndoAccess(change.range, options, change.claim, guard);
  Unclaim(change.claim);
}

// Afterwards nothing is left to cut, and so nothing that could want for metadata.
Error Region::PrepareUnmap(Change& change, const Guard& guard) {
  if (const Error error = CheckExtentCount(change.range); !error.ok()) return error;
  for (bool cut = false; !cut;) {
    {
      sync::SpinLockHolder holder(tree_lock_);
      cut = HasMetadataLocked() || !IsCutLocked(change.range);
      if (cut) {
        (void)StartDetachLocked(change.range, /*pinned=*/false, /*notified=*/false);
        SetBordersBusyLocked(change.range, true);
      }
    }
    if (cut) break;
    if (const Error error = Refill(); !error.ok()) return error;
  }
  if (!shared_.notifiers->empty()) Invalidate(change.range, Invalidation::kUnmap, guard);
  return Error::Ok();
}

// Free extents at the borders may be anybody's by now.
void Region::SetBordersBusyLocked(PageRange range, bool busy) {
  for (const PageNumber page : {range.first, range.end - Pages{1}}) {
    Vma* vma = tree_.Find(ToRegion(page)).vma();
    if (vma->Is(VmaState::kMapped)) vma->busy = busy;
  }
}

void Region::CancelUnmap(Change& change) {
  sync::SpinLockHolder holder(tree_lock_);
  SetBordersBusyLocked(change.range, false);
  for (const PageNumber border : {change.range.first, change.range.end}) {
    if (border < range_.end) MergeMappedLocked(ToRegion(border), ToRegion(border));
  }
}

Error Region::PrepareProtect(Change& change, os::Protection protection, const Guard& guard) {
  const RegionPage first = ToRegion(change.range.first);
  const RegionPage end = ToRegion(change.range.end);
  if (const Error error = CheckExtentCount(change.range); !error.ok()) return error;
  if (const Result<bool> differs = ProtectionDiffers(first, end, protection); !differs.ok()) return differs.error();
  if (!shared_.notifiers->empty()) Invalidate(change.range, Invalidation::kProtect, guard);
  if (const Error error = MakeBusy(first, end); !error.ok()) return error;
  const Error error = shared_.kernel->Protect(change.range, protection);
  if (!error.ok()) CancelProtect(change, guard);
  return error;
}

void Region::CancelProtect(Change& change, const Guard& guard) {
  RestoreProtection(change.range, guard);
  EndBusy(ToRegion(change.range.first), ToRegion(change.range.end));
}

void Region::PublishMap(Change& change, const MapOptions& options) {
  tree_lock_.AssertHeld();
  // Backings are mapped over free pages only.
  DroppedPages<kExtentsPerHold> none;
  for (RegionPage page = change.claim.first; page < change.claim.end;) {
    PublishFixedLocked(change.claim, options, /*continued=*/0, page, none);
  }
  change.closes = change.claim.occupied;
}

void Region::PublishUnmap(Change& change) {
  tree_lock_.AssertHeld();
  const bool pinned = IsPinnedLocked(change.range);
  // Whatever gives the kernel no work either is not handed to anybody before the end.
  change.detachment = StartDetachLocked(change.range, pinned, /*notified=*/true);
  while (!DetachLocked(change.detachment)) {
  }
  unmaps_.Add(1);
  change.closes = change.detachment.zap;
}

void Region::PublishProtect(Change& change, os::Protection protection) {
  tree_lock_.AssertHeld();
  const RegionPage end = ToRegion(change.range.end);
  for (RegionPage page = ToRegion(change.range.first); page < end;) {
    RecordProtectionLocked(ToRegion(change.range.first), end, protection, page);
  }
}

// What the kernel does not take away now, a Tick does.
void Region::FinishChange(Change& change, const Guard& guard) {
  if (change.closes && !shared_.notifiers->empty()) shared_.notifiers->Close(change.range);
  if (!change.detachment.zap || ZapDetached(change.range, change.detachment, guard).ok()) return;
  for (PageNumber page = change.range.first; page < change.range.end;) {
    sync::SpinLockHolder holder(tree_lock_);
    Vma* vma = tree_.Find(ToRegion(page)).vma();
    page = RangeOf(*vma).end;
    if (vma->Is(VmaState::kDetached)) RetryLaterLocked(vma);
  }
}

Region::Hidden::Hidden(Region& region) ABSL_NO_THREAD_SAFETY_ANALYSIS
    : tree_(region.tree_),
      holder_(region.tree_lock_, sync::SameRank::kAscendingAddress) {
  tree_.Hide();
}

Region::Hidden::~Hidden() ABSL_NO_THREAD_SAFETY_ANALYSIS { tree_.Show(); }

}  // namespace freehold::vm
