// Zeroes. What is written to them lasts as long as it is in memory: evicted pages are zero again.
//
// Thread safety: thread-safe.
#ifndef FREEHOLD_VM_PAGERS_ZERO_PAGER_H_
#define FREEHOLD_VM_PAGERS_ZERO_PAGER_H_

#include <cstdint>
#include <cstring>

#include "absl/types/span.h"
#include "vm/pager.h"
#include "vm/result.h"

namespace freehold::vm {

class ZeroPager final : public Pager {
 public:
  Result<Pages> Read(std::uint64_t /*page*/, absl::Span<std::byte> into) override {
    std::memset(into.data(), 0, into.size());
    return Pages{into.size() / kPageSize};
  }
  Error Writeback(std::uint64_t /*page*/, absl::Span<const std::byte> /*from*/) override { return Error::Ok(); }
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_PAGERS_ZERO_PAGER_H_
