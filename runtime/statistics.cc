#include "runtime/statistics.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include "allocator/heap_stats.h"
#include "allocator/object_heap.h"
#include "allocator/size_class.h"
#include "runtime/runtime.h"
#include "vm/address_space.h"
#include "vm/os/raw_syscall.h"

namespace freehold::runtime {
namespace {

using allocator::CacheStats;
using allocator::SizeClassStats;
using vm::os::RawSyscall;
using vm::os::SyscallFailed;
using Visit = absl::FunctionRef<void(const Statistic&)>;

std::uint64_t Load(const vm::Metric& metric) {
  std::uint64_t sum = 0;
  for (std::uint32_t i = 0; i < metric.count; ++i) {
    const auto* at = static_cast<const std::byte*>(metric.first) + i * metric.stride;
    sum += metric.width == sizeof(std::uint64_t)
               ? __atomic_load_n(reinterpret_cast<const std::uint64_t*>(at), __ATOMIC_RELAXED)
               : __atomic_load_n(reinterpret_cast<const std::uint32_t*>(at), __ATOMIC_RELAXED);
  }
  return sum * metric.scale;
}

void VisitMetric(void* visit, const vm::Metric& metric) {
  (*static_cast<Visit*>(visit))(
      {.name = metric.name, .help = metric.help, .kind = metric.kind, .value = Load(metric)});
}

using allocator::HeapStats;

constexpr StatisticRow<HeapStats> kHeapStatistics[] = {
    {"heap_allocated_bytes", "In objects that the program holds.",
     [](const HeapStats& stats) { return std::uint64_t{stats.allocated.value}; }},
    {"heap_active_bytes", "In spans that hold an object, and in large objects.",
     [](const HeapStats& stats) { return std::uint64_t{stats.active.value}; }},
    // They were counted one after the other while threads went on.
    {"heap_fragmented_bytes", "Of these, in no object.",
     [](const HeapStats& stats) {
       return std::uint64_t{stats.active.value - std::min(stats.active.value, stats.allocated.value)};
     }},
    {"heap_mapped_bytes", "Taken from the address space.",
     [](const HeapStats& stats) { return std::uint64_t{stats.mapped.value}; }},
};

constexpr StatisticRow<Residence> kResidenceStatistics[] = {
    {"vm_resident_bytes", "Resident, in pages of any size.",
     [](const Residence& residence) { return residence.bytes; }},
    {"vm_huge_page_bytes", "Resident in huge pages.", [](const Residence& residence) { return residence.huge_bytes; }},
};

std::uint64_t SpanBytesOf(const SizeClassStats& stats) {
  return stats.spans * allocator::kSizeClasses[allocator::ClassOf(stats.object_size)].units * allocator::kUnitSize;
}

constexpr StatisticRow<SizeClassStats> kSizeClassStatistics[] = {
    {"heap_class_objects", "Objects that the program holds, by size.",
     [](const SizeClassStats& stats) { return stats.allocated; }},
    {"heap_class_free_objects", "Room for objects in their spans, by size.",
     [](const SizeClassStats& stats) { return stats.capacity - std::min(stats.capacity, stats.allocated); }},
    {"heap_class_spans", "Spans, by the size of their objects.",
     [](const SizeClassStats& stats) { return stats.spans; }},
    {"heap_class_object_bytes", "In objects that the program holds, by size.",
     [](const SizeClassStats& stats) { return stats.allocated * stats.object_size; }},
    {"heap_class_span_bytes", "Memory of the spans, by the size of their objects.", SpanBytesOf},
};

constexpr StatisticRow<CacheStats> kCacheStatistics[] = {
    {"heap_cache_thread", "The kernel's number of the thread of a cache, the last one's if it is gone; 0: none had it.",
     [](const CacheStats& stats) { return std::uint64_t{stats.thread}; }},
    {"heap_cache_spans", "Spans of a thread's cache.", [](const CacheStats& stats) { return stats.spans; }},
    {"heap_cache_span_bytes", "Memory of these spans.",
     [](const CacheStats& stats) { return std::uint64_t{stats.capacity.value}; }},
    {"heap_cache_object_bytes", "In objects of them that the program holds.",
     [](const CacheStats& stats) { return std::uint64_t{stats.allocated.value}; }},
    {"heap_cache_at_hand_bytes", "In objects that its thread freed and keeps at hand, counted as held.",
     [](const CacheStats& stats) { return std::uint64_t{stats.at_hand.value}; }},
    {"heap_cache_attached", "1: of a thread that lives, or of the heap profile; 0: kept for a thread to come.",
     [](const CacheStats& stats) { return std::uint64_t{stats.attached}; }},
};

void VisitSizeClasses(allocator::ObjectHeap& heap, Visit visit) {
  for (const auto& row : kSizeClassStatistics) {
    struct Context {
      const StatisticRow<SizeClassStats>& row;
      Visit visit;
    } context = {row, visit};
    heap.ForEachSizeClass(
        [](void* to, const SizeClassStats& stats) {
          const auto& context = *static_cast<const Context*>(to);
          if (stats.spans == 0) return;
          context.visit({.name = context.row.name,
                         .help = context.row.help,
                         .value = context.row.value(stats),
                         .label = "size",
                         .label_value = stats.object_size});
        },
        &context);
  }
}

void VisitCaches(allocator::ObjectHeap& heap, Visit visit) {
  for (const auto& row : kCacheStatistics) {
    struct Context {
      const StatisticRow<CacheStats>& row;
      Visit visit;
    } context = {row, visit};
    heap.ForEachCache(
        [](void* to, const CacheStats& stats) {
          const auto& context = *static_cast<const Context*>(to);
          context.visit({.name = context.row.name,
                         .help = context.row.help,
                         .value = context.row.value(stats),
                         .label = "cache",
                         .label_value = stats.id});
        },
        &context);
  }
}

void VisitHeap(allocator::ObjectHeap& heap, Visit visit) {
  const HeapStats stats = heap.Stats();
  for (const auto& row : kHeapStatistics) visit({.name = row.name, .help = row.help, .value = row.value(stats)});
}

// The lines of a file, without its newline; longer ones in parts.
class LineReader {
 public:
  explicit LineReader(const char* path) : file_(RawSyscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC)) {}
  ~LineReader() {
    if (!SyscallFailed(file_)) RawSyscall(SYS_close, file_);
  }
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  // False at the end.
  bool Next(std::string_view& line) {
    for (;;) {
      const char* begin = text_ + at_;
      const auto* newline = static_cast<const char*>(std::memchr(begin, '\n', size_ - at_));
      if (newline != nullptr || size_ - at_ == sizeof(text_)) {
        const std::size_t length = newline != nullptr ? static_cast<std::size_t>(newline - begin) : size_ - at_;
        line = {begin, length};
        at_ += length + (newline != nullptr ? 1 : 0);
        return true;
      }
      if (!Fill()) return false;
    }
  }

