// The seam through which a test decides who runs next: every place where a lock's outcome depends
// on the order of threads announces itself, and every wait goes through here. Compiled in with
// FREEHOLD_SCHEDULE_HOOKS only; otherwise it is nothing but the futex.
//
// Thread safety: thread-safe; async-signal-safe.
#ifndef FREEHOLD_VM_SYNC_SYNC_POINT_H_
#define FREEHOLD_VM_SYNC_SYNC_POINT_H_

#include <atomic>
#include <cstdint>

#include "vm/os/futex.h"
#include "vm/units.h"

namespace freehold::vm::sync {

// What the calling thread is about to do.
enum class SyncPoint : std::uint8_t {
  kAcquire,   // an atomic step that may acquire
  kAcquired,  // has acquired a short lock
  kRelease,   // an atomic step that releases
  kWake,      // has released, wakes a waiter next
};

#if defined(FREEHOLD_SCHEDULE_HOOKS)

// A scheduler for tests. It sees only threads that it chose to control: `controls` says whether it
// controls the calling one, and the other functions are called for those only.
struct ScheduleHooks {
  bool (*controls)();
  void (*reach)(SyncPoint point, const void* object);
  os::FutexResult (*wait)(std::atomic<std::uint32_t>* word, std::uint32_t expected,
                          const Nanoseconds* deadline);
  void (*wake)(std::atomic<std::uint32_t>* word, int count);
};

namespace internal {
extern constinit std::atomic<const ScheduleHooks*> schedule_hooks;

// The hooks, if they control this thread.
inline const ScheduleHooks* Hooks() {
  const ScheduleHooks* hooks = schedule_hooks.load(std::memory_order_acquire);
  return hooks != nullptr && hooks->controls() ? hooks : nullptr;
}
}  // namespace internal

// Null removes them. REQUIRES: no controlled thread is running.
void SetScheduleHooks(const ScheduleHooks* hooks);

inline void ReachSyncPoint(SyncPoint point, const void* object) {
  if (const ScheduleHooks* hooks = internal::Hooks()) hooks->reach(point, object);
}

// False where the schedule is controlled: whoever spins there waits for a thread that never runs.
inline bool MaySpin() { return internal::Hooks() == nullptr; }

// As os::FutexWait and os::FutexWake.
inline os::FutexResult WaitOnWord(std::atomic<std::uint32_t>* word, std::uint32_t expected,
                                  const Nanoseconds* deadline = nullptr) {
  const ScheduleHooks* hooks = internal::Hooks();
  return hooks != nullptr ? hooks->wait(word, expected, deadline)
                          : os::FutexWait(word, expected, deadline);
}
inline void WakeWord(std::atomic<std::uint32_t>* word, int count) {
  if (const ScheduleHooks* hooks = internal::Hooks()) return hooks->wake(word, count);
  os::FutexWake(word, count);
}

#else

inline void ReachSyncPoint(SyncPoint, const void*) {}
inline bool MaySpin() { return true; }
inline os::FutexResult WaitOnWord(std::atomic<std::uint32_t>* word, std::uint32_t expected,
                                  const Nanoseconds* deadline = nullptr) {
  return os::FutexWait(word, expected, deadline);
}
inline void WakeWord(std::atomic<std::uint32_t>* word, int count) { os::FutexWake(word, count); }

#endif

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_SYNC_POINT_H_
