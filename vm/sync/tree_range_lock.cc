#include "vm/sync/tree_range_lock.h"

#include <algorithm>
#include <cstddef>
#include <memory>

#include "vm/os/check.h"
#include "vm/sync/clock.h"

namespace freehold::vm::sync {
namespace {

using Node = RangeRequest;

// The treap. Priorities are a hash of the ticket, so its depth is logarithmic whatever the ranges
// are.

std::uint64_t PriorityOf(std::uint64_t ticket) {
  ticket *= 0x9e3779b97f4a7c15;
  ticket ^= ticket >> 32;
  return ticket * 0xd6e8feb86659fd93;
}

bool Before(const Node& a, const Node& b) {
  return a.range.first != b.range.first ? a.range.first < b.range.first
                                        : a.tree.ticket < b.tree.ticket;
}

PageNumber EndOf(const Node* node) {
  return node != nullptr ? node->tree.subtree_end : PageNumber{0};
}

void UpdateEnd(Node& node) {
  node.tree.subtree_end = std::max({node.range.end, EndOf(node.tree.left), EndOf(node.tree.right)});
}

// Splits `node` into what is before and what is after `key`.
void Split(Node* node, const Node& key, Node** before, Node** after) {
  if (node == nullptr) {
    *before = *after = nullptr;
  } else if (Before(*node, key)) {
    *before = node;
    Split(node->tree.right, key, &node->tree.right, after);
    UpdateEnd(*node);
  } else {
    *after = node;
    Split(node->tree.left, key, before, &node->tree.left);
    UpdateEnd(*node);
  }
}

// Joins two trees, everything in `a` before everything in `b`.
Node* Merge(Node* a, Node* b) {
  if (a == nullptr) return b;
  if (b == nullptr) return a;
  Node* const top = a->tree.priority >= b->tree.priority ? a : b;
  if (top == a) {
    a->tree.right = Merge(a->tree.right, b);
  } else {
    b->tree.left = Merge(a, b->tree.left);
  }
  UpdateEnd(*top);
  return top;
}

// The tree without `node`. REQUIRES: `node` is in it.
Node* Erase(Node* tree, const Node& node) {
  if (tree == &node) return Merge(node.tree.left, node.tree.right);
  Node*& side = Before(node, *tree) ? tree->tree.left : tree->tree.right;
  side = Erase(side, node);
  UpdateEnd(*tree);
  return tree;
}

// Calls visit(Node&) for every request that overlaps `range`, in the order of the tree.
template <typename Visitor>
void ForEachOverlap(Node* tree, PageRange range, const Visitor& visit) {
  if (tree == nullptr || tree->tree.subtree_end <= range.first) return;
  ForEachOverlap(tree->tree.left, range, visit);
  if (range.end <= tree->range.first) return;
  if (tree->range.Overlaps(range)) visit(*tree);
  ForEachOverlap(tree->tree.right, range, visit);
}

std::size_t CountConflicts(Node* tree, const Node& request) {
  std::size_t count = 0;
  ForEachOverlap(tree, request.range, [&](const Node& other) {
    if (Conflict(other.mode, request.mode)) ++count;
  });
  return count;
}

}  // namespace

bool TreeRangeLock::TryAcquire(RangeRequest& request) {
  SpinLockHolder holder(lock_);
  if (CountConflicts(root_, request) != 0) return false;
  InsertLocked(request, 0);
  return true;
}

bool TreeRangeLock::Acquire(RangeRequest& request, const Nanoseconds* deadline) {
  {
    SpinLockHolder holder(lock_);
    if (EnterLocked(request)) return true;
  }
  if (request.parker.Park(deadline)) return true;
  bool granted;
  RangeRequest* woken = nullptr;
  {
    SpinLockHolder holder(lock_);
    granted = request.signalled;
    if (!granted) woken = LeaveLocked(request);
  }
  UnparkAll(woken);
  // Granted at the last moment: the signaller still needs the request until the signal is here.
  if (granted) request.parker.Park();
  return granted;
}

void TreeRangeLock::Release(RangeRequest& request) {
  RangeRequest* woken;
  {
    SpinLockHolder holder(lock_);
    woken = LeaveLocked(request);
  }
  UnparkAll(woken);
}

void TreeRangeLock::Downgrade(RangeRequest& request) {
  RangeRequest* woken;
  {
    SpinLockHolder holder(lock_);
    request.mode = LockMode::kShared;
    // Younger exclusive requests go on counting it.
    woken = UnblockLocked(request, [](LockMode other) { return other == LockMode::kShared; });
  }
  UnparkAll(woken);
}

bool TreeRangeLock::EnterLocked(RangeRequest& request) {
  const std::size_t blockers = CountConflicts(root_, request);
  InsertLocked(request, blockers);
  if (blockers == 0) return true;
  request.since = CoarseNow();
  request.signalled = false;
  ForEachOverlap(root_, request.range, [&](Node& other) {
    if (other.since == Nanoseconds{0}) other.since = request.since;
  });
  return false;
}

void TreeRangeLock::InsertLocked(RangeRequest& request, std::size_t blockers) {
  const std::uint64_t ticket = ++last_ticket_;
  const std::uint64_t priority = PriorityOf(ticket);
  std::construct_at(&request.tree, Node::TreeNode{.left = nullptr,
                                                  .right = nullptr,
                                                  .subtree_end = request.range.end,
                                                  .ticket = ticket,
                                                  .priority = priority,
                                                  .blockers = blockers});
  Node** link = &root_;
  while (*link != nullptr && (*link)->tree.priority >= priority) {
    Node& node = **link;
    node.tree.subtree_end = std::max(node.tree.subtree_end, request.range.end);
    link = Before(request, node) ? &node.tree.left : &node.tree.right;
  }
  Split(*link, request, &request.tree.left, &request.tree.right);
  UpdateEnd(request);
  *link = &request;
  in_use_.store(true, std::memory_order_relaxed);
}

RangeRequest* TreeRangeLock::LeaveLocked(RangeRequest& request) {
  root_ = Erase(root_, request);
  in_use_.store(root_ != nullptr, std::memory_order_relaxed);
  if (root_ == nullptr) return nullptr;
  return UnblockLocked(request, [&](LockMode other) { return Conflict(other, request.mode); });
}

template <typename Predicate>
RangeRequest* TreeRangeLock::UnblockLocked(const RangeRequest& by, Predicate was_blocked) {
  RangeRequest* woken = nullptr;
  ForEachOverlap(root_, by.range, [&](Node& other) {
    if (other.tree.ticket <= by.tree.ticket || !was_blocked(other.mode)) return;
    if (--other.tree.blockers != 0) return;
    other.signalled = true;
    other.since = woken != nullptr ? woken->since : CoarseNow();
    other.next_woken = woken;
    woken = &other;
  });
  return woken;
}

void TreeRangeLock::AppendHolders(PageRange range, HolderList& list) const {
  const Nanoseconds now = CoarseNow();
  SpinLockHolder holder(lock_);
  for (const bool held : {true, false}) {
    ForEachOverlap(root_, range, [&](Node& request) {
      if ((request.tree.blockers == 0) != held) return;
      if (request.since == Nanoseconds{0}) request.since = now;
      list.Add({.thread_id = request.thread_id,
                .operation = request.operation,
                .mode = request.mode,
                .state = held ? HolderInfo::State::kHolding : HolderInfo::State::kWaiting,
                .range = request.range,
                .age = now - std::min(now, request.since)});
    });
  }
}

namespace {

// T2 of the subtree; its nodes lie in [low, high] where those are not null.
void CheckStructure(const Node* node, const Node* low, const Node* high) {
  if (node == nullptr) return;
  const Node::TreeNode& tree = node->tree;
  FREEHOLD_CHECK(!node->range.empty());
  FREEHOLD_CHECK(low == nullptr || Before(*low, *node));
  FREEHOLD_CHECK(high == nullptr || Before(*node, *high));
  for (const Node* child : {tree.left, tree.right}) {
    FREEHOLD_CHECK(child == nullptr || child->tree.priority <= tree.priority);
  }
  CheckStructure(tree.left, low, node);
  CheckStructure(tree.right, node, high);
  FREEHOLD_CHECK(tree.subtree_end ==
                 std::max({node->range.end, EndOf(tree.left), EndOf(tree.right)}));
}

// R1 and T1 for `request` against every request of `tree`, without trusting its index.
std::size_t CountBlockers(const Node* tree, const Node& request) {
  if (tree == nullptr) return 0;
  const bool conflicts =
      tree->range.Overlaps(request.range) && Conflict(tree->mode, request.mode) && tree != &request;
  if (conflicts) FREEHOLD_CHECK(tree->tree.blockers != 0 || request.tree.blockers != 0);
  return CountBlockers(tree->tree.left, request) + CountBlockers(tree->tree.right, request) +
         (conflicts && tree->tree.ticket < request.tree.ticket ? 1 : 0);
}

void CheckBlockers(const Node* node, const Node* root) {
  if (node == nullptr) return;
  FREEHOLD_CHECK(CountBlockers(root, *node) == node->tree.blockers);
  CheckBlockers(node->tree.left, root);
  CheckBlockers(node->tree.right, root);
}

}  // namespace

void TreeRangeLock::CheckInvariants() const {
  SpinLockHolder holder(lock_);
  CheckStructure(root_, nullptr, nullptr);
  CheckBlockers(root_, root_);
}

void TreeRangeLock::ForgetAll() {
  lock_.ReinitAfterFork();
  root_ = nullptr;
  in_use_.store(false, std::memory_order_relaxed);
}

void TreeRangeLock::Adopt(RangeRequest& request) {
  SpinLockHolder holder(lock_);
  InsertLocked(request, 0);
}

}  // namespace freehold::vm::sync
