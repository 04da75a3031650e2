// How long a lock was held, as counts per bucket of nanoseconds; and its recorder, which a RecordedSpinLock
// feeds (spin_lock.h).
//
// Units:    nanoseconds of CLOCK_MONOTONIC, with the cost of reading the clock once included.
// Accuracy: buckets are a quarter of a doubling wide, so a percentile is at most 25 % above the true value. What
//           is longer than two seconds counts as two seconds.
#ifndef FREEHOLD_VM_SYNC_HOLD_HISTOGRAM_H_
#define FREEHOLD_VM_SYNC_HOLD_HISTOGRAM_H_

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "vm/units.h"

namespace freehold::vm::sync {

// A copy of the counts. Thread-compatible; copies of one recorder subtract, which gives what came between them.
class HoldHistogram {
 public:
  static constexpr std::size_t kBuckets = 4 * 30;

  // Below four nanoseconds a bucket each, then four a doubling.
  static constexpr std::size_t BucketOf(Nanoseconds held) {
    if (held.value < 4) return held.value;
    const auto log2 = static_cast<std::size_t>(std::bit_width(held.value)) - 1;
    return std::min(4 * (log2 - 1) + (held.value >> (log2 - 2) & 3), kBuckets - 1);
  }
  // The longest hold that counts in `bucket`.
  static constexpr Nanoseconds LastOf(std::size_t bucket) {
    if (bucket < 4) return {bucket};
    const std::size_t log2 = bucket / 4 + 1;
    return {((4 + bucket % 4 + 1) << (log2 - 2)) - 1};
  }

  void Add(std::size_t bucket, std::uint64_t holds) { counts_[bucket] += holds; }

  std::uint64_t count(std::size_t bucket) const { return counts_[bucket]; }
  std::uint64_t count() const {
    std::uint64_t sum = 0;
    for (const std::uint64_t holds : counts_) sum += holds;
    return sum;
  }
  // The shortest time, a bucket's last, that at least `fraction` of the holds did not exceed; 0 without holds.
  // REQUIRES: 0 < fraction <= 1; 1 gives the longest.
  Nanoseconds Percentile(double fraction) const {
    const double wanted = fraction * static_cast<double>(count());
    if (wanted == 0) return {0};
    std::uint64_t seen = 0;
    std::size_t bucket = 0;
    while (seen += counts_[bucket], static_cast<double>(seen) < wanted && bucket + 1 < kBuckets) ++bucket;
    return LastOf(bucket);
  }

  HoldHistogram& operator+=(const HoldHistogram& other) {
    for (std::size_t i = 0; i < kBuckets; ++i) counts_[i] += other.counts_[i];
    return *this;
  }
  // REQUIRES: `earlier` is an earlier copy.
  HoldHistogram& operator-=(const HoldHistogram& earlier) {
    for (std::size_t i = 0; i < kBuckets; ++i) counts_[i] -= earlier.counts_[i];
    return *this;
  }

 private:
  std::array<std::uint64_t, kBuckets> counts_ = {};
};

// Thread safety: Record is for the holder of the one lock that is recorded; everything else is thread-safe.
// Allocation:    none; about a kilobyte.
class HoldRecorder {
 public:
  // Plain additions of relaxed loads and stores: the lock makes its holder the only writer.
  void Record(Nanoseconds held) {
    std::atomic<std::uint64_t>& count = counts_[HoldHistogram::BucketOf(held)];
    count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }

  // A hold that ends meanwhile may be missing.
  HoldHistogram Read() const {
    HoldHistogram histogram;
    for (std::size_t i = 0; i < HoldHistogram::kBuckets; ++i) {
      histogram.Add(i, counts_[i].load(std::memory_order_relaxed));
    }
    return histogram;
  }

 private:
  std::array<std::atomic<std::uint64_t>, HoldHistogram::kBuckets> counts_ = {};
};

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_HOLD_HISTOGRAM_H_
