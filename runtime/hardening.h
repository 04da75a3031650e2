// What malloc does beyond what costs nothing, when settings ask for it: zeroes what is freed, holds freed objects back
// for a while, and hands out objects in no order.
//
// Where any of this is on, no thread has its cache where malloc's fast path looks for it (thread.h), so every call
// takes the cold path, which comes here. So it costs nothing where it is off.
//
//   malloc   cache -> an object; with random placement, in exchange for a random one of the thread's spares of its
//            class
//   free     zeroed; small ones marked as free and filled, into the thread's quarantine -> cache, later, if the fill is
//            as it was; else the program was at it, and stops
//
// Thread safety: each call concerns the calling thread.
// Allocation:    a thread's part comes from the heap, by its cache.
#ifndef FREEHOLD_RUNTIME_HARDENING_H_
#define FREEHOLD_RUNTIME_HARDENING_H_

#include <cstddef>

#include "allocator/thread_cache.h"
#include "vm/units.h"

namespace freehold::runtime {

struct HardeningOptions {
  bool zero_on_free = false;
  bool random_placement = false;
  vm::Bytes quarantine = {0};  // freed memory that a thread holds back at most

  bool any() const { return zero_on_free || random_placement || quarantine.value != 0; }
};

// Before the first thread is attached.
void SetHardening(const HardeningOptions& options);
bool IsHardened();

// As ThreadCache's. REQUIRES: IsHardened(). `attached`: the cache is the thread's, until its end, and not borrowed.
void* HardenedAllocate(allocator::ThreadCache& cache, bool attached, std::size_t size);
void* HardenedAllocateZeroed(allocator::ThreadCache& cache, bool attached, std::size_t size);
void* HardenedAllocateAligned(allocator::ThreadCache& cache, bool attached, std::size_t alignment, std::size_t size);
void* HardenedReallocate(allocator::ThreadCache& cache, bool attached, void* p, std::size_t size);
void HardenedFree(allocator::ThreadCache& cache, bool attached, void* p);

// The calling thread is about to fork: the child knows by an object's mark that it is free, so nobody may hold it back.
void ReleaseHeld(allocator::ThreadCache& cache);
// The calling thread is about to be detached.
void ReleaseHardening(allocator::ThreadCache& cache);

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_HARDENING_H_
