// One thread's way into an ObjectHeap: the spans that it allocates from, and the objects of other threads that
// it freed and has yet to hand over.
//
// Thread safety: Allocate..., Reallocate and Free... belong to the one thread that attached the cache. What
//                others do to it goes through `inbox_`, or happens under `lock_` once its thread is gone.
// Lock order:    lock_ is LockRank::kHeap. Fast paths take none.
// Waiting:       slow paths wait while another thread forks.
// Errors:        null when out of memory; errno is never touched. A wrong free stops the program.
// Invariants:    C1. A span of objects that belongs to the cache is its class's current span, or in its class's
//                    list (kAvailable), or full (kFull).
//                C2. `credits` of an available span is the number of its objects that are not free; of a full
//                    span, how many more must come free before it is available. Objects in `hot_` are not free.
//                C3. What is in `hot_` are objects of kObjects spans, of this cache or of others, with their tags.
#ifndef FREEHOLD_ALLOCATOR_THREAD_CACHE_H_
#define FREEHOLD_ALLOCATOR_THREAD_CACHE_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/base/attributes.h"
#include "absl/base/optimization.h"
#include "absl/base/thread_annotations.h"
#include "allocator/heap_metadata.h"
#include "allocator/heap_stats.h"
#include "allocator/large_object.h"
#include "allocator/remote_frees.h"
#include "allocator/sampler.h"
#include "allocator/size_class.h"
#include "allocator/span.h"
#include "vm/sync/spin_lock.h"
#include "vm/units.h"

namespace freehold::allocator {

class ObjectHeap;

class alignas(vm::kCacheLineSize) ThreadCache {
 public:
  ThreadCache(const ThreadCache&) = delete;
  ThreadCache& operator=(const ThreadCache&) = delete;

  // An object of at least `size` bytes, aligned to kMinAlignment; for 0 bytes too. Null when out of memory, as
  // for sizes above PTRDIFF_MAX.
  void* Allocate(std::size_t size);
  // The common case of Allocate, in which nothing is called; else null, and nothing has changed.
  void* TryAllocate(std::size_t size);
  // The same, its first `size` bytes zero. Memory that is known to be zero is not zeroed again.
  void* AllocateZeroed(std::size_t size);
  // The same as Allocate, aligned to `alignment`. REQUIRES: a power of two.
  void* AllocateAligned(std::size_t alignment, std::size_t size);
  // An object of at least `size` bytes with the content of `p`, as much as fits; in place where there is room.
  // `p` is no object any more, unless it is what is returned. Null `p`: as Allocate. Null result: `p` stays as
  // it was. Alignment beyond kMinAlignment is not kept.
  void* Reallocate(void* p, std::size_t size);
  // Makes room for at least `size` bytes at `p` without moving it, or leaves it as it is and returns false. Never makes
  // it smaller. REQUIRES: `p` is an object of the heap.
  bool TryExpand(void* p, std::size_t size);
  // Frees `p`, an object of the heap, whichever thread allocated it. Null is fine. If `p` was free already, the
  // program stops at once where this thread allocated it, else a few calls later, or when the thread detaches.
  void Free(void* p);
  // The same; stops the program unless the object at `p` has room for `size` bytes.
  void FreeSized(void* p, std::size_t size);

  // Hands over a list of messages (remote_frees.h), linked from first to last, from any thread. REQUIRES: that
  // holds no cache's lock.
  void Receive(FreeObject* first, FreeObject* last);

  ObjectHeap& heap() const { return *heap_; }
  std::uint32_t id() const { return id_; }

 private:
  friend class ObjectHeap;

  enum class State : std::uint8_t {
    kAttached,  // to a thread
    kOrphan,    // to none: whoever holds lock_ may do what the thread might
    kFrozen,    // an orphan whose thread did not come through a fork: its free lists cannot be trusted
  };

  // Spans of one class, linked by names, the one that waited longest first.
  struct SpanList {
    std::uint32_t first = 0;
    std::uint32_t last = 0;
    bool empty() const { return first == 0; }
  };

  struct Bin {
    Span* current = nullptr;  // `none_` when there is none
    Span* source = nullptr;   // whose free list objects are taken from: `current`, or the sampler's front of the class
    SpanList available;
    std::uint32_t spans = 0;  // that belong to the cache
    OwnerCounter held;        // objects made in its current and full spans
    std::uint32_t credits_seen = 0;  // of `current`, by ReleaseIdle
  };

  struct ClassRequest {
    SizeClass size_class;
    std::size_t size;  // that the program asked for, as the alignment
    std::size_t alignment = kMinAlignment;
    bool zero = false;  // out: the object reads as zero, but for its first kMinAlignment bytes
  };

