// Heaps of the program's own, beside the process's: each an ObjectHeap that takes its memory from a space and gives all
// of it back when it is destroyed. Any thread may use any heap, and is attached to it by its first call.
//
//   HeapHandle (one a heap, and used again for later heaps; its memory is never given back)
//     serial: which heap this is, unlike every other before and after; 0: none
//   thread -> list of { handle, serial, cache }, and the last one used apart
//
// So what a thread remembers of a heap that was destroyed matches nothing any more: neither the heap that lives in the
// handle now, nor one that lies where the old one did. Nobody has to tell threads about it.
//
// Thread safety: thread-safe; CacheOf and the like concern the calling thread.
// Lock order:    LockRank::kRuntime: a handle's lock, over detaching a thread; or the lock of unused handles.
// Waiting:       Destroy and a thread that ends, for each other.
// Allocation:    from malloc: handles, and the lists of threads. No call here is malloc's.
// fork:          the child has the heaps' memory, and nothing else: their threads were in calls.
// Invariants:    E1. A thread's cache of a heap is detached by that thread's end, or goes with the heap.
//                E2. A serial changes to 0 under the handle's lock; whoever holds that and sees its own serial may use
//                    the heap.
#ifndef FREEHOLD_RUNTIME_HEAPS_H_
#define FREEHOLD_RUNTIME_HEAPS_H_

#include <atomic>
#include <cstdint>

#include "absl/base/optimization.h"
#include "allocator/object_heap.h"
#include "allocator/thread_cache.h"
#include "runtime/memory_limit.h"
#include "vm/address_space.h"
#include "vm/result.h"
#include "vm/sync/spin_lock.h"

namespace freehold::runtime {

struct HeapHandle {
  std::atomic<std::uint64_t> serial{0};
  allocator::ObjectHeap* heap = nullptr;
  LimitedHeap limited;
  bool is_limited = false;
  std::uint32_t forks = 0;  // as the process had gone through when it was made
  vm::sync::SpinLock lock{vm::sync::LockRank::kRuntime};
  HeapHandle* next_unused = nullptr;
};

// A heap in `space`; counted by `limit` unless that is null. Errors: those of ObjectHeap::Create; kNoMetadata (malloc);
// kSystem (no fork handler).
vm::Result<HeapHandle*> CreateHeap(vm::AddressSpace& space, const allocator::ObjectHeapOptions& options,
                                   ProcessMemoryLimit* limit);
// Unmaps everything, objects included. REQUIRES: no thread is in a call with the heap, or begins one. Threads that
// used it may live on, or be about to end. False: not in this process's child, or destroyed already.
bool DestroyHeap(HeapHandle* handle, ProcessMemoryLimit* limit);
// Whether calls may be made: it is not destroyed, and not of a parent.
bool IsUsable(const HeapHandle* handle);

namespace internal {

// No heap has this serial.
inline constexpr std::uint64_t kNoSerial = UINT64_MAX;

struct RecentHeap {
  std::uint64_t serial;
  allocator::ThreadCache* cache;
};
extern constinit thread_local RecentHeap recent_heap
    __attribute__((tls_model("initial-exec"), visibility("hidden")));

}  // namespace internal

// The calling thread's cache of a heap, while in scope: its own, or one for this call if the thread is about to end.
class HeapCall {
 public:
  explicit HeapCall(HeapHandle* handle) {
    const internal::RecentHeap& recent = internal::recent_heap;
    if (ABSL_PREDICT_TRUE(handle->serial.load(std::memory_order_relaxed) == recent.serial)) {
      cache_ = recent.cache;
    } else {
      Find(handle);
    }
  }
  HeapCall(const HeapCall&) = delete;
  HeapCall& operator=(const HeapCall&) = delete;
  ~HeapCall() {
    if (ABSL_PREDICT_FALSE(borrowed_from_ != nullptr)) borrowed_from_->DetachThread(cache_);
  }

  // Null: the heap is not usable, or there is no memory for a cache.
  allocator::ThreadCache* cache() const { return cache_; }

 private:
  void Find(HeapHandle* handle);
  void Borrow(HeapHandle* handle);

  allocator::ThreadCache* cache_ = nullptr;
  allocator::ObjectHeap* borrowed_from_ = nullptr;
};

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_HEAPS_H_
