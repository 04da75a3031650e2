// ThreadStacks beside libc's threads in one process, so that sanitizers see it: stacks come back however threads end,
// errors lose nothing, and a stack is used again only when its thread is gone.
#include "runtime/thread_stacks.h"

#include <semaphore.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/os/check.h"
#include "vm/os/linux_kernel.h"

namespace freehold::runtime {
namespace {

using namespace vm::test;  // NOLINT: the fixture's words
using vm::MiB;
using vm::os::FakeKernel;

constexpr LibcThreads kLibc = {.create = pthread_create,
                               .join = pthread_join,
                               .tryjoin_np = pthread_tryjoin_np,
                               .timedjoin_np = pthread_timedjoin_np,
                               .clockjoin_np = pthread_clockjoin_np,
                               .detach = pthread_detach,
                               .getattr_np = pthread_getattr_np};

template <typename Kernel>
class Fixture : public ::testing::Test {
 protected:
  static vm::AddressSpaceOptions Options() {
    return {.reserve = vm::GiB(16), .min_reserve = vm::GiB(16), .regions_per_zone = 1};
  }
  void SetUp() override {
    stacks_.UseLibc(kLibc);
    ASSERT_TRUE(stacks_.Start(*space_, ThreadStacks::Overflows::kSilent).ok());
  }
  void TearDown() override {
    stacks_.Stop();
    EXPECT_EQ(space_->Stats().mapped, vm::Bytes{0});
  }

  pthread_t MustCreate(void* (*body)(void*), void* argument, const pthread_attr_t* attributes = nullptr) {
    pthread_t thread;
    FREEHOLD_CHECK(stacks_.Create(&thread, attributes, body, argument) == 0);
    return thread;
  }
  void MustJoin(pthread_t thread) { FREEHOLD_CHECK(stacks_.Join(thread, nullptr) == 0); }
  std::uint64_t InUse() { return stacks_.pool()->Stats().in_use; }
  std::uint64_t Slots() { return stacks_.pool()->Stats().slots; }
  bool AllGone() {
    return Eventually([this] {
      stacks_.Reap(SIZE_MAX);
      return InUse() == 0;
    });
  }

