// POSIX threads on stacks of a StackPool. Threads are made, joined and detached by libc's own functions, which keep
// everything that they do; only where the stack lies is decided here, through the thread's attributes, and when it may
// be used again.
//
//     Create   slot from the pool | attributes copied, with that stack | libc's pthread_create
//     thread   notes its end in a destructor of thread-specific data; gives back what it touched of a deep stack
//     Join     a moment's spinning, where that has sufficed of late | libc's pthread_join, which returns when the
//              kernel is done with the thread | slot back to the pool
//     detached the slot waits in a queue until the kernel knows the thread no more; a later Create looks
//
// What comes with a stack of its own, what the pool has no room for, and threads that libc makes for itself pass
// through untouched.
//
// Why a slot is never used too early. libc frees a detached thread's descriptor, which lies on that stack, while the
// thread is still on its way out, and the kernel writes there last of all (the word that joiners wait for). A thread
// is found by its id from its creation until the kernel has released it, which is after its last access to memory. So
// when tgkill(2) with signal 0 says ESRCH, the stack is nobody's. An id that was given to a new thread meanwhile only
// makes a slot wait longer.
//
// Thread safety: thread-safe.
// Lock order:    LockRank::kRuntime; not held over calls into libc's thread functions.
// Allocation:    none but libc's.
// Errors:        as the functions of libc that these stand for.
// Invariants:    S1. A slot with a thread is released by whoever makes its state complete, once: the joiner; or who
//                    sets the second of kDetached and kEnded, through the queue.
#ifndef FREEHOLD_RUNTIME_THREAD_STACKS_H_
#define FREEHOLD_RUNTIME_THREAD_STACKS_H_

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <ctime>

#include "absl/base/thread_annotations.h"
#include "runtime/stack_pool.h"
#include "vm/sync/spin_lock.h"
#include "vm/sync/spin_wait.h"

namespace freehold::runtime {

// libc's own.
struct LibcThreads {
  int (*create)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) = nullptr;
  int (*join)(pthread_t, void**) = nullptr;
  int (*tryjoin_np)(pthread_t, void**) = nullptr;
  int (*timedjoin_np)(pthread_t, void**, const timespec*) = nullptr;
  int (*clockjoin_np)(pthread_t, void**, clockid_t, const timespec*) = nullptr;  // null before glibc 2.31
  int (*detach)(pthread_t) = nullptr;
  int (*getattr_np)(pthread_t, pthread_attr_t*) = nullptr;
};

class ThreadStacks {
 public:
  // Whether overflows are reported (stack_overflow.h).
  enum class Overflows : bool { kSilent, kReported };

  constexpr ThreadStacks() = default;
  ThreadStacks(const ThreadStacks&) = delete;
  ThreadStacks& operator=(const ThreadStacks&) = delete;

  // Everything passes through to these. Before anything else; again, with the same, changes nothing.
  void UseLibc(const LibcThreads& libc);
  // From now on, stacks come from a pool in `space`, all of which is for threads. Errors: those of StackPool::Create,
  // kSystem (no key for thread-specific data is left); then everything still passes through. Once it has succeeded,
  // it does nothing. Each thread calls `at_thread_end`, unless that is null, when most of its destructors have run.
  vm::Error Start(vm::AddressSpace& space, Overflows overflows, void (*at_thread_end)() = nullptr);
  // Gives the pool back. REQUIRES: no thread with a stack of it lives. For tests and benchmarks; processes end.
  void Stop();

