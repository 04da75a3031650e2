#include "bench/support/kernel_memory.h"

#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

namespace freehold::bench {
namespace {

// The number in a file that holds nothing else; `otherwise` when there is none ("max", no such
// file).
std::size_t NumberIn(const char* path, std::size_t otherwise) {
  std::ifstream file(path);
  std::size_t number = 0;
  return (file >> number) ? number : otherwise;
}

// What follows `name` at the start of a line, in KiB, as bytes; `otherwise` when there is no such line.
std::size_t KibibytesIn(const char* path, const std::string& name, std::size_t otherwise) {
  std::ifstream file(path);
  std::string word;
  while (file >> word) {
    std::size_t kibibytes = 0;
    if (word == name && file >> kibibytes) return kibibytes << 10;
    std::getline(file, word);
  }
  return otherwise;
}

std::size_t MachineAvailable() {
  return KibibytesIn("/proc/meminfo", "MemAvailable:", std::numeric_limits<std::size_t>::max());
}

std::size_t ControlGroupAvailable() {
  constexpr std::size_t kNoLimit = std::numeric_limits<std::size_t>::max();
  const std::size_t limit = NumberIn("/sys/fs/cgroup/memory.max", kNoLimit);
  if (limit == kNoLimit) return kNoLimit;
  const std::size_t used = NumberIn("/sys/fs/cgroup/memory.current", 0);
  return limit > used ? limit - used : 0;
}

void SetHugePagesDisabled(unsigned long disabled) {
  if (prctl(PR_SET_THP_DISABLE, disabled, 0UL, 0UL, 0UL) != 0)
    DieOfErrno("prctl(PR_SET_THP_DISABLE)");
}

}  // namespace

void DieOfErrno(const char* what) {
  std::fprintf(stderr, "%s: %s\n", what, std::strerror(errno));
  std::exit(1);
}

ScopedNoHugePages::ScopedNoHugePages() { SetHugePagesDisabled(1); }
ScopedNoHugePages::~ScopedNoHugePages() { SetHugePagesDisabled(0); }

bool HasPopulateWrite() {
  std::byte* page = KernelMap(kBytesPerPage);
  const bool has = madvise(page, kBytesPerPage, MADV_POPULATE_WRITE) == 0;
  KernelUnmap(page, kBytesPerPage);
  return has;
}

bool HasHugePagesByAdvice() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string line;
  return std::getline(file, line) && line.find("[never]") == std::string::npos;
}

std::size_t AvailableMemory() { return std::min(MachineAvailable(), ControlGroupAvailable()); }

std::size_t ResidentPages(std::byte* memory, std::size_t bytes) {
  constexpr std::size_t kPagesPerCall = std::size_t{1} << 16;
  std::vector<unsigned char> flags(kPagesPerCall);
  std::size_t resident = 0;
  for (std::size_t done = 0; done < bytes;) {
    const std::size_t length = std::min(bytes - done, kPagesPerCall * kBytesPerPage);
    if (mincore(memory + done, length, flags.data()) != 0) return 0;
    const std::size_t pages = length / kBytesPerPage;
    resident += static_cast<std::size_t>(
        std::count_if(flags.begin(), flags.begin() + static_cast<std::ptrdiff_t>(pages),
                      [](unsigned char flag) { return (flag & 1) != 0; }));
    done += length;
  }
  return resident;
}

std::size_t ResidentMemory() {
  std::ifstream file("/proc/self/statm");
  std::size_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

// Not getrusage's, which remembers what ran in this process before.
std::size_t PeakResidentMemory() { return KibibytesIn("/proc/self/status", "VmHWM:", 0); }

std::uint64_t MinorFaults() {
  rusage usage;
  if (getrusage(RUSAGE_SELF, &usage) != 0) DieOfErrno("getrusage");
  return static_cast<std::uint64_t>(usage.ru_minflt);
}

}  // namespace freehold::bench
