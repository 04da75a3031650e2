// The lock protocol of demand paging (vm/fault.cc, vm/pager_verbs.cc) under every schedule of small scripts: pages of a
// pager before ranges of memory, for one page. No deadlock, no lost write, nothing in an unmapped page; and without the
// lock over pages, a lost write is found.
#include <optional>

#include "gtest/gtest.h"
#include "tests/vm/sync/sched/scheduler.h"
#include "vm/sync/range_lock.h"

namespace freehold::vm::sync {
namespace {

using sched::Exhaustive;
using sched::Outcome;
using sched::Scheduler;
using Guard = RangeLock::Guard;

constexpr PageRange kPage = {{0}, {1}};
constexpr PageRange kMemory = {{100}, {101}};

// A page of a pager that holds 0, mapped, and in memory as 1: written to.
class World {
 public:
  explicit World(LockPolicy policy, bool orders = true) : ranges_(policy), orders_(orders) {}

  // FaultService::Fill
  void Fault() {
    std::optional<Guard> reading;
    if (orders_) reading.emplace(pages_, kPage, LockMode::kShared, Operation::kFault);
    const int content = pager_;
    const Guard guard(ranges_, kMemory, LockMode::kShared, Operation::kFault);
    if (!mapped_) return;
    if (!memory_.has_value()) memory_ = content;
  }
  // FaultService::DropPart
  void Evict() {
    const Guard pages(pages_, kPage, LockMode::kExclusive, Operation::kSync);
    std::optional<int> saved;
    {
      const Guard guard(ranges_, kMemory, LockMode::kExclusive, Operation::kSync);
      if (!mapped_) return;
      saved.swap(memory_);
    }
    if (saved.has_value()) pager_ = *saved;
  }
  // AddressSpace::Unmap: Flush, then AfterDrop.
  void Unmap() {
    std::optional<int> saved;
    {
      const Guard guard(ranges_, kMemory, LockMode::kExclusive, Operation::kUnmap);
      mapped_ = false;
      saved.swap(memory_);
    }
    if (!saved.has_value()) return;
    const Guard pages(pages_, kPage, LockMode::kExclusive, Operation::kSync);
    pager_ = *saved;
  }

  // What the next reader sees is what was written.
  bool KeptTheWrite() const { return memory_.value_or(pager_) == 1; }
  bool IsUnmappedAndEmpty() const { return !mapped_ && !memory_.has_value(); }

 private:
  RangeLock pages_{LockPolicy::kAdaptive, LockRank::kPager};
  RangeLock ranges_;
  const bool orders_;
  int pager_ = 0;
  std::optional<int> memory_ = 1;
  bool mapped_ = true;
};

class PagerOrderTest : public testing::TestWithParam<LockPolicy> {
 protected:
  // Bounds that keep each to seconds.
  static constexpr int kPreemptions = 3;
};
INSTANTIATE_TEST_SUITE_P(Policies, PagerOrderTest,
                         testing::Values(LockPolicy::kAdaptive, LockPolicy::kTree, LockPolicy::kCoarse),
                         [](const auto& info) { return ToString(info.param); });

TEST_P(PagerOrderTest, FaultAgainstEviction) {
  Scheduler scheduler({.threads = 2});
  Exhaustive schedules(kPreemptions);
  do {
    World world(GetParam());
    const Outcome outcome = scheduler.Run({[&] { world.Fault(); }, [&] { world.Evict(); }}, schedules);
    ASSERT_TRUE(outcome.ok()) << outcome;
    ASSERT_TRUE(world.KeptTheWrite()) << outcome;
  } while (schedules.Next());
}

TEST_P(PagerOrderTest, FaultEvictionAndUnmap) {
  Scheduler scheduler({.threads = 3});
  Exhaustive schedules(kPreemptions - 1);
  do {
    World world(GetParam());
    const Outcome outcome =
        scheduler.Run({[&] { world.Fault(); }, [&] { world.Evict(); }, [&] { world.Unmap(); }}, schedules);
    ASSERT_TRUE(outcome.ok()) << outcome;
    ASSERT_TRUE(world.KeptTheWrite()) << outcome;
    ASSERT_TRUE(world.IsUnmappedAndEmpty()) << outcome;
  } while (schedules.Next());
}

TEST_P(PagerOrderTest, WithoutTheLockOverPagesAWriteIsLost) {
  Scheduler scheduler({.threads = 2});
  Exhaustive schedules(kPreemptions);
  bool lost = false;
  do {
    World world(GetParam(), /*orders=*/false);
    const Outcome outcome = scheduler.Run({[&] { world.Fault(); }, [&] { world.Evict(); }}, schedules);
    ASSERT_TRUE(outcome.ok()) << outcome;
    lost = lost || !world.KeptTheWrite();
  } while (schedules.Next());
  EXPECT_TRUE(lost);
}

}  // namespace
}  // namespace freehold::vm::sync
