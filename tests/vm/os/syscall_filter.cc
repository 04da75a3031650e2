#include "tests/vm/os/syscall_filter.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>

#include "vm/os/check.h"
#include "vm/os/raw_syscall.h"

namespace freehold::vm::os {
namespace {

// A sixth argument that marks calls made by the signal handler below, which pass.
constexpr std::uint32_t kFromHandler = 0x0f5ee401;

constexpr std::uint32_t kNumberOffset = offsetof(seccomp_data, nr);
constexpr std::uint32_t LowHalfOfArgument(unsigned index) {
  return static_cast<std::uint32_t>(offsetof(seccomp_data, args) + index * sizeof(std::uint64_t));
}

void InstallFilter(SyscallMatch match, std::uint32_t action) {
  constexpr std::uint16_t kLoad = BPF_LD | BPF_W | BPF_ABS;
  constexpr std::uint16_t kIfEqual = BPF_JMP | BPF_JEQ | BPF_K;
  const std::uint32_t number = static_cast<std::uint32_t>(match.number);
  // Without an argument to match, the number is compared again.
  const std::uint32_t operand =
      match.argument.has_value() ? LowHalfOfArgument(match.argument->index) : kNumberOffset;
  const std::uint32_t value = match.argument.has_value() ? match.argument->value : number;
  std::array<sock_filter, 8> program = {{
      BPF_STMT(kLoad, kNumberOffset),
      BPF_JUMP(kIfEqual, number, 0, 5),
      BPF_STMT(kLoad, operand),
      BPF_JUMP(kIfEqual, value, 0, 3),
      BPF_STMT(kLoad, LowHalfOfArgument(5)),
      BPF_JUMP(kIfEqual, kFromHandler, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, action),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  const sock_fprog filter = {static_cast<unsigned short>(program.size()), program.data()};
  FREEHOLD_CHECK(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
  FREEHOLD_CHECK(!SyscallFailed(RawSyscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter)));
}

std::array<long, 16> script = {};
std::size_t script_length = 0;
std::atomic<std::size_t> script_position{0};

long Answer(long number, const std::array<long, 5>& args) {
  const std::size_t position = script_position.fetch_add(1);
  if (position < script_length && script[position] != kReachKernel) return script[position];
  return RawSyscall(number, args[0], args[1], args[2], args[3], args[4], kFromHandler);
}

void HandleSigsys(int, siginfo_t* info, void* context) {
  mcontext_t& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  auto& r = machine.gregs;
  r[REG_RAX] =
      Answer(info->si_syscall, {static_cast<long>(r[REG_RDI]), static_cast<long>(r[REG_RSI]),
                                static_cast<long>(r[REG_RDX]), static_cast<long>(r[REG_R10]),
                                static_cast<long>(r[REG_R8])});
#elif defined(__aarch64__)
  auto& r = machine.regs;
  r[0] = static_cast<unsigned long long>(Answer(
      info->si_syscall, {static_cast<long>(r[0]), static_cast<long>(r[1]), static_cast<long>(r[2]),
                         static_cast<long>(r[3]), static_cast<long>(r[4])}));
#endif
}

}  // namespace

bool PassesInChild(const std::function<void()>& body) {
  const pid_t child = ::fork();
  FREEHOLD_CHECK(child >= 0);
  if (child == 0) {
    body();
    ::_exit(0);
  }
  int status = -1;
  FREEHOLD_CHECK(::waitpid(child, &status, 0) == child);
  if (WIFSIGNALED(status)) std::fprintf(stderr, "child died of signal %d\n", WTERMSIG(status));
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void FailChild(const char* file, int line, const char* condition) {
  std::fprintf(stderr, "%s:%d: failed in the child: %s\n", file, line, condition);
  ::_exit(1);
}

void RefuseSyscall(SyscallMatch match, int sys_errno) {
  InstallFilter(match, SECCOMP_RET_ERRNO | static_cast<std::uint32_t>(sys_errno));
}

void KillOnSyscall(SyscallMatch match) { InstallFilter(match, SECCOMP_RET_KILL_PROCESS); }

void ScriptSyscall(SyscallMatch match, absl::Span<const long> results) {
  FREEHOLD_CHECK(results.size() <= script.size());
  std::copy(results.begin(), results.end(), script.begin());
  script_length = results.size();
  struct sigaction action = {};
  action.sa_sigaction = HandleSigsys;
  action.sa_flags = SA_SIGINFO;
  FREEHOLD_CHECK(::sigaction(SIGSYS, &action, nullptr) == 0);
  InstallFilter(match, SECCOMP_RET_TRAP);
}

std::size_t ScriptedCalls() { return script_position.load(); }

}  // namespace freehold::vm::os
