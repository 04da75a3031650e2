// What malloc's family and the operators have in common: the way from a symbol of the program into
// its thread's cache, and the ways around it for threads without a cache and for processes that
// libc serves.
//
// The fast path is a load of the cache's address relative to the thread pointer, a test, and the
// cache's own fast path, inlined. An allocation that it does not serve leaves it by a jump, so it needs no stack.
//
// Thread safety: thread-safe.
// Errors:        null when out of memory; errno is set by libc's malloc only, so callers set it.
#ifndef FREEHOLD_RUNTIME_SHIM_ALLOCATE_H_
#define FREEHOLD_RUNTIME_SHIM_ALLOCATE_H_

#include <cstddef>
#include <cstdint>

#include "absl/base/attributes.h"
#include "absl/base/optimization.h"
#include "allocator/object_heap.h"
#include "allocator/size_class.h"
#include "allocator/thread_cache.h"
#include "runtime/thread.h"

namespace freehold::runtime::shim {

// The same operations for a thread that has no cache.
void* AllocateCold(std::size_t size);
void* AllocateZeroedCold(std::size_t size);
void* AllocateAlignedCold(std::size_t alignment, std::size_t size);
void* ReallocateCold(void* p, std::size_t size);
// And for frees that may nudge the keeper. `caller`: the code that called the shim.
void FreeCold(void* p, const void* caller);
void FreeSizedCold(void* p, std::size_t size, const void* caller);
// Allocates a large object and nudges the keeper.
void* AllocateLarge(allocator::ThreadCache& cache, std::size_t size, const void* caller);
// Nudges the keeper after the other allocations of large objects.
void NoticeLarge(const void* caller);
std::size_t UsableSizeCold(const void* p);

inline bool IsLarge(std::size_t size) { return size > allocator::kMaxClassSize; }

// At least `size` bytes, aligned for every type.
inline void* Allocate(std::size_t size, const void* caller) {
  allocator::ThreadCache* cache = FastThreadCache();
  if (ABSL_PREDICT_FALSE(cache == nullptr)) return AllocateCold(size);
  if (ABSL_PREDICT_FALSE(IsLarge(size))) return AllocateLarge(*cache, size, caller);
  return cache->Allocate(size);
}

// The same, in the common case; else null: then Allocate knows.
ABSL_ATTRIBUTE_ALWAYS_INLINE inline void* TryAllocate(std::size_t size) {
  allocator::ThreadCache* cache = FastThreadCache();
  return ABSL_PREDICT_TRUE(cache != nullptr) ? cache->TryAllocate(size) : nullptr;
}

// The same, zeroed.
ABSL_ATTRIBUTE_ALWAYS_INLINE inline void* AllocateZeroed(std::size_t size) {
  allocator::ThreadCache* cache = FastThreadCache();
  if (ABSL_PREDICT_FALSE(cache == nullptr)) return AllocateZeroedCold(size);
  if (ABSL_PREDICT_FALSE(IsLarge(size))) NoticeLarge(__builtin_return_address(0));
  return cache->AllocateZeroed(size);
}

// The same as Allocate, aligned. REQUIRES: `alignment` is a power of two.
ABSL_ATTRIBUTE_ALWAYS_INLINE inline void* AllocateAligned(std::size_t alignment, std::size_t size) {
  allocator::ThreadCache* cache = FastThreadCache();
  if (ABSL_PREDICT_FALSE(cache == nullptr)) return AllocateAlignedCold(alignment, size);
  if (ABSL_PREDICT_FALSE(IsLarge(size))) NoticeLarge(__builtin_return_address(0));
  return cache->AllocateAligned(alignment, size);
}

// As realloc, for a size of zero too: the smallest object. Null: `p` is unchanged.
ABSL_ATTRIBUTE_ALWAYS_INLINE inline void* Reallocate(void* p, std::size_t size) {
  allocator::ThreadCache* cache = FastThreadCache();
  if (ABSL_PREDICT_FALSE(cache == nullptr)) return ReallocateCold(p, size);
  if (ABSL_PREDICT_FALSE(IsLarge(size))) NoticeLarge(__builtin_return_address(0));
  return cache->Reallocate(p, size);
}

// Whether a free of `p` leaves the fast path: at the start of a unit lie all large objects, and the
// first object of each span. Null is such an address too, and so costs no test of its own.
inline bool IsUnitStart(const void* p) {
  return (reinterpret_cast<std::uintptr_t>(p) & (allocator::kUnitSize - 1)) == 0;
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline void Free(void* p) {
  allocator::ThreadCache* cache = FastThreadCache();
  if (ABSL_PREDICT_FALSE(cache == nullptr || IsUnitStart(p)))
    return FreeCold(p, __builtin_return_address(0));
  cache->Free(p);
}

// REQUIRES: `p` was allocated with `size` bytes, which is checked as far as can be.
ABSL_ATTRIBUTE_ALWAYS_INLINE inline void FreeSized(void* p, std::size_t size) {
  allocator::ThreadCache* cache = FastThreadCache();
  if (ABSL_PREDICT_FALSE(cache == nullptr || IsUnitStart(p))) {
    return FreeSizedCold(p, size, __builtin_return_address(0));
  }
  cache->FreeSized(p, size);
}

inline std::size_t UsableSize(const void* p) {
  const allocator::ThreadCache* cache = FastThreadCache();
  if (ABSL_PREDICT_FALSE(cache == nullptr)) return UsableSizeCold(p);
  return allocator::ObjectHeap::UsableSize(*cache, p);
}

}  // namespace freehold::runtime::shim

#endif  // FREEHOLD_RUNTIME_SHIM_ALLOCATE_H_
