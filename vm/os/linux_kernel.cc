#include "vm/os/linux_kernel.h"

#include <fcntl.h>
#include <linux/membarrier.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>

#include "vm/os/check.h"
#include "vm/os/raw_syscall.h"
#include "vm/os/thread_id.h"
#include "vm/sync/lock_rank.h"

// Where glibc 2.35 and later registered each thread's rseq area, relative to the thread pointer.
// Weak: an older or another libc has neither.
extern "C" {
extern const std::ptrdiff_t __rseq_offset __attribute__((weak));
extern const unsigned int __rseq_size __attribute__((weak));
}

namespace freehold::vm::os {
namespace {

// Constants that are newer than the C library's headers.
constexpr int kMadvDontneedLocked = 24;  // Linux 5.18
constexpr int kMadvGuardInstall = 102;   // Linux 6.13
constexpr int kMadvGuardRemove = 103;
constexpr long kSysProcessMadvise = 440;
// "This thread's process", without a descriptor (Linux 6.14). Not PIDFD_SELF_THREAD_GROUP, -10001:
// that one names the main thread, and fails with ESRCH once main has left through pthread_exit.
constexpr int kPidfdSelfThread = -10000;

static_assert(static_cast<int>(Protection::kRead) == PROT_READ);
static_assert(static_cast<int>(Protection::kWrite) == PROT_WRITE);
static_assert(static_cast<int>(Protection::kExec) == PROT_EXEC);

Error ToError(long result) {
  return SyscallFailed(result) ? Error::System(SyscallErrno(result)) : Error::Ok();
}

// Whether the answer means that this process may not or cannot make the call at all, whatever the
// range.
bool IsRefusal(long result) {
  switch (SyscallErrno(result)) {
    case EPERM:
    case EACCES:
    case ENOSYS:
    case EBADF:  // a kernel that does not know kPidfdSelfThread
    case ESRCH:
      return true;
  }
  return false;
}

// Repeats a call until it is neither interrupted nor refused for the moment. Linux says EAGAIN also
// where memory for splitting a VMA is short, which may last: hence a bound.
template <typename Call>
long Repeat(Call call) {
  constexpr int kMaxAgain = 8;
  for (int again = 0;;) {
    const long result = call();
    if (!SyscallFailed(result)) return result;
    if (SyscallErrno(result) == EINTR) continue;
    if (SyscallErrno(result) != EAGAIN || ++again > kMaxAgain) return result;
    YieldCpu();
  }
}

long Mmap(void* address, std::size_t size, int protection, int flags) {
  return RawSyscall(SYS_mmap, address, size, protection, flags | MAP_PRIVATE | MAP_ANONYMOUS, -1,
                    0);
}

long Munmap(void* address, std::size_t size) { return RawSyscall(SYS_munmap, address, size); }

long Madvise(void* address, std::size_t size, int advice) {
  return Repeat([=] { return RawSyscall(SYS_madvise, address, size, advice); });
}

long Madvise(PageRange range, int advice) {
  return Madvise(range.address(), range.bytes().value, advice);
}

long ProcessMadvise(const iovec* stretches, std::size_t count, int advice) {
  return Repeat([=] {
    return RawSyscall(kSysProcessMadvise, kPidfdSelfThread, stretches, count, advice, 0);
  });
}

// A few writable pages to try features on.
class Scratch {
 public:
  static constexpr std::size_t kBytes = 4 * kPageSize;

