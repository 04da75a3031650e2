// One thread's place to wait for one signal.
//
// Thread safety: Park by the owner only; Unpark by any thread, once per Park.
// Waiting:       Park spins for a microsecond, one time in eight for as long as a wake-up takes, then sleeps on a
//                futex.
// Allocation:    none.
// Lifetime:      a Parker may end as soon as its owner has seen the signal. The signaller's last
//                access to it is therefore the exchange that publishes the signal; the wake that
//                may follow uses the address only. If that memory is by then another futex, its
//                waiter wakes spuriously, which every waiter here tolerates; if it is unmapped, the
//                kernel says so and nothing happens.
// Ordering:      what happened before Unpark happens before Park's return.
#ifndef FREEHOLD_VM_SYNC_PARKING_H_
#define FREEHOLD_VM_SYNC_PARKING_H_

#include <atomic>
#include <cstdint>

#include "vm/sync/sync_point.h"
#include "vm/units.h"

namespace freehold::vm::sync {

class Parker {
 public:
  constexpr Parker() = default;
  Parker(const Parker&) = delete;
  Parker& operator=(const Parker&) = delete;

  // Waits for the signal, forever or until CLOCK_MONOTONIC reaches `*deadline`. Returns whether it
  // came; after false, the signal may still come. REQUIRES: no short lock is held.
  bool Park(const Nanoseconds* deadline = nullptr);

  // Sends the signal. Does not touch the Parker after its owner can see it. REQUIRES: no short lock
  // is held.
  void Unpark();

  // Ready to wait for another signal. REQUIRES: the signal came.
  void Reset() { word_.store(kEmpty, std::memory_order_relaxed); }

 private:
  static constexpr std::uint32_t kEmpty = 0;
  static constexpr std::uint32_t kSleeping = 1;  // the owner sleeps, or is about to
  static constexpr std::uint32_t kSignalled = 2;

  std::atomic<std::uint32_t> word_{kEmpty};
};

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_PARKING_H_
