// How long does mapping wait while another thread populates? The program of DESIGN §1, against the
// kernel.
//
// Thread 0 is A: it maps --ranges ranges of --range_mib MiB each and makes all their pages present.
// Every other thread is B: it loops "map 64 KiB, write to one page, unmap" and times each turn.
// threads:1 is A alone, the reference for what B costs A; threads:<n> has n-1 Bs.
//
//   populate_stall/kernel/populate         A: mmap(MAP_POPULATE)                 B: mmap, munmap
//   populate_stall/kernel/madvise          A: mmap, then MADV_POPULATE_WRITE     B: the same
//   populate_stall/kernel/touch            A: mmap, then writes to every page    B: the same
//   populate_stall/kernel/touch_huge       the same after MADV_HUGEPAGE
//   populate_stall/freehold/populate       A: AddressSpace::Map with populate    B: Map, Unmap
//   populate_stall/freehold/populate_huge  the same, preferring huge pages
//   populate_stall/coarse/populate         freehold under one lock for the whole space
//
// What is measured. The time of a case is A's, per round of all ranges. B's turns count when they
// began while A was populating; one that began then and ended later counts in full, as its caller
// waited in full.
//
// Between rounds B stands still and nothing is measured: A unmaps its ranges and, where that leaves
// them resident, purges the AddressSpace, so that the next round's pages come from the kernel
// again. Without that an AddressSpace would serve the next round from resident memory, and A would
// measure memset. mincore checks it both ways: all pages present after every round, none before the
// next.
//
// One round of the fast ones is too short to show tails, hence --min_seconds. A round before the
// first is not measured: in a virtual machine the host has to find memory for pages that the guest
// never used.
//
// Everything but the two huge-page cases runs with transparent huge pages off.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "bench/support/cpu.h"
#include "bench/support/kernel_memory.h"
#include "bench/support/latency_histogram.h"
#include "bench/support/runner.h"
#include "bench/support/spaces.h"
#include "bench/support/tick_clock.h"

ABSL_FLAG(int, ranges, 3, "how many ranges A populates in a round");
ABSL_FLAG(int, range_mib, 2048, "size of a range in MiB");
ABSL_FLAG(double, min_seconds, 3, "A repeats its round until it has populated for this long");
ABSL_FLAG(bool, pin, true, "keep A and every B on a processor of its own");

namespace freehold::bench {
namespace {

constexpr std::size_t kMappedByB = std::size_t{64} << 10;

// ---- What A and B call. -------------------------------------------------------------------------

// The kernel's address space with A's way to populate as a parameter.
template <std::byte* (*populate)(std::size_t)>
class KernelPopulatedBy : public KernelSpace {
 public:
  std::byte* PopulateRange(std::size_t bytes) { return populate(bytes); }
};

std::byte* ByMapPopulate(std::size_t bytes) { return KernelMap(bytes, MAP_POPULATE); }

std::byte* ByPopulateWrite(std::size_t bytes) {
  std::byte* memory = KernelMap(bytes);
  KernelAdvise(memory, bytes, MADV_POPULATE_WRITE);
  return memory;
}

std::byte* ByTouch(std::size_t bytes) {
  std::byte* memory = KernelMap(bytes);
  TouchPages(memory, bytes / kBytesPerPage);
  return memory;
}

std::byte* ByTouchHuge(std::size_t bytes) {
  std::byte* memory = KernelMap(bytes);
  KernelAdvise(memory, bytes, MADV_HUGEPAGE);
  TouchPages(memory, bytes / kBytesPerPage);
  return memory;
}

template <typename Space>
class SmallPages : public Space {
 public:
  std::byte* PopulateRange(std::size_t bytes) { return Space::MapPopulated(bytes); }
};

class HugePagesOf : public FreeholdSpace {
 public:
  std::byte* PopulateRange(std::size_t bytes) { return MapHugePopulated(bytes); }
};

// ---- A and B. -----------------------------------------------------------------------------------

// What the threads of one run share.
class Run {
 public:
  explicit Run(int threads) : mappers_(static_cast<std::size_t>(threads - 1)) {}

  // One B's part. Written by that B; read by A when `standing` says that B stands still.
  struct alignas(64) Mapper {
    std::atomic<bool> ready{false};
    std::atomic<bool> standing{true};
    LatencyHistogram ticks;
  };

