// Starts programs in every way that does not return to the parent's memory: fork and exec, vfork
// and exec, posix_spawn, system, popen; while another thread allocates.
#include <spawn.h>
#include <sys/wait.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "tests/runtime/programs/require.h"

extern char** environ;

namespace {

char program[] = "/bin/sh";
char option[] = "-c";
char command[] = "exit 3";
char* arguments[] = {program, option, command, nullptr};

void Expect(pid_t child) {
  int status = 0;
  REQUIRE(child > 0);
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 3);
}

void ForkAndExec() {
  const pid_t child = fork();
  if (child == 0) {
    execv(program, arguments);
    _exit(1);
  }
  Expect(child);
}

void VforkAndExec() {
  const pid_t child = vfork();
  if (child == 0) {
    execv(program, arguments);
    _exit(1);
  }
  Expect(child);
}

void Spawn() {
  pid_t child = 0;
  REQUIRE(posix_spawn(&child, program, nullptr, nullptr, arguments, environ) == 0);
  Expect(child);
}

void System() { REQUIRE(std::system("exit 3") == 3 << 8); }

void Popen() {
  FILE* pipe = popen("echo from the child", "r");
  REQUIRE(pipe != nullptr);
  char line[100] = {};
  REQUIRE(std::fgets(line, sizeof(line), pipe) != nullptr &&
          std::strcmp(line, "from the child\n") == 0);
  REQUIRE(pclose(pipe) == 0);
}

}  // namespace

int main() {
  std::atomic<bool> stop{false};
  std::thread worker([&stop] {
    while (!stop.load(std::memory_order_relaxed)) std::free(std::malloc(5000));
  });
  for (int i = 0; i < 20; ++i) {
    ForkAndExec();
    VforkAndExec();
    Spawn();
    System();
    Popen();
  }
  stop = true;
  worker.join();
  puts("ok");
  return 0;
}
