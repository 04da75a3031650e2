#include "runtime/cli/stat.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/types/span.h"
#include "allocator/heap_stats.h"
#include "runtime/cli/command.h"
#include "runtime/cli/heap_view.h"
#include "runtime/cli/process_view.h"
#include "runtime/statistics.h"

namespace freehold::cli {
namespace {

using Json = nlohmann::ordered_json;
using Metric = ProcessView::Metric;
using vm::sync::TimeHistogram;

constexpr absl::string_view kHelp = R"(Usage: freehold stat PID [--heap] [--huge-pages] [--json | --prometheus]

Prints the counters of a process that runs on Freehold: of its address space, its heap, and the system calls that it
made for them. The process is neither stopped nor slowed. It takes what a debugger may do.

  --heap         also what the heap holds: by the size of objects, by the cache of each thread, and of its memory, how much
                 is in no object
  --huge-pages   also how much of the address space is resident, and in huge pages; the kernel looks at all pages of the
                 process for that, and keeps it from changing its mappings meanwhile
  --json         as one JSON object, with the regions of the address space
  --prometheus   in the text format of Prometheus, for a node exporter's text file collector

Times of range locks are there if the process runs with FREEHOLD_RECORD_RANGE_LOCKS=1.
Exit status: 0; 1 if the process cannot be looked at; 2 for wrong arguments.
)";

struct Picture {
  const ProcessView& process;
  std::vector<Metric> metrics;
  std::vector<ProcessView::OperationTimes> lock_times;
  std::optional<HeapView> heap = {};
  std::optional<runtime::Residence> residence = {};

