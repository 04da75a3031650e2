// Many threads on one RangeLock: pages carry plain data, so ThreadSanitizer sees every missing
// order, and marks of who is inside, so wrong grants show without it.
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "vm/page_range.h"
#include "vm/sync/clock.h"
#include "vm/sync/range_lock.h"
#include "vm/units.h"

namespace freehold::vm::sync {
namespace {

using Guard = RangeLock::Guard;

#if defined(FREEHOLD_TSAN) || defined(FREEHOLD_ASAN)
constexpr int kRounds = 20'000;
#else
constexpr int kRounds = 40'000;
#endif
constexpr std::size_t kThreads = 4;
constexpr std::size_t kPages = 32;

// Memory as a range lock's users see it.
class Memory {
 public:
  void Enter(PageRange range, LockMode mode) {
    for (std::size_t page = range.first.value; page < range.end.value; ++page) {
      const int before = inside_[page].fetch_add(Weight(mode));
      EXPECT_TRUE(mode == LockMode::kExclusive ? before == 0 : before < kWriter) << "page " << page;
    }
  }
  void Downgrade(PageRange range) {
    for (std::size_t page = range.first.value; page < range.end.value; ++page) {
      inside_[page].fetch_sub(kWriter - 1);
    }
  }
  void Leave(PageRange range, LockMode mode) {
    for (std::size_t page = range.first.value; page < range.end.value; ++page) {
      inside_[page].fetch_sub(Weight(mode));
    }
  }
  // REQUIRES: exclusive.
  void Write(PageRange range) {
    for (std::size_t page = range.first.value; page < range.end.value; ++page) ++data_[page];
  }
  // REQUIRES: shared.
  std::uint64_t Read(PageRange range) const {
    std::uint64_t sum = 0;
    for (std::size_t page = range.first.value; page < range.end.value; ++page) sum += data_[page];
    return sum;
  }

 private:
  static constexpr int kWriter = 1000;
  static int Weight(LockMode mode) { return mode == LockMode::kExclusive ? kWriter : 1; }

  std::array<std::atomic<int>, kPages> inside_{};
  std::array<std::uint64_t, kPages> data_{};
};

class RangeLockStressTest : public ::testing::TestWithParam<LockPolicy> {
 protected:
  RangeLock lock_{GetParam()};
  Memory memory_;
  std::atomic<std::uint64_t> written_{0};  // pages
  std::size_t scale_ = 1;  // how many pages of the lock a page of memory_ stands for

  PageRange Scaled(PageRange range) const {
    return {{range.first.value * scale_}, {range.end.value * scale_}};
  }

  void Operate(std::mt19937_64& random) {
    const std::uint64_t dice = random();
    const LockMode mode = dice % 2 == 0 ? LockMode::kExclusive : LockMode::kShared;
    const std::size_t first = dice / 2 % kPages;
    const std::size_t count = 1 + dice / 64 % (kPages - first);
    PageRange range{{first}, {first + (dice % 3 == 0 ? count : 1)}};
    switch (dice / 4096 % 16) {
      case 0: {
        Use(Guard::WholeSpace(lock_, mode, Operation::kTest), {{0}, {kPages}}, dice);
        return;
      }
      case 1:
      case 2: return Use(Guard::Try(lock_, Scaled(range), mode, Operation::kTest), range, dice);
      case 3:
      case 4: {
        const Nanoseconds deadline = MonotonicNow() + Microseconds(dice / 65536 % 64);
        return Use(Guard::Until(lock_, Scaled(range), mode, Operation::kTest, deadline), range,
                   dice);
      }
      default: return Use(Guard(lock_, Scaled(range), mode, Operation::kTest), range, dice);
    }
  }

  void RunRandomOperations() {
    std::atomic<bool> stop{false};
    std::thread inspector([&] {
      while (!stop.load()) {
        lock_.CheckInvariants();
        for (const HolderInfo& info : lock_.Holders(Scaled({{0}, {kPages}})))
          EXPECT_NE(info.thread_id, 0u);
        std::this_thread::yield();
      }
    });
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < kThreads; ++i) {
      threads.emplace_back([&, i] {
        std::mt19937_64 random(i);
        for (int round = 0; round < kRounds; ++round) Operate(random);
      });
    }
    for (std::thread& thread : threads) thread.join();
    stop.store(true);
    inspector.join();
    EXPECT_EQ(memory_.Read({{0}, {kPages}}), written_.load());
    EXPECT_EQ(lock_.Holders(Scaled({{0}, {kPages}})).total, 0u);
    lock_.CheckInvariants();
  }

 private:
  // The guard comes as a prvalue and is built in place.
  void Use(Guard&& guard, PageRange range, std::uint64_t dice) {
    if (!guard.held()) return;
    EXPECT_TRUE(guard.Covers(Scaled(range), guard.mode()));
    memory_.Enter(range, guard.mode());
    if (guard.mode() == LockMode::kExclusive) {
      memory_.Write(range);
      written_.fetch_add(range.count().value, std::memory_order_relaxed);
      if (dice >> 32 & 1) {
        memory_.Downgrade(range);
        guard.Downgrade();
      }
    }
    if (guard.mode() == LockMode::kShared) memory_.Read(range);
    if ((dice >> 33) % 64 == 0) std::this_thread::yield();
    memory_.Leave(range, guard.mode());
  }
};

INSTANTIATE_TEST_SUITE_P(Policies, RangeLockStressTest,
                         ::testing::Values(LockPolicy::kCoarse, LockPolicy::kTree,
                                           LockPolicy::kAdaptive),
                         [](const auto& info) { return ToString(info.param); });

TEST_P(RangeLockStressTest, RandomOperations) { RunRandomOperations(); }

// For kAdaptive: a granule each, a few, and more than a few.
TEST_P(RangeLockStressTest, RandomOperationsAcrossGranules) {
  scale_ = kPagesPerHugePage;
  RunRandomOperations();
}

// Readers that always overlap each other keep the range held; a writer gets in all the same, and so
// do readers between writers.
TEST_P(RangeLockStressTest, NeitherModeStarves) {
  constexpr PageRange kRange{{0}, {8}};
  for (const LockMode many : {LockMode::kShared, LockMode::kExclusive}) {
    const LockMode one = many == LockMode::kShared ? LockMode::kExclusive : LockMode::kShared;
    std::atomic<bool> stop{false};
    std::vector<std::thread> crowd;
    for (std::size_t i = 0; i < 3; ++i) {
      crowd.emplace_back([&] {
        while (!stop.load()) {
          const Guard guard(lock_, kRange, many, Operation::kTest);
          if (many == LockMode::kExclusive) memory_.Write(kRange);
        }
      });
    }
    for (int round = 0; round < 200; ++round) {
      const Guard guard(lock_, kRange, one, Operation::kTest);
      if (one == LockMode::kExclusive) memory_.Write(kRange);
    }
    stop.store(true);
    for (std::thread& thread : crowd) thread.join();
  }
}

}  // namespace
}  // namespace freehold::vm::sync
