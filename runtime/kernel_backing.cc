#include "runtime/kernel_backing.h"

#include <sys/mman.h>

#include <bit>
#include <new>

#include "vm/os/raw_syscall.h"

namespace freehold::runtime {

using vm::Error;
using vm::PageRange;
using vm::os::Protection;
using vm::os::RawSyscall;
using vm::os::SyscallErrno;
using vm::os::SyscallFailed;

// ---- KernelBacking ----

void KernelBacking::Begin(const Source& source, bool shared) {
  source_ = source;
  shared_ = shared;
}

Error KernelBacking::Install(vm::os::Kernel& kernel, PageRange range, std::uint64_t, Protection, bool occupied) {
  if (!has_source()) return {vm::ErrorCode::kNoRoom};
  const long result = RawSyscall(SYS_mremap, source_.address, source_.length, range.bytes().value,
                                 source_.flags | MREMAP_MAYMOVE | MREMAP_FIXED, range.address());
  if (!SyscallFailed(result)) {
    ForgetSource();
    return Error::Ok();
  }
  // Linux may have unmapped what was there: close the hole before somebody else's mmap falls into it. MS_ASYNC does
  // nothing but say whether there is one.
  const bool hole =
      SyscallFailed(RawSyscall(SYS_msync, range.address(), range.bytes().value, MS_ASYNC));
  if (hole || !occupied) (void)kernel.Reset(range);
  return Error::System(SyscallErrno(result));
}

// As Linux's MAP_POPULATE: copies what may be written privately.
Error KernelBacking::Populate(vm::os::Kernel& kernel, PageRange range, Protection protection) {
  const bool copies = !shared_ && Has(protection, Protection::kWrite);
  return kernel.FaultIn(range, copies ? vm::os::Access::kWrite : vm::os::Access::kRead);
}

Error KernelBacking::Sync(vm::os::Kernel& kernel, PageRange range, vm::os::SyncOptions options) {
  return kernel.Sync(range, options);
}

void KernelBacking::OnUnused() { pool_.ReturnLater(this); }

// ---- KernelBackingPool ----

KernelBacking* KernelBackingPool::Take(vm::AddressSpace& space) {
  KernelBacking* storage = Storage(space);
  if (storage == nullptr) return nullptr;
  if (KernelBacking* backing = TakeFree(storage)) return backing;
  // Some may be free by now.
  space.epochs().Poll();
  return TakeFree(storage);
}

KernelBacking* KernelBackingPool::Storage(vm::AddressSpace& space) {
  // Acquire and release: who gets the storage also sees the space.
  if (KernelBacking* storage = storage_.load(std::memory_order_acquire)) return storage;
  space_.store(&space, std::memory_order_relaxed);
  const vm::Result<PageRange> memory = space.Map(vm::PagesFor({kBackings * sizeof(KernelBacking)}));
  if (!memory.ok()) return nullptr;
  auto* storage = reinterpret_cast<KernelBacking*>(memory->address());
  KernelBacking* others = nullptr;
  if (storage_.compare_exchange_strong(others, storage, std::memory_order_acq_rel)) return storage;
  (void)space.Unmap(*memory);
  return others;
}

KernelBacking* KernelBackingPool::TakeFree(KernelBacking* storage) {
  for (std::size_t word = 0; word < kBackings / kWordBits; ++word) {
    std::uint64_t used = used_[word].load(std::memory_order_relaxed);
    while (~used != 0) {
      const auto bit = static_cast<unsigned>(std::countr_one(used));
      // Acquire pairs with the release in Return: whoever had it is done with it.
      if (used_[word].compare_exchange_weak(used, used | std::uint64_t{1} << bit, std::memory_order_acquire)) {
        return new (storage + word * kWordBits + bit) KernelBacking(*this);
      }
    }
  }
  return nullptr;
}

void KernelBackingPool::ReturnLater(KernelBacking* backing) {
  space_.load(std::memory_order_relaxed)->epochs().Defer(backing, [](vm::sync::DeferredCallback* node) {
    auto* unused = static_cast<KernelBacking*>(node);
    unused->pool_.Return(unused);
  });
}

void KernelBackingPool::Return(KernelBacking* backing) {
  const auto index = static_cast<std::size_t>(backing - storage_.load(std::memory_order_relaxed));
  used_[index / kWordBits].fetch_and(~(std::uint64_t{1} << index % kWordBits), std::memory_order_release);
}

}  // namespace freehold::runtime