  // Of classes that are not in `direct_`, whose objects fill cache lines and pages of their own, the thread keeps those
  // that it freed last at hand, whosever spans they are of: what it allocates next is then in its core's cache, and
  // shares no line with another thread's.
  static constexpr unsigned kFirstHotClass = ClassOf(kMaxDirectSize) + 1;
  static constexpr unsigned kHotClasses = kSizeClassCount - kFirstHotClass;
  static constexpr std::uint32_t kMaxHot = 32;
  static constexpr std::uint32_t kMaxHotBytes = 256 << 10;  // of a class
  static constexpr std::uint32_t kMaxAllHotBytes = 8 << 20;  // of all that have room
  // None of a class that the thread only frees: they would keep their spans from going back, and are not asked for.
  struct HotObjects {
    OwnerCounter count;
    std::uint32_t room = 0;  // 0 until the class is allocated from, and again when it is only freed to
    bool asked = false;      // allocated from since there was no room the last time
    std::array<FreeObject*, kMaxHot> objects;  // the one that was freed last at the end
  };
  static constexpr std::array<std::uint8_t, kHotClasses> kHotCapacity = [] {
    std::array<std::uint8_t, kHotClasses> capacity = {};
    for (unsigned i = 0; i < kHotClasses; ++i) {
      const std::uint32_t fit = kMaxHotBytes / kSizeClasses[kFirstHotClass + i].size;
      capacity[i] = static_cast<std::uint8_t>(fit < kMaxHot ? fit : kMaxHot);
    }
    return capacity;
  }();

  static constexpr std::size_t kDirectCount = kMaxDirectSize / kMinAlignment + 1;
  static constexpr std::size_t kStash = 4;
  // Most objects that are made at a time, in SizeClassInfo::carve.
  static constexpr std::uint32_t kMaxCarves = 4;
  // What is prefetched while objects are made: the page that is cut up next.
  static constexpr std::size_t kCarvePrefetch = 4096;
  // Slow paths between looks at the clock and at forgotten batches.
  static constexpr std::uint32_t kMaintenancePeriod = 256;
  // Credits of a current span, which is not given back however many of its objects come free.
  static constexpr std::uint32_t kNoEvent = 1u << 31;
  // Spans that came through a fork and that one allocation looks through at most.
  static constexpr int kMaxRebuilds = 8;
  // How far apart objects of one span are at most: for spans of one unit, and for others.
  static constexpr std::uint64_t kUnitReach = kUnitSize;
  static constexpr std::uint64_t kChunkReach = kChunkSize;

  // `sampler`: null if no object is to be a sample of a heap profile.
  ThreadCache(ObjectHeap& heap, std::uint32_t id, Sampler* sampler);

  // Runs `work` under lock_ while nobody forks.
  template <typename Work>
  auto InSlowPath(Work work);

  // Whether `p` is the start of an object of `span` that was made; for the owner.
  static bool IsObject(const Span* span, const void* p) {
    return (AddressOf(p) - span->start) * span->reciprocal < span->limit;
  }
  // Takes the first object of the free list. Null when there is none or it is the last one, and when the link
  // leads out of the span: PopAny knows.
  void* Pop(Span* span, std::uint64_t reach) const;
  // From the free list of `source`, whose objects are `span`'s.
  void* PopAny(Span* source, const Span* span) const;
  // The object that follows `object` in a free list of `span`; null at its end. Stops the program if either was written
  // to.
  FreeObject* NextIn(const Span* span, const FreeObject* object) const;
  // Puts `object` in the free list. True: that was the span's last credit.
  bool Push(Span* span, FreeObject* object) const;
  static bool IsHot(const Span* span) { return span->size_class >= kFirstHotClass; }
  // The same for a class that has hot objects. REQUIRES: at least kFirstHotClass.
  void* PopHot(SizeClass size_class);
  ABSL_ATTRIBUTE_NOINLINE void PushHot(Span* span, FreeObject* object);
  // Gives a class that has none as much room as is left for it, and takes it away again. REQUIRES: no object is in it.
  ABSL_ATTRIBUTE_NOINLINE void OpenHot(SizeClass size_class);
  void CloseHot(SizeClass size_class);
  // There is no room for `object`: makes some, or frees it to where it belongs.
  ABSL_ATTRIBUTE_NOINLINE void PushHotFull(HotObjects& hot, Span* span, FreeObject* object);
  void FreeOther(Span* span, FreeObject* object);
  // Frees `object` to where it belongs. REQUIRES: it is not tagged.
  void FreeCold(Span* span, FreeObject* object);
  // The same for the `count` oldest.
  void CoolDown(HotObjects& hot, std::uint32_t count);
  void CoolDownAll();

