#include "runtime/cli/stat.h"

#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "runtime/cli/command.h"
#include "runtime/cli/process_view.h"

namespace freehold::cli {
namespace {

using Json = nlohmann::ordered_json;
using Metric = ProcessView::Metric;
using vm::sync::TimeHistogram;

constexpr absl::string_view kHelp = R"(Usage: freehold stat PID [--json | --prometheus]

Prints the counters of a process that runs on Freehold: of its address space, its heap, and the system calls that it
made for them. The process is neither stopped nor slowed. It takes what a debugger may do.

  --json         as one JSON object, with the regions of the address space
  --prometheus   in the text format of Prometheus, for a node exporter's text file collector

Times of range locks are there if the process runs with FREEHOLD_RECORD_RANGE_LOCKS=1.
Exit status: 0; 1 if the process cannot be looked at; 2 for wrong arguments.
)";

struct Picture {
  const ProcessView& process;
  std::vector<Metric> metrics;
  std::vector<ProcessView::OperationTimes> lock_times;
};

bool IsBytes(const Metric& metric) { return absl::EndsWith(metric.name, "_bytes"); }

constexpr double kQuantiles[] = {0.5, 0.99, 0.999, 1};

// ---- Text ----

void PrintText(const Picture& picture) {
  const ProcessView& process = picture.process;
  absl::PrintF("%s (%d), Freehold %s, %s range locks, up %.0f s\n", process.name(), process.pid(), process.release(),
               process.lock_policy(), process.uptime_seconds());
  for (const Metric& metric : picture.metrics) {
    const std::string value = IsBytes(metric) ? HumanBytes(metric.value) : absl::StrCat(metric.value);
    absl::PrintF("%-28s %14s   %s\n", metric.name, value, metric.help);
  }
  if (picture.lock_times.empty()) return;
  absl::PrintF("\n%-14s %12s %27s %27s\n", "range locks", "requests", "waited ns p50/p99/max", "held ns p50/p99/max");
  for (const auto& [operation, times] : picture.lock_times) {
    const auto summary = [](const TimeHistogram& histogram) {
      return absl::StrCat(histogram.Percentile(0.5).value, "/", histogram.Percentile(0.99).value, "/",
                          histogram.Percentile(1).value);
    };
    absl::PrintF("%-14s %12d %27s %27s\n", vm::sync::ToString(operation), times.waits.count(), summary(times.waits),
                 summary(times.holds));
  }
}

// ---- JSON ----

Json ToJson(const TimeHistogram& histogram) {
  return {{"count", histogram.count()},
          {"p50", histogram.Percentile(0.5).value},
          {"p99", histogram.Percentile(0.99).value},
          {"p999", histogram.Percentile(0.999).value},
          {"max", histogram.Percentile(1).value}};
}

void PrintJson(const Picture& picture) {
  const ProcessView& process = picture.process;
  Json root = {{"pid", process.pid()},
               {"name", process.name()},
               {"release", std::string(process.release())},
               {"lock_policy", std::string(process.lock_policy())},
               {"uptime_seconds", process.uptime_seconds()}};
  for (const Metric& metric : picture.metrics) root["metrics"][metric.name] = metric.value;
  const std::vector<ProcessView::Region> regions = process.Regions();
  for (std::size_t i = 0; i < regions.size(); ++i) {
    Json region = {{"zone", std::string(NameOf(regions[i].zone))},
                   {"address", reinterpret_cast<std::uintptr_t>(regions[i].range.address())},
                   {"bytes", regions[i].range.bytes().value}};
    for (const Metric& metric : picture.metrics) {
      if (i < metric.by_region.size()) region["metrics"][metric.name] = metric.by_region[i];
    }
    root["regions"].push_back(std::move(region));
  }
  for (const auto& [operation, times] : picture.lock_times) {
    root["range_lock_ns"][vm::sync::ToString(operation)] = {{"waited", ToJson(times.waits)},
                                                            {"held", ToJson(times.holds)}};
  }
  // A program may call itself what it likes.
  std::puts(root.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
}

// ---- Prometheus ----

std::string Escaped(absl::string_view text) {
  return absl::StrReplaceAll(text, {{"\\", "\\\\"}, {"\"", "\\\""}, {"\n", "\\n"}});
}

void PrintPrometheus(const Picture& picture) {
  const std::string labels =
      absl::StrFormat("pid=\"%d\",name=\"%s\"", picture.process.pid(), Escaped(picture.process.name()));
  for (const Metric& metric : picture.metrics) {
    const bool counter = metric.kind == vm::Metric::Kind::kCounter;
    absl::PrintF("# HELP freehold_%s %s\n# TYPE freehold_%s %s\n", metric.name, metric.help, metric.name,
                 counter ? "counter" : "gauge");
    absl::PrintF("freehold_%s{%s} %d\n", metric.name, labels, metric.value);
  }
  if (picture.lock_times.empty()) return;
  for (const bool waited : {true, false}) {
    const absl::string_view name = waited ? "range_lock_wait_seconds" : "range_lock_hold_seconds";
    absl::PrintF("# HELP freehold_%s How long range locks were %s.\n# TYPE freehold_%s summary\n", name,
                 waited ? "waited for" : "held", name);
    for (const auto& [operation, times] : picture.lock_times) {
      const TimeHistogram& histogram = waited ? times.waits : times.holds;
      const std::string all = absl::StrCat(labels, ",operation=\"", vm::sync::ToString(operation), "\"");
      for (const double quantile : kQuantiles) {
        absl::PrintF("freehold_%s{%s,quantile=\"%g\"} %.9f\n", name, all, quantile,
                     static_cast<double>(histogram.Percentile(quantile).value) / 1e9);
      }
      absl::PrintF("freehold_%s_count{%s} %d\n", name, all, histogram.count());
    }
  }
}

}  // namespace

int Stat(int count, char** arguments) {
  static constexpr absl::string_view kSwitches[] = {"--json", "--prometheus"};
  CommandLine line;
  int status = 0;
  if (!ParseCommandLine({.name = "stat", .help = kHelp, .switches = kSwitches}, count, arguments, line, status)) {
    return status;
  }
  const absl::StatusOr<ProcessView> process = ProcessView::Open(line.pid);
  if (!process.ok()) return Fail(process.status());
  absl::StatusOr<std::vector<Metric>> metrics = process->ReadMetrics();
  if (!metrics.ok()) return Fail(metrics.status());
  absl::StatusOr<std::vector<ProcessView::OperationTimes>> lock_times = process->ReadLockTimes();
  if (!lock_times.ok()) return Fail(lock_times.status());
  const Picture picture = {*process, *std::move(metrics), *std::move(lock_times)};
  if (line.Has("--json")) {
    PrintJson(picture);
  } else if (line.Has("--prometheus")) {
    PrintPrometheus(picture);
  } else {
    PrintText(picture);
  }
  return 0;
}

}  // namespace freehold::cli
