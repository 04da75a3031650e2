// Runs into FREEHOLD_HARD_LIMIT, by every way to ask for memory: `memory_limit MIB` tells it. Then, with "soft", into
// FREEHOLD_SOFT_LIMIT: prints by how much resident memory was above it at most, in MiB.
#include <malloc.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <latch>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "tests/runtime/programs/process_facts.h"
#include "tests/runtime/programs/require.h"

namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;
int new_handler_calls = 0;

void* Map(std::size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

std::vector<void*> RoomFor(std::size_t objects) {
  std::vector<void*> room;
  room.reserve(objects);
  return room;
}

// Touches everything until there is no more; how many bytes there were. `objects` has room for all.
std::size_t Exhaust(std::size_t size, std::vector<void*> objects = RoomFor(1000000)) {
  errno = 0;
  while (void* p = malloc(size)) {
    REQUIRE(errno == 0);
    memset(p, 1, size);
    objects.push_back(p);
  }
  REQUIRE(errno == ENOMEM);
  for (void* p : objects) free(p);
  return objects.size() * size;
}

void EveryWayFails(std::size_t bytes) {
  errno = 0;
  REQUIRE(malloc(bytes) == nullptr && errno == ENOMEM);
  errno = 0;
  REQUIRE(calloc(bytes / 16, 16) == nullptr && errno == ENOMEM);
  errno = 0;
  REQUIRE(aligned_alloc(1 << 21, bytes) == nullptr && errno == ENOMEM);
  errno = 0;
  REQUIRE(Map(bytes) == MAP_FAILED && errno == ENOMEM);
  void* p = nullptr;
  REQUIRE(posix_memalign(&p, 64, bytes) == ENOMEM && p == nullptr);
  p = malloc(3 * kMiB);
  REQUIRE(p != nullptr);
  memset(p, 7, 3 * kMiB);
  errno = 0;
  REQUIRE(realloc(p, bytes) == nullptr && errno == ENOMEM);
  for (std::size_t i = 0; i < 3 * kMiB; ++i) REQUIRE(static_cast<char*>(p)[i] == 7);
  free(p);
  REQUIRE(new (std::nothrow) char[bytes] == nullptr);
  bool thrown = false;
  try {
    ::operator delete(::operator new(bytes));
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  REQUIRE(thrown);
  std::set_new_handler([] {
    ++new_handler_calls;
    std::set_new_handler(nullptr);
  });
  REQUIRE(new (std::nothrow) char[bytes] == nullptr);
  REQUIRE(new_handler_calls == 1);
}

void Hard(std::size_t limit) {
  for (const std::size_t size : {std::size_t{1000}, std::size_t{30000}, std::size_t{260000}, 2 * kMiB}) {
    const std::size_t got = Exhaust(size);
    REQUIRE(got <= limit && got >= limit / 4 * 3 - 8 * kMiB);
    // Together with what is not Freehold's.
    REQUIRE(process::ResidentMiB() <= limit / kMiB + 24);
  }
  void* map = Map(limit / 2);
  REQUIRE(map != MAP_FAILED);
  EveryWayFails(limit / 2 + kMiB);
  REQUIRE(munmap(map, limit / 2) == 0);
  REQUIRE(Exhaust(1000) >= limit / 4 * 3 - 8 * kMiB);
  // In threads, and in a child. What the threads need themselves is there before one of them takes the rest.
  std::vector<std::thread> threads;
  std::latch ready(4);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&ready, objects = RoomFor(10000)]() mutable {
      ready.arrive_and_wait();
      Exhaust(100000, std::move(objects));
    });
  }
  for (std::thread& thread : threads) thread.join();
  const pid_t child = fork();
  if (child == 0) _exit(Exhaust(10000) >= limit / 2 && malloc(limit + 1) == nullptr ? 0 : 1);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child && status == 0);
}

void Soft(std::size_t limit) {
  std::size_t most = 0;
  for (int round = 0; round < 20; ++round) {
    const std::size_t size = round % 2 == 0 ? 500 : 3 * kMiB + kMiB * static_cast<std::size_t>(round);
    std::vector<void*> objects;
    for (std::size_t got = 0; got < limit * 3 / 4; got += size) {
      objects.push_back(memset(malloc(size), 1, size));
    }
    most = std::max(most, process::ResidentMiB());
    for (void* p : objects) free(p);
    usleep(30000);
  }
  printf("%zu\n", most - std::min(most, limit / kMiB));
}

}  // namespace

int main(int argc, char** argv) {
  REQUIRE(argc == 2 || argc == 3);
  const std::size_t limit = static_cast<std::size_t>(atol(argv[1])) * kMiB;
  argc == 2 ? Hard(limit) : Soft(limit);
  return 0;
}
