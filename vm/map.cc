// Map: choose an extent, mark it pending, lock its range, check that it is still pending, prepare, publish.
//
// Anywhere: an extent that needs no preparation (clean or cached memory in committed space) is published in
// the critical section that chose it. No range lock is needed then: a free page belongs to nobody, and a verb
// that holds its range sees the state before or after, as if this Map had come earlier or later. Everything
// else becomes kPending and is prepared under its range lock only; a fixed Map that got the range first may
// have taken the extent away, which its generation tells. After kMaxAttempts lost races the whole region is
// locked instead, and nobody can interfere.
//
// Fixed: the range is locked first, then every free page in it is claimed (made pending), prepared without
// the tree lock, and the range is published as one extent, which grows over kExtentsPerHold old ones in a critical
// section. Old mappings stay visible to lookups until that moment.
#include <algorithm>
#include <optional>
#include <utility>

#include "vm/backing.h"
#include "vm/os/check.h"
#include "vm/region.h"

namespace freehold::vm {
namespace {

constexpr int kMaxAttempts = 3;

VmaAttributes AttributesOf(const MapOptions& options, RegionPage first, std::uint64_t generation) {
  VmaAttributes attributes = {.protection = options.protection, .lock = options.lock, .generation = generation};
  if (ABSL_PREDICT_FALSE(options.backing != nullptr)) {
    attributes.backing = options.backing;
    attributes.origin = static_cast<std::int64_t>(options.backing_page) - static_cast<std::int64_t>(first);
  }
  return attributes;
}

// Not under a tree lock: it may be the first touch of a page.
void TellGeneration(const MapOptions& options, std::uint64_t generation) {
  if (ABSL_PREDICT_FALSE(options.generation != nullptr)) *options.generation = generation;
}

// Up to this size a memset is cheaper than dropping and faulting, however little of it was resident.
constexpr std::size_t kMemsetPages = FreeRanges::kExactPages;

}  // namespace

// What is clean and as long as asked for needs nothing but to be published. Sizes whose memory gets touched are better
// off with extents that are resident.
Result<PageRange> Region::MapOrdinary(RegionPage count, const MapOptions& options) {
  if (ABSL_PREDICT_FALSE(count > FreeRanges::kExactPages || !maps_clean_ || options.alignment.value != 1)) {
    return MapAnywhere(count, options);
  }
  if (options.content != Content::kZeroed || ABSL_TS_UNCHECKED_READ(free_).ExpectsResident(count)) {
    return MapAnywhere(count, options);
  }
  Vma* vma;
  std::uint64_t generation = 0;
  RegionPage first = 0;
  {
    sync::SpinLockHolder holder(tree_lock_);
    vma = free_.Newest(count, Knowledge::kClean);
    if (ABSL_PREDICT_TRUE(vma != nullptr && vma->is_zones_own())) {
      // What is cached was mapped before.
      FREEHOLD_DCHECK(IsCommitted(vma->first_page(), vma->end_page()));
      free_.RemoveNewest(count, Knowledge::kClean);
      reuses_.Add(1);
      first = vma->first_page();
      generation = NextGenerationLocked();
      PublishLocked(vma, count, {.generation = generation});
    }
  }
  if (ABSL_PREDICT_FALSE(generation == 0)) return MapAnywhere(count, options);
  TellGeneration(options, generation);
  return ToAbsolute(first, count);
}

// One variable, returned everywhere, is built in the caller's frame: copying a result that was just written costs
// more than a tenth of a map.
Result<PageRange> Region::MapAnywhere(RegionPage count, const MapOptions& options) {
  const bool coarse = range_lock_.policy() == sync::LockPolicy::kCoarse;
  Result<PageRange> mapped = coarse ? MapUndisturbed(count, options) : MapOnce(count, options, nullptr);
  for (int attempt = 1; ABSL_PREDICT_FALSE(mapped.error().code == ErrorCode::kReplaced); ++attempt) {
    if (attempt < kMaxAttempts) {
      mapped = MapOnce(count, options, nullptr);
      continue;
    }
    mapped = MapUndisturbed(count, options);
    sync::SpinLockHolder holder(tree_lock_);
    coarse_retries_.Add(1);
  }
  return mapped;
}

Result<PageRange> Region::MapUndisturbed(RegionPage count, const MapOptions& options) {
  const Guard guard(range_lock_, range_, Mode::kExclusive, sync::Operation::kMap);
  return MapOnce(count, options, &guard);
}

Result<PageRange> Region::MapOnce(RegionPage count, const MapOptions& options, const Guard* held) {
  Preparation preparation;
  Remedies left;
  for (;;) {
    Choice choice;
    {
      sync::SpinLockHolder holder(tree_lock_);
      choice = ChooseLocked(count, options, left, preparation);
    }
    // Before anybody touches what is fresh.
    if (ABSL_PREDICT_FALSE(preparation.excess != 0)) PurgeExcess(std::exchange(preparation.excess, 0));
    switch (choice) {
      case Choice::kPublished:
        TellGeneration(options, preparation.attributes.generation);
        return ToAbsolute(preparation.first, count);
      case Choice::kPrepare: {
        TellGeneration(options, preparation.attributes.generation);
        preparation.range = ToAbsolute(preparation.first, count);
        if (held != nullptr) return Finish(preparation, *held);
        const Guard guard(range_lock_, preparation.range, Mode::kExclusive, sync::Operation::kMap);
        return Finish(preparation, guard);
      }
      case Choice::kCommitFirst: {
        const PageRange range = ToAbsolute(preparation.first, count);
        if (held != nullptr) {
          (void)Commit(range);
        } else {
          const Guard guard(range_lock_, range, Mode::kExclusive, sync::Operation::kMap);
          (void)Commit(range);
        }
        left.commit = false;
        break;
      }
      case Choice::kCleanFirst:
        CleanBin(count);
        left.clean = false;
        break;
      case Choice::kPurgeFirst:
        (void)PurgeFree(UINT32_MAX, {0}, FreeRanges::kExactPages);
        left.purge = false;
        break;
      case Choice::kNoMetadata:
        if (const Error error = Refill(); !error.ok()) return error;
        break;
      case Choice::kNoRoom:
        return ErrorCode::kNoRoom;
    }
  }
}

Region::Choice Region::ChooseLocked(RegionPage count, const MapOptions& options, const Remedies& left,
                                    Preparation& out) {
  if (!HasMetadataLocked()) return Choice::kNoMetadata;
  // Of a size that is cut to fit, and for somebody who takes what is resident.
  const bool fills = is_heap() && count > FreeRanges::kExactPages && options.content == Content::kAnything;
  Vma* vma = TakeCachedLocked(count, options);
  bool fresh = false;
  if (vma == nullptr && fills) {
    const Extensible cached = FindExtensibleLocked(count, options.alignment.value);
    // It is cached as a whole later, and what is cached was mapped.
    fresh = cached.vma != nullptr && IsCommitted(cached.first, cached.first + count);
    if (fresh) vma = TakeExtendedLocked(cached, count);
    if (cached.vma != nullptr && !fresh && left.commit) {
      out.first = cached.first;
      return Choice::kCommitFirst;
    }
  }
  if (vma != nullptr) {
    reuses_.Add(1);
  } else {
    fresh = true;
    if (left.clean && WorthCleaningLocked(count)) return Choice::kCleanFirst;
    vma = CarveLocked(count, options.alignment.value);
    if (vma == nullptr) return Choice::kNoRoom;
    if (left.purge && WorthPurgingLocked(*vma)) {
      FreeLocked(vma);
      return Choice::kPurgeFirst;
    }
  }
  if (fills) {
    const std::uint64_t mapped = mapped_pages_.get() + count;
    if (mapped > most_mapped_.load(std::memory_order_relaxed)) most_mapped_.store(mapped, std::memory_order_relaxed);
    out.excess = fresh ? ExcessLocked(count) : 0;
  }
  out.vma = vma;
  out.first = vma->first_page();
  out.attributes = AttributesOf(options, out.first, NextGenerationLocked());
  // What another mapping left in the kernel goes, with its content; a backing takes its place by itself.
  out.reset = vma->foreign && options.backing == nullptr;
  out.zero = options.content == Content::kZeroed && vma->knowledge != Knowledge::kClean && !out.reset &&
             options.backing == nullptr;
  // Many chunks are looked at without the tree lock, in Commit.
  out.commit = (is_heap() && vma->page_count() >> chunk_shift_ > kChunksPerHold) ||
               !IsCommitted(vma->first_page(), vma->end_page());
  const os::Protection now = is_heap() ? os::Protection::kReadWrite : os::Protection::kNone;
  out.protect = (vma->kernel_vma || out.reset || options.protection != now) && options.backing == nullptr;
  out.unguard = is_heap() && shared_.options->strict_unmap;
  // Of free memory, a lock that is known may be gone by now.
  out.relock = vma->locked() || options.lock != os::MemoryLock::kNone;
  if (!out.needed()) {
    PublishLocked(vma, vma->page_count(), out.attributes);
    return Choice::kPublished;
  }
  VmaWriter(*vma).SetGeneration(out.attributes.generation);
  return Choice::kPrepare;
}

// Which of the cached extents serves best depends on what the caller will do: users who touch their memory
// get resident pages (a memset is cheaper than faults), others get clean ones (nothing to do at all).
Vma* Region::TakeCachedLocked(RegionPage count, const MapOptions& options) {
  using enum Knowledge;
  static constexpr Knowledge kResidentFirst[] = {kResident, kUnknown, kClean};
  static constexpr Knowledge kCleanOnly[] = {kClean};
  const bool dirty_is_fine =
      options.content == Content::kAnything || free_.ExpectsResident(count);
  const absl::Span<const Knowledge> order =
      dirty_is_fine ? absl::MakeConstSpan(kResidentFirst) : absl::MakeConstSpan(kCleanOnly);
  for (const Knowledge knowledge : order) {
    Vma* vma = free_.Take(count, knowledge, options.alignment.value, range_.first.value);
    if (vma == nullptr) continue;
    VmaWriter(*vma).SetState(VmaState::kPending);
    if (vma->page_count() > count) CacheLocked(SplitLocked(vma, vma->first_page() + count), knowledge);
    return vma;
  }
  return nullptr;
}

// Only for who takes any content: of an extent that was extended, nobody knows which part is clean.
Region::Extensible Region::FindExtensibleLocked(RegionPage count, std::uint64_t alignment) const {
  Extensible found;
  // Beyond, a look at what is committed takes too long for a hold.
  if (count >> chunk_shift_ >= kChunksPerHold) return found;
  found.vma = free_.FindSmaller(count, [&](const Vma* cached) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    return PlaceAroundLocked(cached, count, alignment, found.first);
  });
  return found;
}

