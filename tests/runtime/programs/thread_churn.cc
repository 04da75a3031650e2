// Thousands of threads are born, allocate, leave some of it to others, and end. Memory must not
// grow: what a thread leaves is found by those that come after it.
#include <malloc.h>
#include <pthread.h>

#include <cstdlib>
#include <thread>
#include <vector>

#include "tests/runtime/programs/process_facts.h"
#include "tests/runtime/programs/require.h"

namespace {

// Allocates in many sizes, and frees three quarters of it.
void Work(std::vector<void*>& left_over) {
  for (int i = 0; i < 400; ++i) {
    const std::size_t size = static_cast<std::size_t>(i % 64) * 61 + 1;
    auto* block = static_cast<char*>(std::malloc(size));
    REQUIRE(block != nullptr);
    block[0] = 1;
    if (i % 4 == 0) {
      left_over.push_back(block);
    } else {
      std::free(block);
    }
  }
  std::free(std::malloc(300'000));
}

void Round(int threads_at_once) {
  std::vector<std::vector<void*>> left_over(static_cast<std::size_t>(threads_at_once));
  std::vector<std::thread> threads;
  for (auto& blocks : left_over) threads.emplace_back([&blocks] { Work(blocks); });
  for (std::thread& thread : threads) thread.join();
  for (auto& blocks : left_over) {
    for (void* block : blocks) std::free(block);
  }
}

// Without what is free and kept for a while, which varies with how many of the threads run at once.
std::size_t ResidentMiB() {
  malloc_trim(0);
  return process::ResidentMiB();
}

}  // namespace

int main() {
  for (int i = 0; i < 50; ++i) Round(8);
  const std::size_t resident = ResidentMiB();
  const std::size_t in_use = mallinfo2().uordblks;
  for (int i = 0; i < 500; ++i) Round(8);
  const std::size_t resident_after = ResidentMiB();
  const std::size_t in_use_after = mallinfo2().uordblks;
  std::printf("resident %zu -> %zu MiB, in use %zu -> %zu KiB\n", resident, resident_after,
              in_use >> 10, in_use_after >> 10);
  // 4000 threads that left a page each behind would be 16 MiB.
  REQUIRE(resident_after <= resident + 4);
  REQUIRE(in_use_after <= in_use + (1 << 20));
  puts("ok");
  return 0;
}
