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
//                C2. `credits` of an available span is the number of its objects that are not in its free list; of the
//                    current span, that and kNoEvent; of a full one, how many more must come free before it is
//                    available. What is at hand is in no span's list.
//                C3. What is at hand are objects of kObjects spans, of this cache or of others, with their tags. It is
//                    none of others' while there are suspect spans.
#ifndef FREEHOLD_ALLOCATOR_THREAD_CACHE_H_
#define FREEHOLD_ALLOCATOR_THREAD_CACHE_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>

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

  // What the thread allocates next of a class: a list of free objects, of whatever spans. What it frees comes first; at
  // the end is what a current span's free list was when nothing else was left.
  //
  //     freed  -->  | o | o | ... | o | o | o | ... |  <-- the current span's free list, what was carved, as a whole
  //     allocated <-'     at most `room` more than    `-- many, or not asked for: back to their spans, each its own
  //                       were taken since then
  //
  // Room is for a few objects at first. When it has ended again, and since the last time objects had to come from spans,
  // there is room for as many more: what a program allocates in one phase and frees in another stays at hand.
  //
  // With a sampler frees go to their spans, and what is at hand is the sampler's front of the class.
  //
  // Of a closed class nothing is kept: every free has to be looked at, or the class is only freed to; then its objects
  // would keep their spans from going back, and nobody asks for them. What is freed goes to its span, if that is own.
  struct AtHand {
    FreeObject* free = nullptr;  // a FreeList
    OwnerCounter credits;        // frees until there is no room for one, and allocations add to it; negative while closed
    std::uint16_t room = 0;      // 0: closed
    bool full_before = false;    // and not empty since
  };
  static_assert(sizeof(AtHand) == 16 && offsetof(AtHand, free) == offsetof(FreeList, free) &&
                offsetof(AtHand, credits) == offsetof(FreeList, credits));
  // A free that waits for the object's line to come. To everybody but this thread the object is still allocated.
  struct LateFree {
    Span* span = nullptr;  // null: none
    void* object = nullptr;
  };
  // What slow paths note of a class at hand.
  struct Use {
    // What PutIdleBack saw the last time.
    const FreeObject* free_seen = nullptr;
    std::uint32_t credits_seen = 0;
    std::uint32_t taken = 0;  // from spans since the class was opened or full
    bool was_full = false;
  };
  // Room to begin with: so many bytes, within these numbers of objects.
  static constexpr std::uint32_t kFirstRoomBytes = 16 << 10;
  static constexpr std::uint32_t kLeastRoom = 4;
  static constexpr std::uint32_t kMostFirstRoom = 32;
  static constexpr std::uint32_t kMaxRoomBytes = 512 << 10;  // of a class
  static constexpr std::uint32_t kMaxAllRoomBytes = 8 << 20;  // of all that are open
  static constexpr std::uint8_t kDirectFrees = 128;
  // Frees that wait for their lines, and the largest class of which they do: what they keep of memory.
  static constexpr std::uint32_t kLateFrees = 16;
  static constexpr SizeClass kLastLateClass = ClassOf(4096);
  static constexpr std::uint32_t kClosed = 3u << 30;  // as far from zero as can be
  static_assert(kMaxRoomBytes / kMinAlignment <= std::numeric_limits<std::uint16_t>::max());

  static constexpr std::size_t kDirectCount = kMaxDirectSize / kMinAlignment + 1;
  static constexpr std::size_t kStash = 4;
  // Objects that are made at a time: from SizeClassInfo::carve divided by this up to as many times it.
  static constexpr std::uint32_t kCarves = 4;
  // What is prefetched while objects are made: the page that is cut up next.
  static constexpr std::size_t kCarvePrefetch = 4096;
  // Slow paths between looks at the clock and at forgotten batches.
  static constexpr std::uint32_t kMaintenancePeriod = 256;
  // Of the credits of a current span, which is not given back however many of its objects come free.
  static constexpr std::uint32_t kNoEvent = 1u << 30;
  // Spans that came through a fork and that one allocation looks through at most.
  static constexpr int kMaxRebuilds = 8;
  // What is larger may be known to be zero.
  static constexpr std::size_t kMaxAlwaysZeroed = 1024;

  // `sampler`: null if no object is to be a sample of a heap profile.
  ThreadCache(ObjectHeap& heap, std::uint32_t id, Sampler* sampler);

  // Runs `work` under lock_ while nobody forks.
  template <typename Work>
  auto InSlowPath(Work work);

  // Of the class that Span::at_hand or at_hand_of_ tells.
  AtHand& AtHandAt(std::uint16_t offset) {
    return *reinterpret_cast<AtHand*>(reinterpret_cast<char*>(at_hand_.data()) + offset);
  }
  static std::uint16_t AtHandOffset(SizeClass size_class) {
    return static_cast<std::uint16_t>(size_class * sizeof(AtHand));
  }
  // Takes the first object at hand. Null when there is none, and when it was written to: the slow path knows.
  void* Pop(AtHand& at_hand) const;
  // Makes the current span's free list what is at hand, and takes the first of it; null when it is empty. REQUIRES:
  // nothing is at hand.
  void* PopCurrent(SizeClass size_class);
  // The object that follows `object`, which is the end of the list or one that `may_follow`. Stops the program if either
  // was written to.
  template <typename MayFollow>
  FreeObject* CheckedNext(const FreeObject* object, MayFollow may_follow) const;
  // The object that follows `object` at hand. Stops the program if either was written to.
  FreeObject* NextAtHand(const FreeObject* object) const;
  // The object that follows `object` in a free list of `span`; null at its end. Stops the program if either was written
  // to.
  FreeObject* NextIn(const Span* span, const FreeObject* object) const;
  // Puts `object` in the free list. True: that was the span's last credit.
  bool Push(Span* span, FreeObject* object) const;
  // Lets a class have room to begin with, or none.
  void Open(SizeClass size_class);
  void Close(SizeClass size_class);
  // Whether the class has room for what it needed from spans since it was full the last time, too.
  bool GrowRoom(SizeClass size_class);
  // There is no room for `object`, which is not tagged.
  void FreeWithoutRoom(Span* span, FreeObject* object);
  // Frees what is at hand to where it belongs: after the first `keep` objects, at most `most`.
  void PutBack(SizeClass size_class, std::uint32_t keep = 0, std::uint32_t most = ~std::uint32_t{0});
  void PutAllBack();
  // What was not used since the last time.
  void PutIdleBack();
  // Puts the objects from `object` on that are of the own span `span` in its free list, at most `most`, which it takes
  // them from. Returns what follows them.
  FreeObject* PutRunBack(Span* span, FreeObject* object, std::uint32_t& most);
  // Frees `object` to where it belongs. REQUIRES: it is not tagged, as far as can be known without looking at others'.
  void FreeToSpan(Span* span, FreeObject* object);
  // In the child of a fork: what is not free by its tag alone stays.
  void KeepOwnAtHand();

  // ---- allocation ----
  // `size`, `alignment`: what the program asked for.
  void* AllocateClass(SizeClass size_class, std::size_t size, std::size_t alignment);
  ABSL_ATTRIBUTE_NOINLINE void* AllocateSlow(std::size_t size);
  void* AllocateClassSlow(ClassRequest& request);
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
  ABSL_ATTRIBUTE_NOINLINE void HandleEvent(Span* span, std::uint32_t beyond = 0);
  void HandleEventLocked(Span* span, std::uint32_t beyond) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);

  // ---- other threads ----
  ABSL_ATTRIBUTE_NOINLINE void FreeSlow(void* p);
  ABSL_ATTRIBUTE_NOINLINE void FreeChecked(void* p);
  // REQUIRES: `p` is an object of `span`, free or not.
  void FreeObjectOf(Span* span, void* p);
  // The same while objects of closed classes are freed.
  ABSL_ATTRIBUTE_NOINLINE void FreeDirectly(Span* span, void* p);
  // Where the line of `p` has come, or is not waited for.
  void FreeArrived(Span* span, void* p);
  void FreeTo(FreeList* list, Span* span, void* p);
  void FinishLateFrees();
  // `p` is an object of `span`, which is counted as freed, and the credits of where it should go have ended.
  ABSL_ATTRIBUTE_NOINLINE void FreeEvent(Span* span, void* p);
  ABSL_ATTRIBUTE_NOINLINE void FreeSizedSlow(void* p, std::size_t size);
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
  // Looks at each.
  std::uint32_t CountFree(const Span* span) const;
  // Of a current span.
  static std::uint32_t UsedOf(const Span* current) { return current->credits.Get() - kNoEvent; }
  void CheckInvariants();

  // What the fast paths read; constant.
  const SpanTable spans_;
  const LinkCode code_;
  ObjectHeap* const heap_;
  const std::uint32_t id_;
  Sampler* const sampler_;  // the thread's; null if there is no heap profile
  // So many frees from now on ask whether their class is closed, since an object of a closed one was freed of late. While
  // it is 0 no free is late. The thread's.
  std::uint8_t direct_frees_ = 0;
  const std::uint64_t addresses_ = kAddresses;  // in memory: one instruction less in Pop
  std::array<std::uint16_t, kDirectCount> at_hand_of_;  // AtHandOffset by size: (size + 15) / 16
  alignas(vm::kCacheLineSize) std::array<AtHand, kSizeClassCount> at_hand_;  // the thread's
  // Whose spans a free goes to directly: this cache if the class is closed; else null. The thread's.
  std::array<const ThreadCache*, kSizeClassCount> direct_;

  // Changed under lock_, but for what is in the current span; the thread may read it without.
  std::array<Bin, kSizeClassCount> bins_;
  std::array<Use, kSizeClassCount> use_;    // the thread's
  std::array<LateFree, kLateFrees> late_frees_;  // the thread's
  std::uint32_t room_bytes_ = 0;            // the thread's: of all classes that are open
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