// The lowest place that covers all of the extent: what is free stays whole behind it.
bool Region::PlaceAroundLocked(const Vma* cached, RegionPage count, std::uint64_t alignment, RegionPage& first) const {
  if (!cached->is_zones_own()) return false;
  std::uint64_t low = cached->first_page();
  std::uint64_t high = cached->end_page();
  VmaTree::Path path = tree_.Find(cached->first_page());
  if (tree_.Previous(path) && path.vma()->Is(VmaState::kFree)) low = path.vma()->first_page();
  const Vma* behind = NextLocked(cached);
  if (behind != nullptr && behind->Is(VmaState::kFree)) high = behind->end_page();
  if (cached->end_page() > count) low = std::max<std::uint64_t>(low, cached->end_page() - count);
  low += range_.first.value;
  low = ((low + alignment - 1) & ~(alignment - 1)) - range_.first.value;
  if (low > cached->first_page() || low + count > high) return false;
  first = static_cast<RegionPage>(low);
  return true;
}

//   before   | mapped |  free   | cached |  free  | mapped |
//   after    | mapped |  | pending          |free | mapped |
//                     cached.first
Vma* Region::TakeExtendedLocked(const Extensible& cached, RegionPage count) {
  const RegionPage first = cached.first;
  Vma* vma = cached.vma;
  free_.Remove(vma);
  SetStateLocked(vma, VmaState::kPending);
  if (first < vma->first_page()) {
    Vma* before = tree_.Find(first).vma();
    if (before->first_page() < first) before = SplitLocked(before, first);
    SetStateLocked(before, VmaState::kPending);
    AbsorbNextLocked(before);
    vma = before;
  }
  if (first + count > vma->end_page()) {
    Vma* behind = NextLocked(vma);
    if (first + count < behind->end_page()) SplitLocked(behind, first + count);
    AbsorbNextLocked(vma);
  }
  vma->knowledge = Knowledge::kUnknown;
  return vma;
}

