// StackPool: slots, guards, what stays resident, errors of every system call, several threads, fork.
#include "runtime/stack_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/address_space.h"
#include "vm/os/check.h"
#include "vm/os/linux_kernel.h"

namespace freehold::runtime {
namespace {

using namespace vm::test;  // NOLINT: the fixture's words
using vm::Bytes;
using vm::Error;
using vm::ErrorCode;
using vm::KiB;
using vm::kPageSize;
using vm::MiB;
using vm::PageRange;
using vm::Pages;
using vm::Result;
using vm::os::FakeKernel;
using vm::os::LinuxKernel;
using Residue = StackPool::Residue;

constexpr std::size_t kHot = StackPool::kHotPages;

// Mappings of a quarter of this: small enough for sanitizers, large enough for some stacks of 8 MiB.
vm::AddressSpaceOptions PoolOptions() {
  return {.reserve = vm::GiB(4), .min_reserve = vm::GiB(4), .regions_per_zone = 1};
}

class TestPool {
 public:
  explicit TestPool(vm::AddressSpace& space) {
    const Result<StackPool*> pool = StackPool::Create(space);
    if (!pool.ok()) throw std::runtime_error("StackPool::Create");
    pool_ = *pool;
  }
  ~TestPool() { StackPool::Destroy(pool_); }
  TestPool(const TestPool&) = delete;
  TestPool& operator=(const TestPool&) = delete;

  StackPool* operator->() const { return pool_; }
  StackPool& operator*() const { return *pool_; }

 private:
  StackPool* pool_;
};

StackSlot* MustAcquire(StackPool& pool, Bytes size, Bytes guard = {kPageSize}) {
  const Result<StackSlot*> slot = pool.Acquire(size, guard);
  if (!slot.ok()) throw std::runtime_error(std::string("Acquire: ") + vm::ToString(slot.error().code));
  return *slot;
}

class StackPoolTest : public ::testing::Test {
 protected:
  FakeKernel kernel_;
  TestSpace space_{kernel_, PoolOptions()};
  TestPool pool_{*space_};
};

// The same with no model beside the kernel: for what really happens to memory, and for many threads.
class StackPoolLinuxTest : public ::testing::Test {
 protected:
  std::size_t Resident(PageRange range) { return kernel_.CountResident(range)->value; }

