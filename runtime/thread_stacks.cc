#include "runtime/thread_stacks.h"

#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>

#include "runtime/stack_overflow.h"
#include "vm/os/raw_syscall.h"
#include "vm/os/thread_id.h"

namespace freehold::runtime {
namespace {

using vm::Bytes;
using vm::Error;
using vm::kPageSize;
using vm::os::RawSyscall;
using Residue = StackPool::Residue;

// States of a thread with a stack of the pool.
constexpr std::uint32_t kThread = 1;
constexpr std::uint32_t kDetached = 2;
constexpr std::uint32_t kEnded = 4;

// Detached threads that one Create looks at.
constexpr std::size_t kReapAtOnce = 2;

// Destructors of thread-specific data run in rounds; in the second, those of others have had a turn.
constexpr std::uintptr_t kSecondRound = 1;
static_assert(alignof(StackSlot) > kSecondRound);

// Below what a thread uses at its end, so much stays resident for the next one.
constexpr std::size_t kKeptPages = StackPool::kHotPages;

// libc wants no more alignment of a stack's end than this, and rounds sizes down to it.
constexpr std::size_t kStackAlignment = 64;

// A thread with little to do has started on another processor and is gone by then.
constexpr vm::Nanoseconds kJoinSpin = vm::Microseconds(20);

// The faults of the calling thread so far, which is at least as many as the pages that it made resident anywhere.
std::uint32_t FaultsOfThisThread() {
  rusage usage = {};
  RawSyscall(SYS_getrusage, RUSAGE_THREAD, &usage);
  return static_cast<std::uint32_t>(std::min<long>(usage.ru_minflt + usage.ru_majflt, INT32_MAX));
}

// The kernel's id of `thread`, which is neither joined nor detached yet; 0 when the kernel is done with it. libc says
// it in the number of the clock that counts the thread's time, whose form is Linux's interface.
int ThreadIdOf(pthread_t thread) {
  clockid_t clock = 0;
  if (pthread_getcpuclockid(thread, &clock) != 0) return 0;
  return ~(clock >> 3);
}

}  // namespace

// Beside the stack, in its slot. Written by Create before the thread exists, but for what says otherwise.
struct ThreadStacks::Record {
  // kThread, kDetached, kEnded. Acquire and release: who sets the last bit sees what the others wrote.
  std::atomic<std::uint32_t> state;
  // Of a detached thread: 0 if the kernel was done with it when it was detached. Written by who detaches it, before
  // kDetached; or by the thread at its end, before kEnded.
  int thread_id;
  // Pages that users of this stack may have made resident since memory was last given back. Written by the thread.
  std::uint32_t faults;
  bool detached_from_start;
  ThreadStacks* owner;
  void* (*start)(void*);
  void* argument;
  std::size_t guard;  // as libc would report it
  StackSlot* next;    // in the queue, under its lock
};

constinit ThreadStacks process_thread_stacks;

ThreadStacks::Record& ThreadStacks::RecordOf(StackSlot* slot) {
  static_assert(sizeof(Record) <= StackSlot::kRecordBytes);
  return *static_cast<Record*>(slot->record());
}

void ThreadStacks::UseLibc(const LibcThreads& libc) {
  const vm::sync::SpinLockHolder holder(lock_);
  if (knows_libc_.load(std::memory_order_relaxed)) return;
  libc_ = libc;
  // Pairs with the acquire of knows_libc().
  knows_libc_.store(true, std::memory_order_release);
}

// Under the lock, so that no fork comes in between.
Error ThreadStacks::Start(vm::AddressSpace& space, Overflows overflows, void (*at_thread_end)()) {
  const vm::sync::SpinLockHolder holder(lock_);
  if (pool() != nullptr) return Error::Ok();
  process_id_ = static_cast<int>(RawSyscall(SYS_getpid));
  if (!has_end_key_) {
    if (const int error = pthread_key_create(&end_key_, OnThreadEnd); error != 0) return Error::System(error);
    has_end_key_ = true;
  }
  const vm::Result<StackPool*> pool = StackPool::Create(space);
  if (!pool.ok()) return pool.error();
  if (overflows == Overflows::kReported && ReportOverflows(**pool)) alternate_stack_ = kAlternateStack;
  at_thread_end_ = at_thread_end;
  pool_.store(*pool, std::memory_order_release);
  return Error::Ok();
}

void ThreadStacks::Stop() {
  while (Exiting() > 0) Reap(SIZE_MAX);
  StackPool::Destroy(pool_.exchange(nullptr, std::memory_order_acq_rel));
  pthread_key_delete(end_key_);
  has_end_key_ = false;
}

// ---- Creating ----

std::byte* ThreadStacks::TopOf(const StackSlot* slot) const {
  return slot->stack().end.address() - alternate_stack_.value;
}

std::byte* ThreadStacks::LowOf(const StackSlot* slot, std::size_t size) const {
  return vm::PageNumber::Of(TopOf(slot) - size).address();
}

StackSlot* ThreadStacks::AcquireFor(const Shape& shape) {
  // What libc refuses, it shall refuse itself.
  constexpr std::size_t kMost = SIZE_MAX / 4;
  if (shape.size > kMost || shape.guard > kMost) return nullptr;
  const Bytes size = vm::PagesFor({shape.size + alternate_stack_.value}).bytes();
  const vm::Result<StackSlot*> slot = pool()->Acquire(size, {shape.guard});
  return slot.ok() ? *slot : nullptr;
}

int ThreadStacks::Create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  if (pool() == nullptr) return libc_.create(thread, attributes, start, argument);
  pthread_attr_t own;
  if (attributes != nullptr) {
    // With all that libc keeps behind pointers, which remain the caller's.
    std::memcpy(&own, attributes, sizeof(own));
  } else if (pthread_getattr_default_np(&own) != 0) {
    return libc_.create(thread, attributes, start, argument);
  }
  void* low = nullptr;
  std::size_t size = 0;
  int detached = PTHREAD_CREATE_JOINABLE;
  Shape shape = {};
  // Without a stack of its own, its end is 0.
  const bool has_stack =
      pthread_attr_getstack(&own, &low, &size) == 0 && reinterpret_cast<std::uintptr_t>(low) + size != 0;
  StackSlot* slot = nullptr;
  if (!has_stack && pthread_attr_getstacksize(&own, &shape.size) == 0 &&
      pthread_attr_getguardsize(&own, &shape.guard) == 0 && pthread_attr_getdetachstate(&own, &detached) == 0) {
    shape.guard = shape.guard > SIZE_MAX - kPageSize ? SIZE_MAX : vm::PagesFor({shape.guard}).bytes().value;
    shape.size &= ~(kStackAlignment - 1);
    shape.detached = detached == PTHREAD_CREATE_DETACHED;
    if (has_orphans_.load(std::memory_order_relaxed)) ReleaseOrphans();
    if (any_exiting_.load(std::memory_order_relaxed)) Reap(kReapAtOnce);
    slot = AcquireFor(shape);
  }
  int error = 0;
  if (slot == nullptr || pthread_attr_setstack(&own, LowOf(slot, shape.size), shape.size) != 0) {
    if (slot != nullptr) pool()->Release(slot, Residue::kNone);
    error = libc_.create(thread, attributes, start, argument);
  } else {
    Record& record = RecordOf(slot);
    record.owner = this;
    record.start = start;
    record.argument = argument;
    record.guard = shape.guard;
    record.detached_from_start = shape.detached;
    // Release pairs with the acquires of SlotOf, by threads that were told of this one.
    record.state.store(kThread | (shape.detached ? kDetached : 0), std::memory_order_release);
    error = libc_.create(thread, &own, ThreadMain, slot);
    if (error != 0) {
      // libc waits for a thread that it could not set up.
      record.state.store(0, std::memory_order_relaxed);
      pool()->Release(slot, Residue::kNone);
    }
  }
  if (attributes == nullptr) pthread_attr_destroy(&own);
  return error;
}

