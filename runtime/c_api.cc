// freehold.h over vm::AddressSpace: bytes become pages, constants become enumerations, errors become errno values.
//
// A handle stands for a space and for the process that made it: after a fork a space of the program's own has no
// fork handlers that would have made it consistent, so the child is refused.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <string_view>

#include "absl/types/span.h"
#include "allocator/memory_limit.h"
#include "runtime/c_api_internal.h"
#include "runtime/freehold.h"
#include "runtime/heap_profile_file.h"
#include "runtime/runtime.h"
#include "runtime/stack_pool.h"
#include "runtime/statistics.h"
#include "runtime/version.h"
#include "vm/address_space.h"
#include "vm/metric.h"
#include "vm/page_range.h"
#include "vm/pin.h"
#include "vm/result.h"
#include "vm/units.h"

using freehold::runtime::process_runtime;
using freehold::runtime::Server;
namespace vm = freehold::vm;

struct freehold_space {
  // Null until known, for the process's own; constant for others.
  std::atomic<vm::AddressSpace*> space{nullptr};
  std::uint32_t forks = 0;  // as `forks` was when it was made
};

struct freehold_stack_pool {
  freehold::runtime::StackPool* pool;
  std::uint32_t forks;
};

namespace {

using freehold::allocator::WithinLimit;
using freehold::runtime::StackPool;
using freehold::runtime::StackSlot;
using freehold::runtime::c_api::Describe;
using freehold::runtime::c_api::Open;
using freehold::runtime::c_api::Read;
using freehold::runtime::c_api::Result;
using freehold::runtime::c_api::Write;

static_assert(FREEHOLD_PAGE_SIZE == vm::kPageSize);

constinit freehold_space process_space;

// Of this process since its first ancestor; written in the child of a fork, before it has other threads.
constinit std::atomic<std::uint32_t> forks{0};
constinit pthread_once_t fork_handler_once = PTHREAD_ONCE_INIT;
constinit int fork_handler_error = 0;  // written under the once

void RegisterForkHandler() {
  fork_handler_error =
      pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
}

// From now on `forks` counts. An errno value.
int WatchForks() {
  pthread_once(&fork_handler_once, RegisterForkHandler);
  return fork_handler_error;
}

}  // namespace

int freehold::runtime::c_api::Open(const freehold_space* handle, vm::AddressSpace*& space) {
  if (handle == nullptr) return EINVAL;
  if (handle != &process_space && handle->forks != forks.load(std::memory_order_relaxed)) return EOPNOTSUPP;
  space = handle->space.load(std::memory_order_relaxed);
  return 0;
}