  Scratch() : mapped_(Mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, 0)) {}
  ~Scratch() {
    if (ok()) Munmap(page(0), kBytes);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool ok() const { return !SyscallFailed(mapped_); }
  volatile char* at(std::size_t page) const {
    return reinterpret_cast<volatile char*>(mapped_) + page * kPageSize;
  }
  void* page(std::size_t page) const { return const_cast<char*>(at(page)); }

 private:
  long mapped_;
};

// Emulators accept advice that they do not know, so success is not enough: the page must trap. A
// system call that stores into it finds out without a signal.
bool TryGuardRegions() {
  const Scratch scratch;
  if (!scratch.ok()) return false;
  if (SyscallFailed(Madvise(scratch.page(0), kPageSize, kMadvGuardInstall))) return false;
  if (RawSyscall(SYS_clock_gettime, CLOCK_MONOTONIC, scratch.page(0)) != -EFAULT) return false;
  if (SyscallFailed(Madvise(scratch.page(0), kPageSize, kMadvGuardRemove))) return false;
  return RawSyscall(SYS_clock_gettime, CLOCK_MONOTONIC, scratch.page(0)) == 0;
}

bool TryVectoredDiscard() {
  const Scratch scratch;
  if (!scratch.ok()) return false;
  for (std::size_t i = 0; i < 3; ++i) *scratch.at(i) = 1;
  const iovec stretches[] = {{scratch.page(0), kPageSize}, {scratch.page(2), kPageSize}};
  const long done = ProcessMadvise(stretches, 2, MADV_DONTNEED);
  return done == 2 * kPageSize && *scratch.at(0) == 0 && *scratch.at(1) == 1 && *scratch.at(2) == 0;
}

bool TryUserfaultfd() {
  constexpr int kUserModeOnly = 1;  // what an unprivileged process may have (Linux 5.11)
  const long fd = RawSyscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | kUserModeOnly);
  if (SyscallFailed(fd)) return false;
  uffdio_api api = {};
  api.api = UFFD_API;
  const long agreed = RawSyscall(SYS_ioctl, fd, UFFDIO_API, &api);
  RawSyscall(SYS_close, fd);
  return !SyscallFailed(agreed);
}

// Reads a small file of /sys into `text`, which ends in a NUL. An unreadable file reads as "".
template <std::size_t kSize>
void ReadSmallFile(const char* path, char (&text)[kSize]) {
  std::size_t size = 0;
  const long fd = RawSyscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
  if (!SyscallFailed(fd)) {
    const long got = Repeat([&] { return RawSyscall(SYS_read, fd, text, kSize - 1); });
    if (!SyscallFailed(got)) size = static_cast<std::size_t>(got);
    RawSyscall(SYS_close, fd);
  }
  text[size] = '\0';
}

// The advice is accepted also where the administrator has switched huge pages off, so ask for that
// too.
bool TryHugePages() {
  const Scratch scratch;
  if (!scratch.ok()) return false;
  if (SyscallFailed(Madvise(scratch.page(0), Scratch::kBytes, MADV_HUGEPAGE))) return false;
  if (RawSyscall(SYS_prctl, PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1) return false;
  char enabled[64];
  ReadSmallFile("/sys/kernel/mm/transparent_hugepage/enabled", enabled);
  return std::strstr(enabled, "[never]") == nullptr;
}

bool TryMembarrier() {
  const long commands = RawSyscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0);
  return !SyscallFailed(commands) && (commands & MEMBARRIER_CMD_PRIVATE_EXPEDITED) != 0;
}

// The largest number in a list such as "0-3,8-11", plus one; 0 for "".
unsigned EndOfCpuList(const char* list) {
  unsigned end = 0;
  unsigned number = 0;
  for (const char* p = list;; ++p) {
    if ('0' <= *p && *p <= '9') {
      number = number * 10 + static_cast<unsigned>(*p - '0');
      end = std::max(end, number + 1);
    } else {
      number = 0;
      if (*p == '\0') return end;
    }
  }
}

// The largest CPU that this thread may run on, plus one; 0 where the kernel does not say.
unsigned EndOfAffinity() {
  unsigned long mask[8192 / (8 * sizeof(unsigned long))];
  const long bytes = RawSyscall(SYS_sched_getaffinity, 0, sizeof(mask), mask);
  if (SyscallFailed(bytes)) return 0;
  constexpr unsigned kBits = std::numeric_limits<unsigned long>::digits;
  for (std::size_t word = static_cast<std::size_t>(bytes) / sizeof(mask[0]); word-- > 0;) {
    if (mask[word] == 0) continue;
    return static_cast<unsigned>(word * kBits + kBits -
                                 static_cast<unsigned>(__builtin_clzl(mask[word])));
  }
  return 0;
}

Error DiscardOne(void* address, std::size_t size) {
  long result = Madvise(address, size, MADV_DONTNEED);
  // Memory of a program that called mlockall: it wants its pages in memory, not the ones that it
  // gave back.
  if (result == -EINVAL) result = Madvise(address, size, kMadvDontneedLocked);
  return ToError(result);
}

// Reads, and writes back unchanged, the byte at `address` in one atomic step. Assembly, since
// compilers turn an atomic "or 0" into a load, and sanitizers would see a race with the program's
// own accesses.
inline void TouchByte(std::byte* address) {
#if defined(__x86_64__)
  asm volatile("lock orb $0, (%0)" : : "r"(address) : "memory", "cc");
#elif defined(__aarch64__)
  unsigned value, failed;
  asm volatile(
      "1: ldxrb %w0, [%2]\n"
      "   stxrb %w1, %w0, [%2]\n"
      "   cbnz %w1, 1b\n"
      : "=&r"(value), "=&r"(failed)
      : "r"(address)
      : "memory");
#endif
}

// Copies a page unless all of it is zero. Assembly for the reason that Zero has.
inline void CopyUnlessZero(const std::byte* from, std::byte* to) {
#if defined(__x86_64__)
  const void* at = from;
  std::size_t words = kPageSize / sizeof(std::uint64_t);
  bool zero;
  asm volatile("repe scasq" : "+D"(at), "+c"(words), "=@ccz"(zero) : "a"(0) : "memory");
  if (zero) return;
  words = kPageSize / sizeof(std::uint64_t);
  asm volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
#else
  static constexpr std::byte kZeroes[kPageSize] = {};
  if (std::memcmp(from, kZeroes, kPageSize) != 0) std::memcpy(to, from, kPageSize);
#endif
}

void CheckRange(const char* operation, PageRange range) {
  sync::CheckNoShortLockHeld(operation);
  FREEHOLD_DCHECK(!range.empty());
}

#if defined(__x86_64__)

// Ranges of these sizes are zeroed four lines at a time, where those hold anything else. They lie in the outer caches,
// if anywhere: reading lines that need no zeroes costs a third of writing them, and they stay clean. Where all need
// them it costs the same.
constexpr Bytes kClearFrom = KiB(32);
constexpr Bytes kClearUpTo = MiB(2);

template <std::size_t width>
using Vector [[gnu::vector_size(width), gnu::may_alias]] = long long;

constexpr std::size_t kBlock = 4 * kCacheLineSize;

// No sanitizer takes these for an access by the program to memory that it has not been given yet.
__attribute__((target("avx2"), no_sanitize("address", "thread", "undefined")))
void ClearNonZero32(std::byte* at, std::size_t bytes) {
  const Vector<32> zero = {};
  for (std::byte* const end = at + bytes; at < end; at += kBlock) {
    auto* const p = reinterpret_cast<Vector<32>*>(at);
    const Vector<32> bits = ((p[0] | p[1]) | (p[2] | p[3])) | ((p[4] | p[5]) | (p[6] | p[7]));
    if (__builtin_ia32_ptestz256(bits, bits)) continue;
    for (std::size_t i = 0; i < kBlock / 32; ++i) p[i] = zero;
  }
}

__attribute__((target("avx512f"), no_sanitize("address", "thread", "undefined")))
void ClearNonZero64(std::byte* at, std::size_t bytes) {
  const Vector<64> zero = {};
  for (std::byte* const end = at + bytes; at < end; at += kBlock) {
    auto* const p = reinterpret_cast<Vector<64>*>(at);
    const Vector<64> bits = (p[0] | p[1]) | (p[2] | p[3]);
    if (_mm512_test_epi64_mask(reinterpret_cast<__m512i>(bits), reinterpret_cast<__m512i>(bits)) == 0) continue;
    for (std::size_t i = 0; i < kBlock / 64; ++i) p[i] = zero;
  }
}

// The widest vectors that the processor has and the kernel saves, in bytes; 1: none. Not by __builtin_cpu_supports, whose
// constructor asks the processor some twenty times in each process: in a virtual machine that is microseconds each.
unsigned AskForVectorWidth() {
  constexpr std::uint32_t kAvxState = 0x6, kAvx512State = 0xe6;  // in XCR0: what is saved
  std::uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & bit_OSXSAVE) == 0) return 1;
  std::uint32_t saved = 0, high = 0;
  asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return 1;
  if ((saved & kAvx512State) == kAvx512State && (b & bit_AVX512F) != 0) return 64;
  return (saved & kAvxState) == kAvxState && (b & bit_AVX2) != 0 ? 32 : 1;
}

