#include "allocator/heap_profile.h"

#include <algorithm>
#include <new>

#include "allocator/object_heap.h"
#include "vm/os/check.h"

namespace freehold::allocator {
namespace {

// Address space for sites and records: enough for the samples of a heap that fills the space, at common intervals.
vm::Bytes ArenaBytes(const vm::AddressSpace& space) {
  return {std::clamp(space.reservation().bytes().value / 64, vm::MiB(4).value, vm::GiB(1).value)};
}

std::uint64_t Mix(std::uint64_t hash, std::uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15;
  return hash ^ (hash >> 32);
}

}  // namespace

HeapProfile* HeapProfile::Create(ObjectHeap& heap, const HeapProfileOptions& options) {
  FREEHOLD_CHECK(options.capture != nullptr);
  const vm::Result<vm::MetadataArena*> created =
      vm::MetadataArena::Create(heap.space().kernel(), vm::PagesFor(ArenaBytes(heap.space())));
  if (!created.ok()) return nullptr;
  vm::MetadataArena* arena = *created;
  void* self = arena->Allocate({sizeof(HeapProfile)}, alignof(HeapProfile));
  auto** site_lists = arena->New<AllocationSite*>(kSiteLists);
  // Zeroes, and few of them are ever touched.
  void* record_lists = arena->Allocate({kRecordLists * sizeof(Record*)}, alignof(Record*));
  ThreadCache* objects = heap.NewCache();
  if (self == nullptr || site_lists == nullptr || record_lists == nullptr || objects == nullptr) {
    vm::MetadataArena::Destroy(arena);  // a cache stays, which nobody uses
    return nullptr;
  }
  return new (self) HeapProfile(heap, options, *arena, *objects, site_lists, static_cast<Record**>(record_lists));
}

void HeapProfile::Destroy(HeapProfile* profile) { vm::MetadataArena::Destroy(&profile->arena_); }

void HeapProfile::ForEachMetric(vm::MetricVisitor visit, void* context) const {
  visit(context, {.name = "heap_samples_total", .help = "Objects in the heap profile.", .first = &samples_});
  visit(context, {.name = "heap_samples_dropped_total",
                  .help = "Objects that are not in the heap profile for want of memory.",
                  .first = &dropped_});
}

// 1 / (1 - exp(-size / interval)), without libm.
double HeapProfile::ObjectsPerSample(std::size_t object_size) const {
  constexpr int kHalvings = 20;
  const double x = static_cast<double>(object_size) / static_cast<double>(options_.interval.value);
  if (options_.interval.value == 1 || x > 50) return 1;
  // 1 - exp(-2y) = c (2 - c) with c = 1 - exp(-y), which is y - y^2 / 2 + y^3 / 6 - ... for small y.
  const double y = x / (1 << kHalvings);
  double chance = y * (1 - y / 2 * (1 - y / 3));
  for (int i = 0; i < kHalvings; ++i) chance *= 2 - chance;
  return 1 / chance;
}

HeapProfile::Stack HeapProfile::Capture() const {
  Stack stack;
  stack.depth = std::min(options_.capture(stack.frames, kMaxDepth), kMaxDepth);
  return stack;
}

AllocationSite* HeapProfile::SiteOfLocked(const Stack& stack, std::size_t object_size) {
  std::uint64_t hash = Mix(stack.depth, object_size);
  for (unsigned i = 0; i < stack.depth; ++i) hash = Mix(hash, AddressOf(stack.frames[i]));
  AllocationSite*& list = site_lists_[hash % kSiteLists];
  for (AllocationSite* site = list; site != nullptr; site = site->next_same) {
    const bool same = site->hash == hash && site->object_size == object_size && site->depth == stack.depth &&
                      std::equal(stack.frames, stack.frames + stack.depth, site->frames);
    if (same) return site;
  }
  void* memory = arena_.Allocate({sizeof(AllocationSite) + stack.depth * sizeof(void*)}, alignof(AllocationSite));
  if (memory == nullptr) return nullptr;
  auto* site = new (memory) AllocationSite{
      .object_size = object_size, .hash = hash, .next = sites_.load(std::memory_order_relaxed), .next_same = list};
  site->depth = stack.depth;
  std::copy(stack.frames, stack.frames + stack.depth, site->frames);
  list = site;
  // Pairs with the acquire in sites().
  sites_.store(site, std::memory_order_release);
  return site;
}

HeapProfile::Record* HeapProfile::NewRecordLocked() {
  if (unused_records_ == nullptr) {
    auto* records = arena_.New<Record>(kRecordsAtATime);
    if (records == nullptr) return nullptr;
    for (std::size_t i = 0; i < kRecordsAtATime; ++i) {
      records[i].next = unused_records_;
      unused_records_ = records + i;
    }
  }
  Record* record = unused_records_;
  unused_records_ = record->next;
  return record;
}

std::size_t HeapProfile::RecordListOf(const void* object) {
  return Mix(0, AddressOf(object) / kMinAlignment) % kRecordLists;
}

void* HeapProfile::Allocate(SizeClass size_class) {
  const Stack stack = Capture();
  vm::sync::SpinLockHolder holder(lock_);
  const std::size_t size = kSizeClasses[size_class].size;
  AllocationSite* site = SiteOfLocked(stack, size);
  Record* record = site == nullptr ? nullptr : NewRecordLocked();
  void* object = record == nullptr ? nullptr : objects_->Allocate(size);
  if (object == nullptr) {
    if (record != nullptr) {
      record->next = unused_records_;
      unused_records_ = record;
    }
    NoteDropped();
    return nullptr;
  }
  Record*& list = record_lists_[RecordListOf(object)];
  *record = {.object = object, .site = site, .next = list};
  list = record;
  site->allocated.fetch_add(1, std::memory_order_relaxed);
  samples_.fetch_add(1, std::memory_order_relaxed);
  return object;
}

void HeapProfile::Free(const Span* span, void* object) {
  vm::sync::SpinLockHolder holder(lock_);
  // Whoever came here asked already, but without the lock.
  if (heap_.code_.IsTagged(object)) heap_.StopOnDoubleFree("free", object, span);
  Record** link = &record_lists_[RecordListOf(object)];
  while (*link != nullptr && (*link)->object != object) link = &(*link)->next;
  Record* record = *link;
  FREEHOLD_CHECK(record != nullptr);
  *link = record->next;
  NoteFree(record->site);
  record->next = unused_records_;
  unused_records_ = record;
  objects_->Free(object);
}

AllocationSite* HeapProfile::Note(vm::Bytes bytes) {
  const Stack stack = Capture();
  vm::sync::SpinLockHolder holder(lock_);
  AllocationSite* site = SiteOfLocked(stack, bytes.value);
  if (site == nullptr) {
    NoteDropped();
    return nullptr;
  }
  site->allocated.fetch_add(1, std::memory_order_relaxed);
  samples_.fetch_add(1, std::memory_order_relaxed);
  return site;
}

}  // namespace freehold::allocator
