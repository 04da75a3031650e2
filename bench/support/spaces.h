// The same few verbs on memory from the kernel and from an AddressSpace, so that one benchmark
// template measures both. Calls are direct and inlined down to the system call or the
// AddressSpace's own function. What fails ends the program: a benchmark has nothing to fall back
// to.
//
// Thread safety: thread-safe, as what they stand for.
// Units:         bytes, multiples of the page size.
#ifndef FREEHOLD_BENCH_SUPPORT_SPACES_H_
#define FREEHOLD_BENCH_SUPPORT_SPACES_H_

#include <benchmark/benchmark.h>

#include <cstddef>

#include "bench/support/kernel_memory.h"
#include "vm/address_space.h"

namespace freehold::bench {

// The kernel's own address space of this process: the baseline.
class KernelSpace {
 public:
  static constexpr const char* kName = "kernel";
  // Whether unmapped memory stays resident for re-use until PurgeUnmapped().
  static constexpr bool kKeepsUnmapped = false;

  std::byte* Map(std::size_t bytes) { return KernelMap(bytes); }
  std::byte* MapPopulated(std::size_t bytes) { return KernelMap(bytes, MAP_POPULATE); }
  void Unmap(std::byte* memory, std::size_t bytes) { KernelUnmap(memory, bytes); }
  void Populate(std::byte* memory, std::size_t bytes) {
    KernelAdvise(memory, bytes, MADV_POPULATE_WRITE);
  }
  void Discard(std::byte* memory, std::size_t bytes) { KernelAdvise(memory, bytes, MADV_DONTNEED); }
  void ProtectNone(std::byte* memory, std::size_t bytes) {
    KernelProtect(memory, bytes, PROT_NONE);
  }
  void ProtectReadWrite(std::byte* memory, std::size_t bytes) {
    KernelProtect(memory, bytes, PROT_READ | PROT_WRITE);
  }
};

// An AddressSpace of its own with default options but for the lock policy.
template <vm::sync::LockPolicy policy>
class AddressSpaceOf {
 public:
  static constexpr const char* kName =
      policy == vm::sync::LockPolicy::kCoarse ? "coarse"
      : policy == vm::sync::LockPolicy::kTree ? "tree"
                                              : "freehold";
  static constexpr bool kKeepsUnmapped = true;

  AddressSpaceOf() : space_(CreateSpace(policy)) {}
  ~AddressSpaceOf() { vm::AddressSpace::Destroy(space_); }
  AddressSpaceOf(const AddressSpaceOf&) = delete;
  AddressSpaceOf& operator=(const AddressSpaceOf&) = delete;

  std::byte* Map(std::size_t bytes) { return MapWith(bytes, {}); }
  std::byte* MapPopulated(std::size_t bytes) { return MapWith(bytes, {.populate = true}); }
  std::byte* MapHugePopulated(std::size_t bytes) {
    return MapWith(bytes, {.huge_pages = vm::os::HugePages::kPrefer, .populate = true});
  }
  void Unmap(std::byte* memory, std::size_t bytes) {
    Require(space_->Unmap(RangeOf(memory, bytes)), "Unmap");
  }
  void Populate(std::byte* memory, std::size_t bytes) {
    Require(space_->Populate(RangeOf(memory, bytes)).error(), "Populate");
  }
  void Discard(std::byte* memory, std::size_t bytes) {
    const vm::PageRange range = RangeOf(memory, bytes);
    Require(space_->Discard({&range, 1}), "Discard");
  }
  void ProtectNone(std::byte* memory, std::size_t bytes) {
    Require(space_->Protect(RangeOf(memory, bytes), vm::os::Protection::kNone), "Protect");
  }
  void ProtectReadWrite(std::byte* memory, std::size_t bytes) {
    Require(space_->Protect(RangeOf(memory, bytes), vm::os::Protection::kReadWrite), "Protect");
  }
  // To where nothing is mapped.
  void Move(std::byte* from, std::byte* to, std::size_t bytes) {
    Require(space_
                ->Remap(RangeOf(from, bytes), vm::PagesFor({bytes}),
                        {.placement = vm::Placement::kFixed, .address = to})
                .error(),
            "Remap");
  }
  void PurgeUnmapped() { space_->Purge(vm::PurgeScope::kAll); }

  vm::AddressSpace& space() { return *space_; }

 private:
  static vm::AddressSpace* CreateSpace(vm::sync::LockPolicy lock_policy);

  static vm::PageRange RangeOf(std::byte* memory, std::size_t bytes) {
    return vm::PageRange::FromBytes(memory, {bytes});
  }

  // Ends the program when `error` is one.
  static void Require(vm::Error error, const char* verb) {
    if (!error.ok()) [[unlikely]]
      Die(error, verb);
  }
  [[noreturn]] static void Die(vm::Error error, const char* verb);

  std::byte* MapWith(std::size_t bytes, const vm::MapOptions& options) {
    const vm::Result<vm::PageRange> range = space_->Map(vm::PagesFor({bytes}), options);
    Require(range.error(), "Map");
    return range->address();
  }

  vm::AddressSpace* space_;
};

// The product; the product under one lock for the whole space, the model of mmap_lock; and with an interval tree of
// held ranges, the model of what was once proposed for Linux.
using FreeholdSpace = AddressSpaceOf<vm::sync::LockPolicy::kAdaptive>;
using CoarseSpace = AddressSpaceOf<vm::sync::LockPolicy::kCoarse>;
using TreeSpace = AddressSpaceOf<vm::sync::LockPolicy::kTree>;

// One fresh `Space` per run of a case, shared by its threads: SetUp and TearDown go into
// CaseOptions.
template <typename Space>
class PerRun {
 public:
  static void SetUp(const benchmark::State&) { space_ = new Space; }
  static void TearDown(const benchmark::State&) {
    delete space_;
    space_ = nullptr;
  }
  static Space& Get() { return *space_; }

 private:
  static inline Space* space_ = nullptr;
};

}  // namespace freehold::bench

#endif  // FREEHOLD_BENCH_SUPPORT_SPACES_H_
