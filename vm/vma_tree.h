// A B+-tree of a region's extents, keyed by first page and augmented with the largest free extent below
// every entry, so that a gap search is a descent. Writers hold the region's tree lock; lookups take no lock
// and write nothing.
//
// Why lookups are right (optimistic lock coupling, one writer at a time): every node carries a version that
// is odd while the node changes. A reader takes the version, reads, moves to the child, takes the child's
// version, and checks that the parent's has not moved: then the child was the right one at that moment. Nodes
// and extents are type-stable and versions only grow, so a stale pointer is read safely and found out. Field
// stores are releases and field loads acquires: a reader that sees a new field also sees the odd version.
//
// Thread safety: Lookup is thread-safe; everything else REQUIRES the region's tree lock.
// Allocation:    nodes come from a pool that the owner refills outside the lock (NeedsNodes, AddNode).
// Units:         pages counted from the start of the region.
// Invariants:    T1. Keys ascend; the key of an inner entry is at most every key below it and above every
//                    page of the extents to its left.
//                T2. The gap of an entry is the length of the free extent, or the largest gap below it.
//                T3. All leaves are at the same depth; no node but the root is empty.
#ifndef FREEHOLD_VM_VMA_TREE_H_
#define FREEHOLD_VM_VMA_TREE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "vm/hold_code.h"
#include "vm/units.h"
#include "vm/vma.h"

namespace freehold::vm {

class VmaTree {
 public:
  // With this fanout, what a lookup searches fills two cache lines, and a node eight.
  static constexpr int kFanout = 30;
  static constexpr int kMaxDepth = 10;

  struct alignas(kCacheLineSize) Node {
    std::atomic<std::uint32_t> version{0};
    std::atomic<std::uint8_t> count{0};
    std::atomic<std::uint8_t> height{0};  // 0: a leaf
    std::atomic<RegionPage> key[kFanout] = {};
    std::atomic<void*> entry[kFanout] = {};  // Vma* in a leaf, Node* above; in the pool, entry[0] links
    std::atomic<RegionPage> gap[kFanout] = {};
  };
  static_assert(offsetof(Node, entry) == 2 * kCacheLineSize && sizeof(Node) == 8 * kCacheLineSize);

  // Where an extent hangs. Valid until the tree changes.
  class Path {
   public:
    Vma* vma() const;

   private:
    friend class VmaTree;
    Node* node_[kMaxDepth];
    int slot_[kMaxDepth];
    int depth_ = 0;
  };

  // What a lookup saw: a copy of one extent at one moment.
  struct View {
    const Vma* vma = nullptr;
    RegionPage first = 0;
    RegionPage count = 0;
    VmaState state = VmaState::kFree;
    VmaAttributes attributes = {.protection = os::Protection::kNone};
  };

  // Puts the first extent in. REQUIRES: the tree is empty; a node is in the pool.
  void Init(Vma* all);

  // The extent that holds `page`, without a lock. False when concurrent changes got in the way too often;
  // the caller then takes the tree lock. REQUIRES: the tree tiles the region and `page` lies in it.
  bool Lookup(RegionPage page, View& view) const;
  // The same; what a change of that extent reads and writes in the tree comes into the caches.
  bool Warm(RegionPage page, View& view) const;

  FREEHOLD_HOLD_CODE Path Find(RegionPage page) const;
  // Steps to the neighbour; false at the end.
  bool Next(Path& path) const { return Step(path, +1); }
  bool Previous(Path& path) const { return Step(path, -1); }

  // The lowest free extent that can hold `count` pages whose first is a multiple of `alignment` when counted
  // from `origin`; false when there is none. Logarithmic when `alignment` is 1 or room is plenty.
  bool FindGap(RegionPage count, std::uint64_t alignment, std::uint64_t origin, Path& path) const;
  // The largest free extent's length.
  RegionPage LargestGap() const;

  // Inserts `vma` right after the extent at `path`. REQUIRES: !NeedsNodes() at most two insertions ago.
  FREEHOLD_HOLD_CODE void InsertAfter(const Path& path, Vma* vma);
  // Removes the extent at `path`, which is not the first of the region.
  FREEHOLD_HOLD_CODE void Erase(const Path& path);
  // Brings the gap index up to date with the state and length of the extent at `path`.
  FREEHOLD_HOLD_CODE void RefreshGap(const Path& path);

  // Whether the pool may run out within three insertions, as many as one verb makes: each may take a node a
  // level and one for a new root.
  bool NeedsNodes() const { return pool_size_ < 3 * (static_cast<std::size_t>(depth_) + 1); }
  void AddNode(Node* node);

  // Between the two, lookups that begin fail, and so wait for the lock of whoever changes the tree: for changes that
  // must be seen together.
  void Hide() {
    hidden_ = true;
    visible_root_.store(nullptr, std::memory_order_release);
  }
  void Show() {
    hidden_ = false;
    SetRoot(root_);
  }

  // Where lookups start: a pointer to the root node, or null while it is hidden. For readers outside the process, who
  // do as Lookup does.
  const void* root_location() const { return &visible_root_; }

  // The pages that `vma` offers to gap searches.
  static RegionPage GapOf(const Vma& vma) { return vma.Is(VmaState::kFree) ? vma.page_count() : 0; }

  std::size_t size() const { return size_; }
  // CHECKs T1-T3 and that the extents tile [0, pages).
  void CheckInvariants(RegionPage pages) const;

 private:
  class NodeWriter;
  struct GapRequest {
    RegionPage count;
    std::uint64_t alignment;
    std::uint64_t origin;
  };

  template <bool kForWriting>
  bool LookUp(RegionPage page, View& view) const;
  FREEHOLD_HOLD_CODE static int SlotOf(const Node& node, RegionPage page);
  FREEHOLD_HOLD_CODE static RegionPage MaxGap(const Node& node);
  FREEHOLD_HOLD_CODE static void InsertAt(Node& node, int slot, RegionPage key, void* entry, RegionPage gap);
  FREEHOLD_HOLD_CODE static void EraseAt(Node& node, int slot);

  FREEHOLD_HOLD_CODE bool Step(Path& path, int direction) const;
  static bool Fits(const Vma& vma, const GapRequest& request);
  bool FindGapBelow(int level, RegionPage at_least, const GapRequest& request, Path& path) const;
  Node* SplitInto(Node& left, int keep);
  void GrowRoot(Node* left, Node* right);
  FREEHOLD_HOLD_CODE void PropagateGap(const Path& path, int level);
  FREEHOLD_HOLD_CODE void PropagateKey(const Path& path, int level);
  FREEHOLD_HOLD_CODE bool MergeWithNeighbour(const Path& path, int level);
  Node* TakeNode();
  void SetRoot(Node* root) {
    root_ = root;
    if (!hidden_) visible_root_.store(root, std::memory_order_release);
  }
  void CheckNode(const Node* node, int height, RegionPage& next, std::size_t& extents) const;

  // What lookups start from: the root, or null while it is hidden. Release pairs with their acquire. On a line with
  // what seldom changes: a lookup waits for nobody who maps.
  alignas(kCacheLineSize) std::atomic<Node*> visible_root_{nullptr};
  Node* root_ = nullptr;
  int depth_ = 0;
  bool hidden_ = false;
  alignas(kCacheLineSize) std::size_t size_ = 0;
  Node* pool_ = nullptr;
  std::size_t pool_size_ = 0;
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_VMA_TREE_H_
