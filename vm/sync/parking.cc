#include "vm/sync/parking.h"

#include "vm/sync/lock_rank.h"
#include "vm/sync/spin_wait.h"

namespace freehold::vm::sync {
namespace {

// Waking up takes longer than kShortSpin. So of threads that lock the same in turn, once one has slept, all would:
// whoever waits for a thread that is waking up gives up spinning before that has even started its turn. One wait in a
// few therefore lasts as long as a wake-up does; a thread that is awake when its turn comes wakes nobody late.
constexpr Nanoseconds kLongSpin = Microseconds(20);
constexpr unsigned kLongSpinEvery = 8;

constinit thread_local unsigned waits = 0;  // of this thread

Nanoseconds NextSpin() { return ++waits % kLongSpinEvery == 0 ? kLongSpin : kShortSpin; }

}  // namespace

bool Parker::Park(const Nanoseconds* deadline) {
  CheckNoShortLockHeld("park");
  // Loads that find kSignalled pair with the exchange in Unpark.
  for (SpinWait spin(deadline == nullptr ? NextSpin() : kShortSpin); spin.Once();) {
    if (word_.load(std::memory_order_acquire) == kSignalled) return true;
  }
  std::uint32_t seen = kEmpty;
  if (!word_.compare_exchange_strong(seen, kSleeping, std::memory_order_acquire) &&
      seen == kSignalled) {
    return true;
  }
  while (true) {
    const os::FutexResult result = WaitOnWord(&word_, kSleeping, deadline);
    if (word_.load(std::memory_order_acquire) == kSignalled) return true;
    if (result == os::FutexResult::kTimeout) return false;
  }
}

void Parker::Unpark() {
  CheckNoShortLockHeld("unpark");
  ReachSyncPoint(SyncPoint::kWake, this);
  // From the exchange on, the Parker may be gone: see Lifetime in the header.
  std::atomic<std::uint32_t>* const address = &word_;
  if (word_.exchange(kSignalled, std::memory_order_release) == kSleeping) WakeWord(address, 1);
}

}  // namespace freehold::vm::sync
