// How much memory this process may have from Freehold: a soft limit, above which free memory goes back at once instead
// of by decay, and a hard one, above which there is no more: malloc returns null, operator new throws,
// mmap says ENOMEM.
//
// What counts is what may be resident: memory of the heap zones that is mapped, or free and not purged, less what the
// heap knows to be clean. So a mapping that was never touched counts in full. Not counted: mappings of files, memory
// that was mapped without access or protected otherwise, stacks, metadata, and what the kernel maps by itself.
//
// The sums are made where memory is taken, a few times per MiB, and on no faster path. Between a thread's question and
// its answer, what it asks for counts twice for a moment: so the hard limit holds under any number of threads, and may
// refuse as much too early as they ask for in that moment.
//
// Thread safety: thread-safe.
// Lock order:    use_lock_ (kRuntime), held over purges; lock_ (kHeapShard), held over sums only.
// Waiting:       MakeRoom and Relieve, for a thread that purges.
// Allocation:    none.
#ifndef FREEHOLD_RUNTIME_MEMORY_LIMIT_H_
#define FREEHOLD_RUNTIME_MEMORY_LIMIT_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "allocator/memory_limit.h"
#include "allocator/object_heap.h"
#include "vm/address_space.h"
#include "vm/sync/spin_lock.h"
#include "vm/units.h"

namespace freehold::runtime {

// A heap that counts; in a list.
struct LimitedHeap {
  allocator::ObjectHeap* heap = nullptr;
  LimitedHeap* next = nullptr;
  LimitedHeap* previous = nullptr;
};

class ProcessMemoryLimit final : public allocator::MemoryLimit {
 public:
  // Called when `bytes` are not to be had, with no lock held. May free memory, and then returns true to have it tried
  // again. A call within the call is not made.
  using OutOfMemoryHandler = int (*)(std::size_t bytes);

  struct Limits {
    vm::Bytes soft = {0};  // 0: none
    vm::Bytes hard = {0};
    friend bool operator==(const Limits&, const Limits&) = default;
  };

  constexpr ProcessMemoryLimit() = default;
  ProcessMemoryLimit(const ProcessMemoryLimit&) = delete;
  ProcessMemoryLimit& operator=(const ProcessMemoryLimit&) = delete;

  // Once, before anything else.
  void Init(vm::AddressSpace& space) { space_ = &space; }
  // From now on `heap`, of that space, counts; its free memory goes back with all other, and by Tick. REQUIRES: it is
  // in no list; it lives, where it is, until it is removed.
  void Add(LimitedHeap& heap);
  void Remove(LimitedHeap& heap);

  // At any time. Below what is in use, a hard limit refuses everything until enough came free.
  void Set(const Limits& limits);
  Limits Get() const;
  // A sum of counters that others change meanwhile.
  vm::Bytes InUse();
  // Of the heaps: free and possibly resident.
  vm::Bytes FreeDirty();
  // Returns the one before. Null: none.
  OutOfMemoryHandler SetHandler(OutOfMemoryHandler handler) {
    return handler_.exchange(handler, std::memory_order_acq_rel);
  }

  bool Admit(vm::Bytes bytes) override;
  void Settle(vm::Bytes bytes) override;
  void Relieve() override;
  bool MakeRoom(vm::Bytes bytes, unsigned attempt) override;
  // For a keeper: gives back what was free for long enough, in every heap; and what came free at all, while more than
  // the soft limit is in use.
  void Tick();

  // Requests that the hard limit refused, and purges that the soft limit asked for.
  std::uint64_t refusals() const { return refusals_.load(std::memory_order_relaxed); }
  std::uint64_t reliefs() const { return reliefs_.load(std::memory_order_relaxed); }

  // Around those of the heap and the space. In the child, all heaps but `survivor` are out of the list.
  void PrepareFork() ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void ParentAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void ChildAfterFork(LimitedHeap* survivor) ABSL_NO_THREAD_SAFETY_ANALYSIS;

 private:
  // Between purges on behalf of the soft limit, at least this long, and ten times as long as one takes; but no longer
  // than the other, should one take long because the thread did not run.
  static constexpr vm::Nanoseconds kReliefInterval = vm::Milliseconds(10);
  static constexpr vm::Nanoseconds kMaxReliefInterval = vm::Milliseconds(50);
  static constexpr std::uint64_t kReliefShare = 10;
  // Less is not worth a purge.
  static constexpr vm::Bytes kWorthwhile = vm::MiB(1);

  vm::Bytes Purge();
  vm::Bytes InUseLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // Of the heaps: mapped, but known not to be resident.
  vm::Bytes AbsentLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // What a purge could give back.
  vm::Bytes Purgeable();
  bool CallHandler(vm::Bytes bytes);

  vm::AddressSpace* space_ = nullptr;
  std::atomic<std::size_t> soft_{0};
  std::atomic<std::size_t> hard_{0};
  std::atomic<OutOfMemoryHandler> handler_{nullptr};
  // Keeps heaps in the list while they are worked on; lock_ does while they are looked at. Both to change it.
  vm::sync::SpinLock use_lock_{vm::sync::LockRank::kRuntime};
  vm::sync::SpinLock lock_{vm::sync::LockRank::kHeapShard};
  LimitedHeap* heaps_ = nullptr;
  // Admitted and not settled. Grows under lock_.
  std::atomic<std::size_t> in_flight_{0};
  std::atomic<std::uint64_t> next_relief_{0};  // CLOCK_MONOTONIC; written by the thread that won the turn
  std::atomic<std::uint64_t> refusals_{0};
  std::atomic<std::uint64_t> reliefs_{0};
};

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_MEMORY_LIMIT_H_