 private:
  bool Fill() {
    if (SyscallFailed(file_)) return false;
    std::memmove(text_, text_ + at_, size_ - at_);
    size_ -= at_;
    at_ = 0;
    long count;
    do {
      count = RawSyscall(SYS_read, file_, text_ + size_, sizeof(text_) - size_);
    } while (count == -EINTR);
    if (count <= 0) return false;
    size_ += static_cast<std::size_t>(count);
    return true;
  }

  const long file_;
  std::size_t at_ = 0;
  std::size_t size_ = 0;
  char text_[2048];
};

// Takes a number off the front of `text`; false if there is none.
bool TakeNumber(std::string_view& text, unsigned base, std::uint64_t& number) {
  std::size_t digits = 0;
  number = 0;
  for (; digits < text.size(); ++digits) {
    const char c = text[digits];
    const unsigned digit = c >= '0' && c <= '9' ? static_cast<unsigned>(c - '0')
                           : c >= 'a' && c <= 'f' ? static_cast<unsigned>(c - 'a' + 10)
                                                  : base;
    if (digit >= base) break;
    number = number * base + digit;
  }
  text.remove_prefix(digits);
  return digits != 0;
}

// The number of "NAME     123 kB", if that is the line's name.
bool TakeField(std::string_view line, std::string_view name, std::uint64_t& number) {
  if (line.size() <= name.size() || std::memcmp(line.data(), name.data(), name.size()) != 0) return false;
  line.remove_prefix(name.size());
  while (!line.empty() && line[0] == ' ') line.remove_prefix(1);
  return TakeNumber(line, 10, number);
}

}  // namespace

absl::Span<const StatisticRow<Residence>> ResidenceStatistics() { return kResidenceStatistics; }
absl::Span<const StatisticRow<HeapStats>> HeapStatistics() { return kHeapStatistics; }
absl::Span<const StatisticRow<SizeClassStats>> SizeClassStatistics() { return kSizeClassStatistics; }
absl::Span<const StatisticRow<CacheStats>> CacheStatistics() { return kCacheStatistics; }

