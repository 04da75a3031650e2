// fork with other threads in the heap: parent and child go on.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"
#include "tests/allocator/heap_model.h"

namespace freehold::allocator {
namespace {

#if defined(FREEHOLD_DEBUG_CHECKS)
constexpr int kForks = 15;
#else
constexpr int kForks = 60;
#endif

// What the process runtime does around fork(). Runs `child` in the child, whose exit status is 0 if it returns
// an empty string.
template <typename Child>
void ForkAndRun(TestHeap& heap, ThreadCache* own, Child child) {
  heap->PrepareFork(own);
  heap.space().PrepareFork();
  const pid_t pid = fork();
  if (pid == 0) {
    heap.space().ChildAfterFork();
    heap->ChildAfterFork(own);
    const std::string error = child();
    if (!error.empty()) std::fprintf(stderr, "in the child: %s\n", error.c_str());
    _exit(error.empty() ? 0 : 1);
  }
  heap.space().ParentAfterFork();
  heap->ParentAfterFork(own);
  ASSERT_GT(pid, 0);
  int status = -1;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  ASSERT_EQ(status, 0);
}

TEST(HeapForkTest, WithoutOtherThreads) {
  TestHeap heap;
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  for (int i = 0; i < 1000; ++i) {
    objects.push_back(cache->Allocate(200));
    Fill(objects.back(), 200, i);
  }
  ForkAndRun(heap, cache.get(), [&]() -> std::string {
    for (int i = 0; i < 1000; ++i) {
      if (!HasContent(objects[i], 200, i)) return "content";
      cache->Free(objects[i]);
    }
    heap->CheckInvariants();
    return cache->Allocate(200) != nullptr ? "" : "null";
  });
  for (void* p : objects) cache->Free(p);
  heap->CheckInvariants();
}

TEST(HeapForkTest, FromAThreadWithoutCache) {
  TestHeap heap;
  AttachedThread cache(*heap);
  void* p = cache->Allocate(100);
  Fill(p, 100, 3);
  ForkAndRun(heap, nullptr, [&]() -> std::string {
    if (!HasContent(p, 100, 3)) return "content";
    heap->Free(p);
    AttachedThread mine(*heap);
    return mine->Allocate(100) == p ? "" : "the freed object was not found";
  });
  cache->Free(p);
}

// What other threads had free is found again in the child, what they held is not given to anybody else.
TEST(HeapForkTest, CachesOfOtherThreadsAreAdopted) {
  const OnOneCpu on_one_cpu;
  TestHeap heap;
  ThreadCache* other = heap->AttachThread();
  AttachedThread cache(*heap);
  std::vector<void*> held;
  std::vector<void*> freed;
  for (int i = 0; i < 30000; ++i) {
    void* p = other->Allocate(64);
    (i % 3 == 0 ? freed : held).push_back(p);
  }
  for (std::size_t i = 0; i < held.size(); ++i) Fill(held[i], 64, i);
  for (void* p : freed) other->Free(p);
  ForkAndRun(heap, cache.get(), [&]() -> std::string {
    for (std::size_t i = 0; i < held.size(); i += 2) cache->Free(held[i]);  // before it is adopted
    const std::size_t mapped = heap->Stats().mapped.value;
    {
      AttachedThread heir(*heap);
      if (heir.get() != other) return "not adopted";
      for (std::size_t i = 1; i < held.size(); i += 4) heir->Free(held[i]);
      std::vector<void*> fresh;
      for (int i = 0; i < 20000; ++i) {
        fresh.push_back(heir->Allocate(64));
        Fill(fresh.back(), 64, 1000 + i);
      }
      if (heap->Stats().mapped.value != mapped) return "free objects were not found";
      for (std::size_t i = 3; i < held.size(); i += 4) {
        if (!HasContent(held[i], 64, i)) return "a held object was given away";
        cache->Free(held[i]);
      }
      for (int i = 0; i < 20000; ++i) {
        if (!HasContent(fresh[i], 64, 1000 + i)) return "objects overlap";
        heir->Free(fresh[i]);
      }
    }
    return {};
  });
  for (void* p : held) cache->Free(p);
  heap->DetachThread(other);
  heap->CheckInvariants();
}

TEST(HeapForkTest, WhileOtherThreadsAllocate) {
  constexpr int kThreads = 3;
  TestHeap heap(ObjectHeapOptions{.decay = vm::Milliseconds(3), .remote_batch = {2000}});
  ModelExchange exchange;
  std::atomic<bool> stop = false;
  std::vector<std::string> errors(kThreads);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; !stop.load() && errors[t].empty(); ++round) {
        HeapModel model(*heap, exchange);
        errors[t] = model.Run(t * 100000 + round, 3000);
        if (errors[t].empty()) errors[t] = model.Finish();
      }
    });
  }
  AttachedThread cache(*heap);
  for (int i = 0; i < kForks; ++i) {
    // Objects that this thread got from others before the fork are its own in the child too.
    std::vector<ModelObject> given = exchange.TakeAll();
    for (ModelObject& object : given) {
      object.size = std::min<std::size_t>(object.size, 64);
      Fill(object.p, object.size, object.seed);
    }
    std::vector<void*> mine;
    for (int k = 0; k < 500; ++k) {
      mine.push_back(cache->Allocate(k * 3));
      Fill(mine.back(), k * 3, k);
    }
    ASSERT_NO_FATAL_FAILURE(ForkAndRun(heap, cache.get(), [&]() -> std::string {
      ModelExchange private_exchange;
      HeapModel first(*heap, private_exchange);
      HeapModel second(*heap, private_exchange);
      if (std::string error = first.Run(i, 2000); !error.empty()) return error;
      for (const ModelObject& object : given) {
        if (!HasContent(object.p, object.size, object.seed)) return "content of a given object";
        cache->Free(object.p);
      }
      if (std::string error = second.Run(i, 2000); !error.empty()) return error;
      for (int k = 0; k < 500; ++k) {
        if (!HasContent(mine[k], k * 3, k)) return "content of an own object";
        cache->Free(mine[k]);
      }
      if (std::string error = first.Finish(); !error.empty()) return error;
      heap->Trim();
      return second.Finish();
    }));
    for (const ModelObject& object : given) cache->Free(object.p);
    for (void* p : mine) cache->Free(p);
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors) EXPECT_EQ(error, "");
  for (const ModelObject& object : exchange.TakeAll()) cache->Free(object.p);
}

// Forks from several threads at once wait for each other.
TEST(HeapForkTest, ConcurrentForks) {
  TestHeap heap;
  std::vector<std::thread> threads;
  std::atomic<int> failures = 0;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      AttachedThread cache(*heap);
      for (int i = 0; i < 10; ++i) {
        void* p = cache->Allocate(1000);
        heap->PrepareFork(cache.get());
        heap->ParentAfterFork(cache.get());
        if (p == nullptr) ++failures;
        cache->Free(p);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, 0);
}

}  // namespace
}  // namespace freehold::allocator
