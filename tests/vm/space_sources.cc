#include "tests/vm/space_sources.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace freehold::vm::test {
namespace {

using os::Protection;

[[noreturn]] void Die(const char* what) {
  std::perror(what);
  std::abort();
}

void FillFilePage(int file, std::uint64_t page, std::uint64_t stamp) {
  std::array<std::uint64_t, kWordsPerPage> content;
  content.fill(stamp);
  if (pwrite(file, content.data(), kPageSize, static_cast<off_t>(page * kPageSize)) != kPageSize) Die("pwrite");
}

}  // namespace

// ---- FilePages ----

FilePages::FilePages(Protection max_protection)
    : Backing(max_protection), Source(Kind::kBacking), stamps_(kPages) {
  file_ = memfd_create("model", MFD_CLOEXEC);
  if (file_ < 0 || ftruncate(file_, kPages * kPageSize) != 0) Die("memfd");
  // Every fourth page has content from the start.
  for (std::uint64_t page = 0; page < kPages; page += 4) {
    stamps_[page] = kFileStamp | page;
    FillFilePage(file_, page, stamps_[page]);
  }
}

FilePages::~FilePages() { close(file_); }

Error FilePages::Install(os::Kernel& kernel, PageRange range, std::uint64_t page, Protection protection,
                         bool occupied) {
  const os::FileView view = {
      .descriptor = file_, .page = page, .protection = protection, .sharing = os::Sharing::kShared};
  return occupied ? kernel.ReplaceByFile(range, view) : kernel.MapFile(range, view);
}

Error FilePages::Populate(os::Kernel& kernel, PageRange range, Protection protection) {
  if ((static_cast<unsigned>(protection) & static_cast<unsigned>(Protection::kWrite)) == 0) {
    return {ErrorCode::kUnsupported};
  }
  return kernel.FaultIn(range, os::Access::kWrite);
}

void FilePages::Flush(os::Kernel&, PageRange, std::uint64_t) {}

// ---- StampedFile ----

StampedFile::StampedFile(Place place, Access access)
    : Source(Kind::kFile), access_(access), stamps_(kMaxPages) {
  const char* folder = std::getenv("TEST_TMPDIR");
  std::string name = std::string(folder != nullptr ? folder : "/tmp") + "/model.XXXXXX";
  file_ = place == Place::kMemory ? memfd_create("model", MFD_CLOEXEC) : mkostemp(name.data(), O_CLOEXEC);
  if (file_ < 0) Die("a file for the model");
  mapped_ = open(("/proc/self/fd/" + std::to_string(file_)).c_str(), O_CLOEXEC | (may_write() ? O_RDWR : O_RDONLY));
  if (mapped_ < 0) Die("a second descriptor");
  if (place == Place::kDisk && unlink(name.c_str()) != 0) Die("unlink");
  Resize(kMaxPages / 2);
  // Unlike the pages of other files.
  struct stat status;
  if (fstat(file_, &status) != 0) Die("fstat");
  const std::uint64_t stamp = kFileStamp | (status.st_ino & 0xffffff) << 16;
  for (std::uint64_t page = 0; page < size_; page += 4) Write(page, stamp | page);
}

StampedFile::~StampedFile() {
  close(mapped_);
  close(file_);
}

void StampedFile::Resize(std::uint64_t pages) {
  if (ftruncate(file_, static_cast<off_t>(pages * kPageSize)) != 0) Die("ftruncate");
  for (std::uint64_t page = pages; page < size_; ++page) stamps_[page] = 0;
  size_ = pages;
}

void StampedFile::Write(std::uint64_t page, std::uint64_t stamp) {
  stamps_[page] = stamp;
  FillFilePage(file_, page, stamp);
}

bool StampedFile::Holds(std::uint64_t page, std::uint64_t stamp) const {
  std::array<std::uint64_t, kWordsPerPage> content;
  if (pread(file_, content.data(), kPageSize, static_cast<off_t>(page * kPageSize)) != kPageSize) Die("pread");
  for (std::size_t i = 0; i < kWordsPerPage; i += kWordStep) {
    if (content[i] != stamp) return false;
  }
  return true;
}

// ---- StampedPager ----

StampedPager::StampedPager(std::size_t capacity, std::uint64_t stamp, Users users)
    : Source(Kind::kPager), users_(users), stamps_(capacity) {
  for (std::size_t page = 0; page < capacity; ++page) stamps_[page] = stamp | page;
}

void StampedPager::FailLocked(const char* what, std::uint64_t page, std::size_t count) {
  if (!failure_.empty()) return;
  failure_ = std::string(what) + " of " + std::to_string(count) + " pages of a pager from its page " +
             std::to_string(page) + ", of " + std::to_string(stamps_.size()) + " from " + std::to_string(kFirst);
}

