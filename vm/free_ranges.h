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

#include "absl/base/optimization.h"
#include "vm/os/check.h"
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

  // The extent of exactly `count` pages that was freed last, or null. REQUIRES: count <= kExactPages.
  Vma* Newest(RegionPage count, Knowledge knowledge) const {
    return bins_[BinOf(count)].lists[Index(knowledge)].newest;
  }
  // Takes that out. REQUIRES: there is one.
  void RemoveNewest(RegionPage count, Knowledge knowledge);
  // Takes out an extent of exactly `count` pages, or for more than kExactPages of at least that many, whose
  // first page counted from `origin` is a multiple of `alignment`; the newest that a short search of each bin
  // finds, or null.
  Vma* Take(RegionPage count, Knowledge knowledge, std::uint64_t alignment, std::uint64_t origin);

  // Of the extents of less than `count` pages, but more than kExactPages, that may be resident: the first of a short
  // search, large ones first, that `accepts(vma)`; or null. It stays in its bin.
  template <typename Accepts>
  Vma* FindSmaller(RegionPage count, const Accepts& accepts) const;

  // Of the extents of more than kExactPages that may be resident, one of the smallest; null if there is none.
  Vma* SmallestLarge() const;

  // Takes out the up to `most` extents of exactly `count` pages that have waited longest, the oldest first; returns how
  // many. REQUIRES: count <= kExactPages.
  std::size_t TakeOldest(RegionPage count, Knowledge knowledge, std::size_t most, Vma** out);

  // The highest bin up to `bin` that holds an extent; -1 if none does.
  int BinAtOrBelow(int bin) const;
  // The extent of `bin` that has waited longest, or null.
  Vma* Oldest(int bin, Knowledge knowledge) const { return bins_[bin].lists[Index(knowledge)].oldest; }
  std::size_t ListSize(int bin, Knowledge knowledge) const {
    return bins_[bin].lists[Index(knowledge)].size;
  }

  // Pages in bins that may be resident.
  std::size_t dirty_pages() const { return dirty_pages_; }
  // Counts them, bin by bin.
  std::size_t extents() const;
  // Pages of extents of at most kExactPages. Looks at each bin that has any.
  std::size_t small_pages() const;
  // Where dirty_pages() is kept, for a Metric.
  const std::size_t* dirty_pages_location() const { return &dirty_pages_; }

  // Whether users of mappings of `count` pages tend to touch them, so that re-using a dirty extent (one
  // memset) beats a clean one (faults, and a later purge). Learnt from samples. Lock-free.
  bool ExpectsResident(RegionPage count) const;
  // Whether an unmap of `count` pages should count its resident pages first. Lock-free.
  bool WantsSample(RegionPage count);
  void AddSample(RegionPage count, std::size_t resident, std::size_t sampled);
  // The unmap that was to be sampled tells nothing; try one later.
  void SkipSample(RegionPage count);

  // Brings what Push and Remove of an extent of `count` pages change into the caches. Lock-free.
  void Prefetch(RegionPage count) const {
    __builtin_prefetch(&bins_[BinOf(count)], 1);
    __builtin_prefetch(&bins_[BinOf(count) + 1], 1);
    __builtin_prefetch(&occupied_, 1);
  }

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
    // Of sampled pages, moving average, in 1/kShareOne. Both are read without the lock.
    std::atomic<std::uint32_t> resident_share{0};
    std::atomic<std::uint32_t> samples{0};
    std::atomic<std::uint32_t> until_sample{0};
  };
  static constexpr std::uint32_t kShareOne = 1 << 16;
  // Extents looked at in a bin that holds several sizes, or for an alignment.
  static constexpr int kSearchLimit = 8;
  static constexpr int Index(Knowledge knowledge) { return static_cast<int>(knowledge); }
  static constexpr int kOccupiedWords = (kBinCount + 63) / 64;

  // The lowest bin from `bin` on that holds an extent of `knowledge`; kBinCount if none does.
  int BinAtOrAbove(int bin, Knowledge knowledge) const;
  void SetOccupied(int bin, Knowledge knowledge, bool occupied);

  // Takes from one bin.
  Vma* TakeFrom(int bin, RegionPage count, Knowledge knowledge, std::uint64_t alignment, std::uint64_t origin);

  // Puts `vma` into `list`, whose newest extent was freed later. Looks at kOrderLimit extents, and makes `freed_at` as
  // old as the last of them if that is not enough.
  static void InsertOlder(List& list, Vma* vma, std::uint32_t freed_at);

  Bin bins_[kBinCount];
  std::uint64_t occupied_[kKnowledgeCount][kOccupiedWords] = {};
  std::size_t dirty_pages_ = 0;
};

// Inline: these are on the path of every map and unmap.

inline void FreeRanges::SetOccupied(int bin, Knowledge knowledge, bool occupied) {
  std::uint64_t& word = occupied_[Index(knowledge)][bin / 64];
  const std::uint64_t bit = std::uint64_t{1} << (bin % 64);
  word = occupied ? word | bit : word & ~bit;
}

