// The short lock: a 32-bit word for critical sections of tens of nanoseconds.
//
// A SpinLock spins for about a microsecond and then sleeps on a futex, because the holder of any
// user-space lock can lose its CPU for milliseconds. It is exclusive and not recursive. It protects
// what its users' ABSL_GUARDED_BY annotations name.
//
// Thread safety: thread-safe. Not async-signal-safe: a handler would wait for the thread that it
//                interrupted.
// Lock order:    the rank given at construction, checked in debug builds.
// Waiting:       not FIFO: a running thread may pass sleeping ones, but a waiter that was passed
//                over kMaxSteals times reserves the lock, which then goes to such waiters only.
//                A sleeper looks at the word every kLookAgain by itself: see Unlock.
// Allocation:    none; constinit; all zeroes is an unlocked lock of the first rank.
// Lifetime:      the lock outlives every call on it: the last thread to acquire it may not yet
//                destroy it, since the one that released before may still be waking others.
// Ordering:      an acquisition sees everything before the releases that precede it.
#ifndef FREEHOLD_VM_SYNC_SPIN_LOCK_H_
#define FREEHOLD_VM_SYNC_SPIN_LOCK_H_

#include <atomic>
#include <bit>
#include <cstdint>

#include "absl/base/attributes.h"
#include "absl/base/optimization.h"
#include "absl/base/thread_annotations.h"
#include "vm/sync/clock.h"
#include "vm/sync/lock_rank.h"
#include "vm/sync/sync_point.h"
#include "vm/sync/time_histogram.h"

namespace freehold::vm::sync {

class ABSL_LOCKABLE SpinLock {
 public:
#if defined(FREEHOLD_DEBUG_CHECKS)
  explicit constexpr SpinLock(LockRank rank, SameRank same_rank = SameRank::kRefused)
      : rank_(rank),
        check_(same_rank == SameRank::kRefused ? RankCheck::kOrdered : RankCheck::kAscending) {}
#else
  explicit constexpr SpinLock(LockRank, SameRank = SameRank::kRefused) {}
#endif
  SpinLock(const SpinLock&) = delete;
  SpinLock& operator=(const SpinLock&) = delete;

  // Tells the thread-safety analysis that this thread holds the lock, as after
  // SpinLockTryHolder::owns(); checked in debug builds.
  void AssertHeld() const ABSL_ASSERT_EXCLUSIVE_LOCK() { CheckLockHeld(this); }

  // For the fork handlers, which cannot scope a holder. The parent and the child both unlock: in
  // the child this forgets waiters, which are threads that exist in the parent only.
  void LockForFork(AcquisitionSite site = AcquisitionSite::Here()) ABSL_EXCLUSIVE_LOCK_FUNCTION();
  void UnlockAfterFork() ABSL_UNLOCK_FUNCTION();
  // In the child of a fork, for a lock that was not locked for it: frees it, since no thread there
  // holds it. What it guards may be half changed and has to be rebuilt.
  void ReinitAfterFork();

 private:
  friend class SpinLockHolder;
  friend class SpinLockTryHolder;

  // The word: kLocked while held, which is all of its first byte; kParked if a thread may sleep on
  // it; kReserved if a waiter was passed over too often. Threads that find it 0 take it by one
  // compare-and-swap.
  static constexpr std::uint32_t kFree = 0;
  static constexpr std::uint32_t kLocked = 1;
  static constexpr std::uint32_t kParked = 0x100;
  static constexpr std::uint32_t kReserved = 0x200;
  // Losses after which a waiter reserves the lock.
  static constexpr int kMaxSteals = 8;
  static constexpr Nanoseconds kLookAgain = Milliseconds(5);

  void Lock(AcquisitionSite site) ABSL_EXCLUSIVE_LOCK_FUNCTION() { Lock(site, check()); }
  void Lock(AcquisitionSite site, RankCheck check) ABSL_EXCLUSIVE_LOCK_FUNCTION() {
    CheckRank(rank(), this, check, site);
    if (!TryLockWord()) LockSlow();
    RecordRank(rank(), this, site);
    ReachSyncPoint(SyncPoint::kAcquired, this);
  }
  bool TryLock(AcquisitionSite site) ABSL_EXCLUSIVE_TRYLOCK_FUNCTION(true) {
    if (!TryLockWord()) return false;
    RecordRank(rank(), this, site);
    ReachSyncPoint(SyncPoint::kAcquired, this);
    return true;
  }
  void Unlock() ABSL_UNLOCK_FUNCTION() {
    ReleaseRank(this);
    ReachSyncPoint(SyncPoint::kRelease, this);
    if (ABSL_PREDICT_FALSE(ReleaseWord())) WakeSlow();
  }

