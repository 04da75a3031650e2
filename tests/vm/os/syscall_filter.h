// Seccomp filters that make the kernel refuse, or a test answer, chosen system calls; and a child
// process to install them in, since a filter cannot be taken back.
#ifndef FREEHOLD_TESTS_VM_OS_SYSCALL_FILTER_H_
#define FREEHOLD_TESTS_VM_OS_SYSCALL_FILTER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "absl/types/span.h"

namespace freehold::vm::os {

// Which system calls a filter means: all calls `number`, or those whose argument `index` is
// `value`.
struct SyscallMatch {
  struct Argument {
    unsigned index;
    std::uint32_t value;
  };
  long number;
  std::optional<Argument> argument = std::nullopt;
};

// Runs `body` in a forked child and returns whether it came to its end with every CHILD_CHECK
// passed.
bool PassesInChild(const std::function<void()>& body);

// Inside PassesInChild: ends the child, with a message, unless `condition` holds.
#define CHILD_CHECK(condition)                         \
  (static_cast<bool>(condition) ? static_cast<void>(0) \
                                : ::freehold::vm::os::FailChild(__FILE__, __LINE__, #condition))
[[noreturn]] void FailChild(const char* file, int line, const char* condition);

// From now on matching calls of this process fail with `sys_errno`.
void RefuseSyscall(SyscallMatch match, int sys_errno);
// From now on matching calls kill this process.
void KillOnSyscall(SyscallMatch match);

// From now on the first matching calls return `results`, in order, without reaching the kernel; a
// result of kReachKernel, and calls after the last one, do reach it. Once a process. REQUIRES: the
// call has fewer than six arguments.
inline constexpr long kReachKernel = 1;
void ScriptSyscall(SyscallMatch match, absl::Span<const long> results);
// How many calls ScriptSyscall has seen.
std::size_t ScriptedCalls();

}  // namespace freehold::vm::os

#endif  // FREEHOLD_TESTS_VM_OS_SYSCALL_FILTER_H_