namespace {

// ---- Arguments ----

// Of the space; null for a program's own.
freehold::allocator::MemoryLimit* LimitOf(const freehold_space* handle) {
  return handle == &process_space ? &process_runtime.limit() : nullptr;
}

vm::Result<vm::Pages> ToPages(std::size_t bytes) {
  if (bytes == 0) return vm::ErrorCode::kEmpty;
  if (bytes > SIZE_MAX - (vm::kPageSize - 1)) return vm::ErrorCode::kOverflow;
  return vm::PagesFor({bytes});
}

bool IsAligned(std::uintptr_t address) { return address % vm::kPageSize == 0; }

vm::Result<vm::PageRange> ToRange(const void* address, std::size_t bytes) {
  const vm::Result<vm::Pages> count = ToPages(bytes);
  if (!count.ok()) return count.error();
  if (!IsAligned(reinterpret_cast<std::uintptr_t>(address))) return vm::ErrorCode::kUnaligned;
  return vm::PageRange::Of(vm::PageNumber::Of(address), *count);
}

// Opens the space and runs `verb(space, range)`, which returns an errno value.
template <typename Verb>
int OnRange(const freehold_space* handle, const void* address, std::size_t bytes, Verb verb) {
  vm::AddressSpace* space = nullptr;
  if (const int error = Open(handle, space); error != 0) return error;
  const vm::Result<vm::PageRange> range = ToRange(address, bytes);
  return range.ok() ? verb(*space, *range) : Result(range.error());
}

// ---- Constants ----

// The value of an enumeration whose numbers are the header's.
template <typename Enum>
std::optional<Enum> ToEnum(int number, Enum last) {
  if (number < 0 || number > static_cast<int>(last)) return std::nullopt;
  return static_cast<Enum>(number);
}

std::optional<vm::os::Protection> ToProtection(int protection) {
  if (protection == FREEHOLD_NO_ACCESS) return vm::os::Protection::kNone;
  if (protection <= 0 || protection > (FREEHOLD_READ | FREEHOLD_WRITE | FREEHOLD_EXECUTE)) return std::nullopt;
  return static_cast<vm::os::Protection>(protection);
}
static_assert(FREEHOLD_READ == static_cast<int>(vm::os::Protection::kRead) &&
              FREEHOLD_WRITE == static_cast<int>(vm::os::Protection::kWrite) &&
              FREEHOLD_EXECUTE == static_cast<int>(vm::os::Protection::kExec));

int FromProtection(vm::os::Protection protection) {
  return protection == vm::os::Protection::kNone ? FREEHOLD_NO_ACCESS : static_cast<int>(protection);
}

std::optional<vm::Placement> ToPlacement(int placement) { return ToEnum(placement, vm::Placement::kReplace); }
static_assert(FREEHOLD_ANYWHERE == static_cast<int>(vm::Placement::kAnywhere) &&
              FREEHOLD_HINT == static_cast<int>(vm::Placement::kHint) &&
              FREEHOLD_FIXED == static_cast<int>(vm::Placement::kFixed) &&
              FREEHOLD_REPLACE == static_cast<int>(vm::Placement::kReplace));

std::optional<vm::os::MemoryLock> ToMemoryLock(int lock) { return ToEnum(lock, vm::os::MemoryLock::kOnFault); }
static_assert(FREEHOLD_UNLOCKED == static_cast<int>(vm::os::MemoryLock::kNone) &&
              FREEHOLD_LOCKED == static_cast<int>(vm::os::MemoryLock::kLocked) &&
              FREEHOLD_LOCKED_ON_FAULT == static_cast<int>(vm::os::MemoryLock::kOnFault));

std::optional<vm::Content> ToContent(int content) { return ToEnum(content, vm::Content::kAnything); }
static_assert(FREEHOLD_ZEROED == static_cast<int>(vm::Content::kZeroed) &&
              FREEHOLD_ANY_CONTENT == static_cast<int>(vm::Content::kAnything));

std::optional<vm::sync::LockPolicy> ToLockPolicy(int policy) {
  switch (policy) {
    case FREEHOLD_LOCK_ADAPTIVE: return vm::sync::LockPolicy::kAdaptive;
    case FREEHOLD_LOCK_TREE: return vm::sync::LockPolicy::kTree;
    case FREEHOLD_LOCK_COARSE: return vm::sync::LockPolicy::kCoarse;
  }
  return std::nullopt;
}

std::optional<vm::Advice> ToAdvice(int advice) {
  switch (advice) {
    case FREEHOLD_DONT_NEED: return vm::Advice::kDontNeed;
    case FREEHOLD_FREE: return vm::Advice::kFree;
    case FREEHOLD_WILL_NEED: return vm::Advice::kWillNeed;
    case FREEHOLD_HUGE_PAGES: return vm::Advice::kHugePages;
    case FREEHOLD_NO_HUGE_PAGES: return vm::Advice::kNoHugePages;
    case FREEHOLD_COLD: return vm::Advice::kCold;
    case FREEHOLD_PAGE_OUT: return vm::Advice::kPageOut;
  }
  return std::nullopt;
}

// A limit that somebody gave, or the default.
std::uint64_t Limit(std::uint64_t given, std::uint64_t standard) {
  if (given == FREEHOLD_NONE) return 0;
  return given != 0 ? given : standard;
}

// ---- Pins ----

// What a freehold_pin holds.
struct PinRecord {
  static constexpr std::uint64_t kPinning = 0x70696e6e696e6721;

