// What this process can say about its memory, from one description: every number once, with its name and what it means,
// written as text, JSON or Prometheus's text format.
//
// The names are those of vm::Metric, which are all among them, and of numbers that have to be counted: per size class,
// per thread cache. `freehold stat` reads the former from outside.
#ifndef FREEHOLD_RUNTIME_STATISTICS_H_
#define FREEHOLD_RUNTIME_STATISTICS_H_

#include <cstdint>
#include <string_view>

#include "absl/functional/function_ref.h"
#include "runtime/message.h"
#include "vm/metric.h"

namespace freehold::runtime {

struct Statistic {
  std::string_view name;  // as vm::Metric's
  std::string_view help;
  vm::Metric::Kind kind = vm::Metric::Kind::kGauge;
  std::uint64_t value = 0;
  // One of several of that name: "size", 64. Empty: there is one.
  std::string_view label = {};
  std::uint64_t label_value = 0;
};

enum class StatisticsFormat : std::uint8_t { kText, kJson, kPrometheus };

struct StatisticsOptions {
  StatisticsFormat format = StatisticsFormat::kText;
  // Also how much of the space is in huge pages. The kernel looks at all of the process's pages for that and keeps
  // everybody from changing its mappings meanwhile.
  bool huge_pages = false;
};

using LineSink = absl::FunctionRef<void(std::string_view line)>;

// Writes statistics, those of one name one after the other.
//
// Thread safety: thread-compatible. Allocation: none.
class StatisticsWriter {
 public:
  StatisticsWriter(StatisticsFormat format, LineSink sink) : format_(format), sink_(sink) {}
  void Write(const Statistic& statistic);
  // After the last one.
  void Finish();

 private:
  void WriteText(const Statistic& statistic);
  void WriteJson(const Statistic& statistic, bool same_name);
  void WritePrometheus(const Statistic& statistic, bool same_name);
  void Emit(Message& line);

  const StatisticsFormat format_;
  const LineSink sink_;
  std::string_view name_ = {};  // of the last one
  bool labelled_ = false;       // it was
};

// Calls `visit` for all that this process has. REQUIRES: it has a space.
void ForEachStatistic(const StatisticsOptions& options, absl::FunctionRef<void(const Statistic&)> visit);

// Both together.
void WriteStatistics(const StatisticsOptions& options, LineSink sink);

// The sum of "AnonHugePages" of the mappings in [first, end), in bytes, from a file in the format of /proc/PID/smaps. 0
// if it cannot be read.
std::uint64_t HugePageBytes(const char* path, std::uintptr_t first, std::uintptr_t end);

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_STATISTICS_H_
