// What a range lock's policies know about one request: what is wanted, by whom, and the node that
// queues it.
#ifndef FREEHOLD_VM_SYNC_RANGE_REQUEST_H_
#define FREEHOLD_VM_SYNC_RANGE_REQUEST_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "vm/page_range.h"
#include "vm/sync/parking.h"
#include "vm/units.h"

namespace freehold::vm::sync {

enum class LockMode : bool { kShared, kExclusive };

// Two requests conflict when their ranges overlap and either is exclusive.
constexpr bool Conflict(LockMode a, LockMode b) {
  return a == LockMode::kExclusive || b == LockMode::kExclusive;
}

// What a range is locked for; for diagnostics. kTest is the last one.
enum class Operation : std::uint8_t {
  kMap,
  kUnmap,
  kProtect,
  kAdvise,
  kRemap,
  kPopulate,
  kMemoryLock,
  kSync,
  kFault,
  kPin,
  kPurge,
  kSnapshot,
  kTransaction,
  kFile,
  kFork,
  kTest,
};
inline constexpr std::size_t kOperations = static_cast<std::size_t>(Operation::kTest) + 1;

constexpr const char* ToString(Operation operation) {
  switch (operation) {
    case Operation::kMap: return "map";
    case Operation::kUnmap: return "unmap";
    case Operation::kProtect: return "protect";
    case Operation::kAdvise: return "advise";
    case Operation::kRemap: return "remap";
    case Operation::kPopulate: return "populate";
    case Operation::kMemoryLock: return "lock-memory";
    case Operation::kSync: return "sync";
    case Operation::kFault: return "fault";
    case Operation::kPin: return "pin";
    case Operation::kPurge: return "purge";
    case Operation::kSnapshot: return "snapshot";
    case Operation::kTransaction: return "transaction";
    case Operation::kFile: return "file";
    case Operation::kFork: return "fork";
    case Operation::kTest: return "test";
  }
  return "unknown";
}

// One holder of, or waiter for, a range.
struct HolderInfo {
  enum class State : bool { kHolding, kWaiting };

  std::uint32_t thread_id;
  Operation operation;
  LockMode mode;
  State state;
  PageRange range;
  // Waiting since, or holding at least since: a holder's clock starts when it was granted after a
  // wait, or when somebody first waited for it or looked at it, so that nobody reads a clock to
  // take a free lock.
  Nanoseconds age;
};

// The first kCapacity holders and waiters of a range, holders first; `total` counts all.
struct HolderList {
  static constexpr std::size_t kCapacity = 16;

  std::array<HolderInfo, kCapacity> entries;
  std::size_t count = 0;
  std::size_t total = 0;

  void Add(const HolderInfo& info) {
    if (count < kCapacity) entries[count++] = info;
    ++total;
  }
  const HolderInfo* begin() const { return entries.data(); }
  const HolderInfo* end() const { return entries.data() + count; }
};

struct LockBucket;  // of adaptive_range_lock.h

// A request for `range`, held or waiting. Lives in its Guard, on the requesting thread's stack; the
// fields below `parker` belong to the policy that it was handed to, which initialises what it uses:
// each store less is felt where all of a lock and unlock is a few nanoseconds.
struct RangeRequest {
  // In the tree of held and pending requests (tree_range_lock.h).
  struct TreeNode {
    RangeRequest* left;
    RangeRequest* right;
    PageNumber subtree_end;  // the highest end of a range in this subtree
    std::uint64_t ticket;    // its age: older requests have lower tickets
    std::uint64_t priority;  // of the treap
    std::size_t blockers;    // older, overlapping, conflicting requests; 0: held
  };
  // In the queue of waiters, or the table of holders (coarse_lock.h).
  struct QueueNode {
    RangeRequest* previous;
    RangeRequest* next;
    std::size_t slot;  // in the table of holders
    bool granted;
  };

  // The range in two pieces: copied as one, GCC reads both back from the stack, where they were
  // stored one by one, and the processor waits for that.
  constexpr RangeRequest(PageRange r, LockMode m, Operation o, std::uint32_t thread)
      : range{r.first, r.end}, mode(m), operation(o), thread_id(thread) {}

  PageRange range;
  LockMode mode;
  Operation operation;
  std::uint32_t thread_id;
  Parker parker;

  bool signalled;            // an Unpark is on its way: the request must stay until it arrived
  bool is_proxy;             // stands for kAdaptive's fast holders: nobody waits with it
  LockBucket* bucket;        // whose word alone says that this is held (kAdaptive); else null
  Nanoseconds since;         // the age's start; 0: not seen yet
  RangeRequest* next_woken;  // in the list of those to unpark after the internal lock
  union {
    std::uint64_t fast_word;  // what the bucket's word was, had this been the only holder
    TreeNode tree;
    QueueNode queue;
  };
};

// Signals the requests of a list, each of which may be gone as soon as it is signalled. REQUIRES:
// they were marked `signalled`, and the lock under which they were is released.
inline void UnparkAll(RangeRequest* woken) {
  while (woken != nullptr) {
    RangeRequest* const next = woken->next_woken;
    woken->parker.Unpark();
    woken = next;
  }
}

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_RANGE_REQUEST_H_
