#include "vm/os/thread_id.h"

namespace freehold::vm::os::internal {

constinit thread_local std::uint32_t cached_thread_id = 0;

std::uint32_t ReadThreadId() {
  cached_thread_id = static_cast<std::uint32_t>(RawSyscall(SYS_gettid));
  return cached_thread_id;
}

}  // namespace freehold::vm::os::internal
