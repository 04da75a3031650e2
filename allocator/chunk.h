// Chunks: what the heap takes from the address space and cuts into spans. A chunk is 64 units, so that one word
// holds a bit for each of them.
#ifndef FREEHOLD_ALLOCATOR_CHUNK_H_
#define FREEHOLD_ALLOCATOR_CHUNK_H_

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "allocator/size_class.h"
#include "vm/units.h"

namespace freehold::allocator {

inline constexpr unsigned kChunkUnits = 64;
inline constexpr unsigned kChunkShift = kUnitShift + 6;
inline constexpr std::size_t kChunkSize = std::size_t{1} << kChunkShift;
// What may be one huge page: a part of a chunk.
inline constexpr unsigned kBlockUnits = vm::kHugePageSize / kUnitSize;
inline constexpr unsigned kChunkBlocks = kChunkUnits / kBlockUnits;

// A set of units of one chunk; bit i is the unit at i * kUnitSize.
class UnitSet {
 public:
  constexpr UnitSet() = default;
  // The units [first, first + count). REQUIRES: 1 <= count, first + count <= kChunkUnits.
  static constexpr UnitSet Of(unsigned first, unsigned count) {
    return UnitSet((~std::uint64_t{0} >> (kChunkUnits - count)) << first);
  }
  static constexpr UnitSet All() { return UnitSet(~std::uint64_t{0}); }

  constexpr bool empty() const { return bits_ == 0; }
  constexpr bool full() const { return ~bits_ == 0; }
  constexpr unsigned count() const { return static_cast<unsigned>(std::popcount(bits_)); }
  constexpr bool Contains(UnitSet other) const { return (other.bits_ & ~bits_) == 0; }
  constexpr bool Overlaps(UnitSet other) const { return (other.bits_ & bits_) != 0; }
  // The lowest unit in the set. REQUIRES: not empty.
  constexpr unsigned first() const { return static_cast<unsigned>(std::countr_zero(bits_)); }
  // How many units from `first` on are in the set without a gap.
  constexpr unsigned RunAt(unsigned first) const {
    return static_cast<unsigned>(std::countr_one(bits_ >> first));
  }

  // The length of the longest run of units.
  constexpr unsigned LongestRun() const {
    const Doublings starts = MakeDoublings();
    std::uint64_t found = ~std::uint64_t{0};  // where runs of `length` start
    unsigned length = 0;
    for (int log2 = 6; log2 >= 0; --log2) {
      if (length == kChunkUnits) break;
      const std::uint64_t longer = found & (starts[log2] >> length);
      if (longer == 0) continue;
      found = longer;
      length += 1u << log2;
    }
    return length;
  }
  // The lowest unit where a run of at least `length` starts, or kChunkUnits. REQUIRES: 1 <= length <= 64.
  constexpr unsigned FindRun(unsigned length) const {
    return static_cast<unsigned>(std::countr_zero(StartsOfRuns(length)));
  }
  // The highest one. REQUIRES: there is one.
  constexpr unsigned FindLastRun(unsigned length) const {
    return kChunkUnits - 1 - static_cast<unsigned>(std::countl_zero(StartsOfRuns(length)));
  }

  friend constexpr UnitSet operator|(UnitSet a, UnitSet b) { return UnitSet(a.bits_ | b.bits_); }
  friend constexpr UnitSet operator&(UnitSet a, UnitSet b) { return UnitSet(a.bits_ & b.bits_); }
  // The units of `a` that are not in `b`.
  friend constexpr UnitSet operator-(UnitSet a, UnitSet b) { return UnitSet(a.bits_ & ~b.bits_); }
  friend constexpr bool operator==(UnitSet, UnitSet) = default;

 private:
  // [k]: where runs of 2^k units start.
  using Doublings = std::array<std::uint64_t, 7>;

  constexpr explicit UnitSet(std::uint64_t bits) : bits_(bits) {}
  constexpr Doublings MakeDoublings() const {
    Doublings starts{bits_};
    for (unsigned log2 = 1; log2 <= 6; ++log2) {
      starts[log2] = starts[log2 - 1] & (starts[log2 - 1] >> (1u << (log2 - 1)));
    }
    return starts;
  }
  // A bit for each unit where a run of at least `length` starts.
  constexpr std::uint64_t StartsOfRuns(unsigned length) const {
    const Doublings starts = MakeDoublings();
    std::uint64_t found = ~std::uint64_t{0};
    unsigned done = 0;
    for (int log2 = 6; log2 >= 0; --log2) {
      if ((length & (1u << log2)) == 0) continue;
      found &= starts[log2] >> done;
      done += 1u << log2;
    }
    return found;
  }

  std::uint64_t bits_ = 0;
};

// Whether, and where, a chunk is in one of its shard's lists.
struct ChunkLink {
  std::uint32_t next = 0;  // names
  std::uint32_t previous = 0;
};

// The record of a chunk; guarded by the lock of its shard. All zeroes for what is not the heap's.
struct alignas(vm::kCacheLineSize) ChunkRecord {
  std::uintptr_t start = 0;
  UnitSet free = {};   // in no span
  UnitSet dirty = {};  // of `free`: may be resident; the rest of `free` reads as zero
  UnitSet aged = {};   // of `dirty`: free since before the last tick
  ChunkLink all = {};       // in the list of all chunks
  ChunkLink by_free = {};   // among the chunks of equal longest free run
  ChunkLink by_dirty = {};  // among the chunks of equal longest dirty run
  std::uint8_t free_run = 0;  // LongestRun(), as the lists know it; 0: in no list
  std::uint8_t dirty_run = 0;
  std::uint8_t shard = 0;
  bool idle = false;  // wholly free and clean at the last tick
  // Bits for blocks; see PageHeap::CollapseBlocks.
  std::uint8_t dense = 0;   // hardly anything was free at the last tick
  std::uint8_t judged = 0;  // of `dense`: worth a huge page or not, and nobody looks again
  std::uint8_t huge = 0;    // of `judged`: made one
};
static_assert(sizeof(ChunkRecord) == vm::kCacheLineSize);

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_CHUNK_H_
