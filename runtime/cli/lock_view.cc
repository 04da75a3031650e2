#include "runtime/cli/lock_view.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <set>

#include "vm/sync/clock.h"
#include "vm/sync/range_lock.h"
#include "vm/sync/request_tree.h"

namespace freehold::cli {
namespace {

using vm::sync::HolderInfo;
using vm::sync::HolderList;
using vm::sync::LockPolicy;
using vm::sync::RangeLock;
using vm::sync::RangeRequest;

// Of one lock. The tree is balanced: one that is deeper is not what it seems.
constexpr std::size_t kMaxRequests = 512;
constexpr int kMaxDepth = 64;

struct Request {
  HolderInfo info;
  std::uint64_t ticket;  // its age among those of its lock
  bool is_proxy;
};

// One lock, copied, and the requests that hang on it.
class LockCopy {
 public:
  explicit LockCopy(const ProcessView& process) : process_(process) {}

  absl::Status Read(std::uint64_t address) {
    if (const absl::Status status = process_.Read(address, bytes_.data(), bytes_.size()); !status.ok()) return status;
    const auto first = reinterpret_cast<std::uintptr_t>(lock().CopiedRequests());
    return lock().policy() == LockPolicy::kCoarse ? ReadQueue(first) : ReadTree(first, 0);
  }

  void AppendWaits(std::vector<LockWait>& waits) const {
    for (const Request& request : requests_) {
      if (request.info.state != HolderInfo::State::kWaiting) continue;
      LockWait wait = {.waiter = request.info, .behind = {}};
      if (FindBlocker(request, wait.behind)) waits.push_back(wait);
    }
  }

 private:
  const RangeLock& lock() const { return *reinterpret_cast<const RangeLock*>(bytes_.data()); }

  struct alignas(RangeRequest) Bytes : std::array<std::byte, sizeof(RangeRequest)> {
    const RangeRequest& get() const { return *reinterpret_cast<const RangeRequest*>(data()); }
    unsigned at(std::size_t offset) const { return std::to_integer<unsigned>((*this)[offset]); }
    bool sound() const {
      const RangeRequest& request = get();
      // As numbers first: what is no value of its type must not be read as one.
      return at(offsetof(RangeRequest, mode)) <= 1 && at(offsetof(RangeRequest, operation)) < vm::sync::kOperations &&
             !request.range.empty();
    }
  };

  // False if it is no request, or changes.
  absl::StatusOr<bool> ReadRequest(std::uint64_t address, Bytes& bytes) {
    if (address % alignof(RangeRequest) != 0 || seen_.size() == kMaxRequests || !seen_.insert(address).second) return false;
    Bytes again;
    const ProcessView::Piece pieces[] = {{address, bytes.data(), bytes.size()}, {address, again.data(), again.size()}};
    const absl::Status status = process_.ReadEach(pieces);
    if (absl::IsUnavailable(status)) return false;  // its stack is gone
    if (!status.ok()) return status;
    return bytes == again && bytes.sound();
  }

  void Add(const RangeRequest& request, std::uint64_t ticket, bool held, bool is_proxy) {
    const vm::Nanoseconds now = vm::sync::CoarseNow();
    requests_.push_back({.info = {.thread_id = request.thread_id,
                                  .operation = request.operation,
                                  .mode = request.mode,
                                  .state = held ? HolderInfo::State::kHolding : HolderInfo::State::kWaiting,
                                  .range = request.range,
                                  .age = request.since.value == 0 ? vm::Nanoseconds{0}
                                                                  : now - std::min(now, request.since)},
                         .ticket = ticket,
                         .is_proxy = is_proxy});
  }

  absl::Status ReadTree(std::uint64_t address, int depth) {
    if (address == 0 || depth == kMaxDepth) return absl::OkStatus();
    Bytes bytes;
    const absl::StatusOr<bool> read = ReadRequest(address, bytes);
    if (!read.ok() || !*read) return read.status();
    const RangeRequest& request = bytes.get();
    const RangeRequest::TreeNode& node = request.tree;
    // Set in a tree only.
    if (bytes.at(offsetof(RangeRequest, is_proxy)) > 1) return absl::OkStatus();
    if (node.priority != vm::sync::RequestTree::PriorityOf(node.ticket)) return absl::OkStatus();
    Add(request, node.ticket, node.blockers == 0, request.is_proxy);
    for (const RangeRequest* child : {node.left, node.right}) {
      const absl::Status status = ReadTree(reinterpret_cast<std::uintptr_t>(child), depth + 1);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  absl::Status ReadQueue(std::uint64_t address) {
    for (std::uint64_t previous = 0; address != 0;) {
      Bytes bytes;
      const absl::StatusOr<bool> read = ReadRequest(address, bytes);
      if (!read.ok() || !*read) return read.status();
      const RangeRequest& request = bytes.get();
      if (reinterpret_cast<std::uintptr_t>(request.queue.previous) != previous) return absl::OkStatus();
      Add(request, requests_.size(), false, false);
      previous = address;
      address = reinterpret_cast<std::uintptr_t>(request.queue.next);
    }
    return absl::OkStatus();
  }

  bool Blocks(const HolderInfo& other, const HolderInfo& waiter) const {
    // A thread does not wait for itself: it went on between two readings.
    return other.thread_id != waiter.thread_id && Conflict(other.mode, waiter.mode) &&
           (lock().policy() == LockPolicy::kCoarse || other.range.Overlaps(waiter.range));
  }

  bool FindBlocker(const Request& waiter, HolderInfo& behind) const {
    if (lock().policy() == LockPolicy::kCoarse && FindNamed(waiter.info, waiter.info, behind)) return true;
    const Request* found = nullptr;
    for (const Request& other : requests_) {
      if (other.ticket >= waiter.ticket || !Blocks(other.info, waiter.info)) continue;
      if (found == nullptr || other.info.state < found->info.state) found = &other;
    }
    if (found == nullptr) return false;
    behind = found->info;
    // A proxy has no thread: its holders' names are in the lock.
    if (found->is_proxy) FindNamed(found->info, waiter.info, behind);
    return true;
  }

  // The first holder of `what` that blocks `waiter`, from what the lock itself tells.
  bool FindNamed(const HolderInfo& what, const HolderInfo& waiter, HolderInfo& behind) const {
    const HolderList list = lock().CopiedHolders(what);
    const auto* const found = std::find_if(list.begin(), list.end(), [&](const HolderInfo& holder) {
      return static_cast<std::size_t>(holder.operation) < vm::sync::kOperations && Blocks(holder, waiter);
    });
    if (found == list.end()) return false;
    behind = *found;
    return true;
  }

  const ProcessView& process_;
  alignas(RangeLock) std::array<std::byte, sizeof(RangeLock)> bytes_;
  std::set<std::uint64_t> seen_;
  std::vector<Request> requests_;
};

}  // namespace

absl::StatusOr<std::vector<LockWait>> ReadLockWaits(const ProcessView& process) {
  const absl::StatusOr<std::vector<std::uint64_t>> locks = process.RangeLocks();
  if (!locks.ok()) return locks.status();
  std::vector<LockWait> waits;
  for (const std::uint64_t address : *locks) {
    LockCopy copy(process);
    if (const absl::Status status = copy.Read(address); !status.ok()) return status;
    copy.AppendWaits(waits);
  }
  std::sort(waits.begin(), waits.end(),
            [](const LockWait& a, const LockWait& b) { return a.waiter.age.value > b.waiter.age.value; });
  return waits;
}

}  // namespace freehold::cli
