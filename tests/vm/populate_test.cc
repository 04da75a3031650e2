// AddressSpace::Populate and Discard: what becomes resident, in which steps, and when they stop.
#include <atomic>
#include <cerrno>
#include <functional>
#include <string>
#include <thread>
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

class PopulateTest : public PolicyTest {
 protected:
  PageRange P(std::size_t first, std::size_t count) const { return Part(space_->reservation(), first, count); }

  // Calls `step` after every chunk.
  Result<Pages> PopulateStepwise(PageRange range, std::function<void(Pages done)> step,
                                 PopulateOptions options = {}) {
    options.progress = [](void* context, Pages done) {
      (*static_cast<std::function<void(Pages)>*>(context))(done);
    };
    options.progress_context = &step;
    return space_->Populate(range, options);
  }

  FakeKernel kernel_;
  TestSpace space_{kernel_, Options()};
};

TEST_P(PopulateTest, MakesEveryPageResidentAndKeepsContent) {
  const PageRange range = MustMap(*space_, 1500);
  Fill(Part(range, 700, 3), 0xaa);
  EXPECT_EQ(*space_->Populate(range), Pages{1500});
  EXPECT_EQ(kernel_.ResidentPages(range), Pages{1500});
  EXPECT_EQ(kernel_.CountResident(range)->value, 1500u) << "the real kernel agrees";
  EXPECT_TRUE(IsFilledWith(Part(range, 700, 3), 0xaa));
  EXPECT_TRUE(IsZero(Part(range, 0, 700)));
  EXPECT_TRUE(IsZero(Part(range, 703, 797)));
}

TEST_P(PopulateTest, PartsOnly) {
  const PageRange range = MustMap(*space_, 100);
  EXPECT_EQ(*space_->Populate(Part(range, 10, 5)), Pages{5});
  EXPECT_EQ(kernel_.ResidentPages(Part(range, 10, 5)), Pages{5});
  EXPECT_EQ(kernel_.ResidentPages(range), Pages{5});
}

//   pages of 2 MiB   |        |        |        |
//   range                 |---------------|
//   chunks                |---|--------|--|
TEST_P(PopulateTest, GoesInChunksThatEndAtHugePages) {
  const PageRange aligned = MustMap(*space_, 4 * kPagesPerHugePage, {.alignment = {kPagesPerHugePage}});
  const PageRange range = Part(aligned, 100, kPagesPerHugePage + 500);
  kernel_.ClearCalls();
  std::vector<std::size_t> progress;
  EXPECT_EQ(*PopulateStepwise(range, [&](Pages done) { progress.push_back(done.value); }), range.count());
  EXPECT_EQ(progress, (std::vector<std::size_t>{kPagesPerHugePage - 100, 2 * kPagesPerHugePage - 100,
                                                kPagesPerHugePage + 500}));
  std::vector<PageRange> touched;
  for (const FakeKernel::Call& call : kernel_.Calls()) {
    if (call.operation == Operation::kTouchForWrite) touched.push_back(call.ranges[0]);
  }
  EXPECT_EQ(touched, (std::vector<PageRange>{Part(aligned, 100, kPagesPerHugePage - 100),
                                             Part(aligned, kPagesPerHugePage, kPagesPerHugePage),
                                             Part(aligned, 2 * kPagesPerHugePage, 88)}));
}

TEST_P(PopulateTest, AcrossMappingsAndRegions) {
  const std::size_t border = kSmallRegionPages;
  MustMapAt(*space_, P(border - 30, 10));
  MustMapAt(*space_, P(border - 20, 20));
  MustMapAt(*space_, P(border, 10));
  std::vector<std::size_t> progress;
  EXPECT_EQ(*PopulateStepwise(P(border - 25, 30), [&](Pages done) { progress.push_back(done.value); }),
            Pages{30});
  EXPECT_EQ(kernel_.ResidentPages(P(border - 25, 30)), Pages{30});
  EXPECT_EQ(progress, (std::vector<std::size_t>{5, 25, 30}));
}

TEST_P(PopulateTest, RefusesHolesBeforeTouchingAnything) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(6, 4));
  for (const PageRange range : {P(0, 6), P(4, 2), P(2, 8), P(8, 10)}) {
    EXPECT_EQ(space_->Populate(range).error().code, ErrorCode::kNotMapped);
  }
  EXPECT_EQ(kernel_.ResidentPages(P(0, 20)), Pages{0});
}

