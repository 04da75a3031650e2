#include "runtime/cli/top.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "runtime/cli/command.h"
#include "runtime/cli/lock_view.h"
#include "runtime/cli/process_view.h"
#include "runtime/cli/terminal.h"

namespace freehold::cli {
namespace {

using vm::sync::HolderInfo;
using vm::sync::LockTimes;

constexpr absl::string_view kHelp = R"(Usage: freehold top PID [--interval=SECONDS] [--count=N] [--once]

Shows what a process that runs on Freehold does with its memory: operations, range locks and system calls per second,
what is resident, and which threads wait for which. 'q' or Ctrl-C ends it. Where standard output is no terminal, it prints
one screen after the other.

  --interval=SECONDS   between two screens, 0.1 to 3600; default: 1
  --count=N            end after N screens
  --once               the same as --count=1: look once for an interval, and print that

Waits for range locks are there if the process runs with FREEHOLD_RECORD_RANGE_LOCKS=1; who waits for whom always is.
Exit status: 0, also if the process ends meanwhile; 1 if the process cannot be looked at; 2 for wrong arguments.
)";

// What is known of one moment.
struct Sample {
  absl::Time time;
  std::map<std::string, std::uint64_t> values;
  std::vector<ProcessView::OperationTimes> lock_times;
  std::vector<LockWait> waits;
  vm::Bytes largest_gap;
  std::uint64_t resident = 0;

