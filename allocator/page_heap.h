// The page heap: free units, and the chunks that they lie in. Spans come from here and go back here.
//
// It is cut into shards, so that threads seldom meet. A shard owns chunks; a request takes the tightest fitting
// run of its own shard, memory that may be resident before clean memory, then maps a new chunk. Another shard's
// memory is taken when that has much of it resident, so that it does not pile up, and when there is no room for
// a chunk. Free units go back to the kernel by age, chunks that are free as a whole to the address space.
//
// If asked for, blocks of 2 MiB that stay in use become huge pages, and then keep the little that is free in them.
//
// Thread safety: thread-safe.
// Lock order:    the purge lock (kHeap), then a shard's (kHeapShard), one at a time except around fork.
// Waiting:       for these locks. Discards and mappings happen with no shard lock held.
// Units:         units (kUnitSize) and bytes, as named.
// Invariants:    P1. dirty is a part of free, aged of dirty; what is free and not dirty reads as zero.
//                P2. A chunk is in its shard's lists by the longest runs of free and of dirty units.
//                P3. Units that are being discarded are in no set; the holder of the purge lock owns them.
#ifndef FREEHOLD_ALLOCATOR_PAGE_HEAP_H_
#define FREEHOLD_ALLOCATOR_PAGE_HEAP_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "allocator/chunk.h"
#include "allocator/heap_metadata.h"
#include "allocator/memory_limit.h"
#include "vm/address_space.h"
#include "vm/metric.h"
#include "vm/os/kernel.h"
#include "vm/sync/spin_lock.h"
#include "vm/units.h"

namespace freehold::allocator {

class PageHeap {
 public:
  static constexpr unsigned kMaxShards = 8;
  // What a shard keeps for its own threads of free memory that may be resident: 64 MiB.
  static constexpr std::uint64_t kKeptDirtyUnits = 1024;

  // Of a block's units, so many may be free while it counts as dense.
  static constexpr unsigned kDenseFree = 2;
  // And while it stays a huge page.
  static constexpr unsigned kHugeFree = 4;
  // A block becomes a huge page if no more of its pages than this would have to be made resident for that.
  static constexpr std::size_t kMostAbsentPages = vm::kPagesPerHugePage / 16;
  // Blocks looked at closely in a call of Age: each may take the kernel milliseconds.
  static constexpr unsigned kBlocksAtOnce = 4;

  struct Options {
    MemoryLimit* limit = nullptr;  // asked for what is not resident
    // kPrefer: for dense blocks.
    vm::os::HugePages huge_pages = vm::os::HugePages::kAvoid;
  };
  // REQUIRES: 1 <= shards <= kMaxShards. Keeps both references.
  PageHeap(vm::AddressSpace& space, const HeapMetadata& metadata, unsigned shards, const Options& options);
  PageHeap(const PageHeap&) = delete;
  PageHeap& operator=(const PageHeap&) = delete;

  // A run of units; their Span records are writable.
  struct Run {
    std::uintptr_t start = 0;  // 0: out of memory
    bool clean = false;        // reads as zero
  };
  // REQUIRES: 1 <= units <= kChunkUnits. `home` is any number; equal numbers share a shard.
  Run Allocate(unsigned home, unsigned units);
  // The same, where `room` units from the start of the run on are free, if there is such a place: for Extend.
  // REQUIRES: units <= room <= kChunkUnits.
  Run AllocateWithRoom(unsigned home, unsigned units, unsigned room);
  // Takes units behind the run [start, start + units): as many as are free there, up to `most`. Returns how many; none
  // unless `more` are to be had. REQUIRES: 1 <= more <= most.
  unsigned Extend(std::uintptr_t start, unsigned units, unsigned more, unsigned most);
  // Takes back units that were allocated together or not, within one chunk; their content does not matter.
  void Free(std::uintptr_t start, unsigned units);

  // Gives back to the kernel what is free since before the last call of Age, and makes blocks huge pages. Returns the
  // pages. Does nothing while another thread gives back.
  vm::Pages Age();
  // Gives back everything that is free.
  vm::Pages Trim();

  // Unmaps every chunk, whatever is in it. REQUIRES: nothing of it is used any more.
  void UnmapAll();

  // Calls `visit` with the address of every unit that is not free, in no particular order, under the lock of
  // its shard.
  void ForEachUsedUnit(void (*visit)(void* context, std::uintptr_t unit), void* context);

  // fork(2): from PrepareFork to the other, in parent and child, nobody is in a call.
  void PrepareFork() ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void UnlockAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS;

  struct Stats {
    std::uint64_t chunks = 0;
    std::uint64_t free_units = 0;
    std::uint64_t dirty_units = 0;  // of the free ones
    std::uint64_t purged_pages = 0;
    std::uint64_t collapsed_blocks = 0;  // so far
  };
  Stats GetStats() const;
  // What is free and not resident: never more than that, while others allocate too.
  vm::Bytes clean() const;
  void ForEachMetric(vm::MetricVisitor visit, void* context) const;

  // CHECKs P1, P2 and the sums. REQUIRES: nobody allocates or frees.
  void CheckInvariants();

