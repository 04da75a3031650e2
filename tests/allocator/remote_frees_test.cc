#include "allocator/remote_frees.h"

#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"

namespace freehold::allocator {
namespace {

// A span of objects in the test's own memory.
class MessageTest : public testing::TestWithParam<std::size_t> {
 protected:
  void SetUp() override {
    span_.size_class = ClassOf(GetParam());
    span_.start = AddressOf(memory_.data());
    span_.reciprocal = info().reciprocal;
  }
  const SizeClassInfo& info() const { return kSizeClasses[span_.size_class]; }
  FreeObject* At(std::size_t number) {
    return reinterpret_cast<FreeObject*>(memory_.data() + number * info().size);
  }
  ObjectChain MakeChain(const std::vector<std::size_t>& numbers) {
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      code_.Link(At(numbers[i]), i + 1 < numbers.size() ? At(numbers[i + 1]) : code_.end());
    }
    return {.first = At(numbers.front()),
            .last = At(numbers.back()),
            .count = static_cast<std::uint32_t>(numbers.size())};
  }

  alignas(16) FreeObject end_ = {};
  LinkCode code_{0x123456789abcdef0, &end_};
  std::vector<std::uint64_t> storage_ = std::vector<std::uint64_t>(kMaxSpanUnits * kUnitSize / 8 + 2);
  struct View {
    std::byte* begin;
    std::byte* data() const { return begin; }
  } memory_{reinterpret_cast<std::byte*>((AddressOf(storage_.data()) + 15) & ~std::uintptr_t{15})};
  Span span_;
};

INSTANTIATE_TEST_SUITE_P(Sizes, MessageTest, testing::Values(32, 48, 1024, 8192, 131072));

TEST_P(MessageTest, ChainComesOutAsItWentIn) {
  const ObjectChain chain = MakeChain({2, 0, 3, 1});
  MakeMessage(code_, &span_, chain);
  code_.Link(chain.first, At(3));  // the list of messages
  const ObjectChain opened = OpenMessage(code_, &span_, chain.first);
  EXPECT_EQ(opened.first, chain.first);
  EXPECT_EQ(opened.last, chain.last);
  EXPECT_EQ(opened.count, 4u);
  std::vector<FreeObject*> objects;
  for (FreeObject* object = opened.first; object != code_.end(); object = code_.Next(object)) {
    objects.push_back(object);
  }
  EXPECT_EQ(objects, (std::vector<FreeObject*>{At(2), At(0), At(3), At(1)}));
}

TEST_P(MessageTest, SingleObject) {
  const ObjectChain chain = MakeChain({3});
  MakeMessage(code_, &span_, chain);
  code_.Link(chain.first, code_.end());
  const ObjectChain opened = OpenMessage(code_, &span_, chain.first);
  EXPECT_EQ(opened.first, At(3));
  EXPECT_EQ(opened.last, At(3));
  EXPECT_EQ(opened.count, 1u);
}

TEST_P(MessageTest, OverwrittenMessageIsRecognized) {
  for (const std::uint64_t damage : {std::uint64_t{0}, ~std::uint64_t{0}, std::uint64_t{0x4141414141414141}}) {
    const ObjectChain chain = MakeChain({0, 1, 2});
    MakeMessage(code_, &span_, chain);
    auto* words = reinterpret_cast<std::uint64_t*>(chain.first);
    words[2] = words[3] = damage;
    EXPECT_EQ(OpenMessage(code_, &span_, chain.first).count, 0u);
  }
}

TEST(SmallestMessageTest, ObjectsOf16BytesTravelAlone) {
  const OnOneCpu on_one_cpu;
  TestHeap heap;
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  for (int i = 0; i < 50000; ++i) objects.push_back(cache->Allocate(16));
  std::thread([&] {
    AttachedThread other(*heap);
    for (void* p : objects) other->Free(p);
  }).join();
  const std::size_t mapped = heap->Stats().mapped.value;
  for (void*& p : objects) p = cache->Allocate(16);
  EXPECT_EQ(heap->Stats().mapped.value, mapped);
  for (void* p : objects) cache->Free(p);
  heap->CheckInvariants();
}

// Objects of many owners and spans at once, more than there is room to gather.
TEST(RemoteFreesTest, ManyOwnersAndSpans) {
  constexpr int kOwners = 50;
  TestHeap heap;
  std::vector<ThreadCache*> owners;
  std::vector<void*> objects;
  for (int i = 0; i < kOwners; ++i) owners.push_back(heap->AttachThread());
  for (int i = 0; i < 20000; ++i) objects.push_back(owners[i * 7 % kOwners]->Allocate(16 + i * 13 % 3000));
  std::thread([&] {
    AttachedThread other(*heap);
    for (void* p : objects) other->Free(p);
  }).join();
  for (ThreadCache* owner : owners) heap->DetachThread(owner);
  EXPECT_EQ(heap->Stats().allocated.value, 0u);
  EXPECT_EQ(heap->Stats().active.value, 0u);
  heap->CheckInvariants();
}

}  // namespace
}  // namespace freehold::allocator
