#include "vm/sync/lock_rank.h"

#include <algorithm>
#include <atomic>

#include "vm/os/check.h"

namespace freehold::vm::sync {

const char* ToString(LockRank rank) {
  switch (rank) {
    case LockRank::kPager: return "kPager";
    case LockRank::kRuntime: return "kRuntime";
    case LockRank::kHeapProfile: return "kHeapProfile";
    case LockRank::kHeap: return "kHeap";
    case LockRank::kHeapShard: return "kHeapShard";
    case LockRank::kFork: return "kFork";
    case LockRank::kRange: return "kRange";
    case LockRank::kPurge: return "kPurge";
    case LockRank::kSnapshot: return "kSnapshot";
    case LockRank::kRegion: return "kRegion";
    case LockRank::kRangeInternal: return "kRangeInternal";
    case LockRank::kFreeList: return "kFreeList";
    case LockRank::kMetadata: return "kMetadata";
    case LockRank::kLeaf: return "kLeaf";
  }
  return "unknown rank";
}

#if defined(FREEHOLD_DEBUG_CHECKS)

namespace {

constexpr std::size_t Index(LockRank rank) { return static_cast<std::size_t>(rank); }
constexpr LockRank Next(LockRank rank) { return static_cast<LockRank>(Index(rank) + 1); }
constexpr std::size_t kLockRanks = Index(LockRank::kLeaf) + 1;

struct HeldLock {
  const void* id = nullptr;    // the lock, or the guard of a range
  const void* lock = nullptr;  // the lock
  PageRange range;             // empty unless it is a range lock
  LockRank rank{};
  AcquisitionSite site;
};

// What a thread holds, oldest first.
struct HeldStack {
  std::size_t size = 0;
  std::size_t fork_locks[kLockRanks] = {};  // of each rank
  HeldLock fork_lock;                       // the last one acquired
  HeldLock locks[kMaxHeldLocks];
};

// Initial-exec: first use never calls into the dynamic linker, which allocates.
constinit thread_local HeldStack held_stack __attribute__((tls_model("initial-exec")));

constinit std::atomic<RankViolationHandler> violation_handler{nullptr};

// A message assembled on the stack: nothing here may allocate.
class Message {
 public:
  Message& operator<<(const char* text) {
    while (*text != '\0' && size_ < sizeof(text_) - 1) text_[size_++] = *text++;
    return *this;
  }
  Message& operator<<(std::uint64_t number) { return Append(number, 10); }
  Message& operator<<(const void* pointer) {
    return (*this << "0x").Append(reinterpret_cast<std::uintptr_t>(pointer), 16);
  }
  Message& operator<<(PageRange range) {
    *this << " of pages [0x";
    Append(range.first.value, 16) << ", 0x";
    return Append(range.end.value, 16) << ")";
  }
  Message& operator<<(const HeldLock& lock) {
    *this << ToString(lock.rank) << " " << lock.lock;
    if (!lock.range.empty()) *this << lock.range;
    return *this << " at " << lock.site.file() << ":"
                 << static_cast<std::uint64_t>(lock.site.line());
  }
  const char* text() const { return text_; }

 private:
  Message& Append(std::uint64_t number, unsigned base) {
    char digits[21] = {};
    std::size_t at = sizeof(digits) - 1;
    do {
      digits[--at] = "0123456789abcdef"[number % base];
      number /= base;
    } while (number != 0);
    return *this << &digits[at];
  }

