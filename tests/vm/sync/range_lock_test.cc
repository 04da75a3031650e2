// RangeLock's contract, each policy in turn: modes, order, deadlines, attribution, fork.
#include "vm/sync/range_lock.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "vm/os/thread_id.h"
#include "vm/page_range.h"
#include "vm/sync/clock.h"
#include "vm/units.h"

namespace freehold::vm::sync {
namespace {

using Guard = RangeLock::Guard;
using State = HolderInfo::State;

constexpr LockMode kS = LockMode::kShared;
constexpr LockMode kX = LockMode::kExclusive;

constexpr PageRange Range(std::size_t first, std::size_t end) { return {{first}, {end}}; }
constexpr PageRange kAll = Range(0, ~std::size_t{0} >> kPageShift);

// Constant initialization is part of the contract: locks are usable before any constructor has run.
constinit RangeLock constinit_coarse(LockPolicy::kCoarse);
constinit RangeLock constinit_tree(LockPolicy::kTree);
constinit RangeLock constinit_adaptive(LockPolicy::kAdaptive);

bool IsHeldBy(const RangeLock& lock, std::uint32_t thread, State state) {
  for (const HolderInfo& info : lock.Holders(kAll)) {
    if (info.thread_id == thread && info.state == state) return true;
  }
  return false;
}

// A thread that holds, or waits for, one range.
class Actor {
 public:
  // Starts to acquire and returns once that is decided: granted, or asleep in the lock.
  Actor(RangeLock& lock, PageRange range, LockMode mode) : lock_(lock) {
    thread_ = std::thread([this, range, mode] {
      thread_id_.store(os::CurrentThreadId());
      Guard guard(lock_, range, mode, Operation::kTest);
      granted_.store(true);
      while (!downgrade_.load() && !release_.load()) std::this_thread::yield();
      if (downgrade_.load()) {
        guard.Downgrade();
        downgraded_.store(true);
      }
      while (!release_.load()) std::this_thread::yield();
    });
    while (!granted_.load() &&
           (thread_id_.load() == 0 || !IsHeldBy(lock_, thread_id_.load(), State::kWaiting))) {
      std::this_thread::yield();
    }
  }
  ~Actor() {
    if (thread_.joinable()) Release();
  }

  bool granted() const { return granted_.load(); }
  std::uint32_t thread_id() const { return thread_id_.load(); }
  // Never returns if the lock does not grant it.
  void AwaitGrant() const {
    while (!granted()) std::this_thread::yield();
  }
  void Downgrade() {
    downgrade_.store(true);
    while (!downgraded_.load()) std::this_thread::yield();
  }
  void Release() {
    release_.store(true);
    thread_.join();
  }

 private:
  RangeLock& lock_;
  std::atomic<std::uint32_t> thread_id_{0};
  std::atomic<bool> granted_{false};
  std::atomic<bool> downgrade_{false};
  std::atomic<bool> downgraded_{false};
  std::atomic<bool> release_{false};
  std::thread thread_;
};

class RangeLockTest : public ::testing::TestWithParam<LockPolicy> {
 protected:
  bool precise() const { return GetParam() != LockPolicy::kCoarse; }
  Guard Try(PageRange range, LockMode mode) {
    return Guard::Try(lock_, range, mode, Operation::kTest);
  }
  // Whether another thread would get `range` at once.
  bool IsFree(PageRange range, LockMode mode) {
    bool free = false;
    std::thread([&] { free = Try(range, mode).held(); }).join();
    return free;
  }

  void TearDown() override {
    lock_.CheckInvariants();
    EXPECT_EQ(lock_.Holders(kAll).total, 0u);
    EXPECT_TRUE(IsFree(kAll, kX));
  }

