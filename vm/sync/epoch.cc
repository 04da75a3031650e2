#include "vm/sync/epoch.h"

#include <algorithm>

#include "vm/os/thread_id.h"
#include "vm/sync/clock.h"
#include "vm/sync/lock_rank.h"
#include "vm/sync/parking.h"

namespace freehold::vm::sync {

void EpochDomain::Defer(DeferredCallback* node, DeferredCallback::Function function) {
  node->function = function;
  node->next = deferred_.load(std::memory_order_relaxed);
  // Pairs with the acquire in TakeDeferred.
  while (!deferred_.compare_exchange_weak(node->next, node, std::memory_order_release,
                                          std::memory_order_relaxed)) {
  }
}

bool EpochDomain::HasDeferred() const {
  return deferred_.load(std::memory_order_relaxed) != nullptr ||
         batch_.load(std::memory_order_relaxed) != nullptr;
}

std::size_t EpochDomain::Poll() {
  CheckNoShortLockHeld("poll an epoch domain");
  if (!HasDeferred() || !TryBecomePoller()) return 0;
  // A batch is taken before its grace period starts, never into a running one.
  if (batch_.load(std::memory_order_relaxed) == nullptr) TakeDeferred();
  const bool waits = batch_.load(std::memory_order_relaxed) != nullptr;
  const std::size_t ran = waits && AdvanceGracePeriod() ? RunBatch() : 0;
  StopPolling();
  return ran;
}

void EpochDomain::Barrier() {
  struct Signal : DeferredCallback {
    Parker parker;
  };
  Signal signal;
  // Callbacks run in order, one at a time: when this one does, all earlier ones have returned.
  Defer(&signal, [](DeferredCallback* node) { static_cast<Signal*>(node)->parker.Unpark(); });
  for (Nanoseconds pause = Microseconds(20);; pause = std::min(pause + pause, Milliseconds(2))) {
    Poll();
    const Nanoseconds deadline = MonotonicNow() + pause;
    if (signal.parker.Park(&deadline)) return;
  }
}

bool EpochDomain::TryBecomePoller() {
  // Pairs with the release in StopPolling.
  return !polling_.load(std::memory_order_relaxed) &&
         !polling_.exchange(true, std::memory_order_acquire);
}

void EpochDomain::StopPolling() { polling_.store(false, std::memory_order_release); }

void EpochDomain::TakeDeferred() {
  // Pairs with the release in Defer.
  DeferredCallback* newest = deferred_.exchange(nullptr, std::memory_order_acquire);
  DeferredCallback* oldest = nullptr;
  while (newest != nullptr) {
    DeferredCallback* const next = newest->next;
    newest->next = oldest;
    oldest = newest;
    newest = next;
  }
  batch_.store(oldest, std::memory_order_relaxed);
}

// Returns whether the grace period of the batch is over; the next one then starts from the
// beginning. Both stages drain the phase that new readers do not use; between them, the phases
// change places.
bool EpochDomain::AdvanceGracePeriod() {
  while (true) {
    const std::size_t unused = 1 - phase_.load(std::memory_order_relaxed);
    if (!HasDrained(unused)) return false;
    drained_slots_ = 0;
    if (stage_ == Stage::kDrainingFormer) break;
    stage_ = Stage::kDrainingFormer;
    phase_.store(unused, std::memory_order_relaxed);
  }
  stage_ = Stage::kDrainingOther;
  return true;
}

// Looks at every slot once, from where the last call was stopped by a reader.
bool EpochDomain::HasDrained(std::size_t phase) {
  for (; drained_slots_ < kSlots; ++drained_slots_) {
    std::atomic<std::uint64_t>& readers = slots_[drained_slots_].readers[phase];
    ReachSyncPoint(SyncPoint::kAcquire, &readers);
    if (readers.load(std::memory_order_relaxed) != 0) return false;
    // The read of the header's argument. Pairs with the acquire in Enter and with ReadGuard's
    // release.
    if (readers.fetch_add(0, std::memory_order_acq_rel) != 0) return false;
  }
  return true;
}

std::size_t EpochDomain::RunBatch() {
  std::size_t ran = 0;
  while (DeferredCallback* const node = batch_.load(std::memory_order_relaxed)) {
    batch_.store(node->next, std::memory_order_relaxed);
    node->function(node);
    ++ran;
  }
  return ran;
}

void EpochDomain::LockForFork() {
  while (!TryBecomePoller()) os::YieldCpu();
}

void EpochDomain::UnlockAfterFork() { StopPolling(); }

void EpochDomain::ReinitAfterFork() {
  for (Slot& slot : slots_) {
    for (std::atomic<std::uint64_t>& readers : slot.readers)
      readers.store(0, std::memory_order_relaxed);
  }
  StopPolling();
}

}  // namespace freehold::vm::sync
