// malloc_trim gives back what is free, whoever freed it, and says so: by resident memory.
#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "tests/runtime/programs/process_facts.h"
#include "tests/runtime/programs/require.h"

namespace {

// What stays: objects that the program holds, and what the process is without them.
constexpr std::size_t kSlackMiB = 6;
constexpr std::size_t kMiB = std::size_t{1} << 20;

using Objects = std::vector<void*>;

// Small, medium and large ones, 24 MiB of each kind.
void Allocate(Objects& objects) {
  for (const std::size_t size : {std::size_t{48}, std::size_t{700}, std::size_t{20000}, std::size_t{300000}, 5 * kMiB}) {
    for (std::size_t bytes = 0; bytes < 24 * kMiB; bytes += size) {
      objects.push_back(memset(malloc(size), 1, size));
    }
  }
}

void Free(Objects& objects) {
  for (void* p : objects) free(p);
  objects.clear();
}

void Trimmed(std::size_t before, const char* what) {
  REQUIRE(malloc_trim(0) == 1);
  // There is nothing more.
  REQUIRE(malloc_trim(0) == 0);
  const std::size_t after = process::ResidentMiB();
  if (after > before + kSlackMiB) dprintf(2, "%s: %zu MiB, and %zu before\n", what, after, before);
  REQUIRE(after <= before + kSlackMiB);
}

}  // namespace

int main() {
  Objects objects;
  objects.reserve(800000);
  Allocate(objects);
  Free(objects);
  malloc_trim(0);
  const std::size_t before = process::ResidentMiB();

  Allocate(objects);
  REQUIRE(process::ResidentMiB() >= before + 100);
  Free(objects);
  Trimmed(before, "own objects");

  // Of threads that are gone, freed here, and the other way round.
  std::thread([&] { Allocate(objects); }).join();
  Free(objects);
  Trimmed(before, "objects of a thread that is gone");
  Allocate(objects);
  std::thread([&] { Free(objects); }).join();
  Trimmed(before, "objects that a thread freed");

  // Memory of mmap.
  void* map = mmap(nullptr, 20 * kMiB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(map != MAP_FAILED);
  memset(map, 1, 20 * kMiB);
  REQUIRE(munmap(map, 20 * kMiB) == 0);
  Trimmed(before, "mappings");

  // Every other object stays, and what it holds with it.
  Allocate(objects);
  for (std::size_t i = 0; i < objects.size(); i += 2) {
    free(objects[i]);
    objects[i] = nullptr;
  }
  malloc_trim(0);
  for (std::size_t i = 1; i < objects.size(); i += 2) REQUIRE(*static_cast<char*>(objects[i]) == 1);
  Free(objects);
  Trimmed(before, "the rest");

  // In a child, whose parent had other threads: they are gone there, and their objects free.
  pthread_barrier_t allocated, ended;
  pthread_barrier_init(&allocated, nullptr, 2);
  pthread_barrier_init(&ended, nullptr, 2);
  std::thread other([&] {
    Allocate(objects);
    pthread_barrier_wait(&allocated);
    pthread_barrier_wait(&ended);
  });
  pthread_barrier_wait(&allocated);
  const pid_t child = fork();
  if (child == 0) {
    Free(objects);
    Trimmed(before, "in a child");
    _exit(0);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child && status == 0);
  pthread_barrier_wait(&ended);
  other.join();
  Free(objects);
  Trimmed(before, "after a child");
  return 0;
}
