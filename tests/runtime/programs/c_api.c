/* Every function of freehold.h, by a program in C99 that knows nothing else of Freehold. "own" tests a space of its own
 * only; "process" the process's too, which serves malloc here; "beside" does where malloc is somebody else's; "mmap"
 * where that has been left to libc by a setting; "libc" that there is none. Prints the cases that it ran. */
#define _GNU_SOURCE /* memfd_create */
#include "runtime/freehold.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#include "require.h"

#define MIB ((size_t)1 << 20)
#define PAGE ((size_t)FREEHOLD_PAGE_SIZE)

static freehold_space* space; /* the one under test */

static char* map(size_t bytes) {
  void* address = NULL;
  REQUIRE(freehold_map(space, bytes, NULL, &address) == 0);
  return address;
}

static void unmap(void* address, size_t bytes) { REQUIRE(freehold_unmap(space, address, bytes) == 0); }

static int is_mapped(const void* address) {
  freehold_mapping mapping = {.size = sizeof(mapping)};
  return freehold_lookup(space, address, &mapping) == 0;
}

static int all_are(const char* memory, size_t bytes, char value) {
  for (size_t i = 0; i < bytes; ++i) {
    if (memory[i] != value) return 0;
  }
  return 1;
}

/* ---- Cases ---- */

static void arguments(void) {
  void* address = &address;
  void* const untouched = address;
  char* memory = map(4 * PAGE);
  freehold_map_options options = {.size = sizeof(options)};
  freehold_mapping mapping = {.size = sizeof(mapping)};
  REQUIRE(freehold_map(NULL, PAGE, NULL, &address) == EINVAL);
  REQUIRE(freehold_map(space, 0, NULL, &address) == EINVAL);
  REQUIRE(freehold_map(space, SIZE_MAX, NULL, &address) == EINVAL);
  REQUIRE(freehold_map(space, SIZE_MAX / 2, NULL, &address) == ENOMEM);
  REQUIRE(freehold_map(space, PAGE, NULL, NULL) == EINVAL);
  REQUIRE(freehold_map_file(space, PAGE, 0, 0, NULL, NULL) == EINVAL);
  REQUIRE(freehold_unmap(space, memory + 1, PAGE) == EINVAL);
  REQUIRE(freehold_unmap(space, memory, 0) == EINVAL);
  REQUIRE(freehold_unmap(space, NULL, PAGE) == ENOMEM);
  REQUIRE(freehold_unmap(space, memory, SIZE_MAX) == EINVAL);
  REQUIRE(freehold_unmap(NULL, memory, PAGE) == EINVAL);
  REQUIRE(freehold_protect(space, memory, PAGE, 0) == EINVAL);
  REQUIRE(freehold_protect(space, memory, PAGE, FREEHOLD_NO_ACCESS | FREEHOLD_READ) == EINVAL);
  REQUIRE(freehold_protect(space, memory, PAGE, -1) == EINVAL);
  REQUIRE(freehold_advise(space, memory, PAGE, 0) == EINVAL);
  REQUIRE(freehold_advise(space, memory, PAGE, FREEHOLD_PAGE_OUT + 1) == EINVAL);
  REQUIRE(freehold_lock_memory(space, memory, PAGE, 3) == EINVAL);
  REQUIRE(freehold_residency(space, memory, PAGE, NULL) == EINVAL);
  REQUIRE(freehold_pin_range(space, memory, PAGE, NULL) == EINVAL);
  REQUIRE(freehold_remap(space, memory, PAGE, PAGE, NULL, NULL) == EINVAL);
  REQUIRE(freehold_remap(space, memory, PAGE, 0, NULL, &address) == EINVAL);
  REQUIRE(freehold_for_each_mapping(space, NULL, NULL) == EINVAL);
  REQUIRE(freehold_print(space, NULL, NULL) == EINVAL);
  REQUIRE(freehold_get_statistics(space, NULL) == EINVAL);
  REQUIRE(freehold_tick(NULL) == EINVAL);
  REQUIRE(freehold_purge(NULL, NULL) == EINVAL);
  REQUIRE(freehold_space_create(NULL, NULL) == EINVAL);
  REQUIRE(freehold_space_destroy(NULL) == EINVAL);
  REQUIRE(freehold_space_contains(NULL, memory) == 0);
  REQUIRE(freehold_lookup(space, memory, NULL) == EINVAL);

  options.placement = 4;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == EINVAL);
  options.placement = FREEHOLD_ANYWHERE;
  options.alignment = 3 * PAGE;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == EINVAL);
  options.alignment = PAGE / 2;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == EINVAL);
  options.alignment = 0;
  options.content = -1;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == EINVAL);
  options.content = FREEHOLD_ZEROED;
  options.lock = 7;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == EINVAL);
  options.lock = FREEHOLD_UNLOCKED;
  mapping.size = 8;
  REQUIRE(freehold_lookup(space, memory, &mapping) == EINVAL);
  REQUIRE(address == untouched);
  unmap(memory, 4 * PAGE);
}

