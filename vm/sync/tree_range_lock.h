// LockPolicy::kTree: one interval tree of held and pending requests under one short lock.
//
// Thread safety: thread-safe; not async-signal-safe.
// Lock order:    LockRank::kRangeInternal for moments; waiters are signalled after it is released.
// Waiting:       FIFO: exactly the order of entry among requests that overlap and conflict.
// Allocation:    none; the tree's nodes are the requests. How it works: request_tree.h.
#ifndef FREEHOLD_VM_SYNC_TREE_RANGE_LOCK_H_
#define FREEHOLD_VM_SYNC_TREE_RANGE_LOCK_H_

#include "absl/base/thread_annotations.h"
#include "vm/page_range.h"
#include "vm/sync/range_request.h"
#include "vm/sync/request_tree.h"
#include "vm/sync/spin_lock.h"
#include "vm/units.h"

namespace freehold::vm::sync {

class TreeRangeLock {
 public:
  constexpr TreeRangeLock() = default;

  // Waits until granted or until `*deadline` (null: forever). Returns whether it was granted; if
  // not, the request is gone from the lock.
  bool Acquire(RangeRequest& request, const Nanoseconds* deadline);
  // Never waits; acquires only if nothing older conflicts.
  bool TryAcquire(RangeRequest& request);
  // REQUIRES: held.
  void Release(RangeRequest& request);
  // REQUIRES: held, exclusive.
  void Downgrade(RangeRequest& request);

  // As RequestTree::in_use.
  bool in_use() const { return ABSL_TS_UNCHECKED_READ(tree_).in_use(); }

  void AppendHolders(PageRange range, HolderList& list) const;
  // See RangeLock::CopiedRequests.
  const RangeRequest* CopiedRequests() const ABSL_NO_THREAD_SAFETY_ANALYSIS { return tree_.root(); }
  void CheckInvariants() const;

  // In the child of a fork: forgets every request; then takes back those that this thread holds.
  void ForgetAll() ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void Adopt(RangeRequest& request);

 private:
  mutable SpinLock lock_{LockRank::kRangeInternal};
  RequestTree tree_ ABSL_GUARDED_BY(lock_);
};

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_TREE_RANGE_LOCK_H_
