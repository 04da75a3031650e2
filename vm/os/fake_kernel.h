// A Kernel for tests: content is real, page states are also modelled, calls are logged, and any of
// them can be made to fail. Misuse that Linux would let pass stops the test.
#ifndef FREEHOLD_VM_OS_FAKE_KERNEL_H_
#define FREEHOLD_VM_OS_FAKE_KERNEL_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/types/span.h"
#include "vm/os/kernel.h"
#include "vm/os/linux_kernel.h"
#include "vm/os/page_model.h"

namespace freehold::vm::os {

// Forwards to a LinuxKernel of its own, so that memory behaves as memory, and keeps a PageModel
// beside it.
//
// Stops the program (CheckFailed, with operation and range) on: an empty range; a range that is not
// inside one reservation, or was released before; touching,
// zeroing or copying to a page that is guarded, not writable, or a file's (whose end may be a signal away);
// making writable what core dumps omit; extending or moving what is no file mapping; touching more than a huge
// page's worth in one call; a Reserve of nothing or with an alignment that is no power of two.
//
// Thread safety: thread-safe. A call and its entry in model and log are one step, but for the
//                memory accesses of TouchForWrite and Zero, which may fault and wait for others.
// Waiting:       for other threads' calls, in a lock that the rank checker does not know.
// Allocation:    from malloc.
class FakeKernel final : public Kernel {
 public:
  enum class Operation : std::uint8_t {
    kReserve,
    kRelease,
    kProtect,
    kReset,
    kMove,
    kLockMemory,
    kUnlockMemory,
    kDiscard,
    kAdviseHugePages,
    kAdviseCoreDumps,  // cannot fail
    kAdviseReclaim,
    kAdvise,
    kInstallGuard,
    kRemoveGuard,
    kCountResident,
    kQueryResident,
    kIdentifyFile,
    kInspectFile,
    kMapFile,
    kReplaceByFile,
    kExtendFile,
    kMoveFile,
    kSync,
    kFaultIn,
    kTouchForWrite,  // this, kZero and kCopy cannot fail
    kZero,
    kCopy,
  };
  static constexpr std::size_t kOperations = static_cast<std::size_t>(Operation::kCopy) + 1;

  struct Call {
    Operation operation;
    // One, but for kDiscard; source and target of kMove, kMoveFile and kCopy; none for questions about descriptors
    // and for a kReserve that failed.
    std::vector<PageRange> ranges;
    Error result;
    Protection protection = Protection::kNone;  // kProtect
    HugePages huge_pages = HugePages::kAvoid;   // kAdviseHugePages
    CoreDumps core_dumps = CoreDumps::kInclude;  // kAdviseCoreDumps
    ReclaimHint reclaim = ReclaimHint::kFree;   // kAdviseReclaim
    int advice = 0;                             // kAdvise
    FileView view = {};                         // kMapFile, kReplaceByFile
    Access access = Access::kRead;              // kFaultIn
  };

  struct Options {
    unsigned cpu_count = 4;
    Features features = LinuxKernel::kAllFeatures;  // fewer if the real kernel has fewer
    bool log_calls = true;  // off for long stress tests; calls are counted all the same
  };

  FakeKernel() : FakeKernel(Options{}) {}
  explicit FakeKernel(Options options);
  // Gives back what is still reserved.
  ~FakeKernel();
  FakeKernel(const FakeKernel&) = delete;
  FakeKernel& operator=(const FakeKernel&) = delete;

  // ---- Kernel ----
  Features features() const override;
  Result<PageRange> Reserve(Pages size, Pages alignment) override;
  Error Release(PageRange range) override;
  Error Protect(PageRange range, Protection protection) override;
  Error Reset(PageRange range) override;
  Error Move(PageRange from, PageRange to) override;
  Error LockMemory(PageRange range) override;
  Error UnlockMemory(PageRange range) override;
  Error Discard(absl::Span<const PageRange> ranges) override;
  Error AdviseHugePages(PageRange range, HugePages advice) override;
  void AdviseCoreDumps(PageRange range, CoreDumps advice) override;
  Error AdviseReclaim(PageRange range, ReclaimHint hint) override;
  Error Advise(PageRange range, int advice) override;
  Error InstallGuard(PageRange range) override;
  Error RemoveGuard(PageRange range) override;
  Result<Pages> CountResident(PageRange range) override;
  Error QueryResident(PageRange range, absl::Span<std::uint8_t> resident) override;
  void TouchForWrite(PageRange range) override;
  void Zero(PageRange range) override;
  void Copy(PageRange from, PageRange to) override;
  Result<FileInfo> IdentifyFile(int descriptor) override;
  Result<FileTraits> InspectFile(int descriptor) override;
  Error MapFile(PageRange range, const FileView& view) override;
  Error ReplaceByFile(PageRange range, const FileView& view) override;
  Error ExtendFile(PageRange range) override;
  Error MoveFile(PageRange from, PageRange to) override;
  Error Sync(PageRange range, SyncOptions options) override;
  Error FaultIn(PageRange range, Access access) override;
  // Stands still, at the real time of construction, until AdvanceTime: deadlines made from it mean
  // something to FutexWait, which knows the real clock only.
  Nanoseconds Now() override;
  unsigned CurrentCpu() override;
  unsigned CpuCount() override;

