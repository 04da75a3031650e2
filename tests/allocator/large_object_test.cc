#include "allocator/large_object.h"

#include <cstdint>
#include <vector>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"
#include "vm/os/fake_kernel.h"

namespace freehold::allocator {
namespace {

constexpr std::size_t KiB(std::size_t n) { return n << 10; }
constexpr std::size_t MiB(std::size_t n) { return n << 20; }

class LargeObjectTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(heap_.ok() && cache_.get() != nullptr); }

  // One CPU, so that placement is the same every time.
  vm::os::FakeKernel kernel_{{.cpu_count = 1}};
  TestHeap heap_{kernel_, {}};
  AttachedThread cache_{*heap_};
};

TEST_F(LargeObjectTest, SizesAreExactToThePage) {
  for (const std::size_t size : {kMaxClassSize + 1, KiB(129), KiB(500), MiB(1), MiB(1) + 1, MiB(7) + 123}) {
    void* p = cache_->Allocate(size);
    ASSERT_NE(p, nullptr);
    EXPECT_TRUE(IsAligned(p, vm::kPageSize));
    EXPECT_EQ(heap_->UsableSize(p), vm::PagesFor({size}).bytes().value);
    Fill(p, size, 5);
    EXPECT_TRUE(HasContent(p, size, 5));
    cache_->Free(p);
  }
  EXPECT_EQ(heap_->Stats().large_objects, 0u);
  EXPECT_EQ(heap_->Stats().large.value, 0u);
}

TEST_F(LargeObjectTest, ImpossibleSizesAreRefused) {
  for (const std::size_t size : {std::size_t{SIZE_MAX}, std::size_t{PTRDIFF_MAX}, std::size_t{PTRDIFF_MAX} + 1,
                                 heap_.space().reservation().bytes().value, MiB(1) << 24}) {
    EXPECT_EQ(cache_->Allocate(size), nullptr);
    EXPECT_EQ(cache_->AllocateZeroed(size), nullptr);
    EXPECT_EQ(cache_->AllocateAligned(64, size), nullptr);
    EXPECT_EQ(cache_->AllocateAligned(MiB(1), size), nullptr);
    void* p = cache_->Allocate(10);
    EXPECT_EQ(cache_->Reallocate(p, size), nullptr);
    cache_->Free(p);
    p = cache_->Allocate(MiB(2));
    Fill(p, 100, 1);
    EXPECT_EQ(cache_->Reallocate(p, size), nullptr);
    EXPECT_TRUE(HasContent(p, 100, 1));
    cache_->Free(p);
  }
}

TEST_F(LargeObjectTest, AnyPowerOfTwoAlignment) {
  std::vector<void*> objects;
  for (std::size_t alignment = 1; alignment <= MiB(256); alignment *= 2) {
    for (const std::size_t size : {std::size_t{1}, std::size_t{1000}, KiB(200), MiB(3)}) {
      void* p = cache_->AllocateAligned(alignment, size);
      ASSERT_NE(p, nullptr) << alignment << " " << size;
      EXPECT_TRUE(IsAligned(p, alignment));
      EXPECT_GE(heap_->UsableSize(p), size);
      Fill(p, size, alignment);
      objects.push_back(p);
    }
  }
  for (void* p : objects) cache_->Free(p);
}

TEST_F(LargeObjectTest, ZeroedMemoryIsZeroHoweverItWasUsed) {
  for (const std::size_t size : {KiB(130), KiB(700), MiB(1), MiB(2), MiB(9)}) {
    for (int round = 0; round < 4; ++round) {
      void* p = cache_->AllocateZeroed(size);
      ASSERT_TRUE(IsZero(p, size)) << size;
      Fill(p, size, 3);
      cache_->Free(p);
    }
  }
}

TEST_F(LargeObjectTest, GrowsInPlaceWhereNothingIsBehind) {
  void* p = cache_->Allocate(MiB(2));
  Fill(p, MiB(2), 9);
  std::size_t size = MiB(2);
  while (size < MiB(512)) {
    size += size / 4;
    ASSERT_EQ(cache_->Reallocate(p, size), p);
    EXPECT_GE(heap_->UsableSize(p), size);
    static_cast<char*>(p)[size - 1] = 1;
  }
  EXPECT_TRUE(HasContent(p, MiB(2), 9));
  cache_->Free(p);
  EXPECT_EQ(heap_->Stats().large.value, 0u);
}

TEST_F(LargeObjectTest, MovesOnceThenGrowsInPlaceBetweenNeighbours) {
  void* p = cache_->Allocate(MiB(2));
  Fill(p, MiB(2), 9);
  void* neighbour = cache_->Allocate(MiB(2));
  void* moved = cache_->Reallocate(p, MiB(3));
  ASSERT_NE(moved, nullptr);
  EXPECT_TRUE(HasContent(moved, MiB(2), 9));
  void* second_neighbour = cache_->Allocate(MiB(2));
  EXPECT_EQ(cache_->Reallocate(moved, MiB(5)), moved);  // the address space that it was given for this
  EXPECT_TRUE(HasContent(moved, MiB(2), 9));
  cache_->Free(moved);
  cache_->Free(neighbour);
  cache_->Free(second_neighbour);
}

TEST_F(LargeObjectTest, ShrinkGivesTheTailBack) {
  void* p = cache_->Allocate(MiB(64));
  Fill(p, MiB(8), 2);
  const std::size_t mapped = heap_->Stats().mapped.value;
  ASSERT_EQ(cache_->Reallocate(p, MiB(8)), p);
  EXPECT_EQ(heap_->UsableSize(p), MiB(8));
  EXPECT_EQ(heap_->Stats().mapped.value, mapped - MiB(56));
  EXPECT_TRUE(HasContent(p, MiB(8), 2));
  ASSERT_EQ(cache_->Reallocate(p, KiB(300)), p);
  EXPECT_TRUE(HasContent(p, KiB(300), 2));
  cache_->Free(p);
}

TEST_F(LargeObjectTest, RunsGrowAndShrinkWithinTheirChunk) {
  void* p = cache_->Allocate(KiB(200));
  Fill(p, KiB(200), 4);
  ASSERT_EQ(cache_->Reallocate(p, KiB(900)), p);
  EXPECT_TRUE(HasContent(p, KiB(200), 4));
  void* behind = cache_->Allocate(KiB(150));
  ASSERT_EQ(cache_->Reallocate(p, KiB(500)), p);
  void* in_tail = cache_->Allocate(KiB(150));
  EXPECT_GT(in_tail, p);
  EXPECT_LT(in_tail, behind);
  EXPECT_TRUE(HasContent(p, KiB(200), 4));
  void* moved = cache_->Reallocate(p, MiB(4));
  EXPECT_NE(moved, p);
  EXPECT_TRUE(HasContent(moved, KiB(200), 4));
  cache_->Free(moved);
  cache_->Free(behind);
  cache_->Free(in_tail);
  EXPECT_EQ(heap_->Stats().large_objects, 0u);
}

TEST_F(LargeObjectTest, BuffersAreReusedWithoutKernelCalls) {
  void* first = cache_->Allocate(MiB(10));
  Fill(first, MiB(10), 1);
  cache_->Free(first);
  EXPECT_EQ(cache_->Allocate(MiB(10)), first);
  cache_->Free(first);
}

}  // namespace
}  // namespace freehold::allocator