// Unwound through by pthread_exit and cancellation: nothing here may need a destructor.
void* ThreadStacks::ThreadMain(void* argument) {
  auto* slot = static_cast<StackSlot*>(argument);
  const Record& record = RecordOf(slot);
  ThreadStacks& owner = *record.owner;
  if (owner.alternate_stack_.value != 0) UseAlternateStack(owner.TopOf(slot));
  // Cannot fail: the key is among those that have their place in the descriptor, or libc has no memory; then the end
  // goes unnoticed until somebody joins.
  (void)pthread_setspecific(owner.end_key_, slot);
  return record.start(record.argument);
}

// ---- Ending ----

void ThreadStacks::OnThreadEnd(void* value) {
  const auto bits = reinterpret_cast<std::uintptr_t>(value);
  auto* slot = reinterpret_cast<StackSlot*>(bits & ~kSecondRound);
  ThreadStacks& owner = *RecordOf(slot).owner;
  if ((bits & kSecondRound) == 0 &&
      pthread_setspecific(owner.end_key_, reinterpret_cast<void*>(bits | kSecondRound)) == 0) {
    return;
  }
  owner.NoteEnd(slot);
}

// On the stack that it is about.
void ThreadStacks::NoteEnd(StackSlot* slot) {
  if (at_thread_end_ != nullptr) at_thread_end_();
  Record& record = RecordOf(slot);
  record.faults += FaultsOfThisThread();
  if (record.faults > kKeptPages) {
    const vm::PageNumber here = vm::PageNumber::Of(__builtin_frame_address(0));
    pool()->DiscardBelow(slot, here - vm::Pages{kKeptPages});
    record.faults = 0;
  }
  // Detach writes it for those that are detached later.
  if (record.detached_from_start) record.thread_id = static_cast<int>(vm::os::CurrentThreadId());
  if ((record.state.fetch_or(kEnded, std::memory_order_acq_rel) & kDetached) != 0) Retire(slot);
}

