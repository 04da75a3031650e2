#include "bench/support/runner.h"

#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "bench/support/cpu.h"
#include "bench/support/kernel_memory.h"

ABSL_FLAG(std::vector<std::string>, threads, std::vector<std::string>({"1", "2"}),
          "how many threads to run every case with: numbers separated by commas");
ABSL_FLAG(bool, smoke, false,
          "run every case with hardly any work, to see that it runs; its numbers mean nothing");

namespace freehold::bench {
namespace {

bool standard_output_is_for_machines = false;

// Passes everything on to another reporter under the names that tools rely on, and remembers
// errors.
class CleanNames : public benchmark::BenchmarkReporter {
 public:
  // `inner` outlives this; the library keeps the default one to itself.
  explicit CleanNames(benchmark::BenchmarkReporter* inner) : inner_(inner) {}

  bool ReportContext(const Context& context) override {
    inner_->SetOutputStream(&GetOutputStream());
    inner_->SetErrorStream(&GetErrorStream());
    return inner_->ReportContext(context);
  }

  void ReportRuns(const std::vector<Run>& runs) override {
    std::vector<Run> cleaned = runs;
    for (Run& run : cleaned) {
      saw_error_ = saw_error_ || run.error_occurred;
      run.run_name.min_time.clear();
      run.run_name.min_warmup_time.clear();
      run.run_name.iterations.clear();
      run.run_name.repetitions.clear();
      run.run_name.time_type.clear();
    }
    inner_->ReportRuns(cleaned);
  }

  void Finalize() override { inner_->Finalize(); }

  bool saw_error() const { return saw_error_; }

 private:
  benchmark::BenchmarkReporter* inner_;
  bool saw_error_ = false;
};

void PrintHelp() {
  benchmark::PrintDefaultHelp();
  std::printf(
      "\nFlags of the house:\n"
      "          [--threads=1,2]\n"
      "          [--smoke]\n"
      "          [--helpfull]  (all flags, with those of this benchmark)\n");
}

// What Google Benchmark keeps to itself of its flags.
bool WritesToFile(int argc, char** argv) {
  return std::any_of(argv + 1, argv + argc, [](const char* argument) {
    return absl::StartsWith(argument, "--benchmark_out=");
  });
}
bool PrintsForMachines(int argc, char** argv) {
  return std::any_of(argv + 1, argv + argc, [](const char* argument) {
    return absl::StartsWith(argument, "--benchmark_format=") &&
           !absl::StartsWith(argument, "--benchmark_format=console");
  });
}

void DescribeMachine() {
  utsname name;
  if (uname(&name) == 0) {
    benchmark::AddCustomContext("kernel",
                                absl::StrCat(name.sysname, " ", name.release, " ", name.machine));
  }
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string huge_pages;
  if (std::getline(file, huge_pages))
    benchmark::AddCustomContext("transparent_hugepage", huge_pages);
  benchmark::AddCustomContext("allowed_cpus", absl::StrCat(AllowedCpuCount()));
  if (Smoke()) benchmark::AddCustomContext("smoke", "true");
}

}  // namespace

std::vector<int> ThreadCounts() {
  std::vector<int> counts;
  for (const std::string& text : absl::GetFlag(FLAGS_threads)) {
    int count = 0;
    if (!absl::SimpleAtoi(text, &count) || count < 1) {
      std::fprintf(stderr, "--threads: '%s' is not a number of threads\n", text.c_str());
      std::exit(1);
    }
    counts.push_back(count);
  }
  std::sort(counts.begin(), counts.end());
  counts.erase(std::unique(counts.begin(), counts.end()), counts.end());
  return counts;
}

bool Smoke() { return absl::GetFlag(FLAGS_smoke); }

bool StandardOutputIsForMachines() { return standard_output_is_for_machines; }

std::string BuiltFile(const std::string& path) {
  char self[4096];
  const ssize_t length = readlink("/proc/self/exe", self, sizeof(self));
  if (length < 0) DieOfErrno("/proc/self/exe");
  const std::string program(self, static_cast<std::size_t>(length));
  return absl::StrCat(program.substr(0, program.rfind('/')), "/", path);
}

void NoteLeftOut(const std::string& cases, const std::string& reason) {
  std::fprintf(stderr, "left out: %s: %s\n", cases.c_str(), reason.c_str());
}

void Register(const std::string& name, const std::function<void(benchmark::State&)>& function,
              const CaseOptions& options) {
  benchmark::internal::Benchmark* registered = nullptr;
  for (int threads : ThreadCounts()) {
    if (threads < options.min_threads || threads > options.max_threads) continue;
    if (threads % options.thread_multiple != 0) continue;
    if (registered == nullptr) registered = benchmark::RegisterBenchmark(name.c_str(), function);
    registered->Threads(threads);
  }
  if (registered == nullptr) return;
  registered->Unit(options.unit);
  if (options.manual_time) {
    registered->UseManualTime();
  } else {
    registered->UseRealTime();
  }
  if (options.iterations != 0) registered->Iterations(options.iterations);
  if (options.set_up != nullptr) registered->Setup(options.set_up);
  if (options.tear_down != nullptr) registered->Teardown(options.tear_down);
}

int RunBenchmarks(int argc, char** argv, bool (*register_cases)()) {
  const bool writes_to_file = WritesToFile(argc, argv);
  standard_output_is_for_machines = PrintsForMachines(argc, argv);
  benchmark::Initialize(&argc, argv, PrintHelp);
  absl::SetProgramUsageMessage("see bench/README.md; --help lists Google Benchmark's flags");
  absl::ParseCommandLine(argc, argv);

  DescribeMachine();
  if (!register_cases()) return 1;

  CleanNames display(benchmark::CreateDefaultDisplayReporter());
  benchmark::JSONReporter json;
  CleanNames file(&json);
  const std::size_t matched =
      benchmark::RunSpecifiedBenchmarks(&display, writes_to_file ? &file : nullptr);
  benchmark::Shutdown();
  return matched == 0 || display.saw_error() ? 1 : 0;
}

}  // namespace freehold::bench