#endif

}  // namespace

bool LinuxKernel::Try(Feature feature) {
  switch (feature) {
    case Feature::kGuardRegions:
      return TryGuardRegions();
    case Feature::kVectoredDiscard:
      return TryVectoredDiscard();
    case Feature::kUserfaultfd:
      return TryUserfaultfd();
    case Feature::kHugePages:
      return TryHugePages();
    case Feature::kMembarrier:
      return TryMembarrier();
  }
  return false;
}

bool LinuxKernel::Permits(Feature feature) const {
  switch (feature) {
    case Feature::kGuardRegions:
      return permitted_.guard_regions;
    case Feature::kVectoredDiscard:
      return permitted_.vectored_discard;
    case Feature::kUserfaultfd:
      return permitted_.userfaultfd;
    case Feature::kHugePages:
      return permitted_.huge_pages;
    case Feature::kMembarrier:
      return permitted_.membarrier;
  }
  return false;
}

// Each feature is tried alone and when first needed: a seccomp filter may kill a process for a
// system call that it does not expect, so a process that never asks for userfaultfd must not make
// that call.
bool LinuxKernel::Has(Feature feature) const {
  const std::uint32_t tried = 1u << (2 * static_cast<unsigned>(feature));
  const std::uint32_t there = tried << 1;
  std::uint32_t state = tried_.load(std::memory_order_relaxed);
  if ((state & tried) == 0) {
    const std::uint32_t found = tried | (Permits(feature) && Try(feature) ? there : 0);
    while ((state & tried) == 0) {
      if (tried_.compare_exchange_weak(state, state | found, std::memory_order_relaxed)) {
        state |= found;
      }
    }
  }
  return (state & there) != 0;
}