  std::uint64_t state;  // kPinning, or anything else
  alignas(vm::Pin) std::byte storage[sizeof(vm::Pin)];
  vm::Pin* pin() { return std::launder(reinterpret_cast<vm::Pin*>(storage)); }
};
static_assert(sizeof(PinRecord) <= sizeof(freehold_pin) && alignof(PinRecord) <= alignof(freehold_pin));

PinRecord& RecordOf(freehold_pin* pin) { return *reinterpret_cast<PinRecord*>(pin->opaque); }

// ---- Stacks ----

int Open(const freehold_stack_pool* handle, StackPool*& pool) {
  if (handle == nullptr) return EINVAL;
  if (handle->forks != forks.load(std::memory_order_relaxed)) return EOPNOTSUPP;
  pool = handle->pool;
  return 0;
}

// ---- Cancelling ----

static_assert(sizeof(std::atomic<bool>) == sizeof(freehold_cancel) &&
              alignof(std::atomic<bool>) == alignof(freehold_cancel) && std::atomic<bool>::is_always_lock_free);

// ---- Reports ----

freehold_mapping Describe(const vm::VmaInfo& vma) {
  freehold_mapping mapping = {};
  mapping.size = sizeof(mapping);
  mapping.address = vma.range.address();
  mapping.bytes = vma.range.bytes().value;
  mapping.protection = FromProtection(vma.protection);
  mapping.lock = static_cast<int>(vma.lock);
  mapping.huge_pages = vma.zone == vm::Zone::kDense ? 1 : 0;
  mapping.backed = vma.backing != nullptr ? 1 : 0;
  mapping.generation = vma.generation;
  mapping.offset = vma.backing_page * vm::kPageSize;
  return mapping;
}

freehold_statistics Describe(const vm::AddressSpaceStats& stats) {
  freehold_statistics statistics = {};
  statistics.reserved = stats.reserved.value;
  statistics.committed = stats.committed.value;
  statistics.mapped = stats.mapped.value;
  statistics.free_resident = stats.free_resident.value;
  statistics.metadata = stats.metadata.value;
  statistics.mappings = stats.vmas;
  statistics.maps = stats.maps;
  statistics.unmaps = stats.unmaps;
  statistics.deferred_unmaps = stats.deferred_unmaps;
  statistics.reuses = stats.reuses;
  statistics.purged_pages = stats.purged_pages;
  statistics.remap_moves = stats.remap_moves;
  statistics.windows = stats.windows;
  statistics.window_hits = stats.window_hits;
  return statistics;
}

struct Report {
  void (*write)(void* context, const char* line, std::size_t length);
  void* context;
};

std::uint64_t ValueOf(const vm::Metric& metric) {
  std::uint64_t sum = 0;
  const auto* at = static_cast<const std::byte*>(metric.first);
  for (std::uint32_t i = 0; i < metric.count; ++i, at += metric.stride) {
    sum += metric.width == sizeof(std::uint64_t)
               ? __atomic_load_n(reinterpret_cast<const std::uint64_t*>(at), __ATOMIC_RELAXED)
               : __atomic_load_n(reinterpret_cast<const std::uint32_t*>(at), __ATOMIC_RELAXED);
  }
  return sum * metric.scale;
}

void PrintMetric(void* to, const vm::Metric& metric) {
  const auto& report = *static_cast<const Report*>(to);
  char line[160];
  const std::size_t length = std::min<std::size_t>(metric.name.size(), 128);
  std::memcpy(line, metric.name.data(), length);
  char* end = line + length;
  *end++ = ' ';
  end = std::to_chars(end, line + sizeof(line) - 1, ValueOf(metric)).ptr;
  *end++ = '\n';
  report.write(report.context, line, static_cast<std::size_t>(end - line));
}

}  // namespace

