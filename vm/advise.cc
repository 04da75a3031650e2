// Advise and Residency: hints about mapped memory, and which of it is resident.
//
// Advise finds VMAs without a lock and works on pieces of them, each under a shared range lock that keeps the
// piece from being unmapped and handed to somebody else meanwhile. A piece that changed before it was locked is
// looked up again, by LookupHeld: an Unmap that takes no range lock is seen by that, or sees the guard.
#include <algorithm>
#include <cerrno>

#include "vm/address_space.h"
#include "vm/backing.h"
#include "vm/file_mapping.h"
#include "vm/purge_stage.h"
#include "vm/region.h"

namespace freehold::vm {
namespace {

using Guard = sync::RangeLock::Guard;
using Mode = sync::RangeLock::Mode;

// A turn of the purge stage: who wants the same pages waits about a millisecond.
constexpr Pages kMaxPiece = {MiB(16).value / kPageSize};

// Whether the zone has huge pages, or not, as the advice wants it.
constexpr bool HoldsIn(Zone zone, Advice advice) {
  return (zone == Zone::kDense) == (advice == Advice::kHugePages);
}

}  // namespace

template <typename AdviseOne>
Error AddressSpace::AdviseMapped(PageRange range, const AdviseOne& advise) {
  if (const Error error = CheckRange(range); !error.ok()) return error;
  bool hole = false;
  for (PageNumber page = range.first; page < range.end;) {
    VmaState state;
    const VmaInfo extent = RegionOf(page)->LookupExtent(page, state);
    PageRange part = {page, std::min(range.end, extent.range.end)};
    if (state != VmaState::kMapped) {
      hole = true;
    } else {
      const Error error = advise(part, extent);
      if (error.code == ErrorCode::kReplaced) continue;
      if (!error.ok()) return error;
    }
    page = part.end;
  }
  return hole ? Error{ErrorCode::kNotMapped} : Error::Ok();
}

Error AddressSpace::Advise(PageRange range, Advice advice) {
  return AdviseMapped(range, [&](PageRange& part, const VmaInfo& vma) {
    switch (advice) {
      case Advice::kWillNeed:
        // Stops where it cannot go on, which is no error of a hint.
        (void)PopulateVma(part, vma.generation, {}, {0});
        return Error::Ok();
      case Advice::kHugePages:
      case Advice::kNoHugePages:
        if (!HoldsIn(vma.zone, advice)) ignored_advice_.fetch_add(1, std::memory_order_relaxed);
        return Error::Ok();
      default:
        part.end = std::min(part.end, part.first + kMaxPiece);
        return AdvisePart(part, vma.generation, advice);
    }
  });
}

Error AddressSpace::AdviseKernel(PageRange range, int advice, AdviceEffect effect) {
  return AdviseMapped(range, [&](PageRange& part, const VmaInfo& vma) {
    if (effect == AdviceEffect::kLasting) {
      return RegionOf(part.first)->AdviseKernel(part, vma.generation, advice);
    }
    part.end = std::min(part.end, PageNumber{(part.first.value / kPagesPerHugePage + 1) * kPagesPerHugePage});
    return AdviseKernelPart(part, vma.generation, advice);
  });
}

Result<VmaInfo> AddressSpace::LookupSame(PageRange part, std::uint64_t generation, const Guard& guard) const {
  const Result<VmaInfo> vma = LookupHeld(part.first, guard);
  if (!vma.ok() || vma->generation != generation || !vma->range.Contains(part)) return ErrorCode::kReplaced;
  return vma;
}

Error AddressSpace::AdvisePart(PageRange part, std::uint64_t generation, Advice advice) {
  const Guard guard(RegionOf(part.first)->range_lock(), part, Mode::kShared, sync::Operation::kAdvise);
  const Result<VmaInfo> vma = LookupSame(part, generation, guard);
  if (!vma.ok()) return vma.error();
  if (vma->lock != os::MemoryLock::kNone) return Error::System(EINVAL);
  const bool drops = advice == Advice::kDontNeed || advice == Advice::kFree;
  if (drops && vma->backing != nullptr && vma->backing->paged()) return {ErrorCode::kUnsupported};
  if (!notifiers_.empty() && advice != Advice::kCold && advice != Advice::kPageOut) {
    notifiers_.Invalidate(part, Invalidation::kDiscard);
  }
  switch (advice) {
    case Advice::kFree: return kernel_->AdviseReclaim(part, os::ReclaimHint::kFree);
    case Advice::kCold: return kernel_->AdviseReclaim(part, os::ReclaimHint::kCold);
    case Advice::kPageOut: return kernel_->AdviseReclaim(part, os::ReclaimHint::kPageOut);
    default: return purge_stage_->Discard({&part, 1});
  }
}

Error AddressSpace::AdviseKernelPart(PageRange part, std::uint64_t generation, int advice) {
  const Guard guard(RegionOf(part.first)->range_lock(), part, Mode::kShared, sync::Operation::kAdvise);
  const Result<VmaInfo> vma = LookupSame(part, generation, guard);
  if (!vma.ok()) return vma.error();
  if (vma->backing != nullptr && vma->backing->paged()) return {ErrorCode::kUnsupported};
  return kernel_->Advise(part, advice);
}

// The steps of Protect. Marked although the kernel may refuse: it may have followed the advice for a part.
Error Region::AdviseKernel(PageRange part, std::uint64_t generation, int advice) {
  const Guard guard(range_lock_, part, Mode::kExclusive, sync::Operation::kAdvise);
  VmaState state;
  const VmaInfo vma = LookupHeld(part.first, state, guard);
  if (state != VmaState::kMapped || vma.generation != generation || !vma.range.Contains(part)) {
    return {ErrorCode::kReplaced};
  }
  if (vma.backing != nullptr && vma.backing->paged()) return {ErrorCode::kUnsupported};
  const RegionPage first = ToRegion(part.first);
  const RegionPage end = ToRegion(part.end);
  if (const Error error = MakeBusy(first, end); !error.ok()) return error;
  NoteChange(vma.backing, FileChange::kAttributes);
  const Error error = shared_.kernel->Advise(part, advice);
  if (is_heap()) {
    sync::SpinLockHolder holder(tree_lock_);
    heap_splits_.Add(1);
  }
  ChangeBusy(first, end, [&](Vma& changed) {
    changed.foreign = true;
    // In the mapping zone, that it was accessible, and so needs a reset.
    changed.kernel_vma = changed.kernel_vma || !is_heap();
  });
  return error;
}

Error AddressSpace::Residency(PageRange range, absl::Span<std::uint8_t> resident) const {
  if (const Error error = CheckRange(range); !error.ok()) return error;
  for (PageNumber page = range.first; page < range.end;) {
    const Result<VmaInfo> vma = Lookup(page);
    if (!vma.ok()) return vma.error();
    page = vma->range.end;
  }
  // The reservation is one mapping for the kernel, whatever of it is mapped by now.
  return kernel_->QueryResident(range, resident);
}

}  // namespace freehold::vm
