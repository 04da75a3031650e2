#include "allocator/object_heap.h"

#include <sys/auxv.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <new>

#include "allocator/misuse.h"
#include "vm/os/check.h"
#include "vm/sync/sync_point.h"

namespace freehold::allocator {
namespace {

// Finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): every bit of `n` moves every bit of the result.
std::uint64_t Mix(std::uint64_t n) {
  n = (n ^ (n >> 30)) * 0xbf58476d1ce4e5b9;
  n = (n ^ (n >> 27)) * 0x94d049bb133111eb;
  return n ^ (n >> 31);
}

// Unlike in every process, and to outsiders unknown: from the 16 random bytes that the kernel gives a program.
std::uint64_t MakeSecret(vm::os::Kernel& kernel, const void* metadata) {
  std::uint64_t random[2] = {};
  if (const void* bytes = reinterpret_cast<const void*>(getauxval(AT_RANDOM))) {
    std::memcpy(random, bytes, sizeof(random));
  }
  return Mix(Mix(Mix(random[0]) ^ random[1] ^ AddressOf(metadata)) ^ kernel.Now().value);
}

unsigned ShardsFor(const ObjectHeapOptions& options, vm::os::Kernel& kernel) {
  const unsigned wanted = options.shards != 0 ? options.shards : kernel.CpuCount();
  return std::clamp(wanted, 1u, PageHeap::kMaxShards);
}

}  // namespace

vm::Result<ObjectHeap*> ObjectHeap::Create(vm::AddressSpace& space, const ObjectHeapOptions& options) {
  const bool has_profile = options.profile.interval.value != 0;
  const bool has_guards = options.guards.interval.value != 0;
  const std::size_t bytes_per_thread = sizeof(ThreadCache) + (has_profile || has_guards ? sizeof(Sampler) : 0);
  const vm::Result<HeapMetadata> metadata = HeapMetadata::Create(
      space, {.header_bytes = sizeof(ObjectHeap), .cache_bytes = options.max_threads * bytes_per_thread});
  if (!metadata.ok()) return metadata.error();
  auto* heap = new (metadata->header()) ObjectHeap(space, *metadata, options);
  if (has_profile) {
    heap->profile_ = HeapProfile::Create(*heap, options.profile);
    heap->samples_ = heap->profile_ == nullptr ? nullptr : heap->profile_->objects();
  }
  if (has_guards) heap->guards_ = GuardedObjects::Create(*heap, options.guards);
  return heap;
}

void ObjectHeap::Destroy(ObjectHeap* heap) {
  if (heap->guards_ != nullptr) GuardedObjects::Destroy(heap->guards_);
  if (heap->profile_ != nullptr) HeapProfile::Destroy(heap->profile_);
  heap->metadata_.Release();
}

void ObjectHeap::DestroyWithMemory(ObjectHeap* heap) {
  heap->metadata_.ForEachWritableSpan(
      [](void* context, Span* span) {
        if (span->kind.load(std::memory_order_relaxed) != SpanKind::kMapped) return;
        static_cast<LargeObjects*>(context)->Free(span);
      },
      &heap->large_);
  heap->page_heap_.UnmapAll();
  Destroy(heap);
}

ObjectHeap::ObjectHeap(vm::AddressSpace& space, const HeapMetadata& metadata,
                       const ObjectHeapOptions& options)
    : space_(space),
      metadata_(metadata),
      code_(MakeSecret(space.kernel(), metadata.header()), &end_),
      options_(options),
      base_(AddressOf(space.reservation().address())),
      size_(space.reservation().bytes().value),
      page_heap_(space, metadata_, ShardsFor(options, space.kernel()),
                 {.limit = options.limit, .huge_pages = options.huge_pages}),
      large_(space, metadata_, page_heap_, options.limit) {}

// ---- threads ----

ThreadCache* ObjectHeap::AttachThread() {
  ThreadCache* cache = TakeOrphan();
  if (cache == nullptr) cache = NewCache();
  if (cache == nullptr) return nullptr;
  cache->BecomeAttached();
  attached_.fetch_add(1, std::memory_order_relaxed);
  return cache;
}

void ObjectHeap::DetachThread(ThreadCache* cache) {
  cache->BecomeOrphan();
  attached_.fetch_sub(1, std::memory_order_relaxed);
  AddOrphan(cache);
}

ThreadCache* ObjectHeap::TakeOrphan() {
  if (orphan_count_.load(std::memory_order_relaxed) == 0) return nullptr;
  vm::sync::SpinLockHolder holder(registry_lock_);
  if (orphans_ == 0) return nullptr;
  ThreadCache* cache = CacheOf(orphans_ - 1);
  orphans_ = cache->next_orphan_;
  orphan_count_.fetch_sub(1, std::memory_order_relaxed);
  return cache;
}

void ObjectHeap::AddOrphan(ThreadCache* cache) {
  vm::sync::SpinLockHolder holder(registry_lock_);
  cache->next_orphan_ = orphans_;
  orphans_ = cache->id_ + 1;
  orphan_count_.fetch_add(1, std::memory_order_relaxed);
}

ThreadCache* ObjectHeap::NewCache() {
  // Room for one more is made before the lock is taken; another thread may take it first.
  for (;;) {
    const std::uint32_t id = cache_count();
    if (id == options_.max_threads) return nullptr;
    if (!metadata_.Commit(CacheOf(id), sizeof(ThreadCache)).ok()) return nullptr;
    // Without memory for that, the thread's objects are no samples.
    const bool wanted = profile_ != nullptr || guards_ != nullptr;
    const bool samples = wanted && metadata_.Commit(SamplerOf(id), sizeof(Sampler)).ok();
    vm::sync::SpinLockHolder holder(registry_lock_);
    if (cache_count() != id) continue;
    const Sampler::Intervals intervals = {.profile = profile_ != nullptr ? profile_->interval() : vm::Bytes{0},
                                          .guard = guards_ != nullptr ? guards_->interval() : vm::Bytes{0}};
    Sampler* sampler = samples ? new (SamplerOf(id)) Sampler(intervals, Mix(code_.Tag(CacheOf(id)))) : nullptr;
    ThreadCache* cache = new (CacheOf(id)) ThreadCache(*this, id, sampler);
    // Pairs with the acquire in cache_count().
    cache_count_.store(id + 1, std::memory_order_release);
    return cache;
  }
}

Span* ObjectHeap::InheritSpan(SizeClass size_class, ThreadCache* heir) {
  if (orphan_count_.load(std::memory_order_relaxed) == 0) return nullptr;
  vm::sync::SpinLockHolder holder(registry_lock_);
  std::uint32_t name = orphans_;
  for (int tried = 0; name != 0 && tried < kMaxOrphansTried; ++tried) {
    ThreadCache* orphan = CacheOf(name - 1);
    if (orphan->HasAvailable(size_class)) {
      if (Span* span = orphan->GiveAvailable(size_class, heir)) return span;
    }
    name = orphan->next_orphan_;
  }
  return nullptr;
}

// ---- pointers ----

Span* ObjectHeap::CheckedSpanSlow(const char* call, const void* p) const {
  if (ABSL_PREDICT_FALSE(!Owns(p))) {
    StopProgram({.what = Misuse::kForeign, .call = call, .address = p});
  }
  Span* span = SpanOf(p);
  const SpanKind kind = span->kind.load(std::memory_order_relaxed);
  if (IsLarge(kind)) {
    if (ABSL_PREDICT_FALSE(AddressOf(p) != span->start)) StopOnWrongPointer(call, p, span);
    return span;
  }
  if (ABSL_PREDICT_FALSE(kind != SpanKind::kObjects && kind != SpanKind::kSuspect)) {
    if (kind != SpanKind::kGuarded) StopOnWrongPointer(call, p, span);
    guards_->SizeOf(call, p);
    return span;
  }
  if (ABSL_PREDICT_FALSE(!IsObject(span, p))) StopOnWrongPointer(call, p, span);
  if (ABSL_PREDICT_FALSE(code_.IsTagged(p))) StopOnDoubleFree(call, p, span);
  return span;
}

// Off every path that goes on, so it may look around.
void ObjectHeap::StopOnWrongPointer(const char* call, const void* p, const Span* span) const {
  // A large object's mapping is known by its first page.
  SpanKind kind = span->kind.load(std::memory_order_relaxed);
  if (kind == SpanKind::kNone || kind == SpanKind::kInterior) {
    const vm::Result<vm::VmaInfo> vma = space_.Lookup(vm::PageNumber::Of(p));
    if (vma.ok()) span = metadata_.spans().At(AddressOf(vma->range.address()));
    kind = span->kind.load(std::memory_order_relaxed);
  }
  MisuseReport report = {.what = Misuse::kNoObject, .call = call, .address = p};
  const std::size_t offset = AddressOf(p) - span->start;
  if (IsLarge(kind)) {
    report.object_size = LargeObjects::UsableSize(span);
    report.object = reinterpret_cast<void*>(span->start);
    if (offset != 0 && offset < report.object_size) report.what = Misuse::kInterior;
  } else if (kind == SpanKind::kObjects || kind == SpanKind::kSuspect) {
    const SizeClassInfo& info = kSizeClasses[span->size_class];
    report.object_size = info.size;
    report.object = reinterpret_cast<void*>(span->start + offset / info.size * info.size);
    if (offset % info.size != 0 && offset / info.size < info.capacity) report.what = Misuse::kInterior;
  }
  StopProgram(report);
}

void ObjectHeap::StopOnDoubleFree(const char* call, const void* p, const Span* span) const {
  StopProgram(
      {.what = Misuse::kDoubleFree, .call = call, .address = p, .object_size = UsableSizeOf(span, p)});
}

void ObjectHeap::StopOnCorruption(const void* object) const {
  const std::size_t size = Owns(object) ? UsableSizeOf(SpanOf(object), object) : 0;
  StopProgram(
      {.what = Misuse::kCorrupted, .call = "malloc", .address = object, .object = object, .object_size = size});
}

void ObjectHeap::Free(void* p) {
  if (p == nullptr) return;
  Span* span = CheckedSpan("free", p);
  if (IsLarge(span)) return FreeLarge(span, p);
  if (IsGuardSlot(span)) return guards_->Free("free", p);
  if (IsSample(span)) return profile_->Free(span, p);
  auto* object = static_cast<FreeObject*>(p);
  if (HasSuspects() && FreeSuspect(span, object)) return;
  code_.Link(object, &end_);
  MakeMessage(code_, span, {.first = object, .last = object, .count = 1});
  span->owner.load(std::memory_order_relaxed)->Receive(object, object);
}

void ObjectHeap::FreeLarge(Span* span, void* p) {
  AllocationSite* site = span->site;
  if (!large_.Free(span)) StopOnWrongPointer("free", p, span);
  if (site != nullptr) HeapProfile::NoteFree(site);
}

// The span of an object that the caller holds may go to another cache at any time, but once its list is rebuilt it
// stays so. Were the object handed over as usual while it is suspect, it would come free twice: by its tag too.
bool ObjectHeap::FreeSuspect(Span* span, FreeObject* object) {
  for (;;) {
    // Pairs with the release in ThreadCache::GiveAvailable.
    ThreadCache* owner = span->owner.load(std::memory_order_acquire);
    if (!owner->NeedsLockToFree(span)) return false;
    if (owner->FreeSuspect(span, object)) return true;
  }
}

void ObjectHeap::CheckFreeSized(const void* p, std::size_t size) const {
  const std::size_t usable = CheckFree(p);
  if (size <= usable) return;
  StopProgram({.what = Misuse::kSizeMismatch, .call = "free", .address = p, .object_size = usable, .size = size});
}

// What is not suspect, and of no frozen cache, never becomes so.
bool ObjectHeap::Hold(void* p) const {
  const Span* span = SpanOf(p);
  if (IsLarge(span) || IsGuardSlot(span)) return false;
  if (HasSuspects() && span->owner.load(std::memory_order_acquire)->NeedsLockToFree(span)) return false;
  code_.Link(static_cast<FreeObject*>(p), &end_);
  return true;
}

void ObjectHeap::Release(void* p, bool intact) const {
  auto* object = static_cast<FreeObject*>(p);
  if (!intact || !code_.IsTagged(p) || code_.Next(object) != &end_) StopOnCorruption(p);
  object->tag = 0;
}

std::size_t ObjectHeap::UsableSizeOfSlow(const Span* span, const void* p) const {
  if (IsLarge(span)) return LargeObjects::UsableSize(span);
  return ABSL_PREDICT_FALSE(IsGuardSlot(span)) ? guards_->SizeOf("free", p) : kClassSizes[span->size_class];
}

std::size_t ObjectHeap::UsableSizeSlow(const void* p) const {
  return p == nullptr ? 0 : UsableSizeOf(CheckedSpan("malloc_usable_size", p), p);
}

// ---- samples ----

void* ObjectHeap::AllocateSample(Sampler::Due due, SizeClass size_class, std::size_t size, std::size_t alignment,
                                 bool& zero) {
  if (due.guard && GuardedObjects::Fits(size, alignment)) {
    if (void* object = guards_->Allocate(size, alignment)) {
      if (due.profile) guards_->SetSite(object, profile_->Note({kSizeClasses[size_class].size}));
      zero = true;
      return object;
    }
  }
  return due.profile ? profile_->Allocate(size_class) : nullptr;
}

// ---- large objects ----

void* ObjectHeap::AllocateLarge(unsigned home, const LargeObjects::Request& request) {
  for (unsigned attempt = 0;; ++attempt) {
    if (void* object = large_.Allocate(home, request)) {
      RelieveLimit();
      return object;
    }
    if (!MakeRoom(std::max(request.size, request.alignment), attempt)) return nullptr;
  }
}

// Room behind the object that only a limit refuses is worth an effort: to move takes much more.
bool ObjectHeap::ResizeLarge(Span* span, std::size_t size) {
  for (unsigned attempt = 0;; ++attempt) {
    if (large_.Resize(span, size)) {
      RelieveLimit();
      return true;
    }
    const std::size_t usable = LargeObjects::UsableSize(span);
    if (size <= usable || Admission(options_.limit, {size - usable}).granted()) return false;
    if (!MakeRoom(size - usable, attempt)) return false;
  }
}

// ---- giving back ----

std::size_t ObjectHeap::Trim(ThreadCache* own) {
  if (own != nullptr) own->Trim();
  for (std::uint32_t id = 0; id < cache_count(); ++id) CacheOf(id)->TrimOrphan();
  EmptyStashes();
  return page_heap_.Trim().bytes().value;
}

void ObjectHeap::Tick(vm::Nanoseconds now) {
  std::uint64_t due = next_tick_.load(std::memory_order_relaxed);
  if (now.value < due) return;
  const std::uint64_t next = (now + options_.decay).value;
  if (!next_tick_.compare_exchange_strong(due, next, std::memory_order_relaxed)) return;
  EmptyStashes();
  page_heap_.Age();
}

void ObjectHeap::EmptyStashes() {
  for (std::uint32_t id = 0; id < cache_count(); ++id) CacheOf(id)->EmptyStash();
}

// ---- statistics ----

HeapStats ObjectHeap::Stats() {
  HeapStats stats;
  std::size_t in_spans = 0;
  ForEachSizeClass(
      [](void* context, const SizeClassStats& size_class) {
        *static_cast<std::size_t*>(context) += size_class.allocated * size_class.object_size;
      },
      &in_spans);
  const PageHeap::Stats pages = page_heap_.GetStats();
  const std::size_t large_mapped = large_.mapped_bytes().value;
  stats.allocated.value = in_spans + large_.bytes().value;
  stats.free_dirty.value = pages.dirty_units * kUnitSize;
  stats.free_clean.value = (pages.free_units - pages.dirty_units) * kUnitSize;
  stats.mapped.value = pages.chunks * kChunkSize + large_mapped;
  stats.active = stats.mapped - stats.free_dirty - stats.free_clean;
  stats.metadata = metadata_.committed();
  stats.large = large_.bytes();
  stats.large_objects = large_.count();
  stats.chunks = pages.chunks;
  stats.threads = attached_.load(std::memory_order_relaxed);
  stats.orphans = orphan_count_.load(std::memory_order_relaxed);
  stats.purged_pages = pages.purged_pages;
  return stats;
}

void ObjectHeap::ForEachMetric(vm::MetricVisitor visit, void* context) const {
  page_heap_.ForEachMetric(visit, context);
  large_.ForEachMetric(visit, context);
  const auto caches = [&](std::string_view name, std::string_view help, const std::atomic<std::uint32_t>& value) {
    visit(context, {.name = name,
                    .help = help,
                    .kind = vm::Metric::Kind::kGauge,
                    .first = &value,
                    .width = sizeof(value)});
  };
  caches("heap_threads", "Threads that have a cache.", attached_);
  caches("heap_orphans", "Caches of threads that are gone, kept for threads to come.", orphan_count_);
  visit(context, {.name = "heap_records_bytes",
                  .help = "Taken for the heap's own records.",
                  .kind = vm::Metric::Kind::kGauge,
                  .first = metadata_.committed_location(),
                  .scale = HeapMetadata::kStep});
  if (profile_ != nullptr) profile_->ForEachMetric(visit, context);
  if (guards_ != nullptr) guards_->ForEachMetric(visit, context);
}

void ObjectHeap::ForEachSizeClass(void (*visit)(void* context, const SizeClassStats& stats), void* context) {
  std::array<SizeClassStats, kSizeClassCount> stats;
  for (unsigned i = 0; i < kSizeClassCount; ++i) stats[i].object_size = kSizeClasses[i].size;
  for (std::uint32_t id = 0; id < cache_count(); ++id) CacheOf(id)->AddStats(stats);
  for (const SizeClassStats& size_class : stats) visit(context, size_class);
}

void ObjectHeap::ForEachCache(void (*visit)(void* context, const CacheStats& stats), void* context) {
  for (std::uint32_t id = 0; id < cache_count(); ++id) {
    ThreadCache* cache = CacheOf(id);
    std::array<SizeClassStats, kSizeClassCount> classes;
    cache->AddStats(classes);
    CacheStats stats{.id = id,
                     .attached = cache->state_.load(std::memory_order_relaxed) == ThreadCache::State::kAttached,
                     .thread = cache->thread_.load(std::memory_order_relaxed),
                     .at_hand = cache->at_hand()};
    for (unsigned i = 0; i < kSizeClassCount; ++i) {
      stats.spans += classes[i].spans;
      stats.capacity.value += classes[i].capacity * kSizeClasses[i].size;
      stats.allocated.value += classes[i].allocated * kSizeClasses[i].size;
    }
    visit(context, stats);
  }
}

HeapLocation ObjectHeap::Locate() const {
  HeapLocation location = ThreadCache::Locate(CacheOf(0));
  location.cache_count = AddressOf(&cache_count_);
  metadata_.Locate(location);
  return location;
}

// ---- fork ----

void ObjectHeap::PrepareFork(ThreadCache* own) {
  if (own != nullptr) own->remote_frees_.LinkArrivals();  // may wait for a fork
  if (profile_ != nullptr) profile_->PrepareFork();
  if (guards_ != nullptr) guards_->PrepareFork();
  std::uint32_t idle = 0;
  while (!forking_.compare_exchange_strong(idle, 1, std::memory_order_seq_cst)) {
    WaitForFork();
    idle = 0;
  }
  // Whoever takes a cache's lock from now on leaves it again (ThreadCache::InSlowPath).
  for (std::uint32_t id = 0; id < cache_count(); ++id) CacheOf(id)->FinishSlowPath(CacheOf(id) == own);
  page_heap_.PrepareFork();
  registry_lock_.LockForFork();
}

void ObjectHeap::ParentAfterFork(ThreadCache*) {
  registry_lock_.UnlockAfterFork();
  page_heap_.UnlockAfterFork();
  EndFork();
  if (guards_ != nullptr) guards_->UnlockAfterFork();
  if (profile_ != nullptr) profile_->UnlockAfterFork();
}

// The list of orphans is made anew: a thread that was about to attach or detach had its cache in neither state.
void ObjectHeap::ChildAfterFork(ThreadCache* own) {
  orphans_ = 0;
  std::uint32_t others = 0;
  for (std::uint32_t id = 0; id < cache_count(); ++id) {
    ThreadCache* cache = CacheOf(id);
    // The profile's is as consistent as its lock made it.
    if (cache == own || cache == samples_) {
      cache->ForgetOthers();
    } else {
      ++others;
      cache->Freeze();
      cache->next_orphan_ = orphans_;
      orphans_ = id + 1;
    }
  }
  has_suspects_.store(others != 0, std::memory_order_relaxed);
  attached_.store(own == nullptr ? 0 : 1, std::memory_order_relaxed);
  orphan_count_.store(others, std::memory_order_relaxed);
  registry_lock_.UnlockAfterFork();
  page_heap_.UnlockAfterFork();
  EndFork();
  if (guards_ != nullptr) guards_->UnlockAfterFork();
  if (profile_ != nullptr) profile_->UnlockAfterFork();
}

void ObjectHeap::WaitForFork() {
  while (IsForking()) vm::sync::WaitOnWord(&forking_, 1);
}

void ObjectHeap::EndFork() {
  forking_.store(0, std::memory_order_release);
  vm::sync::WakeWord(&forking_, std::numeric_limits<int>::max());
}

void ObjectHeap::CheckInvariants() {
  page_heap_.CheckInvariants();
  if (guards_ != nullptr) guards_->CheckInvariants();
  for (std::uint32_t id = 0; id < cache_count(); ++id) CacheOf(id)->CheckInvariants();
}

}  // namespace freehold::allocator
