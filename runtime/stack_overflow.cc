#include "runtime/stack_overflow.h"

#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "runtime/message.h"
#include "vm/os/raw_syscall.h"

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

// Written once, before the handler is installed.
constinit std::atomic<const StackPool*> watched_pool{nullptr};

// Threads that started; relaxed. Every kLookEvery-th looks whether the handler is still ours.
constinit std::atomic<std::uint32_t> starts{0};
constexpr std::uint32_t kLookEvery = 16;
constinit std::atomic<bool> handler_was_ours{true};  // when somebody looked; relaxed

void Report(const StackSlot& slot, const void* address) {
  char name[17] = {};
  RawSyscall(SYS_prctl, PR_GET_NAME, name);
  const auto fault = reinterpret_cast<std::uintptr_t>(address);
  const auto low = reinterpret_cast<std::uintptr_t>(slot.stack().address());
  const auto high = reinterpret_cast<std::uintptr_t>(slot.stack().end.address()) - kAlternateStack.value;
  Message message;
  message.Append("thread ").AppendNumber(static_cast<std::uint64_t>(RawSyscall(SYS_gettid)));
  message.Append(" \"").Append({name, std::strlen(name)}).Append("\" overflowed its stack [").AppendHex(low);
  message.Append(", ").AppendHex(high).Append(") of ").AppendBytes({high - low}).Append(": access to ");
  message.AppendHex(fault).Append(", ").AppendNumber(low - fault).Append(" bytes below it");
  message.Report();
}

// Async-signal-safe. Whatever the reason was, the signal then takes its default action: by another try of the same
// access, so that a core dump shows it, or sent again if somebody sent it.
void OnSegmentationFault(int signal, siginfo_t* info, void*) {
  const StackPool* pool = watched_pool.load(std::memory_order_acquire);
  if (info->si_code > 0) {
    const StackSlot* slot = pool->Find(info->si_addr);
    if (slot != nullptr && slot->guard().Contains(vm::PageNumber::Of(info->si_addr))) Report(*slot, info->si_addr);
  }
  const KernelSigaction by_default;
  RawSyscall(SYS_rt_sigaction, signal, &by_default, nullptr, sizeof(by_default.mask));
  if (info->si_code <= 0) RawSyscall(SYS_tgkill, RawSyscall(SYS_getpid), RawSyscall(SYS_gettid), signal);
}

bool HandlerIsOurs() {
  KernelSigaction now;
  return RawSyscall(SYS_rt_sigaction, SIGSEGV, nullptr, &now, sizeof(now.mask)) == 0 &&
         reinterpret_cast<void*>(now.handler) == reinterpret_cast<void*>(&OnSegmentationFault);
}

}  // namespace

bool ReportOverflows(const StackPool& pool) {
  struct sigaction now;
  if (sigaction(SIGSEGV, nullptr, &now) != 0 || (now.sa_flags & SA_SIGINFO) != 0 || now.sa_handler != SIG_DFL) {
    return false;
  }
  watched_pool.store(&pool, std::memory_order_release);
  struct sigaction ours = {};
  ours.sa_sigaction = OnSegmentationFault;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  return sigaction(SIGSEGV, &ours, nullptr) == 0;
}

void UseAlternateStack(std::byte* low) {
  if (starts.fetch_add(1, std::memory_order_relaxed) % kLookEvery == 0) {
    handler_was_ours.store(HandlerIsOurs(), std::memory_order_relaxed);
  }
  if (!handler_was_ours.load(std::memory_order_relaxed)) return;
  stack_t stack = {};
  stack.ss_sp = low;
  stack.ss_size = kAlternateStack.value;
  RawSyscall(SYS_sigaltstack, &stack, nullptr);
}

}  // namespace freehold::runtime
