// How long verbs hold a region's tree lock, and whether that depends on how much they are about (DESIGN §12, P6).
//
//   tree_lock_hold/freehold/populate_SIZE        map SIZE and make all of it present
//   tree_lock_hold/freehold/protect_SIZE         SIZE of present pages: read-only, then read-write
//   tree_lock_hold/freehold/unmap_SIZE           unmap SIZE of present pages; all of them go back to the kernel
//   tree_lock_hold/freehold/VERB_4KiB_cold       the same of 4 KiB, right after memory has been filled that takes the place of
//                                                everything else in the processor's own caches
//   tree_lock_hold/freehold/VERB_COUNTvmas       the same verbs, and `replace`, a fixed map over what is there, on
//                                                a range of COUNT mappings of one page, untouched
//
// It ends with two tables: the histograms of a small and of a large range side by side, the small one with warm and with
// cold caches. Between two holds of a verb on 4 GiB, memory is filled or dropped: what that costs the next hold, which
// then waits for memory, is seen in the cold case, where the range is as small as can be.
//
// What is measured. The holds of tree locks during the verb, and nothing else, by AddressSpace::TreeLockHolds():
// the counters `p50_ns`, `p99_ns`, `p999_ns` and `worst_ns` are percentiles of a hold, at most 25 % too high, and
// `holds` is how many there were for one verb. Time is that of the verb. The baseline is the smallest SIZE, or
// COUNT: a verb that does its work outside the lock has the same holds for all.
//
// What is the same for all. Free memory goes back to the kernel at once (free_resident_limit is 0), so that 4 KiB
// take the way that 4 GiB take, and everything but the verb itself is undone outside the measurement. The caches
// are warm but in the cold cases: right before each verb, all verbs run on a small mapping beside, since populating
// gigabytes leaves them cold. A hold includes one reading of the clock, and whatever interrupts the thread: `worst_ns` of a
// virtual machine is the scheduler's.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "bench/support/cpu.h"
#include "bench/support/kernel_memory.h"
#include "bench/support/runner.h"
#include "bench/support/tick_clock.h"
#include "vm/address_space.h"
#include "vm/os/linux_kernel.h"
#include "vm/sync/time_histogram.h"

namespace freehold::bench {
namespace {

using vm::AddressSpace;
using vm::PageNumber;
using vm::PageRange;
using vm::Pages;

constinit vm::os::LinuxKernel linux_kernel;

void Require(vm::Error error, const char* verb) {
  if (error.ok()) return;
  std::fprintf(stderr, "AddressSpace::%s: %s\n", verb, vm::ToString(error.code));
  std::exit(1);
}

class Space {
 public:
  Space() {
    const vm::Result<AddressSpace*> space = AddressSpace::Create(
        linux_kernel, {.free_resident_limit = {0}, .record_tree_lock_holds = true});
    Require(space.error(), "Create");
    space_ = *space;
  }
  ~Space() { AddressSpace::Destroy(space_); }
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;

  PageRange Map(Pages count, const vm::MapOptions& options = {}) {
    const vm::Result<PageRange> range = space_->Map(count, options);
    Require(range.error(), "Map");
    return *range;
  }
  // `count` mappings of a page in a row.
  PageRange MapInARow(std::size_t count) {
    const PageRange row = Map({count});
    for (PageNumber page = row.first; page < row.end; page = page + Pages{1}) Replace({page, page + Pages{1}});
    return row;
  }
  void Replace(PageRange range) {
    (void)Map(range.count(), {.placement = vm::Placement::kReplace,
                              .address = range.address(),
                              .content = vm::Content::kAnything});
  }
  void Unmap(PageRange range) { Require(space_->Unmap(range), "Unmap"); }
  void Protect(PageRange range, vm::os::Protection protection) {
    Require(space_->Protect(range, protection), "Protect");
  }
  // As after Create, but for what is committed.
  void Purge() { (void)space_->Purge(vm::PurgeScope::kAll); }
  vm::sync::TimeHistogram Holds() const { return space_->TreeLockHolds(); }

