// An address space that the process owns: one large reservation, cut into zones and regions, with its own
// VMA tree, range locks, populate and purge. `vm/README.md` teaches how the parts play together.
//
// Two verbs wait for each other only when they touch the same pages. What a verb promises about memory holds
// when it returns; what races with it on the same pages sees the state before or after, never between.
// It does not protect the *content* of a mapping: that is the user's, as with mmap(2).
//
// Thread safety:  thread-safe. Not async-signal-safe.
// Lock order:     LockRank::kRange, then kPurge, then kRegion; see vm/sync/README.md.
// Allocation:     metadata comes from the space's own arena, never from malloc.
// Units:          pages; ranges are half-open and absolute.
// Errors:         values (vm/result.h). A verb that fails leaves the space as it was.
// Invariants:     A1. In every region the extents of the tree tile the region: no holes, no overlaps.
//                 A2. A page is handed out by Map only while its extent is free or cached and no one else
//                     holds its range lock.
//                 A3. A page that is free and `kClean` reads as zero and is not resident.
//                 A4. No system call, page touch or wait happens under a region's tree lock.
#ifndef FREEHOLD_VM_ADDRESS_SPACE_H_
#define FREEHOLD_VM_ADDRESS_SPACE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/types/span.h"
#include "vm/metric.h"
#include "vm/notifier.h"
#include "vm/os/kernel.h"
#include "vm/page_range.h"
#include "vm/result.h"
#include "vm/sync/epoch.h"
#include "vm/sync/lock_times.h"
#include "vm/sync/range_lock.h"
#include "vm/sync/spin_lock.h"
#include "vm/sync/time_histogram.h"
#include "vm/units.h"

namespace freehold::vm {

class Backing;
class FileBackingPool;
struct FileKey;
class Pin;
class Transaction;
class MetadataArena;
class PurgeStage;
class Region;

// Where an extent lives, and so how the kernel sees it (DESIGN §3).
enum class Zone : std::uint8_t {
  kPlain,    // anonymous read-write memory in 4 KiB pages
  kDense,    // the same, advised for huge pages: populated and large dense ranges
  kMapping,  // whatever needs kernel VMAs of its own: unusual protections
};
inline constexpr std::size_t kZoneCount = 3;

// Regions of a space at most: 16 a zone, and twice that in the plain zone.
inline constexpr std::size_t kMaxRegions = 64;

struct AddressSpaceOptions {
  // Address space to reserve; halved until the kernel grants it, but not below `min_reserve`.
  Bytes reserve = TiB(16);
  Bytes min_reserve = GiB(64);
  // kAdaptive: lock words for 2 MiB each, per region; kTree: one interval tree of held ranges per region.
  // kCoarse: one reader-writer lock for the whole space, the mmap_sem model and baseline.
  sync::LockPolicy lock_policy = sync::LockPolicy::kAdaptive;
  // Regions per zone; 0 chooses one per CPU, fewer when the reservation is small.
  unsigned regions_per_zone = 0;
  // Unmapped pages trap at once instead of staying resident for re-use. For debugging; slow.
  bool strict_unmap = false;
  // Free memory that stays resident at most, per region, before it is purged at once.
  Bytes free_resident_limit = MiB(256);
  // Windows of files that stay mapped for re-use at most, per region; see MapFile. 0: none.
  Bytes window_limit = MiB(256);
  // How long free memory stays resident, and windows mapped, before Tick() purges them.
  Nanoseconds decay = Milliseconds(1000);
  // Times every hold of a region's tree lock, for TreeLockHolds(); two clock readings each.
  bool record_tree_lock_holds = false;
  // Times every wait for and hold of a range lock, for RangeLockTimes(); three clock readings each, and half a
  // megabyte.
  bool record_range_locks = false;
};

enum class Placement : std::uint8_t {
  kAnywhere,  // `address` is ignored
  kHint,      // at `address`, rounded down to a page, if memory of this kind lives there and all of it is free;
              // else anywhere. Slower than kAnywhere
  kFixed,     // exactly at `address`; kOverlap when something is mapped there
  kReplace,   // exactly at `address`; what is mapped there is unmapped, atomically to lookups
};

enum class Content : std::uint8_t {
  kZeroed,   // as mmap(2): reads as zero
  kAnything  // may hold old data of this process; spares the zeroing when the caller overwrites it anyway
};

struct MapOptions {
  Placement placement = Placement::kAnywhere;
  void* address = nullptr;
  // Of the start, in pages: a power of two, at most the region size. kAnywhere only.
  Pages alignment = {1};
  os::Protection protection = os::Protection::kReadWrite;
  Content content = Content::kZeroed;
  os::HugePages huge_pages = os::HugePages::kAvoid;
  // Make all pages present before returning, outside every lock (DESIGN §7). Stops quietly on error.
  bool populate = false;
  // kNone: as LockAll said for future mappings. kLocked populates too.
  os::MemoryLock lock = os::MemoryLock::kNone;
  // Where the content comes from, its page `backing_page` first; null: anonymous memory.
  Backing* backing = nullptr;
  std::uint64_t backing_page = 0;
  // Unless null, gets the VmaInfo::generation of the new mapping: by the time of a lookup, others may have put a
  // mapping of theirs in its place.
  std::uint64_t* generation = nullptr;