void LinuxKernel::Forget(Feature feature) const {
  tried_.fetch_and(~(2u << (2 * static_cast<unsigned>(feature))), std::memory_order_relaxed);
}

Features LinuxKernel::features() const {
  return {.guard_regions = Has(Feature::kGuardRegions),
          .vectored_discard = Has(Feature::kVectoredDiscard),
          .userfaultfd = Has(Feature::kUserfaultfd),
          .huge_pages = Has(Feature::kHugePages),
          .membarrier = Has(Feature::kMembarrier)};
}

void LinuxKernel::ForEachMetric(MetricVisitor visit, void* context) const {
  static constexpr std::string_view kNames[kCalls] = {
      "kernel_mmap_total",    "kernel_munmap_total",  "kernel_mprotect_total",
      "kernel_mremap_total",  "kernel_mlock_total",   "kernel_dontneed_total",
      "kernel_madvise_total", "kernel_mincore_total", "kernel_msync_total"};
  static constexpr std::string_view kHelp = "Operations that were this system call.";
  for (std::size_t i = 0; i < kCalls; ++i) visit(context, {.name = kNames[i], .help = kHelp, .first = &calls_[i]});
}

Result<PageRange> LinuxKernel::Reserve(Pages size, Pages alignment) {
  sync::CheckNoShortLockHeld("os::Reserve");
  Count(Call::kMmap);
  FREEHOLD_DCHECK(size.value > 0);
  FREEHOLD_DCHECK(alignment.value > 0 && (alignment.value & (alignment.value - 1)) == 0);
  // Too much, and cut off what sticks out: asking for exactly `size` yields an aligned address by
  // luck only.
  const std::size_t slack = alignment.value - 1;
  if (size.value > (std::numeric_limits<std::size_t>::max() >> kPageShift) - slack) {
    return ErrorCode::kOverflow;
  }
  const Pages mapped_size{size.value + slack};
  const long mapped = Mmap(nullptr, mapped_size.bytes().value, PROT_NONE, MAP_NORESERVE);
  if (SyscallFailed(mapped)) return Error::System(SyscallErrno(mapped));

  const PageNumber start{static_cast<std::size_t>(mapped) >> kPageShift};
  const PageRange range = PageRange::Of(PageNumber{(start.value + slack) & ~slack}, size);
  const PageRange before = {start, range.first};
  const PageRange after = {range.end, start + mapped_size};
  // These fail only when the mapping merged with a neighbour and there are too many VMAs to cut it
  // again. What sticks out then stays reserved, which costs addresses and no memory.
  if (!before.empty()) Munmap(before.address(), before.bytes().value);
  if (!after.empty()) Munmap(after.address(), after.bytes().value);
  return range;
}

