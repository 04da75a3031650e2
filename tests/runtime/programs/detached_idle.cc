// Threads that never allocate, made detached or detached late: nothing of them stays behind in malloc. Then main leaves,
// and the process ends with its last thread, though it has been large enough for a keeper.
#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/runtime/programs/require.h"

namespace {

std::atomic<int> ran{0};

void* CountUp(void*) {
  ran.fetch_add(1);
  return nullptr;
}

void* Last(void*) {
  usleep(300'000);  // the keeper has gone to sleep, or ticks
  std::puts("ok");
  std::fflush(stdout);
  return nullptr;
}

}  // namespace

int main() {
  for (int i = 0; i < 20; ++i) {
    void* large = std::malloc(8 << 20);
    std::memset(large, 1, 8 << 20);
    std::free(large);
  }
  pthread_attr_t detached;
  REQUIRE(pthread_attr_init(&detached) == 0);
  REQUIRE(pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED) == 0);
  constexpr int kThreads = 3000;
  for (int i = 0; i < kThreads; ++i) {
    pthread_t thread;
    REQUIRE(pthread_create(&thread, i % 2 == 0 ? &detached : nullptr, CountUp, nullptr) == 0);
    if (i % 2 != 0) REQUIRE(pthread_detach(thread) == 0);
  }
  while (ran.load() < kThreads) usleep(1000);
  void* keepers_work = std::malloc(64 << 20);
  std::memset(keepers_work, 1, 64 << 20);
  std::free(keepers_work);
  pthread_t last;
  REQUIRE(pthread_create(&last, &detached, Last, nullptr) == 0);
  pthread_exit(nullptr);
}