  // ---- Failures ----
  // A failing call changes nothing and returns kSystem with `sys_errno`. A failing Discard has
  // dropped the first half of its ranges, a failing MapFile or ExtendFile has reset its range, and a failing Move or
  // MoveFile its target, as their contracts allow.
  //
  // Fails the nth call of `operation` from now on; 1 is the next one. REQUIRES: n > 0; it can fail.
  void FailNth(Operation operation, std::size_t n, int sys_errno);
  // Fails the nth call from now on of any operation that can fail.
  void FailNthOfAny(std::size_t n, int sys_errno);
  // Fails every call of `operation`.
  void FailAlways(Operation operation, int sys_errno);
  // Like vm.overcommit_memory=2: a Protect that would bring the committed pages above `limit` fails
  // with ENOMEM. Pages commit when they first become writable, until they are reset or released.
  void FailProtectBeyond(Bytes limit);
  // Like RLIMIT_MEMLOCK: a LockMemory that would bring the locked pages above `limit` fails with
  // ENOMEM.
  void FailLockBeyond(Bytes limit);
  // Takes all of the above back.
  void StopFailing();
  // Calls that failed by order of the above. Unchanged over a run: the nth call was never reached.
  std::size_t InjectedFailures() const;

  // ---- Environment ----
  // Takes features away, or gives back those that the real kernel has.
  void SetFeatures(Features features);
  void AdvanceTime(Nanoseconds by);
  // The calling thread now runs on `cpu`, for every FakeKernel. 0 until set.
  static void SetCpu(unsigned cpu);

  // ---- Observation ----
  std::vector<Call> Calls() const;
  void ClearCalls();  // log and counts
  std::size_t CallCount(Operation operation) const;
  std::size_t CallCount() const;

  PageState At(PageNumber page) const;
  Pages ReservedPages() const;
  Pages CommittedPages() const;
  // By the model: pages that were touched through this Kernel and not dropped since.
  Pages ResidentPages(PageRange range) const;
  Pages CountIf(const std::function<bool(const PageState&)>& predicate) const;
  Pages GuardPages(PageRange range) const;
  Pages LockedPages() const;
  Pages FilePages(PageRange range) const;
  // See PageModel::KernelVmaCount.
  std::size_t KernelVmaCount() const;

 private:
  // std::mutex with the annotations that libstdc++'s lacks.
  class ABSL_LOCKABLE Mutex {
   public:
    void Acquire() ABSL_EXCLUSIVE_LOCK_FUNCTION() { mutex_.lock(); }
    void Release() ABSL_UNLOCK_FUNCTION() { mutex_.unlock(); }
    void AssertHeld() ABSL_ASSERT_EXCLUSIVE_LOCK() {}  // for lambdas, which are analysed alone

   private:
    std::mutex mutex_;
  };
  class ABSL_SCOPED_LOCKABLE Lock {
   public:
    explicit Lock(Mutex& mutex) ABSL_EXCLUSIVE_LOCK_FUNCTION(mutex) : mutex_(mutex) {
      mutex_.Acquire();
    }
    ~Lock() ABSL_UNLOCK_FUNCTION() { mutex_.Release(); }

   private:
    Mutex& mutex_;
  };

  struct Failure {
    std::optional<Operation> operation;  // empty: any that can fail
    std::size_t remaining;               // calls until it strikes, this one included
    bool always;                         // and at every call from then on
    int sys_errno;
  };

  void RequireReservedLocked(Operation operation, PageRange range) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void RequireWritableLocked(Operation operation, PageRange range) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The error that this call of `operation` must return, if any. To be asked once a call.
  Error InjectedErrorLocked(Operation operation) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Error ProtectLocked(PageRange range, Protection protection) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void MoveModelLocked(PageRange from, PageRange to, bool moved) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Error SetMemoryLockLocked(PageRange range, bool locked) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ResetModelLocked(PageRange range) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void RequireFileLocked(Operation operation, PageRange range) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // `range` now shows file number `file`.
  void ShowFileLocked(PageRange range, Protection protection, std::uint32_t file)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Error DiscardLocked(absl::Span<const PageRange> ranges) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Error SetGuardLocked(Operation operation, PageRange range) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // What every operation on one range shares: the check, the injected failure, the log.
  template <typename Perform>
  Error Run(Call call, Perform perform);
  // The same for those that cannot fail and touch memory.
  void RecordTouch(Operation operation, PageRange range);
  void LogLocked(Call call) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  LinuxKernel real_;
  const unsigned cpu_count_;
  const bool log_calls_;

  mutable Mutex mutex_;
  Features features_ ABSL_GUARDED_BY(mutex_);
  Nanoseconds now_ ABSL_GUARDED_BY(mutex_);
  PageModel model_ ABSL_GUARDED_BY(mutex_);
  std::vector<Failure> failures_ ABSL_GUARDED_BY(mutex_);
  std::optional<Pages> commit_limit_ ABSL_GUARDED_BY(mutex_);
  std::optional<Pages> lock_limit_ ABSL_GUARDED_BY(mutex_);
  std::size_t injected_ ABSL_GUARDED_BY(mutex_) = 0;
  std::uint32_t moves_ ABSL_GUARDED_BY(mutex_) = 0;
  std::uint32_t files_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<Call> calls_ ABSL_GUARDED_BY(mutex_);
  std::array<std::size_t, kOperations> counts_ ABSL_GUARDED_BY(mutex_) = {};
};

const char* ToString(FakeKernel::Operation operation);
// "Protect [0x7f0000000,0x7f0000010) = system call failed (12)", for messages of failing tests.
std::string ToString(const FakeKernel::Call& call);

}  // namespace freehold::vm::os

#endif  // FREEHOLD_VM_OS_FAKE_KERNEL_H_
