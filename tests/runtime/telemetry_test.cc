// What a reader outside sees of a process, seen by the process itself: counters, mappings and lock waits are what the
// address space says they are, also while others change them.
#include "runtime/telemetry.h"

#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <fstream>
#include <future>
#include <map>
#include <memory>
#include <sstream>
#include <stop_token>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "allocator/object_heap.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "runtime/cli/heap_view.h"
#include "runtime/cli/lock_view.h"
#include "runtime/cli/process_view.h"
#include "runtime/statistics.h"
#include "runtime/version.h"
#include "tests/runtime/subprocess.h"
#include "vm/address_space.h"
#include "vm/os/linux_kernel.h"
#include "vm/os/thread_id.h"
#include "vm/sync/range_lock.h"

namespace freehold::runtime {
namespace {

using cli::LockWait;
using cli::ProcessView;
using ::testing::HasSubstr;
using vm::PageRange;
using vm::Pages;
using vm::sync::LockMode;
using vm::sync::LockPolicy;
using vm::sync::Operation;
using vm::sync::RangeLock;

// The telemetry page of this process.
TelemetryPage* FindPage() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find(TelemetryPage::kName) == std::string::npos) continue;
    return reinterpret_cast<TelemetryPage*>(std::stoull(line, nullptr, 16));
  }
  return nullptr;
}

// A space and a heap whose page this process shows as its own.
class TelemetryTest : public ::testing::TestWithParam<LockPolicy> {
 protected:
  void SetUp() override {
    const auto space = vm::AddressSpace::Create(kernel_, {.reserve = vm::GiB(2),
                                                          .min_reserve = vm::MiB(256),
                                                          .lock_policy = GetParam(),
                                                          .record_range_locks = GetParam() == LockPolicy::kTree});
    ASSERT_TRUE(space.ok());
    space_ = *space;
    const auto heap = allocator::ObjectHeap::Create(*space_);
    ASSERT_TRUE(heap.ok());
    heap_ = *heap;
    // Where only ancestors may look into a process (yama.ptrace_scope 1), the command may look into this one.
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
    ASSERT_EQ(FindPage(), nullptr);
    ASSERT_TRUE(telemetry_.Publish(*space_, heap_, kernel_));
  }
  void TearDown() override {
    if (TelemetryPage* page = FindPage()) munmap(page, sizeof(TelemetryPage));
    if (heap_ != nullptr) allocator::ObjectHeap::Destroy(heap_);
    if (space_ != nullptr) vm::AddressSpace::Destroy(space_);
  }

  static ProcessView Open() {
    absl::StatusOr<ProcessView> view = ProcessView::Open(getpid());
    EXPECT_TRUE(view.ok()) << view.status();
    return *std::move(view);
  }
  static std::string OpenError() { return std::string(ProcessView::Open(getpid()).status().message()); }

  static absl::StatusOr<cli::HeapView> TryReadHeap() {
    const ProcessView view = Open();
    const auto metrics = view.ReadMetrics();
    EXPECT_TRUE(metrics.ok()) << metrics.status();
    return cli::ReadHeap(view, *metrics);
  }
  static cli::HeapView ReadHeap() {
    absl::StatusOr<cli::HeapView> heap = TryReadHeap();
    EXPECT_TRUE(heap.ok()) << heap.status();
    return *std::move(heap);
  }
  static std::string HeapError() { return std::string(TryReadHeap().status().message()); }

  PageRange Map(std::size_t pages, vm::MapOptions options = {}) {
    const auto range = space_->Map({pages}, options);
    EXPECT_TRUE(range.ok());
    return *range;
  }
  RangeLock& LockOf(PageRange range) {
    struct Search {
      PageRange range;
      RangeLock* found;
    } search = {range, nullptr};
    space_->ForEachRegion(
        [](void* to, const vm::RegionLocation& region) {
          auto& search = *static_cast<Search*>(to);
          if (!region.range.Contains(search.range)) return;
          search.found = static_cast<RangeLock*>(const_cast<void*>(region.range_lock));
        },
        &search);
    return *search.found;
  }