  bool populates() const { return populate || lock == os::MemoryLock::kLocked; }
};

struct FileMapOptions {
  int descriptor = -1;  // open for reading; may be closed when MapFile has returned
  Bytes offset;         // of the first page in the file, a multiple of the page size
  os::Sharing sharing = os::Sharing::kPrivate;
  os::Protection protection = os::Protection::kRead;
  Placement placement = Placement::kAnywhere;
  void* address = nullptr;
  // Make the pages present that the file has. Stops quietly on error. Copies pages that may be written privately.
  bool populate = false;
  os::MemoryLock lock = os::MemoryLock::kNone;  // as in MapOptions
};

// A copy of a VMA's attributes, valid at the moment of the lookup.
struct VmaInfo {
  PageRange range;
  os::Protection protection = os::Protection::kNone;
  os::MemoryLock lock = os::MemoryLock::kNone;
  Zone zone = Zone::kPlain;
  std::uint64_t generation = 0;  // unique per mapping; parts split off a mapping keep it
  Backing* backing = nullptr;    // to be used in a read section of AddressSpace::epochs, or with the range held
  std::uint64_t backing_page = 0;  // that the first page of `range` shows
};

struct PopulateOptions {
  // Absolute CLOCK_MONOTONIC time after which populate stops with kDeadline; 0: never.
  Nanoseconds deadline = {0};
  // Set to true by any thread to stop populate with kCancelled. May be null.
  const std::atomic<bool>* cancel = nullptr;
  // Called after every chunk, with no lock held, with the pages done so far. May be null.
  void (*progress)(void* context, Pages done) = nullptr;
  void* progress_context = nullptr;
};

struct SnapshotResult {
  std::size_t vmas = 0;  // in the space: more than were copied if there was too little room
  bool instant = false;  // all of them at one moment
};

// What Advise says about memory. Hints, but for kDontNeed.
enum class Advice : std::uint8_t {
  kDontNeed,     // the content is dropped: reads as zero, not resident
  kFree,         // the content may be dropped, page by page, until the next write to it
  kWillNeed,     // populated, as far as that goes
  kHugePages,    // see Advise
  kNoHugePages,  // see Advise
  kCold,         // not expected to be used soon
  kPageOut,      // should go to swap now
};

// What becomes of advice that only the kernel understands; see AdviseKernel.
enum class AdviceEffect : std::uint8_t {
  kOnce,     // something happens to pages now
  kLasting,  // the kernel VMA has an attribute from now on
};

struct RemapOptions {
  // kAnywhere: where it is if it can be, else wherever Map would put it. kFixed: exactly at `address`; kOverlap
  // when something is mapped there. kReplace: what is mapped there is unmapped first, and stays so on failure.
  Placement placement = Placement::kAnywhere;
  void* address = nullptr;
  bool may_move = false;  // kAnywhere only; the other placements always move
  // The old range stays mapped, and reads as zero. REQUIRES: the size stays, and it moves.
  bool keep_source = false;
};

// What LockAll locks; at least one of `current` and `future`, and `lock` is not kNone.
struct LockAllOptions {
  bool current = false;  // what is mapped
  bool future = false;   // what will be mapped; false takes an earlier order back
  os::MemoryLock lock = os::MemoryLock::kLocked;
};

// What of the free memory a purge takes.
enum class PurgeScope : std::uint8_t { kDecayed, kAll };

// Sums over all regions, each read without a lock: a hint under concurrency, exact when quiet.
struct AddressSpaceStats {
  Bytes reserved;
  Bytes committed;       // readable and writable for the kernel
  Bytes mapped;          // handed out by Map
  Bytes mapped_ordinary; // of that, in the zones of anonymous read-write memory: not what is only reserved, or files
  Bytes free_resident;   // free or cached, possibly resident
  Bytes metadata;        // handed out for the space's own records; the largest share is the VMAs and their trees
  std::uint64_t vmas = 0;
  std::uint64_t maps = 0;
  std::uint64_t unmaps = 0;
  std::uint64_t deferred_unmaps = 0;  // VMAs, or parts of them, that wait for a pin to go
  std::uint64_t reuses = 0;         // maps served from cached extents
  std::uint64_t zeroed_pages = 0;   // cleaned by memset for re-use
  std::uint64_t purged_pages = 0;   // given back to the kernel
  std::uint64_t purge_calls = 0;    // vectored discards
  std::uint64_t heap_splits = 0;    // protections and locks that had to split a heap zone's kernel VMA
  std::uint64_t coarse_retries = 0; // maps that fell back to locking their whole region
  std::uint64_t remap_moves = 0;    // Remap calls that moved content: by copying, or else
  std::uint64_t kernel_moves = 0;   // by the kernel, which splits a kernel VMA until the memory is unmapped
  std::uint64_t windows = 0;        // of files, unmapped and kept for re-use
  Bytes window_bytes;               // in all of them
  std::uint64_t window_hits = 0;    // file mappings served from them
  std::uint64_t ignored_advice = 0; // VMAs that were advised about huge pages against their zone
};

// Where a reader outside the process finds the VMAs of a region, and who waits for its range lock.
struct RegionLocation {
  Zone zone;
  PageRange range;
  const void* tree;       // VmaTree::root_location
  const void* range_lock; // sync::RangeLock; the same for all regions under kCoarse
};

// What the verbs of a space ask of the service that fills its mappings on demand (vm/fault.h). Called with no lock held.
class FaultHooks {
 public:
  // What is mapped in `range` is about to be dropped.
  virtual void BeforeDrop(PageRange range) = 0;
  // It has been, or could not be.
  virtual void AfterDrop(PageRange range) = 0;
  // Makes the pages of `range` present, all of the mapping `generation`. Errors: kReplaced, and others.
  virtual Error Populate(PageRange range, std::uint64_t generation) = 0;
  // In the child, when the space can be used there.
  virtual void ChildAfterFork() = 0;

