// Says which thread overflowed its stack, and how large that was, before the program dies of it as it would have died
// anyway: by SIGSEGV, with the same status and core dump.
//
// The report is made by a signal handler on an alternate stack of the thread's own. It is there only where it takes
// nothing from the program: a handler is installed if SIGSEGV still has its default action when the first thread is
// created, and threads get an alternate stack as long as the handler is found in place, which every sixteenth looks
// after. A program that installs a handler of its own, before or after, is left alone and gets no report, unless
// fault_handler.h says otherwise. What it may notice: sigaction(2) tells of a handler for SIGSEGV, sigaltstack(2) of a
// stack.
//
// Thread safety: thread-safe.
// Allocation:    none.
#ifndef FREEHOLD_RUNTIME_STACK_OVERFLOW_H_
#define FREEHOLD_RUNTIME_STACK_OVERFLOW_H_

#include "runtime/stack_pool.h"
#include "vm/units.h"

namespace freehold::runtime {

// What a report needs, and more: handlers that a program installs later may run there too.
inline constexpr vm::Bytes kAlternateStack = vm::KiB(64);

// From now on, an access to the guard of a stack of `pool` is reported. False, and nothing changed, if the program
// handles SIGSEGV itself, or ignores it. The highest kAlternateStack of each stack is for UseAlternateStack. Once; `pool`
// is never destroyed.
bool ReportOverflows(const StackPool& pool);

// Gives the calling thread the alternate stack [low, low + kAlternateStack), while the handler is in place.
void UseAlternateStack(std::byte* low);

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_STACK_OVERFLOW_H_
