#include "runtime/shim/allocate.h"

#include <algorithm>
#include <cstring>

#include "allocator/chunk.h"
#include "runtime/hardening.h"
#include "runtime/keeper.h"
#include "runtime/runtime.h"
#include "runtime/shim/libc_malloc.h"

namespace freehold::runtime::shim {
namespace {

using allocator::ThreadCache;

bool LibcServes() { return process_runtime.EnsureStarted() == Server::kLibc; }

// Calls `call` with a cache, for a thread that has none, or `hardened` with whether it is the thread's own.
template <typename Call, typename Hardened>
void* WithLease(Call call, Hardened hardened) {
  const CacheLease lease;
  if (lease.get() == nullptr) return nullptr;
  return IsHardened() ? hardened(*lease.get(), lease.attached()) : call(*lease.get());
}

// An object of the bootstrap buffer moves to the malloc that was found meanwhile.
void* MoveFromBootstrap(const LibcMalloc& libc, const void* p, std::size_t size) {
  void* moved = libc.malloc(size);
  if (moved != nullptr) std::memcpy(moved, p, std::min(size, LibcMalloc::BootstrapReadable(p)));
  return moved;
}

// Whether a free of `p`, the start of a unit, nudges even in a small process: one unit in a chunk,
// so that many small objects are noticed in proportion to their memory, and a program that uses one
// object again and again is not slowed down. Not the first unit of a chunk, which holds the first
// objects of all.
bool IsSampled(const void* p) {
  constexpr std::uintptr_t kSampledUnit = allocator::kChunkSize / 2;
  return (reinterpret_cast<std::uintptr_t>(p) & (allocator::kChunkSize - 1)) == kSampledUnit;
}

// After a free. The address is only looked at.
void NoticeFree(const void* p, const void* caller) {
  if (process_keeper.WantsNudges() || IsSampled(p)) process_keeper.Nudge(caller);
}

void FreeToLibc(void* p) {
  if (LibcMalloc::IsBootstrap(p)) return;
  // Without libc's functions nothing was allocated that could be freed, but for the buffer.
  if (const LibcMalloc* libc = LibcMalloc::Get()) libc->free(p);
}

}  // namespace

void* AllocateCold(std::size_t size) {
  if (LibcServes()) {
    const LibcMalloc* libc = LibcMalloc::Get();
    return libc != nullptr ? libc->malloc(size)
                           : LibcMalloc::BootstrapAllocate(allocator::kMinAlignment, size);
  }
  return WithLease([=](ThreadCache& cache) { return cache.Allocate(size); },
                   [=](ThreadCache& cache, bool own) { return HardenedAllocate(cache, own, size); });
}

void* AllocateZeroedCold(std::size_t size) {
  if (LibcServes()) {
    const LibcMalloc* libc = LibcMalloc::Get();
    return libc != nullptr ? libc->calloc(1, size)
                           : LibcMalloc::BootstrapAllocate(allocator::kMinAlignment, size);
  }
  return WithLease([=](ThreadCache& cache) { return cache.AllocateZeroed(size); },
                   [=](ThreadCache& cache, bool own) { return HardenedAllocateZeroed(cache, own, size); });
}

void* AllocateAlignedCold(std::size_t alignment, std::size_t size) {
  if (LibcServes()) {
    const LibcMalloc* libc = LibcMalloc::Get();
    return libc != nullptr ? libc->memalign(alignment, size)
                           : LibcMalloc::BootstrapAllocate(alignment, size);
  }
  return WithLease(
      [=](ThreadCache& cache) { return cache.AllocateAligned(alignment, size); },
      [=](ThreadCache& cache, bool own) { return HardenedAllocateAligned(cache, own, alignment, size); });
}

void* ReallocateCold(void* p, std::size_t size) {
  if (p == nullptr) return AllocateCold(size);
  if (LibcServes()) {
    const LibcMalloc* libc = LibcMalloc::Get();
    if (libc == nullptr) {
      return std::memmove(LibcMalloc::BootstrapAllocate(allocator::kMinAlignment, size), p,
                          std::min(size, LibcMalloc::BootstrapReadable(p)));
    }
    return LibcMalloc::IsBootstrap(p) ? MoveFromBootstrap(*libc, p, size) : libc->realloc(p, size);
  }
  return WithLease([=](ThreadCache& cache) { return cache.Reallocate(p, size); },
                   [=](ThreadCache& cache, bool own) { return HardenedReallocate(cache, own, p, size); });
}

void* AllocateLarge(ThreadCache& cache, std::size_t size, const void* caller) {
  void* p = cache.Allocate(size);
  NoticeLarge(caller);
  return p;
}

void NoticeLarge(const void* caller) { process_keeper.NudgeOnGrowth(caller); }

void FreeCold(void* p, const void* caller) {
  if (p == nullptr) return;
  if (ThreadCache* cache = FastThreadCache()) {
    cache->Free(p);
  } else if (LibcServes()) {
    return FreeToLibc(p);
  } else {
    // Also for a thread that only frees: through a cache it hands over whole batches.
    const CacheLease lease(CacheLease::Use::kFree);
    if (lease.get() == nullptr) {
      process_runtime.heap().Free(p);
    } else if (IsHardened()) {
      HardenedFree(*lease.get(), lease.attached(), p);
    } else {
      lease.get()->Free(p);
    }
  }
  if (IsUnitStart(p)) NoticeFree(p, caller);
}

void FreeSizedCold(void* p, std::size_t size, const void* caller) {
  ThreadCache* cache = FastThreadCache();
  if (cache == nullptr || p == nullptr) {
    if (IsHardened() && p != nullptr) process_runtime.heap().CheckFreeSized(p, size);
    return FreeCold(p, caller);
  }
  cache->FreeSized(p, size);
  NoticeFree(p, caller);
}

std::size_t UsableSizeCold(const void* p) {
  if (p == nullptr) return 0;
  if (!LibcServes()) return process_runtime.heap().UsableSize(p);
  const LibcMalloc* libc = LibcMalloc::Get();
  return libc != nullptr && !LibcMalloc::IsBootstrap(p)
             ? libc->malloc_usable_size(const_cast<void*>(p))
             : 0;
}

}  // namespace freehold::runtime::shim
