// A program for debuggers and profilers: threads that allocate until a line arrives on standard input.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kThreads = 4 };

static volatile int stop;
static volatile long turns[kThreads];
static char* note;  // for who looks into an image

__attribute__((noinline)) static long leaf(long number) {
  const size_t size = (size_t)(number % 1000) + 1;
  char* text = malloc(size);
  memset(text, 'a', size);
  const long found = text[size - 1] == 'a';
  free(text);
  return found;
}

static void* worker(void* argument) {
  const long number = (long)argument;
  while (!stop) turns[number] += leaf(turns[number]);
  return NULL;
}

int main(void) {
  pthread_t threads[kThreads];
  note = strdup("kept in the heap");
  for (long i = 0; i < kThreads; ++i) pthread_create(&threads[i], NULL, worker, (void*)i);
  puts("ready");
  fflush(stdout);
  (void)getchar();
  stop = 1;
  for (int i = 0; i < kThreads; ++i) pthread_join(threads[i], NULL);
  for (int i = 0; i < kThreads; ++i) {
    if (turns[i] == 0) return 3;
  }
  free(note);
  puts("done");
  return 0;
}