  LinuxKernel kernel_;
  TestSpace space_{kernel_, PoolOptions()};
  TestPool pool_{*space_};
};

bool Guarded(const FakeKernel& kernel, PageRange range) {
  return kernel.GuardPages(range) == range.count();
}

// ---- One slot ----

TEST_F(StackPoolTest, AStackHasTheSizeAskedForAndAGuardBelow) {
  for (const std::size_t size : {kPageSize, KiB(16).value, KiB(68).value, KiB(132).value, MiB(1).value + kPageSize,
                                 MiB(8).value, MiB(8).value + KiB(64).value}) {
    StackSlot* slot = MustAcquire(*pool_, {size});
    EXPECT_EQ(slot->stack().bytes(), Bytes{size});
    EXPECT_EQ(slot->guard().count(), Pages{1});
    EXPECT_TRUE(Guarded(kernel_, slot->guard()));
    EXPECT_LE(slot->guard().end, slot->stack().first);
    // Slack is a sixteenth at most.
    EXPECT_LE((slot->stack().first - slot->guard().end).bytes().value, size / 16);
    EXPECT_EQ(kernel_.GuardPages({slot->guard().end, slot->stack().end}), Pages{0});
    Fill(slot->stack(), 0xab);
    EXPECT_TRUE(IsFilledWith(slot->stack(), 0xab));
    pool_->Release(slot);
  }
}

TEST_F(StackPoolTest, CoreDumpsHaveStacksAndOmitTheRestOfTheArena) {
  const StackSlot* slot = MustAcquire(*pool_, MiB(8));
  EXPECT_FALSE(kernel_.At(slot->stack().first).undumped);
  EXPECT_FALSE(kernel_.At(slot->stack().end - Pages{1}).undumped);
  // Beyond four slots of a little more than 8 MiB.
  EXPECT_TRUE(kernel_.At(slot->stack().end + vm::PagesFor(MiB(40))).undumped);
}

TEST_F(StackPoolTest, AReleasedStackIsUsedAgainWithoutASystemCall) {
  StackSlot* slot = MustAcquire(*pool_, MiB(8));
  std::memcpy(slot->record(), "mine", 5);
  pool_->Release(slot, Residue::kNone);
  const std::size_t calls = kernel_.CallCount();
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(MustAcquire(*pool_, MiB(8)), slot);
    EXPECT_STREQ(static_cast<const char*>(slot->record()), "mine");
    pool_->Release(slot, Residue::kNone);
  }
  // Another size of the same class.
  EXPECT_EQ(MustAcquire(*pool_, MiB(8) - KiB(100)), slot);
  EXPECT_EQ(slot->stack().bytes(), MiB(8) - KiB(100));
  EXPECT_EQ(kernel_.CallCount(), calls);
  pool_->Release(slot, Residue::kNone);
}

TEST_F(StackPoolTest, StacksDoNotOverlap) {
  std::vector<StackSlot*> slots;
  for (std::size_t i = 0; i < 300; ++i) slots.push_back(MustAcquire(*pool_, {(i % 37 + 1) * kPageSize}));
  std::set<std::size_t> pages;
  for (StackSlot* slot : slots) {
    for (vm::PageNumber page = slot->guard().first; page < slot->stack().end; page = page + Pages{1}) {
      EXPECT_TRUE(pages.insert(page.value).second);
    }
  }
  EXPECT_EQ(pool_->Stats().in_use, 300u);
  for (StackSlot* slot : slots) pool_->Release(slot);
  EXPECT_EQ(pool_->Stats().in_use, 0u);
}

TEST_F(StackPoolTest, FindsStacksInUse) {
  EXPECT_EQ(pool_->Find(this), nullptr);
  StackSlot* slot = MustAcquire(*pool_, KiB(64));
  StackSlot* other = MustAcquire(*pool_, KiB(64));
  EXPECT_EQ(pool_->Find(slot->stack().address()), slot);
  EXPECT_EQ(pool_->Find(slot->stack().end.address() - 1), slot);
  EXPECT_EQ(pool_->Find(slot->guard().address()), slot);
  EXPECT_EQ(pool_->Find(other->stack().address() + 100), other);
  EXPECT_EQ(pool_->Find(other->stack().end.address()), nullptr);  // carved by nobody yet
  EXPECT_EQ(pool_->Find(slot->guard().address() + MiB(100).value), nullptr);
  pool_->Release(slot);
  EXPECT_EQ(pool_->Find(slot->stack().address()), nullptr);
  pool_->Release(other);
}

TEST_F(StackPoolTest, ForEachInUseVisitsWhatIsInUse) {
  StackSlot* slots[] = {MustAcquire(*pool_, KiB(64)), MustAcquire(*pool_, KiB(64)), MustAcquire(*pool_, MiB(2))};
  pool_->Release(slots[0]);
  std::set<StackSlot*> visited;
  pool_->ForEachInUse([&](StackSlot* slot) { visited.insert(slot); });
  EXPECT_EQ(visited, (std::set<StackSlot*>{slots[1], slots[2]}));
  pool_->Release(slots[1]);
  pool_->Release(slots[2]);
}

using StackPoolDeathTest = StackPoolTest;

TEST_F(StackPoolDeathTest, ReleasingTwiceStopsTheProgram) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(
      {
        StackSlot* slot = MustAcquire(*pool_, KiB(64));
        pool_->Release(slot);
        pool_->Release(slot);
      },
      "check failed");
}

// ---- Guards ----

TEST_F(StackPoolTest, NoGuardAskedForIsAGuardAllTheSame) {
  StackSlot* slot = MustAcquire(*pool_, KiB(64), {0});
  EXPECT_EQ(slot->guard().count(), Pages{1});
  pool_->Release(slot);
}

