/* Freehold's C API: address spaces with their own mappings, range locks and populate. C99 and C++.
 *
 * A program gets it with libfreehold.so, which serves its malloc too, or with the static library. Programs in C++ may
 * use vm/address_space.h instead, which says more about every verb.
 *
 * Units:          bytes, nanoseconds of CLOCK_MONOTONIC. Addresses and offsets are multiples of FREEHOLD_PAGE_SIZE;
 *                 lengths are rounded up to it, and are not 0.
 * Errors:         0, or an errno value; errno itself is left alone. A call that fails leaves the space as it was, and
 *                 what it would have returned through pointers too. Every call may return
 *                   EINVAL      a null space or result, a range that is empty, unaligned or wraps, a constant that is
 *                               not one of this header, an options' `size` that is none
 *                   E2BIG       options from a newer header ask for something that this library does not know
 *                   EOPNOTSUPP  a space of one's own in the child of a fork
 *                   ENOMEM      a range outside the space, or where nothing is mapped; no room; no memory
 *                 and what it names itself. Other values are the kernel's.
 * Thread safety:  thread-safe. Two calls wait for each other only over the same pages. Not async-signal-safe.
 * Options:        structs with `size`, the sizeof that the caller was compiled with; all other fields zero are the
 *                 defaults. A null pointer stands for the defaults too:
 *                   freehold_map_options options = {.size = sizeof(options)};
 * Callbacks:      called with no lock held, so they may call everything here; they return, and do not throw.
 * fork:           the child has the process's space as the parent had it, but for pins and locks. Of spaces of one's
 *                 own it has the memory, and nothing else.
 */
#ifndef FREEHOLD_RUNTIME_FREEHOLD_H_
#define FREEHOLD_RUNTIME_FREEHOLD_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FREEHOLD_PAGE_SIZE 4096

/* "0.1.0": the library's that runs. */
const char* freehold_version(void);

/* ---- Spaces ---- */

typedef struct freehold_space freehold_space;

/* The space that malloc of this process comes from, and mmap where the shared library is there. Null if Freehold serves
 * neither, by FREEHOLD_MALLOC and FREEHOLD_MMAP, or because the kernel granted no address space. It lives as long as
 * the process. A program unmaps and changes what it mapped itself, and nothing else in it. */
freehold_space* freehold_process_space(void);

/* For limits of which 0 means the default: none at all. */
#define FREEHOLD_NONE UINT64_MAX

enum freehold_lock_policy {
  FREEHOLD_LOCK_ADAPTIVE = 0,
  FREEHOLD_LOCK_TREE = 1,
  FREEHOLD_LOCK_COARSE = 2 /* one lock for the whole space, the kernel's model: for comparison */
};

typedef struct freehold_space_options {
  size_t size;
  uint64_t reserve;             /* address space; 0: 16 TiB. Halved until the kernel grants it */
  uint64_t min_reserve;         /* but not below; 0: 64 GiB, or `reserve` if that is less */
  uint64_t free_resident_limit; /* unmapped memory that stays resident, per region; 0: 256 MiB */
  uint64_t window_limit;        /* windows of unmapped files that are kept, per region; 0: 256 MiB */
  uint64_t decay;               /* how long both stay before freehold_tick gives them back; 0: 1 s */
  unsigned regions_per_zone;    /* 0: by the number of processors */
  int lock_policy;
  int strict_unmap; /* not 0: unmapped memory traps at once; slow */
} freehold_space_options;

/* Makes a space of one's own. It needs somebody to call freehold_tick. */
int freehold_space_create(const freehold_space_options* options, freehold_space** space);

/* Unmaps everything and gives it back. REQUIRES: nobody uses it, its memory, or pins of it any more. EINVAL: the
 * process's space. */
int freehold_space_destroy(freehold_space* space);

/* 1 if `address` is in the range that the space has reserved, mapped or not; else 0. */
int freehold_space_contains(const freehold_space* space, const void* address);

/* Gives back what was unmapped longer ago than the space's decay. To be called a few times a second; for the process's
 * space the runtime does. */
int freehold_tick(freehold_space* space);

/* Gives back all that is unmapped. `bytes`, unless null, gets how much. */
int freehold_purge(freehold_space* space, size_t* bytes);

/* ---- Heaps ---- */

