#include "vm/sync/parking.h"

#include "vm/os/thread_id.h"
#include "vm/sync/lock_rank.h"

namespace freehold::vm::sync {
namespace {

constexpr int kSpins = 40;  // about 1 us of pauses

}  // namespace

bool Parker::Park(const Nanoseconds* deadline) {
  CheckNoShortLockHeld("park");
  // Loads that find kSignalled pair with the exchange in Unpark.
  for (int spin = 0; MaySpin() && spin < kSpins; ++spin) {
    if (word_.load(std::memory_order_acquire) == kSignalled) return true;
    os::CpuRelax();
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
