// The heap's own memory: one reservation with a Span per unit and a ChunkRecord per chunk of the whole address
// space, the thread caches, and the heap object itself.
//
// All of it is readable from the start and reads as zero, so that any address can be looked up, and becomes
// writable in steps where the heap uses it. Records are found by the address alone: its unit's, or chunk's,
// number modulo the number of records.
//
// Thread safety: thread-safe. Takes no lock; Commit calls the kernel, so no short lock may be held there.
// Errors:        those of Kernel::Reserve and Protect.
#ifndef FREEHOLD_ALLOCATOR_HEAP_METADATA_H_
#define FREEHOLD_ALLOCATOR_HEAP_METADATA_H_

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "allocator/chunk.h"
#include "allocator/heap_stats.h"
#include "allocator/size_class.h"
#include "allocator/span.h"
#include "vm/address_space.h"
#include "vm/page_range.h"
#include "vm/result.h"
#include "vm/units.h"

namespace freehold::allocator {

// Records for equal, aligned parts of the address space. A value, of which thread caches keep a copy.
template <typename Record, unsigned kPartShift>
class RecordTable {
 public:
  RecordTable() = default;
  // REQUIRES: `count` is a power of two.
  RecordTable(std::byte* records, std::size_t count)
      : records_(records), offset_mask_((count - 1) * sizeof(Record)) {}

  // The record of the part that holds `address`, if the table's address space does; else some record.
  Record* At(std::uintptr_t address) const {
    return reinterpret_cast<Record*>(records_ + ((address >> (kPartShift - kRecordShift)) & offset_mask_));
  }

  // 32-bit names of records, for links between them. 0 is none.
  std::uint32_t NameOf(const Record* record) const {
    return static_cast<std::uint32_t>(record - reinterpret_cast<const Record*>(records_)) + 1;
  }
  Record* Named(std::uint32_t name) const { return reinterpret_cast<Record*>(records_) + (name - 1); }

 private:
  static constexpr unsigned kRecordShift = std::bit_width(sizeof(Record)) - 1;
  static_assert(sizeof(Record) == std::size_t{1} << kRecordShift && kRecordShift < kPartShift);

  std::byte* records_ = nullptr;
  std::size_t offset_mask_ = 0;
};

using SpanTable = RecordTable<Span, kUnitShift>;
using ChunkTable = RecordTable<ChunkRecord, kChunkShift>;

class HeapMetadata {
 public:
  struct Layout {
    std::size_t header_bytes;  // of the heap object, at header(): writable from the start
    std::size_t cache_bytes;   // of all thread caches
  };

  HeapMetadata() = default;
  static vm::Result<HeapMetadata> Create(vm::AddressSpace& space, const Layout& layout);
  // Gives the reservation back, all records and header() included.
  void Release() const;

  // Makes [first, first + bytes) writable. Cheap when it is already.
  vm::Error Commit(const void* first, std::size_t bytes) const;

  std::byte* header() const { return header_; }
  std::byte* caches() const { return caches_; }
  const SpanTable& spans() const { return spans_; }
  const ChunkTable& chunks() const { return chunks_; }
  // What is writable, and where its number of steps is kept, for a Metric.
  vm::Bytes committed() const;
  const void* committed_location() const { return &commitments_->steps; }
  // What becomes writable at a time.
  static constexpr std::size_t kStep = std::size_t{64} << 10;
  // Fills in what concerns the records of spans.
  void Locate(HeapLocation& location) const;
  // Calls `visit` for every writable Span, used or not. REQUIRES: nobody commits.
  void ForEachWritableSpan(void (*visit)(void* context, Span* span), void* context) const;

 private:
  // Steps ahead of need, so that a heap that goes on to new addresses takes mmap_lock for writing rarely: spans for as
  // many addresses as a region of the space makes writable ahead at most.
  static constexpr std::size_t kStepsAhead = 16;
  static constexpr std::size_t kWordBits = 64;

  // At the start of the reservation. Written by whoever commits.
  struct Commitments {
    std::atomic<std::uint64_t> steps;
    std::atomic<std::uint64_t> done[];  // a bit a step, set after it was made writable
  };

  std::size_t step_count() const { return reservation_.bytes().value / kStep; }
  vm::Error CommitSteps(std::size_t first, std::size_t end) const;

  vm::os::Kernel* kernel_ = nullptr;
  vm::PageRange reservation_;
  Commitments* commitments_ = nullptr;
  std::byte* header_ = nullptr;
  std::byte* caches_ = nullptr;
  std::byte* span_section_ = nullptr;
  SpanTable spans_;
  ChunkTable chunks_;
};

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_HEAP_METADATA_H_
