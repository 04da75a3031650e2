// MapFile, and what the other verbs make of file mappings.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/file_fixture.h"
#include "tests/vm/os/syscall_filter.h"
#include "tests/vm/space_fixture.h"
#include "vm/backing.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"

namespace freehold::vm::test {
namespace {

using os::PassesInChild;
using os::Protection;
using os::Sharing;

class FileMappingTest : public PolicyTest {
 protected:
  os::LinuxKernel kernel_;
  TestSpace space_{kernel_, Options()};
};
FREEHOLD_INSTANTIATE_POLICIES(FileMappingTest);

// ---- Content ----

TEST_P(FileMappingTest, ShowsTheFileFromTheOffset) {
  const NumberedFile file(8);
  for (const Sharing sharing : {Sharing::kPrivate, Sharing::kShared}) {
    const PageRange range = MustMapFile(*space_, 4, Of(file, 2, sharing));
    EXPECT_EQ(Letters(range), "cdef");
    const Result<VmaInfo> vma = space_->Lookup(range.first);
    ASSERT_TRUE(vma.ok());
    EXPECT_EQ(vma->range, range);
    EXPECT_EQ(vma->zone, Zone::kMapping);
    EXPECT_EQ(vma->protection, Protection::kRead);
    EXPECT_EQ(vma->backing_page, 2u);
    EXPECT_NE(vma->backing, nullptr);
    ASSERT_TRUE(space_->Unmap(range).ok());
    EXPECT_FALSE(space_->Lookup(range.first).ok());
  }
}

TEST_P(FileMappingTest, SharedMappingsShareAndPrivateOnesCopy) {
  NumberedFile file(2);
  const PageRange shared = MustMapFile(*space_, 2, Of(file, 0, Sharing::kShared, Protection::kReadWrite));
  const PageRange other = MustMapFile(*space_, 2, Of(file, 0, Sharing::kShared));
  const PageRange copy = MustMapFile(*space_, 2, Of(file, 0, Sharing::kPrivate, Protection::kReadWrite));
  Put(copy, 0, 'X');
  EXPECT_EQ(file.Read(0), 'a');
  Put(shared, 1, 'Y');
  EXPECT_EQ(file.Read(1), 'Y');
  EXPECT_EQ(Letters(shared), "aY");
  EXPECT_EQ(Letters(other), "aY");
  EXPECT_EQ(Letters(copy), "XY") << "a page that was not written shows the file";
}

TEST_P(FileMappingTest, TheDescriptorMayBeClosedAndTheFileDeleted) {
  char path[] = "/tmp/file_mapping_test_XXXXXX";
  NumberedFile file(mkstemp(path), 3);
  const PageRange range = MustMapFile(*space_, 3, Of(file));
  ASSERT_EQ(unlink(path), 0);
  file.Close();
  EXPECT_EQ(Letters(range), "abc");
  ASSERT_TRUE(space_->Protect(Part(range, 1, 1), Protection::kNone).ok());
  EXPECT_EQ(Letters(range), "a.c");
}

TEST_P(FileMappingTest, EndsWhereTheFileEndsAndGrowsWithIt) {
  NumberedFile file(2);
  for (const Sharing sharing : {Sharing::kPrivate, Sharing::kShared}) {
    const PageRange range = MustMapFile(*space_, 6, Of(file, 1, sharing));
    EXPECT_EQ(Letters(range), "b.....");
    file.Write(2, 'c');
    EXPECT_EQ(Letters(range), "bc....");
    file.Resize(4);
    EXPECT_EQ(Letters(range), "bc0...");
    file.Resize(2);
    EXPECT_EQ(Letters(range), "b.....") << "truncated";
    ASSERT_TRUE(space_->Unmap(range).ok());
  }
}

TEST_P(FileMappingTest, MapsNothingOfAnEmptyFileAndAllOfAHole) {
  NumberedFile file(0);
  const PageRange range = MustMapFile(*space_, 2, Of(file));
  EXPECT_EQ(Letters(range), "..");
  file.Resize(2);
  EXPECT_EQ(Letters(range), "00");
}

TEST_P(FileMappingTest, TheLastPageIsFilledWithZeroes) {
  NumberedFile file(1);
  ASSERT_EQ(pwrite(file.fd(), "xyz", 3, kPageSize), 3);
  const PageRange range = MustMapFile(*space_, 2, Of(file));
  EXPECT_EQ(Letters(range), "ax");
  const std::byte* last = Part(range, 1, 1).address();
  for (std::size_t i = 3; i < kPageSize; ++i) ASSERT_EQ(last[i], std::byte{0});
}

// A file far larger than memory, mapped at its end.
TEST_P(FileMappingTest, MapsAtOffsetsBeyondFourGigabytes) {
  NumberedFile file(0);
  constexpr std::size_t kFar = std::size_t{5} << (30 - kPageShift);
  file.Write(kFar, 'z');
  const PageRange range = MustMapFile(*space_, 2, Of(file, kFar));
  EXPECT_EQ(Letters(range), "z.");
  EXPECT_EQ(space_->Lookup(Part(range, 1, 1).first)->backing_page, kFar);
}

TEST_P(FileMappingTest, BeyondTheEndIsABusError) {
  const NumberedFile file(1);
  const PageRange range = MustMapFile(*space_, 2, Of(file));
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGBUS, [](int) { _exit(7); });
    signal(SIGSEGV, [](int) { _exit(8); });
    const volatile std::byte* beyond = Part(range, 1, 1).address();
    (void)*beyond;
    _exit(9);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
}

TEST_P(FileMappingTest, DevZeroIsMemory) {
  const NumberedFile zero(open("/dev/zero", O_RDWR | O_CLOEXEC), 0);
  for (const Sharing sharing : {Sharing::kPrivate, Sharing::kShared}) {
    const PageRange range = MustMapFile(*space_, 2, Of(zero, 0, sharing, Protection::kReadWrite));
    EXPECT_EQ(Letters(range), "00");
    Put(range, 1, 'x');
    ASSERT_TRUE(space_->Unmap(range).ok());
    const PageRange again = MustMapFile(*space_, 2, Of(zero, 0, sharing, Protection::kReadWrite));
    EXPECT_EQ(Letters(again), "00") << "never an old one: each mapping of a device is new";
    ASSERT_TRUE(space_->Unmap(again).ok());
  }
  EXPECT_EQ(space_->Stats().windows, 0u);
}

// ---- Placement ----

TEST_P(FileMappingTest, GoesWhereItIsTold) {
  const NumberedFile file(4);
  const PageRange range = MustMapFile(*space_, 2, Of(file));
  const PageNumber free = range.end + Pages{10};
  ASSERT_EQ(MustMapFile(*space_, 2, OfAt(file, free, Placement::kFixed)), PageRange::Of(free, {2}));
  const PageNumber beyond = free + Pages{5};
  ASSERT_EQ(MustMapFile(*space_, 2, OfAt(file, beyond, Placement::kHint)), PageRange::Of(beyond, {2}));
  EXPECT_EQ(Letters(MustMapFile(*space_, 2, OfAt(file, free, Placement::kHint))), "ab") << "elsewhere: it is taken";
  EXPECT_EQ(Letters(PageRange::Of(free, {7})), "ab...ab");
}

//   before   | anonymous xxxxxxxxxx |
//   replace        ^^^^^^
//   after    | x x | a b c | x x    |
TEST_P(FileMappingTest, ReplacesAndIsReplaced) {
  const NumberedFile file(3);
  const PageRange range = MustMap(*space_, 7);
  Fill(range, 'x');
  ASSERT_TRUE(space_->MapFile({3}, OfAt(file, Part(range, 2, 1).first, Placement::kReplace)).ok());
  EXPECT_EQ(Letters(range), "xxabcxx");
  EXPECT_EQ(Draw(*space_, range), "AAbbbAA");
  EXPECT_EQ(space_->MapFile({3}, OfAt(file, Part(range, 3, 1).first)).error(), Error{ErrorCode::kOverlap});
  EXPECT_EQ(Letters(range), "xxabcxx");
  MustMap(*space_, 2, At(Part(range, 3, 1).first, Placement::kReplace));
  EXPECT_EQ(Letters(range), "xxa00xx");
  ASSERT_TRUE(space_->Unmap(range).ok());
  const PageRange again = MustMap(*space_, 7, At(range.first));
  EXPECT_TRUE(IsZero(again)) << "nothing of the file is left";
  Fill(again, 1);
  EXPECT_EQ(file.Read(0), 'a');
}

TEST_P(FileMappingTest, PartsKeepTheirPlaceInTheFile) {
  const NumberedFile file(6);
  const PageRange range = MustMapFile(*space_, 6, Of(file));
  ASSERT_TRUE(space_->Unmap(Part(range, 2, 2)).ok());
  EXPECT_EQ(Letters(range), "ab..ef");
  EXPECT_EQ(space_->Lookup(Part(range, 4, 1).first)->backing_page, 4u);
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(space_->Stats().windows, 0u) << "parts are no windows";
  EXPECT_EQ(space_->Stats().vmas, 0u);
}

// ---- Protection ----

TEST_P(FileMappingTest, NoMoreAccessThanTheDescriptorAllows) {
  char path[] = "/tmp/file_mapping_test_XXXXXX";
  const NumberedFile both(mkstemp(path), 2);
  const NumberedFile reading(open(path, O_RDONLY | O_CLOEXEC), 0);
  const NumberedFile writing(open(path, O_WRONLY | O_CLOEXEC), 0);
  unlink(path);
  EXPECT_EQ(space_->MapFile({1}, Of(writing)).error(), Error{ErrorCode::kDenied});
  EXPECT_EQ(ToErrno(space_->MapFile({1}, Of(writing, 0, Sharing::kShared)).error()), EACCES);
  EXPECT_EQ(space_->MapFile({1}, Of(reading, 0, Sharing::kShared, Protection::kReadWrite)).error(),
            Error{ErrorCode::kDenied});

  const PageRange shared = MustMapFile(*space_, 2, Of(reading, 0, Sharing::kShared));
  EXPECT_EQ(space_->Protect(shared, Protection::kReadWrite), Error{ErrorCode::kDenied});
  EXPECT_EQ(space_->Lookup(shared.first)->protection, Protection::kRead);
  EXPECT_TRUE(space_->Protect(shared, Protection::kNone).ok());
  EXPECT_TRUE(space_->Protect(shared, Protection::kRead).ok());
  EXPECT_EQ(Letters(shared), "ab");

  const PageRange copy = MustMapFile(*space_, 2, Of(reading));
  ASSERT_TRUE(space_->Protect(copy, Protection::kReadWrite).ok()) << "private pages are the process's own";
  Put(copy, 0, 'X');
  EXPECT_EQ(both.Read(0), 'a');

  const PageRange writable = MustMapFile(*space_, 2, Of(both, 0, Sharing::kShared));
  ASSERT_TRUE(space_->Protect(writable, Protection::kReadWrite).ok());
  Put(writable, 1, 'Y');
  EXPECT_EQ(both.Read(1), 'Y');
}

// ---- Errors ----

TEST_P(FileMappingTest, RefusesBadArguments) {
  const NumberedFile file(2);
  EXPECT_EQ(space_->MapFile({0}, Of(file)).error(), Error{ErrorCode::kEmpty});
  FileMapOptions odd = Of(file);
  odd.offset = Bytes{100};
  EXPECT_EQ(space_->MapFile({1}, odd).error(), Error{ErrorCode::kUnaligned});
  FileMapOptions crooked = OfAt(file, space_->reservation().first);
  crooked.address = static_cast<char*>(crooked.address) + 1;
  EXPECT_EQ(space_->MapFile({1}, crooked).error(), Error{ErrorCode::kUnaligned});
  EXPECT_EQ(space_->MapFile({1}, OfAt(file, space_->reservation().end)).error(),
            Error{ErrorCode::kOutsideReservation});
  EXPECT_EQ(space_->MapFile({kSmallRegionPages + 1}, Of(file)).error(), Error{ErrorCode::kNoRoom});
  EXPECT_EQ(space_->MapFile({std::size_t{1} << 60}, Of(file)).error(), Error{ErrorCode::kNoRoom});
  EXPECT_EQ(space_->Stats().vmas, 0u);
}

TEST_P(FileMappingTest, TheKernelsErrorsComeBack) {
  char path[] = "/tmp/file_mapping_test_XXXXXX";
  const NumberedFile file(mkstemp(path), 1);
  const NumberedFile naming(open(path, O_PATH | O_CLOEXEC), 0);
  const NumberedFile folder(open("/tmp", O_RDONLY | O_DIRECTORY | O_CLOEXEC), 0);
  unlink(path);
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  const NumberedFile reading_end(ends[0], 0);
  const NumberedFile writing_end(ends[1], 0);
  const PageRange kept = MustMap(*space_, 4);
  Fill(kept, 'x');

  FileMapOptions closed = Of(file);
  closed.descriptor = 987654;
  FileMapOptions far = Of(file, (std::size_t{1} << 52) - 1);
  const std::pair<FileMapOptions, int> cases[] = {
      {closed, EBADF}, {Of(naming), EBADF}, {Of(folder), ENODEV}, {Of(reading_end), ENODEV}, {far, EOVERFLOW}};
  for (const auto& [options, sys_errno] : cases) {
    EXPECT_EQ(space_->MapFile({4}, options).error(), Error::System(sys_errno));
    FileMapOptions fixed = options;
    fixed.placement = Placement::kReplace;
    fixed.address = kept.address();
    EXPECT_EQ(space_->MapFile({4}, fixed).error(), Error::System(sys_errno));
    EXPECT_EQ(Letters(kept), "xxxx") << "what was to be replaced is as it was";
  }
  EXPECT_EQ(Draw(*space_, kept), "AAAA");
  EXPECT_EQ(space_->Stats().vmas, 1u);
}

TEST_P(FileMappingTest, HugetlbIsRefused) {
  const int fd = memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
  if (fd < 0) GTEST_SKIP() << "no huge pages here";
  const NumberedFile huge(fd, 0);
  EXPECT_EQ(space_->MapFile({kPagesPerHugePage}, Of(huge)).error(), Error{ErrorCode::kUnsupported});
  EXPECT_EQ(space_->Stats().vmas, 0u);
}

// ---- Populate and memory locks ----

std::string Resident(AddressSpace& space, PageRange range) {
  std::vector<std::uint8_t> resident(range.count().value);
  if (!space.Residency(range, absl::MakeSpan(resident)).ok()) return "error";
  std::string drawn;
  for (const std::uint8_t page : resident) drawn += page != 0 ? '1' : '0';
  return drawn;
}

TEST_P(FileMappingTest, PopulateStopsAtTheEndOfTheFile) {
  const NumberedFile file(3);
  for (const Protection protection : {Protection::kRead, Protection::kReadWrite}) {
    for (const Sharing sharing : {Sharing::kPrivate, Sharing::kShared}) {
      FileMapOptions options = Of(file, 0, sharing, protection);
      options.populate = true;
      const PageRange range = MustMapFile(*space_, 5, options);
      EXPECT_EQ(Letters(range), "abc..");
      EXPECT_EQ(space_->Populate(range).error(), Error::System(EFAULT)) << "asked for by itself, it tells";
      EXPECT_TRUE(space_->Populate(Part(range, 0, 3)).ok());
      ASSERT_TRUE(space_->Unmap(range).ok());
    }
  }
}

// Reading a shared page does not dirty it, a private page that may be written is copied at once.
TEST_P(FileMappingTest, PopulateFaultsAsLinuxDoes) {
  const NumberedFile file(1);
  const auto populated = [&](Sharing sharing) {
    FileMapOptions options = Of(file, 0, sharing, Protection::kReadWrite);
    options.populate = true;
    return MustMapFile(*space_, 1, options);
  };
  // Bit 61 of an entry: of a file or shared memory; a copy is anonymous.
  const auto is_of_file = [](PageRange range) {
    std::uint64_t entry = 0;
    const int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    const ssize_t got = pread(fd, &entry, sizeof(entry), static_cast<off_t>(range.first.value * sizeof(entry)));
    close(fd);
    return got == sizeof(entry) && (entry >> 63 & 1) != 0 ? std::optional<bool>((entry >> 61 & 1) != 0) : std::nullopt;
  };
  EXPECT_EQ(is_of_file(populated(Sharing::kShared)), std::optional<bool>(true));
  EXPECT_EQ(is_of_file(populated(Sharing::kPrivate)), std::optional<bool>(false));
}

TEST_P(FileMappingTest, AdviceReachesTheKernel) {
  NumberedFile file(3);
  const PageRange copy = MustMapFile(*space_, 3, Of(file, 0, Sharing::kPrivate, Protection::kReadWrite));
  const PageRange shared = MustMapFile(*space_, 3, Of(file, 0, Sharing::kShared, Protection::kReadWrite));
  Put(copy, 0, 'X');
  Put(shared, 1, 'Y');
  ASSERT_TRUE(space_->Advise(copy, Advice::kDontNeed).ok());
  ASSERT_TRUE(space_->Advise(shared, Advice::kDontNeed).ok());
  EXPECT_EQ(Letters(copy), "aYc") << "the copy is gone";
  EXPECT_EQ(Letters(shared), "aYc");
  Put(copy, 2, 'Z');
  ASSERT_TRUE(space_->Discard({&copy, 1}).ok());
  EXPECT_EQ(Letters(copy), "aYc");
  EXPECT_EQ(space_->Advise(shared, Advice::kFree), Error::System(EINVAL)) << "of anonymous memory only";
  EXPECT_TRUE(space_->Advise(shared, Advice::kCold).ok());
  EXPECT_TRUE(space_->Advise(shared, Advice::kWillNeed).ok());
  EXPECT_EQ(Resident(*space_, shared), "111");
}

bool MayLock(std::size_t pages) {
  rlimit limit = {};
  return getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur >= pages * kPageSize;
}

TEST_P(FileMappingTest, LocksAndUnlocks) {
  if (!MayLock(16)) GTEST_SKIP() << "RLIMIT_MEMLOCK";
  const NumberedFile file(3);
  const PageRange range = MustMapFile(*space_, 4, Of(file, 0, Sharing::kShared));
  ASSERT_TRUE(space_->LockMemory(range).ok());
  EXPECT_EQ(space_->Lookup(range.first)->lock, os::MemoryLock::kLocked);
  EXPECT_EQ(Letters(range), "abc.");
  EXPECT_EQ(space_->Sync(range, {.invalidate = true}), Error::System(EBUSY));
  ASSERT_TRUE(space_->UnlockMemory(range).ok());
  EXPECT_TRUE(space_->Sync(range, {.invalidate = true}).ok());
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(space_->Stats().windows, 0u) << "what was locked is no window";

  FileMapOptions options = Of(file);
  options.lock = os::MemoryLock::kOnFault;
  const PageRange locked = MustMapFile(*space_, 3, options);
  EXPECT_EQ(space_->Lookup(locked.first)->lock, os::MemoryLock::kOnFault);
  ASSERT_TRUE(space_->Unmap(locked).ok());
  EXPECT_EQ(space_->Stats().windows, 0u);
  ASSERT_TRUE(space_->LockAll({.future = true, .lock = os::MemoryLock::kOnFault}).ok());
  const PageRange future = MustMapFile(*space_, 3, Of(file));
  EXPECT_EQ(space_->Lookup(future.first)->lock, os::MemoryLock::kOnFault);
  ASSERT_TRUE(space_->UnlockAll().ok());
}

// ---- Sync ----

TEST_P(FileMappingTest, SyncNeedsAllMappedAndStoresTheRest) {
  NumberedFile file(4);
  const PageRange range = MustMapFile(*space_, 4, Of(file, 0, Sharing::kShared, Protection::kReadWrite));
  const PageRange anonymous = MustMap(*space_, 2);
  for (const bool wait : {false, true}) {
    for (const bool invalidate : {false, true}) {
      EXPECT_TRUE(space_->Sync(range, {.wait = wait, .invalidate = invalidate}).ok());
    }
  }
  EXPECT_TRUE(space_->Sync(anonymous).ok());
  ASSERT_TRUE(space_->Unmap(Part(range, 1, 1)).ok());
  EXPECT_EQ(space_->Sync(range), Error{ErrorCode::kNotMapped});
  EXPECT_EQ(space_->Sync(Part(range, 1, 1)), Error{ErrorCode::kNotMapped});
  EXPECT_EQ(space_->Sync(PageRange{range.first, range.first}), Error{ErrorCode::kEmpty});
  EXPECT_EQ(space_->Sync({range.end, range.first}), Error{ErrorCode::kOverflow});
  EXPECT_EQ(space_->Sync({space_->reservation().end, space_->reservation().end + Pages{1}}),
            Error{ErrorCode::kOutsideReservation});
}

// The parts that the kernel is told about, hole or not.
TEST(FileSyncTest, CallsTheKernelForFilesOnly) {
  os::FakeKernel kernel;
  TestSpace space(kernel);
  const NumberedFile file(4);
  const PageRange range = MustMapFile(*space, 6, Of(file, 0, Sharing::kShared, Protection::kReadWrite));
  MustMap(*space, 1, At(Part(range, 3, 1).first, Placement::kReplace));
  ASSERT_TRUE(space->Unmap(Part(range, 1, 1)).ok());
  kernel.ClearCalls();
  EXPECT_EQ(space->Sync(range), Error{ErrorCode::kNotMapped});
  std::vector<PageRange> synced;
  for (const os::FakeKernel::Call& call : kernel.Calls()) {
    EXPECT_EQ(call.operation, Operation::kSync);
    synced.push_back(call.ranges.at(0));
  }
  EXPECT_EQ(synced, (std::vector<PageRange>{Part(range, 0, 1), Part(range, 2, 1), Part(range, 4, 2)}));
  kernel.FailNth(Operation::kSync, 2, EIO);
  EXPECT_EQ(space->Sync(range), Error::System(EIO));
}

// ---- Remap ----

TEST_P(FileMappingTest, ShrinksAndGrowsInPlace) {
  const NumberedFile file(8);
  for (const Sharing sharing : {Sharing::kPrivate, Sharing::kShared}) {
    const PageRange range = MustMapFile(*space_, 6, Of(file, 1, sharing));
    ASSERT_EQ(*space_->Remap(range, {2}), Part(range, 0, 2));
    EXPECT_EQ(Letters(range), "bc....");
    ASSERT_EQ(*space_->Remap(Part(range, 0, 2), {5}), Part(range, 0, 5));
    EXPECT_EQ(Letters(range), "bcdef.");
    EXPECT_EQ(Draw(*space_, range), "aaaaa.") << "one mapping";
    EXPECT_EQ(space_->Lookup(Part(range, 4, 1).first)->backing_page, 1u);
    ASSERT_EQ(*space_->Remap(Part(range, 0, 5), {9}), PageRange::Of(range.first, {9}));
    EXPECT_EQ(Letters(PageRange::Of(range.first, {9})), "bcdefgh..") << "on beyond the end";
    ASSERT_TRUE(space_->Unmap(PageRange::Of(range.first, {9})).ok());
    EXPECT_EQ(space_->Stats().windows, 0u);
  }
}

TEST_P(FileMappingTest, WhatWasWrittenPrivatelyGrowsByMoving) {
  const NumberedFile file(8);
  const PageRange range = MustMapFile(*space_, 2, Of(file, 1, Sharing::kPrivate, Protection::kReadWrite));
  Put(range, 1, 'X');
  EXPECT_EQ(space_->Remap(range, {4}).error(), Error{ErrorCode::kNoRoom});
  EXPECT_EQ(Letters(range), "bX");
  const std::uint64_t generation = space_->Lookup(range.first)->generation;
  const Result<PageRange> moved = space_->Remap(range, {4}, {.may_move = true});
  ASSERT_TRUE(moved.ok());
  EXPECT_EQ(Letters(*moved), "bXde");
  const VmaInfo vma = *space_->Lookup(moved->first);
  EXPECT_EQ(vma.range, *moved);
  EXPECT_EQ(vma.generation, generation);
  EXPECT_EQ(vma.backing_page, 1u);
  EXPECT_EQ(vma.protection, Protection::kReadWrite);
  EXPECT_EQ(vma.backing->pages(), 4u);
  EXPECT_FALSE(space_->Lookup(range.first).ok());
  Put(*moved, 3, 'Y');
  ASSERT_TRUE(space_->Unmap(*moved).ok());
  EXPECT_EQ(Letters(*moved), "....");
  EXPECT_EQ(space_->Stats().vmas, 0u);
}

TEST_P(FileMappingTest, MovesToAFixedPlaceWholeOrInPart) {
  const NumberedFile file(8);
  const PageRange range = MustMapFile(*space_, 6, Of(file, 1, Sharing::kShared, Protection::kReadWrite));
  const PageRange target = MustMap(*space_, 8);
  Fill(target, 'x');
  RemapOptions options = {.placement = Placement::kReplace, .address = Part(target, 2, 1).address()};
  ASSERT_TRUE(space_->Remap(Part(range, 2, 2), {3}, options).ok());
  EXPECT_EQ(Letters(target), "xxdefxxx") << "one page more of the file than before";
  EXPECT_EQ(Letters(range), "bc..fg");
  EXPECT_EQ(space_->Lookup(Part(target, 2, 1).first)->backing_page, 3u);
  Put(target, 2, 'Y');
  EXPECT_EQ(file.Read(3), 'Y');
  // Smaller than the source, which goes all the same.
  options.address = target.address();
  ASSERT_TRUE(space_->Remap(Part(range, 4, 2), {1}, options).ok());
  EXPECT_EQ(Letters(target), "fxYefxxx");
  EXPECT_EQ(Letters(range), "bc....");
  ASSERT_TRUE(space_->Unmap(target).ok());
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(space_->Stats().vmas, 0u);
}

TEST_P(FileMappingTest, AMoveMayKeepItsSource) {
  const NumberedFile file(4);
  const PageRange range = MustMapFile(*space_, 2, Of(file, 0, Sharing::kPrivate, Protection::kReadWrite));
  Put(range, 0, 'X');
  const Result<PageRange> moved = space_->Remap(range, {2}, {.may_move = true, .keep_source = true});
  ASSERT_TRUE(moved.ok());
  EXPECT_EQ(Letters(*moved), "Xb");
  EXPECT_EQ(Letters(range), "ab") << "the file again";
  EXPECT_EQ(space_->Lookup(range.first)->backing->pages(), 4u);
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(Letters(*moved), "Xb");
}

TEST_P(FileMappingTest, LockedMappingsMoveLocked) {
  if (!MayLock(16)) GTEST_SKIP() << "RLIMIT_MEMLOCK";
  const NumberedFile file(4);
  FileMapOptions locked = Of(file, 0, Sharing::kShared);
  locked.lock = os::MemoryLock::kLocked;
  const PageRange range = MustMapFile(*space_, 2, locked);
  EXPECT_EQ(space_->Remap(range, {3}).error(), Error{ErrorCode::kNoRoom});
  const Result<PageRange> moved = space_->Remap(range, {3}, {.may_move = true});
  ASSERT_TRUE(moved.ok());
  EXPECT_EQ(Letters(*moved), "abc");
  EXPECT_EQ(space_->Lookup(moved->first)->lock, os::MemoryLock::kLocked);
  EXPECT_EQ(space_->Sync(*moved, {.invalidate = true}), Error::System(EBUSY)) << "the kernel has it locked";
  ASSERT_TRUE(space_->UnlockMemory(*moved).ok());
  EXPECT_TRUE(space_->Sync(*moved, {.invalidate = true}).ok());
}

// ---- Failing system calls ----

// Everything that can be seen of a space: what is mapped, with what in it.
std::string Picture(AddressSpace& space) {
  std::string picture;
  for (const VmaInfo& vma : Vmas(space)) {
    picture += std::to_string((vma.range.first - space.reservation().first).value) + "+" +
               std::to_string(vma.range.count().value) + ":" + std::to_string(static_cast<int>(vma.protection)) +
               (vma.lock != os::MemoryLock::kNone ? "L" : "") + "/" + std::to_string(vma.backing_page) + "=" +
               Letters(vma.range) + " ";
  }
  return picture;
}

struct FailureCase {
  const char* name;
  // Runs on a space with a file mapping of 4 pages and an anonymous one, both given.
  std::function<Error(AddressSpace& space, const NumberedFile& file, PageRange mapped, PageRange anonymous)> verb;
};

const FailureCase kFailureCases[] = {
    {"map", [](AddressSpace& space, const NumberedFile& file, PageRange, PageRange) {
       return space.MapFile({3}, Of(file, 1, Sharing::kShared)).error();
     }},
    {"map_window", [](AddressSpace& space, const NumberedFile& file, PageRange, PageRange) {
       return space.MapFile({2}, Of(file, 5)).error();
     }},
    {"map_fixed", [](AddressSpace& space, const NumberedFile& file, PageRange mapped, PageRange) {
       return space.MapFile({3}, OfAt(file, mapped.end + Pages{20})).error();
     }},
    {"replace_memory", [](AddressSpace& space, const NumberedFile& file, PageRange, PageRange anonymous) {
       return space.MapFile({2}, OfAt(file, anonymous.first + Pages{1}, Placement::kReplace)).error();
     }},
    {"replace_file", [](AddressSpace& space, const NumberedFile& file, PageRange mapped, PageRange) {
       return space.MapFile({2}, OfAt(file, mapped.first + Pages{1}, Placement::kReplace)).error();
     }},
    {"protect", [](AddressSpace& space, const NumberedFile&, PageRange mapped, PageRange) {
       return space.Protect(Part(mapped, 1, 2), Protection::kNone);
     }},
    {"unmap_part", [](AddressSpace& space, const NumberedFile&, PageRange mapped, PageRange) {
       return space.Unmap(Part(mapped, 1, 2));
     }},
    {"grow", [](AddressSpace& space, const NumberedFile&, PageRange mapped, PageRange) {
       return space.Remap(mapped, {7}).error();
     }},
    {"move", [](AddressSpace& space, const NumberedFile&, PageRange mapped, PageRange) {
       return space.Remap(Part(mapped, 1, 2), {3}, {.placement = Placement::kFixed,
                                                    .address = (mapped.end + Pages{30}).address()}).error();
     }},
};

class FileFailureTest : public testing::TestWithParam<FailureCase> {};
INSTANTIATE_TEST_SUITE_P(Verbs, FileFailureTest, testing::ValuesIn(kFailureCases),
                         [](const auto& info) { return std::string(info.param.name); });

// Fails the first call, the second, and so on, until the verb gets through.
TEST_P(FileFailureTest, TheSpaceIsAsItWasOrTheVerbIsDone) {
  std::string done;
  for (std::size_t nth = 1; nth < 50; ++nth) {
    os::FakeKernel kernel;
    TestSpace space(kernel);
    const NumberedFile file(8);
    const PageRange mapped = MustMapFile(*space, 4, Of(file, 2, Sharing::kShared, Protection::kReadWrite));
    const PageRange anonymous = MustMap(*space, 4);
    Fill(anonymous, 'x');
    // A window, which verbs may find.
    ASSERT_TRUE(space->Unmap(MustMapFile(*space, 2, Of(file, 5))).ok());
    const std::string before = Picture(*space);

    kernel.FailNthOfAny(nth, ENOMEM);
    const Error error = GetParam().verb(*space, file, mapped, anonymous);
    const std::size_t failed = kernel.InjectedFailures();
    kernel.StopFailing();
    space->CheckInvariants();
    if (error.ok()) {
      const std::string after = Picture(*space);
      EXPECT_NE(after, before);
      if (done.empty()) done = after;
      EXPECT_EQ(after, done) << "call " << nth << " is one that can be done without";
    } else {
      EXPECT_EQ(error, Error::System(ENOMEM)) << "call " << nth;
      EXPECT_EQ(Picture(*space), before) << "call " << nth;
      // The same verb gets through now.
      EXPECT_TRUE(GetParam().verb(*space, file, mapped, anonymous).ok()) << "call " << nth;
    }
    ASSERT_TRUE(space->Unmap(space->reservation()).ok());
    EXPECT_EQ(space->Stats().vmas, 0u);
    (void)space->Purge(PurgeScope::kAll);
    EXPECT_EQ(kernel.FilePages(space->reservation()), Pages{0}) << "call " << nth;
    if (failed == 0) return;
  }
  FAIL() << "it never got through";
}

TEST(FileMappingFailureTest, LocksThatAreRefusedLeaveNothing) {
  os::FakeKernel kernel;
  TestSpace space(kernel);
  const NumberedFile file(4);
  kernel.FailLockBeyond(Pages{2}.bytes());
  FileMapOptions locked = Of(file);
  locked.lock = os::MemoryLock::kOnFault;
  EXPECT_EQ(space->MapFile({3}, locked).error(), Error::System(ENOMEM));
  EXPECT_EQ(space->Stats().vmas, 0u);
  EXPECT_EQ(kernel.FilePages(space->reservation()), Pages{0});
  const PageRange range = MustMapFile(*space, 2, locked);
  EXPECT_EQ(kernel.LockedPages(), Pages{2});
  // Unlocked, moved, and locked again: the target is more than the limit allows.
  EXPECT_EQ(space->Remap(range, {3}, {.may_move = true}).error(), Error::System(ENOMEM));
  EXPECT_EQ(Letters(range), "ab");
  EXPECT_EQ(space->Lookup(range.first)->lock, os::MemoryLock::kOnFault);
  EXPECT_EQ(kernel.LockedPages(), Pages{2});
  EXPECT_EQ(space->Stats().vmas, 1u);
}

// The arena is exhausted: nothing is half done, and nothing is lost.
TEST(FileMappingFailureTest, WithoutMetadata) {
  os::FakeKernel kernel;
  TestSpace space(kernel);
  const NumberedFile file(4);
  std::vector<PageRange> ranges;
  kernel.FailAlways(Operation::kProtect, ENOMEM);  // the arena grows by it
  Result<PageRange> range = ErrorCode::kEmpty;
  for (int i = 0; i < 200'000; ++i) {
    range = space->MapFile({1}, Of(file));
    if (!range.ok()) break;
    ranges.push_back(*range);
  }
  EXPECT_EQ(range.error(), Error{ErrorCode::kNoMetadata});
  EXPECT_EQ(space->Stats().vmas, ranges.size());
  for (const PageRange mapped : ranges) ASSERT_TRUE(space->Unmap(mapped).ok());
  EXPECT_TRUE(space->MapFile({1}, Of(file)).ok());
}

}  // namespace
}  // namespace freehold::vm::test
