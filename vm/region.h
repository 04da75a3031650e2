// A region: one aligned power-of-two part of a zone, with its own tree of extents, bins of free extents, range
// lock and counters. Threads map from the region of their CPU, so that disjoint work writes no shared line.
//
// The verbs here work on one region; vm/address_space.h has the contract towards users and splits ranges.
//
// Thread safety: thread-safe but for the `...Locked` methods, which REQUIRE tree_lock_.
// Lock order:    range_lock_ (kRange), the purge stage (kPurge), tree_lock_ (kRegion).
// Invariants:    G1. Extents tile the region (T1-T3 in vma_tree.h).
//                G2. A kPending extent belongs to the one Map that set its generation. Whoever holds its range
//                    exclusively may take it away, which changes the generation.
//                G3. A kDetached extent lies under a range guard of the Unmap that detached it; a kDeferred one is
//                    neither cut nor merged.
//                G4. A verb visits at most kExtentsPerHold extents in one hold of tree_lock_. One over more of them
//                    goes on in further holds, under its range lock; between, lookups find part of it done.
//                G5. A free extent of a heap zone has the zone's own protection; one of the mapping zone is
//                    inaccessible.
#ifndef FREEHOLD_VM_REGION_H_
#define FREEHOLD_VM_REGION_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/base/optimization.h"
#include "absl/base/thread_annotations.h"
#include "vm/address_space.h"
#include "vm/backing.h"
#include "vm/file_mapping.h"
#include "vm/free_ranges.h"
#include "vm/metadata_arena.h"
#include "vm/notifier.h"
#include "vm/page_range.h"
#include "vm/purge_stage.h"
#include "vm/result.h"
#include "vm/sync/range_lock.h"
#include "vm/sync/request_tree.h"
#include "vm/sync/spin_lock.h"
#include "vm/vma.h"
#include "vm/vma_tree.h"

namespace freehold::vm {

// A relaxed counter with one writer at a time: the holder of the tree lock.
class RegionCounter {
 public:
  void Add(std::uint64_t n) { value_.store(get() + n, std::memory_order_relaxed); }
  void Subtract(std::uint64_t n) { value_.store(get() - n, std::memory_order_relaxed); }
  std::uint64_t get() const { return value_.load(std::memory_order_relaxed); }
  // What the caller does next comes after this.
  std::uint64_t get_acquire() const { return value_.load(std::memory_order_acquire); }

 private:
  std::atomic<std::uint64_t> value_{0};
};

class Pin;

// Aligned to pages: each region's fields then lie alike against what else a verb writes. With some other offsets a map
// and unmap takes a sixth longer, by loads that wait for stores of equal low address bits.
class alignas(kPageSize) Region {
 public:
  using Guard = sync::RangeLock::Guard;

  // Parts that all regions of a space share.
  struct Shared {
    os::Kernel* kernel;
    MetadataArena* arena;
    PurgeStage* purge_stage;
    const AddressSpaceOptions* options;
    std::atomic<std::uint32_t>* clock;  // coarse ticks, see AddressSpace::Tick
    std::atomic<std::uint64_t>* most_committed;  // pages of the region that committed most; a hint
    NotifierList* notifiers;
    const std::atomic<FaultHooks*>* fault_hooks;
  };

  // `range_lock` may be shared with other regions (LockPolicy::kCoarse).
  Region(const Shared& shared, Zone zone, PageRange range, sync::RangeLock& range_lock);

  // Error: kNoMetadata, kSystem. REQUIRES: once, before anything else.
  Error Init();

