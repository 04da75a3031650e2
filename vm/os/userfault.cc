#include "vm/os/userfault.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <cerrno>

#include "vm/os/check.h"
#include "vm/os/raw_syscall.h"
#include "vm/os/thread_id.h"
#include "vm/sync/lock_rank.h"

namespace freehold::vm::os {
namespace {

// Newer than Debian 12's headers.
constexpr int kUserModeOnly = 1;                      // Linux 5.11
constexpr unsigned long kDeviceNew = _IO(0xAA, 0x00);  // /dev/userfaultfd, Linux 6.1
constexpr std::uint64_t kFeaturePoison = 1 << 14;     // Linux 6.6
struct PoisonArgument {
  uffdio_range range;
  std::uint64_t mode;
  std::int64_t updated;
};
constexpr unsigned long kPoison = _IOWR(UFFDIO, 0x08, PoisonArgument);

constexpr int kFlags = O_CLOEXEC | O_NONBLOCK;

long Ioctl(int fd, unsigned long request, void* argument) {
  long result;
  do {
    result = RawSyscall(SYS_ioctl, fd, request, argument);
  } while (result == -EINTR);
  return result;
}

Error ToError(long result) {
  return SyscallFailed(result) ? Error::System(SyscallErrno(result)) : Error::Ok();
}

uffdio_range ToRange(PageRange range) {
  return {.start = reinterpret_cast<std::uintptr_t>(range.address()), .len = range.bytes().value};
}

long Handshake(int fd, std::uint64_t& features) {
  uffdio_api api = {.api = UFFD_API, .features = features, .ioctls = 0};
  const long result = Ioctl(fd, UFFDIO_API, &api);
  features = api.features;
  return result;
}

// Repeats what the kernel refuses because a fork, or another change of the address space, is under way. That is over
// within a system call of another thread, so this is no wait.
template <typename Call>
long WhileBusy(Call call) {
  for (;;) {
    const long result = call();
    if (result != -EAGAIN) return result;
    YieldCpu();
  }
}

}  // namespace

LinuxUserfault::~LinuxUserfault() {
  for (const int fd : {fd_, stop_fd_, empty_fd_}) {
    if (fd >= 0) RawSyscall(SYS_close, fd);
  }
}

long LinuxUserfault::OpenDescriptor(bool& kernel_faults) const {
  kernel_faults = true;
  if (permitted_.kernel_faults) {
    const long fd = RawSyscall(SYS_userfaultfd, kFlags);
    if (!SyscallFailed(fd)) return fd;
    const long device = RawSyscall(SYS_openat, AT_FDCWD, "/dev/userfaultfd", O_RDWR | O_CLOEXEC, 0);
    if (!SyscallFailed(device)) {
      const long from_device = RawSyscall(SYS_ioctl, device, kDeviceNew, kFlags);
      RawSyscall(SYS_close, device);
      if (!SyscallFailed(from_device)) return from_device;
    }
  }
  kernel_faults = false;
  return RawSyscall(SYS_userfaultfd, kFlags | kUserModeOnly);
}

// A descriptor says what there is, once; asked for more than that, it refuses. So the first one asks, and the second
// one is used.
Error LinuxUserfault::Open() {
  sync::CheckNoShortLockHeld("os::Userfault::Open");
  FREEHOLD_CHECK(fd_ < 0);
  bool kernel_faults;
  const long probe = OpenDescriptor(kernel_faults);
  if (SyscallFailed(probe)) return {ErrorCode::kUnsupported};
  std::uint64_t features = 0;
  const long agreed = Handshake(static_cast<int>(probe), features);
  RawSyscall(SYS_close, probe);
  if (SyscallFailed(agreed)) return {ErrorCode::kUnsupported};
  std::uint64_t wanted = 0;
  if (permitted_.write_protect) wanted |= features & UFFD_FEATURE_PAGEFAULT_FLAG_WP;
  if (permitted_.poison) wanted |= features & kFeaturePoison;
  const long fd = OpenDescriptor(kernel_faults);
  if (SyscallFailed(fd)) return ToError(fd);
  fd_ = static_cast<int>(fd);
  abilities_ = {.write_protect = (wanted & UFFD_FEATURE_PAGEFAULT_FLAG_WP) != 0,
                .poison = (wanted & kFeaturePoison) != 0,
                .kernel_faults = kernel_faults};
  if (const long result = Handshake(fd_, wanted); SyscallFailed(result)) return ToError(result);
  const long stop_fd = RawSyscall(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (SyscallFailed(stop_fd)) return ToError(stop_fd);
  stop_fd_ = static_cast<int>(stop_fd);
  if (abilities_.poison) return Error::Ok();
  const long empty_fd = RawSyscall(SYS_memfd_create, "freehold-no-content", MFD_CLOEXEC);
  if (SyscallFailed(empty_fd)) return ToError(empty_fd);
  empty_fd_ = static_cast<int>(empty_fd);
  return Error::Ok();
}

Error LinuxUserfault::Register(PageRange range, WriteTracking tracking) {
  sync::CheckNoShortLockHeld("os::Userfault::Register");
  uffdio_register argument = {
      .range = ToRange(range),
      .mode = UFFDIO_REGISTER_MODE_MISSING |
              (tracking == WriteTracking::kOn ? UFFDIO_REGISTER_MODE_WP : std::uint64_t{0}),
      .ioctls = 0};
  return ToError(Ioctl(fd_, UFFDIO_REGISTER, &argument));
}

bool LinuxUserfault::Wait(FaultEvent& event) {
  sync::CheckNoShortLockHeld("os::Userfault::Wait");
  for (;;) {
    pollfd polled[] = {{.fd = stop_fd_, .events = POLLIN, .revents = 0}, {.fd = fd_, .events = POLLIN, .revents = 0}};
    const long ready = RawSyscall(SYS_ppoll, polled, 2, nullptr, nullptr, 0);
    if (SyscallFailed(ready)) continue;  // EINTR, or short of memory for the moment
    if (polled[0].revents != 0) return false;
    uffd_msg message;
    // EAGAIN: another thread took it, or the faulting thread was woken meanwhile.
    if (RawSyscall(SYS_read, fd_, &message, sizeof(message)) != sizeof(message)) continue;
    if (message.event != UFFD_EVENT_PAGEFAULT) continue;
    event.page = PageNumber{message.arg.pagefault.address >> kPageShift};
    event.write = (message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0;
    event.write_protected = (message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) != 0;
    return true;
  }
}

void LinuxUserfault::Stop() {
  const std::uint64_t one = 1;
  RawSyscall(SYS_write, stop_fd_, &one, sizeof(one));
}

Result<Pages> LinuxUserfault::Copy(PageRange range, const std::byte* from, WriteTracking tracking) {
  sync::CheckNoShortLockHeld("os::Userfault::Copy");
  Pages done;
  while (done < range.count()) {
    const PageRange rest = {range.first + done, range.end};
    uffdio_copy argument = {.dst = reinterpret_cast<std::uintptr_t>(rest.address()),
                            .src = reinterpret_cast<std::uintptr_t>(from + done.bytes().value),
                            .len = rest.bytes().value,
                            .mode = tracking == WriteTracking::kOn ? UFFDIO_COPY_MODE_WP : std::uint64_t{0},
                            .copy = 0};
    const long result = Ioctl(fd_, UFFDIO_COPY, &argument);
    // EAGAIN is also how the kernel says that it stopped on the way.
    if (argument.copy > 0) done += Pages{static_cast<std::size_t>(argument.copy) >> kPageShift};
    if (result == -EAGAIN) {
      if (argument.copy <= 0) YieldCpu();
      continue;
    }
    if (SyscallFailed(result)) {
      if (done.value > 0) return done;
      return ToError(result);
    }
  }
  return done;
}

Error LinuxUserfault::WriteProtect(PageRange range, bool protect) {
  sync::CheckNoShortLockHeld("os::Userfault::WriteProtect");
  uffdio_writeprotect argument = {.range = ToRange(range),
                                  .mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : std::uint64_t{0}};
  return ToError(WhileBusy([&] { return Ioctl(fd_, UFFDIO_WRITEPROTECT, &argument); }));
}

Error LinuxUserfault::Poison(PageNumber page) {
  sync::CheckNoShortLockHeld("os::Userfault::Poison");
  const PageRange range = PageRange::Of(page, {1});
  if (abilities_.poison) {
    PoisonArgument argument = {.range = ToRange(range), .mode = 0, .updated = 0};
    return ToError(WhileBusy([&] { return Ioctl(fd_, kPoison, &argument); }));
  }
  const long mapped = RawSyscall(SYS_mmap, page.address(), kPageSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
                                 empty_fd_, 0);
  if (SyscallFailed(mapped)) return ToError(mapped);
  return Wake(range);
}

Error LinuxUserfault::Wake(PageRange range) {
  sync::CheckNoShortLockHeld("os::Userfault::Wake");
  uffdio_range argument = ToRange(range);
  return ToError(Ioctl(fd_, UFFDIO_WAKE, &argument));
}

}  // namespace freehold::vm::os
