// LockPolicy::kCoarse: one reader-writer lock for the whole space, whatever range is asked for. It
// is built like the kernel's rw_semaphore, which guards an address space as mmap_lock, so that
// comparing with it means something: a state word that free-running threads change by one atomic
// operation, spinning while the holder makes progress, a FIFO queue of sleepers, and bounded
// stealing: a running thread may take the lock ahead of a sleeper that has yet to wake up, which
// keeps the lock busy during wake-ups.
//
// Thread safety: thread-safe; not async-signal-safe.
// Lock order:    LockRank::kRangeInternal for moments, when there is a queue.
// Waiting:       spins, then queues: FIFO but for steals; the queue's head is passed at most
//                kMaxSteals times and then handed the lock.
// Allocation:    none; the queue's nodes are the requests.
// Invariants:    C1. One writer and no reader, or no writer: the word holds them all, granted ones
//                    included.
//                C2. Under queue_lock_: kQueued is set exactly while the queue is not empty.
//                C3. While the queue is not empty, either its head conflicts with a holder, or its
//                    head is signalled, or a thread that released is about to look at the queue.
//                C4. A request that is `signalled` stays until its signal came.
#ifndef FREEHOLD_VM_SYNC_COARSE_LOCK_H_
#define FREEHOLD_VM_SYNC_COARSE_LOCK_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/base/optimization.h"
#include "absl/base/thread_annotations.h"
#include "vm/page_range.h"
#include "vm/sync/range_request.h"
#include "vm/sync/spin_lock.h"
#include "vm/sync/sync_point.h"
#include "vm/units.h"

namespace freehold::vm::sync {

class CoarseLock {
 public:
  // How often the head of the queue can be passed.
  static constexpr std::uint64_t kMaxSteals = 4;

  constexpr CoarseLock() = default;

  // Waits until granted or until `*deadline` (null: forever). Returns whether it was granted; if
  // not, the request is gone from the lock.
  bool Acquire(RangeRequest& request, const Nanoseconds* deadline) {
    return TryAcquire(request) || AcquireSlow(request, deadline);
  }
  // Never waits, and never passes a waiter.
  bool TryAcquire(RangeRequest& request);
  // REQUIRES: held.
  void Release(RangeRequest& request);
  // REQUIRES: held, exclusive.
  void Downgrade(RangeRequest& request);
  // Goes on under another request of the same thread and mode. REQUIRES: `from` is held.
  void Rename(RangeRequest& from, RangeRequest& to) {
    Unrecord(from);
    Record(to, Nanoseconds{0});
  }

  // Holders are a hint: with many of them, or in the middle of an acquisition, some are missing.
  void AppendHolders(HolderList& list) const;
  // See RangeLock::CopiedRequests and CopiedHolders. The latter without the queue.
  const RangeRequest* CopiedRequests() const ABSL_NO_THREAD_SAFETY_ANALYSIS { return head_; }
  void AppendCopiedHolders(HolderList& list) const;
  void CheckInvariants() const;

  // In the child of a fork: forgets every request; then takes back those that this thread holds.
  void ForgetAll() ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void Adopt(RangeRequest& request);

 private:
  // The state word: a writer bit, a bit for "somebody is queued", the times that the head of the
  // queue was passed, and the number of readers.
  static constexpr std::uint64_t kWriter = 1;
  static constexpr std::uint64_t kQueued = 2;
  static constexpr std::uint64_t kOneSteal = 4;
  static constexpr std::uint64_t kStealMask = 0xfc;
  static constexpr std::uint64_t kOneReader = 0x100;
  static_assert(kMaxSteals * kOneSteal <= kStealMask);

  static constexpr std::uint64_t Unit(LockMode mode) {
    return mode == LockMode::kExclusive ? kWriter : kOneReader;
  }
  // Whether no holder conflicts with `mode`.
  static constexpr bool IsFree(std::uint64_t state, LockMode mode) {
    return mode == LockMode::kExclusive ? (state & kWriter) == 0 && state < kOneReader
                                        : (state & kWriter) == 0;
  }
  static constexpr bool StealsUsedUp(std::uint64_t state) {
    return (state & kStealMask) >= kMaxSteals * kOneSteal;
  }