/* A malloc of its own, for what comes and goes together: freehold_heap_destroy ends all of its objects at once. Any
 * thread may use any heap, and may free what others allocated from it. An object belongs to one heap: what is freed in,
 * or asked of, another one, or of malloc, stops the program with a message, as every wrong free does.
 *
 * A thread has a cache of each heap that it used, until it ends or the heap does. Each heap takes some 50 KiB, and 64
 * KiB for each size that it has objects of; a few thousand heaps fit into a process. In the child of a fork a heap has
 * its memory and nothing else: what is asked of it is null, and free does nothing. */
typedef struct freehold_heap freehold_heap;

typedef struct freehold_heap_options {
  size_t size;
  /* Where its memory comes from, and must outlive it; null: the process's, by whose limits it counts. */
  freehold_space* space;
} freehold_heap_options;

/* EOPNOTSUPP also: there is no process's space. */
int freehold_heap_create(const freehold_heap_options* options, freehold_heap** heap);

/* Unmaps everything that the heap has, live objects included. By any thread. REQUIRES: nobody is in a call with it, or
 * uses its objects, any more; threads that did need not have ended. */
int freehold_heap_destroy(freehold_heap* heap);

/* An object of at least `bytes`, for 0 too, aligned as malloc's; null when out of memory, and for a null heap. */
void* freehold_heap_allocate(freehold_heap* heap, size_t bytes);
/* The same, zero. */
void* freehold_heap_allocate_zeroed(freehold_heap* heap, size_t bytes);
/* The same as freehold_heap_allocate, at a multiple of `alignment`, a power of two; null if it is none. */
void* freehold_heap_allocate_aligned(freehold_heap* heap, size_t alignment, size_t bytes);
/* As realloc, but for 0 bytes, which is a size like others. Null: `object` is as it was. */
void* freehold_heap_reallocate(freehold_heap* heap, void* object, size_t bytes);
/* Null is fine. */
void freehold_heap_free(freehold_heap* heap, void* object);
/* The same; stops the program if the object has no room for `bytes`. */
void freehold_heap_free_sized(freehold_heap* heap, void* object, size_t bytes);
/* How many bytes the program may use; 0 for null. */
size_t freehold_heap_usable_size(freehold_heap* heap, const void* object);
/* 1 if there is room for `bytes` at `object` now, without moving it; else 0, and it is as it was. */
int freehold_heap_try_expand(freehold_heap* heap, void* object, size_t bytes);
/* Gives back what is free, but for what other threads have at hand. `bytes`, unless null, gets how much. */
int freehold_heap_trim(freehold_heap* heap, size_t* bytes);

/* How many bytes malloc and heaps give to who asks for `bytes`: what freehold_heap_usable_size then says, and all that
 * is there; but for objects of malloc between guard pages (FREEHOLD_GUARD_PAGES), which have what was asked for. 0: more
 * than there can be. */
size_t freehold_good_size(size_t bytes);
/* freehold_heap_try_expand for malloc's objects. Where Freehold does not serve malloc, 0. */
int freehold_try_expand(void* object, size_t bytes);

/* ---- Limits ---- */

typedef struct freehold_memory_limits {
  size_t size;
  uint64_t soft; /* bytes in use above which what is free goes back to the system at once; 0: none */
  uint64_t hard; /* above which there is no more: malloc and mmap fail with ENOMEM, operator new throws; 0: none */
} freehold_memory_limits;

/* Of malloc, mmap and freehold_map of the process's space, which start with FREEHOLD_SOFT_LIMIT and
 * FREEHOLD_HARD_LIMIT. At any time, also below what is in use. EOPNOTSUPP: there is no such space. */
int freehold_set_memory_limits(const freehold_memory_limits* limits);

typedef struct freehold_memory_usage { /* a result: see freehold_statistics for `size` */
  size_t size;
  uint64_t soft;
  uint64_t hard;
  uint64_t in_use;   /* bytes, as the limits count: mapped to be read and written, or free and possibly resident */
  uint64_t purges;   /* on behalf of the soft limit */
  uint64_t refusals; /* by the hard limit, also of requests that were served after a purge or the handler */
} freehold_memory_usage;

int freehold_get_memory_usage(freehold_memory_usage* usage);