  // map.cc
  // MapAnywhere for the common case. REQUIRES: readable and writable memory, with nothing else asked for but content,
  // alignment and generation.
  Result<PageRange> MapOrdinary(RegionPage count, const MapOptions& options);
  Result<PageRange> MapAnywhere(RegionPage count, const MapOptions& options);
  Result<PageRange> MapFixed(PageRange range, const MapOptions& options);
  // unmap.cc
  // `only`: unless null, error kReplaced where `part` does not belong to this VMA, as it is there.
  Error Unmap(PageRange part, const VmaInfo* only = nullptr);
  // protect.cc
  Error Protect(PageRange part, os::Protection protection);
  // advise.cc
  // Lasting advice for `part` of the VMA `generation`. Errors: kReplaced, kUnsupported, kNoMetadata, kSystem.
  Error AdviseKernel(PageRange part, std::uint64_t generation, int advice);
  // remap.cc
  // Maps what follows `part`, which belongs to the VMA `vma`, as the rest of it, `count` pages in all. Errors:
  // kReplaced (`vma` is not what it was), kNoRoom (something is mapped there), others as MapFixed.
  Result<PageRange> Grow(PageRange part, Pages count, const VmaInfo& vma);
  // Makes `part` of the VMA `vma` an extent of its own that no verb merges. Errors: kReplaced, kNoMetadata.
  Error Isolate(PageRange part, const VmaInfo& vma, const Guard& guard);
  // Undoes that.
  void Join(PageRange part, const Guard& guard);
  // Gives every extent of `range` the kernel protection that the tree says it has, and traps what strict unmap
  // had trapped.
  void RestoreProtection(PageRange range, const Guard& guard);
  // The kernel's idea of the extent of `part` is not the tree's: before somebody else has it, a reset takes that away.
  void ResetLater(PageRange part, const Guard& guard);
  // Unmaps what was isolated. Errors: kSystem; then it is joined again.
  Error UnmapIsolated(PageRange part, const Guard& guard);
  // Expects content in `part`, all of the VMA `vma`. Error: kReplaced.
  Error PrepareTarget(PageRange part, const VmaInfo& vma, const Guard& guard);
  // The kernel is about to put another kernel VMA in the place of the start of `target`.
  void SetMoved(PageRange target, const Guard& guard);
  // From now on `part` is the mapping `generation`.
  void Adopt(PageRange part, std::uint64_t generation, const Guard& guard);
  // lock_memory.cc
  // kNone unlocks. Populates nothing.
  Error SetMemoryLock(PageRange part, os::MemoryLock lock);
  // lookup.cc
  // The extent that holds `page`, mapped or not; `range` is absolute.
  VmaInfo LookupExtent(PageNumber page, VmaState& state) const;
  // The same for whoever holds the page's range and relies on what is mapped there: under the tree lock, by
  // which an Unmap that takes no range lock (UnmapWhole) is seen, or sees the holder.
  VmaInfo LookupHeld(PageNumber page, VmaState& state, const sync::RangeLock::Guard& guard) const;
  // What a hold of the tree lock about the extent of `page` reads and writes comes into this thread's caches, without
  // the lock. For verbs that come to the lock, or back to it, after work that has left the caches cold (a system call,
  // pages touched, a wait): what they wait for here, nobody waits for with them. Changes nothing.
  void Warm(PageNumber page) const;
  // Copies up to `capacity` of the next mapped VMAs from `from` on, in order, and no page below it; returns how
  // many, and in `from` where to go on: the end of the region when it has seen all.
  std::size_t CopyVmas(PageNumber& from, VmaInfo* out, std::size_t capacity) const;
  // pin.cc
  // Error: kNotMapped.
  Error Enter(Pin& pin);
  void Leave(Pin& pin);
  // Unmaps what could not be unmapped when its last pin went.
  void RetryDeferred();
  bool IsPinned(PageRange range) const;
  // purge.cc
  // Gives cached extents freed at or before `until` back, the oldest first, until at most `keep` pages of
  // possibly resident memory are left in the bins, of up to `largest` pages each. Returns the pages given back.
  Pages PurgeFree(std::uint32_t until, Pages keep, RegionPage largest = UINT32_MAX);
  // What was mapped once counts for less, from time to time: see ExcessLocked.
  void ForgetMost();
  // file_mapping.cc
  bool has_windows() const { return windows_ != nullptr && windows_->size() != 0; }
  // Maps the window `key` if it is there, and nobody holds its range; else kNoRoom.
  Result<PageRange> TakeWindow(const FileKey& key);
  // Resets windows that were unmapped at or before `until`, the oldest first, until at most `keep` pages of them are
  // left, and fewer than may be. Returns the pages that are free address space now.
  Pages PurgeWindows(std::uint32_t until, Pages keep);
  // `part`, a whole extent, now shows what `vma` shows from `backing_page` on.
  void ShowBacking(PageRange part, const VmaInfo& vma, std::uint64_t backing_page, const Guard& guard);
  // fork.cc; the range locks are held exclusively throughout.
  void PrepareFork();
  void ParentAfterFork();
  void ChildAfterFork();

  Zone zone() const { return zone_; }
  PageRange range() const { return range_; }
  sync::RangeLock& range_lock() const { return range_lock_; }
  bool is_heap() const { return zone_ != Zone::kMapping; }
  // How often something that lookups see has changed; splits and merges change nothing.
  std::uint64_t changes() const { return changes_.get_acquire(); }
  void AddStats(AddressSpaceStats& stats) const;
  // telemetry.cc
  void ForEachMetric(MetricVisitor visit, void* context) const ABSL_NO_THREAD_SAFETY_ANALYSIS;
  RegionLocation Location() const;
  // Nothing unless AddressSpaceOptions::record_tree_lock_holds asked for it.
  sync::TimeHistogram TreeLockHolds() const;
  void CheckInvariants() const;