  // What was asked for beside the metrics.
  void ForEachStatistic(absl::FunctionRef<void(const runtime::Statistic&)> visit) const {
    if (residence) {
      for (const auto& row : runtime::ResidenceStatistics()) {
        visit({.name = row.name, .help = row.help, .value = row.value(*residence)});
      }
    }
    if (heap) ForEachHeapStatistic(*heap, visit);
  }
};

// Of all mappings in the regions of its space.
runtime::Residence ReadResidence(const ProcessView& process) {
  const std::vector<ProcessView::Region> regions = process.Regions();
  return runtime::ReadResidence(absl::StrCat("/proc/", process.pid(), "/smaps").c_str(),
                                reinterpret_cast<std::uintptr_t>(regions.front().range.address()),
                                reinterpret_cast<std::uintptr_t>(regions.back().range.end.address()));
}

// Names are the runtime's, whose string_view is std's.
std::string Human(std::string_view name, std::uint64_t value) {
  return name.ends_with("_bytes") ? HumanBytes(value) : absl::StrCat(value);
}

constexpr double kQuantiles[] = {0.5, 0.99, 0.999, 1};

// ---- Text ----

void PrintLine(std::string_view name, std::uint64_t value, std::string_view help) {
  absl::PrintF("%-28s %14s   %s\n", std::string(name), Human(name, value), std::string(help));
}

double Percent(std::uint64_t part, std::uint64_t whole) {
  return whole == 0 ? 0 : 100 * static_cast<double>(part) / static_cast<double>(whole);
}

// A row for each of `all`, a column for each statistic, which is called what its name has beyond `prefix`.
template <typename Stats>
void PrintTable(absl::string_view title, absl::string_view prefix, absl::Span<const runtime::StatisticRow<Stats>> columns,
                const std::vector<Stats>& all, std::uint64_t (*label)(const Stats& stats)) {
  if (all.empty()) return;
  const auto width_of = [&](std::size_t i) {
    return static_cast<int>(std::max<std::size_t>(columns[i].name.size() - prefix.size(), 9));
  };
  absl::PrintF("\n%10s", title);
  for (std::size_t i = 0; i < columns.size(); ++i) {
    absl::PrintF("  %*s", width_of(i), std::string(columns[i].name.substr(prefix.size())));
  }
  absl::PrintF("\n");
  for (const Stats& stats : all) {
    absl::PrintF("%10d", label(stats));
    for (std::size_t i = 0; i < columns.size(); ++i) {
      absl::PrintF("  %*s", width_of(i), Human(columns[i].name, columns[i].value(stats)));
    }
    absl::PrintF("\n");
  }
}

void PrintHeap(const HeapView& heap) {
  absl::PrintF("\n");
  for (const auto& row : runtime::HeapStatistics()) PrintLine(row.name, row.value(heap.sums), row.help);
  const std::uint64_t active = heap.sums.active.value;
  absl::PrintF("%.1f %% of the active memory is in no object\n",
               Percent(active - std::min<std::uint64_t>(active, heap.sums.allocated.value), active));
  PrintTable<allocator::SizeClassStats>(
      "size", "heap_class_", runtime::SizeClassStatistics(), heap.classes,
      [](const allocator::SizeClassStats& stats) { return std::uint64_t{stats.object_size}; });
  PrintTable<allocator::CacheStats>("cache", "heap_cache_", runtime::CacheStatistics(), heap.caches,
                                    [](const allocator::CacheStats& stats) { return std::uint64_t{stats.id}; });
}

void PrintText(const Picture& picture) {
  const ProcessView& process = picture.process;
  absl::PrintF("%s (%d), Freehold %s, %s range locks, up %.0f s\n", process.name(), process.pid(), process.release(),
               process.lock_policy(), process.uptime_seconds());
  for (const Metric& metric : picture.metrics) PrintLine(metric.name, metric.value, metric.help);
  if (picture.residence) {
    absl::PrintF("\n");
    for (const auto& row : runtime::ResidenceStatistics()) PrintLine(row.name, row.value(*picture.residence), row.help);
    absl::PrintF("%.1f %% of what is resident is in huge pages\n",
                 Percent(picture.residence->huge_bytes, picture.residence->bytes));
  }
  if (picture.heap) PrintHeap(*picture.heap);
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
  picture.ForEachStatistic([&](const runtime::Statistic& statistic) {
    Json& of_name = root["statistics"][std::string(statistic.name)];
    if (statistic.label.empty()) {
      of_name = statistic.value;
    } else {
      of_name[absl::StrCat(statistic.label_value)] = statistic.value;
    }
  });
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

void PrintHead(std::string_view name, std::string_view help, vm::Metric::Kind kind) {
  absl::PrintF("# HELP freehold_%s %s\n# TYPE freehold_%s %s\n", std::string(name), std::string(help),
               std::string(name), kind == vm::Metric::Kind::kCounter ? "counter" : "gauge");
}

void PrintPrometheus(const Picture& picture) {
  const std::string labels =
      absl::StrFormat("pid=\"%d\",name=\"%s\"", picture.process.pid(), Escaped(picture.process.name()));
  for (const Metric& metric : picture.metrics) {
    PrintHead(metric.name, metric.help, metric.kind);
    absl::PrintF("freehold_%s{%s} %d\n", metric.name, labels, metric.value);
  }
  std::string last;
  picture.ForEachStatistic([&](const runtime::Statistic& statistic) {
    if (statistic.name != last) PrintHead(statistic.name, statistic.help, statistic.kind);
    last = std::string(statistic.name);
    const std::string label = statistic.label.empty() ? "" : absl::StrFormat(",%s=\"%d\"", std::string(statistic.label),
                                                                            statistic.label_value);
    absl::PrintF("freehold_%s{%s%s} %d\n", last, labels, label, statistic.value);
  });
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
  static constexpr absl::string_view kSwitches[] = {"--heap", "--huge-pages", "--json", "--prometheus"};
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
  Picture picture = {*process, *std::move(metrics), *std::move(lock_times)};
  if (line.Has("--heap")) {
    absl::StatusOr<HeapView> heap = ReadHeap(*process, picture.metrics);
    if (!heap.ok()) return Fail(heap.status());
    picture.heap = *std::move(heap);
  }
  if (line.Has("--huge-pages")) picture.residence = ReadResidence(*process);
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
