// The object heap: malloc's engine, as an object. It serves objects of any size out of an AddressSpace;
// README.md follows a malloc and a free through it.
//
// Threads allocate and free through a ThreadCache, which belongs to one thread at a time; an object may be
// freed through any. The heap protects its own structures, not the content of objects. A wrong free (double,
// foreign, misaligned) stops the program with a message naming the address and what it is.
//
// Thread safety:  thread-safe, but for what ThreadCache says. Not async-signal-safe.
// Lock order:     LockRank::kHeap (a cache's, or the page heap's purge lock), then kHeapShard (the registry's,
//                 or a shard's), then the address space's own.
// Waiting:        for these locks, and for a fork.
// Allocation:     metadata comes from a reservation of the heap's own, never from malloc.
// Errors:         null when out of memory; errno is never touched.
// Invariants:     H1. A span of objects belongs to one cache. Only that cache's thread, or for an orphan the
//                     holder of its lock, touches the span's free list.
//                 H2. A free object carries its tag in its second word; an object that was handed out does
//                     not, until the program frees it.
//                 H3. Whatever changes a cache's lists of spans holds that cache's lock.
#ifndef FREEHOLD_ALLOCATOR_OBJECT_HEAP_H_
#define FREEHOLD_ALLOCATOR_OBJECT_HEAP_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "allocator/heap_metadata.h"
#include "allocator/heap_stats.h"
#include "allocator/large_object.h"
#include "allocator/page_heap.h"
#include "allocator/span.h"
#include "allocator/thread_cache.h"
#include "vm/address_space.h"
#include "vm/metric.h"
#include "vm/result.h"
#include "vm/sync/spin_lock.h"
#include "vm/units.h"

namespace freehold::allocator {

struct ObjectHeapOptions {
  // Free memory goes back to the kernel when nobody used it for between one and two times this long.
  vm::Nanoseconds decay = vm::Milliseconds(500);
  // Threads at once, and caches of threads that are gone. Costs address space only.
  std::uint32_t max_threads = 65536;
  // Independent parts of the page heap; 0: one per CPU, PageHeap::kMaxShards at most.
  unsigned shards = 0;
  // Objects of one other thread that a thread gathers before it hands them over.
  vm::Bytes remote_batch = vm::KiB(32);
};

class ObjectHeap {
 public:
  // Errors: those of Kernel::Reserve and Protect. `space` must outlive the heap.
  static vm::Result<ObjectHeap*> Create(vm::AddressSpace& space, const ObjectHeapOptions& options = {});
  // Gives the metadata back; memory that the heap has from `space`, live objects included, stays mapped there.
  // REQUIRES: no thread uses the heap or its objects any more.
  static void Destroy(ObjectHeap* heap);

  ObjectHeap(const ObjectHeap&) = delete;
  ObjectHeap& operator=(const ObjectHeap&) = delete;

  // A cache for the calling thread: that of a thread that is gone, if there is one. Null when out of memory or
  // of threads.
  ThreadCache* AttachThread();
  // Ends the use of `cache`. What it holds free goes back; what the program still holds stays valid, and anyone
  // may free it. REQUIRES: no call on `cache` is running, none comes after.
  void DetachThread(ThreadCache* cache);

  // Whether `p` lies in the heap's address space (not: whether there is an object).
  bool Owns(const void* p) const { return AddressOf(p) - base_ < size_; }
  // Frees `p` from a thread that has no cache, being born or dying. Slower than ThreadCache::Free.
  void Free(void* p);
  // How many bytes the program may use at `p`; 0 for null. REQUIRES: otherwise, `p` is an object of this heap.
  std::size_t UsableSize(const void* p) const;

  // Gives all free memory back to the kernel but for what threads have at hand. Returns the bytes given back.
  std::size_t Trim();
  // Gives back what was free for long enough, when it is time for that. For a keeper thread; without one,
  // allocations do it now and then. `now`: CLOCK_MONOTONIC.
  void Tick(vm::Nanoseconds now);

  HeapStats Stats();
  // What is in Stats() and kept as a number: where.
  void ForEachMetric(vm::MetricVisitor visit, void* context) const;
  // Calls `visit` for every size class in ascending order, with no lock held.
  void ForEachSizeClass(void (*visit)(void* context, const SizeClassStats& stats), void* context);