Error LinuxKernel::Release(PageRange range) {
  CheckRange("os::Release", range);
  Count(Call::kMunmap);
  return ToError(Munmap(range.address(), range.bytes().value));
}

Error LinuxKernel::Protect(PageRange range, Protection protection) {
  CheckRange("os::Protect", range);
  Count(Call::kMprotect);
  return ToError(RawSyscall(SYS_mprotect, range.address(), range.bytes().value, protection));
}

Error LinuxKernel::Reset(PageRange range) {
  CheckRange("os::Reset", range);
  Count(Call::kMmap);
  return ToError(Mmap(range.address(), range.bytes().value, PROT_NONE, MAP_FIXED | MAP_NORESERVE));
}

Error LinuxKernel::Move(PageRange from, PageRange to) {
  CheckRange("os::Move", from);
  Count(Call::kMremap);
  FREEHOLD_DCHECK(from.count() == to.count() && !from.Overlaps(to));
  constexpr int kMremapDontunmap = 4;  // Linux 5.7
  const std::size_t size = from.bytes().value;
  const long result = RawSyscall(SYS_mremap, from.address(), size, size,
                                 MREMAP_MAYMOVE | MREMAP_FIXED | kMremapDontunmap, to.address());
  // Linux may have unmapped the target first: close the hole before somebody else's mmap falls into it.
  if (SyscallFailed(result)) (void)Reset(to);
  return ToError(result);
}

Error LinuxKernel::LockMemory(PageRange range) {
  CheckRange("os::LockMemory", range);
  Count(Call::kMlock);
  constexpr int kMlockOnfault = 1;
  return ToError(RawSyscall(SYS_mlock2, range.address(), range.bytes().value, kMlockOnfault));
}

Error LinuxKernel::UnlockMemory(PageRange range) {
  CheckRange("os::UnlockMemory", range);
  Count(Call::kMlock);
  return ToError(RawSyscall(SYS_munlock, range.address(), range.bytes().value));
}

Error LinuxKernel::Discard(absl::Span<const PageRange> ranges) {
  sync::CheckNoShortLockHeld("os::Discard");
  Count(Call::kDontneed);
  if (ranges.size() == 1) return DiscardOne(ranges[0].address(), ranges[0].bytes().value);
  return DiscardMany(ranges);
}

// Not inlined: the vector is 8 KiB of stack, which a Discard of one range does not need.
[[gnu::noinline]] Error LinuxKernel::DiscardMany(absl::Span<const PageRange> ranges) {
  iovec stretches[kDiscardVector];
  std::size_t count = 0;
  for (std::size_t i = 0; i < ranges.size();) {
    // One stretch: neighbours in the span that are neighbours in memory.
    PageRange stretch = ranges[i++];
    FREEHOLD_DCHECK(!stretch.empty());
    while (i < ranges.size() && ranges[i].first == stretch.end) stretch.end = ranges[i++].end;
    stretches[count++] = {stretch.address(), stretch.bytes().value};
    if (count == kDiscardVector || i == ranges.size()) {
      if (const Error error = DiscardVector(stretches, count); !error.ok()) return error;
      count = 0;
    }
  }
  return Error::Ok();
}

