// Thousands of threads that live at the same time, each of which has been somewhat deep in its stack. Prints the
// kernel VMAs that they added and how much memory is resident while they live, and when they are gone.
//
//     many_threads COUNT
#include <pthread.h>
#include <semaphore.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "tests/runtime/programs/require.h"

namespace {

int KernelVmas() {
  std::ifstream maps("/proc/self/maps");
  int count = 0;
  for (std::string line; std::getline(maps, line);) ++count;
  return count;
}

long ResidentMiB() {
  std::ifstream statm("/proc/self/statm");
  long size = 0, resident = 0;
  statm >> size >> resident;
  return resident * 4096 >> 20;
}

sem_t ready;
sem_t go;

__attribute__((noinline)) void Dig(int kib) {
  volatile char memory[1000];
  memory[0] = 1;
  if (kib > 1) Dig(kib - 1);
  memory[1] = memory[0];
}

void* Live(void*) {
  Dig(256);
  sem_post(&ready);
  while (sem_wait(&go) != 0) {
  }
  return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  REQUIRE(argc == 2);
  std::vector<pthread_t> threads(static_cast<std::size_t>(std::atoi(argv[1])));
  REQUIRE(sem_init(&ready, 0, 0) == 0 && sem_init(&go, 0, 0) == 0);
  const int vmas = KernelVmas();
  const long resident = ResidentMiB();
  for (pthread_t& thread : threads) REQUIRE(pthread_create(&thread, nullptr, Live, nullptr) == 0);
  for (std::size_t i = 0; i < threads.size(); ++i) REQUIRE(sem_wait(&ready) == 0);
  std::printf("vmas %d resident %ld", KernelVmas() - vmas, ResidentMiB() - resident);
  for (std::size_t i = 0; i < threads.size(); ++i) REQUIRE(sem_post(&go) == 0);
  for (pthread_t thread : threads) REQUIRE(pthread_join(thread, nullptr) == 0);
  std::printf(" after %ld\n", ResidentMiB() - resident);
  return 0;
}
