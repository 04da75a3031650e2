// The window cache: when a file mapping is served without the kernel, and that nobody can tell.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/file_fixture.h"
#include "tests/vm/os/syscall_filter.h"
#include "tests/vm/space_fixture.h"
#include "vm/file_mapping.h"
#include "vm/notifier.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"
#include "vm/pin.h"
#include "vm/transaction.h"

namespace freehold::vm::test {
namespace {

using os::PassesInChild;
using os::Protection;
using os::Sharing;

std::uint64_t Windows(AddressSpace& space) { return space.Stats().windows; }
std::uint64_t Hits(AddressSpace& space) { return space.Stats().window_hits; }

class FileWindowTest : public PolicyTest {
 protected:
  PageRange Map(std::size_t pages, const FileMapOptions& options) { return MustMapFile(*space_, pages, options); }
  // Maps and unmaps.
  PageRange Visit(std::size_t pages, const FileMapOptions& options) {
    const PageRange range = Map(pages, options);
    EXPECT_TRUE(space_->Unmap(range).ok());
    return range;
  }
  bool MakesAWindow(const FileMapOptions& options, std::size_t pages = 2) {
    const std::uint64_t before = Windows(*space_);
    Visit(pages, options);
    const bool made = Windows(*space_) > before;
    (void)space_->Purge(PurgeScope::kAll);
    return made;
  }