StackSlot* ThreadStacks::SlotOf(pthread_t thread) const {
  const StackPool* pool = this->pool();
  if (pool == nullptr) return nullptr;
  StackSlot* slot = pool->Find(reinterpret_cast<const void*>(thread));
  if (slot == nullptr) return nullptr;
  return (RecordOf(slot).state.load(std::memory_order_acquire) & kThread) != 0 ? slot : nullptr;
}

void ThreadStacks::ReleaseJoined(StackSlot* slot) {
  // A thread that left by a system call of its own ran no destructors.
  const bool noted = (RecordOf(slot).state.exchange(0, std::memory_order_acq_rel) & kEnded) != 0;
  pool()->Release(slot, noted ? Residue::kNone : Residue::kUnknown);
}

// To sleep until a thread is gone, and to be woken, takes as long as many a thread runs, and the joiner's processor has
// nothing else to do. Where it has, the new thread itself maybe, spinning is in vain.
void ThreadStacks::AwaitEnd(pthread_t thread) {
  if (!joins_.SpinsNow() || ThreadIdOf(thread) == 0) return;
  bool gone = false;
  for (vm::sync::SpinWait spin(kJoinSpin); !gone && spin.Once();) gone = ThreadIdOf(thread) == 0;
  joins_.Note(gone);
}

int ThreadStacks::Detach(pthread_t thread) {
  StackSlot* slot = SlotOf(thread);
  const int thread_id = slot != nullptr ? ThreadIdOf(thread) : 0;
  const int error = libc_.detach(thread);
  // The slot is still this thread's: nobody else sets the bit.
  if (slot != nullptr && error == 0) RecordOf(slot).thread_id = thread_id;
  if (slot != nullptr && error == 0 &&
      (RecordOf(slot).state.fetch_or(kDetached, std::memory_order_acq_rel) & kEnded) != 0) {
    Retire(slot);
  }
  return error;
}

