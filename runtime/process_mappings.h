// The mmap family of system calls, served by an address space where that can serve them, and passed on to the kernel
// where it cannot: what the mmap shim does, apart from errno and symbols. README.md has the table of what goes where.
//
// Memory lies inside the space's reservation or outside, and the address alone tells. What lies outside is the
// kernel's; a range that has parts on both sides is done part by part.
//
// Thread safety: thread-safe. Not async-signal-safe; but a handler of SIGSEGV that a program's own access raised may
//                call anything here, since that thread is in no call.
// Lock order:    as the verbs of AddressSpace.
// Allocation:    none from malloc.
// Results:       as raw system calls give them: an address, a number of bytes, 0, or -errno, the kernel's for the same
//                case. errno is left alone.
#ifndef FREEHOLD_RUNTIME_PROCESS_MAPPINGS_H_
#define FREEHOLD_RUNTIME_PROCESS_MAPPINGS_H_

#include <sys/types.h>

#include <atomic>
#include <cstddef>

#include "allocator/memory_limit.h"
#include "runtime/kernel_backing.h"
#include "vm/address_space.h"

namespace freehold::runtime {

struct ProcessMappingsOptions {
  // Whether an address that is only asked for, outside the space, is left to the kernel, which may follow it. If not,
  // the space serves memory as aligned as that address.
  bool follow_hints = true;
  // Whether files that are only read are mapped in the space, which keeps windows of them for a while.
  bool map_files = true;
  // Asked before memory is mapped, or a mapping grows. May be null.
  allocator::MemoryLimit* limit = nullptr;
};

class ProcessMappings {
 public:
  constexpr ProcessMappings() = default;
  ProcessMappings(const ProcessMappings&) = delete;
  ProcessMappings& operator=(const ProcessMappings&) = delete;

  // Once, before anything else.
  void Init(vm::AddressSpace& space, const ProcessMappingsOptions& options = {});

  long Map(void* address, std::size_t length, int protection, int flags, int descriptor, off_t offset);
  long Unmap(void* address, std::size_t length);
  long Protect(void* address, std::size_t length, int protection);
  long ProtectByKey(void* address, std::size_t length, int protection, int key);  // pkey_mprotect
  long Remap(void* address, std::size_t old_length, std::size_t new_length, int flags, void* new_address);
  long Advise(void* address, std::size_t length, int advice);
  long LockMemory(const void* address, std::size_t length, int flags);  // mlock2
  long UnlockMemory(const void* address, std::size_t length);
  long LockAll(int flags);
  long UnlockAll();
  long Sync(void* address, std::size_t length, int flags);
  long Residency(void* address, std::size_t length, unsigned char* resident);

  bool Contains(const void* address) const { return space_->Contains(address); }

  // In the child of a fork, after the space's own handler: what MADV_DONTFORK left out would be a hole, in which the
  // kernel might map something else.
  void ChildAfterFork();

 private:
  struct MapRequest;

  // Where a range of bytes lies, in whole pages.
  struct Parts {
    vm::PageRange below;
    vm::PageRange inside;
    vm::PageRange above;
    bool touches_space() const { return !inside.empty(); }
    bool leaves_space() const { return !below.empty() || !above.empty(); }
  };
  // Nothing inside for a range that wraps, which no call accepts.
  Parts PartsOf(const void* address, std::size_t length) const;

  long MapAnywhere(const MapRequest& request);
  long MapFixed(const MapRequest& request, const Parts& parts);
  long MapFixedPart(const MapRequest& request, vm::PageRange part);
  long MapForeign(const MapRequest& request, vm::PageRange part);
  // `source` takes the place of `part`. `moved`: it is not where it was, also if the call failed afterwards.
  vm::Error MoveIn(vm::PageRange part, const KernelBacking::Source& source, const vm::MapOptions& options, bool shared,
                   bool& moved);
  bool IsWindow(const MapRequest& request) const;

  // How much more memory a fixed map of `part` takes, for the limit; 0 without one.
  vm::Bytes Growth(vm::PageRange part) const;
  long RemapFrom(vm::PageRange range, vm::Pages count, int flags, void* new_address);
  long RemapPieces(vm::PageRange range, vm::Pages count, int flags, void* new_address);
  // Leaves a mapping for the kernel to put outside, at `new_address` unless that is null.
  long MoveOut(vm::PageRange range, vm::Pages count, int flags, void* new_address);
  // From outside, or of a mapping that the space cannot move, to `target` inside.
  long MoveInto(void* address, std::size_t old_length, vm::PageRange target, int flags);

  // Makes present and keeps so what lies outside and has content.
  void LockOutside();

  long AdviseInside(vm::PageRange range, int advice);
  // Calls `verb(range)`; if not all of it is mapped, for what comes before the hole.
  template <typename Verb>
  long UpToHole(vm::PageRange range, const Verb& verb) const;
  // Calls `visit(part, vma)`, which returns an Error, for what is mapped in `range`; kNotMapped in the end if there
  // was a hole.
  template <typename Visit>
  vm::Error ForEachPart(vm::PageRange range, const Visit& visit) const;

  vm::AddressSpace* space_ = nullptr;
  ProcessMappingsOptions options_;
  vm::Bytes grantable_;  // more than this the kernel may refuse to promise: it is asked
  std::atomic<bool> left_out_of_forks_{false};
  KernelBackingPool backings_;
};

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_PROCESS_MAPPINGS_H_
