#include "vm/sync/epoch.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "vm/sync/clock.h"
#include "vm/units.h"

namespace freehold::vm::sync {
namespace {

constinit EpochDomain constinit_domain;

struct Flag : DeferredCallback {
  std::atomic<bool> ran{false};
  static void Run(DeferredCallback* node) { static_cast<Flag*>(node)->ran.store(true); }
};

// Enough polls for any grace period without readers.
void PollThrough(EpochDomain& domain) {
  for (int i = 0; i < 4; ++i) domain.Poll();
}

TEST(EpochTest, WithoutReadersTheNextPollRunsIt) {
  EpochDomain& domain = constinit_domain;
  Flag flag;
  EXPECT_EQ(domain.Poll(), 0u);
  domain.Defer(&flag, &Flag::Run);
  EXPECT_TRUE(domain.HasDeferred());
  EXPECT_FALSE(flag.ran.load());
  EXPECT_EQ(domain.Poll(), 1u);
  EXPECT_TRUE(flag.ran.load());
  EXPECT_FALSE(domain.HasDeferred());
}

TEST(EpochTest, OlderReaderHoldsItUp) {
  EpochDomain domain;
  Flag flag;
  {
    const EpochDomain::ReadGuard reader(domain);
    domain.Defer(&flag, &Flag::Run);
    PollThrough(domain);
    EXPECT_FALSE(flag.ran.load());
    {
      const EpochDomain::ReadGuard nested(domain);
      PollThrough(domain);
    }
    PollThrough(domain);
    EXPECT_FALSE(flag.ran.load());
  }
  PollThrough(domain);
  EXPECT_TRUE(flag.ran.load());
}

// Each new reader starts before the old one leaves: somebody is always inside, but nobody old.
TEST(EpochTest, YoungerReadersDoNotHoldItUp) {
  EpochDomain domain;
  Flag flag;
  auto reader = std::make_unique<EpochDomain::ReadGuard>(domain);
  domain.Defer(&flag, &Flag::Run);
  for (int i = 0; i < 4 && !flag.ran.load(); ++i) {
    auto next = std::make_unique<EpochDomain::ReadGuard>(domain);
    reader = std::move(next);
    domain.Poll();
  }
  EXPECT_TRUE(flag.ran.load());
}

TEST(EpochTest, RunsInOrderOfDefer) {
  static std::vector<DeferredCallback*> order;
  order.clear();
  EpochDomain domain;
  std::array<DeferredCallback, 5> nodes;
  for (DeferredCallback& node : nodes) {
    domain.Defer(&node, [](DeferredCallback* which) { order.push_back(which); });
  }
  EXPECT_EQ(domain.Poll(), 5u);
  for (std::size_t i = 0; i < nodes.size(); ++i) EXPECT_EQ(order[i], &nodes[i]);
}

// What is deferred in the middle of a grace period waits for its own.
TEST(EpochTest, LateDeferWaitsForItsOwnReaders) {
  EpochDomain domain;
  Flag first;
  Flag second;
  auto old_reader = std::make_unique<EpochDomain::ReadGuard>(domain);
  domain.Defer(&first, &Flag::Run);
  domain.Poll();
  auto new_reader = std::make_unique<EpochDomain::ReadGuard>(domain);
  domain.Defer(&second, &Flag::Run);
  old_reader.reset();
  PollThrough(domain);
  EXPECT_FALSE(second.ran.load());
  new_reader.reset();
  PollThrough(domain);
  EXPECT_TRUE(first.ran.load());
  EXPECT_TRUE(second.ran.load());
}

struct Chain : DeferredCallback {
  EpochDomain* domain;
  int left;