int ThreadStacks::GetAttributes(pthread_t thread, pthread_attr_t* attributes) {
  const int error = libc_.getattr_np(thread, attributes);
  if (error != 0) return error;
  // Of a stack that was given, libc knows no guard.
  StackSlot* slot = SlotOf(thread);
  return slot == nullptr ? 0 : pthread_attr_setguardsize(attributes, RecordOf(slot).guard);
}

// ---- Detached threads on their way out ----

void ThreadStacks::Retire(StackSlot* slot) {
  RecordOf(slot).next = nullptr;
  const vm::sync::SpinLockHolder holder(lock_);
  if (first_exiting_ == nullptr) {
    first_exiting_ = slot;
  } else {
    RecordOf(last_exiting_).next = slot;
  }
  last_exiting_ = slot;
  ++exiting_;
  any_exiting_.store(true, std::memory_order_relaxed);
}

StackSlot* ThreadStacks::NextExiting() {
  const vm::sync::SpinLockHolder holder(lock_);
  StackSlot* slot = first_exiting_;
  if (slot == nullptr) return nullptr;
  first_exiting_ = RecordOf(slot).next;
  --exiting_;
  any_exiting_.store(exiting_ > 0, std::memory_order_relaxed);
  return slot;
}

std::size_t ThreadStacks::Exiting() {
  const vm::sync::SpinLockHolder holder(lock_);
  return exiting_;
}

bool ThreadStacks::IsGone(const Record& record) const {
  return record.thread_id == 0 || RawSyscall(SYS_tgkill, process_id_, record.thread_id, 0) == -ESRCH;
}

void ThreadStacks::Reap(std::size_t limit) {
  for (std::size_t left = std::min(limit, Exiting()); left > 0; --left) {
    StackSlot* slot = NextExiting();
    if (slot == nullptr) return;
    // Who is still there goes to the end of the queue: its id may be a new thread's by now.
    if (!IsGone(RecordOf(slot))) {
      Retire(slot);
      continue;
    }
    RecordOf(slot).state.store(0, std::memory_order_relaxed);
    pool()->Release(slot, Residue::kNone);
  }
}

// ---- fork ----

void ThreadStacks::PrepareFork() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  lock_.LockForFork();
  if (StackPool* pool = this->pool()) pool->PrepareFork();
}

void ThreadStacks::ParentAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  if (StackPool* pool = this->pool()) pool->ParentAfterFork();
  lock_.UnlockAfterFork();
}

void ThreadStacks::ChildAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  StackPool* pool = this->pool();
  if (pool != nullptr) {
    pool->ChildAfterFork();
    process_id_ = static_cast<int>(RawSyscall(SYS_getpid));
    forked_slot_ = SlotOf(pthread_self());
    has_orphans_.store(true, std::memory_order_relaxed);
    // Of the parent's threads; they are orphans here like the others.
    first_exiting_ = nullptr;
    exiting_ = 0;
    any_exiting_.store(false, std::memory_order_relaxed);
  }
  lock_.UnlockAfterFork();
}

void ThreadStacks::ReleaseOrphans() {
  if (!has_orphans_.exchange(false, std::memory_order_relaxed)) return;
  pool()->ForEachInUse([this](StackSlot* slot) {
    Record& record = RecordOf(slot);
    if (slot == forked_slot_ || (record.state.load(std::memory_order_relaxed) & kThread) == 0) return;
    record.state.store(0, std::memory_order_relaxed);
    // Shared with the parent: it costs nothing until it is written. The next user gives it back.
    record.faults = INT32_MAX;
    pool()->Release(slot, Residue::kNone);
  });
}

}  // namespace freehold::runtime
