#include "bench/support/spaces.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "vm/os/linux_kernel.h"

namespace freehold::bench {
namespace {

constinit vm::os::LinuxKernel linux_kernel;

[[noreturn]] void DieOfError(vm::Error error, const char* verb) {
  std::fprintf(stderr, "AddressSpace::%s: %s", verb, vm::ToString(error.code));
  if (error.sys_errno != 0) std::fprintf(stderr, ": %s", std::strerror(error.sys_errno));
  std::fputc('\n', stderr);
  std::exit(1);
}

}  // namespace

template <vm::sync::LockPolicy policy>
vm::AddressSpace* AddressSpaceOf<policy>::CreateSpace(vm::sync::LockPolicy lock_policy) {
  const vm::Result<vm::AddressSpace*> space =
      vm::AddressSpace::Create(linux_kernel, {.lock_policy = lock_policy});
  Require(space.error(), "Create");
  return *space;
}

template <vm::sync::LockPolicy policy>
void AddressSpaceOf<policy>::Die(vm::Error error, const char* verb) {
  DieOfError(error, verb);
}

template class AddressSpaceOf<vm::sync::LockPolicy::kAdaptive>;
template class AddressSpaceOf<vm::sync::LockPolicy::kCoarse>;
template class AddressSpaceOf<vm::sync::LockPolicy::kTree>;

}  // namespace freehold::bench
