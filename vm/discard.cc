// Discard: drops the content of mapped memory through the purge stage, under shared range locks that keep the
// ranges from being unmapped and handed to somebody else meanwhile.
#include <cstddef>
#include <memory>
#include <new>

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

namespace {

// Guards of several ranges of one region. Only the first one waits: whoever held one range and waited for another
// could wait for a request that spans both, came before, and waits for the first (requests are served in order).
class Guards {
 public:
  static constexpr std::size_t kCapacity = 16;

  Guards() = default;
  Guards(const Guards&) = delete;
  Guards& operator=(const Guards&) = delete;
  ~Guards() {
    while (size_ > 0) std::destroy_at(&At(--size_));
  }

  // Whether `range` is held now. REQUIRES: room; `range` lies after those that are held.
  bool Add(sync::RangeLock& lock, PageRange range) {
    void* const place = storage_[size_];
    const Guard& guard = size_ == 0
                             ? *new (place) Guard(lock, range, Mode::kShared, sync::Operation::kPurge)
                             : *new (place) Guard(Guard::Try(lock, range, Mode::kShared, sync::Operation::kPurge));
    ++size_;
    if (guard.held()) return true;
    std::destroy_at(&At(--size_));
    return false;
  }
  std::size_t size() const { return size_; }
  const Guard& operator[](std::size_t i) { return At(i); }

 private:
  Guard& At(std::size_t i) { return *std::launder(reinterpret_cast<Guard*>(storage_[i])); }

  alignas(Guard) std::byte storage_[kCapacity][sizeof(Guard)];
  std::size_t size_ = 0;
};

}  // namespace

Error AddressSpace::Discard(absl::Span<const PageRange> ranges) {
  // Refused as a whole, before anything is dropped; what changes from here on is another thread's doing.
  for (const PageRange& range : ranges) {
    if (const Error error = CheckDiscard(range, nullptr); !error.ok()) return error;
  }
  for (std::size_t next = 0; next < ranges.size();) {
    // A run of ranges that ascend within one region can be locked together, in order.
    PageRange batch[Guards::kCapacity];
    Guards guards;
    for (; next < ranges.size() && guards.size() < Guards::kCapacity; ++next) {
      const PageRange range = ranges[next];
      Region* region = RegionOf(range.first);
      const std::size_t size = guards.size();
      if (size > 0 && (range.first < batch[size - 1].end || region != RegionOf(batch[0].first) ||
                       options_.lock_policy == sync::LockPolicy::kCoarse)) {
        break;
      }
      if (!guards.Add(region->range_lock(), range)) break;
      batch[size] = range;
    }
    for (std::size_t i = 0; i < guards.size(); ++i) {
      if (const Error error = CheckDiscard(batch[i], &guards[i]); !error.ok()) return error;
    }
    if (const Error error = purge_stage_->Discard({batch, guards.size()}); !error.ok()) return error;
  }
  return Error::Ok();
}

}  // namespace freehold::vm
