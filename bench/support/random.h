// Random numbers for operation sequences: fast, and the same on every machine for the same seed.
#ifndef FREEHOLD_BENCH_SUPPORT_RANDOM_H_
#define FREEHOLD_BENCH_SUPPORT_RANDOM_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace freehold::bench {

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t Next() {
    std::uint64_t mixed = (state_ += 0x9e3779b97f4a7c15);
    mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111eb;
    return mixed ^ (mixed >> 31);
  }

  // In [0, limit). REQUIRES: 0 < limit < 2^32.
  std::size_t Below(std::size_t limit) {
    return static_cast<std::size_t>(((Next() >> 32) * limit) >> 32);
  }

  // In [low, high]; all values equally likely.
  std::size_t Uniform(std::size_t low, std::size_t high) { return low + Below(high - low + 1); }

  // In [low, high]; every doubling equally likely, so small values are as frequent as programs have
  // them. REQUIRES: 0 < low.
  std::size_t LogUniform(std::size_t low, std::size_t high) {
    const double fraction = static_cast<double>(Next() >> 11) * 0x1p-53;
    const double span = std::log2(static_cast<double>(high + 1) / static_cast<double>(low));
    const auto value =
        static_cast<std::size_t>(static_cast<double>(low) * std::exp2(fraction * span));
    return value < low ? low : value > high ? high : value;
  }

  // In [low, high], Pareto-distributed with exponent 1: twice as large is half as frequent, so that most values are
  // small and most of the sum is in the few large ones. REQUIRES: 0 < low.
  std::size_t Pareto(std::size_t low, std::size_t high) {
    const double fraction = static_cast<double>(Next() >> 11) * 0x1p-53;
    const auto value = static_cast<std::size_t>(static_cast<double>(low) / (1 - fraction));
    return value > high ? high : value;
  }

  // The numbers 0 to count - 1 in random order.
  std::vector<std::uint32_t> Permutation(std::size_t count) {
    std::vector<std::uint32_t> order(count);
    for (std::size_t i = 0; i < count; ++i) order[i] = static_cast<std::uint32_t>(i);
    for (std::size_t i = count; i > 1; --i) std::swap(order[i - 1], order[Below(i)]);
    return order;
  }

 private:
  std::uint64_t state_;
};

}  // namespace freehold::bench

#endif  // FREEHOLD_BENCH_SUPPORT_RANDOM_H_
