#include "allocator/sampler.h"

#include <cmath>
#include <memory>

#include "gtest/gtest.h"

namespace freehold::allocator {
namespace {

constexpr SizeClass kClass = ClassOf(64);

TEST(SamplerTest, IntervalOfOneTakesEverything) {
  const auto sampler = std::make_unique<Sampler>(Sampler::Intervals{.profile = {1}}, 7);
  for (int i = 0; i < 1000; ++i) {
    EXPECT_TRUE(sampler->Count(kClass).profile);
    EXPECT_EQ(sampler->CountUpTo(kClass, 10), 0u);
    EXPECT_TRUE(sampler->CountLarge({1 << 20}));
  }
}

// Gaps are geometrically distributed: their mean and variance are known, and so is how many are zero.
TEST(SamplerTest, GapsAreGeometric) {
  const auto sampler = std::make_unique<Sampler>(Sampler::Intervals{.profile = {4096}}, 7);
  const double p = 1 - std::exp(-64.0 / 4096);
  constexpr int kGaps = 200'000;
  double sum = 0;
  double squares = 0;
  int zeroes = 0;
  for (int i = 0; i < kGaps; ++i) {
    int gap = 0;
    while (!sampler->Count(kClass).profile) ++gap;
    sum += gap;
    squares += double{1} * gap * gap;
    zeroes += gap == 0;
  }
  const double mean = sum / kGaps;
  const double variance = squares / kGaps - mean * mean;
  EXPECT_NEAR(mean, (1 - p) / p, 0.02 * (1 - p) / p);
  EXPECT_NEAR(variance, (1 - p) / (p * p), 0.04 * (1 - p) / (p * p));
  EXPECT_NEAR(zeroes, p * kGaps, 6 * std::sqrt(p * kGaps));
}

TEST(SamplerTest, CountsManyAsOneByOne) {
  const auto one = std::make_unique<Sampler>(Sampler::Intervals{.profile = {65536}}, 11);
  const auto many = std::make_unique<Sampler>(Sampler::Intervals{.profile = {65536}}, 11);
  for (int i = 0; i < 1000; ++i) {
    int gap = 0;
    while (!one->Count(kClass).profile) ++gap;
    int counted = 0;
    while (const std::uint32_t count = many->CountUpTo(kClass, 100)) {
      ASSERT_LE(count, 100u);
      counted += static_cast<int>(count);
      if (count > 1) {  // one of them was not allocated after all
        many->Uncount(kClass, 1);
        --counted;
      }
    }
    ASSERT_EQ(counted, gap);
    ASSERT_TRUE(many->Count(kClass).profile);
  }
}

// Each kind as if it were alone, and the front ends at whichever comes first.
TEST(SamplerTest, TwoKindsAreIndependent) {
  const auto sampler = std::make_unique<Sampler>(
      Sampler::Intervals{.profile = {4096}, .guard = {16384}}, 7);
  constexpr int kObjects = 2'000'000;
  int profile = 0;
  int guard = 0;
  int both = 0;
  for (int i = 0; i < kObjects; ++i) {
    if (const std::uint32_t count = sampler->CountUpTo(kClass, 10); count != 0) {
      i += static_cast<int>(count) - 1;
      continue;
    }
    const Sampler::Due due = sampler->Count(kClass);
    profile += due.profile;
    guard += due.guard;
    both += due.profile && due.guard;
    EXPECT_EQ(static_cast<bool>(due), due.profile || due.guard);
  }
  const double p = 1 - std::exp(-64.0 / 4096);
  const double g = 1 - std::exp(-64.0 / 16384);
  EXPECT_NEAR(profile, kObjects * p, 6 * std::sqrt(kObjects * p));
  EXPECT_NEAR(guard, kObjects * g, 6 * std::sqrt(kObjects * g));
  EXPECT_NEAR(both, kObjects * p * g, 6 * std::sqrt(kObjects * p * g));
}

TEST(SamplerTest, AKindWithoutAnIntervalHasNoSamples) {
  const auto sampler = std::make_unique<Sampler>(Sampler::Intervals{.guard = {1}}, 7);
  for (int i = 0; i < 1000; ++i) {
    const Sampler::Due due = sampler->Count(kClass);
    EXPECT_TRUE(due.guard && !due.profile);
    EXPECT_FALSE(sampler->CountLarge(vm::GiB(1)));
  }
}

TEST(SamplerTest, LargeObjectsByTheirBytes) {
  const auto sampler = std::make_unique<Sampler>(Sampler::Intervals{.profile = vm::MiB(1)}, 7);
  int samples = 0;
  constexpr int kObjects = 100'000;
  for (int i = 0; i < kObjects; ++i) samples += sampler->CountLarge(vm::KiB(256)) ? 1 : 0;
  const double expected = kObjects * (1 - std::exp(-0.25));
  EXPECT_NEAR(samples, expected, 6 * std::sqrt(expected));
}

TEST(SamplerTest, TakesASampleOnceAtATime) {
  const auto sampler = std::make_unique<Sampler>(Sampler::Intervals{.profile = {1}}, 7);
  EXPECT_TRUE(sampler->Enter());
  EXPECT_FALSE(sampler->Enter());
  sampler->Leave();
  EXPECT_TRUE(sampler->Enter());
}

}  // namespace
}  // namespace freehold::allocator
