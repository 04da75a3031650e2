#include "tests/runtime/subprocess.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "gtest/gtest.h"

extern char** environ;

namespace freehold::testing {
namespace {

using Clock = std::chrono::steady_clock;

bool IsOurs(const char* variable) {
  return std::strncmp(variable, "FREEHOLD_", 9) == 0 ||
         std::strncmp(variable, "LD_PRELOAD=", 11) == 0;
}

std::vector<std::string> EnvironmentOf(const Launch& launch) {
  std::vector<std::string> variables;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    if (!IsOurs(*variable)) variables.emplace_back(*variable);
  }
  for (const auto& [name, value] : launch.environment) variables.push_back(name + "=" + value);
  return variables;
}

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (std::string& string : strings) pointers.push_back(string.data());
  pointers.push_back(nullptr);
  return pointers;
}

[[noreturn]] void Fatal(const char* what) {
  std::perror(what);
  std::abort();
}

struct Pipe {
  Pipe() {
    if (pipe2(ends.data(), O_CLOEXEC) != 0) Fatal("pipe2");
  }
  std::array<int, 2> ends;
};

// In the child of fork: becomes the program.
[[noreturn]] void Execute(char** argv, char** environment, const Launch& launch, int out, int err) {
  setpgid(0, 0);
  dup2(out, STDOUT_FILENO);
  dup2(err, STDERR_FILENO);
  if (launch.address_space_limit) {
    const rlimit limit = {*launch.address_space_limit, *launch.address_space_limit};
    if (setrlimit(RLIMIT_AS, &limit) != 0) _exit(124);
  }
  execvpe(argv[0], argv, environment);
  std::perror(argv[0]);
  _exit(124);
}

// Appends what is there to read. Returns false at the end of the stream.
bool Drain(int fd, std::string& text) {
  char chunk[4096];
  const ssize_t count = read(fd, chunk, sizeof(chunk));
  if (count > 0) text.append(chunk, static_cast<std::size_t>(count));
  return count > 0 || (count < 0 && errno == EINTR);
}

int StatusOf(int wait_status) {
  return WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) : -WTERMSIG(wait_status);
}

}  // namespace

Outcome RunProgram(const Launch& launch) {
  std::vector<std::string> arguments = launch.argv;
  std::vector<std::string> variables = EnvironmentOf(launch);
  const std::vector<char*> argv = Pointers(arguments);
  const std::vector<char*> environment = Pointers(variables);
  Pipe out;
  Pipe err;
  const pid_t child = fork();
  if (child < 0) Fatal("fork");
  if (child == 0) {
    Execute(const_cast<char**>(argv.data()), const_cast<char**>(environment.data()), launch,
            out.ends[1], err.ends[1]);
  }
  close(out.ends[1]);
  close(err.ends[1]);

  Outcome outcome;
  std::array<pollfd, 2> streams = {{{out.ends[0], POLLIN, 0}, {err.ends[0], POLLIN, 0}}};
  const auto deadline = Clock::now() + std::chrono::seconds(launch.timeout_seconds);
  while (streams[0].fd >= 0 || streams[1].fd >= 0) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (left <= 0) {
      kill(-child, SIGKILL);
      outcome.err += "[killed: no end within the time limit]\n";
      break;
    }
    if (poll(streams.data(), streams.size(), static_cast<int>(left)) < 0 && errno != EINTR)
      Fatal("poll");
    if (streams[0].revents != 0 && !Drain(streams[0].fd, outcome.out)) streams[0].fd = -1;
    if (streams[1].revents != 0 && !Drain(streams[1].fd, outcome.err)) streams[1].fd = -1;
  }
  close(out.ends[0]);
  close(err.ends[0]);
  int wait_status = 0;
  while (waitpid(child, &wait_status, 0) < 0) {
    if (errno != EINTR) Fatal("waitpid");
  }
  outcome.status = StatusOf(wait_status);
  return outcome;
}

Launch UnderShim(Launch launch) {
  launch.environment.emplace_back("LD_PRELOAD", ShimLibrary());
  return launch;
}

std::string BuiltFile(const std::string& path) {
  char* absolute = realpath(path.c_str(), nullptr);
  if (absolute == nullptr) Fatal(path.c_str());
  std::string result = absolute;
  std::free(absolute);
  return result;
}

Launch TestProgram(const std::string& name, std::vector<std::string> arguments, Environment environment) {
  arguments.insert(arguments.begin(), BuiltFile("tests/runtime/programs/" + name));
  return {.argv = std::move(arguments), .environment = std::move(environment)};
}

std::string ExpectQuiet(const Launch& launch) {
  const Outcome outcome = RunProgram(launch);
  std::string what;
  for (const auto& [name, value] : launch.environment) what += name + "=" + value + " ";
  for (const std::string& argument : launch.argv) what += argument + " ";
  EXPECT_EQ(outcome.status, 0) << what;
  EXPECT_EQ(outcome.err, "") << what;
  return outcome.out;
}

std::string ShimLibrary() { return BuiltFile("runtime/shim/libfreehold.so"); }

std::string Cli() { return BuiltFile("runtime/cli/freehold"); }

}  // namespace freehold::testing
