// The process runtime used as the shim uses it, but beside the program's own malloc, so that
// sanitizers see it: start, threads and their ends, keeper, fork.
#include "runtime/runtime.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "runtime/config.h"
#include "runtime/fork.h"
#include "runtime/keeper.h"
#include "runtime/thread.h"

// Sanitizers leave little address space. The keeper's decay is short, for short tests.
extern constinit const freehold::runtime::Config freehold::runtime::program_config = {
    .reserve = freehold::vm::GiB(1),
    .decay = freehold::vm::Milliseconds(200),
};

namespace freehold::runtime {
namespace {

using allocator::ThreadCache;

template <typename Condition>
bool Eventually(Condition condition) {
  for (int i = 0; i < 1000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return false;
}

void* Allocate(std::size_t size) {
  if (ThreadCache* cache = CurrentThreadCache()) return cache->Allocate(size);
  const CacheLease lease;
  return lease.get()->Allocate(size);
}

void Free(void* p) {
  if (ThreadCache* cache = CurrentThreadCache()) return cache->Free(p);
  process_runtime.heap().Free(p);
}

void Churn(int rounds) {
  std::vector<void*> blocks;
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t i = 0; i < 100; ++i) {
      const std::size_t size = 16 + i * i;
      blocks.push_back(Allocate(size));
      std::memset(blocks.back(), round, size);
    }
    for (void* block : blocks) Free(block);
    blocks.clear();
  }
}

std::uint64_t AttachedThreads() { return process_runtime.heap().Stats().threads; }

class RuntimeTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    // All at once: one of them starts the runtime, and they agree on it.
    std::atomic<allocator::ObjectHeap*> heap{nullptr};
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i) {
      threads.emplace_back([&heap] {
        EXPECT_EQ(process_runtime.EnsureStarted(), Server::kFreehold);
        allocator::ObjectHeap* expected = nullptr;
        heap.compare_exchange_strong(expected, &process_runtime.heap());
        EXPECT_EQ(heap.load(), &process_runtime.heap());
      });
    }
    for (std::thread& thread : threads) thread.join();
    process_keeper.PrepareToStart();
    RegisterForkHandlers();
  }
};

TEST_F(RuntimeTest, StartsWithTheProgramsOptions) {
  EXPECT_EQ(process_runtime.server(), Server::kFreehold);
  EXPECT_EQ(process_runtime.config().decay, vm::Milliseconds(200));
  EXPECT_EQ(process_runtime.space().reservation().bytes(), vm::GiB(1));
}

TEST_F(RuntimeTest, ThreadsAttachOnceAndDetachAtTheirEnd) {
  std::thread([] {
    EXPECT_EQ(CurrentThreadCache(), nullptr);
    ThreadCache* cache = nullptr;
    {
      const CacheLease lease;
      cache = lease.get();
    }
    EXPECT_NE(cache, nullptr);
    EXPECT_EQ(CurrentThreadCache(), cache) << "attached, not borrowed";
    EXPECT_GE(AttachedThreads(), 1u);
  }).join();
  Churn(1);  // attaches this thread
  EXPECT_EQ(AttachedThreads(), 1u);
}

TEST_F(RuntimeTest, AThreadThatNeverAttachesBorrows) {
  std::thread([] {
    NeverAttachThisThread();
    void* block = Allocate(100);
    EXPECT_NE(block, nullptr);
    EXPECT_EQ(CurrentThreadCache(), nullptr);
    Free(block);
    EXPECT_EQ(CurrentThreadCache(), nullptr);
  }).join();
}

TEST_F(RuntimeTest, ManyThreadsLeaveNothingAttached) {
  Churn(1);
  for (int round = 0; round < 20; ++round) {
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i) threads.emplace_back(Churn, 3);
    for (std::thread& thread : threads) thread.join();
  }
  EXPECT_EQ(AttachedThreads(), 1u);
}

// Allocates and frees more than a small process has.
void Burst() {
  std::vector<void*> blocks;
  for (int i = 0; i < 30; ++i) {
    blocks.push_back(Allocate(1 << 20));
    std::memset(blocks.back(), 1, 1 << 20);
  }
  process_keeper.NudgeOnGrowth(reinterpret_cast<const void*>(&Burst));
  for (void* block : blocks) Free(block);
  process_keeper.Nudge(reinterpret_cast<const void*>(&Burst));
}

bool NothingToGiveBack() {
  return process_runtime.space().Stats().free_resident.value == 0 &&
         process_runtime.heap().Stats().free_dirty.value == 0;
}

TEST_F(RuntimeTest, TheKeeperGivesBackSleepsAndWakes) {
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // between two looks
  Burst();
  EXPECT_FALSE(process_keeper.WantsNudges())
      << "the keeper was not started, or went to sleep at once";
  EXPECT_TRUE(Eventually(NothingToGiveBack));
  EXPECT_TRUE(Eventually([] { return process_keeper.WantsNudges(); })) << "it does not sleep";
  Burst();
  EXPECT_TRUE(Eventually(NothingToGiveBack));
}

TEST_F(RuntimeTest, TheKeeperStopsAndStartsAgain) {
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    Burst();
    process_keeper.Stop();
    EXPECT_TRUE(process_keeper.WantsNudges());
    process_keeper.Stop();  // again: nothing happens
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  Burst();
  EXPECT_TRUE(Eventually(NothingToGiveBack));
}

TEST_F(RuntimeTest, ChildrenOfAForkAllocate) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&stop] {
      while (!stop.load(std::memory_order_relaxed)) Churn(1);
    });
  }
  for (int i = 0; i < 30; ++i) {
    void* block = Allocate(1000);
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      // Nothing of the program's own malloc, which a sanitizer may have replaced.
      for (std::size_t size = 1; size < 200'000; size = size * 3 / 2 + 1) Free(Allocate(size));
      Free(block);
      _exit(AttachedThreads() == 1 ? 0 : 1);
    }
    Free(block);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_EQ(status, 0);
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
}

TEST(ReserveWithinTest, LeavesRoomForOthers) {
  EXPECT_EQ(ReserveWithin(vm::TiB(16), vm::GiB(4).value, 0), vm::GiB(3));
  EXPECT_EQ(ReserveWithin(vm::TiB(16), vm::GiB(4).value, vm::GiB(2).value), vm::MiB(1536));
  EXPECT_EQ(ReserveWithin(vm::GiB(1), vm::GiB(4).value, 0), vm::GiB(1));
  EXPECT_EQ(ReserveWithin(vm::TiB(16), vm::GiB(1).value, vm::GiB(2).value), vm::Bytes{0});
}

}  // namespace
}  // namespace freehold::runtime
