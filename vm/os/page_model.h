// What Linux would know about reserved pages: protection, advice, presence, guards, and how many
// kernel VMAs that makes. The memory of FakeKernel; testonly.
#ifndef FREEHOLD_VM_OS_PAGE_MODEL_H_
#define FREEHOLD_VM_OS_PAGE_MODEL_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>

#include "vm/os/kernel.h"
#include "vm/page_range.h"
#include "vm/units.h"

namespace freehold::vm::os {

// One page. What a VMA is made of comes first, what the page table holds after it.
struct PageState {
  enum class Advice : std::uint8_t { kNone, kPreferHuge, kAvoidHuge };

  std::uint32_t reservation = 0;  // 1, 2, ...: the Reserve call that it came from; 0: not reserved
  Protection protection = Protection::kNone;
  Advice advice = Advice::kNone;
  bool undumped = false;  // core dumps omit it
  bool locked = false;
  std::uint32_t moved = 0;  // 1, 2, ...: the Move that brought it, and keeps its VMA apart; 0: none
  std::uint32_t file = 0;   // 1, 2, ...: the MapFile that brought it; 0: anonymous
  bool committed = false;  // was writable once since it was reserved or reset
  bool resident = false;   // was touched through the Kernel; plain stores are not seen
  bool guard = false;

  friend bool operator==(const PageState&, const PageState&) = default;
};

// The states of all reserved pages, kept as segments of equal neighbours, so that a 16 TiB
// reservation costs one node.
//
// Thread safety: thread-compatible.
// Invariants:    M1. Segments are not empty and do not overlap.
//                M2. Neighbours that touch differ in their state.
//                M3. No segment is in the state "not reserved".
class PageModel {
 public:
  // The state of one page; the default state if it is not reserved.
  PageState At(PageNumber page) const;

  // Marks `range` as reserved by a new reservation. REQUIRES: no page of it is reserved.
  void Reserve(PageRange range);
  // Forgets `range`. REQUIRES: IsReserved(range).
  void Release(PageRange range);
  // Applies `change` to every page of `range`. REQUIRES: IsReserved(range).
  void Update(PageRange range, const std::function<void(PageState&)>& change);

  // Whether all of `range` lies in one reservation.
  bool IsReserved(PageRange range) const;
  // How many pages of `range` are reserved and satisfy `predicate`.
  Pages CountIf(PageRange range, const std::function<bool(const PageState&)>& predicate) const;
  Pages CountIf(const std::function<bool(const PageState&)>& predicate) const;

  // Calls `visit` with the range of each segment, in ascending order.
  void ForEachSegment(const std::function<void(PageRange)>& visit) const;

  // VMAs once Linux has merged all neighbours that it may merge. It may have more of them: VMAs
  // that were both touched before they met (each with an anon_vma of its own) stay apart.
  // `accounted`: pages that were committed do not merge with others, as under
  // vm.overcommit_memory=2.
  std::size_t KernelVmaCount(bool accounted) const;

  // Fails if M1 to M3 do not hold.
  void CheckInvariants() const;

 private:
  struct Segment {
    PageNumber end;
    PageState state;
  };
  using Segments = std::map<PageNumber, Segment>;  // by first page

  // The segment that holds `page`, or end().
  Segments::const_iterator Find(PageNumber page) const;
  // Makes `page` the first of a segment, if it is inside one.
  void SplitAt(PageNumber page);
  // Joins equal neighbours from the segment before `range` to the one after it.
  void MergeAround(PageRange range);

  Segments segments_;
  std::uint32_t last_reservation_ = 0;
};

}  // namespace freehold::vm::os

#endif  // FREEHOLD_VM_OS_PAGE_MODEL_H_
