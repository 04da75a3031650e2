#include "vm/free_ranges.h"

#include <algorithm>

#include "vm/os/check.h"

namespace freehold::vm {
namespace {

// Extents that an extent older than the newest of its bin is compared with.
constexpr int kOrderLimit = 32;
// One unmap in so many pays for a mincore, after the first few.
constexpr std::uint32_t kSampleEvery = 256;
constexpr std::uint32_t kFirstSamples = 4;

}  // namespace

int FreeRanges::BinAtOrAbove(int bin, Knowledge knowledge) const {
  const std::uint64_t* words = occupied_[Index(knowledge)];
  for (int word = bin / 64; word < kOccupiedWords; ++word) {
    const std::uint64_t from = word == bin / 64 ? ~std::uint64_t{0} << (bin % 64) : ~std::uint64_t{0};
    if ((words[word] & from) != 0) return word * 64 + std::countr_zero(words[word] & from);
  }
  return kBinCount;
}

int FreeRanges::BinAtOrBelow(int bin) const {
  for (int word = bin / 64; bin >= 0 && word >= 0; --word) {
    std::uint64_t any = 0;
    for (const auto& words : occupied_) any |= words[word];
    if (word == bin / 64) any &= ~std::uint64_t{0} >> (63 - bin % 64);
    if (any != 0) return word * 64 + 63 - std::countl_zero(any);
  }
  return -1;
}

Vma* FreeRanges::SmallestLarge() const {
  const int resident = BinAtOrAbove(static_cast<int>(kExactPages), Knowledge::kResident);
  const int unknown = BinAtOrAbove(static_cast<int>(kExactPages), Knowledge::kUnknown);
  if (std::min(resident, unknown) == kBinCount) return nullptr;
  return resident < unknown ? Oldest(resident, Knowledge::kResident) : Oldest(unknown, Knowledge::kUnknown);
}

void FreeRanges::InsertOlder(List& list, Vma* vma, std::uint32_t freed_at) {
  Vma* older = nullptr;
  Vma* next = list.oldest;
  for (int i = 0; i < kOrderLimit && next->freed_at <= freed_at; ++i, next = next->newer) older = next;
  if (older != nullptr && next->freed_at <= freed_at) freed_at = older->freed_at;
  vma->freed_at = freed_at;
  vma->older = older;
  vma->newer = next;
  next->older = vma;
  (older != nullptr ? older->newer : list.oldest) = vma;
}

std::size_t FreeRanges::TakeOldest(RegionPage count, Knowledge knowledge, std::size_t most, Vma** out) {
  const int bin = BinOf(count);
  List& list = bins_[bin].lists[Index(knowledge)];
  const std::size_t taken = std::min(most, list.size);
  if (taken == 0) return 0;
  Vma* vma = list.oldest;
  for (std::size_t i = 0; i < taken; ++i, vma = vma->newer) out[i] = vma;
  list.oldest = vma;
  (vma != nullptr ? vma->older : list.newest) = nullptr;
  list.size -= taken;
  if (list.size == 0) SetOccupied(bin, knowledge, false);
  if (knowledge != Knowledge::kClean) dirty_pages_ -= taken * count;
  return taken;
}

std::size_t FreeRanges::extents() const {
  std::size_t extents = 0;
  for (const Bin& bin : bins_) {
    for (const List& list : bin.lists) extents += list.size;
  }
  return extents;
}

std::size_t FreeRanges::small_pages() const {
  std::size_t pages = 0;
  for (const Knowledge knowledge : {Knowledge::kClean, Knowledge::kResident, Knowledge::kUnknown}) {
    for (int bin = 0; (bin = BinAtOrAbove(bin, knowledge)) < static_cast<int>(kExactPages); ++bin) {
      pages += ListSize(bin, knowledge) * (static_cast<std::size_t>(bin) + 1);
    }
  }
  return pages;
}

void FreeRanges::AddSample(RegionPage count, std::size_t resident, std::size_t sampled) {
  Bin& bin = bins_[BinOf(count)];
  const auto share = static_cast<std::uint32_t>(resident * kShareOne / sampled);
  const std::uint32_t samples = bin.samples.load(std::memory_order_relaxed);
  const std::uint32_t before = bin.resident_share.load(std::memory_order_relaxed);
  bin.resident_share.store(samples == 0 ? share : (before * 3 + share) / 4, std::memory_order_relaxed);
  bin.samples.store(samples + 1, std::memory_order_relaxed);
  if (samples + 1 >= kFirstSamples) bin.until_sample.store(kSampleEvery, std::memory_order_relaxed);
}

void FreeRanges::SkipSample(RegionPage count) {
  bins_[BinOf(count)].until_sample.store(kSampleEvery, std::memory_order_relaxed);
}

void FreeRanges::CheckInvariants() const {
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
      FREEHOLD_CHECK((occupied_[knowledge][bin / 64] >> (bin % 64) & 1) == (size != 0 ? 1 : 0));
    }
  }
  FREEHOLD_CHECK(dirty_pages == dirty_pages_);
}

}  // namespace freehold::vm
