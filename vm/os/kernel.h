// The system-call boundary. Everything that Freehold asks of the kernel for its address space goes
// through a `Kernel`; no other folder makes system calls. `LinuxKernel` is the real one;
// `FakeKernel` (testonly) forwards to a real kernel, models page states, logs calls and fails the
// nth one.
//
// Thread safety: thread-safe.
// Lock order:    every entry, and every page touch, asserts in debug builds that the calling thread
//                holds no lock ranked kRegion or later (DESIGN §4 rule d): see vm/sync/lock_rank.h.
//                Asking for features, time and CPU is free.
// Errors:        kSystem with the call's errno, or kUnsupported where the feature probe says so. A
//                call that fails has changed nothing unless its comment says otherwise.
// Units:         page ranges; never empty.
#ifndef FREEHOLD_VM_OS_KERNEL_H_
#define FREEHOLD_VM_OS_KERNEL_H_

#include <cstdint>

#include "absl/types/span.h"
#include "vm/page_range.h"
#include "vm/result.h"
#include "vm/units.h"

namespace freehold::vm::os {

enum class Protection : std::uint8_t {
  kNone = 0,
  kRead = 1,
  kWrite = 2,  // alone: as Linux does, readable too on x86
  kReadWrite = 3,
  kExec = 4,
  kReadExec = 5,
  kReadWriteExec = 7,
};

// Whether `protection` allows `access`, or any part of it.
constexpr bool Has(Protection protection, Protection access) {
  return (static_cast<unsigned>(protection) & static_cast<unsigned>(access)) != 0;
}

enum class HugePages : bool { kAvoid, kPrefer };

enum class CoreDumps : bool { kOmit, kInclude };

// What may happen to pages when memory is short; see AdviseReclaim.
enum class ReclaimHint : std::uint8_t {
  kFree,     // the content may go, page by page, until the next write to it
  kCold,     // the pages are not expected to be used soon
  kPageOut,  // the pages should go to swap now
};

// Whether memory is locked against paging, and when its pages come: an attribute of VMAs, with the
// meaning of mlock2(2).
enum class MemoryLock : std::uint8_t {
  kNone,
  kLocked,   // all pages are made present at once
  kOnFault,  // each page stays once it was touched
};

// Whether writes reach the file and its other mappings, or stay in this one.
enum class Sharing : bool { kPrivate, kShared };

// What a descriptor stands for.
struct FileInfo {
  std::uint64_t device = 0;
  std::uint64_t inode = 0;
  bool regular = false;   // no device, directory, pipe
  // What it was opened for; neither: it only names the file (O_PATH).
  bool readable = false;
  bool writable = false;
};

// What matters about a file to whoever wants to map it again later.
struct FileTraits {
  // As long as a mapping of it exists, device and inode name this file and no other. False where that is not
  // known: some file systems give several files one number, or one number to a file and later its copy.
  bool lasting_identity = false;
  // Its mappings come in huge pages (hugetlbfs).
  bool huge_pages = false;
  // Whether it can be sealed, which mappings that may write to it are in the way of (memfd_create).
  bool sealable = false;
};

// A part of an open file, and how it is to be mapped.
struct FileView {
  int descriptor = -1;
  std::uint64_t page = 0;  // the first, of the file
  Protection protection = Protection::kRead;
  Sharing sharing = Sharing::kPrivate;
};

// As the flags of msync(2).
struct SyncOptions {
  bool wait = true;         // until it is stored; else Linux does nothing, since it writes back by itself
  bool invalidate = false;  // other mappings see the file's content; EBUSY for locked memory
};

enum class Access : bool { kRead, kWrite };

// What this kernel can do, found out once by trying; every flag has a fallback.
struct Features {
  bool guard_regions = false;     // MADV_GUARD_INSTALL; else mprotect
  bool vectored_discard = false;  // process_madvise on oneself; else one madvise a range
  bool userfaultfd = false;       // usable by this process, for user-mode faults at least
  bool huge_pages = false;        // transparent huge pages by advice
  bool membarrier = false;        // private expedited
};

class Kernel {
 public:
  virtual Features features() const = 0;

  // Reserves `size` pages of address space without memory or commit charge, aligned to `alignment`
  // (a power of two pages). Not readable or writable yet. kOverflow if that is more than an address
  // space.
  virtual Result<PageRange> Reserve(Pages size, Pages alignment) = 0;
  // Returns part or all of a reservation.
  virtual Error Release(PageRange range) = 0;
  // Sets the protection of `range`. Takes the kernel's mmap_lock for writing: not for hot paths.
  // The first kReadWrite of a range commits it (counted under strict overcommit: ENOMEM when
  // refused).
  virtual Error Protect(PageRange range, Protection protection) = 0;
  // Replaces `range` by fresh inaccessible reserve: content, guards, protection, advice and commit
  // charge are gone. On error the content may be gone too.
  virtual Error Reset(PageRange range) = 0;

  // Locks the pages of `range` into memory, each from when it becomes present; makes none present, so
  // that mmap_lock is held for short. Splits the kernel VMA unless the range is the whole of it; joins
  // it again when unlocked. EPERM, or ENOMEM over RLIMIT_MEMLOCK. On error a part may be locked.
  virtual Error LockMemory(PageRange range) = 0;
  // Takes that back. On error a part may be unlocked.
  virtual Error UnlockMemory(PageRange range) = 0;

  // Moves the pages of `from`, with their protection, to `to`, a range of the same size that does not
  // overlap it; whatever was in `to` is gone. `from` stays as it was, without content. `to` becomes a
  // kernel VMA that merges with no neighbour until it is Reset. REQUIRES: `from` is not locked. Before
  // Linux 6.17, EFAULT unless `from` lies in one kernel VMA. On error `to` is as after Reset.
  virtual Error Move(PageRange from, PageRange to) = 0;

