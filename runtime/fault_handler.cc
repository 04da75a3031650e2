#include "runtime/fault_handler.h"

#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>

#include "vm/os/raw_syscall.h"

// libc's sigaction, by the name that signal_shim.cc does not take.
extern "C" int __sigaction(int signal, const struct sigaction* action, struct sigaction* before) noexcept;

namespace freehold::runtime {
namespace {

using vm::os::RawSyscall;

// As rt_sigaction(2) wants it.
struct KernelSigaction {
  void (*handler)(int) = nullptr;
  unsigned long flags = 0;
  void (*restorer)() = nullptr;
  unsigned long mask = 0;
};

// Each written once, in order. Release, and acquire in the handler.
constinit std::array<std::atomic<FaultReporter>, 2> reporters = {};

// What the program asked for: the last of as many dispositions, so that a handler, which takes no lock, reads one that
// nobody writes to, unless it is overtaken by all the others.
constexpr std::size_t kActions = 64;
constinit struct sigaction actions[kActions] = {};
constinit const struct sigaction by_default = {};
constinit std::atomic<std::size_t> next_action{0};
// Release, after its content; acquire by readers.
constinit std::atomic<const struct sigaction*> program_action{&by_default};

constinit std::atomic<bool> kept_in_front{false};

bool IsHandler(const struct sigaction& action) { return action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN; }

// By another try of the same access, so that a core dump shows it, or sent again if somebody sent it.
void DieByDefault(int signal, const siginfo_t* info) {
  const KernelSigaction none;
  RawSyscall(SYS_rt_sigaction, signal, &none, nullptr, sizeof(none.mask));
  if (info->si_code <= 0) RawSyscall(SYS_tgkill, RawSyscall(SYS_getpid), RawSyscall(SYS_gettid), signal);
}

void OnFault(int signal, siginfo_t* info, void* context) {
  const bool trapped = info->si_code > 0;
  for (const auto& reporter : reporters) {
    const FaultReporter report = reporter.load(std::memory_order_acquire);
    if (trapped && report != nullptr) report(info->si_addr);
  }
  const struct sigaction action = *program_action.load(std::memory_order_acquire);
  // Nobody can ignore a trap.
  if (action.sa_handler == SIG_IGN && !trapped) return;
  if (!IsHandler(action)) return DieByDefault(signal, info);
  if ((action.sa_flags & SA_RESETHAND) != 0) program_action.store(&by_default, std::memory_order_release);
  if ((action.sa_flags & SA_SIGINFO) != 0) {
    action.sa_sigaction(signal, info, context);
  } else {
    action.sa_handler(signal);
  }
}

int InstallBefore(const struct sigaction& action) {
  struct sigaction ours = action;
  ours.sa_sigaction = OnFault;
  ours.sa_flags = (action.sa_flags & ~SA_RESETHAND) | SA_SIGINFO;
  // Threads may have an alternate stack of Freehold's, for reports; a program's handler runs where it says.
  if (!IsHandler(action)) ours.sa_flags |= SA_ONSTACK;
  return __sigaction(SIGSEGV, &ours, nullptr);
}

}  // namespace

bool WatchFaults(FaultReporter reporter) {
  if (!FaultsAreWatched()) {
    struct sigaction now;
    if (__sigaction(SIGSEGV, nullptr, &now) != 0 || now.sa_handler != SIG_DFL || InstallBefore(now) != 0) return false;
  }
  for (auto& place : reporters) {
    FaultReporter none = nullptr;
    if (place.compare_exchange_strong(none, reporter, std::memory_order_release, std::memory_order_relaxed)) return true;
  }
  return false;
}

bool FaultsAreWatched() {
  KernelSigaction now;
  return RawSyscall(SYS_rt_sigaction, SIGSEGV, nullptr, &now, sizeof(now.mask)) == 0 &&
         reinterpret_cast<void*>(now.handler) == reinterpret_cast<void*>(&OnFault);
}

void KeepFaultHandlerInFront() { kept_in_front.store(true, std::memory_order_release); }
bool FaultHandlerIsKeptInFront() { return kept_in_front.load(std::memory_order_acquire); }

int SetProgramFaultAction(const struct sigaction* action, struct sigaction* before) {
  const struct sigaction last = *program_action.load(std::memory_order_acquire);
  if (action != nullptr) {
    struct sigaction& mine = actions[next_action.fetch_add(1, std::memory_order_relaxed) % kActions];
    mine = *action;
    if (const int error = InstallBefore(mine); error != 0) return error;
    program_action.store(&mine, std::memory_order_release);
  }
  if (before != nullptr) *before = last;
  return 0;
}

}  // namespace freehold::runtime
