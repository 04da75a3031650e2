// The program that steady_state_benchmark runs: threads that allocate and free, map and unmap, and create and join
// threads, each as a server does it. Plain C library calls; what serves them is the system's business.
//
//   steady_state_program THREADS WARM_UP_ROUNDS
//
// Prints "warm" once every thread has done the rounds. Then it goes on until standard input ends; each line that it
// reads there, it answers with the rounds of all threads so far.
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kObjects = 200;
constexpr int kMaxThreads = 256;

void Check(bool holds, const char* what) {
  if (holds) return;
  std::perror(what);
  std::exit(1);
}

// xorshift64.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::size_t Below(std::size_t bound) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<std::size_t>(state_ % bound);
  }

 private:
  std::uint64_t state_;
};

struct alignas(128) Worker {
  pthread_t thread;
  std::uint64_t seed;
  std::atomic<std::uint64_t> rounds;
};

Worker workers[kMaxThreads];
std::atomic<bool> finished{false};
// Objects on their way to whatever thread comes next.
std::atomic<void*> passed_on[64];

// Small ones, some of a few pages, and now and then a large one.
std::size_t RandomSize(Random& random) {
  switch (random.Below(16)) {
    case 0: return 1 + random.Below(64 << 10);
    case 1: return random.Below(8) == 0 ? (128 << 10) + random.Below(1 << 20) : 1 + random.Below(4 << 10);
    default: return 1 + random.Below(512);
  }
}

void AllocateAndFree(Random& random) {
  void* objects[kObjects];
  for (void*& object : objects) {
    const std::size_t size = RandomSize(random);
    object = std::malloc(size);
    Check(object != nullptr, "malloc");
    std::memset(object, 1, size);
  }
  for (void* object : objects) {
    // One in eight is freed by another thread.
    if (random.Below(8) == 0) object = passed_on[random.Below(std::size(passed_on))].exchange(object);
    std::free(object);
  }
}

void MapAndUnmap(Random& random) {
  const std::size_t bytes = (1 + random.Below(64)) * kPage;
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  Check(mapped != MAP_FAILED, "mmap");
  auto* memory = static_cast<char*>(mapped);
  for (std::size_t i = 0; i < bytes; i += kPage) memory[i] = 1;
  // In two parts, so that one of them leaves a hole.
  const std::size_t first = random.Below(bytes / kPage) * kPage;
  if (first != 0) Check(munmap(memory, first) == 0, "munmap");
  Check(munmap(memory + first, bytes - first) == 0, "munmap");
}

void* ShortLived(void* seed) {
  Random random(reinterpret_cast<std::uintptr_t>(seed));
  AllocateAndFree(random);
  MapAndUnmap(random);
  return nullptr;
}

void CreateAndJoin(Random& random) {
  pthread_t thread;
  Check(pthread_create(&thread, nullptr, ShortLived, reinterpret_cast<void*>(1 + random.Below(1 << 30))) == 0,
        "pthread_create");
  Check(pthread_join(thread, nullptr) == 0, "pthread_join");
}

void* Work(void* argument) {
  auto& worker = *static_cast<Worker*>(argument);
  Random random(worker.seed);
  while (!finished.load(std::memory_order_relaxed)) {
    AllocateAndFree(random);
    MapAndUnmap(random);
    CreateAndJoin(random);
    worker.rounds.fetch_add(1, std::memory_order_relaxed);
  }
  return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc == 3 ? std::atoi(argv[1]) : 0;
  if (threads < 1 || threads > kMaxThreads) {
    std::fprintf(stderr, "usage: steady_state_program THREADS WARM_UP_ROUNDS\n");
    return 2;
  }
  const std::uint64_t warm_up = std::strtoull(argv[2], nullptr, 10);
  for (int i = 0; i < threads; ++i) {
    workers[i].seed = static_cast<std::uint64_t>(i) + 1;
    Check(pthread_create(&workers[i].thread, nullptr, Work, &workers[i]) == 0, "pthread_create");
  }
  for (int i = 0; i < threads; ++i) {
    while (workers[i].rounds.load(std::memory_order_relaxed) < warm_up) usleep(1000);
  }
  std::puts("warm");
  std::fflush(stdout);
  for (char line[16]; std::fgets(line, sizeof(line), stdin) != nullptr;) {
    std::uint64_t rounds = 0;
    for (int i = 0; i < threads; ++i) rounds += workers[i].rounds.load(std::memory_order_relaxed);
    std::printf("%llu\n", static_cast<unsigned long long>(rounds));
    std::fflush(stdout);
  }
  finished.store(true, std::memory_order_relaxed);
  for (int i = 0; i < threads; ++i) Check(pthread_join(workers[i].thread, nullptr) == 0, "pthread_join");
  return 0;
}
