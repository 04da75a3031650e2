// Timers interrupt threads that allocate; and a signal that the program's threads block stays
// pending, although the runtime has a thread that the program does not know of.
#include <signal.h>
#include <sys/time.h>

#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "tests/runtime/programs/process_facts.h"
#include "tests/runtime/programs/require.h"

namespace {

std::atomic<int> alarms{0};
std::atomic<int> strays{0};

void Churn() {
  for (int round = 0; round < 300; ++round) {
    std::vector<std::vector<char>> blocks;
    for (std::size_t i = 0; i < 300; ++i) blocks.emplace_back(i * 37);
  }
}

// Makes the process large, and frees: the keeper starts, where there is one.
void Burst() {
  std::vector<void*> blocks;
  for (int i = 0; i < 64; ++i) {
    blocks.push_back(std::calloc(1, 1 << 20));
    REQUIRE(blocks.back() != nullptr);
    static_cast<char*>(blocks.back())[0] = 1;
  }
  for (void* block : blocks) std::free(block);
}

}  // namespace

int main() {
  Burst();
  struct sigaction action = {};
  action.sa_flags = SA_RESTART;
  action.sa_handler = [](int) { alarms.fetch_add(1); };
  REQUIRE(sigaction(SIGALRM, &action, nullptr) == 0);
  const itimerval interval = {{0, 200}, {0, 200}};
  REQUIRE(setitimer(ITIMER_REAL, &interval, nullptr) == 0);
  std::thread other(Churn);
  Churn();
  other.join();
  const itimerval off = {};
  REQUIRE(setitimer(ITIMER_REAL, &off, nullptr) == 0);
  REQUIRE(alarms.load() > 10);

  action.sa_handler = [](int) { strays.fetch_add(1); };
  REQUIRE(sigaction(SIGUSR1, &action, nullptr) == 0);
  sigset_t blocked;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGUSR1);
  REQUIRE(pthread_sigmask(SIG_BLOCK, &blocked, nullptr) == 0);
  REQUIRE(kill(getpid(), SIGUSR1) == 0);
  usleep(50'000);
  REQUIRE(strays.load() == 0);
  sigset_t pending;
  REQUIRE(sigpending(&pending) == 0 && sigismember(&pending, SIGUSR1) == 1);
  REQUIRE(pthread_sigmask(SIG_UNBLOCK, &blocked, nullptr) == 0);
  REQUIRE(strays.load() == 1);
  puts("ok");
  return 0;
}
