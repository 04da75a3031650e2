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

#include "absl/base/optimization.h"
#include "absl/base/thread_annotations.h"
#include "allocator/guarded_objects.h"
#include "allocator/heap_metadata.h"
#include "allocator/heap_profile.h"
#include "allocator/heap_stats.h"
#include "allocator/large_object.h"
#include "allocator/memory_limit.h"
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
  // kPrefer: what stays in use as a whole becomes huge pages, 2 MiB at a time, by who calls Tick.
  vm::os::HugePages huge_pages = vm::os::HugePages::kAvoid;
  // Objects of one other thread that a thread gathers before it hands them over.
  vm::Bytes remote_batch = vm::KiB(32);
  // Asked for memory, and called when there is none. Must outlive the heap.
  MemoryLimit* limit = nullptr;
  // Constant while the heap lives.
  HeapProfileOptions profile = {};
  GuardOptions guards = {};
};

class ObjectHeap {
 public:
  // Errors: those of Kernel::Reserve and Protect. `space` must outlive the heap.
  static vm::Result<ObjectHeap*> Create(vm::AddressSpace& space, const ObjectHeapOptions& options = {});
  // Gives the metadata back; memory that the heap has from `space`, live objects included, stays mapped there.
  // REQUIRES: no thread uses the heap or its objects any more.
  static void Destroy(ObjectHeap* heap);
  // The same, and everything that the heap has from `space` is unmapped: live objects too.
  static void DestroyWithMemory(ObjectHeap* heap);

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
  // How many bytes the program may use at `p`; of a guarded object, as many as it asked for. 0 for null. REQUIRES:
  // otherwise, `p` is an object of this heap.
  std::size_t UsableSize(const void* p) const { return UsableSize(metadata_.spans(), code_, p); }
  // The same of the heap of a thread's cache, faster: programs that count their memory ask twice for each object.
  static std::size_t UsableSize(const ThreadCache& cache, const void* p) {
    return cache.heap_->UsableSize(cache.spans_, cache.code_, p);
  }

  // For who keeps objects that the program freed from being used again. CheckFree: as the beginning of a free of `p`;
  // returns its usable size. Hold marks `p` so that it is known to be free, or returns false: a large object, or one that
  // came through a fork and would be free by the mark alone. Release takes the mark away, so that it may be freed, and
  // stops the program if it is damaged, or `intact` is false.
  std::size_t CheckFree(const void* p) const { return UsableSizeOf(CheckedSpan("free", p), p); }
  // The same for a free with a size: stops the program if there is no room for `size` bytes.
  void CheckFreeSized(const void* p, std::size_t size) const;
  bool Hold(void* p) const;
  void Release(void* p, bool intact) const;

  // Gives all free memory back to the kernel but for what other threads have at hand, or have yet to take in. `own`: the
  // calling thread's cache, or null for what it has to stay, too. Returns the bytes given back. REQUIRES: this thread is
  // in no call on `own`.
  std::size_t Trim(ThreadCache* own = nullptr);
  // Gives back what was free for long enough, when it is time for that. For a keeper thread; without one,
  // allocations do it now and then. `now`: CLOCK_MONOTONIC.
  void Tick(vm::Nanoseconds now);

  HeapStats Stats();
  // Of what the heap has mapped: not resident. Takes no lock, and is never too much while others allocate.
  vm::Bytes absent() const { return page_heap_.clean() + large_.slack(); }
  // Free and possibly resident. Takes no lock.
  vm::Bytes free_dirty() const { return {page_heap_.GetStats().dirty_units * kUnitSize}; }
  // What is in Stats() and kept as a number: where.
  void ForEachMetric(vm::MetricVisitor visit, void* context) const;
  // Calls `visit` for every size class in ascending order, with no lock held.
  void ForEachSizeClass(void (*visit)(void* context, const SizeClassStats& stats), void* context);
  // The same for every thread cache there ever was, by id.
  void ForEachCache(void (*visit)(void* context, const CacheStats& stats), void* context);

