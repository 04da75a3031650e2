// Serializes operations on overlapping page ranges of one address space; disjoint ranges never wait
// for each other. Protects the pages and VMAs in a range, not the tree that indexes them.
//
//   RangeLock::Guard guard(lock, range, RangeLock::Mode::kExclusive, Operation::kUnmap);
//   RangeLock::Guard tried = RangeLock::Guard::Try(lock, range, RangeLock::Mode::kShared,
//                                                  Operation::kFault);
//   if (!tried.held()) ...
//
// Coarse and fine lockers mix: Guard::WholeSpace excludes, or shares with, every range, and a
// function that needs a range held takes either kind of guard and asks guard.Covers(range, mode).
//
// Thread safety: thread-safe; not async-signal-safe. A guard belongs to the thread that made it.
// Lock order:    the rank given at construction, kRange for pages of memory; guards of one thread in
//                ascending order of their ranges, of one lock. Where another thread may lock ranges
//                that span two of them, only the first may wait and the others try: that request may
//                have come in between (R2). Under kCoarse the first one must be kExclusive if a later
//                one is: there is no upgrade.
// Waiting:       by policy, below; a waiter spins for about 1 us, sometimes for 20 (parking.h), then sleeps.
// Allocation:    none; a waiter's node is its Guard, on its own stack.
// Lifetime:      the lock outlives every call on it: a thread that got the last guard may not yet
//                destroy it, since the one that released before may still be waking others.
// Invariants:    R1. Held guards that overlap are all kShared.
//                R2. A request waits only for older requests that overlap it and conflict with it
//                    (kTree, kAdaptive), or for any older request that conflicts with it (kCoarse).
//                    Under kAdaptive, a request that finds itself behind a long one is such an
//                    older request to others for the moment in which it steps back.
//                R3. Of the requests that wait, the oldest is passed by at most a constant number
//                    of younger ones that conflict with it (kTree, kAdaptive: none), so no mode
//                    starves.
#ifndef FREEHOLD_VM_SYNC_RANGE_LOCK_H_
#define FREEHOLD_VM_SYNC_RANGE_LOCK_H_

#include <cstddef>
#include <cstdint>

#include "absl/base/attributes.h"
#include "absl/base/optimization.h"
#include "vm/os/check.h"
#include "vm/os/thread_id.h"
#include "vm/page_range.h"
#include "vm/sync/adaptive_range_lock.h"
#include "vm/sync/coarse_lock.h"
#include "vm/sync/lock_rank.h"
#include "vm/sync/lock_times.h"
#include "vm/sync/range_request.h"
#include "vm/sync/tree_range_lock.h"
#include "vm/units.h"

namespace freehold::vm::sync {

// How ranges are told apart; the meaning of the lock is the same. Fixed at construction.
enum class LockPolicy : std::uint8_t {
  kCoarse,    // not at all: one fair reader-writer lock, the model of the kernel's mmap_lock
  kTree,      // precisely: one tree of held and pending ranges, FIFO among those that overlap
  kAdaptive,  // as precisely, FIFO too: a lock word per 2 MiB, and the tree where words do not do
};

constexpr const char* ToString(LockPolicy policy) {
  switch (policy) {
    case LockPolicy::kCoarse: return "coarse";
    case LockPolicy::kTree: return "tree";
    case LockPolicy::kAdaptive: return "adaptive";
  }
  return "unknown";
}

class RangeLock {
 public:
  using Mode = LockMode;

  // Holds a range while in scope. A function that needs it held takes a `const Guard&`: the proof.
  class [[nodiscard]] Guard {
   public:
    // Waits until granted; cannot fail. REQUIRES: `range` is not empty; this thread holds no lock
    // that ranks at or after kRange, and no guard, of this or another range lock, that ends after
    // range.first.
    Guard(RangeLock& lock, PageRange range, Mode mode, Operation operation,
          AcquisitionSite site = AcquisitionSite::Here());
    // Never waits: held() is false if the request would have had to. REQUIRES: `range` is not
    // empty.
    static Guard Try(RangeLock& lock, PageRange range, Mode mode, Operation operation,
                     AcquisitionSite site = AcquisitionSite::Here());
    // Waits until granted or until CLOCK_MONOTONIC reaches `deadline`, which may have passed
    // already: held() tells which. REQUIRES: as the constructor.
    static Guard Until(RangeLock& lock, PageRange range, Mode mode, Operation operation,
                       Nanoseconds deadline, AcquisitionSite site = AcquisitionSite::Here());
    // Every page there is: the coarse locker's guard. Waits. REQUIRES: as the constructor.
    static Guard WholeSpace(RangeLock& lock, Mode mode, Operation operation,
                            AcquisitionSite site = AcquisitionSite::Here());

    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;
    // Releases if held. Wakes waiters, which may be a system call. REQUIRES: no short lock is held.
    ABSL_ATTRIBUTE_ALWAYS_INLINE ~Guard() {
      if (held_) Release();
    }

