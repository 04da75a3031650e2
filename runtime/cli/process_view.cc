#include "runtime/cli/process_view.h"

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <fstream>
#include <memory>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "vm/vma.h"
#include "vm/vma_tree.h"

namespace freehold::cli {
namespace {

using runtime::TelemetryPage;

// What one process_vm_readv takes.
constexpr std::size_t kVector = 1024;

absl::Status Ended(pid_t pid) { return absl::NotFoundError(absl::StrCat("process ", pid, " has ended")); }

absl::Status NotPermitted(pid_t pid) {
  return absl::PermissionDeniedError(
      absl::StrCat("process ", pid, " may not be looked at: it takes what a debugger may do; be its user and see ",
                   "kernel.yama.ptrace_scope, or be root"));
}

absl::Status StatusOf(int error, pid_t pid) {
  switch (error) {
    case ESRCH: return Ended(pid);
    case EPERM:
    case EACCES: return NotPermitted(pid);
    // The memory is gone: the process execs or exits.
    case EFAULT: return absl::UnavailableError(absl::StrCat("process ", pid, " is ending, or becomes another program"));
    default: return absl::InternalError(absl::StrCat("process ", pid, " cannot be read: ", std::strerror(error)));
  }
}

std::string FirstLine(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// Where the telemetry page lies; 0 if there is none.
absl::StatusOr<std::uint64_t> FindPage(pid_t pid) {
  std::ifstream maps(absl::StrCat("/proc/", pid, "/maps"));
  if (!maps) return StatusOf(errno == ENOENT ? ESRCH : errno, pid);
  const std::string name = absl::StrCat("/memfd:", TelemetryPage::kName);
  for (std::string line; std::getline(maps, line);) {
    if (!absl::StrContains(line, name)) continue;
    std::uint64_t first;
    if (absl::SimpleHexAtoi(line.substr(0, line.find('-')), &first)) return first;
  }
  // A process that may not be read shows an empty file, or none.
  if (maps.bad()) return StatusOf(EACCES, pid);
  return 0;
}

}  // namespace

absl::StatusOr<ProcessView> ProcessView::Open(pid_t pid) {
  const std::string name = FirstLine(absl::StrCat("/proc/", pid, "/comm"));
  if (name.empty()) return absl::NotFoundError(absl::StrCat("there is no process ", pid));
  ProcessView view(pid, name);
  const absl::StatusOr<std::uint64_t> page = FindPage(pid);
  if (!page.ok()) return page.status();
  if (*page == 0) {
    return absl::FailedPreconditionError(absl::StrCat("process ", pid, " (", name,
                                                      ") does not run on Freehold, or with FREEHOLD_TELEMETRY=0"));
  }
  if (const absl::Status status = view.ReadPage(*page); !status.ok()) return status;
  return view;
}

absl::Status ProcessView::Read(std::uint64_t address, void* to, std::size_t bytes) const {
  const iovec local = {to, bytes};
  const iovec remote = {reinterpret_cast<void*>(address), bytes};
  const ssize_t got = process_vm_readv(pid_, &local, 1, &remote, 1, 0);
  if (got < 0) return StatusOf(errno, pid_);
  if (static_cast<std::size_t>(got) != bytes) return StatusOf(EFAULT, pid_);
  return absl::OkStatus();
}

absl::Status ProcessView::ReadPage(std::uint64_t address) {
  const auto page = std::make_unique<TelemetryPage>();
  // The head first: of another version nothing else may be there.
  if (const absl::Status status = Read(address, page.get(), offsetof(TelemetryPage, layout)); !status.ok()) return status;
  if (page->magic.load() != TelemetryPage::kMagic) {
    return absl::UnavailableError(absl::StrCat("process ", pid_, " is only starting; try again"));
  }
  if (page->version != TelemetryPage::kVersion || page->bytes != sizeof(TelemetryPage)) {
    return absl::FailedPreconditionError(absl::StrCat("process ", pid_, " runs another release of Freehold (page version ",
                                                      page->version, ", here ", TelemetryPage::kVersion,
                                                      "): use its `freehold`"));
  }
  if (const absl::Status status = Read(address, page.get(), sizeof(*page)); !status.ok()) return status;
  const std::uint64_t metrics = page->metric_count.load();
  if (metrics > TelemetryPage::kMaxMetrics || page->region_count > vm::kMaxRegions) {
    return absl::DataLossError(absl::StrCat("the telemetry page of process ", pid_, " was overwritten"));
  }
  page_ = {.layout = page->layout,
           .started = page->started,
           .lock_policy = page->lock_policy,
           .lock_times = page->lock_times,
           .release = std::string(page->release, strnlen(page->release, sizeof(page->release))),
           .metrics = {page->metrics, page->metrics + metrics},
           .regions = {page->regions, page->regions + page->region_count}};
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ProcessView::Metric>> ProcessView::ReadMetrics() const {
  std::vector<iovec> remote;
  std::size_t numbers = 0;
  for (const TelemetryPage::Metric& metric : page_.metrics) {
    for (std::uint32_t i = 0; i < metric.count; ++i) {
      remote.push_back({reinterpret_cast<void*>(metric.first + i * metric.stride), metric.width});
    }
    numbers += metric.count;
  }
  // Each in a word of its own, of which little-endian numbers fill the start.
  std::vector<std::uint64_t> values(numbers);
  for (std::size_t begin = 0; begin < numbers; begin += kVector) {
    const std::size_t size = std::min(kVector, numbers - begin);
    std::vector<iovec> local(size);
    std::size_t wanted = 0;
    for (std::size_t i = 0; i < size; ++i) {
      local[i] = {&values[begin + i], remote[begin + i].iov_len};
      wanted += local[i].iov_len;
    }
    const ssize_t got = process_vm_readv(pid_, local.data(), size, &remote[begin], size, 0);
    if (got < 0) return StatusOf(errno, pid_);
    if (static_cast<std::size_t>(got) != wanted) return StatusOf(EFAULT, pid_);
  }
  std::vector<Metric> metrics;
  auto next = values.begin();
  for (const TelemetryPage::Metric& row : page_.metrics) {
    Metric metric = {.name = row.name, .help = row.help, .kind = row.kind, .by_region = {}};
    for (std::uint32_t i = 0; i < row.count; ++i) {
      const std::uint64_t value = *next++ * row.scale;
      metric.value += value;
      if (row.of_regions != 0) metric.by_region.push_back(value);
    }
    metrics.push_back(std::move(metric));
  }
  return metrics;
}

std::vector<ProcessView::Region> ProcessView::Regions() const {
  std::vector<Region> regions;
  for (const TelemetryPage::Region& region : page_.regions) {
    regions.push_back({.zone = static_cast<vm::Zone>(region.zone),
                       .range = vm::PageRange::Of({region.first_page}, {region.pages})});
  }
  return regions;
}

absl::Status ProcessView::CheckLayout() const {
  if (page_.layout == runtime::LayoutOfVmas()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("process ", pid_, " runs another build of Freehold (", page_.release,
                                                    "), whose structures are unknown here: use its `freehold`"));
}

absl::StatusOr<std::vector<ProcessView::OperationTimes>> ProcessView::ReadLockTimes() const {
  std::vector<OperationTimes> result;
  if (!records_lock_times()) return result;
  if (const absl::Status status = CheckLayout(); !status.ok()) return status;
  // Counters without pointers: a copy serves as the original.
  const auto recorder = std::make_unique<vm::sync::LockTimesRecorder>();
  const absl::Status status = Read(page_.lock_times, static_cast<void*>(recorder.get()), sizeof(*recorder));
  if (!status.ok()) return status;
  for (std::size_t i = 0; i < vm::sync::kOperations; ++i) {
    const auto operation = static_cast<vm::sync::Operation>(i);
    const vm::sync::LockTimes times = recorder->Read(operation);
    if (times.waits.count() != 0) result.push_back({operation, times});
  }
  return result;
}

// ---- VMAs ----

// Goes through the tree of one region as VmaTree::Lookup does: a node is believed if its version was even and is the
// same after it was copied, an extent likewise by its sequence. If one is not, the walk goes on from the root, at the first
// page that was not reported yet; after kAttempts without luck, with what it gets.
class VmaWalk {
 public:
  VmaWalk(const ProcessView& view, const TelemetryPage::Region& region, std::vector<ProcessView::MappedVma>& out)
      : view_(view), region_(region), out_(out) {}

  absl::Status Run() {
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      std::uint64_t root = 0;
      if (const absl::Status status = view_.Read(region_.tree, &root, sizeof(root)); !status.ok()) return status;
      if (root == 0) continue;  // a transaction is being published
      last_attempt_ = attempt == kAttempts - 1;
      const absl::StatusOr<bool> done = VisitNode(root, 0);
      if (!done.ok()) return done.status();
      if (*done) break;
    }
    return absl::OkStatus();
  }

 private:
  using Node = vm::VmaTree::Node;
  static constexpr int kAttempts = 16;

  // The words of a node, without its atomics.
  struct NodeCopy {
    alignas(Node) std::array<std::byte, sizeof(Node)> bytes;
    const Node& get() const { return *reinterpret_cast<const Node*>(bytes.data()); }
  };
  struct VmaCopy {
    alignas(vm::Vma) std::array<std::byte, sizeof(vm::Vma)> bytes;
    const vm::Vma& get() const { return *reinterpret_cast<const vm::Vma*>(bytes.data()); }
  };

  // Copies the objects at `addresses`, and the version that each begins with, before and after. One call reads in
  // order.
  template <typename T>
  absl::Status ReadBetween(absl::Span<const std::uint64_t> addresses, std::byte* copies, std::uint32_t* before,
                           std::uint32_t* after) const {
    std::vector<iovec> local, remote;
    const auto add = [&](const auto& to, std::size_t bytes) {
      for (std::size_t i = 0; i < addresses.size(); ++i) {
        local.push_back({to(i), bytes});
        remote.push_back({reinterpret_cast<void*>(addresses[i]), bytes});
      }
    };
    add([&](std::size_t i) { return before + i; }, sizeof(*before));
    add([&](std::size_t i) { return copies + i * sizeof(T); }, sizeof(T));
    add([&](std::size_t i) { return after + i; }, sizeof(*after));
    const ssize_t got = process_vm_readv(view_.pid_, local.data(), local.size(), remote.data(), remote.size(), 0);
    if (got < 0) return StatusOf(errno, view_.pid_);
    const std::size_t wanted = addresses.size() * (sizeof(T) + 2 * sizeof(*before));
    return static_cast<std::size_t>(got) == wanted ? absl::OkStatus() : StatusOf(EFAULT, view_.pid_);
  }

  // False: it changed meanwhile, so that the walk has to go on from the root.
  absl::StatusOr<bool> VisitNode(std::uint64_t address, int depth) {
    if (depth >= vm::VmaTree::kMaxDepth) return false;
    NodeCopy copy;
    std::uint32_t before = 0, after = 0;
    const std::uint64_t node_address[] = {address};
    const absl::Status status = ReadBetween<Node>(node_address, copy.bytes.data(), &before, &after);
    if (!status.ok()) return status;
    const Node& node = copy.get();
    if ((before != after || (before & 1) != 0) && !last_attempt_) return false;
    const int count = std::min<int>(node.count.load(std::memory_order_relaxed), vm::VmaTree::kFanout);
    std::vector<std::uint64_t> entries;
    for (int i = 0; i < count; ++i) {
      // What lies below the next key was reported already.
      if (i + 1 < count && node.key[i + 1].load(std::memory_order_relaxed) <= next_) continue;
      entries.push_back(reinterpret_cast<std::uint64_t>(node.entry[i].load(std::memory_order_relaxed)));
    }
    if (node.height.load(std::memory_order_relaxed) == 0) return VisitLeaf(entries);
    for (const std::uint64_t child : entries) {
      const absl::StatusOr<bool> done = VisitNode(child, depth + 1);
      if (!done.ok() || !*done) return done;
    }
    return true;
  }

  absl::StatusOr<bool> VisitLeaf(absl::Span<const std::uint64_t> entries) {
    if (entries.empty()) return true;
    std::vector<VmaCopy> vmas(entries.size());
    std::vector<std::uint32_t> before(entries.size()), after(entries.size());
    const absl::Status status = ReadBetween<vm::Vma>(entries, vmas.data()->bytes.data(), before.data(), after.data());
    if (!status.ok()) return status;
    for (std::size_t i = 0; i < entries.size(); ++i) {
      const vm::Vma& vma = vmas[i].get();
      if ((before[i] != after[i] || (before[i] & 1) != 0) && !last_attempt_) return false;
      Report(vma);
    }
    return true;
  }

  void Report(const vm::Vma& vma) {
    const vm::RegionPage first = std::max(vma.first_page(), next_);
    if (vma.end_page() <= first || vma.end_page() > region_.pages) return;
    next_ = vma.end_page();
    if (!vma.Is(vm::VmaState::kMapped)) return;
    const vm::VmaAttributes attributes = vma.attributes();
    out_.push_back({.range = vm::PageRange::Of({region_.first_page + first}, {next_ - first}),
                    .protection = attributes.protection,
                    .zone = static_cast<vm::Zone>(region_.zone),
                    .locked = attributes.lock != vm::os::MemoryLock::kNone,
                    .backed = attributes.backing != nullptr,
                    .generation = attributes.generation});
  }

  const ProcessView& view_;
  const TelemetryPage::Region& region_;
  std::vector<ProcessView::MappedVma>& out_;
  vm::RegionPage next_ = 0;  // everything below is reported
  bool last_attempt_ = false;
};

absl::StatusOr<std::vector<ProcessView::MappedVma>> ProcessView::ReadVmas() const {
  if (const absl::Status status = CheckLayout(); !status.ok()) return status;
  std::vector<MappedVma> vmas;
  for (const TelemetryPage::Region& region : page_.regions) {
    if (const absl::Status status = VmaWalk(*this, region, vmas).Run(); !status.ok()) return status;
  }
  return vmas;
}

double ProcessView::uptime_seconds() const {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) / 1e9 -
         static_cast<double>(page_.started) / 1e9;
}

absl::string_view ProcessView::lock_policy() const {
  return vm::sync::ToString(static_cast<vm::sync::LockPolicy>(page_.lock_policy));
}

}  // namespace freehold::cli