  // ---- allocation ----
  // `size`, `alignment`: what the program asked for.
  void* AllocateClass(SizeClass size_class, std::size_t size, std::size_t alignment);
  ABSL_ATTRIBUTE_NOINLINE void* AllocateAboveDirect(std::size_t size);
  ABSL_ATTRIBUTE_NOINLINE void* AllocateSlow(std::size_t size);
  void* AllocateClassSlow(ClassRequest& request);
  ABSL_ATTRIBUTE_NOINLINE void* AllocateClassSlow(SizeClass size_class, std::size_t size, std::size_t alignment);
  // REQUIRES: the class's current span has no free object.
  void* AllocateFromSpans(ClassRequest& request);
  void* AllocateLarge(const LargeObjects::Request& request);
  bool ResizeLarge(Span* span, std::size_t size);
  void* RefillLocked(ClassRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  bool FindSpanLocked(SizeClass size_class) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  Span* TakeAvailableLocked(SizeClass size_class) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  Span* NewSpanLocked(SizeClass size_class) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void* PopCarved(Span* span, ClassRequest& request);

  // ---- samples: with a sampler only ----
  // REQUIRES: the class's front is empty.
  ABSL_ATTRIBUTE_NOINLINE void* AllocateCounted(ClassRequest& request);
  void FillFront(SizeClass size_class);
  void EmptyFrontLocked(SizeClass size_class) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void CountLarge(Span* span);

  // Which part of the page heap to use: what threads that never run at the same time free and allocate lies in
  // one core's cache.
  unsigned Home() const;

  // ---- spans ----
  static bool IsCarved(const Span* span);
  // Puts `span`, which is in no list, where C1 says; it has `used` objects that are not free.
  void PlaceLocked(Span* span, std::uint32_t used) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void SetCurrentLocked(SizeClass size_class, Span* span) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // Makes the class's current span, with `used` objects that are not free, one like the others.
  void RetireCurrentLocked(SizeClass size_class, std::uint32_t used) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // Gives an empty span back.
  void ReleaseLocked(Span* span) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void EmptyStashLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void ReleaseIdleLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // Current spans without an object that the program holds.
  void ReleaseEmptyLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // Available spans that came through a fork.
  void RebuildAllLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // Finds out which objects of a kSuspect span are free, by their tags. Returns how many are not.
  std::uint32_t RebuildLocked(Span* span) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void AppendLocked(SpanList& list, Span* span) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void RemoveLocked(SpanList& list, Span* span) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // `span` has no credits left: it is full no more, or empty. `beyond`: objects that came free after that.
  ABSL_ATTRIBUTE_NOINLINE void HandleEvent(Span* span);
  void HandleEventLocked(Span* span, std::uint32_t beyond) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);

  // ---- other threads ----
  ABSL_ATTRIBUTE_NOINLINE void FreeSlow(void* p);
  ABSL_ATTRIBUTE_NOINLINE void FreeSizedSlow(void* p, std::size_t size);
  void FreeChecked(void* p);
  bool NeedsLockToFree(const Span* span) const;
  // Marks an object of a span that came through a fork as free, from any thread. False: meanwhile the span went to
  // another cache, or its free list was rebuilt.
  bool FreeSuspect(Span* span, FreeObject* object);
  void DrainLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void TakeInLocked(Span* span, FreeObject* message) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void DrainIfOrphan();
  void ForwardStrays();
  ABSL_ATTRIBUTE_NOINLINE void Maintain();

  // ---- for ObjectHeap ----
  void BecomeOrphan();
  void BecomeAttached();
  // Gives back what is free: for the owner, and for whoever finds an orphan.
  void Trim();
  void TrimOrphan();
  void ThawLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void EmptyStash();
  // Returns when no slow path runs, for a thread that closed the gate; takes in what came if `drain`.
  void FinishSlowPath(bool drain);
  // In the child of a fork: for the cache of a thread that is not there, and for that of the one that is.
  void Freeze();
  void ForgetOthers() ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void UpdateOrphanClassesLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  bool HasAvailable(SizeClass size_class) const;  // a hint, for orphans
  // Gives one of the class's available spans to `heir`, if this is an orphan that is not in use right now.
  Span* GiveAvailable(SizeClass size_class, ThreadCache* heir);
  void AddStats(std::array<SizeClassStats, kSizeClassCount>& stats);
  vm::Bytes at_hand() const;
  // Of HeapLocation what concerns caches, the first of which is at `first`, made or not yet.
  static HeapLocation Locate(const ThreadCache* first);
  std::uint32_t CountFree(const Span* span) const;
  void CheckInvariants();

