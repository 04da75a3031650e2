// LockPolicy::kTree: one interval tree of held and pending requests under one short lock.
//
// A request that enters counts the requests in the tree that overlap it and conflict with it: its
// blockers, all older than itself. With none it is held. A request that leaves, whether it was held
// or gave up, is taken off the count of every younger one that counted it, and those that reach
// zero are granted. A downgrade does the same for the younger shared requests.
//
// Thread safety: thread-safe; not async-signal-safe.
// Lock order:    LockRank::kRangeInternal for moments; waiters are signalled after it is released.
// Waiting:       FIFO: exactly the order of entry among requests that overlap and conflict.
// Allocation:    none; the tree's nodes are the requests.
// Invariants:    T1. request.tree.blockers is the number of older, overlapping, conflicting
//                    requests in the tree; the held ones are those with none.
//                T2. The tree is a search tree by (range.first, ticket) and a heap by priority;
//                    subtree_end is the highest range.end below, so overlaps are found in O(log n +
//                    found).
//                T3. A granted request that was waiting is `signalled` and stays until its signal
//                    came.
#ifndef FREEHOLD_VM_SYNC_TREE_RANGE_LOCK_H_
#define FREEHOLD_VM_SYNC_TREE_RANGE_LOCK_H_

#include <cstddef>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "vm/page_range.h"
#include "vm/sync/range_request.h"
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

  // Whether anybody holds or waits for a range. Requests that another lock orders with this call are
  // seen as they are, others may be missed.
  bool in_use() const { return in_use_.load(std::memory_order_relaxed); }

  void AppendHolders(PageRange range, HolderList& list) const;
  void CheckInvariants() const;

  // In the child of a fork: forgets every request; then takes back those that this thread holds.
  void ForgetAll() ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void Adopt(RangeRequest& request);

 private:
  // Returns whether it is held at once.
  bool EnterLocked(RangeRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void InsertLocked(RangeRequest& request, std::size_t blockers)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // These return the requests to signal once the lock is released.
  RangeRequest* LeaveLocked(RangeRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // Takes `by` off the counts of the younger requests that overlap it and whose mode `was_blocked`.
  template <typename Predicate>
  RangeRequest* UnblockLocked(const RangeRequest& by, Predicate was_blocked)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);

  mutable SpinLock lock_{LockRank::kRangeInternal};
  RangeRequest* root_ ABSL_GUARDED_BY(lock_) = nullptr;
  std::atomic<bool> in_use_{false};  // whether there is a root; written under lock_
  std::uint64_t last_ticket_ ABSL_GUARDED_BY(lock_) = 0;
};

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_TREE_RANGE_LOCK_H_
