// Purge: free extents that may be resident are marked kPurging, discarded through the purge stage without a
// lock, and become clean: they merge into the free address space, or stay in their bin for the next Map.
#include <algorithm>

#include "vm/os/check.h"
#include "vm/os/thread_id.h"
#include "vm/region.h"

namespace freehold::vm {
namespace {

// So much may be cached however little is mapped.
constexpr Bytes kLeastCached = MiB(8);

}  // namespace

void Region::TrimFree() {
  const AddressSpaceOptions& options = *shared_.options;
  (void)PurgeFree(UINT32_MAX, {PagesFor(options.free_resident_limit).value / 2});
  (void)PurgeWindows(UINT32_MAX, {PagesFor(options.window_limit).value / 4 * 3});
}

Pages Region::PurgeFree(std::uint32_t until, Pages keep, RegionPage largest) {
  Pages purged;
  // A list with room has all there was; what others free from now on, they trim.
  for (bool full = true; full;) {
    PurgeList list;
    for (bool more = true; more && list.size < kPurgeBatch;) {
      sync::SpinLockHolder holder(tree_lock_);
      more = CollectLocked(until, keep.value, largest, list);
    }
    if (list.size == 0) return purged;
    const Pages cleaned = PurgeListed(list);
    // What the kernel refuses stays cached, and is not tried again at once.
    if (cleaned.value == 0) return purged;
    purged += cleaned;
    full = list.size == kPurgeBatch;
  }
  return purged;
}

Pages Region::PurgeListed(PurgeList& list) {
  SortRanges(list);
  const bool discarded = shared_.purge_stage->Discard({list.ranges, list.range_count}).ok();
  RestoreProtections(list);
  return FinishPurging(list, discarded, /*keep=*/false);
}

// Where extents of changing sizes are cut from each other, some always fit nothing. Without a bound, what is resident
// grows to twice what is mapped at most, and more. A quarter is what placement needs to get along without faults.
RegionPage Region::ExcessLocked(RegionPage count) const {
  const std::uint64_t most = most_mapped_.load(std::memory_order_relaxed);
  const std::uint64_t allowed = most + std::max(most / 4, PagesFor(kLeastCached).value);
  const std::uint64_t used = mapped_pages_.get() + count + free_.dirty_pages();
  return static_cast<RegionPage>(used - std::min(used, allowed));
}

// Small ones first, which serve least. A hold's worth: there is a next time.
void Region::PurgeExcess(RegionPage excess) {
  PurgeList list;
  {
    sync::SpinLockHolder holder(tree_lock_);
    for (int visits = 0; excess != 0 && visits < kExtentsPerHold; ++visits) {
      Vma* vma = free_.SmallestLarge();
      if (vma == nullptr) break;
      excess -= std::min(excess, vma->page_count());
      StartPurgingLocked(vma, list);
    }
  }
  if (list.size != 0) (void)PurgeListed(list);
}

void Region::ForgetMost() {
  const std::uint64_t most = most_mapped_.load(std::memory_order_relaxed);
  const std::uint64_t above = most - std::min(most, mapped_pages_.get());
  if (above != 0) most_mapped_.store(most - (above + 7) / 8, std::memory_order_relaxed);
}

// Large bins first: they hold the most for the fewest ranges. Clean extents go back too, so that address
// space merges again.
bool Region::CollectLocked(std::uint32_t until, std::size_t keep_pages, RegionPage largest, PurgeList& list) {
  int visits = 0;
  const auto oldest = [&](int bin, Knowledge knowledge) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    Vma* vma = free_.Oldest(bin, knowledge);
    return vma != nullptr && vma->freed_at <= until ? vma : nullptr;
  };
  for (int bin = free_.BinAtOrBelow(FreeRanges::BinOf(largest)); bin >= 0; bin = free_.BinAtOrBelow(bin - 1)) {
    for (const Knowledge knowledge : {Knowledge::kUnknown, Knowledge::kResident}) {
      Vma* vma = nullptr;
      while (list.size < kPurgeBatch && free_.dirty_pages() > keep_pages &&
             (vma = oldest(bin, knowledge)) != nullptr) {
        if (visits++ == kExtentsPerHold) return true;
        StartPurgingLocked(vma, list);
      }
    }
    while (Vma* vma = oldest(bin, Knowledge::kClean)) {
      if (visits++ == kExtentsPerHold) return true;
      free_.Remove(vma);
      FreeLocked(vma);
    }
  }
  return false;
}

