#include "runtime/cli/process_view.h"

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <fstream>
#include <limits>
#include <memory>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
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

// The program's name, of which a program may make what it likes: "" if there is no such process.
std::string NameOf(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/comm"));
  std::string name;
  std::getline(file, name);
  for (char& c : name) {
    if (!absl::ascii_isprint(static_cast<unsigned char>(c))) c = '?';
  }
  return name;
}

// Dead, but not yet waited for by its parent.
bool IsZombie(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  std::string line;
  std::getline(file, line);
  const std::size_t end_of_name = line.rfind(") ");
  return end_of_name == std::string::npos || line[end_of_name + 2] == 'Z' || line[end_of_name + 2] == 'X';
}

// Where the telemetry page lies; 0 if there is none.
absl::StatusOr<std::uint64_t> FindPage(pid_t pid) {
  errno = 0;
  std::ifstream maps(absl::StrCat("/proc/", pid, "/maps"));
  if (!maps) return StatusOf(errno == ENOENT ? ESRCH : errno, pid);
  const std::string name = absl::StrCat(" /memfd:", TelemetryPage::kName, " (deleted)");
  for (std::string line; std::getline(maps, line);) {
    std::uint64_t first;
    if (absl::EndsWith(line, name) && absl::SimpleHexAtoi(line.substr(0, line.find('-')), &first)) return first;
  }
  if (maps.bad() || IsZombie(pid)) return Ended(pid);
  return 0;
}

// What the rest relies on, as the page is the process's to write.
bool IsSound(const TelemetryPage::Metric& row) {
  static constexpr std::uint32_t kMaxCount = 4096;  // more than shards and regions
  const auto ends = [](const auto& text) { return std::memchr(text, '\0', sizeof(text)) != nullptr; };
  if (!ends(row.name) || !ends(row.help) || row.name[0] == '\0') return false;
  const absl::string_view name = row.name;
  const absl::string_view help = row.help;
  return std::all_of(name.begin(), name.end(), [](char c) { return absl::ascii_isalnum(c) || c == '_'; }) &&
         std::all_of(help.begin(), help.end(), [](char c) { return absl::ascii_isprint(c) && c != '\\'; }) &&
         row.width >= 1 && row.width <= sizeof(std::uint64_t) && row.count <= kMaxCount;
}

// In ascending order, as a space has them. `end` is of the one before.
bool IsSound(const TelemetryPage::Region& region, std::uint64_t end) {
  constexpr std::uint64_t kPages = std::uint64_t{1} << (64 - vm::kPageShift);
  return region.first_page >= end && region.first_page < kPages && region.pages != 0 &&
         region.pages <= std::numeric_limits<vm::RegionPage>::max() && region.zone <= 2;
}

bool IsSound(const TelemetryPage& page) {
  if (page.metric_count.load() > TelemetryPage::kMaxMetrics) return false;
  if (page.region_count == 0 || page.region_count > vm::kMaxRegions) return false;
  std::uint64_t end = 0;
  for (std::uint64_t i = 0; i < page.region_count; ++i) {
    if (!IsSound(page.regions[i], end)) return false;
    end = page.regions[i].first_page + page.regions[i].pages;
  }
  return std::all_of(page.metrics, page.metrics + page.metric_count.load(),
                     [](const TelemetryPage::Metric& row) { return IsSound(row); });
}

}  // namespace

absl::StatusOr<ProcessView> ProcessView::Open(pid_t pid) {
  ProcessView view(pid);
  view.name_ = NameOf(pid);
  if (view.name_.empty()) return absl::NotFoundError(absl::StrCat("there is no process ", pid));
  const absl::StatusOr<std::uint64_t> page = FindPage(pid);
  if (!page.ok()) return page.status();
  if (*page == 0) {
    return absl::FailedPreconditionError(absl::StrCat("process ", pid, " (", view.name_,
                                                      ") does not run on Freehold, or with FREEHOLD_TELEMETRY=0"));
  }
  if (const absl::Status status = view.ReadPage(*page); !status.ok()) return status;
  return view;
}

absl::Status ProcessView::Read(std::uint64_t address, void* to, std::size_t bytes) const {
  const Piece piece[] = {{address, to, bytes}};
  return ReadEach(piece);
}

