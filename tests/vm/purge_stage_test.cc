// The purge stage: one discard at a time, those who wait go together, large ones take turns, errors go to
// those whose they are.
#include "vm/purge_stage.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"

namespace freehold::vm {
namespace {

using os::FakeKernel;
using test::Fill;
using test::Gate;
using test::IsFilledWith;
using test::IsZero;
using test::Operation;
using test::Part;
using test::WatchedThread;

constexpr std::size_t kPagesPerTurn = MiB(16).value / kPageSize;

class PurgeStageTest : public testing::Test {
 protected:
  void SetUp() override {
    const Result<PageRange> memory = fake_.Reserve({64 * 1024}, {1});
    ASSERT_TRUE(memory.ok());
    memory_ = *memory;
    ASSERT_TRUE(fake_.Protect(memory_, os::Protection::kReadWrite).ok());
    fake_.ClearCalls();
  }

  PageRange Pages_(std::size_t first, std::size_t count) const { return Part(memory_, first, count); }

  // The discards so far, as pages of memory_: "[0,4) [8,12); [16,20)!": two calls, the second one failed.
  std::string Discards() const {
    std::string text;
    for (const FakeKernel::Call& call : fake_.Calls()) {
      if (call.operation != Operation::kDiscard) continue;
      if (!text.empty()) text += "; ";
      std::string ranges;
      for (const PageRange range : call.ranges) {
        if (!ranges.empty()) ranges += " ";
        ranges += "[" + std::to_string((range.first - memory_.first).value) + "," +
                  std::to_string((range.end - memory_.first).value) + ")";
      }
      text += ranges;
      if (!call.result.ok()) text += "!";
    }
    return text;
  }

  // A thread in Discard(range) whose result goes to `error`.
  std::unique_ptr<WatchedThread> Start(std::vector<PageRange> ranges, Error& error) {
    return std::make_unique<WatchedThread>(
        [this, ranges = std::move(ranges), &error] { error = stage_.Discard(ranges); });
  }

  // Has one discard, of page 0, wait in the kernel, and one thread for each of `requests` wait behind it.
  void Queue(std::vector<std::vector<PageRange>> requests) {
    hooked_.HoldNext(Operation::kDiscard, gate_);
    threads_.push_back(Start({Pages_(0, 1)}, errors_.emplace_back()));
    ASSERT_TRUE(gate_.AwaitArrival());
    for (std::vector<PageRange>& ranges : requests) {
      threads_.push_back(Start(std::move(ranges), errors_.emplace_back()));
      ASSERT_TRUE(threads_.back()->AwaitSleep());
    }
  }
  void Finish() {
    gate_.Open();
    for (auto& thread : threads_) thread->Join();
  }

