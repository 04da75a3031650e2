// sigaction and signal, so that a program that handles SIGSEGV itself gets reports all the same, and its handler behind
// them (fault_handler.h). For this signal only, and only where guarded objects are on; all else is libc's, by its other
// names for the same functions. A handler that is installed in other ways takes the place of Freehold's.
#include <signal.h>

#include <cerrno>

#include "runtime/fault_handler.h"
#include "runtime/shim/export.h"

namespace {

using freehold::runtime::FaultHandlerIsKeptInFront;
using freehold::runtime::SetProgramFaultAction;

bool IsOurs(int signal) { return signal == SIGSEGV && FaultHandlerIsKeptInFront(); }

__sighandler_t SetHandler(__sighandler_t handler, int flags) {
  struct sigaction action = {};
  struct sigaction before = {};
  action.sa_handler = handler;
  action.sa_flags = flags;
  sigemptyset(&action.sa_mask);
  return SetProgramFaultAction(&action, &before) == 0 ? before.sa_handler : SIG_ERR;
}

}  // namespace

extern "C" {

int __sigaction(int signal, const struct sigaction* action, struct sigaction* before) noexcept;

FREEHOLD_EXPORT int sigaction(int signal, const struct sigaction* action, struct sigaction* before) noexcept {
  return IsOurs(signal) ? SetProgramFaultAction(action, before) : __sigaction(signal, action, before);
}

FREEHOLD_EXPORT __sighandler_t signal(int signal, __sighandler_t handler) noexcept {
  return IsOurs(signal) ? SetHandler(handler, SA_RESTART) : ssignal(signal, handler);
}

// What signal is in programs that ask for System V's.
FREEHOLD_EXPORT __sighandler_t __sysv_signal(int signal, __sighandler_t handler) noexcept {
  return IsOurs(signal) ? SetHandler(handler, static_cast<int>(SA_RESETHAND | SA_NODEFER))
                        : sysv_signal(signal, handler);
}

}  // extern "C"