  os::FakeKernel kernel_;
  TestSpace space_{kernel_, Options()};
  NumberedFile file_{16};
};
FREEHOLD_INSTANTIATE_POLICIES(FileWindowTest);

// ---- Hits ----

TEST_P(FileWindowTest, TheSameAgainAsksTheKernelOnlyWhatItIs) {
  const PageRange first = Visit(4, Of(file_, 2));
  EXPECT_EQ(Windows(*space_), 1u);
  EXPECT_EQ(space_->Stats().window_bytes, Pages{4}.bytes());
  EXPECT_FALSE(space_->Lookup(first.first).ok());
  EXPECT_EQ(Draw(*space_, first), "....");
  EXPECT_EQ(space_->Stats().mapped, Bytes{0});
  kernel_.ClearCalls();
  for (int i = 0; i < 3; ++i) {
    const PageRange again = Map(4, Of(file_, 2));
    EXPECT_EQ(again, first);
    EXPECT_EQ(Letters(again), "cdef");
    EXPECT_EQ(Windows(*space_), 0u);
    EXPECT_EQ(space_->Stats().mapped, Pages{4}.bytes());
    ASSERT_TRUE(space_->Unmap(again).ok());
  }
  EXPECT_EQ(kernel_.CallCount(), 3u);
  EXPECT_EQ(kernel_.CallCount(Operation::kIdentifyFile), 3u);
  EXPECT_EQ(Hits(*space_), 3u);
}

TEST_P(FileWindowTest, AMappingFromAWindowIsANewOne) {
  const PageRange range = Map(4, Of(file_));
  const std::uint64_t generation = space_->Lookup(range.first)->generation;
  ASSERT_TRUE(space_->Unmap(range).ok());
  const PageRange again = Map(4, Of(file_));
  ASSERT_EQ(again, range);
  EXPECT_GT(space_->Lookup(range.first)->generation, generation);
  EXPECT_EQ(space_->Lookup(range.first)->backing_page, 0u);
}

TEST_P(FileWindowTest, AnotherDescriptorOfTheFileIsAsGood) {
  char path[] = "/tmp/file_window_test_XXXXXX";
  NumberedFile both(mkstemp(path), 4);
  const NumberedFile reading(open(path, O_RDONLY | O_CLOEXEC), 0);
  struct stat status;
  ASSERT_EQ(fstat(both.fd(), &status), 0);
  unlink(path);
  if (!kernel_.InspectFile(both.fd())->lasting_identity) GTEST_SKIP() << "/tmp is on no plain file system";
  const PageRange range = Visit(2, Of(both));
  both.Close();
  EXPECT_EQ(Map(2, Of(reading)), range);
  EXPECT_EQ(Hits(*space_), 1u);
}

TEST_P(FileWindowTest, OnlyTheSameWillDo) {
  const NumberedFile other(16);
  const FileMapOptions base = Of(file_, 2, Sharing::kShared);
  Visit(4, base);
  const std::pair<std::size_t, FileMapOptions> others[] = {
      {3, base},                                                   // shorter
      {5, base},                                                   // longer
      {4, Of(file_, 3, Sharing::kShared)},                         // another part
      {4, Of(file_, 2, Sharing::kPrivate)},
      {4, Of(file_, 2, Sharing::kShared, Protection::kReadWrite)},
      {4, Of(file_, 2, Sharing::kShared, Protection::kNone)},
      {4, Of(other, 2, Sharing::kShared)},
  };
  for (const auto& [pages, options] : others) {
    const PageRange range = Map(pages, options);
    EXPECT_EQ(Hits(*space_), 0u);
    EXPECT_EQ(Windows(*space_), 1u);
    EXPECT_EQ(space_->Lookup(range.first)->protection, options.protection);
  }
  Map(4, base);
  EXPECT_EQ(Hits(*space_), 1u);
}

// A shared window by a descriptor that may write could be made writable; one by a reader must not.
TEST_P(FileWindowTest, ReadersGetNoWritersWindow) {
  char path[] = "/dev/shm/file_window_test_XXXXXX";
  const int fd = mkstemp(path);
  if (fd < 0) GTEST_SKIP() << "no /dev/shm";
  const NumberedFile both(fd, 2);
  const NumberedFile reading(open(path, O_RDONLY | O_CLOEXEC), 0);
  unlink(path);
  Visit(2, Of(both, 0, Sharing::kShared));
  const PageRange range = Map(2, Of(reading, 0, Sharing::kShared));
  EXPECT_EQ(Hits(*space_), 0u);
  EXPECT_EQ(space_->Protect(range, Protection::kReadWrite), Error{ErrorCode::kDenied});
  const PageRange writable = Map(2, Of(both, 0, Sharing::kShared));
  EXPECT_EQ(Hits(*space_), 1u);
  EXPECT_TRUE(space_->Protect(writable, Protection::kReadWrite).ok());
}

// Two users at one time have two addresses, and what one does is not seen by the other.
TEST_P(FileWindowTest, NeverTwoUsersOfOneAddress) {
  const PageRange first = Visit(4, Of(file_));
  const PageRange a = Map(4, Of(file_));
  const PageRange b = Map(4, Of(file_));
  EXPECT_EQ(a, first);
  EXPECT_FALSE(a.Overlaps(b));
  ASSERT_TRUE(space_->Unmap(Part(a, 1, 2)).ok());
  EXPECT_EQ(Letters(a), "a..d");
  EXPECT_EQ(Letters(b), "abcd");
  ASSERT_TRUE(space_->Unmap(b).ok());
  ASSERT_TRUE(space_->Unmap(a).ok());
  EXPECT_EQ(Windows(*space_), 1u);
  EXPECT_EQ(Map(4, Of(file_)), b);
}

TEST_P(FileWindowTest, ShowsWhatBecameOfTheFileMeanwhile) {
  for (const Sharing sharing : {Sharing::kPrivate, Sharing::kShared}) {
    const FileMapOptions options = Of(file_, 0, sharing);
    NumberedFile file(4);
    FileMapOptions window = options;
    window.descriptor = file.fd();
    const PageRange range = Map(6, window);
    EXPECT_EQ(Letters(range), "abcd..");
    ASSERT_TRUE(space_->Unmap(range).ok());
    file.Write(1, 'X');
    file.Resize(2);
    file.Resize(3);
    EXPECT_EQ(Letters(Map(6, window)), "aX0...");
  }
  EXPECT_EQ(Hits(*space_), 2u);
}

TEST_P(FileWindowTest, ServesTheNewestOfSeveral) {
  const PageRange a = Map(2, Of(file_));
  const PageRange b = Map(2, Of(file_));
  ASSERT_TRUE(space_->Unmap(b).ok());
  ASSERT_TRUE(space_->Unmap(a).ok());
  EXPECT_EQ(Map(2, Of(file_)), a);
  EXPECT_EQ(Map(2, Of(file_)), b);
}

TEST_P(FileWindowTest, PopulatesFromAWindowToo) {
  Visit(2, Of(file_));
  kernel_.ClearCalls();
  FileMapOptions options = Of(file_);
  options.populate = true;
  Map(2, options);
  EXPECT_EQ(Hits(*space_), 1u);
  EXPECT_EQ(kernel_.CallCount(Operation::kFaultIn), 1u);
}

// ---- What is no window ----

TEST_P(FileWindowTest, KeepsWhatShowsTheFileAndNothingElse) {
  EXPECT_TRUE(MakesAWindow(Of(file_)));
  EXPECT_TRUE(MakesAWindow(Of(file_, 0, Sharing::kPrivate, Protection::kNone)));
  EXPECT_TRUE(MakesAWindow(Of(file_, 0, Sharing::kShared)));
  EXPECT_TRUE(MakesAWindow(Of(file_, 0, Sharing::kShared, Protection::kReadWrite)));
  EXPECT_TRUE(MakesAWindow(Of(file_, 14), 8)) << "beyond the end";
  EXPECT_FALSE(MakesAWindow(Of(file_, 0, Sharing::kPrivate, Protection::kReadWrite)));
  EXPECT_FALSE(MakesAWindow(Of(file_, 0, Sharing::kPrivate, Protection::kReadExec)));
}

TEST_P(FileWindowTest, KeepsNothingThatWasChanged) {
  PageRange range = Map(4, Of(file_));
  ASSERT_TRUE(space_->Protect(range, Protection::kReadWrite).ok());
  Put(range, 0, 'X');
  ASSERT_TRUE(space_->Protect(range, Protection::kRead).ok());
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(Windows(*space_), 0u) << "it may hold copies";

  range = Map(4, Of(file_, 0, Sharing::kShared));
  ASSERT_TRUE(space_->Protect(Part(range, 1, 2), Protection::kNone).ok());
  ASSERT_TRUE(space_->Protect(Part(range, 1, 2), Protection::kRead).ok());
  EXPECT_EQ(Draw(*space_, range), "aaaa");
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(Windows(*space_), 0u);

  range = Map(4, Of(file_));
  const PageRange moved = *space_->Remap(range, {4}, {.placement = Placement::kFixed,
                                                      .address = (range.end + Pages{8}).address()});
  ASSERT_TRUE(space_->Unmap(moved).ok());
  EXPECT_EQ(Windows(*space_), 0u);

  range = Map(4, Of(file_));
  ASSERT_TRUE(space_->Remap(range, {6}).ok());
  ASSERT_TRUE(space_->Remap(PageRange::Of(range.first, {6}), {4}).ok());
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(Windows(*space_), 0u);

  // The same with a protection that the kernel refused: nobody knows how far it came.
  range = Map(4, Of(file_));
  kernel_.FailNth(Operation::kProtect, 1, ENOMEM);
  EXPECT_FALSE(space_->Protect(range, Protection::kNone).ok());
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(Windows(*space_), 0u);

  // A mapping of other files in the same place is judged for itself.
  EXPECT_TRUE(MakesAWindow(Of(file_), 4));
}

TEST_P(FileWindowTest, KeepsNoPartsAndNoNeighboursTogether) {
  const PageRange range = Map(6, Of(file_));
  ASSERT_TRUE(space_->Unmap(Part(range, 0, 2)).ok());
  ASSERT_TRUE(space_->Unmap(Part(range, 2, 4)).ok());
  EXPECT_EQ(Windows(*space_), 0u);
  const PageRange a = Map(2, Of(file_));
  ASSERT_TRUE(space_->MapFile({2}, OfAt(file_, a.end)).ok());
  ASSERT_TRUE(space_->Unmap(PageRange::Of(a.first, {4})).ok());
  EXPECT_EQ(Windows(*space_), 0u) << "two at once";
  EXPECT_EQ(kernel_.FilePages(space_->reservation()), Pages{0});
}

TEST_P(FileWindowTest, KeepsNothingThatIsNoPlainFile) {
  const NumberedFile zero(open("/dev/zero", O_RDWR | O_CLOEXEC), 0);
  EXPECT_FALSE(MakesAWindow(Of(zero, 0, Sharing::kShared)));
  EXPECT_EQ(kernel_.FilePages(space_->reservation()), Pages{0});
}

// A seal against writing is refused while there is a mapping that may write.
TEST_P(FileWindowTest, StaysOutOfTheWayOfSeals) {
  const NumberedFile file(memfd_create("sealable", MFD_CLOEXEC | MFD_ALLOW_SEALING), 2);
  Visit(2, Of(file, 0, Sharing::kShared, Protection::kReadWrite));
  EXPECT_EQ(Windows(*space_), 0u);
  ASSERT_EQ(fcntl(file.fd(), F_ADD_SEALS, F_SEAL_WRITE), 0);
  EXPECT_EQ(space_->MapFile({2}, Of(file, 0, Sharing::kShared, Protection::kReadWrite)).error(), Error::System(EPERM));
  EXPECT_TRUE(MakesAWindow(Of(file)));
}

TEST_P(FileWindowTest, LimitsAndStrictnessRuleItOut) {
  for (const bool strict : {false, true}) {
    AddressSpaceOptions options = Options();
    if (strict) {
      options.strict_unmap = true;
    } else {
      options.window_limit = Bytes{0};
    }
    TestSpace space(kernel_, options);
    const PageRange range = MustMapFile(*space, 2, Of(file_));
    ASSERT_TRUE(space->Unmap(range).ok());
    EXPECT_EQ(Windows(*space), 0u);
    EXPECT_FALSE(CanRead(range.first));
    EXPECT_EQ(kernel_.FilePages(range), Pages{0});
  }
}

// ---- Their end ----

TEST_P(FileWindowTest, DecayGivesThemBackInRuns) {
  std::vector<PageRange> ranges;
  for (std::size_t i = 0; i < 8; ++i) ranges.push_back(Map(2, Of(file_, i)));
  space_->Tick();
  for (const PageRange range : ranges) ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(Windows(*space_), 8u);
  kernel_.AdvanceTime(Milliseconds(500));
  space_->Tick();
  EXPECT_EQ(Windows(*space_), 8u) << "too young";
  kernel_.AdvanceTime(Milliseconds(700));
  kernel_.ClearCalls();
  space_->Tick();
  EXPECT_EQ(Windows(*space_), 0u);
  EXPECT_EQ(kernel_.FilePages(space_->reservation()), Pages{0});
  EXPECT_EQ(kernel_.CallCount(Operation::kReset), 1u) << "neighbours by one call";
  EXPECT_EQ(Map(16, Of(file_)), PageRange::Of(ranges.front().first, {16})) << "one free range";
}

TEST_P(FileWindowTest, UseKeepsThemYoung) {
  space_->Tick();
  for (int i = 0; i < 5; ++i) {
    Visit(2, Of(file_));
    kernel_.AdvanceTime(Milliseconds(600));
    space_->Tick();
  }
  EXPECT_EQ(Hits(*space_), 4u);
}

TEST_P(FileWindowTest, PurgingAllGivesThemBack) {
  Visit(2, Of(file_));
  Visit(3, Of(file_));
  EXPECT_EQ(space_->Purge(PurgeScope::kAll), Pages{5});
  EXPECT_EQ(Windows(*space_), 0u);
  EXPECT_EQ(kernel_.FilePages(space_->reservation()), Pages{0});
}

TEST_P(FileWindowTest, NumberAndBytesAreBounded) {
  std::vector<PageRange> ranges;
  for (std::size_t i = 0; i < WindowCache::kMaxWindows + 40; ++i) ranges.push_back(Map(1, Of(file_)));
  for (const PageRange range : ranges) {
    ASSERT_TRUE(space_->Unmap(range).ok());
    ASSERT_LE(Windows(*space_), WindowCache::kMaxWindows);
  }
  EXPECT_GE(Windows(*space_), WindowCache::kMaxWindows / 2);
  EXPECT_EQ(kernel_.FilePages(space_->reservation()).value, Windows(*space_)) << "the others are gone at once";
  (void)space_->Purge(PurgeScope::kAll);

  AddressSpaceOptions options = Options();
  options.window_limit = Pages{16}.bytes();
  TestSpace space(kernel_, options);
  for (std::size_t i = 0; i < 10; ++i) {
    ASSERT_TRUE(space->Unmap(MustMapFile(*space, 4, Of(file_, i))).ok());
    ASSERT_LE(space->Stats().window_bytes, Pages{16}.bytes());
  }
  EXPECT_GT(Windows(*space), 0u);
  ASSERT_TRUE(space->Unmap(MustMapFile(*space, 17, Of(file_))).ok());
  EXPECT_LE(space->Stats().window_bytes, Pages{16}.bytes()) << "larger than all may be";
  MustMapFile(*space, 4, Of(file_, 9));
  EXPECT_EQ(Hits(*space), 1u) << "the oldest go first";
}

TEST_P(FileWindowTest, WantOfRoomTakesThem) {
  AddressSpaceOptions options = Options();
  options.window_limit = GiB(1);
  TestSpace space(kernel_, options);
  const PageRange range = MustMapFile(*space, kSmallRegionPages / 2 + 1, Of(file_));
  ASSERT_TRUE(space->Unmap(range).ok());
  EXPECT_EQ(Windows(*space), 1u);
  const PageRange all = MustMapFile(*space, kSmallRegionPages, Of(file_));
  EXPECT_EQ(Letters(Part(all, 0, 2)), "ab");
  EXPECT_EQ(Windows(*space), 0u);
}

//   windows  |  w1   |  w2   |  w3   |
//   fixed         ^^^^^^^^^^^^^^^            memory: reads as zero; what is left of w1 and w3 serves nobody
TEST_P(FileWindowTest, FixedMappingsTakeTheirPlace) {
  const PageRange w1 = Map(4, Of(file_));
  const PageRange w2 = Map(4, Of(file_, 4));
  const PageRange w3 = Map(4, Of(file_, 8));
  const PageRange all = {w1.first, w3.end};
  ASSERT_EQ(all.count(), Pages{12});
  for (const PageRange window : {w1, w2, w3}) ASSERT_TRUE(space_->Unmap(window).ok());
  EXPECT_EQ(Windows(*space_), 3u);
  const PageRange memory = MustMap(*space_, 8, At(Part(all, 2, 1).first));
  EXPECT_TRUE(IsZero(memory));
  EXPECT_EQ(Windows(*space_), 0u);
  Fill(memory, 'x');
  EXPECT_EQ(file_.Read(4), 'e');
  const PageRange again = Map(4, Of(file_, 4));
  EXPECT_EQ(Letters(again), "efgh");
  EXPECT_FALSE(again.Overlaps(memory));
  // What was left of the outer two is memory like any other.
  EXPECT_TRUE(IsZero(MustMap(*space_, 2, At(w1.first, Placement::kFixed))));
  EXPECT_TRUE(IsZero(MustMap(*space_, 2, At(Part(w3, 2, 1).first, Placement::kFixed))));
  EXPECT_EQ(Hits(*space_), 0u);
}

TEST_P(FileWindowTest, FixedFileMappingsTakeTheirPlace) {
  const PageRange window = Visit(4, Of(file_));
  ASSERT_TRUE(space_->MapFile({2}, OfAt(file_, Part(window, 1, 1).first)).ok());
  EXPECT_EQ(Letters(Part(window, 1, 2)), "ab");
  EXPECT_EQ(Draw(*space_, window), ".aa.");
  EXPECT_EQ(Windows(*space_), 0u);
}

TEST_P(FileWindowTest, AnUnmapAroundThemTakesThemAway) {
  const PageRange a = Map(4, Of(file_));
  const PageRange b = Map(4, Of(file_, 4));
  const PageRange c = Map(4, Of(file_, 8));
  ASSERT_TRUE(space_->Unmap(b).ok());
  ASSERT_TRUE(space_->Unmap({a.first, c.end}).ok());
  EXPECT_EQ(Windows(*space_), 0u);
  EXPECT_EQ(kernel_.FilePages({a.first, c.end}), Pages{0});
  EXPECT_EQ(Letters(Map(4, Of(file_, 4))), "efgh");
  EXPECT_EQ(Hits(*space_), 0u);
}

TEST_P(FileWindowTest, AMappingGrowsOverThem) {
  const PageRange a = Map(2, Of(file_));
  const PageRange b = Visit(4, Of(file_, 4));
  ASSERT_EQ(b.first, a.end);
  ASSERT_TRUE(space_->Remap(a, {4}).ok());
  EXPECT_EQ(Letters(PageRange::Of(a.first, {4})), "abcd");
  EXPECT_EQ(Windows(*space_), 0u);
  EXPECT_EQ(Letters(Map(4, Of(file_, 4))), "efgh");
}

// What the kernel would not take back stays free memory, to which the file is not shown any more.
TEST_P(FileWindowTest, WhatCannotBeResetServesNobody) {
  const PageRange window = Visit(4, Of(file_));
  kernel_.FailAlways(Operation::kReset, ENOMEM);
  EXPECT_EQ(space_->Purge(PurgeScope::kAll), Pages{0});
  EXPECT_EQ(Windows(*space_), 0u);
  EXPECT_EQ(kernel_.FilePages(window), Pages{4});
  kernel_.StopFailing();
  EXPECT_EQ(Letters(Map(4, Of(file_))), "abcd");
  EXPECT_EQ(Hits(*space_), 0u);
  EXPECT_EQ(space_->Purge(PurgeScope::kAll), Pages{window.Overlaps(Vmas(*space_)[0].range) ? 0u : 4u});
}

// The open file lives as long as its window, and its flock(2) with it; no longer.
TEST_P(FileWindowTest, TheOpenFileLivesAsLongAsItsWindow) {
  char path[] = "/dev/shm/file_window_test_XXXXXX";
  const int fd = mkstemp(path);
  if (fd < 0) GTEST_SKIP() << "no /dev/shm";
  NumberedFile first(fd, 2);
  const NumberedFile second(open(path, O_RDONLY | O_CLOEXEC), 0);
  unlink(path);
  ASSERT_EQ(flock(first.fd(), LOCK_EX), 0);
  const PageRange range = Visit(2, Of(first));
  first.Close();
  EXPECT_TRUE(CanRead(range.first)) << "the kernel has it";
  EXPECT_EQ(flock(second.fd(), LOCK_EX | LOCK_NB), -1);
  (void)space_->Purge(PurgeScope::kAll);
  EXPECT_FALSE(CanRead(range.first));
  EXPECT_EQ(flock(second.fd(), LOCK_EX | LOCK_NB), 0);
}

// ---- Who holds the range ----

// An unmap that has taken a window away, and not told the kernel yet, is waited for by who wants its pages.
TEST(FileWindowRaceTest, AWindowThatGoesIsNotServed) {
  os::FakeKernel fake;
  HookedKernel kernel(fake);
  TestSpace space(kernel);
  const NumberedFile file(8);
  const PageRange a = MustMapFile(*space, 2, Of(file));
  const PageRange b = MustMapFile(*space, 2, Of(file, 4));
  ASSERT_TRUE(space->Unmap(b).ok());
  Gate gate;
  kernel.HoldNext(Operation::kReset, gate);
  WatchedThread unmapper([&] { EXPECT_TRUE(space->Unmap({a.first, b.end}).ok()); });
  ASSERT_TRUE(gate.AwaitArrival());
  EXPECT_EQ(space->Stats().windows, 0u);
  PageRange again;
  WatchedThread mapper([&] { again = MustMapFile(*space, 2, Of(file, 4)); });
  EXPECT_TRUE(mapper.AwaitSleep());
  gate.Open();
  unmapper.Join();
  mapper.Join();
  EXPECT_EQ(again, b);
  EXPECT_EQ(Letters(again), "ef");
  EXPECT_EQ(Hits(*space), 0u);
}

// While somebody works on pages of a granule, its windows are left alone, and it makes none.
TEST(FileWindowRaceTest, ARangeThatIsHeldIsLeftAlone) {
  os::FakeKernel fake;
  HookedKernel kernel(fake);
  TestSpace space(kernel);
  const NumberedFile file(8);
  const PageRange a = MustMapFile(*space, 2, Of(file));
  const PageRange b = MustMapFile(*space, 3, Of(file, 4));
  ASSERT_TRUE(space->Unmap(b).ok());
  Gate gate;
  kernel.HoldNext(Operation::kProtect, gate);
  WatchedThread protector([&] { EXPECT_TRUE(space->Protect(a, Protection::kNone).ok()); });
  ASSERT_TRUE(gate.AwaitArrival());
  const PageRange other = MustMapFile(*space, 3, Of(file, 4));
  EXPECT_FALSE(other.Overlaps(b));
  EXPECT_EQ(Letters(other), "efg");
  EXPECT_EQ(Hits(*space), 0u);
  gate.Open();
  protector.Join();
  EXPECT_EQ(MustMapFile(*space, 3, Of(file, 4)), b);
  EXPECT_EQ(Hits(*space), 1u);
}

// ---- Pins and notifiers ----

// A pinned mapping waits for its last pin, and then goes for good.
TEST_P(FileWindowTest, WhatIsPinnedIsNoWindow) {
  const PageRange range = Map(4, Of(file_));
  {
    const Pin pin(*space_, Part(range, 1, 1));
    ASSERT_TRUE(pin.error().ok());
    ASSERT_TRUE(space_->Unmap(range).ok());
    EXPECT_EQ(Windows(*space_), 0u);
    EXPECT_FALSE(Map(4, Of(file_)).Overlaps(range));
    EXPECT_EQ(Letters(range), "abcd") << "still there";
  }
  EXPECT_EQ(Letters(range), "....");
  EXPECT_EQ(Windows(*space_), 0u);
  EXPECT_EQ(Hits(*space_), 0u);
}

// Who is told of every mapping is told of those from windows, and of their end, so none is kept.
TEST_P(FileWindowTest, NotifiersHearOfWindows) {
  struct Recorder final : Notifier {
    void OnMap(PageRange range) override { mapped.push_back(range); }
    void OnClose(PageRange range) override { closed.push_back(range); }
    std::vector<PageRange> mapped;
    std::vector<PageRange> closed;
  };
  const PageRange range = Visit(4, Of(file_));
  Recorder recorder;
  const NotifierRegistration registration(*space_, space_->reservation(), recorder);
  EXPECT_EQ(Map(4, Of(file_)), range);
  EXPECT_EQ(Hits(*space_), 1u);
  EXPECT_EQ(recorder.mapped, std::vector<PageRange>{range});
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(recorder.closed, std::vector<PageRange>{range});
  EXPECT_EQ(Windows(*space_), 0u);
}

TEST_P(FileWindowTest, TransactionsTakeTheirPlace) {
  const PageRange a = Map(2, Of(file_));
  const PageRange b = Map(2, Of(file_, 2));
  const PageRange c = Map(2, Of(file_, 4));
  ASSERT_TRUE(space_->Unmap(b).ok());
  Transaction transaction(*space_);
  transaction.Unmap({a.first, Part(b, 1, 1).first});
  transaction.Map(Part(b, 1, 1), {});
  ASSERT_TRUE(transaction.Commit().ok());
  EXPECT_EQ(Letters({a.first, c.end}), "...0ef");
  EXPECT_EQ(Windows(*space_), 0u);
  EXPECT_FALSE(Map(2, Of(file_, 2)).Overlaps(Part(b, 1, 1)));
}

TEST_P(FileWindowTest, SnapshotsDescribeMappingsAndNoWindows) {
  const PageRange window = Visit(2, Of(file_));
  const PageRange range = Map(3, Of(file_, 1, Sharing::kShared));
  struct stat status;
  ASSERT_EQ(fstat(file_.fd(), &status), 0);
  const BackingDescription description = space_->Lookup(range.first)->backing->Describe();
  EXPECT_TRUE(description.shared);
  EXPECT_EQ(description.inode, status.st_ino);
  EXPECT_EQ(description.device_major, major(status.st_dev));
  EXPECT_EQ(description.device_minor, minor(status.st_dev));
  for (const VmaInfo& vma : Vmas(*space_)) EXPECT_FALSE(vma.range.Overlaps(window));
}

// ---- Fork ----

TEST(FileWindowForkTest, ParentAndChildGoOnWithTheirOwn) {
  EXPECT_TRUE(PassesInChild([] {
    os::LinuxKernel kernel;
    TestSpace space(kernel);
    NumberedFile file(4);
    const PageRange window = MustMapFile(*space, 4, Of(file));
    CHILD_CHECK(space->Unmap(window).ok());
    space->PrepareFork();
    const pid_t child = fork();
    if (child == 0) {
      space->ChildAfterFork();
      CHILD_CHECK(MustMapFile(*space, 4, Of(file)) == window);
      CHILD_CHECK(Letters(window) == "abcd");
      CHILD_CHECK(space->Unmap(window).ok());
      (void)space->Purge(PurgeScope::kAll);
      CHILD_CHECK(!CanRead(window.first));
      space->CheckInvariants();
      _exit(0);
    }
    space->ParentAfterFork();
    int status = 0;
    CHILD_CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHILD_CHECK(MustMapFile(*space, 4, Of(file)) == window);
    CHILD_CHECK(Letters(window) == "abcd");
  }));
}

// ---- Many threads ----

// Threads map, read and unmap windows of one file, and do other things in their place, while one purges:
// whoever has a window reads the file in it until it lets it go.
class FileWindowStressTest : public PolicyTest {};
FREEHOLD_INSTANTIATE_POLICIES(FileWindowStressTest);

TEST_P(FileWindowStressTest, ReadersReadTheirWindows) {
  constexpr std::size_t kFilePages = 32;
  const int kRounds = kSanitized ? 3000 : 20000;
  os::LinuxKernel kernel;
  AddressSpaceOptions options = Options();
  options.window_limit = Pages{64}.bytes();
  options.decay = {0};
  TestSpace space(kernel, options);
  const NumberedFile file(kFilePages);
  std::atomic<int> wrong{0};
  std::atomic<int> running{2};
  const auto reader = [&](unsigned seed) {
    std::mt19937 random(seed);
    for (int i = 0; i < kRounds; ++i) {
      const std::size_t page = random() % 6;
      const std::size_t count = 1 + random() % 3;
      const Sharing sharing = random() % 2 == 0 ? Sharing::kShared : Sharing::kPrivate;
      const PageRange range = MustMapFile(*space, count, Of(file, page, sharing));
      for (std::size_t p = 0; p < count; ++p) {
        if (static_cast<char>(*Part(range, p, 1).address()) != static_cast<char>('a' + page + p)) ++wrong;
      }
      switch (random() % 8) {
        case 0:  // Only a part of it, then the rest.
          if (!space->Unmap(Part(range, 0, 1)).ok()) ++wrong;
          if (count > 1 && !space->Unmap(Part(range, 1, count - 1)).ok()) ++wrong;
          break;
        case 1:
          if (!space->Protect(range, Protection::kNone).ok()) ++wrong;
          if (!space->Unmap(range).ok()) ++wrong;
          break;
        case 2:  // Another mapping takes its place.
          if (!space->Map({count}, At(range.first, Placement::kReplace)).ok()) ++wrong;
          if (*range.address() != std::byte{0}) ++wrong;
          if (!space->Unmap(range).ok()) ++wrong;
          break;
        default:
          if (!space->Unmap(range).ok()) ++wrong;
      }
    }
    --running;
  };
  std::thread a(reader, 1);
  std::thread b(reader, 2);
  while (running.load() != 0) {
    space->Tick();
    std::this_thread::yield();
  }
  a.join();
  b.join();
  EXPECT_EQ(wrong.load(), 0);
  EXPECT_EQ(space->Stats().vmas, 0u);
  EXPECT_GT(Hits(*space), 0u);
}

// ---- A model ----

// Random verbs on windows beside a page-by-page expectation of letters.
class FileWindowModelTest : public testing::TestWithParam<unsigned> {};
INSTANTIATE_TEST_SUITE_P(Seeds, FileWindowModelTest, testing::Range(1u, 9u));

TEST_P(FileWindowModelTest, LooksLikeThePlainKernel) {
  constexpr std::size_t kFilePages = 12;
  const int kSteps = kSanitized ? 800 : 3000;
  std::mt19937 random(GetParam());
  os::FakeKernel kernel({.log_calls = false});
  AddressSpaceOptions options = SmallOptions();
  options.window_limit = Pages{24}.bytes();
  TestSpace space(kernel, options);
  NumberedFile file(kFilePages);
  struct Mapping {
    PageRange range;
    std::size_t page;  // of the file, its first
    bool is_shared;
  };
  std::vector<Mapping> live;
  std::string content;
  for (std::size_t page = 0; page < kFilePages; ++page) content += static_cast<char>('a' + page);
  const auto expected = [&](const Mapping& mapping) {
    std::string letters;
    for (std::size_t i = 0; i < mapping.range.count().value; ++i) {
      letters += mapping.page + i < kFilePages ? content[mapping.page + i] : '.';
    }
    return letters;
  };
  for (int step = 0; step < kSteps; ++step) {
    const std::size_t pick = live.empty() ? 0 : random() % live.size();
    switch (random() % 10) {
      case 0:
      case 1:
      case 2:
      case 3: {
        const std::size_t page = random() % kFilePages;
        const std::size_t count = 1 + random() % 4;
        const bool is_shared = random() % 2 == 0;
        const FileMapOptions how = Of(file, page, is_shared ? Sharing::kShared : Sharing::kPrivate,
                                      is_shared ? Protection::kReadWrite : Protection::kRead);
        live.push_back({.range = MustMapFile(*space, count, how), .page = page, .is_shared = is_shared});
        break;
      }
      case 4:
      case 5:
      case 6: {
        if (live.empty()) break;
        ASSERT_TRUE(space->Unmap(live[pick].range).ok());
        live.erase(live.begin() + static_cast<std::ptrdiff_t>(pick));
        break;
      }
      case 7: {  // Write through a shared mapping.
        if (live.empty() || !live[pick].is_shared) break;
        const char letter = static_cast<char>('A' + random() % 26);
        Put(live[pick].range, 0, letter);
        content[live[pick].page] = letter;
        break;
      }
      case 8: {  // Grow or shrink.
        if (live.empty()) break;
        const Result<PageRange> remapped =
            space->Remap(live[pick].range, {1 + random() % 6}, {.may_move = random() % 2 == 0});
        if (!remapped.ok()) {
          ASSERT_EQ(remapped.error(), Error{ErrorCode::kNoRoom}) << "step " << step;
          break;
        }
        live[pick].range = *remapped;
        break;
      }
      case 9: {
        kernel.AdvanceTime(Milliseconds(random() % 900));
        space->Tick();
        break;
      }
    }
    for (const Mapping& mapping : live) {
      ASSERT_EQ(Letters(mapping.range), expected(mapping)) << "seed " << GetParam() << " step " << step;
    }
    if (step % 16 == 0) space->CheckInvariants();
    while (live.size() > 20) {
      ASSERT_TRUE(space->Unmap(live.back().range).ok());
      live.pop_back();
    }
  }
  EXPECT_GT(Hits(*space), 0u);
}

}  // namespace
}  // namespace freehold::vm::test