/* Callers of an older or a newer header. */
static void sizes(void) {
  struct {
    freehold_map_options options;
    uint64_t newer;
  } wide = {{.size = sizeof(wide)}, 0};
  struct {
    freehold_mapping mapping;
    uint64_t newer;
  } result = {{.size = sizeof(result)}, 1};
  freehold_map_options options = {.size = 0};
  void* address = NULL;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == EINVAL);
  options.size = sizeof(options) - 1;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == EINVAL);
  options.size = SIZE_MAX;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == EINVAL);
  wide.newer = 1;
  REQUIRE(freehold_map(space, PAGE, &wide.options, &address) == E2BIG);
  wide.newer = 0;
  REQUIRE(freehold_map(space, PAGE, &wide.options, &address) == 0);
  REQUIRE(freehold_lookup(space, address, &result.mapping) == 0);
  REQUIRE(result.mapping.size == sizeof(result) && result.mapping.address == address && result.newer == 0);
  unmap(address, PAGE);
}

static void mapping(void) {
  freehold_map_options options = {.size = sizeof(options)};
  freehold_mapping mapping = {.size = sizeof(mapping)};
  void* address = NULL;
  char* memory = map(3 * PAGE - 1); /* rounded up */
  REQUIRE(freehold_space_contains(space, memory) == 1);
  REQUIRE(freehold_space_contains(space, &options) == 0);
  REQUIRE(all_are(memory, 3 * PAGE, 0));
  memset(memory, 'x', 3 * PAGE);
  REQUIRE(freehold_lookup(space, memory + 2 * PAGE + 5, &mapping) == 0);
  REQUIRE(mapping.address == memory && mapping.bytes == 3 * PAGE && mapping.size == sizeof(mapping));
  REQUIRE(mapping.protection == (FREEHOLD_READ | FREEHOLD_WRITE) && mapping.lock == FREEHOLD_UNLOCKED);
  REQUIRE(!mapping.backed && !mapping.huge_pages && mapping.generation != 0 && mapping.offset == 0);

  options.placement = FREEHOLD_FIXED;
  options.address = memory;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == EEXIST);
  options.placement = FREEHOLD_REPLACE;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == 0 && address == memory);
  REQUIRE(all_are(memory, PAGE, 0) && all_are(memory + PAGE, 2 * PAGE, 'x'));
  unmap(memory + PAGE, PAGE);
  REQUIRE(is_mapped(memory) && !is_mapped(memory + PAGE) && is_mapped(memory + 2 * PAGE));
  REQUIRE(freehold_protect(space, memory, 3 * PAGE, FREEHOLD_READ) == ENOMEM);
  REQUIRE(freehold_discard(space, memory, 3 * PAGE) == ENOMEM);
  options.placement = FREEHOLD_FIXED;
  options.address = memory + 1;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == EINVAL);
  options.address = memory + PAGE;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == 0 && address == memory + PAGE);
  unmap(memory, 3 * PAGE);

  options.placement = FREEHOLD_ANYWHERE;
  options.alignment = MIB;
  options.huge_pages = 1;
  options.populate = 1;
  options.content = FREEHOLD_ANY_CONTENT;
  REQUIRE(freehold_map(space, 2 * MIB, &options, &address) == 0 && (uintptr_t)address % MIB == 0);
  REQUIRE(freehold_lookup(space, address, &mapping) == 0 && mapping.huge_pages);
  unmap(address, 2 * MIB);
  memset(&options, 0, sizeof(options));
  options.size = sizeof(options);
  options.placement = FREEHOLD_HINT;
  options.address = (char*)address + 77;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == 0);
  unmap(address, PAGE);
}

static void protection(void) {
  freehold_mapping mapping = {.size = sizeof(mapping)};
  freehold_map_options options = {.size = sizeof(options)};
  void* address = NULL;
  char* memory = map(2 * PAGE);
  memory[0] = 'p';
  REQUIRE(freehold_protect(space, memory, PAGE, FREEHOLD_READ) == 0);
  REQUIRE(freehold_lookup(space, memory, &mapping) == 0 && mapping.protection == FREEHOLD_READ);
  REQUIRE(memory[0] == 'p');
  REQUIRE(freehold_protect(space, memory, 2 * PAGE, FREEHOLD_NO_ACCESS) == 0);
  REQUIRE(freehold_lookup(space, memory, &mapping) == 0 && mapping.protection == FREEHOLD_NO_ACCESS);
  REQUIRE(freehold_protect(space, memory, 2 * PAGE, FREEHOLD_READ | FREEHOLD_WRITE) == 0);
  REQUIRE(memory[0] == 'p');
  unmap(memory, 2 * PAGE);
  options.protection = FREEHOLD_NO_ACCESS;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == 0);
  REQUIRE(freehold_lookup(space, address, &mapping) == 0 && mapping.protection == FREEHOLD_NO_ACCESS);
  REQUIRE(freehold_populate(space, address, PAGE, NULL, NULL) == EOPNOTSUPP);
  unmap(address, PAGE);
}

