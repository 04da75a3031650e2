#include "vm/os/file_io.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstdio>

#include "vm/os/raw_syscall.h"
#include "vm/sync/lock_rank.h"

namespace freehold::vm::os {
namespace {

template <typename Call>
long WhileInterrupted(Call call) {
  long result;
  do {
    result = call();
  } while (result == -EINTR);
  return result;
}

// Through the file of this process's memory, which does not ask for the protection of a private mapping.
Error ReadThroughProc(PageRange range, std::byte* into) {
  const long fd = RawSyscall(SYS_openat, AT_FDCWD, "/proc/self/mem", O_RDONLY | O_CLOEXEC, 0);
  if (SyscallFailed(fd)) return Error::System(SyscallErrno(fd));
  const Result<std::size_t> read = ReadFully(static_cast<int>(fd), reinterpret_cast<std::uintptr_t>(range.address()),
                                             {into, range.bytes().value});
  CloseFile(static_cast<int>(fd));
  if (!read.ok()) return read.error();
  return *read == range.bytes().value ? Error::Ok() : Error::System(EIO);
}

}  // namespace

Result<std::size_t> ReadOnce(int fd, std::uint64_t offset, absl::Span<std::byte> into) {
  sync::CheckNoShortLockHeld("os::ReadOnce");
  const long result = WhileInterrupted([&] { return RawSyscall(SYS_pread64, fd, into.data(), into.size(), offset); });
  if (SyscallFailed(result)) return Error::System(SyscallErrno(result));
  return static_cast<std::size_t>(result);
}

Result<std::size_t> ReadFully(int fd, std::uint64_t offset, absl::Span<std::byte> into) {
  std::size_t done = 0;
  while (done < into.size()) {
    const Result<std::size_t> read = ReadOnce(fd, offset + done, {into.data() + done, into.size() - done});
    if (!read.ok()) return read.error();
    if (*read == 0) break;
    done += *read;
  }
  return done;
}

Error WriteFully(int fd, std::uint64_t offset, absl::Span<const std::byte> from) {
  sync::CheckNoShortLockHeld("os::WriteFully");
  for (std::size_t done = 0; done < from.size();) {
    const long result = WhileInterrupted(
        [&] { return RawSyscall(SYS_pwrite64, fd, from.data() + done, from.size() - done, offset + done); });
    if (SyscallFailed(result)) return Error::System(SyscallErrno(result));
    if (result == 0) return Error::System(EIO);
    done += static_cast<std::size_t>(result);
  }
  return Error::Ok();
}

Result<std::uint64_t> FileSize(int fd) {
  sync::CheckNoShortLockHeld("os::FileSize");
  struct stat status = {};
  // newfstatat(2) with an empty path: the one that both processors have.
  const long result = RawSyscall(SYS_newfstatat, fd, "", &status, AT_EMPTY_PATH);
  if (SyscallFailed(result)) return Error::System(SyscallErrno(result));
  return static_cast<std::uint64_t>(status.st_size);
}

Result<int> ReopenDirect(int fd) {
  sync::CheckNoShortLockHeld("os::ReopenDirect");
  const long flags = RawSyscall(SYS_fcntl, fd, F_GETFL);
  if (SyscallFailed(flags)) return Error::System(SyscallErrno(flags));
  char path[32];
  std::snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
  const long direct = RawSyscall(SYS_openat, AT_FDCWD, path, (flags & O_ACCMODE) | O_DIRECT | O_CLOEXEC, 0);
  if (SyscallFailed(direct)) return Error::System(SyscallErrno(direct));
  return static_cast<int>(direct);
}

void CloseFile(int fd) { RawSyscall(SYS_close, fd); }

Error ReadOwnMemory(PageRange range, std::byte* into) {
  sync::CheckNoShortLockHeld("os::ReadOwnMemory");
  const iovec local = {into, range.bytes().value};
  const iovec remote = {range.address(), range.bytes().value};
  const long self = RawSyscall(SYS_getpid);
  const long result =
      WhileInterrupted([&] { return RawSyscall(SYS_process_vm_readv, self, &local, 1, &remote, 1, 0); });
  if (result == static_cast<long>(range.bytes().value)) return Error::Ok();
  // The mapping may not be readable, or a filter may refuse the call.
  return ReadThroughProc(range, into);
}

}  // namespace freehold::vm::os