    // Releases before the end of the scope. REQUIRES: held().
    void Release();
    // To kShared, never unheld in between; waiting readers get in. REQUIRES: held(), mode() is
    // kExclusive.
    void Downgrade();

    bool held() const { return held_; }
    // Whether this guard is held, contains `range` and excludes at least what `mode` excludes.
    bool Covers(PageRange range, Mode mode) const {
      return held_ && request_.range.Contains(range) &&
             (mode == Mode::kShared || request_.mode == Mode::kExclusive);
    }
    PageRange range() const { return request_.range; }
    Mode mode() const { return request_.mode; }
    const RangeLock& lock() const { return lock_; }

   private:
    friend class RangeLock;
    enum class Waits : std::uint8_t { kNever, kForever, kUntil };

    Guard(RangeLock& lock, PageRange range, Mode mode, Operation operation, Waits waits,
          Nanoseconds deadline, AcquisitionSite site);

    bool AcquireSlow(Waits waits, Nanoseconds deadline);
    bool AcquireRecorded(Waits waits, Nanoseconds deadline);
    bool AcquireByPolicy(Waits waits, Nanoseconds deadline);
    void ReleaseSlow();
    void ReleaseRecorded();
    void ReleaseByPolicy();
    void LinkHeld();
    void UnlinkHeld();
    // kCoarse only: see anchors_.
    bool AcquireCoarse(Waits waits, const Nanoseconds* deadline);
    void ReleaseCoarse();
    void DowngradeCoarse();
    void MoveAnchorTo(Guard& other);

    RangeLock& lock_;
    bool held_;
    // Under kCoarse, disjoint guards of one thread are one holder, or the second would wait for the
    // first. The anchor is the one whose request the lock knows; its mode is the strongest of them.
    bool anchors_ = true;
    // In this thread's list of held guards, from which the child of a fork knows what it holds.
    Guard* next_held_;
    Guard** link_to_this_;
    Nanoseconds granted_at_;  // if the lock has a recorder
    RangeRequest request_;
  };

  explicit constexpr RangeLock(LockPolicy policy, LockRank rank = LockRank::kRange)
      : policy_(policy), rank_(rank), takes_words_(policy == LockPolicy::kAdaptive) {}
  RangeLock(const RangeLock&) = delete;
  RangeLock& operator=(const RangeLock&) = delete;

  LockPolicy policy() const { return policy_; }

  // From now on, waits and holds are timed: three readings of the clock each time. Without a recorder that costs a
  // branch on a line that nobody writes. REQUIRES: no other thread uses the lock yet; `recorder` outlives it.
  void InstallRecorder(LockTimesRecorder* recorder) {
    recorder_ = recorder;
    takes_words_ = false;
  }

  // False if nobody holds or waits for any page of `range`. Exact for requests that another lock orders
  // with this call, as those of holders that looked at what that lock guards once they held their
  // range; others may be missed. Always true under kCoarse, the model of a lock that everybody takes.
  bool MayBeHeld(PageRange range) const;
  // Whether MayBeHeld ever says no of so long a range.
  bool KnowsHolders(PageRange range) const {
    return policy_ == LockPolicy::kTree || (policy_ == LockPolicy::kAdaptive && !AdaptiveRangeLock::IsLong(range));
  }

  // Holders and waiters that overlap `range` (kCoarse: all of them). For diagnostics; a hint.
  HolderList Holders(PageRange range) const;

  // For readers outside the process. They call these on a copy of the lock's bytes, made while others use the lock,
  // take no lock, and follow the pointers in the process by themselves.
  //
  // Under kTree and kAdaptive, the root of the tree of those who hold or wait; under kCoarse, the first of the queue of
  // those who wait. In the memory of the process; null if there are none.
  const RangeRequest* CopiedRequests() const;
  // Who holds what `what` describes: under kAdaptive, those whom a proxy stands for; under kCoarse, all holders,
  // whatever `what` is; under kTree nobody, as every request has its name.
  HolderList CopiedHolders(const HolderInfo& what) const;

