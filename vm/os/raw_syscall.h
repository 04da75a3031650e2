// System calls by instruction, not through libc: the runtime replaces libc's mmap family in its
// process, so a call by symbol would come back to itself, and libc's `syscall` would overwrite the
// caller's errno in the middle of a malloc that succeeds. Returns -errno on failure, as the kernel
// does; errno is never touched.
#ifndef FREEHOLD_VM_OS_RAW_SYSCALL_H_
#define FREEHOLD_VM_OS_RAW_SYSCALL_H_

#include <sys/syscall.h>

#include <cstdint>
#include <type_traits>

namespace freehold::vm::os {
namespace internal {

// A system call's argument as the register that carries it.
template <typename T>
inline long Register(T value) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<long>(reinterpret_cast<std::uintptr_t>(value));
  } else if constexpr (std::is_null_pointer_v<T>) {
    return 0;
  } else {
    static_assert(std::is_integral_v<T> || std::is_enum_v<T>);
    return static_cast<long>(value);
  }
}

inline long Enter(long number, long a, long b, long c, long d, long e, long f) {
#if defined(__x86_64__)
  long result;
  register long r10 asm("r10") = d;
  register long r8 asm("r8") = e;
  register long r9 asm("r9") = f;
  asm volatile("syscall"
               : "=a"(result)
               : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
               : "rcx", "r11", "memory");
  return result;
#elif defined(__aarch64__)
  register long x8 asm("x8") = number;
  register long x0 asm("x0") = a;
  register long x1 asm("x1") = b;
  register long x2 asm("x2") = c;
  register long x3 asm("x3") = d;
  register long x4 asm("x4") = e;
  register long x5 asm("x5") = f;
  asm volatile("svc #0"
               : "+r"(x0)
               : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
               : "memory");
  return x0;
#else
#error "Freehold supports x86-64 and aarch64"
#endif
}

}  // namespace internal

// Makes system call `number`; arguments are integers and pointers, up to six. Async-signal-safe.
template <typename... Args>
inline long RawSyscall(long number, Args... args) {
  static_assert(sizeof...(Args) <= 6);
  const long registers[6] = {internal::Register(args)...};
  return internal::Enter(number, registers[0], registers[1], registers[2], registers[3],
                         registers[4], registers[5]);
}

// Whether a RawSyscall failed, and with which errno. Values from -4095 to -1 are errors, every
// other one a result (addresses in the upper half included).
inline bool SyscallFailed(long result) { return static_cast<unsigned long>(result) > -4096UL; }
inline int SyscallErrno(long result) { return static_cast<int>(-result); }

}  // namespace freehold::vm::os

#endif  // FREEHOLD_VM_OS_RAW_SYSCALL_H_
