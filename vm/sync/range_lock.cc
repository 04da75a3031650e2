#include "vm/sync/range_lock.h"

#include "absl/base/optimization.h"
#include "vm/os/check.h"
#include "vm/sync/clock.h"

namespace freehold::vm::sync {
namespace {

// Every page of a 64-bit address space.
constexpr PageRange kWholeSpace{{0}, {~std::size_t{0} >> kPageShift}};

}  // namespace

constinit thread_local RangeLock::Guard* RangeLock::held_guards_ = nullptr;

bool RangeLock::Guard::AcquireSlow(Waits waits, Nanoseconds deadline) {
  if (ABSL_PREDICT_FALSE(lock_.recorder_ != nullptr)) return AcquireRecorded(waits, deadline);
  return AcquireByPolicy(waits, deadline);
}

bool RangeLock::Guard::AcquireRecorded(Waits waits, Nanoseconds deadline) {
  const Nanoseconds asked_at = MonotonicNow();
  if (!(lock_.policy_ == LockPolicy::kAdaptive && lock_.adaptive_.TryAcquireFast(request_)) &&
      !AcquireByPolicy(waits, deadline)) {
    return false;
  }
  granted_at_ = MonotonicNow();
  lock_.recorder_->RecordWait(request_, granted_at_ - asked_at);
  return true;
}

bool RangeLock::Guard::AcquireByPolicy(Waits waits, Nanoseconds deadline) {
  const Nanoseconds* const until = waits == Waits::kUntil ? &deadline : nullptr;
  request_.bucket = nullptr;
  switch (lock_.policy_) {
    case LockPolicy::kCoarse: return AcquireCoarse(waits, until);
    case LockPolicy::kTree:
      if (waits == Waits::kNever) return lock_.tree_.TryAcquire(request_);
      return lock_.tree_.Acquire(request_, until);
    case LockPolicy::kAdaptive:
      if (waits == Waits::kNever) return lock_.adaptive_.TryAcquireSlow(request_);
      return lock_.adaptive_.AcquireSlow(request_, until);
  }
  return false;
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

void RangeLock::Guard::ReleaseSlow() {
  if (ABSL_PREDICT_FALSE(lock_.recorder_ != nullptr)) return ReleaseRecorded();
  ReleaseByPolicy();
}

void RangeLock::Guard::ReleaseRecorded() {
  const Nanoseconds held = MonotonicNow() - granted_at_;
  if (request_.bucket == nullptr || !lock_.adaptive_.TryReleaseFast(request_)) ReleaseByPolicy();
  lock_.recorder_->RecordHold(request_, held);
}

void RangeLock::Guard::ReleaseByPolicy() {
  switch (lock_.policy_) {
    case LockPolicy::kCoarse: return ReleaseCoarse();
    case LockPolicy::kTree: return lock_.tree_.Release(request_);
    case LockPolicy::kAdaptive: return lock_.adaptive_.ReleaseSlow(request_);
  }
}

void RangeLock::Guard::Downgrade() {
  FREEHOLD_DCHECK(held_ && request_.mode == Mode::kExclusive);
  CheckNoShortLockHeld("range downgrade");
  switch (lock_.policy_) {
    case LockPolicy::kCoarse: return DowngradeCoarse();
    case LockPolicy::kTree: return lock_.tree_.Downgrade(request_);
    case LockPolicy::kAdaptive: return lock_.adaptive_.Downgrade(request_);
  }
}

bool RangeLock::Guard::AcquireCoarse(Waits waits, const Nanoseconds* deadline) {
  const Guard* const anchor = lock_.FindStrongestHeld();
  if (ABSL_PREDICT_FALSE(anchor != nullptr)) {
    anchors_ = false;
    for (const Guard* guard = held_guards_; guard != nullptr; guard = guard->next_held_) {
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
  if (ABSL_PREDICT_TRUE(held_guards_ == nullptr)) return nullptr;
  Guard* strongest = nullptr;
  for (Guard* guard = held_guards_; guard != nullptr; guard = guard->next_held_) {
    if (&guard->lock_ != this) continue;
    if (strongest == nullptr || guard->request_.mode > strongest->request_.mode ||
        (guard->request_.mode == strongest->request_.mode && guard->anchors_)) {
      strongest = guard;
    }
  }
  return strongest;
}

HolderList RangeLock::Holders(PageRange range) const {
  HolderList list;
  switch (policy_) {
    case LockPolicy::kCoarse: coarse_.AppendHolders(list); break;
    case LockPolicy::kTree: tree_.AppendHolders(range, list); break;
    case LockPolicy::kAdaptive: adaptive_.AppendHolders(range, list); break;
  }
  return list;
}

const RangeRequest* RangeLock::CopiedRequests() const {
  switch (policy_) {
    case LockPolicy::kCoarse: return coarse_.CopiedRequests();
    case LockPolicy::kTree: return tree_.CopiedRequests();
    case LockPolicy::kAdaptive: return adaptive_.CopiedRequests();
  }
  return nullptr;
}

HolderList RangeLock::CopiedHolders(const HolderInfo& what) const {
  HolderList list;
  if (policy_ == LockPolicy::kCoarse) coarse_.AppendCopiedHolders(list);
  if (policy_ == LockPolicy::kAdaptive) adaptive_.AppendCopiedHolders(what, list);
  return list;
}

void RangeLock::ReinitAfterFork() {
  coarse_.ForgetAll();
  tree_.ForgetAll();
  adaptive_.ForgetAll();
  for (Guard* guard = held_guards_; guard != nullptr; guard = guard->next_held_) {
    if (&guard->lock_ != this) continue;
    guard->request_.thread_id = os::CurrentThreadId();
    if (!guard->anchors_) continue;
    switch (policy_) {
      case LockPolicy::kCoarse: coarse_.Adopt(guard->request_); break;
      case LockPolicy::kTree: tree_.Adopt(guard->request_); break;
      case LockPolicy::kAdaptive: adaptive_.Adopt(guard->request_); break;
    }
  }
}

void RangeLock::CheckInvariants() const {
  coarse_.CheckInvariants();
  tree_.CheckInvariants();
  adaptive_.CheckInvariants();
}

}  // namespace freehold::vm::sync