  // fork(2): PrepareFork waits until no thread is in a slow path and keeps them out; exactly one of the other
  // two follows, in the parent and in the child, with the same argument. The heap comes before its address
  // space in PrepareFork and after it in the others. In the child, the caches of all other threads are orphans.
  // `own`: the calling thread's cache, or null. REQUIRES: this thread is in no call into the heap.
  void PrepareFork(ThreadCache* own) ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void ParentAfterFork(ThreadCache* own) ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void ChildAfterFork(ThreadCache* own) ABSL_NO_THREAD_SAFETY_ANALYSIS;

  vm::AddressSpace& space() const { return space_; }

  // CHECKs H1, H2 and the invariants of all parts. O(heap). REQUIRES: no call into the heap is running.
  void CheckInvariants();

 private:
  friend class RemoteFrees;
  friend class ThreadCache;

  // Orphans that are looked at for a span, each time one is needed.
  static constexpr int kMaxOrphansTried = 8;

  ObjectHeap(vm::AddressSpace& space, const HeapMetadata& metadata, const ObjectHeapOptions& options);

  ThreadCache* CacheOf(std::uint32_t id) const {
    return reinterpret_cast<ThreadCache*>(metadata_.caches()) + id;
  }
  std::uint32_t cache_count() const { return cache_count_.load(std::memory_order_acquire); }
  ThreadCache* TakeOrphan();
  void AddOrphan(ThreadCache* cache);
  ThreadCache* NewCache();
  // An available span of an orphan, which then belongs to `heir`; or null.
  Span* InheritSpan(SizeClass size_class, ThreadCache* heir);

  // The record of the span that `p` lies in, or of a unit without one; for what the heap does not own, some record.
  Span* SpanOf(const void* p) const {
    Span* span = metadata_.spans().At(AddressOf(p));
    if (span->kind.load(std::memory_order_relaxed) != SpanKind::kInterior) return span;
    return metadata_.spans().At(AddressOf(p) - std::size_t{span->units} * kUnitSize);
  }
  // Whether `p` is the start of an object of `span`, a span of objects, that was made.
  static bool IsObject(Span* span, const void* p) {
    return (AddressOf(p) - span->start) * span->reciprocal < span->ReadLimit();
  }
  // The record of the span whose object `p` is. Stops the program if there is none or it is free, naming
  // `call`.
  Span* CheckedSpan(const char* call, const void* p) const;
  [[noreturn]] void StopOnWrongPointer(const char* call, const void* p, const Span* span) const;
  [[noreturn]] void StopOnDoubleFree(const char* call, const void* p, const Span* span) const;
  // `object` is free, but its link or tag are not what they must be.
  [[noreturn]] void StopOnCorruption(const void* object) const;
  static std::size_t UsableSizeOf(const Span* span);
  // Whether there may be spans whose free lists a fork made unusable.
  bool HasSuspects() const { return has_suspects_.load(std::memory_order_relaxed); }
  // Frees `object` if it is in such a span, by its tag.
  bool FreeSuspect(Span* span, FreeObject* object);

  void EmptyStashes();

  bool IsForking() const { return forking_.load(std::memory_order_relaxed) != 0; }
  void WaitForFork();
  void EndFork();

  vm::AddressSpace& space_;
  const HeapMetadata metadata_;
  const ObjectHeapOptions options_;
  const std::uintptr_t base_;
  const std::size_t size_;
  FreeObject end_ = {};  // ends every free list
  const LinkCode code_;
  PageHeap page_heap_;
  LargeObjects large_;

  std::atomic<std::uint32_t> cache_count_{0};  // that were ever made; grows under registry_lock_
  std::atomic<std::uint32_t> attached_{0};
  std::atomic<std::uint32_t> orphan_count_{0};
  vm::sync::SpinLock registry_lock_{vm::sync::LockRank::kHeapShard};
  std::uint32_t orphans_ ABSL_GUARDED_BY(registry_lock_) = 0;  // the last one's id + 1, then next_orphan_

  std::atomic<std::uint64_t> next_tick_{0};    // written by the thread that ticks
  std::atomic<bool> has_suspects_{false};      // set in the child of a fork
  std::atomic<std::uint32_t> forking_{0};      // 1 from PrepareFork on; slow paths sleep on it
};

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_OBJECT_HEAP_H_
