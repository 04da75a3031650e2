// File mappings: LinuxKernel's calls for them.
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <algorithm>
#include <cerrno>

#include "vm/os/check.h"
#include "vm/os/linux_kernel.h"
#include "vm/os/raw_syscall.h"
#include "vm/sync/lock_rank.h"

namespace freehold::vm::os {
namespace {

// Constants that are newer than the C library's headers, or in none.
constexpr int kMremapDontunmap = 4;     // Linux 5.7; of file mappings 5.13
constexpr int kMadvPopulateRead = 22;   // Linux 5.14
constexpr int kMadvPopulateWrite = 23;
constexpr int kGetSeals = 1034;         // F_GET_SEALS
constexpr long kSealSeal = 1;           // F_SEAL_SEAL: no seal can come any more
constexpr int kPathOnly = 010000000;    // O_PATH

constexpr int kMove = MREMAP_MAYMOVE | MREMAP_FIXED;

// File systems of this machine's memory and disks, where an inode number is an inode. Not overlayfs, where a file
// that is written to becomes another one under the same number; nor network, FUSE and virtual ones, which number as
// they like.
constexpr long kPlainFileSystems[] = {
    EXT4_SUPER_MAGIC,  // and ext2, ext3
    TMPFS_MAGIC,       // and memfd_create
    0x58465342,        // XFS
    BTRFS_SUPER_MAGIC, F2FS_SUPER_MAGIC,
};

void CheckRange(const char* operation, PageRange range) {
  sync::CheckNoShortLockHeld(operation);
  FREEHOLD_DCHECK(!range.empty());
}

Error ToError(long result) {
  return SyscallFailed(result) ? Error::System(SyscallErrno(result)) : Error::Ok();
}

// File systems over a network are interrupted by any signal.
template <typename Call>
long RepeatInterrupted(Call call) {
  long result;
  do {
    result = call();
  } while (result == -EINTR);
  return result;
}

long Mmap(void* address, std::size_t size, const FileView& view, int flags) {
  const int sharing = view.sharing == Sharing::kShared ? MAP_SHARED : MAP_PRIVATE;
  return RawSyscall(SYS_mmap, address, size, view.protection, flags | sharing, view.descriptor,
                    view.page << kPageShift);
}

long Mremap(long from, std::size_t size, std::size_t new_size, int flags, void* to) {
  return RawSyscall(SYS_mremap, from, size, new_size, flags, to);
}

void Munmap(long address, std::size_t size) { RawSyscall(SYS_munmap, address, size); }

long AddressOf(PageRange range) { return reinterpret_cast<long>(range.address()); }

}  // namespace

Result<FileInfo> LinuxKernel::IdentifyFile(int descriptor) {
  sync::CheckNoShortLockHeld("os::IdentifyFile");
  struct stat status;
  long result = RepeatInterrupted([&] { return RawSyscall(SYS_fstat, descriptor, &status); });
  if (SyscallFailed(result)) return Error::System(SyscallErrno(result));
  result = RawSyscall(SYS_fcntl, descriptor, F_GETFL);
  if (SyscallFailed(result)) return Error::System(SyscallErrno(result));
  const bool opened = (result & kPathOnly) == 0;
  return FileInfo{.device = status.st_dev,
                  .inode = status.st_ino,
                  .regular = S_ISREG(status.st_mode),
                  .readable = opened && (result & O_ACCMODE) != O_WRONLY,
                  .writable = opened && (result & O_ACCMODE) != O_RDONLY};
}

Result<FileTraits> LinuxKernel::InspectFile(int descriptor) {
  sync::CheckNoShortLockHeld("os::InspectFile");
  struct statfs status;
  const long result = RepeatInterrupted([&] { return RawSyscall(SYS_fstatfs, descriptor, &status); });
  if (SyscallFailed(result)) return Error::System(SyscallErrno(result));
  const long seals = RawSyscall(SYS_fcntl, descriptor, kGetSeals);
  return FileTraits{.lasting_identity = std::count(std::begin(kPlainFileSystems), std::end(kPlainFileSystems),
                                                   static_cast<long>(status.f_type)) != 0,
                    .huge_pages = status.f_type == HUGETLBFS_MAGIC,
                    .sealable = !SyscallFailed(seals) && (seals & kSealSeal) == 0};
}

Error LinuxKernel::MapFile(PageRange range, const FileView& view) {
  CheckRange("os::MapFile", range);
  Count(Call::kMmap);
  const long result = Mmap(range.address(), range.bytes().value, view, MAP_FIXED);
  // Linux may have unmapped what was there first: close the hole before somebody else's mmap falls into it.
  if (SyscallFailed(result)) (void)Reset(range);
  return ToError(result);
}

Error LinuxKernel::ReplaceByFile(PageRange range, const FileView& view) {
  CheckRange("os::ReplaceByFile", range);
  Count(Call::kMmap);
  const std::size_t size = range.bytes().value;
  const long aside = Mmap(nullptr, size, view, 0);
  if (SyscallFailed(aside)) return ToError(aside);
  const long result = Mremap(aside, size, size, kMove, range.address());
  if (SyscallFailed(result)) {
    Munmap(aside, size);
    // MS_ASYNC does nothing but say whether there is a hole now.
    if (SyscallFailed(RawSyscall(SYS_msync, range.address(), size, MS_ASYNC))) (void)Reset(range);
  }
  return ToError(result);
}

// The last page is moved aside, which leaves its place showing the file as before, and is grown there; what it has
// grown by is what is wanted.
//   before   | … |last|  range  |                aside
//   then     | … |last|  range  |               |last|  range's  |
//   after    | … |last|  range's  |             |last|
Error LinuxKernel::ExtendFile(PageRange range) {
  CheckRange("os::ExtendFile", range);
  Count(Call::kMremap);
  const std::size_t size = range.bytes().value;
  const long last = AddressOf(range) - static_cast<long>(kPageSize);
  const long moved = Mremap(last, kPageSize, kPageSize, MREMAP_MAYMOVE | kMremapDontunmap, nullptr);
  if (SyscallFailed(moved)) return ToError(moved);
  const long aside = Mremap(moved, kPageSize, kPageSize + size, MREMAP_MAYMOVE, nullptr);
  if (SyscallFailed(aside)) {
    Munmap(moved, kPageSize);
    return ToError(aside);
  }
  const long result = Mremap(aside + static_cast<long>(kPageSize), size, size, kMove, range.address());
  Munmap(aside, SyscallFailed(result) ? kPageSize + size : kPageSize);
  if (SyscallFailed(result)) (void)Reset(range);
  return ToError(result);
}

Error LinuxKernel::MoveFile(PageRange from, PageRange to) {
  CheckRange("os::MoveFile", from);
  FREEHOLD_DCHECK(from.count() <= to.count() && !from.Overlaps(to));
  if (from.count() == to.count()) return Move(from, to);
  Count(Call::kMremap);
  const std::size_t size = from.bytes().value;
  const long moved = Mremap(AddressOf(from), size, size, MREMAP_MAYMOVE | kMremapDontunmap, nullptr);
  if (moved == -EFAULT) return MoveFilePieces(from, to);
  if (SyscallFailed(moved)) return ToError(moved);
  const long grown = Mremap(moved, size, to.bytes().value, MREMAP_MAYMOVE, nullptr);
  if (SyscallFailed(grown)) {
    (void)Mremap(moved, size, size, kMove, from.address());
    return ToError(grown);
  }
  const long result = Mremap(grown, to.bytes().value, to.bytes().value, kMove, to.address());
  if (SyscallFailed(result)) {
    Munmap(grown + static_cast<long>(size), to.bytes().value - size);
    (void)Mremap(grown, size, size, kMove, from.address());
    (void)Reset(to);
  }
  return ToError(result);
}

// Several kernel VMAs, which Linux moves together only to a place that it is told, and lets not grow. What grows is the
// last page, with what was written to it: aside.
//   from     | … |last|      to   | … |last|        |      aside
//   then     |  file  |           | … |file|        |      |last|  more  |
//   after    |  file  |           | … |last|  more  |
Error LinuxKernel::MoveFilePieces(PageRange from, PageRange to) {
  const PageRange head = PageRange::Of(to.first, from.count());
  if (const Error error = Move(from, head); !error.ok()) return error;
  const std::size_t more = to.bytes().value - head.bytes().value;
  const long last = AddressOf({head.end - Pages{1}, head.end});
  long at = last;
  const long aside = Mremap(last, kPageSize, kPageSize, MREMAP_MAYMOVE | kMremapDontunmap, nullptr);
  if (!SyscallFailed(aside)) at = aside;
  const long grown = SyscallFailed(aside) ? aside : Mremap(aside, kPageSize, kPageSize + more, MREMAP_MAYMOVE, nullptr);
  long result = grown;
  if (!SyscallFailed(grown)) {
    at = grown;
    result = Mremap(grown + static_cast<long>(kPageSize), more, more, kMove, head.end.address());
    if (SyscallFailed(result)) Munmap(grown + static_cast<long>(kPageSize), more);
  }
  if (!SyscallFailed(result)) result = Mremap(grown, kPageSize, kPageSize, kMove, reinterpret_cast<void*>(last));
  if (!SyscallFailed(result)) return Error::Ok();
  // All of it goes back.
  const std::size_t others = from.bytes().value - kPageSize;
  if (others > 0) (void)Mremap(AddressOf(head), others, others, kMove, from.address());
  (void)Mremap(at, kPageSize, kPageSize, kMove, (from.end - Pages{1}).address());
  (void)Reset(to);
  return ToError(result);
}

Error LinuxKernel::Sync(PageRange range, SyncOptions options) {
  CheckRange("os::Sync", range);
  Count(Call::kMsync);
  const int flags = (options.wait ? MS_SYNC : MS_ASYNC) | (options.invalidate ? MS_INVALIDATE : 0);
  return ToError(RepeatInterrupted(
      [&] { return RawSyscall(SYS_msync, range.address(), range.bytes().value, flags); }));
}

Error LinuxKernel::FaultIn(PageRange range, Access access) {
  CheckRange("os::FaultIn", range);
  Count(Call::kMadvise);
  FREEHOLD_DCHECK(range.count().value <= kPagesPerHugePage);
  const int advice = access == Access::kWrite ? kMadvPopulateWrite : kMadvPopulateRead;
  return ToError(RepeatInterrupted(
      [&] { return RawSyscall(SYS_madvise, range.address(), range.bytes().value, advice); }));
}

}  // namespace freehold::vm::os
