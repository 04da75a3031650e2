// The pagers that come with Freehold, called directly, and mapped.
#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "tests/vm/pager_fixture.h"
#include "vm/os/linux_kernel.h"
#include "vm/os/userfault.h"
#include "vm/pagers/compressed_pager.h"
#include "vm/pagers/file_pager.h"
#include "vm/pagers/zero_pager.h"

namespace freehold::vm {
namespace {

using namespace test;  // NOLINT: the fixture's words

struct alignas(kPageSize) Buffer {
  std::byte bytes[8 * kPageSize];
  absl::Span<std::byte> pages(std::size_t count) { return {bytes, count * kPageSize}; }
  absl::Span<const std::byte> content(std::size_t count) const { return {bytes, count * kPageSize}; }
  std::byte* page(std::size_t i) { return bytes + i * kPageSize; }
};

bool Is(const std::byte* at, std::size_t size, int value) {
  for (std::size_t i = 0; i < size; ++i) {
    if (at[i] != static_cast<std::byte>(value)) return false;
  }
  return true;
}

// ---- File ----

// A file of two and a half pages: 1s, 2s, 3s.
class FilePagerTest : public testing::TestWithParam<bool> {
 protected:
  static constexpr std::size_t kSize = 2 * kPageSize + kPageSize / 2;

  void SetUp() override {
    char name[] = "/var/tmp/freehold_pager_XXXXXX";
    fd_ = mkstemp(name);
    ASSERT_GE(fd_, 0);
    unlink(name);
    std::vector<char> content(kSize);
    for (std::size_t i = 0; i < kSize; ++i) content[i] = static_cast<char>(1 + i / kPageSize);
    ASSERT_EQ(pwrite(fd_, content.data(), kSize, 0), static_cast<ssize_t>(kSize));
    fsync(fd_);
    pager_ = std::make_unique<FilePager>(fd_);
    if (GetParam() && !pager_->UseDirectIo().ok()) GTEST_SKIP() << "no direct I/O on this file system";
  }
  void TearDown() override {
    pager_.reset();
    close(fd_);
  }

  std::size_t Size() const { return static_cast<std::size_t>(lseek(fd_, 0, SEEK_END)); }

