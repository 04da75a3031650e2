#include "vm/purge_stage.h"

#include <algorithm>

#include "vm/sync/spin_wait.h"

namespace freehold::vm {
namespace {

// Ranges in one vectored call, and pages in one turn: 16 MiB are dropped in about a millisecond.
constexpr std::size_t kMaxRanges = 256;
constexpr std::size_t kMaxPagesPerTurn = 16 * kPagesPerHugePage / 2;

// The next turn's worth of `ranges`, from range `index` at page `offset` on.
class Turns {
 public:
  explicit Turns(absl::Span<const PageRange> ranges) : ranges_(ranges) {}

  bool done() const { return index_ == ranges_.size(); }

  absl::Span<const PageRange> Next(PageRange* buffer) {
    std::size_t count = 0;
    std::size_t pages = 0;
    while (!done() && count < kMaxRanges && pages < kMaxPagesPerTurn) {
      const PageRange left{ranges_[index_].first + Pages{offset_}, ranges_[index_].end};
      const std::size_t take = std::min(left.count().value, kMaxPagesPerTurn - pages);
      buffer[count++] = PageRange::Of(left.first, {take});
      pages += take;
      offset_ += take;
      if (take == left.count().value) {
        ++index_;
        offset_ = 0;
      }
    }
    return {buffer, count};
  }

 private:
  absl::Span<const PageRange> ranges_;
  std::size_t index_ = 0;
  std::size_t offset_ = 0;
};

}  // namespace

// One turn's worth of somebody's ranges. Lives in the caller's frame until `parker` is signalled.
struct PurgeStage::Request {
  absl::Span<const PageRange> ranges;
  Error error;
  bool served = false;  // written before the signal, read after it
  Request* next = nullptr;
  sync::Parker parker;
};

Error PurgeStage::Discard(absl::Span<const PageRange> ranges) {
  Error error;
  PageRange buffer[kMaxRanges];
  for (Turns turns(ranges); !turns.done() && error.ok();) {
    Request request;
    request.ranges = turns.Next(buffer);
    Request* others = nullptr;
    if (Enter(request, others)) {
      RunTogether(request, others);
      Leave();
    }
    error = request.error;
  }
  return error;
}

Error PurgeStage::DiscardNow(absl::Span<const PageRange> ranges) {
  bool entered = TryEnter();
  for (sync::SpinWait spin(sync::kShortSpin); !entered && spin.Once();) entered = TryEnter();
  const Error error = Run(ranges);
  if (entered) Leave();
  return error;
}

bool PurgeStage::TryEnter() {
  // Spinning writes nothing.
  if (busy_.load(std::memory_order_relaxed)) return false;
  sync::SpinLockHolder holder(lock_);
  return TakeTurnLocked();
}

bool PurgeStage::TakeTurnLocked() {
  if (busy_.load(std::memory_order_relaxed)) return false;
  busy_.store(true, std::memory_order_relaxed);
  return true;
}

bool PurgeStage::Enter(Request& request, Request*& others) {
  {
    sync::SpinLockHolder holder(lock_);
    if (TakeTurnLocked()) return true;
    (last_ != nullptr ? last_->next : first_) = &request;
    last_ = &request;
  }
  request.parker.Park();
  if (request.served) return false;
  // The one before left the turn to this request, which was the oldest: it takes all that wait.
  sync::SpinLockHolder holder(lock_);
  others = first_;
  first_ = last_ = nullptr;
  return true;
}

void PurgeStage::Leave() {
  Request* successor = nullptr;
  {
    sync::SpinLockHolder holder(lock_);
    successor = first_;
    if (successor == nullptr) {
      busy_.store(false, std::memory_order_relaxed);
      return;
    }
    first_ = successor->next;
    if (first_ == nullptr) last_ = nullptr;
    successor->next = nullptr;
  }
  successor->parker.Unpark();
}

Error PurgeStage::Run(absl::Span<const PageRange> ranges) {
  if (ranges.empty()) return Error::Ok();
  const Error error = kernel_.Discard(ranges);
  if (error.ok()) {
    std::size_t pages = 0;
    for (const PageRange& range : ranges) pages += range.count().value;
    calls_.fetch_add(1, std::memory_order_relaxed);
    pages_.fetch_add(pages, std::memory_order_relaxed);
  }
  return error;
}

void PurgeStage::RunTogether(Request& own, Request* others) {
  PageRange batch[kMaxRanges];
  std::size_t size = own.ranges.size();
  std::copy(own.ranges.begin(), own.ranges.end(), batch);
  Request* last_in_batch = nullptr;
  for (Request* other = others; other != nullptr && size + other->ranges.size() <= kMaxRanges;
       other = other->next) {
    std::copy(other->ranges.begin(), other->ranges.end(), batch + size);
    size += other->ranges.size();
    last_in_batch = other;
  }
  const Error together = Run({batch, size});
  // When a joint call fails, everyone learns of their own ranges' error only.
  own.error = together.ok() || last_in_batch == nullptr ? together : Run(own.ranges);
  bool in_batch = last_in_batch != nullptr;
  for (Request* other = others; other != nullptr;) {
    Request* next = other->next;
    other->error = in_batch && together.ok() ? Error::Ok() : Run(other->ranges);
    if (other == last_in_batch) in_batch = false;
    other->served = true;
    other->parker.Unpark();
    other = next;
  }
}

void PurgeStage::PrepareFork() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  for (bool entered = false; !entered;) {
    Request request;  // asks for nothing but the turn
    Request* others = nullptr;
    entered = Enter(request, others);
    if (entered) RunTogether(request, others);
  }
  lock_.LockForFork();
}

void PurgeStage::ParentAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  lock_.UnlockAfterFork();
  Leave();
}

void PurgeStage::ChildAfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  // Waiting requests belong to threads that do not exist here.
  busy_.store(false, std::memory_order_relaxed);
  first_ = last_ = nullptr;
  lock_.UnlockAfterFork();
}

}  // namespace freehold::vm
