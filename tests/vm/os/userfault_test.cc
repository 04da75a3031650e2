// LinuxUserfault against the kernel that runs the test, FakeUserfault, and I/O at offsets.
#include "vm/os/userfault.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/os/syscall_filter.h"
#include "tests/vm/pager_fixture.h"
#include "vm/os/fake_userfault.h"
#include "vm/os/file_io.h"
#include "vm/os/linux_kernel.h"

namespace freehold::vm::os {
namespace {

using namespace test;  // NOLINT: the fixture's words

// Page-aligned bytes, each `value`.
struct alignas(kPageSize) Bytes4 {
  std::byte bytes[4 * kPageSize];
  explicit Bytes4(int value) { std::memset(bytes, value, sizeof(bytes)); }
};

class UserfaultTest : public testing::Test {
 protected:
  void SetUp() override {
    const Result<PageRange> reserved = kernel_.Reserve({16}, {1});
    ASSERT_TRUE(reserved.ok());
    range_ = *reserved;
    ASSERT_TRUE(kernel_.Protect(range_, Protection::kReadWrite).ok());
    const Error error = userfault_.Open();
    if (error.code == ErrorCode::kUnsupported) GTEST_SKIP() << "userfaultfd is not permitted here";
    ASSERT_TRUE(error.ok());
  }
  void TearDown() override { EXPECT_TRUE(kernel_.Release(range_).ok()); }