//     guard 1    |g|              |  64 KiB + 64 KiB - 4 KiB
//     guard 16   |gggggggg|       |
//     then 124 K |g|              |
TEST_F(StackPoolTest, AGuardFitsItsUser) {
  StackSlot* slot = MustAcquire(*pool_, KiB(64), KiB(64));
  EXPECT_EQ(slot->guard().count(), Pages{16});
  EXPECT_TRUE(Guarded(kernel_, slot->guard()));
  pool_->Release(slot, Residue::kNone);

  const std::size_t calls = kernel_.CallCount();
  EXPECT_EQ(MustAcquire(*pool_, KiB(64), KiB(64)), slot);
  EXPECT_EQ(kernel_.CallCount(), calls);  // planted once
  pool_->Release(slot, Residue::kNone);

  EXPECT_EQ(MustAcquire(*pool_, KiB(124)), slot);
  EXPECT_EQ(slot->guard().count(), Pages{1});
  EXPECT_EQ(kernel_.GuardPages(slot->stack()), Pages{0});
  Fill(slot->stack(), 1);
  pool_->Release(slot, Residue::kNone);

  EXPECT_EQ(MustAcquire(*pool_, KiB(60), KiB(68)), slot);
  EXPECT_EQ(slot->guard().count(), Pages{17});
  EXPECT_TRUE(Guarded(kernel_, slot->guard()));
  pool_->Release(slot);
}

TEST_F(StackPoolTest, AKernelWithoutGuardsProtects) {
  vm::os::Features features = kernel_.features();
  features.guard_regions = false;
  kernel_.SetFeatures(features);
  StackSlot* slot = MustAcquire(*pool_, KiB(64), KiB(64));
  for (vm::PageNumber page = slot->guard().first; page < slot->guard().end; page = page + Pages{1}) {
    EXPECT_EQ(kernel_.At(page).protection, vm::os::Protection::kNone);
  }
  Fill(slot->stack(), 1);
  pool_->Release(slot);
  EXPECT_EQ(MustAcquire(*pool_, KiB(124)), slot);
  Fill(slot->stack(), 1);
  pool_->Release(slot);
}

// As when the process locks its memory later on: mlockall(2).
TEST_F(StackPoolTest, AGuardGrowsByProtectionWhereTheKernelRefusesMore) {
  StackSlot* slot = MustAcquire(*pool_, KiB(124));
  ASSERT_TRUE(Guarded(kernel_, slot->guard()));
  pool_->Release(slot, Residue::kNone);
  vm::os::Features features = kernel_.features();
  features.guard_regions = false;
  kernel_.SetFeatures(features);
  EXPECT_EQ(MustAcquire(*pool_, KiB(64), KiB(64)), slot);
  EXPECT_EQ(slot->guard().count(), Pages{16});
  EXPECT_EQ(kernel_.At(slot->guard().first).protection, vm::os::Protection::kNone);
  EXPECT_EQ(kernel_.At(slot->guard().end - Pages{1}).protection, vm::os::Protection::kNone);
  EXPECT_EQ(kernel_.At(slot->stack().first).protection, vm::os::Protection::kReadWrite);
  pool_->Release(slot);
}

TEST_F(StackPoolLinuxTest, TheGuardTraps) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  StackSlot* slot = MustAcquire(*pool_, KiB(64));
  EXPECT_DEATH(*const_cast<volatile std::byte*>(slot->guard().end.address() - 1) = std::byte{1}, "");
  pool_->Release(slot);
}

// ---- Memory ----

TEST_F(StackPoolLinuxTest, DeepStacksGiveMemoryBack) {
  StackSlot* slot = MustAcquire(*pool_, MiB(8));
  Fill(slot->stack(), 1);
  EXPECT_EQ(Resident(slot->stack()), MiB(8).value / kPageSize);
  pool_->Release(slot);
  EXPECT_EQ(Resident(slot->stack()), kHot);
  EXPECT_EQ(Resident({slot->stack().end - Pages{kHot}, slot->stack().end}), kHot);
  EXPECT_EQ(pool_->Stats().discards, 1u);
  // And the guard is there as before.
  EXPECT_EQ(MustAcquire(*pool_, MiB(8)), slot);
  EXPECT_EQ(slot->guard().count(), Pages{1});
  pool_->Release(slot, Residue::kNone);
  EXPECT_EQ(pool_->Stats().discards, 1u);
}