 private:
  enum class Scope : std::uint8_t { kAged, kAll };
  enum class Memory : std::uint8_t { kDirty, kAny };

  using ChunkList = std::uint32_t;  // the first chunk's name, or 0

  // Chunks by the length of a run: lists, and a bit for each list that is not empty.
  struct RunIndex {
    std::array<ChunkList, kChunkUnits> lists = {};  // [length - 1]
    std::uint64_t occupied = 0;
  };

  struct alignas(vm::kCacheLineSize) Shard {
    vm::sync::SpinLock lock{vm::sync::LockRank::kHeapShard};
    ChunkList all ABSL_GUARDED_BY(lock) = 0;
    RunIndex by_free ABSL_GUARDED_BY(lock);
    RunIndex by_dirty ABSL_GUARDED_BY(lock);
    // Changed under the lock; read without it as hints.
    std::atomic<std::uint64_t> chunks{0};
    std::atomic<std::uint64_t> free_units{0};
    std::atomic<std::uint64_t> dirty_units{0};
    std::atomic<std::uint64_t> clean_units{0};  // free and not dirty
  };

  // What one round of a purge took out of the sets.
  struct PurgeBatch;

  Shard& HomeShard(unsigned home) { return shards_[home % shard_count_]; }

  // A null run: nothing fits, or for AllocateNewChunk, no memory. `room`: units that must be free there.
  Run AllocateFrom(Shard& shard, unsigned units, Memory memory, unsigned room);
  // `kept`: from shards with at least that many dirty units.
  Run AllocateElsewhere(const Shard& home, unsigned units, Memory memory, std::uint64_t kept);
  Run AllocateNewChunk(Shard& shard, unsigned units);
  Run TakeLocked(Shard& shard, ChunkRecord* chunk, unsigned first, unsigned units)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(shard.lock);
  unsigned ExtendAdmitted(ChunkRecord* chunk, unsigned first, unsigned more, unsigned most);
  void AddChunkLocked(Shard& shard, ChunkRecord* chunk) ABSL_EXCLUSIVE_LOCKS_REQUIRED(shard.lock);
  void RemoveChunkLocked(Shard& shard, ChunkRecord* chunk) ABSL_EXCLUSIVE_LOCKS_REQUIRED(shard.lock);
  // Sets the chunk's sets, and brings lists and sums in line.
  void UpdateLocked(Shard& shard, ChunkRecord* chunk, UnitSet free, UnitSet dirty)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(shard.lock);

  template <ChunkLink ChunkRecord::*kLink>
  void Push(ChunkList& list, ChunkRecord* chunk);
  template <ChunkLink ChunkRecord::*kLink>
  void Remove(ChunkList& list, ChunkRecord* chunk);
  template <ChunkLink ChunkRecord::*kLink>
  void Reindex(RunIndex& index, ChunkRecord* chunk, std::uint8_t& run, unsigned new_run);

  vm::Pages PurgeShards(Scope scope) ABSL_EXCLUSIVE_LOCKS_REQUIRED(purge_lock_);
  // Each round takes what is due out of the sets, drops its content, and puts it back.
  vm::Pages PurgeShard(Shard& shard, Scope scope) ABSL_EXCLUSIVE_LOCKS_REQUIRED(purge_lock_);
  // `cursor`: where the round starts, then where the next one does; null at the end.
  void CollectLocked(Shard& shard, Scope scope, ChunkRecord*& cursor, PurgeBatch& batch)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(shard.lock);
  // What of `due` is to go: not the little in a block that is a huge page, unless all is to go.
  static UnitSet ChooseDue(ChunkRecord* chunk, UnitSet due, Scope scope);
  // Blocks that were dense at two calls, and are resident.
  void CollapseBlocks() ABSL_EXCLUSIVE_LOCKS_REQUIRED(purge_lock_);
  struct Candidate;
  // Notes which blocks are dense; returns how many of those that were before it put into `candidates`.
  unsigned FindDenseLocked(Shard& shard, Candidate* candidates, unsigned capacity)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(shard.lock);
  // Whether it is a huge page now.
  bool Collapse(const Candidate& candidate) ABSL_EXCLUSIVE_LOCKS_REQUIRED(purge_lock_);
  void UnmapIdleChunks(Shard& shard, Scope scope) ABSL_EXCLUSIVE_LOCKS_REQUIRED(purge_lock_);
  ChunkRecord* TakeIdleChunk(Shard& shard, Scope scope) ABSL_EXCLUSIVE_LOCKS_REQUIRED(purge_lock_);

  vm::AddressSpace& space_;
  const HeapMetadata& metadata_;
  const unsigned shard_count_;
  MemoryLimit* const limit_;
  bool collapses_ ABSL_GUARDED_BY(purge_lock_);
  // One thread purges at a time, over all of its discards, and it alone removes chunks.
  vm::sync::SpinLock purge_lock_{vm::sync::LockRank::kHeap};
  std::atomic<std::uint64_t> purged_pages_{0};
  std::atomic<std::uint64_t> collapsed_blocks_{0};
  std::array<Shard, kMaxShards> shards_;
};

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_PAGE_HEAP_H_
