// Large objects: those above kMaxClassSize, those that grow (GrowsAsRun), and those aligned to more than a unit. They
// are ranges of pages: up to kMaxRunSize runs of units from the page heap, above that mappings of their own. They belong
// to no thread.
//
// A run that grows takes units ahead of its need, so that most of its growth is a store. What all runs together have
// ahead is bounded by a constant and by a share of all large objects; beyond that, they take what they need.
//
// Thread safety: thread-safe; calls for one object are the program's to order.
// Lock order:    takes the page heap's and the address space's locks.
// Units:         bytes.
// Errors:        null or false when out of memory.
#ifndef FREEHOLD_ALLOCATOR_LARGE_OBJECT_H_
#define FREEHOLD_ALLOCATOR_LARGE_OBJECT_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "allocator/heap_metadata.h"
#include "allocator/memory_limit.h"
#include "allocator/page_heap.h"
#include "allocator/span.h"
#include "vm/address_space.h"
#include "vm/metric.h"
#include "vm/units.h"

namespace freehold::allocator {

class LargeObjects {
 public:
  // An object of this size that grows becomes a run, with room to grow further; from there on growth seldom copies.
  static constexpr std::size_t kMinRunSize = std::size_t{4} << 10;
  // A run of less counts as taken ahead as a whole, since it has a unit where an object of a class would do with a few
  // pages. From here on an object that grows becomes a run in any case.
  static constexpr std::size_t kSmallRunSize = std::size_t{16} << 10;
  // What runs may have ahead: so many units, and a share of what large objects have.
  static constexpr std::uint64_t kAheadUnits = 64;
  static constexpr std::uint64_t kAheadShare = 16;
  // From here on an object's memory is unmapped when it is freed; the address space keeps it for a while.
  static constexpr std::size_t kMaxRunSize = std::size_t{1} << 20;
  // An object that grows to this size, or beyond it, has huge pages from then on.
  static constexpr std::size_t kMinHugeSize = std::size_t{16} << 20;

  // `limit`: asked for mappings; may be null.
  LargeObjects(vm::AddressSpace& space, const HeapMetadata& metadata, PageHeap& page_heap,
               MemoryLimit* limit = nullptr)
      : space_(space), metadata_(metadata), page_heap_(page_heap), limit_(limit) {}
  LargeObjects(const LargeObjects&) = delete;
  LargeObjects& operator=(const LargeObjects&) = delete;

  struct Request {
    std::size_t size;
    std::size_t alignment = kMinAlignment;  // a power of two
    bool zeroed = false;
    bool will_grow = false;  // place it where there is room for that, if there is plenty
  };
  // `home`: as for PageHeap::Allocate.
  void* Allocate(unsigned home, const Request& request);

  // REQUIRES: `span` is kRun or kMapped, `object` is its start. False: another thread freed it just now.
  bool Free(Span* span);

  // Whether an object of `usable` bytes that grows to `size` is worth a run: Allocate it with will_grow. Where a limit
  // would have to make room for a small one, it is not.
  bool GrowsAsRun(std::size_t usable, std::size_t size) const {
    if (size > kSmallRunSize) return true;
    return usable >= kMinRunSize && size > usable && MayTakeAhead(1) && Admission(limit_, {kUnitSize}).granted();
  }

  // Makes the object `size` bytes large where it is, or leaves it as it is and returns false.
  bool Resize(Span* span, std::size_t size);
  // Whether a mapping that grows to `size` bytes should move to huge pages, which Allocate with will_grow gives it, and a
  // limit has room for both. Once in an object's life, when little of it needs copying. Where that fails it grows as ever.
  bool BelongsInHugePages(const Span* span, std::size_t size) const;
  // The same for a run that grows and has the units for it; false as well if `p` is none, whatever it is. `span`: the
  // record of p's unit. Writes nothing else: bytes() learns of it when the run takes units again.
  static bool GrowAhead(Span* span, const void* p, std::size_t size) {
    if (span->kind.load(std::memory_order_relaxed) != SpanKind::kRun || span->start != AddressOf(p)) return false;
    if (size > std::size_t{span->units} * kUnitSize) return false;
    const auto pages = static_cast<std::uint32_t>(vm::PagesFor({size}).value);
    if (pages < span->used_pages) return false;
    span->used_pages = pages;
    return true;
  }

  // REQUIRES: `span` is kRun or kMapped.
  static std::size_t UsableSize(const Span* span) {
    return std::size_t{span->used_pages} << vm::kPageShift;
  }

  vm::Bytes bytes() const { return vm::Pages{pages_.load(std::memory_order_relaxed)}.bytes(); }
  // Of bytes(): in mappings of their own, at the mappings' size.
  vm::Bytes mapped_bytes() const { return vm::Pages{mapped_pages_.load(std::memory_order_relaxed)}.bytes(); }
  // Of mapped_bytes(): kept to grow into, and not resident.
  vm::Bytes slack() const { return vm::Pages{slack_pages_.load(std::memory_order_relaxed)}.bytes(); }
  std::uint64_t count() const { return count_.load(std::memory_order_relaxed); }
  void ForEachMetric(vm::MetricVisitor visit, void* context) const;

 private:
  // So that page counts fit their fields.
  static constexpr std::size_t kMaxSize = std::size_t{1} << 43;

  bool CanServe(std::size_t size) const;
  void* AllocateRun(unsigned home, const Request& request);
  void* AllocateMapped(const Request& request);
  bool ResizeRun(Span* span, std::uint32_t pages);
  bool ResizeMapped(Span* span, std::uint32_t pages);
  // Whether the memory at `start` is advised for huge pages.
  bool HasHugePages(std::uintptr_t start) const;
  // `pages` from `start` on, rounded up to a whole unit, or to a whole huge page where there may be some.
  std::uint32_t WholePages(std::uintptr_t start, std::uint32_t pages) const;
  // Of a mapping: what may be resident, and the rest.
  std::uint32_t ResidentPages(const Span* span) const;
  std::uint32_t SlackOf(const Span* span) const { return span->mapped_pages - ResidentPages(span); }
  bool GrowRun(Span* span, std::uint32_t units);
  // Of a run of `units` with `pages` in use.
  static std::uint32_t AheadOf(std::uint32_t units, std::uint32_t pages);
  bool MayTakeAhead(std::uint64_t units) const {
    return ahead_units_.load(std::memory_order_relaxed) + units <=
           kAheadUnits + bytes().value / kUnitSize / kAheadShare;
  }

  vm::AddressSpace& space_;
  const HeapMetadata& metadata_;
  PageHeap& page_heap_;
  MemoryLimit* const limit_;
  // Of live large objects.
  std::atomic<std::uint64_t> pages_{0};
  std::atomic<std::uint64_t> mapped_pages_{0};
  std::atomic<std::uint64_t> slack_pages_{0};
  std::atomic<std::uint64_t> ahead_units_{0};
  std::atomic<std::uint64_t> count_{0};
};

// Makes the records of the units behind `span`'s first one lead to it.
void MarkInterior(const SpanTable& spans, Span* span, unsigned first, unsigned end);

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_LARGE_OBJECT_H_
