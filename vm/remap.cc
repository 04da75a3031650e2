// Remap: shrink, grow in place, or move.
//
// Growing maps the pages behind as a fixed Map does, under the range lock of old and new pages together, and
// publishes them with the generation of the VMA that they continue. Moving maps a target like any other mapping,
// then locks source and target, checks both by generation, moves the content, lets the target
// take the source's generation, and unmaps the source.
//
// Content moves in one of two ways. The kernel moves page tables in a few microseconds, whatever is swapped out or
// was never touched, but takes mmap_lock for writing and leaves a kernel VMA of its own at the target until that is
// unmapped. Copying costs per page, and has neither cost: up to kCopyPages it is used where it can be.
#include <algorithm>

#include "vm/address_space.h"
#include "vm/backing.h"
#include "vm/file_mapping.h"
#include "vm/os/check.h"
#include "vm/purge_stage.h"
#include "vm/region.h"

namespace freehold::vm {
namespace {

using Guard = sync::RangeLock::Guard;
using Mode = sync::RangeLock::Mode;

constexpr int kMaxAttempts = 3;
constexpr Pages kCopyPages = {KiB(256).value / kPageSize};

}  // namespace

Result<PageRange> AddressSpace::Remap(PageRange range, Pages count, const RemapOptions& options) {
  if (const Error error = CheckRange(range); !error.ok()) return error;
  if (count.value == 0) return ErrorCode::kEmpty;
  if (count >= reservation_.count()) return ErrorCode::kNoRoom;
  const bool moves = options.may_move || options.placement != Placement::kAnywhere;
  if (options.placement == Placement::kHint) return ErrorCode::kUnsupported;
  if (options.keep_source && (!moves || count != range.count())) return ErrorCode::kUnsupported;
  for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
    const sync::EpochDomain::ReadGuard reader(epochs_);
    const Result<VmaInfo> vma = Lookup(range.first);
    if (!vma.ok()) return vma.error();
    if (!vma->range.Contains(range)) return ErrorCode::kNotMapped;
    const Result<PageRange> remapped = RemapVma(*vma, range, count, options);
    if (!remapped.ok() && remapped.error().code == ErrorCode::kReplaced) continue;
    if (remapped.ok() && vma->lock == os::MemoryLock::kLocked) (void)Advise(*remapped, Advice::kWillNeed);
    return remapped;
  }
  return ErrorCode::kReplaced;
}

Result<PageRange> AddressSpace::RemapVma(const VmaInfo& vma, PageRange range, Pages count,
                                         const RemapOptions& options) {
  if (options.placement != Placement::kAnywhere || options.keep_source) return MoveVma(vma, range, count, options);
  const PageRange wanted = PageRange::Of(range.first, count);
  if (count <= range.count()) {
    if (count < range.count()) {
      if (const Error error = Unmap({wanted.end, range.end}); !error.ok()) return error;
    }
    return wanted;
  }
  const Result<PageRange> grown = RegionOf(range.first)->Grow(range, count, vma);
  if (grown.ok() && !notifiers_.empty()) notifiers_.Map({range.end, grown->end});
  if (grown.ok() || grown.error().code != ErrorCode::kNoRoom || !options.may_move) return grown;
  return MoveVma(vma, range, count, options);
}

Result<PageRange> AddressSpace::MoveVma(const VmaInfo& vma, PageRange range, Pages count,
                                        const RemapOptions& options) {
  MapOptions map;
  map.placement = options.placement;
  map.address = options.address;
  map.protection = vma.protection;
  map.lock = vma.lock;
  // Looked at again when both ranges are held, but as a rule before anything is mapped or replaced for nothing.
  if (RegionOf(range.first)->IsPinned(range)) return ErrorCode::kPinned;
  if (vma.backing != nullptr) {
    if (vma.backing->AsFile() == nullptr) return ErrorCode::kUnsupported;
    map.protection = os::Protection::kNone;
    map.lock = os::MemoryLock::kNone;
  }
  // Whatever others do to the target before it is held, content goes nowhere else.
  VmaInfo target_vma;
  target_vma.protection = map.protection;
  target_vma.lock = map.lock;
  map.generation = &target_vma.generation;
  Result<PageRange> target = ErrorCode::kNoRoom;
  if (options.placement == Placement::kAnywhere) {
    target = MapInZone(vma.backing != nullptr ? Zone::kMapping : vma.zone, count, map);
  } else {
    if (PageRange::Of(PageNumber::Of(options.address), count).Overlaps(range)) return ErrorCode::kOverlap;
    target = MapAt(count, map);
  }
  if (!target.ok()) return target;
  const Error error = MoveInto(vma, range, target_vma, *target, options);
  if (error.ok()) {
    remap_moves_.fetch_add(1, std::memory_order_relaxed);
    if (!notifiers_.empty()) notifiers_.Map(*target);
    return target;
  }
  UnmapOwn(*target, target_vma.generation);
  return error;
}

