// What the files of the C API share: options and results that carry their size, and handles.
#ifndef FREEHOLD_RUNTIME_C_API_INTERNAL_H_
#define FREEHOLD_RUNTIME_C_API_INTERNAL_H_

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include "allocator/heap_stats.h"
#include "runtime/freehold.h"
#include "vm/address_space.h"
#include "vm/result.h"
#include "vm/units.h"

namespace freehold::runtime::c_api {

// What a struct had in the first version of the header that has it: no caller knows less.
template <typename Struct>
constexpr std::size_t kFirstSize = sizeof(Struct);

// No struct of any version has more.
inline constexpr std::size_t kMaxSize = vm::kPageSize;

template <typename Struct>
bool IsSize(std::size_t size) {
  return kFirstSize<Struct> <= size && size <= kMaxSize;
}

// The options as this library knows them.
template <typename Options>
int Read(const Options* given, Options& options) {
  options = {};
  if (given == nullptr) return 0;
  const std::size_t size = given->size;
  if (!IsSize<Options>(size)) return EINVAL;
  std::memcpy(&options, given, std::min(size, sizeof(Options)));
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  const bool known = std::all_of(bytes + std::min(size, sizeof(Options)), bytes + size,
                                 [](unsigned char byte) { return byte == 0; });
  return known ? 0 : E2BIG;
}

// Fills in `result`, of which the caller may know more or less.
template <typename Struct>
int Write(Struct value, Struct* result) {
  if (result == nullptr || !IsSize<Struct>(result->size)) return EINVAL;
  value.size = result->size;
  const std::size_t known = std::min(value.size, sizeof(Struct));
  std::memcpy(result, &value, known);
  std::memset(reinterpret_cast<unsigned char*>(result) + known, 0, value.size - known);
  return 0;
}

inline int Result(vm::Error error) { return vm::ToErrno(error); }

inline freehold_heap_statistics Describe(const allocator::HeapStats& stats) {
  freehold_heap_statistics statistics = {};
  statistics.allocated = stats.allocated.value;
  statistics.active = stats.active.value;
  statistics.free_resident = stats.free_dirty.value;
  statistics.free_returned = stats.free_clean.value;
  statistics.mapped = stats.mapped.value;
  statistics.metadata = stats.metadata.value;
  statistics.large = stats.large.value;
  statistics.large_objects = stats.large_objects;
  statistics.threads = stats.threads;
  statistics.purged_pages = stats.purged_pages;
  return statistics;
}

// Sets `space`, or says why not.
int Open(const freehold_space* handle, vm::AddressSpace*& space);

}  // namespace freehold::runtime::c_api

#endif  // FREEHOLD_RUNTIME_C_API_INTERNAL_H_
