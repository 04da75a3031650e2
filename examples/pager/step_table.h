// A table that is larger than anybody computes: for each number, the steps of its Collatz sequence to 1. It lies in
// memory as an array, and a pager computes each page of it when somebody looks there for the first time.
#ifndef FREEHOLD_EXAMPLES_PAGER_STEP_TABLE_H_
#define FREEHOLD_EXAMPLES_PAGER_STEP_TABLE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/types/span.h"
#include "vm/address_space.h"
#include "vm/fault.h"
#include "vm/os/userfault.h"
#include "vm/pager.h"
#include "vm/result.h"
#include "vm/units.h"

namespace freehold::examples {

// Page P holds the numbers from P * kNumbersPerPage on.
//
// Thread safety: thread-safe.
class StepPager final : public vm::Pager {
 public:
  static constexpr std::size_t kNumbersPerPage = vm::kPageSize / sizeof(std::uint16_t);

  vm::Result<vm::Pages> Read(std::uint64_t page, absl::Span<std::byte> into) override;
  // The table is mapped for reading: nothing comes back.
  vm::Error Writeback(std::uint64_t page, absl::Span<const std::byte> from) override;

  std::uint64_t pages_computed() const { return pages_computed_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> pages_computed_{0};
};

// Thread safety: thread-safe, but for Start.
class StepTable {
 public:
  // Where pages cannot be computed on demand, so many are computed beforehand.
  static constexpr vm::Pages kFallbackPages = {64};

  // Both outlive the table; `userfault` is for it alone.
  StepTable(vm::AddressSpace& space, vm::os::Userfault& userfault) : space_(space), faults_(space, userfault) {}
  ~StepTable();
  StepTable(const StepTable&) = delete;
  StepTable& operator=(const StepTable&) = delete;

  // Maps `count` pages, or kFallbackPages of them if this process may not use userfaultfd. Errors: as
  // vm::FaultService::MapPager.
  vm::Error Start(vm::Pages count);
  bool on_demand() const { return faults_.available(); }

  vm::Pages pages() const { return table_.count(); }
  std::uint64_t pages_computed() const { return pager_.pages_computed(); }
  // Nothing for numbers beyond the table, and for 0.
  std::optional<unsigned> StepsOf(std::uint64_t number) const;

 private:
  vm::AddressSpace& space_;
  StepPager pager_;  // outlives the service
  vm::FaultService faults_;
  vm::PageRange table_;
};

}  // namespace freehold::examples

#endif  // FREEHOLD_EXAMPLES_PAGER_STEP_TABLE_H_
