// Keeps mapped memory where it is while a device, or I/O in flight, uses it.
//
// A pinned page is not unmapped, and not replaced, before the last pin on it goes. An Unmap that meets a pin takes
// the memory away from lookups at once, as ever, and returns; the pages stay as they are, and are handed to nobody,
// until no pin overlaps them. A Map or Remap that would have to put something else in their place is refused:
// kPinned. Content and protection are not kept: whoever may write to the memory may write, discard, protect.
//
//     const Pin pin(space, buffer);
//     if (!pin.ok()) return pin.error();
//     ... the device works ...
//
// Thread safety: thread-compatible; different threads may make and destroy one, so that the completion of I/O can.
// Waiting:       to make one waits for a verb that is changing these very pages, for nothing else. The last pin of
//                memory that was unmapped gives it back, with the system calls that this may take.
// Lock order:    as a verb: the range, then the tree lock. REQUIRES: no range lock of these pages is held.
// Allocation:    none.
// Fork:          the child inherits no pins; Pin objects that it has do nothing there.
#ifndef FREEHOLD_VM_PIN_H_
#define FREEHOLD_VM_PIN_H_

#include <cstdint>

#include "vm/page_range.h"
#include "vm/result.h"
#include "vm/sync/range_request.h"

namespace freehold::vm {

class AddressSpace;
class Region;

class [[nodiscard]] Pin {
 public:
  // Pins `range`, any number of VMAs of one region. Errors: kEmpty, kOverflow, kOutsideReservation (also across
  // regions), kNotMapped (it must be mapped throughout).
  Pin(AddressSpace& space, PageRange range);
  ~Pin();
  Pin(const Pin&) = delete;
  Pin& operator=(const Pin&) = delete;

  bool ok() const { return error_.ok(); }
  Error error() const { return error_; }
  PageRange range() const { return request_.range; }

 private:
  friend class Region;

  Region* region_ = nullptr;
  Error error_;
  std::uint32_t forks_ = 0;  // of the region when it was pinned
  sync::RangeRequest request_;
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_PIN_H_
