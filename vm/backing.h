// Where the content of a mapping comes from, when it is not anonymous memory: a file, a pager.
//
// A mapping gets its backing by MapOptions and shows it from one page on, page after page. Its extents keep the
// pointer, and lookups report it.
//
// Thread safety: thread-safe. Every call is made with no short lock held, so it may make system calls.
// Lifetime:      references are counted in mapped pages, and by whoever else needs one: who maps adds its pages, who
//                unmaps drops them, and what splits and merges extents changes nothing. Readers without a lock may
//                still look at a backing that has become unused: OnUnused defers what they would miss
//                (AddressSpace::epochs).
#ifndef FREEHOLD_VM_BACKING_H_
#define FREEHOLD_VM_BACKING_H_

#include <atomic>
#include <cstdint>
#include <string_view>

#include "vm/os/kernel.h"
#include "vm/page_range.h"
#include "vm/result.h"

namespace freehold::vm {

class FileBacking;

// Whether accesses to pages that are not there yet wait for a FaultService (vm/fault.h), and so for whoever holds their
// range. Such pages are not touched with the range held, nor dropped behind the service's back.
enum class Paging : bool { kNone, kOnDemand };

// For humans: what /proc/PID/maps says about a mapping.
struct BackingDescription {
  bool shared = false;
  std::uint32_t device_major = 0;
  std::uint32_t device_minor = 0;
  std::uint64_t inode = 0;
  std::string_view name;  // lives as long as the backing
};

class Backing {
 public:
  Backing(const Backing&) = delete;
  Backing& operator=(const Backing&) = delete;

  // Makes the kernel show this backing from its page `page` on in `range`, with `protection`, whatever was there
  // before. The range is held exclusively. `occupied`: something is mapped there; on error it is there still, as far
  // as the kernel lets it. Otherwise the caller resets the range on error.
  virtual Error Install(os::Kernel& kernel, PageRange range, std::uint64_t page, os::Protection protection,
                        bool occupied) = 0;
  // What the kernel has of `range` is about to be dropped: unmapped, or replaced. Content that lives nowhere else
  // is saved here. The mapping may live on, if the verb fails afterwards. The range is held, at least shared.
  virtual void Flush(os::Kernel& kernel, PageRange range, std::uint64_t page) = 0;

  // Makes the pages of `range`, at most 2 MiB, present, as far as that goes; a mapping of `protection` that
  // refuses answers with an error. The range is held, at least shared.
  virtual Error Populate(os::Kernel& kernel, PageRange range, os::Protection protection) {
    if (!Has(protection, os::Protection::kWrite)) {
      return {ErrorCode::kUnsupported};
    }
    kernel.TouchForWrite(range);
    return Error::Ok();
  }
  // Stores what was written to `range`, as msync(2). No range is held: what is mapped there may be another mapping.
  virtual Error Sync(os::Kernel&, PageRange, os::SyncOptions) { return Error::Ok(); }
  // Null if it is none.
  virtual FileBacking* AsFile() { return nullptr; }
  virtual BackingDescription Describe() const { return {}; }

  // No mapping gets more than this, by Map or Protect: kDenied.
  os::Protection max_protection() const { return max_protection_; }
  bool Allows(os::Protection protection) const {
    return (static_cast<unsigned>(protection) & ~static_cast<unsigned>(max_protection_)) == 0;
  }

  // True for a PagerBacking, and for nothing else.
  bool paged() const { return paging_ == Paging::kOnDemand; }

  // Release and acquire: what was done with a backing happens before OnUnused.
  void AddPages(std::uint64_t count) { pages_.fetch_add(count, std::memory_order_relaxed); }
  void DropPages(std::uint64_t count) {
    if (pages_.fetch_sub(count, std::memory_order_acq_rel) == count) OnUnused();
  }
  std::uint64_t pages() const { return pages_.load(std::memory_order_relaxed); }

 protected:
  explicit Backing(os::Protection max_protection, Paging paging = Paging::kNone)
      : max_protection_(max_protection), paging_(paging) {}
  // Never deleted through this interface.
  ~Backing() = default;

  // The last reference is gone. Range locks may be held.
  virtual void OnUnused() = 0;

 private:
  std::atomic<std::uint64_t> pages_{0};
  const os::Protection max_protection_;
  const Paging paging_;
};

// Up to `kCapacity` times pages that go with the scope: declared before the lock under which they are found.
template <int kCapacity>
class DroppedPages {
 public:
  DroppedPages() = default;
  DroppedPages(const DroppedPages&) = delete;
  DroppedPages& operator=(const DroppedPages&) = delete;
  ~DroppedPages() {
    for (int i = 0; i < size_; ++i) drops_[i].backing->DropPages(drops_[i].pages);
  }

  // Nothing for null.
  void Add(Backing* backing, std::uint64_t pages) {
    if (backing != nullptr) drops_[size_++] = {backing, pages};
  }

 private:
  struct Drop {
    Backing* backing;
    std::uint64_t pages;
  };
  int size_ = 0;
  Drop drops_[kCapacity];
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_BACKING_H_
