// What a process's heap holds, by size and by thread, read from outside: by the records of its spans, which say whose they
// are and how many of their objects are in use, and a few numbers of each thread's cache.
//
// Records change while they are read: each is as of its own moment, and so is each sum.
#ifndef FREEHOLD_RUNTIME_CLI_HEAP_VIEW_H_
#define FREEHOLD_RUNTIME_CLI_HEAP_VIEW_H_

#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "allocator/heap_stats.h"
#include "runtime/cli/process_view.h"
#include "runtime/statistics.h"

namespace freehold::cli {

struct HeapView {
  allocator::HeapStats sums;  // allocated, active, mapped, large
  std::vector<allocator::SizeClassStats> classes;  // ascending; those with a span
  std::vector<allocator::CacheStats> caches;       // by id: all there ever were
};

// `metrics`: the process's, read just before. Errors: as ProcessView::Heap and ReadEach; kDataLoss where what the process
// says of its heap cannot be.
absl::StatusOr<HeapView> ReadHeap(const ProcessView& process, const std::vector<ProcessView::Metric>& metrics);

// Calls `visit` for everything that the table of statistics says of a heap, those of one name one after the other.
void ForEachHeapStatistic(const HeapView& heap, absl::FunctionRef<void(const runtime::Statistic&)> visit);

}  // namespace freehold::cli

#endif  // FREEHOLD_RUNTIME_CLI_HEAP_VIEW_H_
