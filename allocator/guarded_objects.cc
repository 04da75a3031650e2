#include "allocator/guarded_objects.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "absl/base/optimization.h"
#include "allocator/heap_profile.h"
#include "allocator/object_heap.h"
#include "vm/os/check.h"
#include "vm/os/thread_id.h"

namespace freehold::allocator {
namespace {

constexpr vm::Pages kSlotPages = {kUnitSize >> vm::kPageShift};
constexpr vm::Pages kMarginPages = {4};
static_assert((kSlotPages - kMarginPages - kMarginPages).bytes().value == GuardedObjects::kMaxSize);

// Around objects. Not zero, which is what strays most often write.
constexpr unsigned char kFill = 0xdb;

// Tries to get the lock, with the processor given up after each: its holders are done at once, or never, if the caller
// interrupted one.
constexpr int kPatience = 1000;

unsigned char* BytesOf(const void* p) { return static_cast<unsigned char*>(const_cast<void*>(p)); }

}  // namespace

GuardedObjects* GuardedObjects::Create(ObjectHeap& heap, const GuardOptions& options) {
  FREEHOLD_CHECK(options.capture != nullptr && options.slots > 0 && options.slots <= kMaxSlots);
  vm::AddressSpace& space = heap.space();
  const std::size_t record_bytes = sizeof(GuardedObjects) + options.slots * sizeof(Slot);
  const vm::Result<vm::MetadataArena*> created =
      vm::MetadataArena::Create(space.kernel(), vm::PagesFor({record_bytes}) + vm::Pages{2});
  if (!created.ok()) return nullptr;
  vm::MetadataArena* arena = *created;
  void* self = arena->Allocate({sizeof(GuardedObjects)}, alignof(GuardedObjects));
  auto* slots = arena->New<Slot>(options.slots);
  // Nothing of it is readable, so it counts against no limit.
  const vm::Result<vm::PageRange> memory = space.Map(
      {options.slots * kSlotPages.value}, {.alignment = kSlotPages, .protection = vm::os::Protection::kNone});
  if (self == nullptr || slots == nullptr || !memory.ok()) {
    if (memory.ok()) static_cast<void>(space.Unmap(*memory));
    vm::MetadataArena::Destroy(arena);
    return nullptr;
  }
  auto* guards = new (self)
      GuardedObjects(heap, options, *arena, slots, *memory, heap.code_.Tag(memory->address()));
  if (guards->MarkUnits() && guards->Guard()) return guards;
  Destroy(guards);
  return nullptr;
}

GuardedObjects::GuardedObjects(ObjectHeap& heap, const GuardOptions& options, vm::MetadataArena& arena, Slot* slots,
                               vm::PageRange memory, std::uint64_t seed)
    : heap_(heap),
      options_(options),
      arena_(arena),
      slots_(slots),
      slot_count_(options.slots),
      memory_(memory),
      random_(seed) {
  const vm::sync::SpinLockHolder holder(lock_);
  for (std::uint32_t number = 0; number < slot_count_; ++number) Enqueue(number);
}

// What is mapped of the pool when it goes is lost to the space, if it cannot unmap it for want of metadata.
void GuardedObjects::Destroy(GuardedObjects* guards) {
  const SpanTable& spans = guards->heap_.metadata_.spans();
  const std::uintptr_t start = AddressOf(guards->memory_.address());
  for (std::uint32_t number = 0; number < guards->slot_count_; ++number) {
    Span* span = spans.At(start + number * kUnitSize);
    // Of units without a record that could be written, the record says so.
    if (span->kind.load(std::memory_order_relaxed) == SpanKind::kGuarded) {
      span->kind.store(SpanKind::kNone, std::memory_order_relaxed);
    }
  }
  static_cast<void>(guards->heap_.space().Unmap(guards->memory_));
  vm::MetadataArena::Destroy(&guards->arena_);
}

bool GuardedObjects::MarkUnits() {
  const HeapMetadata& metadata = heap_.metadata_;
  const std::uintptr_t start = AddressOf(memory_.address());
  for (std::uint32_t number = 0; number < slot_count_; ++number) {
    Span* span = metadata.spans().At(start + number * kUnitSize);
    if (!metadata.Commit(span, sizeof(Span)).ok()) return false;
    span->start = start + number * kUnitSize;
    span->kind.store(SpanKind::kGuarded, std::memory_order_relaxed);
  }
  return true;
}

// All of it at once, as one kernel VMA; or it stays as it was mapped, and each slot's protection changes.
bool GuardedObjects::Guard() {
  const bool opened = kernel().features().guard_regions &&
                      heap_.space().Protect(memory_, vm::os::Protection::kReadWrite).ok();
  // Objects take few pages of a slot.
  if (opened && kernel().features().huge_pages) {
    static_cast<void>(kernel().AdviseHugePages(memory_, vm::os::HugePages::kAvoid));
  }
  if (opened && kernel().InstallGuard(memory_).ok()) return true;
  for (std::uint32_t number = 0; number < slot_count_; ++number) slots_[number].protection = true;
  return !opened || heap_.space().Protect(memory_, vm::os::Protection::kNone).ok();
}

void GuardedObjects::ForEachMetric(vm::MetricVisitor visit, void* context) const {
  using Kind = vm::Metric::Kind;
  visit(context, {.name = "heap_guarded_total", .help = "Objects that lay between guard pages.", .first = &allocated_});
  visit(context, {.name = "heap_guarded_dropped_total",
                  .help = "Objects that do not for want of a free slot.",
                  .first = &dropped_});
  visit(context, {.name = "heap_guarded_objects",
                  .help = "Objects between guard pages.",
                  .kind = Kind::kGauge,
                  .first = &live_});
  visit(context,
        {.name = "heap_guarded_bytes", .help = "In such objects.", .kind = Kind::kGauge, .first = &live_bytes_});
}

vm::os::Kernel& GuardedObjects::kernel() const { return heap_.space().kernel(); }

vm::PageRange GuardedObjects::PagesOf(std::size_t slot, std::size_t size) const {
  return vm::PageRange::Of(memory_.first + vm::Pages{slot * kSlotPages.value} + kMarginPages, vm::PagesFor({size}));
}

GuardedEvent GuardedObjects::Capture() const {
  GuardedEvent event;
  event.thread = vm::os::CurrentThreadId();
  event.depth = std::min(options_.capture(event.frames, GuardedEvent::kMaxDepth), GuardedEvent::kMaxDepth);
  return event;
}

// ---- The queue ----

std::uint32_t GuardedObjects::Take(bool& at_end) {
  const vm::sync::SpinLockHolder holder(lock_);
  const std::uint32_t number = first_;
  if (number == kNone) return kNone;
  first_ = slots_[number].next;
  if (first_ == kNone) last_ = kNone;
  slots_[number].state = State::kTaken;
  random_ = random_ * 6364136223846793005 + 1442695040888963407;  // Knuth's, of MMIX: the top bits are the best
  at_end = random_ >> 63 != 0;
  return number;
}

void GuardedObjects::Enqueue(std::uint32_t number) {
  slots_[number].next = kNone;
  (last_ == kNone ? first_ : slots_[last_].next) = number;
  last_ = number;
}

// ---- Access ----

bool GuardedObjects::Open(Slot& slot, vm::PageRange pages) {
  if (!slot.protection) return kernel().RemoveGuard(pages).ok();
  // What was written there between its content's end and its closing goes.
  return heap_.space().Protect(pages, vm::os::Protection::kReadWrite).ok() &&
         heap_.space().Discard({&pages, 1}).ok();
}

bool GuardedObjects::Close(Slot& slot, vm::PageRange pages) {
  if (!slot.protection && kernel().InstallGuard(pages).ok()) return true;
  // Locked memory has no guard regions. One kind for all that an object may lie in, so that it can be taken back.
  static_cast<void>(heap_.space().Discard({&pages, 1}));
  const vm::PageRange all = PagesOf(static_cast<std::size_t>(&slot - slots_), kMaxSize);
  if (!heap_.space().Protect(slot.protection ? pages : all, vm::os::Protection::kNone).ok()) return false;
  return std::exchange(slot.protection, true) || kernel().RemoveGuard(all).ok();
}

void GuardedObjects::Fill(vm::PageRange pages, const GuardedObject& object) {
  unsigned char* const begin = BytesOf(object.object);
  unsigned char* const end = begin + object.size;
  std::fill(BytesOf(pages.address()), begin, kFill);
  std::fill(end, BytesOf(pages.end.address()), kFill);
}

const unsigned char* GuardedObjects::FindWritten(vm::PageRange pages, const GuardedObject& object) {
  const unsigned char* const begin = BytesOf(object.object);
  const unsigned char* const end = begin + object.size;
  const auto written = [](unsigned char byte) { return byte != kFill; };
  const unsigned char* const last = BytesOf(pages.end.address());
  // Of overflows, the nearest byte to the object is the one to name; of underflows, too.
  if (const unsigned char* at = std::find_if(end, last, written); at != last) return at;
  for (const unsigned char* at = begin; at > BytesOf(pages.address()); --at) {
    if (written(at[-1])) return at - 1;
  }
  return nullptr;
}

// ---- Objects ----

void* GuardedObjects::Allocate(std::size_t size, std::size_t alignment) {
  size = std::max<std::size_t>(size, 1);
  GuardedEvent allocation = Capture();
  bool at_end = false;
  const std::uint32_t number = Take(at_end);
  if (number == kNone) {
    dropped_.fetch_add(1, std::memory_order_relaxed);
    return nullptr;
  }
  Slot& slot = slots_[number];
  const vm::PageRange pages = PagesOf(number, size);
  if (!Open(slot, pages)) {
    // As it was, or a part of it open, which nobody has an address of.
    dropped_.fetch_add(1, std::memory_order_relaxed);
    const vm::sync::SpinLockHolder holder(lock_);
    slot.state = slot.last.object == nullptr ? State::kUnused : State::kFreed;
    Enqueue(number);
    return nullptr;
  }
  const std::uintptr_t begin = AddressOf(pages.address());
  const std::size_t offset = (pages.bytes().value - size) & ~(std::max(alignment, kMinAlignment) - 1);
  GuardedObject object = {.object = reinterpret_cast<void*>(begin + (at_end ? offset : 0)), .size = size};
  object.allocation = allocation;
  Fill(pages, object);
  const vm::sync::SpinLockHolder holder(lock_);
  allocated_.fetch_add(1, std::memory_order_relaxed);
  live_.fetch_add(1, std::memory_order_relaxed);
  live_bytes_.fetch_add(size, std::memory_order_relaxed);
  slot.last = object;
  slot.site = nullptr;
  slot.state = State::kLive;
  return const_cast<void*>(object.object);
}

void GuardedObjects::SetSite(const void* p, AllocationSite* site) {
  const vm::sync::SpinLockHolder holder(lock_);
  slots_[SlotNumberOf(p)].site = site;
}

GuardedObjects::Slot& GuardedObjects::CheckedSlot(const char* call, const void* p, bool takes) {
  Slot& slot = slots_[SlotNumberOf(p)];
  MisuseReport wrong = {.what = Misuse::kNoObject, .call = call, .address = p};
  GuardedObject last;
  {
    const vm::sync::SpinLockHolder holder(lock_);
    if (ABSL_PREDICT_TRUE(slot.state == State::kLive && slot.last.object == p)) {
      if (!takes) return slot;
      slot.state = State::kTaken;
      live_.fetch_sub(1, std::memory_order_relaxed);
      live_bytes_.fetch_sub(slot.last.size, std::memory_order_relaxed);
      return slot;
    }
    last = slot.last;
    const std::size_t offset = AddressOf(p) - AddressOf(last.object);
    if (slot.state == State::kLive && offset < last.size) wrong.what = Misuse::kInterior;
    if (slot.state != State::kLive && last.object == p) wrong.what = Misuse::kDoubleFree;
  }
  wrong.object = last.object;
  wrong.object_size = last.size;
  Stop(wrong, last);
}

std::size_t GuardedObjects::SizeOf(const char* call, const void* p) {
  const Slot& slot = CheckedSlot(call, p, false);
  // Constant while the object lives, and the caller holds it.
  return slot.last.size;
}

void GuardedObjects::Free(const char* call, void* p) {
  Slot& slot = CheckedSlot(call, p, true);
  const auto number = static_cast<std::uint32_t>(&slot - slots_);
  const GuardedObject& object = slot.last;
  const vm::PageRange pages = PagesOf(number, object.size);
  if (const unsigned char* written = FindWritten(pages, object); ABSL_PREDICT_FALSE(written != nullptr)) {
    Stop({.what = Misuse::kStray,
          .call = call,
          .address = p,
          .object = p,
          .object_size = object.size,
          .written = written},
         object);
  }
  const GuardedEvent event = Capture();
  {
    // Before nobody may access it: who does finds out who freed it.
    const vm::sync::SpinLockHolder holder(lock_);
    slot.last.free = event;
    slot.last.freed = true;
  }
  const bool closed = Close(slot, pages);
  if (slot.site != nullptr) HeapProfile::NoteFree(slot.site);
  // What cannot be closed is never used again: it may not be as it must be.
  if (!closed) return;
  const vm::sync::SpinLockHolder holder(lock_);
  slot.state = State::kFreed;
  Enqueue(number);
}

bool GuardedObjects::Find(const void* address, GuardedObject& found) {
  if (!Owns(address)) return false;
  for (int i = 0; i < kPatience; ++i) {
    const vm::sync::SpinLockTryHolder holder(lock_);
    if (!holder.owns()) {
      vm::os::YieldCpu();
      continue;
    }
    lock_.AssertHeld();
    const std::size_t number = SlotNumberOf(address);
    const bool unused = slots_[number].last.object == nullptr;
    found = slots_[unused && number > 0 ? number - 1 : number].last;
    return found.object != nullptr;
  }
  return false;
}

void GuardedObjects::Stop(MisuseReport report, const GuardedObject& object) const {
  struct Context {
    void (*explain)(const GuardedObject& object);
    const GuardedObject& object;
  } context = {options_.explain, object};
  report.explain = [](const void* to) {
    const auto& what = *static_cast<const Context*>(to);
    if (what.explain != nullptr && what.object.object != nullptr) what.explain(what.object);
  };
  report.context = &context;
  StopProgram(report);
}

void GuardedObjects::CheckInvariants() {
  const vm::sync::SpinLockHolder holder(lock_);
  std::uint32_t queued = 0;
  for (std::uint32_t number = first_; number != kNone; number = slots_[number].next) {
    const Slot& slot = slots_[number];
    FREEHOLD_CHECK(slot.state == State::kUnused || slot.state == State::kFreed);
    FREEHOLD_CHECK((slot.state == State::kUnused) == (slot.last.object == nullptr));
    FREEHOLD_CHECK(slot.next != kNone || number == last_);
    FREEHOLD_CHECK(++queued <= slot_count_);
  }
  const auto live = static_cast<std::uint32_t>(
      std::count_if(slots_, slots_ + slot_count_, [](const Slot& slot) { return slot.state == State::kLive; }));
  const auto taken = static_cast<std::uint32_t>(
      std::count_if(slots_, slots_ + slot_count_, [](const Slot& slot) { return slot.state == State::kTaken; }));
  FREEHOLD_CHECK(live == live_.load(std::memory_order_relaxed));
  FREEHOLD_CHECK(queued + live + taken == slot_count_);
}

}  // namespace freehold::allocator
