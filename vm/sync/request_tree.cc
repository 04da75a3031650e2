#include "vm/sync/request_tree.h"

#include <algorithm>
#include <cstddef>
#include <memory>

#include "vm/os/check.h"
#include "vm/sync/clock.h"

namespace freehold::vm::sync {
namespace {

using Node = RangeRequest;

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

}  // namespace

// The treap. Priorities are a hash of the ticket, so its depth is logarithmic whatever the ranges are.
std::uint64_t RequestTree::PriorityOf(std::uint64_t ticket) {
  ticket *= 0x9e3779b97f4a7c15;
  ticket ^= ticket >> 32;
  return ticket * 0xd6e8feb86659fd93;
}

std::size_t RequestTree::CountConflicts(PageRange range, LockMode mode) const {
  std::size_t count = 0;
  ForEachOverlap(range, [&](const Node& other) {
    if (Conflict(other.mode, mode)) ++count;
  });
  return count;
}

bool RequestTree::HasConflict(PageRange range, LockMode mode) const {
  return CountConflicts(range, mode) != 0;
}

bool RequestTree::TryEnter(RangeRequest& request) {
  if (HasConflict(request.range, request.mode)) return false;
  Insert(request, Kind::kRequest, 0);
  return true;
}

bool RequestTree::Enter(RangeRequest& request, Kind kind) {
  const std::size_t blockers = CountConflicts(request.range, request.mode);
  Insert(request, kind, blockers);
  if (blockers == 0) return true;
  request.since = CoarseNow();
  request.signalled = false;
  ForEachOverlap(request.range, [&](Node& other) {
    if (other.since == Nanoseconds{0}) other.since = request.since;
  });
  return false;
}

void RequestTree::Insert(RangeRequest& request, Kind kind, std::size_t blockers) {
  const std::uint64_t ticket = ++last_ticket_;
  const std::uint64_t priority = PriorityOf(ticket);
  request.is_proxy = kind == Kind::kProxy;
  request.since = Nanoseconds{0};
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

RangeRequest* RequestTree::Leave(RangeRequest& request) {
  root_ = Erase(root_, request);
  in_use_.store(root_ != nullptr, std::memory_order_relaxed);
  if (root_ == nullptr) return nullptr;
  return Unblock(request, [&](LockMode other) { return Conflict(other, request.mode); });
}

RangeRequest* RequestTree::Downgrade(RangeRequest& request) {
  request.mode = LockMode::kShared;
  // Younger exclusive requests go on counting it.
  return Unblock(request, [](LockMode other) { return other == LockMode::kShared; });
}

template <typename Predicate>
RangeRequest* RequestTree::Unblock(const RangeRequest& by, Predicate was_blocked) {
  RangeRequest* woken = nullptr;
  ForEachOverlap(by.range, [&](Node& other) {
    if (other.tree.ticket <= by.tree.ticket || !was_blocked(other.mode)) return;
    if (--other.tree.blockers != 0 || other.is_proxy) return;
    other.signalled = true;
    other.since = woken != nullptr ? woken->since : CoarseNow();
    other.next_woken = woken;
    woken = &other;
  });
  return woken;
}

HolderInfo RequestTree::Describe(RangeRequest& request, Nanoseconds now) {
  if (request.since == Nanoseconds{0}) request.since = now;
  return {.thread_id = request.thread_id,
          .operation = request.operation,
          .mode = request.mode,
          .state = IsHeld(request) ? HolderInfo::State::kHolding : HolderInfo::State::kWaiting,
          .range = request.range,
          .age = now - std::min(now, request.since)};
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

void RequestTree::CheckInvariants() const {
  CheckStructure(root_, nullptr, nullptr);
  CheckBlockers(root_, root_);
}

}  // namespace freehold::vm::sync
