// Mappings that the kernel made elsewhere and that were moved into the address space, because a program wants them at
// an address there: files, shared memory, huge pages, whatever MAP_FIXED or MREMAP_FIXED may put over memory that
// Freehold serves. The space knows that something is there and has it reset when it goes; what it is, the kernel knows.
#ifndef FREEHOLD_RUNTIME_KERNEL_BACKING_H_
#define FREEHOLD_RUNTIME_KERNEL_BACKING_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "vm/address_space.h"
#include "vm/backing.h"
#include "vm/sync/epoch.h"

namespace freehold::runtime {

class KernelBackingPool;

// One of them, and its parts.
class KernelBacking final : public vm::Backing, private vm::sync::DeferredCallback {
 public:
  explicit KernelBacking(KernelBackingPool& pool) : Backing(vm::os::Protection::kReadWriteExec), pool_(pool) {}

  // What the next Install moves into its range: a mapping of `length` bytes, by mremap(2) with `flags` besides
  // MREMAP_MAYMOVE and MREMAP_FIXED.
  struct Source {
    void* address = nullptr;
    std::size_t length = 0;
    int flags = 0;
  };
  void Begin(const Source& source, bool shared);
  // False once it was moved.
  bool has_source() const { return source_.address != nullptr; }
  // Without one, what needs an Install is refused: growing in place, and being put back.
  void ForgetSource() { source_ = {}; }

  vm::Error Install(vm::os::Kernel& kernel, vm::PageRange range, std::uint64_t page, vm::os::Protection protection,
                    bool occupied) override;
  void Flush(vm::os::Kernel&, vm::PageRange, std::uint64_t) override {}
  vm::Error Populate(vm::os::Kernel& kernel, vm::PageRange range, vm::os::Protection protection) override;
  vm::Error Sync(vm::os::Kernel& kernel, vm::PageRange range, vm::os::SyncOptions options) override;
  vm::BackingDescription Describe() const override { return {.shared = shared_, .name = {}}; }

 private:
  friend class KernelBackingPool;

  void OnUnused() override;

  KernelBackingPool& pool_;
  Source source_;  // of the thread that maps
  bool shared_ = false;
};

// As many as Linux gives a process kernel VMAs, or fewer. Without a lock, so that a fork in the middle does no harm.
//
// Thread safety: thread-safe.
// Allocation:    from the space, once, at the first Take.
class KernelBackingPool {
 public:
  static constexpr std::size_t kBackings = std::size_t{1} << 14;

  constexpr KernelBackingPool() = default;
  KernelBackingPool(const KernelBackingPool&) = delete;
  KernelBackingPool& operator=(const KernelBackingPool&) = delete;

  // Null when all are in use.
  KernelBacking* Take(vm::AddressSpace& space);
  // Free again when those who look at it have left.
  void ReturnLater(KernelBacking* backing);

 private:
  static constexpr std::size_t kWordBits = 64;

  KernelBacking* Storage(vm::AddressSpace& space);
  KernelBacking* TakeFree(KernelBacking* storage);
  void Return(KernelBacking* backing);

  std::atomic<KernelBacking*> storage_{nullptr};
  std::atomic<vm::AddressSpace*> space_{nullptr};
  std::atomic<std::uint64_t> used_[kBackings / kWordBits] = {};  // a bit each
};

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_KERNEL_BACKING_H_
