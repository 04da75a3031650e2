// The calls for file mappings, on the kernel that runs the test and on FakeKernel's model of it.
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/os/syscall_filter.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"
#include "vm/os/raw_syscall.h"
#include "vm/sync/lock_rank.h"

namespace freehold::vm::os {
namespace {

using Operation = FakeKernel::Operation;

PageRange Part(PageRange range, std::size_t first, std::size_t count) {
  return PageRange::Of(range.first + Pages{first}, Pages{count});
}

// A descriptor that closes with its scope.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) { EXPECT_GE(fd, 0) << std::strerror(errno); }
  ~Descriptor() { close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  const int fd_;
};

// Page p of the file is filled with 'a' + p.
int MakeFile(std::size_t pages, unsigned flags = 0) {
  const int fd = memfd_create("file_calls_test", MFD_CLOEXEC | flags);
  for (std::size_t page = 0; page < pages; ++page) {
    const std::string content(kPageSize, static_cast<char>('a' + page));
    EXPECT_EQ(pwrite(fd, content.data(), kPageSize, static_cast<off_t>(page * kPageSize)),
              static_cast<ssize_t>(kPageSize));
  }
  return fd;
}

char FirstByte(PageRange range, std::size_t page) {
  return static_cast<char>(*(range.first + Pages{page}).address());
}

// What the pages of `range` begin with, a letter each: '.' for one that a system call cannot read.
std::string Letters(PageRange range) {
  std::string letters;
  for (std::size_t page = 0; page < range.count().value; ++page) {
    const timespec none = {0, 0};
    const void* address = (range.first + Pages{page}).address();
    const bool readable =
        RawSyscall(SYS_futex, address, FUTEX_WAIT_PRIVATE, 1, &none, nullptr, 0) != -EFAULT;
    letters += readable ? FirstByte(range, page) : '.';
  }
  return letters;
}

// The number of kernel VMAs in `range`, and whether there is a hole.
std::size_t VmasIn(PageRange range) {
  std::FILE* maps = std::fopen("/proc/self/maps", "r");
  std::size_t count = 0;
  char line[512];
  while (std::fgets(line, sizeof(line), maps) != nullptr) {
    unsigned long first = 0;
    unsigned long end = 0;
    if (std::sscanf(line, "%lx-%lx", &first, &end) != 2) continue;
    count += range.Overlaps({PageNumber{first >> kPageShift}, PageNumber{end >> kPageShift}});
  }
  std::fclose(maps);
  return count;
}

bool IsMappedThroughout(PageRange range) {
  return RawSyscall(SYS_msync, range.address(), range.bytes().value, MS_ASYNC) == 0;
}

// What the calls do is the same through either kernel.
enum class Which { kLinux, kFake };

class FileCallsTest : public ::testing::TestWithParam<Which> {
 protected:
  FileCallsTest() {
    if (GetParam() == Which::kFake) fake_.emplace();
    const Result<PageRange> reserved = kernel().Reserve(Pages{16}, Pages{1});
    EXPECT_TRUE(reserved.ok());
    range_ = *reserved;
  }
  ~FileCallsTest() override { EXPECT_TRUE(kernel().Release(range_).ok()); }

  Kernel& kernel() { return fake_.has_value() ? static_cast<Kernel&>(*fake_) : linux_; }
  PageRange part(std::size_t first, std::size_t count) const { return Part(range_, first, count); }

 private:
  LinuxKernel linux_;
  std::optional<FakeKernel> fake_;