  // Calls `turn()` over and over while A populates, and records its latency.
  template <typename Turn>
  void BeMapper(Mapper& mapper, Turn turn) {
    mapper.ready.store(true, std::memory_order_release);
    while (!finished_.load(std::memory_order_acquire)) {
      // Sequentially consistent, both: either A sees that this thread moves, or this thread sees
      // that A has stopped. So nothing is timed between A's StopMappers() and the next
      // StartMappers().
      mapper.standing.store(false, std::memory_order_seq_cst);
      while (populating_.load(std::memory_order_seq_cst)) {
        const std::uint64_t start = TickClock::Now();
        turn();
        mapper.ticks.Record(TickClock::Now() - start);
      }
      mapper.standing.store(true, std::memory_order_release);
      CpuRelax();
    }
  }

  void AwaitMappers() {
    for (Mapper& mapper : mappers_) {
      SpinUntil([&] { return mapper.ready.load(std::memory_order_acquire); });
    }
  }
  void StartMappers() { populating_.store(true, std::memory_order_seq_cst); }
  void StopMappers() {
    populating_.store(false, std::memory_order_seq_cst);
    for (Mapper& mapper : mappers_) {
      SpinUntil([&] { return mapper.standing.load(std::memory_order_seq_cst); });
    }
  }
  void Finish(double seconds_per_round) {
    seconds_per_round_ = seconds_per_round;
    finished_.store(true, std::memory_order_release);
  }

  Mapper& mapper(int index) { return mappers_[static_cast<std::size_t>(index)]; }
  // REQUIRES: Finish() was called, and happened before.
  double seconds_per_round() const { return seconds_per_round_; }

  LatencyHistogram AllTicks() const {
    LatencyHistogram all;
    for (const Mapper& mapper : mappers_) all.Merge(mapper.ticks);
    return all;
  }

 private:
  // Both flags are A's; a line of their own, which A writes twice a round.
  alignas(64) std::atomic<bool> populating_{false};
  std::atomic<bool> finished_{false};
  double seconds_per_round_ = 0;  // published by finished_
  std::vector<Mapper> mappers_;
};

struct Outcome {
  std::uint64_t rounds = 0;
  double populating_seconds = 0;
  const char* error = nullptr;