  // Drops the content, of locked memory too; the next read sees zeroes, and guards stay. `ranges`
  // may be many, in any order, and may overlap. Neighbours in the span that touch become one, and one
  // system call drops a vector of up to 512 of these where the kernel can. On error some ranges may
  // have been dropped.
  virtual Error Discard(absl::Span<const PageRange> ranges) = 0;

  // Advises the kernel VMA under `range`; splits it unless the range is the whole VMA.
  virtual Error AdviseHugePages(PageRange range, HugePages advice) = 0;
  // Whether images of the process contain `range`, as they do unless told otherwise; splits the kernel VMA unless the
  // range is the whole of it. For what is reserved and not in use yet. A refusal changes nothing, and is nobody's
  // concern: the image is larger, or lacks something.
  virtual void AdviseCoreDumps(PageRange range, CoreDumps advice) = 0;
  // Says what may happen to the pages of `range`; changes no kernel VMA. EINVAL for locked memory.
  virtual Error AdviseReclaim(PageRange range, ReclaimHint hint) = 0;
  // Gives the kernel any other advice, a value of madvise(2). What it does, and what it leaves behind in kernel VMAs
  // for good, is the caller's to know. On error a part may have been advised.
  virtual Error Advise(PageRange range, int advice) = 0;
  // Makes accesses to `range` trap without changing kernel VMAs; drops the content. kUnsupported,
  // and nothing changed, on kernels before 6.13, where a filter refuses it, and for locked memory:
  // then Protect instead.
  virtual Error InstallGuard(PageRange range) = 0;
  // Takes guards in `range` away; other pages keep their content.
  virtual Error RemoveGuard(PageRange range) = 0;

  // How many pages of `range` are resident. Takes mmap_lock for reading: for samples, not for hot
  // paths.
  virtual Result<Pages> CountResident(PageRange range) = 0;
  // The same page by page: 1 for a page of `range` that is resident, 0 for any other. REQUIRES:
  // `resident` has a byte for each. On error some may be set.
  virtual Error QueryResident(PageRange range, absl::Span<std::uint8_t> resident) = 0;

  // Makes every page of `range` present and writable by touching it, content unchanged, at most one
  // huge page's worth of pages (kPagesPerHugePage) a call. Safe against concurrent writers of the
  // same memory. No system call, but page faults.
  virtual void TouchForWrite(PageRange range) = 0;
  // Fills `range` with zeroes. No system call, but page faults.
  virtual void Zero(PageRange range) = 0;

  // Copies the content of `from`, which is readable, to `to`, which is writable, reads as zero, has
  // the same size and does not overlap it. Pages of zeroes are left out, so that `to` takes no more
  // memory than needed. No system call, but page faults.
  virtual void Copy(PageRange from, PageRange to) = 0;

  // ---- Files ----

  // EBADF.
  virtual Result<FileInfo> IdentifyFile(int descriptor) = 0;
  virtual Result<FileTraits> InspectFile(int descriptor) = 0;
  // Maps the file in `range`; what was there is gone. The file may be shorter: access beyond its end is a SIGBUS.
  // The mapping keeps the open file, not the descriptor. Errors as mmap(2): EACCES, EBADF, ENODEV, EOVERFLOW, EPERM,
  // and others. On error `range` is as it was or as after Reset.
  virtual Error MapFile(PageRange range, const FileView& view) = 0;
  // The same for a `range` whose loss matters: the mapping is made elsewhere and put in its place. On error `range`
  // is as it was; only where Linux has no memory for its own records, as after Reset.
  virtual Error ReplaceByFile(PageRange range, const FileView& view) = 0;
  // Lets the file mapping that ends before `range` go on in it; what was there is gone. REQUIRES: the page before
  // is of a file, is not locked, and has no content of its own: it is shared or was never written. On error `range`
  // is as it was or as after Reset.
  virtual Error ExtendFile(PageRange range) = 0;
  // Moves a file mapping as Move does, to as many pages or more; then `to` shows more of the file. `from` shows the
  // file, without what was written to it privately. On error it is as it was, if Linux lets it, and `to` is as after
  // Reset.
  virtual Error MoveFile(PageRange from, PageRange to) = 0;
  // As msync(2). The range must be mapped throughout for the kernel, which is where it stops.
  virtual Error Sync(PageRange range, SyncOptions options) = 0;
  // Makes the pages of `range` present, as an access would. EFAULT where an access would be a signal: file mappings
  // end without warning, so they cannot be touched. Takes mmap_lock for reading: at most kPagesPerHugePage a call.
  virtual Error FaultIn(PageRange range, Access access) = 0;

  // ---- Time and place ----

  // CLOCK_MONOTONIC. Neither this nor the next two are system calls in the usual case; any lock may
  // be held.
  virtual Nanoseconds Now() = 0;
  // The CPU this thread runs on, a hint: it may have moved on already. A plain load where glibc
  // registered rseq. At or beyond CpuCount() for CPUs plugged in later: reduce it before it becomes
  // an index.
  virtual unsigned CurrentCpu() = 0;
  // The highest CPU that is online or that this process may run on, plus one: what per-CPU tables
  // are sized by. The same at every call.
  virtual unsigned CpuCount() = 0;

 protected:
  // Never deleted through the interface, so that a constinit Kernel stays trivial.
  ~Kernel() = default;
};

}  // namespace freehold::vm::os

#endif  // FREEHOLD_VM_OS_KERNEL_H_
