// The main function that the benchmarks share: Google Benchmark's flags, the flags of the house,
// and names as tools rely on them.
#ifndef FREEHOLD_BENCH_SUPPORT_RUNNER_H_
#define FREEHOLD_BENCH_SUPPORT_RUNNER_H_

#include <benchmark/benchmark.h>

#include <cstddef>
#include <functional>
#include <limits>
#include <string>
#include <vector>

namespace freehold::bench {

// Parses the command line, lets `register_cases` register what the flags ask for, runs it and
// returns the exit status: 1 when `register_cases` refused (it has said why), a case reported an
// error or none matched the filter.
//
// Names are reported as `<operation>/<implementation>[/<argument>]/threads:<n>`; the parts that
// Google Benchmark puts in between (`/real_time`, `/iterations:1`, …) are left out. --benchmark_out
// writes JSON.
int RunBenchmarks(int argc, char** argv, bool (*register_cases)());

// The value of --threads, in ascending order: how many threads every case is run with, one after
// the other.
std::vector<int> ThreadCounts();

// Whether --smoke was given: every case runs, with so little work that its numbers mean nothing.
bool Smoke();

// `count`, or `smoke_count` under --smoke.
inline std::size_t Scaled(std::size_t count, std::size_t smoke_count) {
  return Smoke() ? smoke_count : count;
}

// Whether --benchmark_format asks for something else than the console's text, so that nothing else
// may be written to standard output.
bool StandardOutputIsForMachines();

// Says on standard error why a case is left out.
void NoteLeftOut(const std::string& cases, const std::string& reason);

// The path of a file of the build, given from this benchmark's folder: "../runtime/cli/freehold".
std::string BuiltFile(const std::string& path);

// How a case is registered.
struct CaseOptions {
  // Which counts of --threads make sense: from, to, and a multiple of this many.
  int min_threads = 1;
  int max_threads = std::numeric_limits<int>::max();
  int thread_multiple = 1;
  // The case sets its own time (SetIterationTime), leaving out what it does in between. Otherwise
  // wall-clock time is measured: threads that sleep in the kernel use no CPU time.
  bool manual_time = false;
  // Rounds to run instead of as many as fill --benchmark_min_time; 0: the latter.
  int iterations = 0;
  // Called on the main thread before and after every run, with no benchmark thread alive. May be
  // null.
  void (*set_up)(const benchmark::State&) = nullptr;
  void (*tear_down)(const benchmark::State&) = nullptr;
  benchmark::TimeUnit unit = benchmark::kNanosecond;
};

// Registers `function` under `name` for every fitting count of --threads.
void Register(const std::string& name, const std::function<void(benchmark::State&)>& function,
              const CaseOptions& options = {});

}  // namespace freehold::bench

#endif  // FREEHOLD_BENCH_SUPPORT_RUNNER_H_
