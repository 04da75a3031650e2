// The free extents of a region that wait for re-use at their own size, binned by page count, with what is
// known of their pages (clean, resident, unknown) and when they were freed.
//
// This is the free-range index beside the gap index of VmaTree: an extent in a bin keeps its place in the
// tree, so that unmapping and mapping again at the same size changes one state field and two links.
//
// Thread safety: REQUIRES the region's tree lock, except where a method says otherwise.
// Units:         pages; times are ticks of the address space's coarse clock.
// Invariants:    F1. An extent is in a bin exactly while its state is kCached.
//                F2. Within a list, extents are ordered by the time they were freed, newest first.
//                F3. occupied_ has a bit for every list that is not empty: searches are bounded by the words of
//                    a bit set, not by bins or extents.
#ifndef FREEHOLD_VM_FREE_RANGES_H_
#define FREEHOLD_VM_FREE_RANGES_H_

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "vm/vma.h"

namespace freehold::vm {

class FreeRanges {
 public:
  // Up to this size every page count has a bin of its own; above, four bins a doubling.
  static constexpr RegionPage kExactPages = 64;
  static constexpr int kBinCount = static_cast<int>(kExactPages) + 4 * (32 - 6);

  static constexpr int BinOf(RegionPage count) {
    if (count <= kExactPages) return static_cast<int>(count) - 1;
    const int log2 = std::bit_width(count) - 1;
    return static_cast<int>(kExactPages) + (log2 - 6) * 4 + static_cast<int>((count >> (log2 - 2)) & 3);
  }

  // REQUIRES: `vma` is kCached and in no bin. An extent older than many in its bin may pass for older than it is.
  void Push(Vma* vma, std::uint32_t freed_at);
  // REQUIRES: `vma` is in a bin.
  void Remove(Vma* vma);

  // Takes out an extent of exactly `count` pages, or for more than kExactPages of at least that many, whose
  // first page counted from `origin` is a multiple of `alignment`; the newest that a short search of each bin
  // finds, or null.
  Vma* Take(RegionPage count, Knowledge knowledge, std::uint64_t alignment, std::uint64_t origin);

  // The highest bin up to `bin` that holds an extent; -1 if none does.
  int BinAtOrBelow(int bin) const;
  // The extent of `bin` that has waited longest, or null.
  Vma* Oldest(int bin, Knowledge knowledge) const { return bins_[bin].lists[Index(knowledge)].oldest; }
  std::size_t ListSize(int bin, Knowledge knowledge) const {
    return bins_[bin].lists[Index(knowledge)].size;
  }

  // Pages in bins that may be resident.
  std::size_t dirty_pages() const { return dirty_pages_; }
  std::size_t extents() const { return extents_; }

  // Whether users of mappings of `count` pages tend to touch them, so that re-using a dirty extent (one
  // memset) beats a clean one (faults, and a later purge). Learnt from samples.
  bool ExpectsResident(RegionPage count) const;
  // Whether an unmap of `count` pages should count its resident pages first. Lock-free.
  bool WantsSample(RegionPage count);
  void AddSample(RegionPage count, std::size_t resident, std::size_t sampled);
  // The unmap that was to be sampled tells nothing; try one later.
  void SkipSample(RegionPage count);

  // CHECKs F1 to F3 and the sums.
  void CheckInvariants() const;

 private:
  struct List {
    Vma* newest = nullptr;
    Vma* oldest = nullptr;
    std::size_t size = 0;
  };
  struct Bin {
    List lists[kKnowledgeCount];
    std::uint32_t resident_share = 0;  // of sampled pages, moving average, in 1/kShareOne
    std::uint32_t samples = 0;
    std::atomic<std::uint32_t> until_sample{0};
  };
  static constexpr std::uint32_t kShareOne = 1 << 16;
  static constexpr int Index(Knowledge knowledge) { return static_cast<int>(knowledge); }
  static constexpr int kOccupiedWords = (kBinCount + 63) / 64;

  // The lowest bin from `bin` on that holds an extent of `knowledge`; kBinCount if none does.
  int BinAtOrAbove(int bin, Knowledge knowledge) const;
  void SetOccupied(int bin, Knowledge knowledge, bool occupied);

  Bin bins_[kBinCount];
  std::uint64_t occupied_[kKnowledgeCount][kOccupiedWords] = {};
  std::size_t dirty_pages_ = 0;
  std::size_t extents_ = 0;
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_FREE_RANGES_H_
