// LockPolicy::kAdaptive: a lock word per granule of 2 MiB, hashed into a fixed table, and kTree's
// interval tree behind it for whatever a word cannot say.
//
// A bucket's word is idle, or *fast*: one range inside one granule, precise to the page, and how it
// is held; or *closed*: everything about the bucket is in the tree. An uncontended lock is one
// compare-and-swap from idle to fast, its release one back. Who finds the word in use closes the
// bucket: it moves the fast holders into the tree as a *proxy*, a request stored in the bucket, and
// enters behind them. When the last request of a bucket has left the tree, the bucket is idle again
// (it deflates). Long ranges close no bucket; they raise a gate that fast lockers look at once they
// have their word. README.md argues why that is right.
//
// Thread safety: thread-safe; not async-signal-safe.
// Lock order:    LockRank::kRangeInternal for moments, on the slow path; waiters are signalled
//                after it is released.
// Waiting:       FIFO among requests that overlap and conflict; never for a range that merely
//                shares a bucket.
// Allocation:    none; the table is fixed, the tree's nodes are the requests.
// Invariants:    A1. A bucket is closed exactly while requests of it (proxy included) are in the
//                    tree. (Under lock_; in the middle of closing it is closed already.)
//                A2. gate_ counts the long requests in the tree.
//                A3. A fast word conflicts with no request in the tree, but for long ones that
//                    entered before it became fast; those who made it so have not confirmed it yet.
//                A4. A proxy that nobody has confirmed may be pending in the tree; one that was
//                    confirmed is held there.
#ifndef FREEHOLD_VM_SYNC_ADAPTIVE_RANGE_LOCK_H_
#define FREEHOLD_VM_SYNC_ADAPTIVE_RANGE_LOCK_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include "absl/base/attributes.h"
#include "absl/base/optimization.h"
#include "absl/base/thread_annotations.h"
#include "vm/page_range.h"
#include "vm/sync/range_request.h"
#include "vm/sync/request_tree.h"
#include "vm/sync/spin_lock.h"
#include "vm/sync/sync_point.h"
#include "vm/units.h"

namespace freehold::vm::sync {

// What the fast lockers of a bucket write, on a line of its own.
struct alignas(kCacheLineSize) LockBucket {
  static constexpr std::size_t kReaderSlots = 4;

  std::atomic<std::uint64_t> word{0};  // its format: AdaptiveRangeLock
  // Who holds, for those who ask: a thread id and an operation. The writer's is good while the
  // word, or the proxy, is exclusive; readers clear theirs, unless another one took their slot.
  std::atomic<std::uint64_t> writer{0};
  std::array<std::atomic<std::uint64_t>, kReaderSlots> readers{};
  std::atomic<std::uint64_t> since{0};  // the age's start; 0: nobody asked yet
};

class AdaptiveRangeLock {
 public:
  static constexpr std::size_t kPagesPerGranule = kPagesPerHugePage;
  // Ranges of more granules than this raise the gate.
  static constexpr std::size_t kMaxGranules = 8;

  constexpr AdaptiveRangeLock() = default;

  // Holds `request` by its bucket's word alone if that is possible now. If not, the request is not
  // in the lock, and one of the functions below goes on.
  bool TryAcquireFast(RangeRequest& request);
  // Waits until granted or until `*deadline` (null: forever). Returns whether it was granted; if
  // not, the request is gone from the lock. REQUIRES: TryAcquireFast refused it; request.bucket is
  // null.
  bool AcquireSlow(RangeRequest& request, const Nanoseconds* deadline);
  // Never waits; acquires only if nothing older conflicts. REQUIRES: as AcquireSlow.
  bool TryAcquireSlow(RangeRequest& request);

  // Releases if the word alone says that it is held. REQUIRES: held, request.bucket != nullptr.
  bool TryReleaseFast(const RangeRequest& request);
  // REQUIRES: held; TryReleaseFast refused it, or request.bucket == nullptr.
  void ReleaseSlow(RangeRequest& request);
  // REQUIRES: held, exclusive.
  void Downgrade(RangeRequest& request);

  // As RangeLock::MayBeHeld: whether a bucket of `range` is in use, or the gate is up.
  bool MayBeHeld(PageRange range) const {
    // A holder's word was fast or closed, or the gate up, before it got its range, and is until it leaves.
    if (ABSL_PREDICT_FALSE(gate_.load(std::memory_order_relaxed) != 0)) return true;
    const std::size_t granule = GranuleOf(range.first);
    if (ABSL_PREDICT_FALSE(granule != LastGranuleOf(range))) return MayBeHeldWide(range);
    return buckets_[IndexOf(granule)].word.load(std::memory_order_relaxed) != kIdle;
  }