inline void* ThreadCache::Pop(AtHand& at_hand) const {
  FreeObject* object = at_hand.free;
  const std::uint64_t tag = code_.TagAhead(object);
  FreeObject* next = code_.Next(object, tag);
  if (ABSL_PREDICT_FALSE(AddressOf(next) >= addresses_)) return nullptr;
  if (ABSL_PREDICT_FALSE(!code_.TakeTag(object, tag))) {
    object->tag ^= tag;  // as it was: whoever tries again finds the same
    return nullptr;
  }
  at_hand.free = next;
  at_hand.credits.CountUp();
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
  return Pop(AtHandAt(at_hand_of_[(size + kMinAlignment - 1) / kMinAlignment]));
}

inline void* ThreadCache::Allocate(std::size_t size) {
  void* object = TryAllocate(size);
  return ABSL_PREDICT_TRUE(object != nullptr) ? object : AllocateSlow(size);
}

inline void ThreadCache::Free(void* p) {
  Span* span = spans_.At(AddressOf(p));
  if (ABSL_PREDICT_FALSE(!span->HasObjectAt(p))) return FreeSlow(p);
  FreeObjectOf(span, p);
}

inline void ThreadCache::FreeObjectOf(Span* span, void* p) {
  if (ABSL_PREDICT_FALSE(direct_frees_ != 0)) return FreeDirectly(span, p);
  AtHand& at_hand = AtHandAt(span->at_hand);
  FreeTo(reinterpret_cast<FreeList*>(&at_hand), span, p);
}

inline void ThreadCache::FreeTo(FreeList* list, Span* span, void* p) {
  if (ABSL_PREDICT_FALSE(list->credits.CountDown())) return FreeEvent(span, p);
  if (ABSL_PREDICT_FALSE(code_.IsTagged(p))) return FreeChecked(p);
  auto* object = static_cast<FreeObject*>(p);
  code_.Link(object, list->free);
  list->free = object;
}

inline void ThreadCache::FreeSized(void* p, std::size_t size) {
  Span* span = spans_.At(AddressOf(p));
  if (ABSL_PREDICT_FALSE(!span->HasObjectAt(p)) || ABSL_PREDICT_FALSE(size > kSizeClasses[span->size_class].size)) {
    return FreeSizedSlow(p, size);
  }
  Free(p);
}

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_THREAD_CACHE_H_