static void files(void) {
  freehold_file_options options = {.size = sizeof(options)};
  freehold_mapping mapping = {.size = sizeof(mapping)};
  char page[FREEHOLD_PAGE_SIZE];
  void* address = NULL;
  char* memory;
  int file = memfd_create("c_api", MFD_CLOEXEC);
  REQUIRE(file >= 0 && ftruncate(file, 4 * FREEHOLD_PAGE_SIZE) == 0);
  REQUIRE(pwrite(file, "second", 6, FREEHOLD_PAGE_SIZE) == 6);
  REQUIRE(freehold_map_file(space, PAGE, -1, 0, NULL, &address) == EBADF);
  REQUIRE(freehold_map_file(space, PAGE, file, 5, NULL, &address) == EINVAL);
  REQUIRE(freehold_map_file(NULL, PAGE, file, 0, NULL, &address) == EINVAL);
  REQUIRE(freehold_map_file(space, 2 * PAGE, file, PAGE, NULL, &address) == 0);
  memory = address;
  REQUIRE(memcmp(memory, "second", 6) == 0);
  REQUIRE(freehold_lookup(space, memory, &mapping) == 0);
  REQUIRE(mapping.backed && mapping.offset == PAGE && mapping.protection == FREEHOLD_READ);
  unmap(memory, 2 * PAGE);

  options.shared = 1;
  options.populate = 1;
  options.protection = FREEHOLD_READ | FREEHOLD_WRITE;
  REQUIRE(freehold_map_file(space, PAGE, file, 0, &options, &address) == 0);
  memcpy(address, "written", 7);
  REQUIRE(freehold_sync(space, address, PAGE) == 0);
  REQUIRE(pread(file, page, sizeof(page), 0) == (ssize_t)sizeof(page) && memcmp(page, "written", 7) == 0);
  unmap(address, PAGE);
  REQUIRE(freehold_sync(space, address, PAGE) == ENOMEM);
  close(file);

  file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  REQUIRE(file >= 0);
  REQUIRE(freehold_map_file(space, PAGE, file, 0, &options, &address) == EACCES);
  REQUIRE(freehold_map_file(space, PAGE, file, 0, NULL, &address) == 0);
  REQUIRE(memcmp(address, "\177ELF", 4) == 0);
  unmap(address, PAGE);
  close(file);
}

static void remapping(void) {
  freehold_remap_options options = {.size = sizeof(options)};
  void* moved = NULL;
  char* memory = map(4 * PAGE);
  char* target = map(8 * PAGE);
  memset(memory, 'm', 4 * PAGE);
  REQUIRE(freehold_remap(space, memory, 4 * PAGE, 2 * PAGE, NULL, &moved) == 0 && moved == memory);
  REQUIRE(!is_mapped(memory + 2 * PAGE));
  options.may_move = 1;
  REQUIRE(freehold_remap(space, memory, 2 * PAGE, 64 * PAGE, &options, &moved) == 0);
  memory = moved;
  REQUIRE(all_are(memory, 2 * PAGE, 'm') && all_are(memory + 2 * PAGE, 62 * PAGE, 0));
  options.may_move = 0;
  options.placement = FREEHOLD_FIXED;
  options.address = target;
  REQUIRE(freehold_remap(space, memory, 64 * PAGE, 8 * PAGE, &options, &moved) == EEXIST);
  REQUIRE(moved == memory && memory[0] == 'm');
  options.placement = FREEHOLD_HINT;
  REQUIRE(freehold_remap(space, memory, 64 * PAGE, 8 * PAGE, &options, &moved) == EINVAL);
  options.placement = FREEHOLD_REPLACE;
  REQUIRE(freehold_remap(space, memory, 64 * PAGE, 8 * PAGE, &options, &moved) == 0 && moved == target);
  REQUIRE(all_are(target, 2 * PAGE, 'm') && !is_mapped(memory));
  options.size = 3;
  REQUIRE(freehold_remap(space, target, 8 * PAGE, 8 * PAGE, &options, &moved) == EINVAL);
  memset(&options, 0, sizeof(options));
  options.size = sizeof(options);
  options.keep_source = 1;
  REQUIRE(freehold_remap(space, target, 8 * PAGE, 9 * PAGE, &options, &moved) == EOPNOTSUPP);
  unmap(target, 8 * PAGE);
  REQUIRE(freehold_remap(space, target, PAGE, 2 * PAGE, NULL, &moved) == ENOMEM);
}

static void advice(void) {
  char* memory = map(4 * PAGE);
  unsigned char resident[4] = {9, 9, 9, 9};
  memset(memory, 'a', 4 * PAGE);
  REQUIRE(freehold_residency(space, memory, 4 * PAGE, resident) == 0);
  REQUIRE(resident[0] == 1 && resident[3] == 1);
  REQUIRE(freehold_discard(space, memory, 2 * PAGE) == 0);
  REQUIRE(freehold_residency(space, memory, 4 * PAGE, resident) == 0);
  REQUIRE(resident[0] == 0 && resident[1] == 0 && resident[3] == 1);
  REQUIRE(all_are(memory, 2 * PAGE, 0) && all_are(memory + 2 * PAGE, 2 * PAGE, 'a'));
  REQUIRE(freehold_advise(space, memory, 4 * PAGE, FREEHOLD_DONT_NEED) == 0);
  REQUIRE(all_are(memory, 4 * PAGE, 0));
  REQUIRE(freehold_advise(space, memory, 4 * PAGE, FREEHOLD_WILL_NEED) == 0);
  REQUIRE(freehold_advise(space, memory, 4 * PAGE, FREEHOLD_FREE) == 0);
  REQUIRE(freehold_advise(space, memory, 4 * PAGE, FREEHOLD_HUGE_PAGES) == 0);
  REQUIRE(freehold_advise(space, memory, 4 * PAGE, FREEHOLD_NO_HUGE_PAGES) == 0);
  REQUIRE(freehold_advise(space, memory, 4 * PAGE, FREEHOLD_COLD) == 0);
  REQUIRE(freehold_advise(space, memory, 4 * PAGE, FREEHOLD_PAGE_OUT) == 0);
  unmap(memory + PAGE, PAGE);
  REQUIRE(freehold_advise(space, memory, 4 * PAGE, FREEHOLD_COLD) == ENOMEM);
  REQUIRE(freehold_residency(space, memory, 4 * PAGE, resident) == ENOMEM);
  unmap(memory, 4 * PAGE);
}

