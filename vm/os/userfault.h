// userfaultfd(2) as the layers above see it: page faults of registered ranges come as events to whoever waits
// for them, and the faulting thread sleeps until its page is there, poisoned, or it is told to try again.
//
// Thread safety: thread-safe, but for Open. An event goes to one of the threads that wait.
// Lock order:    as `Kernel`: no short lock is held in any call.
// Waiting:       Wait only. Copy, Poison, Wake and WriteProtect wake the threads that sleep in the range.
// Errors:        kSystem with the call's errno; kUnsupported where this process may not do it.
// Fork:          the child's copies of registered ranges are ordinary memory there, empty pages reading as zero, and
//                no event comes from it.
#ifndef FREEHOLD_VM_OS_USERFAULT_H_
#define FREEHOLD_VM_OS_USERFAULT_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "vm/page_range.h"
#include "vm/result.h"
#include "vm/units.h"

namespace freehold::vm::os {

// A thread sleeps because of this page.
struct FaultEvent {
  PageNumber page;
  bool write = false;            // it wants to write
  bool write_protected = false;  // the page is there, but was write-protected by Copy or WriteProtect
};

// What this kernel and this process's rights allow.
struct UserfaultAbilities {
  bool write_protect = false;  // Linux 5.7
  bool poison = false;         // Linux 6.6: without another kernel VMA
  // Faults of the kernel on behalf of a thread, as read(2) into a page that is not there, come as events too;
  // else such a call fails with EFAULT.
  bool kernel_faults = false;
};

enum class WriteTracking : bool { kOff, kOn };

class Userfault {
 public:
  // REQUIRES: once, before anything else.
  virtual Error Open() = 0;
  virtual UserfaultAbilities abilities() const = 0;

  // From now on, faults on pages of `range` that are not there become events; with tracking, writes to
  // write-protected pages too. Ends when the range is mapped anew. REQUIRES: private anonymous memory; kOn:
  // abilities().write_protect.
  virtual Error Register(PageRange range, WriteTracking tracking) = 0;

  // Waits for an event; false once Stop was called. Events that nobody took by then stay untaken.
  virtual bool Wait(FaultEvent& event) = 0;
  // Ends every Wait, for good. Async-signal-safe.
  virtual void Stop() = 0;

  // Puts a copy of the bytes at `from` into `range`, page by page and each atomically to other threads, and stops at
  // the first page that cannot take it. Returns the pages done; an error only if it is none. EEXIST: a page is
  // there; ENOENT: the range is not registered (any more). kOn: the pages are write-protected.
  virtual Result<Pages> Copy(PageRange range, const std::byte* from, WriteTracking tracking) = 0;
  // Write-protects the pages of `range` that are there, or lets them be written again. ENOENT as Copy.
  virtual Error WriteProtect(PageRange range, bool protect) = 0;
  // Accesses to `page`, which is not there, get SIGBUS. EEXIST: it is there, or poisoned. Without abilities().poison
  // another kernel VMA takes its place, and the page is no longer registered; with it, dropping the content of the page
  // ends it.
  virtual Error Poison(PageNumber page) = 0;
  // The threads that sleep in `range` try again.
  virtual Error Wake(PageRange range) = 0;

 protected:
  ~Userfault() = default;
};

// The real one. Faults of the kernel come too where the process may have them: as root, where
// vm.unprivileged_userfaultfd is 1, or where /dev/userfaultfd may be opened. Closes its descriptor when it ends, which
// turns what is still registered into ordinary memory: pages that are not there read as zero.
class LinuxUserfault final : public Userfault {
 public:
  static constexpr UserfaultAbilities kAllAbilities = {.write_protect = true, .poison = true, .kernel_faults = true};

  LinuxUserfault() = default;
  // Does without the abilities that `permitted` lacks.
  explicit LinuxUserfault(UserfaultAbilities permitted) : permitted_(permitted) {}
  ~LinuxUserfault();
  LinuxUserfault(const LinuxUserfault&) = delete;
  LinuxUserfault& operator=(const LinuxUserfault&) = delete;

  Error Open() override;
  UserfaultAbilities abilities() const override { return abilities_; }
  Error Register(PageRange range, WriteTracking tracking) override;
  bool Wait(FaultEvent& event) override;
  void Stop() override;
  Result<Pages> Copy(PageRange range, const std::byte* from, WriteTracking tracking) override;
  Error WriteProtect(PageRange range, bool protect) override;
  Error Poison(PageNumber page) override;
  Error Wake(PageRange range) override;

 private:
  // A descriptor, or -errno; `kernel_faults` says of which kind.
  long OpenDescriptor(bool& kernel_faults) const;

  const UserfaultAbilities permitted_ = kAllAbilities;
  UserfaultAbilities abilities_;
  int fd_ = -1;
  int stop_fd_ = -1;   // an eventfd: readable once stopped
  int empty_fd_ = -1;  // an empty file, all of which lies beyond its end: unless there is poison
};

}  // namespace freehold::vm::os

#endif  // FREEHOLD_VM_OS_USERFAULT_H_
