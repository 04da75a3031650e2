#include "vm/metadata_arena.h"

#include <algorithm>

#include "vm/sync/lock_rank.h"

namespace freehold::vm {
namespace {

// One mprotect per step: rare enough for mmap_lock, small enough for strict overcommit. An arena that is larger
// than a huge page grows by huge pages: the kernel uses one only where all of it is committed at the first touch.
constexpr std::size_t kCommitStep = MiB(1).value;
constexpr std::size_t StepBelow(std::size_t end) { return end <= kHugePageSize ? kCommitStep : kHugePageSize; }

}  // namespace

Result<MetadataArena*> MetadataArena::Create(os::Kernel& kernel, Pages size) {
  const bool may_grow_huge = kernel.features().huge_pages && size.bytes().value > kHugePageSize;
  const Result<PageRange> range = kernel.Reserve(size, {may_grow_huge ? kPagesPerHugePage : 1});
  if (!range.ok()) return range.error();
  const std::size_t first_step = std::min(kCommitStep, size.bytes().value);
  const PageRange first = PageRange::FromBytes(range->address(), {first_step});
  kernel.AdviseCoreDumps(*range, os::CoreDumps::kOmit);
  kernel.AdviseCoreDumps(first, os::CoreDumps::kInclude);
  const Error committed = kernel.Protect(first, os::Protection::kReadWrite);
  if (!committed.ok()) {
    (void)kernel.Release(*range);
    return committed;
  }
  // Small pages serve as well.
  if (may_grow_huge) (void)kernel.AdviseHugePages(*range, os::HugePages::kPrefer);
  return new (range->address()) MetadataArena(kernel, *range, first_step);
}

void MetadataArena::Destroy(MetadataArena* arena) {
  os::Kernel& kernel = arena->kernel_;
  const PageRange range = arena->range_;
  arena->~MetadataArena();
  (void)kernel.Release(range);
}

void* MetadataArena::Allocate(Bytes size, std::size_t alignment) {
  sync::CheckNoShortLockHeld("MetadataArena::Allocate");
  std::size_t next = next_.load(std::memory_order_relaxed);
  for (;;) {
    const std::size_t start = (next + alignment - 1) & ~(alignment - 1);
    const std::size_t limit = range_.bytes().value;
    if (start > limit || size.value > limit - start) return nullptr;
    if (!CommitTo(start + size.value)) return nullptr;
    if (next_.compare_exchange_weak(next, start + size.value, std::memory_order_relaxed)) {
      return range_.address() + start;
    }
  }
}

// Threads may commit the same step at the same time: making it read-write twice does no harm, and no lock is
// held over the system call.
bool MetadataArena::CommitTo(std::size_t end) {
  std::size_t committed = committed_.load(std::memory_order_acquire);
  if (end <= committed) return true;
  const std::size_t unit = StepBelow(end);
  const std::size_t goal =
      std::min((end + unit - 1) / unit * unit, range_.bytes().value);
  const PageRange step = PageRange::FromBytes(range_.address() + committed, {goal - committed});
  kernel_.AdviseCoreDumps(step, os::CoreDumps::kInclude);
  if (!kernel_.Protect(step, os::Protection::kReadWrite).ok()) return false;
  // Release pairs with the acquire above: whoever sees the new bound may touch the memory.
  while (committed < goal &&
         !committed_.compare_exchange_weak(committed, goal, std::memory_order_release)) {
  }
  return true;
}

}  // namespace freehold::vm
