// The shim is part of the program, whose C++ runtime the linker found.
#include <new>

#include "runtime/shim/allocate.h"
#include "runtime/shim/new_failure.h"

namespace freehold::runtime::shim {
namespace {

bool IsAligned(NewForm form) {
  return form == NewForm::kObjectAligned || form == NewForm::kArrayAligned ||
         form == NewForm::kObjectAlignedNothrow || form == NewForm::kArrayAlignedNothrow;
}

void* TryWithHandlers(NewForm form, std::size_t size, std::size_t alignment) {
  for (;;) {
    const std::new_handler handler = std::get_new_handler();
    if (handler == nullptr) throw std::bad_alloc();
    handler();
    void* p = IsAligned(form) ? AllocateAligned(alignment, size) : Allocate(size, __builtin_return_address(0));
    if (p != nullptr) return p;
  }
}

}  // namespace

void* NewAfterFailure(NewForm form, std::size_t size, std::size_t alignment) {
  if (form < NewForm::kObjectNothrow) return TryWithHandlers(form, size, alignment);
  try {
    return TryWithHandlers(form, size, alignment);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

}  // namespace freehold::runtime::shim
