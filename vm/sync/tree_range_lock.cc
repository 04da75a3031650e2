#include "vm/sync/tree_range_lock.h"

#include "vm/sync/clock.h"

namespace freehold::vm::sync {

bool TreeRangeLock::TryAcquire(RangeRequest& request) {
  SpinLockHolder holder(lock_);
  return tree_.TryEnter(request);
}

bool TreeRangeLock::Acquire(RangeRequest& request, const Nanoseconds* deadline) {
  {
    SpinLockHolder holder(lock_);
    if (tree_.Enter(request)) return true;
  }
  return AwaitGrant(request, deadline, lock_,
                    [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return tree_.Leave(request); });
}

void TreeRangeLock::Release(RangeRequest& request) {
  RangeRequest* woken;
  {
    SpinLockHolder holder(lock_);
    woken = tree_.Leave(request);
  }
  UnparkAll(woken);
}

void TreeRangeLock::Downgrade(RangeRequest& request) {
  RangeRequest* woken;
  {
    SpinLockHolder holder(lock_);
    woken = tree_.Downgrade(request);
  }
  UnparkAll(woken);
}

void TreeRangeLock::AppendHolders(PageRange range, HolderList& list) const {
  const Nanoseconds now = CoarseNow();
  SpinLockHolder holder(lock_);
  for (const bool held : {true, false}) {
    tree_.ForEachOverlap(range, [&](RangeRequest& request) {
      if (RequestTree::IsHeld(request) == held) list.Add(RequestTree::Describe(request, now));
    });
  }
}

void TreeRangeLock::CheckInvariants() const {
  SpinLockHolder holder(lock_);
  tree_.CheckInvariants();
}

void TreeRangeLock::ForgetAll() {
  lock_.ReinitAfterFork();
  tree_.Clear();
}

void TreeRangeLock::Adopt(RangeRequest& request) {
  SpinLockHolder holder(lock_);
  tree_.TryEnter(request);
}

}  // namespace freehold::vm::sync