  // What a fixed map finds in its range.
  struct Claim {
    RegionPage first = 0;
    RegionPage end = 0;
    Placement placement = Placement::kFixed;
    RegionPage next = 0;               // everything below is claimed; the two outermost extents from the start
    std::uint64_t generation = 0;  // of the mapping to be; 0 until the range was cut out
    // Of what is claimed so far:
    bool clean = true;    // no page was used since it was last zero
    bool locked = false;  // the kernel has some of it locked
    bool backed = false;   // some of it has a kernel VMA of its own: a backing's, its remains, a moved or advised one
    bool occupied = false; // some of it is mapped
    bool lost = false;     // the kernel has something else in place of what is mapped
  };
  // What is left of an Unmap to take away from lookups, and what that has found.
  struct Detachment {
    RegionPage next = 0;
    RegionPage end = 0;
    std::uint64_t newest = 0;  // generation: later mappings came into holes of the range and stay
    bool pinned = false;   // some of it: all of it is deferred, see pin.cc
    bool notified = false; // it must not be used again before OnClose
    bool zap = false;      // some of it needs kernel work
    bool backed = false;   // some of it has a backing
    bool reset = false;    // in the mapping zone: some of it was ever accessible
  };
  // transaction.cc
  // A step of a Transaction on its way.
  struct Change {
    PageRange range;
    Claim claim;            // of a map
    Detachment detachment;  // of an unmap
    bool closes = false;    // something that was mapped is not any more
  };
  // What can be undone, by the Cancel of the same name. Errors: as the verbs, and kUnsupported.
  Error PrepareMap(Change& change, const MapOptions& options, const Guard& guard);
  Error PrepareUnmap(Change& change, const Guard& guard);
  Error PrepareProtect(Change& change, os::Protection protection, const Guard& guard);
  // Drops the content that is mapped over. Error: kSystem.
  Error PrepareContent(Change& change, const MapOptions& options);
  void CancelMap(Change& change, const MapOptions& options, const Guard& guard);
  void CancelUnmap(Change& change);
  void CancelProtect(Change& change, const Guard& guard);
  // REQUIRES: a Hidden of this region.
  void PublishMap(Change& change, const MapOptions& options);
  void PublishUnmap(Change& change);
  void PublishProtect(Change& change, os::Protection protection);
  void FinishChange(Change& change, const Guard& guard);
  // Holds the tree lock, and lets no lookup begin, while in scope.
  class Hidden {
   public:
    explicit Hidden(Region& region);
    ~Hidden();
    Hidden(const Hidden&) = delete;
    Hidden& operator=(const Hidden&) = delete;

   private:
    VmaTree& tree_;
    sync::SpinLockHolder holder_;
  };

 private:
  using Mode = sync::RangeLock::Mode;

  // What Map must do to an extent that it chose, outside the tree lock.
  struct Preparation {
    Vma* vma = nullptr;
    RegionPage first = 0;
    PageRange range;  // unless there is nothing to do
    VmaAttributes attributes;  // of the mapping to be
    bool commit = false;   // the first use of this part of the region
    bool protect = false;  // its kernel protection is not the one asked for
    bool zero = false;
    bool unguard = false;  // strict unmap made it trap
    bool relock = false;   // it is not locked as asked for
    bool reset = false;    // in the mapping zone: the kernel has something of another mapping there
    RegionPage excess = 0;  // so much of what is cached goes, since this is fresh
    bool needed() const {
      return commit || protect || zero || unguard || relock || reset || attributes.backing != nullptr;
    }
  };

  // What a verb does to this many extents takes about a microsecond.
  static constexpr int kExtentsPerHold = 16;
  static constexpr std::size_t kChunksPerHold = 64;  // of committed_

  // So many extents go back at once. A bin of small ones that nobody tends to touch is cleaned when it has gathered
  // as many: neighbours become one range, and one discard of nothing costs each of them a few nanoseconds.
  static constexpr std::size_t kPurgeBatch = 256;
  struct PurgeList {
    Vma* vmas[kPurgeBatch];
    PageRange ranges[kPurgeBatch];  // theirs, in any order; neighbours that came together are one
    bool unlocked[kPurgeBatch] = {};  // an Unmap could not unlock it, the purge could
    std::size_t size = 0;
    std::size_t range_count = 0;
  };

