// Code that runs while a tree lock is held, in one place of the library, so that it can be fetched before the lock is
// taken. After a long system call the processor's caches hold the kernel's work; a hold that then waits for memory line
// after line, for instructions as for data, takes microseconds where others take a tenth of one.
#ifndef FREEHOLD_VM_HOLD_CODE_H_
#define FREEHOLD_VM_HOLD_CODE_H_

#include "vm/units.h"

// For declarations of functions that are neither inline nor templates.
#define FREEHOLD_HOLD_CODE __attribute__((section("freehold_hold")))

// The linker's names for where the section begins and ends.
extern "C" {
extern const char __start_freehold_hold[] __attribute__((visibility("hidden")));
extern const char __stop_freehold_hold[] __attribute__((visibility("hidden")));
}

namespace freehold::vm {

// About 10 KiB; a tenth of a microsecond when it is there already. The requests do not wait for one another.
inline void PrefetchHoldCode() {
  for (const char* line = __start_freehold_hold; line < __stop_freehold_hold; line += kCacheLineSize) {
    __builtin_prefetch(line);
  }
}

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_HOLD_CODE_H_