  int fd_ = -1;
  std::unique_ptr<FilePager> pager_;
  Buffer buffer_;
};
INSTANTIATE_TEST_SUITE_P(Io, FilePagerTest, testing::Bool(),
                         [](const auto& info) { return info.param ? "direct" : "buffered"; });

TEST_P(FilePagerTest, ReadsUpToTheEnd) {
  std::size_t at = 0;
  while (at < 3) {
    const Result<Pages> read = pager_->Read(at, buffer_.pages(8));
    ASSERT_TRUE(read.ok());
    for (std::size_t i = 0; i < read->value; ++i, ++at) {
      const std::size_t size = at == 2 ? kPageSize / 2 : kPageSize;
      EXPECT_TRUE(Is(buffer_.page(i), size, static_cast<int>(at) + 1)) << at;
      EXPECT_TRUE(Is(buffer_.page(i) + size, kPageSize - size, 0)) << "zero beyond the end";
    }
  }
  EXPECT_EQ(at, 3u);
  EXPECT_EQ(pager_->Read(3, buffer_.pages(1)).error(), Error::System(ENODATA));
  EXPECT_EQ(pager_->Read(1, buffer_.pages(1)).error(), Error::Ok());
  EXPECT_TRUE(Is(buffer_.page(0), kPageSize, 2));
}

TEST_P(FilePagerTest, WritesBackButNeverGrows) {
  std::memset(buffer_.bytes, 9, sizeof(buffer_.bytes));
  ASSERT_TRUE(pager_->Writeback(1, buffer_.content(4)).ok());
  EXPECT_EQ(Size(), kSize);
  ASSERT_TRUE(pager_->Writeback(5, buffer_.content(1)).ok()) << "what the file has lost is dropped";
  EXPECT_EQ(Size(), kSize);
  std::byte content[kSize];
  ASSERT_EQ(pread(fd_, content, kSize, 0), static_cast<ssize_t>(kSize));
  EXPECT_TRUE(Is(content, kPageSize, 1));
  EXPECT_TRUE(Is(content + kPageSize, kSize - kPageSize, 9));
}

TEST_P(FilePagerTest, Mapped) {
  os::LinuxKernel kernel;
  const TestSpace space(kernel, SmallOptions());
  os::LinuxUserfault userfault;
  const TrapScope traps;
  FaultService service(*space, userfault);
  ASSERT_TRUE(service.Start().ok());
  if (!service.available()) GTEST_SKIP() << "userfaultfd is not permitted here";
  const Result<PageRange> range = service.MapPager(*pager_, 0, {8});
  ASSERT_TRUE(range.ok());
  EXPECT_TRUE(IsFilledWith(Part(*range, 0, 1), 1));
  EXPECT_TRUE(Is(PageAt(*range, 2).address(), kPageSize / 2, 3));
  EXPECT_TRUE(Is(PageAt(*range, 2).address() + kPageSize / 2, kPageSize / 2, 0));
  EXPECT_EQ(TryRead(PageAt(*range, 3)).signal, SIGBUS);
  std::memset(PageAt(*range, 1).address(), 7, 2 * kPageSize);
  ASSERT_TRUE(service.Writeback(*range).ok());
  EXPECT_EQ(Size(), kSize);
  char byte = 0;
  ASSERT_EQ(pread(fd_, &byte, 1, kSize - 1), 1);
  EXPECT_EQ(byte, 7);
  // Truncated: pages in memory stay until they are invalidated.
  ASSERT_EQ(ftruncate(fd_, kPageSize), 0);
  EXPECT_TRUE(Is(PageAt(*range, 1).address(), kPageSize, 7));
  ASSERT_TRUE(service.Invalidate(*range).ok());
  EXPECT_TRUE(IsFilledWith(Part(*range, 0, 1), 1));
  EXPECT_EQ(TryRead(PageAt(*range, 1)).signal, SIGBUS);
  // Grown: tried again once invalidated.
  ASSERT_EQ(ftruncate(fd_, 8 * kPageSize), 0);
  ASSERT_TRUE(service.Invalidate(*range).ok());
  EXPECT_TRUE(IsFilledWith(Part(*range, 1, 7), 0));
}

// The file is shortened while the fault is in the pager: whichever comes first, no wrong content.
TEST_P(FilePagerTest, TruncatedDuringAFault) {
  class Truncating final : public Pager {
   public:
    Truncating(Pager& next, int fd) : next_(next), fd_(fd) {}
    Result<Pages> Read(std::uint64_t page, absl::Span<std::byte> into) override {
      if (!done_.exchange(true) && ftruncate(fd_, 0) != 0) return Error::System(errno);
      return next_.Read(page, into);
    }
    Error Writeback(std::uint64_t page, absl::Span<const std::byte> from) override {
      return next_.Writeback(page, from);
    }

   private:
    Pager& next_;
    const int fd_;
    std::atomic<bool> done_{false};
  };
  os::LinuxKernel kernel;
  const TestSpace space(kernel, SmallOptions());
  os::LinuxUserfault userfault;
  const TrapScope traps;
  Truncating pager(*pager_, fd_);
  FaultService service(*space, userfault);
  ASSERT_TRUE(service.Start().ok());
  if (!service.available()) GTEST_SKIP() << "userfaultfd is not permitted here";
  const Result<PageRange> range = service.MapPager(pager, 0, {2});
  ASSERT_TRUE(range.ok());
  EXPECT_EQ(TryRead(range->first).signal, SIGBUS);
  EXPECT_EQ(TryRead(PageAt(*range, 1)).signal, SIGBUS);
}

TEST(FilePagerErrorTest, SaysWhatTheKernelSays) {
  Buffer buffer;
  FilePager closed(-1);
  EXPECT_EQ(closed.UseDirectIo(), Error::System(EBADF));
  EXPECT_EQ(closed.Read(0, buffer.pages(1)).error(), Error::System(EBADF));
  EXPECT_EQ(closed.Writeback(0, buffer.content(1)), Error::System(EBADF));
}

// ---- Zero ----

TEST(ZeroPagerTest, IsZero) {
  ZeroPager pager;
  Buffer buffer;
  std::memset(buffer.bytes, 1, sizeof(buffer.bytes));
  EXPECT_EQ(*pager.Read(5, buffer.pages(3)), Pages{3});
  EXPECT_TRUE(Is(buffer.bytes, 3 * kPageSize, 0));
  EXPECT_TRUE(Is(buffer.page(3), kPageSize, 1));
  EXPECT_TRUE(pager.Writeback(5, buffer.content(3)).ok());
}

// ---- Compressed ----

TEST(CompressedPagerTest, KeepsWhatIsWritten) {
  CompressedPager pager;
  Buffer buffer;
  std::memset(buffer.bytes, 1, sizeof(buffer.bytes));
  EXPECT_EQ(*pager.Read(100, buffer.pages(2)), Pages{2});
  EXPECT_TRUE(Is(buffer.bytes, 2 * kPageSize, 0)) << "never written";
  // One page that compresses well, one that does not at all, one of zeroes.
  std::memset(buffer.page(0), 0x55, kPageSize);
  std::mt19937_64 random(1);
  for (std::size_t i = 0; i < kPageSize; ++i) buffer.page(1)[i] = static_cast<std::byte>(random());
  std::memset(buffer.page(2), 0, kPageSize);
  const Buffer written = buffer;
  ASSERT_TRUE(pager.Writeback(63, buffer.content(3)).ok()) << "across a stripe";
  EXPECT_EQ(pager.stored_pages(), Pages{2});
  EXPECT_GT(pager.stored().value, kPageSize);
  EXPECT_LT(pager.stored().value, kPageSize + 200);
  std::memset(buffer.bytes, 1, sizeof(buffer.bytes));
  EXPECT_EQ(*pager.Read(63, buffer.pages(3)), Pages{3});
  EXPECT_EQ(std::memcmp(buffer.bytes, written.bytes, 3 * kPageSize), 0);
  std::memset(buffer.bytes, 0, sizeof(buffer.bytes));
  ASSERT_TRUE(pager.Writeback(63, buffer.content(3)).ok());
  EXPECT_EQ(pager.stored().value, 0u) << "zeroes take nothing";
}

TEST(CompressedPagerTest, MappedAndEvicted) {
  os::LinuxKernel kernel;
  const TestSpace space(kernel, SmallOptions());
  os::LinuxUserfault userfault;
  CompressedPager pager;
  FaultService service(*space, userfault);
  ASSERT_TRUE(service.Start().ok());
  if (!service.available()) GTEST_SKIP() << "userfaultfd is not permitted here";
  const Result<PageRange> range = service.MapPager(pager, 0, {1000});
  ASSERT_TRUE(range.ok());
  for (std::size_t page = 0; page < 1000; page += 3) WriteWord(PageAt(*range, page), page + 1);
  ASSERT_TRUE(service.Evict(*range).ok());
  EXPECT_EQ(pager.stored_pages(), Pages{334});
  EXPECT_LT(pager.stored().value, 334 * kPageSize / 10);
  for (std::size_t page = 0; page < 1000; ++page) {
    EXPECT_EQ(ReadWord(PageAt(*range, page)), page % 3 == 0 ? page + 1 : 0);
  }
}

// ---- A user's own: the example of vm/README.md ----

// The page with number n holds n, n + 1, n + 2, ... It is made up when it is touched, and takes no memory before.
class CountingPager final : public Pager {
 public:
  Result<Pages> Read(std::uint64_t page, absl::Span<std::byte> into) override {
    auto* words = reinterpret_cast<std::uint64_t*>(into.data());
    for (std::size_t i = 0; i < into.size() / kPageSize; ++i) {
      std::iota(words + i * 512, words + (i + 1) * 512, page + i);
    }
    return Pages{into.size() / kPageSize};
  }
  Error Writeback(std::uint64_t, absl::Span<const std::byte>) override { return {ErrorCode::kUnsupported}; }
};

TEST(UserPagerTest, ShowsWhatItMakesUp) {
  os::LinuxKernel kernel;
  const TestSpace space(kernel, SmallOptions());
  os::LinuxUserfault userfault;
  CountingPager pager;
  FaultService service(*space, userfault);
  ASSERT_TRUE(service.Start().ok());
  const Result<PageRange> range = service.MapPager(
      pager, 0, {2048},
      {.protection = os::Protection::kRead,
       .max_protection = os::Protection::kRead,
       .when_unavailable = WhenUnavailable::kPopulate});
  ASSERT_TRUE(range.ok());
  const auto* words = reinterpret_cast<const std::uint64_t*>(range->address());
  for (const std::size_t page : {2047u, 0u, 1000u}) {
    EXPECT_EQ(words[page * 512], page);
    EXPECT_EQ(words[page * 512 + 511], page + 511);
  }
}

}  // namespace
}  // namespace freehold::vm
