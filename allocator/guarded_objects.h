// Objects that lie alone between inaccessible pages, so that a stray access to one traps: a few, chosen like the samples
// of the heap profile, out of a fixed pool of slots.
//
//     slot: one unit of 16 pages   | 4 pages | up to 8 pages of the object | 4 pages |
//                                   no access  open while it is allocated    no access
//
//     the object's pages           |object      fill|   or   |fill      object fill|     at random
//
// An object begins with its first page or ends with its last one, but for what alignment takes; the rest of its pages is
// filled, and looked at when it is freed. From then on nobody may access them, until all other free slots have been used:
// they form a queue. Each slot keeps who allocated and who freed its last object.
//
// Accesses are trapped by guard regions (MADV_GUARD_INSTALL), which change no kernel VMA: the pool is one. Where there
// are none, by protections, which cut the pool into two VMAs a slot at most.
//
// Thread safety: thread-safe. Find is async-signal-safe.
// Lock order:    lock_ (kHeapProfile), which is held for no call into heap, space or kernel.
// Waiting:       for lock_.
// Allocation:    records from an arena of its own; pages from the space, all at the start.
// Errors:        null when no slot is free, or the system refuses; a wrong free stops the program.
// Invariants:    G1. A slot is in the queue, or an object's, or a call of this class has it. Only that call changes what
//                    may be accessed of it.
#ifndef FREEHOLD_ALLOCATOR_GUARDED_OBJECTS_H_
#define FREEHOLD_ALLOCATOR_GUARDED_OBJECTS_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/types/span.h"
#include "allocator/misuse.h"
#include "allocator/size_class.h"
#include "vm/metadata_arena.h"
#include "vm/metric.h"
#include "vm/os/kernel.h"
#include "vm/page_range.h"
#include "vm/sync/spin_lock.h"
#include "vm/units.h"

namespace freehold::allocator {

class ObjectHeap;
struct AllocationSite;

// Who did something, and where.
struct GuardedEvent {
  static constexpr unsigned kMaxDepth = 32;

  std::uint32_t thread = 0;  // the kernel's id; 0: it did not happen
  std::uint32_t depth = 0;
  void* frames[kMaxDepth] = {};  // return addresses, innermost first

  absl::Span<void* const> stack() const { return {frames, depth}; }
};

// What is known of the object that a slot holds, or held last.
struct GuardedObject {
  const void* object = nullptr;
  std::size_t size = 0;
  bool freed = false;
  GuardedEvent allocation = {};
  GuardedEvent free = {};
};

struct GuardOptions {
  // A guarded object every so many bytes on average; 0: none; 1: every object that fits.
  vm::Bytes interval = {0};
  std::uint32_t slots = 1024;
  // As HeapProfileOptions's. REQUIRES, with an interval: not null.
  unsigned (*capture)(void** frames, unsigned most) = nullptr;
  // Called before the program is stopped for what it did to an object, after the line that says what. May be null.
  void (*explain)(const GuardedObject& object) = nullptr;
};

class GuardedObjects {
 public:
  // What fits into a slot.
  static constexpr std::size_t kMaxSize = std::size_t{32} << 10;
  static constexpr std::size_t kMaxAlignment = vm::kPageSize;
  static constexpr std::uint32_t kMaxSlots = 16384;

  // A pool for `heap`, whose options have an interval; null if there is no memory. REQUIRES: `heap` is used by nobody yet.
  static GuardedObjects* Create(ObjectHeap& heap, const GuardOptions& options);
  // Gives its memory back. REQUIRES: nobody uses the heap any more.
  static void Destroy(GuardedObjects* guards);

  GuardedObjects(const GuardedObjects&) = delete;
  GuardedObjects& operator=(const GuardedObjects&) = delete;

  vm::Bytes interval() const { return options_.interval; }
  static bool Fits(std::size_t size, std::size_t alignment) {
    return size <= kMaxSize && alignment <= kMaxAlignment;
  }

  // An object of `size` bytes, which read as zero; null: no slot is free. REQUIRES: Fits(size, alignment).
  void* Allocate(std::size_t size, std::size_t alignment);
  // The object's size, exactly. Stops the program, naming `call`, unless `p` is an allocated object of the pool. REQUIRES:
  // Owns(p).
  std::size_t SizeOf(const char* call, const void* p);
  // Frees `p`. Stops the program as SizeOf, and if what lies around the object was written to. REQUIRES: Owns(p).
  void Free(const char* call, void* p);
  // The object is a sample of the heap profile, too. REQUIRES: `p` was allocated by the caller just now.
  void SetSite(const void* p, AllocationSite* site);

