// Allocates until there is no more, then frees and goes on: `exhaust SIZE`. Prints how many MiB it
// got.
#include <stdlib.h>

#include "tests/runtime/programs/require.h"

struct Block {
  struct Block* next;
};

static size_t Fill(struct Block** list, size_t size) {
  size_t total = 0;
  errno = 0;
  for (struct Block* block; total < (size_t)8 << 30 && (block = malloc(size)) != NULL;
       total += size) {
    block->next = *list;
    *list = block;
  }
  return total;
}

int main(int argc, char** argv) {
  REQUIRE(argc == 2);
  const size_t size = (size_t)atol(argv[1]);
  size_t total = 0;
  for (int round = 0; round < 2; ++round) {
    struct Block* list = NULL;
    total = Fill(&list, size);
    REQUIRE(errno == ENOMEM);
    REQUIRE(malloc(size) == NULL && errno == ENOMEM);
    while (list != NULL) {
      struct Block* next = list->next;
      free(list);
      list = next;
    }
    void* p = malloc(size);
    REQUIRE(p != NULL);
    free(p);
  }
  printf("%zu\n", total >> 20);
  return 0;
}
