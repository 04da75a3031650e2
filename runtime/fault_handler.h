// The process's one handler of SIGSEGV: lets reporters say what an access did wrong, and then leaves it to the program's
// own disposition, as if the handler were not there.
//
// It is installed where the program has no handler. One that a program installs later through libc's sigaction or signal
// takes its place, and reports end; unless the preloaded library keeps its own in front (signal_shim.cc), which it does
// if guarded objects are on: then the program's is called behind the reports, with its flags and its mask.
//
// Thread safety: thread-safe and async-signal-safe, but for WatchFaults, whose calls must not overlap.
// Allocation:    none.
#ifndef FREEHOLD_RUNTIME_FAULT_HANDLER_H_
#define FREEHOLD_RUNTIME_FAULT_HANDLER_H_

#include <signal.h>

namespace freehold::runtime {

// Says what it knows of the access to `address` that trapped. Async-signal-safe.
using FaultReporter = void (*)(const void* address);

// Lets `reporter` see every access of the process that traps from now on. False, and nothing changed, if the program
// handles SIGSEGV itself. A few reporters at most, each once.
bool WatchFaults(FaultReporter reporter);

// Whether the kernel still has the handler.
bool FaultsAreWatched();

// From now on, dispositions that the program asks for stand behind the handler: SetProgramFaultAction. REQUIRES:
// WatchFaults returned true.
void KeepFaultHandlerInFront();
bool FaultHandlerIsKeptInFront();

// As sigaction(SIGSEGV, action, before) for the program. REQUIRES: FaultHandlerIsKeptInFront().
int SetProgramFaultAction(const struct sigaction* action, struct sigaction* before);

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_FAULT_HANDLER_H_
