// Snapshots: what is mapped, copied region by region, some extents in a hold of a tree lock, so that nobody waits
// for a reader that looks at everything, and the reader waits for nobody who is mapping, faulting or purging.
//
// Each region counts the changes that lookups could see (Region::changes). A copy of all regions between two equal
// sums of these counts shows one instant: every change happens, and is counted, in a critical section of a tree lock,
// and a copy that shows it came after that.
#include <charconv>
#include <cstring>
#include <string_view>

#include "vm/address_space.h"
#include "vm/backing.h"
#include "vm/region.h"

namespace freehold::vm {
namespace {

constexpr int kAttempts = 8;
constexpr std::size_t kBatch = 64;

// A line of /proc/PID/maps: longer names are cut.
class MapsLine {
 public:
  MapsLine& Text(std::string_view text) {
    const std::size_t length = std::min(text.size(), sizeof(line_) - 1 - size_);
    std::memcpy(line_ + size_, text.data(), length);
    size_ += length;
    return *this;
  }
  // With at least `width` digits.
  MapsLine& Number(std::uint64_t value, int base, std::size_t width) {
    char digits[20];
    const auto end = std::to_chars(digits, digits + sizeof(digits), value, base).ptr;
    for (std::size_t length = static_cast<std::size_t>(end - digits); length < width; ++length) Text("0");
    return Text({digits, static_cast<std::size_t>(end - digits)});
  }
  MapsLine& PadTo(std::size_t column) {
    while (size_ < column) Text(" ");
    return *this;
  }
  std::string_view Finish() {
    line_[size_++] = '\n';
    return {line_, size_};
  }

 private:
  std::size_t size_ = 0;
  char line_[256];
};

std::string_view NameOf(Zone zone) {
  switch (zone) {
    case Zone::kPlain: return "[freehold:plain]";
    case Zone::kDense: return "[freehold:dense]";
    case Zone::kMapping: return "[freehold:mapping]";
  }
  return "";
}

// The columns of the kernel: where names begin.
constexpr std::size_t kNameColumn = 73;

}  // namespace

void AddressSpace::ForEachVma(void (*visit)(void* context, const VmaInfo& vma), void* context) const {
  for (const Region* region : regions()) {
    for (PageNumber from = region->range().first; from < region->range().end;) {
      VmaInfo vmas[kBatch];
      const std::size_t size = region->CopyVmas(from, vmas, kBatch);
      for (std::size_t i = 0; i < size; ++i) visit(context, vmas[i]);
    }
  }
}

std::uint64_t AddressSpace::Changes() const {
  std::uint64_t changes = 0;
  for (const Region* region : regions()) changes += region->changes();
  return changes;
}

SnapshotResult AddressSpace::Snapshot(absl::Span<VmaInfo> out) const {
  struct Copy {
    absl::Span<VmaInfo> out;
    std::size_t vmas;
  } copy = {out, 0};
  const auto add = [](void* context, const VmaInfo& vma) {
    auto& to = *static_cast<Copy*>(context);
    if (to.vmas < to.out.size()) to.out[to.vmas] = vma;
    ++to.vmas;
  };
  bool instant = false;
  for (int attempt = 0; attempt < kAttempts && !instant; ++attempt) {
    copy.vmas = 0;
    const std::uint64_t before = Changes();
    ForEachVma(add, &copy);
    instant = Changes() == before;
  }
  return {.vmas = copy.vmas, .instant = instant};
}

void AddressSpace::WriteMaps(void (*write)(void* context, std::string_view line), void* context) {
  struct Writer {
    void (*write)(void* context, std::string_view line);
    void* context;
  } writer = {write, context};
  // Backings that are looked at stay.
  const sync::EpochDomain::ReadGuard reading(epochs_);
  ForEachVma(
      [](void* to, const VmaInfo& vma) {
        const BackingDescription backing =
            vma.backing != nullptr ? vma.backing->Describe() : BackingDescription{.name = NameOf(vma.zone)};
        MapsLine line;
        line.Number(vma.range.first.value * kPageSize, 16, 8).Text("-").Number(vma.range.end.value * kPageSize, 16, 8);
        line.Text(Has(vma.protection, os::Protection::kRead) ? " r" : " -");
        line.Text(Has(vma.protection, os::Protection::kWrite) ? "w" : "-");
        line.Text(Has(vma.protection, os::Protection::kExec) ? "x" : "-").Text(backing.shared ? "s " : "p ");
        line.Number(vma.backing_page * kPageSize, 16, 8).Text(" ");
        line.Number(backing.device_major, 16, 2).Text(":").Number(backing.device_minor, 16, 2).Text(" ");
        line.Number(backing.inode, 10, 1).Text(" ");
        if (!backing.name.empty()) line.PadTo(kNameColumn).Text(backing.name);
        const auto& writer = *static_cast<Writer*>(to);
        writer.write(writer.context, line.Finish());
      },
      &writer);
}

}  // namespace freehold::vm