  std::uint64_t operator[](const std::string& name) const {
    const auto found = values.find(name);
    return found != values.end() ? found->second : 0;
  }
};

std::uint64_t ResidentBytes(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/statm"));
  std::uint64_t size = 0, resident = 0;
  file >> size >> resident;
  return resident * vm::kPageSize;
}

absl::StatusOr<Sample> Look(const ProcessView& process) {
  Sample sample;
  sample.time = absl::Now();
  absl::StatusOr<std::vector<ProcessView::Metric>> metrics = process.ReadMetrics();
  if (!metrics.ok()) return metrics.status();
  for (const ProcessView::Metric& metric : *metrics) sample.values[metric.name] = metric.value;
  absl::StatusOr<std::vector<ProcessView::OperationTimes>> lock_times = process.ReadLockTimes();
  if (!lock_times.ok()) return lock_times.status();
  sample.lock_times = *std::move(lock_times);
  absl::StatusOr<std::vector<LockWait>> waits = ReadLockWaits(process);
  if (!waits.ok()) return waits.status();
  sample.waits = *std::move(waits);
  const absl::StatusOr<vm::Pages> gap = process.ReadLargestGap();
  if (!gap.ok()) return gap.status();
  sample.largest_gap = gap->bytes();
  sample.resident = ResidentBytes(process.pid());
  return sample;
}

// ---- One screen ----

std::string HumanTime(vm::Nanoseconds time) { return absl::FormatDuration(absl::Nanoseconds(time.value)); }

// "1234", "12.3k", "4.56M".
std::string Rate(double per_second) {
  if (per_second < 10'000) return absl::StrFormat("%.0f", per_second);
  return per_second < 1e6 ? absl::StrFormat("%.1fk", per_second / 1e3) : absl::StrFormat("%.2fM", per_second / 1e6);
}

class Screen {
 public:
  Screen(const ProcessView& process, const Sample& before, const Sample& now)
      : process_(process), before_(before), now_(now), seconds_(absl::ToDoubleSeconds(now.time - before.time)) {}

  std::string Draw() {
    absl::StrAppendFormat(&text_, "%s (%d), Freehold %s, %s range locks, up %.0f s, %d threads\n", process_.name(),
                          process_.pid(), process_.release(), process_.lock_policy(), process_.uptime_seconds(),
                          now_["heap_threads"]);
    DrawMemory();
    DrawRates();
    DrawLockTimes();
    DrawWaits();
    return std::move(text_);
  }

 private:
  void DrawMemory() {
    // What is set aside, for stacks or by the program, would dwarf the rest.
    const std::uint64_t mapped = now_["vm_heap_zone_mapped_bytes"];
    const std::uint64_t elsewhere = std::max(mapped, now_["vm_mapped_bytes"]) - mapped;
    const std::uint64_t free = now_["vm_free_resident_bytes"];
    absl::StrAppendFormat(&text_, "memory   resident %s, free but resident %s (%.1f %% of mapped)\n",
                          HumanBytes(now_.resident), HumanBytes(free),
                          mapped != 0 ? 100.0 * static_cast<double>(free) / static_cast<double>(mapped) : 0.0);
    absl::StrAppendFormat(&text_, "         mapped %s, set aside or of files %s, in %d mappings\n", HumanBytes(mapped),
                          HumanBytes(elsewhere), now_["vm_vmas"]);
    absl::StrAppendFormat(&text_, "heap     small objects %s, of that free %s; large objects %s in %d; largest gap %s\n\n",
                          HumanBytes(now_["heap_chunk_bytes"]), HumanBytes(now_["heap_free_bytes"]),
                          HumanBytes(now_["heap_large_bytes"]), now_["heap_large_objects"],
                          HumanBytes(now_.largest_gap.value));
  }

  // Counters that moved, the busiest first.
  void DrawRates() {
    for (const bool kernel : {false, true}) {
      std::vector<std::pair<std::uint64_t, std::string>> moved;
      for (const auto& [name, value] : now_.values) {
        const bool is_kernel = absl::StartsWith(name, "kernel_");
        const std::uint64_t earlier = before_[name];
        if (!absl::EndsWith(name, "_total") || is_kernel != kernel || value <= earlier) continue;
        const std::size_t prefix = name.find('_') + 1;
        moved.emplace_back(value - earlier, name.substr(prefix, name.size() - prefix - 6));
      }
      std::sort(moved.begin(), moved.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
      text_ += kernel ? "kernel/s " : "calls/s  ";
      for (std::size_t i = 0; i < moved.size(); ++i) {
        absl::StrAppend(&text_, i != 0 ? ", " : "", moved[i].second, " ",
                        Rate(static_cast<double>(moved[i].first) / seconds_));
      }
      text_ += moved.empty() ? "none\n" : "\n";
    }
  }

  void DrawLockTimes() {
    if (!process_.records_lock_times()) {
      text_ += "locks/s  not recorded: FREEHOLD_RECORD_RANGE_LOCKS=1\n";
      return;
    }
    std::vector<std::pair<vm::sync::Operation, LockTimes>> busy;
    for (auto [operation, times] : now_.lock_times) {
      for (const auto& [old_operation, old_times] : before_.lock_times) {
        if (old_operation != operation) continue;
        times.waits -= old_times.waits;
        times.holds -= old_times.holds;
      }
      if (times.waits.count() != 0) busy.emplace_back(operation, times);
    }
    std::sort(busy.begin(), busy.end(),
              [](const auto& a, const auto& b) { return a.second.waits.count() > b.second.waits.count(); });
    absl::StrAppendFormat(&text_, "\n%-14s %9s %12s %12s %12s %12s\n", "range locks", "per s", "wait p99", "wait max",
                          "hold p99", "hold max");
    for (const auto& [operation, times] : busy) {
      absl::StrAppendFormat(&text_, "%-14s %9s %12s %12s %12s %12s\n", vm::sync::ToString(operation),
                            Rate(static_cast<double>(times.waits.count()) / seconds_),
                            HumanTime(times.waits.Percentile(0.99)), HumanTime(times.waits.Percentile(1)),
                            HumanTime(times.holds.Percentile(0.99)), HumanTime(times.holds.Percentile(1)));
    }
  }

  std::string Thread(std::uint32_t id) const {
    if (id == 0) return "an unknown thread";
    std::ifstream file(absl::StrCat("/proc/", process_.pid(), "/task/", id, "/comm"));
    std::string name;
    std::getline(file, name);
    return name.empty() ? absl::StrCat("thread ", id) : absl::StrCat("thread ", id, " ", Printable(name));
  }

  static std::string Describe(const HolderInfo& info) {
    return absl::StrFormat("%x-%x (%s, %s, %s)", info.range.first.value * vm::kPageSize,
                           info.range.end.value * vm::kPageSize, vm::sync::ToString(info.operation),
                           info.mode == vm::sync::LockMode::kExclusive ? "exclusive" : "shared", HumanTime(info.age));
  }

  void DrawWaits() {
    absl::StrAppendFormat(&text_, "\nwaiting  %d threads\n", now_.waits.size());
    for (const LockWait& wait : now_.waits) {
      absl::StrAppend(&text_, Thread(wait.waiter.thread_id), " waits for ", Describe(wait.waiter), " behind ",
                      Thread(wait.behind.thread_id),
                      wait.behind.state == HolderInfo::State::kHolding ? ", who holds " : ", who waits for ",
                      Describe(wait.behind), "\n");
    }
  }

  const ProcessView& process_;
  const Sample& before_;
  const Sample& now_;
  const double seconds_;
  std::string text_;
};

// ---- The loop ----

struct Options {
  absl::Duration interval = absl::Seconds(1);
  std::uint64_t count = std::numeric_limits<std::uint64_t>::max();
};

// False, with a line: a value is wrong.
bool ParseOptions(const CommandLine& line, Options& options) {
  if (line.Has("--interval")) {
    double seconds = 0;
    if (!absl::SimpleAtod(line.ValueOf("--interval"), &seconds) || !(seconds >= 0.1 && seconds <= 3600)) {
      PrintError(absl::StrCat("--interval=", line.ValueOf("--interval"), " is not 0.1 to 3600 seconds"));
      return false;
    }
    options.interval = absl::Seconds(seconds);
  }
  if (line.Has("--count") && (!absl::SimpleAtoi(line.ValueOf("--count"), &options.count) || options.count == 0)) {
    PrintError(absl::StrCat("--count=", line.ValueOf("--count"), " is not a number of screens"));
    return false;
  }
  if (line.Has("--once")) options.count = 1;
  return true;
}

// Until enough was shown or the user quits. Errors: the process has ended.
absl::Status Watch(const ProcessView& process, const Options& options, Sample before) {
  Terminal terminal;
  std::string screen;
  for (std::uint64_t shown = 0; shown < options.count;) {
    const absl::Duration left = before.time + options.interval - absl::Now();
    switch (terminal.Wait(left)) {
      case Terminal::Event::kQuit: return absl::OkStatus();
      case Terminal::Event::kResize: terminal.Show(screen); continue;
      case Terminal::Event::kTimeout: break;
    }
    absl::StatusOr<Sample> now = Look(process);
    if (!now.ok()) return now.status();
    screen = Screen(process, before, *now).Draw();
    if (!terminal.Show(screen)) return absl::OkStatus();  // main() says so
    before = *std::move(now);
    ++shown;
  }
  return absl::OkStatus();
}

}  // namespace

int Top(int count, char** arguments) {
  static constexpr absl::string_view kSwitches[] = {"--once"};
  static constexpr absl::string_view kWithValue[] = {"--interval", "--count"};
  CommandLine line;
  int status = 0;
  const Command command = {.name = "top", .help = kHelp, .switches = kSwitches, .with_value = kWithValue};
  if (!ParseCommandLine(command, count, arguments, line, status)) return status;
  Options options;
  if (!ParseOptions(line, options)) return kUsageError;
  const absl::StatusOr<ProcessView> process = ProcessView::Open(line.pid);
  if (!process.ok()) return Fail(process.status());
  absl::StatusOr<Sample> first = Look(*process);
  if (!first.ok()) return Fail(first.status());
  const absl::Status watched = Watch(*process, options, *std::move(first));
  if (absl::IsNotFound(watched) || absl::IsUnavailable(watched)) {
    absl::PrintF("%s (%d) has ended\n", process->name(), process->pid());
    return 0;
  }
  return watched.ok() ? 0 : Fail(watched);
}

}  // namespace freehold::cli
