// A bit a page, over memory that reads as zero at first.
//
// Thread safety: thread-safe, page by page. All accesses are relaxed: what orders them is the locks of who uses it.
#ifndef FREEHOLD_VM_PAGE_BITMAP_H_
#define FREEHOLD_VM_PAGE_BITMAP_H_

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "vm/units.h"

namespace freehold::vm {

class PageBitmap {
 public:
  // Bytes that a bitmap of `count` pages takes.
  static constexpr Bytes SizeFor(Pages count) { return {(count.value + 63) / 64 * sizeof(std::uint64_t)}; }

  PageBitmap() = default;
  // REQUIRES: `words` has that size, and is aligned to 8 bytes.
  explicit PageBitmap(void* words) : words_(static_cast<std::uint64_t*>(words)) {}

  bool Test(std::uint64_t page) const { return (Word(page / 64).load(kRelaxed) >> (page % 64) & 1) != 0; }
  void Set(std::uint64_t first, std::uint64_t end) {
    ForEachWord(first, end, [this](std::uint64_t word, std::uint64_t mask) { Word(word).fetch_or(mask, kRelaxed); });
  }
  void Clear(std::uint64_t first, std::uint64_t end) {
    ForEachWord(first, end, [this](std::uint64_t word, std::uint64_t mask) { Word(word).fetch_and(~mask, kRelaxed); });
  }
  // The first page of [first, end) whose bit is set, or is not; `end` if there is none.
  std::uint64_t FindSet(std::uint64_t first, std::uint64_t end) const { return Find(first, end, 0); }
  std::uint64_t FindClear(std::uint64_t first, std::uint64_t end) const { return Find(first, end, ~std::uint64_t{0}); }

 private:
  static constexpr std::memory_order kRelaxed = std::memory_order_relaxed;

  std::atomic_ref<std::uint64_t> Word(std::uint64_t word) const { return std::atomic_ref<std::uint64_t>(words_[word]); }

  template <typename Visit>
  void ForEachWord(std::uint64_t first, std::uint64_t end, Visit visit) {
    while (first < end) {
      const std::uint64_t bits = std::min(end - first, 64 - first % 64);
      const std::uint64_t ones = bits == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << bits) - 1;
      visit(first / 64, ones << (first % 64));
      first += bits;
    }
  }

  std::uint64_t Find(std::uint64_t first, std::uint64_t end, std::uint64_t flip) const {
    while (first < end) {
      const std::uint64_t rest = (Word(first / 64).load(kRelaxed) ^ flip) >> (first % 64);
      if (rest != 0) return std::min(end, first + static_cast<std::uint64_t>(std::countr_zero(rest)));
      first = (first / 64 + 1) * 64;
    }
    return end;
  }

  std::uint64_t* words_ = nullptr;
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_PAGE_BITMAP_H_
