// What does a page fault cost that a pager serves, and does a slow pager cost the others anything (DESIGN §8)?
//
//   file_sequential/freehold        a file read forward through a FilePager: one word of each page
//   file_sequential/pread           pread(2) of the file, 2 MiB at a time, into fresh memory, and one word of each page
//   file_sequential/pread_reused    the same into one buffer of 2 MiB
//   file_sequential/kernel          the same through mmap(2) of the file
//   cold_fault/freehold/64KiB       first access to 64 KiB of a file, in random order, through a FilePager
//   cold_fault/freehold/64KiB_all   the same, and then one word of each of its other pages
//   cold_fault/pread/64KiB          pread of 64 KiB into fresh memory
//   cold_fault/kernel/64KiB         the same access through mmap, with as much fault-around as the kernel has
//   fault_isolation/freehold/10ms   cold faults of 64 KiB while another thread faults on a pager that takes 10 ms, and
//                                   while it does not
//
// What is measured. The file is in the kernel's page cache, so that no disk has a part in it; mapping and unmapping,
// which also makes memory fresh, are not measured. `bytes_per_second` of file_sequential; p50_us and p99_us of one
// access of cold_fault. fault_isolation alternates, 200 faults at a time, between the other thread faulting and not, so
// that both see the same machine: p99_alone_us, p99_beside_us, and p99_ratio, which is what counts.
//
// The service's threads are not pinned, nor is the thread that faults: they wake each other.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bench/support/latency_histogram.h"
#include "bench/support/runner.h"
#include "vm/address_space.h"
#include "vm/fault.h"
#include "vm/os/linux_kernel.h"
#include "vm/os/userfault.h"
#include "vm/pagers/file_pager.h"

namespace freehold::bench {
namespace {

using vm::PageRange;
using vm::Pages;

constexpr std::size_t kPage = vm::kPageSize;
constexpr std::size_t kCluster = vm::kClusterPages.bytes().value;
constexpr std::size_t kBuffer = std::size_t{2} << 20;

constinit vm::os::LinuxKernel linux_kernel;

[[noreturn]] void Die(const char* what) {
  std::fprintf(stderr, "fault_benchmark: %s\n", what);
  std::exit(1);
}

std::uint64_t Nanoseconds() {
  return static_cast<std::uint64_t>(
      std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}

std::size_t FileSize() { return Scaled(std::size_t{256} << 20, std::size_t{4} << 20); }

// A file without a name, in the page cache.
int File() {
  static const int fd = [] {
    char name[] = "/tmp/freehold_fault_benchmark_XXXXXX";
    const int file = mkstemp(name);
    if (file < 0) Die("no temporary file");
    unlink(name);
    std::vector<std::uint64_t> buffer(kBuffer / sizeof(std::uint64_t));
    std::iota(buffer.begin(), buffer.end(), 1);
    for (std::size_t at = 0; at < FileSize(); at += kBuffer) {
      if (pwrite(file, buffer.data(), kBuffer, static_cast<off_t>(at)) != static_cast<ssize_t>(kBuffer)) Die("pwrite");
    }
    fsync(file);
    return file;
  }();
  return fd;
}

// A space with a service.
class Paged {
 public:
  Paged() {
    const vm::Result<vm::AddressSpace*> space = vm::AddressSpace::Create(linux_kernel, {});
    if (!space.ok()) Die("AddressSpace::Create");
    space_ = *space;
    service_ = std::make_unique<vm::FaultService>(*space_, userfault_);
    if (!service_->Start().ok()) Die("FaultService::Start");
  }
  ~Paged() {
    service_.reset();
    vm::AddressSpace::Destroy(space_);
  }

  const std::byte* Map(vm::Pager& pager, std::size_t bytes) {
    const vm::Result<PageRange> range = service_->MapPager(
        pager, 0, vm::PagesFor({bytes}),
        {.protection = vm::os::Protection::kRead, .max_protection = vm::os::Protection::kRead});
    if (!range.ok()) Die("MapPager");
    return range->address();
  }
  void Unmap(const std::byte* at, std::size_t bytes) {
    if (!space_->Unmap(PageRange::FromBytes(at, {bytes})).ok()) Die("Unmap");
  }
  void Drop(const std::byte* at, std::size_t bytes) {
    if (!service_->Invalidate(PageRange::FromBytes(at, {bytes})).ok()) Die("Invalidate");
  }

 private:
  vm::AddressSpace* space_;
  vm::os::LinuxUserfault userfault_;
  std::unique_ptr<vm::FaultService> service_;
};

std::byte* MapKernel(std::size_t bytes, int fd) {
  void* const at = mmap(nullptr, bytes, PROT_READ | (fd < 0 ? PROT_WRITE : 0),
                        MAP_PRIVATE | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);
  if (at == MAP_FAILED) Die("mmap");
  return static_cast<std::byte*>(at);
}

std::uint64_t Word(const std::byte* at) { return *reinterpret_cast<const volatile std::uint64_t*>(at); }

std::uint64_t TouchAll(const std::byte* at, std::size_t bytes) {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < bytes; i += kPage) sum += Word(at + i);
  return sum;
}

void Finish(benchmark::State& state) {
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * FileSize()));
}