static void locking(void) {
  freehold_mapping mapping = {.size = sizeof(mapping)};
  char* memory = map(2 * PAGE);
  const int error = freehold_lock_memory(space, memory, 2 * PAGE, FREEHOLD_LOCKED);
  REQUIRE(error == 0 || error == EPERM || error == ENOMEM); /* as RLIMIT_MEMLOCK has it */
  if (error == 0) {
    REQUIRE(freehold_lookup(space, memory, &mapping) == 0 && mapping.lock == FREEHOLD_LOCKED);
    REQUIRE(freehold_advise(space, memory, PAGE, FREEHOLD_DONT_NEED) == EINVAL);
    REQUIRE(freehold_lock_memory(space, memory, 2 * PAGE, FREEHOLD_UNLOCKED) == 0);
    REQUIRE(freehold_lock_memory(space, memory, 2 * PAGE, FREEHOLD_LOCKED_ON_FAULT) == 0);
  }
  unmap(memory, 2 * PAGE);
  REQUIRE(freehold_lock_memory(space, memory, PAGE, FREEHOLD_UNLOCKED) == ENOMEM);
}

static size_t seen;
static freehold_cancel cancel;

static void count(void* context, size_t done) {
  REQUIRE(context == &seen && done > seen);
  seen = done;
}

static void cancel_after_chunk(void* context, size_t done) {
  (void)done;
  freehold_cancel_request(context);
}

static void populating(void) {
  freehold_populate_options options = {.size = sizeof(options)};
  unsigned char resident[2048];
  char* memory = map(8 * MIB);
  size_t done = 1;
  REQUIRE(freehold_residency(space, memory, 8 * MIB, resident) == 0 && resident[2047] == 0);
  options.progress = count;
  options.progress_context = &seen;
  seen = 0;
  REQUIRE(freehold_populate(space, memory, 8 * MIB, &options, &done) == 0);
  REQUIRE(done == 8 * MIB && seen == done);
  REQUIRE(freehold_residency(space, memory, 8 * MIB, resident) == 0 && resident[0] == 1 && resident[2047] == 1);

  options.progress = cancel_after_chunk;
  options.progress_context = &cancel;
  options.cancel = &cancel;
  REQUIRE(freehold_populate(space, memory, 8 * MIB, &options, &done) == ECANCELED);
  REQUIRE(done > 0 && done < 8 * MIB && done % PAGE == 0);
  REQUIRE(freehold_populate(space, memory, 8 * MIB, &options, &done) == ECANCELED && done == 0);
  options.cancel = NULL;
  options.progress = NULL;
  options.deadline = 1;
  REQUIRE(freehold_populate(space, memory, 8 * MIB, &options, &done) == ETIMEDOUT && done == 0);
  options.size = 0;
  REQUIRE(freehold_populate(space, memory, 8 * MIB, &options, &done) == EINVAL);
  unmap(memory, 8 * MIB);
  REQUIRE(freehold_populate(space, memory, PAGE, NULL, &done) == ENOMEM);
}

static void pins(void) {
  freehold_pin pin = {{0}};
  freehold_statistics statistics = {.size = sizeof(statistics)};
  freehold_map_options options = {.size = sizeof(options)};
  void* address = NULL;
  char* memory = map(2 * PAGE);
  REQUIRE(freehold_unpin(NULL) == EINVAL);
  REQUIRE(freehold_unpin(&pin) == EINVAL);
  REQUIRE(freehold_pin_range(space, memory, 2 * PAGE, &pin) == 0);
  REQUIRE(freehold_pin_range(space, memory, 2 * PAGE, &pin) == EINVAL);
  memset(memory, 'i', 2 * PAGE);
  options.placement = FREEHOLD_REPLACE;
  options.address = memory;
  REQUIRE(freehold_map(space, PAGE, &options, &address) == EBUSY);
  unmap(memory, 2 * PAGE);
  REQUIRE(!is_mapped(memory) && all_are(memory, 2 * PAGE, 'i')); /* the device goes on */
  REQUIRE(freehold_get_statistics(space, &statistics) == 0 && statistics.deferred_unmaps == 1);
  REQUIRE(freehold_unpin(&pin) == 0);
  REQUIRE(freehold_unpin(&pin) == EINVAL);
  REQUIRE(freehold_get_statistics(space, &statistics) == 0 && statistics.deferred_unmaps == 0);
  REQUIRE(freehold_pin_range(space, memory, PAGE, &pin) == ENOMEM);
  REQUIRE(freehold_unpin(&pin) == EINVAL);
}

