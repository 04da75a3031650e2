// Where a mapping's content comes from and goes to, by a program's own code: it is read page by page when somebody
// touches it, and what was written to it is handed back.
//
//   class Squares final : public Pager { ... Read: fill each page ... };
//   FaultService faults(space, userfault);        // vm/fault.h
//   faults.MapPager(squares, 0, {1024});
//
// Thread safety: calls come from several threads at once: from those that handle faults, and from those that call
//                verbs. Never two at once about one page of a mapping, unless both are Read.
// Waiting:       any call may take as long as it likes. Who touches the same pages waits, and so do verbs that write
//                them back or evict them; others do not, as long as FaultOptions leaves threads for them.
// Locks:         no call is made under a lock of the address space: it may map, unmap, allocate and lock. It does not
//                touch memory mapped from a pager of the same FaultService, which may wait for the very thread.
// Errors:        values; an exception counts as kThrew. Who touches a page that could not be read gets SIGBUS, and
//                standard error a line.
#ifndef FREEHOLD_VM_PAGER_H_
#define FREEHOLD_VM_PAGER_H_

#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "vm/result.h"
#include "vm/units.h"

namespace freehold::vm {

// Pages are counted from the start of what the pager stands for; a page of it is a page of memory.
class Pager {
 public:
  virtual ~Pager() = default;

  // Fills `into`, which is page-aligned and a whole number of pages, with the content from `page` on. Returns the
  // pages filled: at least one, and fewer than asked for where the content ends or the rest is not at hand. Reads ahead
  // ask for more than was touched; whether those pages exist is found out by this.
  virtual Result<Pages> Read(std::uint64_t page, absl::Span<std::byte> into) = 0;

  // Takes back pages that were written to. `from` does not change meanwhile. After an error the pages still count as
  // written to.
  virtual Error Writeback(std::uint64_t page, absl::Span<const std::byte> from) = 0;

  // `count` pages from `page` on, as they were given to one MapPager that succeeded, are mapped no more: nothing of
  // that mapping calls the pager again.
  virtual void Release(std::uint64_t page, Pages count) {
    (void)page;
    (void)count;
  }
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_PAGER_H_
