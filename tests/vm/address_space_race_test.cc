// Interleavings of two and three verbs on the same pages, made to happen: one is held up in the kernel, where it
// holds its range lock, until the others were seen to wait.
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/address_space.h"
#include "vm/os/fake_kernel.h"

namespace freehold::vm {
namespace {

using namespace test;  // NOLINT: the fixture's words
using os::FakeKernel;
using os::Protection;

class RaceTest : public testing::Test {
 protected:
  // Pages of the first plain region, which is the first to be mapped from.
  PageRange P(std::size_t first, std::size_t count) const { return Part(space_->reservation(), first, count); }
  std::string Line(std::size_t count) const { return Draw(*space_, P(0, count)); }
  // Of pages [4, 8), within a mapping of the first twelve.
  void ProtectNeighboursAndBack() {
    for (const Protection protection : {Protection::kRead, Protection::kNone}) {
      for (const PageRange neighbour : {P(0, 4), P(8, 4)}) {
        EXPECT_TRUE(space_->Protect(neighbour, protection).ok());
        EXPECT_TRUE(space_->Protect(neighbour, Protection::kReadWrite).ok());
      }
    }
  }

  FakeKernel fake_;
  HookedKernel kernel_{fake_};
  TestSpace space_{kernel_};
  Gate gate_;
};

// ---- A Map that waits for the range of an extent it chose ----

//   page       0           12  15   20                    100
//   Unmap      |------------------------- of nothing -----|    in the kernel, holding the range
//   Map fixed              |F F|                               waits
//   Map        |MMMMMMMMMMMMMMMMMMMM|                          has made this pending, waits
//
// Whoever comes first, nobody gets a page of the other; also where the fixed one takes an end of the pending extent,
// all of it, or more.
TEST(PendingRaceTest, FixedMapTakesAnyPartOfAPendingExtent) {
  struct Case {
    std::size_t first, count;
  };
  for (const Case fixed_at : {Case{12, 3}, Case{0, 5}, Case{15, 5}, Case{0, 20}, Case{10, 60}}) {
    SCOPED_TRACE("fixed at " + std::to_string(fixed_at.first) + ", " + std::to_string(fixed_at.count));
    FakeKernel fake;
    HookedKernel kernel(fake);
    TestSpace space(kernel);
    Gate gate;
    const auto part = [&](std::size_t first, std::size_t count) {
      return Part(space->reservation(), first, count);
    };
    kernel.HoldNext(Operation::kCountResident, gate);
    WatchedThread unmapper([&] { EXPECT_TRUE(space->Unmap(part(0, 100)).ok()); });
    ASSERT_TRUE(gate.AwaitArrival());
    Result<PageRange> fixed = ErrorCode::kEmpty;
    Result<PageRange> anywhere = ErrorCode::kEmpty;
    WatchedThread fixed_mapper(
        [&] { fixed = space->Map({fixed_at.count}, At(part(fixed_at.first, 1).first)); });
    ASSERT_TRUE(fixed_mapper.AwaitSleep());
    WatchedThread mapper([&] { anywhere = space->Map({20}); });
    ASSERT_TRUE(mapper.AwaitSleep());
    EXPECT_EQ(Draw(*space, part(0, 24)), std::string(24, '.')) << "pending is not visible";
    gate.Open();
    unmapper.Join();
    fixed_mapper.Join();
    mapper.Join();
    ASSERT_TRUE(fixed.ok());
    EXPECT_EQ(*fixed, part(fixed_at.first, fixed_at.count));
    ASSERT_TRUE(anywhere.ok());
    EXPECT_FALSE(anywhere->Overlaps(*fixed)) << testing::PrintToString(*anywhere);
    EXPECT_EQ(Draw(*space, *anywhere), std::string(20, 'A'));
    EXPECT_EQ(Draw(*space, *fixed), std::string(fixed_at.count, 'A'));
    Fill(*fixed, 1);
    Fill(*anywhere, 2);
    EXPECT_TRUE(IsFilledWith(*fixed, 1));
    EXPECT_EQ(space->Stats().mapped, Pages{20 + fixed_at.count}.bytes());
    space->CheckInvariants();
  }
}

//   page       0         10           20                   100
//   Unmap                |------------- of nothing --------|   in the kernel, holding the range
//   Map        |MMMMMMMMMMMMMMMMMMMMMM|                        has made this pending, waits
TEST_F(RaceTest, UnmapOfAHoleThatEndsInAPendingExtent) {
  kernel_.HoldNext(Operation::kCountResident, gate_);
  WatchedThread unmapper([&] { EXPECT_TRUE(space_->Unmap(P(10, 90)).ok()); });
  ASSERT_TRUE(gate_.AwaitArrival());
  Result<PageRange> mapped = ErrorCode::kEmpty;
  WatchedThread mapper([&] { mapped = space_->Map({20}); });
  ASSERT_TRUE(mapper.AwaitSleep());
  gate_.Open();
  unmapper.Join();
  mapper.Join();
  ASSERT_TRUE(mapped.ok());
  EXPECT_EQ(Draw(*space_, *mapped), std::string(20, 'A'));
  EXPECT_EQ(space_->Stats().mapped, Pages{20}.bytes());
  space_->CheckInvariants();
}

// ---- Extents that are being purged ----

class RaceWithPurgeTest : public RaceTest {
 protected:
  // Pages [0, 64) are free and resident, and on their way to the kernel, held up there.
  void StartPurge() {
    MustMapAt(*space_, P(0, 64));
    Fill(P(0, 64), 7);
    ASSERT_TRUE(space_->Unmap(P(0, 64)).ok());
    kernel_.HoldNext(Operation::kDiscard, gate_);
    purger_ = std::make_unique<WatchedThread>([&] { purged_ = space_->Purge(PurgeScope::kAll); });
    ASSERT_TRUE(gate_.AwaitArrival());
  }
  void FinishPurge() {
    gate_.Open();
    purger_->Join();
    EXPECT_EQ(purged_, Pages{64});
    space_->CheckInvariants();
    EXPECT_EQ(space_->Stats().free_resident, Bytes{0});
  }