  // For readers outside the process, of the last two.
  HeapLocation Locate() const;

  // fork(2): PrepareFork waits until no thread is in a slow path and keeps them out; exactly one of the other
  // two follows, in the parent and in the child, with the same argument. The heap comes before its address
  // space in PrepareFork and after it in the others. In the child, the caches of all other threads are orphans.
  // `own`: the calling thread's cache, or null. REQUIRES: this thread is in no call into the heap.
  void PrepareFork(ThreadCache* own) ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void ParentAfterFork(ThreadCache* own) ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void ChildAfterFork(ThreadCache* own) ABSL_NO_THREAD_SAFETY_ANALYSIS;

  vm::AddressSpace& space() const { return space_; }
  // Null, as the next one, if there is none, by the options or for want of memory.
  const HeapProfile* profile() const { return profile_; }
  GuardedObjects* guards() const { return guards_; }
  // Whether `p`, an object of the heap, lies between guard pages.
  bool IsGuarded(const void* p) const { return guards_ != nullptr && guards_->Owns(p); }

  // CHECKs H1, H2 and the invariants of all parts. O(heap). REQUIRES: no call into the heap is running.
  void CheckInvariants();

 private:
  friend class GuardedObjects;
  friend class HeapProfile;
  friend class RemoteFrees;
  friend class ThreadCache;

  // Orphans that are looked at for a span, each time one is needed.
  static constexpr int kMaxOrphansTried = 8;

  ObjectHeap(vm::AddressSpace& space, const HeapMetadata& metadata, const ObjectHeapOptions& options);

  ThreadCache* CacheOf(std::uint32_t id) const {
    return reinterpret_cast<ThreadCache*>(metadata_.caches()) + id;
  }
  // There is room for them only with a profile, or guarded objects.
  Sampler* SamplerOf(std::uint32_t id) const { return reinterpret_cast<Sampler*>(CacheOf(options_.max_threads)) + id; }
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
  static bool IsObject(const Span* span, const void* p) {
    if (ABSL_PREDICT_TRUE(span->HasObjectAt(p))) return true;
    // Of a suspect span, the limit is 0. It may become one, and be one no more, while this looks: each writes first what
    // is read last here.
    std::atomic_thread_fence(std::memory_order_acquire);
    if (ABSL_PREDICT_TRUE(span->kind.load(std::memory_order_acquire) != SpanKind::kSuspect)) return span->HasObjectAt(p);
    return (AddressOf(p) - span->start) * span->reciprocal <
           span->carved.Get() * kSizeClasses[span->size_class].excess;
  }
  // The record of the span of objects whose object `p` is, if it is one, not suspect and not free; else null.
  static Span* ObjectSpan(const SpanTable& spans, const LinkCode& code, const void* p) {
    Span* span = spans.At(AddressOf(p));
    return ABSL_PREDICT_TRUE(span->HasObjectAt(p) && !code.IsTagged(p)) ? span : nullptr;
  }
  // The record of the span whose object `p` is. Stops the program if there is none or it is free, naming
  // `call`.
  Span* CheckedSpan(const char* call, const void* p) const {
    Span* span = ObjectSpan(metadata_.spans(), code_, p);
    return ABSL_PREDICT_TRUE(span != nullptr) ? span : CheckedSpanSlow(call, p);
  }
  Span* CheckedSpanSlow(const char* call, const void* p) const;
  [[noreturn]] void StopOnWrongPointer(const char* call, const void* p, const Span* span) const;
  [[noreturn]] void StopOnDoubleFree(const char* call, const void* p, const Span* span) const;
  // `object` is free, but its link or tag are not what they must be.
  [[noreturn]] void StopOnCorruption(const void* object) const;
  // Of `p`, the object of `span`.
  std::size_t UsableSizeOf(const Span* span, const void* p) const {
    const bool of_class = span->kind.load(std::memory_order_relaxed) == SpanKind::kObjects;
    return ABSL_PREDICT_TRUE(of_class) ? kClassSizes[span->size_class] : UsableSizeOfSlow(span, p);
  }
  std::size_t UsableSizeOfSlow(const Span* span, const void* p) const;
  // `spans` and `code`: the heap's, or a cache's copy.
  std::size_t UsableSize(const SpanTable& spans, const LinkCode& code, const void* p) const {
    const Span* span = ObjectSpan(spans, code, p);
    return ABSL_PREDICT_TRUE(span != nullptr) ? kClassSizes[span->size_class] : UsableSizeSlow(p);
  }
  std::size_t UsableSizeSlow(const void* p) const;
  static bool IsGuardSlot(const Span* span) { return span->kind.load(std::memory_order_relaxed) == SpanKind::kGuarded; }
  // An object that is a sample, for a thread in its slow path. Null: there is none to be had.
  void* AllocateSample(Sampler::Due due, SizeClass size_class, std::size_t size, std::size_t alignment, bool& zero);
  bool IsSample(const Span* span) const {
    return samples_ != nullptr && span->owner.load(std::memory_order_relaxed) == samples_;
  }
  // Frees the large object `p`.
  void FreeLarge(Span* span, void* p);
  // Whether there may be spans whose free lists a fork made unusable.
  bool HasSuspects() const { return has_suspects_.load(std::memory_order_relaxed); }
  // Frees `object` if it is in such a span, by its tag.
  bool FreeSuspect(Span* span, FreeObject* object);