  // Of fast holders, more than four readers of one bucket are counted but not all listed; one that
  // has just acquired may be missing.
  void AppendHolders(PageRange range, HolderList& list) const;
  // See RangeLock::CopiedRequests and CopiedHolders.
  const RangeRequest* CopiedRequests() const ABSL_NO_THREAD_SAFETY_ANALYSIS { return tree_.root(); }
  void AppendCopiedHolders(const HolderInfo& proxy, HolderList& list) const ABSL_NO_THREAD_SAFETY_ANALYSIS {
    const std::size_t index = IndexOf(proxy.range);
    ListFast(buckets_[index], slow_[index].proxied, proxy, list);
  }
  void CheckInvariants() const;
  // Whether a lock of `range` raises the gate; then MayBeHeld is true.
  static constexpr bool IsLong(PageRange range) {
    return LastGranuleOf(range) - GranuleOf(range.first) >= kMaxGranules;
  }

  // In the child of a fork: forgets every request; then takes back those that this thread holds.
  void ForgetAll() ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void Adopt(RangeRequest& request);

 private:
  static constexpr std::size_t kBuckets = 32;

  // A word: 0 (idle), kClosed alone, or fast: mode, holders, first page within the granule, pages
  // less one, granule.
  static constexpr std::uint64_t kIdle = 0;
  static constexpr std::uint64_t kClosed = 1;
  static constexpr std::uint64_t kExclusive = 2;
  static constexpr std::uint64_t kOneHolder = 4;
  static constexpr std::uint64_t kHoldersMask = 0xff * kOneHolder;
  static constexpr unsigned kOffsetShift = 10;
  static constexpr unsigned kCountShift = 19;
  static constexpr unsigned kGranuleShift = 28;
  static constexpr std::uint64_t kPageMask = kPagesPerGranule - 1;
  // Granules that a word can name: addresses of 57 bits. Others take the slow path.
  static constexpr std::size_t kGranules = std::size_t{1} << (64 - kGranuleShift);
  static_assert(kPagesPerGranule == 512 && kCountShift - kOffsetShift == 9 &&
                kGranuleShift - kCountShift == 9);

  // The slow path's part of a bucket.
  struct SlowBucket {
    std::uint32_t requests = 0;  // in the tree, once for each granule that is hashed here; the
                                 // proxy counts as one
    std::uint32_t proxied = 0;   // fast holders that the proxy stands for; 0: there is no proxy
    alignas(RangeRequest) std::array<std::byte, sizeof(RangeRequest)> storage{};

    RangeRequest& proxy() { return *std::launder(reinterpret_cast<RangeRequest*>(&storage)); }
  };

  // Neighbouring granules lie in different buckets; so do, mostly, those at strides of powers of
  // two, at which mappings are aligned.
  static constexpr std::size_t IndexOf(std::size_t granule) {
    return (granule ^ (granule >> 5) ^ (granule >> 10)) % kBuckets;
  }
  static constexpr std::size_t GranuleOf(PageNumber page) { return page.value / kPagesPerGranule; }
  // Of the first granule; of the only one, if the range fits a word.
  static constexpr std::size_t IndexOf(PageRange range) { return IndexOf(GranuleOf(range.first)); }
  static constexpr std::size_t LastGranuleOf(PageRange range) {
    return GranuleOf(range.end - Pages{1});
  }
  static constexpr bool FitsWord(PageRange range) {
    return GranuleOf(range.first) == LastGranuleOf(range) && GranuleOf(range.first) < kGranules;
  }

  // The word of one holder. REQUIRES: FitsWord(range).
  static constexpr std::uint64_t FastWord(PageRange range, LockMode mode) {
    return GranuleOf(range.first) << kGranuleShift |
           (range.end.value - range.first.value - 1) << kCountShift |
           (range.first.value & kPageMask) << kOffsetShift | kOneHolder |
           (mode == LockMode::kExclusive ? kExclusive : 0);
  }
  static constexpr bool IsFast(std::uint64_t word) { return (word & kHoldersMask) != 0; }
  static constexpr LockMode ModeOf(std::uint64_t word) {
    return (word & kExclusive) != 0 ? LockMode::kExclusive : LockMode::kShared;
  }
  static constexpr std::uint32_t HoldersOf(std::uint64_t word) {
    return static_cast<std::uint32_t>((word & kHoldersMask) / kOneHolder);
  }
  static constexpr PageRange RangeOf(std::uint64_t word) {
    return PageRange::Of(
        {(word >> kGranuleShift) * kPagesPerGranule + (word >> kOffsetShift & kPageMask)},
        {(word >> kCountShift & kPageMask) + 1});
  }
  // Whether a holder of `word` can share with those of `seen`: the same range, all of them readers,
  // and the count does not overflow.
  static constexpr bool CanJoin(std::uint64_t word, std::uint64_t seen) {
    return ((word ^ seen) & ~kHoldersMask) == 0 && (word & kExclusive) == 0 &&
           (seen & kHoldersMask) != kHoldersMask;
  }

  bool MayBeHeldWide(PageRange range) const;

  std::size_t IndexOf(const LockBucket& bucket) const {
    return static_cast<std::size_t>(&bucket - buckets_.data());
  }
  static constexpr std::uint64_t WhoIs(const RangeRequest& request) {
    return request.thread_id | std::uint64_t{static_cast<std::uint8_t>(request.operation)} << 32;
  }