 protected:
  ~FaultHooks() = default;
};

class AddressSpace {
 public:
  // Reserves and builds a space; kernel VMAs: a few per zone and region. Errors: kSystem (the last
  // reservation error), kNoRoom (below `min_reserve`), kNoMetadata, kEmpty (no reserve asked for).
  static Result<AddressSpace*> Create(os::Kernel& kernel, const AddressSpaceOptions& options);
  // Gives everything back. REQUIRES: no other thread uses the space or memory from it.
  static void Destroy(AddressSpace* space);

  AddressSpace(const AddressSpace&) = delete;
  AddressSpace& operator=(const AddressSpace&) = delete;

  // Maps `count` pages of anonymous memory, or of a backing. Errors: kEmpty, kOverflow, kUnaligned (address or alignment),
  // kOutsideReservation (fixed range not inside one region), kOverlap, kPinned, kNoRoom, kNoMetadata, kDenied (more than the
  // backing allows), kSystem (EPERM or ENOMEM too when it is to be locked and may not; what the backing says).
  Result<PageRange> Map(Pages count, const MapOptions& options = {});

  // Maps `count` pages of a file, as mmap(2): beyond the file's end, access is a SIGBUS; what grows comes into view;
  // a deleted file lives as long as its mappings.
  //
  // A mapping of a regular file on ext4, XFS, Btrfs, F2FS or tmpfs that is unmapped whole may stay in the kernel and
  // serve the next MapFile of the same part of the same file in the same way. That holds for shared mappings and
  // private ones that were never writable, not executable, not locked, protected otherwise or moved, and not for
  // those that may write to a file that can be sealed. Until the window is used, wanted for something else, or
  // purged, at most AddressSpaceOptions::decay later if somebody calls Tick, the open file lives on: the space of a
  // deleted file, locks of flock(2) and leases, its mount (EBUSY), and, if it was open for writing, that it cannot be
  // executed (ETXTBSY). Purge(kAll) ends that; AddressSpaceOptions::window_limit of 0 rules it out.
  //
  // Errors: kEmpty, kUnaligned (offset or address), kOutsideReservation, kOverlap, kNoRoom, kNoMetadata, kDenied (a
  // descriptor for writing only, or a shared mapping to write to by one for reading only), kUnsupported (hugetlbfs),
  // kSystem as mmap(2) and mlock(2) say: EBADF, EACCES, ENODEV, EOVERFLOW, EPERM, ENOMEM.
  Result<PageRange> MapFile(Pages count, const FileMapOptions& options);
  // Stores what was written to the shared file mappings in `range`, as msync(2); what is mapped otherwise needs it
  // not. Holds no lock: a mapping that takes the place of another meanwhile may be stored too. Errors: kEmpty,
  // kOverflow, kOutsideReservation, kNotMapped (part of it; the rest is stored), kSystem (EBUSY: locked memory
  // invalidated; EIO; what comes after is not stored).
  Error Sync(PageRange range, os::SyncOptions options = {});