  // As those of LargeObjects, as far as a limit can be made to allow it.
  void* AllocateLarge(unsigned home, const LargeObjects::Request& request);
  bool ResizeLarge(Span* span, std::size_t size);
  bool GrowsAsRun(std::size_t usable, std::size_t size) const { return large_.GrowsAsRun(usable, size); }
  // See MemoryLimit, for a caller that holds no lock.
  void RelieveLimit() {
    if (ABSL_PREDICT_FALSE(options_.limit != nullptr && options_.limit->wants_relief())) options_.limit->Relieve();
  }
  bool MakeRoom(std::size_t size, unsigned attempt) {
    return options_.limit != nullptr && size < size_ && options_.limit->MakeRoom({size}, attempt);
  }

  void EmptyStashes();

  bool IsForking() const { return forking_.load(std::memory_order_relaxed) != 0; }
  void WaitForFork();
  void EndFork();

  vm::AddressSpace& space_;
  const HeapMetadata metadata_;
  const LinkCode code_;  // in the line of the table of spans, for ObjectSpan
  const ObjectHeapOptions options_;
  const std::uintptr_t base_;
  const std::size_t size_;
  FreeObject end_ = {};  // ends every free list
  PageHeap page_heap_;
  LargeObjects large_;

  std::atomic<std::uint32_t> cache_count_{0};  // that were ever made; grows under registry_lock_
  std::atomic<std::uint32_t> attached_{0};
  std::atomic<std::uint32_t> orphan_count_{0};
  vm::sync::SpinLock registry_lock_{vm::sync::LockRank::kHeapShard};
  std::uint32_t orphans_ ABSL_GUARDED_BY(registry_lock_) = 0;  // the last one's id + 1, then next_orphan_

  // Constant once threads use the heap.
  HeapProfile* profile_ = nullptr;
  const ThreadCache* samples_ = nullptr;  // owner of small samples
  GuardedObjects* guards_ = nullptr;

  std::atomic<std::uint64_t> next_tick_{0};    // written by the thread that ticks
  std::atomic<bool> has_suspects_{false};      // set in the child of a fork
  std::atomic<std::uint32_t> forking_{0};      // 1 from PrepareFork on; slow paths sleep on it
};

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_OBJECT_HEAP_H_
