// How often does a program in steady state take the kernel's mmap_lock for writing? steady_state_program, which knows
// nothing of Freehold, under `freehold run` with every shim (`freehold`), and plain (`kernel`: glibc's malloc and
// stacks, the kernel's mmap).
//
//   steady_state/IMPL     threads that allocate and free, map and unmap, and create and join threads
//
// What is measured. mmap_lock_writes: acquisitions by the program's threads, its own and Freehold's, in --seconds; the
// kernel's tracepoint counts them. rounds_per_second: of the workload. warm_up_seconds: until --quiet_seconds passed
// without an acquisition, --warm_up_seconds at most: while a program reaches addresses that it never used before,
// which become writable in steps of up to 1 GiB, it is not in steady state. The baseline has no such time, and is given
// as long as the quiet takes.
//
// Needs root and a kernel with tracepoints for mmap_lock.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "bench/support/kernel_memory.h"
#include "bench/support/mmap_lock_trace.h"
#include "bench/support/runner.h"

ABSL_FLAG(double, seconds, 5, "how long the program is watched");
ABSL_FLAG(double, quiet_seconds, 15, "the warm-up is over when so long no lock was taken for writing");
ABSL_FLAG(double, warm_up_seconds, 90, "how long the warm-up takes at most");

namespace freehold::bench {
namespace {

using Clock = std::chrono::steady_clock;

void Sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }
double SecondsSince(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// steady_state_program while it runs. Whatever goes wrong ends this program, and so the other one's input, and it.
class Program {
 public:
  // It has done `rounds` rounds by then. Traced from its first instruction on.
  Program(std::vector<std::string> command, int threads, std::size_t rounds, MmapLockTrace& trace) {
    command.push_back(BuiltFile("steady_state_program"));
    command.push_back(absl::StrCat(threads));
    command.push_back(absl::StrCat(rounds));
    std::vector<char*> arguments;
    for (std::string& argument : command) arguments.push_back(argument.data());
    arguments.push_back(nullptr);
    int input[2];
    int output[2];
    if (pipe2(input, O_CLOEXEC) != 0 || pipe2(output, O_CLOEXEC) != 0) DieOfErrno("pipe2");
    process_ = fork();
    if (process_ < 0) DieOfErrno("fork");
    if (process_ == 0) {
      // Not before it is followed.
      char go;
      if (read(input[0], &go, 1) != 1) _exit(127);
      dup2(input[0], STDIN_FILENO);
      dup2(output[1], STDOUT_FILENO);
      execv(arguments[0], arguments.data());
      _exit(127);
    }
    close(input[0]);
    close(output[1]);
    to_ = input[1];
    from_ = fdopen(output[0], "r");
    trace.Follow(process_);
    Tell("!");
    if (Hear() != "warm\n") Fail();
  }
  ~Program() {
    close(to_);
    int status = 0;
    if (waitpid(process_, &status, 0) != process_ || status != 0) Fail();
    std::fclose(from_);
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  std::uint64_t Rounds() {
    Tell("\n");
    std::uint64_t rounds = 0;
    if (!absl::SimpleAtoi(Hear(), &rounds)) Fail();
    return rounds;
  }

 private:
  void Tell(const std::string& text) {
    if (write(to_, text.data(), text.size()) != static_cast<ssize_t>(text.size())) Fail();
  }
  std::string Hear() {
    char line[64];
    return std::fgets(line, sizeof(line), from_) != nullptr ? line : "";
  }
  [[noreturn]] static void Fail() {
    std::fprintf(stderr, "steady_state_program did not do its work\n");
    std::exit(1);
  }

  pid_t process_ = -1;
  int to_ = -1;
  FILE* from_ = nullptr;
};

std::unique_ptr<MmapLockTrace> trace;
// Of the case that runs: made before its threads are, of which one is needed.
std::unique_ptr<Program> program;
double warm_up_seconds = 0;

struct Freehold {
  static constexpr const char* kName = "freehold";
  static std::vector<std::string> Command() { return {BuiltFile("../runtime/cli/freehold"), "run", "--"}; }
  static double WarmUpSeconds() { return absl::GetFlag(FLAGS_warm_up_seconds); }
};

struct Kernel {
  static constexpr const char* kName = "kernel";
  static std::vector<std::string> Command() { return {}; }
  static double WarmUpSeconds() { return absl::GetFlag(FLAGS_quiet_seconds); }
};

template <typename Implementation>
void StartAndWarmUp(const benchmark::State& state) {
  const Clock::time_point begin = Clock::now();
  program = std::make_unique<Program>(Implementation::Command(), state.threads(), Scaled(100, 1), *trace);
  const double quiet = absl::GetFlag(FLAGS_quiet_seconds);
  do {
    trace->Start();
    Sleep(quiet);
    trace->Stop();
  } while (trace->WriteAcquisitions() > 0 && SecondsSince(begin) < Implementation::WarmUpSeconds());
  warm_up_seconds = SecondsSince(begin);
}

void Stop(const benchmark::State&) { program = nullptr; }

void SteadyState(benchmark::State& state) {
  const bool watches = state.thread_index() == 0;
  double rounds_per_second = 0;
  for (auto _ : state) {
    if (!watches) continue;
    const std::uint64_t before = program->Rounds();
    const Clock::time_point begin = Clock::now();
    trace->Start();
    Sleep(absl::GetFlag(FLAGS_seconds));
    trace->Stop();
    rounds_per_second = static_cast<double>(program->Rounds() - before) / SecondsSince(begin);
  }
  if (!watches) return;
  const std::uint64_t writes = trace->WriteAcquisitions();
  if (writes > 0) std::fprintf(stderr, "mmap_lock was taken for writing:\n%s", trace->Excerpt().c_str());
  state.counters["mmap_lock_writes"] = static_cast<double>(writes);
  state.counters["warm_up_seconds"] = warm_up_seconds;
  state.counters["rounds_per_second"] = rounds_per_second;
}

template <typename Implementation>
void RegisterOne() {
  Register(absl::StrCat("steady_state/", Implementation::kName), SteadyState,
           {.iterations = 1,
            .set_up = StartAndWarmUp<Implementation>,
            .tear_down = Stop,
            .unit = benchmark::kMillisecond});
}

bool RegisterCases() {
  signal(SIGPIPE, SIG_IGN);
  std::string reason;
  trace = MmapLockTrace::Create(reason);
  if (trace == nullptr) {
    NoteLeftOut("steady_state", reason);
    return true;
  }
  RegisterOne<Freehold>();
  RegisterOne<Kernel>();
  return true;
}

}  // namespace
}  // namespace freehold::bench

int main(int argc, char** argv) {
  const int status = freehold::bench::RunBenchmarks(argc, argv, freehold::bench::RegisterCases);
  freehold::bench::trace = nullptr;
  return status;
}
