#include "runtime/cli/maps.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "runtime/cli/command.h"
#include "runtime/cli/process_view.h"

namespace freehold::cli {
namespace {

using MappedVma = ProcessView::MappedVma;
using vm::os::Has;
using vm::os::Protection;

constexpr absl::string_view kHelp = R"(Usage: freehold maps PID [--kernel]

Prints what a process that runs on Freehold has mapped in its address space, mapping by mapping, without stopping it: the
kernel sees a few huge mappings there (pmap, /proc/PID/maps). Zones: plain and dense (huge pages) memory, and mapping:
files, pagers and memory of unusual protection.

  --kernel       in the format of /proc/PID/maps, and with what the process has outside of that space

Exit status: 0; 1 if the process cannot be looked at; 2 for wrong arguments.
)";

// A line of /proc/PID/maps.
struct KernelVma {
  std::uint64_t first = 0;
  std::uint64_t end = 0;
  std::string line;
  std::uint64_t offset = 0;
  std::string rest;  // device, inode and name
};

std::vector<KernelVma> ReadKernelVmas(pid_t pid) {
  std::vector<KernelVma> vmas;
  std::ifstream maps(absl::StrCat("/proc/", pid, "/maps"));
  for (std::string line; std::getline(maps, line);) {
    KernelVma vma;
    const std::size_t dash = line.find('-');
    const std::size_t space = line.find(' ');
    if (dash == std::string::npos || space == std::string::npos || space + 6 > line.size()) continue;
    if (!absl::SimpleHexAtoi(line.substr(0, dash), &vma.first)) continue;
    if (!absl::SimpleHexAtoi(line.substr(dash + 1, space - dash - 1), &vma.end)) continue;
    const std::size_t end_of_offset = line.find(' ', space + 6);
    if (end_of_offset == std::string::npos) continue;
    if (!absl::SimpleHexAtoi(line.substr(space + 6, end_of_offset - space - 6), &vma.offset)) continue;
    vma.rest = line.substr(end_of_offset);
    vma.line = std::move(line);
    vmas.push_back(std::move(vma));
  }
  return vmas;
}

std::uint64_t FirstByte(const vm::PageRange& range) { return reinterpret_cast<std::uintptr_t>(range.address()); }
std::uint64_t EndByte(const vm::PageRange& range) { return FirstByte(range) + range.bytes().value; }

std::string Access(const MappedVma& vma) {
  return {Has(vma.protection, Protection::kRead) ? 'r' : '-', Has(vma.protection, Protection::kWrite) ? 'w' : '-',
          Has(vma.protection, Protection::kExec) ? 'x' : '-'};
}

// The kernel's own line for the file that shows at `vma`: it knows offset, device, inode and path.
const KernelVma* FileOf(const MappedVma& vma, const std::vector<KernelVma>& kernel) {
  for (const KernelVma& candidate : kernel) {
    if (candidate.first <= FirstByte(vma.range) && FirstByte(vma.range) < candidate.end) return &candidate;
  }
  return nullptr;
}

void PrintKernelLine(const MappedVma& vma, const KernelVma* file) {
  std::string line = absl::StrFormat("%08x-%08x %sp ", FirstByte(vma.range), EndByte(vma.range), Access(vma));
  if (vma.backed && file != nullptr) {
    line.back() = ' ';
    line[line.size() - 2] = file->line[file->line.find(' ') + 4];  // shared or private
    absl::StrAppendFormat(&line, "%08x%s", file->offset + (FirstByte(vma.range) - file->first), file->rest);
  } else {
    absl::StrAppend(&line, "00000000 00:00 0 ");
    line.resize(std::max<std::size_t>(line.size(), 73), ' ');
    absl::StrAppend(&line, "[freehold:", NameOf(vma.zone), "]");
  }
  std::puts(line.c_str());
}

// What lies in the space comes from Freehold, everything else from the kernel.
void PrintAsKernel(const ProcessView& process, const std::vector<MappedVma>& vmas,
                   const std::vector<KernelVma>& kernel) {
  const std::vector<ProcessView::Region> regions = process.Regions();
  const std::uint64_t begin = FirstByte(regions.front().range);
  const std::uint64_t end = EndByte(regions.back().range);
  bool printed = false;
  const auto print = [&] {
    for (const MappedVma& vma : vmas) PrintKernelLine(vma, vma.backed ? FileOf(vma, kernel) : nullptr);
    printed = true;
  };
  for (const KernelVma& vma : kernel) {
    if (!printed && vma.first >= begin) print();
    if (vma.end <= begin || vma.first >= end) std::puts(vma.line.c_str());
  }
  if (!printed) print();
}

void PrintTable(const ProcessView& process, const std::vector<MappedVma>& vmas, const std::vector<KernelVma>& kernel) {
  absl::PrintF("%-27s %12s  %-4s %-8s %s\n", "ADDRESSES", "SIZE", "MODE", "ZONE", "WHAT");
  std::map<absl::string_view, std::pair<std::size_t, std::uint64_t>> sums;
  for (const MappedVma& vma : vmas) {
    std::string what;
    if (vma.backed) {
      const KernelVma* file = FileOf(vma, kernel);
      const std::size_t slash = file != nullptr ? file->rest.find('/') : std::string::npos;
      what = slash != std::string::npos ? Printable(file->rest.substr(slash)) : "pager";
    }
    if (vma.locked) absl::StrAppend(&what, what.empty() ? "" : " ", "locked");
    absl::PrintF("%012x-%012x   %12s  %-4s %-8s %s\n", FirstByte(vma.range), EndByte(vma.range),
                 HumanBytes(vma.range.bytes().value), Access(vma), NameOf(vma.zone), what);
    auto& [count, bytes] = sums[NameOf(vma.zone)];
    ++count;
    bytes += vma.range.bytes().value;
  }
  for (const auto& [zone, sum] : sums) {
    absl::PrintF("%s: %d mappings, %s\n", zone, sum.first, HumanBytes(sum.second));
  }
  absl::PrintF("%s (%d)\n", process.name(), process.pid());
}

}  // namespace

int Maps(int count, char** arguments) {
  static constexpr absl::string_view kSwitches[] = {"--kernel"};
  CommandLine line;
  int status = 0;
  if (!ParseCommandLine({.name = "maps", .help = kHelp, .switches = kSwitches}, count, arguments, line, status)) {
    return status;
  }
  const absl::StatusOr<ProcessView> process = ProcessView::Open(line.pid);
  if (!process.ok()) return Fail(process.status());
  const absl::StatusOr<std::vector<MappedVma>> vmas = process->ReadVmas();
  if (!vmas.ok()) return Fail(vmas.status());
  const std::vector<KernelVma> kernel = ReadKernelVmas(line.pid);
  if (kernel.empty()) return Fail(absl::NotFoundError(absl::StrCat("process ", line.pid, " has ended")));
  if (line.Has("--kernel")) {
    PrintAsKernel(*process, *vmas, kernel);
  } else {
    PrintTable(*process, *vmas, kernel);
  }
  return 0;
}

}  // namespace freehold::cli