void StatisticsWriter::Emit(Message& line) {
  sink_(line.text());
  line.Clear();
}

void StatisticsWriter::Write(const Statistic& statistic) {
  const bool same_name = statistic.name == name_;
  switch (format_) {
    case StatisticsFormat::kText: WriteText(statistic); break;
    case StatisticsFormat::kJson: WriteJson(statistic, same_name); break;
    case StatisticsFormat::kPrometheus: WritePrometheus(statistic, same_name); break;
  }
  name_ = statistic.name;
  labelled_ = !statistic.label.empty();
}

void StatisticsWriter::WriteText(const Statistic& statistic) {
  Message line;
  line.Append(statistic.name);
  if (!statistic.label.empty()) {
    line.Append('[').Append(statistic.label).Append(' ').AppendNumber(statistic.label_value).Append(']');
  }
  Emit(line.Append(' ').AppendNumber(statistic.value).Append('\n'));
}

// One object, with an object in it for each name that has labels.
void StatisticsWriter::WriteJson(const Statistic& statistic, bool same_name) {
  Message line;
  if (same_name) {
    line.Append(",\n    \"");
  } else {
    line.Append(name_.empty() ? "{\n" : labelled_ ? "\n  },\n" : ",\n");
    line.Append("  \"").Append(statistic.name).Append("\": ");
    if (!statistic.label.empty()) line.Append("{\n    \"");
  }
  if (!statistic.label.empty()) line.AppendNumber(statistic.label_value).Append("\": ");
  Emit(line.AppendNumber(statistic.value));
}

void StatisticsWriter::WritePrometheus(const Statistic& statistic, bool same_name) {
  Message line;
  if (!same_name) {
    line.Append("# HELP freehold_").Append(statistic.name).Append(' ').Append(statistic.help).Append('\n');
    line.Append("# TYPE freehold_").Append(statistic.name);
    Emit(line.Append(statistic.kind == vm::Metric::Kind::kCounter ? " counter\n" : " gauge\n"));
  }
  line.Append("freehold_").Append(statistic.name);
  if (!statistic.label.empty()) {
    line.Append('{').Append(statistic.label).Append("=\"").AppendNumber(statistic.label_value).Append("\"}");
  }
  Emit(line.Append(' ').AppendNumber(statistic.value).Append('\n'));
}

void StatisticsWriter::Finish() {
  if (format_ != StatisticsFormat::kJson) return;
  sink_(name_.empty() ? "{}\n" : labelled_ ? "\n  }\n}\n" : "\n}\n");
}

Residence ReadResidence(const char* path, std::uintptr_t first, std::uintptr_t end) {
  LineReader reader(path);
  bool inside = false;
  Residence kilobytes;
  for (std::string_view line; reader.Next(line);) {
    std::string_view rest = line;
    std::uint64_t number = 0;
    // A mapping begins with "7f0123456000-7f0123457000 ".
    if (TakeNumber(rest, 16, number) && !rest.empty() && rest[0] == '-') {
      inside = first <= number && number < end;
    } else if (inside) {
      if (TakeField(line, "Rss:", number)) kilobytes.bytes += number;
      if (TakeField(line, "AnonHugePages:", number)) kilobytes.huge_bytes += number;
    }
  }
  return {.bytes = kilobytes.bytes * 1024, .huge_bytes = kilobytes.huge_bytes * 1024};
}

void ForEachStatistic(const StatisticsOptions& options, Visit visit) {
  vm::AddressSpace& space = process_runtime.space();
  space.ForEachMetric(VisitMetric, &visit);
  if (options.huge_pages) {
    const auto first = reinterpret_cast<std::uintptr_t>(space.reservation().address());
    const Residence residence = ReadResidence("/proc/self/smaps", first, first + space.reservation().bytes().value);
    for (const auto& row : kResidenceStatistics) visit({.name = row.name, .help = row.help, .value = row.value(residence)});
  }
  if (process_runtime.server() != Server::kFreehold) return;
  allocator::ObjectHeap& heap = process_runtime.heap();
  heap.ForEachMetric(VisitMetric, &visit);
  VisitHeap(heap, visit);
  VisitSizeClasses(heap, visit);
  VisitCaches(heap, visit);
}

void WriteStatistics(const StatisticsOptions& options, LineSink sink) {
  StatisticsWriter writer(options.format, sink);
  ForEachStatistic(options, [&](const Statistic& statistic) { writer.Write(statistic); });
  writer.Finish();
}

}  // namespace freehold::runtime
