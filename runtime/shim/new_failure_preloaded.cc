// The shim is a library that knows nothing of the program's C++ runtime, which may be libstdc++,
// libc++, none, or come along with a library that a C program loads later. Whoever called operator
// new has one: its operator new is the one that this shim stands in front of. It tries malloc
// again, calls the program's handlers, and throws the program's bad_alloc.
//
// Exceptions pass through the frames of this file, which have unwind tables but nothing to clean
// up.
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "runtime/message.h"
#include "runtime/shim/new_failure.h"

namespace freehold::runtime::shim {
namespace {

// By NewForm.
constexpr const char* kSymbols[] = {
    "_Znwm",
    "_Znam",
    "_ZnwmSt11align_val_t",
    "_ZnamSt11align_val_t",
    "_ZnwmRKSt9nothrow_t",
    "_ZnamRKSt9nothrow_t",
    "_ZnwmSt11align_val_tRKSt9nothrow_t",
    "_ZnamSt11align_val_tRKSt9nothrow_t",
};

// Stands in for std::nothrow, an empty object that tells forms apart by its type.
constexpr char kNothrow = 0;

// In the global scope behind the shim, or in a runtime that was loaded with local scope.
void* FindOperator(const char* symbol) {
  if (void* found = dlsym(RTLD_NEXT, symbol)) return found;
  for (const char* library : {"libstdc++.so.6", "libc++.so.1", "libc++abi.so.1"}) {
    void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) continue;
    void* found = dlsym(handle, symbol);
    dlclose(handle);  // The library stays: its caller holds it.
    if (found != nullptr) return found;
  }
  return nullptr;
}

template <typename... Parameters>
void* Call(void* function, Parameters... parameters) {
  return reinterpret_cast<void* (*)(Parameters...)>(function)(parameters...);
}

}  // namespace

void* NewAfterFailure(NewForm form, std::size_t size, std::size_t alignment) {
  void* function = FindOperator(kSymbols[static_cast<unsigned>(form)]);
  if (function == nullptr) {
    Message().Append("out of memory in operator new, and no C++ runtime to report it to").Report();
    std::abort();
  }
  // libstdc++ rounds sizes up to the alignment without a look at overflow, and would then succeed.
  size = std::min(size, static_cast<std::size_t>(PTRDIFF_MAX));
  switch (form) {
    case NewForm::kObject:
    case NewForm::kArray:
      return Call(function, size);
    case NewForm::kObjectAligned:
    case NewForm::kArrayAligned:
      return Call(function, size, alignment);
    case NewForm::kObjectNothrow:
    case NewForm::kArrayNothrow:
      return Call(function, size, &kNothrow);
    case NewForm::kObjectAlignedNothrow:
    case NewForm::kArrayAlignedNothrow:
      return Call(function, size, alignment, &kNothrow);
  }
  return nullptr;
}

}  // namespace freehold::runtime::shim
