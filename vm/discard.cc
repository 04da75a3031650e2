// Discard: drops the content of mapped memory through the purge stage, under shared range locks that keep the
// ranges from being unmapped and handed to somebody else meanwhile.
#include <optional>

#include "vm/address_space.h"
#include "vm/purge_stage.h"
#include "vm/region.h"

namespace freehold::vm {

using Guard = sync::RangeLock::Guard;
using Mode = sync::RangeLock::Mode;

Error AddressSpace::CheckDiscard(PageRange range, const Guard* guard) const {
  if (const Error error = CheckRange(range); !error.ok()) return error;
  if (!RegionOf(range.first)->range().Contains(range)) return {ErrorCode::kOutsideReservation};
  for (PageNumber page = range.first; page < range.end;) {
    const Result<VmaInfo> vma = guard == nullptr ? Lookup(page) : LookupHeld(page, *guard);
    if (!vma.ok()) return vma.error();
    page = vma->range.end;
  }
  return Error::Ok();
}

Error AddressSpace::Discard(absl::Span<const PageRange> ranges) {
  constexpr std::size_t kBatch = 16;
  // Refused as a whole, before anything is dropped; what changes from here on is another thread's doing.
  for (const PageRange& range : ranges) {
    if (const Error error = CheckDiscard(range, nullptr); !error.ok()) return error;
  }
  for (std::size_t next = 0; next < ranges.size();) {
    // A run of ranges that ascend within one region can be locked together, in order.
    PageRange batch[kBatch];
    std::optional<Guard> guards[kBatch];
    std::size_t size = 0;
    for (; next < ranges.size() && size < kBatch; ++next) {
      const PageRange range = ranges[next];
      Region* region = RegionOf(range.first);
      if (size > 0 && (range.first < batch[size - 1].end ||
                       region != RegionOf(batch[0].first) ||
                       options_.lock_policy == sync::LockPolicy::kCoarse)) {
        break;
      }
      guards[size].emplace(region->range_lock(), range, Mode::kShared, sync::Operation::kPurge);
      batch[size++] = range;
    }
    for (std::size_t i = 0; i < size; ++i) {
      if (const Error error = CheckDiscard(batch[i], &*guards[i]); !error.ok()) return error;
    }
    if (const Error error = purge_stage_->Discard({batch, size}); !error.ok()) return error;
  }
  return Error::Ok();
}

}  // namespace freehold::vm