struct walk {
  const char* sought;
  size_t found;
  const char* last;
};

static void visit(void* context, const freehold_mapping* mapping) {
  struct walk* walk = context;
  REQUIRE(mapping->size == sizeof(*mapping) && (const char*)mapping->address >= walk->last);
  walk->last = (const char*)mapping->address + mapping->bytes;
  if (mapping->address == walk->sought) ++walk->found;
}

struct text {
  char* bytes;
  size_t size;
};

static void append_part(void* context, const char* part, size_t length) {
  struct text* text = context;
  text->bytes = realloc(text->bytes, text->size + length + 1);
  memcpy(text->bytes + text->size, part, length);
  text->size += length;
  text->bytes[text->size] = '\0';
}

static void append(void* context, const char* line, size_t length) {
  REQUIRE(length > 0 && line[length - 1] == '\n' && memchr(line, '\n', length) == line + length - 1);
  append_part(context, line, length);
}

static void looking(void) {
  freehold_statistics before = {.size = sizeof(before)};
  freehold_statistics after = {.size = sizeof(after)};
  struct walk walk = {NULL, 0, NULL};
  struct text text = {NULL, 0};
  char line[64];
  char* memory;
  size_t purged = 1;
  REQUIRE(freehold_get_statistics(space, &before) == 0);
  memory = map(3 * PAGE);
  REQUIRE(freehold_get_statistics(space, &after) == 0);
  REQUIRE(after.reserved == before.reserved && after.mapped >= before.mapped + 3 * PAGE);
  REQUIRE(after.maps > before.maps && after.mappings > 0 && after.metadata > 0);
  walk.sought = memory;
  REQUIRE(freehold_for_each_mapping(space, visit, &walk) == 0);
  REQUIRE(walk.found == 1);
  REQUIRE(freehold_print(space, append, &text) == 0);
  REQUIRE(strstr(text.bytes, "vm_mapped_bytes ") != NULL && strstr(text.bytes, "\n\n") != NULL);
  snprintf(line, sizeof(line), "\n%08llx-%08llx rw-p", (unsigned long long)(uintptr_t)memory,
           (unsigned long long)(uintptr_t)memory + 3 * PAGE);
  REQUIRE(strstr(text.bytes, line) != NULL);
  free(text.bytes);
  memset(memory, 1, 3 * PAGE);
  unmap(memory, 3 * PAGE);
  REQUIRE(freehold_tick(space) == 0);
  REQUIRE(freehold_purge(space, &purged) == 0 && purged >= 3 * PAGE && purged % PAGE == 0);
  REQUIRE(freehold_purge(space, NULL) == 0);
}

static void* churn(void* context) {
  unsigned char resident;
  for (int i = 0; i < 2000; ++i) {
    freehold_pin pin = {{0}};
    char* memory = map((size_t)(i % 7 + 1) * PAGE);
    memory[0] = 'c';
    REQUIRE(freehold_pin_range(space, memory, PAGE, &pin) == 0);
    REQUIRE(freehold_residency(space, memory, PAGE, &resident) == 0 && resident == 1);
    REQUIRE(freehold_unpin(&pin) == 0);
    unmap(memory, (size_t)(i % 7 + 1) * PAGE);
  }
  return context;
}

static void* cancel_soon(void* context) {
  freehold_cancel_request(context);
  return context;
}

static void threads(void) {
  pthread_t others[4];
  freehold_cancel stop = {0};
  freehold_populate_options options = {.size = sizeof(options)};
  char* memory = map(4 * MIB);
  int error;
  for (int i = 0; i < 3; ++i) REQUIRE(pthread_create(&others[i], NULL, churn, NULL) == 0);
  REQUIRE(pthread_create(&others[3], NULL, cancel_soon, &stop) == 0);
  options.cancel = &stop;
  do {
    error = freehold_populate(space, memory, 4 * MIB, &options, NULL);
    REQUIRE(error == 0 || error == ECANCELED);
  } while (error == 0);
  for (int i = 0; i < 4; ++i) REQUIRE(pthread_join(others[i], NULL) == 0);
  unmap(memory, 4 * MIB);
}

static void* fill_stack(void* context) {
  volatile char deep[40000];
  for (size_t i = 0; i < sizeof(deep); i += PAGE / 2) deep[i] = 's';
  *(uintptr_t*)context = (uintptr_t)&deep[0];
  return NULL;
}

static freehold_stack_pool* pool;

static int overflow(char* stack) {
  signal(SIGSEGV, SIG_DFL); /* a sanitizer would report it */
  for (size_t pages = 1; pages <= 33; ++pages) *(volatile char*)(stack - pages * PAGE) = 'o';
  return 0;
}

static int without_pool(char* memory) {
  freehold_stack* stack = NULL;
  (void)memory;
  REQUIRE(freehold_stack_acquire(pool, PAGE, 0, &stack) == EOPNOTSUPP);
  REQUIRE(freehold_stack_pool_destroy(pool) == EOPNOTSUPP);
  return 9;
}

static int in_child(int (*child)(char* memory), char* memory);

