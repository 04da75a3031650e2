// The fast paths as functions, in a file that is optimized as the product is.
#ifndef FREEHOLD_TESTS_ALLOCATOR_FAST_PATH_H_
#define FREEHOLD_TESTS_ALLOCATOR_FAST_PATH_H_

#include <cstddef>

#include "allocator/thread_cache.h"

namespace freehold::allocator {

void* CallAllocate(ThreadCache& cache, std::size_t size);
void CallFree(ThreadCache& cache, void* p);

}  // namespace freehold::allocator

#endif  // FREEHOLD_TESTS_ALLOCATOR_FAST_PATH_H_