  FakeKernel fake_;
  test::HookedKernel hooked_{fake_};
  PurgeStage stage_{hooked_};
  PageRange memory_;
  Gate gate_;
  std::deque<Error> errors_;
  std::vector<std::unique_ptr<WatchedThread>> threads_;
};

// ---- One request ----

TEST_F(PurgeStageTest, DropsContentOfItsRangesOnly) {
  Fill(Pages_(0, 16), 7);
  const PageRange ranges[] = {Pages_(1, 2), Pages_(8, 1)};
  EXPECT_EQ(stage_.Discard(ranges), Error::Ok());
  EXPECT_TRUE(IsZero(ranges[0]));
  EXPECT_TRUE(IsZero(ranges[1]));
  EXPECT_TRUE(IsFilledWith(Pages_(0, 1), 7));
  EXPECT_TRUE(IsFilledWith(Pages_(3, 5), 7));
  EXPECT_TRUE(IsFilledWith(Pages_(9, 7), 7));
  EXPECT_EQ(Discards(), "[1,3) [8,9)");
  EXPECT_EQ(stage_.calls(), 1u);
  EXPECT_EQ(stage_.pages(), 3u);
}

TEST_F(PurgeStageTest, NothingIsNoCall) {
  EXPECT_EQ(stage_.Discard({}), Error::Ok());
  EXPECT_EQ(stage_.DiscardNow({}), Error::Ok());
  EXPECT_EQ(fake_.CallCount(), 0u);
  EXPECT_EQ(stage_.calls(), 0u);
}

TEST_F(PurgeStageTest, ReportsErrorsAndDoesNotCountThem) {
  fake_.FailNth(Operation::kDiscard, 1, ENOMEM);
  const PageRange range = Pages_(0, 4);
  EXPECT_EQ(stage_.Discard({&range, 1}), Error::System(ENOMEM));
  EXPECT_EQ(stage_.calls(), 0u);
  EXPECT_EQ(stage_.pages(), 0u);
  EXPECT_EQ(stage_.Discard({&range, 1}), Error::Ok());
}

// ---- Turns ----

//   pages    0            4096          8192          12288
//            |   turn 1   |   turn 2    |   turn 3    |
TEST_F(PurgeStageTest, CutsALargeRangeIntoTurns) {
  const PageRange range = Pages_(0, 3 * kPagesPerTurn);
  EXPECT_EQ(stage_.Discard({&range, 1}), Error::Ok());
  EXPECT_EQ(Discards(), "[0,4096); [4096,8192); [8192,12288)");
}

//   turn 1: all of the first range and the start of the second; turn 2: the rest
TEST_F(PurgeStageTest, FillsTurnsAcrossRanges) {
  const PageRange ranges[] = {Pages_(0, 3000), Pages_(4000, 3000), Pages_(8000, 10)};
  EXPECT_EQ(stage_.Discard(ranges), Error::Ok());
  EXPECT_EQ(Discards(), "[0,3000) [4000,5096); [5096,7000) [8000,8010)");
  EXPECT_EQ(stage_.pages(), 6010u);
}

TEST_F(PurgeStageTest, CutsManyRangesIntoTurns) {
  std::vector<PageRange> ranges;
  for (std::size_t i = 0; i < 600; ++i) ranges.push_back(Pages_(2 * i, 1));
  EXPECT_EQ(stage_.Discard(ranges), Error::Ok());
  std::vector<std::size_t> sizes;
  for (const FakeKernel::Call& call : fake_.Calls()) sizes.push_back(call.ranges.size());
  EXPECT_EQ(sizes, (std::vector<std::size_t>{256, 256, 88}));
  EXPECT_EQ(stage_.pages(), 600u);
}

TEST_F(PurgeStageTest, StopsAtTheTurnThatFails) {
  const PageRange range = Pages_(0, 3 * kPagesPerTurn);
  fake_.FailNth(Operation::kDiscard, 2, EAGAIN);
  EXPECT_EQ(stage_.Discard({&range, 1}), Error::System(EAGAIN));
  EXPECT_EQ(Discards(), "[0,4096); [4096,8192)!");
  EXPECT_EQ(stage_.pages(), kPagesPerTurn);
}

// Somebody's small request does not wait for all of a large one.
TEST_F(PurgeStageTest, SmallRequestsGoBetweenTurns) {
  hooked_.HoldNext(Operation::kDiscard, gate_);
  Error large_error, small_error;
  auto large = Start({Pages_(0, 3 * kPagesPerTurn)}, large_error);
  ASSERT_TRUE(gate_.AwaitArrival());
  auto small = Start({Pages_(20'000, 1)}, small_error);
  ASSERT_TRUE(small->AwaitSleep());
  gate_.Open();
  large->Join();
  small->Join();
  EXPECT_EQ(large_error, Error::Ok());
  EXPECT_EQ(small_error, Error::Ok());
  const std::string discards = Discards();
  EXPECT_EQ(discards.find("[0,4096);"), 0u);
  EXPECT_LT(discards.find("[20000,20001)"), discards.find("[8192,12288)")) << discards;
}

// ---- Together ----

TEST_F(PurgeStageTest, ThoseWhoWaitGoTogether) {
  Fill(Pages_(0, 64), 7);
  Queue({{Pages_(8, 4)}, {Pages_(16, 4), Pages_(24, 2)}, {Pages_(32, 1)}});
  EXPECT_EQ(Discards(), "") << "the first one has not come through";
  Finish();
  EXPECT_EQ(Discards(), "[0,1); [8,12) [16,20) [24,26) [32,33)");
  for (const Error error : errors_) EXPECT_EQ(error, Error::Ok());
  EXPECT_TRUE(IsZero(Pages_(24, 2)));
  EXPECT_TRUE(IsFilledWith(Pages_(26, 6), 7));
  EXPECT_EQ(stage_.calls(), 2u);
  EXPECT_EQ(stage_.pages(), 12u);
}

TEST_F(PurgeStageTest, WhatDoesNotFitIntoOneCallGoesAfterIt) {
  std::vector<PageRange> many, more;
  for (std::size_t i = 0; i < 200; ++i) {
    many.push_back(Pages_(1000 + 2 * i, 1));
    more.push_back(Pages_(2000 + 2 * i, 1));
  }
  Queue({many, more, {Pages_(8, 4)}});
  Finish();
  for (const Error error : errors_) EXPECT_EQ(error, Error::Ok());
  std::size_t most = 0;
  for (const FakeKernel::Call& call : fake_.Calls()) most = std::max(most, call.ranges.size());
  EXPECT_EQ(most, 200u);
  EXPECT_EQ(stage_.pages(), 405u);
}

// The call of all fails, then everyone's own is tried alone: the first and third go through.
TEST_F(PurgeStageTest, AJointFailureIsAttributed) {
  Queue({{Pages_(8, 4)}, {Pages_(16, 4)}, {Pages_(32, 1)}});
  fake_.FailNth(Operation::kDiscard, 2, ENOMEM);  // the joint one, after page 0
  fake_.FailNth(Operation::kDiscard, 4, EAGAIN);  // the second one's own
  Finish();
  EXPECT_EQ(Discards(), "[0,1); [8,12) [16,20) [32,33)!; [8,12); [16,20)!; [32,33)");
  EXPECT_EQ(errors_[0], Error::Ok());
  EXPECT_EQ(errors_[1], Error::Ok());
  EXPECT_EQ(errors_[2], Error::System(EAGAIN));
  EXPECT_EQ(errors_[3], Error::Ok());
  EXPECT_EQ(stage_.pages(), 6u);
}

TEST_F(PurgeStageTest, TheFirstOnesFailureIsItsOwn) {
  fake_.FailNth(Operation::kDiscard, 1, ENOMEM);
  Queue({{Pages_(8, 4)}});
  Finish();
  EXPECT_EQ(errors_[0], Error::System(ENOMEM));
  EXPECT_EQ(errors_[1], Error::Ok());
  EXPECT_EQ(Discards(), "[0,1)!; [8,12)");
}

// The same pages twice are two requests, which Kernel::Discard must not get in one call.
TEST_F(PurgeStageTest, OverlappingRequestsOfTwoThreadsAreServed) {
  Fill(Pages_(8, 8), 7);
  Queue({{Pages_(8, 4)}, {Pages_(10, 4)}});
  Finish();
  for (const Error error : errors_) EXPECT_EQ(error, Error::Ok());
  EXPECT_TRUE(IsZero(Pages_(8, 6)));
  EXPECT_TRUE(IsFilledWith(Pages_(14, 2), 7));
}

// ---- Now ----

TEST_F(PurgeStageTest, DiscardsNow) {
  Fill(Pages_(8, 4), 7);
  const PageRange range = Pages_(8, 4);
  EXPECT_EQ(stage_.DiscardNow({&range, 1}), Error::Ok());
  EXPECT_TRUE(IsZero(range));
  EXPECT_EQ(stage_.calls(), 1u);
  EXPECT_EQ(stage_.pages(), 4u);
  fake_.FailNth(Operation::kDiscard, 1, ENOMEM);
  EXPECT_EQ(stage_.DiscardNow({&range, 1}), Error::System(ENOMEM));
  EXPECT_EQ(stage_.calls(), 1u);
}

TEST_F(PurgeStageTest, NowIsBesideADiscardThatTakesLong) {
  Fill(Pages_(8, 4), 7);
  Queue({});
  const PageRange range = Pages_(8, 4);
  EXPECT_EQ(stage_.DiscardNow({&range, 1}), Error::Ok()) << "while page 0 is in the kernel";
  EXPECT_TRUE(IsZero(range));
  EXPECT_EQ(Discards(), "[8,12)");
  Finish();
  EXPECT_EQ(Discards(), "[8,12); [0,1)");
}

// It has a turn if it can, and then others wait for it.
TEST_F(PurgeStageTest, WaitersGoOnAfterNow) {
  hooked_.HoldNext(Operation::kDiscard, gate_);
  WatchedThread now([&] {
    const PageRange range = Pages_(0, 1);
    EXPECT_EQ(stage_.DiscardNow({&range, 1}), Error::Ok());
  });
  ASSERT_TRUE(gate_.AwaitArrival());
  Error error = Error::System(1);
  auto waiter = Start({Pages_(8, 1)}, error);
  ASSERT_TRUE(waiter->AwaitSleep());
  gate_.Open();
  now.Join();
  waiter->Join();
  EXPECT_EQ(error, Error::Ok());
  EXPECT_EQ(Discards(), "[0,1); [8,9)");
}

// ---- Fork ----

TEST_F(PurgeStageTest, PrepareForkWaitsForTheDiscardUnderWay) {
  Queue({{Pages_(8, 1)}});
  WatchedThread forker([&] {
    stage_.PrepareFork();
    stage_.ParentAfterFork();
  });
  ASSERT_TRUE(forker.AwaitSleep());
  Finish();
  forker.Join();
  for (const Error error : errors_) EXPECT_EQ(error, Error::Ok());
  EXPECT_EQ(stage_.pages(), 2u) << "requests are served, whoever serves them";
}

TEST_F(PurgeStageTest, NobodyHasATurnAroundAFork) {
  stage_.PrepareFork();
  Error error = Error::System(1);
  auto waiter = Start({Pages_(8, 1)}, error);
  ASSERT_TRUE(waiter->AwaitSleep());
  EXPECT_EQ(Discards(), "");
  stage_.ParentAfterFork();
  waiter->Join();
  EXPECT_EQ(error, Error::Ok());
  const PageRange range = Pages_(16, 1);
  EXPECT_EQ(stage_.Discard({&range, 1}), Error::Ok());
}

// The child starts with an idle stage, also when others waited at the fork.
TEST(PurgeStageForkTest, TheChildDiscards) {
  os::LinuxKernel linux;
  test::HookedKernel hooked(linux);
  PurgeStage stage(hooked);
  const Result<PageRange> memory = linux.Reserve({64}, {1});
  ASSERT_TRUE(memory.ok());
  ASSERT_TRUE(linux.Protect(*memory, os::Protection::kReadWrite).ok());
  Fill(*memory, 7);
  stage.PrepareFork();
  Error error = Error::System(1);
  const PageRange own = Part(*memory, 8, 1);
  WatchedThread waiter([&] { error = stage.Discard({&own, 1}); });
  // It waits for the stage's own lock, which the fork holds.
  ASSERT_TRUE(waiter.AwaitSleep());
  const pid_t child = fork();
  if (child == 0) {
    stage.ChildAfterFork();
    const PageRange range = Part(*memory, 16, 1);
    const bool fine = stage.Discard({&range, 1}).ok() && IsZero(range) && IsFilledWith(own, 7) &&
                      stage.DiscardNow({&own, 1}).ok() && IsZero(own);
    _exit(fine ? 0 : 1);
  }
  stage.ParentAfterFork();
  waiter.Join();
  EXPECT_EQ(error, Error::Ok());
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_TRUE(IsZero(own));
  EXPECT_TRUE(IsFilledWith(Part(*memory, 16, 1), 7)) << "the child's memory is its own";
  EXPECT_TRUE(linux.Release(*memory).ok());
}

// ---- Many threads ----

// Every thread sees its own pages zeroed when its call returns, and nobody else's.
TEST_F(PurgeStageTest, ServesThreads) {
  constexpr int kThreads = 4;
  constexpr std::size_t kPagesEach = 64;
  const int rounds = test::kSanitized ? 200 : 1000;
  std::vector<std::thread> threads;
  for (std::size_t id = 0; id < kThreads; ++id) {
    threads.emplace_back([&, id] {
      const PageRange own = Pages_(id * kPagesEach, kPagesEach);
      for (int round = 0; round < rounds; ++round) {
        Fill(own, static_cast<int>(id + 1));
        const PageRange ranges[] = {Part(own, round % 30, 2), Part(own, 33, 1 + round % 30)};
        if (round % 5 == 0) {
          ASSERT_TRUE(stage_.DiscardNow(ranges).ok());
        } else {
          ASSERT_TRUE(stage_.Discard(ranges).ok());
        }
        ASSERT_TRUE(IsZero(ranges[0]));
        ASSERT_TRUE(IsZero(ranges[1]));
        ASSERT_TRUE(IsFilledWith(Part(own, 32, 1), static_cast<int>(id + 1)));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace freehold::vm
