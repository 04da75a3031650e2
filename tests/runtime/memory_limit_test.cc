// The process's limit on a space and a heap of the test's.
#include "runtime/memory_limit.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "runtime/process_mappings.h"
#include "vm/address_space.h"
#include "vm/os/linux_kernel.h"

namespace freehold::runtime {
namespace {

using allocator::ObjectHeap;
using allocator::ThreadCache;
using vm::Bytes;
using vm::MiB;

class Process {
 public:
  explicit Process(const ProcessMemoryLimit::Limits& limits = {}) {
    const auto space = vm::AddressSpace::Create(kernel_, {.reserve = vm::GiB(16), .min_reserve = vm::GiB(1)});
    EXPECT_TRUE(space.ok());
    space_ = *space;
    limit_.Init(*space_);
    const auto heap = ObjectHeap::Create(*space_, {.limit = &limit_});
    EXPECT_TRUE(heap.ok());
    heap_ = *heap;
    limited_.heap = heap_;
    limit_.Add(limited_);
    limit_.Set(limits);
    mappings_.Init(*space_, {.limit = &limit_});
  }
  ~Process() {
    ObjectHeap::Destroy(heap_);
    vm::AddressSpace::Destroy(space_);
  }

  ProcessMemoryLimit& limit() { return limit_; }
  ObjectHeap& heap() { return *heap_; }
  vm::AddressSpace& space() { return *space_; }
  long Mmap(std::size_t bytes, void* at = nullptr, int flags = 0, int protection = PROT_READ | PROT_WRITE) {
    return mappings_.Map(at, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
  }
  ProcessMappings& mappings() { return mappings_; }

 private:
  vm::os::LinuxKernel kernel_;
  vm::AddressSpace* space_ = nullptr;
  ProcessMemoryLimit limit_;
  LimitedHeap limited_;
  ObjectHeap* heap_ = nullptr;
  ProcessMappings mappings_;
};

class Thread {
 public:
  explicit Thread(Process& process) : heap_(process.heap()), cache_(heap_.AttachThread()) {}
  ~Thread() { heap_.DetachThread(cache_); }
  ThreadCache* operator->() { return cache_; }

