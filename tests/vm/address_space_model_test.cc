// Random operations on a space against a naive map of pages, checked after each; then the same operations on one
// space from four threads. Files and pagers are the real ones: pages of a pager come through userfaultfd, where this
// process may use it. A failure prints its seed and operations; a list that once failed is kept below as a test of its
// own.
//
//   MODEL_SECONDS=n   that long for each of the two, instead of six seconds, with seeds that are new each time
//                              (./runtests: half a minute; ./runtests --long: five minutes, in each configuration)
//   FREEHOLD_MODEL_SEED=n      one run with this seed
//
// A run that ends in a crash prints its operations, all of them. To have only those that are needed:
//
//   address_space_fuzz_replay --seed n > /tmp/list; address_space_fuzz_replay --shrink /tmp/list
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_model.h"
#include "tests/vm/space_operations.h"
#include "vm/fault.h"
#include "vm/os/linux_kernel.h"
#include "vm/os/userfault.h"

namespace freehold::vm::test {
namespace {

using std::chrono::steady_clock;

// Random runs, until their time is up.
class Seeds {
 public:
  explicit Seeds(double seconds) {
    if (const char* only = std::getenv("FREEHOLD_MODEL_SEED"); only != nullptr) {
      seed_ = std::strtoull(only, nullptr, 10);
      only_ = true;
    }
    if (const char* longer = std::getenv("MODEL_SECONDS"); longer != nullptr) {
      // Not what the quick runs have seen.
      seconds = std::atof(longer);
      if (!only_) seed_ = static_cast<std::uint64_t>(steady_clock::now().time_since_epoch().count()) & 0xffffffff;
    }
    end_ = steady_clock::now() + std::chrono::milliseconds(static_cast<int>(seconds * 1000));
  }
  // At least one, which also counts those done.
  bool Next() {
    if (runs_ > 0 && (only_ || steady_clock::now() >= end_)) return false;
    if (runs_++ > 0) ++seed_;
    return true;
  }
  std::uint64_t seed() const { return seed_; }
  std::string ToString() const { return "repeat with FREEHOLD_MODEL_SEED=" + std::to_string(seed_); }