Vma* Region::CarveLocked(RegionPage count, std::uint64_t alignment) {
  VmaTree::Path path;
  if (!tree_.FindGap(count, alignment, range_.first.value, path)) return nullptr;
  Vma* vma = path.vma();
  const std::uint64_t first = range_.first.value + vma->first_page();
  const std::uint64_t aligned = (first + alignment - 1) & ~(alignment - 1);
  if (aligned > first) vma = SplitLocked(vma, vma->first_page() + static_cast<RegionPage>(aligned - first));
  if (vma->page_count() > count) SplitLocked(vma, vma->first_page() + count);
  SetStateLocked(vma, VmaState::kPending);
  return vma;
}

Result<PageRange> Region::Finish(const Preparation& preparation, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(preparation.range, Mode::kExclusive));
  Vma* vma = preparation.vma;
  // While the range is held exclusively, nobody takes the extent away: the check needs no tree lock.
  const VmaAttributes& attributes = preparation.attributes;
  if (vma->generation.load(std::memory_order_acquire) != attributes.generation) {
    return ErrorCode::kReplaced;
  }
  const Error error = Prepare(preparation);
  // What could not be committed was not untrapped either; a guard there would trap the next Commit.
  const bool untrapped = preparation.unguard && IsCommitted(vma->first_page(), vma->end_page());
  // Of a backing that was refused, or got no lock, the kernel may have anything.
  const bool replaced = preparation.reset || attributes.backing != nullptr;
  const bool foreign = error.ok() ? attributes.backing != nullptr || (vma->foreign && !replaced)
                                  : replaced ? !ReplaceForeign(preparation.range).ok() : vma->foreign;
  const bool locked = attributes.lock != os::MemoryLock::kNone;
  const bool still_locked = !error.ok() && preparation.relock && locked && !(replaced && !foreign) &&
                            !shared_.kernel->UnlockMemory(preparation.range).ok();
  if (!error.ok() && untrapped) (void)Trap(preparation.range);
  sync::SpinLockHolder holder(tree_lock_);
  vma->foreign = foreign;
  if (!error.ok()) {
    vma->kernel_vma = vma->kernel_vma || (replaced && is_heap());
    if (still_locked) VmaWriter(*vma).SetLock(attributes.lock);
    GiveBackLocked(vma);
    return error;
  }
  if (preparation.zero) {
    zeroed_pages_.Add(vma->page_count());
    vma->knowledge = Knowledge::kResident;
  }
  vma->kernel_vma = is_heap() ? attributes.protection != os::Protection::kReadWrite
                              : attributes.protection != os::Protection::kNone || locked;
  if (is_heap() && (preparation.protect || locked)) heap_splits_.Add(1);
  PublishLocked(vma, vma->page_count(), attributes);
  return preparation.range;
}