  double seconds_per_round() const {
    return rounds == 0 ? 0 : populating_seconds / static_cast<double>(rounds);
  }
};

std::size_t RangeBytes() {
  const int mebibytes = absl::GetFlag(FLAGS_range_mib);
  return static_cast<std::size_t>(mebibytes) << 20;
}

std::vector<std::byte*> PopulateRanges(auto& space) {
  std::vector<std::byte*> ranges(static_cast<std::size_t>(absl::GetFlag(FLAGS_ranges)));
  for (std::byte*& range : ranges) range = space.PopulateRange(RangeBytes());
  return ranges;
}

// Gives the ranges of a round back to the kernel, and checks that the round was a full one and that
// the next can be.
template <typename Space>
void GiveBack(Space& space, const std::vector<std::byte*>& ranges, Outcome& outcome) {
  const std::size_t bytes = RangeBytes();
  for (std::byte* range : ranges) {
    if (ResidentPages(range, bytes) != bytes / kBytesPerPage)
      outcome.error = "pages are missing after populate";
  }
  for (std::byte* range : ranges) space.Unmap(range, bytes);
  if constexpr (Space::kKeepsUnmapped) {
    space.PurgeUnmapped();
    for (std::byte* range : ranges) {
      if (ResidentPages(range, bytes) != 0)
        outcome.error = "pages are still present after unmap and purge";
    }
  }
}

// One round of A.
template <typename Space>
void PopulateRound(Space& space, Run& run, Outcome& outcome) {
  run.StartMappers();
  const std::uint64_t start = MonotonicNanoseconds();
  const std::vector<std::byte*> ranges = PopulateRanges(space);
  const std::uint64_t end = MonotonicNanoseconds();
  run.StopMappers();

  outcome.populating_seconds += static_cast<double>(end - start) * 1e-9;
  ++outcome.rounds;
  GiveBack(space, ranges, outcome);
}

template <typename Space>
Outcome BePopulator(Space& space, Run& run) {
  const double min_seconds = absl::GetFlag(FLAGS_min_seconds);
  Outcome outcome;
  run.AwaitMappers();
  GiveBack(space, PopulateRanges(space), outcome);  // warms up, while B stands
  do {
    PopulateRound(space, run, outcome);
  } while (outcome.populating_seconds < min_seconds && outcome.error == nullptr);
  run.Finish(outcome.seconds_per_round());
  return outcome;
}

// ---- Results. -----------------------------------------------------------------------------------

// One run of one case, in the units of the report.
struct Sample {
  double a_seconds = 0;
  double calls = 0;
  double calls_per_second = 0;
  double p50_us = 0;
  double p99_us = 0;
  double p999_us = 0;
  double worst_us = 0;
};

// Samples by number of threads, for one way to populate, in the order of registration.
struct CaseSamples {
  std::string name;
  std::map<int, std::vector<Sample>> by_threads;
};

// Filled on the main thread, where thread 0 of every run is.
std::vector<CaseSamples>& AllSamples() {
  static std::vector<CaseSamples> samples;
  return samples;
}

Sample Summarize(const Outcome& outcome, const LatencyHistogram& ticks) {
  const auto microseconds = [](std::uint64_t value) {
    return TickClock::ToNanoseconds(value) * 1e-3;
  };
  Sample sample;
  sample.a_seconds = outcome.seconds_per_round();
  sample.calls = static_cast<double>(ticks.count());
  sample.calls_per_second = sample.calls / outcome.populating_seconds;
  sample.p50_us = microseconds(ticks.Percentile(0.5));
  sample.p99_us = microseconds(ticks.Percentile(0.99));
  sample.p999_us = microseconds(ticks.Percentile(0.999));
  sample.worst_us = microseconds(ticks.max());
  return sample;
}

void Report(benchmark::State& state, const Outcome& outcome, const LatencyHistogram& ticks,
            CaseSamples& samples) {
  const Sample sample = Summarize(outcome, ticks);
  samples.by_threads[state.threads()].push_back(sample);
  state.counters["a_seconds"] = sample.a_seconds;
  state.counters["rounds"] = static_cast<double>(outcome.rounds);
  if (state.threads() == 1) return;
  state.counters["calls"] = sample.calls;
  state.counters["calls_per_second"] = sample.calls_per_second;
  state.counters["p50_us"] = sample.p50_us;
  state.counters["p99_us"] = sample.p99_us;
  state.counters["p999_us"] = sample.p999_us;
  state.counters["worst_us"] = sample.worst_us;
}

double Median(const std::vector<Sample>& samples, double Sample::*field) {
  std::vector<double> values;
  for (const Sample& sample : samples) values.push_back(sample.*field);
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

std::string Duration(double microseconds) {
  if (microseconds < 1e3) return absl::StrFormat("%.2f us", microseconds);
  if (microseconds < 1e6) return absl::StrFormat("%.2f ms", microseconds * 1e-3);
  return absl::StrFormat("%.2f s", microseconds * 1e-6);
}

void PrintRow(std::FILE* out, const std::string& name, const std::vector<Sample>& samples,
              const std::string& alone) {
  const auto duration = [&samples](double Sample::*field) {
    return Duration(Median(samples, field));
  };
  absl::FPrintF(out, "%-26s %11.0f %11.0f %10s %10s %10s %10s %9.3f %9s\n", name,
                Median(samples, &Sample::calls), Median(samples, &Sample::calls_per_second),
                duration(&Sample::p50_us), duration(&Sample::p99_us), duration(&Sample::p999_us),
                duration(&Sample::worst_us), Median(samples, &Sample::a_seconds), alone);
}

void PrintRows(std::FILE* out, const CaseSamples& samples) {
  const auto alone = samples.by_threads.find(1);
  const std::string alone_seconds =
      alone == samples.by_threads.end()
          ? "-"
          : absl::StrFormat("%.3f", Median(alone->second, &Sample::a_seconds));
  for (const auto& [threads, runs] : samples.by_threads) {
    if (threads == 1) continue;
    const std::string mappers = threads == 2 ? "" : absl::StrCat(", ", threads - 1, " Bs");
    PrintRow(out, samples.name + mappers, runs, alone_seconds);
  }
}

// For people; to standard error when standard output is for machines.
void PrintTable() {
  std::FILE* out = StandardOutputIsForMachines() ? stderr : stdout;
  absl::FPrintF(out,
                "\nB maps %d KiB, touches a page and unmaps while A populates %d x %d MiB: B's "
                "calls and latencies, and\n"
                "A's seconds per round, with B and alone. Medians over repetitions.\n"
                "%-26s %11s %11s %10s %10s %10s %10s %9s %9s\n",
                kMappedByB >> 10, absl::GetFlag(FLAGS_ranges), absl::GetFlag(FLAGS_range_mib), "",
                "B: calls", "per second", "p50", "p99", "p99.9", "worst", "A", "A alone");
  for (const CaseSamples& samples : AllSamples()) PrintRows(out, samples);
}

// ---- Cases. -------------------------------------------------------------------------------------

// A fresh space and a fresh Run for every run of a case; made and destroyed on the main thread.
template <typename Space>
struct Stage {
  static inline std::unique_ptr<Run> run;

  static void SetUp(const benchmark::State& state) {
    PerRun<Space>::SetUp(state);
    run = std::make_unique<Run>(state.threads());
  }
  static void TearDown(const benchmark::State& state) {
    run.reset();
    PerRun<Space>::TearDown(state);
  }
};

template <typename Space>
void MapTouchUnmap(Space& space) {
  std::byte* memory = space.Map(kMappedByB);
  TouchPages(memory, 1);
  space.Unmap(memory, kMappedByB);
}

enum class PageSize { kSmall, kHuge };

// `case_index`: where in AllSamples() the results go.
template <typename Space>
void RunStall(benchmark::State& state, std::size_t case_index) {
  Space& space = PerRun<Space>::Get();
  Run& run = *Stage<Space>::run;
  const int thread = state.thread_index();
  std::unique_ptr<ScopedPin> pin;
  if (absl::GetFlag(FLAGS_pin)) pin = std::make_unique<ScopedPin>(thread);

  Outcome outcome;
  for (auto _ : state) {
    if (thread == 0) {
      outcome = BePopulator(space, run);
    } else {
      run.BeMapper(run.mapper(thread - 1), [&space] { MapTouchUnmap(space); });
    }
    // Google Benchmark averages over the threads, then divides by the iterations of all of them.
    state.SetIterationTime(run.seconds_per_round() * state.threads());
  }
  if (thread != 0) return;
  // All threads have left their loops: Google Benchmark has a barrier there.
  Report(state, outcome, run.AllTicks(), AllSamples()[case_index]);
  if (outcome.error != nullptr) state.SkipWithError(outcome.error);
}

template <typename Space>
void RegisterStall(const std::string& implementation, PageSize page_size) {
  const std::size_t case_index = AllSamples().size();
  AllSamples().push_back({implementation, {}});
  Register(absl::StrCat("populate_stall/", implementation),
           [case_index, page_size](benchmark::State& state) {
             std::unique_ptr<ScopedNoHugePages> no_huge_pages;
             if (page_size == PageSize::kSmall && state.thread_index() == 0) {
               no_huge_pages = std::make_unique<ScopedNoHugePages>();
             }
             RunStall<Space>(state, case_index);
           },
           {.manual_time = true,
            .iterations = 1,
            .set_up = Stage<Space>::SetUp,
            .tear_down = Stage<Space>::TearDown,
            .unit = benchmark::kSecond});
}

bool FlagsAreSane() {
  if (absl::GetFlag(FLAGS_ranges) >= 1 && absl::GetFlag(FLAGS_range_mib) >= 1) return true;
  absl::FPrintF(stderr, "stall_benchmark: --ranges and --range_mib must be at least 1\n");
  return false;
}

// Whether A's ranges fit; says what to do when they do not.
bool RangesFitInMemory() {
  constexpr std::size_t kSpare = std::size_t{256} << 20;
  const std::size_t wanted = RangeBytes() * static_cast<std::size_t>(absl::GetFlag(FLAGS_ranges));
  const std::size_t available = AvailableMemory();
  if (wanted + kSpare <= available) return true;
  absl::FPrintF(stderr,
                "stall_benchmark: A's %d x %d MiB and 256 MiB to spare do not fit into the %d MiB "
                "of memory that "
                "are available; choose a smaller --range_mib\n",
                absl::GetFlag(FLAGS_ranges), absl::GetFlag(FLAGS_range_mib), available >> 20);
  return false;
}

bool RegisterCases() {
  if (!FlagsAreSane() || !RangesFitInMemory()) return false;
  using enum PageSize;
  TickClock::NanosecondsPerTick();  // calibrates before anything runs
  RegisterStall<KernelPopulatedBy<ByMapPopulate>>("kernel/populate", kSmall);
  if (HasPopulateWrite()) {
    RegisterStall<KernelPopulatedBy<ByPopulateWrite>>("kernel/madvise", kSmall);
  } else {
    NoteLeftOut("populate_stall/kernel/madvise", "this kernel lacks MADV_POPULATE_WRITE");
  }
  RegisterStall<KernelPopulatedBy<ByTouch>>("kernel/touch", kSmall);
  RegisterStall<SmallPages<FreeholdSpace>>("freehold/populate", kSmall);
  RegisterStall<SmallPages<CoarseSpace>>("coarse/populate", kSmall);
  if (HasHugePagesByAdvice()) {
    RegisterStall<KernelPopulatedBy<ByTouchHuge>>("kernel/touch_huge", kHuge);
    RegisterStall<HugePagesOf>("freehold/populate_huge", kHuge);
  } else {
    NoteLeftOut("populate_stall with huge pages",
                "transparent huge pages are switched off on this system");
  }
  return true;
}

}  // namespace
}  // namespace freehold::bench

int main(int argc, char** argv) {
  const int status = freehold::bench::RunBenchmarks(argc, argv, freehold::bench::RegisterCases);
  freehold::bench::PrintTable();
  return status;
}
