#include "vm/os/fake_userfault.h"

#include <cerrno>
#include <chrono>
#include <cstring>

#include "vm/os/check.h"
#include "vm/sync/lock_rank.h"

namespace freehold::vm::os {

Error FakeUserfault::CountLocked(Operation operation) {
  sync::CheckNoShortLockHeld("FakeUserfault");
  FREEHOLD_CHECK(open_ || operation == Operation::kOpen);
  const auto i = static_cast<std::size_t>(operation);
  ++calls_[i];
  if (failures_[i] == 0) return Error::Ok();
  if (successes_[i] > 0) {
    --successes_[i];
    return Error::Ok();
  }
  --failures_[i];
  return errors_[i];
}

void FakeUserfault::WakeLocked(PageRange range) {
  for (auto sleeper = sleepers_.lower_bound(range.first.value);
       sleeper != sleepers_.end() && sleeper->first < range.end.value;) {
    sleeper = sleepers_.erase(sleeper);
  }
  changed_.notify_all();
}

Error FakeUserfault::Open() {
  const std::lock_guard lock(mutex_);
  if (const Error error = CountLocked(Operation::kOpen); !error.ok()) return error;
  open_ = true;
  return Error::Ok();
}

Error FakeUserfault::Register(PageRange range, WriteTracking tracking) {
  const std::lock_guard lock(mutex_);
  if (const Error error = CountLocked(Operation::kRegister); !error.ok()) return error;
  for (std::size_t page = range.first.value; page < range.end.value; ++page) {
    pages_[page] = {tracking, PageStatus::kMissing};
  }
  return Error::Ok();
}

bool FakeUserfault::Wait(FaultEvent& event) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return stopped_ || !events_.empty(); });
  if (stopped_) return false;
  event = events_.front();
  events_.pop_front();
  return true;
}

void FakeUserfault::Stop() {
  const std::lock_guard lock(mutex_);
  stopped_ = true;
  changed_.notify_all();
}

Result<Pages> FakeUserfault::Copy(PageRange range, const std::byte* from, WriteTracking tracking) {
  const std::lock_guard lock(mutex_);
  if (const Error error = CountLocked(Operation::kCopy); !error.ok()) return error;
  Pages done;
  for (; done < range.count(); done += Pages{1}) {
    const PageNumber page = range.first + done;
    const auto found = pages_.find(page.value);
    if (found == pages_.end() || found->second.status != PageStatus::kMissing) {
      if (done.value > 0) break;
      return Error::System(found == pages_.end() ? ENOENT : EEXIST);
    }
    FREEHOLD_CHECK(tracking == WriteTracking::kOff || found->second.tracking == WriteTracking::kOn);
    std::memcpy(page.address(), from + done.bytes().value, kPageSize);
    found->second.status = tracking == WriteTracking::kOn ? PageStatus::kProtected : PageStatus::kWritable;
  }
  WakeLocked({range.first, range.first + done});
  return done;
}

Error FakeUserfault::WriteProtect(PageRange range, bool protect) {
  const std::lock_guard lock(mutex_);
  if (const Error error = CountLocked(Operation::kWriteProtect); !error.ok()) return error;
  for (std::size_t page = range.first.value; page < range.end.value; ++page) {
    const auto found = pages_.find(page);
    if (found == pages_.end()) return Error::System(ENOENT);
    FREEHOLD_CHECK(found->second.tracking == WriteTracking::kOn);
    PageStatus& status = found->second.status;
    if (status != PageStatus::kProtected && status != PageStatus::kWritable) continue;
    status = protect ? PageStatus::kProtected : PageStatus::kWritable;
  }
  if (!protect) WakeLocked(range);
  return Error::Ok();
}

Error FakeUserfault::Poison(PageNumber page) {
  const std::lock_guard lock(mutex_);
  if (const Error error = CountLocked(Operation::kPoison); !error.ok()) return error;
  const auto found = pages_.find(page.value);
  if (found == pages_.end()) return Error::System(ENOENT);
  if (found->second.status != PageStatus::kMissing) return Error::System(EEXIST);
  found->second.status = PageStatus::kPoisoned;
  WakeLocked(PageRange::Of(page, {1}));
  return Error::Ok();
}

Error FakeUserfault::Wake(PageRange range) {
  const std::lock_guard lock(mutex_);
  if (const Error error = CountLocked(Operation::kWake); !error.ok()) return error;
  WakeLocked(range);
  return Error::Ok();
}

void FakeUserfault::Raise(FaultEvent event) {
  const std::lock_guard lock(mutex_);
  ++sleepers_[event.page.value];
  events_.push_back(event);
  changed_.notify_all();
}

bool FakeUserfault::AwaitWoken(PageNumber page) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::seconds(10), [&] { return sleepers_.count(page.value) == 0; });
}

void FakeUserfault::Forget(PageRange range) {
  const std::lock_guard lock(mutex_);
  pages_.erase(pages_.lower_bound(range.first.value), pages_.lower_bound(range.end.value));
}

void FakeUserfault::Drop(PageRange range) {
  const std::lock_guard lock(mutex_);
  for (auto page = pages_.lower_bound(range.first.value);
       page != pages_.end() && page->first < range.end.value; ++page) {
    page->second.status = PageStatus::kMissing;
  }
}

FakeUserfault::PageStatus FakeUserfault::At(PageNumber page) const {
  const std::lock_guard lock(mutex_);
  const auto found = pages_.find(page.value);
  return found == pages_.end() ? PageStatus::kUnregistered : found->second.status;
}

std::size_t FakeUserfault::CallCount(Operation operation) const {
  const std::lock_guard lock(mutex_);
  return calls_[static_cast<std::size_t>(operation)];
}

void FakeUserfault::FailNext(Operation operation, std::size_t times, Error error, std::size_t after) {
  const std::lock_guard lock(mutex_);
  successes_[static_cast<std::size_t>(operation)] = after;
  failures_[static_cast<std::size_t>(operation)] = times;
  errors_[static_cast<std::size_t>(operation)] = error;
}

}  // namespace freehold::vm::os