  std::unique_ptr<WatchedThread> purger_;
  Pages purged_;
};

//   page     0        20              40         64
//   purging  |-----------------------------------|
//   Unmap             |--- of nothing --|
TEST_F(RaceWithPurgeTest, UnmapOfAHoleInsideOne) {
  StartPurge();
  EXPECT_TRUE(space_->Unmap(P(20, 20)).ok());
  EXPECT_TRUE(space_->Unmap(P(32, 100)).ok());
  FinishPurge();
  // All of it is one free extent again.
  MustMapAt(*space_, P(0, 64));
  EXPECT_TRUE(IsZero(P(0, 64)));
}

TEST_F(RaceWithPurgeTest, FixedMapWaitsForIt) {
  StartPurge();
  WatchedThread mapper([&] {
    MustMapAt(*space_, P(20, 20));
    Fill(P(20, 20), 9);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(mapper.done());
  EXPECT_EQ(Line(64), std::string(64, '.'));
  gate_.Open();
  purger_->Join();
  mapper.Join();
  EXPECT_TRUE(IsFilledWith(P(20, 20), 9)) << "the discard came before";
  EXPECT_EQ(Line(64), std::string(20, '.') + std::string(20, 'A') + std::string(24, '.'));
  space_->CheckInvariants();
}

TEST_F(RaceWithPurgeTest, MapElsewhereDoesNotWaitForIt) {
  StartPurge();
  const PageRange other = MustMap(*space_, 64);
  EXPECT_FALSE(other.Overlaps(P(0, 64)));
  EXPECT_TRUE(IsZero(other));
  EXPECT_TRUE(space_->Unmap(other).ok());
  gate_.Open();
  purger_->Join();
}

// ---- Unmap while it zaps ----

TEST_F(RaceTest, UnmappedIsGoneForLookupsWhileItIsZapped) {
  const PageRange range = MustMap(*space_, 8, {.protection = Protection::kRead});
  kernel_.HoldNext(Operation::kReset, gate_);
  WatchedThread unmapper([&] { EXPECT_TRUE(space_->Unmap(range).ok()); });
  ASSERT_TRUE(gate_.AwaitArrival());
  EXPECT_EQ(Draw(*space_, range), "........");
  EXPECT_EQ(space_->Stats().mapped, Bytes{0});
  // Nobody gets these pages yet, neither by chance nor by address.
  const PageRange other = MustMap(*space_, 8, {.protection = Protection::kReadExec});
  EXPECT_FALSE(other.Overlaps(range));
  WatchedThread mapper([&] { MustMapAt(*space_, Part(range, 2, 2), Protection::kRead); });
  ASSERT_TRUE(mapper.AwaitSleep());
  EXPECT_EQ(Draw(*space_, range), "........");
  gate_.Open();
  unmapper.Join();
  mapper.Join();
  EXPECT_EQ(Draw(*space_, range), "..aa....");
  EXPECT_EQ(fake_.At(Part(range, 2, 1).first).protection, Protection::kRead) << "the zap came before";
  EXPECT_EQ(fake_.At(Part(range, 4, 1).first).protection, Protection::kNone);
}

//   page     0   2   4   8
//   verb     |   |- -|   |           held up in the kernel; some want the whole VMA
//   Unmap    |-----------|           of exactly this VMA takes no range lock, unless somebody has a part of it
//   Map      |B B B B B B|           of the same thread: the verb has nothing to do with these pages any more
TEST_F(RaceTest, UnmapOfAWholeVmaWaitsForWhoHoldsAPart) {
  const PageRange range = P(0, 8);
  const PageRange part = P(2, 2);
  const std::pair<Operation, std::function<Error()>> verbs[] = {
      {Operation::kCopy, [&] { return space_->Remap(range, {16}, {.may_move = true}).error(); }},
      {Operation::kLockMemory, [&] { return space_->LockMemory(range, os::MemoryLock::kOnFault); }},
      {Operation::kAdviseReclaim, [&] { return space_->Advise(part, Advice::kFree); }},
      {Operation::kDiscard, [&] { return space_->Discard({&part, 1}); }},
  };
  MustMapAt(*space_, P(8, 1));
  for (const auto& [operation, verb] : verbs) {
    SCOPED_TRACE(ToString(operation));
    Gate gate;
    MustMapAt(*space_, range);
    Fill(range, 7);
    const std::uint64_t generation = space_->Lookup(range.first)->generation;
    kernel_.HoldNext(operation, gate);
    WatchedThread holder([&, &verb = verb] { EXPECT_EQ(verb(), Error::Ok()); });
    const bool arrived = gate.AwaitArrival();
    WatchedThread unmapper([&] {
      EXPECT_TRUE(space_->Unmap(range).ok());
      EXPECT_EQ(Line(9), "........A");
      EXPECT_EQ(fake_.LockedPages(), Pages{0});
      MustMapAt(*space_, range);
      Fill(range, 9);
    });
    EXPECT_TRUE(unmapper.AwaitSleep());
    EXPECT_EQ(space_->Lookup(range.first)->generation, generation);
    gate.Open();
    holder.Join();
    unmapper.Join();
    ASSERT_TRUE(arrived);
    EXPECT_TRUE(IsFilledWith(range, 9));
    space_->CheckInvariants();
    ASSERT_TRUE(space_->Unmap(range).ok());
  }
}

// ---- Replacement ----

TEST_F(RaceTest, ReplacedStaysVisibleUntilTheNewOneIsReady) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(6, 4));
  Fill(P(0, 4), 1);
  Fill(P(6, 4), 2);
  EXPECT_EQ(Line(12), "AAAA..BBBB..");
  kernel_.HoldNext(Operation::kProtect, gate_);
  WatchedThread mapper([&] {
    MustMap(*space_, 6, At(P(2, 6).first, Placement::kReplace, Protection::kRead));
  });
  ASSERT_TRUE(gate_.AwaitArrival());
  EXPECT_EQ(space_->Lookup(P(2, 1).first)->protection, Protection::kReadWrite);
  EXPECT_EQ(space_->Lookup(P(7, 1).first)->protection, Protection::kReadWrite);
  EXPECT_EQ(space_->Lookup(P(4, 1).first).error().code, ErrorCode::kNotMapped);
  gate_.Open();
  mapper.Join();
  EXPECT_EQ(Line(12), "AAbbbbbbCC..");
  EXPECT_TRUE(IsZero(P(2, 6)));
  EXPECT_TRUE(IsFilledWith(P(0, 2), 1));
  EXPECT_TRUE(IsFilledWith(P(8, 2), 2));
}

// ---- Merging beside a verb that has cut out its part ----

//   page     0       4       8       12
//   before   |A A A A|A A A A|A A A A|      one mapping
//   Map                replace                in the kernel
//   Protect  read-only and back               done meanwhile: its part merges with nothing
//   after    |A A A A|B B B B|A A A A|
TEST_F(RaceTest, ReplaceBesideAProtectOfTheNeighbours) {
  MustMapAt(*space_, P(0, 12));
  Fill(P(0, 12), 1);
  EXPECT_EQ(Line(14), "AAAAAAAAAAAA..");
  kernel_.HoldNext(Operation::kProtect, gate_);
  WatchedThread mapper([&] { MustMap(*space_, 4, At(P(4, 4).first, Placement::kReplace)); });
  ASSERT_TRUE(gate_.AwaitArrival());
  ProtectNeighboursAndBack();
  gate_.Open();
  mapper.Join();
  EXPECT_EQ(Line(14), "AAAABBBBAAAA..");
  EXPECT_TRUE(IsFilledWith(P(0, 4), 1));
  EXPECT_TRUE(IsZero(P(4, 4)));
  EXPECT_TRUE(IsFilledWith(P(8, 4), 1));
  EXPECT_EQ(space_->Stats().vmas, 3u);
  EXPECT_EQ(space_->Stats().mapped, Pages{12}.bytes());
  space_->CheckInvariants();
}

TEST_F(RaceTest, ProtectBesideAProtectOfTheNeighbours) {
  MustMapAt(*space_, P(0, 12));
  kernel_.HoldNext(Operation::kProtect, gate_);
  WatchedThread protector([&] { EXPECT_TRUE(space_->Protect(P(4, 4), Protection::kRead).ok()); });
  ASSERT_TRUE(gate_.AwaitArrival());
  ProtectNeighboursAndBack();
  gate_.Open();
  protector.Join();
  EXPECT_EQ(Line(14), "AAAAaaaaAAAA..");
  for (std::size_t page = 0; page < 12; ++page) {
    EXPECT_EQ(fake_.At(P(page, 1).first).protection, space_->Lookup(P(page, 1).first)->protection) << page;
  }
  EXPECT_TRUE(space_->Protect(P(4, 4), Protection::kReadWrite).ok());
  EXPECT_EQ(space_->Stats().vmas, 1u) << "one again";
}

TEST_F(RaceTest, LockBesideAProtectOfTheNeighbours) {
  MustMapAt(*space_, P(0, 12));
  kernel_.HoldNext(Operation::kLockMemory, gate_);
  WatchedThread locker([&] { EXPECT_TRUE(space_->LockMemory(P(4, 4), os::MemoryLock::kOnFault).ok()); });
  ASSERT_TRUE(gate_.AwaitArrival());
  ProtectNeighboursAndBack();
  gate_.Open();
  locker.Join();
  EXPECT_EQ(Line(14), "AAAA|AAAA|AAAA..");
  EXPECT_EQ(fake_.LockedPages(), Pages{4});
  EXPECT_TRUE(space_->UnlockMemory(P(0, 12)).ok());
  EXPECT_EQ(space_->Stats().vmas, 1u) << "one again";
}

// The same when the verb that waited fails, and puts together what it cut.
TEST_F(RaceTest, FailuresBesideAProtectOfTheNeighbours) {
  MustMapAt(*space_, P(0, 12));
  const std::function<Error()> verbs[] = {
      [&] { return space_->Map({4}, At(P(4, 4).first, Placement::kReplace)).error(); },
      [&] { return space_->Protect(P(4, 4), Protection::kRead); },
  };
  for (const auto& verb : verbs) {
    Gate gate;
    kernel_.HoldNext(Operation::kProtect, gate);
    Error error;
    WatchedThread thread([&] { error = verb(); });
    ASSERT_TRUE(gate.AwaitArrival());
    ProtectNeighboursAndBack();
    fake_.FailNth(Operation::kProtect, 1, ENOMEM);
    gate.Open();
    thread.Join();
    EXPECT_EQ(error, Error::System(ENOMEM));
    EXPECT_EQ(Line(14), "AAAAAAAAAAAA..");
    EXPECT_EQ(space_->Stats().vmas, 1u);
    space_->CheckInvariants();
  }
}

// ---- Populate ----

// A page that is being populated keeps waiting whoever wants that chunk, and nobody else.
TEST_F(RaceTest, PopulateHoldsOneChunkOnly) {
  const PageRange range = MustMap(*space_, 4 * kPagesPerHugePage, {.alignment = {kPagesPerHugePage}});
  kernel_.HoldNext(Operation::kTouchForWrite, gate_);
  Result<Pages> populated = Pages{0};
  WatchedThread populator([&] { populated = space_->Populate(range); });
  ASSERT_TRUE(gate_.AwaitArrival());
  // The second chunk is free to be unmapped, any other memory to be mapped and populated.
  EXPECT_TRUE(space_->Unmap(Part(range, kPagesPerHugePage, 8)).ok());
  const PageRange other = MustMap(*space_, 8, {.populate = true});
  EXPECT_TRUE(space_->Protect(other, Protection::kRead).ok());
  // Readers of the chunk that is held pass, writers wait.
  const PageRange discarded = Part(range, 8, 1);
  EXPECT_TRUE(space_->Discard({&discarded, 1}).ok());
  WatchedThread unmapper([&] { EXPECT_TRUE(space_->Unmap(Part(range, 0, 1)).ok()); });
  ASSERT_TRUE(unmapper.AwaitSleep());
  EXPECT_TRUE(space_->Lookup(range.first).ok());
  gate_.Open();
  populator.Join();
  unmapper.Join();
  EXPECT_EQ(populated.error().code, ErrorCode::kReplaced);
  EXPECT_EQ(fake_.ResidentPages(Part(range, kPagesPerHugePage, 3 * kPagesPerHugePage)), Pages{0});
}

// Unmapped and mapped again by somebody else in between: not this populate's mapping any more.
TEST_F(RaceTest, PopulateStopsAtAnothersMappingOfTheSameRange) {
  const PageRange range = MustMap(*space_, 2 * kPagesPerHugePage, {.alignment = {kPagesPerHugePage}});
  kernel_.HoldNext(Operation::kTouchForWrite, gate_);
  Result<Pages> populated = Pages{0};
  WatchedThread populator([&] { populated = space_->Populate(range); });
  ASSERT_TRUE(gate_.AwaitArrival());
  const PageRange second = Part(range, kPagesPerHugePage, kPagesPerHugePage);
  EXPECT_TRUE(space_->Unmap(second).ok());
  MustMapAt(*space_, second);
  gate_.Open();
  populator.Join();
  EXPECT_EQ(populated.error().code, ErrorCode::kReplaced);
  EXPECT_EQ(fake_.ResidentPages(second), Pages{0});
  EXPECT_EQ(fake_.ResidentPages(range), Pages{kPagesPerHugePage}) << "what was done stays";
}

// ---- Discard ----

TEST_F(RaceTest, TwoThreadsDiscardTheSamePages) {
  const PageRange range = MustMap(*space_, 16);
  Fill(range, 7);
  const PageRange first = MustMap(*space_, 1);
  kernel_.HoldNext(Operation::kDiscard, gate_);
  WatchedThread holder([&] { EXPECT_TRUE(space_->Discard({&first, 1}).ok()); });
  ASSERT_TRUE(gate_.AwaitArrival());
  const PageRange a_part = Part(range, 0, 8);
  const PageRange b_part = Part(range, 4, 8);
  WatchedThread a([&] { EXPECT_TRUE(space_->Discard({&a_part, 1}).ok()); });
  ASSERT_TRUE(a.AwaitSleep());
  WatchedThread b([&] { EXPECT_TRUE(space_->Discard({&b_part, 1}).ok()); });
  ASSERT_TRUE(b.AwaitSleep());
  gate_.Open();
  holder.Join();
  a.Join();
  b.Join();
  EXPECT_TRUE(IsZero(Part(range, 0, 12)));
  EXPECT_TRUE(IsFilledWith(Part(range, 12, 4), 7));
}

// It waits for the first of its ranges only, and for the others never while it holds one.
TEST_F(RaceTest, DiscardsBesideUnmapsOfAllTheirRanges) {
  for (int round = 0; round < 300; ++round) {
    const PageRange ranges[] = {P(0, 2), P(4, 2), P(8, 2), P(12, 2)};
    MustMapAt(*space_, P(0, 16));
    WatchedThread discarder([&] { (void)space_->Discard(ranges); });
    WatchedThread protector([&] { (void)space_->Protect(P(0, 16), Protection::kRead); });
    WatchedThread unmapper([&] { EXPECT_TRUE(space_->Unmap(P(0, 16)).ok()); });
    discarder.Join();
    protector.Join();
    unmapper.Join();
    space_->CheckInvariants();
    ASSERT_TRUE(space_->Unmap(P(0, 16)).ok());
  }
}

// ---- Advise ----

//   page       0       4       8
//   before     |A A A A A A A A|
//   Unmap          |- -|               in the kernel, which it does not need here: then
//   Advise     |---------------|       waits, and finds a hole
TEST_F(RaceTest, AnAdviceThatWaitedSeesTheHole) {
  MustMapAt(*space_, P(0, 8));
  Fill(P(0, 8), 7);
  kernel_.HoldNext(Operation::kCountResident, gate_);
  WatchedThread unmapper([&] { EXPECT_TRUE(space_->Unmap(P(2, 2)).ok()); });
  ASSERT_TRUE(gate_.AwaitArrival());
  Error advised;
  WatchedThread adviser([&] { advised = space_->Advise(P(0, 8), Advice::kDontNeed); });
  ASSERT_TRUE(adviser.AwaitSleep());
  gate_.Open();
  unmapper.Join();
  adviser.Join();
  EXPECT_EQ(advised.code, ErrorCode::kNotMapped);
  EXPECT_EQ(Line(8), "AA..AAAA");
  EXPECT_TRUE(IsZero(P(0, 2)));
  EXPECT_TRUE(IsZero(P(4, 4)));
}

// ---- Locked memory ----

// Between the unlock and the end of the unmap nobody gets the pages, and whoever gets them next has them unlocked.
TEST_F(RaceTest, UnmapUnlocksBeforeTheExtentIsUsedAgain) {
  MustMapAt(*space_, P(0, 8));
  ASSERT_TRUE(space_->LockMemory(P(0, 8)).ok());
  kernel_.HoldNext(Operation::kUnlockMemory, gate_);
  WatchedThread unmapper([&] { EXPECT_TRUE(space_->Unmap(P(0, 8)).ok()); });
  ASSERT_TRUE(gate_.AwaitArrival());
  EXPECT_EQ(Line(8), "........");
  const PageRange other = MustMap(*space_, 8);
  EXPECT_FALSE(other.Overlaps(P(0, 8)));
  WatchedThread mapper([&] { MustMapAt(*space_, P(2, 2)); });
  ASSERT_TRUE(mapper.AwaitSleep());
  gate_.Open();
  unmapper.Join();
  mapper.Join();
  EXPECT_EQ(fake_.LockedPages(), Pages{0});
  EXPECT_EQ(space_->Lookup(P(2, 1).first)->lock, os::MemoryLock::kNone);
  EXPECT_TRUE(IsZero(P(2, 2)));
}

// The lock is taken under the range lock; the pages come afterwards, chunk by chunk, and nobody waits for that.
TEST_F(RaceTest, LockedMemoryIsPopulatedOutsideOfTheLock) {
  const PageRange range = MustMap(*space_, 4 * kPagesPerHugePage, {.alignment = {kPagesPerHugePage}});
  kernel_.HoldNext(Operation::kTouchForWrite, gate_);
  Error locked;
  WatchedThread locker([&] { locked = space_->LockMemory(range); });
  ASSERT_TRUE(gate_.AwaitArrival());
  EXPECT_EQ(space_->Lookup(range.first)->lock, os::MemoryLock::kLocked);
  const PageRange second = Part(range, kPagesPerHugePage, kPagesPerHugePage);
  EXPECT_TRUE(space_->Unmap(second).ok());
  MustMapAt(*space_, second);
  gate_.Open();
  locker.Join();
  EXPECT_EQ(locked, Error::Ok());
  EXPECT_EQ(space_->Lookup(second.first)->lock, os::MemoryLock::kNone);
  EXPECT_EQ(fake_.LockedPages(), Pages{3 * kPagesPerHugePage});
}

// ---- Remap ----

//   page     0       8          16
//   Remap    |A A A A|               held up while it copies: both ranges are its own
//   Unmap      |---|                 waits, and finds nothing there any more
TEST_F(RaceTest, UnmapWaitsForAMove) {
  MustMapAt(*space_, P(0, 8));
  MustMapAt(*space_, P(8, 1));
  Fill(P(0, 8), 7);
  kernel_.HoldNext(Operation::kCopy, gate_);
  Result<PageRange> moved = ErrorCode::kEmpty;
  WatchedThread mover([&] { moved = space_->Remap(P(0, 8), {16}, {.may_move = true}); });
  ASSERT_TRUE(gate_.AwaitArrival());
  EXPECT_TRUE(space_->Lookup(P(0, 1).first).ok()) << "the source is there until its content is elsewhere";
  WatchedThread unmapper([&] { EXPECT_TRUE(space_->Unmap(P(2, 2)).ok()); });
  ASSERT_TRUE(unmapper.AwaitSleep());
  gate_.Open();
  mover.Join();
  unmapper.Join();
  ASSERT_TRUE(moved.ok());
  EXPECT_TRUE(IsFilledWith(Part(*moved, 0, 8), 7));
  EXPECT_EQ(Draw(*space_, *moved), std::string(16, 'A'));
  EXPECT_EQ(Line(9), "........A");
}

// Moves lock two ranges of a region, unmaps want both and what is between: in whatever order they come, none waits
// for another that waits for it.
TEST_F(RaceTest, MovesBesideUnmapsOfSourceAndTarget) {
  for (int round = 0; round < 300; ++round) {
    MustMapAt(*space_, P(0, 8));
    MustMapAt(*space_, P(16, 8));
    const auto move = [&](PageRange from, PageRange to) {
      (void)space_->Remap(from, {8}, {.placement = Placement::kFixed, .address = to.address()});
    };
    WatchedThread upper([&] { move(P(0, 8), P(8, 8)); });
    WatchedThread downer([&] { move(P(16, 8), P(8, 8)); });
    WatchedThread unmapper([&] { EXPECT_TRUE(space_->Unmap(P(0, 24)).ok()); });
    upper.Join();
    downer.Join();
    unmapper.Join();
    space_->CheckInvariants();
    ASSERT_TRUE(space_->Unmap(P(0, 24)).ok());
  }
}

//   page     0       4       8
//   before   |A A A A A A A A|
//   Unmap            |-------|         has locked its pages, and nothing more yet
//   Remap    |---------------- - - -   waits, looks again, and finds that it is not one VMA
TEST_F(RaceTest, ARemapThatWaitedFindsItsSourceChanged) {
  MustMapAt(*space_, P(0, 8));
  for (const RemapOptions& options :
       {RemapOptions{}, RemapOptions{.placement = Placement::kFixed, .address = P(40, 1).address()}}) {
    Gate gate;
    kernel_.HoldNext(Operation::kCountResident, gate);
    WatchedThread unmapper([&] { EXPECT_TRUE(space_->Unmap(P(4, 4)).ok()); });
    const bool arrived = gate.AwaitArrival();
    Result<PageRange> remapped = ErrorCode::kEmpty;
    WatchedThread remapper([&] { remapped = space_->Remap(P(0, 8), {16}, options); });
    EXPECT_TRUE(remapper.AwaitSleep());
    gate.Open();
    unmapper.Join();
    remapper.Join();
    ASSERT_TRUE(arrived);
    EXPECT_EQ(remapped.error().code, ErrorCode::kNotMapped);
    EXPECT_EQ(Line(60), "AAAA" + std::string(56, '.'));
    EXPECT_EQ(*space_->Remap(P(0, 4), {8}), P(0, 8));
  }
}

//   page     0       8      16      24
//   Advise   |-------|                   held up in the kernel: keeps the source
//   Remap    |A A A A|      |A A A A|    has mapped its target, waits for the source
//   others                  |B B B B|    unmap that, and map their own there
//
// Neither content nor an unmap meant for the target goes where others are by then.
TEST_F(RaceTest, AMoveSparesWhatOthersMappedInThePlaceOfItsTarget) {
  for (const bool all : {true, false}) {
    SCOPED_TRACE(all ? "all of it" : "a part of it");
    Gate gate;
    MustMapAt(*space_, P(0, 8));
    Fill(P(0, 8), 7);
    kernel_.HoldNext(Operation::kAdviseReclaim, gate);
    WatchedThread adviser([&] { EXPECT_TRUE(space_->Advise(P(0, 8), Advice::kCold).ok()); });
    const bool arrived = gate.AwaitArrival();
    Result<PageRange> moved = ErrorCode::kEmpty;
    WatchedThread mover([&] {
      moved = space_->Remap(P(0, 8), {8}, {.placement = Placement::kFixed, .address = P(16, 1).address()});
    });
    EXPECT_TRUE(mover.AwaitSleep());
    EXPECT_EQ(Line(26), "AAAAAAAA........BBBBBBBB..");
    const PageRange own = all ? P(16, 8) : P(18, 3);
    EXPECT_TRUE(space_->Unmap(own).ok());
    MustMapAt(*space_, own);
    Fill(own, 9);
    const std::uint64_t generation = space_->Lookup(own.first)->generation;
    gate.Open();
    adviser.Join();
    mover.Join();
    ASSERT_TRUE(arrived);
    EXPECT_EQ(moved.error().code, ErrorCode::kOverlap) << "seen when it tried again";
    EXPECT_EQ(space_->Lookup(own.first)->generation, generation);
    EXPECT_TRUE(IsFilledWith(own, 9));
    EXPECT_EQ(Line(26), all ? "AAAAAAAA........BBBBBBBB.." : "AAAAAAAA..........BBB.....");
    EXPECT_TRUE(IsFilledWith(P(0, 8), 7));
    space_->CheckInvariants();
    ASSERT_TRUE(space_->Unmap(P(0, 24)).ok());
  }
}

// The same, at any moment.
TEST_F(RaceTest, MovesBesideOthersWhoTakeTheTarget) {
  std::atomic<bool> done{false};
  std::atomic<int> stolen{0};
  WatchedThread thief([&] {
    while (!done.load()) {
      if (!space_->Unmap(P(16, 8)).ok() || !space_->Map({8}, At(P(16, 1).first)).ok()) continue;
      Fill(P(16, 8), 9);
      std::this_thread::yield();
      // Only moves that succeeded before it was mapped, and none since, had content for these pages.
      ASSERT_TRUE(IsFilledWith(P(16, 8), 9));
      stolen.fetch_add(1);
      ASSERT_TRUE(space_->Unmap(P(16, 8)).ok());
    }
  });
  MustMapAt(*space_, P(0, 8));
  for (int round = 0; round < 300 || (stolen.load() < 3 && !thief.done()); ++round) {
    Fill(P(0, 8), 7);
    const Result<PageRange> moved =
        space_->Remap(P(0, 8), {8}, {.placement = Placement::kFixed, .address = P(16, 1).address()});
    if (moved.ok()) MustMapAt(*space_, P(0, 8));
    ASSERT_TRUE(IsFilledWith(P(0, 8), moved.ok() ? 0 : 7));
  }
  done.store(true);
  thief.Join();
  space_->CheckInvariants();
}

// Two moves cross: each locks its two ranges in ascending order.
TEST_F(RaceTest, TwoMovesToWhereTheOtherIs) {
  for (int round = 0; round < 50; ++round) {
    MustMapAt(*space_, P(0, 8));
    MustMapAt(*space_, P(16, 8));
    Fill(P(0, 8), 1);
    Fill(P(16, 8), 2);
    const auto move = [&](PageRange from, PageRange to) {
      return space_->Remap(from, {8}, {.placement = Placement::kReplace, .address = to.address()});
    };
    Result<PageRange> up = ErrorCode::kEmpty;
    Result<PageRange> down = ErrorCode::kEmpty;
    WatchedThread upper([&] { up = move(P(0, 8), P(16, 8)); });
    WatchedThread downer([&] { down = move(P(16, 8), P(0, 8)); });
    upper.Join();
    downer.Join();
    // One of them at least found its source replaced or moved, or came after the other.
    for (const PageRange range : {P(0, 8), P(16, 8)}) {
      if (!space_->Lookup(range.first).ok()) continue;
      EXPECT_TRUE(IsFilledWith(range, 1) || IsFilledWith(range, 2) || IsZero(range));
    }
    space_->CheckInvariants();
    ASSERT_TRUE(space_->Unmap(P(0, 24)).ok());
  }
}

}  // namespace
}  // namespace freehold::vm
