// Half-open ranges of pages: the argument of every verb and every range lock.
#ifndef FREEHOLD_VM_PAGE_RANGE_H_
#define FREEHOLD_VM_PAGE_RANGE_H_

#include <algorithm>
#include <cstddef>

#include "vm/units.h"

namespace freehold::vm {

// The pages [first, end). Empty when first >= end; verbs refuse empty ranges.
struct PageRange {
  PageNumber first;
  PageNumber end;

  static constexpr PageRange Of(PageNumber first, Pages count) { return {first, first + count}; }
  // The pages of [address, address + bytes). REQUIRES: `address` is page-aligned; the range does not wrap.
  static PageRange FromBytes(const void* address, Bytes bytes) {
    return Of(PageNumber::Of(address), PagesFor(bytes));
  }

  constexpr bool empty() const { return first >= end; }
  constexpr Pages count() const { return empty() ? Pages{0} : end - first; }
  constexpr Bytes bytes() const { return count().bytes(); }
  std::byte* address() const { return first.address(); }

  constexpr bool Contains(PageNumber page) const { return first <= page && page < end; }
  constexpr bool Contains(PageRange other) const { return first <= other.first && other.end <= end; }
  constexpr bool Overlaps(PageRange other) const { return first < other.end && other.first < end; }
  // The common pages; empty when there are none.
  constexpr PageRange Intersect(PageRange other) const {
    return {std::max(first, other.first), std::min(end, other.end)};
  }

  friend constexpr bool operator==(PageRange, PageRange) = default;
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_PAGE_RANGE_H_
