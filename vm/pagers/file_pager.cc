#include "vm/pagers/file_pager.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "vm/os/file_io.h"

namespace freehold::vm {

FilePager::~FilePager() {
  if (direct_fd_ >= 0) os::CloseFile(direct_fd_);
}

Error FilePager::UseDirectIo() {
  const Result<int> fd = os::ReopenDirect(fd_);
  if (!fd.ok()) return fd.error();
  direct_fd_ = *fd;
  return Error::Ok();
}

Result<Pages> FilePager::Read(std::uint64_t page, absl::Span<std::byte> into) {
  const std::uint64_t offset = page * kPageSize;
  if (direct_fd_ < 0) return ReadBuffered(offset, into);
  const Result<std::size_t> read = os::ReadOnce(direct_fd_, offset, into);
  if (!read.ok()) return read.error();
  const Pages whole = {*read / kPageSize};
  if (whole.value > 0) return whole;
  // The file's last page, most likely; direct I/O cannot go on from within a page.
  return ReadBuffered(offset, {into.data(), kPageSize});
}

Result<Pages> FilePager::ReadBuffered(std::uint64_t offset, absl::Span<std::byte> into) {
  const Result<std::size_t> read = os::ReadFully(fd_, offset, into);
  if (!read.ok()) return read.error();
  if (*read == 0) return Error::System(ENODATA);
  const Pages pages = PagesFor({*read});
  std::memset(into.data() + *read, 0, pages.bytes().value - *read);
  return pages;
}

Error FilePager::Writeback(std::uint64_t page, absl::Span<const std::byte> from) {
  const std::uint64_t offset = page * kPageSize;
  const Result<std::uint64_t> size = os::FileSize(fd_);
  if (!size.ok()) return size.error();
  if (offset >= *size) return Error::Ok();
  const std::size_t bytes = std::min<std::uint64_t>(from.size(), *size - offset);
  const std::size_t whole = direct_fd_ < 0 ? 0 : bytes / kPageSize * kPageSize;
  if (whole > 0) {
    if (const Error error = os::WriteFully(direct_fd_, offset, {from.data(), whole}); !error.ok()) return error;
  }
  return os::WriteFully(fd_, offset + whole, {from.data() + whole, bytes - whole});
}

}  // namespace freehold::vm