absl::Status ProcessView::ReadEach(absl::Span<const Piece> pieces) const {
  for (; !pieces.empty(); pieces.remove_prefix(std::min(kVector, pieces.size()))) {
    const absl::Span<const Piece> some = pieces.subspan(0, kVector);
    std::vector<iovec> local, remote;
    std::size_t wanted = 0;
    for (const Piece& piece : some) {
      local.push_back({piece.to, piece.bytes});
      remote.push_back({reinterpret_cast<void*>(piece.address), piece.bytes});
      wanted += piece.bytes;
    }
    const ssize_t got = process_vm_readv(pid_, local.data(), local.size(), remote.data(), remote.size(), 0);
    if (got < 0) return StatusOf(errno, pid_);
    if (static_cast<std::size_t>(got) != wanted) return StatusOf(EFAULT, pid_);
  }
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
  if (!IsSound(*page)) {
    return absl::DataLossError(absl::StrCat("the telemetry page of process ", pid_, " was overwritten"));
  }
  page_ = {.layout = page->layout,
           .started = page->started,
           .lock_policy = page->lock_policy,
           .lock_times = page->lock_times,
           .heap = page->heap,
           .release = std::string(page->release, strnlen(page->release, sizeof(page->release))),
           .metrics = {page->metrics, page->metrics + page->metric_count.load()},
           .regions = {page->regions, page->regions + page->region_count}};
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ProcessView::Metric>> ProcessView::ReadMetrics() const {
  std::size_t numbers = 0;
  for (const TelemetryPage::Metric& metric : page_.metrics) numbers += metric.count;
  // Each in a word of its own, of which little-endian numbers fill the start.
  std::vector<std::uint64_t> values(numbers);
  std::vector<Piece> pieces;
  for (const TelemetryPage::Metric& metric : page_.metrics) {
    for (std::uint32_t i = 0; i < metric.count; ++i) {
      pieces.push_back({metric.first + i * metric.stride, &values[pieces.size()], metric.width});
    }
  }
  if (const absl::Status status = ReadEach(pieces); !status.ok()) return status;
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

absl::StatusOr<allocator::HeapLocation> ProcessView::Heap() const {
  if (const absl::Status status = CheckLayout(); !status.ok()) return status;
  if (page_.heap.caches == 0) {
    return absl::FailedPreconditionError(absl::StrCat("process ", pid_, " (", name_, ") has no heap of Freehold's"));
  }
  return page_.heap;
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
  if (page_.layout == runtime::LayoutOfStructures()) return absl::OkStatus();
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

namespace {

// Goes through the tree of one region, a leaf at a time, and finds each leaf as VmaTree::Lookup does: hand over hand,
// believing what was read only between two equal and even versions. Extents tile their region: what follows has to begin
// where the last one ended, so nothing that was there throughout is missed, whatever changed meanwhile.
class VmaWalk {
 public:
  VmaWalk(const ProcessView& view, const TelemetryPage::Region& region, std::vector<ProcessView::MappedVma>& out)
      : view_(view), region_(region), out_(out) {}

  absl::Status Run() {
    int failures = 0;
    while (next_ < region_.pages && failures < kAttempts) {
      const vm::RegionPage before = next_;
      if (const absl::Status status = VisitLeaf(); !status.ok()) return status;
      failures = next_ != before ? 0 : failures + 1;
      // What changes quickly is read in small bites.
      extents_at_once_ = failures == 0 ? std::min(2 * extents_at_once_, vm::VmaTree::kFanout)
                                       : std::max(extents_at_once_ / 2, 1);
      if (failures > kEagerAttempts) absl::SleepFor(kNap);
    }
    return absl::OkStatus();
  }

 private:
  using Node = vm::VmaTree::Node;
  using Version = std::uint32_t;
  static constexpr int kEagerAttempts = 100;
  static constexpr int kAttempts = 600;
  static constexpr absl::Duration kNap = absl::Milliseconds(1);

  // The bytes of an object that others write, read as if it were here. Both kinds begin with their version.
  template <typename T>
  struct Copy {
    alignas(T) std::array<std::byte, sizeof(T)> bytes;
    Version before;
    Version after;
    const T& get() const { return *reinterpret_cast<const T*>(bytes.data()); }
    bool whole() const { return before == after && (before & 1) == 0; }
  };

  // Reads all, and then the version of `parent` once more. False: something of it changed meanwhile.
  template <typename T>
  absl::StatusOr<bool> ReadBetween(absl::Span<const std::uint64_t> addresses, Copy<T>* copies, std::uint64_t parent,
                                   Version parent_version) const {
    std::vector<ProcessView::Piece> pieces;
    for (std::size_t i = 0; i < addresses.size(); ++i) pieces.push_back({addresses[i], &copies[i].before, sizeof(Version)});
    for (std::size_t i = 0; i < addresses.size(); ++i) pieces.push_back({addresses[i], &copies[i].bytes, sizeof(T)});
    for (std::size_t i = 0; i < addresses.size(); ++i) pieces.push_back({addresses[i], &copies[i].after, sizeof(Version)});
    Version parent_now = parent_version;
    if (parent != 0) pieces.push_back({parent, &parent_now, sizeof(Version)});
    const absl::Status status = view_.ReadEach(pieces);
    // An entry may be anything while its node changes.
    if (absl::IsUnavailable(status)) return false;
    if (!status.ok()) return status;
    return parent_now == parent_version &&
           std::all_of(copies, copies + addresses.size(), [](const Copy<T>& copy) { return copy.whole(); });
  }

  // Reports what it can from the leaf of the page `next_` on, or nothing.
  absl::Status VisitLeaf() {
    std::uint64_t address = 0;
    if (const absl::Status status = view_.Read(region_.tree, &address, sizeof(address)); !status.ok()) return status;
    if (address == 0) return absl::OkStatus();  // a transaction is being published
    Copy<Node> copy;
    std::uint64_t parent = 0;
    Version parent_version = 0;
    for (int depth = 0; depth < vm::VmaTree::kMaxDepth; ++depth) {
      const absl::StatusOr<bool> read = ReadBetween<Node>({&address, 1}, &copy, parent, parent_version);
      if (!read.ok() || !*read) return read.status();
      const Node& node = copy.get();
      const int count = std::min<int>(node.count.load(std::memory_order_relaxed), vm::VmaTree::kFanout);
      int slot = -1;
      while (slot + 1 < count && node.key[slot + 1].load(std::memory_order_relaxed) <= next_) ++slot;
      if (slot < 0) return absl::OkStatus();
      if (node.height.load(std::memory_order_relaxed) == 0) {
        std::vector<std::uint64_t> extents;
        for (const int end = std::min(count, slot + extents_at_once_); slot < end; ++slot) {
          extents.push_back(EntryOf(node, slot));
        }
        return VisitExtents(extents, address, copy.before);
      }
      parent = address;
      parent_version = copy.before;
      address = EntryOf(node, slot);
    }
    return absl::OkStatus();
  }

  static std::uint64_t EntryOf(const Node& node, int slot) {
    return reinterpret_cast<std::uintptr_t>(node.entry[slot].load(std::memory_order_relaxed));
  }

  absl::Status VisitExtents(absl::Span<const std::uint64_t> extents, std::uint64_t leaf, Version leaf_version) {
    std::vector<Copy<vm::Vma>> copies(extents.size());
    const absl::StatusOr<bool> read = ReadBetween<vm::Vma>(extents, copies.data(), leaf, leaf_version);
    if (!read.ok() || !*read) return read.status();
    for (const Copy<vm::Vma>& copy : copies) {
      if (!Report(copy.get())) break;
    }
    return absl::OkStatus();
  }

  // False if `vma` does not hold the page `next_`: its neighbour changed before it was read.
  bool Report(const vm::Vma& vma) {
    if (vma.first_page() > next_ || vma.end_page() <= next_ || vma.end_page() > region_.pages) return false;
    const vm::RegionPage first = std::exchange(next_, vma.end_page());
    if (!vma.Is(vm::VmaState::kMapped)) return true;
    const vm::VmaAttributes attributes = vma.attributes();
    out_.push_back({.range = vm::PageRange::Of({region_.first_page + first}, {next_ - first}),
                    .protection = attributes.protection,
                    .zone = static_cast<vm::Zone>(region_.zone),
                    .locked = attributes.lock != vm::os::MemoryLock::kNone,
                    .backed = attributes.backing != nullptr,
                    .generation = attributes.generation});
    return true;
  }

  const ProcessView& view_;
  const TelemetryPage::Region& region_;
  std::vector<ProcessView::MappedVma>& out_;
  vm::RegionPage next_ = 0;  // everything below is reported
  int extents_at_once_ = vm::VmaTree::kFanout;
};

}  // namespace

absl::StatusOr<std::vector<ProcessView::MappedVma>> ProcessView::ReadVmas() const {
  if (const absl::Status status = CheckLayout(); !status.ok()) return status;
  std::vector<MappedVma> vmas;
  for (const TelemetryPage::Region& region : page_.regions) {
    if (const absl::Status status = VmaWalk(*this, region, vmas).Run(); !status.ok()) return status;
  }
  return vmas;
}

absl::StatusOr<vm::Pages> ProcessView::ReadLargestGap() const {
  if (const absl::Status status = CheckLayout(); !status.ok()) return status;
  vm::RegionPage largest = 0;
  for (const TelemetryPage::Region& region : page_.regions) {
    std::uint64_t root = 0;
    if (const absl::Status status = Read(region.tree, &root, sizeof(root)); !status.ok()) return status;
    if (root == 0) continue;
    vm::VmaTree::Node node;
    const absl::Status status = Read(root, static_cast<void*>(&node), sizeof(node));
    if (!status.ok()) return status;
    const int count = std::min<int>(node.count.load(std::memory_order_relaxed), vm::VmaTree::kFanout);
    for (int i = 0; i < count; ++i) largest = std::max(largest, node.gap[i].load(std::memory_order_relaxed));
  }
  return vm::Pages{largest};
}

absl::StatusOr<std::vector<std::uint64_t>> ProcessView::RangeLocks() const {
  if (const absl::Status status = CheckLayout(); !status.ok()) return status;
  std::set<std::uint64_t> locks;
  for (const TelemetryPage::Region& region : page_.regions) locks.insert(region.range_lock);
  return std::vector<std::uint64_t>(locks.begin(), locks.end());
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