  vm::os::LinuxKernel kernel_;
  vm::AddressSpace* space_ = nullptr;
  allocator::ObjectHeap* heap_ = nullptr;
  Telemetry telemetry_;
};

INSTANTIATE_TEST_SUITE_P(Policies, TelemetryTest,
                         ::testing::Values(LockPolicy::kAdaptive, LockPolicy::kTree, LockPolicy::kCoarse),
                         [](const auto& info) { return vm::sync::ToString(info.param); });

std::map<std::string, std::uint64_t> Values(const ProcessView& view) {
  const auto metrics = view.ReadMetrics();
  EXPECT_TRUE(metrics.ok()) << metrics.status();
  std::map<std::string, std::uint64_t> values;
  for (const ProcessView::Metric& metric : *metrics) {
    EXPECT_TRUE(values.emplace(metric.name, metric.value).second) << metric.name << " twice";
    EXPECT_NE(metric.help, "") << metric.name;
    std::uint64_t sum = 0;
    for (const std::uint64_t part : metric.by_region) sum += part;
    if (!metric.by_region.empty()) {
      EXPECT_EQ(sum, metric.value) << metric.name;
      EXPECT_EQ(metric.by_region.size(), view.Regions().size()) << metric.name;
    }
  }
  return values;
}

// ---- counters ----

TEST_P(TelemetryTest, CountersAreThoseOfTheSpaceAndTheHeap) {
  std::vector<PageRange> ranges;
  for (std::size_t i = 1; i <= 50; ++i) ranges.push_back(Map(i));
  for (std::size_t i = 0; i < 50; i += 2) EXPECT_TRUE(space_->Unmap(ranges[i]).ok());
  EXPECT_TRUE(space_->Protect(ranges[1], vm::os::Protection::kRead).ok());
  std::map<std::string, std::uint64_t> values = Values(Open());
  const vm::AddressSpaceStats stats = space_->Stats();
  const std::map<std::string, std::uint64_t> expected = {
      {"vm_mapped_bytes", stats.mapped.value},
      {"vm_heap_zone_mapped_bytes", stats.mapped_ordinary.value},
      {"vm_free_resident_bytes", stats.free_resident.value},
      {"vm_committed_bytes", stats.committed.value},
      {"vm_metadata_bytes", stats.metadata.value},
      {"vm_vmas", stats.vmas},
      {"vm_maps_total", stats.maps},
      {"vm_unmaps_total", stats.unmaps},
      {"vm_deferred_unmaps", stats.deferred_unmaps},
      {"vm_reuses_total", stats.reuses},
      {"vm_zeroed_pages_total", stats.zeroed_pages},
      {"vm_purged_pages_total", stats.purged_pages},
      {"vm_purge_calls_total", stats.purge_calls},
      {"vm_heap_splits_total", stats.heap_splits},
      {"vm_coarse_retries_total", stats.coarse_retries},
      {"vm_remap_moves_total", stats.remap_moves},
      {"vm_kernel_moves_total", stats.kernel_moves},
      {"vm_window_hits_total", stats.window_hits},
      {"vm_ignored_advice_total", stats.ignored_advice}};
  for (const auto& [name, value] : expected) {
    ASSERT_EQ(values.count(name), 1u) << name;
    EXPECT_EQ(values[name], value) << name;
  }
  EXPECT_GE(stats.maps, 50u);
  EXPECT_GE(values["kernel_mmap_total"], 1u);
}

TEST_P(TelemetryTest, SaysWhatItIs) {
  const ProcessView view = Open();
  EXPECT_EQ(view.pid(), getpid());
  EXPECT_EQ(view.release(), kVersion);
  EXPECT_EQ(view.lock_policy(), vm::sync::ToString(GetParam()));
  EXPECT_GE(view.uptime_seconds(), 0);
  EXPECT_LT(view.uptime_seconds(), 60);
  std::uint64_t bytes = 0;
  for (const ProcessView::Region& region : view.Regions()) bytes += region.range.bytes().value;
  EXPECT_EQ(bytes, space_->reservation().bytes().value);
}

