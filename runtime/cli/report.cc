#include "runtime/cli/report.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "runtime/cli/command.h"
#include "runtime/cli/lock_view.h"
#include "runtime/cli/process_view.h"

namespace freehold::cli {
namespace {

using Metric = ProcessView::Metric;
using MappedVma = ProcessView::MappedVma;
using vm::sync::HolderInfo;
using vm::sync::TimeHistogram;

constexpr absl::string_view kHelp = R"(Usage: freehold report PID -o FILE.html [--seconds=S]

Watches a process that runs on Freehold for a while and writes what it saw as one page of HTML: its address space drawn
zone by zone, memory over time, counters, times of range locks and who waited for whom. The page needs nothing else, no
network and no script.

  -o FILE.html    where to write it; an existing file is replaced
  --seconds=S     how long to watch, 0 to 3600; default: 5

Times of range locks are there if the process runs with FREEHOLD_RECORD_RANGE_LOCKS=1.
Exit status: 0; 1 if the process cannot be looked at or the file not written; 2 for wrong arguments.
)";

constexpr int kMoments = 60;

// Of one moment while it is watched.
struct Moment {
  double seconds;
  std::uint64_t mapped;  // in heap zones: what is only set aside would dwarf it
  std::uint64_t free_resident;
  std::size_t waiters;
};

struct Watched {
  std::vector<Moment> moments;
  std::vector<Metric> first;
  std::vector<Metric> last;
  std::vector<ProcessView::OperationTimes> lock_times;
  std::vector<MappedVma> vmas;
  std::vector<LockWait> longest_waits;  // as of the moment with the most waiters
};

std::uint64_t ValueOf(const std::vector<Metric>& metrics, absl::string_view name) {
  const auto found = std::find_if(metrics.begin(), metrics.end(), [&](const Metric& m) { return m.name == name; });
  return found != metrics.end() ? found->value : 0;
}

absl::StatusOr<Watched> Watch(const ProcessView& process, absl::Duration duration) {
  Watched watched;
  const absl::Time begin = absl::Now();
  for (int i = 0; i <= kMoments; ++i) {
    absl::SleepFor(begin + duration * i / kMoments - absl::Now());
    absl::StatusOr<std::vector<Metric>> metrics = process.ReadMetrics();
    if (!metrics.ok()) return metrics.status();
    absl::StatusOr<std::vector<LockWait>> waits = ReadLockWaits(process);
    if (!waits.ok()) return waits.status();
    watched.moments.push_back({.seconds = absl::ToDoubleSeconds(absl::Now() - begin),
                               .mapped = ValueOf(*metrics, "vm_heap_zone_mapped_bytes"),
                               .free_resident = ValueOf(*metrics, "vm_free_resident_bytes"),
                               .waiters = waits->size()});
    if (i == 0) watched.first = *metrics;
    watched.last = *std::move(metrics);
    if (waits->size() > watched.longest_waits.size()) watched.longest_waits = *std::move(waits);
  }
  absl::StatusOr<std::vector<ProcessView::OperationTimes>> lock_times = process.ReadLockTimes();
  if (!lock_times.ok()) return lock_times.status();
  watched.lock_times = *std::move(lock_times);
  absl::StatusOr<std::vector<MappedVma>> vmas = process.ReadVmas();
  if (!vmas.ok()) return vmas.status();
  watched.vmas = *std::move(vmas);
  return watched;
}

// ---- HTML ----

constexpr absl::string_view kStyle = R"(
:root { --back: #fff; --text: #1b1f24; --quiet: #57606a; --line: #d0d7de; --empty: #eaeef2; --one: #0b5cad; --two: #b35900; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --text: #e6edf3; --quiet: #9da7b3; --line: #30363d; --empty: #21262d; --one: #6cb6ff; --two: #f0a35e; }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0 .75rem; }
.quiet, figcaption, th small { color: var(--quiet); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.25rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.facts div { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .75rem; }
.facts dt { color: var(--quiet); font-size: .85rem; } .facts dd { margin: 0; font-size: 1.2rem; }
figure { margin: 0 0 1rem; } figcaption { font-size: .9rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; }
.strip { height: 1.5rem; border-radius: .25rem; background: var(--empty); }
.chart { height: 8rem; border-bottom: 1px solid var(--line); }
.one { fill: var(--one); } .two { fill: var(--two); }
path { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
path.one { stroke: var(--one); fill: none; } path.two { stroke: var(--two); fill: none; stroke-dasharray: 5 3; }
.key::before { content: ""; display: inline-block; width: 1.2rem; border-top: 3px solid var(--one);
  margin-right: .35rem; vertical-align: middle; }
.key.two::before { border-top: 3px dashed var(--two); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody td:first-child { white-space: nowrap; } td .quiet { white-space: normal; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
)";

std::string Escaped(absl::string_view text) {
  return absl::StrReplaceAll(text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}, {"'", "&#39;"}});
}

std::string HumanTime(std::uint64_t nanoseconds) { return absl::FormatDuration(absl::Nanoseconds(nanoseconds)); }

bool IsBytes(const Metric& metric) { return absl::EndsWith(metric.name, "_bytes"); }

class Page {
 public:
  Page(const ProcessView& process, const Watched& watched) : process_(process), watched_(watched) {}

  std::string Write() {
    const std::string title = absl::StrCat(Escaped(process_.name()), " (", process_.pid(), ")");
    absl::StrAppend(&html_, "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n",
                    "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>", title,
                    " on Freehold</title>\n<style>", kStyle, "</style>\n</head>\n<body>\n<main>\n<h1>", title,
                    "</h1>\n<p class=\"quiet\">Freehold ", Escaped(process_.release()), ", ",
                    Escaped(process_.lock_policy()), " range locks, up ",
                    absl::FormatDuration(absl::Seconds(static_cast<std::int64_t>(process_.uptime_seconds()))), "; seen ",
                    absl::FormatTime("%Y-%m-%d %H:%M:%S %Z", absl::Now(), absl::LocalTimeZone()), "</p>\n");
    WriteFacts();
    WriteSpace();
    WriteMoments();
    WriteLockTimes();
    WriteWaits();
    WriteCounters();
    html_ += "</main>\n</body>\n</html>\n";
    return std::move(html_);
  }

 private:
  void WriteFacts() {
    const auto fact = [&](absl::string_view name, const std::string& value) {
      absl::StrAppend(&html_, "<div><dt>", name, "</dt><dd>", value, "</dd></div>\n");
    };
    html_ += "<dl class=\"facts\">\n";
    const std::uint64_t in_heap_zones = ValueOf(watched_.last, "vm_heap_zone_mapped_bytes");
    fact("Mapped", HumanBytes(in_heap_zones));
    // Read one after the other.
    const std::uint64_t in_all = std::max(in_heap_zones, ValueOf(watched_.last, "vm_mapped_bytes"));
    fact("Set aside, or of files", HumanBytes(in_all - in_heap_zones));
    fact("Mappings", absl::StrCat(ValueOf(watched_.last, "vm_vmas")));
    fact("Free but resident", HumanBytes(ValueOf(watched_.last, "vm_free_resident_bytes")));
    fact("Small objects", HumanBytes(ValueOf(watched_.last, "heap_chunk_bytes")));
    fact("Large objects", HumanBytes(ValueOf(watched_.last, "heap_large_bytes")));
    fact("Threads with a cache", absl::StrCat(ValueOf(watched_.last, "heap_threads")));
    html_ += "</dl>\n";
  }

  // ---- the address space ----

  static constexpr std::size_t kCells = 128;

  struct Use {
    std::uint64_t mapped_pages = 0;
    std::size_t mappings = 0;
    std::uint64_t end_page = 0;  // of the last mapping, from the region's start
    std::array<double, kCells> cells = {};  // how much of each is mapped, of [0, end_page)
  };

  Use UseOf(const ProcessView::Region& region) const {
    Use use;
    const auto visit = [&](auto what) {
      for (const MappedVma& vma : watched_.vmas) {
        if (!region.range.Contains(vma.range)) continue;
        what(vma.range.first.value - region.range.first.value, vma.range.end.value - region.range.first.value);
      }
    };
    visit([&](std::uint64_t first, std::uint64_t end) {
      use.mapped_pages += end - first;
      ++use.mappings;
      use.end_page = std::max(use.end_page, end);
    });
    const double pages_per_cell = static_cast<double>(use.end_page) / kCells;
    visit([&](std::uint64_t first, std::uint64_t end) {
      const double from = static_cast<double>(first) / pages_per_cell, to = static_cast<double>(end) / pages_per_cell;
      for (auto cell = static_cast<std::size_t>(from); cell < kCells && static_cast<double>(cell) < to; ++cell) {
        const auto left = static_cast<double>(cell);
        use.cells[cell] += std::min(to, left + 1) - std::max(from, left);
      }
    });
    return use;
  }

  void WriteCells(const Use& use) {
    // In steps, the lowest of which can be seen.
    const auto shade = [&](std::size_t cell) {
      return use.cells[cell] > 0 ? 4 + static_cast<int>(6 * std::min(1.0, use.cells[cell])) : 0;
    };
    for (std::size_t cell = 0, end = 0; cell < kCells; cell = end) {
      while (end < kCells && shade(end) == shade(cell)) ++end;
      if (shade(cell) == 0) continue;
      absl::StrAppendFormat(&html_, "<rect class=\"one\" x=\"%d\" width=\"%d\" height=\"1\" opacity=\"%.1f\"/>", cell,
                            end - cell, shade(cell) / 10.0);
    }
  }

  void WriteSpace() {
    html_ += "<h2>Address space</h2>\n<p>Each strip is the used part of a region, up to the end of its last mapping; "
             "the fuller a place, the stronger its colour. Regions without a mapping are left out.</p>\n";
    const std::vector<ProcessView::Region> regions = process_.Regions();
    std::string rows;
    for (std::size_t i = 0; i < regions.size(); ++i) {
      const Use use = UseOf(regions[i]);
      const std::uint64_t used = use.end_page * vm::kPageSize;
      const std::uint64_t mapped = use.mapped_pages * vm::kPageSize;
      const std::string address = absl::StrFormat("%x", reinterpret_cast<std::uintptr_t>(regions[i].range.address()));
      absl::StrAppend(&rows, "<tr><td>", NameOf(regions[i].zone), " ", i, "</td><td class=\"n\">", address,
                      "</td><td class=\"n\">", HumanBytes(regions[i].range.bytes().value), "</td><td class=\"n\">",
                      HumanBytes(used), "</td><td class=\"n\">", HumanBytes(mapped), "</td><td class=\"n\">",
                      use.mappings, "</td></tr>\n");
      if (use.mappings == 0) continue;
      const std::string caption =
          absl::StrCat(NameOf(regions[i].zone), " ", i, ": ", use.mappings, use.mappings == 1 ? " mapping" : " mappings",
                       ", ", HumanBytes(mapped), " of the first ", HumanBytes(used), " at ", address);
      absl::StrAppend(&html_, "<figure><svg class=\"strip\" viewBox=\"0 0 ", kCells,
                      " 1\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"", caption, "\">");
      WriteCells(use);
      absl::StrAppend(&html_, "</svg><figcaption>", caption, "</figcaption></figure>\n");
    }
    absl::StrAppend(&html_, "<div class=\"scroll\"><table>\n<thead><tr><th>Region</th><th class=\"n\">Address</th>",
                    "<th class=\"n\">Size</th><th class=\"n\">Used up to</th><th class=\"n\">Mapped</th>",
                    "<th class=\"n\">Mappings</th></tr></thead>\n<tbody>\n", rows, "</tbody></table></div>\n");
  }

  // ---- over time ----

  // A line through one value of each moment, in a box of 100 x 100.
  template <typename Value>
  void WritePath(absl::string_view style, double top, const Value& value) {
    absl::StrAppend(&html_, "<path class=\"", style, "\" d=\"");
    const double seconds = std::max(watched_.moments.back().seconds, 1e-9);
    for (const Moment& moment : watched_.moments) {
      absl::StrAppendFormat(&html_, "%s%.2f %.2f", &moment == &watched_.moments.front() ? "M" : " L",
                            100 * moment.seconds / seconds, 98 - 96 * static_cast<double>(value(moment)) / top);
    }
    html_ += "\"/>";
  }

  void OpenChart(const std::string& label) {
    absl::StrAppend(&html_, "<figure><svg class=\"chart\" viewBox=\"0 0 100 100\" preserveAspectRatio=\"none\" role=\"img\" ",
                    "aria-label=\"", label, "\">");
  }

  void WriteMoments() {
    std::uint64_t bytes = 1;
    std::size_t waiters = 0;
    for (const Moment& moment : watched_.moments) {
      bytes = std::max({bytes, moment.mapped, moment.free_resident});
      waiters = std::max(waiters, moment.waiters);
    }
    const double seconds = watched_.moments.back().seconds;
    html_ += absl::StrFormat("<h2>Memory over %.1f s</h2>\n<p><span class=\"key\">mapped</span> "
                             "<span class=\"key two\">free but resident</span></p>\n", seconds);
    OpenChart("Mapped and free but resident memory over time");
    WritePath("one", static_cast<double>(bytes), [](const Moment& m) { return m.mapped; });
    WritePath("two", static_cast<double>(bytes), [](const Moment& m) { return m.free_resident; });
    const Moment& first = watched_.moments.front();
    const Moment& last = watched_.moments.back();
    absl::StrAppend(&html_, "</svg><figcaption>from 0 to ", HumanBytes(bytes), "; mapped ", HumanBytes(first.mapped),
                    " at first, ", HumanBytes(last.mapped), " at last; free but resident ", HumanBytes(first.free_resident),
                    " at first, ", HumanBytes(last.free_resident), " at last</figcaption></figure>\n");
    html_ += "<h2>Threads that wait for a range lock</h2>\n";
    if (waiters == 0) {
      absl::StrAppend(&html_, "<p>None at any of ", watched_.moments.size(), " moments.</p>\n");
      return;
    }
    OpenChart("Threads that wait for a range lock over time");
    WritePath("one", static_cast<double>(waiters), [](const Moment& m) { return m.waiters; });
    absl::StrAppend(&html_, "</svg><figcaption>from 0 to ", waiters, ", at ", watched_.moments.size(),
                    " moments</figcaption></figure>\n");
  }

  // ---- range locks ----

  // A bar for each doubling of the time; heights by the square root, so that few are seen beside many.
  void WriteHistogram(const std::string& caption, const TimeHistogram& histogram) {
    static constexpr std::size_t kDoublings = TimeHistogram::kBuckets / 4;
    std::array<std::uint64_t, kDoublings> counts = {};
    for (std::size_t i = 0; i < TimeHistogram::kBuckets; ++i) counts[i / 4] += histogram.count(i);
    const double most = static_cast<double>(*std::max_element(counts.begin(), counts.end()));
    absl::StrAppend(&html_, "<figure><svg class=\"strip\" viewBox=\"0 0 ", kDoublings,
                    " 1\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"", caption, "\">");
    for (std::size_t i = 0; i < kDoublings; ++i) {
      if (counts[i] == 0) continue;
      const double height = std::max(0.08, std::sqrt(static_cast<double>(counts[i]) / most));
      absl::StrAppendFormat(&html_, "<rect class=\"one\" x=\"%.1f\" y=\"%.3f\" width=\"0.8\" height=\"%.3f\"/>",
                            static_cast<double>(i) + 0.1, 1 - height, height);
    }
    absl::StrAppend(&html_, "</svg><figcaption>", caption, "</figcaption></figure>\n");
  }

  void WriteLockTimes() {
    html_ += "<h2>Times of range locks</h2>\n";
    if (!process_.records_lock_times()) {
      html_ += "<p>Not recorded: start the process with FREEHOLD_RECORD_RANGE_LOCKS=1.</p>\n";
      return;
    }
    html_ += "<p>Since the process started. A bar for each doubling, from nanoseconds on the left to two seconds on the "
             "right; the height goes by the square root of the number.</p>\n";
    std::string rows;
    for (const auto& [operation, times] : watched_.lock_times) {
      const absl::string_view name = vm::sync::ToString(operation);
      for (const bool waited : {true, false}) {
        const TimeHistogram& histogram = waited ? times.waits : times.holds;
        if (histogram.count() == 0) continue;
        WriteHistogram(absl::StrCat(name, ", ", waited ? "waited for" : "held", ": ", histogram.count(), " times, p99 ",
                                    HumanTime(histogram.Percentile(0.99).value)),
                       histogram);
        absl::StrAppend(&rows, "<tr><td>", name, "</td><td>", waited ? "waited" : "held", "</td><td class=\"n\">",
                        histogram.count(), "</td>");
        for (const double fraction : {0.5, 0.99, 0.999, 1.0}) {
          absl::StrAppend(&rows, "<td class=\"n\">", HumanTime(histogram.Percentile(fraction).value), "</td>");
        }
        rows += "</tr>\n";
      }
    }
    absl::StrAppend(&html_, "<div class=\"scroll\"><table>\n<thead><tr><th>Operation</th><th></th><th class=\"n\">Times</th>",
                    "<th class=\"n\">p50</th><th class=\"n\">p99</th><th class=\"n\">p99.9</th><th class=\"n\">max</th></tr>",
                    "</thead>\n<tbody>\n", rows, "</tbody></table></div>\n");
  }

  static std::string Describe(const HolderInfo& info) {
    return absl::StrFormat("%s: %s %x-%x for %s", info.thread_id != 0 ? absl::StrCat(info.thread_id) : "unknown",
                           vm::sync::ToString(info.operation), info.range.first.value * vm::kPageSize,
                           info.range.end.value * vm::kPageSize, HumanTime(info.age.value));
  }

  void WriteWaits() {
    if (watched_.longest_waits.empty()) return;
    html_ += "<h2>Who waited for whom</h2>\n<p>At the moment with the most waiters.</p>\n<div class=\"scroll\"><table>\n"
             "<thead><tr><th>Thread waits</th><th>Behind thread</th></tr></thead>\n<tbody>\n";
    for (const LockWait& wait : watched_.longest_waits) {
      absl::StrAppend(&html_, "<tr><td>", Describe(wait.waiter), "</td><td>", Describe(wait.behind), "</td></tr>\n");
    }
    html_ += "</tbody></table></div>\n";
  }

  void WriteCounters() {
    html_ += "<h2>Counters</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th>Name</th><th class=\"n\">Value</th>"
             "<th class=\"n\">Change</th></tr></thead>\n<tbody>\n";
    for (const Metric& metric : watched_.last) {
      const std::uint64_t before = ValueOf(watched_.first, metric.name);
      const bool grew = metric.value >= before;
      const std::uint64_t change = grew ? metric.value - before : before - metric.value;
      const auto text = [&](std::uint64_t value) { return IsBytes(metric) ? HumanBytes(value) : absl::StrCat(value); };
      absl::StrAppend(&html_, "<tr><td>", Escaped(metric.name), "<br><span class=\"quiet\">", Escaped(metric.help),
                      "</span></td><td class=\"n\">", text(metric.value), "</td><td class=\"n\">",
                      change == 0 ? "" : absl::StrCat(grew ? "+" : "&minus;", text(change)), "</td></tr>\n");
    }
    html_ += "</tbody></table></div>\n";
  }

  const ProcessView& process_;
  const Watched& watched_;
  std::string html_;
};

bool WriteFile(const std::string& path, const std::string& content) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << content;
  file.close();
  return !file.fail();
}

}  // namespace

int Report(int count, char** arguments) {
  static constexpr absl::string_view kWithValue[] = {"-o", "--seconds"};
  CommandLine line;
  int status = 0;
  const Command command = {.name = "report", .help = kHelp, .switches = {}, .with_value = kWithValue};
  if (!ParseCommandLine(command, count, arguments, line, status)) return status;
  const std::string path = line.ValueOf("-o");
  if (path.empty()) {
    PrintError("no file given: -o FILE.html; see `freehold report --help`");
    return kUsageError;
  }
  double seconds = 5;
  if (line.Has("--seconds") &&
      (!absl::SimpleAtod(line.ValueOf("--seconds"), &seconds) || !(seconds >= 0 && seconds <= 3600))) {
    PrintError(absl::StrCat("--seconds=", line.ValueOf("--seconds"), " is not 0 to 3600"));
    return kUsageError;
  }
  const absl::StatusOr<ProcessView> process = ProcessView::Open(line.pid);
  if (!process.ok()) return Fail(process.status());
  const absl::StatusOr<Watched> watched = Watch(*process, absl::Seconds(seconds));
  if (!watched.ok()) return Fail(watched.status());
  if (!WriteFile(path, Page(*process, *watched).Write())) {
    PrintError(absl::StrCat(path, ": ", std::strerror(errno)));
    return kFailed;
  }
  return 0;
}

}  // namespace freehold::cli
