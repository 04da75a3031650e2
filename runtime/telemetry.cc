#include "runtime/telemetry.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <string_view>

#include "runtime/version.h"
#include "vm/os/check.h"
#include "vm/os/raw_syscall.h"

namespace freehold::runtime {
namespace {

using vm::os::RawSyscall;
using vm::os::SyscallFailed;

template <std::size_t kSize>
void CopyText(char (&to)[kSize], std::string_view text) {
  const std::size_t length = std::min(text.size(), kSize - 1);
  std::memcpy(to, text.data(), length);
  to[length] = '\0';
}

std::uint64_t AddressOf(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }

// Zeroes, under a name that /proc/PID/maps shows. The file is empty: what is written is the process's own.
TelemetryPage* MapPage() {
  constexpr unsigned kCloseOnExec = 1;
  const long file = RawSyscall(SYS_memfd_create, TelemetryPage::kName, kCloseOnExec);
  if (SyscallFailed(file)) return nullptr;
  long page = RawSyscall(SYS_ftruncate, file, sizeof(TelemetryPage));
  if (!SyscallFailed(page)) {
    page = RawSyscall(SYS_mmap, nullptr, sizeof(TelemetryPage), PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  }
  RawSyscall(SYS_close, file);
  return SyscallFailed(page) ? nullptr : reinterpret_cast<TelemetryPage*>(page);
}

}  // namespace

bool Telemetry::Publish(const vm::AddressSpace& space, const allocator::ObjectHeap* heap,
                        const vm::os::LinuxKernel& kernel) {
  FREEHOLD_CHECK(page_ == nullptr);
  page_ = MapPage();
  if (page_ == nullptr) return false;
  page_->version = TelemetryPage::kVersion;
  page_->bytes = sizeof(TelemetryPage);
  page_->layout = LayoutOfStructures();
  page_->started = space.kernel().Now().value;
  page_->lock_policy = static_cast<std::uint64_t>(space.lock_policy());
  page_->lock_times = AddressOf(space.lock_times());
  CopyText(page_->release, kVersion);
  const auto add_region = [](void* self, const vm::RegionLocation& region) {
    static_cast<Telemetry*>(self)->AddRegion(region);
  };
  const auto add = [](void* self, const vm::Metric& metric) { static_cast<Telemetry*>(self)->Add(metric); };
  space.ForEachRegion(add_region, this);
  space.ForEachMetric(add, this);
  if (heap != nullptr) heap->ForEachMetric(add, this);
  if (heap != nullptr) page_->heap = heap->Locate();
  kernel.ForEachMetric(add, this);
  // After everything else, for readers of a process that has just started.
  page_->magic.store(TelemetryPage::kMagic, std::memory_order_release);
  return true;
}

void Telemetry::AddRegion(const vm::RegionLocation& region) {
  page_->regions[page_->region_count++] = {.first_page = region.range.first.value,
                                           .pages = region.range.count().value,
                                           .tree = AddressOf(region.tree),
                                           .range_lock = AddressOf(region.range_lock),
                                           .zone = static_cast<std::uint64_t>(region.zone)};
}

void Telemetry::Add(const vm::Metric& metric) {
  if (page_ == nullptr) return;
  const std::uint64_t index = page_->metric_count.load(std::memory_order_relaxed);
  FREEHOLD_CHECK(index < TelemetryPage::kMaxMetrics);
  TelemetryPage::Metric& row = page_->metrics[index];
  CopyText(row.name, metric.name);
  CopyText(row.help, metric.help);
  row.kind = metric.kind;
  row.width = metric.width;
  row.count = metric.count;
  row.of_regions = metric.of_regions ? 1 : 0;
  row.first = AddressOf(metric.first);
  row.stride = metric.stride;
  row.scale = metric.scale;
  // Pairs with the reader, who takes no row that is not counted.
  page_->metric_count.store(index + 1, std::memory_order_release);
}

}  // namespace freehold::runtime