 private:
  std::uint64_t seed_ = 1;
  bool only_ = false;
  int runs_ = 0;
  steady_clock::time_point end_;
};

// ---- One thread ----

TEST(AddressSpaceModelTest, RandomOperations) {
  for (Seeds seeds(6); seeds.Next();) {
    const Variant& variant = Variants()[seeds.seed() % Variants().size()];
    const std::string run = std::string(variant.name) + ", " + seeds.ToString();
    const std::vector<SpaceOperation> operations = RandomOperations(seeds.seed(), kModelBytes);
    PrintOnCrash(&run, &operations);
    const std::string failure = RunAndShrink(operations, variant.options);
    PrintOnCrash(nullptr, nullptr);
    ASSERT_TRUE(failure.empty()) << run << ": " << failure;
  }
}

// ---- Four threads ----

constexpr int kThreads = 4;

void MapAll(AddressSpace& space, const std::vector<PageRange>& ranges) {
  for (const PageRange range : ranges) {
    ASSERT_TRUE(space.Map(range.count(), {.placement = Placement::kFixed, .address = range.address()}).ok());
  }
}

void RunThreads(std::uint64_t seed, const AddressSpaceOptions& options) {
  os::LinuxKernel kernel;
  const Result<AddressSpace*> created = AddressSpace::Create(kernel, options);
  ASSERT_TRUE(created.ok());
  AddressSpace& space = **created;
  os::LinuxUserfault userfault;
  StampedPager pager(64, kFileStamp, StampedPager::Users::kMany);
  auto faults = std::make_unique<FaultService>(space, userfault);
  ASSERT_TRUE(faults->Start().ok());
  // Behind the windows, in plain memory and among mappings.
  FilePages backing(os::Protection::kReadWrite);
  StampedFile file(StampedFile::Place::kDisk, StampedFile::Access::kReadOnly);
  SharedPages shared;
  shared.backing = &backing;
  shared.file = &file;
  shared.pager = &pager;
  shared.faults = faults->available() ? faults.get() : nullptr;
  const PageRange all = space.reservation();
  for (const std::size_t region : {0, 3}) {
    const PageNumber first = all.first + Pages{region * (all.count().value / 4) + 4 * SpaceModel::kWindowPages};
    shared.mapped.push_back(PageRange::Of(first, {64}));
    shared.open.push_back(PageRange::Of(first + Pages{64}, {64}));
  }
  MapAll(space, shared.mapped);

  std::vector<std::unique_ptr<SpaceModel>> models;
  for (int i = 0; i < kThreads; ++i) models.push_back(std::make_unique<SpaceModel>(space, shared, i + 1));
  std::string last[kThreads];
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      SpaceModel& model = *models[i];
      int done = 0;
      for (const SpaceOperation& operation : RandomOperations(seed * kThreads + i, 6000)) {
        std::visit([&](const auto& one) { one.Perform(model); }, operation);
        if (++done % 16 == 0) model.CheckInvariants(SpaceModel::Depth::kContent);
        if (!model.ok()) {
          last[i] = ToString(operation);
          return;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();

  // All of it: what the threads know, and nothing else.
  space.CheckInvariants();
  for (const std::vector<PageRange>& ranges : {shared.mapped, shared.open}) {
    for (const PageRange range : ranges) ASSERT_TRUE(space.Unmap(range).ok());
  }
  std::size_t known = 0;
  for (int i = 0; i < kThreads; ++i) {
    SpaceModel& model = *models[i];
    ASSERT_TRUE(model.ok()) << "thread " << i << ": " << model.failure() << ", after " << last[i];
    model.CheckInvariants(SpaceModel::Depth::kContent);
    ASSERT_TRUE(model.ok()) << "thread " << i << ", at the end: " << model.failure();
    known += model.pages().size();
  }
  EXPECT_EQ(backing.pages(), 0u);
  EXPECT_EQ(pager.failure(), "");
  EXPECT_EQ(space.Stats().mapped, Pages{known}.bytes());
  for (const std::unique_ptr<SpaceModel>& model : models) {
    model->Finish();
    EXPECT_EQ(model->failure(), "");
  }
  EXPECT_EQ(space.Stats().mapped, Bytes{0});
  space.CheckInvariants();
  faults.reset();
  models.clear();
  AddressSpace::Destroy(&space);
}

TEST(AddressSpaceModelTest, FourThreads) {
  const std::vector<SpaceOperation> none;
  for (Seeds seeds(6); seeds.Next();) {
    const Variant& variant = Variants()[seeds.seed() % Variants().size()];
    const std::string run = std::string(variant.name) + ", " + seeds.ToString();
    PrintOnCrash(&run, &none);
    RunThreads(seeds.seed(), variant.options);
    PrintOnCrash(nullptr, nullptr);
    ASSERT_FALSE(HasFailure()) << run;
  }
}

// ---- What was found ----

void ExpectFine(const std::vector<SpaceOperation>& operations) {
  for (const Variant& variant : Variants()) EXPECT_EQ(Run(operations, variant.options), "") << variant.name;
}

// Old content kept behind kNone in the mapping zone came back as clean memory.
TEST(SpaceOperationsTest, ContentBehindNoAccessIsResetOnUnmap) {
  const Span four = {.where = 3, .page = 0, .size = 3};
  ExpectFine({Map{.span = four, .placement = Placement::kFixed}, Write{four},
              Map{.span = four, .placement = Placement::kReplace, .protection = 2, .content = Content::kAnything},
              Unmap{four}, Map{.span = four, .placement = Placement::kAnywhere, .protection = 1}});
}

// Pages of the first window, or of the one for mappings, from `page` on.
Span Plain(std::uint16_t page, std::uint8_t count) { return {.where = 0, .page = page, .size = static_cast<std::uint8_t>(count - 1)}; }
Span Mappings(std::uint16_t page, std::uint8_t count) { return {.where = 3, .page = page, .size = static_cast<std::uint8_t>(count - 1)}; }

// What replaced a file was refused half-way: lookups still found the file, but the kernel showed something else, and
// what had been anonymous memory showed a file when it was mapped again.
TEST(SpaceOperationsTest, RefusedReplacementShowsTheFileAgain) {
  const Map file = {.span = Plain(0, 8), .placement = Placement::kReplace, .lock = os::MemoryLock::kOnFault,
                    .backing = 1, .backing_page = 3};
  Map anonymous = file;
  anonymous.backing = 0;
  Map half = file;
  half.span = Plain(4, 8);
  for (std::uint8_t nth = 0; nth < 10; ++nth) {
    SCOPED_TRACE(nth);
    const FailCall fail = {.nth = nth, .error = 1};
    ExpectFine({file, Write{Plain(0, 8)}, fail, anonymous, Unmap{Plain(0, 8)}, anonymous});
    ExpectFine({anonymous, Write{Plain(0, 8)}, fail, half, Unmap{Plain(0, 8)}, anonymous, Write{Plain(0, 12)}, file});
  }
}

// Of an unmap of several mappings, what lay beside the pinned one was lost for good.
TEST(SpaceOperationsTest, UnmapFinishesWhatLiesBesideAPin) {
  for (const bool mappings : {false, true}) {
    const auto part = [&](std::uint16_t page, std::uint8_t count) {
      return mappings ? Mappings(page, count) : Plain(page, count);
    };
    ExpectFine({Map{.span = part(0, 4), .placement = Placement::kFixed, .backing = 1},
                Map{.span = part(4, 4), .placement = Placement::kFixed, .lock = os::MemoryLock::kOnFault},
                PinPages{.span = part(0, 4)}, Unmap{part(0, 8)}, PinPages{.release = true}});
  }
}

// A mapping in front of pinned pages could not grow, though it might have moved.
TEST(SpaceOperationsTest, GrowsElsewhereInFrontOfAPin) {
  ExpectFine({Map{.span = Plain(0, 4), .placement = Placement::kFixed}, Write{Plain(0, 4)},
              Map{.span = Plain(4, 4), .placement = Placement::kFixed}, PinPages{.span = Plain(4, 4)},
              Unmap{Plain(4, 4)}, Remap{.span = Plain(0, 4), .size = 7, .may_move = true}});
}

// A pinned source is refused before the target is mapped: the kernel might not give that back.
TEST(SpaceOperationsTest, PinnedSourceLeavesNoTarget) {
  ExpectFine({Map{.span = Mappings(0, 4), .placement = Placement::kFixed, .protection = 1},
              PinPages{.span = Mappings(1, 1)}, FailCall{.nth = 0, .error = 1},
              Remap{.span = Mappings(0, 4), .same_size = true, .placement = Placement::kFixed,
                    .target = Mappings(100, 4)}});
}

// A pager that was refused on the way in left pages behind that the pager before it took for present: who touched them
// waited for ever.
TEST(SpaceOperationsTest, RefusedPagerLeavesThePagerBefore) {
  const MapPager pager = {.span = Mappings(0, 8), .placement = Placement::kReplace, .page_limit = 1};
  MapPager half = pager;
  half.span = Mappings(4, 8);
  for (const bool userfault : {false, true}) {
    for (std::uint8_t nth = 0; nth < (userfault ? 4 : 10); ++nth) {
      SCOPED_TRACE(nth);
      const FailCall fail = {.nth = nth, .error = 1, .userfault = userfault};
      ExpectFine({pager, Write{Mappings(0, 8)}, fail, half, Write{Mappings(0, 12)}, Unmap{Mappings(2, 6)}});
    }
  }
}

// What lay before a pager in the list was dropped before the whole was refused.
TEST(SpaceOperationsTest, DiscardRefusesPagersBeforeItDropsAnything) {
  ExpectFine({Map{.span = Plain(0, 4), .placement = Placement::kFixed}, Write{Plain(0, 4)},
              MapPager{.span = Mappings(0, 4), .placement = Placement::kFixed, .page_limit = 1},
              Discard{.first = Plain(0, 4), .second = Mappings(0, 4)}});
}

// The kernel's word for it, which is another one, came through.
TEST(SpaceOperationsTest, PopulateOfAFileWithoutAccessIsUnsupported) {
  for (const os::Sharing sharing : {os::Sharing::kPrivate, os::Sharing::kShared}) {
    ExpectFine({MapFile{.span = Mappings(0, 4), .placement = Placement::kFixed, .protection = 2, .sharing = sharing},
                Populate{.span = Mappings(0, 4)}});
  }
}

// Under strict unmap, memory that replaces a file took the traps of free memory away first, from the file.
TEST(SpaceOperationsTest, StrictSpacesReplaceFilesThatMayNotBeWritten) {
  const MapFile file = {.span = Plain(0, 4), .placement = Placement::kFixed, .protection = 1, .file = 1,
                        .sharing = os::Sharing::kShared};
  ExpectFine({file, Map{.span = Plain(0, 4), .placement = Placement::kReplace}, Write{Plain(0, 4)}, Unmap{Plain(0, 4)},
              file, Map{.span = Plain(2, 4), .placement = Placement::kReplace}, Write{Plain(0, 6)}});
}

// What had been locked in part while it was written to could move, but not move and grow.
TEST(SpaceOperationsTest, MovesAndGrowsAFileOfSeveralKernelVmas) {
  for (std::uint8_t nth = 0; nth < 12; ++nth) {
    SCOPED_TRACE(nth);
    ExpectFine({MapFile{.span = Mappings(0, 8), .placement = Placement::kFixed},
                LockMemory{.span = Mappings(4, 4), .lock = os::MemoryLock::kOnFault}, Write{Mappings(0, 8)},
                LockMemory{.span = Mappings(4, 4)}, FailCall{.nth = nth},
                Remap{.span = Mappings(0, 8), .size = 96 + 11, .placement = Placement::kFixed,
                      .target = Mappings(100, 1)},
                Write{Mappings(101, 1)}});
  }
}

// ---- The operations themselves ----

TEST(SpaceOperationsTest, BytesAreOperationsAndBack) {
  const std::vector<SpaceOperation> operations = RandomOperations(7, 10000);
  std::vector<bool> seen(std::variant_size_v<SpaceOperation>);
  for (const SpaceOperation& operation : operations) seen[operation.index()] = true;
  EXPECT_EQ(std::count(seen.begin(), seen.end(), false), 0);
  const std::vector<SpaceOperation> again = Decode(Encode(operations));
  ASSERT_EQ(again.size(), operations.size());
  for (std::size_t i = 0; i < operations.size(); ++i) EXPECT_EQ(ToString(again[i]), ToString(operations[i]));
  EXPECT_EQ(ToString(Unmap{{.where = 1, .page = 300, .size = 5}}),
            "Unmap{.span = {.where = 1, .page = 300, .size = 5}}");
  EXPECT_EQ(ToString(Purge{PurgeScope::kAll}), "Purge{.scope = PurgeScope{1}}");
  EXPECT_TRUE(Decode({}).empty());
}

// A space that somebody changes behind the model's back is found out.
class CheckerTest : public testing::Test {
 protected:
  CheckerTest() : space_(*AddressSpace::Create(kernel_, Variants()[0].options)), model_(*space_, kernel_) {
    const Span eight = {.where = 0, .page = 0, .size = 7};
    Map{.span = eight, .placement = Placement::kFixed}.Perform(model_);
    Write{eight}.Perform(model_);
    range_ = PageRange::Of(space_->reservation().first, {8});
    model_.CheckInvariants(SpaceModel::Depth::kContent);
    EXPECT_EQ(model_.failure(), "");
  }
  ~CheckerTest() { AddressSpace::Destroy(space_); }

  std::string Check() {
    model_.CheckInvariants(SpaceModel::Depth::kContent);
    return model_.failure();
  }

  os::FakeKernel kernel_;
  AddressSpace* space_;
  SpaceModel model_;
  PageRange range_;
};

TEST_F(CheckerTest, FindsContentThatChanged) {
  range_.address()[0] = std::byte{8};
  EXPECT_NE(Check().find("word 0 is"), std::string::npos) << Check();
}

TEST_F(CheckerTest, FindsAPageThatWent) {
  ASSERT_TRUE(space_->Unmap(PageRange::Of(range_.first, {1})).ok());
  EXPECT_NE(Check().find("should be ["), std::string::npos) << Check();
}

TEST_F(CheckerTest, FindsAPageThatCame) {
  ASSERT_TRUE(space_->Map({1}).ok());
  EXPECT_NE(Check().find("should not be mapped"), std::string::npos) << Check();
}

TEST_F(CheckerTest, FindsAnotherProtection) {
  ASSERT_TRUE(space_->Protect(range_, os::Protection::kRead).ok());
  EXPECT_NE(Check().find("wrong protection"), std::string::npos) << Check();
}

TEST_F(CheckerTest, FindsAnotherLock) {
  if (!space_->LockMemory(range_).ok()) GTEST_SKIP() << "memory cannot be locked here";
  EXPECT_NE(Check().find("wrong lock"), std::string::npos) << Check();
}

TEST_F(CheckerTest, FindsAnotherMapping) {
  ASSERT_TRUE(space_->Map(range_.count(), {.placement = Placement::kReplace, .address = range_.address()}).ok());
  EXPECT_NE(Check().find("wrong generation"), std::string::npos) << Check();
}

TEST_F(CheckerTest, FindsTheKernelsProtection) {
  ASSERT_TRUE(kernel_.Protect(PageRange::Of(range_.first, {1}), os::Protection::kRead).ok());
  EXPECT_NE(Check().find("the kernel has another protection"), std::string::npos) << Check();
}

TEST_F(CheckerTest, AFailedCallIsCheckedAndRepeated) {
  FailCall{.nth = 0, .error = 0}.Perform(model_);
  Protect{.span = {.where = 0, .page = 2, .size = 1}, .protection = 1}.Perform(model_);
  EXPECT_EQ(kernel_.InjectedFailures(), 1u);
  EXPECT_EQ(Check(), "");
  // A verb that fails half-way.
  model_.Arm(1, ENOMEM);
  (void)model_.Call([&] {
    (void)space_->Unmap(PageRange::Of(range_.first, {1}));
    return space_->Protect(range_, os::Protection::kNone);
  });
  EXPECT_NE(model_.failure().find("after a failed call"), std::string::npos) << model_.failure();
}

TEST(SpaceOperationsTest, FailuresShrinkToWhatTheyNeed) {
  // A kernel that cannot exist: the reservation is too small for the options.
  AddressSpaceOptions options = Variants()[0].options;
  options.min_reserve = GiB(1);
  EXPECT_EQ(RunAndShrink({Tick{}, Tick{}}, options).find("cannot create a space"), 0u);
}

}  // namespace
}  // namespace freehold::vm::test