  Kernel kernel_;
  TestSpace space_{kernel_, Options()};
  ThreadStacks stacks_;
};

using ThreadStacksTest = Fixture<vm::os::LinuxKernel>;
using ThreadStacksFakeTest = Fixture<FakeKernel>;

void* Return(void* value) { return value; }

struct Held {
  sem_t go;
  std::atomic<void*> frame{nullptr};
  Held() { sem_init(&go, 0, 0); }
  static void* Run(void* held) {
    auto& self = *static_cast<Held*>(held);
    int here;
    self.frame.store(&here);
    while (sem_wait(&self.go) != 0) {
    }
    return held;
  }
};

TEST_F(ThreadStacksTest, AThreadRunsOnAStackOfThePool) {
  Held held;
  const pthread_t thread = MustCreate(Held::Run, &held);
  ASSERT_TRUE(Eventually([&] { return held.frame.load() != nullptr; }));
  EXPECT_NE(stacks_.pool()->Find(reinterpret_cast<void*>(thread)), nullptr);
#if !defined(FREEHOLD_ASAN)  // which may have put the local variable elsewhere
  EXPECT_NE(stacks_.pool()->Find(held.frame.load()), nullptr);
#endif
  EXPECT_EQ(InUse(), 1u);
  EXPECT_EQ(stacks_.TryJoin(thread, nullptr), EBUSY);
  EXPECT_EQ(InUse(), 1u);
  sem_post(&held.go);
  void* result = nullptr;
  EXPECT_EQ(stacks_.Join(thread, &result), 0);
  EXPECT_EQ(result, &held);
  EXPECT_EQ(InUse(), 0u);
}

TEST_F(ThreadStacksTest, OneStackServesThreadAfterThread) {
  for (int i = 0; i < 200; ++i) MustJoin(MustCreate(Return, nullptr));
  EXPECT_EQ(Slots(), 1u);
  EXPECT_EQ(InUse(), 0u);
}

// Joiners wait awhile by themselves first: for threads that are gone, that end meanwhile, and much later.
TEST_F(ThreadStacksTest, JoinsThreadsThatEndSoonerAndLater) {
  const auto run = [](void* microseconds) -> void* {
    if (microseconds != nullptr) usleep(static_cast<useconds_t>(reinterpret_cast<std::uintptr_t>(microseconds)));
    return microseconds;
  };
  for (std::uintptr_t i = 0; i < 100; ++i) {
    for (const std::uintptr_t microseconds : {std::uintptr_t{0}, i % 25, std::uintptr_t{300}}) {
      const pthread_t thread = MustCreate(run, reinterpret_cast<void*>(microseconds));
      if (i % 4 == 0) usleep(100);
      void* result = &result;
      ASSERT_EQ(stacks_.Join(thread, &result), 0);
      ASSERT_EQ(reinterpret_cast<std::uintptr_t>(result), microseconds);
      ASSERT_EQ(InUse(), 0u);
    }
  }
}

#if !defined(FREEHOLD_TSAN)  // whose pthread_join takes a cancelled thread for one that is still in there
TEST_F(ThreadStacksTest, AJoinThatWaitsCanBeCancelled) {
  struct Join {
    ThreadStacks* stacks;
    pthread_t thread;
    static void* Run(void* argument) {
      auto& self = *static_cast<Join*>(argument);
      self.stacks->Join(self.thread, nullptr);
      return nullptr;
    }
  };
  Held held;
  Join join = {&stacks_, MustCreate(Held::Run, &held)};
  const pthread_t joiner = MustCreate(Join::Run, &join);
  ASSERT_EQ(pthread_cancel(joiner), 0);
  void* result = nullptr;
  EXPECT_EQ(stacks_.Join(joiner, &result), 0);
  EXPECT_EQ(result, PTHREAD_CANCELED);
  EXPECT_EQ(InUse(), 1u) << "who was waited for";
  sem_post(&held.go);
  MustJoin(join.thread);
  EXPECT_EQ(InUse(), 0u);
}
#endif

TEST_F(ThreadStacksTest, NoThreadJoinsItself) {
  struct Self {
    ThreadStacks* stacks;
    static void* Run(void* self) {
      const int error = static_cast<Self*>(self)->stacks->Join(pthread_self(), nullptr);
      return reinterpret_cast<void*>(static_cast<std::uintptr_t>(error));
    }
  };
  Self self = {&stacks_};
  void* result = nullptr;
  EXPECT_EQ(stacks_.Join(MustCreate(Self::Run, &self), &result), 0);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(result), std::uintptr_t{EDEADLK});
}

// Joined threads need no more memory than their tops; deep ones give back at their end, joined or not.
TEST_F(ThreadStacksTest, DeepThreadsGiveBackAtTheirEnd) {
  const auto dig = [](void*) -> void* {
    constexpr std::size_t kDeep = std::size_t{4} << 20;
    auto* memory = static_cast<volatile char*>(__builtin_alloca(kDeep));
    for (std::size_t i = 0; i < kDeep; i += vm::kPageSize) memory[i] = 1;
    return nullptr;
  };
  const pthread_t thread = MustCreate(dig, nullptr);
  StackSlot* slot = stacks_.pool()->Find(reinterpret_cast<void*>(thread));
  ASSERT_NE(slot, nullptr);
  EXPECT_TRUE(Eventually([&] { return stacks_.pool()->Stats().discards == 1; }));
  MustJoin(thread);
  EXPECT_EQ(stacks_.pool()->Stats().discards, 1u);
  // ThreadSanitizer keeps much of its own in thread-local storage, which lies on the stack.
  EXPECT_LE(kernel_.CountResident(slot->stack())->value, kSanitized ? 400 : 3 * StackPool::kHotPages);
  // The next one has nothing to give back, once its stack is warm.
  const std::uint64_t discards = stacks_.pool()->Stats().discards;
  for (int i = 0; i < 10; ++i) MustJoin(MustCreate(Return, nullptr));
  EXPECT_LE(stacks_.pool()->Stats().discards, discards + (kSanitized ? 10 : 2));
}

TEST_F(ThreadStacksTest, DetachedThreadsGiveTheirStacksBack) {
  static std::atomic<int> ran;
  ran.store(0);
  const auto count = [](void*) -> void* {
    ran.fetch_add(1);
    return nullptr;
  };
  for (int i = 0; i < 300; ++i) {
    const pthread_t thread = MustCreate(count, nullptr);
    if (i % 3 == 0) usleep(100);  // detached when it has ended, maybe
    EXPECT_EQ(stacks_.Detach(thread), 0);
  }
  pthread_attr_t attributes;
  ASSERT_EQ(pthread_attr_init(&attributes), 0);
  ASSERT_EQ(pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED), 0);
  for (int i = 0; i < 300; ++i) MustCreate(count, nullptr, &attributes);
  pthread_attr_destroy(&attributes);
  EXPECT_TRUE(Eventually([] { return ran.load() == 600; }));
  EXPECT_TRUE(AllGone());
  EXPECT_LT(Slots(), 400u);
}

