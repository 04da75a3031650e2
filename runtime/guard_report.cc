#include "runtime/guard_report.h"

#include <sys/prctl.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "absl/types/span.h"
#include "runtime/fault_handler.h"
#include "runtime/message.h"
#include "runtime/runtime.h"
#include "runtime/stack_trace.h"
#include "vm/os/raw_syscall.h"

namespace freehold::runtime {
namespace {

using allocator::GuardedEvent;
using allocator::GuardedObject;
using vm::os::RawSyscall;

// Of the last report, relaxed: who handles a trap may try the access again.
constinit std::atomic<const void*> last_reported{nullptr};

void ReportStack(absl::Span<void* const> stack) {
  Message line;
  for (std::size_t i = FramesOfMalloc(); i < stack.size(); ++i) {
    line.Clear();
    AppendFrame(stack[i], line);
    line.Append('\n').Write();
  }
}

void ReportEvent(const char* what, const GuardedEvent& event) {
  Message().Append(what).Append(" by thread ").AppendNumber(event.thread).Append(" at").Report();
  ReportStack(event.stack());
}

void ReportAccess(const GuardedObject& object, const void* address) {
  char name[17] = {};
  RawSyscall(SYS_prctl, PR_GET_NAME, name);
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  const auto begin = reinterpret_cast<std::uintptr_t>(object.object);
  const std::uintptr_t end = begin + object.size;
  Message message;
  message.Append(object.freed ? "use after free" : at < begin ? "heap underflow" : "heap overflow");
  message.Append(": thread ").AppendNumber(static_cast<std::uint64_t>(RawSyscall(SYS_gettid)));
  message.Append(" \"").Append({name, std::strlen(name)}).Append("\" accessed ").AppendHex(at).Append(", ");
  if (at < begin) {
    message.AppendNumber(begin - at).Append(" bytes before");
  } else if (at < end) {
    message.AppendNumber(at - begin).Append(" bytes into");
  } else {
    message.AppendNumber(at - end).Append(" bytes after");
  }
  message.Append(object.freed ? " the freed " : " the ").AppendNumber(object.size).Append("-byte object at ");
  message.AppendHex(begin).Report();
}

void ReportIfGuarded(const void* address) {
  GuardedObject object;
  if (!process_runtime.heap().guards()->Find(address, object)) return;
  if (last_reported.exchange(address, std::memory_order_relaxed) == address) return;
  ReportAccess(object, address);
  void* frames[GuardedEvent::kMaxDepth];
  const unsigned depth = CaptureStack(frames, GuardedEvent::kMaxDepth);
  Message().Append("accessed at").Report();
  ReportStack({frames, depth});
  ExplainGuardedObject(object);
}

}  // namespace

void ExplainGuardedObject(const GuardedObject& object) {
  ReportEvent("allocated", object.allocation);
  if (object.freed) ReportEvent("freed", object.free);
}

void StartGuardReports() {
  if (process_runtime.config().guard_pages.value == 0) return;
  const bool served = process_runtime.server() == Server::kFreehold;
  if (!served || process_runtime.heap().guards() == nullptr) {
    Message().Append("no guard pages: ").Append(served ? "no memory for them" : "malloc is not Freehold's").Report();
    return;
  }
  // What the unwinder does once is done here, and not within somebody's malloc.
  void* frame;
  CaptureStack(&frame, 1);
  if (WatchFaults(ReportIfGuarded)) {
    KeepFaultHandlerInFront();
  } else {
    Message().Append("accesses to guard pages are not reported: the program ignores or handles SIGSEGV").Report();
  }
}

}  // namespace freehold::runtime
