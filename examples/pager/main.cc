// Looks numbers up in a table of 4 GiB that does not exist but for the pages that are looked at.
//
//     pager NUMBER...
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "examples/pager/step_table.h"
#include "vm/address_space.h"
#include "vm/os/linux_kernel.h"
#include "vm/os/userfault.h"

namespace vm = freehold::vm;
using freehold::examples::StepPager;
using freehold::examples::StepTable;

namespace {

constexpr vm::Pages kTable = vm::PagesFor(vm::GiB(4));

int Fail(const char* what, vm::Error error) {
  std::fprintf(stderr, "pager: %s: %s\n", what, vm::ToString(error.code));
  return 1;
}

int LookUp(vm::AddressSpace& space, const std::vector<std::uint64_t>& numbers) {
  vm::os::LinuxUserfault userfault;
  StepTable table(space, userfault);
  if (const vm::Error error = table.Start(kTable); !error.ok()) return Fail("no table", error);
  if (!table.on_demand()) {
    std::fprintf(stderr,
                 "pager: userfaultfd is not permitted here (vm.unprivileged_userfaultfd, or a filter): "
                 "computed the first %zu numbers beforehand\n",
                 table.pages().value * StepPager::kNumbersPerPage);
  }
  for (const std::uint64_t number : numbers) {
    if (const auto steps = table.StepsOf(number)) {
      std::printf("%llu: %u steps\n", static_cast<unsigned long long>(number), *steps);
    } else {
      std::printf("%llu: not in the table\n", static_cast<unsigned long long>(number));
    }
  }
  std::printf("computed %llu of %zu pages\n", static_cast<unsigned long long>(table.pages_computed()),
              table.pages().value);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::uint64_t> numbers;
  for (int i = 1; i < argc; ++i) {
    const char* end = argv[i] + std::strlen(argv[i]);
    const auto [stop, error] = std::from_chars(argv[i], end, numbers.emplace_back());
    if (error != std::errc() || stop != end) {
      std::fprintf(stderr, "pager: %s is no number\n", argv[i]);
      return 2;
    }
  }
  if (numbers.empty()) {
    std::fputs("usage: pager NUMBER...\n", stderr);
    return 2;
  }
  static constinit vm::os::LinuxKernel kernel;
  // A mapping fits into one region.
  const vm::Result<vm::AddressSpace*> space =
      vm::AddressSpace::Create(kernel, {.reserve = vm::GiB(64), .min_reserve = vm::GiB(64), .regions_per_zone = 1});
  if (!space.ok()) return Fail("no address space", space.error());
  const int status = LookUp(**space, numbers);
  vm::AddressSpace::Destroy(*space);
  return status;
}
