// The allocators that malloc_benchmark compares, side by side in one process whose own malloc stays
// glibc's.
//
// All are called in the same way, through a pointer in memory: what a program pays that calls
// malloc() across the border of a shared library.
#ifndef FREEHOLD_BENCH_SUPPORT_ALLOCATORS_H_
#define FREEHOLD_BENCH_SUPPORT_ALLOCATORS_H_

#include <cstddef>

namespace freehold::bench {

struct Allocator {
  const char* name;
  void* (*malloc)(std::size_t size);
  void (*free)(void* object);
  void* (*calloc)(std::size_t count, std::size_t size);
  void* (*realloc)(void* object, std::size_t size);
  // Lets time pass as a program does that has nothing to do.
  void (*idle)(double seconds);
};

// glibc's malloc by its internal names, so that nothing that replaces malloc stands in for it.
extern const Allocator kGlibc;

// Freehold's object heap: one ObjectHeap on one AddressSpace, a ThreadCache for every thread that
// allocates, found through a thread-local pointer and given back at thread exit; as the malloc shim
// does. idle() ticks heap and space the while, as the runtime's keeper thread does.
extern const Allocator kFreehold;

// mimalloc by its own names, loaded so that its malloc replaces nothing. Empty, its name null,
// until LoadMimalloc() has succeeded.
extern Allocator mimalloc;

// Loads mimalloc. Returns null, or why it cannot be loaded. REQUIRES: no other thread runs yet.
const char* LoadMimalloc();

}  // namespace freehold::bench

#endif  // FREEHOLD_BENCH_SUPPORT_ALLOCATORS_H_
