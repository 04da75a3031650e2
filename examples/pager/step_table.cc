#include "examples/pager/step_table.h"

#include <algorithm>
#include <cstring>

namespace freehold::examples {
namespace {

std::uint16_t ComputeSteps(std::uint64_t number) {
  std::uint16_t steps = 0;
  for (; number > 1; ++steps) number = number % 2 == 0 ? number / 2 : 3 * number + 1;
  return steps;
}

}  // namespace

vm::Result<vm::Pages> StepPager::Read(std::uint64_t page, absl::Span<std::byte> into) {
  std::uint64_t number = page * kNumbersPerPage;
  for (std::size_t at = 0; at < into.size(); at += sizeof(std::uint16_t), ++number) {
    const std::uint16_t steps = ComputeSteps(number);
    std::memcpy(into.data() + at, &steps, sizeof(steps));
  }
  const vm::Pages pages = {into.size() / vm::kPageSize};
  pages_computed_.fetch_add(pages.value, std::memory_order_relaxed);
  return pages;
}

vm::Error StepPager::Writeback(std::uint64_t, absl::Span<const std::byte>) { return {vm::ErrorCode::kUnsupported}; }

StepTable::~StepTable() {
  if (!table_.empty()) (void)space_.Unmap(table_);
}

vm::Error StepTable::Start(vm::Pages count) {
  if (const vm::Error error = faults_.Start(); !error.ok()) return error;
  const vm::Pages mapped = on_demand() ? count : std::min(count, kFallbackPages);
  const vm::Result<vm::PageRange> table =
      faults_.MapPager(pager_, 0, mapped,
                       {.protection = vm::os::Protection::kRead,
                        .max_protection = vm::os::Protection::kRead,
                        .when_unavailable = vm::WhenUnavailable::kPopulate});
  if (!table.ok()) return table.error();
  table_ = *table;
  return vm::Error::Ok();
}

std::optional<unsigned> StepTable::StepsOf(std::uint64_t number) const {
  if (number == 0 || number >= pages().value * StepPager::kNumbersPerPage) return std::nullopt;
  return reinterpret_cast<const std::uint16_t*>(table_.address())[number];
}

}  // namespace freehold::examples
