#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"
#include "tests/allocator/heap_model.h"

namespace freehold::allocator {
namespace {

#if defined(FREEHOLD_DEBUG_CHECKS)
constexpr int kOperations = 20000;
#else
constexpr int kOperations = 200000;
#endif

// More seeds than the default few for long runs, and others: FREEHOLD_MODEL_SEEDS=COUNT, FREEHOLD_MODEL_FIRST_SEED=N.
std::uint64_t FromEnvironment(const char* name, std::uint64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoull(value, nullptr, 10);
}
const std::uint64_t kFirstSeed = FromEnvironment("FREEHOLD_MODEL_FIRST_SEED", 1);
const std::uint64_t kEndSeed = kFirstSeed + FromEnvironment("FREEHOLD_MODEL_SEEDS", 4);

void ExpectEmpty(ObjectHeap& heap, ModelExchange& exchange) {
  for (const ModelObject& object : exchange.TakeAll()) {
    ASSERT_GE(heap.UsableSize(object.p), object.size);
    heap.Free(object.p);
  }
  const HeapStats stats = heap.Stats();
  EXPECT_EQ(stats.allocated.value, 0u);
  EXPECT_EQ(stats.active.value, 0u);
  EXPECT_EQ(stats.large_objects, 0u);
  EXPECT_EQ(stats.threads, 0u);
  heap.CheckInvariants();
}

TEST(ObjectHeapModelTest, OneThread) {
  for (std::uint64_t seed = kFirstSeed; seed < kEndSeed; ++seed) {
    TestHeap heap(ObjectHeapOptions{.decay = vm::Milliseconds(5)});
    ModelExchange exchange;
    {
      HeapModel model(*heap, exchange);
      ASSERT_EQ(model.Run(seed, kOperations), "");
      heap->CheckInvariants();
      ASSERT_EQ(model.Finish(), "");
    }
    ExpectEmpty(*heap, exchange);
  }
}

TEST(ObjectHeapModelTest, ThreadsThatExchangeObjects) {
  constexpr int kThreads = 4;
  for (std::uint64_t seed = kFirstSeed; seed < kEndSeed; ++seed) {
    TestHeap heap(ObjectHeapOptions{
        .decay = vm::Milliseconds(5), .shards = static_cast<unsigned>(seed % 3 + 1), .remote_batch = {1000}});
    ModelExchange exchange;
    std::vector<std::string> errors(kThreads);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        HeapModel model(*heap, exchange);
        errors[t] = model.Run(seed * 1000 + t, kOperations / 2);
        if (errors[t].empty()) errors[t] = model.Finish();
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::string& error : errors) ASSERT_EQ(error, "");
    ExpectEmpty(*heap, exchange);
  }
}

TEST(ObjectHeapModelTest, ThreadsThatComeAndGo) {
  constexpr int kThreads = 3;
  for (std::uint64_t seed = kFirstSeed; seed < kEndSeed; ++seed) {
    TestHeap heap(ObjectHeapOptions{.decay = vm::Milliseconds(2)});
    ModelExchange exchange;
    std::vector<std::string> errors(kThreads);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (int generation = 0; generation < 50 && errors[t].empty(); ++generation) {
          std::thread([&] {
            HeapModel model(*heap, exchange);
            errors[t] = model.Run(seed * 1000 + t * 100 + generation, kOperations / 100);
            if (errors[t].empty()) errors[t] = model.Finish();
          }).join();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::string& error : errors) ASSERT_EQ(error, "");
    ExpectEmpty(*heap, exchange);
  }
}

// The model notices what it is there to notice.
TEST(ObjectHeapModelTest, DamageIsNoticed) {
  TestHeap heap;
  ModelExchange exchange;
  HeapModel model(*heap, exchange);
  using Kind = ModelOperation::Kind;
  ASSERT_EQ(model.Perform({.kind = Kind::kAllocate, .slot = 0, .size = 100}), "");
  ASSERT_EQ(model.Perform({.kind = Kind::kExchange, .slot = 0, .size = 5}), "");
  ModelObject object = exchange.Swap(5, {});
  ASSERT_NE(object.p, nullptr);
  static_cast<char*>(object.p)[99] ^= 1;
  exchange.Swap(5, object);
  ASSERT_EQ(model.Perform({.kind = Kind::kExchange, .slot = 0, .size = 5}), "");
  EXPECT_EQ(model.Perform({.kind = Kind::kFree, .slot = 0}), "content is damaged");
}

}  // namespace
}  // namespace freehold::allocator