Error Region::Prepare(const Preparation& preparation) {
  const PageRange range = preparation.range;
  const VmaAttributes& attributes = preparation.attributes;
  if (preparation.commit) {
    if (const Error error = Commit(range); !error.ok()) return error;
  }
  if (preparation.unguard) {
    if (const Error error = Untrap(range); !error.ok()) return error;
  }
  if (preparation.reset) {
    if (const Error error = ReplaceForeign(range); !error.ok()) return error;
  }
  if (attributes.backing != nullptr) {
    const auto page = static_cast<std::uint64_t>(attributes.origin + preparation.first);
    const Error error =
        attributes.backing->Install(*shared_.kernel, range, page, attributes.protection, /*occupied=*/false);
    if (!error.ok()) return error;
  }
  if (preparation.relock) {
    if (const Error error = LockInKernel(range, attributes.lock); !error.ok()) return error;
  }
  // Zeroing writes: the pages must be writable, then get the protection asked for.
  const bool zero_by_discard = preparation.zero && !Has(attributes.protection, os::Protection::kWrite);
  if (preparation.protect) {
    if (const Error error = shared_.kernel->Protect(range, attributes.protection); !error.ok()) {
      return error;
    }
  }
  if (zero_by_discard) return shared_.purge_stage->Discard({&range, 1});
  // Chosen dirty on purpose (TakeCachedLocked): its pages are worth keeping, whatever their number.
  if (preparation.zero) shared_.kernel->Zero(range);
  return Error::Ok();
}

