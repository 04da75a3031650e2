// Held and pending requests of a range lock, as an interval tree: what kTree and the slow path of
// kAdaptive share.
//
// A request that enters counts the requests in the tree that overlap it and conflict with it: its
// blockers, all older than itself. With none it is held. A request that leaves, whether it was held
// or gave up, is taken off the count of every younger one that counted it, and those that reach
// zero are granted. A downgrade does the same for the younger shared requests.
//
// Thread safety: thread-compatible: its owner's internal lock guards it. AwaitGrant is for the requesting thread.
// Allocation:    none; the tree's nodes are the requests.
// Invariants:    T1. request.tree.blockers is the number of older, overlapping, conflicting
//                    requests in the tree; the held ones are those with none.
//                T2. The tree is a search tree by (range.first, ticket) and a heap by priority;
//                    subtree_end is the highest range.end below, so overlaps are found in O(log n +
//                    found).
//                T3. A granted request that was waiting is `signalled`, unless it is a proxy, and
//                    stays until its signal came.
#ifndef FREEHOLD_VM_SYNC_REQUEST_TREE_H_
#define FREEHOLD_VM_SYNC_REQUEST_TREE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "vm/page_range.h"
#include "vm/sync/range_request.h"
#include "vm/sync/spin_lock.h"
#include "vm/units.h"

namespace freehold::vm::sync {

class RequestTree {
 public:
  constexpr RequestTree() = default;

  // Who notices that it is granted: the requesting thread by its signal, or nobody.
  enum class Kind : bool { kRequest, kProxy };

  // Returns whether it is held at once.
  bool Enter(RangeRequest& request, Kind kind = Kind::kRequest);
  // Enters only if it is held at once.
  bool TryEnter(RangeRequest& request);
  // These return the requests to signal (UnparkAll) once the internal lock is released.
  // REQUIRES: `request` is in the tree.
  [[nodiscard]] RangeRequest* Leave(RangeRequest& request);
  // To kShared. REQUIRES: held, exclusive.
  [[nodiscard]] RangeRequest* Downgrade(RangeRequest& request);

  // REQUIRES: in the tree.
  static bool IsHeld(const RangeRequest& request) { return request.tree.blockers == 0; }
  bool HasConflict(PageRange range, LockMode mode) const;
  // For Holders(): its age starts now if it has not yet. REQUIRES: in the tree.
  static HolderInfo Describe(RangeRequest& request, Nanoseconds now);

  // Calls visit(RangeRequest&) for every request that overlaps `range`, in the tree's order.
  template <typename Visitor>
  void ForEachOverlap(PageRange range, const Visitor& visit) const {
    ForEachOverlapBelow(root_, range, visit);
  }

  void CheckInvariants() const;
  void Clear() {
    root_ = nullptr;
    in_use_.store(false, std::memory_order_relaxed);
  }
  // Where the requests hang: for readers outside the process. A node's priority is PriorityOf its ticket.
  const RangeRequest* root() const { return root_; }
  static std::uint64_t PriorityOf(std::uint64_t ticket);

  // Whether there is any request, without the internal lock. Requests that another lock orders with
  // this call are seen as they are, others may be missed.
  bool in_use() const { return in_use_.load(std::memory_order_relaxed); }

 private:
  template <typename Visitor>
  static void ForEachOverlapBelow(RangeRequest* node, PageRange range, const Visitor& visit) {
    if (node == nullptr || node->tree.subtree_end <= range.first) return;
    ForEachOverlapBelow(node->tree.left, range, visit);
    if (range.end <= node->range.first) return;
    if (node->range.Overlaps(range)) visit(*node);
    ForEachOverlapBelow(node->tree.right, range, visit);
  }

  std::size_t CountConflicts(PageRange range, LockMode mode) const;
  void Insert(RangeRequest& request, Kind kind, std::size_t blockers);
  // Takes `by` off the counts of the younger requests that overlap it and whose mode `was_blocked`.
  template <typename Predicate>
  RangeRequest* Unblock(const RangeRequest& by, Predicate was_blocked);

  RangeRequest* root_ = nullptr;
  std::atomic<bool> in_use_{false};  // whether there is a root
  std::uint64_t last_ticket_ = 0;
};

// Waits for the grant of a request that Enter left pending in a tree that `lock` guards, forever or until `*deadline`
// (null: forever). Returns whether it was granted; if not, `leave()` has taken it out under the lock, and has
// returned the requests to signal. REQUIRES: `lock` is not held.
template <typename Leave>
bool AwaitGrant(RangeRequest& request, const Nanoseconds* deadline, SpinLock& lock, const Leave& leave) {
  if (request.parker.Park(deadline)) return true;
  bool granted;
  RangeRequest* woken = nullptr;
  {
    SpinLockHolder holder(lock);
    granted = request.signalled;
    if (!granted) woken = leave();
  }
  UnparkAll(woken);
  // Granted at the last moment: the signaller still needs the request until the signal is here.
  if (granted) request.parker.Park();
  return granted;
}

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_REQUEST_TREE_H_
