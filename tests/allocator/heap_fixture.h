// An address space and an object heap for one test, on the real kernel or on a FakeKernel.
#ifndef FREEHOLD_TESTS_ALLOCATOR_HEAP_FIXTURE_H_
#define FREEHOLD_TESTS_ALLOCATOR_HEAP_FIXTURE_H_

#include <sched.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>

#include "allocator/object_heap.h"
#include "gtest/gtest.h"
#include "vm/address_space.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/kernel.h"
#include "vm/os/linux_kernel.h"
#include "vm/units.h"

namespace freehold::allocator {

// Owns a space and a heap; both go at the end of the test.
class TestHeap {
 public:
  explicit TestHeap(const ObjectHeapOptions& options = {}) : TestHeap(real_, options) {}
  TestHeap(vm::os::Kernel& kernel, const ObjectHeapOptions& options,
           vm::Bytes reserve = vm::GiB(8)) {
    const auto space =
        vm::AddressSpace::Create(kernel, {.reserve = reserve, .min_reserve = vm::MiB(64)});
    if (!space.ok()) return;
    space_ = *space;
    const auto heap = ObjectHeap::Create(*space_, options);
    if (heap.ok()) heap_ = *heap;
  }
  TestHeap(const TestHeap&) = delete;
  TestHeap& operator=(const TestHeap&) = delete;
  ~TestHeap() {
    if (heap_ != nullptr) ObjectHeap::Destroy(heap_);
    if (space_ != nullptr) vm::AddressSpace::Destroy(space_);
  }

  bool ok() const { return heap_ != nullptr; }
  ObjectHeap& operator*() const { return *heap_; }
  ObjectHeap* operator->() const { return heap_; }
  vm::AddressSpace& space() const { return *space_; }

 private:
  vm::os::LinuxKernel real_;
  vm::AddressSpace* space_ = nullptr;
  ObjectHeap* heap_ = nullptr;
};

// Keeps the calling thread, and those that it starts, on the CPU it runs on while in scope: the page heap's
// shards go by CPU, so how much a heap maps depends on where its threads run.
class OnOneCpu {
 public:
  OnOneCpu() {
    EXPECT_EQ(sched_getaffinity(0, sizeof(allowed_), &allowed_), 0);
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    EXPECT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  }
  OnOneCpu(const OnOneCpu&) = delete;
  OnOneCpu& operator=(const OnOneCpu&) = delete;
  ~OnOneCpu() { sched_setaffinity(0, sizeof(allowed_), &allowed_); }

 private:
  cpu_set_t allowed_;
};

// The calling thread's cache while in scope.
class AttachedThread {
 public:
  explicit AttachedThread(ObjectHeap& heap) : heap_(heap), cache_(heap.AttachThread()) {}
  AttachedThread(const AttachedThread&) = delete;
  AttachedThread& operator=(const AttachedThread&) = delete;
  ~AttachedThread() {
    if (cache_ != nullptr) heap_.DetachThread(cache_);
  }

  ThreadCache& operator*() const { return *cache_; }
  ThreadCache* operator->() const { return cache_; }
  ThreadCache* get() const { return cache_; }

 private:
  ObjectHeap& heap_;
  ThreadCache* cache_;
};

// Makes heaps, in each of which another system call fails, until none does. Returns how many there were, all of which
// serve, that are without what `has(heap)` tells of.
template <typename Has>
std::size_t HeapsWithout(const ObjectHeapOptions& options, Has has) {
  std::size_t without = 0;
  bool failed = true;
  for (std::size_t n = 1; failed; ++n) {
    vm::os::FakeKernel kernel;
    const auto space = vm::AddressSpace::Create(kernel, {.reserve = vm::GiB(4), .min_reserve = vm::MiB(64)});
    if (!space.ok()) {
      ADD_FAILURE() << "no space";
      return 0;
    }
    kernel.FailNthOfAny(n, ENOMEM);
    const auto heap = ObjectHeap::Create(**space, options);
    failed = kernel.InjectedFailures() != 0;
    kernel.StopFailing();
    if (heap.ok()) {
      if (!has(**heap)) ++without;
      {
        const AttachedThread cache(**heap);
        void* p = cache->Allocate(100);
        EXPECT_NE(p, nullptr);
        cache->Free(p);
        (*heap)->CheckInvariants();
      }
      ObjectHeap::Destroy(*heap);
    }
    vm::AddressSpace::Destroy(*space);
  }
  return without;
}

// Content that tells its place and its object: `seed` differs between objects.
inline void Fill(void* p, std::size_t size, std::uint64_t seed) {
  auto* bytes = static_cast<unsigned char*>(p);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<unsigned char>(seed + i * 7);
}
inline bool HasContent(const void* p, std::size_t size, std::uint64_t seed) {
  const auto* bytes = static_cast<const unsigned char*>(p);
  for (std::size_t i = 0; i < size; ++i) {
    if (bytes[i] != static_cast<unsigned char>(seed + i * 7)) return false;
  }
  return true;
}
inline bool IsZero(const void* p, std::size_t size) {
  const auto* bytes = static_cast<const unsigned char*>(p);
  for (std::size_t i = 0; i < size; ++i) {
    if (bytes[i] != 0) return false;
  }
  return true;
}
inline bool IsAligned(const void* p, std::size_t alignment) {
  return reinterpret_cast<std::uintptr_t>(p) % alignment == 0;
}

}  // namespace freehold::allocator

#endif  // FREEHOLD_TESTS_ALLOCATOR_HEAP_FIXTURE_H_
