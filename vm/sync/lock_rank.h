// The order in which locks are acquired, and its check at run time.
//
// Every lock has a rank. A thread acquires locks in rank order, earlier ranks outside later ones;
// README.md draws the tree. Builds with FREEHOLD_DEBUG_CHECKS keep a stack of held locks per thread
// and stop the program on the first acquisition out of order, naming both acquisition sites,
// whether or not another thread was there to deadlock with. In other builds everything here
// compiles to nothing.
//
// Thread safety: thread-compatible: each thread checks only itself. Async-signal-safe.
// Allocation:    none; a thread may hold kMaxHeldLocks locks at once.
#ifndef FREEHOLD_VM_SYNC_LOCK_RANK_H_
#define FREEHOLD_VM_SYNC_LOCK_RANK_H_

#include <cstddef>
#include <cstdint>

#include "vm/page_range.h"

namespace freehold::vm::sync {

// In acquisition order: earlier is outer. See README.md for what each rank guards.
enum class LockRank : std::uint8_t {
  kPager,
  kRuntime,
  kHeapProfile,
  kHeap,
  kHeapShard,
  kFork,
  kRange,
  kPurge,
  kSnapshot,
  kRegion,  // from here on: short
  kRangeInternal,
  kFreeList,
  kMetadata,
  kLeaf,
};

const char* ToString(LockRank rank);

// Under a short lock: no system call, no page touch, no waiting (other than for another short
// lock), no allocation, nothing that grows with a number of pages.
constexpr bool IsShort(LockRank rank) { return rank >= LockRank::kRegion; }

// Whether a thread may hold two locks of one rank.
enum class SameRank : std::uint8_t {
  kRefused,
  kAscendingAddress,  // yes, locks at higher addresses later
};

// How an acquisition that may wait is checked.
enum class RankCheck : std::uint8_t {
  kOrdered,    // every held lock must rank earlier
  kAscending,  // or be of this rank and at a lower address
};

// Where a lock was acquired. Default arguments `AcquisitionSite site = AcquisitionSite::Here()`
// name the caller; empty unless locks are checked.
class AcquisitionSite {
 public:
#if defined(FREEHOLD_DEBUG_CHECKS)
  static constexpr AcquisitionSite Here(const char* file = __builtin_FILE(),
                                        int line = __builtin_LINE()) {
    return AcquisitionSite(file, line);
  }
  constexpr AcquisitionSite() = default;
  constexpr const char* file() const { return file_; }
  constexpr int line() const { return line_; }

 private:
  constexpr AcquisitionSite(const char* file, int line) : file_(file), line_(line) {}
  const char* file_ = "";
  int line_ = 0;
#else
  static constexpr AcquisitionSite Here() { return {}; }
#endif
};

#if defined(FREEHOLD_DEBUG_CHECKS)

inline constexpr std::size_t kMaxHeldLocks = 96;

// Checks that this thread may wait for `lock` now; to be called before it does. One that cannot
// wait cannot deadlock and needs no check.
void CheckRank(LockRank rank, const void* lock, RankCheck check, AcquisitionSite site);
// Records that this thread holds `lock`; to be called when it does.
void RecordRank(LockRank rank, const void* lock, AcquisitionSite site);
// Both.
inline void AcquireRank(LockRank rank, const void* lock, RankCheck check, AcquisitionSite site) {
  CheckRank(rank, lock, check, site);
  RecordRank(rank, lock, site);
}

// The same for `holder`, a guard of `range` in the range lock `lock`: this thread's other guards of
// that rank, in whichever range lock, must end at or before range.first: pages have one order however
// many locks divide them.
void CheckRangeRank(LockRank rank, const void* lock, const void* holder, PageRange range,
                    AcquisitionSite site);
void RecordRangeRank(LockRank rank, const void* lock, const void* holder, PageRange range,
                     AcquisitionSite site);

// Forgets `lock`, or `holder` of a range lock. Any order of release is fine. REQUIRES: recorded.
void ReleaseRank(const void* lock);

// The same for the fork handlers, which acquire every lock there is: only their order by rank is
// checked, and they are counted, not listed.
void AcquireRankForFork(LockRank rank, AcquisitionSite site);
void ReleaseRankForFork(LockRank rank);

// Fails if this thread holds a short lock. `operation` names what is about to happen.
void CheckNoShortLockHeld(const char* operation);

// Fails unless this thread holds `lock`, or guard.
void CheckLockHeld(const void* lock);

// Called instead of abort() on a failed check, in all threads, with the message; null restores
// abort(). If it returns, the acquisition goes on and is recorded.
using RankViolationHandler = void (*)(const char* message);
void SetRankViolationHandlerForTest(RankViolationHandler handler);

#else

inline void CheckRank(LockRank, const void*, RankCheck, AcquisitionSite) {}
inline void RecordRank(LockRank, const void*, AcquisitionSite) {}
inline void AcquireRank(LockRank, const void*, RankCheck, AcquisitionSite) {}
inline void CheckRangeRank(LockRank, const void*, const void*, PageRange, AcquisitionSite) {}
inline void RecordRangeRank(LockRank, const void*, const void*, PageRange, AcquisitionSite) {}
inline void ReleaseRank(const void*) {}
inline void AcquireRankForFork(LockRank, AcquisitionSite) {}
inline void ReleaseRankForFork(LockRank) {}
inline void CheckNoShortLockHeld(const char*) {}
inline void CheckLockHeld(const void*) {}

#endif

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_LOCK_RANK_H_
