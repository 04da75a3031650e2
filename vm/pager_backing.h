// One mapping of a pager: which of its pages are in memory and which were written to, its read-ahead, and the lock
// over its pages. vm/fault.h has the users' side.
//
// Pages are counted from the start of the mapping as it was made; `pager_page` adds where that lies in the pager.
//
// Thread safety: thread-safe but for what REQUIRES the service's lock.
// Lifetime:      counted: one reference for the mapped pages together, dropped a grace period after the last of them
//                went, and one for each Pin. The last one releases the pager and destroys this.
#ifndef FREEHOLD_VM_PAGER_BACKING_H_
#define FREEHOLD_VM_PAGER_BACKING_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "vm/backing.h"
#include "vm/page_bitmap.h"
#include "vm/pager.h"
#include "vm/sync/epoch.h"
#include "vm/sync/range_lock.h"

namespace freehold::vm {

class FaultService;

// Pages of a backing, half-open.
struct PageSpan {
  std::uint64_t first = 0;
  std::uint64_t end = 0;
  bool empty() const { return first >= end; }
  std::uint64_t count() const { return empty() ? 0 : end - first; }
};

class PagerBacking final : public Backing {
 public:
  // How content comes into the mapping.
  enum class Filling : std::uint8_t {
    kOnFault,  // through userfaultfd
    kAtMap,    // all of it before MapPager returns
  };
  struct Options {
    os::Protection max_protection;
    Filling filling;
    bool track_writes;  // kOnFault: by write protection; else every page in memory counts as written to
  };

  // `capacity`: pages that the mapping may ever have. Errors: kSystem.
  static Result<PagerBacking*> Create(FaultService& service, Pager& pager, std::uint64_t pager_page, Pages capacity,
                                      const Options& options);

  void Pin() { references_.fetch_add(1, std::memory_order_relaxed); }
  void Unpin();
  // From now on, the pager is told when the mapping has gone. REQUIRES: a page is counted.
  void Announce() { announced_.store(true, std::memory_order_relaxed); }

  // ---- Backing ----
  Error Install(os::Kernel& kernel, PageRange range, std::uint64_t page, os::Protection protection,
                bool occupied) override;
  void Flush(os::Kernel& kernel, PageRange range, std::uint64_t page) override;
  BackingDescription Describe() const override { return {.name = "[pager]"}; }

  // ---- The pager; exceptions end here ----
  Result<Pages> Read(std::uint64_t page, absl::Span<std::byte> into);
  Error Writeback(std::uint64_t page, absl::Span<const std::byte> from);
  std::uint64_t pager_page(std::uint64_t page) const { return pager_page_ + page; }

  // Orders reads (shared) with write-back, eviction and invalidation (exclusive) of the same pages. LockRank::kPager:
  // taken before the range of memory, so never under one.
  sync::RangeLock& pages_lock() { return pages_lock_; }
  static PageRange LockRange(PageSpan pages) { return {PageNumber{pages.first}, PageNumber{pages.end}}; }

  // ---- Pages ----
  Filling filling() const { return options_.filling; }
  bool tracks_writes() const { return options_.track_writes; }
  // In memory; a hint unless the range is held, and never true of what is not.
  PageBitmap& present() { return present_; }
  // Written to since they were read or written back: of pages in memory.
  PageBitmap& dirty() { return dirty_; }
  // Whether a page of it was ever poisoned.
  bool poisoned() const { return poisoned_.load(std::memory_order_relaxed); }
  void SetPoisoned() { poisoned_.store(true, std::memory_order_relaxed); }
  // The next run of pages in [first, end) to write back; a hint unless the range is held exclusively.
  PageSpan NextDirty(std::uint64_t first, std::uint64_t end) const;

  // The pages around `page`, of `bounds`, that are not in memory: up to a cluster before and `max_pages` after. A hint.
  PageSpan AbsentAround(std::uint64_t page, PageSpan bounds, std::uint64_t max_pages) const;

  // ---- Read-ahead and admission, under the service's lock ----
  // What to read because of `page`, of `bounds`, all of which may be read.
  PageSpan ChooseWindow(std::uint64_t page, PageSpan bounds, std::uint64_t max_pages);
  unsigned fills = 0;    // reads under way for faults
  PageRange postponed;   // faults that wait for one of them to end lie in here

 protected:
  void OnUnused() override;

 private:
  // A reader that goes forward. A few, so that several do not take each other's read-ahead away.
  struct Stream {
    std::uint64_t next = 0;    // where its last window ended
    std::uint64_t length = 0;  // of that window; 0: unused
    std::uint64_t used = 0;    // by uses_
  };
  static constexpr std::size_t kStreams = 4;

  PagerBacking(FaultService& service, Pager& pager, std::uint64_t pager_page, Pages capacity, const Options& options,
               PageRange memory);
  ~PagerBacking() = default;
  static Bytes HeaderSize();
  void Destroy();

  FaultService& service_;
  Pager& pager_;
  const std::uint64_t pager_page_;
  const Pages capacity_;
  const Options options_;
  const PageRange memory_;  // in which this lies
  PageBitmap present_;
  PageBitmap dirty_;
  sync::RangeLock pages_lock_{sync::LockPolicy::kAdaptive, sync::LockRank::kPager};
  Stream streams_[kStreams];
  std::uint64_t uses_ = 0;
  std::atomic<bool> announced_{false};
  std::atomic<bool> poisoned_{false};
  // Release and acquire: what was done with it happens before its end.
  std::atomic<std::uint64_t> references_{1};
  struct Deferred : sync::DeferredCallback {
    PagerBacking* backing = nullptr;
  };
  Deferred deferred_;
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_PAGER_BACKING_H_
