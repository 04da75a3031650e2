// The telemetry page: tells readers outside the process where it keeps its counters, its VMAs and its range locks.
//
// Nothing is copied, and nobody in the process does anything for a reader: `freehold stat`, `maps`, `top` and `report`
// find the page by its name in /proc/PID/maps and read what it points to by process_vm_readv(2). So counting costs what
// it costs without telemetry, a stopped process can be looked at like a busy one, and the child of a fork has a page of
// its own, since the mapping is private.
//
// Thread safety: thread-compatible: written at the process's start.
// Allocation:    none from malloc. One mapping of 16 KiB, outside of the address space.
#ifndef FREEHOLD_RUNTIME_TELEMETRY_H_
#define FREEHOLD_RUNTIME_TELEMETRY_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "allocator/object_heap.h"
#include "vm/address_space.h"
#include "vm/metric.h"
#include "vm/os/linux_kernel.h"
#include "vm/sync/lock_times.h"
#include "vm/sync/range_lock.h"
#include "vm/sync/range_request.h"
#include "vm/vma.h"
#include "vm/vma_tree.h"

namespace freehold::runtime {

// What a reader gets. Addresses are the process's own; texts end in a NUL.
struct TelemetryPage {
  // The mapping is called "/memfd:freehold-telemetry (deleted)".
  static constexpr char kName[] = "freehold-telemetry";
  static constexpr std::uint64_t kMagic = 0x444c'4f48'4545'5246;  // "FREEHOLD"
  // Changes when a field of this page does.
  static constexpr std::uint32_t kVersion = 2;
  static constexpr std::size_t kMaxMetrics = 64;

  struct Metric {
    char name[40];
    char help[88];
    vm::Metric::Kind kind;
    std::uint32_t width;
    std::uint32_t count;
    std::uint32_t of_regions;  // 1: a number for each region, in their order
    std::uint64_t first;
    std::uint64_t stride;
    std::uint64_t scale;
  };
  struct Region {
    std::uint64_t first_page;
    std::uint64_t pages;
    std::uint64_t tree;        // address of a pointer to the root vm::VmaTree::Node
    std::uint64_t range_lock;  // address of a vm::sync::RangeLock
    std::uint64_t zone;        // vm::Zone
  };

  std::atomic<std::uint64_t> magic;  // written last
  std::uint32_t version;
  std::uint32_t bytes;         // of this struct
  std::uint64_t layout;        // LayoutOfStructures(), for those who follow `tree`, `range_lock` and `heap`
  std::uint64_t started;       // CLOCK_MONOTONIC, in nanoseconds
  std::uint64_t lock_policy;   // vm::sync::LockPolicy
  std::uint64_t lock_times;    // address of a vm::sync::LockTimesRecorder; 0: not recorded
  allocator::HeapLocation heap;  // for those who know `layout`; all zero if libc serves malloc
  std::uint64_t region_count;
  std::atomic<std::uint64_t> metric_count;  // grows; release after the metric was written
  char release[16];            // kVersion of version.h
  Metric metrics[kMaxMetrics];
  Region regions[vm::kMaxRegions];
};

// A number that stands for the structures that a reader of VMAs, locks, histograms and spans knows: two builds that agree
// in it can read each other's.
constexpr std::uint64_t LayoutOfStructures() {
  std::uint64_t layout = TelemetryPage::kVersion;
  for (const std::size_t part :
       {sizeof(vm::VmaTree::Node), offsetof(vm::VmaTree::Node, entry), offsetof(vm::VmaTree::Node, gap),
        sizeof(vm::Vma), offsetof(vm::Vma, generation), offsetof(vm::Vma, knowledge), sizeof(vm::sync::RangeLock),
        sizeof(vm::sync::RangeRequest), sizeof(vm::sync::LockTimesRecorder), vm::sync::kOperations,
        sizeof(allocator::Span), offsetof(allocator::Span, credits), offsetof(allocator::Span, carved),
        offsetof(allocator::Span, size_class), offsetof(allocator::Span, state),
        std::size_t{allocator::kSizeClassCount}, std::size_t{allocator::kMaxClassSize}}) {
    layout = layout * 1'000'003 + part;
  }
  return layout;
}

class Telemetry {
 public:
  constexpr Telemetry() = default;
  Telemetry(const Telemetry&) = delete;
  Telemetry& operator=(const Telemetry&) = delete;

  // False when the system refuses the mapping: then nobody can look inside, and all else works. `heap`: null if libc
  // serves malloc.
  bool Publish(const vm::AddressSpace& space, const allocator::ObjectHeap* heap, const vm::os::LinuxKernel& kernel);
  // Adds one metric more. REQUIRES: fewer than kMaxMetrics. Nothing happens unless published.
  void Add(const vm::Metric& metric);

 private:
  void AddRegion(const vm::RegionLocation& region);

  TelemetryPage* page_ = nullptr;
};

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_TELEMETRY_H_