TEST_F(StackPoolLinuxTest, AUserMayGiveBackWhatIsBelow) {
  StackSlot* slot = MustAcquire(*pool_, MiB(1));
  Fill(slot->stack(), 1);
  pool_->DiscardBelow(slot, slot->stack().end - Pages{100});
  EXPECT_EQ(Resident(slot->stack()), 100u);
  EXPECT_TRUE(IsFilledWith({slot->stack().end - Pages{100}, slot->stack().end}, 1));
  pool_->Release(slot);
}

TEST_F(StackPoolLinuxTest, OnlySomeFreeStacksStayResident) {
  std::vector<StackSlot*> slots;
  for (std::size_t i = 0; i < 8 * StackPool::kHotSlots; ++i) {
    slots.push_back(MustAcquire(*pool_, KiB(64)));
    Fill(slots.back()->stack(), 1);
  }
  for (StackSlot* slot : slots) pool_->Release(slot, Residue::kNone);
  std::size_t resident = 0;
  for (StackSlot* slot : slots) resident += Resident(slot->stack());
  // A list for each processor that this test moved over.
  EXPECT_LE(resident, kernel_.CpuCount() * StackPool::kHotSlots * kHot);
  EXPECT_GE(resident, StackPool::kHotSlots * kHot);
  // All of them can be had again.
  const std::uint64_t carved = pool_->Stats().slots;
  for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = MustAcquire(*pool_, KiB(64));
  EXPECT_EQ(pool_->Stats().slots, carved);
  for (StackSlot* slot : slots) pool_->Release(slot);
}

TEST_F(StackPoolTest, KernelVmasDoNotGrowWithStacks) {
  std::vector<StackSlot*> slots = {MustAcquire(*pool_, KiB(64))};
  const std::size_t before = kernel_.KernelVmaCount();
  for (int i = 0; i < 5000; ++i) slots.push_back(MustAcquire(*pool_, KiB(64)));
  EXPECT_LE(kernel_.KernelVmaCount(), before + 4);
  const std::size_t calls = kernel_.CallCount(Operation::kProtect);
  EXPECT_LE(calls, 40u);  // spans double
  for (StackSlot* slot : slots) pool_->Release(slot);
}

// ---- Errors ----

TEST_F(StackPoolTest, RefusesWhatIsNoStack) {
  EXPECT_EQ(pool_->Acquire({0}).error().code, ErrorCode::kEmpty);
  EXPECT_EQ(pool_->Acquire({100}).error().code, ErrorCode::kUnaligned);
  EXPECT_EQ(pool_->Acquire(KiB(64), {1}).error().code, ErrorCode::kUnaligned);
  EXPECT_EQ(pool_->Acquire({SIZE_MAX - kPageSize + 1}, KiB(64)).error().code, ErrorCode::kOverflow);
  EXPECT_EQ(pool_->Acquire({SIZE_MAX / 2 - kPageSize + 1}).error().code, ErrorCode::kNoRoom);
  EXPECT_EQ(pool_->Acquire(vm::GiB(100)).error().code, ErrorCode::kNoRoom);
  EXPECT_EQ(pool_->Stats().slots, 0u);
}

TEST_F(StackPoolTest, AFullSpaceRefusesAndRecovers) {
  std::vector<StackSlot*> slots;
  Result<StackSlot*> slot = pool_->Acquire(MiB(20));
  for (; slot.ok(); slot = pool_->Acquire(MiB(20))) slots.push_back(*slot);
  EXPECT_EQ(slot.error().code, ErrorCode::kNoRoom);
  EXPECT_GT(slots.size(), 30u);  // of a quarter of 4 GiB
  // A smaller one may still fit; and one that is released serves the next.
  pool_->Release(slots.back());
  EXPECT_EQ(MustAcquire(*pool_, MiB(20)), slots.back());
  for (StackSlot* one : slots) pool_->Release(one);
}