  // Unmaps whatever is mapped in `range`: parts of VMAs, several VMAs, holes. What is pinned is no longer found, but
  // stays untouched until the last pin goes (vm/pin.h). Errors: kEmpty, kOverflow,
  // kOutsideReservation, kNoMetadata (a split needs metadata), kSystem. Fails as a whole per region; lookups may
  // find an unmap of many VMAs partly done.
  Error Unmap(PageRange range);

  // Changes the protection of `range`, which must be mapped throughout, else kNotMapped, and may be no more than the
  // backings in it allow, else kDenied. Fails as a whole per
  // region; lookups may find a change of many VMAs partly done.
  Error Protect(PageRange range, os::Protection protection);

  // Makes `range`, which lies in one VMA, `count` pages long, as mremap(2): the tail is unmapped, or grows into
  // free memory behind, or everything moves. Content, protection, lock and generation are kept; new pages are
  // zero, or show the next of the file; a kLocked mapping is populated before it returns. File mappings grow in place
  // unless they are locked or were ever private and writable, and the kernel moves them. A target becomes visible to lookups before the source
  // goes, and what others do to the source's content meanwhile may be lost. Errors: kEmpty, kOverflow, kUnaligned
  // (target), kOutsideReservation (source; target not inside one region), kNotMapped (also of several VMAs),
  // kOverlap (also of source and target), kPinned, kNoRoom, kUnsupported (kHint; keep_source, and the size changes or
  // nothing moves), kReplaced (others changed the source again and again), kNoMetadata, kSystem. All is as it was then,
  // but for the target of kReplace.
  Result<PageRange> Remap(PageRange range, Pages count, const RemapOptions& options = {});

