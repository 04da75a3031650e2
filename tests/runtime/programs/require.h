// For the programs that tests of the runtime start: stops with a message and status 1 when a
// condition fails. Usable from C and C++; allocates nothing.
#ifndef FREEHOLD_TESTS_RUNTIME_PROGRAMS_REQUIRE_H_
#define FREEHOLD_TESTS_RUNTIME_PROGRAMS_REQUIRE_H_

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define REQUIRE(condition)                                                                 \
  do {                                                                                     \
    if (!(condition)) {                                                                    \
      dprintf(2, "%s:%d: failed: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno); \
      _exit(1);                                                                            \
    }                                                                                      \
  } while (0)

#endif  // FREEHOLD_TESTS_RUNTIME_PROGRAMS_REQUIRE_H_
