#include "vm/notifier.h"

#include "vm/address_space.h"
#include "vm/os/check.h"

namespace freehold::vm {

NotifierRegistration::NotifierRegistration(AddressSpace& space, PageRange range, Notifier& notifier)
    : space_(space), notifier_(notifier), range_(range) {
  space_.notifiers().Add(*this);
}

NotifierRegistration::~NotifierRegistration() { space_.notifiers().Remove(*this); }

void NotifierList::Add(NotifierRegistration& registration) {
  sync::SpinLockHolder holder(lock_);
  registration.next_.store(first_.load(std::memory_order_relaxed), std::memory_order_relaxed);
  first_.store(&registration, std::memory_order_release);
}

void NotifierList::Remove(NotifierRegistration& registration) {
  {
    sync::SpinLockHolder holder(lock_);
    std::atomic<NotifierRegistration*>* link = &first_;
    while (link->load(std::memory_order_relaxed) != &registration) {
      NotifierRegistration* const other = link->load(std::memory_order_relaxed);
      FREEHOLD_CHECK(other != nullptr);
      link = &other->next_;
    }
    link->store(registration.next_.load(std::memory_order_relaxed), std::memory_order_release);
  }
  // Whoever came past it is in a read section.
  epochs_.Barrier();
}

template <typename Call>
void NotifierList::ForEach(PageRange range, const Call& call) {
  const sync::EpochDomain::ReadGuard reading(epochs_);
  for (NotifierRegistration* each = first_.load(std::memory_order_acquire); each != nullptr;
       each = each->next_.load(std::memory_order_acquire)) {
    if (each->range_.Overlaps(range)) call(each->notifier_, each->range_.Intersect(range));
  }
}

void NotifierList::Map(PageRange range) {
  ForEach(range, [](Notifier& notifier, PageRange part) { notifier.OnMap(part); });
}

void NotifierList::Invalidate(PageRange range, Invalidation what) {
  ForEach(range, [&](Notifier& notifier, PageRange part) { notifier.OnInvalidate(part, what); });
}

void NotifierList::Close(PageRange range) {
  ForEach(range, [](Notifier& notifier, PageRange part) { notifier.OnClose(part); });
}

}  // namespace freehold::vm