  // A holder, for those who ask. Written by the holder, `since` also by those who ask. Where
  // threads share a slot, only the first to hold is shown.
  struct alignas(kCacheLineSize) HolderSlot {
    std::atomic<std::uint64_t> who{0};  // thread, operation and mode; 0: free
    std::atomic<std::size_t> first{0};
    std::atomic<std::size_t> end{0};
    std::atomic<std::uint64_t> since{0};  // 0: nobody asked yet
  };
  static constexpr std::size_t kHolderSlots = 32;
  static constexpr std::size_t kNoSlot = kHolderSlots;

  bool AcquireSlow(RangeRequest& request, const Nanoseconds* deadline);
  bool SpinThenSteal(LockMode mode);
  bool AcquireOrEnqueueLocked(RangeRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(queue_lock_);
  bool WaitInQueue(RangeRequest& request, const Nanoseconds* deadline);
  // After a release: invites the head of the queue, or hands it the lock.
  void WakeQueue();
  // These return the requests to signal once the lock is released.
  RangeRequest* GrantHeadLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(queue_lock_);
  RangeRequest* LeaveQueueLocked(RangeRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(queue_lock_);
  void UnlinkLocked(RangeRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(queue_lock_);

  void Record(RangeRequest& request, Nanoseconds since);
  void Unrecord(const RangeRequest& request);
  void StampHolders() const;

  // Acquire operations on it pair with the release operations of those who held before.
  std::atomic<std::uint64_t> state_{0};
  // The thread that last acquired exclusively, for spinners to see progress. Written by that
  // thread.
  std::atomic<std::uint32_t> last_writer_{0};

  alignas(kCacheLineSize) mutable SpinLock queue_lock_{LockRank::kRangeInternal};
  RangeRequest* head_ ABSL_GUARDED_BY(queue_lock_) = nullptr;
  RangeRequest* tail_ ABSL_GUARDED_BY(queue_lock_) = nullptr;

  mutable std::array<HolderSlot, kHolderSlots> holders_{};
};

inline bool CoarseLock::TryAcquire(RangeRequest& request) {
  ReachSyncPoint(SyncPoint::kAcquire, this);
  std::uint64_t state = state_.load(std::memory_order_relaxed);
  do {
    if ((state & kQueued) != 0 || !IsFree(state, request.mode)) return false;
  } while (!state_.compare_exchange_weak(state, state + Unit(request.mode),
                                         std::memory_order_acquire, std::memory_order_relaxed));
  Record(request, Nanoseconds{0});
  return true;
}

inline void CoarseLock::Release(RangeRequest& request) {
  Unrecord(request);
  ReachSyncPoint(SyncPoint::kRelease, this);
  const std::uint64_t unit = Unit(request.mode);
  const std::uint64_t state = state_.fetch_sub(unit, std::memory_order_release) - unit;
  if (ABSL_PREDICT_FALSE((state & kQueued) != 0) && state < kOneReader) WakeQueue();
}

inline void CoarseLock::Record(RangeRequest& request, Nanoseconds since) {
  if (request.mode == LockMode::kExclusive) {
    last_writer_.store(request.thread_id, std::memory_order_relaxed);
  }
  const std::size_t index = request.thread_id % kHolderSlots;
  HolderSlot& slot = holders_[index];
  if (slot.who.load(std::memory_order_relaxed) != 0) {
    request.queue.slot = kNoSlot;
    return;
  }
  request.queue.slot = index;
  slot.first.store(request.range.first.value, std::memory_order_relaxed);
  slot.end.store(request.range.end.value, std::memory_order_relaxed);
  slot.since.store(since.value, std::memory_order_relaxed);
  slot.who.store(request.thread_id |
                     std::uint64_t{static_cast<std::uint8_t>(request.operation)} << 32 |
                     std::uint64_t{request.mode == LockMode::kExclusive} << 40,
                 std::memory_order_release);
}

inline void CoarseLock::Unrecord(const RangeRequest& request) {
  if (request.queue.slot != kNoSlot)
    holders_[request.queue.slot].who.store(0, std::memory_order_relaxed);
}

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_COARSE_LOCK_H_
