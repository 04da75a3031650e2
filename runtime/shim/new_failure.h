// What operator new does when there is no memory: calls the program's new handler, and throws
// std::bad_alloc. Both belong to the program's C++ runtime, so a program that links the shim and
// one that preloads it need different ways to it: new_failure_linked.cc, new_failure_preloaded.cc.
#ifndef FREEHOLD_RUNTIME_SHIM_NEW_FAILURE_H_
#define FREEHOLD_RUNTIME_SHIM_NEW_FAILURE_H_

#include <cstddef>
#include <cstdint>

namespace freehold::runtime::shim {

// The operators that can fail.
enum class NewForm : std::uint8_t {
  kObject,
  kArray,
  kObjectAligned,
  kArrayAligned,
  kObjectNothrow,
  kArrayNothrow,
  kObjectAlignedNothrow,
  kArrayAlignedNothrow,
};

// Goes on for an operator of this form whose first try failed. Returns memory if a handler made
// room; otherwise throws what the handler threw, or std::bad_alloc; the nothrow forms return null
// instead. `alignment` is a power of two, and ignored by the forms that are not aligned.
void* NewAfterFailure(NewForm form, std::size_t size, std::size_t alignment);

}  // namespace freehold::runtime::shim

#endif  // FREEHOLD_RUNTIME_SHIM_NEW_FAILURE_H_
