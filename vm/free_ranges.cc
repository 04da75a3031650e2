#include "vm/free_ranges.h"

#include "vm/os/check.h"

namespace freehold::vm {
namespace {

// Extents looked at in a bin that holds several sizes, or for an alignment.
constexpr int kSearchLimit = 8;
// One unmap in so many pays for a mincore, after the first few.
constexpr std::uint32_t kSampleEvery = 64;
constexpr std::uint32_t kFirstSamples = 4;

}  // namespace

void FreeRanges::Push(Vma* vma, std::uint32_t freed_at) {
  FREEHOLD_DCHECK(vma->Is(VmaState::kCached));
  List& list = bins_[BinOf(vma->page_count())].lists[Index(vma->knowledge)];
  vma->freed_at = freed_at;
  // Nearly always the newest; parts of an extent that was split are as old as it was.
  Vma* older = list.newest;
  if (older != nullptr && older->freed_at > freed_at) {
    older = nullptr;
    for (Vma* next = list.oldest; next->freed_at <= freed_at; next = next->newer) older = next;
  }
  vma->older = older;
  vma->newer = older != nullptr ? older->newer : list.oldest;
  (vma->newer != nullptr ? vma->newer->older : list.newest) = vma;
  (older != nullptr ? older->newer : list.oldest) = vma;
  ++list.size;
  ++extents_;
  if (vma->knowledge != Knowledge::kClean) dirty_pages_ += vma->page_count();
}

void FreeRanges::Remove(Vma* vma) {
  List& list = bins_[BinOf(vma->page_count())].lists[Index(vma->knowledge)];
  (vma->newer != nullptr ? vma->newer->older : list.newest) = vma->older;
  (vma->older != nullptr ? vma->older->newer : list.oldest) = vma->newer;
  vma->newer = vma->older = nullptr;
  --list.size;
  --extents_;
  if (vma->knowledge != Knowledge::kClean) dirty_pages_ -= vma->page_count();
}

Vma* FreeRanges::Take(RegionPage count, Knowledge knowledge, std::uint64_t alignment,
                      std::uint64_t origin) {
  const int own = BinOf(count);
  const int last = count <= kExactPages ? own : kBinCount - 1;
  for (int bin = own; bin <= last; ++bin) {
    Vma* vma = bins_[bin].lists[Index(knowledge)].newest;
    for (int i = 0; vma != nullptr && i < kSearchLimit; ++i, vma = vma->older) {
      if (vma->page_count() < count || ((origin + vma->first_page()) & (alignment - 1)) != 0) continue;
      Remove(vma);
      return vma;
    }
  }
  return nullptr;
}

bool FreeRanges::ExpectsResident(RegionPage count) const {
  const Bin& bin = bins_[BinOf(count)];
  // One memset of a small extent costs less than a single fault. Of a large one it would make far more
  // resident than its users ever touch, unless they touch most of it.
  const std::uint32_t threshold = count <= kExactPages ? kShareOne / 32 : kShareOne / 2;
  return bin.samples > 0 && bin.resident_share >= threshold;
}

bool FreeRanges::WantsSample(RegionPage count) {
  std::atomic<std::uint32_t>& until = bins_[BinOf(count)].until_sample;
  const std::uint32_t left = until.load(std::memory_order_relaxed);
  if (left == 0) return true;
  // Racing threads may lose a step: the period is only about kSampleEvery.
  until.store(left - 1, std::memory_order_relaxed);
  return false;
}

void FreeRanges::AddSample(RegionPage count, std::size_t resident, std::size_t sampled) {
  Bin& bin = bins_[BinOf(count)];
  const auto share = static_cast<std::uint32_t>(resident * kShareOne / sampled);
  bin.resident_share = bin.samples == 0 ? share : (bin.resident_share * 3 + share) / 4;
  ++bin.samples;
  if (bin.samples >= kFirstSamples) bin.until_sample.store(kSampleEvery, std::memory_order_relaxed);
}

void FreeRanges::SkipSample(RegionPage count) {
  bins_[BinOf(count)].until_sample.store(kSampleEvery, std::memory_order_relaxed);
}

void FreeRanges::CheckInvariants() const {
  std::size_t extents = 0;
  std::size_t dirty_pages = 0;
  for (int bin = 0; bin < kBinCount; ++bin) {
    for (int knowledge = 0; knowledge < kKnowledgeCount; ++knowledge) {
      const List& list = bins_[bin].lists[knowledge];
      std::size_t size = 0;
      const Vma* newer = nullptr;
      for (const Vma* vma = list.newest; vma != nullptr; newer = vma, vma = vma->older) {
        FREEHOLD_CHECK(vma->Is(VmaState::kCached));
        FREEHOLD_CHECK(BinOf(vma->page_count()) == bin && Index(vma->knowledge) == knowledge);
        FREEHOLD_CHECK(vma->newer == newer);
        FREEHOLD_CHECK(newer == nullptr || newer->freed_at >= vma->freed_at);
        if (vma->knowledge != Knowledge::kClean) dirty_pages += vma->page_count();
        ++size;
      }
      FREEHOLD_CHECK(list.oldest == newer);
      FREEHOLD_CHECK(size == list.size);
      extents += size;
    }
  }
  FREEHOLD_CHECK(extents == extents_);
  FREEHOLD_CHECK(dirty_pages == dirty_pages_);
}

}  // namespace freehold::vm
