// A program to look at: `inspected CASE`, see main. Prints a line once it is as it should be, then waits for the end of
// its standard input.
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "tests/runtime/programs/require.h"

namespace {

void AwaitEndOfInput() {
  char byte;
  while (read(STDIN_FILENO, &byte, 1) > 0) {
  }
}

void* MustAllocate(std::size_t size) {
  void* block = std::malloc(size);
  REQUIRE(block != nullptr);
  std::memset(block, 1, size);
  return block;
}

// Prints where 3 MiB lie that it holds.
void Hold() {
  void* block = MustAllocate(3 << 20);
  dprintf(1, "%p\n", block);
  AwaitEndOfInput();
  std::free(block);
}

// Parent and child print their ids; the child holds 40 MiB more.
void Fork() {
  MustAllocate(1 << 20);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    MustAllocate(40 << 20);
    dprintf(1, "%d\n", getpid());
    AwaitEndOfInput();
    _exit(0);
  }
  AwaitEndOfInput();
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child && status == 0);
}

// Has a telemetry page of another release.
void ForeignPage() {
  const int file = memfd_create("freehold-telemetry", 0);
  REQUIRE(file >= 0 && ftruncate(file, 1 << 16) == 0);
  void* page = mmap(nullptr, 1 << 16, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  REQUIRE(page != MAP_FAILED);
  std::memcpy(page, "FREEHOLD", 8);
  const std::uint32_t version = 99;
  std::memcpy(static_cast<char*>(page) + 8, &version, sizeof(version));
  dprintf(1, "ready\n");
  AwaitEndOfInput();
}

// A program's name can be anything.
void Name() {
  REQUIRE(prctl(PR_SET_NAME, "\033[31m\"\\\xff{}") == 0);
  Hold();
}

void HtmlName() {
  REQUIRE(prctl(PR_SET_NAME, "<b>&\"'") == 0);
  Hold();
}

std::atomic<bool> ending{false};

// Threads that allocate and free all the time: until the end of input, or until it is killed.
void Churn(bool until_end) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([] {
      std::vector<void*> blocks(50);
      for (unsigned round = 0; !ending.load(std::memory_order_relaxed); ++round) {
        void*& block = blocks[round * 7 % blocks.size()];
        std::free(block);
        block = std::malloc(1 << (12 + round % 14));
        REQUIRE(block != nullptr);
        *static_cast<char*>(block) = 1;
      }
    });
  }
  dprintf(1, "ready\n");
  if (until_end) {
    AwaitEndOfInput();
    ending = true;
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  REQUIRE(argc == 2);
  // Where only ancestors may look into a process (yama.ptrace_scope 1), the command may look into this one.
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
  const struct {
    const char* name;
    void (*run)();
  } cases[] = {{"hold", Hold}, {"fork", Fork}, {"foreign-page", ForeignPage}, {"name", Name}, {"html-name", HtmlName},
               {"churn", [] { Churn(false); }}, {"churn-until-end", [] { Churn(true); }}};
  for (const auto& [name, run] : cases) {
    if (std::strcmp(argv[1], name) != 0) continue;
    run();
    return 0;
  }
  return 2;
}