static void stacks(void) {
  freehold_stack* stack = NULL;
  freehold_stack* again = NULL;
  pthread_attr_t attributes;
  pthread_t thread;
  void* address = NULL;
  uintptr_t inside = 0;
  size_t bytes = 0;
  REQUIRE(freehold_stack_pool_create(NULL, &pool) == EINVAL);
  REQUIRE(freehold_stack_pool_create(space, NULL) == EINVAL);
  REQUIRE(freehold_stack_pool_destroy(NULL) == EINVAL);
  REQUIRE(freehold_stack_pool_create(space, &pool) == 0);
  REQUIRE(freehold_stack_acquire(NULL, PAGE, 0, &stack) == EINVAL);
  REQUIRE(freehold_stack_acquire(pool, 0, 0, &stack) == EINVAL);
  REQUIRE(freehold_stack_acquire(pool, SIZE_MAX, 0, &stack) == EINVAL);
  REQUIRE(freehold_stack_acquire(pool, PAGE, SIZE_MAX, &stack) == EINVAL);
  REQUIRE(freehold_stack_acquire(pool, PAGE, 0, NULL) == EINVAL);
  REQUIRE(freehold_stack_acquire(pool, SIZE_MAX / 4, 0, &stack) == ENOMEM);
  REQUIRE(stack == NULL);
  REQUIRE(freehold_stack_range(NULL, &address, &bytes) == EINVAL);
  REQUIRE(freehold_stack_release(pool, NULL) == EINVAL);
  REQUIRE(freehold_stack_release(NULL, stack) == EINVAL);

  REQUIRE(freehold_stack_acquire(pool, 2 * MIB, 3 * PAGE, &stack) == 0);
  REQUIRE(freehold_stack_range(stack, &address, NULL) == EINVAL);
  REQUIRE(freehold_stack_range(stack, &address, &bytes) == 0 && bytes == 2 * MIB);
  REQUIRE(freehold_space_contains(space, address) && (uintptr_t)address % PAGE == 0);
  REQUIRE(pthread_attr_init(&attributes) == 0 && pthread_attr_setstack(&attributes, address, bytes) == 0);
  REQUIRE(pthread_create(&thread, &attributes, fill_stack, &inside) == 0 && pthread_join(thread, NULL) == 0);
  REQUIRE(inside - (uintptr_t)address < bytes);
  pthread_attr_destroy(&attributes);
  REQUIRE(in_child(overflow, address) == -SIGSEGV);
  REQUIRE(in_child(without_pool, NULL) == 9);
  REQUIRE(freehold_stack_release(pool, stack) == 0);
  REQUIRE(freehold_stack_acquire(pool, 2 * MIB, 3 * PAGE, &again) == 0 && again == stack);
  REQUIRE(freehold_stack_release(pool, again) == 0);
  REQUIRE(freehold_stack_pool_destroy(pool) == 0);
}

