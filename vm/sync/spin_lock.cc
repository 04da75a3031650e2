#include "vm/sync/spin_lock.h"

#include <limits>

#include "vm/sync/spin_wait.h"

namespace freehold::vm::sync {
namespace {

constexpr int kEveryone = std::numeric_limits<int>::max();

}  // namespace

void SpinLock::LockSlow() {
  for (SpinWait spin(kShortSpin); spin.Once();) {
    std::uint32_t word = word_.load(std::memory_order_relaxed);
    if ((word & (kLocked | kReserved)) == 0 &&
        word_.compare_exchange_strong(word, word | kLocked, std::memory_order_acquire,
                                      std::memory_order_relaxed)) {
      return;
    }
  }
  for (int losses = 0;; ++losses) {
    const std::uint32_t reserve = losses >= kMaxSteals ? kReserved : 0;
    std::uint32_t word = word_.load(std::memory_order_relaxed);
    std::uint32_t next;
    bool acquires;
    do {
      acquires = (word & kLocked) == 0 && ((word & kReserved) == 0 || reserve != 0);
      // Whoever slept cannot know who else does, so an acquisition keeps kParked. It gives up
      // kReserved: others with a claim are awake, since a reserved lock wakes everyone, and will
      // claim it again.
      next = acquires ? kLocked | kParked : word | kParked | reserve;
    } while (!word_.compare_exchange_weak(word, next, std::memory_order_acquire,
                                          std::memory_order_relaxed));
    if (acquires) return;
    // Where the schedule is controlled, threads see each other's stores at once, and a wake that is lost is an error.
    const Nanoseconds deadline = MaySpin() ? MonotonicNow() + kLookAgain : Nanoseconds{0};
    WaitOnWord(&word_, next, MaySpin() ? &deadline : nullptr);
    ReachSyncPoint(SyncPoint::kAcquire, this);
  }
}

// Runs after the release, so the lock may be taken or even contended again. Clearing kParked loses
// nobody: the thread woken here sets it again before it sleeps or when it acquires, and one that is
// about to sleep finds the word changed.
void SpinLock::WakeSlow() {
  ReachSyncPoint(SyncPoint::kWake, this);
  const std::uint32_t before = word_.fetch_and(~kParked, std::memory_order_relaxed);
  if ((before & kParked) != 0) WakeWord(&word_, (before & kReserved) != 0 ? kEveryone : 1);
}

void SpinLock::LockForFork(AcquisitionSite site) {
  AcquireRankForFork(rank(), site);
  if (!TryLockWord()) LockSlow();
}

void SpinLock::UnlockAfterFork() {
  ReleaseRankForFork(rank());
  // The parent's waiters, if any, record themselves again.
  word_.store(kFree, std::memory_order_release);
  WakeWord(&word_, kEveryone);
}

void SpinLock::ReinitAfterFork() { word_.store(kFree, std::memory_order_relaxed); }

}  // namespace freehold::vm::sync
