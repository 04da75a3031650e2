// A look inside a process that runs on Freehold, from outside: finds its telemetry page (runtime/telemetry.h) and
// reads what that points to. The process is neither stopped nor told.
//
// What is read changes meanwhile: single numbers are right, sums and sets are as of about the same moment. The process
// may be hostile: whatever comes from it is checked before it is used as a size or printed.
//
// Thread safety: thread-compatible.
#ifndef FREEHOLD_RUNTIME_CLI_PROCESS_VIEW_H_
#define FREEHOLD_RUNTIME_CLI_PROCESS_VIEW_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "runtime/telemetry.h"
#include "vm/sync/lock_times.h"

namespace freehold::cli {

class ProcessView {
 public:
  // Errors, each a line for the user: there is no such process; it is another user's; it does not run on Freehold;
  // it runs another release, whose page is unknown here.
  static absl::StatusOr<ProcessView> Open(pid_t pid);

  struct Metric {
    std::string name;
    std::string help;
    vm::Metric::Kind kind;
    std::uint64_t value = 0;
    std::vector<std::uint64_t> by_region;  // in the order of regions(); empty for others
  };
  // All metrics at about the same moment. Errors: the process has ended.
  absl::StatusOr<std::vector<Metric>> ReadMetrics() const;

  struct Region {
    vm::Zone zone;
    vm::PageRange range;
  };
  std::vector<Region> Regions() const;

  struct OperationTimes {
    vm::sync::Operation operation;
    vm::sync::LockTimes times;
  };
  // Of range locks, those operations that took any; empty where the process does not record them (FREEHOLD_RECORD_RANGE_LOCKS).
  absl::StatusOr<std::vector<OperationTimes>> ReadLockTimes() const;
  bool records_lock_times() const { return page_.lock_times != 0; }

  struct MappedVma {
    vm::PageRange range;
    vm::os::Protection protection;
    vm::Zone zone;
    bool locked;
    bool backed;  // by a file or a pager
    std::uint64_t generation;
  };
  // Every mapped VMA in ascending order, no page twice; what is mapped throughout is there. A region that cannot be read
  // consistently for half a second, as when the process was stopped in the middle of a change, ends early. Errors: the
  // process has ended; it runs another build, whose structures are unknown here.
  absl::StatusOr<std::vector<MappedVma>> ReadVmas() const;
  // The longest free extent of all regions; a hint. Errors: as ReadVmas.
  absl::StatusOr<vm::Pages> ReadLargestGap() const;

  // Addresses of the range locks, each once: for lock_view.h. Errors: it runs another build.
  absl::StatusOr<std::vector<std::uint64_t>> RangeLocks() const;

  // Where its heap is: for heap_view.h. Errors: it has none; it runs another build.
  absl::StatusOr<allocator::HeapLocation> Heap() const;

  pid_t pid() const { return pid_; }
  const std::string& name() const { return name_; }  // of its program, as ps(1) shows it
  absl::string_view release() const { return page_.release; }
  double uptime_seconds() const;  // since the runtime started
  absl::string_view lock_policy() const;

  // All `bytes` at `address` of the process.
  absl::Status Read(std::uint64_t address, void* to, std::size_t bytes) const;
  struct Piece {
    std::uint64_t address;
    void* to;
    std::size_t bytes;
  };
  // The same for each, in order and, up to a thousand of them, in one system call. Errors: kUnavailable if one of them is
  // not readable memory.
  absl::Status ReadEach(absl::Span<const Piece> pieces) const;

 private:
  // Of the telemetry page, a copy without atomics.
  struct Page {
    std::uint64_t layout;
    std::uint64_t started;
    std::uint64_t lock_policy;
    std::uint64_t lock_times;
    allocator::HeapLocation heap;
    std::string release;
    std::vector<runtime::TelemetryPage::Metric> metrics;
    std::vector<runtime::TelemetryPage::Region> regions;
  };

  explicit ProcessView(pid_t pid) : pid_(pid) {}
  absl::Status ReadPage(std::uint64_t address);
  absl::Status CheckLayout() const;

  pid_t pid_;
  std::string name_;
  Page page_;
};

}  // namespace freehold::cli

#endif  // FREEHOLD_RUNTIME_CLI_PROCESS_VIEW_H_