// A thread that has ended for its own part, and is still running: in a destructor after ours.
TEST_F(ThreadStacksTest, AStackIsNotUsedWhileItsThreadIsOnTheWayOut) {
  static sem_t go;
  static pthread_key_t key;
  ASSERT_EQ(sem_init(&go, 0, 0), 0);
  ASSERT_EQ(pthread_key_create(&key, [](void* round) {
    // Three rounds: the last one comes after every other key's second.
    const auto number = reinterpret_cast<std::uintptr_t>(round);
    if (number < 3) {
      pthread_setspecific(key, reinterpret_cast<void*>(number + 1));
    } else {
      while (sem_wait(&go) != 0) {
      }
    }
  }), 0);
  const auto linger = [](void*) -> void* {
    pthread_setspecific(key, reinterpret_cast<void*>(1));
    return nullptr;
  };
  const pthread_t thread = MustCreate(linger, nullptr);
  const StackSlot* slot = stacks_.pool()->Find(reinterpret_cast<void*>(thread));
  ASSERT_EQ(stacks_.Detach(thread), 0);
  ASSERT_TRUE(Eventually([this] { return stacks_.Exiting() == 1; }));
  for (int i = 0; i < 20; ++i) {
    const pthread_t other = MustCreate(Return, nullptr);
    EXPECT_NE(stacks_.pool()->Find(reinterpret_cast<void*>(other)), slot);
    MustJoin(other);
  }
  EXPECT_EQ(stacks_.Exiting(), 1u);
  sem_post(&go);
  EXPECT_TRUE(AllGone());
  EXPECT_EQ(stacks_.Exiting(), 0u);
  pthread_key_delete(key);
}

