// Latencies as counts per bucket: recording is an increment in memory that the constructor has
// touched, so a thread that measures never faults, allocates or calls the kernel on the histogram's
// behalf.
//
// Thread safety: thread-compatible; one writer, merged when it has stopped.
// Units:         whatever is recorded; TickClock ticks here.
// Accuracy:      a percentile is at most 1/64 above the true value; count and maximum are exact.
#ifndef FREEHOLD_BENCH_SUPPORT_LATENCY_HISTOGRAM_H_
#define FREEHOLD_BENCH_SUPPORT_LATENCY_HISTOGRAM_H_

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace freehold::bench {

class LatencyHistogram {
 public:
  LatencyHistogram() { Clear(); }

  void Clear() {
    buckets_.fill(0);
    count_ = 0;
    max_ = 0;
  }

  void Record(std::uint64_t value) {
    ++buckets_[BucketOf(value)];
    ++count_;
    max_ = std::max(max_, value);
  }

  void Merge(const LatencyHistogram& other) {
    for (std::size_t i = 0; i < buckets_.size(); ++i) buckets_[i] += other.buckets_[i];
    count_ += other.count_;
    max_ = std::max(max_, other.max_);
  }

  std::uint64_t count() const { return count_; }
  std::uint64_t max() const { return max_; }

  // The smallest value that at least `fraction` of the recorded ones do not exceed; 0 when nothing
  // was recorded. REQUIRES: 0 < fraction <= 1.
  std::uint64_t Percentile(double fraction) const {
    if (count_ == 0) return 0;
    const double wanted = fraction * static_cast<double>(count_);
    std::uint64_t seen = 0;
    for (std::size_t i = 0; i < buckets_.size(); ++i) {
      seen += buckets_[i];
      if (static_cast<double>(seen) >= wanted) return std::min(LastOf(i), max_);
    }
    return max_;
  }

 private:
  // Values below 2^kSubBits have a bucket each; above, every power of two is cut into 2^kSubBits
  // buckets.
  static constexpr unsigned kSubBits = 6;
  static constexpr std::size_t kSubBuckets = std::size_t{1} << kSubBits;
  static constexpr std::size_t kBuckets = (64 - kSubBits + 1) * kSubBuckets;

  static std::size_t BucketOf(std::uint64_t value) {
    if (value < kSubBuckets) return value;
    const unsigned shift = static_cast<unsigned>(std::bit_width(value)) - 1 - kSubBits;
    return (shift + 1) * kSubBuckets + ((value >> shift) & (kSubBuckets - 1));
  }

  // The largest value of a bucket.
  static std::uint64_t LastOf(std::size_t bucket) {
    if (bucket < kSubBuckets) return bucket;
    const unsigned shift = static_cast<unsigned>(bucket / kSubBuckets) - 1;
    const std::uint64_t first = (kSubBuckets + bucket % kSubBuckets) << shift;
    return first + ((std::uint64_t{1} << shift) - 1);
  }

  std::array<std::uint64_t, kBuckets> buckets_;
  std::uint64_t count_;
  std::uint64_t max_;
};

}  // namespace freehold::bench

#endif  // FREEHOLD_BENCH_SUPPORT_LATENCY_HISTOGRAM_H_