  LinuxKernel kernel_;
  PageRange range_;
  LinuxUserfault userfault_;
  TrapScope traps_;
};

TEST_F(UserfaultTest, MissingPagesBecomeEvents) {
  ASSERT_TRUE(userfault_.Register(range_, WriteTracking::kOff).ok());
  const Bytes4 content(7);
  std::thread handler([&] {
    FaultEvent event;
    ASSERT_TRUE(userfault_.Wait(event));
    EXPECT_EQ(event.page, PageAt(range_, 2));
    EXPECT_FALSE(event.write);
    EXPECT_FALSE(event.write_protected);
    EXPECT_EQ(*userfault_.Copy(Part(range_, 0, 4), content.bytes, WriteTracking::kOff), Pages{4});
    ASSERT_TRUE(userfault_.Wait(event));
    EXPECT_EQ(event.page, PageAt(range_, 5));
    EXPECT_TRUE(event.write);
    EXPECT_EQ(*userfault_.Copy(Part(range_, 5, 1), content.bytes, WriteTracking::kOff), Pages{1});
  });
  EXPECT_EQ(ReadWord(PageAt(range_, 2)), 0x0707070707070707u);
  WriteWord(PageAt(range_, 5), 1);
  handler.join();
  EXPECT_TRUE(IsFilledWith(Part(range_, 0, 4), 7));
  EXPECT_EQ(ReadWord(PageAt(range_, 5)), 1u);
}

TEST_F(UserfaultTest, CopyStopsAtWhatIsThere) {
  const Bytes4 content(1);
  EXPECT_EQ(userfault_.Copy(Part(range_, 0, 4), content.bytes, WriteTracking::kOff).error(), Error::System(ENOENT));
  ASSERT_TRUE(userfault_.Register(range_, WriteTracking::kOff).ok());
  EXPECT_EQ(*userfault_.Copy(Part(range_, 2, 1), content.bytes, WriteTracking::kOff), Pages{1});
  EXPECT_EQ(*userfault_.Copy(Part(range_, 0, 4), content.bytes, WriteTracking::kOff), Pages{2});
  EXPECT_EQ(userfault_.Copy(Part(range_, 2, 2), content.bytes, WriteTracking::kOff).error(), Error::System(EEXIST));
}

TEST_F(UserfaultTest, WriteProtectedPagesTell) {
  if (!userfault_.abilities().write_protect) GTEST_SKIP() << "no write protection here";
  ASSERT_TRUE(userfault_.Register(range_, WriteTracking::kOn).ok());
  const Bytes4 content(1);
  EXPECT_EQ(*userfault_.Copy(Part(range_, 0, 4), content.bytes, WriteTracking::kOn), Pages{4});
  std::atomic<int> events{0};
  std::thread handler([&] {
    for (FaultEvent event; userfault_.Wait(event);) {
      EXPECT_TRUE(event.write_protected);
      EXPECT_TRUE(event.write);
      events.fetch_add(1);
      EXPECT_TRUE(userfault_.WriteProtect(PageRange::Of(event.page, {1}), false).ok());
    }
  });
  EXPECT_EQ(ReadWord(PageAt(range_, 1)), 0x0101010101010101u);
  EXPECT_EQ(events.load(), 0);
  WriteWord(PageAt(range_, 1), 2);
  WriteWord(PageAt(range_, 1), 3);
  EXPECT_EQ(events.load(), 1);
  ASSERT_TRUE(userfault_.WriteProtect(Part(range_, 0, 4), true).ok());
  WriteWord(PageAt(range_, 1), 4);
  EXPECT_EQ(events.load(), 2);
  userfault_.Stop();
  handler.join();
  ASSERT_TRUE(kernel_.Reset(range_).ok());
  EXPECT_EQ(userfault_.WriteProtect(Part(range_, 0, 4), true), Error::System(ENOENT));
}

void PoisonsAPage(UserfaultAbilities permitted) {
  LinuxKernel kernel;
  LinuxUserfault userfault(permitted);
  ASSERT_TRUE(userfault.Open().ok());
  const PageRange range = *kernel.Reserve({16}, {1});
  ASSERT_TRUE(userfault.Register(range, WriteTracking::kOff).ok());
  ASSERT_TRUE(kernel.Protect(range, Protection::kReadWrite).ok());
  std::thread handler([&] {
    FaultEvent event;
    ASSERT_TRUE(userfault.Wait(event));
    EXPECT_TRUE(userfault.Poison(event.page).ok());
  });
  const TrapScope traps;
  EXPECT_EQ(TryRead(PageAt(range, 3)).signal, SIGBUS);
  handler.join();
  EXPECT_EQ(TryWrite(PageAt(range, 3), 1).signal, SIGBUS);
  const Bytes4 content(9);
  EXPECT_EQ(*userfault.Copy(Part(range, 0, 3), content.bytes, WriteTracking::kOff), Pages{3});
  EXPECT_EQ(*userfault.Copy(Part(range, 4, 4), content.bytes, WriteTracking::kOff), Pages{4});
  EXPECT_TRUE(IsFilledWith(Part(range, 0, 3), 9));
  EXPECT_TRUE(kernel.Release(range).ok());
}

TEST_F(UserfaultTest, PoisonIsSigbus) { PoisonsAPage(LinuxUserfault::kAllAbilities); }
TEST_F(UserfaultTest, PoisonIsSigbusOnOlderKernels) {
  PoisonsAPage({.write_protect = true, .poison = false, .kernel_faults = true});
}

TEST_F(UserfaultTest, PoisonGoesWithTheContent) {
  if (!userfault_.abilities().poison) GTEST_SKIP() << "no poison here";
  ASSERT_TRUE(userfault_.Register(range_, WriteTracking::kOff).ok());
  ASSERT_TRUE(userfault_.Poison(PageAt(range_, 0)).ok());
  EXPECT_EQ(userfault_.Poison(PageAt(range_, 0)), Error::System(EEXIST));
  EXPECT_EQ(TryRead(PageAt(range_, 0)).signal, SIGBUS);
  ASSERT_TRUE(kernel_.Discard({&range_, 1}).ok());
  const Bytes4 content(2);
  EXPECT_EQ(*userfault_.Copy(Part(range_, 0, 1), content.bytes, WriteTracking::kOff), Pages{1});
  EXPECT_TRUE(IsFilledWith(Part(range_, 0, 1), 2));
}

TEST_F(UserfaultTest, WakeLetsThreadsTryAgain) {
  ASSERT_TRUE(userfault_.Register(range_, WriteTracking::kOff).ok());
  test::Access access;
  std::thread reader([&] { access = TryRead(PageAt(range_, 1)); });
  FaultEvent event;
  ASSERT_TRUE(userfault_.Wait(event));
  ASSERT_TRUE(userfault_.Wake(PageRange::Of(event.page, {1})).ok());
  ASSERT_TRUE(userfault_.Wait(event)) << "it faults again";
  ASSERT_TRUE(kernel_.Reset(range_).ok());
  ASSERT_TRUE(userfault_.Wake(range_).ok());
  reader.join();
  EXPECT_EQ(access.signal, SIGSEGV);
}

TEST_F(UserfaultTest, StopEndsEveryWait) {
  std::vector<std::thread> waiters;
  std::atomic<int> ended{0};
  for (int i = 0; i < 4; ++i) {
    waiters.emplace_back([&] {
      FaultEvent event;
      EXPECT_FALSE(userfault_.Wait(event));
      ended.fetch_add(1);
    });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(ended.load(), 0);
  userfault_.Stop();
  for (std::thread& waiter : waiters) waiter.join();
  FaultEvent event;
  EXPECT_FALSE(userfault_.Wait(event)) << "for good";
}

TEST_F(UserfaultTest, RefusesWhatIsNotAnonymousMemory) {
  EXPECT_FALSE(userfault_.Register({PageNumber{1}, PageNumber{2}}, WriteTracking::kOff).ok());
}

TEST(UserfaultOpenTest, AProcessThatMayNot) {
  EXPECT_TRUE(PassesInChild([] {
    RefuseSyscall({.number = SYS_userfaultfd}, EPERM);
    LinuxUserfault userfault({.write_protect = true, .poison = true, .kernel_faults = false});
    CHILD_CHECK(userfault.Open().code == ErrorCode::kUnsupported);
  }));
}

TEST(UserfaultOpenTest, TheDeviceServesWhereTheCallIsRefused) {
  const int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
  if (device < 0) GTEST_SKIP() << "/dev/userfaultfd may not be opened here";
  close(device);
  EXPECT_TRUE(PassesInChild([] {
    RefuseSyscall({.number = SYS_userfaultfd}, EPERM);
    LinuxUserfault userfault;
    CHILD_CHECK(userfault.Open().ok());
    CHILD_CHECK(userfault.abilities().kernel_faults);
  }));
}

TEST(UserfaultOpenTest, SaysWhatElseIsRefused) {
  for (const long number : {static_cast<long>(SYS_eventfd2), static_cast<long>(SYS_memfd_create)}) {
    EXPECT_TRUE(PassesInChild([number] {
      LinuxUserfault before;
      if (!before.Open().ok()) return;
      RefuseSyscall({.number = number}, EMFILE);
      LinuxUserfault userfault({.write_protect = true, .poison = false, .kernel_faults = true});
      CHILD_CHECK(userfault.Open() == Error::System(EMFILE));
    }));
  }
}

// ---- I/O at offsets ----

class FileIoTest : public testing::Test {
 protected:
  FileIoTest() {
    char name[] = "/tmp/freehold_file_io_XXXXXX";
    fd_ = mkstemp(name);
    EXPECT_GE(fd_, 0);
    unlink(name);
  }
  ~FileIoTest() override { close(fd_); }
  int fd_;
};

TEST_F(FileIoTest, ReadsAndWritesAtOffsets) {
  const Bytes4 content(5);
  ASSERT_TRUE(WriteFully(fd_, 100, {content.bytes, 5000}).ok());
  EXPECT_EQ(*FileSize(fd_), 5100u);
  Bytes4 read(1);
  EXPECT_EQ(*ReadFully(fd_, 100, {read.bytes, sizeof(read.bytes)}), 5000u);
  EXPECT_EQ(read.bytes[4999], std::byte{5});
  EXPECT_EQ(read.bytes[5000], std::byte{1});
  EXPECT_EQ(*ReadOnce(fd_, 5100, {read.bytes, 10}), 0u);
  EXPECT_EQ(*ReadOnce(fd_, 0, {read.bytes, 10}), 10u);
  EXPECT_EQ(read.bytes[0], std::byte{0});
}

TEST_F(FileIoTest, SaysWhatTheKernelSays) {
  Bytes4 content(0);
  EXPECT_EQ(ReadOnce(-1, 0, {content.bytes, 1}).error(), Error::System(EBADF));
  EXPECT_EQ(ReadFully(-1, 0, {content.bytes, 1}).error(), Error::System(EBADF));
  EXPECT_EQ(WriteFully(-1, 0, {content.bytes, 1}), Error::System(EBADF));
  EXPECT_EQ(FileSize(-1).error(), Error::System(EBADF));
  EXPECT_EQ(ReopenDirect(-1).error(), Error::System(EBADF));
  const int null = open("/dev/full", O_WRONLY);
  EXPECT_EQ(WriteFully(null, 0, {content.bytes, 1}), Error::System(ENOSPC));
  close(null);
}

TEST_F(FileIoTest, ReadsOwnMemoryWhateverItsProtection) {
  LinuxKernel kernel;
  const PageRange range = *kernel.Reserve({4}, {1});
  ASSERT_TRUE(kernel.Protect(range, Protection::kReadWrite).ok());
  Fill(range, 3);
  Bytes4 into(0);
  EXPECT_TRUE(ReadOwnMemory(range, into.bytes).ok());
  EXPECT_EQ(into.bytes[4 * kPageSize - 1], std::byte{3});
  ASSERT_TRUE(kernel.Protect(range, Protection::kNone).ok());
  std::memset(into.bytes, 0, sizeof(into.bytes));
  EXPECT_TRUE(ReadOwnMemory(range, into.bytes).ok());
  EXPECT_EQ(into.bytes[4 * kPageSize - 1], std::byte{3});
  ASSERT_TRUE(kernel.Release(range).ok());
  EXPECT_FALSE(ReadOwnMemory(range, into.bytes).ok());
}

// ---- The fake ----

TEST(FakeUserfaultTest, ModelsWhatTheKernelDoes) {
  LinuxKernel kernel;
  const PageRange range = *kernel.Reserve({4}, {1});
  ASSERT_TRUE(kernel.Protect(range, Protection::kReadWrite).ok());
  FakeUserfault fake;
  using Status = FakeUserfault::PageStatus;
  ASSERT_TRUE(fake.Open().ok());
  const Bytes4 content(6);
  EXPECT_EQ(fake.Copy(range, content.bytes, WriteTracking::kOff).error(), Error::System(ENOENT));
  ASSERT_TRUE(fake.Register(range, WriteTracking::kOn).ok());
  fake.Raise({.page = PageAt(range, 1)});
  FaultEvent event;
  ASSERT_TRUE(fake.Wait(event));
  EXPECT_EQ(event.page, PageAt(range, 1));
  EXPECT_EQ(*fake.Copy(Part(range, 1, 1), content.bytes, WriteTracking::kOn), Pages{1});
  EXPECT_TRUE(fake.AwaitWoken(event.page));
  EXPECT_EQ(fake.At(event.page), Status::kProtected);
  EXPECT_TRUE(IsFilledWith(Part(range, 1, 1), 6));
  EXPECT_EQ(*fake.Copy(range, content.bytes, WriteTracking::kOff), Pages{1});
  EXPECT_EQ(fake.Copy(Part(range, 0, 2), content.bytes, WriteTracking::kOff).error(), Error::System(EEXIST));
  EXPECT_TRUE(fake.WriteProtect(range, false).ok());
  EXPECT_EQ(fake.At(event.page), Status::kWritable);
  EXPECT_EQ(fake.Poison(event.page), Error::System(EEXIST));
  EXPECT_TRUE(fake.Poison(PageAt(range, 3)).ok());
  EXPECT_EQ(fake.At(PageAt(range, 3)), Status::kPoisoned);
  fake.Drop(range);
  EXPECT_EQ(fake.At(PageAt(range, 3)), Status::kMissing);
  fake.Forget(range);
  EXPECT_EQ(fake.WriteProtect(range, true), Error::System(ENOENT));
  EXPECT_EQ(fake.Poison(range.first), Error::System(ENOENT));
  fake.FailNext(FakeUserfault::Operation::kWake, 1, Error::System(EPERM));
  EXPECT_EQ(fake.Wake(range), Error::System(EPERM));
  EXPECT_TRUE(fake.Wake(range).ok());
  EXPECT_EQ(fake.CallCount(FakeUserfault::Operation::kWake), 2u);
  fake.Stop();
  EXPECT_FALSE(fake.Wait(event));
  EXPECT_TRUE(kernel.Release(range).ok());
}

}  // namespace
}  // namespace freehold::vm::os
