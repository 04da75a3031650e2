// Every kernel call fails once: allocations return null, nothing is lost, and the heap goes on.
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"
#include "tests/allocator/heap_model.h"
#include "vm/os/fake_kernel.h"

namespace freehold::allocator {
namespace {

TEST(OutOfMemoryTest, CreateFailsAndLeavesNothing) {
  vm::os::FakeKernel kernel;
  const auto space = vm::AddressSpace::Create(kernel, {.reserve = vm::GiB(4), .min_reserve = vm::MiB(64)});
  ASSERT_TRUE(space.ok());
  const vm::Pages reserved = kernel.ReservedPages();
  for (std::size_t n = 1;; ++n) {
    const std::size_t before = kernel.InjectedFailures();
    kernel.FailNthOfAny(n, ENOMEM);
    const auto heap = ObjectHeap::Create(**space);
    kernel.StopFailing();
    if (kernel.InjectedFailures() == before) {
      ASSERT_TRUE(heap.ok());
      ObjectHeap::Destroy(*heap);
      break;
    }
    EXPECT_FALSE(heap.ok());
    EXPECT_EQ(kernel.ReservedPages(), reserved);
  }
  vm::AddressSpace::Destroy(*space);
}

// A fixed list of operations that reaches every kernel call of the heap: attach, spans of all kinds, large
// objects that move and grow, trim.
std::vector<ModelOperation> Script() {
  using Kind = ModelOperation::Kind;
  std::vector<ModelOperation> script;
  std::size_t slot = 0;
  for (const std::size_t size :
       {std::size_t{10}, std::size_t{3000}, std::size_t{60000}, std::size_t{200000}, std::size_t{3} << 20}) {
    for (int i = 0; i < 6; ++i) {
      script.push_back({.kind = i % 2 == 0 ? Kind::kAllocate : Kind::kAllocateZeroed, .slot = slot++, .size = size});
    }
  }
  script.push_back({.kind = Kind::kAllocateAligned, .slot = slot++, .size = 100, .alignment = 1 << 21});
  script.push_back({.kind = Kind::kAllocateAligned, .slot = slot++, .size = 5 << 20, .alignment = 1 << 22});
  for (const std::size_t size : {std::size_t{4} << 20, std::size_t{9} << 20, std::size_t{1} << 20}) {
    for (std::size_t i = 0; i < slot; i += 4) {
      script.push_back({.kind = Kind::kReallocate, .slot = i, .size = size});
    }
  }
  for (std::size_t i = 0; i < slot; i += 2) script.push_back({.kind = Kind::kFree, .slot = i});
  script.push_back({.kind = Kind::kTrim, .slot = 0});
  for (std::size_t i = 0; i < slot; i += 3) {
    script.push_back({.kind = Kind::kAllocate, .slot = i, .size = 100000 * i});
  }
  script.push_back({.kind = Kind::kReattach, .slot = 0});
  return script;
}

TEST(OutOfMemoryTest, EveryKernelCallMayFail) {
  const std::vector<ModelOperation> script = Script();
  for (std::size_t n = 1;; ++n) {
    SCOPED_TRACE(n);
    vm::os::FakeKernel kernel;
    TestHeap heap(kernel, {.shards = 2}, vm::GiB(1));
    ASSERT_TRUE(heap.ok());
    kernel.FailNthOfAny(n, ENOMEM);
    ModelExchange exchange;
    {
      HeapModel model(*heap, exchange, /*may_fail=*/true);
      for (const ModelOperation& operation : script) {
        ASSERT_EQ(model.Perform(operation), "") << operation.ToString();
      }
      heap->CheckInvariants();
      // Everything works again.
      kernel.StopFailing();
      ASSERT_EQ(model.Perform({.kind = ModelOperation::Kind::kAllocate, .slot = 0, .size = 1000}), "");
      ASSERT_EQ(model.Finish(), "");
    }
    EXPECT_EQ(heap->Stats().allocated.value, 0u);
    heap->Trim();
    heap->CheckInvariants();
    if (kernel.InjectedFailures() == 0) break;
    ASSERT_LT(n, 500u);
  }
}

// As under vm.overcommit_memory=2, which lends memory by the piece.
TEST(OutOfMemoryTest, CommitLimit) {
  vm::os::FakeKernel kernel;
  TestHeap heap(kernel, {}, vm::GiB(4));
  AttachedThread cache(*heap);
  ASSERT_NE(cache.get(), nullptr);
  kernel.FailProtectBeyond(vm::MiB(200));
  std::vector<void*> objects;
  while (void* p = cache->Allocate(10000)) objects.push_back(p);
  EXPECT_EQ(cache->Allocate(std::size_t{300} << 20), nullptr);
  heap->CheckInvariants();
  for (void* p : objects) cache->Free(p);
  EXPECT_NE(cache->Allocate(10000), nullptr);
}

}  // namespace
}  // namespace freehold::allocator
