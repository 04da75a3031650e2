// What compiled C++ refers to where an exception could pass, for a library that neither throws nor
// catches. libstdc++'s own versions would bring its whole exception machinery into every process, C
// programs included, with a constructor that allocates 72 KiB. Exceptions of the program's new
// handlers do pass through operator new (new_failure_preloaded.cc): its frames have nothing to
// clean up, so "go on" is the right answer.
#include <unwind.h>

#include <exception>

#include "vm/os/check.h"

namespace {

[[noreturn]] void StopOnException() {
  freehold::vm::CheckFailed(__FILE__, __LINE__, "an exception in the shim, which throws none");
}

}  // namespace

extern "C" {

_Unwind_Reason_Code __gxx_personality_v0(int, _Unwind_Action, _Unwind_Exception_Class,
                                         _Unwind_Exception*, _Unwind_Context*) {
  return _URC_CONTINUE_UNWIND;
}

// Where a function that is noexcept, as clang compiles it, would stop an exception.
void* __cxa_begin_catch(void*) noexcept { StopOnException(); }

}  // extern "C"

void std::terminate() noexcept { StopOnException(); }