/* Called in the thread that needs memory when malloc, operator new or mmap would fail for want of it, with how much is
 * wanted: by the hard limit, or the system's. May allocate and free, and returns not 0 to have it tried again. It is
 * not called for what it allocates itself; several threads may be in it at once; operator new calls it before the
 * program's new handler. Requests that no process can have do not reach it. */
typedef int (*freehold_out_of_memory_handler)(size_t bytes);

/* Returns the one before; null is none. */
freehold_out_of_memory_handler freehold_set_out_of_memory_handler(freehold_out_of_memory_handler handler);

/* ---- Mapping ---- */

enum freehold_protection {
  FREEHOLD_READ = 1,
  FREEHOLD_WRITE = 2,
  FREEHOLD_EXECUTE = 4,
  FREEHOLD_NO_ACCESS = 8 /* alone */
};

enum freehold_placement {
  FREEHOLD_ANYWHERE = 0,
  FREEHOLD_HINT = 1,   /* at `address` if that is free, else anywhere */
  FREEHOLD_FIXED = 2,  /* at `address`; EEXIST if something is mapped there */
  FREEHOLD_REPLACE = 3 /* at `address`; what is mapped there is unmapped. EBUSY if it is pinned */
};

enum freehold_memory_lock {
  FREEHOLD_UNLOCKED = 0,
  FREEHOLD_LOCKED = 1,         /* as mlock(2); populates */
  FREEHOLD_LOCKED_ON_FAULT = 2 /* as mlock2(2) with MLOCK_ONFAULT */
};

enum freehold_content {
  FREEHOLD_ZEROED = 0,
  FREEHOLD_ANY_CONTENT = 1 /* may be old data of this process; spares the zeroing of what is overwritten anyway */
};

typedef struct freehold_map_options {
  size_t size;
  void* address;
  size_t alignment; /* of the start: 0, or a power of two of at least a page. FREEHOLD_ANYWHERE only */
  int placement;
  int protection; /* 0: FREEHOLD_READ | FREEHOLD_WRITE */
  int lock;
  int content;
  int huge_pages; /* not 0: among memory in huge pages */
  int populate;   /* not 0: all pages are there when the call returns, as far as there is memory */
} freehold_map_options;

/* Maps `bytes` of anonymous memory at `*address`. EPERM: to be locked, and may not. */
int freehold_map(freehold_space* space, size_t bytes, const freehold_map_options* options, void** address);

typedef struct freehold_file_options {
  size_t size;
  void* address;
  int placement;
  int protection; /* 0: FREEHOLD_READ */
  int lock;
  int shared;   /* not 0: writes reach the file */
  int populate; /* not 0: the pages that the file has are there when the call returns */
} freehold_file_options;

/* Maps `bytes` of the open file `descriptor` from `offset` on, as mmap(2); the descriptor may be closed afterwards.
 * EACCES, EBADF, ENODEV, EOVERFLOW as mmap; EOPNOTSUPP on hugetlbfs. What is unmapped may stay in the kernel for a
 * decay, and with it the open file; see AddressSpace::MapFile. */
int freehold_map_file(freehold_space* space, size_t bytes, int descriptor, uint64_t offset,
                      const freehold_file_options* options, void** address);

/* Stores what was written to the shared files mapped in the range, as msync(2) with MS_SYNC. EIO. */
int freehold_sync(freehold_space* space, void* address, size_t bytes);

/* Unmaps whatever is mapped in the range, holes or not. What is pinned goes with its last pin. */
int freehold_unmap(freehold_space* space, void* address, size_t bytes);

/* Changes the protection of a range that is mapped throughout. EACCES: more than a file was opened for. */
int freehold_protect(freehold_space* space, void* address, size_t bytes, int protection);

typedef struct freehold_remap_options {
  size_t size;
  void* address;
  int placement;   /* FREEHOLD_ANYWHERE, FREEHOLD_FIXED or FREEHOLD_REPLACE */
  int may_move;    /* not 0: with FREEHOLD_ANYWHERE, where it does not fit it moves; else ENOMEM */
  int keep_source; /* not 0: the old range stays mapped and reads as zero. Same size, and it moves; else EOPNOTSUPP */
} freehold_remap_options;

/* Makes the range `new_bytes` long, as mremap(2), and tells where it is. The range lies in one mapping. EEXIST, EBUSY:
 * as for placements. */
