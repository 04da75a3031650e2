#include "runtime/runtime.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstddef>

#include "runtime/cgroup.h"
#include "runtime/guard_report.h"
#include "runtime/hardening.h"
#include "runtime/heap_profile_file.h"
#include "runtime/message.h"
#include "runtime/stack_trace.h"
#include "runtime/thread.h"
#include "vm/os/futex.h"
#include "vm/os/raw_syscall.h"
#include "vm/os/valgrind.h"

namespace freehold::runtime {
namespace {

using vm::Bytes;

// Less is not worth a heap of its own. Without a limit on address space there is much more: what is
// then missing is wrong with the machine, and worth a message.
constexpr Bytes kMinReserve = vm::MiB(64);
constexpr Bytes kMinReserveUnlimited = vm::GiB(64);
// A smaller space is cut into few regions, because an object fits into one region.
constexpr Bytes kFewRegions = vm::GiB(64);
// One thread's share of a small space, for the table of threads.
constexpr Bytes kSpacePerThread = vm::KiB(256);
constexpr std::uint32_t kMinThreads = 1024;

// RLIMIT_AS in bytes.
std::uint64_t AddressSpaceLimit() {
  rlimit limit = {RLIM_INFINITY, RLIM_INFINITY};
  vm::os::RawSyscall(SYS_prlimit64, 0, RLIMIT_AS, nullptr, &limit);
  return limit.rlim_cur;
}

// The address space that this process uses, from the first number in /proc/self/statm; a guess
// without it.
std::uint64_t AddressSpaceUsed() {
  constexpr std::uint64_t kGuess = vm::MiB(32).value;
  const long fd =
      vm::os::RawSyscall(SYS_openat, AT_FDCWD, "/proc/self/statm", O_RDONLY | O_CLOEXEC);
  if (vm::os::SyscallFailed(fd)) return kGuess;
  char text[64];
  const long size = vm::os::RawSyscall(SYS_read, fd, text, sizeof(text));
  vm::os::RawSyscall(SYS_close, fd);
  std::uint64_t pages = 0;
  for (long i = 0; i < size && text[i] >= '0' && text[i] <= '9'; ++i) {
    pages = pages * 10 + static_cast<std::uint64_t>(text[i] - '0');
  }
  return pages != 0 ? pages * vm::kPageSize : kGuess;
}

vm::AddressSpaceOptions SpaceOptions(const Config& config) {
  const std::uint64_t limit = AddressSpaceLimit();
  vm::AddressSpaceOptions options;
  options.reserve = limit == RLIM_INFINITY
                        ? config.reserve
                        : ReserveWithin(config.reserve, limit, AddressSpaceUsed());
  options.min_reserve =
      std::min(limit == RLIM_INFINITY ? kMinReserveUnlimited : kMinReserve, config.reserve);
  options.lock_policy = config.lock_policy;
  options.regions_per_zone = options.reserve < kFewRegions ? 1 : 0;
  options.strict_unmap = config.strict_unmap;
  options.free_resident_limit = config.free_resident_limit;
  options.window_limit = config.window_limit;
  options.decay = config.decay;
  options.record_range_locks = config.record_range_locks;
  return options;
}

allocator::ObjectHeapOptions HeapOptions(const Config& config, const vm::AddressSpace& space,
                                         allocator::MemoryLimit& limit) {
  allocator::ObjectHeapOptions options;
  options.limit = &limit;
  // The heap gives back after one to two times its decay.
  options.decay = {config.decay.value / 2};
  options.huge_pages = config.heap_huge_pages ? vm::os::HugePages::kPrefer : vm::os::HugePages::kAvoid;
  const std::size_t share = space.reservation().bytes().value / kSpacePerThread.value;
  options.profile = {.interval = ProfileInterval(config), .capture = CaptureStack};
  options.guards = {.interval = config.guard_pages,
                    .slots = config.guard_slots,
                    .capture = CaptureStack,
                    .explain = ExplainGuardedObject};
  options.max_threads = static_cast<std::uint32_t>(
      std::clamp<std::size_t>(share, kMinThreads, allocator::ObjectHeapOptions{}.max_threads));
  return options;
}

void ReportFailure(const Config& config, vm::Error error) {
  Message message;
  message.Append("cannot reserve address space: ").Append(vm::ToString(error.code));
  if (error.sys_errno != 0)
    message.Append(" (errno ").AppendNumber(static_cast<unsigned>(error.sys_errno)).Append(")");
  message.Append("; FREEHOLD_RESERVE is ").AppendBytes(config.reserve);
  if (const std::uint64_t limit = AddressSpaceLimit(); limit != RLIM_INFINITY) {
    message.Append(", and the process may have ")
        .AppendNumber(limit >> 20)
        .Append("M in all (ulimit -v)");
  }
  message.Append("; libc serves malloc instead");
  message.Report();
}

void ReportStepAside() {
  Message message;
  message.Append("process ").AppendNumber(static_cast<std::uint64_t>(vm::os::RawSyscall(SYS_getpid)));
  message.Append(": runs under valgrind, which Freehold leaves all memory to").Report();
}

void ReportStart(const Config& config, const vm::AddressSpace& space) {
  Message message;
  message.Append("process ")
      .AppendNumber(static_cast<std::uint64_t>(vm::os::RawSyscall(SYS_getpid)));
  message.Append(": reserved ").AppendBytes(space.reservation().bytes()).Append(" at ");
  message.AppendHex(space.reservation().first.value << vm::kPageShift);
  for (const Option& option : Options()) {
    if (option.load == nullptr) continue;
    message.Append(", ").Append(option.name).Append(" ");
    AppendValue(option, config, message);
  }
  message.Report();
}

}  // namespace

constinit Runtime process_runtime;

Bytes ReserveWithin(Bytes wanted, std::uint64_t limit, std::uint64_t used) {
  const std::uint64_t room = limit > used ? limit - used : 0;
  return std::min(wanted, Bytes{room / 4 * 3});
}

Server Runtime::Start(const char* const* environment) {
  // The state is the word that waiting threads sleep on.
  auto* word = reinterpret_cast<std::atomic<std::uint32_t>*>(&server_);
  static_assert(sizeof(server_) == sizeof(*word));
  Server server = Server::kUndecided;
  if (server_.compare_exchange_strong(server, Server::kStarting, std::memory_order_acquire)) {
    config_ = LoadConfig(environment);
    server = StartFreehold();
    // Release pairs with the acquires in EnsureStarted and below.
    server_.store(server, std::memory_order_release);
    vm::os::FutexWake(word, INT32_MAX);
    return server;
  }
  while ((server = server_.load(std::memory_order_acquire)) == Server::kStarting) {
    vm::os::FutexWait(word, static_cast<std::uint32_t>(Server::kStarting));
  }
  return server;
}

bool Runtime::StartSpace() {
  const vm::Result<vm::AddressSpace*> space = vm::AddressSpace::Create(kernel_, SpaceOptions(config_));
  if (!space.ok()) {
    ReportFailure(config_, space.error());
    return false;
  }
  space_ = *space;
  limit_.Init(*space_);
  return true;
}

void Runtime::ResolveLimits() {
  if (config_.soft_limit != kCgroupLimit && config_.hard_limit != kCgroupLimit) return;
  const CgroupLimits limits = ReadCgroupLimits();
  if (config_.soft_limit == kCgroupLimit) config_.soft_limit = SoftLimitFor(limits);
  if (config_.hard_limit == kCgroupLimit) config_.hard_limit = HardLimitFor(limits);
}

bool Runtime::StartHeap() {
  const vm::Result<allocator::ObjectHeap*> heap =
      allocator::ObjectHeap::Create(*space_, HeapOptions(config_, *space_, limit_));
  if (!heap.ok()) {
    ReportFailure(config_, heap.error());
    return false;
  }
  heap_ = *heap;
  limited_heap_.heap = heap_;
  limit_.Add(limited_heap_);
  return true;
}

Server Runtime::StartFreehold() {
  // Its tools follow libc's malloc and the kernel's mmap, and it has no room for a reservation.
  if (vm::os::RunsUnderValgrind()) {
    if (config_.verbose) ReportStepAside();
    return Server::kLibc;
  }
  const bool mallocs = config_.malloc == MallocChoice::kFreehold;
  const bool maps = config_.mmap && &has_mmap_shim != nullptr;
  if (!(mallocs || maps) || !StartSpace()) return Server::kLibc;
  if (mallocs && !StartHeap()) {
    vm::AddressSpace::Destroy(space_);
    space_ = nullptr;
    return Server::kLibc;
  }
  ResolveLimits();
  limit_.Set({.soft = config_.soft_limit, .hard = config_.hard_limit});
  serves_mappings_ = maps;
  if (maps) {
    // mimalloc asks for aligned memory by asking for addresses.
    mappings_.Init(*space_, {.follow_hints = config_.malloc != MallocChoice::kMimalloc,
                             .map_files = config_.window_limit.value != 0,
                             .limit = &limit_});
  }
  if (config_.telemetry && !telemetry_.Publish(*space_, heap_, kernel_) && config_.verbose) {
    Message().Append("the system refuses the telemetry page: `freehold stat` and the like see nothing").Report();
  }
  if (mallocs) {
    SetHardening({.zero_on_free = config_.zero_on_free,
                  .random_placement = config_.random_placement,
                  .quarantine = config_.quarantine});
    WatchThreadExits();
  }
  if (config_.verbose) ReportStart(config_, *space_);
  return mallocs ? Server::kFreehold : Server::kLibc;
}

}  // namespace freehold::runtime
