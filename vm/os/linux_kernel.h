// The real kernel: Linux 5.15 or later, on x86-64 and aarch64.
#ifndef FREEHOLD_VM_OS_LINUX_KERNEL_H_
#define FREEHOLD_VM_OS_LINUX_KERNEL_H_

#include <sys/uio.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "vm/metric.h"
#include "vm/os/kernel.h"

namespace freehold::vm::os {

// Linux's `Kernel`. Its state is what it learned about features and the number of CPUs; address
// space and memory belong to the process, so any number of LinuxKernels may coexist.
//
// Thread safety: thread-safe; async-signal-safe.
// Waiting:       for the kernel only. Probing takes no lock: threads that come first at the same
//                time all try, and agree.
// Allocation:    none. Constant-initialized and trivially destroyed: a `constinit` one serves from
//                the first instruction of the process to its last.
// Errors:        as in `Kernel`; the caller's errno is never touched. Calls that Linux interrupts
//                or refuses for the moment (EINTR, a few EAGAIN) are repeated here.
class LinuxKernel final : public Kernel {
 public:
  static constexpr Features kAllFeatures = {.guard_regions = true,
                                            .vectored_discard = true,
                                            .userfaultfd = true,
                                            .huge_pages = true,
                                            .membarrier = true};
  // The most that CpuCount() says.
  static constexpr unsigned kMaxCpus = 1024;
  // The most stretches of adjacent ranges that one system call of Discard drops.
  static constexpr std::size_t kDiscardVector = 512;

  constexpr LinuxKernel() = default;
  // Does without the features that `permitted` lacks, as if this kernel did not have them.
  constexpr explicit LinuxKernel(Features permitted) : permitted_(permitted) {}

  Features features() const override;

  // Operations so far by the system call that does them; some take several calls.
  void ForEachMetric(MetricVisitor visit, void* context) const;

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

  // linux_files.cc
  Result<FileInfo> IdentifyFile(int descriptor) override;
  Result<FileTraits> InspectFile(int descriptor) override;
  Error MapFile(PageRange range, const FileView& view) override;
  Error ReplaceByFile(PageRange range, const FileView& view) override;
  Error ExtendFile(PageRange range) override;
  Error MoveFile(PageRange from, PageRange to) override;
  Error Sync(PageRange range, SyncOptions options) override;
  Error FaultIn(PageRange range, Access access) override;

  Nanoseconds Now() override;
  unsigned CurrentCpu() override;
  unsigned CpuCount() override;

 private:
  // MoveFile to more pages, of several kernel VMAs.
  Error MoveFilePieces(PageRange from, PageRange to);
  enum class Feature : unsigned {
    kGuardRegions,
    kVectoredDiscard,
    kUserfaultfd,
    kHugePages,
    kMembarrier
  };

  enum class Call : unsigned { kMmap, kMunmap, kMprotect, kMremap, kMlock, kDontneed, kMadvise, kMincore, kMsync };
  static constexpr std::size_t kCalls = static_cast<std::size_t>(Call::kMsync) + 1;
  void Count(Call call) { calls_[static_cast<std::size_t>(call)].fetch_add(1, std::memory_order_relaxed); }

  static bool Try(Feature feature);
  bool Permits(Feature feature) const;
  // Whether the feature is there; tries it at the first question.
  bool Has(Feature feature) const;
  // The kernel, or a seccomp filter that came after the probe, refused the feature: use the
  // fallback.
  void Forget(Feature feature) const;

  // Whether there are vectors to zero `range` with, and it is zeroed.
  bool ClearNonZero(PageRange range);
  Error DiscardMany(absl::Span<const PageRange> ranges);
  Error DiscardVector(const iovec* stretches, std::size_t count);

  Features permitted_ = kAllFeatures;
  // Two bits a feature, "tried" and "there". Written by the thread that tries first, and by
  // Forget(). Relaxed: a bit stands for nothing but itself.
  mutable std::atomic<std::uint32_t> tried_{0};
  // 0: not counted yet. Written by any thread that counts; all find the same.
  std::atomic<unsigned> cpu_count_{0};
  // Of the widest vectors, in bytes, and 1 of none; 0: not asked yet. Written by any thread that asks; all find the same.
  std::atomic<unsigned> vector_width_{0};
  // On lines that nobody else reads.
  alignas(kCacheLineSize) std::array<std::atomic<std::uint64_t>, kCalls> calls_ = {};
};

}  // namespace freehold::vm::os

#endif  // FREEHOLD_VM_OS_LINUX_KERNEL_H_
