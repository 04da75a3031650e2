#include "vm/sync/spin_lock.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "vm/sync/clock.h"
#include "vm/sync/parking.h"

namespace freehold::vm::sync {
namespace {

constinit SpinLock constinit_lock(LockRank::kLeaf);

#if !defined(FREEHOLD_DEBUG_CHECKS)
static_assert(sizeof(SpinLock) == 4);
#endif

bool IsFree(SpinLock& lock) {
  bool free = false;
  std::thread([&] {
    SpinLockTryHolder holder(lock);
    free = holder.owns();
  }).join();
  return free;
}

TEST(SpinLockTest, HolderHoldsWhileInScope) {
  {
    SpinLockHolder holder(constinit_lock);
    constinit_lock.AssertHeld();
    EXPECT_FALSE(IsFree(constinit_lock));
  }
  EXPECT_TRUE(IsFree(constinit_lock));
}

TEST(SpinLockTest, TryHolderOwnsWhatItGot) {
  SpinLock lock(LockRank::kLeaf);
  {
    SpinLockTryHolder holder(lock);
    EXPECT_TRUE(holder.owns());
    EXPECT_FALSE(IsFree(lock));
  }
  EXPECT_TRUE(IsFree(lock));
}

TEST(SpinLockTest, WaitersOutlastALongHold) {
  SpinLock lock(LockRank::kLeaf);
  std::atomic<int> entered{0};
  std::vector<std::thread> waiters;
  {
    SpinLockHolder holder(lock);
    for (int i = 0; i < 3; ++i) {
      waiters.emplace_back([&] {
        SpinLockHolder inner(lock);
        entered.fetch_add(1);
      });
    }
    // Long enough for all of them to sleep.
    const Nanoseconds end = MonotonicNow() + Milliseconds(20);
    while (MonotonicNow() < end) std::this_thread::yield();
    EXPECT_EQ(entered.load(), 0);
  }
  for (std::thread& waiter : waiters) waiter.join();
  EXPECT_EQ(entered.load(), 3);
  EXPECT_TRUE(IsFree(lock));
}

// A release may miss a sleeper that announces itself at that very moment.
TEST(SpinLockTest, ASleeperThatNobodyWakesLooksAgain) {
  SpinLock lock(LockRank::kLeaf);
  std::atomic<bool> entered{false};
  lock.LockForFork();
  std::thread sleeper([&] {
    SpinLockHolder inner(lock);
    entered.store(true);
  });
  const Nanoseconds asleep = MonotonicNow() + Milliseconds(20);
  while (MonotonicNow() < asleep) std::this_thread::yield();
  EXPECT_FALSE(entered.load());
  lock.ReinitAfterFork();  // frees it and wakes nobody
  sleeper.join();
  EXPECT_TRUE(entered.load());
  lock.UnlockAfterFork();
  EXPECT_TRUE(IsFree(lock));
}

TEST(SpinLockTest, ForkedChildFindsItFree) {
  SpinLock lock(LockRank::kLeaf);
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] {
      while (!stop.load()) SpinLockHolder holder(lock);
    });
  }
  for (int round = 0; round < 30; ++round) {
    lock.LockForFork();
    const pid_t pid = fork();
    lock.UnlockAfterFork();
    if (pid == 0) {
      alarm(20);
      { SpinLockHolder holder(lock); }
      _exit(0);
    }
    int status = 0;
    ASSERT_EQ(waitpid(pid, &status, 0), pid);
    ASSERT_EQ(status, 0);
  }
  stop.store(true);
  for (std::thread& thread : threads) thread.join();
}

TEST(SpinLockTest, ReinitAfterForkFreesWhatNobodyHolds) {
  SpinLock lock(LockRank::kLeaf);
  std::atomic<bool> held{false};
  std::atomic<bool> stop{false};
  std::thread holder([&] {
    SpinLockHolder inner(lock);
    held.store(true);
    while (!stop.load()) std::this_thread::yield();
  });
  while (!held.load()) std::this_thread::yield();
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(20);
    lock.ReinitAfterFork();
    { SpinLockHolder inner(lock); }
    _exit(0);
  }
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_EQ(status, 0);
  stop.store(true);
  holder.join();
}

TEST(SpinLockStressTest, CountsRight) {
#if defined(FREEHOLD_TSAN)
  constexpr int kRounds = 20'000;
#else
  constexpr int kRounds = 200'000;
#endif
  for (const int threads : {2, 4}) {
    SpinLock lock(LockRank::kLeaf);
    std::uint64_t count = 0;  // plain: ThreadSanitizer watches
    std::vector<std::thread> workers;
    for (int i = 0; i < threads; ++i) {
      workers.emplace_back([&] {
        for (int round = 0; round < kRounds; ++round) {
          if (round % 16 == 0) {
            SpinLockTryHolder holder(lock);
            if (holder.owns()) ++count;
            if (holder.owns()) continue;
          }
          SpinLockHolder holder(lock);
          ++count;
        }
      });
    }
    for (std::thread& worker : workers) worker.join();
    EXPECT_EQ(count, static_cast<std::uint64_t>(threads) * kRounds);
  }
}

TEST(ParkerTest, SignalBeforeParkIsKept) {
  Parker parker;
  parker.Unpark();
  EXPECT_TRUE(parker.Park());
  EXPECT_TRUE(parker.Park());  // until reset
  parker.Reset();
  const Nanoseconds past{1};
  EXPECT_FALSE(parker.Park(&past));
}

TEST(ParkerTest, TimesOutThenStillTakesTheSignal) {
  Parker parker;
  const Nanoseconds deadline = MonotonicNow() + Milliseconds(5);
  EXPECT_FALSE(parker.Park(&deadline));
  EXPECT_GE(MonotonicNow(), deadline);
  std::thread signaller([&] { parker.Unpark(); });
  EXPECT_TRUE(parker.Park());
  signaller.join();
}

TEST(ParkerStressTest, PingPong) {
  constexpr int kRounds = 20'000;
  Parker ping;
  Parker pong;
  int message = 0;  // plain: handed over by the signals
  std::thread other([&] {
    for (int round = 0; round < kRounds; ++round) {
      ping.Park();
      ping.Reset();
      ++message;
      pong.Unpark();
    }
  });
  for (int round = 0; round < kRounds; ++round) {
    ++message;
    ping.Unpark();
    pong.Park();
    pong.Reset();
    ASSERT_EQ(message, 2 * round + 2);
  }
  other.join();
}

}  // namespace
}  // namespace freehold::vm::sync
