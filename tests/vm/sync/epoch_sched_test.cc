// EpochDomain under chosen schedules: wherever a reader is preempted, also between looking up the
// phase and counting itself in, no callback runs while it can see the object.
#include <array>
#include <atomic>
#include <cstdint>

#include "gtest/gtest.h"
#include "tests/vm/sync/sched/scheduler.h"
#include "vm/sync/epoch.h"

namespace freehold::vm::sync {
namespace {

using sched::Exhaustive;
using sched::Outcome;
using sched::Scheduler;
using sched::Seeded;

struct Object : DeferredCallback {
  bool reclaimed = false;
};

// Readers look at one slot, which a writer empties and refills; every object is reclaimed through
// the domain.
class World {
 public:
  World(Scheduler& scheduler, int rounds) : scheduler_(scheduler), rounds_(rounds) {
    current_.store(&objects_[0]);
  }

  void Read() {
    for (int round = 0; round < rounds_; ++round) {
      EpochDomain::ReadGuard guard(domain_);
      Object* const object = current_.load(std::memory_order_acquire);
      for (int use = 0; use < 2; ++use) {
        if (object != nullptr && object->reclaimed)
          scheduler_.Fail("a reader sees a reclaimed object");
        scheduler_.Yield("reads");
      }
      EpochDomain::ReadGuard nested(domain_);
      if (object != nullptr && object->reclaimed)
        scheduler_.Fail("reclaimed under a nested reader");
    }
  }
  void Write() {
    for (int round = 0; round < rounds_; ++round) {
      Object* const old = current_.load(std::memory_order_relaxed);
      current_.store(&objects_[static_cast<std::size_t>(round) + 1], std::memory_order_release);
      domain_.Defer(old,
                    [](DeferredCallback* node) { static_cast<Object*>(node)->reclaimed = true; });
      domain_.Poll();
    }
  }
  void Poll(int times) {
    for (int i = 0; i < times; ++i) domain_.Poll();
  }
  // When all have left, a few polls run everything.
  void ExpectAllReclaimed() {
    Poll(2 * rounds_ + 2);
    for (int round = 0; round < rounds_; ++round) {
      EXPECT_TRUE(objects_[static_cast<std::size_t>(round)].reclaimed);
    }
    EXPECT_FALSE(domain_.HasDeferred());
  }

 private:
  Scheduler& scheduler_;
  const int rounds_;
  EpochDomain domain_;
  std::array<Object, 8> objects_;
  std::atomic<Object*> current_{nullptr};
};

TEST(EpochSchedTest, OneReaderOneWriter) {
  Scheduler scheduler({.threads = 2});
  Exhaustive schedules(/*max_preemptions=*/2);
  do {
    World world(scheduler, 1);
    const Outcome outcome = scheduler.Run({[&] { world.Read(); },
                                           [&] {
                                             world.Write();
                                             world.Poll(2);
                                           }},
                                          schedules);
    ASSERT_TRUE(outcome.ok()) << outcome;
    world.ExpectAllReclaimed();
  } while (schedules.Next());
}

TEST(EpochSchedTest, RandomReadersWritersAndPollers) {
  Scheduler scheduler({.threads = 4});
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Seeded schedule(seed, /*one_in=*/seed % 2 == 0 ? 4 : 40);
    World world(scheduler, 5);
    const auto read = [&] { world.Read(); };
    const Outcome outcome =
        scheduler.Run({read, read, [&] { world.Write(); }, [&] { world.Poll(6); }}, schedule);
    ASSERT_TRUE(outcome.ok()) << outcome;
    world.ExpectAllReclaimed();
  }
}

}  // namespace
}  // namespace freehold::vm::sync