  RangeLock lock_{GetParam()};
};

INSTANTIATE_TEST_SUITE_P(Policies, RangeLockTest,
                         ::testing::Values(LockPolicy::kCoarse, LockPolicy::kTree,
                                           LockPolicy::kAdaptive),
                         [](const auto& info) { return ToString(info.param); });

TEST_P(RangeLockTest, ExclusiveExcludesBothModes) {
  const Guard guard(lock_, Range(0, 8), kX, Operation::kTest);
  EXPECT_FALSE(IsFree(Range(0, 8), kX));
  EXPECT_FALSE(IsFree(Range(0, 8), kS));
  EXPECT_FALSE(IsFree(Range(7, 9), kS));
  EXPECT_FALSE(IsFree(kAll, kS));
  lock_.CheckInvariants();
}

TEST_P(RangeLockTest, SharedSharesAndExcludesExclusive) {
  const Guard guard(lock_, Range(0, 8), kS, Operation::kTest);
  EXPECT_TRUE(IsFree(Range(0, 8), kS));
  EXPECT_TRUE(IsFree(kAll, kS));
  EXPECT_FALSE(IsFree(Range(7, 9), kX));
  EXPECT_FALSE(IsFree(kAll, kX));
}

//      0       8       16
//      [--X---)               held
//              [--X---)       free if precise
TEST_P(RangeLockTest, DisjointRangesAreIndependentIfPrecise) {
  const Guard guard(lock_, Range(0, 8), kX, Operation::kTest);
  EXPECT_EQ(IsFree(Range(8, 16), kX), precise());
  EXPECT_EQ(IsFree(Range(8, 9), kS), precise());
}

TEST_P(RangeLockTest, ReleaseFrees) {
  {
    Guard guard(lock_, Range(0, 8), kX, Operation::kTest);
    guard.Release();
    EXPECT_FALSE(guard.held());
    EXPECT_TRUE(IsFree(Range(0, 8), kX));
  }
  EXPECT_TRUE(IsFree(Range(0, 8), kX));
  { const Guard guard(lock_, Range(0, 8), kS, Operation::kTest); }
  EXPECT_TRUE(IsFree(Range(0, 8), kX));
}

TEST_P(RangeLockTest, CoversWhatItExcludes) {
  Guard exclusive(lock_, Range(4, 8), kX, Operation::kTest);
  EXPECT_TRUE(exclusive.Covers(Range(4, 8), kX));
  EXPECT_TRUE(exclusive.Covers(Range(5, 6), kS));
  EXPECT_FALSE(exclusive.Covers(Range(3, 8), kS));
  EXPECT_FALSE(exclusive.Covers(Range(4, 9), kX));
  exclusive.Downgrade();
  EXPECT_TRUE(exclusive.Covers(Range(4, 8), kS));
  EXPECT_FALSE(exclusive.Covers(Range(4, 8), kX));
  EXPECT_EQ(exclusive.mode(), kS);
  exclusive.Release();
  EXPECT_FALSE(exclusive.Covers(Range(4, 8), kS));
}

TEST_P(RangeLockTest, WholeSpaceCoversEverything) {
  {
    const Guard guard = Guard::WholeSpace(lock_, kX, Operation::kFork);
    EXPECT_TRUE(guard.Covers(Range(123, 1 << 30), kX));
    EXPECT_FALSE(IsFree(Range(1 << 20, 1 << 21), kS));
  }
  const Guard guard = Guard::WholeSpace(lock_, kS, Operation::kSnapshot);
  EXPECT_TRUE(IsFree(Range(1, 2), kS));
  EXPECT_FALSE(IsFree(Range(1, 2), kX));
}

TEST_P(RangeLockTest, DowngradeNeverLetsAWriterIn) {
  Guard guard(lock_, Range(0, 8), kX, Operation::kTest);
  guard.Downgrade();
  EXPECT_TRUE(IsFree(Range(0, 8), kS));
  EXPECT_FALSE(IsFree(Range(0, 8), kX));
}

TEST_P(RangeLockTest, TryNeverWaits) {
  const Guard held(lock_, Range(0, 8), kX, Operation::kTest);
  const Guard refused = Try(Range(0, 8), kS);
  EXPECT_FALSE(refused.held());
  EXPECT_FALSE(refused.Covers(Range(0, 8), kS));
}

TEST_P(RangeLockTest, DeadlinePassesOrNot) {
  {
    Actor holder(lock_, Range(0, 8), kX);
    const Nanoseconds begin = MonotonicNow();
    const Guard late =
        Guard::Until(lock_, Range(0, 8), kX, Operation::kTest, begin + Milliseconds(20));
    EXPECT_FALSE(late.held());
    EXPECT_GE(MonotonicNow(), begin + Milliseconds(20));
    EXPECT_FALSE(Guard::Until(lock_, Range(0, 8), kS, Operation::kTest, Nanoseconds{1}).held());
    lock_.CheckInvariants();
  }
  EXPECT_TRUE(Guard::Until(lock_, Range(0, 8), kX, Operation::kTest, Nanoseconds{1}).held());
}

//      [--X---)          holder
//          [--X---)      first
//      [--S-------)      second: waits for both
TEST_P(RangeLockTest, OverlappingRequestsAreGrantedInOrder) {
  Actor holder(lock_, Range(0, 8), kX);
  Actor first(lock_, Range(4, 12), kX);
  Actor second(lock_, Range(0, 12), kS);
  lock_.CheckInvariants();
  EXPECT_FALSE(first.granted());
  holder.Release();
  first.AwaitGrant();
  EXPECT_FALSE(second.granted());
  lock_.CheckInvariants();
  first.Release();
  second.AwaitGrant();
}

// A queued writer holds up later readers of its own range, and of no other.
TEST_P(RangeLockTest, QueuedWriterBlocksReadersOfItsRangeOnly) {
  Actor reader(lock_, Range(0, 8), kS);
  Actor writer(lock_, Range(4, 12), kX);
  EXPECT_FALSE(IsFree(Range(6, 8), kS));
  EXPECT_EQ(IsFree(Range(0, 4), kS), precise());
  EXPECT_EQ(IsFree(Range(12, 16), kX), precise());
  reader.Release();
  writer.AwaitGrant();
}

TEST_P(RangeLockTest, WaitingReadersGetInTogether) {
  Actor writer(lock_, Range(0, 8), kX);
  Actor first(lock_, Range(0, 8), kS);
  Actor second(lock_, Range(4, 6), kS);
  EXPECT_FALSE(first.granted() || second.granted());
  writer.Release();
  first.AwaitGrant();
  second.AwaitGrant();
}

TEST_P(RangeLockTest, DowngradeLetsWaitingReadersInWhileHeld) {
  Actor writer(lock_, Range(0, 8), kX);
  Actor reader(lock_, Range(0, 8), kS);
  Actor late_writer(lock_, Range(4, 12), kX);
  EXPECT_FALSE(reader.granted());
  writer.Downgrade();
  reader.AwaitGrant();
  EXPECT_FALSE(late_writer.granted());
  lock_.CheckInvariants();
  writer.Release();
  EXPECT_FALSE(late_writer.granted());
  reader.Release();
  late_writer.AwaitGrant();
}

TEST_P(RangeLockTest, GivingUpUnblocksThoseBehind) {
  Actor reader(lock_, Range(0, 8), kS);
  std::atomic<std::uint32_t> impatient_id{0};
  std::thread impatient([&] {
    impatient_id.store(os::CurrentThreadId());
    const Nanoseconds deadline = MonotonicNow() + Milliseconds(300);
    EXPECT_FALSE(Guard::Until(lock_, Range(0, 8), kX, Operation::kTest, deadline).held());
  });
  while (impatient_id.load() == 0 || !IsHeldBy(lock_, impatient_id.load(), State::kWaiting)) {
    std::this_thread::yield();
  }
  Actor behind(lock_, Range(4, 6), kS);
  behind.AwaitGrant();  // while the first reader still holds
  impatient.join();
}

TEST_P(RangeLockTest, HoldersNamesHoldersAndWaiters) {
  Guard held(lock_, Range(0, 8), kX, Operation::kUnmap);
  Actor waiter(lock_, Range(4, 12), kS);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const HolderList list = lock_.Holders(Range(0, 16));
  ASSERT_EQ(list.total, 2u);
  ASSERT_EQ(list.count, 2u);

  const HolderInfo& holder = list.entries[0];
  EXPECT_EQ(holder.state, State::kHolding);
  EXPECT_EQ(holder.thread_id, os::CurrentThreadId());
  EXPECT_EQ(holder.operation, Operation::kUnmap);
  EXPECT_STREQ(ToString(holder.operation), "unmap");
  EXPECT_EQ(holder.mode, kX);
  EXPECT_EQ(holder.range, Range(0, 8));
  // Since somebody waited.
  EXPECT_GE(holder.age, Milliseconds(10));
  EXPECT_LT(holder.age, Milliseconds(60'000));

  const HolderInfo& waiting = list.entries[1];
  EXPECT_EQ(waiting.state, State::kWaiting);
  EXPECT_EQ(waiting.thread_id, waiter.thread_id());
  EXPECT_EQ(waiting.mode, kS);
  EXPECT_EQ(waiting.range, Range(4, 12));
  EXPECT_GE(waiting.age, Milliseconds(10));

  EXPECT_EQ(lock_.Holders(Range(20, 30)).total, precise() ? 0u : 2u);
  held.Release();
}

// Exact for what happened before, on this thread; a policy may see more than there is.
TEST_P(RangeLockTest, MayBeHeldSeesEveryHolderAndWaiter) {
  constexpr std::size_t kFar = 1 << 20;
  const auto in_use = [&](PageRange range) { return lock_.MayBeHeld(range); };
  const bool coarse = GetParam() == LockPolicy::kCoarse;
  EXPECT_EQ(in_use(Range(0, 8)), coarse);
  for (const auto mode : {kS, kX}) {
    for (const PageRange held : {Range(0, 1), Range(3, 8), Range(500, 600), Range(0, 100'000), Range(kFar, kFar + 1)}) {
      Guard guard(lock_, held, mode, Operation::kUnmap);
      EXPECT_TRUE(in_use(held));
      EXPECT_TRUE(in_use({held.first, held.first + Pages{1}}));
      EXPECT_TRUE(in_use({held.end - Pages{1}, held.end}));
      EXPECT_TRUE(in_use(kAll));
      if (mode == kX) guard.Downgrade();
      EXPECT_TRUE(in_use(held));
      guard.Release();
      EXPECT_EQ(in_use(held), coarse || (held.count() > Pages{10'000} && GetParam() == LockPolicy::kAdaptive));
    }
  }
  {
    Guard held(lock_, Range(0, 8), kX, Operation::kUnmap);
    Guard other(lock_, Range(8, 16), kX, Operation::kUnmap);
    EXPECT_TRUE(in_use(Range(0, 1)));
    held.Release();
    EXPECT_TRUE(in_use(Range(8, 9)));
  }
  EXPECT_EQ(in_use(Range(0, 16)), coarse) << "back to idle after two ranges of a granule";
}

TEST_P(RangeLockTest, HoldersShowsADowngrade) {
  Guard guard(lock_, Range(0, 8), kX, Operation::kUnmap);
  guard.Downgrade();
  const HolderList list = lock_.Holders(Range(0, 8));
  ASSERT_EQ(list.count, 1u);
  EXPECT_EQ(list.entries[0].mode, kS);
  EXPECT_EQ(list.entries[0].operation, Operation::kUnmap);
}

TEST_P(RangeLockTest, HoldersCountsMoreThanItLists) {
  std::vector<std::unique_ptr<Guard>> guards;
  for (std::size_t i = 0; i < 20; ++i) {
    guards.emplace_back(new Guard(Try(Range(i, i + 1), kS)));
    ASSERT_TRUE(guards.back()->held());
  }
  const HolderList list = lock_.Holders(kAll);
  EXPECT_EQ(list.count, precise() ? HolderList::kCapacity : 1u);
  EXPECT_EQ(list.total, precise() ? 20u : 1u);
  lock_.CheckInvariants();
}

//      0   4   8   12
//      [-X-)                first
//          [-X-)            second
//                [S)        third
TEST_P(RangeLockTest, SeveralGuardsOfOneThreadReleasedInAnyOrder) {
  auto first = std::make_unique<Guard>(lock_, Range(0, 4), kX, Operation::kTest);
  auto second = std::make_unique<Guard>(lock_, Range(4, 8), kX, Operation::kTest);
  auto third = std::make_unique<Guard>(lock_, Range(10, 11), kS, Operation::kTest);
  EXPECT_FALSE(Try(Range(3, 5), kS).held());
  EXPECT_TRUE(Try(Range(20, 21), kX).held());
  second.reset();
  EXPECT_EQ(IsFree(Range(4, 10), kX), precise());
  EXPECT_FALSE(IsFree(Range(3, 4), kX));
  first.reset();
  EXPECT_FALSE(IsFree(Range(10, 12), kX));
  EXPECT_TRUE(IsFree(Range(0, 12), kS));
  EXPECT_EQ(IsFree(Range(0, 10), kX), precise());
}

TEST_P(RangeLockTest, SeveralGuardsOfOneThreadDowngradeOneByOne) {
  Guard first(lock_, Range(0, 4), kX, Operation::kTest);
  Guard second(lock_, Range(4, 8), kX, Operation::kTest);
  first.Downgrade();
  EXPECT_EQ(IsFree(Range(0, 4), kS), precise());
  EXPECT_FALSE(IsFree(Range(4, 8), kS));
  Actor reader(lock_, Range(0, 8), kS);
  second.Downgrade();
  reader.AwaitGrant();
  EXPECT_FALSE(IsFree(Range(0, 8), kX));
  first.Release();
  EXPECT_FALSE(IsFree(Range(4, 8), kX));
}

// A waiting writer must not come between two guards of one reader.
TEST_P(RangeLockTest, SecondGuardOfAReaderDoesNotWaitForWritersElsewhere) {
  Guard first(lock_, Range(0, 4), kS, Operation::kTest);
  Actor writer(lock_, Range(0, 4), kX);
  {
    const Guard second(lock_, Range(4, 8), kS, Operation::kTest);
    EXPECT_FALSE(writer.granted());
  }
  first.Release();
  writer.AwaitGrant();
}

// ---- Across the granules of kAdaptive; for the others, ranges like any. ----

constexpr PageRange kInGranule = Range(512, 520);
constexpr PageRange kNextInGranule = Range(520, 1024);
// Not the same granule, but one that kAdaptive keeps in the same lock word.
constexpr PageRange kSameWord = Range(33 * 512, 33 * 512 + 8);
constexpr PageRange kAcrossTwo = Range(1'000, 1'100);
constexpr PageRange kLong = Range(600, 40'000);

TEST_P(RangeLockTest, RangesAreToldApartWhereverTheyLie) {
  constexpr PageRange kRanges[] = {kInGranule, kNextInGranule, kSameWord, kAcrossTwo, kLong,
                                   // Beyond what a lock word can name.
                                   Range(std::size_t{1} << 50, (std::size_t{1} << 50) + 8)};
  for (const PageRange held : kRanges) {
    for (const LockMode mode : {kX, kS}) {
      const Guard guard(lock_, held, mode, Operation::kTest);
      for (const PageRange other : kRanges) {
        const bool overlaps = !precise() || other.Overlaps(held);
        EXPECT_EQ(IsFree(other, kX), !overlaps);
        EXPECT_EQ(IsFree(other, kS), !overlaps || mode == kS);
        lock_.CheckInvariants();
      }
      EXPECT_FALSE(IsFree(kAll, kX));
    }
  }
}

TEST_P(RangeLockTest, LongRangesWaitForShortOnesAndTheOtherWayRound) {
  Actor holder(lock_, Range(600, 608), kX);
  Actor elsewhere(lock_, Range(512, 520), precise() ? kX : kS);
  Actor long_one(lock_, kLong, kX);
  EXPECT_FALSE(long_one.granted());
  Actor behind(lock_, Range(20'000, 20'008), kS);
  EXPECT_FALSE(behind.granted());
  EXPECT_EQ(elsewhere.granted(), precise());
  lock_.CheckInvariants();
  holder.Release();
  if (!precise()) elsewhere.Release();
  long_one.AwaitGrant();
  EXPECT_FALSE(behind.granted());
  lock_.CheckInvariants();
  long_one.Downgrade();
  behind.AwaitGrant();
}

TEST_P(RangeLockTest, ReadersOfOneRangeAreCountedAndNamed) {
  std::vector<std::unique_ptr<Actor>> readers;
  for (int i = 0; i < 3; ++i) {
    readers.push_back(std::make_unique<Actor>(lock_, kInGranule, kS));
    EXPECT_TRUE(readers.back()->granted());
  }
  EXPECT_EQ(lock_.Holders(kInGranule).total, 3u);
  EXPECT_FALSE(IsFree(kInGranule, kX));
  EXPECT_EQ(lock_.Holders(kInGranule).total, 3u);
  readers.erase(readers.begin());
  EXPECT_EQ(lock_.Holders(kInGranule).total, 2u);
  EXPECT_TRUE(IsFree(kInGranule, kS));
  lock_.CheckInvariants();
}

// Whatever went through the slow path, what comes after it is fast again.
TEST_P(RangeLockTest, AWriterAmongReadersInterruptsThemOnce) {
  for (int round = 0; round < 3; ++round) {
    Actor reader(lock_, kInGranule, kS);
    Actor writer(lock_, kInGranule, kX);
    EXPECT_FALSE(writer.granted());
    Actor late_reader(lock_, kInGranule, kS);
    EXPECT_FALSE(late_reader.granted());
    reader.Release();
    writer.AwaitGrant();
    writer.Downgrade();
    late_reader.AwaitGrant();
    lock_.CheckInvariants();
  }
}

// Runs `child` in a forked process; its answer is the exit status.
void ExpectInChild(const std::function<bool()>& child) {
  const pid_t pid = fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {
    os::ForgetThreadIdAfterFork();
    alarm(20);
    _exit(child() ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
}

TEST_P(RangeLockTest, ChildOfForkKeepsOwnGuardsAndForgetsOthers) {
  auto mine = std::make_unique<Guard>(lock_, Range(0, 4), precise() ? kX : kS, Operation::kFork);
  auto mine_too = std::make_unique<Guard>(lock_, Range(4, 8), kS, Operation::kFork);
  Actor other(lock_, Range(100, 108), precise() ? kX : kS);
  Actor waiter(lock_, Range(0, 108), kX);
  ExpectInChild([&] {
    lock_.ReinitAfterFork();
    lock_.CheckInvariants();
    const HolderList holders = lock_.Holders(kAll);
    bool ok = holders.total == (precise() ? 2u : 1u) &&
              holders.entries[0].thread_id == os::CurrentThreadId() &&
              holders.entries[0].operation == Operation::kFork;
    ok = ok && !Try(Range(0, 8), kX).held() && Try(Range(100, 108), precise() ? kX : kS).held();
    mine.reset();
    ok = ok && !Try(Range(4, 8), kX).held();
    mine_too.reset();
    lock_.CheckInvariants();
    return ok && Try(kAll, kX).held();
  });
  mine_too.reset();
  mine.reset();
  other.Release();
  waiter.AwaitGrant();
}

TEST_P(RangeLockTest, ForkWhileOthersAreInsideTheLock) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] {
      while (!stop.load()) {
        const Guard guard(lock_, Range(i, i + 2), i == 0 ? kS : kX, Operation::kTest);
      }
    });
  }
  for (int round = 0; round < 30; ++round) {
    ExpectInChild([&] {
      lock_.ReinitAfterFork();
      const bool free = Try(kAll, kX).held();
      { const Guard guard(lock_, Range(0, 4), kX, Operation::kTest); }
      lock_.CheckInvariants();
      return free && lock_.Holders(kAll).total == 0;
    });
  }
  stop.store(true);
  for (std::thread& thread : threads) thread.join();
}

TEST(RangeLockConstinitTest, IsUsable) {
  for (RangeLock* lock : {&constinit_coarse, &constinit_tree, &constinit_adaptive}) {
    const Guard guard(*lock, Range(0, 8), kX, Operation::kTest);
    EXPECT_TRUE(guard.held());
  }
}

}  // namespace
}  // namespace freehold::vm::sync