  // The VMA that holds `page`; kNotMapped when there is none. Takes no lock and writes nothing.
  Result<VmaInfo> Lookup(PageNumber page) const;

  // The first VMA that ends after `page`; kNotMapped when there is none. Locks as Lookup; passes over free memory
  // extent by extent, so what is mapped and unmapped meanwhile may be missed.
  Result<VmaInfo> LookupNext(PageNumber page) const;

  // Makes the pages of `range` present, in chunks of at most 2 MiB, each under a shared range lock of that
  // chunk only. Returns the pages done. Errors: kNotMapped, kUnsupported (not writable; of files, whatever may be read
  // will do), kReplaced (unmapped or replaced meanwhile), kSystem (EFAULT: the file ends there; EIO), kDeadline,
  // kCancelled; then the pages done so far stay.
  Result<Pages> Populate(PageRange range, const PopulateOptions& options = {});

  // Drops the content of mapped read-write memory: it reads as zero, or as the file, afterwards and is not resident
  // (MADV_DONTNEED through the purge stage). Each range lies in one region. Errors: kNotMapped, kSystem,
  // kOutsideReservation, kEmpty, kUnsupported (memory of a pager).
  // Ranges that ascend within a region go into one call.
  Error Discard(absl::Span<const PageRange> ranges);

  // Says what `range` will be used for, as madvise(2): whatever is mapped in it is advised, VMA by VMA, and if
  // there was a hole too, the answer is kNotMapped. The kind of pages belongs to the zone that Map chose by
  // MapOptions::huge_pages: kHugePages holds in the dense zone already, kNoHugePages in the others, and where
  // the zone is of the other kind the hint is counted (ignored_advice) and not followed, since following it
  // would split the zone's kernel VMA for good. Errors: kEmpty, kOverflow, kOutsideReservation, kNotMapped,
  // kSystem (what comes after is not advised; EINVAL for locked memory, which cannot be dropped, freed, cold or
  // paged out).
  Error Advise(PageRange range, Advice advice);

  // Passes `advice`, a value of madvise(2) that Advise has no word for, to the kernel for whatever is mapped in
  // `range`, VMA by VMA, kOnce in pieces of 2 MiB. What lasts ends with the mapping: whoever gets the addresses next
  // gets memory without it. In a heap zone that takes a kernel VMA of its own meanwhile (heap_splits). Errors: as
  // Advise; kUnsupported for what a pager fills.
  Error AdviseKernel(PageRange range, int advice, AdviceEffect effect);

  // Which pages of `range` are resident now: 1 or 0 in the byte of each, as mincore(2). The range must be
  // mapped throughout. Takes no lock, so it is out of date when it returns. Errors: kEmpty, kOverflow,
  // kOutsideReservation, kNotMapped, kSystem. REQUIRES: `resident` has a byte for every page.
  Error Residency(PageRange range, absl::Span<std::uint8_t> resident) const;

  // Locks `range` into memory, as mlock(2) and mlock2(2); it must be mapped throughout. kLocked makes pages that
  // may be written present before it returns, outside every lock; others have content only if they were present
  // once, and those stay. Splits a heap zone's kernel VMA until the memory is unlocked or unmapped (heap_splits).
  // Locks do not nest, and are not inherited by the child of a fork. Errors: kEmpty (also for kNone), kOverflow,
  // kOutsideReservation, kNotMapped, kNoMetadata, kSystem (EPERM; ENOMEM: above RLIMIT_MEMLOCK). Fails as a whole
  // per region; lookups may find a change of many VMAs partly done.
  Error LockMemory(PageRange range, os::MemoryLock lock = os::MemoryLock::kLocked);
  // As munlock(2); the range must be mapped throughout. Fails as LockMemory.
  Error UnlockMemory(PageRange range);
  // As mlockall(2), for this space. Errors: kEmpty (nothing to lock), kNoMetadata, kSystem (as LockMemory; then the
  // VMAs before the refused one stay locked, and future mappings are what they were).
  Error LockAll(const LockAllOptions& options);
  // As munlockall(2). Errors: kNoMetadata, kSystem; then the VMAs after the refused one stay locked.
  Error UnlockAll();