  // In the child of a fork, before any other use there: this thread keeps the guards it holds,
  // everyone else's guards and requests are gone. REQUIRES: os::ForgetThreadIdAfterFork() was
  // called.
  void ReinitAfterFork();

  // CHECKs R1, R2 and the structure. O(n^2) in the number of requests; tests only.
  void CheckInvariants() const;

 private:
  // Of this thread, the last one first. Written by the thread itself only; initial-exec, so that
  // reading it never allocates.
  static constinit thread_local Guard* held_guards_ __attribute__((tls_model("initial-exec")));
  // The strongest guard of this lock that this thread holds, the anchor if several are; null if
  // none.
  Guard* FindStrongestHeld() const;

  const LockPolicy policy_;
  const LockRank rank_;
  // Constant once threads use the lock.
  bool takes_words_;  // kAdaptive without a recorder: the fast path; everything else goes through AcquireSlow
  LockTimesRecorder* recorder_ = nullptr;
  CoarseLock coarse_;
  TreeRangeLock tree_;
  AdaptiveRangeLock adaptive_;
};

inline bool RangeLock::MayBeHeld(PageRange range) const {
  if (ABSL_PREDICT_TRUE(policy_ == LockPolicy::kAdaptive)) return adaptive_.MayBeHeld(range);
  return policy_ == LockPolicy::kCoarse || tree_.in_use();
}

// Inlined wherever GCC would rather not: a call costs as much as half of the fast path.
ABSL_ATTRIBUTE_ALWAYS_INLINE inline RangeLock::Guard::Guard(RangeLock& lock, PageRange range,
                                                            Mode mode, Operation operation,
                                                            Waits waits, Nanoseconds deadline,
                                                            AcquisitionSite site)
    : lock_(lock), request_(range, mode, operation, os::CurrentThreadId()) {
  FREEHOLD_DCHECK(!range.empty());
  if (waits != Waits::kNever) CheckRangeRank(lock.rank_, &lock, this, range, site);
  held_ = (ABSL_PREDICT_TRUE(lock.takes_words_) && ABSL_PREDICT_TRUE(lock.adaptive_.TryAcquireFast(request_))) ||
          AcquireSlow(waits, deadline);
  if (!held_) return;
  RecordRangeRank(lock.rank_, &lock, this, range, site);
  LinkHeld();
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline RangeLock::Guard::Guard(RangeLock& lock, PageRange range,
                                                            Mode mode, Operation operation,
                                                            AcquisitionSite site)
    : Guard(lock, range, mode, operation, Waits::kForever, Nanoseconds{0}, site) {}

inline RangeLock::Guard RangeLock::Guard::Try(RangeLock& lock, PageRange range, Mode mode,
                                              Operation operation, AcquisitionSite site) {
  return Guard(lock, range, mode, operation, Waits::kNever, Nanoseconds{0}, site);
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline void RangeLock::Guard::Release() {
  FREEHOLD_DCHECK(held_);
  CheckNoShortLockHeld("range unlock");
  held_ = false;
  UnlinkHeld();
  ReleaseRank(this);
  if (ABSL_PREDICT_TRUE(lock_.takes_words_) && ABSL_PREDICT_TRUE(request_.bucket != nullptr) &&
      ABSL_PREDICT_TRUE(lock_.adaptive_.TryReleaseFast(request_))) {
    return;
  }
  ReleaseSlow();
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
// GCC 12, once it has inlined this, no longer sees that the destructor takes the guard off.
#pragma GCC diagnostic ignored "-Wdangling-pointer"
#endif
ABSL_ATTRIBUTE_ALWAYS_INLINE inline void RangeLock::Guard::LinkHeld() {
  Guard*& head = held_guards_;
  next_held_ = head;
  link_to_this_ = &head;
  if (head != nullptr) head->link_to_this_ = &next_held_;
  head = this;
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

ABSL_ATTRIBUTE_ALWAYS_INLINE inline void RangeLock::Guard::UnlinkHeld() {
  *link_to_this_ = next_held_;
  if (next_held_ != nullptr) next_held_->link_to_this_ = link_to_this_;
}

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_RANGE_LOCK_H_