Error Region::MakeZero(PageRange range, bool writable) {
  if (writable && range.count().value <= kMemsetPages) {
    shared_.kernel->Zero(range);
    return Error::Ok();
  }
  return shared_.purge_stage->Discard({&range, 1});
}

Result<PageRange> Region::MapFixed(PageRange range, const MapOptions& options) {
  const Guard guard(range_lock_, range, Mode::kExclusive, sync::Operation::kMap);
  return MapHeld(range, options, 0, guard);
}

Result<PageRange> Region::MapHeld(PageRange range, const MapOptions& options, std::uint64_t generation,
                                  const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(range, Mode::kExclusive));
  const RegionPage first = ToRegion(range.first);
  const RegionPage end = ToRegion(range.end);
  Result<Claim> claim = ClaimFixed(first, end, options.placement);
  if (!claim.ok()) return claim.error();
  const bool notified = claim->occupied && !shared_.notifiers->empty();
  if (notified) Invalidate(range, Invalidation::kReplace, guard);
  if (claim->backed) FlushBackings(range, guard);
  const Error error = PrepareFixed(range, options, *claim, guard);
  if (!error.ok()) {
    Unclaim(*claim);
    return error;
  }
  PublishFixed(*claim, options, generation);
  TellGeneration(options, generation != 0 ? generation : claim->generation);
  if (notified) shared_.notifiers->Close(range);
  return range;
}

Result<Region::Claim> Region::ClaimFixed(RegionPage first, RegionPage end, Placement placement) {
  Claim claim = {.first = first, .end = end, .placement = placement, .next = first};
  for (;;) {
    ClaimResult result;
    {
      sync::SpinLockHolder holder(tree_lock_);
      result = ClaimLocked(claim);
    }
    Error error;
    switch (result) {
      case ClaimResult::kClaimed:
        return claim;
      case ClaimResult::kMore:
        break;
      case ClaimResult::kOverlap:
        error = {ErrorCode::kOverlap};
        break;
      case ClaimResult::kPinned:
        error = {ErrorCode::kPinned};
        break;
      case ClaimResult::kPurging:
        WaitForPurges();
        break;
      case ClaimResult::kNoMetadata:
        error = Refill();
        break;
    }
    if (error.ok()) continue;
    Unclaim(claim);
    return error;
  }
}

// Makes everything in the range that is not mapped pending, up to kExtentsPerHold extents at a time.
Region::ClaimResult Region::ClaimLocked(Claim& claim) {
  ClaimResult refusal;
  if (claim.generation == 0 && !StartClaimLocked(claim, refusal)) return refusal;
  for (int visits = 0; claim.next < claim.end; ++visits) {
    if (visits == kExtentsPerHold) return ClaimResult::kMore;
    const Vma* vma = tree_.Find(claim.next).vma();
    if (!MayClaim(*vma, claim.placement, refusal)) return refusal;
    claim.next = ClaimExtentLocked(claim.next, claim)->end_page();
  }
  return ClaimResult::kClaimed;
}

bool Region::MayClaim(const Vma& vma, Placement placement, ClaimResult& refusal) {
  switch (vma.state.load(std::memory_order_relaxed)) {
    case VmaState::kPurging: refusal = ClaimResult::kPurging; return false;
    case VmaState::kDeferred: refusal = ClaimResult::kPinned; return false;
    case VmaState::kMapped: refusal = ClaimResult::kOverlap; return placement == Placement::kReplace;
    default: return true;
  }
}