extern "C" {

const char* freehold_version() { return freehold::runtime::kVersion; }

// ---- Spaces ----

freehold_space* freehold_process_space() {
  (void)process_runtime.EnsureStarted();
  if (!process_runtime.has_space()) return nullptr;
  // Everybody who stores it stores the same.
  process_space.space.store(&process_runtime.space(), std::memory_order_relaxed);
  return &process_space;
}

int freehold_space_create(const freehold_space_options* given, freehold_space** result) {
  freehold_space_options options;
  if (const int error = Read(given, options); error != 0) return error;
  const auto policy = ToLockPolicy(options.lock_policy);
  if (result == nullptr || !policy) return EINVAL;
  if (const int error = WatchForks(); error != 0) return error;

  vm::AddressSpaceOptions chosen;
  if (options.reserve != 0) chosen.reserve = {options.reserve};
  chosen.min_reserve = {options.min_reserve != 0 ? options.min_reserve
                                                 : std::min(chosen.min_reserve.value, chosen.reserve.value)};
  chosen.free_resident_limit = {Limit(options.free_resident_limit, chosen.free_resident_limit.value)};
  chosen.window_limit = {Limit(options.window_limit, chosen.window_limit.value)};
  chosen.decay = {Limit(options.decay, chosen.decay.value)};
  chosen.regions_per_zone = options.regions_per_zone;
  chosen.lock_policy = *policy;
  chosen.strict_unmap = options.strict_unmap != 0;

  void* memory = std::malloc(sizeof(freehold_space));
  if (memory == nullptr) return ENOMEM;
  const vm::Result<vm::AddressSpace*> space = vm::AddressSpace::Create(process_runtime.kernel(), chosen);
  if (!space.ok()) {
    std::free(memory);
    return Result(space.error());
  }
  auto* handle = new (memory) freehold_space;
  handle->space.store(*space, std::memory_order_relaxed);
  handle->forks = forks.load(std::memory_order_relaxed);
  *result = handle;
  return 0;
}

int freehold_space_destroy(freehold_space* handle) {
  vm::AddressSpace* space = nullptr;
  if (const int error = Open(handle, space); error != 0) return error;
  if (handle == &process_space) return EINVAL;
  vm::AddressSpace::Destroy(space);
  handle->~freehold_space();
  std::free(handle);
  return 0;
}

int freehold_space_contains(const freehold_space* handle, const void* address) {
  vm::AddressSpace* space = nullptr;
  return Open(handle, space) == 0 && space->Contains(address) ? 1 : 0;
}

int freehold_tick(freehold_space* handle) {
  vm::AddressSpace* space = nullptr;
  if (const int error = Open(handle, space); error != 0) return error;
  space->Tick();
  return 0;
}

int freehold_purge(freehold_space* handle, size_t* bytes) {
  vm::AddressSpace* space = nullptr;
  if (const int error = Open(handle, space); error != 0) return error;
  const vm::Pages purged = space->Purge(vm::PurgeScope::kAll);
  if (bytes != nullptr) *bytes = purged.bytes().value;
  return 0;
}

// ---- Limits ----

int freehold_set_memory_limits(const freehold_memory_limits* given) {
  freehold_memory_limits limits;
  if (given == nullptr) return EINVAL;
  if (const int error = Read(given, limits); error != 0) return error;
  if (freehold_process_space() == nullptr) return EOPNOTSUPP;
  process_runtime.limit().Set({.soft = {limits.soft}, .hard = {limits.hard}});
  return 0;
}

int freehold_get_memory_usage(freehold_memory_usage* result) {
  if (freehold_process_space() == nullptr) return EOPNOTSUPP;
  auto& limit = process_runtime.limit();
  const auto limits = limit.Get();
  freehold_memory_usage usage = {};
  usage.soft = limits.soft.value;
  usage.hard = limits.hard.value;
  usage.in_use = limit.InUse().value;
  usage.purges = limit.reliefs();
  usage.refusals = limit.refusals();
  return Write(usage, result);
}

freehold_out_of_memory_handler freehold_set_out_of_memory_handler(freehold_out_of_memory_handler handler) {
  return process_runtime.limit().SetHandler(handler);
}

// ---- Mapping ----

int freehold_map(freehold_space* handle, size_t bytes, const freehold_map_options* given, void** address) {
  freehold_map_options options;
  vm::AddressSpace* space = nullptr;
  if (const int error = Open(handle, space); error != 0) return error;
  if (const int error = Read(given, options); error != 0) return error;
  const auto placement = ToPlacement(options.placement);
  const auto protection =
      ToProtection(options.protection != 0 ? options.protection : FREEHOLD_READ | FREEHOLD_WRITE);
  const auto lock = ToMemoryLock(options.lock);
  const auto content = ToContent(options.content);
  if (address == nullptr || !placement || !protection || !lock || !content) return EINVAL;
  const std::size_t alignment = options.alignment != 0 ? options.alignment : vm::kPageSize;
  if (!std::has_single_bit(alignment) || alignment < vm::kPageSize) return EINVAL;
  const vm::Result<vm::Pages> count = ToPages(bytes);
  if (!count.ok()) return Result(count.error());
  const auto huge_pages = options.huge_pages != 0 ? vm::os::HugePages::kPrefer : vm::os::HugePages::kAvoid;
  const bool counts = *protection == vm::os::Protection::kReadWrite;
  const auto mapped = WithinLimit(LimitOf(handle), counts ? count->bytes() : vm::Bytes{0}, [&] {
    return space->Map(*count, {.placement = *placement,
                               .address = options.address,
                               .alignment = vm::PagesFor({alignment}),
                               .protection = *protection,
                               .content = *content,
                               .huge_pages = huge_pages,
                               .populate = options.populate != 0,
                               .lock = *lock});
  });
  if (!mapped) return ENOMEM;
  if (!mapped->ok()) return Result(mapped->error());
  *address = (*mapped)->address();
  return 0;
}

int freehold_map_file(freehold_space* handle, size_t bytes, int descriptor, uint64_t offset,
                      const freehold_file_options* given, void** address) {
  freehold_file_options options;
  vm::AddressSpace* space = nullptr;
  if (const int error = Open(handle, space); error != 0) return error;
  if (const int error = Read(given, options); error != 0) return error;
  const auto placement = ToPlacement(options.placement);
  const auto protection = ToProtection(options.protection != 0 ? options.protection : FREEHOLD_READ);
  const auto lock = ToMemoryLock(options.lock);
  if (address == nullptr || !placement || !protection || !lock) return EINVAL;
  const vm::Result<vm::Pages> count = ToPages(bytes);
  if (!count.ok()) return Result(count.error());
  const vm::Result<vm::PageRange> mapped =
      space->MapFile(*count, {.descriptor = descriptor,
                              .offset = {offset},
                              .sharing = options.shared != 0 ? vm::os::Sharing::kShared : vm::os::Sharing::kPrivate,
                              .protection = *protection,
                              .placement = *placement,
                              .address = options.address,
                              .populate = options.populate != 0,
                              .lock = *lock});
  if (!mapped.ok()) return Result(mapped.error());
  *address = mapped->address();
  return 0;
}

int freehold_sync(freehold_space* handle, void* address, size_t bytes) {
  return OnRange(handle, address, bytes,
                 [](vm::AddressSpace& space, vm::PageRange range) { return Result(space.Sync(range)); });
}

int freehold_unmap(freehold_space* handle, void* address, size_t bytes) {
  return OnRange(handle, address, bytes,
                 [](vm::AddressSpace& space, vm::PageRange range) { return Result(space.Unmap(range)); });
}

int freehold_protect(freehold_space* handle, void* address, size_t bytes, int protection) {
  return OnRange(handle, address, bytes, [protection](vm::AddressSpace& space, vm::PageRange range) {
    const auto chosen = ToProtection(protection);
    return chosen ? Result(space.Protect(range, *chosen)) : EINVAL;
  });
}

int freehold_remap(freehold_space* handle, void* address, size_t bytes, size_t new_bytes,
                   const freehold_remap_options* given, void** new_address) {
  return OnRange(handle, address, bytes, [=](vm::AddressSpace& space, vm::PageRange range) {
    freehold_remap_options options;
    if (const int error = Read(given, options); error != 0) return error;
    const auto placement = ToPlacement(options.placement);
    if (new_address == nullptr || !placement || *placement == vm::Placement::kHint) return EINVAL;
    const vm::Result<vm::Pages> count = ToPages(new_bytes);
    if (!count.ok()) return Result(count.error());
    const vm::Pages growth = *count - std::min(*count, range.count());
    const auto moved = WithinLimit(LimitOf(handle), growth.bytes(), [&] {
      return space.Remap(range, *count,
                         {.placement = *placement,
                          .address = options.address,
                          .may_move = options.may_move != 0,
                          .keep_source = options.keep_source != 0});
    });
    if (!moved) return ENOMEM;
    if (!moved->ok()) return Result(moved->error());
    *new_address = (*moved)->address();
    return 0;
  });
}

int freehold_advise(freehold_space* handle, void* address, size_t bytes, int advice) {
  return OnRange(handle, address, bytes, [advice](vm::AddressSpace& space, vm::PageRange range) {
    const auto chosen = ToAdvice(advice);
    return chosen ? Result(space.Advise(range, *chosen)) : EINVAL;
  });
}

int freehold_discard(freehold_space* handle, void* address, size_t bytes) {
  return OnRange(handle, address, bytes, [](vm::AddressSpace& space, vm::PageRange range) {
    return Result(space.Discard(absl::MakeConstSpan(&range, 1)));
  });
}

int freehold_lock_memory(freehold_space* handle, void* address, size_t bytes, int lock) {
  return OnRange(handle, address, bytes, [lock](vm::AddressSpace& space, vm::PageRange range) {
    const auto chosen = ToMemoryLock(lock);
    if (!chosen) return EINVAL;
    return Result(*chosen == vm::os::MemoryLock::kNone ? space.UnlockMemory(range) : space.LockMemory(range, *chosen));
  });
}

// ---- Populating ----

void freehold_cancel_request(freehold_cancel* cancel) {
  reinterpret_cast<std::atomic<bool>*>(cancel)->store(true, std::memory_order_relaxed);
}

int freehold_populate(freehold_space* handle, void* address, size_t bytes, const freehold_populate_options* given,
                      size_t* done) {
  return OnRange(handle, address, bytes, [=](vm::AddressSpace& space, vm::PageRange range) {
    freehold_populate_options options;
    if (const int error = Read(given, options); error != 0) return error;
    struct Progress {
      const freehold_populate_options& options;
      std::size_t done;
    } progress = {options, 0};
    const vm::Result<vm::Pages> populated =
        space.Populate(range, {.deadline = {options.deadline},
                               .cancel = reinterpret_cast<const std::atomic<bool>*>(options.cancel),
                               .progress =
                                   [](void* context, vm::Pages pages) {
                                     auto& progress = *static_cast<Progress*>(context);
                                     progress.done = pages.bytes().value;
                                     if (progress.options.progress != nullptr)
                                       progress.options.progress(progress.options.progress_context, progress.done);
                                   },
                               .progress_context = &progress});
    if (done != nullptr) *done = populated.ok() ? populated->bytes().value : progress.done;
    return Result(populated.error());
  });
}

int freehold_residency(const freehold_space* handle, const void* address, size_t bytes, unsigned char* resident) {
  return OnRange(handle, address, bytes, [resident](const vm::AddressSpace& space, vm::PageRange range) {
    return resident != nullptr ? Result(space.Residency(range, {resident, range.count().value})) : EINVAL;
  });
}

// ---- Pins ----

int freehold_pin_range(freehold_space* handle, void* address, size_t bytes, freehold_pin* pin) {
  return OnRange(handle, address, bytes, [pin](vm::AddressSpace& space, vm::PageRange range) {
    if (pin == nullptr || RecordOf(pin).state == PinRecord::kPinning) return EINVAL;
    PinRecord& record = RecordOf(pin);
    const vm::Pin* made = new (record.storage) vm::Pin(space, range);
    const int error = Result(made->error());
    if (error == 0) {
      record.state = PinRecord::kPinning;
    } else {
      made->~Pin();
    }
    return error;
  });
}

int freehold_unpin(freehold_pin* pin) {
  if (pin == nullptr || RecordOf(pin).state != PinRecord::kPinning) return EINVAL;
  RecordOf(pin).state = 0;
  RecordOf(pin).pin()->~Pin();
  return 0;
}

// ---- Stacks ----

int freehold_stack_pool_create(freehold_space* handle, freehold_stack_pool** result) {
  vm::AddressSpace* space = nullptr;
  if (const int error = Open(handle, space); error != 0) return error;
  if (result == nullptr) return EINVAL;
  if (const int error = WatchForks(); error != 0) return error;
  auto* made = static_cast<freehold_stack_pool*>(std::malloc(sizeof(freehold_stack_pool)));
  if (made == nullptr) return ENOMEM;
  const vm::Result<StackPool*> pool = StackPool::Create(*space);
  if (!pool.ok()) {
    std::free(made);
    return Result(pool.error());
  }
  *made = {*pool, forks.load(std::memory_order_relaxed)};
  *result = made;
  return 0;
}

int freehold_stack_pool_destroy(freehold_stack_pool* handle) {
  StackPool* pool = nullptr;
  if (const int error = Open(handle, pool); error != 0) return error;
  StackPool::Destroy(pool);
  std::free(handle);
  return 0;
}

int freehold_stack_acquire(freehold_stack_pool* handle, size_t bytes, size_t guard, freehold_stack** stack) {
  StackPool* pool = nullptr;
  if (const int error = Open(handle, pool); error != 0) return error;
  const vm::Result<vm::Pages> size = ToPages(bytes);
  const vm::Result<vm::Pages> below = ToPages(std::max(guard, vm::kPageSize));
  if (stack == nullptr) return EINVAL;
  if (!size.ok() || !below.ok()) return Result(!size.ok() ? size.error() : below.error());
  const vm::Result<StackSlot*> slot = pool->Acquire(size->bytes(), below->bytes());
  if (!slot.ok()) return Result(slot.error());
  *stack = reinterpret_cast<freehold_stack*>(*slot);
  return 0;
}

int freehold_stack_range(const freehold_stack* stack, void** address, size_t* bytes) {
  if (stack == nullptr || address == nullptr || bytes == nullptr) return EINVAL;
  const vm::PageRange range = reinterpret_cast<const StackSlot*>(stack)->stack();
  *address = range.address();
  *bytes = range.bytes().value;
  return 0;
}

int freehold_stack_release(freehold_stack_pool* handle, freehold_stack* stack) {
  StackPool* pool = nullptr;
  if (const int error = Open(handle, pool); error != 0) return error;
  if (stack == nullptr) return EINVAL;
  pool->Release(reinterpret_cast<StackSlot*>(stack));
  return 0;
}

// ---- Looking ----

int freehold_lookup(const freehold_space* handle, const void* address, freehold_mapping* mapping) {
  vm::AddressSpace* space = nullptr;
  if (const int error = Open(handle, space); error != 0) return error;
  const vm::Result<vm::VmaInfo> vma = space->Lookup(vm::PageNumber::Of(address));
  return vma.ok() ? Write(Describe(*vma), mapping) : Result(vma.error());
}

int freehold_for_each_mapping(const freehold_space* handle,
                              void (*visit)(void* context, const freehold_mapping* mapping), void* context) {
  vm::AddressSpace* space = nullptr;
  if (const int error = Open(handle, space); error != 0) return error;
  if (visit == nullptr) return EINVAL;
  struct Visitor {
    void (*visit)(void* context, const freehold_mapping* mapping);
    void* context;
  } visitor = {visit, context};
  space->ForEachVma(
      [](void* to, const vm::VmaInfo& vma) {
        const auto& visitor = *static_cast<const Visitor*>(to);
        const freehold_mapping mapping = Describe(vma);
        visitor.visit(visitor.context, &mapping);
      },
      &visitor);
  return 0;
}

int freehold_get_statistics(const freehold_space* handle, freehold_statistics* result) {
  vm::AddressSpace* space = nullptr;
  if (const int error = Open(handle, space); error != 0) return error;
  return Write(Describe(space->Stats()), result);
}

int freehold_get_heap_statistics(freehold_heap_statistics* result) {
  if (process_runtime.EnsureStarted() != Server::kFreehold) return EOPNOTSUPP;
  return Write(Describe(process_runtime.heap().Stats()), result);
}

int freehold_heap_profile_write(int descriptor) { return freehold::runtime::WriteHeapProfile(descriptor); }

int freehold_heap_profile_save(const char* path) {
  return path == nullptr ? EINVAL : freehold::runtime::SaveHeapProfile(path);
}

int freehold_print(freehold_space* handle, void (*write)(void* context, const char* line, size_t length),
                   void* context) {
  vm::AddressSpace* space = nullptr;
  if (const int error = Open(handle, space); error != 0) return error;
  if (write == nullptr) return EINVAL;
  Report report = {write, context};
  space->ForEachMetric(PrintMetric, &report);
  if (handle == &process_space && process_runtime.server() == Server::kFreehold)
    process_runtime.heap().ForEachMetric(PrintMetric, &report);
  write(context, "\n", 1);
  space->WriteMaps(
      [](void* to, std::string_view line) {
        const auto& report = *static_cast<const Report*>(to);
        report.write(report.context, line.data(), line.size());
      },
      &report);
  return 0;
}

int freehold_print_statistics(const freehold_statistics_options* given,
                              void (*write)(void* context, const char* text, size_t length), void* context) {
  using freehold::runtime::StatisticsFormat;
  freehold_statistics_options options;
  if (const int error = Read(given, options); error != 0) return error;
  if (write == nullptr || options.format < FREEHOLD_TEXT || options.format > FREEHOLD_PROMETHEUS) return EINVAL;
  (void)process_runtime.EnsureStarted();
  if (!process_runtime.has_space()) return EOPNOTSUPP;
  freehold::runtime::WriteStatistics(
      {.format = static_cast<StatisticsFormat>(options.format), .huge_pages = options.huge_pages != 0},
      [&](std::string_view text) { write(context, text.data(), text.size()); });
  return 0;
}

}  // extern "C"