void AddressSpace::UnmapOwn(PageRange range, std::uint64_t generation) {
  for (PageNumber page = range.first; page < range.end;) {
    VmaState state;
    const VmaInfo extent = RegionOf(page)->LookupExtent(page, state);
    const PageRange part = {page, std::min(extent.range.end, range.end)};
    if (state == VmaState::kMapped && extent.generation == generation) {
      // Changed before it was held: look again.
      if (RegionOf(page)->Unmap(part, &extent).code == ErrorCode::kReplaced) continue;
    }
    page = part.end;
  }
}

Error AddressSpace::MoveInto(const VmaInfo& vma, PageRange range, const VmaInfo& target_vma, PageRange target,
                             const RemapOptions& options) {
  Region* from = RegionOf(range.first);
  Region* to = RegionOf(target.first);
  const auto move = [&](const Guard& source_guard, const Guard& target_guard) {
    return MoveHeld(vma, range, target_vma, target, options, source_guard, target_guard);
  };
  if (from != to) {
    const bool up = range.first < target.first;
    const Guard lower((up ? from : to)->range_lock(), up ? range : target, Mode::kExclusive, sync::Operation::kRemap);
    const Guard upper((up ? to : from)->range_lock(), up ? target : range, Mode::kExclusive, sync::Operation::kRemap);
    return up ? move(lower, upper) : move(upper, lower);
  }
  // Within a region, whoever waits for pages on both sides, and came between, would wait for the first guard and be
  // waited for by the second: nobody waits for the second. Whoever has it is waited for before the next attempt.
  bool source_first = true;
  for (int attempt = 0; attempt < kMaxAttempts; ++attempt, source_first = !source_first) {
    const Guard first(from->range_lock(), source_first ? range : target, Mode::kExclusive, sync::Operation::kRemap);
    const Guard second =
        Guard::Try(from->range_lock(), source_first ? target : range, Mode::kExclusive, sync::Operation::kRemap);
    if (second.held()) return source_first ? move(first, second) : move(second, first);
  }
  const PageRange both = {std::min(range.first, target.first), std::max(range.end, target.end)};
  const Guard guard(from->range_lock(), both, Mode::kExclusive, sync::Operation::kRemap);
  return move(guard, guard);
}

Error AddressSpace::MoveHeld(const VmaInfo& vma, PageRange range, const VmaInfo& target_vma, PageRange target,
                             const RemapOptions& options, const Guard& source_guard, const Guard& target_guard) {
  Region* from = RegionOf(range.first);
  Region* to = RegionOf(target.first);
  if (const Error error = to->PrepareTarget(target, target_vma, target_guard); !error.ok()) return error;
  // Cut before anything moves: then the unmap cannot want for metadata.
  if (const Error error = from->Isolate(range, vma, source_guard); !error.ok()) return error;
  if (vma.backing != nullptr) return MoveFileHeld(vma, range, target, options, source_guard, target_guard);
  const Pages kept = {std::min(range.count().value, target.count().value)};
  const PageRange head = PageRange::Of(range.first, kept);
  const PageRange new_head = PageRange::Of(target.first, kept);
  // The kernel would take the locks of all of its VMA away.
  const bool copies = vma.lock != os::MemoryLock::kNone ||
                      (vma.protection == os::Protection::kReadWrite && kept <= kCopyPages);
  bool moved = false;
  if (!copies) {
    to->SetMoved(target, target_guard);
    moved = kernel_->Move(head, new_head).ok();
  }
  Error error;
  if (moved) {
    kernel_moves_.fetch_add(1, std::memory_order_relaxed);
  } else {
    error = CopyContent(vma, head, new_head, /*renewed=*/!copies);
  }
  if (error.ok() && options.keep_source && !moved) error = purge_stage_->Discard({&range, 1});
  if (!error.ok() || options.keep_source) {
    if (!moved) from->RestoreProtection(range, source_guard);
    from->Join(range, source_guard);
    return error;
  }
  error = from->UnmapIsolated(range, source_guard);
  if (error.ok()) {
    to->Adopt(target, vma.generation, target_guard);
  } else if (moved) {
    // Mapped as it was; its content goes back the way it came, or by copying. Refused both, it is lost.
    if (!kernel_->Move(new_head, head).ok()) (void)CopyContent(vma, new_head, head, /*renewed=*/true);
  } else {
    from->RestoreProtection(range, source_guard);
  }
  return error;
}

Error AddressSpace::CopyContent(const VmaInfo& vma, PageRange from, PageRange to, bool renewed) {
  const bool readable = Has(vma.protection, os::Protection::kRead);
  const bool writable = Has(vma.protection, os::Protection::kWrite);
  Error error;
  if (!readable) error = kernel_->Protect(from, os::Protection::kRead);
  if (error.ok() && (renewed || !writable)) {
    error = kernel_->Protect(to, writable ? vma.protection : os::Protection::kReadWrite);
  }
  if (error.ok()) kernel_->Copy(from, to);
  if (error.ok() && !writable) error = kernel_->Protect(to, vma.protection);
  return error;
}

// From this look under the tree lock on, the VMA stays what it is as long as `guard` holds its pages exclusively.
bool Region::IsStill(PageRange part, const VmaInfo& vma, const Guard& guard) const {
  VmaState state;
  const VmaInfo now = LookupHeld(part.first, state, guard);
  return state == VmaState::kMapped && now.generation == vma.generation && now.range.Contains(part) &&
         now.protection == vma.protection && now.lock == vma.lock && now.backing == vma.backing;
}

