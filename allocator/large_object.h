// Large objects: those above kMaxClassSize, those that grew above kMinRunSize, and those aligned to more than a unit.
// They are ranges of pages: up to
// kMaxRunSize runs of units from the page heap, above that mappings of their own. They belong to no thread.
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
  // An object that grows beyond this becomes a run, with room to grow further; from there on growth seldom copies.
  static constexpr std::size_t kMinRunSize = std::size_t{16} << 10;
  // From here on an object's memory is unmapped when it is freed; the address space keeps it for a while.
  static constexpr std::size_t kMaxRunSize = std::size_t{1} << 20;

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

  // Makes the object `size` bytes large where it is, or leaves it as it is and returns false.
  bool Resize(Span* span, std::size_t size);

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
  void SetUsedPages(Span* span, std::uint32_t pages);

  vm::AddressSpace& space_;
  const HeapMetadata& metadata_;
  PageHeap& page_heap_;
  MemoryLimit* const limit_;
  // Of live large objects.
  std::atomic<std::uint64_t> pages_{0};
  std::atomic<std::uint64_t> mapped_pages_{0};
  std::atomic<std::uint64_t> slack_pages_{0};
  std::atomic<std::uint64_t> count_{0};
};

// Makes the records of the units behind `span`'s first one lead to it.
void MarkInterior(const SpanTable& spans, Span* span, unsigned first, unsigned end);

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_LARGE_OBJECT_H_
