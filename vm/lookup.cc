// Lookups: without a lock by VmaTree::Lookup, with the tree lock when writers got in the way too often.
#include <algorithm>
#include <cstddef>

#include "vm/os/check.h"
#include "vm/region.h"

namespace freehold::vm {
namespace {

// Extents that one hold of the tree lock looks at for CopyVmas, mapped or not. Steps along leaves are cheap.
constexpr int kVisitsPerCopy = 64;

void PrefetchForWriting(const void* from, const void* end) {
  for (const auto* line = static_cast<const std::byte*>(from); line < end; line += kCacheLineSize) {
    __builtin_prefetch(line, /*rw=*/1);
  }
}

// Where holds are timed, what the clock waits for is no part of them.
void WarmClock(const sync::RecordedSpinLock& lock) {
  if (ABSL_PREDICT_FALSE(lock.recorder() != nullptr)) (void)sync::MonotonicNow();
}

}  // namespace

VmaInfo Region::InfoOf(PageRange range, const VmaAttributes& attributes) const {
  const auto first = static_cast<std::int64_t>(ToRegion(range.first));
  return {.range = range,
          .protection = attributes.protection,
          .lock = attributes.lock,
          .zone = zone_,
          .generation = attributes.generation,
          .backing = attributes.backing,
          .backing_page = attributes.backing == nullptr ? 0 : static_cast<std::uint64_t>(attributes.origin + first)};
}

VmaInfo Region::LookupExtent(PageNumber page, VmaState& state) const {
  FREEHOLD_DCHECK(range_.Contains(page));
  VmaTree::View view;
  if (!tree_.Lookup(ToRegion(page), view)) {
    sync::SpinLockHolder holder(tree_lock_);
    // Nobody writes now, so one attempt is enough.
    FREEHOLD_CHECK(tree_.Lookup(ToRegion(page), view));
  }
  state = view.state;
  return InfoOf(ToAbsolute(view.first, view.count), view.attributes);
}

VmaInfo Region::LookupHeld(PageNumber page, VmaState& state, const Guard& guard) const {
  FREEHOLD_DCHECK(guard.Covers(PageRange::Of(page, {1}), Mode::kShared));
  VmaTree::View view;
  // What this reads is what the lookup below will read.
  WarmClock(tree_lock_);
  (void)tree_.Lookup(ToRegion(page), view);
  sync::SpinLockHolder holder(tree_lock_);
  FREEHOLD_CHECK(tree_.Lookup(ToRegion(page), view));
  state = view.state;
  return InfoOf(ToAbsolute(view.first, view.count), view.attributes);
}

// Fields first, since these requests do not wait for one another; the lookups then take as long as they do.
void Region::Warm(PageNumber page) const {
  WarmClock(tree_lock_);
  PrefetchForWriting(&tree_lock_, &free_);
  PrefetchForWriting(&windows_, &committed_pages_ + 1);
  VmaTree::View view;
  if (!tree_.Warm(ToRegion(page), view)) return;
  ABSL_TS_UNCHECKED_READ(free_).Prefetch(view.count);
  __builtin_prefetch(view.vma, 1);
  // A verb that changes the extent looks whether its neighbours merge with it.
  VmaTree::View neighbour;
  const RegionPage end = view.first + view.count;
  if (view.first > 0) (void)tree_.Warm(view.first - 1, neighbour);
  if (end < range_.count().value) (void)tree_.Warm(end, neighbour);
}

std::size_t Region::CopyVmas(PageNumber& from, VmaInfo* out, std::size_t capacity) const {
  sync::SpinLockHolder holder(tree_lock_);
  std::size_t size = 0;
  VmaTree::Path path = tree_.Find(ToRegion(from));
  const PageNumber lowest = from;
  int visits = 0;
  do {
    const Vma& vma = *path.vma();
    // An extent made since the last copy may begin before `from`.
    const PageRange range = RangeOf(vma);
    from = range.end;
    if (!vma.Is(VmaState::kMapped)) continue;
    out[size++] = InfoOf({std::max(range.first, lowest), range.end}, vma.attributes());
  } while (size < capacity && ++visits < kVisitsPerCopy && tree_.Next(path));
  return size;
}

}  // namespace freehold::vm
