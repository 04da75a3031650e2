// Files whose pages can be told apart, for tests of file mappings.
#ifndef FREEHOLD_TESTS_VM_FILE_FIXTURE_H_
#define FREEHOLD_TESTS_VM_FILE_FIXTURE_H_

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "tests/vm/space_fixture.h"
#include "vm/address_space.h"
#include "vm/os/raw_syscall.h"

namespace freehold::vm::test {

// A file in memory; page p of it is full of the letter 'a' + p % 26.
class NumberedFile {
 public:
  explicit NumberedFile(std::size_t pages) : NumberedFile(memfd_create("numbered", MFD_CLOEXEC), pages) {}
  // `descriptor` becomes its own.
  NumberedFile(int descriptor, std::size_t pages) : fd_(descriptor) {
    if (fd_ < 0) throw std::runtime_error("NumberedFile: no file");
    for (std::size_t page = 0; page < pages; ++page) Write(page, static_cast<char>('a' + page % 26));
  }
  ~NumberedFile() {
    if (fd_ >= 0) close(fd_);
  }
  NumberedFile(const NumberedFile&) = delete;
  NumberedFile& operator=(const NumberedFile&) = delete;

  int fd() const { return fd_; }
  void Close() {
    close(fd_);
    fd_ = -1;
  }
  void Write(std::size_t page, char letter) {
    const std::string content(kPageSize, letter);
    if (pwrite(fd_, content.data(), kPageSize, static_cast<off_t>(page * kPageSize)) != kPageSize) {
      throw std::runtime_error("NumberedFile: write");
    }
  }
  char Read(std::size_t page) const {
    char byte = 0;
    if (pread(fd_, &byte, 1, static_cast<off_t>(page * kPageSize)) != 1) throw std::runtime_error("read");
    return byte;
  }
  void Resize(std::size_t pages) {
    if (ftruncate(fd_, static_cast<off_t>(pages * kPageSize)) != 0) throw std::runtime_error("truncate");
  }

 private:
  int fd_;
};

// Options for a mapping of `file` from `page` on.
inline FileMapOptions Of(const NumberedFile& file, std::size_t page = 0,
                         os::Sharing sharing = os::Sharing::kPrivate,
                         os::Protection protection = os::Protection::kRead) {
  return {.descriptor = file.fd(), .offset = Pages{page}.bytes(), .sharing = sharing, .protection = protection};
}
inline FileMapOptions OfAt(const NumberedFile& file, PageNumber at, Placement placement = Placement::kFixed) {
  FileMapOptions options = Of(file);
  options.placement = placement;
  options.address = at.address();
  return options;
}

inline PageRange MustMapFile(AddressSpace& space, std::size_t pages, const FileMapOptions& options) {
  const Result<PageRange> range = space.MapFile({pages}, options);
  if (!range.ok()) {
    throw std::runtime_error(std::string("MapFile: ") + ToString(range.error().code) + " " +
                             std::to_string(range.error().sys_errno));
  }
  return *range;
}

// Whether a system call can read there: false where an access would be a signal.
inline bool CanRead(PageNumber page) {
  const timespec none = {0, 0};
  return os::RawSyscall(SYS_futex, page.address(), FUTEX_WAIT_PRIVATE, 1, &none, nullptr, 0) != -EFAULT;
}

// The first letter of each page of `range`: '.' where it cannot be read, '0' for zeroes.
inline std::string Letters(PageRange range) {
  std::string letters;
  for (PageNumber page = range.first; page < range.end; page = page + Pages{1}) {
    const char first = CanRead(page) ? static_cast<char>(*page.address()) : '.';
    letters += first == 0 ? '0' : first;
  }
  return letters;
}

inline void Put(PageRange range, std::size_t page, char letter) {
  *(range.first + Pages{page}).address() = static_cast<std::byte>(letter);
}

}  // namespace freehold::vm::test

#endif  // FREEHOLD_TESTS_VM_FILE_FIXTURE_H_
