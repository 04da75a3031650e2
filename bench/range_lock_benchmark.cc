// Locking page ranges: RangeLock under its default policy kAdaptive (`freehold`), under kTree
// (`tree`) and kCoarse (`coarse`), and a std::shared_mutex that knows no ranges (`shared_mutex`).
//
//   pair_exclusive/IMPL         lock and unlock 16 pages that nobody else wants
//   pair_shared/IMPL            the same, shared
//   pair_exclusive/freehold/recorded   with its wait and hold counted (RangeLock::InstallRecorder)
//   disjoint/IMPL/own_granule   every thread its own 16 pages exclusively, 2 MiB apart
//   disjoint/IMPL/same_granule  the same, side by side within 2 MiB
//   overlapping/IMPL            every thread the same 16 pages exclusively
//   mixed/IMPL                  2 MiB: nine times of ten all of it shared, as populate and faults
//                               do, else 16 pages of it exclusively
//   long_range/IMPL/own         every thread its own 1 GiB exclusively
//   long_range/IMPL/beside      thread 0 locks 1 GiB over and over; every other thread its own 16
//                               pages outside of it. Items are those of the others.
//
// What is measured. Wall-clock time of all threads together; an item is one lock and unlock,
// through a Guard as the verbs use it: the list of held guards included, the rank checker (debug
// builds) not. Every thread is pinned to a processor.
//
// Fairness. In `overlapping` and `mixed` each acquisition is timed, which costs every
// implementation the same two readings of the processor's counter; longest_wait_us_<i> is the
// longest that thread i waited. A virtual machine's scheduler can show in it. `overlapping` counts
// under the lock and fails when the count is wrong.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <shared_mutex>
#include <string>

#include "absl/base/attributes.h"
#include "absl/strings/str_cat.h"
#include "bench/support/cpu.h"
#include "bench/support/random.h"
#include "bench/support/runner.h"
#include "bench/support/tick_clock.h"
#include "vm/page_range.h"
#include "vm/sync/range_lock.h"
#include "vm/units.h"

namespace freehold::bench {
namespace {

using vm::PageRange;
using vm::Pages;
using vm::sync::LockMode;
using vm::sync::LockPolicy;
using vm::sync::RangeLock;

// A place where ranges lie in an address space; nothing is mapped there.
constexpr vm::PageNumber kBase{std::size_t{1} << 34};
constexpr std::size_t kPages = 16;
constexpr Pages kLongPages{vm::GiB(1).value / vm::kPageSize};

constexpr PageRange PagesAt(std::size_t page, Pages count = {kPages}) {
  return PageRange::Of(kBase + Pages{page}, count);
}

// ---- Implementations: a lock, and an object that holds a range of it. ---------------------------

template <LockPolicy policy>
class RangeLockOf {
 public:
  static constexpr const char* kName =
      policy == LockPolicy::kAdaptive ? "freehold" : vm::sync::ToString(policy);

  class Holder {
   public:
    ABSL_ATTRIBUTE_ALWAYS_INLINE Holder(RangeLockOf& lock, PageRange range, LockMode mode)
        : guard_(lock.lock_, range, mode, vm::sync::Operation::kTest) {}

   private:
    RangeLock::Guard guard_;
  };

 private:
  RangeLock lock_{policy};
};

// kAdaptive with a recorder.
class RecordedRangeLock {
 public:
  class Holder {
   public:
    Holder(RecordedRangeLock& lock, PageRange range, LockMode mode)
        : guard_(lock.lock_, range, mode, vm::sync::Operation::kTest) {}

   private:
    RangeLock::Guard guard_;
  };

  RecordedRangeLock() { lock_.InstallRecorder(&recorder_); }

 private:
  vm::sync::LockTimesRecorder recorder_;
  RangeLock lock_{LockPolicy::kAdaptive};
};

class SharedMutex {
 public:
  static constexpr const char* kName = "shared_mutex";

  class Holder {
   public:
    Holder(SharedMutex& lock, PageRange, LockMode mode) : lock_(lock), mode_(mode) {
      mode == LockMode::kShared ? lock_.mutex_.lock_shared() : lock_.mutex_.lock();
    }
    ~Holder() { mode_ == LockMode::kShared ? lock_.mutex_.unlock_shared() : lock_.mutex_.unlock(); }
    Holder(const Holder&) = delete;
    Holder& operator=(const Holder&) = delete;

   private:
    SharedMutex& lock_;
    const LockMode mode_;
  };

 private:
  std::shared_mutex mutex_;
};

// The lock that all threads of a case use, and what it protects in `overlapping`.
template <typename Lock>
struct alignas(vm::kCacheLineSize) Shared {
  Lock lock;
  alignas(vm::kCacheLineSize) std::int64_t count = 0;

