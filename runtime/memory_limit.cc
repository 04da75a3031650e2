#include "runtime/memory_limit.h"

#include <algorithm>
#include <cerrno>

namespace freehold::runtime {
namespace {

using vm::Bytes;

// The calling thread is in the program's handler.
constinit thread_local bool in_handler __attribute__((tls_model("initial-exec"))) = false;

}  // namespace

void ProcessMemoryLimit::Set(const Limits& limits) {
  soft_.store(limits.soft.value, std::memory_order_relaxed);
  hard_.store(limits.hard.value, std::memory_order_relaxed);
  is_set_.store(limits != Limits{}, std::memory_order_relaxed);
  if (limits == Limits{}) wants_relief_.store(false, std::memory_order_relaxed);
}

ProcessMemoryLimit::Limits ProcessMemoryLimit::Get() const {
  return {.soft = {soft_.load(std::memory_order_relaxed)}, .hard = {hard_.load(std::memory_order_relaxed)}};
}

void ProcessMemoryLimit::Add(LimitedHeap& heap) {
  vm::sync::SpinLockHolder using_heaps(use_lock_);
  vm::sync::SpinLockHolder holder(lock_);
  heap.previous = nullptr;
  heap.next = heaps_;
  if (heaps_ != nullptr) heaps_->previous = &heap;
  heaps_ = &heap;
}

void ProcessMemoryLimit::Remove(LimitedHeap& heap) {
  vm::sync::SpinLockHolder using_heaps(use_lock_);
  vm::sync::SpinLockHolder holder(lock_);
  (heap.previous != nullptr ? heap.previous->next : heaps_) = heap.next;
  if (heap.next != nullptr) heap.next->previous = heap.previous;
}

Bytes ProcessMemoryLimit::AbsentLocked() const {
  Bytes sum = {0};
  for (const LimitedHeap* limited = heaps_; limited != nullptr; limited = limited->next) {
    sum = sum + limited->heap->absent();
  }
  return sum;
}

Bytes ProcessMemoryLimit::FreeDirty() {
  vm::sync::SpinLockHolder holder(lock_);
  Bytes sum = {0};
  for (const LimitedHeap* limited = heaps_; limited != nullptr; limited = limited->next) {
    sum = sum + limited->heap->free_dirty();
  }
  return sum;
}

// A chunk that comes or goes meanwhile is in one of the two readings of what is absent only, so it is not subtracted
// from a sum that it is not in.
Bytes ProcessMemoryLimit::InUseLocked() const {
  const Bytes before = AbsentLocked();
  const vm::AddressSpaceStats space = space_->Stats();
  const Bytes present = space.mapped_ordinary + space.free_resident;
  const Bytes absent = std::min(before, AbsentLocked());
  return present - std::min(present, absent);
}

Bytes ProcessMemoryLimit::InUse() {
  vm::sync::SpinLockHolder holder(lock_);
  return InUseLocked();
}

Bytes ProcessMemoryLimit::Purgeable() {
  const vm::AddressSpaceStats space = space_->Stats();
  return space.free_resident + space.window_bytes + FreeDirty();
}

bool ProcessMemoryLimit::Admit(Bytes bytes) {
  const Limits limits = Get();
  vm::sync::SpinLockHolder holder(lock_);
  // First what is in flight, then what is there: acquire pairs with the release in Settle, so whoever is not in the
  // one any more is in the other.
  const Bytes in_flight = Bytes{in_flight_.load(std::memory_order_acquire)} + bytes;
  const Bytes wanted = InUseLocked() + in_flight;
  if (limits.hard.value != 0 && wanted > limits.hard) {
    refusals_.fetch_add(1, std::memory_order_relaxed);
    return false;
  }
  if (limits.soft.value != 0 && wanted > limits.soft) wants_relief_.store(true, std::memory_order_relaxed);
  in_flight_.fetch_add(bytes.value, std::memory_order_relaxed);
  return true;
}

void ProcessMemoryLimit::Settle(Bytes bytes) { in_flight_.fetch_sub(bytes.value, std::memory_order_release); }

Bytes ProcessMemoryLimit::Purge() {
  Bytes sum = {0};
  {
    vm::sync::SpinLockHolder using_heaps(use_lock_);
    for (LimitedHeap* limited = heaps_; limited != nullptr; limited = limited->next) {
      sum = sum + Bytes{limited->heap->Trim()};
    }
  }
  return sum + space_->Purge(vm::PurgeScope::kAll).bytes();
}

void ProcessMemoryLimit::Relieve() {
  const vm::Nanoseconds start = space_->kernel().Now();
  std::uint64_t due = next_relief_.load(std::memory_order_relaxed);
  if (start.value < due) return;
  // Nobody else's turn until this one knows how long it took.
  if (!next_relief_.compare_exchange_strong(due, UINT64_MAX, std::memory_order_relaxed)) return;
  wants_relief_.store(false, std::memory_order_relaxed);
  const Bytes soft = Get().soft;
  if (soft.value != 0 && InUse() > soft && Purgeable() >= kWorthwhile) {
    (void)Purge();
    reliefs_.fetch_add(1, std::memory_order_relaxed);
  }
  const vm::Nanoseconds end = space_->kernel().Now();
  const std::uint64_t rest =
      std::clamp((end - start).value * kReliefShare, kReliefInterval.value, kMaxReliefInterval.value);
  next_relief_.store(end.value + rest, std::memory_order_relaxed);
}

void ProcessMemoryLimit::Tick() {
  {
    const vm::Nanoseconds now = space_->kernel().Now();
    vm::sync::SpinLockHolder using_heaps(use_lock_);
    for (LimitedHeap* limited = heaps_; limited != nullptr; limited = limited->next) limited->heap->Tick(now);
  }
  const Bytes soft = Get().soft;
  if (soft.value != 0 && InUse() > soft) Relieve();
}

bool ProcessMemoryLimit::MakeRoom(Bytes bytes, unsigned attempt) {
  if (attempt == 0 && Purge().value != 0) return true;
  if (!CallHandler(bytes)) return false;
  // What the handler freed may be too scattered, or elsewhere.
  (void)Purge();
  return true;
}

bool ProcessMemoryLimit::CallHandler(Bytes bytes) {
  const OutOfMemoryHandler handler = handler_.load(std::memory_order_acquire);
  if (handler == nullptr || in_handler) return false;
  const int before = errno;
  in_handler = true;
  const bool again = handler(bytes.value) != 0;
  in_handler = false;
  errno = before;
  return again;
}

// Nobody works on a heap from here on, so nobody waits for the fork with use_lock_ held.
void ProcessMemoryLimit::PrepareFork() {
  use_lock_.LockForFork();
}

void ProcessMemoryLimit::ParentAfterFork() {
  use_lock_.UnlockAfterFork();
}

// Whoever else was asking, or purging, is not here.
void ProcessMemoryLimit::ChildAfterFork(LimitedHeap* survivor) {
  lock_.ReinitAfterFork();
  if (survivor != nullptr) survivor->next = survivor->previous = nullptr;
  heaps_ = survivor;
  in_flight_.store(0, std::memory_order_relaxed);
  next_relief_.store(0, std::memory_order_relaxed);
  use_lock_.UnlockAfterFork();
}

}  // namespace freehold::runtime