  // region.cc: extents
  RegionPage ToRegion(PageNumber page) const {
    return static_cast<RegionPage>((page - range_.first).value);
  }
  PageRange ToAbsolute(RegionPage first, RegionPage count) const {
    return PageRange::Of(range_.first + Pages{first}, {count});
  }
  PageRange RangeOf(const Vma& vma) const { return ToAbsolute(vma.first_page(), vma.page_count()); }

  // Every verb asks for this before its first change, so that it cannot fail half-way: three insertions.
  bool HasMetadataLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_) {
    return HasVmasLocked() && !tree_.NeedsNodes();
  }
  bool HasVmasLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_) { return spare_vma_count_ >= 3; }
  // Gets metadata from the arena, outside the lock.
  Error Refill();
  FREEHOLD_HOLD_CODE Vma* TakeVmaLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  FREEHOLD_HOLD_CODE void ReturnVmaLocked(Vma* vma) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);

  // Cuts the extent at `page`; both parts keep its attributes. Returns the upper part. A cached extent stays
  // cached, in two bins.
  FREEHOLD_HOLD_CODE Vma* SplitLocked(Vma* vma, RegionPage page) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Makes `first` and `end` borders of extents.
  FREEHOLD_HOLD_CODE void IsolateLocked(RegionPage first, RegionPage end) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Lets `vma` swallow its right neighbour.
  FREEHOLD_HOLD_CODE void AbsorbNextLocked(Vma* vma) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Removes the right neighbour of `vma`, whose pages `vma` covers already.
  FREEHOLD_HOLD_CODE void DropNextLocked(Vma* vma) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Keeps other verbs from merging the extents of [first, end) with theirs, between two critical sections of a
  // verb that holds exactly these pages and has made their borders borders of extents. The outermost two are
  // enough: nobody else merges mapped extents within the range.
  FREEHOLD_HOLD_CODE void SetBusyLocked(RegionPage first, RegionPage end, bool busy)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // The start of such a verb: makes the borders and sets busy. Error: kNoMetadata; then nothing has changed.
  Error MakeBusy(RegionPage first, RegionPage end);
  // Its end when it was refused.
  void EndBusy(RegionPage first, RegionPage end);
  // These two go through the extents of [first, end), which the caller holds exclusively, so that what is mapped stays
  // so from one hold of the tree lock to the next; kExtentsPerHold of them a hold.
  // Calls `look(vma)`, which returns an Error. Errors: kNotMapped where something is not mapped; the first of `look`.
  template <typename Look>
  Error LookAtMapped(RegionPage first, RegionPage end, const Look& look) const;
  // Calls `change(vma)` for what MakeBusy has cut out, merges what has become equal, and ends busy.
  template <typename Changer>
  void ChangeBusy(RegionPage first, RegionPage end, const Changer& change);
  // One hold of it, from `page` on, where it leaves where to go on.
  template <typename Changer>
  void ChangeBusyLocked(RegionPage first, RegionPage end, RegionPage& page, const Changer& change)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Merges mapped neighbours of one mapping that have equal attributes, around and within [first, end), unless
  // they are busy.
  FREEHOLD_HOLD_CODE void MergeMappedLocked(RegionPage first, RegionPage end) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  FREEHOLD_HOLD_CODE Vma* NextLocked(const Vma* vma) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);

  // Unique in the space: a moved mapping keeps its own.
  std::uint64_t NextGenerationLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_) {
    return last_generation_ += kMaxRegions;
  }
  // From now on they are newer than `generation`, which may be another region's.
  void RaiseGenerationLocked(std::uint64_t generation) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_) {
    if (generation <= last_generation_) return;
    last_generation_ += (generation - last_generation_ + kMaxRegions - 1) / kMaxRegions * kMaxRegions;
  }
  void SetStateLocked(Vma* vma, VmaState state) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // To kCached, in its bin. `vma` may become part of a neighbour.
  void CacheLocked(Vma* vma, Knowledge knowledge) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Merges a large extent, kCached but in no bin yet, with cached neighbours; returns what it became.
  FREEHOLD_HOLD_CODE Vma* MergeCachedLocked(Vma* vma) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // To kFree and kClean, merged with free neighbours.
  FREEHOLD_HOLD_CODE void FreeLocked(Vma* vma) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Takes a kPending extent from its Map, or a kPurging one from its purge: free again, as it was.
  void GiveBackLocked(Vma* vma) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // To kMapped, `count` pages from its first on: visible to lookups, all at once. REQUIRES: not kFree; what else lies
  // in those pages is dropped afterwards.
  void PublishLocked(Vma* vma, RegionPage count, const VmaAttributes& attributes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // The extent that holds `page`; the quicker way to one that begins there and was published lately.
  Vma* FindLocked(RegionPage page) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);

  // lookup.cc
  VmaInfo InfoOf(PageRange range, const VmaAttributes& attributes) const;

  // region.cc: what the kernel has made readable and writable. Heap zones grow by chunks. In the mapping zone, what
  // core dumps include: everything up to the end of the highest range.
  Error Commit(PageRange range);
  void IncludeInCoreDumps(RegionPage end) ABSL_EXCLUSIVE_LOCKS_REQUIRED(commit_lock_);
  Error CommitChunks(std::size_t first, std::size_t end) ABSL_EXCLUSIVE_LOCKS_REQUIRED(commit_lock_);
  bool IsCommitted(RegionPage first, RegionPage end) const;
  bool IsChunkCommitted(std::size_t chunk) const;
  std::atomic_ref<std::uint64_t> CommittedWord(std::size_t chunk) const {
    return std::atomic_ref<std::uint64_t>(committed_[chunk / 64]);
  }

  // map.cc
  enum class Choice : std::uint8_t { kPublished, kPrepare, kCommitFirst, kCleanFirst, kPurgeFirst, kNoMetadata, kNoRoom };
  // What a Map has not tried yet to find memory that was used before.
  struct Remedies {
    bool commit = true;
    bool clean = true;
    bool purge = true;
  };
  Choice ChooseLocked(RegionPage count, const MapOptions& options, const Remedies& left, Preparation& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  Vma* TakeCachedLocked(RegionPage count, const MapOptions& options)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // A cached extent that has too few pages and enough free memory around it, and where the place that covers it begins.
  struct Extensible {
    Vma* vma = nullptr;
    RegionPage first = 0;
  };
  Extensible FindExtensibleLocked(RegionPage count, std::uint64_t alignment) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  bool PlaceAroundLocked(const Vma* cached, RegionPage count, std::uint64_t alignment, RegionPage& first) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  Vma* TakeExtendedLocked(const Extensible& cached, RegionPage count) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  Vma* CarveLocked(RegionPage count, std::uint64_t alignment) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Under the range lock of the whole region, so that nobody takes the extent away.
  Result<PageRange> MapUndisturbed(RegionPage count, const MapOptions& options);
  // `held`: a guard of the whole region, or null. Error kReplaced: somebody took the extent, try again.
  Result<PageRange> MapOnce(RegionPage count, const MapOptions& options, const Guard* held);
  Result<PageRange> Finish(const Preparation& preparation, const Guard& guard);
  Error Prepare(const Preparation& preparation);
  enum class ClaimResult : std::uint8_t { kClaimed, kMore, kOverlap, kPinned, kPurging, kNoMetadata };
  Result<Claim> ClaimFixed(RegionPage first, RegionPage end, Placement placement);
  ClaimResult ClaimLocked(Claim& claim) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Whether a fixed map of this placement takes what `vma` has, or why not.
  static bool MayClaim(const Vma& vma, Placement placement, ClaimResult& refusal);
  bool StartClaimLocked(Claim& claim, ClaimResult& refusal) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  Vma* ClaimExtentLocked(RegionPage page, Claim& claim) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  void Unclaim(const Claim& claim);
  // `generation`: of the mapping that this continues; 0: a new one.
  Result<PageRange> MapHeld(PageRange range, const MapOptions& options, std::uint64_t generation,
                            const Guard& guard);
  void PublishFixed(const Claim& claim, const MapOptions& options, std::uint64_t continued);
  void PublishFixedLocked(const Claim& claim, const MapOptions& options, std::uint64_t continued, RegionPage& page,
                          DroppedPages<kExtentsPerHold>& replaced) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  Error PrepareFixed(PageRange range, const MapOptions& options, Claim& claim, const Guard& guard);
  Error PrepareAccess(PageRange range, const MapOptions& options, Claim& claim, const Guard& guard);
  Error PrepareContent(PageRange range, const MapOptions& options, const Claim& claim);
  void UndoAccess(PageRange range, const MapOptions& options, const Claim& claim, const Guard& guard);
  Error ReplaceInKernel(PageRange range, const MapOptions& options, Claim& claim);
  void RestoreContent(PageRange range, bool lost);
  void FlushBackings(PageRange range, const Guard& guard);
  // Fills with zeroes: by memset where that is cheaper than faults, else by a discard.
  Error MakeZero(PageRange range, bool writable);

  // remap.cc
  // Whether `part`, which `guard` covers, belongs to the VMA that `vma` describes, and that is as it was.
  bool IsStill(PageRange part, const VmaInfo& vma, const Guard& guard) const;

  // lock_memory.cc
  Error LockInKernel(PageRange range, os::MemoryLock lock);
  // Locks every extent of `range` in the kernel as the tree says, and no other.
  void RestoreLocks(PageRange range, const Guard& guard);

  // unmap.cc
  // Tells the notifiers about what is mapped in `range`.
  void Invalidate(PageRange range, Invalidation what, const Guard& guard);
  // And that what was told to be closed is mapped again.
  void TakeBackClose(PageRange range, const Guard& guard);
  // Unmaps these pages without their range lock, if nobody has that and RetireWholeLocked does it.
  bool UnmapWhole(RegionPage first, RegionPage count, bool& over_limit);
  // Heap zones: puts the zone's own kernel VMA in the place of another, without access.
  Error ReplaceForeign(PageRange range);
  // Unmap, whatever that takes.
  FREEHOLD_HOLD_CODE Error UnmapHeld(PageRange part, const VmaInfo* only, bool sample, bool& over_limit);
  // The common case: these pages are exactly one mapped extent that needs no kernel work. False otherwise.
  bool RetireWholeLocked(RegionPage first, RegionPage count, std::size_t sampled)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Whether a border of `part` goes through a mapped extent.
  bool IsCutLocked(PageRange part) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Cuts mapped extents at the borders of `part`.
  Detachment StartDetachLocked(PageRange part, bool pinned, bool notified) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Takes up to kExtentsPerHold extents away from lookups; true when that was all.
  bool DetachLocked(Detachment& detachment) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Whether an extent that is unmapped gives the kernel work.
  bool NeedsZap(const Vma& vma) const;
  void NoteDetached(const Vma& vma, Detachment& detachment) const;
  void RetireLocked(Vma* vma) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  FREEHOLD_HOLD_CODE Error ZapDetached(PageRange part, const Detachment& detachment, const Guard& guard);
  bool Trap(PageRange range);
  Error Untrap(PageRange range);
  void RemapDetached(PageRange part);
  // Whether this unmap, one in many, should count its resident pages. A hint, without a lock.
  bool WantsSample(RegionPage count);
  static constexpr std::size_t kNoSample = SIZE_MAX;
  // How many of them it looks at.
  static constexpr std::size_t SampledPages(std::size_t pages) { return pages < 512 ? pages : 512; }
  std::size_t SampleResidency(PageRange part);

  // file_mapping.cc
  Result<PageRange> TakeWindowLocked(Vma* window) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Unmaps a mapping that may stay as a window; else false.
  bool RetireWindowLocked(Vma* vma) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  bool OverWindowLimit() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // To kCached and foreign.
  void AbandonWindowLocked(Vma* window) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Takes it out of windows_, and its backing away.
  void ReleaseWindowLocked(Vma* window) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  bool CollectWindowsLocked(std::uint32_t until, Pages keep, PurgeList& list)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  void ResetWindows(PurgeList& list);

  // transaction.cc
  // Error kUnsupported: more than one hold of the tree lock visits.
  Error CheckExtentCount(PageRange range) const;
  void SetBordersBusyLocked(PageRange range, bool busy) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);

  // protect.cc
  // Whether something in [first, end) has another protection. Errors: kNotMapped, kDenied.
  Result<bool> ProtectionDiffers(RegionPage first, RegionPage end, os::Protection protection) const;
  // As ChangeBusyLocked.
  FREEHOLD_HOLD_CODE void RecordProtectionLocked(RegionPage first, RegionPage end,
                                                 os::Protection protection, RegionPage& page)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);

  // pin.cc
  bool IsPinnedLocked(PageRange range) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  void DeferLocked(Vma* vma) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  void RetryLaterLocked(Vma* vma) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Finishes an Unmap that found `extent` pinned.
  void FinishDeferred(PageRange extent);
  void FinishDeferredHeld(PageRange extent);

  // purge.cc
  bool OverFreeLimit() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Back to well below the limits.
  void TrimFree();
  // By how much too many pages are mapped or cached once `count` more are mapped. Only for who takes any content.
  RegionPage ExcessLocked(RegionPage count) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Gives back that much, and what is left of an extent.
  void PurgeExcess(RegionPage excess);
  // Gives back what was collected; returns the pages.
  Pages PurgeListed(PurgeList& list);
  // Visits up to kExtentsPerHold extents; false when there are no more.
  FREEHOLD_HOLD_CODE bool CollectLocked(std::uint32_t until, std::size_t keep_pages, RegionPage largest,
                                        PurgeList& list)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  void StartPurgingLocked(Vma* vma, PurgeList& list) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // To kPurging. REQUIRES: `vma` is in no bin.
  void AddToPurgeLocked(Vma* vma, PurgeList& list) ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  void RestoreProtections(PurgeList& list);
  static void SortRanges(PurgeList& list);
  // Ends kPurging; returns the pages that are clean now. `keep`: in their bin, for the next Map.
  FREEHOLD_HOLD_CODE Pages FinishPurging(const PurgeList& list, bool discarded, bool keep);
  // Whether the bin of `count` has gathered enough extents of unknown content for one cheap discard.
  bool WorthCleaningLocked(RegionPage count) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Whether so much is cached that the region had better give it back than grow for `carved`, which is free.
  bool WorthPurgingLocked(const Vma& carved) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(tree_lock_);
  // Discards what such a bin has gathered, and keeps the extents as clean.
  void CleanBin(RegionPage count);
  void WaitForPurges();

  const Shared shared_;
  const Zone zone_;
  const PageRange range_;
  sync::RangeLock& range_lock_;
  const bool maps_clean_;               // MapOrdinary may publish what a bin has clean
  std::uint64_t* committed_ = nullptr;  // a bit for each commit chunk; set, never cleared; see CommittedWord
  unsigned chunk_shift_ = 0;            // of a commit chunk's pages
  // Of the mapping zone: core dumps omit what lies beyond. Written under commit_lock_.
  std::atomic<RegionPage> dumped_end_{0};

  // Held over mprotect. Only under a range guard, so that fork finds it free.
  sync::SpinLock commit_lock_{sync::LockRank::kPurge};
  // Several at once by a fork or a Transaction only, in address order. Not on the line of what lookups read.
  alignas(kCacheLineSize) mutable sync::RecordedSpinLock tree_lock_{sync::LockRank::kRegion};
  VmaTree tree_;  // changed under tree_lock_; Lookup is lock-free
  FreeRanges free_ ABSL_GUARDED_BY(tree_lock_);
  WindowCache* windows_ = nullptr;  // null in heap zones; changed under tree_lock_
  // By a hash of its first page, the extent that was published there last. A record that is kMapped is in the tree, so
  // one that begins at the page asked for is the answer, however old the entry is.
  static constexpr std::size_t kPublishedEntries = std::size_t{1} << 6;
  static constexpr std::size_t PublishedIndex(RegionPage page) {
    return page * 0x9E3779B1u >> 26;
  }
  Vma* published_[kPublishedEntries] ABSL_GUARDED_BY(tree_lock_) = {};
  Vma* spare_vmas_ ABSL_GUARDED_BY(tree_lock_) = nullptr;
  std::size_t spare_vma_count_ ABSL_GUARDED_BY(tree_lock_) = 0;
  std::uint64_t last_generation_ ABSL_GUARDED_BY(tree_lock_);
  sync::RequestTree pins_ ABSL_GUARDED_BY(tree_lock_);
  std::uint32_t forks_ ABSL_GUARDED_BY(tree_lock_) = 0;         // in how many generations of children this lives
  Vma* unfinished_ ABSL_GUARDED_BY(tree_lock_) = nullptr;  // deferred extents that no pin will finish
  std::atomic<std::uint32_t> purges_in_flight_{0};  // extents in kPurging; changed under tree_lock_

  // The most pages that were mapped when something large was. Raised under tree_lock_, lowered without: a hint.
  std::atomic<std::uint64_t> most_mapped_{0};

  RegionCounter changes_;  // see snapshot.cc
  RegionCounter mapped_pages_;
  RegionCounter vmas_;
  RegionCounter maps_;
  RegionCounter unmaps_;
  RegionCounter deferred_extents_;
  RegionCounter reuses_;
  RegionCounter zeroed_pages_;
  RegionCounter heap_splits_;
  RegionCounter coarse_retries_;
  RegionCounter window_hits_;
  std::atomic<std::uint64_t> committed_pages_{0};
};