 private:
  AddressSpace* space_;
};

// ---- The histograms side by side. ----------------------------------------------------------------

// All repetitions of a case together, by verb and size.
std::map<std::string, std::map<std::string, vm::sync::TimeHistogram>> histograms;

// A column for each verb and size, a row for each bucket that anything fell into: shares of the holds in percent.
void PrintTable(std::FILE* out, const char* what, const std::vector<std::string>& verbs,
                const std::vector<std::string>& sizes) {
  std::vector<const vm::sync::TimeHistogram*> columns;
  std::string heading = absl::StrFormat("%-10s", "");
  std::string names = absl::StrFormat("%-10s", "ns, up to");
  for (const std::string& verb : verbs) {
    absl::StrAppendFormat(&heading, "  %*s", static_cast<int>(11 * sizes.size()), verb);
    for (const std::string& size : sizes) {
      columns.push_back(&histograms[verb][size]);
      absl::StrAppendFormat(&names, " %11s", size);
    }
    names += " ";
  }
  absl::FPrintF(out, "\nHolds of tree locks, %s: how many of a hundred.\n%s\n%s\n", what, heading, names);
  for (std::size_t bucket = 0; bucket < vm::sync::TimeHistogram::kBuckets; ++bucket) {
    std::string row = absl::StrFormat("%-10d", vm::sync::TimeHistogram::LastOf(bucket).value);
    bool any = false;
    for (std::size_t i = 0; i < columns.size(); ++i) {
      const std::uint64_t holds = columns[i]->count(bucket);
      any = any || holds != 0;
      if (holds == 0) {
        absl::StrAppendFormat(&row, " %11s", "-");
      } else {
        absl::StrAppendFormat(&row, " %11.2f",
                              100.0 * static_cast<double>(holds) / static_cast<double>(columns[i]->count()));
      }
      if ((i + 1) % sizes.size() == 0) row += " ";
    }
    if (any) absl::FPrintF(out, "%s\n", row);
  }
}

// For people; to standard error when standard output is for machines.
void PrintTables() {
  std::FILE* out = StandardOutputIsForMachines() ? stderr : stdout;
  PrintTable(out, "by how much memory a verb is about", {"populate", "protect", "unmap"}, {"4KiB", "4KiB_cold", "4GiB"});
  PrintTable(out, "by how many mappings", {"protect", "unmap", "replace"}, {"1vmas", "100000vmas"});
}

// Times `verb` and collects its holds.
class Meter {
 public:
  Meter(benchmark::State& state, const Space& space) : state_(state), space_(space) {}

  template <typename Verb>
  void Measure(const Verb& verb) {
    vm::sync::TimeHistogram holds = space_.Holds();
    const std::uint64_t start = MonotonicNanoseconds();
    verb();
    state_.SetIterationTime(static_cast<double>(MonotonicNanoseconds() - start) * 1e-9);
    vm::sync::TimeHistogram after = space_.Holds();
    after -= holds;
    holds_ += after;
  }
  void Report(const char* verb, const std::string& size) const {
    histograms[verb][size] += holds_;
    const auto percentile = [&](double fraction) {
      return static_cast<double>(holds_.Percentile(fraction).value);
    };
    state_.counters["p50_ns"] = percentile(0.5);
    state_.counters["p99_ns"] = percentile(0.99);
    state_.counters["p999_ns"] = percentile(0.999);
    state_.counters["worst_ns"] = percentile(1);
    state_.counters["holds"] =
        static_cast<double>(holds_.count()) / static_cast<double>(state_.iterations());
  }

 private:
  benchmark::State& state_;
  const Space& space_;
  vm::sync::TimeHistogram holds_;
};

// ---- Verbs on one mapping. ----------------------------------------------------------------------

enum class Verb { kPopulate, kProtect, kUnmap, kReplace };

const char* NameOf(Verb verb) {
  switch (verb) {
    case Verb::kPopulate: return "populate";
    case Verb::kProtect: return "protect";
    case Verb::kUnmap: return "unmap";
    case Verb::kReplace: return "replace";
  }
  return "";
}

void ProtectPair(Space& space, PageRange range) {
  space.Protect(range, vm::os::Protection::kRead);
  space.Protect(range, vm::os::Protection::kReadWrite);
}

constexpr vm::MapOptions kPopulated = {.huge_pages = vm::os::HugePages::kPrefer, .populate = true};

// All verbs on a mapping of `size`, or of a huge page if that is less: in the same zone either way.
void WarmUp(Space& space, Pages size) {
  const PageRange range = space.Map(std::min(size, Pages{vm::kPagesPerHugePage}), kPopulated);
  ProtectPair(space, range);
  space.Unmap(range);
}

// Fills what is larger than the caches of one processor.
class Chill {
 public:
  Chill() : bytes_(Scaled(std::size_t{16} << 20, std::size_t{1} << 16)) {}
  void operator()() {
    std::memset(bytes_.data(), ++value_, bytes_.size());
    benchmark::ClobberMemory();
  }