// Makes the ends of the range borders, and claims the extents there, so that nothing grows across them later.
// What can be seen at once to be in the way is refused before anything changes.
//   before   |   kPending   |            chosen by a Map that waits: it loses its pages, whole, and tries again
//                first    end
//   after    | cached | claimed | cached |
bool Region::StartClaimLocked(Claim& claim, ClaimResult& refusal) {
  refusal = ClaimResult::kPinned;
  if (IsPinnedLocked(ToAbsolute(claim.first, claim.end - claim.first))) return false;
  refusal = ClaimResult::kNoMetadata;
  if (!HasMetadataLocked()) return false;
  RegionPage page = claim.first;
  for (int visits = 0; page < claim.end; ++visits) {
    const Vma* vma = tree_.Find(visits < kExtentsPerHold ? page : claim.end - 1).vma();
    if (!MayClaim(*vma, claim.placement, refusal)) return false;
    page = visits < kExtentsPerHold ? vma->end_page() : claim.end;
  }
  for (const RegionPage border : {claim.first, claim.end - 1}) {
    Vma* vma = tree_.Find(border).vma();
    if (vma->Is(VmaState::kPending)) {
      GiveBackLocked(vma);
    } else if (vma->Is(VmaState::kWindow)) {
      AbandonWindowLocked(vma);
    }
  }
  IsolateLocked(claim.first, claim.end);
  claim.generation = NextGenerationLocked();
  for (const RegionPage border : {claim.first, claim.end - 1}) ClaimExtentLocked(border, claim);
  SetBusyLocked(claim.first, claim.end, true);
  return true;
}

// Claims the extent of `page`, unless it is mapped, and looks what it was. Returns it.
Vma* Region::ClaimExtentLocked(RegionPage page, Claim& claim) {
  Vma* vma = tree_.Find(page).vma();
  const bool pending = vma->Is(VmaState::kPending);
  if (pending && vma->generation.load(std::memory_order_relaxed) == claim.generation) return vma;
  if (pending) {
    GiveBackLocked(vma);
    vma = tree_.Find(page).vma();
  }
  if (vma->Is(VmaState::kWindow)) AbandonWindowLocked(vma);
  const bool mapped = vma->Is(VmaState::kMapped);
  claim.clean = claim.clean && !mapped && vma->knowledge == Knowledge::kClean && vma->is_zones_own();
  claim.locked = claim.locked || vma->locked() || vma->unrestored;
  // Anonymous memory with a kernel VMA of its own may have advice that must not last beyond it.
  claim.backed = claim.backed || vma->attributes().backing != nullptr || vma->foreign;
  claim.occupied = claim.occupied || mapped;
  if (mapped) return vma;
  if (vma->Is(VmaState::kCached)) free_.Remove(vma);
  SetStateLocked(vma, VmaState::kPending);
  VmaWriter(*vma).SetGeneration(claim.generation);
  return vma;
}

// Undoes ClaimFixed, however far it came.
void Region::Unclaim(const Claim& claim) {
  if (claim.generation == 0) return;
  for (RegionPage page = claim.first; page < claim.end;) {
    sync::SpinLockHolder holder(tree_lock_);
    if (page == claim.first) SetBusyLocked(claim.first, claim.end, false);
    for (int visits = 0; page < claim.end && visits < kExtentsPerHold; ++visits) {
      Vma* vma = tree_.Find(page).vma();
      page = vma->end_page();
      if (vma->Is(VmaState::kPending) && vma->generation.load(std::memory_order_relaxed) == claim.generation) {
        GiveBackLocked(vma);
      }
    }
    if (page < claim.end) continue;
    for (const RegionPage border : {claim.first, claim.end}) MergeMappedLocked(border, border);
  }
}

// One write makes the first extent the new mapping of all that one hold is about; the others, hidden by it or
// still seen as what they were, then go. The next hold lets it grow. `continued`: the generation of the mapping
// before it of which it becomes a part; 0 for none.
void Region::PublishFixed(const Claim& claim, const MapOptions& options, std::uint64_t continued) {
  for (RegionPage page = claim.first; page < claim.end;) {
    DroppedPages<kExtentsPerHold> replaced;  // dropped when the lock is
    sync::SpinLockHolder holder(tree_lock_);
    PublishFixedLocked(claim, options, continued, page, replaced);
  }
}