// Inline: these are on the path of every map and unmap.

ABSL_ATTRIBUTE_ALWAYS_INLINE inline void Region::PublishLocked(Vma* vma, RegionPage count,
                                                               const VmaAttributes& attributes) {
  FREEHOLD_DCHECK(!vma->Is(VmaState::kFree));
  const RegionPage first = vma->first_page();
  {
    VmaWriter writer(*vma);
    writer.SetRange(first, count);
    writer.SetState(VmaState::kMapped);
    writer.SetAttributes(attributes);
  }
  published_[PublishedIndex(first)] = vma;
  changes_.Add(1);
  mapped_pages_.Add(count);
  vmas_.Add(1);
  maps_.Add(1);
}

inline void Region::SetStateLocked(Vma* vma, VmaState state) {
  const bool gap_changes = vma->Is(VmaState::kFree) != (state == VmaState::kFree);
  VmaWriter(*vma).SetState(state);
  if (ABSL_PREDICT_FALSE(gap_changes)) tree_.RefreshGap(tree_.Find(vma->first_page()));
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline void Region::CacheLocked(Vma* vma, Knowledge knowledge) {
  vma->knowledge = knowledge;
  SetStateLocked(vma, VmaState::kCached);
  if (ABSL_PREDICT_FALSE(vma->page_count() > FreeRanges::kExactPages)) vma = MergeCachedLocked(vma);
  free_.Push(vma, shared_.clock->load(std::memory_order_relaxed));
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline void Region::RetireLocked(Vma* vma) {
  changes_.Add(1);
  mapped_pages_.Subtract(vma->page_count());
  vmas_.Subtract(1);
  CacheLocked(vma, vma->knowledge == Knowledge::kResident ? Knowledge::kResident : Knowledge::kUnknown);
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline bool Region::RetireWholeLocked(RegionPage first, RegionPage count,
                                                                   std::size_t sampled) {
  Vma* vma = FindLocked(first);
  if (vma->first_page() != first || vma->page_count() != count || !vma->Is(VmaState::kMapped)) return false;
  if (shared_.options->strict_unmap) return false;
  if (!is_heap()) return RetireWindowLocked(vma);
  if (!vma->is_zones_own()) return false;
  // What Map itself filled with zeroes is resident anyway: only other extents tell what users do.
  if (vma->knowledge == Knowledge::kResident) {
    free_.SkipSample(vma->page_count());
  } else if (ABSL_PREDICT_FALSE(sampled != kNoSample)) {
    free_.AddSample(vma->page_count(), sampled, SampledPages(vma->page_count()));
  }
  RetireLocked(vma);
  return true;
}

inline Vma* Region::FindLocked(RegionPage page) const {
  Vma* vma = published_[PublishedIndex(page)];
  if (ABSL_PREDICT_TRUE(vma != nullptr && vma->first_page() == page && vma->Is(VmaState::kMapped))) return vma;
  return tree_.Find(page).vma();
}

inline bool Region::IsChunkCommitted(std::size_t chunk) const {
  // Acquire pairs with the release in Commit: the kernel made the chunk writable before.
  return (CommittedWord(chunk).load(std::memory_order_acquire) >> (chunk % 64) & 1) != 0;
}

inline bool Region::IsCommitted(RegionPage first, RegionPage end) const {
  // Acquire pairs with the release in IncludeInCoreDumps.
  if (!is_heap()) return end <= dumped_end_.load(std::memory_order_acquire);
  const std::size_t last = (end - 1) >> chunk_shift_;
  for (std::size_t chunk = first >> chunk_shift_; chunk <= last; ++chunk) {
    if (!IsChunkCommitted(chunk)) return false;
  }
  return true;
}

inline bool Region::IsPinnedLocked(PageRange range) const {
  return ABSL_PREDICT_FALSE(pins_.in_use()) && pins_.HasConflict(range, sync::LockMode::kExclusive);
}

inline bool Region::OverFreeLimit() const {
  return free_.dirty_pages() > PagesFor(shared_.options->free_resident_limit).value || OverWindowLimit();
}

template <typename Look>
Error Region::LookAtMapped(RegionPage first, RegionPage end, const Look& look) const {
  for (RegionPage page = first; page < end;) {
    Warm(range_.first + Pages{page});
    sync::SpinLockHolder holder(tree_lock_);
    for (int visits = 0; page < end && visits < kExtentsPerHold; ++visits) {
      const Vma& vma = *tree_.Find(page).vma();
      page = vma.end_page();
      if (!vma.Is(VmaState::kMapped)) return {ErrorCode::kNotMapped};
      if (const Error error = look(vma); !error.ok()) return error;
    }
  }
  return Error::Ok();
}

template <typename Changer>
void Region::ChangeBusy(RegionPage first, RegionPage end, const Changer& change) {
  for (RegionPage page = first; page < end;) {
    Warm(range_.first + Pages{page});
    sync::SpinLockHolder holder(tree_lock_);
    ChangeBusyLocked(first, end, page, change);
  }
}

template <typename Changer>
void Region::ChangeBusyLocked(RegionPage first, RegionPage end, RegionPage& page, const Changer& change) {
  const RegionPage from = page;
  for (int visits = 0; page < end && visits < kExtentsPerHold; ++visits) {
    Vma& vma = *tree_.Find(page).vma();
    page = vma.end_page();
    change(vma);
    changes_.Add(1);
  }
  if (page >= end) {
    SetBusyLocked(first, end, false);
    MergeMappedLocked(first, first + 1);
  }
  MergeMappedLocked(from, page < end ? page : end);
}

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_REGION_H_
