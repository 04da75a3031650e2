// The calling thread's return addresses, for the heap profile.
#ifndef FREEHOLD_RUNTIME_STACK_TRACE_H_
#define FREEHOLD_RUNTIME_STACK_TRACE_H_

#include "runtime/message.h"

namespace freehold::runtime {

// Writes return addresses, innermost first, `most` of them at most, to `frames`; returns how many. By the unwind
// tables, so frame pointers need not be there; it ends at code that has none, but is never empty. In the preloaded
// library, all of whose frames are malloc to the program, they are one: an address within operator new, which readers
// of profiles leave out.
//
// Thread safety: thread-safe; takes no lock with glibc 2.35 or later, where the dynamic linker finds tables without.
// Allocation:    none.
unsigned CaptureStack(void** frames, unsigned most);

// How many that is: 1 in the preloaded library, else 0.
unsigned FramesOfMalloc();

// Appends to `line` what the dynamic linker knows of a return address: "    0x1234 main+0x12 (/bin/server+0x1234)". It takes
// the linker's lock, and so waits while a library is loaded.
void AppendFrame(const void* address, Message& line);

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_STACK_TRACE_H_