// What one hold does, from `page` on.
void Region::PublishFixedLocked(const Claim& claim, const MapOptions& options, std::uint64_t continued,
                                RegionPage& page, DroppedPages<kExtentsPerHold>& replaced) {
  const os::Protection protection = options.protection;
  const bool locked = options.lock != os::MemoryLock::kNone;
  Vma* vma = tree_.Find(claim.first).vma();
  const RegionPage from = page;
  for (int visits = 0; page < claim.end && visits < kExtentsPerHold; ++visits) {
    const Vma* old = tree_.Find(page).vma();
    page = old->end_page();
    if (!old->Is(VmaState::kMapped)) continue;
    replaced.Add(old->attributes().backing, old->page_count());
    mapped_pages_.Subtract(old->page_count());
    if (old == vma) vmas_.Subtract(1);
  }
  if (from == claim.first) {
    vma->knowledge = Knowledge::kUnknown;
    // In the mapping zone, old content (Content::kAnything) may lie behind a protection of kNone.
    vma->kernel_vma = is_heap() ? protection != os::Protection::kReadWrite
                                : protection != os::Protection::kNone || !claim.clean || locked;
    vma->foreign = options.backing != nullptr;
    vma->unrestored = false;
    if (is_heap() && (vma->kernel_vma || locked)) heap_splits_.Add(1);
    PublishLocked(vma, page - from,
                  AttributesOf(options, claim.first, continued != 0 ? continued : claim.generation));
  } else {
    VmaWriter(*vma).SetRange(claim.first, page - claim.first);
    changes_.Add(1);
    mapped_pages_.Add(page - from);
  }
  while (NextLocked(vma) != nullptr && NextLocked(vma)->first_page() < page) DropNextLocked(vma);
  if (page < claim.end) return;
  vma->busy = false;
  if (continued != 0) MergeMappedLocked(claim.first, claim.end);
}

// The kernel's side of a fixed mapping, steps that can fail first. On error the old mappings have their
// protection and content: content goes last.
Error Region::PrepareFixed(PageRange range, const MapOptions& options, Claim& claim, const Guard& guard) {
  if (const Error error = PrepareAccess(range, options, claim, guard); !error.ok()) return error;
  const Error error = PrepareContent(range, options, claim);
  if (!error.ok()) UndoAccess(range, options, claim, guard);
  return error;
}

Error Region::PrepareContent(PageRange range, const MapOptions& options, const Claim& claim) {
  if (claim.clean || claim.backed || options.backing != nullptr || options.content == Content::kAnything) {
    return Error::Ok();
  }
  return MakeZero(range, Has(options.protection, os::Protection::kWrite));
}

// Can be undone, but for what a backing replaces, or is replaced by.
Error Region::PrepareAccess(PageRange range, const MapOptions& options, Claim& claim, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(range, Mode::kExclusive));
  if (!IsCommitted(ToRegion(range.first), ToRegion(range.end))) {
    if (const Error error = Commit(range); !error.ok()) return error;
  }
  const os::Protection now = is_heap() ? os::Protection::kReadWrite : os::Protection::kNone;
  const bool replaced = claim.backed || options.backing != nullptr;
  // What is replaced takes its traps with it, and may not allow any access.
  if (is_heap() && shared_.options->strict_unmap && !replaced) {
    if (const Error error = Untrap(range); !error.ok()) {
      RestoreProtection(range, guard);
      return error;
    }
  }
  Error error;
  // Also before a replacement, which takes the lock away: so the limit is known while nothing is lost.
  if (claim.locked || options.lock != os::MemoryLock::kNone) error = LockInKernel(range, options.lock);
  if (error.ok() && replaced) {
    error = ReplaceInKernel(range, options, claim);
  } else if (error.ok() && (!claim.clean || options.protection != now)) {
    error = shared_.kernel->Protect(range, options.protection);
  }
  if (!error.ok()) UndoAccess(range, options, claim, guard);
  return error;
}

void Region::UndoAccess(PageRange range, const MapOptions& options, const Claim& claim, const Guard& guard) {
  if (claim.backed || options.backing != nullptr) RestoreContent(range, claim.lost);
  if (claim.locked || options.lock != os::MemoryLock::kNone) RestoreLocks(range, guard);
  RestoreProtection(range, guard);
}