  // As pthread_create and so on.
  int Create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument);
  int Join(pthread_t thread, void** result) {
    StackSlot* slot = SlotOf(thread);
    if (slot != nullptr) AwaitEnd(thread);
    return ReleaseIfJoined(slot, libc_.join(thread, result));
  }
  int TryJoin(pthread_t thread, void** result) {
    StackSlot* slot = SlotOf(thread);
    return ReleaseIfJoined(slot, libc_.tryjoin_np(thread, result));
  }
  int TimedJoin(pthread_t thread, void** result, const timespec* deadline) {
    StackSlot* slot = SlotOf(thread);
    return ReleaseIfJoined(slot, libc_.timedjoin_np(thread, result, deadline));
  }
  int ClockJoin(pthread_t thread, void** result, clockid_t clock, const timespec* deadline) {
    StackSlot* slot = SlotOf(thread);
    return ReleaseIfJoined(slot, libc_.clockjoin_np(thread, result, clock, deadline));
  }
  int Detach(pthread_t thread);
  int GetAttributes(pthread_t thread, pthread_attr_t* attributes);

  // Whether UseLibc was called.
  bool knows_libc() const { return knows_libc_.load(std::memory_order_acquire); }
  // Null unless started.
  StackPool* pool() const { return pool_.load(std::memory_order_acquire); }
  // Stacks of detached threads that ended, or are about to, and were not found gone yet.
  std::size_t Exiting();
  // Releases those of them that are gone; Create looks at some each time.
  void Reap(std::size_t limit);

  // fork(2), in the order of the pool's. The child releases the stacks of threads that it does not have when it
  // creates its first thread: most children never do.
  void PrepareFork();
  void ParentAfterFork();
  void ChildAfterFork();

 private:
  struct Record;
  // How a thread's stack is to be.
  struct Shape {
    std::size_t size;   // as asked for; not a multiple of anything
    std::size_t guard;  // in whole pages
    bool detached;
  };

  static void* ThreadMain(void* slot);
  static void OnThreadEnd(void* value);
  static Record& RecordOf(StackSlot* slot);

  // Of a thread with a stack of the pool; else null.
  StackSlot* SlotOf(pthread_t thread) const;
  int ReleaseIfJoined(StackSlot* slot, int error) {
    if (slot != nullptr && error == 0) ReleaseJoined(slot);
    return error;
  }
  void ReleaseJoined(StackSlot* slot);
  // Waits for the end of `thread` for a moment, if that has mostly sufficed of late.
  void AwaitEnd(pthread_t thread);
  // Null: libc shall find a stack, or say why it cannot.
  StackSlot* AcquireFor(const Shape& shape);
  // Where the thread's stack ends, and its alternate stack begins.
  std::byte* TopOf(const StackSlot* slot) const;
  // Where a thread's stack of `size` bytes begins: at a page, as libc's do.
  std::byte* LowOf(const StackSlot* slot, std::size_t size) const;
  void NoteEnd(StackSlot* slot);
  void Retire(StackSlot* slot);
  StackSlot* NextExiting();
  bool IsGone(const Record& record) const;
  void ReleaseOrphans();

  LibcThreads libc_;  // written by the first UseLibc
  std::atomic<bool> knows_libc_{false};
  // Written by Start.
  pthread_key_t end_key_ = 0;
  vm::Bytes alternate_stack_;  // on top of each stack; 0: none
  bool has_end_key_ = false;
  void (*at_thread_end_)() = nullptr;
  std::atomic<StackPool*> pool_{nullptr};  // release in Start

  // Whose threads these are. Written by Start, and in the child of a fork.
  int process_id_ = 0;
  // In the child of a fork, until it created a thread: there are stacks of threads that it does not have.
  std::atomic<bool> has_orphans_{false};
  StackSlot* forked_slot_ = nullptr;  // of the one that it has; written in the child of a fork

  vm::sync::SpinHistory joins_;  // of AwaitEnd

  vm::sync::SpinLock lock_{vm::sync::LockRank::kRuntime};
  // First in, first out.
  StackSlot* first_exiting_ ABSL_GUARDED_BY(lock_) = nullptr;
  StackSlot* last_exiting_ ABSL_GUARDED_BY(lock_) = nullptr;
  std::size_t exiting_ ABSL_GUARDED_BY(lock_) = 0;
  std::atomic<bool> any_exiting_{false};  // a hint: whether there are any
};

// This process's.
extern constinit ThreadStacks process_thread_stacks;

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_THREAD_STACKS_H_