 protected:
  PageRange range_;
};

INSTANTIATE_TEST_SUITE_P(Kernels, FileCallsTest, ::testing::Values(Which::kLinux, Which::kFake),
                         [](const auto& info) {
                           return std::string(info.param == Which::kLinux ? "Linux" : "Fake");
                         });

TEST_P(FileCallsTest, IdentifiesFilesAndHowTheyWereOpened) {
  char path[] = "/tmp/file_calls_test_XXXXXX";
  const Descriptor both(mkstemp(path));
  const Descriptor reading(open(path, O_RDONLY | O_CLOEXEC));
  const Descriptor writing(open(path, O_WRONLY | O_CLOEXEC));
  const Descriptor naming(open(path, O_PATH | O_CLOEXEC));
  const Descriptor other(MakeFile(1));
  const Descriptor device(open("/dev/zero", O_RDWR | O_CLOEXEC));
  unlink(path);

  const FileInfo first = *kernel().IdentifyFile(both.get());
  EXPECT_TRUE(first.regular && first.readable && first.writable);
  for (const auto& [fd, readable, writable] : {std::tuple{reading.get(), true, false},
                                               std::tuple{writing.get(), false, true},
                                               std::tuple{naming.get(), false, false}}) {
    const Result<FileInfo> info = kernel().IdentifyFile(fd);
    ASSERT_TRUE(info.ok());
    EXPECT_EQ(info->device, first.device);
    EXPECT_EQ(info->inode, first.inode);
    EXPECT_EQ(info->readable, readable);
    EXPECT_EQ(info->writable, writable);
  }
  const FileInfo second = *kernel().IdentifyFile(other.get());
  EXPECT_FALSE(second.device == first.device && second.inode == first.inode);
  EXPECT_FALSE(kernel().IdentifyFile(device.get())->regular);
  EXPECT_EQ(kernel().IdentifyFile(-1).error(), Error::System(EBADF));
}

TEST_P(FileCallsTest, InspectsFileSystemsAndSeals) {
  const Descriptor plain(MakeFile(1));
  const FileTraits traits = *kernel().InspectFile(plain.get());
  EXPECT_TRUE(traits.lasting_identity);
  EXPECT_FALSE(traits.huge_pages);
  EXPECT_FALSE(traits.sealable);

  const Descriptor sealable(MakeFile(1, MFD_ALLOW_SEALING));
  EXPECT_TRUE(kernel().InspectFile(sealable.get())->sealable);
  ASSERT_EQ(fcntl(sealable.get(), F_ADD_SEALS, F_SEAL_SEAL), 0);
  EXPECT_FALSE(kernel().InspectFile(sealable.get())->sealable) << "no seal can come any more";

  const Descriptor virtual_file(open("/proc/self/status", O_RDONLY | O_CLOEXEC));
  EXPECT_FALSE(kernel().InspectFile(virtual_file.get())->lasting_identity);
  EXPECT_EQ(kernel().InspectFile(-1).error(), Error::System(EBADF));

  const int huge = memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
  if (huge < 0) GTEST_SKIP() << "no huge pages here: " << std::strerror(errno);
  const Descriptor closes(huge);
  EXPECT_TRUE(kernel().InspectFile(huge)->huge_pages);
  EXPECT_FALSE(kernel().InspectFile(huge)->lasting_identity);
}

TEST_P(FileCallsTest, MapsFromTheGivenPageAndEndsWithTheFile) {
  const Descriptor file(MakeFile(4));
  ASSERT_TRUE(kernel().MapFile(part(2, 5), {.descriptor = file.get(), .page = 1}).ok());
  EXPECT_EQ(Letters(range_), "..bcd...........");
  EXPECT_TRUE(IsMappedThroughout(range_));
}

TEST_P(FileCallsTest, SharedMappingsWriteToTheFileAndPrivateOnesDoNot) {
  const Descriptor file(MakeFile(1));
  const auto map = [&](std::size_t page, Sharing sharing) {
    return kernel().MapFile(part(page, 1), {.descriptor = file.get(),
                                            .protection = Protection::kReadWrite,
                                            .sharing = sharing});
  };
  ASSERT_TRUE(map(0, Sharing::kShared).ok());
  ASSERT_TRUE(map(1, Sharing::kPrivate).ok());
  *part(1, 1).address() = std::byte{'p'};
  char byte = 0;
  ASSERT_EQ(pread(file.get(), &byte, 1, 0), 1);
  EXPECT_EQ(byte, 'a');
  *part(0, 1).address() = std::byte{'s'};
  ASSERT_EQ(pread(file.get(), &byte, 1, 0), 1);
  EXPECT_EQ(byte, 's');
  EXPECT_EQ(Letters(part(0, 2)), "sp");
}

TEST_P(FileCallsTest, MapErrorsComeBackAndLeaveNoHole) {
  char path[] = "/tmp/file_calls_test_XXXXXX";
  const Descriptor both(mkstemp(path));
  const Descriptor reading(open(path, O_RDONLY | O_CLOEXEC));
  const Descriptor writing(open(path, O_WRONLY | O_CLOEXEC));
  const Descriptor folder(open("/tmp", O_RDONLY | O_CLOEXEC));
  unlink(path);
  ASSERT_TRUE(kernel().Protect(range_, Protection::kReadWrite).ok());
  const std::pair<FileView, int> cases[] = {
      {{.descriptor = -1}, EBADF},
      {{.descriptor = writing.get()}, EACCES},
      {{.descriptor = reading.get(), .protection = Protection::kReadWrite, .sharing = Sharing::kShared}, EACCES},
      {{.descriptor = folder.get()}, ENODEV},
      {{.descriptor = reading.get(), .page = (std::uint64_t{1} << 52) - 2}, EOVERFLOW},
  };
  for (const auto& [view, sys_errno] : cases) {
    EXPECT_EQ(kernel().MapFile(part(0, 4), view), Error::System(sys_errno));
    EXPECT_TRUE(IsMappedThroughout(range_));
    *part(8, 1).address() = std::byte{'x'};
    EXPECT_EQ(kernel().ReplaceByFile(part(8, 4), view), Error::System(sys_errno));
    EXPECT_EQ(Letters(part(8, 1)), "x") << "as it was";
    EXPECT_TRUE(IsMappedThroughout(range_));
  }
}

TEST_P(FileCallsTest, ReplacesContentByAFile) {
  const Descriptor file(MakeFile(4));
  ASSERT_TRUE(kernel().Protect(part(0, 4), Protection::kReadWrite).ok());
  std::memset(range_.address(), 'x', 4 * kPageSize);
  ASSERT_TRUE(kernel().ReplaceByFile(part(1, 2), {.descriptor = file.get(), .page = 2}).ok());
  EXPECT_EQ(Letters(part(0, 5)), "xcdx.");
  EXPECT_EQ(VmasIn(range_), 4u);
}

TEST_P(FileCallsTest, ExtendsWhereTheMappingEnds) {
  const Descriptor file(MakeFile(8));
  for (const Sharing sharing : {Sharing::kPrivate, Sharing::kShared}) {
    ASSERT_TRUE(kernel().Reset(range_).ok());
    ASSERT_TRUE(kernel().MapFile(part(1, 3), {.descriptor = file.get(), .page = 1, .sharing = sharing}).ok());
    EXPECT_EQ(Letters(part(0, 5)), ".bcd.");
    ASSERT_TRUE(kernel().ExtendFile(part(4, 3)).ok());
    EXPECT_EQ(Letters(part(0, 8)), ".bcdefg.");
    EXPECT_TRUE(IsMappedThroughout(range_));
    EXPECT_EQ(VmasIn(range_), 3u) << "one of the file";
  }
}

TEST_P(FileCallsTest, ExtendedSharedMappingsShare) {
  const Descriptor file(MakeFile(2));
  ASSERT_TRUE(kernel().MapFile(part(0, 1), {.descriptor = file.get(),
                                            .protection = Protection::kReadWrite,
                                            .sharing = Sharing::kShared}).ok());
  *part(0, 1).address() = std::byte{'1'};
  ASSERT_TRUE(kernel().ExtendFile(part(1, 1)).ok());
  *part(1, 1).address() = std::byte{'2'};
  char byte = 0;
  ASSERT_EQ(pread(file.get(), &byte, 1, kPageSize), 1);
  EXPECT_EQ(byte, '2');
  EXPECT_EQ(Letters(part(0, 2)), "12");
}

TEST_P(FileCallsTest, MovesAndGrowsWithWhatWasWrittenPrivately) {
  const Descriptor file(MakeFile(8));
  for (const std::size_t count : {2u, 4u}) {
    ASSERT_TRUE(kernel().Reset(range_).ok());
    ASSERT_TRUE(kernel().MapFile(part(0, 2), {.descriptor = file.get(), .page = 1,
                                              .protection = Protection::kReadWrite}).ok());
    *part(1, 1).address() = std::byte{'x'};
    ASSERT_TRUE(kernel().MoveFile(part(0, 2), part(8, count)).ok());
    EXPECT_EQ(Letters(part(8, 4)), count == 2 ? "bx.." : "bxde");
    EXPECT_EQ(Letters(part(0, 3)), "bc.") << "the source shows the file";
    EXPECT_TRUE(IsMappedThroughout(range_));
  }
}

// Locks keep kernel VMAs apart that were written to meanwhile, and then never join.
TEST_P(FileCallsTest, MovesAndGrowsSeveralKernelVmas) {
  const Descriptor file(MakeFile(8));
  ASSERT_TRUE(kernel().MapFile(part(0, 4), {.descriptor = file.get(), .protection = Protection::kReadWrite}).ok());
  if (!kernel().LockMemory(part(2, 2)).ok()) GTEST_SKIP() << "memory cannot be locked here";
  *part(0, 1).address() = std::byte{'x'};
  *part(3, 1).address() = std::byte{'y'};
  ASSERT_TRUE(kernel().UnlockMemory(part(2, 2)).ok());
  const Error error = kernel().MoveFile(part(0, 4), part(8, 6));
  if (error == Error::System(EFAULT)) GTEST_SKIP() << "this kernel moves no several VMAs";
  ASSERT_TRUE(error.ok());
  EXPECT_EQ(Letters(part(8, 6)), "xbcyef");
  EXPECT_EQ(Letters(part(0, 4)), "abcd") << "the source shows the file";
  EXPECT_TRUE(IsMappedThroughout(range_));
}

TEST_P(FileCallsTest, SyncStoresAndFindsHoles) {
  char path[] = "/tmp/file_calls_test_XXXXXX";
  const Descriptor file(mkstemp(path));
  unlink(path);
  ASSERT_EQ(ftruncate(file.get(), 2 * kPageSize), 0);
  ASSERT_TRUE(kernel().MapFile(part(0, 2), {.descriptor = file.get(),
                                            .protection = Protection::kReadWrite,
                                            .sharing = Sharing::kShared}).ok());
  *part(1, 1).address() = std::byte{'y'};
  for (const bool wait : {false, true}) {
    for (const bool invalidate : {false, true}) {
      EXPECT_TRUE(kernel().Sync(part(0, 2), {.wait = wait, .invalidate = invalidate}).ok());
    }
  }
  char byte = 0;
  ASSERT_EQ(pread(file.get(), &byte, 1, kPageSize), 1);
  EXPECT_EQ(byte, 'y');
}

TEST_P(FileCallsTest, FaultsInAndReportsTheEndInsteadOfASignal) {
  const Descriptor file(MakeFile(2));
  ASSERT_TRUE(kernel().MapFile(part(0, 4), {.descriptor = file.get(),
                                            .protection = Protection::kReadWrite}).ok());
  EXPECT_TRUE(kernel().FaultIn(part(0, 2), Access::kRead).ok());
  EXPECT_TRUE(kernel().FaultIn(part(0, 2), Access::kWrite).ok());
  EXPECT_EQ(kernel().FaultIn(part(1, 2), Access::kRead), Error::System(EFAULT));
  EXPECT_EQ(kernel().FaultIn(part(2, 2), Access::kWrite), Error::System(EFAULT));
  EXPECT_EQ(Letters(part(0, 4)), "ab..");
}

// ---- Steps that fail halfway ----

// Scripts the results of mremap in a child: `nth` of them fails.
template <typename Perform>
bool WithFailingMremap(std::size_t nth, Perform perform) {
  return PassesInChild([&] {
    std::vector<long> results(nth, kReachKernel);
    results.back() = -ENOMEM;
    ScriptSyscall({.number = SYS_mremap}, results);
    perform();
    CHILD_CHECK(ScriptedCalls() >= nth);
  });
}

TEST(LinuxFileCallsTest, AnExtensionThatFailsLeavesTheMappingAndNoHole) {
  const Descriptor file(MakeFile(4));
  for (const std::size_t nth : {1u, 2u, 3u}) {
    EXPECT_TRUE(WithFailingMremap(nth, [&] {
      LinuxKernel kernel;
      const PageRange range = *kernel.Reserve(Pages{8}, Pages{1});
      CHILD_CHECK(kernel.MapFile(Part(range, 0, 2), {.descriptor = file.get()}).ok());
      CHILD_CHECK(kernel.ExtendFile(Part(range, 2, 2)) == Error::System(ENOMEM));
      CHILD_CHECK(Letters(range) == "ab......");
      CHILD_CHECK(IsMappedThroughout(range));
      CHILD_CHECK(kernel.ExtendFile(Part(range, 2, 2)).ok());
      CHILD_CHECK(Letters(range) == "abcd....");
    })) << nth;
  }
}

TEST(LinuxFileCallsTest, AMoveThatFailsLeavesTheSourceAndNoHole) {
  const Descriptor file(MakeFile(4));
  for (const std::size_t nth : {1u, 2u, 3u}) {
    EXPECT_TRUE(WithFailingMremap(nth, [&] {
      LinuxKernel kernel;
      const PageRange range = *kernel.Reserve(Pages{8}, Pages{1});
      const FileView view = {.descriptor = file.get(), .protection = Protection::kReadWrite};
      CHILD_CHECK(kernel.MapFile(Part(range, 0, 2), view).ok());
      *range.address() = std::byte{'x'};
      CHILD_CHECK(kernel.MoveFile(Part(range, 0, 2), Part(range, 4, 3)) == Error::System(ENOMEM));
      CHILD_CHECK(Letters(range) == "xb......");
      CHILD_CHECK(IsMappedThroughout(range));
    })) << nth;
  }
}

// The first mremap is the attempt as one.
TEST(LinuxFileCallsTest, AMoveOfSeveralVmasThatFailsLeavesTheSourceAndNoHole) {
  const Descriptor file(MakeFile(4));
  for (const std::size_t nth : {2u, 3u, 4u, 5u, 6u}) {
    EXPECT_TRUE(PassesInChild([&] {
      LinuxKernel kernel;
      const PageRange range = *kernel.Reserve(Pages{8}, Pages{1});
      const FileView view = {.descriptor = file.get(), .protection = Protection::kReadWrite};
      CHILD_CHECK(kernel.MapFile(Part(range, 0, 2), view).ok());
      *range.address() = std::byte{'x'};
      *Part(range, 1, 1).address() = std::byte{'y'};
      std::vector<long> results(nth, kReachKernel);
      results.front() = -EFAULT;
      results.back() = -ENOMEM;
      ScriptSyscall({.number = SYS_mremap}, results);
      CHILD_CHECK(kernel.MoveFile(Part(range, 0, 2), Part(range, 4, 3)) == Error::System(ENOMEM));
      CHILD_CHECK(Letters(range) == "xy......");
      CHILD_CHECK(IsMappedThroughout(range));
    })) << nth;
  }
}

TEST(LinuxFileCallsTest, AReplacementThatFailsLeavesWhatWasThere) {
  const Descriptor file(MakeFile(4));
  EXPECT_TRUE(WithFailingMremap(1, [&] {
    LinuxKernel kernel;
    const PageRange range = *kernel.Reserve(Pages{8}, Pages{1});
    CHILD_CHECK(kernel.Protect(range, Protection::kReadWrite).ok());
    *range.address() = std::byte{'x'};
    CHILD_CHECK(kernel.ReplaceByFile(Part(range, 0, 2), {.descriptor = file.get()}) == Error::System(ENOMEM));
    CHILD_CHECK(Letters(Part(range, 0, 1)) == "x");
  }));
}

TEST(LinuxFileCallsTest, QuestionsAndFaultsGoOnAfterInterruption) {
  const Descriptor file(MakeFile(1));
  const long twice[] = {-EINTR, -EINTR};
  EXPECT_TRUE(PassesInChild([&] {
    ScriptSyscall({.number = SYS_fstat}, twice);
    CHILD_CHECK(LinuxKernel().IdentifyFile(file.get()).ok());
    CHILD_CHECK(ScriptedCalls() == 3);
  }));
  EXPECT_TRUE(PassesInChild([&] {
    LinuxKernel kernel;
    const PageRange range = *kernel.Reserve(Pages{1}, Pages{1});
    CHILD_CHECK(kernel.MapFile(range, {.descriptor = file.get()}).ok());
    ScriptSyscall({.number = SYS_msync}, twice);
    CHILD_CHECK(kernel.Sync(range, {}).ok());
    CHILD_CHECK(ScriptedCalls() == 3);
  }));
}

// ---- FakeKernel ----

class FakeFileTest : public ::testing::Test {
 protected:
  FakeFileTest() : file_(MakeFile(8)) {
    const Result<PageRange> reserved = kernel_.Reserve(Pages{16}, Pages{1});
    EXPECT_TRUE(reserved.ok());
    range_ = *reserved;
  }
  PageRange part(std::size_t first, std::size_t count) const { return Part(range_, first, count); }

