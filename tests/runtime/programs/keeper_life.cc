// Looks at the keeper from outside: `keeper_life CASE`, see main.
#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "tests/runtime/programs/process_facts.h"
#include "tests/runtime/programs/require.h"

namespace {

using process::kKeeper;

// Makes the process large, and frees.
void Burst() {
  std::vector<void*> blocks;
  for (int i = 0; i < 64; ++i) {
    blocks.push_back(std::malloc(1 << 20));
    REQUIRE(blocks.back() != nullptr);
    std::memset(blocks.back(), 1, 1 << 20);
  }
  for (void* block : blocks) std::free(block);
}

// Whether `condition` comes true within five seconds.
template <typename Condition>
bool Eventually(Condition condition) {
  for (int i = 0; i < 500; ++i) {
    if (condition()) return true;
    usleep(10'000);
  }
  return false;
}

bool HasKeeper() { return !process::TaskNamed(kKeeper).empty(); }

// How often the thread with this status file has gone to sleep. Allocates nothing.
long VoluntarySwitches(const char* path) {
  static char status[4096];
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  REQUIRE(fd >= 0);
  const ssize_t size = read(fd, status, sizeof(status) - 1);
  close(fd);
  REQUIRE(size > 0);
  status[size] = '\0';
  const char* field = std::strstr(status, "\nvoluntary_ctxt_switches:");
  REQUIRE(field != nullptr);
  return std::atol(field + 25);
}

void SmallProcessHasNoKeeper() {
  for (int i = 0; i < 100'000; ++i) std::free(std::malloc(static_cast<std::size_t>(i % 5000)));
  REQUIRE(process::Tasks().size() == 1);
  REQUIRE(unshare(CLONE_NEWUSER) == 0 || errno != EINVAL);  // EINVAL: has threads
}

void BlocksSignals() {
  Burst();
  REQUIRE(Eventually(HasKeeper));
  // All but SIGKILL, SIGSTOP and the two that libc keeps for itself (32 and 33).
  const unsigned long long mask = std::strtoull(
      process::StatusField(process::TaskNamed(kKeeper), "SigBlk").c_str(), nullptr, 16);
  for (int signal = 1; signal <= 64; ++signal) {
    const bool never = signal == SIGKILL || signal == SIGSTOP || signal == 32 || signal == 33;
    REQUIRE(never || (mask >> (signal - 1) & 1) == 1);
  }
}

// Once everything is given back, it sleeps without waking up; and wakes up for the next burst.
void SleepsWhenIdle() {
  Burst();
  REQUIRE(Eventually(HasKeeper));
  // Without allocating: a free can wake the keeper.
  static char path[100];
  std::snprintf(path, sizeof(path), "%s/status", process::TaskNamed(kKeeper).c_str());
  REQUIRE(Eventually([&] {
    const long before = VoluntarySwitches(path);
    usleep(500'000);
    return VoluntarySwitches(path) == before;
  }));
  const std::size_t idle = process::ResidentMiB();
  Burst();
  REQUIRE(process::ResidentMiB() > idle + 30);
  REQUIRE(Eventually([&] { return process::ResidentMiB() < idle + 8; }));
}

// The keeper takes part in a change of identity: it is a thread that libc knows.
void FollowsSetuid() {
  Burst();
  REQUIRE(Eventually(HasKeeper));
  REQUIRE(setgid(65534) == 0 && setuid(65534) == 0);
  for (const std::string& task : process::Tasks()) {
    REQUIRE(process::StatusField(task, "Uid") == "65534\t65534\t65534\t65534");
  }
  Burst();
}

// The process ends with its last thread, though main left before and the keeper runs.
void EndsWithLastThread() {
  Burst();
  REQUIRE(Eventually(HasKeeper));
  std::thread([] {
    Burst();
    usleep(100'000);
    std::puts("last thread");
  }).detach();
  pthread_exit(nullptr);
}

void RestartsInChild() {
  Burst();
  REQUIRE(Eventually(HasKeeper));
  for (int i = 0; i < 5; ++i) {
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      Burst();
      REQUIRE(Eventually(HasKeeper));
      REQUIRE(Eventually([] { return process::ResidentMiB() < 40; }));
      std::exit(0);
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child && status == 0);
    Burst();
    REQUIRE(HasKeeper());
  }
}

// The child of vfork lives in this process's memory: what it frees must not start a keeper that
// ends with it.
void IsNotStartedInVforksChild() {
  std::vector<void*> blocks;
  for (int i = 0; i < 64; ++i) blocks.push_back(nullptr);
  const pid_t child = vfork();
  if (child == 0) {
    for (void*& block : blocks) block = std::malloc(1 << 20);
    for (void* block : blocks) std::free(block);
    _exit(0);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child && status == 0);
  usleep(20'000);
  Burst();
  REQUIRE(Eventually(HasKeeper));
  REQUIRE(Eventually([] { return process::ResidentMiB() < 20; }));
}

// Where the system refuses a thread, the program's own activity gives memory back.
void IsRefused() {
  if (getuid() == 0) REQUIRE(setgid(65534) == 0 && setuid(65534) == 0);
  const rlimit limit = {0, 0};
  REQUIRE(setrlimit(RLIMIT_NPROC, &limit) == 0);
  Burst();
  REQUIRE(Eventually([] {
    for (std::size_t i = 1; i < 200; ++i) std::free(std::malloc(i * 5000));
    return process::ResidentMiB() < 20;
  }));
  REQUIRE(process::Tasks().size() == 1);
}

// FREEHOLD_KEEPER=0.
// For as long as it takes to start one many times over.
void NoKeeper() {
  for (int i = 0; i < 100; ++i) {
    Burst();
    REQUIRE(!HasKeeper());
  }
}

}  // namespace

int main(int argc, char** argv) {
  REQUIRE(argc == 2);
  const std::string name = argv[1];
  if (name == "small") SmallProcessHasNoKeeper();
  if (name == "signals") BlocksSignals();
  if (name == "idle") SleepsWhenIdle();
  if (name == "setuid") FollowsSetuid();
  if (name == "last-thread") EndsWithLastThread();
  if (name == "fork") RestartsInChild();
  if (name == "vfork") IsNotStartedInVforksChild();
  if (name == "refused") IsRefused();
  if (name == "off") NoKeeper();
  std::puts("ok");
  return 0;
}
