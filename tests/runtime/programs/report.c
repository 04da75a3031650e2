// Prints what malloc says about itself, over a known load: `report xml|stats|none`.
#include <malloc.h>
#include <stdlib.h>

#include "tests/runtime/programs/require.h"

int main(int argc, char** argv) {
  REQUIRE(argc == 2);
  static void* blocks[1000];
  for (int i = 0; i < 1000; ++i) blocks[i] = malloc(1000);
  void* large = malloc(10 << 20);
  REQUIRE(large != NULL);
  if (strcmp(argv[1], "xml") == 0) REQUIRE(malloc_info(0, stdout) == 0);
  if (strcmp(argv[1], "stats") == 0) malloc_stats();
  const struct mallinfo2 info = mallinfo2();
  fprintf(stderr, "mallinfo2: arena %zu uordblks %zu fordblks %zu hblks %zu hblkhd %zu\n",
          info.arena, info.uordblks, info.fordblks, info.hblks, info.hblkhd);
  for (int i = 0; i < 1000; ++i) free(blocks[i]);
  free(large);
  return 0;
}
