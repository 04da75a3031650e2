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
  // Makes the functions below usable. Returns null, or why they are not. Called once, before anything else.
  const char* (*load)();
  void* (*malloc)(std::size_t size);
  void (*free)(void* object);
  void* (*calloc)(std::size_t count, std::size_t size);
  void* (*realloc)(void* object, std::size_t size);
  // Lets time pass as a program does that has nothing to do.
  void (*idle)(double seconds);
};

// Freehold's object heap: one ObjectHeap on one AddressSpace, a ThreadCache for every thread that
// allocates, found through a thread-local pointer and given back at thread exit; as the malloc shim
// does. idle() ticks heap and space the while, as the runtime's keeper thread does.
extern Allocator freehold_heap;

// glibc's malloc by its internal names, so that nothing that replaces malloc stands in for it.
extern Allocator glibc;

// Debian's libraries, loaded so that their malloc replaces nothing, each when it is first asked for: a
// process that measures one does not carry the others. REQUIRES: MakeRoomForLibraries.
extern Allocator mimalloc;
extern Allocator jemalloc;
extern Allocator tcmalloc;

// Starts the program again unless its environment makes libc keep room for the thread-local variables of
// libraries that are loaded later: of jemalloc's there are more than libc has room for by itself. To be
// called first in main(). Returns if it is so, or cannot be.
void MakeRoomForLibraries(char** argv);

}  // namespace freehold::bench

#endif  // FREEHOLD_BENCH_SUPPORT_ALLOCATORS_H_
