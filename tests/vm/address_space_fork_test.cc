// fork(2) while other threads are in the middle of verbs: the child has a whole space with its memory, and the
// parent goes on. What the child finds wrong stops it (FREEHOLD_CHECK names the line).
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/address_space.h"
#include "vm/os/check.h"
#include "vm/os/linux_kernel.h"

namespace freehold::vm {
namespace {

using namespace test;  // NOLINT: the fixture's words
using os::LinuxKernel;
using os::Protection;

// Every verb, in a child, without malloc or gtest: other threads may have held their locks at the fork.
void UseSpaceInChild(AddressSpace& space) {
  space.CheckInvariants();
  for (int round = 0; round < 3; ++round) {
    const Result<PageRange> range = space.Map({16});
    FREEHOLD_CHECK(range.ok());
    FREEHOLD_CHECK(IsZero(*range));
    Fill(*range, 0xcc);
    FREEHOLD_CHECK(space.Protect(Part(*range, 4, 4), Protection::kRead).ok());
    FREEHOLD_CHECK(space.Unmap(Part(*range, 8, 4)).ok());
    FREEHOLD_CHECK(space.Populate(Part(*range, 0, 4)).ok());
    const PageRange part = Part(*range, 12, 2);
    FREEHOLD_CHECK(space.Discard({&part, 1}).ok());
    FREEHOLD_CHECK(IsZero(part) && IsFilledWith(Part(*range, 0, 8), 0xcc));
    FREEHOLD_CHECK(space.Map({16}, At(range->first, Placement::kReplace)).ok());
    FREEHOLD_CHECK(IsZero(*range));
    const Result<PageRange> dense = space.Map({512}, {.populate = true});
    FREEHOLD_CHECK(dense.ok() && IsZero(*dense));
    FREEHOLD_CHECK(space.Unmap(*dense).ok());
    const Result<PageRange> read_only = space.Map({4}, {.protection = Protection::kRead});
    FREEHOLD_CHECK(read_only.ok() && space.Unmap(*read_only).ok());
    FREEHOLD_CHECK(space.Unmap(*range).ok());
    space.Tick();
    (void)space.Purge(PurgeScope::kAll);
    space.CheckInvariants();
  }
}

class ForkTest : public PolicyTest {
 protected:
  static AddressSpaceOptions ForkOptions() {
    AddressSpaceOptions options = Options();
    options.free_resident_limit = MiB(1);
    options.decay = Milliseconds(1);
    return options;
  }