// A backing, or anonymous memory, takes the place of another kernel VMA.
Error Region::ReplaceInKernel(PageRange range, const MapOptions& options, Claim& claim) {
  // A pager begins with free memory: what was there goes first, so that it is known to be gone if the pager is refused.
  const bool resets = options.backing == nullptr || options.backing->paged();
  Error error;
  if (resets) error = ReplaceForeign(range);
  claim.lost = resets && error.ok();
  if (error.ok() && options.backing != nullptr) {
    error = options.backing->Install(*shared_.kernel, range, options.backing_page, options.protection,
                                     claim.occupied && !resets);
    claim.lost = claim.lost || error.ok();
  }
  if (error.ok() && options.backing == nullptr && options.protection != os::Protection::kNone) {
    error = shared_.kernel->Protect(range, options.protection);
  }
  return error.ok() && options.lock != os::MemoryLock::kNone ? LockInKernel(range, options.lock) : error;
}

// The way back from a replacement. Free pages must be clean again. `lost`: what was mapped there is gone from the
// kernel; backings show theirs again, as far as they can, and anonymous memory has lost its content.
void Region::RestoreContent(PageRange range, bool lost) {
  for (PageNumber page = range.first; page < range.end;) {
    VmaState state;
    const VmaInfo extent = LookupExtent(page, state);
    const PageRange part = extent.range.Intersect(range);
    page = part.end;
    const bool mapped = state == VmaState::kMapped;
    if (mapped && !lost) continue;
    // A file's descriptor is its owner's again: what shows it is lost as well.
    if (mapped && extent.backing != nullptr && extent.backing->AsFile() == nullptr) {
      const std::uint64_t first = extent.backing_page + (part.first - extent.range.first).value;
      (void)extent.backing->Install(*shared_.kernel, part, first, extent.protection, /*occupied=*/false);
      continue;
    }
    const bool own = ReplaceForeign(part).ok() &&
                     (!is_heap() || shared_.kernel->Protect(part, os::Protection::kReadWrite).ok());
    // The borders of the range are borders of extents.
    sync::SpinLockHolder holder(tree_lock_);
    Vma* vma = tree_.Find(ToRegion(part.first)).vma();
    vma->foreign = !own || extent.backing != nullptr;
    vma->kernel_vma = vma->kernel_vma || !own;
  }
}

// Before the content of what is mapped in `range` goes.
void Region::FlushBackings(PageRange range, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(range, Mode::kShared));
  for (PageNumber page = range.first; page < range.end;) {
    VmaState state;
    const VmaInfo extent = LookupExtent(page, state);
    const PageRange part = extent.range.Intersect(range);
    page = part.end;
    if (extent.backing == nullptr || (state != VmaState::kMapped && state != VmaState::kDetached)) continue;
    extent.backing->Flush(*shared_.kernel, part, extent.backing_page + (part.first - extent.range.first).value);
  }
}

// A refusal leaves more access than promised or less, until it is unmapped or used again.
void Region::RestoreProtection(PageRange range, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(range, Mode::kExclusive));
  const os::Protection free = is_heap() ? os::Protection::kReadWrite : os::Protection::kNone;
  for (PageNumber page = range.first; page < range.end;) {
    VmaState state;
    const VmaInfo extent = LookupExtent(page, state);
    const PageRange part = extent.range.Intersect(range);
    page = part.end;
    const bool mapped = state == VmaState::kMapped;
    const bool trapped = !mapped && is_heap() && shared_.options->strict_unmap && Trap(part);
    if (trapped) continue;
    if (!shared_.kernel->Protect(part, mapped ? extent.protection : free).ok()) ResetLater(part, guard);
  }
}

void Region::ResetLater(PageRange part, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(part, Mode::kExclusive));
  sync::SpinLockHolder holder(tree_lock_);
  // Of an extent that is larger by now, all is reset.
  Vma* vma = tree_.Find(ToRegion(part.first)).vma();
  (vma->Is(VmaState::kMapped) ? vma->unrestored : vma->foreign) = true;
}

// Undoes Trap, whichever way it went.
Error Region::Untrap(PageRange range) {
  if (shared_.kernel->features().guard_regions) {
    if (const Error error = shared_.kernel->RemoveGuard(range); !error.ok()) return error;
  }
  return shared_.kernel->Protect(range, os::Protection::kReadWrite);
}

}  // namespace freehold::vm