  // Pairs with the acquire of the next owner's compare-and-swap. Returns whether somebody may sleep.
#if defined(__x86_64__) && !defined(FREEHOLD_TSAN)
  // A store to one byte and a load of the other instead of a read-modify-write, which would be half
  // of an uncontended pair. The load may be done before others see the store, and miss one who
  // announces itself in between. That one goes to sleep only if the kernel, too, is earlier than
  // the store, and then for kLookAgain.
  bool ReleaseWord() {
    auto* const bytes = reinterpret_cast<unsigned char*>(&word_);
    __atomic_store_n(bytes, 0, __ATOMIC_RELEASE);
    return __atomic_load_n(bytes + 1, __ATOMIC_RELAXED) != 0;
  }
  static_assert(std::endian::native == std::endian::little && kLocked == 1 && (kParked | kReserved) == 0x300);
#else
  bool ReleaseWord() { return word_.fetch_sub(kLocked, std::memory_order_release) != kLocked; }
#endif

  bool TryLockWord() {
    ReachSyncPoint(SyncPoint::kAcquire, this);
    std::uint32_t expected = kFree;
    return ABSL_PREDICT_TRUE(word_.compare_exchange_strong(
        expected, kLocked, std::memory_order_acquire, std::memory_order_relaxed));
  }
  void LockSlow();
  void WakeSlow();

  std::atomic<std::uint32_t> word_{kFree};
#if defined(FREEHOLD_DEBUG_CHECKS)
  LockRank rank() const { return rank_; }
  RankCheck check() const { return check_; }
  const LockRank rank_;
  const RankCheck check_;
#else
  static constexpr LockRank rank() { return LockRank::kLeaf; }
  static constexpr RankCheck check() { return RankCheck::kOrdered; }
#endif
};

// A SpinLock whose holds can be timed. Until a recorder is installed that costs one branch on the lock's own
// cache line. Holds that span a fork are not recorded.
class ABSL_LOCKABLE RecordedSpinLock : public SpinLock {
 public:
  explicit constexpr RecordedSpinLock(LockRank rank) : SpinLock(rank) {}

  // REQUIRES: no other thread uses the lock yet; `recorder` records no other lock and outlives this one.
  void InstallRecorder(TimeRecorder* recorder) { recorder_ = recorder; }
  // Null until one is installed.
  const TimeRecorder* recorder() const { return recorder_; }

 private:
  friend class SpinLockHolder;
  TimeRecorder* recorder_ = nullptr;  // constant once threads use the lock
};

// Holds a SpinLock while in scope.
class [[nodiscard]] ABSL_SCOPED_LOCKABLE SpinLockHolder {
 public:
  explicit SpinLockHolder(SpinLock& lock, AcquisitionSite site = AcquisitionSite::Here())
      ABSL_EXCLUSIVE_LOCK_FUNCTION(lock)
      : lock_(lock), recorder_(nullptr) {
    lock_.Lock(site);
  }
  explicit SpinLockHolder(RecordedSpinLock& lock, AcquisitionSite site = AcquisitionSite::Here())
      ABSL_EXCLUSIVE_LOCK_FUNCTION(lock)
      : lock_(lock), recorder_(lock.recorder_) {
    lock_.Lock(site);
    if (ABSL_PREDICT_FALSE(recorder_ != nullptr)) since_ = MonotonicNow();
  }
  // One of several locks of this rank that the thread holds at once, at ascending addresses.
  SpinLockHolder(RecordedSpinLock& lock, SameRank, AcquisitionSite site = AcquisitionSite::Here())
      ABSL_EXCLUSIVE_LOCK_FUNCTION(lock)
      : lock_(lock), recorder_(lock.recorder_) {
    lock_.Lock(site, RankCheck::kAscending);
    if (ABSL_PREDICT_FALSE(recorder_ != nullptr)) since_ = MonotonicNow();
  }
  SpinLockHolder(const SpinLockHolder&) = delete;
  SpinLockHolder& operator=(const SpinLockHolder&) = delete;
  ~SpinLockHolder() ABSL_UNLOCK_FUNCTION() {
    if (ABSL_PREDICT_FALSE(recorder_ != nullptr)) recorder_->RecordAlone(MonotonicNow() - since_);
    lock_.Unlock();
  }

 private:
  SpinLock& lock_;
  TimeRecorder* const recorder_;  // null, known to the compiler, for a plain SpinLock
  Nanoseconds since_;
};

// Holds a SpinLock while in scope if it was free; never waits. The analysis cannot follow the
// condition:
//
//   SpinLockTryHolder holder(lock);
//   if (!holder.owns()) return;
//   lock.AssertHeld();
class [[nodiscard]] SpinLockTryHolder {
 public:
  explicit SpinLockTryHolder(SpinLock& lock, AcquisitionSite site = AcquisitionSite::Here())
      ABSL_NO_THREAD_SAFETY_ANALYSIS : lock_(lock),
                                       owns_(lock.TryLock(site)) {}
  SpinLockTryHolder(const SpinLockTryHolder&) = delete;
  SpinLockTryHolder& operator=(const SpinLockTryHolder&) = delete;
  ~SpinLockTryHolder() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (owns_) lock_.Unlock();
  }

  bool owns() const { return owns_; }

 private:
  SpinLock& lock_;
  const bool owns_;
};

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_SPIN_LOCK_H_