int freehold_remap(freehold_space* space, void* address, size_t bytes, size_t new_bytes,
                   const freehold_remap_options* options, void** new_address);

enum freehold_advice {
  FREEHOLD_DONT_NEED = 1, /* the content is dropped: reads as zero, or as the file */
  FREEHOLD_FREE = 2,      /* the content may be dropped until it is written to again */
  FREEHOLD_WILL_NEED = 3,
  FREEHOLD_HUGE_PAGES = 4,
  FREEHOLD_NO_HUGE_PAGES = 5,
  FREEHOLD_COLD = 6,
  FREEHOLD_PAGE_OUT = 7
};

/* As madvise(2). EINVAL also for memory that is locked and would be dropped. */
int freehold_advise(freehold_space* space, void* address, size_t bytes, int advice);

/* Drops the content of a range that is mapped throughout and may be written: it reads as zero afterwards and takes no
 * memory. */
int freehold_discard(freehold_space* space, void* address, size_t bytes);

/* mlock2(2), or munlock(2) for FREEHOLD_UNLOCKED, of a range that is mapped throughout. EPERM. */
int freehold_lock_memory(freehold_space* space, void* address, size_t bytes, int lock);

/* ---- Populating ---- */

/* Zero at first. */
typedef struct freehold_cancel {
  unsigned char requested;
} freehold_cancel;

/* Stops the calls of freehold_populate that were given `cancel`; by any thread, and from a signal handler too. */
void freehold_cancel_request(freehold_cancel* cancel);

typedef struct freehold_populate_options {
  size_t size;
  uint64_t deadline; /* on CLOCK_MONOTONIC; 0: none */
  const freehold_cancel* cancel;
  void (*progress)(void* context, size_t done); /* after each chunk of at most 2 MiB; may be null */
  void* progress_context;
} freehold_populate_options;

/* Makes the pages of the range present, so that touching them waits for nothing. Holds no lock over more than a chunk.
 * `done`, unless null, gets how far it came, on these errors too: ETIMEDOUT, ECANCELED, ENOMEM (what was there is
 * mapped no more), EFAULT (the file ends there), EOPNOTSUPP (memory that may not be written). */
int freehold_populate(freehold_space* space, void* address, size_t bytes, const freehold_populate_options* options,
                      size_t* done);

/* `resident[i]` becomes 1 if the i-th page of the range is in memory, else 0. The range is mapped throughout. */
int freehold_residency(const freehold_space* space, const void* address, size_t bytes, unsigned char* resident);

/* ---- Pins ---- */

/* The caller's, and not to be moved or copied while it pins. Zero at first. */
typedef struct freehold_pin {
  uint64_t opaque[32];
} freehold_pin;

/* Keeps the range where it is, for a device or I/O in flight: until freehold_unpin nothing takes its place, also if it
 * is unmapped meanwhile. It is mapped throughout. EINVAL also if `pin` pins already. */
int freehold_pin_range(freehold_space* space, void* address, size_t bytes, freehold_pin* pin);

/* By any thread. EINVAL: it does not pin. */
int freehold_unpin(freehold_pin* pin);

/* ---- Stacks ---- */

/* For fibers, and for threads (pthread_attr_setstack). In the child of a fork a pool is like a space of one's own. */
typedef struct freehold_stack_pool freehold_stack_pool;
typedef struct freehold_stack freehold_stack;

/* Makes a pool of stacks in `space`. */
int freehold_stack_pool_create(freehold_space* space, freehold_stack_pool** pool);

/* Gives everything back. REQUIRES: nobody uses it, or a stack of it, any more. */
int freehold_stack_pool_destroy(freehold_stack_pool* pool);

/* A stack of `bytes`, and perhaps a sixteenth more; below that at least `guard` bytes trap, and a page. What is on it
 * is whatever it is. In steady state without a system call. */
int freehold_stack_acquire(freehold_stack_pool* pool, size_t bytes, size_t guard, freehold_stack** stack);

/* Where it is: its lowest address, and its length. */
int freehold_stack_range(const freehold_stack* stack, void** address, size_t* bytes);

/* REQUIRES: it was acquired from this pool, and nothing runs on it any more. If it is free already, the program
 * stops. */
int freehold_stack_release(freehold_stack_pool* pool, freehold_stack* stack);

/* ---- Looking ---- */