// An Unmap may have left an extent with a protection, a lock or a foreign kernel VMA that the kernel would not take
// back.
void Region::RestoreProtections(PurgeList& list) {
  for (std::size_t i = 0; i < list.size; ++i) {
    Vma* vma = list.vmas[i];
    const bool reset = vma->foreign && ReplaceForeign(RangeOf(*vma)).ok();
    vma->foreign = vma->foreign && !reset;
    list.unlocked[i] = vma->locked() && (reset || shared_.kernel->UnlockMemory(RangeOf(*vma)).ok());
    if (!is_heap()) {
      vma->kernel_vma = vma->kernel_vma && !reset;
    } else if (vma->kernel_vma || reset) {
      vma->kernel_vma = !shared_.kernel->Protect(RangeOf(*vma), os::Protection::kReadWrite).ok();
    }
  }
}

void Region::StartPurgingLocked(Vma* vma, PurgeList& list) {
  free_.Remove(vma);
  AddToPurgeLocked(vma, list);
}

void Region::AddToPurgeLocked(Vma* vma, PurgeList& list) {
  VmaWriter(*vma).SetState(VmaState::kPurging);
  purges_in_flight_.store(purges_in_flight_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  list.vmas[list.size] = vma;
  ++list.size;
  // Extents that were carved one after another are freed in that order too, or in the opposite one.
  const PageRange range = RangeOf(*vma);
  PageRange* last = list.range_count != 0 ? &list.ranges[list.range_count - 1] : nullptr;
  if (last != nullptr && last->end == range.first) {
    last->end = range.end;
  } else if (last != nullptr && last->first == range.end) {
    last->first = range.first;
  } else {
    list.ranges[list.range_count++] = range;
  }
}

// In ascending order, neighbours become one range for the kernel.
void Region::SortRanges(PurgeList& list) {
  if (list.range_count == 1) return;
  std::sort(list.ranges, list.ranges + list.range_count,
            [](const PageRange& a, const PageRange& b) { return a.first < b.first; });
}

Pages Region::FinishPurging(const PurgeList& list, bool discarded, bool keep) {
  Pages cleaned;
  for (std::size_t i = 0; i < list.size;) {
    const std::size_t begin = i;
    const std::size_t end = std::min(list.size, begin + kExtentsPerHold);
    // A bin's discard drops next to nothing, and is short.
    if (!keep) PrefetchHoldCode();
    for (std::size_t next = begin; !keep && next < end; ++next) Warm(RangeOf(*list.vmas[next]).first);
    sync::SpinLockHolder holder(tree_lock_);
    for (; i < end; ++i) {
      Vma* vma = list.vmas[i];
      if (list.unlocked[i]) VmaWriter(*vma).SetLock(os::MemoryLock::kNone);
      if (!discarded || !vma->is_zones_own()) {
        CacheLocked(vma, Knowledge::kUnknown);
        continue;
      }
      cleaned += {vma->page_count()};
      keep ? CacheLocked(vma, Knowledge::kClean) : FreeLocked(vma);
    }
    // Release pairs with the acquire in WaitForPurges.
    purges_in_flight_.store(purges_in_flight_.load(std::memory_order_relaxed) - static_cast<std::uint32_t>(i - begin),
                            std::memory_order_release);
  }
  return cleaned;
}

bool Region::WorthCleaningLocked(RegionPage count) const {
  return count <= FreeRanges::kExactPages &&
         free_.ListSize(FreeRanges::BinOf(count), Knowledge::kUnknown) >= kPurgeBatch;
}

// Mappings of changing sizes, or unmapped in parts, leave small extents that nobody asks for at their size. Given back,
// they merge into room for anything. (Large ones merge while they are cached, and serve any size.) A quarter of what the
// region has: so much was unmapped since the last time that giving it back costs each of these pages no more than an
// unmap of the kernel's, and a region that is in use grows by that.
bool Region::WorthPurgingLocked(const Vma& carved) const {
  if (!is_heap() || IsCommitted(carved.end_page() - 1, carved.end_page())) return false;
  return free_.small_pages() >= committed_pages_.load(std::memory_order_relaxed) / 4;
}

void Region::CleanBin(RegionPage count) {
  PurgeList list;
  Vma* taken[kExtentsPerHold];
  for (bool more = true; more && list.size < kPurgeBatch;) {
    sync::SpinLockHolder holder(tree_lock_);
    const std::size_t most = std::min<std::size_t>(kExtentsPerHold, kPurgeBatch - list.size);
    const std::size_t size = free_.TakeOldest(count, Knowledge::kUnknown, most, taken);
    for (std::size_t i = 0; i < size; ++i) AddToPurgeLocked(taken[i], list);
    more = size == most;
  }
  if (list.size == 0) return;
  SortRanges(list);
  const bool discarded = shared_.purge_stage->DiscardNow({list.ranges, list.range_count}).ok();
  (void)FinishPurging(list, discarded, /*keep=*/true);
}

// A fixed Map met an extent that is being purged. That ends without any lock that this thread holds, within
// one turn of the purge stage.
void Region::WaitForPurges() {
  while (purges_in_flight_.load(std::memory_order_acquire) != 0) os::YieldCpu();
}

}  // namespace freehold::vm