  // What the fast paths read; constant.
  const SpanTable spans_;
  const LinkCode code_;
  ObjectHeap* const heap_;
  const std::uint32_t id_;
  Sampler* const sampler_;  // the thread's; null if there is no heap profile
  // By size: (size + 15) / 16. Written in slow paths.
  std::array<Span*, kDirectCount> direct_;

  // Changed under lock_, but for what is in the current span; the thread may read it without.
  std::array<Bin, kSizeClassCount> bins_;
  std::array<HotObjects, kHotClasses> hot_;  // the thread's
  std::uint32_t hot_room_bytes_ = 0;         // the thread's: that there is room for in all of them
  std::uint32_t slow_paths_ = 0;             // the thread's
  RemoteFrees remote_frees_;                 // the thread's
  // Stands in for a span where there is none: it never has a free object.
  Span none_;

  // Guards what only slow paths change, so that others may do so for an orphan and fork sees it consistent.
  vm::sync::SpinLock lock_{vm::sync::LockRank::kHeap};
  std::uint32_t stash_size_ ABSL_GUARDED_BY(lock_) = 0;
  std::array<Span*, kStash> stash_ ABSL_GUARDED_BY(lock_);  // empty spans of one unit
  // Messages that came through inbox_ after their span had gone to another cache.
  FreeObject* strays_ ABSL_GUARDED_BY(lock_);
  std::atomic<State> state_{State::kAttached};  // changed under lock_, and in the child of a fork
  std::atomic<std::uint32_t> thread_{0};        // the kernel's number of the thread that attached last; written by it
  // Classes that an orphan has available spans of. Changed under lock_.
  std::array<std::atomic<std::uint64_t>, 2> orphan_classes_ = {};
  std::uint32_t next_orphan_ = 0;  // the registry's

  // Messages with objects of this cache's spans, freed by other threads. Everybody's.
  alignas(vm::kCacheLineSize) std::atomic<FreeObject*> inbox_;
};

inline void* ThreadCache::Pop(Span* span, std::uint64_t reach) const {
  FreeObject* object = span->free;
  const std::uint64_t distance = code_.Distance(object);
  if (ABSL_PREDICT_FALSE(distance >= reach)) return nullptr;
  FreeObject* next = reinterpret_cast<FreeObject*>(AddressOf(object) ^ distance);
  span->free = next;
  object->tag = 0;
  __builtin_prefetch(next);  // the next allocation of the class reads its link
  return object;
}

inline bool ThreadCache::Push(Span* span, FreeObject* object) const {
  code_.Link(object, span->free);
  span->free = object;
  return span->credits.CountDown();
}

inline void* ThreadCache::TryAllocate(std::size_t size) {
  if (ABSL_PREDICT_FALSE(size > kMaxDirectSize)) return nullptr;
  return Pop(direct_[(size + kMinAlignment - 1) / kMinAlignment], kUnitReach);
}

inline void* ThreadCache::Allocate(std::size_t size) {
  if (ABSL_PREDICT_FALSE(size > kMaxDirectSize)) return AllocateAboveDirect(size);
  void* object = Pop(direct_[(size + kMinAlignment - 1) / kMinAlignment], kUnitReach);
  return ABSL_PREDICT_TRUE(object != nullptr) ? object : AllocateSlow(size);
}

inline void ThreadCache::Free(void* p) {
  Span* span = spans_.At(AddressOf(p));
  if (ABSL_PREDICT_FALSE(span->owner.load(std::memory_order_relaxed) != this) ||
      ABSL_PREDICT_FALSE(!IsObject(span, p)) || ABSL_PREDICT_FALSE(code_.IsTagged(p))) {
    return FreeSlow(p);
  }
  if (ABSL_PREDICT_FALSE(IsHot(span))) return PushHot(span, static_cast<FreeObject*>(p));
  if (ABSL_PREDICT_FALSE(Push(span, static_cast<FreeObject*>(p)))) HandleEvent(span);
}

inline void ThreadCache::FreeSized(void* p, std::size_t size) {
  Span* span = spans_.At(AddressOf(p));
  if (ABSL_PREDICT_FALSE(span->owner.load(std::memory_order_relaxed) != this) ||
      ABSL_PREDICT_FALSE(size > kSizeClasses[span->size_class].size)) {
    return FreeSizedSlow(p, size);
  }
  Free(p);
}

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_THREAD_CACHE_H_