template <typename Run>
void TimeOnce(benchmark::State& state, Run run) {
  const std::uint64_t start = Nanoseconds();
  run();
  state.SetIterationTime(static_cast<double>(Nanoseconds() - start) * 1e-9);
}

// ---- file_sequential ----

void SequentialFreehold(benchmark::State& state) {
  Paged paged;
  vm::FilePager pager(File());
  for (auto _ : state) {
    const std::byte* at = paged.Map(pager, FileSize());
    TimeOnce(state, [&] { benchmark::DoNotOptimize(TouchAll(at, FileSize())); });
    paged.Unmap(at, FileSize());
  }
  Finish(state);
}

void SequentialPread(benchmark::State& state, bool reused) {
  const std::size_t room = reused ? kBuffer : FileSize();
  std::byte* at = MapKernel(room, -1);
  if (reused) TouchAll(at, room);
  for (auto _ : state) {
    TimeOnce(state, [&] {
      for (std::size_t done = 0; done < FileSize(); done += kBuffer) {
        std::byte* to = at + done % room;
        if (pread(File(), to, kBuffer, static_cast<off_t>(done)) != static_cast<ssize_t>(kBuffer)) Die("pread");
        benchmark::DoNotOptimize(TouchAll(to, kBuffer));
      }
    });
    if (!reused) madvise(at, room, MADV_DONTNEED);
  }
  munmap(at, room);
  Finish(state);
}

void SequentialKernel(benchmark::State& state) {
  for (auto _ : state) {
    std::byte* at = MapKernel(FileSize(), File());
    TimeOnce(state, [&] { benchmark::DoNotOptimize(TouchAll(at, FileSize())); });
    munmap(at, FileSize());
  }
  Finish(state);
}

// ---- cold_fault ----

std::vector<std::size_t> RandomClusters() {
  std::vector<std::size_t> offsets(FileSize() / kCluster);
  for (std::size_t i = 0; i < offsets.size(); ++i) offsets[i] = i * kCluster;
  std::shuffle(offsets.begin(), offsets.end(), std::mt19937_64(1));
  return offsets;
}

double Microseconds(std::uint64_t nanoseconds) { return static_cast<double>(nanoseconds) * 1e-3; }

// `access(offset)` of every 64 KiB once, and `renew` in between.
template <typename Access, typename Renew>
void ColdFaults(benchmark::State& state, Access access, Renew renew) {
  const std::vector<std::size_t> offsets = RandomClusters();
  auto latencies = std::make_unique<LatencyHistogram>();
  for (auto _ : state) {
    std::uint64_t total = 0;
    for (const std::size_t offset : offsets) {
      const std::uint64_t start = Nanoseconds();
      access(offset);
      const std::uint64_t took = Nanoseconds() - start;
      latencies->Record(took);
      total += took;
    }
    state.SetIterationTime(static_cast<double>(total) * 1e-9);
    renew();
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations() * offsets.size()));
  state.counters["p50_us"] = Microseconds(latencies->Percentile(0.5));
  state.counters["p99_us"] = Microseconds(latencies->Percentile(0.99));
}

void ColdFreehold(benchmark::State& state, std::size_t touched) {
  Paged paged;
  vm::FilePager pager(File());
  const std::byte* at = paged.Map(pager, FileSize());
  ColdFaults(state, [&](std::size_t offset) { benchmark::DoNotOptimize(TouchAll(at + offset, touched)); },
             [&] { paged.Drop(at, FileSize()); });
}

void ColdPread(benchmark::State& state) {
  std::byte* at = MapKernel(FileSize(), -1);
  ColdFaults(state,
             [&](std::size_t offset) {
               if (pread(File(), at + offset, kCluster, static_cast<off_t>(offset)) < 0) Die("pread");
               benchmark::DoNotOptimize(Word(at + offset));
             },
             [&] { madvise(at, FileSize(), MADV_DONTNEED); });
  munmap(at, FileSize());
}

