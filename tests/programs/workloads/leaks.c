// Uses memory in the ways that valgrind's tools report; `leaks thread` races.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static long shared;

static void* race(void* argument) {
  shared += (long)argument;
  return NULL;
}

int main(int argc, char** argv) {
  if (argc > 1 && strcmp(argv[1], "thread") == 0) {
    pthread_t threads[2];
    for (long i = 0; i < 2; ++i) pthread_create(&threads[i], NULL, race, (void*)i);
    for (int i = 0; i < 2; ++i) pthread_join(threads[i], NULL);
    return 0;
  }
  char* volatile lost = malloc(100);
  memset(lost, 0, 100);
  lost = NULL;
  char* volatile freed = malloc(50);
  if (freed[10] != 0) puts("not zero");
  free(freed);
  freed[1] = 1;
  char* volatile kept = realloc(calloc(10, 10), 1000);
  char* volatile mapped = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mapped[5] = 1;
  munmap(mapped, 1 << 20);
  free(kept);
  free(kept);
  puts("end");
  return 0;
}