TEST_F(StackPoolTest, MemoryThatMayNotBeCommitted) {
  StackSlot* first = MustAcquire(*pool_, KiB(64));
  // Room for one stack of 8 MiB, but not for four.
  kernel_.FailProtectBeyond(kernel_.CommittedPages().bytes() + MiB(12));
  StackSlot* second = MustAcquire(*pool_, MiB(8));
  EXPECT_EQ(pool_->Acquire(MiB(8)).error(), Error::System(ENOMEM));
  kernel_.StopFailing();
  StackSlot* third = MustAcquire(*pool_, MiB(8));
  for (StackSlot* slot : {first, second, third}) pool_->Release(slot);
}

// The nth call fails, for every n: Acquire says so and changes nothing, and the next one succeeds.
TEST(StackPoolFailureTest, EveryCallMayFail) {
  bool reached = true;
  for (std::size_t n = 1; reached; ++n) {
    FakeKernel kernel;
    TestSpace space(kernel, PoolOptions());
    kernel.FailNthOfAny(n, ENOMEM);
    const Result<StackPool*> created = StackPool::Create(*space);
    if (!created.ok()) {
      EXPECT_EQ(created.error(), Error::System(ENOMEM));
      continue;
    }
    StackPool& pool = **created;
    const struct {
      Bytes size, guard;
    } requests[] = {{KiB(64), KiB(4)}, {KiB(64), KiB(64)}, {KiB(124), KiB(4)}, {MiB(8), KiB(4)}};
    std::size_t failures = 0;
    for (const auto& request : requests) {
      Result<StackSlot*> slot = pool.Acquire(request.size, request.guard);
      if (!slot.ok()) {
        ++failures;
        EXPECT_EQ(slot.error(), Error::System(ENOMEM));
        EXPECT_EQ(pool.Stats().in_use, 0u);
        slot = pool.Acquire(request.size, request.guard);
      }
      ASSERT_TRUE(slot.ok()) << n;
      EXPECT_TRUE(Guarded(kernel, (*slot)->guard()));
      EXPECT_GE((*slot)->guard().bytes(), request.guard);
      EXPECT_LE((*slot)->guard().end, (*slot)->stack().first);
      Fill((*slot)->stack(), 1);
      pool.Release(*slot);
    }
    reached = kernel.InjectedFailures() > 0;
    EXPECT_LE(failures, kernel.InjectedFailures());
    kernel.StopFailing();
    StackPool::Destroy(*created);
    EXPECT_EQ(space->Stats().mapped, Bytes{0});
    EXPECT_TRUE(reached || n > 10);
  }
}

TEST(StackPoolDestroyTest, GivesEverythingBack) {
  FakeKernel kernel;
  TestSpace space(kernel, PoolOptions());
  const Bytes before = space->Stats().mapped;
  const Result<StackPool*> pool = StackPool::Create(*space);
  ASSERT_TRUE(pool.ok());
  for (std::size_t i = 1; i < 500; ++i) MustAcquire(**pool, {i * kPageSize});
  StackPool::Destroy(*pool);
  EXPECT_EQ(space->Stats().mapped, before);
  EXPECT_EQ(kernel.GuardPages(ZoneRange(*space, vm::Zone::kMapping)), Pages{0});
}

// ---- Threads ----

// Writes its own mark over the ends of every stack it has, and finds it there later.
void Churn(StackPool& pool, std::uint32_t seed, std::size_t rounds) {
  std::mt19937 random(seed);
  struct Held {
    StackSlot* slot;
    std::uint64_t mark;
  };
  std::vector<Held> held;
  const auto low = [](StackSlot* slot) { return reinterpret_cast<std::uint64_t*>(slot->stack().address()); };
  const auto high = [](StackSlot* slot) { return reinterpret_cast<std::uint64_t*>(slot->stack().end.address()) - 1; };
  const auto release = [&](std::size_t i) {
    const Held one = held[i];
    held[i] = held.back();
    held.pop_back();
    FREEHOLD_CHECK(*low(one.slot) == one.mark && *high(one.slot) == one.mark);
    FREEHOLD_CHECK(*static_cast<std::uint64_t*>(one.slot->record()) == one.mark);
    FREEHOLD_CHECK(pool.Find(low(one.slot)) == one.slot);
    pool.Release(one.slot, random() % 2 == 0 ? Residue::kUnknown : Residue::kNone);
  };
  for (std::size_t i = 0; i < rounds; ++i) {
    const bool acquire = held.empty() || (held.size() < 40 && random() % 2 == 0);
    if (!acquire) {
      release(random() % held.size());
      continue;
    }
    const std::size_t sizes[] = {1, 4, 16, 17, 64, 200};
    const Result<StackSlot*> slot =
        pool.Acquire({sizes[random() % std::size(sizes)] * kPageSize}, {random() % 3 * kPageSize});
    FREEHOLD_CHECK(slot.ok());
    const std::uint64_t mark = std::uint64_t{seed} << 32 | i;
    *low(*slot) = mark;
    *high(*slot) = mark;
    std::memcpy((*slot)->record(), &mark, sizeof(mark));
    held.push_back({*slot, mark});
  }
  while (!held.empty()) release(held.size() - 1);
}

