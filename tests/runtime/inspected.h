// For tests of the commands that look at a process: a process to look at, and ways to run the commands.
#ifndef FREEHOLD_TESTS_RUNTIME_INSPECTED_H_
#define FREEHOLD_TESTS_RUNTIME_INSPECTED_H_

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_split.h"
#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {

using Variables = std::vector<std::pair<std::string, std::string>>;

// The program `inspected` in one of its cases, while in scope. Under the shim unless told otherwise.
class Inspected {
 public:
  explicit Inspected(const std::string& name, Variables environment = {{"LD_PRELOAD", ShimLibrary()}}) {
    const std::string program = BuiltFile("tests/runtime/programs/inspected");
    int in[2], out[2];
    EXPECT_EQ(pipe2(in, O_CLOEXEC), 0);
    EXPECT_EQ(pipe2(out, O_CLOEXEC), 0);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(in[0], STDIN_FILENO);
      dup2(out[1], STDOUT_FILENO);
      for (const auto& [variable, value] : environment) setenv(variable.c_str(), value.c_str(), 1);
      execl(program.c_str(), "inspected", name.c_str(), nullptr);
      _exit(124);
    }
    close(in[0]);
    close(out[1]);
    input_ = in[1];
    char byte;
    while (read(out[0], &byte, 1) == 1 && byte != '\n') line_ += byte;
    close(out[0]);
    EXPECT_NE(line_, "");
  }
  ~Inspected() { End(); }
  Inspected(const Inspected&) = delete;
  Inspected& operator=(const Inspected&) = delete;

  // It reaches its end by itself, with status 0.
  void End() {
    if (input_ >= 0) close(std::exchange(input_, -1));
    if (pid_ == 0) return;
    int status = -1;
    waitpid(std::exchange(pid_, 0), &status, 0);
    EXPECT_EQ(status, 0);
  }
  // Leaves a zombie, or nothing.
  void Kill() const { kill(pid_, SIGKILL); }
  void KillAndWait() {
    Kill();
    waitpid(std::exchange(pid_, 0), nullptr, 0);
  }

  std::string pid() const { return std::to_string(pid_); }
  const std::string& line() const { return line_; }

 private:
  pid_t pid_;
  int input_;
  std::string line_;
};

inline Outcome Freehold(std::vector<std::string> arguments, Variables environment = {}) {
  arguments.insert(arguments.begin(), Cli());
  return RunProgram({.argv = arguments, .environment = std::move(environment), .timeout_seconds = 60});
}

// Runs it and expects that it works.
inline std::string OutputOf(std::vector<std::string> arguments) {
  const Outcome outcome = Freehold(std::move(arguments));
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(outcome.err, "");
  return outcome.out;
}

inline void ExpectFailure(std::vector<std::string> arguments, int status, const std::string& message) {
  const std::string command = arguments[0];
  const Outcome outcome = Freehold(std::move(arguments));
  EXPECT_EQ(outcome.status, status) << command;
  EXPECT_EQ(outcome.out, "") << command;
  EXPECT_EQ(outcome.err, "freehold: " + message + "\n") << command;
}

inline std::vector<std::string> Lines(const std::string& text) {
  std::vector<std::string> lines = absl::StrSplit(text, '\n');
  EXPECT_EQ(lines.back(), "") << "no newline at the end";
  lines.pop_back();
  return lines;
}

}  // namespace freehold::testing

#endif  // FREEHOLD_TESTS_RUNTIME_INSPECTED_H_
