// The heaps of freehold.h, over heaps.h; and what it says about sizes.
#include <cerrno>
#include <cstddef>
#include <cstdint>

#include "allocator/object_heap.h"
#include "allocator/size_class.h"
#include "allocator/thread_cache.h"
#include "runtime/c_api_internal.h"
#include "runtime/freehold.h"
#include "runtime/heaps.h"
#include "runtime/runtime.h"
#include "runtime/thread.h"
#include "vm/address_space.h"
#include "vm/units.h"

namespace {

namespace vm = freehold::vm;
using freehold::allocator::ObjectHeap;
using freehold::allocator::ObjectHeapOptions;
using freehold::allocator::ThreadCache;
using freehold::runtime::CacheLease;
using freehold::runtime::CurrentThreadCache;
using freehold::runtime::HeapCall;
using freehold::runtime::HeapHandle;
using freehold::runtime::process_runtime;
using freehold::runtime::ProcessMemoryLimit;
using freehold::runtime::Server;
using freehold::runtime::c_api::Describe;
using freehold::runtime::c_api::Open;
using freehold::runtime::c_api::Read;
using freehold::runtime::c_api::Result;
using freehold::runtime::c_api::Write;

// freehold_heap is never defined: it stands for this.
HeapHandle* ToHandle(freehold_heap* heap) { return reinterpret_cast<HeapHandle*>(heap); }

// 0, or an errno value.
int Check(freehold_heap* heap) {
  if (heap == nullptr || ToHandle(heap)->serial.load(std::memory_order_acquire) == 0) return EINVAL;
  return freehold::runtime::IsUsable(ToHandle(heap)) ? 0 : EOPNOTSUPP;
}

// `call(cache)`, or `otherwise` if there is none.
template <typename Answer, typename Call>
Answer WithCache(freehold_heap* heap, Answer otherwise, const Call& call) {
  if (heap == nullptr) return otherwise;
  const HeapCall use(ToHandle(heap));
  return use.cache() != nullptr ? call(*use.cache()) : otherwise;
}

bool IsPowerOfTwo(std::size_t n) { return n != 0 && (n & (n - 1)) == 0; }

}  // namespace

extern "C" {

int freehold_heap_create(const freehold_heap_options* given, freehold_heap** result) {
  freehold_heap_options options;
  if (const int error = Read(given, options); error != 0) return error;
  if (result == nullptr) return EINVAL;
  freehold_space* const process = freehold_process_space();
  freehold_space* const handle = options.space != nullptr ? options.space : process;
  if (handle == nullptr) return EOPNOTSUPP;
  vm::AddressSpace* space = nullptr;
  if (const int error = Open(handle, space); error != 0) return error;
  ProcessMemoryLimit* const limit = handle == process ? &process_runtime.limit() : nullptr;
  ObjectHeapOptions chosen;
  // Heaps may be many, and threads seldom meet in one: memory lies together.
  chosen.shards = 1;
  chosen.limit = limit;
  const vm::Result<HeapHandle*> made = freehold::runtime::CreateHeap(*space, chosen, limit);
  if (!made.ok()) return Result(made.error());
  *result = reinterpret_cast<freehold_heap*>(*made);
  return 0;
}

int freehold_heap_destroy(freehold_heap* heap) {
  if (const int error = Check(heap); error != 0) return error;
  return freehold::runtime::DestroyHeap(ToHandle(heap), &process_runtime.limit()) ? 0 : EINVAL;
}

void* freehold_heap_allocate(freehold_heap* heap, size_t bytes) {
  return WithCache<void*>(heap, nullptr, [=](ThreadCache& cache) { return cache.Allocate(bytes); });
}

void* freehold_heap_allocate_zeroed(freehold_heap* heap, size_t bytes) {
  return WithCache<void*>(heap, nullptr, [=](ThreadCache& cache) { return cache.AllocateZeroed(bytes); });
}

void* freehold_heap_allocate_aligned(freehold_heap* heap, size_t alignment, size_t bytes) {
  if (!IsPowerOfTwo(alignment)) return nullptr;
  return WithCache<void*>(heap, nullptr, [=](ThreadCache& cache) { return cache.AllocateAligned(alignment, bytes); });
}

void* freehold_heap_reallocate(freehold_heap* heap, void* object, size_t bytes) {
  return WithCache<void*>(heap, nullptr, [=](ThreadCache& cache) { return cache.Reallocate(object, bytes); });
}

void freehold_heap_free(freehold_heap* heap, void* object) {
  WithCache(heap, 0, [=](ThreadCache& cache) { return cache.Free(object), 0; });
}

void freehold_heap_free_sized(freehold_heap* heap, void* object, size_t bytes) {
  WithCache(heap, 0, [=](ThreadCache& cache) { return cache.FreeSized(object, bytes), 0; });
}

size_t freehold_heap_usable_size(freehold_heap* heap, const void* object) {
  return Check(heap) == 0 ? ToHandle(heap)->heap->UsableSize(object) : 0;
}

int freehold_heap_try_expand(freehold_heap* heap, void* object, size_t bytes) {
  if (object == nullptr) return 0;
  return WithCache(heap, 0, [=](ThreadCache& cache) { return cache.TryExpand(object, bytes) ? 1 : 0; });
}

int freehold_heap_trim(freehold_heap* heap, size_t* bytes) {
  if (const int error = Check(heap); error != 0) return error;
  const HeapCall use(ToHandle(heap));
  const std::size_t given_back = ToHandle(heap)->heap->Trim(use.cache());
  if (bytes != nullptr) *bytes = given_back;
  return 0;
}

int freehold_heap_get_statistics(freehold_heap* heap, freehold_heap_statistics* result) {
  if (const int error = Check(heap); error != 0) return error;
  return Write(Describe(ToHandle(heap)->heap->Stats()), result);
}

size_t freehold_good_size(size_t bytes) {
  using freehold::allocator::kMaxClassSize;
  if (bytes <= kMaxClassSize) return freehold::allocator::kSizeClasses[freehold::allocator::ClassOf(bytes)].size;
  if (bytes > PTRDIFF_MAX - (vm::kPageSize - 1)) return 0;
  return vm::PagesFor({bytes}).bytes().value;
}

int freehold_try_expand(void* object, size_t bytes) {
  if (object == nullptr || process_runtime.EnsureStarted() != Server::kFreehold) return 0;
  if (ThreadCache* cache = CurrentThreadCache()) return cache->TryExpand(object, bytes) ? 1 : 0;
  const CacheLease lease;
  return lease.get() != nullptr && lease.get()->TryExpand(object, bytes) ? 1 : 0;
}

}  // extern "C"
