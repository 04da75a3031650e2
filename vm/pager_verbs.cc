// What a FaultService does for callers: mapping pagers, write-back, eviction, invalidation, and the ends of mappings.
//
// Each works on pieces of at most 2 MiB:
//
//   + the pager's pages, exclusively                 no read of these pages is under way or begins
//     + the range, exclusively
//       still the same mapping?                      no: looked up again
//       pages that were written to: write-protected, copied, count as written to no more; dropped, if asked for
//     - range
//     Pager::Writeback from the copy
//   - pages
//
// Write-back goes by runs of pages that were written to. A run is in memory, so no read of it can be under way that
// keeps it waiting.
//
// Unmap and a replacing Map hold the range when they drop content, and must not wait for pager's code, which may want
// the space. So they write back before (BeforeDrop), save what was written to since under the range (SaveDirty), and
// hand that over at their end (AfterDrop).
#include <algorithm>
#include <new>

#include "vm/fault.h"
#include "vm/os/check.h"
#include "vm/os/file_io.h"
#include "vm/os/thread_id.h"
#include "vm/region.h"

namespace freehold::vm {

// ---- Pieces ----

Result<FaultService::Piece*> FaultService::NewPiece() {
  {
    sync::SpinLockHolder holder(lock_);
    if (Piece* piece = free_pieces_; piece != nullptr) {
      free_pieces_ = piece->next;
      --free_piece_count_;
      return piece;
    }
  }
  const Result<PageRange> memory = kernel_.Reserve(Pages{1} + kPiecePages, {1});
  if (!memory.ok()) return memory.error();
  if (const Error error = kernel_.Protect(*memory, os::Protection::kReadWrite); !error.ok()) {
    (void)kernel_.Release(*memory);
    return error;
  }
  Piece* piece = reinterpret_cast<Piece*>(memory->address());
  // Another piece may have been here: with the lock, what was done to that came before.
  { sync::SpinLockHolder holder(lock_); }
  new (piece) Piece;
  piece->memory = *memory;
  return piece;
}

void FaultService::FreePiece(Piece* piece) {
  const PageRange memory = piece->memory;
  {
    sync::SpinLockHolder holder(lock_);
    if (free_piece_count_ < kMaxFreePieces) {
      piece->next = free_pieces_;
      free_pieces_ = piece;
      ++free_piece_count_;
      return;
    }
  }
  (void)kernel_.Release(memory);
}

// ---- Finding mappings ----

Result<FaultService::Target> FaultService::FindTarget(PageRange range, PageRange& found, VmaState also) {
  const sync::EpochDomain::ReadGuard reader(space_.epochs());
  VmaState state;
  const VmaInfo extent = space_.RegionOf(range.first)->LookupExtent(range.first, state);
  found = extent.range.Intersect(range);
  if (state != VmaState::kMapped && state != also) return ErrorCode::kNotMapped;
  if (extent.backing == nullptr || !extent.backing->paged()) return ErrorCode::kUnsupported;
  auto* backing = static_cast<PagerBacking*>(extent.backing);
  backing->Pin();
  return Target{.backing = backing,
                .generation = extent.generation,
                .vma = extent.range,
                .range = found,
                .first = extent.backing_page};
}

template <typename Verb>
Error FaultService::ForEachTarget(PageRange range, Holes holes, Verb verb) {
  Error first_error;
  const auto note = [&](Error error) {
    if (first_error.ok()) first_error = error;
  };
  int attempts = 0;
  for (PageNumber page = range.first; page < range.end;) {
    PageRange found;
    const Result<Target> target = FindTarget({page, range.end}, found);
    Error error = target.error();
    if (target.ok()) {
      error = verb(*target);
      target->backing->Unpin();
      // Others replaced it meanwhile.
      if (error.code == ErrorCode::kReplaced && ++attempts < kMaxAttempts) continue;
    } else if (error.code == ErrorCode::kUnsupported || holes == Holes::kSkipped) {
      error = Error::Ok();
    }
    if (!error.ok()) note(error);
    attempts = 0;
    page = found.end;
  }
  return first_error;
}

template <typename Verb>
Error FaultService::Perform(PageRange range, Holes holes, Verb verb) {
  if (dead_.load(std::memory_order_relaxed)) return {ErrorCode::kUnsupported};
  if (const Error error = space_.CheckRange(range); !error.ok()) return error;
  const Result<Piece*> piece = NewPiece();
  if (!piece.ok()) return piece.error();
  const Error error = ForEachTarget(range, holes, [&](const Target& target) { return verb(target, **piece); });
  FreePiece(*piece);
  return error;
}

// ---- Mapping ----

Result<PageRange> FaultService::MapPager(Pager& pager, std::uint64_t page, Pages count,
                                         const PagerMapOptions& options) {
  if (count.value == 0) return ErrorCode::kEmpty;
  const Pages capacity = std::max(count, options.capacity);
  if (capacity >= space_.reservation().count()) return ErrorCode::kNoRoom;
  if (dead_.load(std::memory_order_relaxed)) return ErrorCode::kUnsupported;
  if (!available_ && options.when_unavailable == WhenUnavailable::kFail) return ErrorCode::kUnsupported;
  if (options.placement != Placement::kAnywhere &&
      PageNumber::Of(options.address) < space_.RegionsOf(Zone::kMapping)[0]->range().first) {
    return ErrorCode::kOutsideReservation;
  }
  const bool writable = Has(options.max_protection, os::Protection::kWrite);
  const Result<PagerBacking*> created = PagerBacking::Create(
      *this, pager, page, capacity,
      {.max_protection = options.max_protection,
       .filling = available_ ? PagerBacking::Filling::kOnFault : PagerBacking::Filling::kAtMap,
       .track_writes = available_ && writable && userfault_.abilities().write_protect});
  if (!created.ok()) return created.error();
  PagerBacking& backing = **created;
  backing.AddPages(1);  // until here is decided what becomes of it
  MapOptions map;
  map.placement = options.placement;
  map.address = options.address;
  map.protection = options.protection;
  map.backing = &backing;
  Result<PageRange> mapped = space_.Map(count, map);
  if (mapped.ok()) {
    const Error error = available_ ? Error::Ok() : PopulateAll(backing, *mapped);
    if (error.ok()) {
      backing.Announce();
    } else {
      (void)space_.Unmap(*mapped);
      mapped = error;
    }
  }
  backing.DropPages(1);
  return mapped;
}

// The pages are writable until they are full.
Error FaultService::PopulateAll(PagerBacking& backing, PageRange range) {
  return Perform(range, Holes::kRefused, [&](const Target& target, Piece& piece) -> Error {
    if (target.backing != &backing) return {ErrorCode::kReplaced};
    for (PageNumber at = range.first; at < range.end;) {
      const Result<Pages> filled = Fill(target, {at, std::min(range.end, at + kChunkPages)}, nullptr, piece);
      if (!filled.ok()) return filled.error();
      at = at + *filled;
    }
    const Guard guard(RangeLockOf(range.first), range, Mode::kExclusive, sync::Operation::kMap);
    if (!IsStill(target, range, guard)) return {ErrorCode::kReplaced};
    return ForEachHeld(range, guard, [&](PageRange part, const VmaInfo& vma) {
      return vma.protection == os::Protection::kReadWrite ? Error::Ok() : kernel_.Protect(part, vma.protection);
    });
  });
}

// For AddressSpace::Populate: pages of a pager are not touched under their range, which the fault would want too.
Error FaultService::Populate(PageRange range, std::uint64_t generation) {
  return Perform(range, Holes::kRefused, [&](const Target& target, Piece& piece) -> Error {
    if (target.generation != generation) return {ErrorCode::kReplaced};
    const PageSpan all = target.PagesOf(target.range);
    PageBitmap& present = target.backing->present();
    for (std::uint64_t page = present.FindClear(all.first, all.end); page < all.end;) {
      // A fault may bring the page meanwhile: never nothing.
      const std::uint64_t end = std::min(present.FindSet(page + 1, all.end), page + kChunkPages.value);
      const Result<Pages> filled = Fill(target, target.RangeOf({page, end}), nullptr, piece);
      if (!filled.ok()) return filled.error();
      page = present.FindClear(page + filled->value, all.end);
    }
    return Error::Ok();
  });
}

// ---- Write-back ----

Error FaultService::Writeback(PageRange range) {
  return Perform(range, Holes::kRefused,
                 [this](const Target& target, Piece& piece) { return WritebackTarget(target, piece); });
}

Error FaultService::WritebackTarget(const Target& target, Piece& piece) {
  const PageSpan all = target.PagesOf(target.range);
  Error first_error;
  for (std::uint64_t page = all.first; page < all.end;) {
    PageSpan run = target.backing->NextDirty(page, all.end);
    if (run.empty()) break;
    run.end = std::min(run.end, run.first + kPiecePages.value);
    page = run.end;
    const PageRange part = target.RangeOf(run);
    const Guard pages(target.backing->pages_lock(), PagerBacking::LockRange(run), Mode::kExclusive,
                      sync::Operation::kSync);
    Error error;
    {
      const Guard guard(RangeLockOf(part.first), part, Mode::kExclusive, sync::Operation::kSync);
      error = IsStill(target, part, guard) ? Collect(*target.backing, part, run, piece) : Error{ErrorCode::kReplaced};
    }
    if (error.ok()) error = HandBack(*target.backing, piece);
    if (error.code == ErrorCode::kReplaced) return error;
    if (first_error.ok()) first_error = error;
  }
  return first_error;
}

Error FaultService::Collect(PagerBacking& backing, PageRange part, PageSpan pages, Piece& piece) {
  piece.pages = pages;
  piece.saved().Clear(0, kPiecePages.value);
  for (std::uint64_t page = pages.first;;) {
    const PageSpan run = backing.NextDirty(page, pages.end);
    if (run.empty()) return Error::Ok();
    page = run.end;
    const PageRange range = PageRange::Of(part.first + Pages{run.first - pages.first}, {run.count()});
    Error error;
    if (backing.tracks_writes()) {
      error = userfault_.WriteProtect(range, true);
      if (error.ok()) backing.dirty().Clear(run.first, run.end);
    }
    if (error.ok()) error = os::ReadOwnMemory(range, piece.BytesOf(run.first));
    if (!error.ok()) {
      backing.dirty().Set(run.first, run.end);
      MarkDirty(backing, piece);
      return error;
    }
    piece.saved().Set(run.first - pages.first, run.end - pages.first);
  }
}

Error FaultService::HandBack(PagerBacking& backing, Piece& piece) {
  for (std::uint64_t at = 0; at < piece.pages.count();) {
    const std::uint64_t first = piece.saved().FindSet(at, piece.pages.count());
    const std::uint64_t end = piece.saved().FindClear(first, piece.pages.count());
    if (first == end) break;
    const std::uint64_t page = piece.pages.first + first;
    const Error error = backing.Writeback(page, {piece.BytesOf(page), (end - first) * kPageSize});
    if (!error.ok()) {
      MarkDirty(backing, piece);
      return error;
    }
    piece.saved().Clear(first, end);
    pages_written_.fetch_add(end - first, std::memory_order_relaxed);
    at = end;
  }
  return Error::Ok();
}

void FaultService::MarkDirty(PagerBacking& backing, Piece& piece) {
  for (std::uint64_t at = 0; at < piece.pages.count();) {
    const std::uint64_t first = piece.saved().FindSet(at, piece.pages.count());
    at = piece.saved().FindClear(first, piece.pages.count());
    backing.dirty().Set(piece.pages.first + first, piece.pages.first + at);
  }
}

// ---- Eviction, invalidation ----

Error FaultService::Evict(PageRange range) {
  return Perform(range, Holes::kRefused, [this](const Target& target, Piece& piece) {
    return DropTarget(target, Drop::kWrittenBack, piece);
  });
}

Error FaultService::Invalidate(PageRange range) {
  return Perform(range, Holes::kRefused, [this](const Target& target, Piece& piece) {
    return DropTarget(target, Drop::kLost, piece);
  });
}

Error FaultService::DropTarget(const Target& target, Drop drop, Piece& piece) {
  if (target.backing->filling() == PagerBacking::Filling::kAtMap) return {ErrorCode::kUnsupported};
  Error first_error;
  for (PageNumber at = target.range.first; at < target.range.end;) {
    const PageRange part = {at, std::min(target.range.end, at + kPiecePages)};
    const Error error = DropPart(target, part, drop, piece);
    if (error.code == ErrorCode::kReplaced) return error;
    if (first_error.ok()) first_error = error;
    at = part.end;
  }
  return first_error;
}

Error FaultService::DropPart(const Target& target, PageRange part, Drop drop, Piece& piece) {
  PagerBacking& backing = *target.backing;
  const PageSpan pages = target.PagesOf(part);
  const Guard reading(backing.pages_lock(), PagerBacking::LockRange(pages), Mode::kExclusive, sync::Operation::kSync);
  {
    const Guard guard(RangeLockOf(part.first), part, Mode::kExclusive, sync::Operation::kSync);
    if (!IsStill(target, part, guard)) return {ErrorCode::kReplaced};
    if (drop == Drop::kWrittenBack) {
      if (const Error error = Collect(backing, part, pages, piece); !error.ok()) return error;
    }
    if (!space_.notifiers_.empty()) space_.notifiers_.Invalidate(part, Invalidation::kDiscard);
    if (const Error error = DropInKernel(backing, part, guard); !error.ok()) {
      if (drop == Drop::kWrittenBack) MarkDirty(backing, piece);
      return error;
    }
    backing.present().Clear(pages.first, pages.end);
    backing.dirty().Clear(pages.first, pages.end);
  }
  if (drop == Drop::kLost) return Error::Ok();
  const Error error = HandBack(backing, piece);
  if (!error.ok()) PutBack(target, piece);
  return error;
}

// A page that was poisoned by another kernel VMA in its place needs a mapping of its own again.
Error FaultService::DropInKernel(PagerBacking& backing, PageRange part, const Guard& guard) {
  if (!backing.poisoned() || userfault_.abilities().poison) return kernel_.Discard({&part, 1});
  return ForEachHeld(part, guard, [&](PageRange piece, const VmaInfo& vma) {
    const std::uint64_t page = vma.backing_page + (piece.first - vma.range.first).value;
    return backing.Install(kernel_, piece, page, vma.protection, /*occupied=*/true);
  });
}

// What was evicted before the pager refused it. Nobody has read anything since: the pager's pages are held.
void FaultService::PutBack(const Target& target, Piece& piece) {
  for (std::uint64_t at = 0; at < piece.pages.count();) {
    const std::uint64_t first = piece.saved().FindSet(at, piece.pages.count());
    at = piece.saved().FindClear(first, piece.pages.count());
    if (first == at) break;
    const PageSpan run = {piece.pages.first + first, piece.pages.first + at};
    const PageRange part = target.RangeOf(run);
    const Guard guard(RangeLockOf(part.first), part, Mode::kShared, sync::Operation::kSync);
    target.backing->dirty().Set(run.first, run.end);
    if (!IsStill(target, part, guard) ||
        !CopyIn(target, part, piece.BytesOf(run.first), os::WriteTracking::kOff).ok()) {
      target.backing->dirty().Clear(run.first, run.end);
      ReportLost(*target.backing, run);
    }
  }
}

void FaultService::ReportLost(PagerBacking& backing, PageSpan pages) {
  const CheckValue values[] = {{"pager_page", backing.pager_page(pages.first)}, {"pages", pages.count()}};
  Report("a pager did not take back what was written to its pages, which are mapped no more:", values, 2);
  pages_lost_.fetch_add(pages.count(), std::memory_order_relaxed);
}

template <typename Visit>
Error FaultService::ForEachHeld(PageRange range, const Guard& guard, Visit visit) {
  for (PageNumber page = range.first; page < range.end;) {
    const Result<VmaInfo> vma = space_.LookupHeld(page, guard);
    if (!vma.ok()) return vma.error();
    const PageRange part = vma->range.Intersect({page, range.end});
    if (const Error error = visit(part, *vma); !error.ok()) return error;
    page = part.end;
  }
  return Error::Ok();
}

// ---- The ends of mappings ----

void FaultService::BeforeDrop(PageRange range) {
  if (backings_.load(std::memory_order_relaxed) == 0) return;
  // What fails here is tried again at the end.
  (void)Perform(range, Holes::kSkipped,
                [this](const Target& target, Piece& piece) { return WritebackTarget(target, piece); });
}

void FaultService::SaveDirty(PagerBacking& backing, PageRange range, PageSpan pages) {
  for (std::uint64_t page = pages.first; page < pages.end;) {
    const PageSpan dirty = backing.NextDirty(page, pages.end);
    if (dirty.empty()) return;
    const PageSpan part = {dirty.first, std::min(pages.end, dirty.first + kPiecePages.value)};
    page = part.end;
    const PageRange memory = PageRange::Of(range.first + Pages{part.first - pages.first}, {part.count()});
    const Result<Piece*> piece = NewPiece();
    if (!piece.ok()) {
      ReportLost(backing, dirty);
      continue;
    }
    if (!Collect(backing, memory, part, **piece).ok()) {
      ReportLost(backing, dirty);
      FreePiece(*piece);
      continue;
    }
    backing.Pin();
    (*piece)->backing = &backing;
    (*piece)->thread = os::CurrentThreadId();
    sync::SpinLockHolder holder(lock_);
    (*piece)->next = saved_;
    saved_ = *piece;
  }
}

FaultService::Piece* FaultService::TakeSaved() {
  const std::uint32_t self = os::CurrentThreadId();
  sync::SpinLockHolder holder(lock_);
  for (Piece** link = &saved_; *link != nullptr; link = &(*link)->next) {
    Piece* piece = *link;
    if (piece->thread != self) continue;
    *link = piece->next;
    return piece;
  }
  return nullptr;
}

void FaultService::AfterDrop(PageRange range) {
  if (dead_.load(std::memory_order_relaxed) || backings_.load(std::memory_order_relaxed) == 0) return;
  // Who sleeps here sees what is mapped now, also if its pager never answers.
  if (available_) Wake(range);
  while (Piece* piece = TakeSaved()) {
    PagerBacking& backing = *piece->backing;
    {
      const Guard pages(backing.pages_lock(), PagerBacking::LockRange(piece->pages), Mode::kExclusive,
                        sync::Operation::kSync);
      if (!HandBack(backing, *piece).ok()) {
        for (std::uint64_t at = 0; at < piece->pages.count();) {
          const std::uint64_t first = piece->saved().FindSet(at, piece->pages.count());
          at = piece->saved().FindClear(first, piece->pages.count());
          if (first < at) ReportLost(backing, {piece->pages.first + first, piece->pages.first + at});
        }
      }
    }
    FreePiece(piece);
    backing.Unpin();
  }
  space_.epochs().Poll();
}

void FaultService::UnmapAll() {
  struct Found {
    PageRange ranges[16];
    std::size_t size = 0;
  };
  for (;;) {
    Found found;
    space_.ForEachVma([](void* context, const VmaInfo& vma) {
      auto* into = static_cast<Found*>(context);
      if (vma.backing == nullptr || !vma.backing->paged() || into->size == std::size(into->ranges)) return;
      into->ranges[into->size++] = vma.range;
    }, &found);
    if (found.size == 0) return;
    for (std::size_t i = 0; i < found.size; ++i) FREEHOLD_CHECK(space_.Unmap(found.ranges[i]).ok());
  }
}

// Userfaultfd serves the parent only: without this, pages that are not there would read as zero.
void FaultService::ChildAfterFork() {
  dead_.store(true, std::memory_order_relaxed);
  space_.ForEachVma([](void* context, const VmaInfo& vma) {
    if (vma.backing == nullptr || !vma.backing->paged()) return;
    FREEHOLD_CHECK(static_cast<os::Kernel*>(context)->Reset(vma.range).ok());
  }, &kernel_);
}

FaultStats FaultService::Stats() const {
  const auto read = [](const std::atomic<std::uint64_t>& counter) { return counter.load(std::memory_order_relaxed); };
  FaultStats stats = {.faults = read(faults_),
                      .pages_read = read(pages_read_),
                      .joined = read(joined_),
                      .postponed = read(postponed_),
                      .failures = read(failures_),
                      .pages_written = read(pages_written_),
                      .pages_lost = read(pages_lost_)};
  sync::SpinLockHolder holder(lock_);
  stats.threads = threads_;
  return stats;
}

}  // namespace freehold::vm