Result<Pages> StampedPager::Read(std::uint64_t page, absl::Span<std::byte> into) {
  const std::size_t count = into.size() / kPageSize;
  const Result<Pages> read = ReadNow(page, count, into);
  // Now and then there is time for others to change what the content is for.
  const bool slow = slow_.fetch_add(1, std::memory_order_relaxed) % 4 == 3;
  if (slow) std::this_thread::sleep_for(std::chrono::microseconds(50));
  return read;
}

Result<Pages> StampedPager::ReadNow(std::uint64_t page, std::size_t count, absl::Span<std::byte> into) {
  const std::lock_guard lock(mutex_);
  if (!IsMine(page, count)) FailLocked("Read", page, count);
  if (released_) FailLocked("Read after the end", page, count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t at = page - kFirst + i;
    if (at >= stamps_.size() || failing_.count(at) != 0) return i == 0 ? Result<Pages>(Error::System(EIO)) : Pages{i};
    std::byte* const words = into.data() + i * kPageSize;
    for (std::size_t word = 0; word < kPageSize; word += sizeof stamps_[at]) {
      std::memcpy(words + word, &stamps_[at], sizeof stamps_[at]);
    }
  }
  return Pages{count};
}

Error StampedPager::Writeback(std::uint64_t page, absl::Span<const std::byte> from) {
  const std::size_t count = from.size() / kPageSize;
  const std::lock_guard lock(mutex_);
  if (!IsMine(page, count)) FailLocked("Writeback", page, count);
  if (released_) FailLocked("Writeback after the end", page, count);
  if (refusing_) return Error::System(ENOSPC);
  for (std::size_t i = 0; i < count && page - kFirst + i < stamps_.size(); ++i) {
    std::uint64_t words[kWordsPerPage];
    std::memcpy(words, from.data() + i * kPageSize, kPageSize);
    for (std::size_t word = 0; word < kWordsPerPage && users_ == Users::kOne; word += kWordStep) {
      if (words[word] != words[0]) FailLocked("Writeback in parts", page + i, 1);
    }
    stamps_[page - kFirst + i] = words[0];
  }
  return Error::Ok();
}

void StampedPager::Release(std::uint64_t page, Pages count) {
  const std::lock_guard lock(mutex_);
  if (users_ == Users::kMany) return;
  if (released_) FailLocked("second Release", page, count.value);
  if (page != kFirst || count.value != stamps_.size()) FailLocked("Release", page, count.value);
  released_ = true;
}

void StampedPager::SetFailing(std::uint64_t page, bool fails) {
  const std::lock_guard lock(mutex_);
  if (fails) {
    failing_.insert(page);
  } else {
    failing_.erase(page);
  }
}

void StampedPager::SetRefusing(bool refuses) {
  const std::lock_guard lock(mutex_);
  refusing_ = refuses;
}

bool StampedPager::refusing() const {
  const std::lock_guard lock(mutex_);
  return refusing_;
}

bool StampedPager::released() const {
  const std::lock_guard lock(mutex_);
  return released_;
}

bool StampedPager::Exists(std::uint64_t page) const {
  const std::lock_guard lock(mutex_);
  return failing_.count(page) == 0;
}

std::uint64_t StampedPager::StampOf(std::uint64_t page) const {
  const std::lock_guard lock(mutex_);
  return stamps_[page];
}

void StampedPager::SetStamp(std::uint64_t page, std::uint64_t stamp) {
  const std::lock_guard lock(mutex_);
  stamps_[page] = stamp;
}

std::string StampedPager::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

// ---- FailingUserfault ----

void FailingUserfault::FailNth(std::size_t nth, int sys_errno) {
  errno_.store(sys_errno, std::memory_order_relaxed);
  remaining_.store(nth, std::memory_order_relaxed);
}

bool FailingUserfault::Strikes() {
  std::size_t remaining = remaining_.load(std::memory_order_relaxed);
  while (remaining > 0 && !remaining_.compare_exchange_weak(remaining, remaining - 1, std::memory_order_relaxed)) {
  }
  if (remaining == 1) failures_.fetch_add(1, std::memory_order_relaxed);
  return remaining == 1;
}

Error FailingUserfault::Register(PageRange range, os::WriteTracking tracking) {
  return Strikes() ? Error::System(errno_.load(std::memory_order_relaxed)) : real_.Register(range, tracking);
}

Error FailingUserfault::WriteProtect(PageRange range, bool protect) {
  if (protect && Strikes()) return Error::System(errno_.load(std::memory_order_relaxed));
  return real_.WriteProtect(range, protect);
}

}  // namespace freehold::vm::test
