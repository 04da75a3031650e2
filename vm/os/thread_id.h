// Who runs here: the kernel's thread id, cached, and ways to give the CPU away for a moment.
#ifndef FREEHOLD_VM_OS_THREAD_ID_H_
#define FREEHOLD_VM_OS_THREAD_ID_H_

#include <cstdint>

#include "vm/os/raw_syscall.h"

namespace freehold::vm::os {
namespace internal {

// 0 until asked for. Initial-exec: one load relative to the thread pointer, and no call into the
// dynamic linker (which allocates) on a thread's first use, from a shared library too.
extern constinit thread_local std::uint32_t cached_thread_id
    __attribute__((tls_model("initial-exec")));

std::uint32_t ReadThreadId();

}  // namespace internal

// The calling thread's id, as gettid() gives it; never 0. A system call once a thread.
// Async-signal-safe.
//
// In the child of a fork the cached value is the parent's thread until ForgetThreadIdAfterFork()
// ran there.
inline std::uint32_t CurrentThreadId() {
  const std::uint32_t id = internal::cached_thread_id;
  return id != 0 ? id : internal::ReadThreadId();
}

// To be called in the child of a fork, before it takes or releases any lock of the runtime: the
// runtime's fork handler does. Only the thread that forked lives on in the child, so one cache is
// all there is.
inline void ForgetThreadIdAfterFork() { internal::cached_thread_id = 0; }

// Offers the rest of this thread's time slice to another runnable thread.
inline void YieldCpu() { RawSyscall(SYS_sched_yield); }

// A pause in a spin loop: tens of cycles in which a sibling hyperthread runs and the memory bus
// rests.
inline void CpuRelax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // `yield` is a no-op on the cores at hand
#endif
}

}  // namespace freehold::vm::os

#endif  // FREEHOLD_VM_OS_THREAD_ID_H_