TEST_P(PopulateTest, RefusesReadOnlyBeforeTouchingAnything) {
  MustMapAt(*space_, P(0, 8));
  ASSERT_TRUE(space_->Protect(P(4, 1), Protection::kRead).ok());
  EXPECT_EQ(space_->Populate(P(0, 8)).error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(kernel_.ResidentPages(P(0, 8)), Pages{0});
  EXPECT_EQ(*space_->Populate(P(0, 4)), Pages{4});
}

TEST_P(PopulateTest, AnyWritableProtectionWillDo) {
  for (const Protection protection : {Protection::kReadWriteExec, Protection::kWrite}) {
    const PageRange range = MustMap(*space_, 4, {.protection = protection});
    EXPECT_EQ(*space_->Populate(range), Pages{4});
  }
}

TEST_P(PopulateTest, RefusesWhatIsNoRangeOfTheSpace) {
  const PageRange all = space_->reservation();
  EXPECT_EQ(space_->Populate(P(2, 0)).error().code, ErrorCode::kEmpty);
  EXPECT_EQ(space_->Populate({P(3, 1).first, P(1, 1).first}).error().code, ErrorCode::kOverflow);
  EXPECT_EQ(space_->Populate(PageRange::Of(all.end, {1})).error().code, ErrorCode::kOutsideReservation);
}

// ---- When it stops ----

class PopulateStopTest : public PopulateTest {
 protected:
  static constexpr std::size_t kChunk = kPagesPerHugePage;
  PageRange Map4Chunks() { return MustMap(*space_, 4 * kChunk, {.alignment = {kChunk}}); }
  std::size_t ResidentChunks(PageRange range) const { return kernel_.ResidentPages(range).value / kChunk; }
};

TEST_P(PopulateStopTest, AtADeadline) {
  const PageRange range = Map4Chunks();
  const Nanoseconds deadline = kernel_.Now() + Milliseconds(10);
  const Result<Pages> result = PopulateStepwise(
      range, [&](Pages) { kernel_.AdvanceTime(Milliseconds(4)); }, {.deadline = deadline});
  EXPECT_EQ(result.error().code, ErrorCode::kDeadline);
  EXPECT_EQ(ResidentChunks(range), 3u) << "those done stay";
  EXPECT_EQ(space_->Populate(range, {.deadline = kernel_.Now()}).error().code, ErrorCode::kDeadline);
  EXPECT_EQ(*space_->Populate(range, {.deadline = kernel_.Now() + Milliseconds(1)}), range.count());
}

TEST_P(PopulateStopTest, WhenCancelled) {
  const PageRange range = Map4Chunks();
  std::atomic<bool> cancel{false};
  const Result<Pages> result = PopulateStepwise(
      range, [&](Pages done) { cancel.store(done.value >= 2 * kChunk); }, {.cancel = &cancel});
  EXPECT_EQ(result.error().code, ErrorCode::kCancelled);
  EXPECT_EQ(ResidentChunks(range), 2u);
  EXPECT_EQ(space_->Populate(range, {.cancel = &cancel}).error().code, ErrorCode::kCancelled);
  cancel.store(false);
  EXPECT_EQ(*space_->Populate(range, {.cancel = &cancel}), range.count());
}

TEST_P(PopulateStopTest, WhenTheRestIsUnmapped) {
  const PageRange range = Map4Chunks();
  const Result<Pages> result = PopulateStepwise(range, [&](Pages done) {
    if (done.value != kChunk) return;
    ASSERT_TRUE(space_->Unmap(Part(range, 2 * kChunk, kChunk)).ok());
  });
  EXPECT_EQ(result.error().code, ErrorCode::kReplaced);
  EXPECT_EQ(ResidentChunks(range), 2u) << "up to the hole";
}

TEST_P(PopulateStopTest, WhenTheRestIsReplaced) {
  const PageRange range = Map4Chunks();
  const Result<Pages> result = PopulateStepwise(range, [&](Pages done) {
    if (done.value != kChunk) return;
    MustMap(*space_, 2 * kChunk, At(Part(range, kChunk, 1).first, Placement::kReplace));
  });
  EXPECT_EQ(result.error().code, ErrorCode::kReplaced);
  EXPECT_EQ(ResidentChunks(range), 1u) << "a new mapping is not ours to populate";
}

TEST_P(PopulateStopTest, WhenTheRestBecomesReadOnly) {
  const PageRange range = Map4Chunks();
  const Result<Pages> result = PopulateStepwise(range, [&](Pages done) {
    if (done.value != kChunk) return;
    ASSERT_TRUE(space_->Protect(Part(range, 3 * kChunk, 1), Protection::kRead).ok());
  });
  EXPECT_EQ(result.error().code, ErrorCode::kReplaced);
  EXPECT_EQ(ResidentChunks(range), 3u);
}

// Parts of a mapping keep its generation: what is left of it is still the same.
TEST_P(PopulateStopTest, NotWhenTheMappingIsSplitBehindIt) {
  const PageRange range = Map4Chunks();
  const Result<Pages> result = PopulateStepwise(range, [&](Pages done) {
    if (done.value != kChunk) return;
    ASSERT_TRUE(space_->Unmap(Part(range, 0, 10)).ok());
    ASSERT_TRUE(space_->Protect(Part(range, 20, 10), Protection::kRead).ok());
    ASSERT_TRUE(space_->Protect(Part(range, 2 * kChunk, 10), Protection::kRead).ok());
    ASSERT_TRUE(space_->Protect(Part(range, 2 * kChunk, 10), Protection::kReadWrite).ok());
  });
  EXPECT_EQ(*result, range.count());
}

// No lock is held while progress is reported: every verb works from there, on the same pages.
TEST_P(PopulateStopTest, ProgressMayUseTheSpace) {
  const PageRange range = Map4Chunks();
  const Result<Pages> result = PopulateStepwise(range, [&](Pages) {
    const PageRange other = MustMap(*space_, 8);
    EXPECT_TRUE(space_->Unmap(other).ok());
    EXPECT_EQ(*space_->Populate(Part(range, 0, 1)), Pages{1});
    const PageRange part = Part(range, 0, 1);
    EXPECT_TRUE(space_->Discard({&part, 1}).ok());
    (void)space_->Purge(PurgeScope::kAll);
  });
  EXPECT_EQ(*result, range.count());
}

FREEHOLD_INSTANTIATE_POLICIES(PopulateTest);
FREEHOLD_INSTANTIATE_POLICIES(PopulateStopTest);

// ---- Discard ----

class DiscardTest : public PolicyTest {
 protected:
  PageRange P(std::size_t first, std::size_t count) const { return Part(space_->reservation(), first, count); }
  Error Discard(std::vector<PageRange> ranges) { return space_->Discard(ranges); }

  FakeKernel kernel_;
  TestSpace space_{kernel_, Options()};
};

TEST_P(DiscardTest, DropsContentAndPages) {
  const PageRange range = MustMap(*space_, 16, {.populate = true});
  Fill(range, 0xaa);
  EXPECT_EQ(Discard({Part(range, 4, 8)}), Error::Ok());
  EXPECT_TRUE(IsZero(Part(range, 4, 8)));
  EXPECT_TRUE(IsFilledWith(Part(range, 0, 4), 0xaa));
  EXPECT_TRUE(IsFilledWith(Part(range, 12, 4), 0xaa));
  EXPECT_EQ(kernel_.ResidentPages(range), Pages{8});
  EXPECT_EQ(Draw(*space_, range), std::string(16, 'A')) << "mapped as before";
  Fill(range, 0xbb);
  EXPECT_EQ(space_->Stats().purged_pages, 8u);
}

TEST_P(DiscardTest, ManyRangesInAnyOrder) {
  const PageRange range = MustMap(*space_, 400, {.populate = true});
  Fill(range, 0xaa);
  std::vector<PageRange> ranges;
  for (std::size_t i = 0; i < 40; ++i) ranges.push_back(Part(range, 10 * i, 3));
  std::swap(ranges[3], ranges[20]);
  std::swap(ranges[7], ranges[8]);
  EXPECT_EQ(Discard(ranges), Error::Ok());
  for (const PageRange part : ranges) EXPECT_TRUE(IsZero(part));
  EXPECT_EQ(kernel_.ResidentPages(range), Pages{400 - 3 * 40});
}

TEST_P(DiscardTest, RangesThatAscendGoInOneCall) {
  if (GetParam() == sync::LockPolicy::kCoarse) GTEST_SKIP() << "one range at a time under one lock";
  const PageRange range = MustMap(*space_, 100, {.populate = true});
  kernel_.ClearCalls();
  EXPECT_EQ(Discard({Part(range, 0, 3), Part(range, 10, 3), Part(range, 13, 2), Part(range, 50, 1)}), Error::Ok());
  EXPECT_EQ(kernel_.CallCount(Operation::kDiscard), 1u);
}

TEST_P(DiscardTest, AcrossRegionsByTwoRanges) {
  const std::size_t border = kSmallRegionPages;
  MustMapAt(*space_, P(border - 4, 4));
  MustMapAt(*space_, P(border, 4));
  Fill(P(border - 4, 8), 0xaa);
  EXPECT_EQ(Discard({P(border - 2, 2), P(border, 2)}), Error::Ok());
  EXPECT_TRUE(IsZero(P(border - 2, 4)));
  EXPECT_TRUE(IsFilledWith(P(border - 4, 2), 0xaa));
}

TEST_P(DiscardTest, RefusesHoles) {
  MustMapAt(*space_, P(0, 4));
  MustMapAt(*space_, P(8, 4));
  Fill(P(0, 4), 0xaa);
  Fill(P(8, 4), 0xaa);
  for (const PageRange range : {P(0, 5), P(4, 4), P(2, 8), P(10, 4)}) {
    EXPECT_EQ(Discard({range}).code, ErrorCode::kNotMapped);
  }
  EXPECT_EQ(Discard({P(0, 2), P(5, 1)}).code, ErrorCode::kNotMapped);
  EXPECT_TRUE(IsFilledWith(P(0, 4), 0xaa)) << "nothing of a call that was refused";
  EXPECT_TRUE(IsFilledWith(P(8, 4), 0xaa));
}

TEST_P(DiscardTest, RefusesWhatIsNoRangeOfTheSpace) {
  MustMapAt(*space_, P(0, 4));
  const PageRange all = space_->reservation();
  EXPECT_EQ(Discard({}), Error::Ok());
  EXPECT_EQ(Discard({P(0, 0)}).code, ErrorCode::kEmpty);
  EXPECT_EQ(Discard({{P(3, 1).first, P(1, 1).first}}).code, ErrorCode::kOverflow);
  EXPECT_EQ(Discard({PageRange::Of(all.end, {1})}).code, ErrorCode::kOutsideReservation);
}

TEST_P(DiscardTest, ReportsTheKernelsError) {
  const PageRange range = MustMap(*space_, 4);
  Fill(range, 0xaa);
  kernel_.FailNth(Operation::kDiscard, 1, ENOMEM);
  EXPECT_EQ(Discard({range}), Error::System(ENOMEM));
  EXPECT_TRUE(IsFilledWith(range, 0xaa));
  EXPECT_EQ(Discard({range}), Error::Ok());
  EXPECT_TRUE(IsZero(range));
}

// What was discarded while it was mapped is zero for the next user, like everything else.
TEST_P(DiscardTest, ThenReuse) {
  for (int round = 0; round < 10; ++round) {
    const PageRange range = MustMap(*space_, 8);
    ASSERT_TRUE(IsZero(range));
    Fill(range, 0xaa);
    ASSERT_EQ(Discard({Part(range, round % 8, 1)}), Error::Ok());
    ASSERT_TRUE(space_->Unmap(range).ok());
  }
}

// Whoever held the first range and waited for the second would wait for a Protect of both that came in between.
TEST_P(DiscardTest, OfSeveralRangesBesideVerbsOverAllOfThem) {
  const PageRange all = MustMap(*space_, 12);
  const PageRange ranges[] = {Part(all, 0, 2), Part(all, 4, 2), Part(all, 8, 2)};
  std::atomic<bool> done{false};
  std::thread protector([&] {
    for (int i = 0; !done.load(); ++i) {
      EXPECT_TRUE(space_->Protect(all, i % 2 == 0 ? Protection::kRead : Protection::kReadWrite).ok());
    }
  });
  for (int i = 0; i < 2000; ++i) ASSERT_TRUE(space_->Discard(ranges).ok());
  done.store(true);
  protector.join();
}

FREEHOLD_INSTANTIATE_POLICIES(DiscardTest);

}  // namespace
}  // namespace freehold::vm
