// Demand paging: fills pages of an address space from pagers (vm/pager.h) when they are touched, and hands back what
// was written to them.
//
// Faults come through userfaultfd(2) to threads of the service. Two faults wait for each other only if they are about
// the same pages; one whose pager takes its time keeps a thread, and when all threads are busy another is started.
// A fault that meets an unmap or a replacement of its page ends in what is mapped afterwards, or in SIGSEGV.
//
// Thread safety: thread-safe.
// Lock order:    pages of a mapping's pager (LockRank::kPager), then ranges of memory. A pager's code runs under the
//                former, or none. REQUIRES: the callers of verbs, and whoever touches memory of a pager, hold no lock
//                of the space.
// Waiting:       verbs wait for the pager where they say so, and for those who hold the range.
// Allocation:    memory from the kernel; threads from libc, whose thread records may come from malloc. Pagers are
//                meant for zones that serve no heap.
// Units:         pages.
// Errors:        values. A page that cannot be had: SIGBUS for who touches it, and a line on standard error.
// Fork:          in the child the mappings of pagers are inaccessible, and the verbs here kUnsupported. The space's
//                fork handlers see to that; a child of a bare fork(2) reads zeroes where the parent would fault.
#ifndef FREEHOLD_VM_FAULT_H_
#define FREEHOLD_VM_FAULT_H_

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/types/span.h"
#include "vm/address_space.h"
#include "vm/os/userfault.h"
#include "vm/page_range.h"
#include "vm/pager.h"
#include "vm/pager_backing.h"
#include "vm/result.h"
#include "vm/sync/parking.h"
#include "vm/sync/range_lock.h"
#include "vm/sync/spin_lock.h"
#include "vm/vma.h"

namespace freehold::vm {

struct FaultOptions {
  // Threads started at once; more come when these are busy.
  unsigned min_threads = 2;
  // Threads at most, and faults that are handled at the same time. When pagers keep all of them busy, others wait.
  unsigned max_threads = 64;
  // Of these, for one mapping: so this many pagers may block for good before others notice: max_threads / this.
  unsigned threads_per_mapping = 4;
  // The most that is read because of one fault, by a reader that goes forward; at least kClusterPages.
  Pages max_read_ahead = {MiB(2).value / kPageSize};
};

// What is read because of a fault, unless a reader goes forward: the aligned pages around it.
inline constexpr Pages kClusterPages = {16};

enum class WhenUnavailable : std::uint8_t {
  kFail,      // MapPager says kUnsupported
  kPopulate,  // MapPager reads everything before it returns; such pages are never evicted
};

struct PagerMapOptions {
  Placement placement = Placement::kAnywhere;
  void* address = nullptr;  // in the mapping zone
  os::Protection protection = os::Protection::kReadWrite;
  // That Protect may ever give it. Without kWrite nothing is ever written back.
  os::Protection max_protection = os::Protection::kReadWrite;
  // Pages to which Remap may let it grow in place; 0: those that it has.
  Pages capacity = {0};
  // If this process may not use userfaultfd.
  WhenUnavailable when_unavailable = WhenUnavailable::kFail;
};

// Since Start; each read without a lock.
struct FaultStats {
  std::uint64_t faults = 0;        // events taken
  std::uint64_t pages_read = 0;    // put into memory
  std::uint64_t joined = 0;        // faults on pages that were being read already
  std::uint64_t postponed = 0;     // faults of a mapping that had its share of threads
  std::uint64_t failures = 0;      // pages whose readers got SIGBUS
  std::uint64_t pages_written = 0; // handed back
  std::uint64_t pages_lost = 0;    // that could not be handed back, and are mapped no more
  unsigned threads = 0;
};

class FaultService final : private FaultHooks {
 public:
  // `space` and `userfault` outlive the service; `userfault` serves it alone. REQUIRES: the space has no other one.
  FaultService(AddressSpace& space, os::Userfault& userfault, const FaultOptions& options = {});
  // Unmaps what is still mapped by pagers, so that threads which wait for it get SIGSEGV, and waits for the pagers'
  // calls.
  // REQUIRES: nobody calls it, nor maps through it, any more; nothing that pagers back is pinned.
  ~FaultService();
  FaultService(const FaultService&) = delete;
  FaultService& operator=(const FaultService&) = delete;

  // Fine without userfaultfd too: see available(). Errors: kSystem. REQUIRES: once, first.
  Error Start();
  // Whether this process may use userfaultfd.
  bool available() const { return available_; }

  // Maps `count` pages of `pager` from `page` on, in the mapping zone. The pager outlives the mapping: until Release.
  // AddressSpace's verbs work on the mapping, with these exceptions: Remap moves it not (kUnsupported), nor do Discard
  // and the advice to drop pages work (kUnsupported; see Evict). Unmap, and a replacing Map, write back what was
  // written to, before and after they hold the range, and return when that is done. Errors: as AddressSpace::Map;
  // kUnsupported; the pager's (kPopulate).
  Result<PageRange> MapPager(Pager& pager, std::uint64_t page, Pages count, const PagerMapOptions& options = {});