typedef struct freehold_mapping {
  size_t size; /* set by the caller of freehold_lookup; see freehold_statistics */
  void* address;
  size_t bytes;
  int protection; /* of freehold_protection; never 0 */
  int lock;
  int huge_pages;      /* 1: among memory in huge pages */
  int backed;          /* 1: a file or a pager; 0: anonymous memory */
  uint64_t generation; /* unique to a mapping; parts of one that was split have the same */
  uint64_t offset;     /* in what it is backed by */
} freehold_mapping;

/* The mapping that holds `address`, as it is at some moment of the call. Takes no lock. */
int freehold_lookup(const freehold_space* space, const void* address, freehold_mapping* mapping);

/* Calls visit for every mapping, upwards. */
int freehold_for_each_mapping(const freehold_space* space,
                              void (*visit)(void* context, const freehold_mapping* mapping), void* context);

/* Results have a `size` too, which the caller sets: the library fills in that much, with zero for what it does not
 * know. A hint while others use the space. */
typedef struct freehold_statistics {
  size_t size;
  uint64_t reserved; /* bytes, as all up to `metadata` */
  uint64_t committed;
  uint64_t mapped;
  uint64_t free_resident; /* unmapped, possibly resident */
  uint64_t metadata;
  uint64_t mappings;
  uint64_t maps; /* calls, since the start */
  uint64_t unmaps;
  uint64_t deferred_unmaps; /* that wait for pins */
  uint64_t reuses;          /* maps served from memory that was still resident */
  uint64_t purged_pages;    /* given back to the kernel */
  uint64_t remap_moves;
  uint64_t windows; /* of files, kept for re-use */
  uint64_t window_hits;
} freehold_statistics;

int freehold_get_statistics(const freehold_space* space, freehold_statistics* statistics);

typedef struct freehold_heap_statistics {
  size_t size;
  uint64_t allocated; /* bytes in objects, as all up to `large` */
  uint64_t active;    /* in spans that hold an object */
  uint64_t free_resident;
  uint64_t free_returned; /* free, not resident */
  uint64_t mapped;
  uint64_t metadata;
  uint64_t large; /* in objects above 128 KiB */
  uint64_t large_objects;
  uint64_t threads;
  uint64_t purged_pages;
} freehold_heap_statistics;

/* Of malloc. EOPNOTSUPP: Freehold does not serve it. */
int freehold_get_heap_statistics(freehold_heap_statistics* statistics);

/* Of a heap of one's own. */
int freehold_heap_get_statistics(freehold_heap* heap, freehold_heap_statistics* statistics);

/* The heap profile of malloc: samples of what the program holds and of what it ever allocated, in the text format that
 * pprof reads. It is there if a setting asks for it (FREEHOLD_HEAP_PROFILE, FREEHOLD_HEAP_PROFILE_INTERVAL, ...); else
 * EOPNOTSUPP. Both are async-signal-safe. */
int freehold_heap_profile_write(int descriptor);

/* To a file that is created or overwritten. */
int freehold_heap_profile_save(const char* path);

/* Writes a report for humans, line by line, each with its newline and not terminated by a null character: every counter
 * as "NAME VALUE", malloc's too if the space is the process's, an empty line, and the mappings as /proc/PID/maps has
 * them. */
int freehold_print(freehold_space* space, void (*write)(void* context, const char* line, size_t length), void* context);

enum freehold_format {
  FREEHOLD_TEXT = 0, /* "NAME VALUE", "NAME[LABEL NUMBER] VALUE" */
  FREEHOLD_JSON = 1, /* one object */
  FREEHOLD_PROMETHEUS = 2
};

typedef struct freehold_statistics_options {
  size_t size;
  int format;
  int huge_pages; /* not 0: how much is in huge pages, too. The kernel keeps all mappings from changing meanwhile */
} freehold_statistics_options;

/* Writes all numbers that the process's space and malloc have, part by part, as freehold_print does: counters, and what
 * is counted for it, per size class and per thread cache. EOPNOTSUPP: Freehold serves neither. */
int freehold_print_statistics(const freehold_statistics_options* options,
                              void (*write)(void* context, const char* text, size_t length), void* context);

#ifdef __cplusplus
}
#endif

#endif /* FREEHOLD_RUNTIME_FREEHOLD_H_ */
