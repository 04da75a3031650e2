// What an ObjectHeap says about itself. Sums over threads that go on allocating: a hint while they do.
#ifndef FREEHOLD_ALLOCATOR_HEAP_STATS_H_
#define FREEHOLD_ALLOCATOR_HEAP_STATS_H_

#include <cstddef>
#include <cstdint>

#include "vm/units.h"

namespace freehold::allocator {

struct HeapStats {
  // In objects that the program holds, at their size class's size. The free objects of the span that a thread
  // allocates a size class from are counted as held, and so are objects on their way back to another thread.
  vm::Bytes allocated;
  vm::Bytes active;      // in spans that hold at least one object, and in large objects
  vm::Bytes free_dirty;  // in free spans, possibly resident
  vm::Bytes free_clean;  // in free spans, not resident
  vm::Bytes mapped;      // taken from the address space: active + free_dirty + free_clean
  vm::Bytes metadata;    // readable and writable for the heap's own records
  vm::Bytes large;       // in large objects; part of allocated and active
  std::uint64_t large_objects = 0;
  std::uint64_t chunks = 0;
  std::uint64_t threads = 0;        // attached
  std::uint64_t orphans = 0;        // caches of threads that are gone, kept for threads to come
  std::uint64_t purged_pages = 0;   // given back to the kernel so far

  // An upper bound of the memory that the heap keeps resident, but for metadata.
  vm::Bytes resident_estimate() const { return active + free_dirty; }
};

struct SizeClassStats {
  std::size_t object_size = 0;
  std::uint64_t spans = 0;
  std::uint64_t capacity = 0;   // objects that the spans can hold
  std::uint64_t allocated = 0;  // objects that the program holds, see HeapStats::allocated
};

// Of one thread cache, or of the heap profile's.
struct CacheStats {
  std::uint32_t id = 0;
  bool attached = false;      // false: its thread is gone
  std::uint32_t thread = 0;   // the kernel's number of the thread that it belongs, or belonged, to; 0: none
  std::uint64_t spans = 0;
  vm::Bytes capacity = {0};   // of the spans' objects
  vm::Bytes allocated = {0};  // see HeapStats::allocated
  vm::Bytes at_hand = {0};    // at most, in objects of any span that its thread freed and keeps; counted as held
};

// Where a reader outside the process finds what its heap counts by size and by thread. Addresses and sizes are the
// process's; what is read is `Span`, and numbers.
struct HeapLocation {
  std::uint64_t caches = 0;       // the first; 0: there is no heap
  std::uint64_t cache_bytes = 0;  // from one to the next
  std::uint64_t cache_count = 0;  // address of a number of 32 bits
  // From the start of a cache: a byte, 0 if it is attached; a number of 32 bits; by size class, `at_hand_bytes` each, what
  // tells of objects at hand: for how many there is room (16 bits), and how many more may come and one (32), from its start.
  std::uint64_t detached = 0;
  std::uint64_t thread = 0;
  std::uint64_t at_hand = 0;
  std::uint64_t at_hand_bytes = 0;
  std::uint64_t at_hand_room = 0;
  std::uint64_t at_hand_credits = 0;
  // The records of spans, in steps of `step_bytes` of which the bit in the words at `writable` says whether it may hold
  // any: from first_step on, counted from `records`.
  std::uint64_t records = 0;
  std::uint64_t step_bytes = 0;
  std::uint64_t writable = 0;
  std::uint64_t first_step = 0;
  std::uint64_t end_step = 0;
};

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_HEAP_STATS_H_