Result<PageRange> Region::Grow(PageRange part, Pages count, const VmaInfo& vma) {
  const PageRange wanted = PageRange::Of(part.first, count);
  if (!range_.Contains(wanted)) return ErrorCode::kNoRoom;
  const Guard guard(range_lock_, wanted, Mode::kExclusive, sync::Operation::kRemap);
  if (!IsStill(part, vma, guard)) return ErrorCode::kReplaced;
  MapOptions options;
  options.placement = Placement::kFixed;
  options.protection = vma.protection;
  options.lock = vma.lock;
  const PageRange more = {part.end, wanted.end};
  if (vma.backing != nullptr) {
    NoteChange(vma.backing, vma.lock == os::MemoryLock::kNone ? FileChange::kAttributes : FileChange::kLocked);
    options.backing = vma.backing;
    options.backing_page = vma.backing_page + (part.end - vma.range.first).value;
    vma.backing->AddPages(more.count().value);
  }
  const Result<PageRange> added = MapHeld(more, options, vma.generation, guard);
  if (added.ok()) return wanted;
  if (vma.backing != nullptr) vma.backing->DropPages(more.count().value);
  const bool taken = added.error().code == ErrorCode::kOverlap || added.error().code == ErrorCode::kPinned;
  return taken ? Error{ErrorCode::kNoRoom} : added.error();
}

Error Region::Isolate(PageRange part, const VmaInfo& vma, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(part, Mode::kExclusive));
  if (!IsStill(part, vma, guard)) return {ErrorCode::kReplaced};
  {
    sync::SpinLockHolder holder(tree_lock_);
    if (IsPinnedLocked(part)) return {ErrorCode::kPinned};
  }
  if (!shared_.notifiers->empty()) Invalidate(part, Invalidation::kMove, guard);
  if (const Error error = MakeBusy(ToRegion(part.first), ToRegion(part.end)); !error.ok()) return error;
  sync::SpinLockHolder holder(tree_lock_);
  // It may become readable for the copy: then it needs a reset.
  Vma* source = tree_.Find(ToRegion(part.first)).vma();
  source->kernel_vma = source->kernel_vma || !is_heap();
  return Error::Ok();
}

void Region::Join(PageRange part, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(part, Mode::kShared));
  EndBusy(ToRegion(part.first), ToRegion(part.end));
}

Error Region::UnmapIsolated(PageRange part, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(part, Mode::kExclusive));
  Detachment detachment;
  const bool notified = !shared_.notifiers->empty();
  {
    sync::SpinLockHolder holder(tree_lock_);
    SetBusyLocked(ToRegion(part.first), ToRegion(part.end), false);
    // What is resident of it now, nobody has counted.
    tree_.Find(ToRegion(part.first)).vma()->knowledge = Knowledge::kUnknown;
    unmaps_.Add(1);
    // Pinned since Isolate has looked.
    const bool pinned = IsPinnedLocked(part);
    const auto count = static_cast<RegionPage>(part.count().value);
    if (!pinned && !notified && RetireWholeLocked(ToRegion(part.first), count, kNoSample)) return Error::Ok();
    // It is one extent, and so one hold; nothing is left to cut.
    detachment = StartDetachLocked(part, pinned, notified);
    FREEHOLD_CHECK(DetachLocked(detachment));
  }
  if (!detachment.zap) return Error::Ok();
  if (notified) shared_.notifiers->Close(part);
  const Error error = ZapDetached(part, detachment, guard);
  if (error.ok()) return error;
  RemapDetached(part);
  if (notified) shared_.notifiers->Map(part);
  return error;
}

Error Region::PrepareTarget(PageRange part, const VmaInfo& vma, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(part, Mode::kExclusive));
  if (!IsStill(part, vma, guard)) return {ErrorCode::kReplaced};
  sync::SpinLockHolder holder(tree_lock_);
  Vma* target = tree_.Find(ToRegion(part.first)).vma();
  // Even without access, it will need a reset.
  target->kernel_vma = target->kernel_vma || !is_heap();
  return Error::Ok();
}

void Region::SetMoved(PageRange target, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(target, Mode::kExclusive));
  sync::SpinLockHolder holder(tree_lock_);
  Vma* vma = tree_.Find(ToRegion(target.first)).vma();
  vma->knowledge = Knowledge::kUnknown;
  // In the mapping zone every unmap resets.
  vma->foreign = is_heap();
}

void Region::Adopt(PageRange part, std::uint64_t generation, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(part, Mode::kExclusive));
  sync::SpinLockHolder holder(tree_lock_);
  // It may come from a region that has seen more: an Unmap spares what is newer than itself (Detachment::newest).
  RaiseGenerationLocked(generation);
  VmaWriter(*tree_.Find(ToRegion(part.first)).vma()).SetGeneration(generation);
  changes_.Add(1);
  MergeMappedLocked(ToRegion(part.first), ToRegion(part.end));
}

}  // namespace freehold::vm