  static void Run(DeferredCallback* node) {
    auto* const chain = static_cast<Chain*>(node);
    EXPECT_EQ(chain->domain->Poll(), 0u);
    if (--chain->left > 0) chain->domain->Defer(chain, &Run);
  }
};

TEST(EpochTest, CallbackMayDeferAndPoll) {
  EpochDomain domain;
  Chain chain;
  chain.domain = &domain;
  chain.left = 3;
  domain.Defer(&chain, &Chain::Run);
  for (int i = 0; i < 12; ++i) domain.Poll();
  EXPECT_EQ(chain.left, 0);
}

TEST(EpochTest, SleepingReaderOnAnotherThread) {
  EpochDomain domain;
  Flag flag;
  std::atomic<bool> inside{false};
  std::atomic<bool> leave{false};
  std::thread reader([&] {
    const EpochDomain::ReadGuard guard(domain);
    inside.store(true);
    while (!leave.load()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_FALSE(flag.ran.load());
  });
  while (!inside.load()) std::this_thread::yield();
  // The writer goes on while the reader sleeps.
  const Nanoseconds begin = MonotonicNow();
  domain.Defer(&flag, &Flag::Run);
  PollThrough(domain);
  EXPECT_LT(MonotonicNow(), begin + Milliseconds(2000));
  EXPECT_FALSE(flag.ran.load());
  leave.store(true);
  reader.join();
  PollThrough(domain);
  EXPECT_TRUE(flag.ran.load());
}

TEST(EpochTest, BarrierWaitsForReadersAndRunsEverything) {
  EpochDomain domain;
  Flag flag;
  std::atomic<bool> inside{false};
  std::thread reader([&] {
    const EpochDomain::ReadGuard guard(domain);
    inside.store(true);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_FALSE(flag.ran.load());
  });
  while (!inside.load()) std::this_thread::yield();
  domain.Defer(&flag, &Flag::Run);
  domain.Barrier();
  EXPECT_TRUE(flag.ran.load());
  reader.join();
  domain.Barrier();  // with nothing deferred
}

EpochDomain* handler_domain = nullptr;

TEST(EpochTest, ReadersInSignalHandlers) {
  EpochDomain domain;
  handler_domain = &domain;
  struct sigaction action {};
  struct sigaction before {};
  action.sa_handler = [](int) { const EpochDomain::ReadGuard guard(*handler_domain); };
  ASSERT_EQ(sigaction(SIGUSR1, &action, &before), 0);
  Flag flag;
  {
    const EpochDomain::ReadGuard guard(domain);
    ASSERT_EQ(raise(SIGUSR1), 0);
    domain.Defer(&flag, &Flag::Run);
    PollThrough(domain);
    EXPECT_FALSE(flag.ran.load());
  }
  PollThrough(domain);
  EXPECT_TRUE(flag.ran.load());
  sigaction(SIGUSR1, &before, nullptr);
}

TEST(EpochTest, ChildOfForkForgetsReadersAndKeepsCallbacks) {
  EpochDomain domain;
  Flag flag;
  std::atomic<bool> inside{false};
  std::atomic<bool> leave{false};
  std::thread reader([&] {
    const EpochDomain::ReadGuard guard(domain);
    inside.store(true);
    while (!leave.load()) std::this_thread::yield();
  });
  while (!inside.load()) std::this_thread::yield();
  domain.Defer(&flag, &Flag::Run);
  domain.Poll();
  domain.LockForFork();
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(20);
    domain.ReinitAfterFork();
    PollThrough(domain);
    _exit(flag.ran.load() ? 0 : 1);
  }
  domain.UnlockAfterFork();
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_EQ(status, 0);
  PollThrough(domain);
  EXPECT_FALSE(flag.ran.load());
  leave.store(true);
  reader.join();
  domain.Barrier();
  EXPECT_TRUE(flag.ran.load());
}

// Readers follow a pointer that writers replace; the old object's memory is scribbled over when
// reclaimed. Plain fields: ThreadSanitizer sees a callback that runs without an order after a
// reader.
TEST(EpochStressTest, NoReaderSeesAReclaimedObject) {
#if defined(FREEHOLD_TSAN)
  constexpr int kReplacements = 3'000;
#else
  constexpr int kReplacements = 100'000;
#endif
  struct Object : DeferredCallback {
    std::uint64_t value;
    std::uint64_t complement;
    std::atomic<int>* live;
  };
  EpochDomain domain;
  std::atomic<int> live{0};
  auto make = [&](std::uint64_t value) {
    auto* const object = new Object;
    object->value = value;
    object->complement = ~value;
    object->live = &live;
    live.fetch_add(1);
    return object;
  };
  std::array<std::atomic<Object*>, 2> slots;
  for (auto& slot : slots) slot.store(make(0));
  std::atomic<bool> stop{false};

  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      for (std::uint64_t round = 0; !stop.load(); ++round) {
        const EpochDomain::ReadGuard guard(domain);
        const Object* const object = slots[round % 2].load(std::memory_order_acquire);
        if (round % 64 == 0 && i == 0) std::this_thread::yield();
        EXPECT_EQ(object->value, ~object->complement);
      }
    });
  }
  threads.emplace_back([&] {
    while (!stop.load()) {
      domain.Poll();
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> writers;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    writers.emplace_back([&, i] {
      for (int round = 1; round <= kReplacements; ++round) {
        Object* const old = slots[i].exchange(make(static_cast<std::uint64_t>(round)));
        domain.Defer(old, [](DeferredCallback* node) {
          auto* const object = static_cast<Object*>(node);
          object->value = object->complement = 0;
          object->live->fetch_sub(1);
          delete object;
        });
        if (round % 256 == 0) domain.Poll();
      }
    });
  }
  for (std::thread& writer : writers) writer.join();
  stop.store(true);
  for (std::thread& thread : threads) thread.join();
  domain.Barrier();
  EXPECT_EQ(live.load(), 2);
  for (auto& slot : slots) delete slot.load();
}

}  // namespace
}  // namespace freehold::vm::sync
