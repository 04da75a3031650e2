#include "tests/allocator/fast_path.h"

namespace freehold::allocator {

void* CallAllocate(ThreadCache& cache, std::size_t size) { return cache.Allocate(size); }

void CallFree(ThreadCache& cache, void* p) { cache.Free(p); }

}  // namespace freehold::allocator
