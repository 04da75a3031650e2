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

// A chunk that comes or goes meanwhile is in one of the two readings of what is absent only, so it is not subtracted
// from a sum that it is not in.
Bytes ProcessMemoryLimit::InUse() const {
  const Bytes before = Absent();
  const vm::AddressSpaceStats space = space_->Stats();
  const Bytes present = space.mapped_ordinary + space.free_resident;
  const Bytes absent = std::min(before, Absent());
  return present - std::min(present, absent);
}

Bytes ProcessMemoryLimit::Absent() const { return heap_ != nullptr ? heap_->absent() : Bytes{0}; }

Bytes ProcessMemoryLimit::Purgeable() const {
  const vm::AddressSpaceStats space = space_->Stats();
  const Bytes heap = heap_ != nullptr ? heap_->free_dirty() : Bytes{0};
  return space.free_resident + space.window_bytes + heap;
}

bool ProcessMemoryLimit::Admit(Bytes bytes) {
  const Limits limits = Get();
  vm::sync::SpinLockHolder holder(lock_);
  // First what is in flight, then what is there: acquire pairs with the release in Settle, so whoever is not in the
  // one any more is in the other.
  const Bytes in_flight = Bytes{in_flight_.load(std::memory_order_acquire)} + bytes;
  const Bytes wanted = InUse() + in_flight;
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
  const Bytes heap = {heap_ != nullptr ? heap_->Trim() : 0};
  return heap + space_->Purge(vm::PurgeScope::kAll).bytes();
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
  const std::uint64_t rest = std::max(kReliefInterval.value, (end - start).value * kReliefShare);
  next_relief_.store(end.value + rest, std::memory_order_relaxed);
}

void ProcessMemoryLimit::Tick() {
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

// Whoever else was asking, or purging, is not here.
void ProcessMemoryLimit::ChildAfterFork() {
  in_flight_.store(0, std::memory_order_relaxed);
  next_relief_.store(0, std::memory_order_relaxed);
  lock_.UnlockAfterFork();
}

}  // namespace freehold::runtime
