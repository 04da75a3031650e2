// fork with other threads in the heap: parent and child go on.
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <semaphore>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"
#include "tests/allocator/heap_fork.h"
#include "tests/allocator/heap_model.h"
#include "tests/allocator/single_step.h"

namespace freehold::allocator {
namespace {

#if defined(FREEHOLD_DEBUG_CHECKS)
constexpr int kForks = 15;
#else
constexpr int kForks = 60;
#endif

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

// Memory of threads that are not in the child goes back there, once it is free.
TEST(HeapForkTest, TrimInTheChild) {
  TestHeap heap;
  AttachedThread cache(*heap);
  std::vector<void*> objects;
  std::binary_semaphore allocated(0);
  std::binary_semaphore done(0);
  std::thread other([&] {
    AttachedThread cache(*heap);
    for (int i = 0; i < 20000; ++i) objects.push_back(cache->Allocate(400));
    for (int i = 0; i < 10; ++i) objects.push_back(cache->Allocate(20000));
    allocated.release();
    done.acquire();
  });
  allocated.acquire();
  Fill(objects[7], 400, 7);
  ForkAndRun(heap, cache.get(), [&]() -> std::string {
    for (std::size_t i = 8; i < objects.size(); ++i) cache->Free(objects[i]);
    if (heap->Trim(cache.get()) < 7 << 20) return "little went back";
    if (heap->Stats().active.value > 1 << 20) return "much is held";
    if (!HasContent(objects[7], 400, 7)) return "content";
    for (std::size_t i = 0; i < 8; ++i) cache->Free(objects[i]);
    heap->Trim(cache.get());
    if (heap->Stats().active.value != 0) return "something is held";
    // Somebody may still attach to the cache. (ThreadSanitizer wants no thread in such a child.)
    {
      AttachedThread again(*heap);
      again->Free(again->Allocate(400));
    }
    heap->CheckInvariants();
    return "";
  });
  done.release();
  other.join();
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

// What the forking thread has at hand of another's spans is known in the child by its tags, once.
TEST(HeapForkTest, ObjectsOfOthersAtHandAreHandedOutOnce) {
  const OnOneCpu on_one_cpu;
  TestHeap heap;
  ThreadCache* other = heap->AttachThread();
  AttachedThread cache(*heap);
  std::vector<void*> held;
  for (int i = 0; i < 60; ++i) {
    held.push_back(other->Allocate(5000));
    Fill(held.back(), 5000, i);
  }
  std::vector<void*> own;
  for (int i = 0; i < 4; ++i) own.push_back(cache->Allocate(5000));
  for (int i = 0; i < 10; ++i) cache->Free(held[i]);
  for (void* p : own) cache->Free(p);
  ForkAndRun(heap, cache.get(), [&]() -> std::string {
    AttachedThread heir(*heap);
    if (heir.get() != other) return "not adopted";
    std::set<void*> all(held.begin() + 10, held.end());
    for (int i = 0; i < 200; ++i) {
      if (!all.insert(heir->Allocate(5000)).second) return "handed out twice";
      if (!all.insert(cache->Allocate(5000)).second) return "handed out twice";
    }
    for (void* p : std::vector<void*>(held.begin(), held.begin() + 10)) {
      if (all.count(p) == 0) return "a free object was not found";
    }
    for (int i = 10; i < 60; ++i) {
      if (!HasContent(held[i], 5000, i)) return "a held object was given away";
    }
    heap->CheckInvariants();
    return {};
  });
  heap->DetachThread(other);
  heap->CheckInvariants();
}

// A page of objects may be copied later than the record that tells how many there are.
TEST(HeapForkTest, WhatAnotherThreadCarvesMeanwhileIsNotZero) {
  constexpr std::size_t kSize = 4096;
  TestHeap heap;
  ThreadCache* other = heap->AttachThread();
  AttachedThread cache(*heap);
  auto* first = static_cast<char*>(other->Allocate(kSize));
  ForkAndRun(heap, cache.get(), [&]() -> std::string {
    Fill(first + kSize, kUnitSize - kSize, 5);
    AttachedThread heir(*heap);
    if (heir.get() != other) return "not adopted";
    for (int i = 0; i < 15; ++i) {
      const void* p = heir->AllocateZeroed(kSize);
      if (AddressOf(p) - AddressOf(first) >= kUnitSize) return "another span";
      if (!IsZero(p, kSize)) return "not zero";
    }
    return {};
  });
  heap->DetachThread(other);
}

#if defined(FREEHOLD_SINGLE_STEP)
// Whatever another thread does without a lock, and however far it came: the child finds none of its free objects
// damaged, and gives none of its objects away.
class HeapForkStepTest : public testing::TestWithParam<std::size_t> {
 protected:
  struct Held {
    void* p;
    std::uint64_t seed;
  };

  void SetUp() override {
    for (int i = 0; i < 3; ++i) Hold(other_->Allocate(size_));
  }
  void Hold(void* p) {
    held_.push_back({p, ++last_seed_});
    Fill(p, size_, last_seed_);
  }
  void* LetGo() {
    void* p = held_.back().p;
    held_.pop_back();
    return p;
  }
  // Forks after each instruction of `work`, which the other thread does.
  template <typename Work>
  void ForkIn(Work work) {
    const std::size_t forks = SingleStep::Run(work, [&] {
      ForkAndRun(heap_, cache_.get(), [&] { return UseAll(); });
      return !HasFailure();
    });
    EXPECT_GE(forks, 10u);
  }
  std::string UseAll() {
    AttachedThread heir(*heap_);
    if (heir.get() != other_) return "not adopted";
    std::vector<Held> made;
    for (int i = 0; i < 200; ++i) {
      made.push_back({(i % 4 == 0 ? cache_ : heir)->Allocate(size_), ++last_seed_});
      Fill(made.back().p, size_, last_seed_);
    }
    made.insert(made.end(), held_.begin(), held_.end());
    for (const Held& object : made) {
      if (!HasContent(object.p, size_, object.seed)) return "an object was given away";
      heir->Free(object.p);
    }
    heap_->CheckInvariants();
    return {};
  }

  const std::size_t size_ = GetParam();
  TestHeap heap_;
  ThreadCache* const other_ = heap_->AttachThread();
  AttachedThread cache_{*heap_};
  std::vector<Held> held_;
  std::uint64_t last_seed_ = 0;
};

TEST_P(HeapForkStepTest, Allocate) {
  // Objects that are made, until the span's list has ended and more are carved.
  for (int i = 0; i < 6; ++i) {
    void* p = nullptr;
    ForkIn([&] { p = other_->Allocate(size_); });
    Hold(p);
    if (HasFailure()) return;
  }
}

TEST_P(HeapForkStepTest, Free) {
  for (int i = 0; i < 2; ++i) {
    void* p = LetGo();
    ForkIn([&] { other_->Free(p); });
  }
}

TEST_P(HeapForkStepTest, FreeOfTheForkingThreadsObject) {
  for (int i = 0; i < 5; ++i) Hold(cache_->Allocate(size_));
  for (int i = 0; i < 2; ++i) {
    void* p = LetGo();
    ForkIn([&] { heap_->Free(p); });
  }
}

// One of the fast path's sizes, and one beyond.
INSTANTIATE_TEST_SUITE_P(Sizes, HeapForkStepTest, testing::Values(1024, 4096));

// Another thread takes the lock of the forking thread's cache, finds that it must wait for the fork, and lets go.
TEST(HeapForkTest, WhileAnotherThreadFindsOutThatItMustWait) {
  TestHeap heap;
  AttachedThread cache(*heap);
  std::counting_semaphore<> stopped(0);
  std::counting_semaphore<> go_on(0);
  std::atomic<bool> steps = true;
  PrepareFork(heap, cache.get());
  std::thread other([&] {
    SingleStep::Run([&] { heap->Trim(); },
                    [&] {
                      if (!steps.load()) return false;
                      stopped.release();
                      go_on.acquire();
                      return true;
                    });
  });
  int forks = 0;
  // Until it sleeps.
  while (!HasFailure() && stopped.try_acquire_for(std::chrono::milliseconds(500))) {
    ++forks;
    ExpectSuccess(Fork(heap, cache.get(), [&]() -> std::string {
      alarm(20);
      return cache->Allocate(2000) != nullptr ? "" : "null";
    }));
    go_on.release();
  }
  EXPECT_GE(forks, 10);
  steps = false;
  go_on.release();
  ParentAfterFork(heap, cache.get());
  other.join();
}

// In a child with threads, something happens to a span that came through the fork while a thread is at each instruction
// of freeing one of its objects; and the span is allocated from as soon as that object looks free.
enum class Event { kCacheIsAdopted, kSpanIsInherited };

class HeapForkFreeTest : public testing::TestWithParam<Event> {
 protected:
  static constexpr std::size_t kSize = 2048;
  static constexpr std::size_t kPerSpan = kUnitSize / kSize;
  static constexpr auto kPause = std::chrono::milliseconds(2);  // long enough, unless the stopped thread holds a lock

  // A thread that frees `freed_` and stops twice: after `first` instructions, and when the object's tag changes. At the
  // end of the call if it comes to that before.
  class FreeingThread {
   public:
    FreeingThread(HeapForkFreeTest& test, int first) : thread_([this, &test, first] { Run(test, first); }) {}
    void WaitFor(int stop) { stopped_[stop].acquire(); }
    void GoOnAfter(int stop) { go_on_[stop].release(); }
    // Returns whether the call was longer than `first` instructions.
    bool Join() {
      thread_.join();
      return came_to_first_;
    }

   private:
    void Run(HeapForkFreeTest& test, int first) {
      const volatile std::uint64_t& tag = static_cast<FreeObject*>(test.freed_)->tag;
      const std::uint64_t before = tag;
      int steps = 0;
      SingleStep::Run([&] { test.heap_->Free(test.freed_); },
                      [&] {
                        if (++steps == first) Stop();
                        if (stops_ == 1 && tag != before) Stop();
                        return stops_ < 2;
                      });
      came_to_first_ = stops_ > 0;
      while (stops_ < 2) Stop();
    }
    void Stop() {
      stopped_[stops_].release();
      static_cast<void>(go_on_[stops_].try_acquire_for(kPause));
      ++stops_;
    }

    std::array<std::counting_semaphore<>, 2> stopped_ = {std::counting_semaphore<>(0), std::counting_semaphore<>(0)};
    std::array<std::counting_semaphore<>, 2> go_on_ = {std::counting_semaphore<>(0), std::counting_semaphore<>(0)};
    int stops_ = 0;
    bool came_to_first_ = false;
    std::thread thread_;  // the last one: it uses the others
  };

  void SetUp() override {
    // More full spans than one allocation looks through: what `rich_` inherits in the child it does not use at once.
    for (std::size_t i = 0; i < 20 * kPerSpan; ++i) ASSERT_NE(rich_->Allocate(kSize), nullptr);
    for (std::size_t i = 0; i < kPerSpan / 2; ++i) freed_ = poor_->Allocate(kSize);
    Fill(freed_, kSize, 1);
  }
  // Attaches threads to both caches.
  bool Adopt() {
    const std::set<ThreadCache*> heirs = {heap_->AttachThread(), heap_->AttachThread()};
    return heirs == std::set<ThreadCache*>{poor_, rich_};
  }
  void Make(ThreadCache* cache, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      made_.push_back(cache->Allocate(kSize));
      Fill(made_.back(), kSize, made_.size());
    }
  }
  // In the child.
  std::string FreeAndStopAt(int first) {
    const bool inherits = GetParam() == Event::kSpanIsInherited;
    ThreadCache* heir = inherits ? rich_ : poor_;
    bool adopted = true;
    if (inherits) {
      adopted = Adopt();
      heap_->DetachThread(poor_);
    }
    FreeingThread freeing(*this, first);
    freeing.WaitFor(0);
    if (inherits) {
      Make(heir, 1);
    } else {
      adopted = Adopt();
    }
    freeing.GoOnAfter(0);
    freeing.WaitFor(1);
    Make(heir, 2 * kPerSpan);
    freeing.GoOnAfter(1);
    if (!freeing.Join()) done_->store(true);
    if (!adopted) return "not adopted";
    Make(heir, 2 * kPerSpan);
    for (std::size_t i = 0; i < made_.size(); ++i) {
      if (!HasContent(made_[i], kSize, i + 1)) return "an object was given away";
      heir->Free(made_[i]);
    }
    heap_->CheckInvariants();
    return {};
  }

  TestHeap heap_;
  ThreadCache* const poor_ = heap_->AttachThread();
  ThreadCache* const rich_ = heap_->AttachThread();
  AttachedThread cache_{*heap_};
  void* freed_ = nullptr;
  std::vector<void*> made_;
  // Shared with children.
  std::atomic<bool>* const done_ = static_cast<std::atomic<bool>*>(
      mmap(nullptr, vm::kPageSize, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
};

TEST_P(HeapForkFreeTest, AtEveryInstruction) {
  ASSERT_NE(done_, MAP_FAILED);
  int stops = 0;
  while (!done_->load() && !HasFailure()) {
    ++stops;
    ForkAndRun(heap_, cache_.get(), [&] { return FreeAndStopAt(stops); });
  }
  EXPECT_GE(stops, 20);
  munmap(done_, vm::kPageSize);
}
INSTANTIATE_TEST_SUITE_P(Events, HeapForkFreeTest, testing::Values(Event::kCacheIsAdopted, Event::kSpanIsInherited),
                         [](const auto& info) {
                           return info.param == Event::kCacheIsAdopted ? "CacheIsAdopted" : "SpanIsInherited";
                         });
#endif

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