  static Shared& Get() {
    static Shared shared;
    return shared;
  }
};

// ---- Operations. --------------------------------------------------------------------------------

void SetItems(benchmark::State& state) {
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}

// The longest of a thread's waits, under a name of its own: counters of all threads are added up.
void ReportWait(benchmark::State& state, std::uint64_t ticks) {
  state.counters[absl::StrCat("longest_wait_us_", state.thread_index())] =
      TickClock::ToNanoseconds(ticks) / 1000;
}

template <typename Lock>
void LockAndUnlock(benchmark::State& state, PageRange range, LockMode mode) {
  const ScopedPin pin(state.thread_index());
  Lock& lock = Shared<Lock>::Get().lock;
  for (auto _ : state) {
    typename Lock::Holder holder(lock, range, mode);
    benchmark::ClobberMemory();
  }
  SetItems(state);
}

template <typename Lock>
void LockOwn(benchmark::State& state, std::size_t stride, Pages count) {
  const auto index = static_cast<std::size_t>(state.thread_index());
  LockAndUnlock<Lock>(state, PagesAt(index * stride, count), LockMode::kExclusive);
}

template <typename Lock>
void LockSame(benchmark::State& state) {
  const ScopedPin pin(state.thread_index());
  Shared<Lock>& shared = Shared<Lock>::Get();
  if (state.thread_index() == 0) shared.count = 0;
  std::uint64_t longest = 0;
  for (auto _ : state) {
    const std::uint64_t start = TickClock::Now();
    typename Lock::Holder holder(shared.lock, PagesAt(0), LockMode::kExclusive);
    longest = std::max(longest, TickClock::Now() - start);
    ++shared.count;
    benchmark::ClobberMemory();
  }
  // The loop ends when all threads are done.
  if (shared.count != static_cast<std::int64_t>(state.iterations()) * state.threads()) {
    state.SkipWithError("two threads held the same pages");
  }
  SetItems(state);
  ReportWait(state, longest);
}

template <typename Lock>
void LockMixed(benchmark::State& state) {
  const ScopedPin pin(state.thread_index());
  Lock& lock = Shared<Lock>::Get().lock;
  // A function of the thread's index, the same for every implementation.
  std::array<std::uint8_t, 4096> dice;
  Random random(static_cast<std::uint64_t>(state.thread_index()) + 1);
  for (std::uint8_t& die : dice) die = static_cast<std::uint8_t>(random.Below(10));
  std::uint64_t longest = 0;
  std::size_t next = 0;
  for (auto _ : state) {
    const bool writes = dice[next++ % dice.size()] == 0;
    const PageRange range = PagesAt(0, {writes ? kPages : vm::kPagesPerHugePage});
    const std::uint64_t start = TickClock::Now();
    typename Lock::Holder holder(lock, range, writes ? LockMode::kExclusive : LockMode::kShared);
    longest = std::max(longest, TickClock::Now() - start);
    benchmark::ClobberMemory();
  }
  SetItems(state);
  ReportWait(state, longest);
}

template <typename Lock>
void LockBesideLong(benchmark::State& state) {
  const auto index = static_cast<std::size_t>(state.thread_index());
  if (index != 0) {
    return LockAndUnlock<Lock>(state, PagesAt(kLongPages.value + index * vm::kPagesPerHugePage),
                               LockMode::kExclusive);
  }
  LockAndUnlock<Lock>(state, PagesAt(0, kLongPages), LockMode::kExclusive);
  state.SetItemsProcessed(0);
}

// ---- Registration. ------------------------------------------------------------------------------

// Registers a case for every implementation, next to each other. `run` is called as
// run.operator()<Lock>(state).
template <typename Run>
void ForEachLock(const std::string& operation, const std::string& argument, Run run,
                 const CaseOptions& options = {}) {
  const auto register_one = [&]<typename Lock>() {
    const std::string name = absl::StrCat(operation, "/", Lock::kName);
    Register(
        argument.empty() ? name : absl::StrCat(name, "/", argument),
        [run](benchmark::State& state) { run.template operator()<Lock>(state); }, options);
  };
  register_one.template operator()<RangeLockOf<LockPolicy::kAdaptive>>();
  register_one.template operator()<RangeLockOf<LockPolicy::kTree>>();
  register_one.template operator()<RangeLockOf<LockPolicy::kCoarse>>();
  register_one.template operator()<SharedMutex>();
}

bool RegisterCases() {
  for (const auto& [operation, mode] :
       {std::pair{"pair_exclusive", LockMode::kExclusive}, {"pair_shared", LockMode::kShared}}) {
    ForEachLock(operation, "",
                [mode = mode]<typename Lock>(benchmark::State& state) {
                  LockAndUnlock<Lock>(state, PagesAt(0), mode);
                },
                {.max_threads = 1});
  }
  Register("pair_exclusive/freehold/recorded",
           [](benchmark::State& state) {
             LockAndUnlock<RecordedRangeLock>(state, PagesAt(0), LockMode::kExclusive);
           },
           {.max_threads = 1});
  for (const auto& [argument, stride] :
       {std::pair{"own_granule", vm::kPagesPerHugePage}, {"same_granule", kPages}}) {
    ForEachLock("disjoint", argument, [stride = stride]<typename Lock>(benchmark::State& state) {
      LockOwn<Lock>(state, stride, {kPages});
    });
  }
  ForEachLock("overlapping", "",
              []<typename Lock>(benchmark::State& state) { LockSame<Lock>(state); });
  ForEachLock("mixed", "", []<typename Lock>(benchmark::State& state) { LockMixed<Lock>(state); });
  ForEachLock("long_range", "own", []<typename Lock>(benchmark::State& state) {
    LockOwn<Lock>(state, kLongPages.value, kLongPages);
  });
  ForEachLock("long_range", "beside",
              []<typename Lock>(benchmark::State& state) { LockBesideLong<Lock>(state); },
              {.min_threads = 2});
  return true;
}

}  // namespace
}  // namespace freehold::bench

int main(int argc, char** argv) {
  return freehold::bench::RunBenchmarks(argc, argv, freehold::bench::RegisterCases);
}