  char text_[480] = {};
  std::size_t size_ = 0;
};

void Fail(const Message& message, AcquisitionSite site) {
  if (const RankViolationHandler handler = violation_handler.load(std::memory_order_acquire)) {
    return handler(message.text());
  }
  CheckFailed(site.file(), site.line(), message.text());
}

void FailOrder(const HeldLock& wanted, const HeldLock& held, const char* rule) {
  Message message;
  message << "lock order: acquiring " << wanted << " while holding " << held << ": " << rule;
  Fail(message, wanted.site);
}

// The rule that acquiring `wanted` while holding `held` breaks; null if none.
const char* BrokenRule(const HeldLock& wanted, const HeldLock& held, RankCheck check) {
  if (wanted.id == held.id) return "not recursive";
  if (wanted.rank > held.rank) return nullptr;
  if (wanted.rank < held.rank) return "rank out of order";
  if (!wanted.range.empty() && !held.range.empty()) {
    return held.range.end <= wanted.range.first ? nullptr : "ranges not ascending";
  }
  if (check != RankCheck::kAscending) return "two locks of one rank";
  return held.lock < wanted.lock ? nullptr : "addresses not ascending";
}

// Whether the fork handlers hold a lock of rank `from` or later.
bool HoldsForkLock(const HeldStack& stack, LockRank from) {
  return std::any_of(stack.fork_locks + Index(from), stack.fork_locks + kLockRanks,
                     [](std::size_t count) { return count != 0; });
}

void Check(const HeldLock& wanted, RankCheck check) {
  const HeldStack& stack = held_stack;
  for (std::size_t i = stack.size; i > 0; --i) {
    const HeldLock& held = stack.locks[i - 1];
    if (const char* const rule = BrokenRule(wanted, held, check))
      return FailOrder(wanted, held, rule);
  }
  if (HoldsForkLock(stack, wanted.rank)) FailOrder(wanted, stack.fork_lock, "rank out of order");
}

void Record(const HeldLock& held) {
  HeldStack& stack = held_stack;
  if (stack.size == kMaxHeldLocks) {
    CheckFailed(held.site.file(), held.site.line(), "lock order: a thread holds too many locks");
  }
  stack.locks[stack.size++] = held;
}

HeldLock Lock(LockRank rank, const void* lock, AcquisitionSite site) {
  return {.id = lock, .lock = lock, .range = {}, .rank = rank, .site = site};
}

HeldLock Range(LockRank rank, const void* lock, const void* holder, PageRange range,
               AcquisitionSite site) {
  return {.id = holder, .lock = lock, .range = range, .rank = rank, .site = site};
}

}  // namespace

void CheckRank(LockRank rank, const void* lock, RankCheck check, AcquisitionSite site) {
  Check(Lock(rank, lock, site), check);
}

void RecordRank(LockRank rank, const void* lock, AcquisitionSite site) {
  Record(Lock(rank, lock, site));
}

void CheckRangeRank(LockRank rank, const void* lock, const void* holder, PageRange range,
                    AcquisitionSite site) {
  Check(Range(rank, lock, holder, range, site), RankCheck::kOrdered);
}

void RecordRangeRank(LockRank rank, const void* lock, const void* holder, PageRange range,
                     AcquisitionSite site) {
  Record(Range(rank, lock, holder, range, site));
}

void ReleaseRank(const void* lock) {
  HeldStack& stack = held_stack;
  for (std::size_t i = stack.size; i > 0; --i) {
    if (stack.locks[i - 1].id != lock) continue;
    for (--stack.size; i <= stack.size; ++i) stack.locks[i - 1] = stack.locks[i];
    return;
  }
  Message message;
  message << "lock order: releasing " << lock << ", which this thread does not hold";
  Fail(message, AcquisitionSite::Here());
}

void AcquireRankForFork(LockRank rank, AcquisitionSite site) {
  HeldStack& stack = held_stack;
  const HeldLock wanted = Lock(rank, nullptr, site);
  for (std::size_t i = 0; i < stack.size; ++i) {
    if (rank < stack.locks[i].rank) FailOrder(wanted, stack.locks[i], "rank out of order");
  }
  if (rank != LockRank::kLeaf && HoldsForkLock(stack, Next(rank))) {
    FailOrder(wanted, stack.fork_lock, "rank out of order");
  }
  ++stack.fork_locks[Index(rank)];
  stack.fork_lock = wanted;
}

void ReleaseRankForFork(LockRank rank) { --held_stack.fork_locks[Index(rank)]; }

void CheckNoShortLockHeld(const char* operation) {
  const HeldStack& stack = held_stack;
  const HeldLock* held = nullptr;
  for (std::size_t i = 0; i < stack.size; ++i) {
    if (IsShort(stack.locks[i].rank)) held = &stack.locks[i];
  }
  if (HoldsForkLock(stack, LockRank::kRegion)) held = &stack.fork_lock;
  if (held == nullptr) return;
  Message message;
  message << "lock order: " << operation << " while holding the short lock " << *held;
  Fail(message, held->site);
}

void CheckLockHeld(const void* lock) {
  const HeldStack& stack = held_stack;
  if (HoldsForkLock(stack, LockRank{})) return;
  for (std::size_t i = 0; i < stack.size; ++i) {
    if (stack.locks[i].id == lock) return;
  }
  Message message;
  message << "lock order: " << lock << " is not held by this thread";
  Fail(message, AcquisitionSite::Here());
}

void SetRankViolationHandlerForTest(RankViolationHandler handler) {
  violation_handler.store(handler, std::memory_order_release);
}

#endif

}  // namespace freehold::vm::sync