  static void NoteHolder(LockBucket& bucket, const RangeRequest& request);
  static void ForgetReader(LockBucket& bucket, const RangeRequest& request);
  // Takes `request` off its bucket's word; refused if the bucket is closed.
  static bool LeaveWord(const RangeRequest& request);
  // Whether a request whose word is fast may hold it although long requests are in the tree. If
  // not, it is taken off the word.
  bool Confirm(RangeRequest& request);

  // Moves the fast holders that conflict with `request` into the tree, and keeps new ones from
  // being confirmed until LeaveBucketsLocked: closes the buckets of its range, or raises the gate.
  void CloseBucketsLocked(const RangeRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void LeaveBucketsLocked(const RangeRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // Closes the bucket and moves its fast holders, if any, into the tree.
  void CloseLocked(std::size_t index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void LeaveBucketLocked(std::size_t index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // These return the requests to signal once the lock is released.
  RangeRequest* LeaveLocked(RangeRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  RangeRequest* LeaveProxyLocked(std::size_t index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);

  static void ListFast(const LockBucket& bucket, std::uint32_t holders, const HolderInfo& what,
                       HolderList& list);

  // Read by every fast locker, written by long ones only.
  alignas(kCacheLineSize) std::atomic<std::uint32_t> gate_{0};

  alignas(kCacheLineSize) mutable SpinLock lock_{LockRank::kRangeInternal};
  RequestTree tree_ ABSL_GUARDED_BY(lock_);

  mutable std::array<LockBucket, kBuckets> buckets_{};
  std::array<SlowBucket, kBuckets> slow_ ABSL_GUARDED_BY(lock_) = {};
};

// Inlined, and with the range in registers, wherever GCC would rather not: a call, or a range that
// is read back from memory, costs as much as half of the rest.
ABSL_ATTRIBUTE_ALWAYS_INLINE inline bool AdaptiveRangeLock::TryAcquireFast(RangeRequest& request) {
  if (ABSL_PREDICT_FALSE(!FitsWord(request.range))) return false;
  LockBucket& bucket = buckets_[IndexOf(request.range)];
  const std::uint64_t mine = FastWord(request.range, request.mode);
  ReachSyncPoint(SyncPoint::kAcquire, this);
  std::uint64_t seen = kIdle;
  // Acquires what those released who made it idle. Sequentially consistent with the gate: see
  // README.md.
  while (ABSL_PREDICT_FALSE(
      !bucket.word.compare_exchange_strong(seen, seen == kIdle ? mine : seen + kOneHolder,
                                           std::memory_order_seq_cst, std::memory_order_relaxed))) {
    if (seen != kIdle && !CanJoin(mine, seen)) return false;
  }
  request.bucket = &bucket;
  request.fast_word = mine;
  NoteHolder(bucket, request);
  if (seen == kIdle) bucket.since.store(0, std::memory_order_relaxed);
  ReachSyncPoint(SyncPoint::kAcquire, this);
  if (ABSL_PREDICT_TRUE(gate_.load(std::memory_order_seq_cst) == 0)) return true;
  return Confirm(request);
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline void AdaptiveRangeLock::NoteHolder(
    LockBucket& bucket, const RangeRequest& request) {
  std::atomic<std::uint64_t>& slot =
      request.mode == LockMode::kExclusive
          ? bucket.writer
          : bucket.readers[request.thread_id % LockBucket::kReaderSlots];
  slot.store(WhoIs(request), std::memory_order_relaxed);
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline void AdaptiveRangeLock::ForgetReader(
    LockBucket& bucket, const RangeRequest& request) {
  if (request.mode == LockMode::kExclusive) return;
  std::atomic<std::uint64_t>& slot = bucket.readers[request.thread_id % LockBucket::kReaderSlots];
  if (slot.load(std::memory_order_relaxed) == WhoIs(request)) {
    slot.store(0, std::memory_order_relaxed);
  }
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline bool AdaptiveRangeLock::LeaveWord(const RangeRequest& request) {
  std::atomic<std::uint64_t>& word = request.bucket->word;
  std::uint64_t seen = request.fast_word;
  std::uint64_t next = kIdle;
  // Pairs with the compare-and-swap of the next holder, and with the exchange or the load of who
  // closes the bucket or raised the gate.
  while (ABSL_PREDICT_FALSE(!word.compare_exchange_strong(seen, next, std::memory_order_release,
                                                          std::memory_order_relaxed))) {
    if (seen == kClosed) return false;
    next = HoldersOf(seen) == 1 ? kIdle : seen - kOneHolder;
  }
  return true;
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline bool AdaptiveRangeLock::TryReleaseFast(
    const RangeRequest& request) {
  ForgetReader(*request.bucket, request);
  ReachSyncPoint(SyncPoint::kRelease, this);
  return LeaveWord(request);
}

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_ADAPTIVE_RANGE_LOCK_H_
