#include "vm/sync/sync_point.h"

namespace freehold::vm::sync {

#if defined(FREEHOLD_SCHEDULE_HOOKS)

namespace internal {
constinit std::atomic<const ScheduleHooks*> schedule_hooks{nullptr};
}

void SetScheduleHooks(const ScheduleHooks* hooks) {
  internal::schedule_hooks.store(hooks, std::memory_order_release);
}

#endif

}  // namespace freehold::vm::sync
