#include "vm/free_ranges.h"

#include "vm/os/check.h"

namespace freehold::vm {
namespace {

// One unmap in so many pays for a mincore, after the first few.
constexpr std::uint32_t kSampleEvery = 64;
constexpr std::uint32_t kFirstSamples = 4;

}  // namespace

Vma* FreeRanges::FindOlder(const List& list, std::uint32_t freed_at) {
  Vma* older = nullptr;
  for (Vma* next = list.oldest; next->freed_at <= freed_at; next = next->newer) older = next;
  return older;
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
