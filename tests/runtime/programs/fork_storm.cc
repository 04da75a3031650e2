// Forks again and again while other threads are in malloc, with fork handlers of its own that
// allocate too. The children allocate, free what the parent's threads had, create threads, and exit
// in the ordinary way. `fork_storm FORKS`.
#include <pthread.h>
#include <sys/wait.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "tests/runtime/programs/require.h"

namespace {

std::atomic<bool> stop{false};
constexpr int kWorkers = 3;
constexpr int kShared = 64;
// Blocks that change hands between threads.
std::atomic<void*> shared[kShared];

void Churn(unsigned seed) {
  std::vector<void*> own(200, nullptr);
  while (!stop.load(std::memory_order_relaxed)) {
    seed = seed * 1664525 + 1013904223;
    void*& slot = own[(seed >> 8) % own.size()];
    std::free(slot);
    const std::size_t size =
        (seed >> 16) % 100 == 0 ? (seed >> 12) % 2'000'000 : (seed >> 12) % 3000;
    slot = std::malloc(size);
    REQUIRE(slot != nullptr);
    if (size > 0) std::memset(slot, 1, size < 4096 ? size : 4096);
    if (seed % 7 == 0) slot = shared[(seed >> 4) % kShared].exchange(slot);
    if (seed % 50'000 == 0) std::thread([] { std::free(std::malloc(100)); }).join();
  }
  for (void* block : own) std::free(block);
}

void Allocate() {
  void* blocks[50];
  for (int i = 0; i < 50; ++i) {
    blocks[i] = std::malloc(static_cast<std::size_t>(i) * 997 + 1);
    REQUIRE(blocks[i] != nullptr);
    std::memset(blocks[i], i, static_cast<std::size_t>(i) * 997 + 1);
  }
  for (void* block : blocks) std::free(block);
  std::free(std::calloc(1, 5 << 20));
}

void ChildMain(int number) {
  Allocate();
  for (auto& slot : shared) std::free(slot.exchange(nullptr));
  if (number % 3 == 0) {
    std::thread first(Allocate);
    std::thread second([] {
      Allocate();
      std::thread(Allocate).join();
    });
    first.join();
    second.join();
  }
  if (number % 10 == 0) {
    // A child's own child.
    const pid_t grandchild = fork();
    REQUIRE(grandchild >= 0);
    if (grandchild == 0) {
      Allocate();
      std::thread(Allocate).join();
      _exit(0);
    }
    int status = 0;
    REQUIRE(waitpid(grandchild, &status, 0) == grandchild && status == 0);
  }
  std::exit(number % 100);
}

std::atomic<int> handlers_run{0};

void OnFork() {
  Allocate();
  handlers_run.fetch_add(1);
}

}  // namespace

int main(int argc, char** argv) {
  const int forks = argc > 1 ? std::atoi(argv[1]) : 300;
  REQUIRE(pthread_atfork(OnFork, OnFork, OnFork) == 0);
  std::vector<std::thread> workers;
  for (unsigned i = 0; i < kWorkers; ++i) workers.emplace_back(Churn, i + 1);
  for (int i = 0; i < forks; ++i) {
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      alarm(60);  // a hang is a failure, not a time-out of the whole test
      ChildMain(i);
    }
    Allocate();
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != i % 100) {
      dprintf(2, "child %d: status 0x%x\n", i, static_cast<unsigned>(status));
      return 1;
    }
  }
  stop = true;
  for (std::thread& worker : workers) worker.join();
  for (auto& slot : shared) std::free(slot.exchange(nullptr));
  REQUIRE(handlers_run.load() == 2 * forks);
  puts("ok");
  return 0;
}
