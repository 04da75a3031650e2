#include "vm/sync/seq_count.h"

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace freehold::vm::sync {
namespace {

struct Bounds {
  SeqCount seq;
  SeqField<std::uint64_t> low;
  SeqField<std::uint64_t> high;
};
constinit Bounds constinit_bounds;

TEST(SeqCountTest, UndisturbedReadSucceedsAtOnce) {
  Bounds& bounds = constinit_bounds;
  {
    SeqCount::WriteScope scope(bounds.seq);
    bounds.low.Store(1);
    bounds.high.Store(2);
  }
  int calls = 0;
  EXPECT_TRUE(bounds.seq.Read(1, [&] {
    ++calls;
    EXPECT_EQ(bounds.low.Load() + 1, bounds.high.Load());
  }));
  EXPECT_EQ(calls, 1);
}

TEST(SeqCountTest, ReadInsideAWriteGivesUp) {
  Bounds bounds;
  SeqCount::WriteScope scope(bounds.seq);
  int calls = 0;
  EXPECT_FALSE(bounds.seq.Read(5, [&] { ++calls; }));
  EXPECT_EQ(calls, 0);
  EXPECT_FALSE(bounds.seq.Validate(bounds.seq.Begin()));
}

TEST(SeqCountTest, WriteDuringReadIsNoticed) {
  Bounds bounds;
  int calls = 0;
  EXPECT_TRUE(bounds.seq.Read(2, [&] {
    if (++calls == 1) SeqCount::WriteScope scope(bounds.seq);
  }));
  EXPECT_EQ(calls, 2);
  EXPECT_FALSE(bounds.seq.Read(1, [&] { SeqCount::WriteScope scope(bounds.seq); }));
}

TEST(SeqCountTest, EveryWriteIsAGeneration) {
  SeqCount seq;
  const std::uint32_t before = seq.value();
  { SeqCount::WriteScope scope(seq); }
  EXPECT_NE(seq.value(), before);
  EXPECT_EQ(seq.value() % 2, 0u);
}

TEST(SeqCountTest, ReinitClosesAnAbandonedWrite) {
  SeqCount seq;
  auto* const abandoned = new SeqCount::WriteScope(seq);
  EXPECT_FALSE(seq.Read(1, [] {}));
  seq.ReinitAfterFork();
  EXPECT_TRUE(seq.Read(1, [] {}));
  seq.ReinitAfterFork();
  EXPECT_TRUE(seq.Read(1, [] {}));
  ::operator delete(abandoned);
}

TEST(SeqCountStressTest, ReadersNeverSeeHalfAWrite) {
#if defined(FREEHOLD_TSAN)
  constexpr std::uint64_t kWrites = 20'000;
#else
  constexpr std::uint64_t kWrites = 1'000'000;
#endif
  Bounds bounds;
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> good{0};
  std::vector<std::thread> readers;
  for (int i = 0; i < 2; ++i) {
    readers.emplace_back([&] {
      std::uint64_t last = 0;
      while (!stop.load(std::memory_order_relaxed)) {
        std::uint64_t low = 0;
        std::uint64_t high = 0;
        if (!bounds.seq.Read(100, [&] {
              low = bounds.low.Load();
              high = bounds.high.Load();
            })) {
          continue;
        }
        EXPECT_EQ(high, 2 * low);
        EXPECT_GE(low, last);
        last = low;
        good.fetch_add(1, std::memory_order_relaxed);
      }
    });
  }
  for (std::uint64_t i = 1; i <= kWrites || good.load(std::memory_order_relaxed) < 1000; ++i) {
    SeqCount::WriteScope scope(bounds.seq);
    bounds.low.Store(i);
    bounds.high.Store(2 * i);
  }
  stop.store(true);
  for (std::thread& reader : readers) reader.join();
}

}  // namespace
}  // namespace freehold::vm::sync
