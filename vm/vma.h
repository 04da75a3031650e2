// One extent of a region: a mapped VMA, or free address space. Extents tile their region.
#ifndef FREEHOLD_VM_VMA_H_
#define FREEHOLD_VM_VMA_H_

#include <atomic>
#include <cstdint>

#include "vm/os/kernel.h"
#include "vm/units.h"

namespace freehold::vm {

class Backing;

// Pages counted from the start of a region; 32 bits cover 16 TiB.
using RegionPage = std::uint32_t;

enum class VmaState : std::uint8_t {
  kFree,      // in the gap index; always kClean; neighbours that are free are one extent
  kCached,    // unmapped whole and kept for re-use at the same size, in a bin of FreeRanges
  kPending,   // chosen by a Map that is still preparing it; invisible to lookups
  kMapped,    // handed out; the only state that lookups report
  kDetached,  // unmapped, its pages are being zapped; held under a range lock
  kDeferred,  // unmapped while pinned: nobody touches it before the last pin goes
  kPurging,   // free, its pages are being given back; Region::purges_in_flight counts it
  kWindow,    // of a file: unmapped, but still in the kernel, for the next MapFile of the same; see WindowCache
};

// What is known about the pages of an extent that is not mapped.
enum class Knowledge : std::uint8_t {
  kClean,     // reads as zero, not resident
  kResident,  // every page is resident and may hold old data
  kUnknown,   // neither
};
inline constexpr int kKnowledgeCount = 3;

// What a mapping is, apart from where it lies. Its parts merge while these are equal.
struct VmaAttributes {
  os::Protection protection = os::Protection::kReadWrite;
  // Of a mapped extent, what was asked for; of any other, kNone unless the kernel refused to unlock it.
  os::MemoryLock lock = os::MemoryLock::kNone;
  // Unique for each mapping in its region, and for each attempt to make one: who drops every lock and
  // comes back checks that it is still the one it knew.
  std::uint64_t generation = 0;
  // Null: anonymous memory.
  Backing* backing = nullptr;
  // The backing's page that the region's first page would show: so parts of one mapping have the same.
  std::int64_t origin = 0;

  friend bool operator==(const VmaAttributes&, const VmaAttributes&) = default;
};

// Guarded by the tree lock of its region. The atomic fields are also read without it, between two equal and
// even values of `sequence` (VmaTree::Lookup). Objects are type-stable: they never go back to the arena.
struct alignas(kCacheLineSize) Vma {
  std::atomic<std::uint32_t> sequence{0};  // odd while the fields below change
  std::atomic<RegionPage> first{0};
  std::atomic<RegionPage> count{0};
  std::atomic<VmaState> state{VmaState::kFree};
  std::atomic<os::Protection> protection{os::Protection::kReadWrite};
  std::atomic<os::MemoryLock> lock{os::MemoryLock::kNone};
  // Not atomic, here for its size. Of mapped memory: the kernel refused to restore its lock or protection when a verb
  // failed. A reset when it is unmapped.
  bool unrestored = false;
  std::atomic<std::uint64_t> generation{0};
  std::atomic<Backing*> backing{nullptr};
  std::atomic<std::int64_t> origin{0};

  Knowledge knowledge = Knowledge::kClean;
  bool busy = false;            // a verb that holds its range is at work without the tree lock: do not merge
  bool kernel_vma = false;      // the kernel was asked for a protection other than the zone's own
  // A backing's kernel VMA, one that a Remap moved here, or one with lasting advice: only a reset takes it away.
  bool foreign = false;
  std::uint32_t freed_at = 0;   // coarse clock when it was cached
  Vma* newer = nullptr;         // neighbours in its bin, or the free list of Vma objects
  Vma* older = nullptr;

  RegionPage first_page() const { return first.load(std::memory_order_relaxed); }
  RegionPage page_count() const { return count.load(std::memory_order_relaxed); }
  RegionPage end_page() const { return first_page() + page_count(); }
  VmaAttributes attributes() const {
    return {.protection = protection.load(std::memory_order_relaxed),
            .lock = lock.load(std::memory_order_relaxed),
            .generation = generation.load(std::memory_order_relaxed),
            .backing = backing.load(std::memory_order_relaxed),
            .origin = origin.load(std::memory_order_relaxed)};
  }
  bool locked() const { return lock.load(std::memory_order_relaxed) != os::MemoryLock::kNone; }
  // Whether its kernel VMA is as the zone's other free memory: nothing to take back before it is free.
  bool is_zones_own() const { return !kernel_vma && !foreign && !unrestored && !locked(); }
  bool Is(VmaState s) const { return state.load(std::memory_order_relaxed) == s; }
};
static_assert(sizeof(Vma) == kCacheLineSize);

// Changes a Vma's reader-visible fields in its scope. The stores inside are releases, so that a reader that
// sees one of them also sees the odd sequence that came before (pairs with the acquires in VmaTree::Lookup).
class VmaWriter {
 public:
  explicit VmaWriter(Vma& vma)
      : vma_(vma), sequence_(vma.sequence.load(std::memory_order_relaxed)) {
    vma_.sequence.store(sequence_ + 1, std::memory_order_relaxed);
  }
  ~VmaWriter() { vma_.sequence.store(sequence_ + 2, std::memory_order_release); }
  VmaWriter(const VmaWriter&) = delete;
  VmaWriter& operator=(const VmaWriter&) = delete;

  void SetRange(RegionPage first, RegionPage count) {
    vma_.first.store(first, std::memory_order_release);
    vma_.count.store(count, std::memory_order_release);
  }
  void SetState(VmaState state) { vma_.state.store(state, std::memory_order_release); }
  void SetProtection(os::Protection p) { vma_.protection.store(p, std::memory_order_release); }
  void SetLock(os::MemoryLock l) { vma_.lock.store(l, std::memory_order_release); }
  void SetGeneration(std::uint64_t g) { vma_.generation.store(g, std::memory_order_release); }
  void SetBacking(Backing* backing, std::int64_t origin) {
    vma_.backing.store(backing, std::memory_order_release);
    vma_.origin.store(origin, std::memory_order_release);
  }
  void SetAttributes(const VmaAttributes& attributes) {
    SetProtection(attributes.protection);
    SetLock(attributes.lock);
    SetGeneration(attributes.generation);
    SetBacking(attributes.backing, attributes.origin);
  }

 private:
  Vma& vma_;
  const std::uint32_t sequence_;
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_VMA_H_