  // Hands what was written to in `range` back to its pagers. What is written meanwhile may or may not be part of it;
  // then it still counts as written to. What another thread is handing back at this time may still be on its way.
  // Ranges of no pager are passed over. Waits for the pager. Errors: kEmpty,
  // kOverflow, kOutsideReservation, kNotMapped, kUnsupported, kSystem (no memory), the pager's; it goes on after an
  // error and returns the first.
  Error Writeback(PageRange range);

  // Writes back and drops the pages of `range`: the next access reads them again. A page that could not be read is
  // tried again too. Waits for reads under way. Errors: as Writeback; pages whose write-back failed stay.
  Error Evict(PageRange range);

  // Drops the pages of `range` without writing them back: what the pager stands for has changed, or ends before them. A
  // read that is under way is not mistaken for newer content. Waits for reads under way. Errors: as Writeback.
  Error Invalidate(PageRange range);

  FaultStats Stats() const;

 private:
  friend class PagerBacking;
  using Guard = sync::RangeLock::Guard;
  using Mode = sync::RangeLock::Mode;

  static constexpr unsigned kMaxThreads = 256;
  // Of the threads that have nothing to do, two wait for faults, so that one is left when the other takes one; the
  // rest is parked, or all of them would wake up for each fault.
  static constexpr unsigned kWaiting = 2;
  // Pieces that are kept for the next verbs.
  static constexpr unsigned kMaxFreePieces = 4;
  static constexpr Pages kPiecePages = {MiB(2).value / kPageSize};
  // Read and copied at once; the reader goes on when the first of a window is there.
  static constexpr Pages kChunkPages = {64};

  // A part of a mapping on which a fault or a verb works. The backing is pinned.
  struct Target {
    PagerBacking* backing = nullptr;
    std::uint64_t generation = 0;
    PageRange vma;      // when it was looked up
    PageRange range;    // the part of it
    // The backing's page at the start of the VMA.
    std::uint64_t first = 0;

    PageSpan PagesOf(PageRange part) const {
      const std::uint64_t from = first + (part.first - vma.first).value;
      return {from, from + part.count().value};
    }
    PageRange RangeOf(PageSpan pages) const {
      return {vma.first + Pages{pages.first - first}, vma.first + Pages{pages.end - first}};
    }
  };

  // Room for content between memory and a pager: a header, and kPiecePages behind it.
  struct Piece {
    PageRange memory;
    Piece* next = nullptr;  // saved by Flush, or free
    // Of one that Flush saved:
    PagerBacking* backing = nullptr;
    std::uint32_t thread = 0;
    // What it holds: of `pages`, those set in `saved`.
    PageSpan pages;
    std::uint64_t saved_words[kPiecePages.value / 64] = {};

    PageBitmap saved() { return PageBitmap(saved_words); }
    std::byte* bytes() { return reinterpret_cast<std::byte*>(this) + kPageSize; }
    std::byte* BytesOf(std::uint64_t page) { return bytes() + (page - pages.first) * kPageSize; }
  };

  struct Handler {
    FaultService* service = nullptr;
    pthread_t thread = {};
    Piece* piece = nullptr;
    sync::Parker parker;
    Handler* next_parked = nullptr;
    // Guarded by lock_:
    bool used = false;    // it has a thread
    // What that reads, and for which mapping.
    const PagerBacking* backing = nullptr;
    PageRange filling;
    bool wakes = false;   // somebody else waits for that
  };

  // ---- FaultHooks ----
  void BeforeDrop(PageRange range) override;
  void AfterDrop(PageRange range) override;
  Error Populate(PageRange range, std::uint64_t generation) override;
  void ChildAfterFork() override;

  // ---- Threads ----
  static void* RunHandler(void* handler);
  Error Spawn(Handler& handler);
  // A handler without a thread, with a place among the waiting; null if all have one.
  Handler* TakeSlotLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  bool IsSpawning() const;
  void KeepSomebodyWaiting();
  // Parks until the thread may wait for faults; false when the service ends.
  bool AwaitTurn(Handler& self);

  // ---- Faults ----
  void HandleFault(Handler& self, const os::FaultEvent& event);
  // Makes the range of `target` what is to be read because of `page`, and claims it. False if another thread sees to
  // it: the page is being read, or is tried again when one of the mapping's reads ends.
  bool Admit(Handler& self, Target& target, PageNumber page);
  void Leave(Handler& self, const Target& target);
  void HandleMissing(Handler& self, const Target& target, const os::FaultEvent& event);
  // Reads and installs pages from `chunk.first` on, and returns how many. `event`: what made a thread wait, or null.
  // Error kReplaced: the mapping is another.
  Result<Pages> Fill(const Target& target, PageRange chunk, const os::FaultEvent* event, Piece& piece);
  Error Put(const Target& target, PageRange part, const std::byte* from, const os::FaultEvent* event);
  Error CopyIn(const Target& target, PageRange part, const std::byte* from, os::WriteTracking tracking);
  void AllowWrite(const Target& target, PageNumber page);
  void Fail(const Target& target, PageNumber page, Error error);
  void Wake(PageRange range) { (void)userfault_.Wake(range); }

