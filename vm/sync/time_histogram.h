// How long something took, as counts per bucket of nanoseconds; and the recorder of such times, which locks feed
// (spin_lock.h, lock_times.h).
//
// Units:    nanoseconds of CLOCK_MONOTONIC, with the cost of reading the clock once included.
// Accuracy: buckets are a quarter of a doubling wide, so a percentile is at most 25 % above the true value. What
//           is longer than two seconds counts as two seconds.
#ifndef FREEHOLD_VM_SYNC_TIME_HISTOGRAM_H_
#define FREEHOLD_VM_SYNC_TIME_HISTOGRAM_H_

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "vm/units.h"

namespace freehold::vm::sync {

// A copy of the counts. Thread-compatible; copies of one recorder subtract, which gives what came between them.
class TimeHistogram {
 public:
  static constexpr std::size_t kBuckets = 4 * 30;

  // Below four nanoseconds a bucket each, then four a doubling.
  static constexpr std::size_t BucketOf(Nanoseconds time) {
    if (time.value < 4) return time.value;
    const auto log2 = static_cast<std::size_t>(std::bit_width(time.value)) - 1;
    return std::min(4 * (log2 - 1) + (time.value >> (log2 - 2) & 3), kBuckets - 1);
  }
  // The longest time that counts in `bucket`.
  static constexpr Nanoseconds LastOf(std::size_t bucket) {
    if (bucket < 4) return {bucket};
    const std::size_t log2 = bucket / 4 + 1;
    return {((4 + bucket % 4 + 1) << (log2 - 2)) - 1};
  }

  void Add(std::size_t bucket, std::uint64_t times) { counts_[bucket] += times; }

  std::uint64_t count(std::size_t bucket) const { return counts_[bucket]; }
  std::uint64_t count() const {
    std::uint64_t sum = 0;
    for (const std::uint64_t times : counts_) sum += times;
    return sum;
  }
  // The shortest time, a bucket's last, that at least `fraction` of those counted did not exceed; 0 without any.
  // REQUIRES: 0 < fraction <= 1; 1 gives the longest.
  Nanoseconds Percentile(double fraction) const {
    const double wanted = fraction * static_cast<double>(count());
    if (wanted == 0) return {0};
    std::uint64_t seen = 0;
    std::size_t bucket = 0;
    while (seen += counts_[bucket], static_cast<double>(seen) < wanted && bucket + 1 < kBuckets) ++bucket;
    return LastOf(bucket);
  }

  TimeHistogram& operator+=(const TimeHistogram& other) {
    for (std::size_t i = 0; i < kBuckets; ++i) counts_[i] += other.counts_[i];
    return *this;
  }
  // REQUIRES: `earlier` is an earlier copy.
  TimeHistogram& operator-=(const TimeHistogram& earlier) {
    for (std::size_t i = 0; i < kBuckets; ++i) counts_[i] -= earlier.counts_[i];
    return *this;
  }

 private:
  std::array<std::uint64_t, kBuckets> counts_ = {};
};

// Thread safety: thread-safe, but for RecordAlone.
// Allocation:    none; about a kilobyte.
class TimeRecorder {
 public:
  void Record(Nanoseconds time) {
    counts_[TimeHistogram::BucketOf(time)].fetch_add(1, std::memory_order_relaxed);
  }
  // Cheaper. REQUIRES: nobody else records meanwhile, as where the holder of a lock records into that lock's own.
  void RecordAlone(Nanoseconds time) {
    std::atomic<std::uint64_t>& count = counts_[TimeHistogram::BucketOf(time)];
    count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }

  // What is recorded meanwhile may be missing.
  TimeHistogram Read() const {
    TimeHistogram histogram;
    for (std::size_t i = 0; i < TimeHistogram::kBuckets; ++i) {
      histogram.Add(i, counts_[i].load(std::memory_order_relaxed));
    }
    return histogram;
  }

 private:
  std::array<std::atomic<std::uint64_t>, TimeHistogram::kBuckets> counts_ = {};
};

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_TIME_HISTOGRAM_H_