  // Gives free memory back to the kernel; returns the pages given back.
  Pages Purge(PurgeScope scope);
  // Advances the coarse clock and purges what has decayed. Called by the runtime's keeper, or any ticker.
  void Tick();

  PageRange reservation() const { return reservation_; }
  bool Contains(const void* address) const { return reservation_.Contains(PageNumber::Of(address)); }
  // The region of `page`, which no mapping extends beyond. REQUIRES: the reservation contains the page.
  PageRange RegionAt(PageNumber page) const {
    const std::size_t region = (page - reservation_.first).value >> region_shift_;
    return PageRange::Of(reservation_.first + Pages{region << region_shift_}, {std::size_t{1} << region_shift_});
  }
  // Where `page` lives, mapped or not; one load and two comparisons. REQUIRES: the reservation contains the page.
  Zone ZoneAt(PageNumber page) const {
    const std::size_t region = (page - reservation_.first).value >> region_shift_;
    return region < zone_begin_[1] ? Zone::kPlain : region < zone_begin_[2] ? Zone::kDense : Zone::kMapping;
  }
  os::Kernel& kernel() const { return *kernel_; }
  // Keeps backings that a lookup reported from being destroyed while a reader is inside. Tick polls it.
  sync::EpochDomain& epochs() { return epochs_; }
  // See NotifierRegistration.
  NotifierList& notifiers() { return notifiers_; }
  AddressSpaceStats Stats() const;
  // What is in Stats(), and more: where it is kept. Sums over regions have a number for each region, in the order of
  // ForEachRegion.
  void ForEachMetric(MetricVisitor visit, void* context) const;
  void ForEachRegion(void (*visit)(void* context, const RegionLocation& region), void* context) const;
  // See RangeLockTimes; null unless asked for. For readers outside the process.
  const sync::LockTimesRecorder* lock_times() const { return lock_times_; }
  sync::LockPolicy lock_policy() const { return options_.lock_policy; }
  // How long tree locks were held since Create, all regions together; empty unless
  // AddressSpaceOptions::record_tree_lock_holds is set.
  sync::TimeHistogram TreeLockHolds() const;
  // How long `operation` waited for and held range locks since Create; empty unless
  // AddressSpaceOptions::record_range_locks is set. What takes no range lock (vm/README.md) does not count.
  sync::LockTimes RangeLockTimes(sync::Operation operation) const;

  // Copies every mapped VMA in ascending order to `out`, as far as there is room. Waits for nobody but holders of a
  // tree lock, and nobody waits for it longer than that. Each page is reported at most once, and as it was at some
  // moment during the call; if the result says `instant`, the same moment for all. It does unless others kept
  // changing the space during each of several attempts.
  SnapshotResult Snapshot(absl::Span<VmaInfo> out) const;

  // How often something that lookups see has changed: as long as this stays, a snapshot holds.
  std::uint64_t Changes() const;

  // Writes what is mapped as /proc/PID/maps does, line by line, backings named as they describe themselves. No lock
  // is held during a call of `write`.
  void WriteMaps(void (*write)(void* context, std::string_view line), void* context);

  // Calls `visit` for every mapped VMA in ascending order, from consistent copies of up to 64 VMAs of a region;
  // no lock is held during the call. Pages mapped all the time are visited once; no page is visited twice: of a
  // VMA that changes meanwhile, only the part above what was visited before.
  void ForEachVma(void (*visit)(void* context, const VmaInfo& vma), void* context) const;

