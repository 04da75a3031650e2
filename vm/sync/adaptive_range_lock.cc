#include "vm/sync/adaptive_range_lock.h"

#include <algorithm>
#include <memory>

#include "vm/os/check.h"
#include "vm/sync/clock.h"

namespace freehold::vm::sync {
namespace {

constexpr PageRange kEveryPage{{0}, {~std::size_t{0} >> kPageShift}};

}  // namespace

bool AdaptiveRangeLock::Confirm(RangeRequest& request) {
  const std::size_t index = IndexOf(*request.bucket);
  RangeRequest* woken = nullptr;
  bool held;
  {
    SpinLockHolder holder(lock_);
    SlowBucket& slow = slow_[index];
    if (slow.requests != 0) {
      // Somebody closed the bucket since, so the request is part of its proxy.
      held = RequestTree::IsHeld(slow.proxy());
      if (!held) woken = LeaveProxyLocked(index);
    } else {
      held = !tree_.HasConflict(request.range, request.mode);
      if (!held) LeaveWord(request);
    }
  }
  UnparkAll(woken);
  if (held) return true;
  ForgetReader(*request.bucket, request);
  return false;
}

bool AdaptiveRangeLock::AcquireSlow(RangeRequest& request, const Nanoseconds* deadline) {
  {
    SpinLockHolder holder(lock_);
    CloseBucketsLocked(request);
    if (tree_.Enter(request)) return true;
  }
  return AwaitGrant(request, deadline, lock_,
                    [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return LeaveLocked(request); });
}

bool AdaptiveRangeLock::TryAcquireSlow(RangeRequest& request) {
  SpinLockHolder holder(lock_);
  CloseBucketsLocked(request);
  if (tree_.TryEnter(request)) return true;
  LeaveBucketsLocked(request);
  return false;
}

void AdaptiveRangeLock::ReleaseSlow(RangeRequest& request) {
  RangeRequest* woken;
  {
    SpinLockHolder holder(lock_);
    woken = request.bucket != nullptr ? LeaveProxyLocked(IndexOf(*request.bucket))
                                      : LeaveLocked(request);
  }
  UnparkAll(woken);
}

void AdaptiveRangeLock::Downgrade(RangeRequest& request) {
  if (request.bucket != nullptr) {
    std::uint64_t expected = request.fast_word;
    request.fast_word &= ~kExclusive;
    request.mode = LockMode::kShared;
    NoteHolder(*request.bucket, request);
    ReachSyncPoint(SyncPoint::kRelease, this);
    // Pairs with the compare-and-swap of the readers that join.
    if (request.bucket->word.compare_exchange_strong(
            expected, request.fast_word, std::memory_order_release, std::memory_order_relaxed)) {
      return;
    }
  }
  RangeRequest* woken;
  {
    SpinLockHolder holder(lock_);
    woken = tree_.Downgrade(request.bucket != nullptr ? slow_[IndexOf(*request.bucket)].proxy()
                                                      : request);
  }
  UnparkAll(woken);
}

bool AdaptiveRangeLock::MayBeHeldWide(PageRange range) const {
  if (IsLong(range)) return true;
  for (std::size_t granule = GranuleOf(range.first); granule <= LastGranuleOf(range); ++granule) {
    if (buckets_[IndexOf(granule)].word.load(std::memory_order_relaxed) != kIdle) return true;
  }
  return false;
}

void AdaptiveRangeLock::CloseBucketsLocked(const RangeRequest& request) {
  const PageRange range = request.range;
  if (!IsLong(range)) {
    for (std::size_t granule = GranuleOf(range.first); granule <= LastGranuleOf(range); ++granule) {
      const std::size_t index = IndexOf(granule);
      if (slow_[index].requests == 0) CloseLocked(index);
      ++slow_[index].requests;
    }
    return;
  }
  // From here on, whoever makes a word fast looks at the tree before holding it, and that waits for
  // lock_. Who did so before is found below. See README.md.
  ReachSyncPoint(SyncPoint::kAcquire, this);
  gate_.fetch_add(1, std::memory_order_seq_cst);
  for (std::size_t index = 0; index < kBuckets; ++index) {
    ReachSyncPoint(SyncPoint::kAcquire, this);
    const std::uint64_t word = buckets_[index].word.load(std::memory_order_seq_cst);
    if (!IsFast(word) || !RangeOf(word).Overlaps(range)) continue;
    if (!Conflict(ModeOf(word), request.mode)) continue;
    CloseLocked(index);
    if (slow_[index].requests != 0) continue;
    buckets_[index].word.store(kIdle, std::memory_order_release);  // released since the load
  }
}

void AdaptiveRangeLock::LeaveBucketsLocked(const RangeRequest& request) {
  const PageRange range = request.range;
  if (IsLong(range)) {
    gate_.fetch_sub(1, std::memory_order_seq_cst);
    return;
  }
  for (std::size_t granule = GranuleOf(range.first); granule <= LastGranuleOf(range); ++granule) {
    LeaveBucketLocked(IndexOf(granule));
  }
}

void AdaptiveRangeLock::CloseLocked(std::size_t index) {
  ReachSyncPoint(SyncPoint::kAcquire, this);
  // Acquires what those released who made it idle; a holder that releases from here on does so
  // under lock_.
  const std::uint64_t word = buckets_[index].word.exchange(kClosed, std::memory_order_seq_cst);
  if (!IsFast(word)) return;
  SlowBucket& slow = slow_[index];
  slow.requests = 1;
  slow.proxied = HoldersOf(word);
  RangeRequest* const proxy = std::construct_at(reinterpret_cast<RangeRequest*>(&slow.storage),
                                                RangeOf(word), ModeOf(word), Operation{}, 0);
  tree_.Enter(*proxy, RequestTree::Kind::kProxy);
}

void AdaptiveRangeLock::LeaveBucketLocked(std::size_t index) {
  // Pairs with the compare-and-swap that makes the word fast again.
  if (--slow_[index].requests == 0) buckets_[index].word.store(kIdle, std::memory_order_release);
}

RangeRequest* AdaptiveRangeLock::LeaveLocked(RangeRequest& request) {
  RangeRequest* const woken = tree_.Leave(request);
  LeaveBucketsLocked(request);
  return woken;
}

RangeRequest* AdaptiveRangeLock::LeaveProxyLocked(std::size_t index) {
  SlowBucket& slow = slow_[index];
  if (--slow.proxied != 0) return nullptr;
  RangeRequest* const woken = tree_.Leave(slow.proxy());
  LeaveBucketLocked(index);
  return woken;
}

// ---- For those who look. ----

// Those among `holders` fast holders whose names are known; `what` is the same for all of them.
void AdaptiveRangeLock::ListFast(const LockBucket& bucket, std::uint32_t holders,
                                 const HolderInfo& what, HolderList& list) {
  std::uint32_t listed = 0;
  const auto list_one = [&](const std::atomic<std::uint64_t>& slot) {
    const std::uint64_t who = slot.load(std::memory_order_relaxed);
    if (who == 0 || listed == holders) return;
    HolderInfo info = what;
    info.thread_id = static_cast<std::uint32_t>(who);
    info.operation = static_cast<Operation>(who >> 32);
    list.Add(info);
    ++listed;
  };
  if (what.mode == LockMode::kExclusive) {
    list_one(bucket.writer);
  } else {
    for (const std::atomic<std::uint64_t>& slot : bucket.readers) list_one(slot);
  }
  list.total += holders - listed;
}

void AdaptiveRangeLock::AppendHolders(PageRange range, HolderList& list) const {
  const Nanoseconds now = CoarseNow();
  SpinLockHolder holder(lock_);
  for (LockBucket& bucket : buckets_) {
    const std::uint64_t word = bucket.word.load(std::memory_order_acquire);
    if (!IsFast(word) || !RangeOf(word).Overlaps(range)) continue;
    std::uint64_t since = 0;
    if (bucket.since.compare_exchange_strong(since, now.value, std::memory_order_relaxed)) {
      since = now.value;
    }
    ListFast(bucket, HoldersOf(word),
             {.thread_id = 0,
              .operation = {},
              .mode = ModeOf(word),
              .state = HolderInfo::State::kHolding,
              .range = RangeOf(word),
              .age = now - std::min(now, Nanoseconds{since})},
             list);
  }
  for (const bool held : {true, false}) {
    tree_.ForEachOverlap(range, [&](RangeRequest& request) ABSL_NO_THREAD_SAFETY_ANALYSIS {
      if (RequestTree::IsHeld(request) != held) return;
      const HolderInfo info = RequestTree::Describe(request, now);
      request.is_proxy ? AppendCopiedHolders(info, list) : list.Add(info);
    });
  }
}

void AdaptiveRangeLock::CheckInvariants() const {
  SpinLockHolder holder(lock_);
  tree_.CheckInvariants();
  std::array<std::uint32_t, kBuckets> requests{};
  std::array<bool, kBuckets> has_proxy{};
  std::uint32_t long_requests = 0;
  tree_.ForEachOverlap(kEveryPage, [&](const RangeRequest& request) {
    if (IsLong(request.range)) {
      ++long_requests;
      return;
    }
    for (std::size_t g = GranuleOf(request.range.first); g <= LastGranuleOf(request.range); ++g) {
      ++requests[IndexOf(g)];
    }
    if (request.is_proxy) has_proxy[IndexOf(request.range)] = true;
  });
  FREEHOLD_CHECK(gate_.load(std::memory_order_relaxed) == long_requests);  // A2
  for (std::size_t index = 0; index < kBuckets; ++index) {
    const std::uint64_t word = buckets_[index].word.load(std::memory_order_acquire);
    FREEHOLD_CHECK(slow_[index].requests == requests[index]);
    FREEHOLD_CHECK((slow_[index].proxied != 0) == has_proxy[index]);
    FREEHOLD_CHECK((word == kClosed) == (requests[index] != 0));  // A1
    if (word == kIdle || word == kClosed) continue;
    const PageRange range = RangeOf(word);
    FREEHOLD_CHECK(FitsWord(range) && IndexOf(range) == index);
    FREEHOLD_CHECK(HoldersOf(word) == 1 || ModeOf(word) == LockMode::kShared);
    FREEHOLD_CHECK(HoldersOf(word) != 0);
    tree_.ForEachOverlap(range, [](const RangeRequest& request) {
      FREEHOLD_CHECK(IsLong(request.range));  // as far as A3 can be seen from here
    });
  }
}

void AdaptiveRangeLock::ForgetAll() {
  lock_.ReinitAfterFork();
  gate_.store(0, std::memory_order_relaxed);
  tree_.Clear();
  for (LockBucket& bucket : buckets_) {
    bucket.word.store(kIdle, std::memory_order_relaxed);
    bucket.writer.store(0, std::memory_order_relaxed);
    for (std::atomic<std::uint64_t>& reader : bucket.readers) {
      reader.store(0, std::memory_order_relaxed);
    }
  }
  for (SlowBucket& slow : slow_) slow.requests = slow.proxied = 0;
}

void AdaptiveRangeLock::Adopt(RangeRequest& request) {
  SpinLockHolder holder(lock_);
  request.bucket = nullptr;
  CloseBucketsLocked(request);
  tree_.TryEnter(request);
}

}  // namespace freehold::vm::sync
