#include "vm/sync/coarse_lock.h"

#include <algorithm>
#include <memory>

#include "vm/os/check.h"
#include "vm/sync/clock.h"
#include "vm/sync/spin_wait.h"

namespace freehold::vm::sync {
namespace {

// Writers that a spinner watches go by.
constexpr int kMaxWriters = 8;

}  // namespace

bool CoarseLock::AcquireSlow(RangeRequest& request, const Nanoseconds* deadline) {
  if (SpinThenSteal(request.mode)) {
    Record(request, Nanoseconds{0});
    return true;
  }
  {
    SpinLockHolder holder(queue_lock_);
    if (AcquireOrEnqueueLocked(request)) {
      Record(request, Nanoseconds{0});
      return true;
    }
  }
  StampHolders();
  if (!WaitInQueue(request, deadline)) return false;
  Record(request, CoarseNow());
  return true;
}

// Spins while the holder makes progress: as long as writers follow each other, or for one short
// section under the same holder, which after that is likely to sleep or to have lost its CPU.
bool CoarseLock::SpinThenSteal(LockMode mode) {
  std::uint32_t writer = last_writer_.load(std::memory_order_relaxed);
  int writers = 1;
  SpinWait spin(kShortSpin);
  do {
    ReachSyncPoint(SyncPoint::kAcquire, this);
    std::uint64_t state = state_.load(std::memory_order_relaxed);
    if (StealsUsedUp(state)) return false;
    // Readers do not join readers ahead of a writer in the queue: only a lock that nobody holds is
    // stolen.
    const bool queued = (state & kQueued) != 0;
    const std::uint64_t steal = queued ? kOneSteal : 0;
    if (IsFree(state, queued ? LockMode::kExclusive : mode) &&
        state_.compare_exchange_weak(state, state + Unit(mode) + steal, std::memory_order_acquire,
                                     std::memory_order_relaxed)) {
      return true;
    }
    const std::uint32_t now_writer = last_writer_.load(std::memory_order_relaxed);
    if (now_writer == writer) continue;
    if (++writers > kMaxWriters) return false;
    writer = now_writer;
    spin = SpinWait(kShortSpin);
  } while (spin.Once());
  return false;
}

bool CoarseLock::AcquireOrEnqueueLocked(RangeRequest& request) {
  if (head_ == nullptr) {
    std::uint64_t state = state_.load(std::memory_order_relaxed);
    bool acquires;
    do {
      acquires = IsFree(state, request.mode);
    } while (!state_.compare_exchange_weak(state,
                                           acquires ? state + Unit(request.mode) : state | kQueued,
                                           std::memory_order_acquire, std::memory_order_relaxed));
    if (acquires) return true;
  }
  request.since = CoarseNow();
  request.signalled = false;
  request.queue = {.previous = tail_, .next = nullptr, .slot = kNoSlot, .granted = false};
  (tail_ != nullptr ? tail_->queue.next : head_) = &request;
  tail_ = &request;
  return false;
}

bool CoarseLock::WaitInQueue(RangeRequest& request, const Nanoseconds* deadline) {
  const Nanoseconds* until = deadline;
  while (true) {
    const bool signal_came = request.parker.Park(until);
    until = deadline;
    RangeRequest* woken = nullptr;
    bool leaves = false;
    bool granted = false;
    {
      SpinLockHolder holder(queue_lock_);
      if (signal_came) {
        // An invitation lets the head grant itself what it can get; `signalled` stays set
        // meanwhile, so that it does not signal itself.
        if (!request.queue.granted) woken = GrantHeadLocked();
        granted = request.queue.granted;
        if (!granted) {
          request.signalled = false;
          request.parker.Reset();
        }
      } else if (request.signalled) {
        until = nullptr;  // the signal is under way, and the signaller still needs the request
      } else {
        woken = LeaveQueueLocked(request);
        leaves = true;
      }
    }
    UnparkAll(woken);
    if (granted) return true;
    if (leaves) return false;
  }
}

void CoarseLock::WakeQueue() {
  RangeRequest* woken = nullptr;
  {
    SpinLockHolder holder(queue_lock_);
    if (head_ == nullptr) return;
    // Readers at the head are granted together; a writer is only invited, so that running threads
    // can use the lock until it has woken up, until they have done so too often.
    if (head_->mode == LockMode::kShared || StealsUsedUp(state_.load(std::memory_order_relaxed))) {
      woken = GrantHeadLocked();
    } else if (!head_->signalled) {
      head_->signalled = true;
      head_->next_woken = nullptr;
      woken = head_;
    }
  }
  UnparkAll(woken);
}

// Takes the lock on behalf of the writer, or of all the readers, at the head of the queue, if it is
// free for them. The acquire passes on to them through their signals.
RangeRequest* CoarseLock::GrantHeadLocked() {
  if (head_ == nullptr) return nullptr;
  const LockMode mode = head_->mode;
  std::uint64_t units = 0;
  RangeRequest* rest = head_;
  do {
    units += Unit(mode);
    rest = rest->queue.next;
  } while (mode == LockMode::kShared && rest != nullptr && rest->mode == LockMode::kShared);

  std::uint64_t state = state_.load(std::memory_order_relaxed);
  std::uint64_t next;
  do {
    if (!IsFree(state, mode)) return nullptr;
    next = (state & ~(kQueued | kStealMask)) + units + (rest != nullptr ? kQueued : 0);
  } while (!state_.compare_exchange_weak(state, next, std::memory_order_acquire,
                                         std::memory_order_relaxed));

  RangeRequest* woken = nullptr;
  RangeRequest** link = &woken;
  while (head_ != rest) {
    RangeRequest* const request = head_;
    UnlinkLocked(*request);
    request->queue.granted = true;
    if (request->signalled) continue;  // it will see the grant when its signal arrives
    request->signalled = true;
    *link = request;
    link = &request->next_woken;
  }
  *link = nullptr;
  return woken;
}

RangeRequest* CoarseLock::LeaveQueueLocked(RangeRequest& request) {
  UnlinkLocked(request);
  if (head_ == nullptr) {
    state_.fetch_and(~(kQueued | kStealMask), std::memory_order_relaxed);
    return nullptr;
  }
  return GrantHeadLocked();  // readers may have waited for this writer only
}

void CoarseLock::UnlinkLocked(RangeRequest& request) {
  RangeRequest::QueueNode& node = request.queue;
  (node.previous != nullptr ? node.previous->queue.next : head_) = node.next;
  (node.next != nullptr ? node.next->queue.previous : tail_) = node.previous;
}

void CoarseLock::Downgrade(RangeRequest& request) {
  ReachSyncPoint(SyncPoint::kRelease, this);
  request.mode = LockMode::kShared;
  const std::uint64_t before = state_.fetch_add(kOneReader - kWriter, std::memory_order_release);
  if (request.queue.slot != kNoSlot) {
    std::atomic<std::uint64_t>& who = holders_[request.queue.slot].who;
    who.store(who.load(std::memory_order_relaxed) & 0xff'ffff'ffff, std::memory_order_relaxed);
  }
  if ((before & kQueued) == 0) return;
  RangeRequest* woken = nullptr;
  {
    SpinLockHolder holder(queue_lock_);
    if (head_ != nullptr && head_->mode == LockMode::kShared) woken = GrantHeadLocked();
  }
  UnparkAll(woken);
}

void CoarseLock::StampHolders() const {
  const Nanoseconds now = CoarseNow();
  for (HolderSlot& slot : holders_) {
    std::uint64_t unseen = 0;
    if (slot.who.load(std::memory_order_relaxed) != 0) {
      slot.since.compare_exchange_strong(unseen, now.value, std::memory_order_relaxed);
    }
  }
}

void CoarseLock::AppendCopiedHolders(HolderList& list) const {
  const std::uint64_t now = CoarseNow().value;
  for (const HolderSlot& slot : holders_) {
    // Pairs with the release in Record; the rest may be of the slot's next user all the same.
    const std::uint64_t who = slot.who.load(std::memory_order_acquire);
    if (who == 0) continue;
    const std::uint64_t since = slot.since.load(std::memory_order_relaxed);
    list.Add({.thread_id = static_cast<std::uint32_t>(who),
              .operation = static_cast<Operation>(who >> 32 & 0xff),
              .mode = static_cast<LockMode>(who >> 40 & 1),
              .state = HolderInfo::State::kHolding,
              .range = {{slot.first.load(std::memory_order_relaxed)},
                        {slot.end.load(std::memory_order_relaxed)}},
              .age = {since == 0 || since > now ? 0 : now - since}});
  }
}

void CoarseLock::AppendHolders(HolderList& list) const {
  StampHolders();
  AppendCopiedHolders(list);
  const std::uint64_t now = CoarseNow().value;
  SpinLockHolder holder(queue_lock_);
  for (const RangeRequest* request = head_; request != nullptr; request = request->queue.next) {
    list.Add({.thread_id = request->thread_id,
              .operation = request->operation,
              .mode = request->mode,
              .state = HolderInfo::State::kWaiting,
              .range = request->range,
              .age = {now - std::min(now, request->since.value)}});
  }
}

void CoarseLock::CheckInvariants() const {
  SpinLockHolder holder(queue_lock_);
  const std::uint64_t state = state_.load(std::memory_order_relaxed);
  FREEHOLD_CHECK((state & kWriter) == 0 || state < kOneReader);    // C1
  FREEHOLD_CHECK(((state & kQueued) != 0) == (head_ != nullptr));  // C2
  FREEHOLD_CHECK(head_ != nullptr || (state & kStealMask) == 0);
  FREEHOLD_CHECK((state & kStealMask) <= kMaxSteals * kOneSteal);
  const RangeRequest* previous = nullptr;
  for (const RangeRequest* request = head_; request != nullptr; request = request->queue.next) {
    FREEHOLD_CHECK(request->queue.previous == previous);
    FREEHOLD_CHECK(!request->queue.granted);
    FREEHOLD_CHECK(request == head_ || !request->signalled);
    previous = request;
  }
  FREEHOLD_CHECK(tail_ == previous);
}

void CoarseLock::ForgetAll() {
  queue_lock_.ReinitAfterFork();
  state_.store(0, std::memory_order_relaxed);
  head_ = tail_ = nullptr;
  for (HolderSlot& slot : holders_) slot.who.store(0, std::memory_order_relaxed);
}

void CoarseLock::Adopt(RangeRequest& request) {
  state_.fetch_add(Unit(request.mode), std::memory_order_relaxed);
  Record(request, Nanoseconds{0});
}

}  // namespace freehold::vm::sync
