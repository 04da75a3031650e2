#include "vm/os/futex.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <atomic>
#include <cerrno>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "vm/os/linux_kernel.h"
#include "vm/os/raw_syscall.h"

namespace freehold::vm::os {
namespace {

Nanoseconds Now() { return LinuxKernel().Now(); }

// Waits until FutexWake finds a sleeper: there is no other way to see that a thread sleeps.
void WakeOneSleeper(std::atomic<std::uint32_t>* word) {
  while (FutexWake(word, 1) == 0) std::this_thread::yield();
}

TEST(FutexTest, AWordThatChangedIsNotWaitedFor) {
  std::atomic<std::uint32_t> word{1};
  EXPECT_EQ(FutexWait(&word, 2), FutexResult::kChanged);
}

TEST(FutexTest, ADeadlineInThePastIsATimeout) {
  std::atomic<std::uint32_t> word{1};
  const Nanoseconds past{0};
  EXPECT_EQ(FutexWait(&word, 1, &past), FutexResult::kTimeout);
}

TEST(FutexTest, ADeadlineIsAnAbsoluteMonotonicTime) {
  std::atomic<std::uint32_t> word{1};
  const Nanoseconds deadline = Now() + Milliseconds(20);
  FutexResult result;
  do {
    result = FutexWait(&word, 1, &deadline);
  } while (result == FutexResult::kWoken || result == FutexResult::kInterrupted);
  EXPECT_EQ(result, FutexResult::kTimeout);
  EXPECT_GE(Now(), deadline);
}

TEST(FutexTest, AWakeEndsTheWait) {
  std::atomic<std::uint32_t> word{1};
  std::atomic<bool> woken{false};
  std::thread sleeper([&] {
    EXPECT_EQ(FutexWait(&word, 1), FutexResult::kWoken);
    woken = true;
  });
  EXPECT_FALSE(woken.load());
  WakeOneSleeper(&word);
  sleeper.join();
  EXPECT_TRUE(woken.load());
}

TEST(FutexTest, WakeCountsWhomItWoke) {
  std::atomic<std::uint32_t> word{1};
  EXPECT_EQ(FutexWake(&word, 1), 0);
  std::atomic<int> awake{0};
  std::vector<std::thread> sleepers;
  for (int i = 0; i < 3; ++i) {
    sleepers.emplace_back([&] {
      EXPECT_EQ(FutexWait(&word, 1), FutexResult::kWoken);
      ++awake;
    });
  }
  WakeOneSleeper(&word);
  int woken = 1;
  while (woken < 3) woken += FutexWake(&word, 3 - woken);
  for (std::thread& sleeper : sleepers) sleeper.join();
  EXPECT_EQ(awake.load(), 3);
  EXPECT_EQ(FutexWake(&word, 1), 0);
}

TEST(FutexTest, AWakeOfAWordThatIsGoneWakesNobody) {
  LinuxKernel kernel;
  const Result<PageRange> memory = kernel.Reserve(Pages{1}, Pages{1});
  ASSERT_TRUE(memory.ok());
  ASSERT_TRUE(kernel.Release(*memory).ok());
  EXPECT_EQ(FutexWake(reinterpret_cast<std::atomic<std::uint32_t>*>(memory->address()), 1), 0);
}

TEST(FutexTest, ASignalHandlerInterruptsTheWait) {
  struct sigaction action = {};
  struct sigaction before;
  action.sa_handler = [](int) {};  // without SA_RESTART
  ASSERT_EQ(::sigaction(SIGUSR1, &action, &before), 0);
  std::atomic<std::uint32_t> word{1};
  std::atomic<bool> interrupted{false};
  std::thread sleeper([&] {
    while (FutexWait(&word, 1) != FutexResult::kInterrupted) {
    }
    interrupted = true;
  });
  while (!interrupted) {
    ASSERT_EQ(::pthread_kill(sleeper.native_handle(), SIGUSR1), 0);
    std::this_thread::yield();
  }
  sleeper.join();
  EXPECT_EQ(::sigaction(SIGUSR1, &before, nullptr), 0);
}

TEST(FutexTest, KeepsErrno) {
  std::atomic<std::uint32_t> word{1};
  const Nanoseconds past{0};
  errno = 4711;
  (void)FutexWait(&word, 2);
  (void)FutexWait(&word, 1, &past);
  (void)FutexWake(&word, 1);
  EXPECT_EQ(errno, 4711);
}

TEST(FutexDeathTest, AWordOutsideOfMemoryIsABrokenInvariant) {
  auto* word = reinterpret_cast<std::atomic<std::uint32_t>*>(std::uintptr_t{0x1000});
  EXPECT_DEATH((void)FutexWait(word, 1), "futex wait failed word=0x1000 errno=0xe");
}

}  // namespace
}  // namespace freehold::vm::os