TEST_P(TelemetryTest, AddsAMetricLater) {
  static constexpr std::uint32_t kParts[] = {1, 10, 100};
  telemetry_.Add({.name = "test_things",
                  .help = "Things.",
                  .kind = vm::Metric::Kind::kGauge,
                  .first = kParts,
                  .width = sizeof(kParts[0]),
                  .count = 3,
                  .stride = sizeof(kParts[0]),
                  .scale = 2});
  EXPECT_EQ(Values(Open())["test_things"], 222u);
  Telemetry unpublished;
  unpublished.Add({.name = "nothing", .help = "Happens.", .first = kParts});
}

TEST_P(TelemetryTest, LockTimesAreThoseOfTheSpace) {
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(space_->Unmap(Map(1 + i % 7)).ok());
  const ProcessView view = Open();
  const auto times = view.ReadLockTimes();
  ASSERT_TRUE(times.ok()) << times.status();
  EXPECT_EQ(view.records_lock_times(), GetParam() == LockPolicy::kTree);
  EXPECT_EQ(times->empty(), !view.records_lock_times());
  for (const auto& [operation, read] : *times) {
    const vm::sync::LockTimes own = space_->RangeLockTimes(operation);
    EXPECT_EQ(read.waits.count(), own.waits.count());
    EXPECT_EQ(read.holds.count(), own.holds.count());
    EXPECT_EQ(read.waits.Percentile(1).value, own.waits.Percentile(1).value);
  }
}

// ---- mappings ----

std::vector<ProcessView::MappedVma> ReadVmas(const ProcessView& view) {
  auto vmas = view.ReadVmas();
  EXPECT_TRUE(vmas.ok()) << vmas.status();
  return *std::move(vmas);
}

TEST_P(TelemetryTest, MappingsAreThoseOfASnapshot) {
  EXPECT_TRUE(ReadVmas(Open()).size() <= 1);  // the heap's own
  std::vector<PageRange> ranges;
  for (std::size_t i = 0; i < 2000; ++i) {
    const bool odd = i % 3 == 0;
    ranges.push_back(Map(1 + i % 5, {.protection = odd ? vm::os::Protection::kRead : vm::os::Protection::kReadWrite}));
  }
  for (std::size_t i = 0; i < ranges.size(); i += 7) EXPECT_TRUE(space_->Unmap(ranges[i]).ok());
  std::vector<vm::VmaInfo> expected(4000);
  expected.resize(space_->Snapshot({expected.data(), expected.size()}).vmas);
  const std::vector<ProcessView::MappedVma> vmas = ReadVmas(Open());
  ASSERT_EQ(vmas.size(), expected.size());
  ASSERT_GT(vmas.size(), 1700u);
  for (std::size_t i = 0; i < vmas.size(); ++i) {
    EXPECT_TRUE(vmas[i].range == expected[i].range);
    EXPECT_EQ(vmas[i].protection, expected[i].protection);
    EXPECT_EQ(vmas[i].zone, expected[i].zone);
    EXPECT_EQ(vmas[i].generation, expected[i].generation);
    EXPECT_FALSE(vmas[i].locked);
    EXPECT_FALSE(vmas[i].backed);
  }
}

TEST_P(TelemetryTest, LargestGapShrinks) {
  const ProcessView view = Open();
  const auto before = view.ReadLargestGap();
  ASSERT_TRUE(before.ok());
  std::size_t longest = 0;
  for (const ProcessView::Region& region : view.Regions()) longest = std::max(longest, region.range.count().value);
  EXPECT_GT(before->value, 0u);
  EXPECT_LE(before->value, longest);
  EXPECT_FALSE(space_->Map({before->value + 1}).ok());
}

