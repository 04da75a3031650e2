// mmap and its family, as the manual pages define them: the symbols, and errno. What they do is in process_mappings.h.
// Not cancellation points, but for msync.
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/types.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstddef>
#include <cstdint>

#include "absl/base/optimization.h"
#include "runtime/keeper.h"
#include "runtime/message.h"
#include "runtime/process_mappings.h"
#include "runtime/runtime.h"
#include "runtime/shim/export.h"
#include "runtime/thread.h"
#include "vm/os/raw_syscall.h"
#include "vm/units.h"

namespace freehold::runtime {

extern const bool has_mmap_shim;
constinit const bool has_mmap_shim = true;

namespace shim {
namespace {

using vm::os::RawSyscall;
using vm::os::SyscallErrno;
using vm::os::SyscallFailed;

// Null: the call is the kernel's. That holds for whoever comes while another thread starts the runtime, too: what the
// kernel maps then lies outside the space, where every later call on it goes to the kernel as well.
inline ProcessMappings* Mappings() {
  const Server server = process_runtime.server();
  if (ABSL_PREDICT_FALSE(server < Server::kFreehold)) {
    if (server == Server::kStarting) return nullptr;
    process_runtime.EnsureStarted();
  }
  return process_runtime.mappings();
}

// Once: a program may try again.
void ExplainLockLimit() {
  static constinit std::atomic<bool> explained{false};
  rlimit limit = {};
  if (RawSyscall(SYS_prlimit64, 0, RLIMIT_MEMLOCK, nullptr, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return;
  if (!process_runtime.has_space() || explained.exchange(true, std::memory_order_relaxed)) return;
  Message()
      .Append("mlockall was refused: the limit of ")
      .AppendBytes({limit.rlim_cur})
      .Append(" (ulimit -l) counts the address space that is reserved; with no limit, or CAP_IPC_LOCK, it works")
      .Report();
}

// From what a system call says to what a C function says.
inline int Answer(long result) {
  if (ABSL_PREDICT_TRUE(!SyscallFailed(result))) return static_cast<int>(result);
  errno = SyscallErrno(result);
  return -1;
}

inline void* AnswerAddress(long result) {
  if (ABSL_PREDICT_TRUE(!SyscallFailed(result))) return reinterpret_cast<void*>(result);
  errno = SyscallErrno(result);
  return MAP_FAILED;
}

// Memory came free. Small pieces are noticed in proportion to their number.
void NoticeUnmap(const void* address, std::size_t length, const void* caller) {
  constexpr std::size_t kLarge = vm::KiB(256).value;
  constexpr std::uintptr_t kSampled = vm::KiB(256).value - vm::kPageSize;
  const bool sampled = (reinterpret_cast<std::uintptr_t>(address) & kSampled) == 0;
  if (ABSL_PREDICT_TRUE(length < kLarge && !sampled && !process_keeper.WantsNudges())) return;
  // Who has a cache calls Freehold's malloc, and so does libc for it.
  process_keeper.NudgeOnUnmap(caller, /*may_start=*/CurrentThreadCache() != nullptr);
}

}  // namespace
}  // namespace shim
}  // namespace freehold::runtime

namespace shim = freehold::runtime::shim;
using freehold::runtime::ProcessMappings;

extern "C" {

FREEHOLD_EXPORT void* mmap(void* address, std::size_t length, int protection, int flags, int descriptor,
                           off_t offset) noexcept {
  ProcessMappings* mappings = shim::Mappings();
  return shim::AnswerAddress(
      mappings != nullptr ? mappings->Map(address, length, protection, flags, descriptor, offset)
                          : shim::RawSyscall(SYS_mmap, address, length, protection, flags, descriptor, offset));
}

static_assert(sizeof(off_t) == sizeof(off64_t));
FREEHOLD_ALIAS(mmap)
void* mmap64(void* address, std::size_t length, int protection, int flags, int descriptor, off64_t offset) noexcept;

FREEHOLD_EXPORT int munmap(void* address, std::size_t length) noexcept {
  ProcessMappings* mappings = shim::Mappings();
  if (mappings == nullptr) return shim::Answer(shim::RawSyscall(SYS_munmap, address, length));
  const long result = mappings->Unmap(address, length);
  if (result == 0 && mappings->Contains(address)) shim::NoticeUnmap(address, length, __builtin_return_address(0));
  return shim::Answer(result);
}

FREEHOLD_EXPORT int mprotect(void* address, std::size_t length, int protection) noexcept {
  ProcessMappings* mappings = shim::Mappings();
  return shim::Answer(mappings != nullptr ? mappings->Protect(address, length, protection)
                                          : shim::RawSyscall(SYS_mprotect, address, length, protection));
}

FREEHOLD_EXPORT int pkey_mprotect(void* address, std::size_t length, int protection, int key) noexcept {
  ProcessMappings* mappings = shim::Mappings();
  return shim::Answer(mappings != nullptr
                          ? mappings->ProtectByKey(address, length, protection, key)
                          : shim::RawSyscall(SYS_pkey_mprotect, address, length, protection, key));
}

FREEHOLD_EXPORT void* mremap(void* address, std::size_t old_length, std::size_t new_length, int flags,
                             ...) noexcept {
  va_list arguments;
  va_start(arguments, flags);
  constexpr int kTakesAddress = MREMAP_FIXED | 4;  // MREMAP_DONTUNMAP
  void* new_address = (flags & kTakesAddress) != 0 ? va_arg(arguments, void*) : nullptr;
  va_end(arguments);
  ProcessMappings* mappings = shim::Mappings();
  return shim::AnswerAddress(
      mappings != nullptr ? mappings->Remap(address, old_length, new_length, flags, new_address)
                          : shim::RawSyscall(SYS_mremap, address, old_length, new_length, flags, new_address));
}

FREEHOLD_EXPORT int madvise(void* address, std::size_t length, int advice) noexcept {
  ProcessMappings* mappings = shim::Mappings();
  return shim::Answer(mappings != nullptr ? mappings->Advise(address, length, advice)
                                          : shim::RawSyscall(SYS_madvise, address, length, advice));
}

// Says what went wrong by its result. As in libc, POSIX_MADV_DONTNEED, which must keep the content, does nothing.
FREEHOLD_EXPORT int posix_madvise(void* address, std::size_t length, int advice) noexcept {
  if (advice == POSIX_MADV_DONTNEED) return 0;
  ProcessMappings* mappings = shim::Mappings();
  const long result = mappings != nullptr ? mappings->Advise(address, length, advice)
                                          : shim::RawSyscall(SYS_madvise, address, length, advice);
  return shim::SyscallFailed(result) ? shim::SyscallErrno(result) : 0;
}

FREEHOLD_EXPORT int mlock2(const void* address, std::size_t length, unsigned flags) noexcept {
  ProcessMappings* mappings = shim::Mappings();
  return shim::Answer(mappings != nullptr ? mappings->LockMemory(address, length, static_cast<int>(flags))
                                          : shim::RawSyscall(SYS_mlock2, address, length, flags));
}

FREEHOLD_EXPORT int mlock(const void* address, std::size_t length) noexcept {
  ProcessMappings* mappings = shim::Mappings();
  return shim::Answer(mappings != nullptr ? mappings->LockMemory(address, length, 0)
                                          : shim::RawSyscall(SYS_mlock, address, length));
}

FREEHOLD_EXPORT int munlock(const void* address, std::size_t length) noexcept {
  ProcessMappings* mappings = shim::Mappings();
  return shim::Answer(mappings != nullptr ? mappings->UnlockMemory(address, length)
                                          : shim::RawSyscall(SYS_munlock, address, length));
}

FREEHOLD_EXPORT int mlockall(int flags) noexcept {
  ProcessMappings* mappings = shim::Mappings();
  const long result = mappings != nullptr ? mappings->LockAll(flags) : shim::RawSyscall(SYS_mlockall, flags);
  if (result == -ENOMEM) shim::ExplainLockLimit();
  return shim::Answer(result);
}

FREEHOLD_EXPORT int munlockall() noexcept {
  ProcessMappings* mappings = shim::Mappings();
  return shim::Answer(mappings != nullptr ? mappings->UnlockAll() : shim::RawSyscall(SYS_munlockall));
}

FREEHOLD_EXPORT int msync(void* address, std::size_t length, int flags) {
  pthread_testcancel();
  ProcessMappings* mappings = shim::Mappings();
  return shim::Answer(mappings != nullptr ? mappings->Sync(address, length, flags)
                                          : shim::RawSyscall(SYS_msync, address, length, flags));
}

FREEHOLD_EXPORT int mincore(void* address, std::size_t length, unsigned char* resident) noexcept {
  ProcessMappings* mappings = shim::Mappings();
  return shim::Answer(mappings != nullptr ? mappings->Residency(address, length, resident)
                                          : shim::RawSyscall(SYS_mincore, address, length, resident));
}

}  // extern "C"