  // fork(2): PrepareFork quiesces the space, so that the child's copy is consistent; exactly one of the
  // other two follows, in the parent and in the child.
  void PrepareFork();
  void ParentAfterFork();
  void ChildAfterFork();

  // CHECKs A1 and the counters of every region. O(extents); REQUIRES: no verb is running.
  void CheckInvariants() const;

 private:
  friend class FaultService;
  friend class Pin;
  friend class Transaction;

  struct ForkGuards;
  // On cache lines of its own: lockers of different regions write no common line.
  struct alignas(kCacheLineSize) PaddedRangeLock {
    explicit PaddedRangeLock(sync::LockPolicy policy) : lock(policy) {}
    sync::RangeLock lock;
  };

  explicit AddressSpace(os::Kernel& kernel, const AddressSpaceOptions& options)
      : kernel_(&kernel), options_(options) {}
  ~AddressSpace() = default;

  Error Init(PageRange reservation, MetadataArena* arena);
  Error InitFork();

  absl::Span<Region* const> regions() const { return {regions_, region_count_}; }
  absl::Span<Region* const> RegionsOf(Zone zone) const;
  Region* RegionOf(PageNumber page) const {
    return regions_[(page - reservation_.first).value >> region_shift_];
  }
  // kEmpty, kOverflow or kOutsideReservation, or fine.
  Error CheckRange(PageRange range) const;
  // Lookup by a holder of the page's range: see Region::LookupHeld.
  Result<VmaInfo> LookupHeld(PageNumber page, const sync::RangeLock::Guard& guard) const;
  // As CheckRange, or kNotMapped, or kUnsupported: `range` lies in one region and is mapped throughout, by no pager.
  // `guard`: of the range, or null in a read section of epochs().
  Error CheckDiscard(PageRange range, const sync::RangeLock::Guard* guard) const;
  // Map with whatever is not ordinary: a backing, notifiers, locks, populating, another protection or place.
  Result<PageRange> MapOrdinary(Pages count, const MapOptions& options);
  Result<PageRange> MapSpecial(Pages count, MapOptions options);
  void PopulateMapped(PageRange mapped);
  // What a mapping is locked as that was asked to be locked as `lock`.
  os::MemoryLock LockOf(os::MemoryLock lock) const {
    return lock != os::MemoryLock::kNone ? lock : future_lock_.load(std::memory_order_relaxed);
  }
  // file_mapping.cc
  Result<PageRange> TakeWindow(const FileKey& key);
  Result<PageRange> MapFileAnew(const os::FileInfo& info, const FileKey& key, const FileMapOptions& options);
  Error UnmapParts(PageRange range);
  // Whether a FaultService fills the VMA of `page`, for now.
  bool IsPaged(PageNumber page);
  // The service that is asked before and after `range` is dropped; null when nothing there can be paged.
  FaultHooks* HooksFor(PageRange range) const;
  // REQUIRES: no mapping is paged.
  void SetFaultHooks(FaultHooks* hooks);
  // Map without populating.
  Result<PageRange> Place(Pages count, const MapOptions& options);
  Result<PageRange> RemapVma(const VmaInfo& vma, PageRange range, Pages count, const RemapOptions& options);
  // Unmaps what is left of the mapping `generation` in `range`, and nothing else, as far as that goes.
  void UnmapOwn(PageRange range, std::uint64_t generation);
  Result<PageRange> MoveVma(const VmaInfo& vma, PageRange range, Pages count, const RemapOptions& options);
  Error MoveInto(const VmaInfo& vma, PageRange range, const VmaInfo& target_vma, PageRange target,
                 const RemapOptions& options);
  Error MoveHeld(const VmaInfo& vma, PageRange range, const VmaInfo& target_vma, PageRange target,
                 const RemapOptions& options, const sync::RangeLock::Guard& source_guard,
                 const sync::RangeLock::Guard& target_guard);
  // MoveHeld of a file mapping, into an anonymous one without access.
  Error MoveFileHeld(const VmaInfo& vma, PageRange range, PageRange target, const RemapOptions& options,
                     const sync::RangeLock::Guard& source_guard, const sync::RangeLock::Guard& target_guard);
  // Error: kSystem. The guards of MoveHeld cover both ranges; `renewed`: `to` has no access yet. May leave `from`
  // readable.
  Error CopyContent(const VmaInfo& vma, PageRange from, PageRange to, bool renewed);
  // Gives every VMA of the space `lock`, as it comes by; VMAs that go meanwhile are passed over.
  Error SetMemoryLockOfAll(os::MemoryLock lock);
  Error SetMemoryLock(PageRange range, os::MemoryLock lock);
  // Calls advise(part, vma), which may end `part` earlier, for each VMA in `range`; looks again after kReplaced.
  // Errors: kNotMapped at last, where there was a hole; others as `advise`, at once.
  template <typename AdviseOne>
  Error AdviseMapped(PageRange range, const AdviseOne& advise);
  // The VMA of `part`, if all of it still belongs to the VMA `generation`; else kReplaced.
  Result<VmaInfo> LookupSame(PageRange part, std::uint64_t generation, const sync::RangeLock::Guard& guard) const;
  // One piece of what Advise works on: as long as all of `part` belongs to the VMA `generation`; else kReplaced.
  Error AdvisePart(PageRange part, std::uint64_t generation, Advice advice);
  Error AdviseKernelPart(PageRange part, std::uint64_t generation, int advice);
  Result<PageRange> MapInZone(Zone zone, Pages count, const MapOptions& options);
  Result<PageRange> MapElsewhere(Zone zone, std::size_t own, Pages count, const MapOptions& options);
  Result<PageRange> MapNear(Pages count, const MapOptions& options);
  Result<PageRange> MapAt(Pages count, const MapOptions& options);
  Error PopulatePiece(PageRange piece, const VmaInfo& vma);
  Result<Pages> PopulateVma(PageRange part, std::uint64_t generation, const PopulateOptions& options,
                            Pages before);