Error LinuxKernel::DiscardVector(const iovec* stretches, std::size_t count) {
  while (count > 0) {
    std::size_t dropped = 0;
    if (count > 1 && Has(Feature::kVectoredDiscard)) {
      const long result = ProcessMadvise(stretches, count, MADV_DONTNEED);
      if (SyscallFailed(result) && IsRefusal(result)) {
        Forget(Feature::kVectoredDiscard);
      } else if (!SyscallFailed(result)) {
        // Linux stops at the first stretch that fails and says how many bytes came before it.
        std::size_t bytes = static_cast<std::size_t>(result);
        while (dropped < count && bytes >= stretches[dropped].iov_len) {
          bytes -= stretches[dropped++].iov_len;
        }
      }
    }
    if (dropped == 0) {
      // No vectors here, or the first stretch fails: alone it gets the fallback for locked memory,
      // or an error of its own.
      const Error error = DiscardOne(stretches->iov_base, stretches->iov_len);
      if (!error.ok()) return error;
      dropped = 1;
    }
    stretches += dropped;
    count -= dropped;
  }
  return Error::Ok();
}

Error LinuxKernel::AdviseHugePages(PageRange range, HugePages advice) {
  CheckRange("os::AdviseHugePages", range);
  Count(Call::kMadvise);
  return ToError(Madvise(range, advice == HugePages::kPrefer ? MADV_HUGEPAGE : MADV_NOHUGEPAGE));
}

void LinuxKernel::AdviseCoreDumps(PageRange range, CoreDumps advice) {
  CheckRange("os::AdviseCoreDumps", range);
  Count(Call::kMadvise);
  (void)Madvise(range, advice == CoreDumps::kOmit ? MADV_DONTDUMP : MADV_DODUMP);
}

Error LinuxKernel::AdviseReclaim(PageRange range, ReclaimHint hint) {
  CheckRange("os::AdviseReclaim", range);
  Count(Call::kMadvise);
  static constexpr int kAdvice[] = {MADV_FREE, MADV_COLD, MADV_PAGEOUT};
  return ToError(Madvise(range, kAdvice[static_cast<std::size_t>(hint)]));
}

Error LinuxKernel::Advise(PageRange range, int advice) {
  CheckRange("os::Advise", range);
  return ToError(Madvise(range, advice));
}

Error LinuxKernel::InstallGuard(PageRange range) {
  CheckRange("os::InstallGuard", range);
  Count(Call::kMadvise);
  if (!Has(Feature::kGuardRegions)) return {ErrorCode::kUnsupported};
  const long result = Madvise(range, kMadvGuardInstall);
  if (!SyscallFailed(result)) return Error::Ok();
  if (IsRefusal(result)) {
    Forget(Feature::kGuardRegions);
    return {ErrorCode::kUnsupported};
  }
  // Locked memory (mlockall) cannot have guards, other memory of the process can.
  if (result == -EINVAL) return {ErrorCode::kUnsupported};
  return ToError(result);
}

Error LinuxKernel::RemoveGuard(PageRange range) {
  CheckRange("os::RemoveGuard", range);
  Count(Call::kMadvise);
  if (!Has(Feature::kGuardRegions)) return {ErrorCode::kUnsupported};
  return ToError(Madvise(range, kMadvGuardRemove));
}

Result<Pages> LinuxKernel::CountResident(PageRange range) {
  CheckRange("os::CountResident", range);
  Count(Call::kMincore);
  // As much as the kernel looks at under one hold of its lock.
  unsigned char resident[kPageSize];
  Pages total;
  for (PageNumber at = range.first; at < range.end;) {
    const Pages chunk{std::min(sizeof(resident), (range.end - at).value)};
    const long result = Repeat(
        [&] { return RawSyscall(SYS_mincore, at.address(), chunk.bytes().value, resident); });
    if (SyscallFailed(result)) return Error::System(SyscallErrno(result));
    for (std::size_t i = 0; i < chunk.value; ++i) total.value += resident[i] & 1;
    at = at + chunk;
  }
  return total;
}