TEST_F(ThreadStacksTest, ReportsTheGuardThatWasAskedFor) {
  pthread_attr_t attributes;
  ASSERT_EQ(pthread_attr_init(&attributes), 0);
  ASSERT_EQ(pthread_attr_setguardsize(&attributes, 10'000), 0);
  Held held;
  const pthread_t thread = MustCreate(Held::Run, &held, &attributes);
  pthread_attr_t now;
  ASSERT_EQ(stacks_.GetAttributes(thread, &now), 0);
  std::size_t guard = 0;
  EXPECT_EQ(pthread_attr_getguardsize(&now, &guard), 0);
  EXPECT_EQ(guard, 12'288u);
  sem_post(&held.go);
  MustJoin(thread);
  pthread_attr_destroy(&now);
  pthread_attr_destroy(&attributes);
}

TEST_F(ThreadStacksTest, GivenStacksPassThrough) {
  constexpr std::size_t kSize = std::size_t{1} << 20;
  std::vector<char> memory(kSize);
  pthread_attr_t attributes;
  ASSERT_EQ(pthread_attr_init(&attributes), 0);
  ASSERT_EQ(pthread_attr_setstack(&attributes, memory.data(), kSize), 0);
  const pthread_t thread = MustCreate(Return, nullptr, &attributes);
  EXPECT_EQ(InUse(), 0u);
  EXPECT_EQ(stacks_.pool()->Find(reinterpret_cast<void*>(thread)), nullptr);
  MustJoin(thread);
  pthread_attr_destroy(&attributes);
}

// ---- Errors ----

int RefuseToCreate(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) { return EAGAIN; }

TEST(ThreadStacksErrorTest, ARefusedThreadLosesNothing) {
  vm::os::LinuxKernel kernel;
  TestSpace space(kernel, {.reserve = vm::GiB(16), .min_reserve = vm::GiB(16), .regions_per_zone = 1});
  ThreadStacks stacks;
  LibcThreads libc = kLibc;
  libc.create = RefuseToCreate;
  stacks.UseLibc(libc);
  pthread_t thread;
  EXPECT_EQ(stacks.Create(&thread, nullptr, Return, nullptr), EAGAIN);  // not started: passed through
  ASSERT_TRUE(stacks.Start(*space, ThreadStacks::Overflows::kSilent).ok());
  ASSERT_TRUE(stacks.Start(*space, ThreadStacks::Overflows::kSilent).ok());  // does nothing
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(stacks.Create(&thread, nullptr, Return, nullptr), EAGAIN);
  EXPECT_EQ(stacks.pool()->Stats().slots, 1u);
  EXPECT_EQ(stacks.pool()->Stats().in_use, 0u);
  stacks.Stop();
}

TEST(ThreadStacksErrorTest, NoPool) {
  FakeKernel kernel;
  TestSpace space(kernel);
  ThreadStacks stacks;
  stacks.UseLibc(kLibc);
  kernel.FailAlways(Operation::kProtect, ENOMEM);
  EXPECT_EQ(stacks.Start(*space, ThreadStacks::Overflows::kSilent), vm::Error::System(ENOMEM));
  pthread_t thread;
  EXPECT_EQ(stacks.Create(&thread, nullptr, Return, nullptr), 0);
  EXPECT_EQ(stacks.Join(thread, nullptr), 0);
  kernel.StopFailing();
  EXPECT_TRUE(stacks.Start(*space, ThreadStacks::Overflows::kSilent).ok());
  stacks.Stop();
}

// libc finds a stack where the pool has none.
TEST_F(ThreadStacksFakeTest, WithoutMemoryForStacksLibcServes) {
  for (const Operation operation : {Operation::kProtect, Operation::kInstallGuard}) {
    kernel_.FailAlways(operation, ENOMEM);
    const pthread_t thread = MustCreate(Return, nullptr);
    EXPECT_EQ(stacks_.pool()->Find(reinterpret_cast<void*>(thread)), nullptr);
    MustJoin(thread);
    kernel_.StopFailing();
  }
  EXPECT_EQ(InUse(), 0u);
  const pthread_t thread = MustCreate(Return, nullptr);
  EXPECT_NE(stacks_.pool()->Find(reinterpret_cast<void*>(thread)), nullptr);
  MustJoin(thread);
}

TEST_F(ThreadStacksFakeTest, WithoutRoomLibcServes) {
  pthread_attr_t attributes;
  ASSERT_EQ(pthread_attr_init(&attributes), 0);
  ASSERT_EQ(pthread_attr_setstacksize(&attributes, std::size_t{6} << 30), 0);
  const pthread_t thread = MustCreate(Return, nullptr, &attributes);
  EXPECT_EQ(InUse(), 0u);
  MustJoin(thread);
  pthread_attr_destroy(&attributes);
}

// ---- Many ----

TEST_F(ThreadStacksTest, Churn) {
  constexpr int kRounds = kSanitized ? 100 : 1000;
  std::vector<std::thread> creators;
  for (int i = 0; i < 4; ++i) {
    creators.emplace_back([this] {
      pthread_attr_t attributes;
      pthread_attr_init(&attributes);
      for (int round = 0; round < kRounds; ++round) {
        pthread_attr_setstacksize(&attributes, (round % 2 == 0 ? MiB(2) : MiB(4)).value);
        pthread_t threads[6];
        for (pthread_t& thread : threads) thread = MustCreate(Return, &thread, &attributes);
        for (int k = 0; k < 6; ++k) {
          if (k % 3 == 0) {
            FREEHOLD_CHECK(stacks_.Detach(threads[k]) == 0);
            continue;
          }
          void* result = nullptr;
          FREEHOLD_CHECK(stacks_.Join(threads[k], &result) == 0 && result == &threads[k]);
        }
      }
      pthread_attr_destroy(&attributes);
    });
  }
  for (std::thread& creator : creators) creator.join();
  EXPECT_TRUE(AllGone());
  EXPECT_LT(Slots(), 500u);
}

#if !defined(FREEHOLD_TSAN)
// Of this process, as the kernel counts.
std::size_t Threads() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<std::size_t>(std::distance(begin(tasks), end(tasks)));
}

// The child has one thread; the stacks of the others serve new ones.
TEST_F(ThreadStacksTest, Fork) {
  std::vector<Held> held(10);
  std::vector<pthread_t> threads;
  for (Held& one : held) threads.push_back(MustCreate(Held::Run, &one));
  const pthread_t gone = MustCreate(Return, nullptr);
  ASSERT_EQ(stacks_.Detach(gone), 0);
  // AddressSanitizer's allocator, which starting and ending threads are in, is copied as they left it.
  ASSERT_TRUE(Eventually([&] {
    const auto waits = [](const Held& one) { return one.frame.load() != nullptr; };
    return std::all_of(held.begin(), held.end(), waits) && Threads() == 1 + held.size();
  }));
  const std::uint64_t slots = Slots();
  stacks_.PrepareFork();
  space_->PrepareFork();
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(30);
    space_->ChildAfterFork();
    stacks_.ChildAfterFork();
    FREEHOLD_CHECK(InUse() >= 10);  // until the child needs them
    for (int i = 0; i < 5; ++i) {
      pthread_t batch[5];
      for (pthread_t& thread : batch) thread = MustCreate(Return, nullptr);
      for (pthread_t thread : batch) MustJoin(thread);
    }
    FREEHOLD_CHECK(InUse() == 0 && Slots() == slots);
    _exit(0);
  }
  space_->ParentAfterFork();
  stacks_.ParentAfterFork();
  int status = -1;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_EQ(status, 0);
  for (Held& one : held) sem_post(&one.go);
  for (const pthread_t thread : threads) MustJoin(thread);
  EXPECT_TRUE(AllGone());
}
#endif

}  // namespace
}  // namespace freehold::runtime