  // ---- Verbs (pager_verbs.cc) ----
  static constexpr int kMaxAttempts = 3;
  enum class Holes : std::uint8_t { kRefused, kSkipped };
  enum class Drop : std::uint8_t { kWrittenBack, kLost };

  Result<Piece*> NewPiece();
  void FreePiece(Piece* piece);
  // The part of `range` in the VMA at its start, which is `found`: pinned; kNotMapped, or kUnsupported when no pager
  // backs it. What waits for pins to go (`also`) is no longer mapped, but faults all the same.
  Result<Target> FindTarget(PageRange range, PageRange& found, VmaState also = VmaState::kMapped);
  // Calls `verb(target)` for every part of `range` that a pager backs, again if it says kReplaced; returns the first
  // error.
  template <typename Verb>
  Error ForEachTarget(PageRange range, Holes holes, Verb verb);
  // The same with a piece, `verb(target, piece)`, after a check of the range.
  template <typename Verb>
  Error Perform(PageRange range, Holes holes, Verb verb);
  // Calls `visit(part, vma)` for the parts of `range`, which is mapped throughout; until an error.
  template <typename Visit>
  Error ForEachHeld(PageRange range, const Guard& guard, Visit visit);
  // Whether all of `part` is still this mapping, or waits for pins to go.
  bool IsStill(const Target& target, PageRange part, const Guard& guard) const;

  Error PopulateAll(PagerBacking& backing, PageRange range);
  Error WritebackTarget(const Target& target, Piece& piece);
  // Copies what was written to in `part`, the backing's `pages`, and counts it as written to no more. On error nothing
  // has changed. The range is held exclusively, or the mapping is out of reach.
  Error Collect(PagerBacking& backing, PageRange part, PageSpan pages, Piece& piece);
  // Hands `piece` to the pager. On error it holds what is left, which counts as written to again.
  Error HandBack(PagerBacking& backing, Piece& piece);
  void MarkDirty(PagerBacking& backing, Piece& piece);
  Error DropTarget(const Target& target, Drop drop, Piece& piece);
  Error DropPart(const Target& target, PageRange part, Drop drop, Piece& piece);
  Error DropInKernel(PagerBacking& backing, PageRange part, const Guard& guard);
  void PutBack(const Target& target, Piece& piece);
  void ReportLost(PagerBacking& backing, PageSpan pages);
  // For PagerBacking::Flush.
  void SaveDirty(PagerBacking& backing, PageRange range, PageSpan pages);
  // What this thread saved, one piece after the other; null at last.
  Piece* TakeSaved();
  void UnmapAll();

  sync::RangeLock& RangeLockOf(PageNumber page) const;

  AddressSpace& space_;
  os::Kernel& kernel_;
  os::Userfault& userfault_;
  const FaultOptions options_;
  bool available_ = false;         // constant after Start
  std::atomic<bool> dead_{false};  // this is the child of a fork; written there, before other threads exist
  std::atomic<std::uint64_t> backings_{0};  // that live

  // Faults, not accesses: taken a few times a fault.
  mutable sync::SpinLock lock_{sync::LockRank::kLeaf};
  Handler handlers_[kMaxThreads];
  unsigned threads_ ABSL_GUARDED_BY(lock_) = 0;
  unsigned waiting_ ABSL_GUARDED_BY(lock_) = 0;  // for faults, or about to
  unsigned spawning_ ABSL_GUARDED_BY(lock_) = 0;  // of these, being started
  bool stopping_ ABSL_GUARDED_BY(lock_) = false;
  Handler* parked_ ABSL_GUARDED_BY(lock_) = nullptr;
  Piece* saved_ ABSL_GUARDED_BY(lock_) = nullptr;  // by Flush, for the verb's end
  Piece* free_pieces_ ABSL_GUARDED_BY(lock_) = nullptr;
  unsigned free_piece_count_ ABSL_GUARDED_BY(lock_) = 0;

  std::atomic<std::uint64_t> faults_{0};
  std::atomic<std::uint64_t> pages_read_{0};
  std::atomic<std::uint64_t> joined_{0};
  std::atomic<std::uint64_t> postponed_{0};
  std::atomic<std::uint64_t> failures_{0};
  std::atomic<std::uint64_t> pages_written_{0};
  std::atomic<std::uint64_t> pages_lost_{0};
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_FAULT_H_