Error LinuxKernel::QueryResident(PageRange range, absl::Span<std::uint8_t> resident) {
  CheckRange("os::QueryResident", range);
  Count(Call::kMincore);
  FREEHOLD_DCHECK(resident.size() >= range.count().value);
  const long result = Repeat([&] {
    return RawSyscall(SYS_mincore, range.address(), range.bytes().value, resident.data());
  });
  if (SyscallFailed(result)) return Error::System(SyscallErrno(result));
  // The other bits are reserved.
  for (std::size_t i = 0; i < range.count().value; ++i) resident[i] &= 1;
  return Error::Ok();
}

void LinuxKernel::TouchForWrite(PageRange range) {
  CheckRange("os::TouchForWrite", range);
  FREEHOLD_DCHECK(range.count().value <= kPagesPerHugePage);
  for (PageNumber page = range.first; page < range.end; page = page + Pages{1}) {
    TouchByte(page.address());
  }
}

#if defined(__x86_64__)
bool LinuxKernel::ClearNonZero(PageRange range) {
  unsigned width = vector_width_.load(std::memory_order_relaxed);
  if (width == 0) vector_width_.store(width = AskForVectorWidth(), std::memory_order_relaxed);
  if (width == 64) {
    ClearNonZero64(range.address(), range.bytes().value);
  } else if (width == 32) {
    ClearNonZero32(range.address(), range.bytes().value);
  }
  return width != 1;
}
#endif

void LinuxKernel::Zero(PageRange range) {
  CheckRange("os::Zero", range);
#if defined(__x86_64__)
  if (range.bytes() >= kClearFrom && range.bytes() <= kClearUpTo && ClearNonZero(range)) return;
  // For whole pages as fast as memset, which is this instruction plus the way to it, and no
  // sanitizer takes it for an access by the program to memory that it has not been given yet.
  void* at = range.address();
  std::size_t words = range.bytes().value / sizeof(std::uint64_t);
  asm volatile("rep stosq" : "+D"(at), "+c"(words) : "a"(0) : "memory");
#else
  std::memset(range.address(), 0, range.bytes().value);
#endif
}

void LinuxKernel::Copy(PageRange from, PageRange to) {
  CheckRange("os::Copy", from);
  FREEHOLD_DCHECK(from.count() == to.count() && !from.Overlaps(to));
  for (std::size_t page = 0; page < from.count().value; ++page) {
    CopyUnlessZero((from.first + Pages{page}).address(), (to.first + Pages{page}).address());
  }
}

Nanoseconds LinuxKernel::Now() {
  timespec now;
  // By symbol: through the vDSO it is no system call, and it cannot fail.
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return {static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 +
          static_cast<std::uint64_t>(now.tv_nsec)};
}

unsigned LinuxKernel::CurrentCpu() {
  // struct rseq { u32 cpu_id_start; s32 cpu_id; ... }; the kernel keeps cpu_id current, it is
  // negative in a thread that is not registered.
  constexpr std::ptrdiff_t kCpuId = 4;
  if (&__rseq_size != nullptr && __rseq_size > kCpuId) {
    int cpu;
#if defined(__x86_64__)
    asm volatile("movl %%fs:(%1), %0" : "=r"(cpu) : "r"(__rseq_offset + kCpuId));
#elif defined(__aarch64__)
    cpu = *reinterpret_cast<volatile int*>(static_cast<char*>(__builtin_thread_pointer()) +
                                           __rseq_offset + kCpuId);
#endif
    if (cpu >= 0) return static_cast<unsigned>(cpu);
  }
  unsigned cpu = 0;
  RawSyscall(SYS_getcpu, &cpu, nullptr, nullptr);
  return cpu;
}

unsigned LinuxKernel::CpuCount() {
  unsigned count = cpu_count_.load(std::memory_order_relaxed);
  if (count != 0) return count;
  // Online CPUs rather than possible ones: virtual machines can call hundreds possible that never
  // come. And the affinity too: container file systems show a made-up list.
  char online[256];
  ReadSmallFile("/sys/devices/system/cpu/online", online);
  count = std::clamp(std::max(EndOfCpuList(online), EndOfAffinity()), 1u, kMaxCpus);
  cpu_count_.store(count, std::memory_order_relaxed);
  return count;
}

}  // namespace freehold::vm::os
