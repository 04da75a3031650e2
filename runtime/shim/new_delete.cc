// Every replaceable operator new and delete.
#include <cstddef>
#include <new>

#include "absl/base/attributes.h"
#include "absl/base/optimization.h"
#include "runtime/shim/allocate.h"
#include "runtime/shim/export.h"
#include "runtime/shim/new_failure.h"

namespace freehold::runtime::shim {
namespace {

ABSL_ATTRIBUTE_NOINLINE void* NewSlow(NewForm form, std::size_t size) {
  // That of the operator, which jumped here.
  void* p = Allocate(size, __builtin_return_address(0));
  return ABSL_PREDICT_TRUE(p != nullptr) ? p : NewAfterFailure(form, size, 0);
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline void* New(NewForm form, std::size_t size) {
  void* p = TryAllocate(size);
  return ABSL_PREDICT_TRUE(p != nullptr) ? p : NewSlow(form, size);
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline void* New(NewForm form, std::size_t size,
                                              std::align_val_t alignment) {
  void* p = AllocateAligned(static_cast<std::size_t>(alignment), size);
  return ABSL_PREDICT_TRUE(p != nullptr)
             ? p
             : NewAfterFailure(form, size, static_cast<std::size_t>(alignment));
}

}  // namespace
}  // namespace freehold::runtime::shim

namespace shim = freehold::runtime::shim;
using shim::NewForm;

FREEHOLD_EXPORT void* operator new(std::size_t size) { return shim::New(NewForm::kObject, size); }
FREEHOLD_EXPORT void* operator new[](std::size_t size) { return shim::New(NewForm::kArray, size); }
FREEHOLD_EXPORT void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return shim::New(NewForm::kObjectNothrow, size);
}
FREEHOLD_EXPORT void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
  return shim::New(NewForm::kArrayNothrow, size);
}
FREEHOLD_EXPORT void* operator new(std::size_t size, std::align_val_t alignment) {
  return shim::New(NewForm::kObjectAligned, size, alignment);
}
FREEHOLD_EXPORT void* operator new[](std::size_t size, std::align_val_t alignment) {
  return shim::New(NewForm::kArrayAligned, size, alignment);
}
FREEHOLD_EXPORT void* operator new(std::size_t size, std::align_val_t alignment,
                                   const std::nothrow_t&) noexcept {
  return shim::New(NewForm::kObjectAlignedNothrow, size, alignment);
}
FREEHOLD_EXPORT void* operator new[](std::size_t size, std::align_val_t alignment,
                                     const std::nothrow_t&) noexcept {
  return shim::New(NewForm::kArrayAlignedNothrow, size, alignment);
}

FREEHOLD_EXPORT void operator delete(void* p) noexcept { shim::Free(p); }
FREEHOLD_EXPORT void operator delete[](void* p) noexcept { shim::Free(p); }
FREEHOLD_EXPORT void operator delete(void* p, const std::nothrow_t&) noexcept { shim::Free(p); }
FREEHOLD_EXPORT void operator delete[](void* p, const std::nothrow_t&) noexcept { shim::Free(p); }
FREEHOLD_EXPORT void operator delete(void* p, std::size_t size) noexcept {
  shim::FreeSized(p, size);
}
FREEHOLD_EXPORT void operator delete[](void* p, std::size_t size) noexcept {
  shim::FreeSized(p, size);
}
FREEHOLD_EXPORT void operator delete(void* p, std::align_val_t) noexcept { shim::Free(p); }
FREEHOLD_EXPORT void operator delete[](void* p, std::align_val_t) noexcept { shim::Free(p); }
FREEHOLD_EXPORT void operator delete(void* p, std::align_val_t, const std::nothrow_t&) noexcept {
  shim::Free(p);
}
FREEHOLD_EXPORT void operator delete[](void* p, std::align_val_t, const std::nothrow_t&) noexcept {
  shim::Free(p);
}
FREEHOLD_EXPORT void operator delete(void* p, std::size_t size, std::align_val_t) noexcept {
  shim::FreeSized(p, size);
}
FREEHOLD_EXPORT void operator delete[](void* p, std::size_t size, std::align_val_t) noexcept {
  shim::FreeSized(p, size);
}
