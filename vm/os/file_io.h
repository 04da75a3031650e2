// Reading and writing at offsets, of files and of this process's own memory.
//
// Thread safety: thread-safe.
// Lock order:    as `Kernel`: no short lock is held in any call.
// Errors:        kSystem with the call's errno.
#ifndef FREEHOLD_VM_OS_FILE_IO_H_
#define FREEHOLD_VM_OS_FILE_IO_H_

#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "vm/page_range.h"
#include "vm/result.h"

namespace freehold::vm::os {

// One pread(2), repeated if a signal came first: returns the bytes read, which are fewer than asked for at the end
// of the file and elsewhere too.
Result<std::size_t> ReadOnce(int fd, std::uint64_t offset, absl::Span<std::byte> into);
// Reads until `into` is full or the file ends; returns the bytes read. REQUIRES: not O_DIRECT.
Result<std::size_t> ReadFully(int fd, std::uint64_t offset, absl::Span<std::byte> into);
// Writes all of `from`. On error a part may be written.
Error WriteFully(int fd, std::uint64_t offset, absl::Span<const std::byte> from);
Result<std::uint64_t> FileSize(int fd);
// Opens the file of `fd` once more, for direct I/O, readable and, if `fd` is, writable. EINVAL where its file
// system has none.
Result<int> ReopenDirect(int fd);
void CloseFile(int fd);

// Copies the content of `range`, whatever its protection, to `into`; EFAULT or EIO where a page cannot be had.
// REQUIRES: `into` has room for it.
Error ReadOwnMemory(PageRange range, std::byte* into);

}  // namespace freehold::vm::os

#endif  // FREEHOLD_VM_OS_FILE_IO_H_
