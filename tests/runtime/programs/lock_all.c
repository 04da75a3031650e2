// mlockall: what the process has is present when it returns, and what comes later from its start; and not more than
// that. Prints "refused" and the reason if it may not.
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/runtime/programs/require.h"

#define KIB ((size_t)1024)
#define PAGE (4 * KIB)

static char untouched[256 * 1024];  // in .bss

static size_t Present(const void* memory, size_t bytes) {
  unsigned char pages[1024];
  const uintptr_t first = ((uintptr_t)memory + PAGE - 1) & ~(PAGE - 1);
  const size_t count = ((uintptr_t)memory + bytes - first) / PAGE;
  size_t present = 0;
  REQUIRE(count <= sizeof(pages));
  REQUIRE(mincore((void*)first, count * PAGE, pages) == 0);
  for (size_t i = 0; i < count; ++i) present += pages[i] & 1;
  return present;
}

static size_t Map(size_t bytes) {
  char* memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(memory != MAP_FAILED);
  const size_t present = Present(memory, bytes);
  REQUIRE(munmap(memory, bytes) == 0);
  return present;
}

// Of the process, in KiB.
static long Status(const char* name) {
  char line[256];
  long value = -1;
  FILE* file = fopen("/proc/self/status", "r");
  REQUIRE(file != NULL);
  while (fgets(line, sizeof(line), file) != NULL) {
    if (strncmp(line, name, strlen(name)) == 0) value = atol(line + strlen(name) + 1);
  }
  fclose(file);
  return value;
}

int main(void) {
  char* object = malloc(512 * KIB);
  char* mapped = mmap(NULL, 512 * KIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(object != NULL && mapped != MAP_FAILED);
  REQUIRE(mlockall(MCL_CURRENT | 64) == -1 && errno == EINVAL);
  if (mlockall(MCL_CURRENT) != 0) {
    printf("refused: %s\n", strerror(errno));
    REQUIRE(mlockall(MCL_CURRENT) != 0);
    return 0;
  }
  // All but what lies on pages beside.
  REQUIRE(Present(untouched, sizeof(untouched)) == (sizeof(untouched) - 1) / PAGE);
  REQUIRE(Present(object, 512 * KIB) >= 127);
  REQUIRE(Present(mapped, 512 * KIB) == 128);
  REQUIRE(mlockall(MCL_CURRENT | MCL_FUTURE) == 0);
  REQUIRE(Map(256 * KIB) == 64);
  // No page of zeros for every table that is only read.
  REQUIRE(Status("VmRSS") < 200 * (long)KIB);
  REQUIRE(Status("VmPTE") < 8 * (long)KIB);
  REQUIRE(munlockall() == 0);
  puts("ok");
  return 0;
}
