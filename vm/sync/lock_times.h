// How long range locks are waited for and held, by operation; fed by RangeLocks that a recorder is installed in.
#ifndef FREEHOLD_VM_SYNC_LOCK_TIMES_H_
#define FREEHOLD_VM_SYNC_LOCK_TIMES_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "vm/sync/range_request.h"
#include "vm/sync/time_histogram.h"
#include "vm/units.h"

namespace freehold::vm::sync {

// Of granted requests: each has one wait, and one hold once it is released. Requests that were refused or gave up are
// in neither. A hold goes on through a downgrade.
struct LockTimes {
  TimeHistogram waits;
  TimeHistogram holds;
};

// One for any number of locks.
//
// Thread safety: thread-safe. Threads record in different shards, as far as there are: lockers of disjoint ranges
//                write few common lines.
// Allocation:    none; half a megabyte.
class LockTimesRecorder {
 public:
  void RecordWait(const RangeRequest& request, Nanoseconds time) { ShardOf(request).waits.Record(time); }
  void RecordHold(const RangeRequest& request, Nanoseconds time) { ShardOf(request).holds.Record(time); }

  // What is recorded meanwhile may be missing.
  LockTimes Read(Operation operation) const {
    LockTimes times;
    for (const Shard& shard : shards_) {
      const Recorders& recorders = shard[static_cast<std::size_t>(operation)];
      times.waits += recorders.waits.Read();
      times.holds += recorders.holds.Read();
    }
    return times;
  }

 private:
  static constexpr std::size_t kShards = 16;
  struct alignas(kCacheLineSize) Recorders {
    TimeRecorder waits;
    TimeRecorder holds;
  };
  using Shard = std::array<Recorders, kOperations>;

  Recorders& ShardOf(const RangeRequest& request) {
    return shards_[request.thread_id % kShards][static_cast<std::size_t>(request.operation)];
  }

  std::array<Shard, kShards> shards_ = {};
};

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_LOCK_TIMES_H_
