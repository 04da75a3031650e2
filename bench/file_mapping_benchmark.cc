// Windows of a file: mapping a part of it, reading some pages, unmapping it. The kernel's mmap and munmap (`kernel`)
// against AddressSpace::MapFile (`freehold`), the same under one lock for the whole space (`coarse`), and
// with an interval tree of held ranges (`tree`).
//
//   file_window/IMPL/SIZE   the same window again and again, as a database or a reader of an index does: map, read
//                           from up to 16 pages, unmap
//   file_scan/IMPL/64KiB    another window each time, until the whole file was mapped, and again: more windows than
//                           an AddressSpace keeps, so none is there when it is wanted
//
//   file_window_program/IMPL/64KiB
//                           the same window again and again by a program that knows nothing of Freehold
//                           (file_window_program): under `freehold run` (`freehold`), and plain (`kernel`)
//
// What is measured. Wall-clock time of all threads together. Every thread is pinned to a processor and uses the same
// file, which is in the page cache: a memory file of 64 MiB, mapped shared and read-only. Every run starts with a
// fresh AddressSpace, whose making is not timed.
//
// What is the same for all. Content is read through the mapping, a byte of a page. What is not: after unmap the kernel
// has nothing left of the window, and the next one costs its page faults; an AddressSpace keeps it
// (AddressSpaceOptions::window_limit), and asks fstat(2) and fcntl(2) what the descriptor is before it serves it.
#include <benchmark/benchmark.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bench/support/cpu.h"
#include "bench/support/kernel_memory.h"
#include "bench/support/runner.h"
#include "bench/support/spaces.h"
#include "vm/address_space.h"

namespace freehold::bench {
namespace {

constexpr std::size_t kKiB = 1024;
constexpr std::size_t kMiB = 1024 * kKiB;
constexpr std::size_t kTouchedPages = 16;
constexpr std::size_t kScanBytes = 64 * kKiB;

// A file in memory, written throughout. Lives as long as the program.
class CachedFile {
 public:
  explicit CachedFile(std::size_t bytes) : bytes_(bytes), descriptor_(memfd_create("file_mapping", MFD_CLOEXEC)) {
    if (descriptor_ < 0) DieOfErrno("memfd_create");
    const std::vector<char> block(kMiB, 'x');
    for (std::size_t at = 0; at < bytes; at += kMiB) {
      if (pwrite(descriptor_, block.data(), kMiB, static_cast<off_t>(at)) != static_cast<ssize_t>(kMiB)) {
        DieOfErrno("pwrite");
      }
    }
  }
  CachedFile(const CachedFile&) = delete;
  CachedFile& operator=(const CachedFile&) = delete;

  int descriptor() const { return descriptor_; }
  std::size_t bytes() const { return bytes_; }

 private:
  const std::size_t bytes_;
  const int descriptor_;
};

const CachedFile& File() {
  static const CachedFile& file = *new CachedFile(Scaled(64 * kMiB, 2 * kMiB));
  return file;
}

std::byte* MapWindow(KernelSpace&, const CachedFile& file, std::size_t offset, std::size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file.descriptor(), static_cast<off_t>(offset));
  if (memory == MAP_FAILED) DieOfErrno("mmap");
  return static_cast<std::byte*>(memory);
}

template <vm::sync::LockPolicy policy>
std::byte* MapWindow(AddressSpaceOf<policy>& space, const CachedFile& file, std::size_t offset, std::size_t bytes) {
  const vm::Result<vm::PageRange> range =
      space.space().MapFile(vm::PagesFor({bytes}), {.descriptor = file.descriptor(),
                                                    .offset = {offset},
                                                    .sharing = vm::os::Sharing::kShared,
                                                    .protection = vm::os::Protection::kRead});
  if (!range.ok()) DieOfErrno("MapFile");
  return range->address();
}

void ReadPages(const std::byte* memory, std::size_t pages) {
  const auto* bytes = reinterpret_cast<const volatile char*>(memory);
  for (std::size_t page = 0; page < pages; ++page) (void)bytes[page * kBytesPerPage];
}

// Moves on by `step` each time, from the start again at the end of the file.
template <typename Space>
void Windows(benchmark::State& state, std::size_t bytes, std::size_t step) {
  const ScopedPin pin(state.thread_index());
  Space& space = PerRun<Space>::Get();
  const CachedFile& file = File();
  const std::size_t touched = std::min(kTouchedPages, bytes / kBytesPerPage);
  std::size_t offset = 0;
  for (auto _ : state) {
    std::byte* memory = MapWindow(space, file, offset, bytes);
    benchmark::DoNotOptimize(memory);
    ReadPages(memory, touched);
    space.Unmap(memory, bytes);
    offset += step;
    if (offset + bytes > file.bytes()) offset = 0;
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}

template <typename Space>
void RegisterOne(const char* operation, std::size_t bytes, std::size_t step) {
  const std::string size =
      bytes % kMiB == 0 ? absl::StrCat(bytes / kMiB, "MiB") : absl::StrCat(bytes / kKiB, "KiB");
  Register(
      absl::StrCat(operation, "/", Space::kName, "/", size),
      [bytes, step](benchmark::State& state) { Windows<Space>(state, bytes, step); },
      {.set_up = PerRun<Space>::SetUp, .tear_down = PerRun<Space>::TearDown});
}

// For every space, next to each other: what disturbs the machine for a while then disturbs all of them.
void RegisterForAll(const char* operation, std::size_t bytes, std::size_t step) {
  RegisterOne<FreeholdSpace>(operation, bytes, step);
  RegisterOne<CoarseSpace>(operation, bytes, step);
  RegisterOne<TreeSpace>(operation, bytes, step);
  RegisterOne<KernelSpace>(operation, bytes, step);
}

constexpr std::size_t kProgramWindowKiB = 64;

void RunProgram(benchmark::State& state, const std::string& runner) {
  const std::size_t windows = Scaled(200'000, 100);
  const std::string command =
      absl::StrCat(runner, BuiltFile("file_window_program"), " ", windows, " ", kProgramWindowKiB);
  for (auto _ : state) {
    FILE* output = popen(command.c_str(), "r");
    if (output == nullptr) DieOfErrno("popen");
    double nanoseconds = 0;
    const bool understood = std::fscanf(output, "%lf", &nanoseconds) == 1;
    if (pclose(output) != 0 || !understood) {
      state.SkipWithError("file_window_program did not do its work");
      return;
    }
    state.SetIterationTime(nanoseconds * 1e-9 * static_cast<double>(windows));
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations() * windows));
}

void RegisterProgram(const char* implementation, const std::string& runner) {
  Register(absl::StrCat("file_window_program/", implementation, "/", kProgramWindowKiB, "KiB"),
           [runner](benchmark::State& state) { RunProgram(state, runner); },
           {.max_threads = 1, .manual_time = true, .iterations = 1, .unit = benchmark::kMillisecond});
}

bool RegisterCases() {
  for (const std::size_t bytes : {4 * kKiB, 64 * kKiB, 1 * kMiB}) RegisterForAll("file_window", bytes, 0);
  RegisterForAll("file_scan", kScanBytes, kScanBytes);
  RegisterProgram("freehold", absl::StrCat(BuiltFile("../runtime/cli/freehold"), " run -- "));
  RegisterProgram("kernel", "");
  return true;
}

}  // namespace
}  // namespace freehold::bench

int main(int argc, char** argv) {
  const freehold::bench::ScopedNoHugePages no_huge_pages;
  return freehold::bench::RunBenchmarks(argc, argv, freehold::bench::RegisterCases);
}