  // Written by Init, constant afterwards.
  os::Kernel* const kernel_;
  const AddressSpaceOptions options_;
  PageRange reservation_;
  MetadataArena* arena_ = nullptr;
  PurgeStage* purge_stage_ = nullptr;
  FileBackingPool* file_backings_ = nullptr;
  PaddedRangeLock* range_locks_ = nullptr;  // one a region, or one for all (kCoarse)
  sync::LockTimesRecorder* lock_times_ = nullptr;  // theirs; null unless asked for
  Region** regions_ = nullptr;              // in address order, zone after zone
  std::size_t region_count_ = 0;
  std::size_t zone_begin_[kZoneCount + 1] = {};
  unsigned region_shift_ = 0;  // log2 of pages per region
  // Of new mappings; relaxed, any thread. Beside what every Map reads and nobody writes.
  std::atomic<os::MemoryLock> future_lock_{os::MemoryLock::kNone};
  std::atomic<FaultHooks*> fault_hooks_{nullptr};  // release and acquire
  sync::EpochDomain epochs_;
  NotifierList notifiers_{epochs_};
  sync::SpinLock fork_lock_{sync::LockRank::kFork};
  ForkGuards* fork_guards_ = nullptr;  // changed under fork_lock_

  // CLOCK_MONOTONIC in units of 2^24 ns, as of the last Tick.
  std::atomic<std::uint32_t> clock_{0};
  std::atomic<std::uint64_t> most_committed_{0};  // see Region::Shared
  // Relaxed, any thread. On a line of their own: every Unmap reads the clock.
  alignas(kCacheLineSize) std::atomic<std::uint64_t> remap_moves_{0};
  std::atomic<std::uint64_t> kernel_moves_{0};
  std::atomic<std::uint64_t> ignored_advice_{0};
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_ADDRESS_SPACE_H_
