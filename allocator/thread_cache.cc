#include "allocator/thread_cache.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "allocator/heap_profile.h"
#include "allocator/misuse.h"
#include "allocator/object_heap.h"
#include "vm/os/check.h"
#include "vm/os/thread_id.h"

namespace freehold::allocator {
namespace {

const SizeClassInfo& InfoOf(const Span* span) { return kSizeClasses[span->size_class]; }

// What a large object stays one for when it shrinks.
std::size_t LeastSizeOf(const Span* span) {
  const bool is_run = span->kind.load(std::memory_order_relaxed) == SpanKind::kRun;
  return is_run ? LargeObjects::kSmallRunSize : kMaxClassSize;
}

FreeObject* ObjectAt(const Span* span, std::uint32_t index) {
  return reinterpret_cast<FreeObject*>(span->start + std::size_t{index} * InfoOf(span).size);
}

}  // namespace

ThreadCache::ThreadCache(ObjectHeap& heap, std::uint32_t id, Sampler* sampler)
    : spans_(heap.metadata_.spans()),
      code_(heap.code_),
      heap_(&heap),
      id_(id),
      sampler_(sampler),
      remote_frees_(heap, heap.code_, heap.options_.remote_batch),
      strays_(heap.code_.end()),
      inbox_(heap.code_.end()) {
  none_.free = code_.end();
  none_.credits.Set(kNoEvent);
  none_.carved.Set(kSizeClasses[0].capacity);  // of class 0: nothing to carve
  for (std::size_t i = 0; i < kDirectCount; ++i) at_hand_of_[i] = AtHandOffset(ClassOf(i * kMinAlignment));
  for (Bin& bin : bins_) bin.current = &none_;
  for (AtHand& at_hand : at_hand_) {
    at_hand.free = code_.end();
    at_hand.credits.Set(kClosed);
  }
  direct_.fill(this);
}

// Fork: PrepareFork closes the gate (IsForking), then takes and releases each cache's lock, so that whoever
// holds one afterwards sees the gate closed.
template <typename Work>
auto ThreadCache::InSlowPath(Work work) {
  for (;;) {
    {
      vm::sync::SpinLockHolder holder(lock_);
      if (ABSL_PREDICT_TRUE(!heap_->IsForking())) return work();
    }
    heap_->WaitForFork();
  }
}

// ---- allocation ----

void* ThreadCache::PopCurrent(SizeClass size_class) {
  Span* span = bins_[size_class].current;
  FreeObject* object = span->free;
  if (object == code_.end()) return nullptr;
  FreeObject* next = NextIn(span, object);
  object->tag = 0;
  if (ABSL_PREDICT_TRUE(sampler_ == nullptr)) {
    at_hand_[size_class].free = next;
    __builtin_prefetch(next);
    next = code_.end();
    use_[size_class].taken += span->carved.Get() - UsedOf(span);
    span->credits.Set(kNoEvent + span->carved.Get());
  } else {
    span->credits.Add(1);
  }
  span->free = next;
  return object;
}

template <typename MayFollow>
FreeObject* ThreadCache::CheckedNext(const FreeObject* object, MayFollow may_follow) const {
  FreeObject* next = code_.Next(object);
  const bool next_is_fine = next == code_.end() || may_follow(next);
  if (ABSL_PREDICT_FALSE(!code_.IsTagged(object) || !next_is_fine)) heap_->StopOnCorruption(object);
  return next;
}

FreeObject* ThreadCache::NextAtHand(const FreeObject* object) const {
  return CheckedNext(object, [this](const FreeObject* next) { return heap_->Owns(next); });
}

FreeObject* ThreadCache::NextIn(const Span* span, const FreeObject* object) const {
  return CheckedNext(object, [span](const FreeObject* next) { return span->HasObjectAt(next); });
}

// ---- at hand ----

void ThreadCache::Open(SizeClass size_class) {
  AtHand& at_hand = at_hand_[size_class];
  const bool looks_at_frees = sampler_ != nullptr || heap_->samples_ != nullptr || heap_->HasSuspects();
  if (at_hand.room == 0 && !looks_at_frees) {
    const std::uint32_t size = kSizeClasses[size_class].size;
    const std::uint32_t first = std::clamp(kFirstRoomBytes / size, kLeastRoom, kMostFirstRoom);
    at_hand.room = static_cast<std::uint16_t>(std::min(first, (kMaxAllRoomBytes - room_bytes_) / size));
    room_bytes_ += at_hand.room * size;
    use_[size_class].taken = 0;
  }
  at_hand.credits.Set(at_hand.room == 0 ? kClosed : at_hand.room + 1);
  direct_[size_class] = at_hand.room == 0 ? this : nullptr;
  at_hand.full_before = false;
}

void ThreadCache::Close(SizeClass size_class) {
  AtHand& at_hand = at_hand_[size_class];
  room_bytes_ -= at_hand.room * kSizeClasses[size_class].size;
  at_hand.room = 0;
  at_hand.credits.Set(kClosed);
  direct_[size_class] = this;
}

bool ThreadCache::GrowRoom(SizeClass size_class) {
  AtHand& at_hand = at_hand_[size_class];
  Use& use = use_[size_class];
  const std::uint64_t size = kSizeClasses[size_class].size;
  const std::uint64_t more = std::exchange(use.taken, 0);
  const bool again = std::exchange(use.was_full, true);
  if (!again || more == 0) return false;
  if ((at_hand.room + more) * size > kMaxRoomBytes || room_bytes_ + more * size > kMaxAllRoomBytes) return false;
  room_bytes_ += static_cast<std::uint32_t>(more * size);
  at_hand.room = static_cast<std::uint16_t>(at_hand.room + more);
  at_hand.credits.Set(static_cast<std::uint32_t>(more) + 1);
  return true;
}

// What is asked for now and then keeps a part, but what has not been empty since it was full is only freed to.
void ThreadCache::FreeWithoutRoom(Span* span, FreeObject* object) {
  const SizeClass size_class = span->size_class;
  AtHand& at_hand = at_hand_[size_class];
  if (GrowRoom(size_class)) return FreeTo(reinterpret_cast<FreeList*>(&at_hand), span, object);
  const std::uint32_t keep = std::exchange(at_hand.full_before, true) ? 0 : at_hand.room / 2;
  if (keep == 0) {
    PutBack(size_class);
    Close(size_class);
  } else {
    const std::uint32_t back = at_hand.room - keep;
    PutBack(size_class, keep, back);
    at_hand.credits.Set(back + 1);
  }
  FreeToSpan(span, object);
}

void ThreadCache::FreeToSpan(Span* span, FreeObject* object) {
  if (span->owner.load(std::memory_order_relaxed) == this) {
    if (Push(span, object)) HandleEvent(span);
  } else {
    remote_frees_.Add(span, object);
  }
}

void ThreadCache::PutBack(SizeClass size_class, std::uint32_t keep, std::uint32_t most) {
  AtHand& at_hand = at_hand_[size_class];
  FreeObject* last = nullptr;
  FreeObject* object = at_hand.free;
  for (; keep != 0 && object != code_.end(); --keep) {
    last = object;
    object = NextAtHand(object);
  }
  while (most != 0 && object != code_.end()) {
    Span* span = heap_->SpanOf(object);
    if (span->owner.load(std::memory_order_relaxed) == this) {
      object = PutRunBack(span, object, most);
      continue;
    }
    FreeObject* next = NextAtHand(object);
    object->tag = 0;  // RemoteFrees sets it again
    remote_frees_.Add(span, object);
    object = next;
    --most;
  }
  if (last == nullptr) {
    at_hand.free = object;
  } else {
    code_.Link(last, object);
  }
}

FreeObject* ThreadCache::PutRunBack(Span* span, FreeObject* object, std::uint32_t& most) {
  FreeObject* last = object;
  FreeObject* next = NextAtHand(last);
  std::uint32_t count = 1;
  for (; count < most && next != code_.end() && AddressOf(next) - span->start < span->units * kUnitSize; ++count) {
    last = next;
    next = NextAtHand(last);
  }
  most -= count;
  code_.Link(last, span->free);
  span->free = object;
  const std::uint32_t credits = span->credits.Get();
  if (credits > count) {
    span->credits.Set(credits - count);
  } else {
    HandleEvent(span, count - credits);
  }
  return next;
}

void ThreadCache::PutAllBack() {
  FinishLateFrees();
  direct_frees_ = 0;
  if (sampler_ != nullptr) return;
  for (unsigned i = 0; i < kSizeClassCount; ++i) {
    PutBack(static_cast<SizeClass>(i));
    Close(static_cast<SizeClass>(i));
    use_[i].was_full = false;
  }
}

void ThreadCache::PutIdleBack() {
  if (sampler_ != nullptr) return;
  for (unsigned i = 0; i < kSizeClassCount; ++i) {
    AtHand& at_hand = at_hand_[i];
    Use& use = use_[i];
    const bool changed = use.free_seen != at_hand.free || use.credits_seen != at_hand.credits.Get();
    use.free_seen = at_hand.free;
    use.credits_seen = at_hand.credits.Get();
    if (at_hand.free == code_.end() || changed) continue;
    PutBack(static_cast<SizeClass>(i));
    Close(static_cast<SizeClass>(i));
  }
}

void ThreadCache::KeepOwnAtHand() {
  if (sampler_ != nullptr) return;
  for (unsigned i = 0; i < kSizeClassCount; ++i) {
    AtHand& at_hand = at_hand_[i];
    FreeObject* object = std::exchange(at_hand.free, code_.end());
    while (object != code_.end()) {
      FreeObject* next = NextAtHand(object);
      if (heap_->SpanOf(object)->owner.load(std::memory_order_relaxed) == this) {
        code_.Link(object, at_hand.free);
        at_hand.free = object;
      }
      object = next;
    }
    Close(static_cast<SizeClass>(i));
  }
}

inline void* ThreadCache::AllocateClass(SizeClass size_class, std::size_t size, std::size_t alignment) {
  void* object = Pop(at_hand_[size_class]);
  if (ABSL_PREDICT_TRUE(object != nullptr)) return object;
  ClassRequest request{.size_class = size_class, .size = size, .alignment = alignment};
  return AllocateClassSlow(request);
}

void* ThreadCache::AllocateSlow(std::size_t size) {
  if (size > kMaxClassSize) return AllocateLarge({.size = size});
  if (size > kMaxDirectSize) return AllocateClass(ClassOf(size), size, kMinAlignment);
  ClassRequest request{.size_class = ClassOf(size), .size = size};
  return AllocateClassSlow(request);
}

// REQUIRES: Pop found nothing.
void* ThreadCache::AllocateClassSlow(ClassRequest& request) {
  const SizeClass size_class = request.size_class;
  AtHand& at_hand = at_hand_[size_class];
  if (direct_frees_ != 0) {
    FinishLateFrees();
    if (void* object = Pop(at_hand)) return object;
  }
  if (ABSL_PREDICT_FALSE(at_hand.free != code_.end())) heap_->StopOnCorruption(at_hand.free);
  Open(size_class);
  for (unsigned attempt = 0;; ++attempt) {
    if (ABSL_PREDICT_TRUE(sampler_ == nullptr)) {
      if (void* object = PopCurrent(size_class)) return object;
    }
    if (++slow_paths_ % kMaintenancePeriod == 0) Maintain();
    void* object = ABSL_PREDICT_TRUE(sampler_ == nullptr) ? AllocateFromSpans(request) : AllocateCounted(request);
    if (ABSL_PREDICT_TRUE(object != nullptr)) return object;
    const std::size_t bytes = kSizeClasses[size_class].units * kUnitSize;
    if (!heap_->MakeRoom(bytes, attempt)) return nullptr;
  }
}

void* ThreadCache::AllocateFromSpans(ClassRequest& request) {
  Bin& bin = bins_[request.size_class];
  // Memory that came back is used before memory that was not; then no list changes, and no lock is needed.
  const bool none_came_back =
      inbox_.load(std::memory_order_relaxed) == code_.end() && bin.available.empty();
  if (none_came_back && !IsCarved(bin.current)) return PopCarved(bin.current, request);
  void* object = InSlowPath([&] {
    lock_.AssertHeld();
    return RefillLocked(request);
  });
  if (ABSL_PREDICT_TRUE(object != nullptr)) heap_->RelieveLimit();
  return object;
}

void* ThreadCache::RefillLocked(ClassRequest& request) {
  Bin& bin = bins_[request.size_class];
  if (inbox_.load(std::memory_order_relaxed) != code_.end()) {
    DrainLocked();
    if (void* object = PopCurrent(request.size_class)) return object;
  }
  if (!FindSpanLocked(request.size_class)) return nullptr;
  if (void* object = PopCurrent(request.size_class)) return object;
  return PopCarved(bin.current, request);
}

// Makes a span current that has a free object, or one to carve.
bool ThreadCache::FindSpanLocked(SizeClass size_class) {
  Bin& bin = bins_[size_class];
  Span* span = TakeAvailableLocked(size_class);
  if (span == nullptr) {
    if (!IsCarved(bin.current)) return true;
    if (Span* inherited = heap_->InheritSpan(size_class, this)) {
      ++bin.spans;
      AppendLocked(bin.available, inherited);
      span = TakeAvailableLocked(size_class);
    }
  }
  if (span == nullptr) span = NewSpanLocked(size_class);
  if (span == nullptr) return false;
  if (bin.current != &none_) RetireCurrentLocked(size_class, bin.current->carved.Get());
  SetCurrentLocked(size_class, span);
  return true;
}

// Null when there is none, and when only spans are left that would take long to look through.
Span* ThreadCache::TakeAvailableLocked(SizeClass size_class) {
  SpanList& list = bins_[size_class].available;
  for (int rebuilds = 0; !list.empty() && rebuilds < kMaxRebuilds; ++rebuilds) {
    Span* span = spans_.Named(list.first);
    RemoveLocked(list, span);
    if (ABSL_PREDICT_TRUE(span->kind.load(std::memory_order_relaxed) != SpanKind::kSuspect)) return span;
    const std::uint32_t used = RebuildLocked(span);
    span->credits.Set(used);
    if (used < InfoOf(span).capacity) return span;
    PlaceLocked(span, used);
  }
  return nullptr;
}

Span* ThreadCache::NewSpanLocked(SizeClass size_class) {
  const SizeClassInfo& info = kSizeClasses[size_class];
  PageHeap::Run run;
  if (info.units == 1 && stash_size_ > 0) {
    run.start = stash_[--stash_size_]->start;
  } else {
    run = heap_->page_heap_.Allocate(Home(), info.units);
    if (run.start == 0) return nullptr;
  }
  Span* span = spans_.At(run.start);
  span->start = run.start;
  span->reciprocal = info.reciprocal;
  span->SetLimit(0);
  span->free = code_.end();
  span->credits.Set(0);
  span->carved.Set(0);
  span->units = info.units;
  span->size_class = size_class;
  span->at_hand = AtHandOffset(size_class);
  span->clean = run.clean;
  MarkInterior(spans_, span, 1, info.units);
  span->kind.store(SpanKind::kObjects, std::memory_order_relaxed);
  span->owner.store(this, std::memory_order_relaxed);
  ++bins_[size_class].spans;
  return span;
}

// REQUIRES: `span` is current, is not carved up, and has no free object.
void* ThreadCache::PopCarved(Span* span, ClassRequest& request) {
  request.zero = span->clean;
  const SizeClassInfo& info = InfoOf(span);
  const std::uint32_t first = span->carved.Get();
  // The more objects of a span are in use, the more are made at a time.
  const std::uint32_t wanted = std::clamp(first, std::max(info.carve / kCarves, 1u), kCarves * info.carve);
  const std::uint32_t end = std::min(first + wanted, info.capacity);
  // In ascending order, which the hardware prefetches, up to the page's end.
  FreeObject* object = ObjectAt(span, first);
  span->free = object;
  for (std::uint32_t i = first + 1; i < end; ++i) {
    FreeObject* next = ObjectAt(span, i);
    __builtin_prefetch(reinterpret_cast<char*>(next) + kCarvePrefetch, 1);
    code_.Link(object, next);
    object = next;
  }
  code_.Link(object, code_.end());
  span->carved.Set(end);
  span->SetLimit(end * info.excess);
  bins_[span->size_class].held.Add(end - first);
  return PopCurrent(span->size_class);
}

void* ThreadCache::AllocateZeroed(std::size_t size) {
  if (size > kMaxClassSize) return AllocateLarge({.size = size, .zeroed = true});
  if (size <= kMaxAlwaysZeroed) {
    void* object = Allocate(size);
    return object == nullptr ? nullptr : std::memset(object, 0, size);
  }
  ClassRequest request{.size_class = ClassOf(size), .size = size};
  void* object = Pop(at_hand_[request.size_class]);
  if (object == nullptr) object = AllocateClassSlow(request);
  return object == nullptr ? nullptr : std::memset(object, 0, request.zero ? kMinAlignment : size);
}

void* ThreadCache::AllocateAligned(std::size_t alignment, std::size_t size) {
  if (alignment <= kMinAlignment) return Allocate(size);
  // The largest class is a multiple of every alignment up to a unit.
  if (size > kMaxClassSize || alignment > kUnitSize) return AllocateLarge({.size = size, .alignment = alignment});
  return AllocateClass(AlignedClassOf(alignment, size), size, alignment);
}

void* ThreadCache::AllocateLarge(const LargeObjects::Request& request) {
  if (direct_frees_ != 0) FinishLateFrees();
  if (++slow_paths_ % kMaintenancePeriod == 0) Maintain();
  void* object = heap_->AllocateLarge(Home(), request);
  if (ABSL_PREDICT_FALSE(sampler_ != nullptr) && object != nullptr) CountLarge(spans_.At(AddressOf(object)));
  return object;
}

void* ThreadCache::Reallocate(void* p, std::size_t size) {
  if (p == nullptr) return Allocate(size);
  // To a profile, what grows is another object.
  if (ABSL_PREDICT_TRUE(sampler_ == nullptr) && LargeObjects::GrowAhead(spans_.At(AddressOf(p)), p, size)) return p;
  Span* span = heap_->CheckedSpan("realloc", p);
  const bool is_large = IsLarge(span);
  const std::size_t usable = heap_->UsableSizeOf(span, p);
  const bool grows = size > usable;
  void* to = nullptr;
  if (is_large && grows && heap_->large_.BelongsInHugePages(span, size)) {
    to = heap_->large_.Allocate(Home(), {.size = size, .will_grow = true});  // without making room for it
    if (ABSL_PREDICT_FALSE(sampler_ != nullptr) && to != nullptr) CountLarge(spans_.At(AddressOf(to)));
  }
  if (to != nullptr) {
    // It moves.
  } else if (is_large && (grows || size > LeastSizeOf(span))) {
    if (ResizeLarge(span, size)) return p;
  } else if (!grows && size > usable / 2) {
    return p;
  }
  if (to == nullptr && grows && heap_->GrowsAsRun(usable, size)) {
    to = AllocateLarge({.size = size, .will_grow = true});
    if (to == nullptr && size > kMaxClassSize) return nullptr;
  }
  if (to == nullptr) to = Allocate(size);
  if (to == nullptr) return grows ? nullptr : p;
  std::memcpy(to, p, std::min(size, usable));
  Free(p);
  return to;
}

bool ThreadCache::TryExpand(void* p, std::size_t size) {
  Span* span = heap_->CheckedSpan("try_expand", p);
  if (size <= heap_->UsableSizeOf(span, p)) return true;
  return IsLarge(span) && ResizeLarge(span, size);
}

bool ThreadCache::ResizeLarge(Span* span, std::size_t size) {
  if (!heap_->ResizeLarge(span, size)) return false;
  // To the profile, one object less and another one more.
  if (AllocationSite* site = std::exchange(span->site, nullptr)) HeapProfile::NoteFree(site);
  if (ABSL_PREDICT_FALSE(sampler_ != nullptr)) CountLarge(span);
  return true;
}

// ---- samples ----

void* ThreadCache::AllocateCounted(ClassRequest& request) {
  const SizeClass size_class = request.size_class;
  const Sampler::Due due = sampler_->Count(size_class);
  if (due && sampler_->Enter()) {
    void* sample = heap_->AllocateSample(due, size_class, request.size, request.alignment, request.zero);
    sampler_->Leave();
    if (sample != nullptr) return sample;
  }
  void* object = PopCurrent(size_class);
  if (object == nullptr) object = AllocateFromSpans(request);
  if (object != nullptr) FillFront(size_class);
  return object;
}

// REQUIRES: the front is empty.
void ThreadCache::FillFront(SizeClass size_class) {
  Span* span = bins_[size_class].current;
  AtHand& front = at_hand_[size_class];
  const std::uint32_t free = span->carved.Get() - UsedOf(span);
  const std::uint32_t count = sampler_->CountUpTo(size_class, free);
  if (count == 0) return;
  front.free = span->free;
  span->credits.Add(count);
  if (count == free) {
    span->free = code_.end();
    return;
  }
  FreeObject* last = front.free;
  for (std::uint32_t i = 1; i < count; ++i) last = NextIn(span, last);
  span->free = NextIn(span, last);
  code_.Link(last, code_.end());
}

void ThreadCache::EmptyFrontLocked(SizeClass size_class) {
  Span* span = bins_[size_class].current;
  if (span == &none_) return;
  FreeObject*& front = at_hand_[size_class].free;
  std::uint32_t count = 0;
  FreeObject* last = nullptr;
  for (FreeObject* object = front; object != code_.end(); object = NextIn(span, object)) {
    last = object;
    ++count;
  }
  if (count == 0) return;
  code_.Link(last, span->free);
  span->free = std::exchange(front, code_.end());
  span->credits.Subtract(count);
  sampler_->Uncount(size_class, count);
}

void ThreadCache::CountLarge(Span* span) {
  const vm::Bytes bytes{LargeObjects::UsableSize(span)};
  if (!sampler_->CountLarge(bytes) || !sampler_->Enter()) return;
  span->site = heap_->profile_->Note(bytes);
  sampler_->Leave();
}

// ---- spans ----

unsigned ThreadCache::Home() const { return heap_->space_.kernel().CurrentCpu(); }

bool ThreadCache::IsCarved(const Span* span) { return span->carved.Get() == InfoOf(span).capacity; }

void ThreadCache::PlaceLocked(Span* span, std::uint32_t used) {
  Bin& bin = bins_[span->size_class];
  if (used == 0) return ReleaseLocked(span);
  if (used == InfoOf(span).capacity) {
    span->state = SpanState::kFull;
    span->credits.Set(InfoOf(span).wake);
    bin.held.Add(used);
    return;
  }
  span->credits.Set(used);
  AppendLocked(bin.available, span);
}

void ThreadCache::SetCurrentLocked(SizeClass size_class, Span* span) {
  Bin& bin = bins_[size_class];
  bin.current = span;
  bin.credits_seen = 0;
  if (span == &none_) return;
  span->state = SpanState::kCurrent;
  span->credits.Add(kNoEvent);
  bin.held.Add(span->carved.Get());
}

void ThreadCache::RetireCurrentLocked(SizeClass size_class, std::uint32_t used) {
  Bin& bin = bins_[size_class];
  Span* span = bin.current;
  bin.held.Subtract(span->carved.Get());
  SetCurrentLocked(size_class, &none_);
  PlaceLocked(span, used);
}

// Spans of one unit are kept at hand: a class that comes empty and is needed again takes no shared lock.
void ThreadCache::ReleaseLocked(Span* span) {
  --bins_[span->size_class].spans;
  span->SetLimit(0);
  span->owner.store(nullptr, std::memory_order_relaxed);
  span->kind.store(SpanKind::kNone, std::memory_order_relaxed);
  const bool keep = span->units == 1 && stash_size_ < kStash &&
                    state_.load(std::memory_order_relaxed) == State::kAttached;
  if (keep) {
    stash_[stash_size_++] = span;
  } else {
    heap_->page_heap_.Free(span->start, span->units);
  }
}

void ThreadCache::EmptyStashLocked() {
  while (stash_size_ > 0) heap_->page_heap_.Free(stash_[--stash_size_]->start, 1);
}

// Of what the span's thread wrote without a lock, `carved` and the tags count. It may have been stopped before it wrote
// the limit of what it had carved, and what is not carved it may have used.
std::uint32_t ThreadCache::RebuildLocked(Span* span) {
  std::uint32_t used = span->carved.Get();
  span->SetLimit(used * InfoOf(span).excess);
  span->clean = false;
  span->free = code_.end();
  for (std::uint32_t i = span->carved.Get(); i > 0; --i) {
    FreeObject* object = ObjectAt(span, i - 1);
    if (!code_.IsTagged(object)) continue;
    code_.Link(object, span->free);
    span->free = object;
    --used;
  }
  // Pairs with the acquire in ObjectHeap::IsObject.
  span->kind.store(SpanKind::kObjects, std::memory_order_release);
  return used;
}

void ThreadCache::AppendLocked(SpanList& list, Span* span) {
  const std::uint32_t name = spans_.NameOf(span);
  span->state = SpanState::kAvailable;
  span->next = 0;
  span->previous = list.last;
  (list.last == 0 ? list.first : spans_.Named(list.last)->next) = name;
  list.last = name;
}

void ThreadCache::RemoveLocked(SpanList& list, Span* span) {
  (span->previous == 0 ? list.first : spans_.Named(span->previous)->next) = span->next;
  (span->next == 0 ? list.last : spans_.Named(span->next)->previous) = span->previous;
}

void ThreadCache::HandleEvent(Span* span, std::uint32_t beyond) {
  InSlowPath([&] {
    lock_.AssertHeld();
    HandleEventLocked(span, beyond);
  });
}

void ThreadCache::HandleEventLocked(Span* span, std::uint32_t beyond) {
  Bin& bin = bins_[span->size_class];
  switch (span->state) {
    case SpanState::kCurrent:
      break;  // its credits do not end
    case SpanState::kFull:
      bin.held.Subtract(span->carved.Get());
      PlaceLocked(span, span->carved.Get() - InfoOf(span).wake - beyond);
      break;
    case SpanState::kAvailable:
      RemoveLocked(bin.available, span);
      PlaceLocked(span, span->kind.load(std::memory_order_relaxed) == SpanKind::kSuspect
                            ? RebuildLocked(span)
                            : 0);
      break;
  }
}

// ---- other threads ----

// In a large burst of frees the objects are in no cache, and the next free would wait with this one for their lines.
void ThreadCache::FreeDirectly(Span* span, void* p) {
  if (ABSL_PREDICT_FALSE(--direct_frees_ == 0)) {
    FinishLateFrees();
  } else if (ABSL_PREDICT_TRUE(span->owner.load(std::memory_order_relaxed) == this) &&
             ABSL_PREDICT_TRUE(span->size_class <= kLastLateClass)) {
    __builtin_prefetch(p, 1);
    LateFree& late = late_frees_[direct_frees_ % kLateFrees];
    std::swap(late.span, span);
    std::swap(late.object, p);
    if (ABSL_PREDICT_FALSE(span == nullptr)) return;
  }
  FreeArrived(span, p);
}

// To the span's own list or to what is at hand, without a branch: while some classes are closed and others are not, which
// of them it is cannot be foreseen. Where all are open this would make allocations wait for the address of the list.
inline void ThreadCache::FreeArrived(Span* span, void* p) {
  FreeList* list = reinterpret_cast<FreeList*>(&AtHandAt(span->at_hand));
#if defined(FREEHOLD_WORKS_IN_MEMORY)
  asm("cmpq %2, %1\n\tcmoveq %3, %0" : "+r"(list) : "m"(span->owner), "r"(direct_[span->size_class]), "r"(span) : "cc");
#else
  if (span->owner.load(std::memory_order_relaxed) == direct_[span->size_class]) list = reinterpret_cast<FreeList*>(span);
#endif
  FreeTo(list, span, p);
}

void ThreadCache::FinishLateFrees() {
  for (LateFree& late : late_frees_) {
    const LateFree one = std::exchange(late, {});
    if (one.span != nullptr) FreeArrived(one.span, one.object);
  }
}

void ThreadCache::FreeEvent(Span* span, void* p) {
  AtHand& at_hand = at_hand_[span->size_class];
  auto* object = static_cast<FreeObject*>(p);
  const bool is_own = span->owner.load(std::memory_order_relaxed) == this;
  const bool is_closed = at_hand.room == 0;
  if (is_closed && is_own) {
    if (ABSL_PREDICT_FALSE(code_.IsTagged(p))) return FreeChecked(p);
    if (span->credits.Get() == 0) {  // those that have ended
      code_.Link(object, span->free);
      span->free = object;
      return HandleEvent(span);
    }
    at_hand.credits.Set(kClosed);
    direct_frees_ = kDirectFrees;
    return FreeToSpan(span, object);
  }
  at_hand.credits.Set(is_closed ? kClosed : 1);
  if (ABSL_PREDICT_FALSE(!is_own && (heap_->HasSuspects() || heap_->IsSample(span)))) return FreeChecked(p);
  // Whether it is tagged is looked at later: it is likely to be in another core's cache.
  if (is_closed) return remote_frees_.Add(span, object);
  if (ABSL_PREDICT_FALSE(code_.IsTagged(object))) heap_->StopOnDoubleFree("free", object, span);
  FreeWithoutRoom(span, object);
}

// Whatever is no object that is found by its span's first unit.
void ThreadCache::FreeSlow(void* p) {
  Span* span = heap_->SpanOf(p);
  span->HasObjectAt(p) ? FreeObjectOf(span, p) : FreeChecked(p);
}

// What is no small object, and what has to be looked at.
void ThreadCache::FreeChecked(void* p) {
  if (p == nullptr) return;
  Span* span = heap_->CheckedSpan("free", p);
  auto* object = static_cast<FreeObject*>(p);
  if (IsLarge(span)) {
    heap_->FreeLarge(span, p);
  } else if (ABSL_PREDICT_FALSE(ObjectHeap::IsGuardSlot(span))) {
    heap_->guards_->Free("free", p);
  } else if (span->owner.load(std::memory_order_relaxed) == this) {
    if (Push(span, object)) HandleEvent(span);
  } else if (heap_->IsSample(span)) {
    heap_->profile_->Free(span, p);
  } else if (!heap_->HasSuspects() || !heap_->FreeSuspect(span, object)) {
    remote_frees_.Add(span, object);
  }
}

void ThreadCache::FreeSizedSlow(void* p, std::size_t size) {
  if (p == nullptr) return;
  heap_->CheckFreeSized(p, size);
  FreeSlow(p);
}

void ThreadCache::Receive(FreeObject* first, FreeObject* last) {
  FreeObject* before = inbox_.load(std::memory_order_relaxed);
  do {
    code_.Link(last, before);
    // Releases the objects to the exchange in DrainLocked. Sequentially consistent with the load of state_, as
    // BecomeOrphan's store of state_ is with its look at inbox_: one of both sees the other's store.
  } while (!inbox_.compare_exchange_weak(before, first, std::memory_order_seq_cst,
                                         std::memory_order_relaxed));
  if (ABSL_PREDICT_FALSE(state_.load(std::memory_order_seq_cst) == State::kOrphan)) DrainIfOrphan();
}

// In this order: who sees that the cache is not frozen any more sees which spans ThawLocked made suspect. Pairs with
// the release in BecomeAttached.
bool ThreadCache::NeedsLockToFree(const Span* span) const {
  return state_.load(std::memory_order_acquire) == State::kFrozen ||
         span->kind.load(std::memory_order_relaxed) == SpanKind::kSuspect;
}

bool ThreadCache::FreeSuspect(Span* span, FreeObject* object) {
  return InSlowPath([&] {
    lock_.AssertHeld();
    const bool suspect = span->owner.load(std::memory_order_relaxed) == this && NeedsLockToFree(span);
    if (suspect) object->tag = code_.Tag(object);
    return suspect;
  });
}

void ThreadCache::DrainLocked() {
  // Pairs with the release in Receive.
  FreeObject* message = inbox_.exchange(code_.end(), std::memory_order_acquire);
  while (message != code_.end()) {
    FreeObject* next = code_.Next(message);
    __builtin_prefetch(next, 1);
    const bool next_is_fine = next == code_.end() || heap_->Owns(next);
    if (ABSL_PREDICT_FALSE(!code_.IsTagged(message) || !next_is_fine)) heap_->StopOnCorruption(message);
    Span* span = heap_->SpanOf(message);
    if (ABSL_PREDICT_TRUE(span->owner.load(std::memory_order_relaxed) == this)) {
      TakeInLocked(span, message);
    } else {
      code_.Link(message, strays_);
      strays_ = message;
    }
    message = next;
  }
}

void ThreadCache::TakeInLocked(Span* span, FreeObject* message) {
  const ObjectChain chain = OpenMessage(code_, span, message);
  if (ABSL_PREDICT_FALSE(chain.count == 0)) heap_->StopOnCorruption(message);
  code_.Link(chain.last, span->free);
  span->free = chain.first;
  const std::uint32_t credits = span->credits.Get();
  if (credits > chain.count) {
    span->credits.Set(credits - chain.count);
  } else {
    HandleEventLocked(span, chain.count - credits);
  }
}

void ThreadCache::DrainIfOrphan() {
  const bool drained = InSlowPath([&] {
    lock_.AssertHeld();
    if (state_.load(std::memory_order_relaxed) != State::kOrphan) return false;
    DrainLocked();
    UpdateOrphanClassesLocked();
    return true;
  });
  if (drained) ForwardStrays();
}

void ThreadCache::ForwardStrays() {
  FreeObject* message = InSlowPath([&] {
    lock_.AssertHeld();
    return std::exchange(strays_, code_.end());
  });
  while (message != code_.end()) {
    FreeObject* next = code_.Next(message);
    heap_->SpanOf(message)->owner.load(std::memory_order_relaxed)->Receive(message, message);
    message = next;
  }
}

void ThreadCache::Maintain() {
  heap_->Tick(heap_->space_.kernel().Now());
  PutIdleBack();
  remote_frees_.HandOverAll();
  ForwardStrays();
  InSlowPath([&] {
    lock_.AssertHeld();
    ReleaseIdleLocked();
  });
}

// A current span whose objects all came free stays where it is, in case its class is used again. Here go those
// of which nothing came free since the last time.
void ThreadCache::ReleaseIdleLocked() {
  for (unsigned size_class = 0; size_class < kSizeClassCount; ++size_class) {
    Bin& bin = bins_[size_class];
    if (bin.current == &none_) continue;
    if (sampler_ != nullptr) EmptyFrontLocked(static_cast<SizeClass>(size_class));
    const std::uint32_t credits = bin.current->credits.Get();
    const bool is_idle = std::exchange(bin.credits_seen, credits) == credits;
    if (is_idle && UsedOf(bin.current) == 0) RetireCurrentLocked(static_cast<SizeClass>(size_class), 0);
  }
}

void ThreadCache::ReleaseEmptyLocked() {
  for (unsigned size_class = 0; size_class < kSizeClassCount; ++size_class) {
    const Span* span = bins_[size_class].current;
    if (span == &none_ || UsedOf(span) != 0) continue;
    RetireCurrentLocked(static_cast<SizeClass>(size_class), 0);
  }
}

void ThreadCache::RebuildAllLocked() {
  for (Bin& bin : bins_) {
    for (std::uint32_t name = bin.available.first; name != 0;) {
      Span* span = spans_.Named(name);
      name = span->next;
      if (span->kind.load(std::memory_order_relaxed) != SpanKind::kSuspect) continue;
      RemoveLocked(bin.available, span);
      PlaceLocked(span, RebuildLocked(span));
    }
  }
}

// ---- for ObjectHeap ----

void ThreadCache::Trim() {
  PutAllBack();
  remote_frees_.HandOverAll();
  InSlowPath([&] {
    lock_.AssertHeld();
    DrainLocked();
    if (heap_->HasSuspects()) RebuildAllLocked();
    ReleaseEmptyLocked();
    EmptyStashLocked();
  });
  ForwardStrays();
}

void ThreadCache::TrimOrphan() {
  const bool trimmed = InSlowPath([&] {
    lock_.AssertHeld();
    if (state_.load(std::memory_order_relaxed) == State::kAttached) return false;
    if (state_.load(std::memory_order_relaxed) == State::kFrozen) {
      ThawLocked();
      // As in BecomeAttached.
      state_.store(State::kOrphan, std::memory_order_release);
    }
    DrainLocked();
    if (heap_->HasSuspects()) RebuildAllLocked();
    UpdateOrphanClassesLocked();
    return true;
  });
  if (trimmed) ForwardStrays();
}

void ThreadCache::BecomeOrphan() {
  PutAllBack();
  remote_frees_.HandOverAll();
  InSlowPath([&] {
    lock_.AssertHeld();
    DrainLocked();
    for (unsigned size_class = 0; size_class < kSizeClassCount; ++size_class) {
      const Span* span = bins_[size_class].current;
      if (span == &none_) continue;
      if (sampler_ != nullptr) EmptyFrontLocked(static_cast<SizeClass>(size_class));
      RetireCurrentLocked(static_cast<SizeClass>(size_class), UsedOf(span));
    }
    EmptyStashLocked();
    state_.store(State::kOrphan, std::memory_order_seq_cst);
    if (inbox_.load(std::memory_order_seq_cst) != code_.end()) DrainLocked();
    UpdateOrphanClassesLocked();
  });
  ForwardStrays();
}

void ThreadCache::BecomeAttached() {
  thread_.store(vm::os::CurrentThreadId(), std::memory_order_relaxed);
  InSlowPath([&] {
    lock_.AssertHeld();
    if (state_.load(std::memory_order_relaxed) == State::kFrozen) ThawLocked();
    state_.store(State::kAttached, std::memory_order_release);
  });
}

// The lists of a cache whose thread a fork left behind are consistent (H3), its free lists may not be: fork
// copied the thread's pages one after the other while it ran. What the tags say is true, see README.md.
void ThreadCache::ThawLocked() {
  remote_frees_.Forget();
  if (sampler_ != nullptr) sampler_->Leave();
  for (AtHand& at_hand : at_hand_) {
    at_hand.free = code_.end();
    at_hand.room = 0;
    at_hand.credits.Set(kClosed);
  }
  direct_.fill(this);
  late_frees_ = {};
  direct_frees_ = 0;
  room_bytes_ = 0;
  strays_ = code_.end();
  inbox_.store(code_.end(), std::memory_order_relaxed);
  for (unsigned size_class = 0; size_class < kSizeClassCount; ++size_class) {
    Bin& bin = bins_[size_class];
    bin.available = {};
    bin.spans = 0;
    bin.held.Set(0);
    SetCurrentLocked(static_cast<SizeClass>(size_class), &none_);
  }
  heap_->page_heap_.ForEachUsedUnit(
      [](void* context, std::uintptr_t unit) {
        auto* self = static_cast<ThreadCache*>(context);
        self->lock_.AssertHeld();
        Span* span = self->spans_.At(unit);
        if (span->owner.load(std::memory_order_relaxed) != self) return;
        span->kind.store(SpanKind::kSuspect, std::memory_order_relaxed);
        span->SetLimit(0);
        span->free = self->code_.end();
        span->credits.Set(1);
        Bin& bin = self->bins_[span->size_class];
        ++bin.spans;
        self->AppendLocked(bin.available, span);
      },
      this);
}

void ThreadCache::EmptyStash() {
  InSlowPath([&] {
    lock_.AssertHeld();
    EmptyStashLocked();
  });
}

void ThreadCache::FinishSlowPath(bool drain) {
  vm::sync::SpinLockHolder holder(lock_);
  if (drain) DrainLocked();
}

void ThreadCache::Freeze() {
  lock_.ReinitAfterFork();
  state_.store(State::kFrozen, std::memory_order_relaxed);
}

// Since FinishSlowPath, another thread may have taken the lock, to count or to find out that it must wait. What others
// sent since then may have come through half, and what is gathered for them they will know by its tags.
void ThreadCache::ForgetOthers() {
  lock_.ReinitAfterFork();
  if (thread_.load(std::memory_order_relaxed) != 0) {
    thread_.store(vm::os::CurrentThreadId(), std::memory_order_relaxed);
  }
  inbox_.store(code_.end(), std::memory_order_relaxed);
  strays_ = code_.end();
  remote_frees_.Forget();
  KeepOwnAtHand();
}

void ThreadCache::UpdateOrphanClassesLocked() {
  std::array<std::uint64_t, 2> classes = {};
  for (unsigned i = 0; i < kSizeClassCount; ++i) {
    if (!bins_[i].available.empty()) classes[i / 64] |= std::uint64_t{1} << i % 64;
  }
  for (unsigned i = 0; i < 2; ++i) orphan_classes_[i].store(classes[i], std::memory_order_relaxed);
}

bool ThreadCache::HasAvailable(SizeClass size_class) const {
  const std::uint64_t classes = orphan_classes_[size_class / 64].load(std::memory_order_relaxed);
  return (classes >> size_class % 64 & 1) != 0;
}

Span* ThreadCache::GiveAvailable(SizeClass size_class, ThreadCache* heir) {
  vm::sync::SpinLockTryHolder holder(lock_);
  if (!holder.owns()) return nullptr;
  lock_.AssertHeld();
  Bin& bin = bins_[size_class];
  if (state_.load(std::memory_order_relaxed) != State::kOrphan || bin.available.empty()) return nullptr;
  Span* span = spans_.Named(bin.available.first);
  RemoveLocked(bin.available, span);
  --bin.spans;
  if (bin.available.empty()) UpdateOrphanClassesLocked();
  // Pairs with the acquire in ObjectHeap::FreeSuspect: who sees the heir sees that the span is suspect.
  span->owner.store(heir, std::memory_order_release);
  return span;
}

void ThreadCache::AddStats(std::array<SizeClassStats, kSizeClassCount>& stats) {
  vm::sync::SpinLockHolder holder(lock_);
  for (unsigned i = 0; i < kSizeClassCount; ++i) {
    const Bin& bin = bins_[i];
    stats[i].spans += bin.spans;
    stats[i].capacity += std::uint64_t{bin.spans} * kSizeClasses[i].capacity;
    stats[i].allocated += bin.held.Get();
    for (std::uint32_t name = bin.available.first; name != 0; name = spans_.Named(name)->next) {
      stats[i].allocated += spans_.Named(name)->credits.Get();
    }
  }
}

vm::Bytes ThreadCache::at_hand() const {
  std::size_t bytes = 0;
  for (unsigned i = 0; i < kSizeClassCount; ++i) {
    const std::uint32_t room = at_hand_[i].room;
    const std::uint32_t credits = at_hand_[i].credits.Get();
    if (credits <= room) bytes += (room + 1 - credits) * kSizeClasses[i].size;
  }
  return {bytes};
}

HeapLocation ThreadCache::Locate(const ThreadCache* first) {
  const auto offset_of = [&](const void* member) { return AddressOf(member) - AddressOf(first); };
  static_assert(static_cast<int>(State::kAttached) == 0 && sizeof(first->state_) == 1 &&
                sizeof(AtHand::room) == sizeof(std::uint16_t) && sizeof(AtHand::credits) == sizeof(std::uint32_t));
  return {.caches = AddressOf(first),
          .cache_bytes = sizeof(ThreadCache),
          .detached = offset_of(&first->state_),
          .thread = offset_of(&first->thread_),
          .at_hand = offset_of(&first->at_hand_[0]),
          .at_hand_bytes = sizeof(AtHand),
          .at_hand_room = offset_of(&first->at_hand_[0].room) - offset_of(&first->at_hand_[0]),
          .at_hand_credits = offset_of(&first->at_hand_[0].credits) - offset_of(&first->at_hand_[0])};
}

std::uint32_t ThreadCache::CountFree(const Span* span) const {
  std::uint32_t count = 0;
  for (const FreeObject* object = span->free; object != code_.end(); object = NextIn(span, object)) {
    if (++count > span->carved.Get()) heap_->StopOnCorruption(object);
  }
  return count;
}

void ThreadCache::CheckInvariants() {
  vm::sync::SpinLockHolder holder(lock_);
  if (state_.load(std::memory_order_relaxed) == State::kFrozen) return;
  for (unsigned i = 0; i < kSizeClassCount; ++i) {
    const Bin& bin = bins_[i];
    if (bin.current != &none_) {
      FREEHOLD_CHECK(bin.current->owner.load(std::memory_order_relaxed) == this);
      FREEHOLD_CHECK(bin.current->state == SpanState::kCurrent && bin.current->size_class == i);
      FREEHOLD_CHECK(UsedOf(bin.current) == bin.current->carved.Get() - CountFree(bin.current));
    }
    std::uint32_t previous = 0;
    for (std::uint32_t name = bin.available.first; name != 0; name = spans_.Named(name)->next) {
      const Span* span = spans_.Named(name);
      FREEHOLD_CHECK(span->owner.load(std::memory_order_relaxed) == this);
      FREEHOLD_CHECK(span->state == SpanState::kAvailable && span->size_class == i);
      FREEHOLD_CHECK(span->previous == previous);
      if (span->kind.load(std::memory_order_relaxed) == SpanKind::kObjects) {
        FREEHOLD_CHECK(span->credits.Get() == span->carved.Get() - CountFree(span));
      }
      previous = name;
    }
    FREEHOLD_CHECK(bin.available.last == previous);
  }
  std::uint32_t room_bytes = 0;
  for (unsigned i = 0; i < kSizeClassCount; ++i) {
    const AtHand& at_hand = at_hand_[i];
    room_bytes += at_hand.room * kSizeClasses[i].size;
    FREEHOLD_CHECK(at_hand.room * kSizeClasses[i].size <= kMaxRoomBytes);
    FREEHOLD_CHECK((at_hand.room == 0) == (static_cast<std::int32_t>(at_hand.credits.Get()) < 0));
    FREEHOLD_CHECK((at_hand.room == 0) == (direct_[i] == this));
    for (const FreeObject* object = at_hand.free; object != code_.end(); object = NextAtHand(object)) {
      FREEHOLD_CHECK(heap_->SpanOf(object)->size_class == i);
    }
  }
  FREEHOLD_CHECK(room_bytes == room_bytes_ && room_bytes <= kMaxAllRoomBytes);
}

}  // namespace freehold::allocator
