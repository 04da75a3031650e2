#include "runtime/heaps.h"

#include <pthread.h>

#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <new>

#include "absl/base/thread_annotations.h"

namespace freehold::runtime {

namespace internal {
constinit thread_local RecentHeap recent_heap = {.serial = kNoSerial, .cache = nullptr};
}  // namespace internal

namespace {

using allocator::ObjectHeap;
using allocator::ThreadCache;
using internal::kNoSerial;
using internal::recent_heap;

// A thread's use of a heap.
struct Attachment {
  HeapHandle* handle;
  std::uint64_t serial;
  ThreadCache* cache;

  bool is_alive() const { return handle->serial.load(std::memory_order_acquire) == serial; }
};

// Whatever a thread has. Heaps are few a thread, and mostly the last one is meant: a list does.
struct ThreadHeaps {
  Attachment* list;
  std::size_t count;
  std::size_t capacity;
  bool ended;  // its last round of destructors is over: nothing is detached any more
};
constinit thread_local ThreadHeaps thread_heaps __attribute__((tls_model("initial-exec"))) = {};

constinit std::atomic<std::uint64_t> last_serial{0};
// Of this process since its first ancestor; written in the child of a fork, before it has other threads.
constinit std::atomic<std::uint32_t> forks{0};

constinit vm::sync::SpinLock unused_lock(vm::sync::LockRank::kRuntime);
constinit HeapHandle* unused ABSL_GUARDED_BY(unused_lock) = nullptr;

constinit pthread_once_t prepared = PTHREAD_ONCE_INIT;
constinit pthread_key_t exit_key = 0;  // its value is the number of the round of destructors, as in thread.cc
constinit int prepare_error = 0;       // written under the once
constexpr std::uintptr_t kDetachRound = 2;

void DetachAll(ThreadHeaps& own) {
  recent_heap = {.serial = kNoSerial, .cache = nullptr};
  for (std::size_t i = 0; i < own.count; ++i) {
    const Attachment& attachment = own.list[i];
    vm::sync::SpinLockHolder holder(attachment.handle->lock);
    if (attachment.is_alive()) attachment.handle->heap->DetachThread(attachment.cache);
  }
  std::free(own.list);
  own = {.list = nullptr, .count = 0, .capacity = 0, .ended = true};
}

void OnThreadExit(void* value) {
  const auto round = reinterpret_cast<std::uintptr_t>(value);
  if (round < kDetachRound && pthread_setspecific(exit_key, reinterpret_cast<void*>(round + 1)) == 0) return;
  DetachAll(thread_heaps);
}

// The thread that forked is the only one: what it was attached to is the parent's.
void ChildAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  forks.fetch_add(1, std::memory_order_relaxed);
  recent_heap = {.serial = kNoSerial, .cache = nullptr};
  thread_heaps.count = 0;
  // A thread that ended may have looked at one.
  for (HeapHandle* handle = unused; handle != nullptr; handle = handle->next_unused) handle->lock.ReinitAfterFork();
  unused_lock.UnlockAfterFork();
}

void Prepare() {
  prepare_error = pthread_key_create(&exit_key, OnThreadExit);
  if (prepare_error != 0) return;
  prepare_error = pthread_atfork([]() ABSL_NO_THREAD_SAFETY_ANALYSIS { unused_lock.LockForFork(); },
                                 []() ABSL_NO_THREAD_SAFETY_ANALYSIS { unused_lock.UnlockAfterFork(); },
                                 []() ABSL_NO_THREAD_SAFETY_ANALYSIS { ChildAfterFork(); });
}

HeapHandle* TakeHandle() {
  {
    vm::sync::SpinLockHolder holder(unused_lock);
    if (HeapHandle* handle = unused) {
      unused = handle->next_unused;
      return handle;
    }
  }
  void* memory = std::malloc(sizeof(HeapHandle));
  return memory != nullptr ? new (memory) HeapHandle : nullptr;
}

void KeepHandle(HeapHandle* handle) {
  vm::sync::SpinLockHolder holder(unused_lock);
  handle->next_unused = unused;
  unused = handle;
}

// Room for one more, once what was destroyed is out.
bool MakeRoom(ThreadHeaps& own) {
  if (own.count < own.capacity) return true;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < own.count; ++i) {
    if (own.list[i].is_alive()) own.list[kept++] = own.list[i];
  }
  own.count = kept;
  // Not for one place only: the next sweep would come too soon.
  if (kept < own.capacity / 2) return true;
  const std::size_t capacity = own.capacity != 0 ? own.capacity * 2 : 8;
  void* grown = std::realloc(own.list, capacity * sizeof(Attachment));
  if (grown == nullptr) return kept < own.capacity;
  own.list = static_cast<Attachment*>(grown);
  own.capacity = capacity;
  return true;
}