 private:
  std::vector<char> bytes_;
  int value_ = 0;
};

void OnOneMapping(benchmark::State& state, Verb verb, const std::string& name, Pages size, bool cold) {
  const ScopedPin pin(state.thread_index());
  Space space;
  Meter meter(state, space);
  std::optional<Chill> chill;
  if (cold) chill.emplace();
  const auto prepare = [&] {
    WarmUp(space, size);
    if (chill) (*chill)();
  };
  space.Unmap(space.Map(size));  // The address space for it is committed from now on.
  space.Purge();
  for (auto _ : state) {
    PageRange range;
    if (verb == Verb::kPopulate) {
      prepare();
      meter.Measure([&] { range = space.Map(size, kPopulated); });
    } else {
      range = space.Map(size, kPopulated);
      prepare();
    }
    if (verb == Verb::kProtect) meter.Measure([&] { ProtectPair(space, range); });
    if (verb == Verb::kUnmap) {
      meter.Measure([&] { space.Unmap(range); });
    } else {
      space.Unmap(range);
    }
    space.Purge();
  }
  meter.Report(NameOf(verb), name);
}

// ---- Verbs on many mappings. --------------------------------------------------------------------

void OnManyMappings(benchmark::State& state, Verb verb, const std::string& name, std::size_t count) {
  const ScopedPin pin(state.thread_index());
  Space space;
  Meter meter(state, space);
  for (auto _ : state) {
    const PageRange row = space.MapInARow(count);
    WarmUp(space, {1});
    switch (verb) {
      case Verb::kProtect: meter.Measure([&] { ProtectPair(space, row); }); break;
      case Verb::kReplace: meter.Measure([&] { space.Replace(row); }); break;
      default: meter.Measure([&] { space.Unmap(row); }); break;
    }
    space.Unmap(row);
    space.Purge();
  }
  meter.Report(NameOf(verb), name);
}

// ---- Registration. ------------------------------------------------------------------------------

constexpr std::size_t kKiB = 1024;
constexpr std::size_t kGiB = std::size_t{1} << 30;

void RegisterOne(Verb verb, const std::string& size, int iterations,
                 const std::function<void(benchmark::State&)>& function) {
  Register(absl::StrCat("tree_lock_hold/freehold/", NameOf(verb), "_", size), function,
           {.max_threads = 1,
            .manual_time = true,
            .iterations = static_cast<int>(Scaled(static_cast<std::size_t>(iterations), 1)),
            .unit = benchmark::kMicrosecond});
}

bool RegisterCases() {
  struct Size {
    const char* name;
    std::size_t bytes;
    bool cold = false;
  };
  // The same number of verbs for both: percentiles of few holds depend on how many there are.
  constexpr int kVerbs = 8;
  const bool has_memory = AvailableMemory() > 5 * kGiB;
  if (!has_memory) NoteLeftOut("tree_lock_hold/4GiB", "less than 5 GiB of memory available");
  for (const Verb verb : {Verb::kPopulate, Verb::kProtect, Verb::kUnmap}) {
    for (const Size& size : {Size{"4KiB", 4 * kKiB}, Size{"4KiB_cold", 4 * kKiB, true}, Size{"4GiB", 4 * kGiB}}) {
      if (size.bytes >= kGiB && !has_memory) continue;
      const Pages pages = vm::PagesFor({Scaled(size.bytes, std::min(size.bytes, std::size_t{8} << 20))});
      RegisterOne(verb, size.name, kVerbs,
                  [verb, size, pages](benchmark::State& state) {
                    OnOneMapping(state, verb, size.name, pages, size.cold);
                  });
    }
  }
  constexpr int kVerbsOnMany = 4;
  for (const Verb verb : {Verb::kProtect, Verb::kUnmap, Verb::kReplace}) {
    for (const std::size_t count : {std::size_t{1}, std::size_t{100'000}}) {
      const std::size_t scaled = Scaled(count, std::min<std::size_t>(count, 100));
      const std::string name = absl::StrCat(count, "vmas");
      RegisterOne(verb, name, kVerbsOnMany,
                  [verb, name, scaled](benchmark::State& state) { OnManyMappings(state, verb, name, scaled); });
    }
  }
  return true;
}

}  // namespace
}  // namespace freehold::bench

int main(int argc, char** argv) {
  const int status = freehold::bench::RunBenchmarks(argc, argv, freehold::bench::RegisterCases);
  freehold::bench::PrintTables();
  return status;
}
