#include "vm/sync/range_lock.h"

#include "absl/base/optimization.h"
#include "vm/os/check.h"

namespace freehold::vm::sync {
namespace {

// Every page of a 64-bit address space.
constexpr PageRange kWholeSpace{{0}, {~std::size_t{0} >> kPageShift}};

}  // namespace

// Written by the thread itself only; initial-exec, so that reading it never allocates.
RangeLock::Guard*& RangeLock::HeldGuards() {
  static constinit thread_local Guard* head __attribute__((tls_model("initial-exec"))) = nullptr;
  return head;
}

RangeLock::Guard::Guard(RangeLock& lock, PageRange range, Mode mode, Operation operation,
                        Waits waits, Nanoseconds deadline, AcquisitionSite site)
    : lock_(lock), request_(range, mode, operation, os::CurrentThreadId()) {
  FREEHOLD_DCHECK(!range.empty());
  if (waits != Waits::kNever) CheckRangeRank(&lock, this, range, site);
  held_ = Acquire(waits, deadline);
  if (!held_) return;
  RecordRangeRank(&lock, this, range, site);
  LinkHeld();
}

bool RangeLock::Guard::Acquire(Waits waits, Nanoseconds deadline) {
  const Nanoseconds* const until = waits == Waits::kUntil ? &deadline : nullptr;
  switch (lock_.policy_) {
    case LockPolicy::kCoarse: return AcquireCoarse(waits, until);
    case LockPolicy::kTree: break;
  }
  if (waits == Waits::kNever) return lock_.tree_.TryAcquire(request_);
  return lock_.tree_.Acquire(request_, until);
}

RangeLock::Guard::Guard(RangeLock& lock, PageRange range, Mode mode, Operation operation,
                        AcquisitionSite site)
    : Guard(lock, range, mode, operation, Waits::kForever, Nanoseconds{0}, site) {}

RangeLock::Guard RangeLock::Guard::Try(RangeLock& lock, PageRange range, Mode mode,
                                       Operation operation, AcquisitionSite site) {
  return Guard(lock, range, mode, operation, Waits::kNever, Nanoseconds{0}, site);
}

RangeLock::Guard RangeLock::Guard::Until(RangeLock& lock, PageRange range, Mode mode,
                                         Operation operation, Nanoseconds deadline,
                                         AcquisitionSite site) {
  return Guard(lock, range, mode, operation, Waits::kUntil, deadline, site);
}

RangeLock::Guard RangeLock::Guard::WholeSpace(RangeLock& lock, Mode mode, Operation operation,
                                              AcquisitionSite site) {
  return Guard(lock, kWholeSpace, mode, operation, Waits::kForever, Nanoseconds{0}, site);
}

void RangeLock::Guard::Release() {
  FREEHOLD_DCHECK(held_);
  CheckNoShortLockHeld("range unlock");
  held_ = false;
  UnlinkHeld();
  ReleaseRank(this);
  switch (lock_.policy_) {
    case LockPolicy::kCoarse: return ReleaseCoarse();
    case LockPolicy::kTree: return lock_.tree_.Release(request_);
  }
}

void RangeLock::Guard::Downgrade() {
  FREEHOLD_DCHECK(held_ && request_.mode == Mode::kExclusive);
  CheckNoShortLockHeld("range downgrade");
  switch (lock_.policy_) {
    case LockPolicy::kCoarse: return DowngradeCoarse();
    case LockPolicy::kTree: return lock_.tree_.Downgrade(request_);
  }
}

bool RangeLock::Guard::AcquireCoarse(Waits waits, const Nanoseconds* deadline) {
  const Guard* const anchor = lock_.FindStrongestHeld();
  if (ABSL_PREDICT_FALSE(anchor != nullptr)) {
    anchors_ = false;
    for (const Guard* guard = HeldGuards(); guard != nullptr; guard = guard->next_held_) {
      const bool conflicts = &guard->lock_ == &lock_ &&
                             guard->request_.range.Overlaps(request_.range) &&
                             Conflict(guard->request_.mode, request_.mode);
      FREEHOLD_CHECK(!conflicts || waits != Waits::kForever);  // this thread would wait for itself
      if (conflicts) return false;
    }
    const bool upgrades =
        anchor->request_.mode == Mode::kShared && request_.mode == Mode::kExclusive;
    FREEHOLD_CHECK(!upgrades || waits != Waits::kForever);  // see Lock order
    return !upgrades;
  }
  if (waits == Waits::kNever) return lock_.coarse_.TryAcquire(request_);
  return lock_.coarse_.Acquire(request_, deadline);
}

void RangeLock::Guard::ReleaseCoarse() {
  if (!anchors_) return;
  Guard* const heir = lock_.FindStrongestHeld();
  if (ABSL_PREDICT_TRUE(heir == nullptr)) return lock_.coarse_.Release(request_);
  if (heir->request_.mode != request_.mode) lock_.coarse_.Downgrade(request_);
  MoveAnchorTo(*heir);
}

void RangeLock::Guard::DowngradeCoarse() {
  if (anchors_) {
    UnlinkHeld();
    Guard* const other = lock_.FindStrongestHeld();
    LinkHeld();
    if (other == nullptr || other->request_.mode == Mode::kShared) {
      return lock_.coarse_.Downgrade(request_);
    }
    MoveAnchorTo(*other);
  }
  request_.mode = Mode::kShared;
}

void RangeLock::Guard::MoveAnchorTo(Guard& other) {
  lock_.coarse_.Rename(request_, other.request_);
  anchors_ = false;
  other.anchors_ = true;
}

RangeLock::Guard* RangeLock::FindStrongestHeld() const {
  if (ABSL_PREDICT_TRUE(HeldGuards() == nullptr)) return nullptr;
  Guard* strongest = nullptr;
  for (Guard* guard = HeldGuards(); guard != nullptr; guard = guard->next_held_) {
    if (&guard->lock_ != this) continue;
    if (strongest == nullptr || guard->request_.mode > strongest->request_.mode ||
        (guard->request_.mode == strongest->request_.mode && guard->anchors_)) {
      strongest = guard;
    }
  }
  return strongest;
}

void RangeLock::Guard::LinkHeld() {
  Guard*& head = HeldGuards();
  next_held_ = head;
  link_to_this_ = &head;
  if (head != nullptr) head->link_to_this_ = &next_held_;
  head = this;
}

void RangeLock::Guard::UnlinkHeld() {
  *link_to_this_ = next_held_;
  if (next_held_ != nullptr) next_held_->link_to_this_ = link_to_this_;
}

HolderList RangeLock::Holders(PageRange range) const {
  HolderList list;
  switch (policy_) {
    case LockPolicy::kCoarse: coarse_.AppendHolders(list); break;
    case LockPolicy::kTree: tree_.AppendHolders(range, list); break;
  }
  return list;
}

void RangeLock::ReinitAfterFork() {
  coarse_.ForgetAll();
  tree_.ForgetAll();
  for (Guard* guard = HeldGuards(); guard != nullptr; guard = guard->next_held_) {
    if (&guard->lock_ != this) continue;
    guard->request_.thread_id = os::CurrentThreadId();
    if (!guard->anchors_) continue;
    switch (policy_) {
      case LockPolicy::kCoarse: coarse_.Adopt(guard->request_); break;
      case LockPolicy::kTree: tree_.Adopt(guard->request_); break;
    }
  }
}

bool RangeLock::MayBeHeld(PageRange) const {
  switch (policy_) {
    case LockPolicy::kCoarse: return true;
    case LockPolicy::kTree: return tree_.in_use();
  }
  return true;
}

void RangeLock::CheckInvariants() const {
  coarse_.CheckInvariants();
  tree_.CheckInvariants();
}

}  // namespace freehold::vm::sync