void ColdKernel(benchmark::State& state) {
  std::byte* at = MapKernel(FileSize(), File());
  ColdFaults(state, [&](std::size_t offset) { benchmark::DoNotOptimize(Word(at + offset)); },
             [&] { madvise(at, FileSize(), MADV_DONTNEED); });
  munmap(at, FileSize());
}

// ---- fault_isolation ----

class SlowPager final : public vm::Pager {
 public:
  vm::Result<Pages> Read(std::uint64_t, absl::Span<std::byte> into) override {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    return Pages{into.size() / kPage};
  }
  vm::Error Writeback(std::uint64_t, absl::Span<const std::byte>) override { return vm::Error::Ok(); }
};

void Isolation(benchmark::State& state) {
  constexpr std::size_t kTurn = 200;
  Paged paged;
  vm::FilePager pager(File());
  SlowPager slow_pager;
  const std::byte* at = paged.Map(pager, FileSize());
  const std::size_t slow_size = std::size_t{1} << 30;
  const std::byte* slow = paged.Map(slow_pager, slow_size);
  std::atomic<bool> stop{false};
  std::atomic<bool> on{false};
  std::thread other([&] {
    // Each access is the first to its 64 KiB, and no stream of them.
    for (std::size_t offset = 0; !stop.load(); offset = (offset + 7 * kCluster) % slow_size) {
      while (!on.load() && !stop.load()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      benchmark::DoNotOptimize(Word(slow + offset));
    }
  });
  const std::vector<std::size_t> offsets = RandomClusters();
  std::unique_ptr<LatencyHistogram> latencies[] = {std::make_unique<LatencyHistogram>(),
                                                   std::make_unique<LatencyHistogram>()};
  for (auto _ : state) {
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < offsets.size(); ++i) {
      const bool beside = i / kTurn % 2 == 1;
      if (i % kTurn == 0) {
        on.store(beside);
        // Whatever was under way has ended, or has begun.
        std::this_thread::sleep_for(std::chrono::milliseconds(15));
      }
      const std::uint64_t start = Nanoseconds();
      benchmark::DoNotOptimize(Word(at + offsets[i]));
      const std::uint64_t took = Nanoseconds() - start;
      latencies[beside]->Record(took);
      total += took;
    }
    state.SetIterationTime(static_cast<double>(total) * 1e-9);
    paged.Drop(at, FileSize());
  }
  stop.store(true);
  other.join();
  const double alone = Microseconds(latencies[0]->Percentile(0.99));
  const double beside = Microseconds(latencies[1]->Percentile(0.99));
  state.counters["p50_alone_us"] = Microseconds(latencies[0]->Percentile(0.5));
  state.counters["p50_beside_us"] = Microseconds(latencies[1]->Percentile(0.5));
  state.counters["p99_alone_us"] = alone;
  state.counters["p99_beside_us"] = beside;
  state.counters["p99_ratio"] = alone > 0 ? beside / alone : 0;
}

bool RegisterCases() {
  const CaseOptions options = {.max_threads = 1, .manual_time = true, .unit = benchmark::kMicrosecond};
  bool available;
  {
    vm::os::LinuxUserfault userfault;
    available = userfault.Open().ok();
  }
  if (!available) NoteLeftOut("faults/freehold", "this process may not use userfaultfd");
  if (available) Register("file_sequential/freehold", SequentialFreehold, options);
  Register("file_sequential/pread", [](benchmark::State& state) { SequentialPread(state, false); }, options);
  Register("file_sequential/pread_reused", [](benchmark::State& state) { SequentialPread(state, true); }, options);
  Register("file_sequential/kernel", SequentialKernel, options);
  if (available) {
    Register("cold_fault/freehold/64KiB", [](benchmark::State& state) { ColdFreehold(state, kPage); }, options);
    Register("cold_fault/freehold/64KiB_all", [](benchmark::State& state) { ColdFreehold(state, kCluster); }, options);
  }
  Register("cold_fault/pread/64KiB", ColdPread, options);
  Register("cold_fault/kernel/64KiB", ColdKernel, options);
  if (available) Register("fault_isolation/freehold/10ms", Isolation, options);
  return true;
}

}  // namespace
}  // namespace freehold::bench

int main(int argc, char** argv) { return freehold::bench::RunBenchmarks(argc, argv, &freehold::bench::RegisterCases); }
