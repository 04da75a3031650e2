// The sampled heap profile: which calls allocated what the program holds, and what it allocated in all.
//
// Which objects are samples is each thread's to find out (sampler.h). A sample's stack and size name its *site*, which
// counts. Small samples come from a cache that belongs to no thread but to the profile: so whoever frees one finds an
// owner that is not itself, off the fast path, and nothing has to be looked up for all the other objects. Large ones
// have the site in their span's record.
//
// Sites are never removed and never move. Readers take no lock: they may be signal handlers, of a thread that was in
// the profile itself.
//
// Thread safety: thread-safe; reading is async-signal-safe.
// Lock order:    lock_ (kHeapProfile), then all of the heap's.
// Waiting:       for lock_, and for a fork. Stacks are captured without it.
// Allocation:    from an arena of its own. When that is full, what would be a sample is an object like others.
// Invariants:    S1. Every object of objects_ that is not free has one record.
//                S2. A site's `freed` is never more than its `allocated`, for those who read `freed` first.
#ifndef FREEHOLD_ALLOCATOR_HEAP_PROFILE_H_
#define FREEHOLD_ALLOCATOR_HEAP_PROFILE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/types/span.h"
#include "allocator/size_class.h"
#include "allocator/span.h"
#include "vm/metadata_arena.h"
#include "vm/metric.h"
#include "vm/sync/spin_lock.h"
#include "vm/units.h"

namespace freehold::allocator {

class ObjectHeap;

struct HeapProfileOptions {
  // A sample every so many bytes on average; 0: no profile; 1: every object is a sample.
  vm::Bytes interval;
  // Writes the return addresses of the calling thread, innermost first, `most` of them at most, to `frames`. Returns
  // how many. May allocate from the heap. REQUIRES, with a profile: not null.
  unsigned (*capture)(void** frames, unsigned most) = nullptr;
};

// Objects of one size that calls through one stack allocated.
struct AllocationSite {
  std::size_t object_size = 0;
  std::uint64_t hash = 0;
  AllocationSite* next = nullptr;       // in the list of all
  AllocationSite* next_same = nullptr;  // of equal hash
  // Samples. Release, after `allocated` of the object; read first.
  std::atomic<std::uint64_t> freed{0};
  std::atomic<std::uint64_t> allocated{0};
  unsigned depth = 0;
  void* frames[];

  absl::Span<void* const> stack() const { return {frames, depth}; }
};

class HeapProfile {
 public:
  static constexpr unsigned kMaxDepth = 64;

  // A profile of what `heap` allocates; null if there is no memory. REQUIRES: `heap` is used by nobody yet.
  static HeapProfile* Create(ObjectHeap& heap, const HeapProfileOptions& options);
  // Gives its memory back. REQUIRES: nobody uses the heap any more.
  static void Destroy(HeapProfile* profile);

  HeapProfile(const HeapProfile&) = delete;
  HeapProfile& operator=(const HeapProfile&) = delete;

  vm::Bytes interval() const { return options_.interval; }

  // What a site counts at some moment.
  struct Counts {
    std::uint64_t live = 0;
    std::uint64_t allocated = 0;  // ever
  };
  static Counts CountsOf(const AllocationSite& site) {
    // Pairs with the release in NoteFree.
    const std::uint64_t freed = site.freed.load(std::memory_order_acquire);
    const std::uint64_t allocated = site.allocated.load(std::memory_order_relaxed);
    return {allocated - freed, allocated};
  }
  // For how many objects of this size one sample stands, on average.
  double ObjectsPerSample(std::size_t object_size) const;
  // All sites, through `next`; null when there is none.
  const AllocationSite* sites() const { return sites_.load(std::memory_order_acquire); }

  void ForEachMetric(vm::MetricVisitor visit, void* context) const;

  // For thread caches.
  // An object of the class that is a sample; null: there is no memory for it, or for its record.
  void* Allocate(SizeClass size_class);
  // Frees what Allocate returned. Stops the program if it is free already.
  void Free(const Span* span, void* object);
  // Counts an object of `bytes` that comes from elsewhere as a sample: a large or a guarded one. Null: no memory for that.
  AllocationSite* Note(vm::Bytes bytes);
  static void NoteFree(AllocationSite* site) {
    site->freed.fetch_add(1, std::memory_order_release);
  }
  // Whose spans small samples lie in.
  const ThreadCache* objects() const { return objects_; }

  // fork(2): as ObjectHeap's; this comes first in PrepareFork.
  void PrepareFork() ABSL_NO_THREAD_SAFETY_ANALYSIS { lock_.LockForFork(); }
  void UnlockAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS { lock_.UnlockAfterFork(); }

 private:
  static constexpr std::size_t kSiteLists = std::size_t{1} << 14;
  static constexpr std::size_t kRecordLists = std::size_t{1} << 18;
  static constexpr std::size_t kRecordsAtATime = 256;

  // A sample that is a small object.
  struct Record {
    const void* object = nullptr;
    AllocationSite* site = nullptr;
    Record* next = nullptr;
  };
  struct Stack {
    unsigned depth = 0;
    void* frames[kMaxDepth];
  };

  HeapProfile(ObjectHeap& heap, const HeapProfileOptions& options, vm::MetadataArena& arena, ThreadCache& objects,
              AllocationSite** site_lists, Record** record_lists)
      : heap_(heap),
        options_(options),
        arena_(arena),
        objects_(&objects),
        site_lists_(site_lists),
        record_lists_(record_lists) {}

  Stack Capture() const;
  // Both null when the arena is full.
  AllocationSite* SiteOfLocked(const Stack& stack, std::size_t object_size) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  Record* NewRecordLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  static std::size_t RecordListOf(const void* object);
  void NoteDropped() { dropped_.fetch_add(1, std::memory_order_relaxed); }

  ObjectHeap& heap_;
  const HeapProfileOptions options_;
  vm::MetadataArena& arena_;
  ThreadCache* const objects_;  // called under lock_ only
  std::atomic<AllocationSite*> sites_{nullptr};  // changed under lock_
  std::atomic<std::uint64_t> samples_{0};
  std::atomic<std::uint64_t> dropped_{0};
  vm::sync::SpinLock lock_{vm::sync::LockRank::kHeapProfile};
  AllocationSite** const site_lists_ ABSL_PT_GUARDED_BY(lock_);  // by hash
  Record** const record_lists_ ABSL_PT_GUARDED_BY(lock_);        // by object
  Record* unused_records_ ABSL_GUARDED_BY(lock_) = nullptr;
};

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_HEAP_PROFILE_H_
