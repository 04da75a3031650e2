// A number that a part of Freehold keeps anyway, described so that a reader outside the process finds it.
#ifndef FREEHOLD_VM_METRIC_H_
#define FREEHOLD_VM_METRIC_H_

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace freehold::vm {

// The value is the sum of `count` unsigned numbers of `width` bytes, `stride` bytes apart, times `scale`. Each is
// written at any time by relaxed stores or adds, and is where it is for the life of the process.
struct Metric {
  enum class Kind : std::uint32_t {
    kCounter,  // only grows
    kGauge,
  };

  std::string_view name;  // as Prometheus has it, without a prefix: "vm_mapped_bytes"
  std::string_view help;
  Kind kind = Kind::kCounter;
  const void* first = nullptr;
  std::uint32_t width = sizeof(std::uint64_t);
  std::uint32_t count = 1;
  std::uint64_t stride = 0;
  std::uint64_t scale = 1;
  bool of_regions = false;     // a number for each region of an AddressSpace, in their order
  bool of_heap_zones = false;  // only of regions of heap zones, which come first
};

using MetricVisitor = void (*)(void* context, const Metric& metric);

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_METRIC_H_