TEST_F(StackPoolLinuxTest, ManyThreads) {
  std::vector<std::thread> threads;
  for (std::uint32_t seed = 1; seed <= 4; ++seed) {
    threads.emplace_back([&, seed] { Churn(*pool_, seed, kSanitized ? 4000 : 40'000); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool_->Stats().in_use, 0u);
  EXPECT_LE(pool_->Stats().slots, 4 * 40 * 8u);
}

// Stacks that one thread acquires and another releases.
TEST_F(StackPoolLinuxTest, HandedFromThreadToThread) {
  constexpr int kRounds = 5000;
  std::atomic<StackSlot*> handed{nullptr};
  std::thread taker([&] {
    for (int i = 0; i < kRounds;) {
      StackSlot* slot = handed.exchange(nullptr, std::memory_order_acquire);
      if (slot == nullptr) {
        std::this_thread::yield();
        continue;
      }
      FREEHOLD_CHECK(IsFilledWith({slot->stack().first, slot->stack().first + Pages{1}}, i & 0xff));
      pool_->Release(slot, Residue::kNone);
      ++i;
    }
  });
  for (int i = 0; i < kRounds; ++i) {
    StackSlot* slot = MustAcquire(*pool_, KiB(16));
    Fill({slot->stack().first, slot->stack().first + Pages{1}}, i & 0xff);
    while (handed.load(std::memory_order_relaxed) != nullptr) std::this_thread::yield();
    handed.store(slot, std::memory_order_release);
  }
  taker.join();
  EXPECT_EQ(pool_->Stats().in_use, 0u);
}

// ThreadSanitizer does not follow a fork of several threads.
#if !defined(FREEHOLD_TSAN)
TEST_F(StackPoolLinuxTest, ForkWhileThreadsCarve) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (std::uint32_t seed = 1; seed <= 3; ++seed) {
    threads.emplace_back([&, seed] {
      for (std::uint32_t round = 0; !stop.load(); ++round) Churn(*pool_, seed * 1000 + round, 200);
    });
  }
  for (int i = 0; i < 20; ++i) {
    pool_->PrepareFork();
    space_->PrepareFork();
    const pid_t pid = fork();
    if (pid == 0) {
      alarm(30);
      space_->ChildAfterFork();
      pool_->ChildAfterFork();
      // Stacks of threads that are not here.
      pool_->ForEachInUse([&](StackSlot* slot) { pool_->Release(slot); });
      for (std::size_t pages = 1; pages < 100; ++pages) {
        const Result<StackSlot*> slot = pool_->Acquire({pages * kPageSize});
        FREEHOLD_CHECK(slot.ok());
        std::memset((*slot)->stack().address(), 1, pages * kPageSize);
        pool_->Release(*slot);
      }
      _exit(pool_->Stats().in_use == 0 ? 0 : 1);
    }
    space_->ParentAfterFork();
    pool_->ParentAfterFork();
    ASSERT_GT(pid, 0);
    int status = -1;
    ASSERT_EQ(waitpid(pid, &status, 0), pid);
    EXPECT_EQ(status, 0);
  }
  stop.store(true);
  for (std::thread& thread : threads) thread.join();
}
#endif

}  // namespace
}  // namespace freehold::runtime