/* Ends with what `child` returns, or minus the signal that ended it. */
static int in_child(int (*child)(char* memory), char* memory) {
  int status = 0;
  const pid_t id = fork();
  REQUIRE(id >= 0);
  if (id == 0) _exit(child(memory));
  REQUIRE(waitpid(id, &status, 0) == id);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static int refused(char* memory) {
  void* address = NULL;
  memory[0] = 'd'; /* its own copy */
  REQUIRE(memory[1] == 'f');
  REQUIRE(freehold_map(space, PAGE, NULL, &address) == EOPNOTSUPP);
  REQUIRE(freehold_unmap(space, memory, PAGE) == EOPNOTSUPP);
  REQUIRE(freehold_space_destroy(space) == EOPNOTSUPP);
  return 7;
}

static int served(char* memory) {
  REQUIRE(memory[1] == 'f');
  unmap(memory, PAGE);
  memory = map(PAGE);
  memory[0] = 'd';
  return 8;
}

static void own_in_child(void) {
  char* memory = map(PAGE);
  memset(memory, 'f', PAGE);
  REQUIRE(in_child(refused, memory) == 7);
  REQUIRE(memory[0] == 'f');
  unmap(memory, PAGE);
}

static void process_in_child(void) {
  char* memory = map(PAGE);
  memset(memory, 'f', PAGE);
  REQUIRE(in_child(served, memory) == 8);
  unmap(memory, PAGE);
}

static void creating(void) {
  freehold_space* made = NULL;
  freehold_space_options options = {.size = sizeof(options)};
  freehold_statistics statistics = {.size = sizeof(statistics)};
  options.size = 1;
  REQUIRE(freehold_space_create(&options, &made) == EINVAL);
  options.size = sizeof(options);
  options.lock_policy = 9;
  REQUIRE(freehold_space_create(&options, &made) == EINVAL);
  options.lock_policy = FREEHOLD_LOCK_TREE;
  options.reserve = PAGE; /* too small to cut up */
  options.min_reserve = MIB;
  REQUIRE(freehold_space_create(&options, &made) == ENOMEM);
  REQUIRE(made == NULL);
  for (int policy = FREEHOLD_LOCK_ADAPTIVE; policy <= FREEHOLD_LOCK_COARSE; ++policy) {
    freehold_space* const tested = space;
    options.lock_policy = policy;
    options.reserve = 256 * MIB;
    options.min_reserve = 0;
    options.free_resident_limit = FREEHOLD_NONE;
    options.window_limit = FREEHOLD_NONE;
    options.decay = 1000000;
    options.regions_per_zone = 1;
    options.strict_unmap = policy == FREEHOLD_LOCK_TREE;
    REQUIRE(freehold_space_create(&options, &made) == 0);
    REQUIRE(freehold_get_statistics(made, &statistics) == 0 && statistics.reserved == 256 * MIB);
    space = made;
    unmap(map(PAGE), PAGE);
    space = tested;
    REQUIRE(freehold_space_destroy(made) == 0);
  }
}

static void of_the_process(void) {
  freehold_heap_statistics heap = {.size = sizeof(heap)};
  struct text text = {NULL, 0};
  void* const object = malloc(1000000);
  freehold_space* const process = freehold_process_space();
  REQUIRE(process == space && process == freehold_process_space());
  REQUIRE(object != NULL);
  REQUIRE(freehold_get_heap_statistics(&heap) == 0);
  REQUIRE(heap.mapped >= heap.active && heap.metadata > 0);
  if (freehold_space_contains(process, object)) { /* not "beside" */
    REQUIRE(freehold_try_expand(object, freehold_good_size(1000000)) == 1);
    REQUIRE(freehold_try_expand(object, SIZE_MAX) == 0 && freehold_try_expand(NULL, 1) == 0);
    REQUIRE(heap.allocated > heap.large && heap.large >= 1000000 && heap.large_objects >= 1 && heap.threads >= 1);
  }
  heap.size = 0;
  REQUIRE(freehold_get_heap_statistics(&heap) == EINVAL);
  REQUIRE(freehold_get_heap_statistics(NULL) == EINVAL);
  REQUIRE(freehold_print(process, append, &text) == 0 && strstr(text.bytes, "\nheap_large_bytes ") != NULL);
  free(text.bytes);
  for (int format = FREEHOLD_TEXT; format <= FREEHOLD_PROMETHEUS; ++format) {
    freehold_statistics_options options = {.size = sizeof(options), .format = format, .huge_pages = 1};
    struct text all = {NULL, 0};
    REQUIRE(freehold_print_statistics(&options, append_part, &all) == 0);
    REQUIRE(strstr(all.bytes, "heap_allocated_bytes") != NULL && strstr(all.bytes, "vm_huge_page_bytes") != NULL);
    free(all.bytes);
    options.format = FREEHOLD_PROMETHEUS + 1;
    REQUIRE(freehold_print_statistics(&options, append_part, &all) == EINVAL);
  }
  REQUIRE(freehold_print_statistics(NULL, NULL, NULL) == EINVAL);
  free(object);
  REQUIRE(freehold_space_destroy(process) == EINVAL);
}

static void heaps(void) {
  freehold_heap_options options = {.size = sizeof(options), .space = space};
  freehold_heap_statistics statistics = {.size = sizeof(statistics)};
  freehold_heap* heap = NULL;
  size_t bytes = 0;
  char* objects[3];
  REQUIRE(freehold_heap_create(&options, NULL) == EINVAL);
  options.size = 1;
  REQUIRE(freehold_heap_create(&options, &heap) == EINVAL && heap == NULL);
  options.size = sizeof(options);
  REQUIRE(freehold_heap_create(&options, &heap) == 0);
  objects[0] = freehold_heap_allocate(heap, 100);
  objects[1] = freehold_heap_allocate_zeroed(heap, 5 * MIB);
  objects[2] = freehold_heap_allocate_aligned(heap, 256, 1000);
  REQUIRE(objects[0] != NULL && objects[1] != NULL && (uintptr_t)objects[2] % 256 == 0);
  REQUIRE(freehold_space_contains(space, objects[0]) && freehold_space_contains(space, objects[1]));
  REQUIRE(all_are(objects[1], 5 * MIB, 0));
  memset(objects[0], 1, 100);
  objects[0] = freehold_heap_reallocate(heap, objects[0], 10000);
  REQUIRE(objects[0] != NULL && all_are(objects[0], 100, 1));
  REQUIRE(freehold_heap_usable_size(heap, objects[0]) == freehold_good_size(10000));
  REQUIRE(freehold_heap_try_expand(heap, objects[0], 10001) == 1);
  REQUIRE(freehold_heap_try_expand(heap, objects[0], MIB) == 0);
  REQUIRE(freehold_heap_get_statistics(heap, &statistics) == 0);
  REQUIRE(statistics.large == 5 * MIB && statistics.threads == 1);
  freehold_heap_free(heap, objects[0]);
  freehold_heap_free_sized(heap, objects[2], 1000);
  REQUIRE(freehold_heap_trim(heap, &bytes) == 0 && bytes > 0);
  REQUIRE(freehold_heap_destroy(heap) == 0);
  REQUIRE(freehold_heap_destroy(NULL) == EINVAL);
}

static int handler_calls;

static int lift_limit(size_t bytes) {
  freehold_memory_limits none = {.size = sizeof(none)};
  REQUIRE(bytes >= 16 * MIB);
  ++handler_calls;
  return freehold_set_memory_limits(&none) == 0;
}

static void limits(void) {
  freehold_memory_limits limits = {.size = sizeof(limits)};
  freehold_memory_usage usage = {.size = sizeof(usage)};
  void* small = NULL;
  void* large = NULL;
  REQUIRE(freehold_set_memory_limits(NULL) == EINVAL);
  limits.size = 1;
  REQUIRE(freehold_set_memory_limits(&limits) == EINVAL);
  limits.size = sizeof(limits);
  usage.size = 0;
  REQUIRE(freehold_get_memory_usage(&usage) == EINVAL);
  REQUIRE(freehold_get_memory_usage(NULL) == EINVAL);
  usage.size = sizeof(usage);
  REQUIRE(freehold_purge(space, NULL) == 0);
  REQUIRE(freehold_get_memory_usage(&usage) == 0 && usage.soft == 0 && usage.hard == 0);
  limits.soft = usage.in_use + 8 * MIB;
  limits.hard = usage.in_use + 16 * MIB;
  REQUIRE(freehold_set_memory_limits(&limits) == 0);
  REQUIRE(freehold_map(space, 64 * MIB, NULL, &large) == ENOMEM && large == NULL);
  REQUIRE(freehold_map(space, 4 * MIB, NULL, &small) == 0);
  REQUIRE(freehold_remap(space, small, 4 * MIB, 64 * MIB, NULL, &large) == ENOMEM && large == NULL);
  REQUIRE(freehold_get_memory_usage(&usage) == 0);
  REQUIRE(usage.soft == limits.soft && usage.hard == limits.hard && usage.in_use <= limits.hard);
  REQUIRE(usage.refusals >= 2);

  REQUIRE(freehold_set_out_of_memory_handler(lift_limit) == NULL);
  REQUIRE(freehold_map(space, 64 * MIB, NULL, &large) == 0 && handler_calls == 1);
  REQUIRE(freehold_set_out_of_memory_handler(NULL) == lift_limit);
  unmap(small, 4 * MIB);
  unmap(large, 64 * MIB);
}

static void without_process_space(void) {
  freehold_heap_statistics heap = {.size = sizeof(heap)};
  freehold_memory_limits limits = {.size = sizeof(limits)};
  freehold_memory_usage usage = {.size = sizeof(usage)};
  REQUIRE(freehold_set_memory_limits(&limits) == EOPNOTSUPP);
  REQUIRE(freehold_get_memory_usage(&usage) == EOPNOTSUPP);
  freehold_heap* own = NULL;
  char* object = malloc(100);
  struct text text = {NULL, 0};
  REQUIRE(freehold_process_space() == NULL);
  REQUIRE(freehold_print_statistics(NULL, append_part, &text) == EOPNOTSUPP);
  REQUIRE(freehold_heap_profile_write(1) == EOPNOTSUPP && freehold_heap_profile_save("/dev/null") == EOPNOTSUPP);
  REQUIRE(freehold_get_heap_statistics(&heap) == EOPNOTSUPP);
  REQUIRE(freehold_heap_create(NULL, &own) == EOPNOTSUPP && own == NULL);
  REQUIRE(freehold_try_expand(object, 100) == 0);
  free(object);
}

static void without_heap(void) {
  freehold_heap_statistics heap = {.size = sizeof(heap)};
  struct text text = {NULL, 0};
  REQUIRE(freehold_get_heap_statistics(&heap) == EOPNOTSUPP);
  REQUIRE(freehold_print(space, append, &text) == 0 && strstr(text.bytes, "\nheap_large_bytes ") == NULL);
  REQUIRE(!freehold_space_contains(space, text.bytes));
  free(text.bytes);
}

#define RUN(test) (test(), printf("%s\n", #test))

static void verbs(void) {
  RUN(arguments);
  RUN(sizes);
  RUN(mapping);
  RUN(protection);
  RUN(files);
  RUN(remapping);
  RUN(advice);
  RUN(locking);
  cancel.requested = 0;
  RUN(populating);
  RUN(pins);
  RUN(looking);
  RUN(threads);
  RUN(stacks);
  RUN(heaps);
}

int main(int argc, char** argv) {
  freehold_space_options options = {.size = sizeof(options)};
  const char* kind = argc == 2 ? argv[1] : "";
  const int process = strcmp(kind, "process") == 0;
  const int beside = strcmp(kind, "beside") == 0;
  const int mapped = strcmp(kind, "mmap") == 0;
  const int libc = strcmp(kind, "libc") == 0;
  REQUIRE(strcmp(kind, "own") == 0 || process || beside || mapped || libc);
  setvbuf(stdout, NULL, _IOLBF, 0);
  printf("version %s\n", freehold_version());
  options.reserve = 1024 * MIB;
  REQUIRE(freehold_space_create(&options, &space) == 0);
  verbs();
  RUN(creating);
  RUN(own_in_child);
  REQUIRE(freehold_space_destroy(space) == 0);
  if (process || beside || mapped) {
    space = freehold_process_space();
    REQUIRE(space != NULL);
    verbs();
  }
  if (process || beside || mapped) RUN(limits);
  if (process || beside) RUN(of_the_process);
  if (process || mapped) RUN(process_in_child);
  if (mapped) RUN(without_heap);
  if (libc) RUN(without_process_space);
  return 0;
}
