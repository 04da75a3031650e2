// The one place where memory goes back to the kernel: concurrent requests are combined into vectored
// discards, because discards that overlap in time cost ten to twenty times one that is alone (they force full
// TLB flushes on each other).
//
// Thread safety: thread-safe.
// Lock order:    LockRank::kPurge, held for a few instructions only, never over the discard itself. Callers
//                may hold range guards; they hold no region's tree lock.
// Waiting:       at most one discard runs, but for DiscardNow; requests that arrive meanwhile go together in the next
//                one. A request of many pages is cut, so that small ones do not wait behind all of it.
// Allocation:    none; a request waits in its caller's frame.
#ifndef FREEHOLD_VM_PURGE_STAGE_H_
#define FREEHOLD_VM_PURGE_STAGE_H_

#include <atomic>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/types/span.h"
#include "vm/metric.h"
#include "vm/os/kernel.h"
#include "vm/page_range.h"
#include "vm/result.h"
#include "vm/sync/parking.h"
#include "vm/sync/spin_lock.h"

namespace freehold::vm {

class PurgeStage {
 public:
  explicit PurgeStage(os::Kernel& kernel) : kernel_(kernel) {}

  // Drops the content of `ranges`, alone or together with other requests; returns when it is done. The
  // ranges are disjoint. Errors: kSystem; then some ranges may have been dropped.
  Error Discard(absl::Span<const PageRange> ranges);
  // The same in one call, for many pages of which hardly any is resident: spins for its turn about as long as such
  // a call takes, then goes beside whoever is discarding. Flushes that overlap cost both a full one, so taking turns
  // is worth that, but not worth a sleep.
  Error DiscardNow(absl::Span<const PageRange> ranges);

  // fork(2): nobody has a turn between Prepare and the other two.
  void PrepareFork();
  void ParentAfterFork();
  void ChildAfterFork();

  std::uint64_t calls() const { return calls_.load(std::memory_order_relaxed); }
  void ForEachMetric(MetricVisitor visit, void* context) const;
  std::uint64_t pages() const { return pages_.load(std::memory_order_relaxed); }

 private:
  struct Request;

  // Becomes the one who discards, waiting for its turn; `others` gets the requests to serve along. False:
  // somebody else served `request`, whose error is set.
  bool Enter(Request& request, Request*& others);
  // The same without waiting.
  bool TryEnter();
  bool TakeTurnLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  void Leave();
  Error Run(absl::Span<const PageRange> ranges);
  void RunTogether(Request& own, Request* others);

  os::Kernel& kernel_;
  sync::SpinLock lock_{sync::LockRank::kPurge};
  std::atomic<bool> busy_{false};  // written under lock_
  Request* first_ ABSL_GUARDED_BY(lock_) = nullptr;  // waiting requests, oldest first
  Request* last_ ABSL_GUARDED_BY(lock_) = nullptr;
  std::atomic<std::uint64_t> calls_{0};
  std::atomic<std::uint64_t> pages_{0};
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_PURGE_STAGE_H_