  bool Owns(const void* p) const { return SlotNumberOf(p) < slot_count_; }
  // What lies at `address`, or nearest to it in its slot, and when nothing ever did in the slot before it. False if that
  // is nothing, `address` is not the pool's, or other threads keep the lock for as long as a handler of a signal may wait.
  bool Find(const void* address, GuardedObject& found);

  void ForEachMetric(vm::MetricVisitor visit, void* context) const;

  // fork(2): as ObjectHeap's; after the profile's in PrepareFork. A slot that a call has in another thread stays
  // unused in the child.
  void PrepareFork() ABSL_NO_THREAD_SAFETY_ANALYSIS { lock_.LockForFork(); }
  void UnlockAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS { lock_.UnlockAfterFork(); }

  // CHECKs G1, for a time when no call is running.
  void CheckInvariants();

 private:
  enum class State : std::uint8_t {
    kUnused,  // in the queue, and nothing was ever there
    kFreed,   // in the queue
    kTaken,   // a call has it
    kLive,    // an object's
  };
  struct Slot {
    State state = State::kUnused;
    bool protection = false;  // what keeps accesses away is the kernel VMA's protection, not a guard region. G1
    std::uint32_t next = 0;   // in the queue
    AllocationSite* site = nullptr;
    GuardedObject last;
  };
  static constexpr std::uint32_t kNone = ~std::uint32_t{0};

  GuardedObjects(ObjectHeap& heap, const GuardOptions& options, vm::MetadataArena& arena, Slot* slots,
                 vm::PageRange memory, std::uint64_t seed);

  std::size_t SlotNumberOf(const void* p) const {
    return (reinterpret_cast<std::uintptr_t>(p) - reinterpret_cast<std::uintptr_t>(memory_.address())) >> kUnitShift;
  }
  // Gives each unit a record that says what it is. False: no memory.
  bool MarkUnits();
  // Makes all of it inaccessible, as it stays but for the pages of objects. False if the system refuses.
  bool Guard();
  // Of the slot: what an object of `size` bytes gets.
  vm::PageRange PagesOf(std::size_t slot, std::size_t size) const;
  vm::os::Kernel& kernel() const;
  GuardedEvent Capture() const;
  // kNone when there is none. The caller has the slot then.
  std::uint32_t Take(bool& at_end);
  void Enqueue(std::uint32_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // For who has the slot. Makes `pages` of it accessible, and inaccessible again, without content. False if the system
  // refuses.
  bool Open(Slot& slot, vm::PageRange pages);
  bool Close(Slot& slot, vm::PageRange pages);
  // The first byte around the object that is not as Fill left it; null if all are.
  static const unsigned char* FindWritten(vm::PageRange pages, const GuardedObject& object);
  static void Fill(vm::PageRange pages, const GuardedObject& object);
  // The slot whose object `p` is, which the caller has from now on if it `takes` it; else the program is stopped.
  Slot& CheckedSlot(const char* call, const void* p, bool takes);
  [[noreturn]] void Stop(MisuseReport report, const GuardedObject& object) const;

  ObjectHeap& heap_;
  const GuardOptions options_;
  vm::MetadataArena& arena_;
  Slot* const slots_;
  const std::uint32_t slot_count_;
  const vm::PageRange memory_;  // a unit a slot

  vm::sync::SpinLock lock_{vm::sync::LockRank::kHeapProfile};
  std::uint32_t first_ ABSL_GUARDED_BY(lock_) = kNone;  // of the queue: free for the longest time
  std::uint32_t last_ ABSL_GUARDED_BY(lock_) = kNone;
  std::uint64_t random_ ABSL_GUARDED_BY(lock_);

  std::atomic<std::uint64_t> allocated_{0};  // ever
  std::atomic<std::uint64_t> dropped_{0};
  std::atomic<std::uint64_t> live_{0};  // as the next one changed under lock_, with the states
  std::atomic<std::uint64_t> live_bytes_{0};
};

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_GUARDED_OBJECTS_H_