 private:
  ObjectHeap& heap_;
  ThreadCache* cache_;
};

void* ToPointer(long address) { return reinterpret_cast<void*>(address); }

// Allocates until there is no more, then frees it all; how much there was.
std::size_t Fill(Thread& thread, std::size_t size) {
  std::vector<void*> objects;
  while (void* p = thread->Allocate(size)) objects.push_back(p);
  for (void* p : objects) thread->Free(p);
  return objects.size() * size;
}

TEST(MemoryLimitTest, NothingIsLimitedByDefault) {
  Process process;
  Thread thread(process);
  EXPECT_FALSE(process.limit().is_set());
  void* p = thread->Allocate(MiB(512).value);
  EXPECT_NE(p, nullptr);
  EXPECT_GE(process.limit().InUse(), MiB(512));
  thread->Free(p);
}

// Almost all of what may be had is had, by objects of every size; and again.
TEST(MemoryLimitTest, TheHardLimitHolds) {
  Process process({.hard = MiB(64)});
  Thread thread(process);
  for (const std::size_t size : {std::size_t{100}, std::size_t{3000}, std::size_t{60000}, std::size_t{260000},
                                 std::size_t{900000}, std::size_t{5} << 20}) {
    for (int round = 0; round < 2; ++round) {
      const std::size_t got = Fill(thread, size);
      EXPECT_LE(got, MiB(64).value) << size;
      EXPECT_GE(got, MiB(52).value) << size;
      EXPECT_LE(process.limit().InUse(), MiB(64)) << size;
    }
  }
  EXPECT_GT(process.limit().refusals(), 0u);
  EXPECT_EQ(thread->Allocate(MiB(65).value), nullptr);
  void* p = thread->Allocate(MiB(40).value);
  ASSERT_NE(p, nullptr);
  EXPECT_EQ(thread->Allocate(MiB(40).value), nullptr);
  thread->Free(p);
}

// What a chunk has beyond its spans does not count: it is not there.
TEST(MemoryLimitTest, CleanMemoryDoesNotCount) {
  Process process({.hard = MiB(64)});
  Thread thread(process);
  void* p = thread->Allocate(100);
  EXPECT_GE(process.heap().Stats().mapped, MiB(4));
  EXPECT_LT(process.limit().InUse(), MiB(1));
  std::vector<void*> objects;
  for (int i = 0; i < 200; ++i) objects.push_back(thread->Allocate(200000));
  const Bytes full = process.limit().InUse();
  EXPECT_GE(full, MiB(38));
  for (std::size_t i = 0; i < objects.size(); i += 2) thread->Free(objects[i]);
  EXPECT_EQ(process.limit().InUse(), full);
  process.heap().Trim();
  EXPECT_LT(process.limit().InUse(), MiB(28));
  for (std::size_t i = 1; i < objects.size(); i += 2) thread->Free(objects[i]);
  thread->Free(p);
}

TEST(MemoryLimitTest, GrowingInPlaceCounts) {
  Process process({.hard = MiB(64)});
  Thread thread(process);
  void* p = nullptr;
  std::size_t size = 0;
  // By the last step there is no room for a copy.
  for (; size < MiB(60).value; size += MiB(1).value) {
    void* grown = thread->Reallocate(p, size + MiB(1).value);
    ASSERT_NE(grown, nullptr) << size;
    p = grown;
  }
  EXPECT_EQ(thread->Reallocate(p, MiB(65).value), nullptr);
  EXPECT_LE(process.limit().InUse(), MiB(64));
  // Room to grow that is not used is not in use.
  EXPECT_NE(thread->Reallocate(p, MiB(2).value), nullptr);
}

TEST(MemoryLimitTest, MmapIsRefusedAndServed) {
  Process process({.hard = MiB(64)});
  const long first = process.Mmap(MiB(40).value);
  ASSERT_GT(first, 0);
  EXPECT_TRUE(process.space().Contains(ToPointer(first)));
  EXPECT_EQ(process.Mmap(MiB(40).value), -ENOMEM);
  // What has no access takes no memory.
  const long reserved = process.Mmap(MiB(400).value, nullptr, 0, PROT_NONE);
  EXPECT_GT(reserved, 0);
  // The same pages again are no more than before.
  EXPECT_EQ(process.Mmap(MiB(40).value, ToPointer(first), MAP_FIXED), first);
  EXPECT_EQ(process.Mmap(MiB(80).value, ToPointer(first), MAP_FIXED), -ENOMEM);
  EXPECT_EQ(process.mappings().Remap(ToPointer(first), MiB(40).value, MiB(80).value, MREMAP_MAYMOVE, nullptr), -ENOMEM);
  const long grown = process.mappings().Remap(ToPointer(first), MiB(40).value, MiB(60).value, MREMAP_MAYMOVE, nullptr);
  EXPECT_GT(grown, 0);
  EXPECT_EQ(process.mappings().Unmap(ToPointer(grown), MiB(60).value), 0);
  // It is free, but still resident: it goes for what is asked for now.
  const long second = process.Mmap(MiB(50).value);
  EXPECT_GT(second, 0);
  EXPECT_LE(process.limit().InUse(), MiB(64));
}

TEST(MemoryLimitTest, BelowWhatIsInUseEverythingIsRefusedUntilEnoughCameFree) {
  Process process;
  Thread thread(process);
  void* large = thread->Allocate(MiB(32).value);
  process.limit().Set({.hard = MiB(16)});
  EXPECT_EQ(thread->Allocate(MiB(2).value), nullptr);
  thread->Free(large);
  void* p = thread->Allocate(MiB(2).value);
  EXPECT_NE(p, nullptr);
  process.limit().Set({});
  void* q = thread->Allocate(MiB(32).value);
  EXPECT_NE(q, nullptr);
  thread->Free(p);
  thread->Free(q);
}

TEST(MemoryLimitTest, TheSoftLimitGivesBackWhatIsFree) {
  Process process({.soft = MiB(64)});
  Thread thread(process);
  // Bursts that do not fit side by side, of memory that the others cannot use.
  for (int round = 0; round < 3; ++round) {
    for (const std::size_t size : {std::size_t{100}, std::size_t{700000}, std::size_t{4} << 20}) {
      std::vector<void*> objects;
      for (std::size_t got = 0; got < MiB(48).value; got += size) {
        objects.push_back(thread->Allocate(size));
        ASSERT_NE(objects.back(), nullptr);
        std::memset(objects.back(), 1, size);
      }
      for (void* p : objects) thread->Free(p);
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  }
  EXPECT_GT(process.limit().reliefs(), 0u);
  EXPECT_LT(process.limit().InUse(), MiB(100));
  // A keeper finds what came free since.
  void* p = thread->Allocate(MiB(100).value);
  thread->Free(p);
  ASSERT_GT(process.limit().InUse(), MiB(64));
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  process.limit().Tick();
  EXPECT_LT(process.limit().InUse(), MiB(64));
  EXPECT_EQ(process.limit().refusals(), 0u);
}

// Live memory above the limit is no reason to purge all the time.
TEST(MemoryLimitTest, AboveTheSoftLimitPurgesAreRare) {
  Process process({.soft = MiB(16)});
  Thread thread(process);
  void* live = thread->Allocate(MiB(32).value);
  const std::uint64_t before = process.limit().reliefs();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 20000; ++i) thread->Free(thread->Allocate(MiB(2).value));
  const auto took = std::chrono::steady_clock::now() - start;
  EXPECT_LE(process.limit().reliefs() - before, 2 + static_cast<std::uint64_t>(took / std::chrono::milliseconds(10)));
  thread->Free(live);
}

// ---- the handler ----

struct HandlerState {
  ThreadCache* cache = nullptr;
  std::vector<void*> reserve = {};
  int calls = 0;
  std::size_t bytes = 0;
};
HandlerState handler_state;

int FreeOne(std::size_t bytes) {
  ++handler_state.calls;
  handler_state.bytes = bytes;
  errno = EIO;
  if (handler_state.reserve.empty()) return 0;
  handler_state.cache->Free(handler_state.reserve.back());
  handler_state.reserve.pop_back();
  return 1;
}

TEST(MemoryLimitTest, TheHandlerMakesRoom) {
  Process process({.hard = MiB(64)});
  {
    Thread thread(process);
    handler_state = {.cache = thread.operator->()};
    EXPECT_EQ(process.limit().SetHandler(FreeOne), nullptr);
    for (int i = 0; i < 5; ++i) handler_state.reserve.push_back(thread->Allocate(MiB(10).value));
    EXPECT_EQ(handler_state.calls, 0);
    errno = 0;
    // 14 MiB are left: three of the five must go.
    void* p = thread->Allocate(MiB(40).value);
    EXPECT_NE(p, nullptr);
    EXPECT_EQ(handler_state.calls, 3);
    EXPECT_EQ(handler_state.bytes, MiB(40).value);
    EXPECT_EQ(errno, 0) << "an allocation that succeeds leaves errno alone";
    // Small objects ask too, when the last page is gone; and mmap.
    std::vector<void*> small;
    while (handler_state.calls < 4) small.push_back(thread->Allocate(1000));
    EXPECT_NE(small.back(), nullptr);
    EXPECT_GT(process.Mmap(MiB(10).value), 0);
    EXPECT_EQ(handler_state.calls, 5);
    // It has nothing more.
    EXPECT_EQ(thread->Allocate(MiB(40).value), nullptr);
    EXPECT_EQ(handler_state.calls, 6);
    // What nobody can have does not concern it.
    EXPECT_EQ(thread->Allocate(SIZE_MAX / 2), nullptr);
    EXPECT_EQ(handler_state.calls, 6);
    for (void* object : small) thread->Free(object);
    thread->Free(p);
    EXPECT_EQ(process.limit().SetHandler(nullptr), FreeOne);
  }
}

int AllocateTooMuch(std::size_t bytes) {
  ++handler_state.calls;
  EXPECT_EQ(handler_state.cache->Allocate(bytes), nullptr);
  return 0;
}

TEST(MemoryLimitTest, TheHandlerIsNotCalledForItself) {
  Process process({.hard = MiB(16)});
  Thread thread(process);
  handler_state = {.cache = thread.operator->()};
  process.limit().SetHandler(AllocateTooMuch);
  EXPECT_EQ(thread->Allocate(MiB(32).value), nullptr);
  EXPECT_EQ(handler_state.calls, 1);
  EXPECT_EQ(thread->Allocate(MiB(32).value), nullptr);
  EXPECT_EQ(handler_state.calls, 2);
}

// ---- threads ----

TEST(MemoryLimitTest, ThreadsTogetherDoNotExceedTheHardLimit) {
  constexpr std::size_t kHard = MiB(48).value;
  Process process({.soft = MiB(32), .hard = {kHard}});
  std::atomic<bool> stop{false};
  std::atomic<std::size_t> live{0};
  std::atomic<std::size_t> most{0};
  std::atomic<std::uint64_t> refused{0};
  std::vector<std::thread> threads;
  for (unsigned id = 0; id < 4; ++id) {
    threads.emplace_back([&, id] {
      Thread thread(process);
      std::vector<std::pair<void*, std::size_t>> objects;
      std::uint64_t random = id + 1;
      while (!stop.load(std::memory_order_relaxed)) {
        random = random * 6364136223846793005 + 1442695040888963407;
        const std::size_t size = std::size_t{1} << (10 + (random >> 33) % 13);
        void* p = (random >> 60) % 2 == 0 ? thread->Allocate(size) : nullptr;
        if (p != nullptr) {
          objects.emplace_back(p, size);
          const std::size_t now = live.fetch_add(size) + size;
          std::size_t before = most.load();
          while (now > before && !most.compare_exchange_weak(before, now)) {
          }
        } else if (!objects.empty()) {
          refused.fetch_add(1, std::memory_order_relaxed);
          live.fetch_sub(objects.back().second);
          thread->Free(objects.back().first);
          objects.pop_back();
        }
      }
      for (const auto& [p, size] : objects) thread->Free(p);
    });
  }
  for (int i = 0; i < 100; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    // Who looks from outside may see a page before it leaves one sum and after it came into the other.
    EXPECT_LE(process.limit().InUse().value, kHard + MiB(16).value);
  }
  stop.store(true);
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(most.load(), kHard);
  EXPECT_GT(process.limit().refusals(), 0u);
  process.heap().CheckInvariants();
  process.space().CheckInvariants();
}

// A child forgets what other threads were asking for.
TEST(MemoryLimitTest, Fork) {
  Process process({.hard = MiB(64)});
  ASSERT_TRUE(process.limit().Admit(MiB(60)));
  EXPECT_FALSE(process.limit().Admit(MiB(60)));
  process.limit().PrepareFork();
  const pid_t child = fork();
  if (child == 0) {
    process.limit().ChildAfterFork(nullptr);
    const bool admits = process.limit().Admit(MiB(60));
    _exit(admits ? 0 : 1);
  }
  process.limit().ParentAfterFork();
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_FALSE(process.limit().Admit(MiB(60)));
  process.limit().Settle(MiB(60));
  EXPECT_TRUE(process.limit().Admit(MiB(60)));
  process.limit().Settle(MiB(60));
}

}  // namespace
}  // namespace freehold::runtime