// Null: the end of this thread, or its use of the heap, could not be noted.
ThreadCache* Attach(HeapHandle* handle, std::uint64_t serial) {
  ThreadHeaps& own = thread_heaps;
  if (own.ended || !MakeRoom(own)) return nullptr;
  // Before it is needed: it may allocate.
  if (pthread_getspecific(exit_key) == nullptr && pthread_setspecific(exit_key, reinterpret_cast<void*>(1)) != 0)
    return nullptr;
  ThreadCache* cache = handle->heap->AttachThread();
  if (cache != nullptr) own.list[own.count++] = {.handle = handle, .serial = serial, .cache = cache};
  return cache;
}

}  // namespace

void HeapCall::Find(HeapHandle* handle) {
  const std::uint64_t serial = handle->serial.load(std::memory_order_acquire);
  if (!IsUsable(handle)) return;
  const ThreadHeaps& own = thread_heaps;
  for (std::size_t i = 0; i < own.count && cache_ == nullptr; ++i) {
    if (own.list[i].serial == serial) cache_ = own.list[i].cache;
  }
  if (cache_ == nullptr) cache_ = Attach(handle, serial);
  if (cache_ == nullptr) return Borrow(handle);
  recent_heap = {.serial = serial, .cache = cache_};
}

void HeapCall::Borrow(HeapHandle* handle) {
  cache_ = handle->heap->AttachThread();
  if (cache_ != nullptr) borrowed_from_ = handle->heap;
}

bool IsUsable(const HeapHandle* handle) {
  return handle->serial.load(std::memory_order_acquire) != 0 && handle->forks == forks.load(std::memory_order_relaxed);
}

vm::Result<HeapHandle*> CreateHeap(vm::AddressSpace& space, const allocator::ObjectHeapOptions& options,
                                   ProcessMemoryLimit* limit) {
  pthread_once(&prepared, Prepare);
  if (prepare_error != 0) return vm::Error::System(prepare_error);
  HeapHandle* handle = TakeHandle();
  if (handle == nullptr) return vm::ErrorCode::kNoMetadata;
  const vm::Result<ObjectHeap*> heap = ObjectHeap::Create(space, options);
  if (!heap.ok()) {
    KeepHandle(handle);
    return heap.error();
  }
  handle->heap = *heap;
  handle->forks = forks.load(std::memory_order_relaxed);
  handle->is_limited = limit != nullptr;
  handle->limited.heap = *heap;
  if (limit != nullptr) limit->Add(handle->limited);
  handle->serial.store(last_serial.fetch_add(1, std::memory_order_relaxed) + 1, std::memory_order_release);
  return handle;
}

bool DestroyHeap(HeapHandle* handle, ProcessMemoryLimit* limit) {
  if (!IsUsable(handle)) return false;
  {
    vm::sync::SpinLockHolder holder(handle->lock);
    if (!IsUsable(handle)) return false;
    handle->serial.store(0, std::memory_order_release);
  }
  if (handle->is_limited) limit->Remove(handle->limited);
  ObjectHeap::DestroyWithMemory(handle->heap);
  handle->heap = nullptr;
  KeepHandle(handle);
  return true;
}

}  // namespace freehold::runtime
