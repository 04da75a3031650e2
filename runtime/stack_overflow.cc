#include "runtime/stack_overflow.h"

#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "runtime/fault_handler.h"
#include "runtime/message.h"
#include "vm/os/raw_syscall.h"

namespace freehold::runtime {
namespace {

using vm::os::RawSyscall;

// Written before anything is reported.
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

void ReportIfOverflow(const void* address) {
  const StackSlot* slot = watched_pool.load(std::memory_order_acquire)->Find(address);
  if (slot != nullptr && slot->guard().Contains(vm::PageNumber::Of(address))) Report(*slot, address);
}

}  // namespace

bool ReportOverflows(const StackPool& pool) {
  watched_pool.store(&pool, std::memory_order_release);
  return WatchFaults(ReportIfOverflow);
}

void UseAlternateStack(std::byte* low) {
  if (starts.fetch_add(1, std::memory_order_relaxed) % kLookEvery == 0) {
    handler_was_ours.store(FaultsAreWatched(), std::memory_order_relaxed);
  }
  if (!handler_was_ours.load(std::memory_order_relaxed)) return;
  stack_t stack = {};
  stack.ss_sp = low;
  stack.ss_size = kAlternateStack.value;
  RawSyscall(SYS_sigaltstack, &stack, nullptr);
}

}  // namespace freehold::runtime
