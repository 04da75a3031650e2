// A file's content, read by pread(2) and written back by pwrite(2): page 0 is the file's first. With direct I/O the
// kernel keeps no copy of its own.
//
// As with mmap(2): the rest of the last page reads as zero and is not written back, and a page beyond the end of the
// file, as it is at the time of the fault, is SIGBUS. The file never grows; what was written to pages that the file has
// lost is dropped.
//
// Thread safety: thread-safe.
// Allocation:    none.
// Errors:        kSystem: pread's and pwrite's; ENODATA for a page beyond the end.
#ifndef FREEHOLD_VM_PAGERS_FILE_PAGER_H_
#define FREEHOLD_VM_PAGERS_FILE_PAGER_H_

#include <cstdint>

#include "absl/types/span.h"
#include "vm/pager.h"
#include "vm/result.h"

namespace freehold::vm {

class FilePager final : public Pager {
 public:
  // `fd` is open for reading, and for writing if anything is to be written back. It stays the caller's, and open as
  // long as the pager is used.
  explicit FilePager(int fd) : fd_(fd) {}
  ~FilePager() override;
  FilePager(const FilePager&) = delete;
  FilePager& operator=(const FilePager&) = delete;

  // From now on whole pages go past the kernel's cache. Errors: kSystem; EINVAL where the file system cannot. REQUIRES:
  // before it is mapped.
  Error UseDirectIo();

  Result<Pages> Read(std::uint64_t page, absl::Span<std::byte> into) override;
  Error Writeback(std::uint64_t page, absl::Span<const std::byte> from) override;

 private:
  Result<Pages> ReadBuffered(std::uint64_t offset, absl::Span<std::byte> into);

  const int fd_;
  int direct_fd_ = -1;
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_PAGERS_FILE_PAGER_H_
