// Several changes of an address space, all of them or none.
//
//     Transaction swap(space);
//     swap.Map(area, {.protection = Protection::kRead, .backing = &file});
//     swap.Unmap(scratch);
//     swap.Protect(table, Protection::kReadWrite);
//     const Error error = swap.Commit();
//
// No lookup finds one step done after another has found a step not done, and no snapshot does. Accesses to the
// memory itself are as with the single verbs: a step's protection or new content may be there before the others'.
// What is mapped over, content and all, is kept until nothing that is likely to fail is left.
//
// Limits: kMaxSteps steps over ranges that do not overlap, each within a region and over at most 16 extents (VMAs, and
//         the holes between them); a Map with a backing, or over one, takes free pages only: else kUnsupported.
// Locks:  all ranges of a region as one, from the lowest page to the highest, regions in ascending order; the steps
//         take effect under the tree locks of all regions concerned.
// Thread safety: thread-compatible.
#ifndef FREEHOLD_VM_TRANSACTION_H_
#define FREEHOLD_VM_TRANSACTION_H_

#include <cstddef>
#include <cstdint>

#include "vm/address_space.h"
#include "vm/page_range.h"
#include "vm/result.h"

namespace freehold::vm {

class Transaction {
 public:
  static constexpr std::size_t kMaxSteps = 16;

  explicit Transaction(AddressSpace& space) : space_(space) {}
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;

  // As AddressSpace::Map at exactly `range`, which is free, or with kReplace may be mapped.
  void Map(PageRange range, const MapOptions& options = {});
  // As AddressSpace::Unmap.
  void Unmap(PageRange range);
  // As AddressSpace::Protect.
  void Protect(PageRange range, os::Protection protection);

  // Makes all steps, and forgets them. Errors: those of the verbs, the first that is met; kOverlap (steps overlap),
  // kUnsupported (above the limits), kEmpty (no step). All is as it was then, unless the kernel refuses to drop the
  // content of what is mapped over, by when some of that may be gone.
  Error Commit();

 private:
  enum class Verb : std::uint8_t { kMap, kUnmap, kProtect };
  struct Step {
    Verb verb = Verb::kUnmap;
    PageRange range;
    MapOptions options;  // of kMap; `protection` of kProtect
  };
  class Run;

  void Add(const Step& step);

  AddressSpace& space_;
  std::size_t size_ = 0;  // may exceed kMaxSteps, which Commit refuses
  Step steps_[kMaxSteps];
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_TRANSACTION_H_
