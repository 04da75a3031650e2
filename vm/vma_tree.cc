#include "vm/vma_tree.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <bit>
#include <cstddef>

#include "vm/os/check.h"

namespace freehold::vm {
namespace {

using Node = VmaTree::Node;

// How often a lookup starts over before it asks for the lock.
constexpr int kLookupAttempts = 64;

// A node with fewer entries looks for a neighbour to merge with; the merged node keeps room to grow.
constexpr int kMergeBelow = VmaTree::kFanout / 4;
constexpr int kMergedAtMost = VmaTree::kFanout * 3 / 4;

// What a full node keeps when it is split for an insertion at its end.
constexpr int kAscendingKeep = VmaTree::kFanout - 4;

// Field accesses of the (only) writer: it reads its own stores.
int Count(const Node& node) { return node.count.load(std::memory_order_relaxed); }
int Height(const Node& node) { return node.height.load(std::memory_order_relaxed); }
RegionPage Key(const Node& node, int slot) { return node.key[slot].load(std::memory_order_relaxed); }
RegionPage Gap(const Node& node, int slot) { return node.gap[slot].load(std::memory_order_relaxed); }
void* Entry(const Node& node, int slot) { return node.entry[slot].load(std::memory_order_relaxed); }
Node* Child(const Node& node, int slot) { return static_cast<Node*>(Entry(node, slot)); }
Vma* Leaf(const Node& node, int slot) { return static_cast<Vma*>(Entry(node, slot)); }

void Put(Node& node, int slot, RegionPage key, void* entry, RegionPage gap) {
  node.key[slot].store(key, std::memory_order_release);
  node.entry[slot].store(entry, std::memory_order_release);
  node.gap[slot].store(gap, std::memory_order_release);
}

void Move(Node& to, int to_slot, const Node& from, int from_slot) {
  Put(to, to_slot, Key(from, from_slot), Entry(from, from_slot), Gap(from, from_slot));
}

void SetCount(Node& node, int count) {
  node.count.store(static_cast<std::uint8_t>(count), std::memory_order_release);
}

}  // namespace

// Keeps a node's version odd in its scope. Only versions tell readers; the gap index is the writer's own
// and changes without one.
class VmaTree::NodeWriter {
 public:
  explicit NodeWriter(Node& node) : node_(node), version_(node.version.load(std::memory_order_relaxed)) {
    node_.version.store(version_ + 1, std::memory_order_relaxed);
  }
  ~NodeWriter() { node_.version.store(version_ + 2, std::memory_order_release); }
  NodeWriter(const NodeWriter&) = delete;
  NodeWriter& operator=(const NodeWriter&) = delete;