  LinuxKernel linux_;
  HookedKernel kernel_{linux_};
  TestSpace space_{kernel_, ForkOptions()};
};

TEST_P(ForkTest, AQuietSpace) {
  const PageRange range = MustMap(*space_, 32);
  Fill(range, 0xaa);
  for (int i = 0; i < 3; ++i) {
    Fork(*space_, [&] {
      FREEHOLD_CHECK(IsFilledWith(range, 0xaa));
      Fill(range, 0xbb);
      FREEHOLD_CHECK(space_->Lookup(range.first)->range == range);
      FREEHOLD_CHECK(space_->Unmap(Part(range, 0, 16)).ok());
      UseSpaceInChild(*space_);
    });
    EXPECT_TRUE(IsFilledWith(range, 0xaa)) << "the child's memory is its own";
    EXPECT_EQ(space_->Lookup(range.first)->range, range);
  }
  space_->CheckInvariants();
}

TEST_P(ForkTest, TheChildForksToo) {
  const PageRange range = MustMap(*space_, 4);
  Fill(range, 0xaa);
  Fork(*space_, [&] {
    UseSpaceInChild(*space_);
    space_->PrepareFork();
    const pid_t grandchild = fork();
    if (grandchild == 0) {
      space_->ChildAfterFork();
      FREEHOLD_CHECK(IsFilledWith(range, 0xaa));
      UseSpaceInChild(*space_);
      _exit(0);
    }
    space_->ParentAfterFork();
    int status = -1;
    FREEHOLD_CHECK(waitpid(grandchild, &status, 0) == grandchild && status == 0);
    UseSpaceInChild(*space_);
  });
}

// The parent may prepare and find that it cannot fork.
TEST_P(ForkTest, PreparedInVain) {
  for (int i = 0; i < 10; ++i) {
    space_->PrepareFork();
    space_->ParentAfterFork();
    const PageRange range = MustMap(*space_, 4);
    ASSERT_TRUE(space_->Unmap(range).ok());
  }
}

TEST_P(ForkTest, WaitsForAVerbAndHoldsUpOthers) {
  const PageRange range = MustMap(*space_, 4, {.protection = Protection::kRead});
  const PageRange other = MustMap(*space_, 4);
  Gate gate;
  kernel_.HoldNext(Operation::kReset, gate);
  WatchedThread unmapper([&] { EXPECT_TRUE(space_->Unmap(range).ok()); });
  ASSERT_TRUE(gate.AwaitArrival());
  std::atomic<bool> prepared{false};
  std::atomic<bool> go_on{false};
  WatchedThread forker([&] {
    space_->PrepareFork();
    prepared.store(true);
    while (!go_on.load()) std::this_thread::yield();
    space_->ParentAfterFork();
  });
  ASSERT_TRUE(forker.AwaitSleep());
  EXPECT_FALSE(prepared.load()) << "an unmap is half done";
  gate.Open();
  unmapper.Join();
  ASSERT_TRUE(Eventually([&] { return prepared.load(); }));
  EXPECT_TRUE(space_->Lookup(other.first).ok()) << "lookups need no lock";
  WatchedThread later([&] { EXPECT_TRUE(space_->Unmap(other).ok()); });
  ASSERT_TRUE(later.AwaitSleep());
  EXPECT_TRUE(space_->Lookup(other.first).ok());
  go_on.store(true);
  forker.Join();
  later.Join();
  EXPECT_FALSE(space_->Lookup(other.first).ok());
}

// At the fork, one Map has chosen an extent and waits for its range, which the fork holds. The child has no such
// thread: the extent is free there.
//
//   purger   holds the turn of the purge stage, in the kernel
//   forker   holds all ranges, waits for the turn
//   mapper   has a pending extent, waits for its range
TEST_P(ForkTest, APendingMapIsTakenBackInTheChild) {
  const PageRange dirty = MustMap(*space_, 64, {.populate = true});
  ASSERT_TRUE(space_->Unmap(dirty).ok());
  Gate gate;
  kernel_.HoldNext(Operation::kDiscard, gate);
  WatchedThread purger([&] { (void)space_->Purge(PurgeScope::kAll); });
  ASSERT_TRUE(gate.AwaitArrival());
  WatchedThread forker([&] {
    Fork(*space_, [&] {
      UseSpaceInChild(*space_);
      FREEHOLD_CHECK(space_->Stats().mapped == Bytes{0});
      // All of a region can be had: nothing is lost to a thread that does not exist.
      FREEHOLD_CHECK(space_->Map({kSmallRegionPages}).ok());
      FREEHOLD_CHECK(space_->Map({kSmallRegionPages}).ok());
      FREEHOLD_CHECK(space_->Map({kSmallRegionPages}, {.huge_pages = os::HugePages::kPrefer}).ok());
    });
  });
  ASSERT_TRUE(forker.AwaitSleep());
  Result<PageRange> mapped = ErrorCode::kEmpty;
  // The first of its region: it has to be committed, under its range.
  WatchedThread mapper([&] { mapped = space_->Map({512}, {.huge_pages = os::HugePages::kPrefer}); });
  ASSERT_TRUE(mapper.AwaitSleep());
  gate.Open();
  purger.Join();
  forker.Join();
  mapper.Join();
  ASSERT_TRUE(mapped.ok());
  EXPECT_TRUE(IsZero(*mapped));
  space_->CheckInvariants();
}

// Threads do verbs all the time; one forks again and again.
TEST_P(ForkTest, InALoopBesideVerbs) {
  constexpr unsigned kSeed = 31;
  std::printf("seed %u\n", kSeed);
  const int forks = kSanitized ? 15 : 60;
  const PageRange own = MustMap(*space_, 64);
  Fill(own, 0xaa);
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (unsigned id = 0; id < 3; ++id) {
    threads.emplace_back([&, id] {
      std::mt19937 random(kSeed + id);
      std::vector<PageRange> mine;
      while (!stop.load(std::memory_order_relaxed)) {
        if (mine.size() < 20) {
          MapOptions options;
          if (random() % 4 == 0) options.protection = Protection::kRead;
          options.populate = random() % 4 == 0;
          const Result<PageRange> range = space_->Map({1 + random() % 40}, options);
          ASSERT_TRUE(range.ok());
          ASSERT_TRUE(IsZero(*range));
          if (options.protection == Protection::kReadWrite) Fill(*range, static_cast<int>(id + 1));
          mine.push_back(*range);
          continue;
        }
        std::swap(mine[random() % mine.size()], mine.back());
        const PageRange range = mine.back();
        switch (random() % 5) {
          case 0: ASSERT_TRUE(space_->Protect(Part(range, 0, 1), Protection::kRead).ok()); break;
          case 1: MustMap(*space_, range.count().value, At(range.first, Placement::kReplace)); break;
          case 2: (void)space_->Purge(PurgeScope::kAll); break;
          case 3: ASSERT_TRUE(space_->Discard({&range, 1}).ok()); break;
          default:
            ASSERT_TRUE(space_->Unmap(range).ok());
            mine.pop_back();
        }
      }
    });
  }
  for (int i = 0; i < forks && !HasFatalFailure(); ++i) {
    Fork(*space_, [&] {
      FREEHOLD_CHECK(IsFilledWith(own, 0xaa));
      UseSpaceInChild(*space_);
      FREEHOLD_CHECK(IsFilledWith(own, 0xaa));
      // What other threads had mapped is mapped here, and can be unmapped: nothing hangs on those threads.
      FREEHOLD_CHECK(space_->Unmap(space_->reservation()).ok());
      (void)space_->Purge(PurgeScope::kAll);
      space_->CheckInvariants();
      FREEHOLD_CHECK(space_->Stats().mapped == Bytes{0});
      FREEHOLD_CHECK(space_->Map({kSmallRegionPages}).ok());
    });
  }
  stop.store(true);
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(IsFilledWith(own, 0xaa));
  space_->CheckInvariants();
}

// Threads that all fork: preparations wait for each other.
TEST_P(ForkTest, FromSeveralThreads) {
  std::vector<std::thread> threads;
  for (int id = 0; id < 3; ++id) {
    threads.emplace_back([&] {
      for (int i = 0; i < (kSanitized ? 4 : 10); ++i) {
        ASSERT_NO_FATAL_FAILURE(Fork(*space_, [&] { UseSpaceInChild(*space_); }));
        const PageRange range = MustMap(*space_, 8);
        Fill(range, 1);
        ASSERT_TRUE(space_->Unmap(range).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

FREEHOLD_INSTANTIATE_POLICIES(ForkTest);

}  // namespace
}  // namespace freehold::vm
