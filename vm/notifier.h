// Tells whoever keeps something of its own about memory (a device's translations, a registration cache, a second page
// table) what happens to it: mapped, about to change, gone.
//
// Thread safety: thread-safe. Callbacks come from whatever thread runs the verb, several at a time.
// Locks:         no short lock is held during a callback, so it may sleep, make system calls and allocate. OnInvalidate
//                and OnClose run while the verb holds the range: they may look (Lookup, Snapshot, Residency), but must
//                not call a verb that locks a range. OnMap runs without any lock, unless it takes an OnClose back.
// Order:         for one page OnInvalidate, then OnClose, then OnMap of what comes next. Of a verb that is refused,
//                OnInvalidate may have been called, and if OnClose was, OnMap takes that back.
// Cost:          a verb looks at every registration; without any, at one pointer.
// Fork:          the child has the registrations of its parent.
#ifndef FREEHOLD_VM_NOTIFIER_H_
#define FREEHOLD_VM_NOTIFIER_H_

#include <atomic>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "vm/page_range.h"
#include "vm/sync/epoch.h"
#include "vm/sync/spin_lock.h"

namespace freehold::vm {

class AddressSpace;

enum class Invalidation : std::uint8_t {
  kUnmap,
  kReplace,  // by another mapping
  kMove,     // by Remap, to another address
  kProtect,  // content stays, access changes
  kDiscard,  // the mapping stays, content goes
};

class Notifier {
 public:
  // Mapped, and visible to lookups. Others may have unmapped it again.
  virtual void OnMap(PageRange /*range*/) {}
  // What is mapped in `range` is about to change; until this returns, it is as it was.
  virtual void OnInvalidate(PageRange /*range*/, Invalidation /*what*/) {}
  // Lookups find no more what was mapped in `range`, holes included; nobody else has got the pages yet. Comes later
  // than the Unmap where the memory was pinned.
  virtual void OnClose(PageRange /*range*/) {}

 protected:
  ~Notifier() = default;
};

// While in scope, `notifier` hears of `range`: of each event, the part that it wants to hear of.
class [[nodiscard]] NotifierRegistration {
 public:
  NotifierRegistration(AddressSpace& space, PageRange range, Notifier& notifier);
  // Waits until no callback is running. REQUIRES: not called by a callback, nor in a read section of
  // AddressSpace::epochs.
  ~NotifierRegistration();
  NotifierRegistration(const NotifierRegistration&) = delete;
  NotifierRegistration& operator=(const NotifierRegistration&) = delete;

 private:
  friend class NotifierList;

  AddressSpace& space_;
  Notifier& notifier_;
  const PageRange range_;
  std::atomic<NotifierRegistration*> next_{nullptr};
};

// The registrations of a space.
class NotifierList {
 public:
  explicit NotifierList(sync::EpochDomain& epochs) : epochs_(epochs) {}
  NotifierList(const NotifierList&) = delete;
  NotifierList& operator=(const NotifierList&) = delete;

  bool empty() const { return first_.load(std::memory_order_acquire) == nullptr; }

  void Add(NotifierRegistration& registration);
  void Remove(NotifierRegistration& registration);

  void Map(PageRange range);
  void Invalidate(PageRange range, Invalidation what);
  void Close(PageRange range);

  void PrepareFork() ABSL_EXCLUSIVE_LOCK_FUNCTION(lock_) { lock_.LockForFork(); }
  void EndFork() ABSL_UNLOCK_FUNCTION(lock_) { lock_.UnlockAfterFork(); }

 private:
  template <typename Call>
  void ForEach(PageRange range, const Call& call);

  sync::EpochDomain& epochs_;  // callbacks run in its read sections
  sync::SpinLock lock_{sync::LockRank::kLeaf};
  // Changed under lock_; release pairs with the acquires of readers.
  std::atomic<NotifierRegistration*> first_{nullptr};
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_NOTIFIER_H_
