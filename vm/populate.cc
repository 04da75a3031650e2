// Populate: chunk by chunk, each under a shared range lock of that chunk only (DESIGN §7). A writer that wants
// the same pages waits for one chunk at most; everyone else for nothing. Never MAP_POPULATE or
// MADV_POPULATE_* of anonymous memory: the kernel holds mmap_lock all along. Backings know better: a file may end
// anywhere, and a touch beyond its end is a signal.
#include <algorithm>

#include "vm/address_space.h"
#include "vm/backing.h"
#include "vm/region.h"

namespace freehold::vm {
namespace {

using Guard = sync::RangeLock::Guard;
using Mode = sync::RangeLock::Mode;

// The part of `range` up to the next 2 MiB border.
PageRange FirstChunk(PageRange range) {
  const PageNumber border{(range.first.value / kPagesPerHugePage + 1) * kPagesPerHugePage};
  return {range.first, std::min(range.end, border)};
}

}  // namespace

Result<Pages> AddressSpace::Populate(PageRange range, const PopulateOptions& options) {
  if (const Error error = CheckRange(range); !error.ok()) return error;
  // Refused as a whole when it cannot succeed, before any page is touched.
  for (PageNumber page = range.first; page < range.end;) {
    const Result<VmaInfo> vma = Lookup(page);
    if (!vma.ok()) return vma.error();
    if (vma->backing == nullptr && !Has(vma->protection, os::Protection::kWrite)) return ErrorCode::kUnsupported;
    page = vma->range.end;
  }
  Pages done;
  while (done < range.count()) {
    const PageNumber page = range.first + done;
    const Result<VmaInfo> vma = Lookup(page);
    if (!vma.ok()) return ErrorCode::kReplaced;
    const PageRange part = {page, std::min(range.end, vma->range.end)};
    const Result<Pages> populated = PopulateVma(part, vma->generation, options, done);
    if (!populated.ok()) return populated.error();
    done += *populated;
  }
  return done;
}

// One VMA's part of a chunk, with its range held.
Error AddressSpace::PopulatePiece(PageRange piece, const VmaInfo& vma) {
  if (vma.backing != nullptr) return vma.backing->Populate(*kernel_, piece, vma.protection);
  if (!Has(vma.protection, os::Protection::kWrite)) return {ErrorCode::kReplaced};
  kernel_->TouchForWrite(piece);
  return Error::Ok();
}

bool AddressSpace::IsPaged(PageNumber page) {
  const sync::EpochDomain::ReadGuard reader(epochs_);
  const Result<VmaInfo> vma = Lookup(page);
  return vma.ok() && vma->backing != nullptr && vma->backing->paged();
}

// Populates `part` as long as it belongs to the mapping `generation`. `before`: pages done earlier.
Result<Pages> AddressSpace::PopulateVma(PageRange part, std::uint64_t generation,
                                        const PopulateOptions& options, Pages before) {
  Region* region = RegionOf(part.first);
  const bool paged = IsPaged(part.first);
  Pages done;
  while (done < part.count()) {
    if (options.cancel != nullptr && options.cancel->load(std::memory_order_relaxed)) {
      return ErrorCode::kCancelled;
    }
    if (options.deadline.value != 0 && kernel_->Now() >= options.deadline) return ErrorCode::kDeadline;
    const PageRange chunk = FirstChunk({part.first + done, part.end});
    if (paged) {
      FaultHooks* hooks = fault_hooks_.load(std::memory_order_acquire);
      if (hooks == nullptr) return ErrorCode::kReplaced;
      if (const Error error = hooks->Populate(chunk, generation); !error.ok()) return error;
    } else {
      const Guard guard(region->range_lock(), chunk, Mode::kShared, sync::Operation::kPopulate);
      // Nobody unmaps, replaces or protects these pages while the guard lives; parts of a VMA that was
      // split keep its generation.
      for (PageNumber page = chunk.first; page < chunk.end;) {
        const Result<VmaInfo> vma = LookupHeld(page, guard);
        if (!vma.ok() || vma->generation != generation) return ErrorCode::kReplaced;
        const PageRange piece = {page, std::min(chunk.end, vma->range.end)};
        if (const Error error = PopulatePiece(piece, *vma); !error.ok()) return error;
        page = piece.end;
      }
    }
    done += chunk.count();
    if (options.progress != nullptr) options.progress(options.progress_context, before + done);
  }
  return done;
}

}  // namespace freehold::vm
