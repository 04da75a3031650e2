// Discard: drops the content of mapped memory through the purge stage, under shared range locks that keep the
// ranges from being unmapped and handed to somebody else meanwhile.
#include <cstddef>
#include <new>

#include "vm/address_space.h"
#include "vm/backing.h"
#include "vm/purge_stage.h"
#include "vm/region.h"

namespace freehold::vm {

using Guard = sync::RangeLock::Guard;
using Mode = sync::RangeLock::Mode;

namespace {

// Ranges that one call discards.
constexpr std::size_t kBatch = 16;

// The guards of a batch. Nobody waits for a range while holding another: who wants both, and came between, would
// wait for the one and be in the way of the other.
class BatchGuards {
 public:
  BatchGuards() = default;
  BatchGuards(const BatchGuards&) = delete;
  BatchGuards& operator=(const BatchGuards&) = delete;
  ~BatchGuards() {
    while (size_ > 0) DropLast();
  }

  // Waits for the first; false if another would have to wait.
  bool Add(sync::RangeLock& lock, PageRange range) {
    if (size_ == 0) {
      new (storage_[size_++]) Guard(lock, range, Mode::kShared, sync::Operation::kPurge);
      return true;
    }
    new (storage_[size_++]) Guard(Guard::Try(lock, range, Mode::kShared, sync::Operation::kPurge));
    if (At(size_ - 1).held()) return true;
    DropLast();
    return false;
  }
  Guard& At(std::size_t i) { return *std::launder(reinterpret_cast<Guard*>(storage_[i])); }

 private:
  void DropLast() {
    At(size_ - 1).~Guard();
    --size_;
  }

  alignas(Guard) std::byte storage_[kBatch][sizeof(Guard)];
  std::size_t size_ = 0;
};

}  // namespace

Error AddressSpace::CheckDiscard(PageRange range, const Guard* guard) const {
  if (const Error error = CheckRange(range); !error.ok()) return error;
  if (!RegionOf(range.first)->range().Contains(range)) return {ErrorCode::kOutsideReservation};
  for (PageNumber page = range.first; page < range.end;) {
    const Result<VmaInfo> vma = guard == nullptr ? Lookup(page) : LookupHeld(page, *guard);
    if (!vma.ok()) return vma.error();
    if (vma->backing != nullptr && vma->backing->paged()) return {ErrorCode::kUnsupported};
    page = vma->range.end;
  }
  return Error::Ok();
}

Error AddressSpace::Discard(absl::Span<const PageRange> ranges) {
  // Refused as a whole, before anything is dropped; what changes from here on is another thread's doing.
  for (const PageRange& range : ranges) {
    const sync::EpochDomain::ReadGuard reader(epochs_);  // keeps backings that lookups find
    if (const Error error = CheckDiscard(range, nullptr); !error.ok()) return error;
  }
  for (std::size_t next = 0; next < ranges.size();) {
    // A run of ranges that ascend within one region can be locked together, as far as none has to wait.
    PageRange batch[kBatch];
    BatchGuards guards;
    std::size_t size = 0;
    for (; next < ranges.size() && size < kBatch; ++next) {
      const PageRange range = ranges[next];
      Region* region = RegionOf(range.first);
      if (size > 0 && (range.first < batch[size - 1].end ||
                       region != RegionOf(batch[0].first) ||
                       options_.lock_policy == sync::LockPolicy::kCoarse)) {
        break;
      }
      if (!guards.Add(region->range_lock(), range)) break;
      batch[size++] = range;
    }
    for (std::size_t i = 0; i < size; ++i) {
      if (const Error error = CheckDiscard(batch[i], &guards.At(i)); !error.ok()) return error;
    }
    if (!notifiers_.empty()) {
      for (std::size_t i = 0; i < size; ++i) notifiers_.Invalidate(batch[i], Invalidation::kDiscard);
    }
    if (const Error error = purge_stage_->Discard({batch, size}); !error.ok()) return error;
  }
  return Error::Ok();
}

}  // namespace freehold::vm