// While others map, unmap and split beside it, what is mapped throughout is seen each time, and no page twice.
TEST_P(TelemetryTest, MappingsWhileOthersChangeThem) {
  std::vector<PageRange> stable;
  std::vector<PageRange> holes;
  for (int i = 0; i < 500; ++i) {
    stable.push_back(Map(2));
    holes.push_back(Map(3));
  }
  for (const PageRange range : holes) EXPECT_TRUE(space_->Unmap(range).ok());
  std::vector<std::jthread> churn;
  for (unsigned seed = 1; seed <= 2; ++seed) {
    churn.emplace_back([&, seed](std::stop_token stop) {
      std::uint64_t random = seed;
      std::vector<PageRange> mine;
      while (!stop.stop_requested()) {
        random = random * 6364136223846793005 + 1442695040888963407;
        // Without a rest now and then a reader hardly ever finds a node as it was.
        if (random >> 62 == 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
        if (mine.size() < 200 || (random >> 40 & 1) != 0) {
          const auto range = space_->Map({1 + (random >> 33) % 9});
          if (range.ok()) mine.push_back(*range);
        }
        if (mine.size() < 100) continue;
        std::swap(mine[(random >> 33) % mine.size()], mine.back());
        const PageRange gone = mine.back();
        mine.pop_back();
        // The middle first: that splits it.
        const PageRange middle = PageRange::Of(gone.first + Pages{gone.count().value / 3}, Pages{1});
        EXPECT_TRUE(space_->Unmap(middle).ok());
        EXPECT_TRUE(space_->Unmap(gone).ok());
      }
      for (const PageRange range : mine) EXPECT_TRUE(space_->Unmap(range).ok());
    });
  }
  const ProcessView view = Open();
  const auto end_of_time = std::chrono::steady_clock::now() + std::chrono::seconds(3);
  for (int round = 0; round < 20 && (round < 2 || std::chrono::steady_clock::now() < end_of_time); ++round) {
    const std::vector<ProcessView::MappedVma> vmas = ReadVmas(view);
    vm::PageNumber end = {0};
    std::map<std::size_t, PageRange> seen;
    for (const ProcessView::MappedVma& vma : vmas) {
      ASSERT_FALSE(vma.range.empty());
      ASSERT_TRUE(end <= vma.range.first) << "round " << round;
      end = vma.range.end;
      seen[vma.range.first.value] = vma.range;
    }
    for (const PageRange range : stable) {
      ASSERT_EQ(seen.count(range.first.value), 1u) << "round " << round;
      ASSERT_TRUE(seen[range.first.value] == range) << "round " << round;
    }
  }
}

// ---- who waits for whom ----

// What a reader sees once as many as `waiters` wait.
std::vector<LockWait> AwaitWaits(const ProcessView& view, std::size_t waiters) {
  for (int i = 0; i < 2000; ++i) {
    auto waits = cli::ReadLockWaits(view);
    EXPECT_TRUE(waits.ok()) << waits.status();
    if (waits->size() == waiters) return *std::move(waits);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  ADD_FAILURE() << "never saw " << waiters << " waiters";
  return {};
}

TEST_P(TelemetryTest, WaitersAndThoseTheyWaitFor) {
  const PageRange range = Map(8);
  RangeLock& lock = LockOf(range);
  const ProcessView view = Open();
  EXPECT_TRUE(AwaitWaits(view, 0).empty());
  const PageRange part = PageRange::Of(range.first + Pages{2}, Pages{3});
  std::promise<std::uint32_t> who;
  std::jthread waiter;  // ends after the holder does
  auto holder = std::make_unique<RangeLock::Guard>(lock, range, LockMode::kExclusive, Operation::kTest);
  waiter = std::jthread([&] {
    who.set_value(vm::os::CurrentThreadId());
    const RangeLock::Guard guard(lock, part, LockMode::kShared, Operation::kSync);
  });
  const std::uint32_t waiter_id = who.get_future().get();
  const std::vector<LockWait> waits = AwaitWaits(view, 1);
  ASSERT_EQ(waits.size(), 1u);
  EXPECT_EQ(waits[0].waiter.thread_id, waiter_id);
  EXPECT_EQ(waits[0].waiter.operation, Operation::kSync);
  EXPECT_EQ(waits[0].waiter.mode, LockMode::kShared);
  EXPECT_TRUE(waits[0].waiter.range == part);
  EXPECT_EQ(waits[0].behind.thread_id, vm::os::CurrentThreadId());
  EXPECT_EQ(waits[0].behind.operation, Operation::kTest);
  EXPECT_EQ(waits[0].behind.mode, LockMode::kExclusive);
  EXPECT_EQ(waits[0].behind.state, vm::sync::HolderInfo::State::kHolding);
  EXPECT_TRUE(waits[0].behind.range == range);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_GE(AwaitWaits(view, 1)[0].waiter.age.value, 20'000'000u);
  // As people see it.
  const std::string pid = std::to_string(getpid());
  const auto address = [](vm::PageNumber page) {
    std::ostringstream text;
    text << std::hex << page.value * vm::kPageSize;
    return text.str();
  };
  const testing::Outcome top = testing::RunProgram({.argv = {testing::Cli(), "top", pid, "--once", "--interval=0.1"}});
  EXPECT_EQ(top.status, 0) << top.err;
  EXPECT_THAT(top.out, HasSubstr("\nwaiting  1 threads\nthread " + std::to_string(waiter_id) + " "));
  EXPECT_THAT(top.out, HasSubstr(" waits for " + address(part.first) + "-" + address(part.end) + " (sync, shared, "));
  EXPECT_THAT(top.out, HasSubstr(") behind thread " + std::to_string(vm::os::CurrentThreadId()) + " "));
  EXPECT_THAT(top.out, HasSubstr(", who holds " + address(range.first) + "-" + address(range.end) + " (test, exclusive, "));
  const testing::Outcome report =
      testing::RunProgram({.argv = {testing::Cli(), "report", pid, "-o", "/dev/stdout", "--seconds=0.1"}});
  EXPECT_EQ(report.status, 0) << report.err;
  EXPECT_THAT(report.out, HasSubstr("Who waited for whom"));
  EXPECT_THAT(report.out, HasSubstr("<td>" + std::to_string(waiter_id) + ": sync " + address(part.first)));
  EXPECT_THAT(report.out, HasSubstr("from 0 to 1, at 61 moments"));
  holder.reset();
  waiter.join();
  EXPECT_TRUE(AwaitWaits(view, 0).empty());
}

// Threads lock and unlock all the time: whatever is reported is possible.
TEST_P(TelemetryTest, WaitsWhileLocksChangeHands) {
  const PageRange range = Map(64);
  RangeLock& lock = LockOf(range);
  std::vector<std::jthread> lockers;
  for (unsigned seed = 1; seed <= 3; ++seed) {
    lockers.emplace_back([&, seed](std::stop_token stop) {
      std::uint64_t random = seed;
      while (!stop.stop_requested()) {
        random = random * 6364136223846793005 + 1442695040888963407;
        const PageRange part = PageRange::Of(range.first + Pages{(random >> 33) % 32}, Pages{1 + (random >> 45) % 32});
        const RangeLock::Guard guard(lock, part, (random >> 60) % 3 == 0 ? LockMode::kExclusive : LockMode::kShared,
                                     Operation::kTest);
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      }
    });
  }
  const ProcessView view = Open();
  std::size_t seen = 0;
  const auto end_of_time = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  for (int round = 0; (round < 3000 || seen < 100) && std::chrono::steady_clock::now() < end_of_time; ++round) {
    const auto waits = cli::ReadLockWaits(view);
    ASSERT_TRUE(waits.ok()) << waits.status();
    for (const auto& [waiter, behind] : *waits) {
      ++seen;
      ASSERT_TRUE(range.Contains(waiter.range));
      ASSERT_EQ(waiter.operation, Operation::kTest);
      ASSERT_NE(waiter.thread_id, behind.thread_id);
      ASSERT_TRUE(Conflict(waiter.mode, behind.mode));
    }
  }
  EXPECT_GE(seen, 100u);
}

// ---- the heap ----

// What the heap counts itself, as a view of it.
cli::HeapView OwnView(allocator::ObjectHeap& heap) {
  cli::HeapView view;
  heap.ForEachSizeClass(
      [](void* to, const allocator::SizeClassStats& stats) {
        if (stats.spans != 0) static_cast<cli::HeapView*>(to)->classes.push_back(stats);
      },
      &view);
  heap.ForEachCache(
      [](void* to, const allocator::CacheStats& stats) { static_cast<cli::HeapView*>(to)->caches.push_back(stats); }, &view);
  view.sums = heap.Stats();
  return view;
}

using Named = std::map<std::pair<std::string, std::uint64_t>, std::uint64_t>;
Named NamedOf(const cli::HeapView& view) {
  Named named;
  cli::ForEachHeapStatistic(view, [&](const Statistic& statistic) {
    EXPECT_TRUE(named.emplace(std::pair(std::string(statistic.name), statistic.label_value), statistic.value).second);
  });
  return named;
}

TEST_P(TelemetryTest, TheHeapIsAsItCountsItself) {
  EXPECT_TRUE(ReadHeap().classes.empty());
  EXPECT_TRUE(ReadHeap().caches.empty());
  allocator::ThreadCache* cache = heap_->AttachThread();
  std::vector<void*> objects;
  for (int i = 0; i < 20'000; ++i) objects.push_back(cache->Allocate(static_cast<std::size_t>(i) % 3000));
  for (const std::size_t size : {5000, 60'000, 131'072, 200'000, 5 << 20}) objects.push_back(cache->Allocate(size));
  // Full spans, available ones, empty ones; objects at hand; objects on their way to another thread.
  for (std::size_t i = 0; i < 15'000; ++i) {
    if (i % 7 != 0) cache->Free(std::exchange(objects[i], nullptr));
  }
  std::thread([&] {
    allocator::ThreadCache* other = heap_->AttachThread();
    for (int i = 0; i < 3000; ++i) objects.push_back(other->Allocate(2000));
    for (int i = 0; i < 3000; i += 2) other->Free(std::exchange(objects[objects.size() - 1 - i], nullptr));
    for (std::size_t i = 15'000; i < 15'100; ++i) other->Free(std::exchange(objects[i], nullptr));
    other->Free(other->Allocate(2000));
    const Named own = NamedOf(OwnView(*heap_));
    EXPECT_EQ(NamedOf(ReadHeap()), own);
    EXPECT_GT(own.at({"heap_cache_at_hand_bytes", other->id()}), 0u);
    EXPECT_EQ(own.at({"heap_cache_thread", other->id()}), static_cast<std::uint64_t>(gettid()));
    EXPECT_EQ(own.at({"heap_cache_thread", cache->id()}), static_cast<std::uint64_t>(getpid()));
    EXPECT_GT(own.at({"heap_class_objects", 2048}), 1500u);
    EXPECT_GT(own.at({"heap_fragmented_bytes", 0}), 0u);
    heap_->DetachThread(other);
  }).join();
  const Named own = NamedOf(OwnView(*heap_));
  EXPECT_EQ(NamedOf(ReadHeap()), own);
  EXPECT_EQ(own.at({"heap_cache_attached", cache->id()}), 1u);
  EXPECT_EQ(own.at({"heap_cache_attached", 1 - cache->id()}), 0u);
  EXPECT_EQ(own.at({"heap_cache_at_hand_bytes", 1 - cache->id()}), 0u);
  for (void* p : objects) cache->Free(p);
  heap_->DetachThread(cache);
  EXPECT_EQ(NamedOf(ReadHeap()), NamedOf(OwnView(*heap_)));
}

TEST_P(TelemetryTest, TheHeapWhileOthersUseIt) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      unsigned random = t + 1;
      while (!stop.load(std::memory_order_relaxed)) {
        allocator::ThreadCache* cache = heap_->AttachThread();
        std::array<void*, 200> objects = {};
        for (int i = 0; i < 5000; ++i) {
          random = random * 1664525 + 1013904223;
          void*& object = objects[random >> 8 & 127];
          cache->Free(object);
          object = cache->Allocate((random >> 12) % 10'000);
        }
        for (void* object : objects) cache->Free(object);
        heap_->DetachThread(cache);
      }
    });
  }
  for (int round = 0; round < 200; ++round) {
    const cli::HeapView view = ReadHeap();
    for (const allocator::SizeClassStats& stats : view.classes) {
      ASSERT_LE(stats.allocated, stats.capacity);
      ASSERT_LE(stats.capacity * stats.object_size, std::size_t{2} << 30);
    }
    for (const allocator::CacheStats& stats : view.caches) {
      ASSERT_LE(stats.allocated.value, stats.capacity.value);
      ASSERT_LE(stats.at_hand.value, std::size_t{64} << 20);
    }
    ASSERT_LE(view.caches.size(), 4u);
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(NamedOf(ReadHeap()), NamedOf(OwnView(*heap_)));
}

TEST_P(TelemetryTest, HeapsThatCannotBeRead) {
  allocator::ThreadCache* cache = heap_->AttachThread();
  cache->Free(cache->Allocate(100));
  TelemetryPage& page = *FindPage();
  const allocator::HeapLocation original = page.heap;
  const auto expect = [&](const char* what, const std::string& message, auto&& change) {
    change(page.heap);
    EXPECT_THAT(HeapError(), HasSubstr(message)) << what;
    page.heap = original;
  };
  using Location = allocator::HeapLocation;
  const std::string overwritten = "was overwritten";
  expect("none", "has no heap of Freehold's", [](Location& heap) { heap = {}; });
  expect("no bytes", overwritten, [](Location& heap) { heap.cache_bytes = 0; });
  expect("many bytes", overwritten, [](Location& heap) { heap.cache_bytes = ~std::uint64_t{0}; });
  expect("state", overwritten, [](Location& heap) { heap.detached = heap.cache_bytes; });
  expect("thread", overwritten, [](Location& heap) { heap.thread = heap.cache_bytes - 3; });
  expect("far", overwritten, [](Location& heap) { heap.at_hand = ~std::uint64_t{0} - 8; });
  expect("counts", overwritten, [](Location& heap) { heap.at_hand_bytes = 2; });
  expect("counts that are far from each other", overwritten, [](Location& heap) { heap.at_hand_bytes = 100'000; });
  expect("room", overwritten, [](Location& heap) { heap.at_hand_room = heap.at_hand_bytes; });
  expect("credits", overwritten, [](Location& heap) { heap.at_hand_credits = heap.at_hand_bytes - 2; });
  expect("steps", overwritten, [](Location& heap) { heap.end_step = std::uint64_t{1} << 40; });
  expect("backwards", overwritten, [](Location& heap) { heap.first_step = heap.end_step + 1; });
  expect("no step", overwritten, [](Location& heap) { heap.step_bytes = 0; });
  expect("odd steps", overwritten, [](Location& heap) { heap.step_bytes = 100; });
  const std::uint32_t many = ~std::uint32_t{0};
  expect("many caches", "number of threads cannot be",
         [&](Location& heap) { heap.cache_count = reinterpret_cast<std::uintptr_t>(&many); });
  const auto unreadable = [](Location& heap) { heap.cache_count = 8; };
  expect("nowhere", "is ending", unreadable);
  expect("no caches there", "is ending", [](Location& heap) { heap.caches = 8; });
  expect("no bits there", "is ending", [](Location& heap) { heap.writable = 8; });
  expect("no records there", "is ending", [](Location& heap) { heap.records = 4096; });
  EXPECT_FALSE(ReadHeap().classes.empty());
  heap_->DetachThread(cache);
}

// ---- pages that are not as they should be ----

TEST_P(TelemetryTest, PagesOfOtherReleasesAndBrokenOnes) {
  TelemetryPage& page = *FindPage();
  const auto original = std::make_unique<std::array<char, sizeof(TelemetryPage)>>();
  std::memcpy(original->data(), static_cast<void*>(&page), sizeof(page));
  const auto expect = [&](const char* what, const std::string& message, auto&& change) {
    change();
    EXPECT_THAT(OpenError(), HasSubstr(message)) << what;
    std::memcpy(static_cast<void*>(&page), original->data(), sizeof(page));
  };
  const std::string overwritten = "was overwritten";
  expect("magic", "is only starting; try again", [&] { page.magic = 0; });
  expect("version", "another release of Freehold (page version 9, here 2)", [&] { page.version = 9; });
  expect("size", "another release", [&] { page.bytes = 1; });
  expect("too many metrics", overwritten, [&] { page.metric_count = TelemetryPage::kMaxMetrics + 1; });
  expect("no region", overwritten, [&] { page.region_count = 0; });
  expect("too many regions", overwritten, [&] { page.region_count = 1'000'000; });
  expect("empty region", overwritten, [&] { page.regions[0].pages = 0; });
  expect("overlap", overwritten, [&] { page.regions[1].first_page = page.regions[0].first_page; });
  expect("zone", overwritten, [&] { page.regions[0].zone = 77; });
  expect("wide number", overwritten, [&] { page.metrics[0].width = 9; });
  expect("many numbers", overwritten, [&] { page.metrics[0].count = 0xffff'ffff; });
  expect("endless name", overwritten, [&] { std::memset(page.metrics[0].name, 'x', sizeof(page.metrics[0].name)); });
  expect("escapes", overwritten, [&] { std::strcpy(page.metrics[0].help, "\033[2J"); });
  EXPECT_TRUE(ProcessView::Open(getpid()).ok());

  // Another build: counters can be read, structures cannot.
  ++page.layout;
  const ProcessView view = Open();
  EXPECT_TRUE(view.ReadMetrics().ok());
  EXPECT_THAT(std::string(view.ReadVmas().status().message()), HasSubstr("another build of Freehold"));
  EXPECT_THAT(std::string(cli::ReadLockWaits(view).status().message()), HasSubstr("another build of Freehold"));
  EXPECT_FALSE(view.ReadLargestGap().ok());
  EXPECT_THAT(HeapError(), HasSubstr("another build of Freehold"));
  --page.layout;
  // Addresses of nothing.
  page.metrics[0].first = 8;
  EXPECT_TRUE(absl::IsUnavailable(Open().ReadMetrics().status()));
  page.regions[0].tree = 8;
  EXPECT_TRUE(absl::IsUnavailable(Open().ReadVmas().status()));
  page.regions[0].range_lock = 8;
  EXPECT_TRUE(absl::IsUnavailable(cli::ReadLockWaits(Open()).status()));
}

TEST_P(TelemetryTest, AHiddenOrTornTreeEndsEarlyInsteadOfHanging) {
  const PageRange range = Map(4);
  TelemetryPage& page = *FindPage();
  std::size_t index = 0;
  while (range.first.value - page.regions[index].first_page >= page.regions[index].pages) ++index;
  const auto covers = [&](const std::vector<ProcessView::MappedVma>& vmas) {
    return std::any_of(vmas.begin(), vmas.end(), [&](const auto& vma) { return vma.range.Contains(range); });
  };
  EXPECT_TRUE(covers(ReadVmas(Open())));
  std::uint64_t root = 0;
  page.regions[index].tree = reinterpret_cast<std::uintptr_t>(&root);
  EXPECT_FALSE(covers(ReadVmas(Open())));  // hidden
  vm::VmaTree::Node node;
  root = reinterpret_cast<std::uintptr_t>(&node);
  EXPECT_FALSE(covers(ReadVmas(Open())));  // empty
  node.count = 200;
  node.height = 1;
  node.entry[0] = &node;
  node.version = 2;
  EXPECT_FALSE(covers(ReadVmas(Open())));  // a circle
  node.entry[0] = reinterpret_cast<void*>(8);
  EXPECT_FALSE(covers(ReadVmas(Open())));  // nowhere
  node.version = 3;
  EXPECT_FALSE(covers(ReadVmas(Open())));  // changing for ever
}

}  // namespace
}  // namespace freehold::runtime
