#include <pthread.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>

#include "allocator/object_heap.h"
#include "allocator/thread_cache.h"
#include "bench/support/allocators.h"
#include "vm/address_space.h"
#include "vm/os/linux_kernel.h"

namespace freehold::bench {
namespace {

using allocator::ObjectHeap;
using allocator::ThreadCache;

constinit vm::os::LinuxKernel linux_kernel;

template <typename T>
T Require(const vm::Result<T>& result, const char* what) {
  if (result.ok()) return *result;
  std::fprintf(stderr, "%s: %s\n", what, vm::ToString(result.error().code));
  std::exit(1);
}

// The one heap of the process; lives until its end.
struct Heap {
  Heap() {
    space = Require(vm::AddressSpace::Create(linux_kernel, {}), "AddressSpace::Create");
    heap = Require(ObjectHeap::Create(*space), "ObjectHeap::Create");
    pthread_key_create(
        &exit_key, [](void* cache) { Get().heap->DetachThread(static_cast<ThreadCache*>(cache)); });
  }

  static Heap& Get() {
    static Heap* instance = new Heap;
    return *instance;
  }

  vm::AddressSpace* space;
  ObjectHeap* heap;
  pthread_key_t exit_key;  // its destructor gives a dying thread's cache back
};

constinit thread_local ThreadCache* this_thread = nullptr;

ThreadCache& Attach() {
  Heap& heap = Heap::Get();
  this_thread = heap.heap->AttachThread();
  if (this_thread == nullptr) {
    std::fputs("ObjectHeap::AttachThread: out of memory or threads\n", stderr);
    std::exit(1);
  }
  pthread_setspecific(heap.exit_key, this_thread);
  return *this_thread;
}

ThreadCache& Cache() {
  if (this_thread != nullptr) [[likely]]
    return *this_thread;
  return Attach();
}

// As in the shim (runtime/shim/allocate.h), a thread's first call is apart, so that the others need no stack frame.
[[gnu::noinline]] void* MallocFirst(std::size_t size) { return Attach().Allocate(size); }
[[gnu::noinline]] void FreeFirst(void* object) { Attach().Free(object); }

void* Malloc(std::size_t size) {
  if (this_thread == nullptr) [[unlikely]]
    return MallocFirst(size);
  return this_thread->Allocate(size);
}

void Free(void* object) {
  if (this_thread == nullptr) [[unlikely]]
    return FreeFirst(object);
  this_thread->Free(object);
}

void* Calloc(std::size_t count, std::size_t size) {
  std::size_t bytes;
  if (__builtin_mul_overflow(count, size, &bytes)) return nullptr;
  return Cache().AllocateZeroed(bytes);
}

void* Realloc(void* object, std::size_t size) { return Cache().Reallocate(object, size); }

// A keeper thread's work for a while, on this thread.
void Idle(double seconds) {
  constexpr double kPeriod = 0.05;
  const Heap& heap = Heap::Get();
  for (double slept = 0; slept < seconds; slept += kPeriod) {
    const timespec period = {.tv_sec = 0, .tv_nsec = static_cast<long>(kPeriod * 1e9)};
    nanosleep(&period, nullptr);
    heap.heap->Tick(linux_kernel.Now());
    heap.space->Tick();
  }
}

}  // namespace

constinit Allocator freehold_heap = {
    .name = "freehold",
    .load = []() -> const char* { return nullptr; },
    .malloc = Malloc,
    .free = Free,
    .calloc = Calloc,
    .realloc = Realloc,
    .idle = Idle,
};

}  // namespace freehold::bench