 private:
  Node& node_;
  const std::uint32_t version_;
};

// Whether a free extent has room for an aligned run.
bool VmaTree::Fits(const Vma& vma, const GapRequest& request) {
  const std::uint64_t first = request.origin + vma.first_page();
  const std::uint64_t aligned = (first + request.alignment - 1) & ~(request.alignment - 1);
  const std::uint64_t end = first + vma.page_count();
  return aligned < end && request.count <= end - aligned;
}

Vma* VmaTree::Path::vma() const { return Leaf(*node_[depth_ - 1], slot_[depth_ - 1]); }

void VmaTree::Init(Vma* all) {
  FREEHOLD_DCHECK(root_ == nullptr);
  Node* root = TakeNode();
  {
    NodeWriter writer(*root);
    root->height.store(0, std::memory_order_release);
    Put(*root, 0, all->first_page(), all, GapOf(*all));
    SetCount(*root, 1);
  }
  depth_ = 1;
  size_ = 1;
  SetRoot(root);
}

// The last slot whose key is at most `page`, or -1. All keys are compared at once: a search by halves waits for five
// loads in a row, and no predictor guesses which half of a node a random page is in.
int VmaTree::SlotOf(const Node& node, RegionPage page) {
  const int count = std::min<int>(node.count.load(std::memory_order_acquire), kFanout);
  std::uint32_t above = 0;  // a bit for each key above `page`
#if defined(__SSE2__) && !defined(FREEHOLD_TSAN)
  static_assert(offsetof(Node, key) + 32 * sizeof(RegionPage) <= sizeof(Node), "reads 32 keys, whatever kFanout is");
  const auto* keys = reinterpret_cast<const __m128i*>(node.key);
  // The comparison is of signed numbers: both sides move down by half of the range.
  const __m128i half = _mm_set1_epi32(INT32_MIN);
  const __m128i wanted = _mm_xor_si128(_mm_set1_epi32(static_cast<int>(page)), half);
  const auto compare = [&](const __m128i* four) {
    return _mm_cmpgt_epi32(_mm_xor_si128(_mm_loadu_si128(four), half), wanted);
  };
  for (int i = 0; i < 2; ++i, keys += 4) {
    const __m128i low = _mm_packs_epi32(compare(keys), compare(keys + 1));
    const __m128i high = _mm_packs_epi32(compare(keys + 2), compare(keys + 3));
    const __m128i bytes = _mm_packs_epi16(low, high);
    above |= static_cast<std::uint32_t>(_mm_movemask_epi8(bytes)) << (16 * i);
  }
  // These loads are plain to the compiler, though acquires to the hardware: none moves below the caller's check of
  // the node's version.
  std::atomic_signal_fence(std::memory_order_acquire);
#else
  for (int slot = 0; slot < kFanout; ++slot) {
    above |= std::uint32_t{node.key[slot].load(std::memory_order_acquire) > page} << slot;
  }
#endif
  // Keys ascend, so the first one above tells. What lies behind `count` is nobody's.
  return std::countr_zero(above | std::uint32_t{1} << count) - 1;
}

// Fetches what a lookup reads of `node` in one go: it would wait for line after line otherwise.
static inline void Prefetch(const Node* node) {
  constexpr std::size_t kRead = offsetof(Node, gap);
  for (std::size_t i = 0; i < kRead; i += kCacheLineSize) {
    __builtin_prefetch(reinterpret_cast<const std::byte*>(node) + i);
  }
}

// What a change of an extent reads too: the gaps.
static inline void PrefetchGaps(const Node* node) {
  for (std::size_t i = offsetof(Node, gap); i < sizeof(Node); i += kCacheLineSize) {
    __builtin_prefetch(reinterpret_cast<const std::byte*>(node) + i, 1);
  }
}

bool VmaTree::Lookup(RegionPage page, View& view) const { return LookUp<false>(page, view); }

bool VmaTree::Warm(RegionPage page, View& view) const { return LookUp<true>(page, view); }

template <bool kForWriting>
ABSL_ATTRIBUTE_ALWAYS_INLINE inline bool VmaTree::LookUp(RegionPage page, View& view) const {
  for (int attempt = 0; attempt < kLookupAttempts; ++attempt) {
    const Node* node = visible_root_.load(std::memory_order_acquire);
    if (ABSL_PREDICT_FALSE(node == nullptr)) return false;
    std::uint32_t version = node->version.load(std::memory_order_acquire);
    if ((version & 1) != 0 || visible_root_.load(std::memory_order_acquire) != node) continue;
    const Vma* vma = nullptr;
    for (;;) {
      if constexpr (kForWriting) PrefetchGaps(node);
      const int height = node->height.load(std::memory_order_acquire);
      const int slot = SlotOf(*node, page);
      if (slot < 0) break;
      void* entry = node->entry[slot].load(std::memory_order_acquire);
      if (height == 0) {
        vma = static_cast<const Vma*>(entry);
        if (node->version.load(std::memory_order_acquire) != version) vma = nullptr;
        break;
      }
      // The entry may be anything while the node changes: believe it only once the version is confirmed.
      if (node->version.load(std::memory_order_acquire) != version) break;
      const Node* child = static_cast<const Node*>(entry);
      Prefetch(child);
      const std::uint32_t child_version = child->version.load(std::memory_order_acquire);
      if ((child_version & 1) != 0 || node->version.load(std::memory_order_acquire) != version) break;
      node = child;
      version = child_version;
    }
    if (vma == nullptr) continue;
    const std::uint32_t sequence = vma->sequence.load(std::memory_order_acquire);
    if ((sequence & 1) != 0) continue;
    view.vma = vma;
    view.first = vma->first.load(std::memory_order_acquire);
    view.count = vma->count.load(std::memory_order_acquire);
    view.state = vma->state.load(std::memory_order_acquire);
    view.attributes.protection = vma->protection.load(std::memory_order_acquire);
    view.attributes.lock = vma->lock.load(std::memory_order_acquire);
    view.attributes.generation = vma->generation.load(std::memory_order_acquire);
    view.attributes.backing = vma->backing.load(std::memory_order_acquire);
    view.attributes.origin = vma->origin.load(std::memory_order_acquire);
    if (vma->sequence.load(std::memory_order_acquire) != sequence) continue;
    // The leaf may have let go of the extent, and the extent may have shrunk before its new neighbour
    // came in: both are found here.
    if (node->version.load(std::memory_order_acquire) != version) continue;
    if (page - view.first < view.count) return true;
  }
  return false;
}

VmaTree::Path VmaTree::Find(RegionPage page) const {
  Path path;
  Node* node = root_;
  for (int level = 0;; ++level) {
    const int slot = SlotOf(*node, page);
    FREEHOLD_DCHECK(slot >= 0);
    path.node_[level] = node;
    path.slot_[level] = slot;
    if (Height(*node) == 0) {
      path.depth_ = level + 1;
      return path;
    }
    node = Child(*node, slot);
  }
}

bool VmaTree::Step(Path& path, int direction) const {
  int level = path.depth_ - 1;
  for (; level >= 0; --level) {
    const int slot = path.slot_[level] + direction;
    if (slot >= 0 && slot < Count(*path.node_[level])) {
      path.slot_[level] = slot;
      break;
    }
  }
  if (level < 0) return false;
  for (++level; level < path.depth_; ++level) {
    path.node_[level] = Child(*path.node_[level - 1], path.slot_[level - 1]);
    path.slot_[level] = direction > 0 ? 0 : Count(*path.node_[level]) - 1;
  }
  return true;
}

bool VmaTree::FindGap(RegionPage count, std::uint64_t alignment, std::uint64_t origin,
                      Path& path) const {
  const GapRequest request{count, alignment, origin};
  path.depth_ = depth_;
  // A gap with room for any misalignment is found by descent alone; only when there is none do all gaps
  // that are long enough have to be looked at.
  const std::uint64_t roomy = count + alignment - 1;
  return (roomy <= UINT32_MAX && FindGapBelow(0, static_cast<RegionPage>(roomy), request, path)) ||
         (alignment > 1 && FindGapBelow(0, count, request, path));
}

bool VmaTree::FindGapBelow(int level, RegionPage at_least, const GapRequest& request,
                           Path& path) const {
  Node* node = level == 0 ? root_
                          : Child(*path.node_[level - 1], path.slot_[level - 1]);
  path.node_[level] = node;
  for (int slot = 0, size = Count(*node); slot < size; ++slot) {
    if (Gap(*node, slot) < at_least) continue;
    path.slot_[level] = slot;
    if (Height(*node) == 0 ? Fits(*Leaf(*node, slot), request)
                           : FindGapBelow(level + 1, at_least, request, path)) {
      return true;
    }
  }
  return false;
}

RegionPage VmaTree::LargestGap() const { return MaxGap(*root_); }

RegionPage VmaTree::MaxGap(const Node& node) {
  RegionPage max = 0;
  for (int slot = 0, size = Count(node); slot < size; ++slot) max = std::max(max, Gap(node, slot));
  return max;
}

void VmaTree::InsertAt(Node& node, int slot, RegionPage key, void* entry, RegionPage gap) {
  NodeWriter writer(node);
  const int size = Count(node);
  for (int i = size; i > slot; --i) Move(node, i, node, i - 1);
  Put(node, slot, key, entry, gap);
  SetCount(node, size + 1);
}

void VmaTree::EraseAt(Node& node, int slot) {
  NodeWriter writer(node);
  const int size = Count(node);
  for (int i = slot; i < size - 1; ++i) Move(node, i, node, i + 1);
  SetCount(node, size - 1);
}

// Moves all but the first `keep` entries of `left` to a new node on its right.
VmaTree::Node* VmaTree::SplitInto(Node& left, int keep) {
  Node* right = TakeNode();
  NodeWriter left_writer(left);
  NodeWriter right_writer(*right);
  right->height.store(static_cast<std::uint8_t>(Height(left)), std::memory_order_release);
  for (int i = keep; i < kFanout; ++i) Move(*right, i - keep, left, i);
  SetCount(*right, kFanout - keep);
  SetCount(left, keep);
  return right;
}

// The old root keeps its place as the left child: a reader that still starts there finds its version moved.
void VmaTree::GrowRoot(Node* left, Node* right) {
  FREEHOLD_CHECK(depth_ < kMaxDepth);
  Node* root = TakeNode();
  {
    NodeWriter writer(*root);
    root->height.store(static_cast<std::uint8_t>(Height(*left) + 1), std::memory_order_release);
    Put(*root, 0, Key(*left, 0), left, MaxGap(*left));
    Put(*root, 1, Key(*right, 0), right, MaxGap(*right));
    SetCount(*root, 2);
  }
  ++depth_;
  SetRoot(root);
}

void VmaTree::InsertAfter(const Path& path, Vma* vma) {
  FREEHOLD_DCHECK(pool_size_ > static_cast<std::size_t>(depth_));
  ++size_;
  int level = path.depth_ - 1;
  int slot = path.slot_[level] + 1;
  RegionPage key = vma->first_page();
  void* entry = vma;
  RegionPage gap = GapOf(*vma);
  while (Count(*path.node_[level]) == kFanout) {
    Node* left = path.node_[level];
    // Maps that carve the lowest gap insert in ascending order, just before the last entry or after it: nodes
    // that are left behind stay as they are, so they are left nearly full.
    const int keep = slot >= kFanout - 1 ? kAscendingKeep : kFanout / 2;
    Node* right = SplitInto(*left, keep);
    slot <= keep ? InsertAt(*left, slot, key, entry, gap)
                 : InsertAt(*right, slot - keep, key, entry, gap);
    key = Key(*right, 0);
    entry = right;
    gap = MaxGap(*right);
    if (level == 0) return GrowRoot(left, right);
    --level;
    path.node_[level]->gap[path.slot_[level]].store(MaxGap(*left), std::memory_order_relaxed);
    slot = path.slot_[level] + 1;
  }
  InsertAt(*path.node_[level], slot, key, entry, gap);
  PropagateGap(path, level);
}

void VmaTree::Erase(const Path& path) {
  --size_;
  int level = path.depth_ - 1;
  EraseAt(*path.node_[level], path.slot_[level]);
  // A node that ran empty leaves its parent; the root never does, since the first extent stays.
  while (level > 0 && Count(*path.node_[level]) == 0) {
    AddNode(path.node_[level]);
    --level;
    EraseAt(*path.node_[level], path.slot_[level]);
  }
  if (path.slot_[level] == 0 && Count(*path.node_[level]) > 0) PropagateKey(path, level);
  while (level > 0 && Count(*path.node_[level]) < kMergeBelow && MergeWithNeighbour(path, level)) {
    --level;
  }
  PropagateGap(path, level);
  Node* root = root_;
  while (Height(*root) > 0 && Count(*root) == 1) {
    Node* child = Child(*root, 0);
    SetRoot(child);
    { NodeWriter writer(*root); }                   // Readers that started there start over.
    AddNode(root);
    --depth_;
    root = child;
  }
}

// Merges the node at `level` with a neighbour under the same parent when both fit well into one.
bool VmaTree::MergeWithNeighbour(const Path& path, int level) {
  Node& parent = *path.node_[level - 1];
  const int slot = path.slot_[level - 1];
  for (const int left_slot : {slot - 1, slot}) {
    if (left_slot < 0 || left_slot + 1 >= Count(parent)) continue;
    Node& left = *Child(parent, left_slot);
    Node& right = *Child(parent, left_slot + 1);
    const int size = Count(left);
    if (size + Count(right) > kMergedAtMost) continue;
    {
      NodeWriter left_writer(left);
      NodeWriter right_writer(right);
      for (int i = 0; i < Count(right); ++i) Move(left, size + i, right, i);
      SetCount(left, size + Count(right));
    }
    EraseAt(parent, left_slot + 1);
    parent.gap[left_slot].store(MaxGap(left), std::memory_order_relaxed);
    AddNode(&right);
    return true;
  }
  return false;
}

// The first key of the node at `level` moved up: so do the separators that name it.
void VmaTree::PropagateKey(const Path& path, int level) {
  const RegionPage key = Key(*path.node_[level], 0);
  for (; level > 0; --level) {
    Node& parent = *path.node_[level - 1];
    {
      NodeWriter writer(parent);
      parent.key[path.slot_[level - 1]].store(key, std::memory_order_release);
    }
    if (path.slot_[level - 1] != 0) return;
  }
}

void VmaTree::PropagateGap(const Path& path, int level) {
  for (; level > 0; --level) {
    std::atomic<RegionPage>& gap = path.node_[level - 1]->gap[path.slot_[level - 1]];
    const RegionPage max = MaxGap(*path.node_[level]);
    if (gap.load(std::memory_order_relaxed) == max) return;
    gap.store(max, std::memory_order_relaxed);
  }
}

void VmaTree::RefreshGap(const Path& path) {
  const int leaf = path.depth_ - 1;
  std::atomic<RegionPage>& gap = path.node_[leaf]->gap[path.slot_[leaf]];
  const RegionPage now = GapOf(*path.vma());
  if (gap.load(std::memory_order_relaxed) == now) return;
  gap.store(now, std::memory_order_relaxed);
  PropagateGap(path, leaf);
}

void VmaTree::AddNode(Node* node) {
  {
    NodeWriter writer(*node);
    SetCount(*node, 0);
    node->entry[0].store(pool_, std::memory_order_release);
  }
  pool_ = node;
  ++pool_size_;
}

VmaTree::Node* VmaTree::TakeNode() {
  FREEHOLD_CHECK(pool_ != nullptr);
  Node* node = pool_;
  pool_ = Child(*node, 0);
  --pool_size_;
  return node;
}

void VmaTree::CheckInvariants(RegionPage pages) const {
  RegionPage next = 0;
  std::size_t extents = 0;
  CheckNode(root_, depth_ - 1, next, extents);
  FREEHOLD_CHECK(next == pages);
  FREEHOLD_CHECK(extents == size_);
}

void VmaTree::CheckNode(const Node* node, int height, RegionPage& next, std::size_t& extents) const {
  FREEHOLD_CHECK(Height(*node) == height);
  FREEHOLD_CHECK(Count(*node) > 0);
  for (int slot = 0; slot < Count(*node); ++slot) {
    FREEHOLD_CHECK(slot == 0 || Key(*node, slot - 1) < Key(*node, slot));
    if (height > 0) {
      const Node* child = Child(*node, slot);
      FREEHOLD_CHECK(Key(*node, slot) <= Key(*child, 0));
      FREEHOLD_CHECK(slot == 0 || Key(*node, slot) >= next);
      FREEHOLD_CHECK(Gap(*node, slot) == MaxGap(*child));
      CheckNode(child, height - 1, next, extents);
      continue;
    }
    const Vma& vma = *Leaf(*node, slot);
    FREEHOLD_CHECK(Key(*node, slot) == vma.first_page());
    FREEHOLD_CHECK(vma.first_page() == next);
    FREEHOLD_CHECK(vma.page_count() > 0);
    FREEHOLD_CHECK(Gap(*node, slot) == GapOf(vma));
    next = vma.end_page();
    ++extents;
  }
}

}  // namespace freehold::vm
