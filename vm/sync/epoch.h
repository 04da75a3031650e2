// Deferred reclamation with readers that may sleep: the model of sleepable RCU.
//
// A reader enters, finds objects through atomic pointers, uses them (I/O included) and leaves. A
// writer makes an object unreachable and defers its destruction; the deferred callback runs when
// every reader that could have found the object has left. Writers never wait for readers. Epochs do
// not order readers against writers in any other way.
//
//   reader                                    writer
//     EpochDomain::ReadGuard guard(domain);     slot.store(nullptr, release);  // unreachable
//     Vma* vma = slot.load(acquire);            domain.Defer(old, &DropVma);   // later
//     if (vma != nullptr) Use(*vma);            ... later, somewhere: domain.Poll();
//
// Thread safety: thread-safe. ReadGuard and Defer are async-signal-safe.
// Lock order:    none: no function waits for a lock. Poll and Barrier run callbacks: REQUIRES
//                there.
// Waiting:       Barrier only.
// Allocation:    none; a deferred callback's node lies in the object that it reclaims.
//
// Why it is correct. Each slot has a counter per phase; a reader increments one counter of one slot
// by an acquire read-modify-write and decrements the same one, by release, when it leaves. A grace
// period reads every counter once by an acquire-release read-modify-write that adds nothing, and
// goes on only from a zero. Take a reader R, the counter C that it uses and the read S of C that
// found zero. In C's modification order, R's increment comes
//   * after S: the increment reads from S's release sequence, so S, and with it the Defer that came
//     before the grace period, and with that the unlinking, happen before everything that R loads:
//     R cannot find the object;
//   * or before S: since S read zero, R's decrement came before it too, and S reads from the
//     decrement's release sequence: everything that R did happens before S and so before the
//     callback.
// This needs no property of the phases. They only bring progress: new readers use the current
// phase, so the counters of the other one drain; a grace period drains that one, switches, and
// drains the former.
#ifndef FREEHOLD_VM_SYNC_EPOCH_H_
#define FREEHOLD_VM_SYNC_EPOCH_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "vm/os/thread_id.h"
#include "vm/sync/sync_point.h"
#include "vm/units.h"

namespace freehold::vm::sync {

// A callback that waits for a grace period; lies in the object that it will reclaim. The node
// belongs to the domain from Defer until `function` is called with it, and to nobody after that.
struct DeferredCallback {
  using Function = void (*)(DeferredCallback* node);

  DeferredCallback* next = nullptr;
  Function function = nullptr;
};

class EpochDomain {
 public:
  // A read section while in scope. It may sleep, move between CPUs, and nest, also in a signal
  // handler that interrupted another.
  class [[nodiscard]] ReadGuard {
   public:
    explicit ReadGuard(EpochDomain& domain) : counter_(domain.Enter()) {}
    ReadGuard(const ReadGuard&) = delete;
    ReadGuard& operator=(const ReadGuard&) = delete;
    // Pairs with the acquire in HasDrained.
    ~ReadGuard() {
      ReachSyncPoint(SyncPoint::kRelease, &counter_);
      counter_.fetch_sub(1, std::memory_order_release);
    }

   private:
    std::atomic<std::uint64_t>& counter_;
  };

  constexpr EpochDomain() = default;
  EpochDomain(const EpochDomain&) = delete;
  EpochDomain& operator=(const EpochDomain&) = delete;

  // Calls `function(node)` from some later Poll or Barrier, when all readers that are inside now
  // have left. Never waits; lock-free. REQUIRES: the object is already unreachable for new readers.
  void Defer(DeferredCallback* node, DeferredCallback::Function function);

  // Moves grace periods on and runs the callbacks whose grace period is over, in the order of their
  // Defer. Never waits for readers; returns at once while another thread polls. Returns how many it
  // ran. Cheap when nothing is deferred. REQUIRES: no short lock is held, nor any lock that a
  // callback takes.
  std::size_t Poll();

  // Waits until every callback deferred before this call has returned. REQUIRES: as Poll; this
  // thread is in no read section of this domain and in no callback.
  void Barrier();

  // Whether a callback waits. A hint.
  bool HasDeferred() const;

  // Around fork: keeps callbacks from running in between, so that none is cut in half in the child.
  // Waits for a running Poll, so before the locks that callbacks take. The child calls the third
  // instead of the second; there only the forking thread is left. REQUIRES: it is in no read
  // section.
  void LockForFork();
  void UnlockAfterFork();
  void ReinitAfterFork();

 private:
  // Enough that threads seldom share a line: thread ids are handed out in sequence.
  static constexpr std::size_t kSlots = 64;

  struct alignas(kCacheLineSize) Slot {
    std::atomic<std::uint64_t> readers[2] = {0, 0};  // by phase
  };

  // Counts a reader in.
  std::atomic<std::uint64_t>& Enter() {
    const std::size_t phase = phase_.load(std::memory_order_relaxed) & 1;
    std::atomic<std::uint64_t>& counter = slots_[os::CurrentThreadId() % kSlots].readers[phase];
    ReachSyncPoint(SyncPoint::kAcquire, &counter);
    // Pairs with the release in HasDrained.
    counter.fetch_add(1, std::memory_order_acquire);
    return counter;
  }

  bool TryBecomePoller();
  void StopPolling();

  // For the poller. The state machine of grace periods: these go on from where they stopped.
  void TakeDeferred();
  bool AdvanceGracePeriod();
  bool HasDrained(std::size_t phase);
  std::size_t RunBatch();

  std::array<Slot, kSlots> slots_;
  // The phase of new readers. Written by the poller, seldom.
  alignas(kCacheLineSize) std::atomic<std::size_t> phase_{0};

  // Newest first. Any thread pushes, the poller takes all: so no node is pushed, popped and
  // mistaken.
  alignas(kCacheLineSize) std::atomic<DeferredCallback*> deferred_{nullptr};
  // Set while a thread polls or forks, which thereby owns what follows.
  std::atomic<bool> polling_{false};
  // Callbacks that wait for the grace period under way, oldest first. Atomic for HasDeferred only.
  std::atomic<DeferredCallback*> batch_{nullptr};
  enum class Stage : std::uint8_t { kDrainingOther, kDrainingFormer };
  Stage stage_ = Stage::kDrainingOther;
  std::size_t drained_slots_ = 0;  // that were found empty in this stage
};

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_EPOCH_H_
