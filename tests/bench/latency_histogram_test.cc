#include "bench/support/latency_histogram.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "bench/support/random.h"

namespace freehold::bench {
namespace {

// The percentile by definition.
std::uint64_t ExactPercentile(std::vector<std::uint64_t> values, double fraction) {
  std::sort(values.begin(), values.end());
  const auto rank =
      static_cast<std::size_t>(std::ceil(fraction * static_cast<double>(values.size())));
  return values[std::max<std::size_t>(rank, 1) - 1];
}

TEST(LatencyHistogramTest, EmptyHasNoPercentiles) {
  const LatencyHistogram histogram;
  EXPECT_EQ(histogram.count(), 0u);
  EXPECT_EQ(histogram.max(), 0u);
  EXPECT_EQ(histogram.Percentile(0.5), 0u);
}

TEST(LatencyHistogramTest, SmallValuesAreExact) {
  LatencyHistogram histogram;
  for (std::uint64_t value = 0; value < 100; ++value) histogram.Record(value);
  EXPECT_EQ(histogram.count(), 100u);
  EXPECT_EQ(histogram.Percentile(0.01), 0u);
  EXPECT_EQ(histogram.Percentile(0.5), 49u);
  EXPECT_EQ(histogram.Percentile(1.0), 99u);
}

TEST(LatencyHistogramTest, PercentilesAreAtMostOneSixtyFourthTooHigh) {
  LatencyHistogram histogram;
  std::vector<std::uint64_t> values;
  Random random(1);
  for (int i = 0; i < 20'000; ++i) {
    values.push_back(random.LogUniform(1, 1'000'000'000));
    histogram.Record(values.back());
  }
  for (const double fraction : {0.001, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0}) {
    const std::uint64_t exact = ExactPercentile(values, fraction);
    EXPECT_GE(histogram.Percentile(fraction), exact) << fraction;
    EXPECT_LE(histogram.Percentile(fraction), exact + exact / 64 + 1) << fraction;
  }
}

TEST(LatencyHistogramTest, OneSlowCallIsTheWorstAndNotTheMedian) {
  LatencyHistogram histogram;
  for (int i = 0; i < 999; ++i) histogram.Record(10);
  histogram.Record(5'000'000'123);
  EXPECT_EQ(histogram.Percentile(0.5), 10u);
  EXPECT_EQ(histogram.Percentile(0.999), 10u);
  EXPECT_EQ(histogram.Percentile(1.0), 5'000'000'123u);
  EXPECT_EQ(histogram.max(), 5'000'000'123u);
}

TEST(LatencyHistogramTest, HoldsAnyValue) {
  LatencyHistogram histogram;
  constexpr std::uint64_t kLargest = std::numeric_limits<std::uint64_t>::max();
  histogram.Record(kLargest);
  histogram.Record(std::uint64_t{1} << 63);
  EXPECT_EQ(histogram.max(), kLargest);
  EXPECT_EQ(histogram.Percentile(1.0), kLargest);
}

TEST(LatencyHistogramTest, MergeAddsUp) {
  LatencyHistogram first, second;
  for (std::uint64_t value = 0; value < 50; ++value) first.Record(value);
  for (std::uint64_t value = 50; value < 100; ++value) second.Record(value);
  first.Merge(second);
  EXPECT_EQ(first.count(), 100u);
  EXPECT_EQ(first.max(), 99u);
  EXPECT_EQ(first.Percentile(0.5), 49u);
  first.Clear();
  EXPECT_EQ(first.count(), 0u);
  EXPECT_EQ(first.Percentile(1.0), 0u);
}

}  // namespace
}  // namespace freehold::bench