  FakeKernel kernel_;
  const Descriptor file_;
  PageRange range_;
};

TEST_F(FakeFileTest, ModelsFilePages) {
  ASSERT_TRUE(kernel_.MapFile(part(2, 4), {.descriptor = file_.get(), .protection = Protection::kRead}).ok());
  EXPECT_EQ(kernel_.FilePages(range_), Pages{4});
  EXPECT_EQ(kernel_.At(part(2, 1).first).protection, Protection::kRead);
  EXPECT_EQ(kernel_.KernelVmaCount(), 3u);
  ASSERT_TRUE(kernel_.ExtendFile(part(6, 2)).ok());
  EXPECT_EQ(kernel_.FilePages(range_), Pages{6});
  EXPECT_EQ(kernel_.KernelVmaCount(), 3u) << "the same mapping";
  ASSERT_TRUE(kernel_.ReplaceByFile(part(3, 1), {.descriptor = file_.get()}).ok());
  EXPECT_EQ(kernel_.KernelVmaCount(), 5u);
  ASSERT_TRUE(kernel_.FaultIn(part(2, 2), Access::kRead).ok());
  EXPECT_EQ(kernel_.ResidentPages(range_), Pages{2});
  ASSERT_TRUE(kernel_.MoveFile(part(6, 2), part(10, 3)).ok());
  EXPECT_EQ(kernel_.FilePages(part(10, 4)), Pages{3});
  ASSERT_TRUE(kernel_.Reset(range_).ok());
  EXPECT_EQ(kernel_.FilePages(range_), Pages{0});
  EXPECT_EQ(kernel_.KernelVmaCount(), 1u);
}

TEST_F(FakeFileTest, LogsWhatWasAsked) {
  ASSERT_TRUE(kernel_.MapFile(part(2, 4), {.descriptor = file_.get(), .page = 3}).ok());
  ASSERT_TRUE(kernel_.FaultIn(part(2, 1), Access::kRead).ok());
  ASSERT_TRUE(kernel_.MoveFile(part(2, 4), part(8, 4)).ok());
  const std::vector<FakeKernel::Call> calls = kernel_.Calls();
  ASSERT_EQ(calls.size(), 4u);
  EXPECT_EQ(calls[1].operation, Operation::kMapFile);
  EXPECT_EQ(calls[1].view.page, 3u);
  EXPECT_EQ(calls[2].access, Access::kRead);
  EXPECT_EQ(calls[3].ranges, (std::vector<PageRange>{part(2, 4), part(8, 4)}));
  EXPECT_EQ(ToString(calls[3]).substr(0, 8), "MoveFile");
}

TEST_F(FakeFileTest, FailuresLeaveWhatTheContractSays) {
  const FileView view = {.descriptor = file_.get()};
  ASSERT_TRUE(kernel_.MapFile(part(0, 2), view).ok());
  ASSERT_TRUE(kernel_.Protect(part(8, 2), Protection::kReadWrite).ok());
  *part(8, 1).address() = std::byte{'x'};

  kernel_.FailNth(Operation::kReplaceByFile, 1, ENOMEM);
  EXPECT_EQ(kernel_.ReplaceByFile(part(8, 2), view), Error::System(ENOMEM));
  EXPECT_EQ(Letters(part(8, 1)), "x");

  kernel_.FailNth(Operation::kMapFile, 1, ENOMEM);
  EXPECT_EQ(kernel_.MapFile(part(8, 2), view), Error::System(ENOMEM));
  EXPECT_EQ(kernel_.At(part(8, 1).first), (PageState{.reservation = 1}));

  ASSERT_TRUE(kernel_.Protect(part(2, 2), Protection::kReadWrite).ok());
  kernel_.FailNth(Operation::kExtendFile, 1, ENOMEM);
  EXPECT_EQ(kernel_.ExtendFile(part(2, 2)), Error::System(ENOMEM));
  EXPECT_EQ(kernel_.At(part(2, 1).first), (PageState{.reservation = 1}));
  EXPECT_EQ(Letters(part(0, 3)), "ab.");

  ASSERT_TRUE(kernel_.Protect(part(8, 2), Protection::kReadWrite).ok());
  kernel_.FailNth(Operation::kMoveFile, 1, ENOMEM);
  EXPECT_EQ(kernel_.MoveFile(part(0, 2), part(8, 2)), Error::System(ENOMEM));
  EXPECT_EQ(kernel_.At(part(8, 1).first), (PageState{.reservation = 1}));
  EXPECT_EQ(Letters(part(0, 3)), "ab.");

  const std::pair<Operation, std::function<Error()>> others[] = {
      {Operation::kIdentifyFile, [&] { return kernel_.IdentifyFile(file_.get()).error(); }},
      {Operation::kInspectFile, [&] { return kernel_.InspectFile(file_.get()).error(); }},
      {Operation::kSync, [&] { return kernel_.Sync(part(0, 2), {}); }},
      {Operation::kFaultIn, [&] { return kernel_.FaultIn(part(0, 2), Access::kRead); }},
  };
  for (const auto& [operation, perform] : others) {
    kernel_.FailNth(operation, 1, EIO);
    EXPECT_EQ(perform(), Error::System(EIO)) << ToString(operation);
    EXPECT_TRUE(perform().ok()) << ToString(operation);
  }
  EXPECT_EQ(kernel_.ResidentPages(range_), Pages{2});
}

using FakeFileDeathTest = FakeFileTest;

TEST_F(FakeFileDeathTest, StopsOnMisuse) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  ASSERT_TRUE(kernel_.MapFile(part(0, 2), {.descriptor = file_.get(), .protection = Protection::kReadWrite}).ok());
  ASSERT_TRUE(kernel_.Protect(part(2, 2), Protection::kReadWrite).ok());
  EXPECT_DEATH(kernel_.TouchForWrite(part(0, 1)), "pages of a file");
  EXPECT_DEATH(kernel_.Zero(part(1, 1)), "pages of a file");
  EXPECT_DEATH(kernel_.Copy(part(2, 1), part(0, 1)), "pages of a file");
  EXPECT_DEATH((void)kernel_.ExtendFile(part(4, 1)), "pages of no file");
  EXPECT_DEATH((void)kernel_.MoveFile(part(1, 2), part(8, 2)), "pages of no file");
}

}  // namespace
}  // namespace freehold::vm::os