inline void FreeRanges::Push(Vma* vma, std::uint32_t freed_at) {
  FREEHOLD_DCHECK(vma->Is(VmaState::kCached));
  const RegionPage count = vma->page_count();
  const int bin = BinOf(count);
  const Knowledge knowledge = vma->knowledge;
  List& list = bins_[bin].lists[Index(knowledge)];
  ++list.size;
  if (knowledge != Knowledge::kClean) dirty_pages_ += count;
  // Nearly always the newest; parts of an extent that was split are as old as it was.
  Vma* const newest = list.newest;
  if (ABSL_PREDICT_FALSE(newest == nullptr)) {
    list.oldest = vma;
    SetOccupied(bin, knowledge, true);
  } else if (ABSL_PREDICT_TRUE(newest->freed_at <= freed_at)) {
    newest->newer = vma;
  } else {
    return InsertOlder(list, vma, freed_at);
  }
  vma->freed_at = freed_at;
  vma->newer = nullptr;
  vma->older = newest;
  list.newest = vma;
}

inline void FreeRanges::Remove(Vma* vma) {
  const RegionPage count = vma->page_count();
  const int bin = BinOf(count);
  const Knowledge knowledge = vma->knowledge;
  List& list = bins_[bin].lists[Index(knowledge)];
  Vma* const newer = vma->newer;
  Vma* const older = vma->older;
  (newer != nullptr ? newer->older : list.newest) = older;
  (older != nullptr ? older->newer : list.oldest) = newer;
  if (--list.size == 0) SetOccupied(bin, knowledge, false);
  if (knowledge != Knowledge::kClean) dirty_pages_ -= count;
}

inline void FreeRanges::RemoveNewest(RegionPage count, Knowledge knowledge) {
  const int bin = BinOf(count);
  List& list = bins_[bin].lists[Index(knowledge)];
  Vma* const older = list.newest->older;
  list.newest = older;
  if (ABSL_PREDICT_TRUE(older != nullptr)) {
    older->newer = nullptr;
  } else {
    list.oldest = nullptr;
    SetOccupied(bin, knowledge, false);
  }
  --list.size;
  if (knowledge != Knowledge::kClean) dirty_pages_ -= count;
}

inline Vma* FreeRanges::TakeFrom(int bin, RegionPage count, Knowledge knowledge, std::uint64_t alignment,
                                 std::uint64_t origin) {
  Vma* vma = bins_[bin].lists[Index(knowledge)].newest;
  for (int i = 0; vma != nullptr && i < kSearchLimit; ++i, vma = vma->older) {
    if (vma->page_count() < count || ((origin + vma->first_page()) & (alignment - 1)) != 0) continue;
    Remove(vma);
    return vma;
  }
  return nullptr;
}

inline Vma* FreeRanges::Take(RegionPage count, Knowledge knowledge, std::uint64_t alignment,
                             std::uint64_t origin) {
  int bin = BinOf(count);
  if (count <= kExactPages) return TakeFrom(bin, count, knowledge, alignment, origin);
  while ((bin = BinAtOrAbove(bin, knowledge)) < kBinCount) {
    if (Vma* vma = TakeFrom(bin++, count, knowledge, alignment, origin)) return vma;
  }
  return nullptr;
}

template <typename Accepts>
Vma* FreeRanges::FindSmaller(RegionPage count, const Accepts& accepts) const {
  int left = kSearchLimit;
  for (int bin = BinAtOrBelow(BinOf(count)); bin >= static_cast<int>(kExactPages); bin = BinAtOrBelow(bin - 1)) {
    for (const Knowledge knowledge : {Knowledge::kResident, Knowledge::kUnknown}) {
      for (Vma* vma = bins_[bin].lists[Index(knowledge)].newest; vma != nullptr; vma = vma->older) {
        if (left-- == 0) return nullptr;
        if (vma->page_count() < count && accepts(vma)) return vma;
      }
    }
  }
  return nullptr;
}

inline bool FreeRanges::ExpectsResident(RegionPage count) const {
  const Bin& bin = bins_[BinOf(count)];
  // One memset of a small extent costs less than a single fault. Of a large one it would make far more
  // resident than its users ever touch, unless they touch most of it.
  const std::uint32_t threshold = count <= kExactPages ? kShareOne / 32 : kShareOne / 2;
  return bin.samples.load(std::memory_order_relaxed) > 0 &&
         bin.resident_share.load(std::memory_order_relaxed) >= threshold;
}

inline bool FreeRanges::WantsSample(RegionPage count) {
  std::atomic<std::uint32_t>& until = bins_[BinOf(count)].until_sample;
  const std::uint32_t left = until.load(std::memory_order_relaxed);
  if (left == 0) return true;
  // Racing threads may lose a step: the period is only about kSampleEvery.
  until.store(left - 1, std::memory_order_relaxed);
  return false;
}

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_FREE_RANGES_H_
