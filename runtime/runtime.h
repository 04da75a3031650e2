// The process runtime: owns the one AddressSpace and the one ObjectHeap that serve this process,
// and decides at the first allocation whether Freehold or libc serves malloc. README.md follows a
// process through it.
//
// Nothing here has a constructor or a destructor that does anything: the runtime serves the dynamic
// linker's allocations before the first constructor and the last destructor's frees.
//
// Thread safety: thread-safe. Not async-signal-safe, as malloc is not.
// Lock order:    no lock is held over calls into the heap or the space.
// Waiting:       threads that come while another one starts the runtime wait for it.
// Allocation:    none from malloc: not while starting either.
// Errors:        when the address space cannot be reserved, one line says so on standard error and
// libc serves
//                malloc instead; a process that has no other malloc (linked statically) stops.
#ifndef FREEHOLD_RUNTIME_RUNTIME_H_
#define FREEHOLD_RUNTIME_RUNTIME_H_

#include <atomic>
#include <cstdint>

#include "allocator/object_heap.h"
#include "runtime/config.h"
#include "runtime/memory_limit.h"
#include "runtime/process_mappings.h"
#include "runtime/telemetry.h"
#include "vm/address_space.h"
#include "vm/os/linux_kernel.h"

namespace freehold::runtime {

// Who serves malloc. Decided once.
enum class Server : std::uint32_t {
  kUndecided,  // nothing was allocated yet
  kStarting,
  kFreehold,
  kLibc,  // FREEHOLD_MALLOC is not freehold, there was no address space to be had, or valgrind is there
};

// Defined by the mmap shim, where that is linked: then there is a space for it even if libc serves malloc.
extern const bool has_mmap_shim __attribute__((weak));

class Runtime {
 public:
  constexpr Runtime() = default;
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  // Starts the runtime unless that was done; returns kFreehold or kLibc. `environment` is the
  // environment block if the caller knows it, else null.
  Server EnsureStarted(const char* const* environment = nullptr) {
    // Acquire pairs with the release that publishes the heap.
    const Server server = server_.load(std::memory_order_acquire);
    return server >= Server::kFreehold ? server : Start(environment);
  }
  // The same without starting anything.
  Server server() const { return server_.load(std::memory_order_acquire); }

  // REQUIRES: EnsureStarted() returned a value.
  const Config& config() const { return config_; }
  // REQUIRES: EnsureStarted() returned kFreehold.
  allocator::ObjectHeap& heap() const { return *heap_; }
  // REQUIRES: has_space().
  vm::AddressSpace& space() const { return *space_; }
  // REQUIRES, as the next one: EnsureStarted() returned a value.
  bool has_space() const { return space_ != nullptr; }
  // Null if the mmap family is the kernel's.
  ProcessMappings* mappings() { return serves_mappings_ ? &mappings_ : nullptr; }
  // REQUIRES: has_space().
  ProcessMemoryLimit& limit() { return limit_; }
  // The process's heap, as the limit knows it; null if there is none.
  LimitedHeap* limited_heap() { return heap_ != nullptr ? &limited_heap_ : nullptr; }
  vm::os::Kernel& kernel() { return kernel_; }

 private:
  Server Start(const char* const* environment);
  Server StartFreehold();
  bool StartSpace();
  bool StartHeap();
  // Replaces kCgroupLimit in config_.
  void ResolveLimits();

  std::atomic<Server> server_{Server::kUndecided};  // written by the thread that starts the runtime
  Config config_;
  vm::AddressSpace* space_ = nullptr;
  allocator::ObjectHeap* heap_ = nullptr;
  ProcessMappings mappings_;
  bool serves_mappings_ = false;
  ProcessMemoryLimit limit_;
  LimitedHeap limited_heap_;
  vm::os::LinuxKernel kernel_;
  Telemetry telemetry_;
};

// This process's.
extern constinit Runtime process_runtime;

// How much to reserve, given that the configuration asks for `wanted`, that the process may have
// `limit` bytes of address space (RLIM_INFINITY: any number) and uses `used`: three quarters of
// what the limit leaves, so that stacks, libraries and file mappings have room too.
vm::Bytes ReserveWithin(vm::Bytes wanted, std::uint64_t limit, std::uint64_t used);

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_RUNTIME_H_
