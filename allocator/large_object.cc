#include "allocator/large_object.h"

#include <algorithm>
#include <cstring>

#include "vm/os/check.h"
#include "vm/page_range.h"

namespace freehold::allocator {
namespace {

constexpr std::uint32_t kUnitPages = kUnitSize >> vm::kPageShift;
constexpr std::uint32_t kMinHugePages = LargeObjects::kMinHugeSize >> vm::kPageShift;
constexpr std::uint32_t kMaxRunUnits = LargeObjects::kMaxRunSize / kUnitSize;
// A run that grows takes so many times as many units as it has.
constexpr std::uint32_t kGrowth = 4;

std::uint32_t PagesOf(std::size_t size) { return static_cast<std::uint32_t>(vm::PagesFor({size}).value); }
std::uint32_t UnitsOf(std::uint32_t pages) { return (pages + kUnitPages - 1) / kUnitPages; }

constexpr std::uintptr_t RoundUp(std::uintptr_t n, std::size_t granule) { return (n + granule - 1) & ~(granule - 1); }

vm::PageRange RangeOf(const Span* span, std::uint32_t first_page, std::uint32_t end_page) {
  const vm::PageNumber start = vm::PageNumber::Of(reinterpret_cast<void*>(span->start));
  return {start + vm::Pages{first_page}, start + vm::Pages{end_page}};
}

}  // namespace

void LargeObjects::ForEachMetric(vm::MetricVisitor visit, void* context) const {
  using Kind = vm::Metric::Kind;
  visit(context, {.name = "heap_large_objects",
                  .help = "Objects that are ranges of pages: all above 128 KiB, and those that grow.",
                  .kind = Kind::kGauge,
                  .first = &count_});
  visit(context, {.name = "heap_large_bytes",
                  .help = "In such objects.",
                  .kind = Kind::kGauge,
                  .first = &pages_,
                  .scale = vm::kPageSize});
  visit(context, {.name = "heap_large_mapped_bytes",
                  .help = "Of that, in mappings of their own.",
                  .kind = Kind::kGauge,
                  .first = &mapped_pages_,
                  .scale = vm::kPageSize});
  visit(context, {.name = "heap_large_ahead_bytes",
                  .help = "Taken for objects that grow, before they need it.",
                  .kind = Kind::kGauge,
                  .first = &ahead_units_,
                  .scale = kUnitSize});
}

void MarkInterior(const SpanTable& spans, Span* span, unsigned first, unsigned end) {
  for (unsigned unit = first; unit < end; ++unit) {
    Span* interior = spans.At(span->start + unit * kUnitSize);
    interior->units = unit;
    interior->kind.store(SpanKind::kInterior, std::memory_order_relaxed);
  }
}

bool LargeObjects::CanServe(std::size_t size) const {
  return size < space_.reservation().bytes().value && size <= kMaxSize;
}

void* LargeObjects::Allocate(unsigned home, const Request& request) {
  if (!CanServe(request.size) || !CanServe(request.alignment)) return nullptr;
  const bool fits_run = request.size <= kMaxRunSize && request.alignment <= kUnitSize;
  return fits_run ? AllocateRun(home, request) : AllocateMapped(request);
}

void* LargeObjects::AllocateRun(unsigned home, const Request& request) {
  const std::uint32_t pages = std::max<std::uint32_t>(PagesOf(request.size), 1);
  const std::uint32_t units = UnitsOf(pages);
  const PageHeap::Run run = request.will_grow
                                ? page_heap_.AllocateWithRoom(home, units, kMaxRunUnits)
                                : page_heap_.Allocate(home, units);
  if (run.start == 0) return nullptr;
  Span* span = metadata_.spans().At(run.start);
  span->start = run.start;
  span->units = units;
  span->used_pages = pages;
  span->counted_pages = pages;
  span->site = nullptr;
  span->kind.store(SpanKind::kRun, std::memory_order_relaxed);
  MarkInterior(metadata_.spans(), span, 1, units);
  count_.fetch_add(1, std::memory_order_relaxed);
  pages_.fetch_add(pages, std::memory_order_relaxed);
  if (const std::uint32_t ahead = AheadOf(units, pages)) ahead_units_.fetch_add(ahead, std::memory_order_relaxed);
  void* object = reinterpret_cast<void*>(run.start);
  if (request.zeroed && !run.clean) std::memset(object, 0, request.size);
  return object;
}

void* LargeObjects::AllocateMapped(const Request& request) {
  const std::uint32_t pages = std::max<std::uint32_t>(PagesOf(request.size), 1);
  const bool huge = request.will_grow && pages >= kMinHugePages;
  const std::size_t granule = huge ? vm::kPagesPerHugePage : kUnitPages;
  const auto whole = [granule](std::uint32_t n) { return static_cast<std::uint32_t>(RoundUp(n, granule)); };
  vm::MapOptions options = {.alignment = {std::max(request.alignment, kUnitSize) >> vm::kPageShift},
                            .content = request.zeroed ? vm::Content::kZeroed : vm::Content::kAnything,
                            .huge_pages = huge ? vm::os::HugePages::kPrefer : vm::os::HugePages::kAvoid};
  const Admission admission(limit_, vm::Pages{whole(pages)}.bytes());
  if (!admission.granted()) return nullptr;
  // Room to grow as far again: it is not touched, so it costs nothing but addresses.
  std::uint32_t mapped_pages = whole(request.will_grow && request.size <= kMaxSize / 2 ? pages * 2 : pages);
  vm::Result<vm::PageRange> mapped = space_.Map({mapped_pages}, options);
  if (!mapped.ok() && request.will_grow) {
    mapped_pages = whole(pages);
    options.huge_pages = vm::os::HugePages::kAvoid;
    mapped = space_.Map({mapped_pages}, options);
  }
  if (!mapped.ok()) return nullptr;
  const std::uintptr_t start = AddressOf(mapped->address());
  Span* span = metadata_.spans().At(start);
  if (!metadata_.Commit(span, sizeof(Span)).ok()) {
    static_cast<void>(space_.Unmap(*mapped));  // nothing is lost but address space
    return nullptr;
  }
  span->start = start;
  span->used_pages = pages;
  span->mapped_pages = mapped_pages;
  span->site = nullptr;
  span->kind.store(SpanKind::kMapped, std::memory_order_relaxed);
  count_.fetch_add(1, std::memory_order_relaxed);
  pages_.fetch_add(pages, std::memory_order_relaxed);
  mapped_pages_.fetch_add(mapped_pages, std::memory_order_relaxed);
  slack_pages_.fetch_add(SlackOf(span), std::memory_order_relaxed);
  return mapped->address();
}

bool LargeObjects::Free(Span* span) {
  // Whoever takes the kind away frees the object. From here on the record may be another object's as soon as
  // the memory is back.
  const std::uint32_t used = span->used_pages;
  const std::uint32_t units = span->units;
  const std::uint32_t counted = span->counted_pages;
  const std::uint32_t mapped = span->mapped_pages;
  const std::uint32_t slack = SlackOf(span);
  const std::uintptr_t start = span->start;
  const vm::PageRange range = RangeOf(span, 0, mapped);
  const SpanKind kind = span->kind.exchange(SpanKind::kNone, std::memory_order_relaxed);
  if (!IsLarge(kind)) return false;
  count_.fetch_sub(1, std::memory_order_relaxed);
  if (kind == SpanKind::kRun) {
    pages_.fetch_sub(counted, std::memory_order_relaxed);
    if (const std::uint32_t ahead = AheadOf(units, counted)) ahead_units_.fetch_sub(ahead, std::memory_order_relaxed);
    page_heap_.Free(start, units);
    return true;
  }
  pages_.fetch_sub(used, std::memory_order_relaxed);
  mapped_pages_.fetch_sub(mapped, std::memory_order_relaxed);
  slack_pages_.fetch_sub(slack, std::memory_order_relaxed);
  // If the address space cannot unmap for want of metadata, the memory goes back to the kernel all the same,
  // and the addresses are lost.
  if (!space_.Unmap(range).ok()) static_cast<void>(space_.Discard({&range, 1}));
  return true;
}

bool LargeObjects::Resize(Span* span, std::size_t size) {
  if (!CanServe(size)) return false;
  const std::uint32_t pages = std::max<std::uint32_t>(PagesOf(size), 1);
  if (pages == span->used_pages) return true;
  return span->kind.load(std::memory_order_relaxed) == SpanKind::kRun ? ResizeRun(span, pages)
                                                                      : ResizeMapped(span, pages);
}

bool LargeObjects::ResizeRun(Span* span, std::uint32_t pages) {
  const std::uint32_t before = span->units;
  const std::uint32_t units = UnitsOf(pages);
  if (units > before) {
    if (units > kMaxRunUnits || !GrowRun(span, units)) return false;
  } else if (units < before) {
    page_heap_.Free(span->start + units * kUnitSize, before - units);
    span->units = units;
  }
  // Modulo 2^64, so that differences may be negative.
  ahead_units_.fetch_add(std::uint64_t{AheadOf(span->units, pages)} - AheadOf(before, span->counted_pages),
                         std::memory_order_relaxed);
  pages_.fetch_add(std::uint64_t{pages} - span->counted_pages, std::memory_order_relaxed);
  span->used_pages = pages;
  span->counted_pages = pages;
  return true;
}

bool LargeObjects::GrowRun(Span* span, std::uint32_t units) {
  const std::uint32_t before = span->units;
  const std::uint32_t most = std::max(units, std::min(before * kGrowth, kMaxRunUnits));
  const std::uint32_t taken = page_heap_.Extend(span->start, before, units - before,
                                                (MayTakeAhead(most - units) ? most : units) - before);
  if (taken == 0) return false;
  MarkInterior(metadata_.spans(), span, before, before + taken);
  span->units = before + taken;
  return true;
}

std::uint32_t LargeObjects::AheadOf(std::uint32_t units, std::uint32_t pages) {
  return pages < PagesOf(kSmallRunSize) ? units : units - UnitsOf(pages);
}

bool LargeObjects::BelongsInHugePages(const Span* span, std::size_t size) const {
  if (span->kind.load(std::memory_order_relaxed) != SpanKind::kMapped || size > kMaxSize) return false;
  const std::uint32_t pages = PagesOf(size);
  if (span->used_pages >= kMinHugePages || pages < kMinHugePages || HasHugePages(span->start)) return false;
  if (!space_.kernel().features().huge_pages) return false;
  return Admission(limit_, vm::Pages{RoundUp(pages, vm::kPagesPerHugePage)}.bytes()).granted();
}

bool LargeObjects::HasHugePages(std::uintptr_t start) const {
  return space_.ZoneAt(vm::PageNumber::Of(reinterpret_cast<void*>(start))) == vm::Zone::kDense;
}

// Mappings begin at units, so what would be left of their last ones would be of no use, and keep what is free beside it
// from being one with what is free behind.
std::uint32_t LargeObjects::WholePages(std::uintptr_t start, std::uint32_t pages) const {
  const std::uintptr_t end = start + (std::uintptr_t{pages} << vm::kPageShift);
  const std::uintptr_t whole = RoundUp(end, HasHugePages(start) ? vm::kHugePageSize : kUnitSize);
  return static_cast<std::uint32_t>((whole - start) >> vm::kPageShift);
}

std::uint32_t LargeObjects::ResidentPages(const Span* span) const {
  return std::min(span->mapped_pages, WholePages(span->start, span->used_pages));
}

bool LargeObjects::ResizeMapped(Span* span, std::uint32_t pages) {
  const std::uint32_t used = span->used_pages;
  const std::uint32_t mapped = span->mapped_pages;
  const std::uint32_t slack = SlackOf(span);
  const std::uint32_t needed = WholePages(span->start, pages);
  const std::uint32_t resident = mapped - slack;
  const Admission admission(needed > resident ? limit_ : nullptr, vm::Pages{needed - resident}.bytes());
  if (!admission.granted()) return false;
  if (pages > mapped) {
    const vm::PageRange more = RangeOf(span, mapped, needed);
    const vm::Result<vm::PageRange> grown =
        space_.Map(more.count(), {.placement = vm::Placement::kFixed,
                                  .address = more.address(),
                                  .content = vm::Content::kAnything});
    if (!grown.ok()) return false;
    span->mapped_pages = needed;
  } else if (pages < used && needed < mapped) {
    if (!space_.Unmap(RangeOf(span, needed, mapped)).ok()) return true;  // as it was, which is large enough
    span->mapped_pages = needed;
  }
  span->used_pages = pages;
  mapped_pages_.fetch_add(std::uint64_t{span->mapped_pages} - mapped, std::memory_order_relaxed);
  slack_pages_.fetch_add(std::uint64_t{SlackOf(span)} - slack, std::memory_order_relaxed);
  pages_.fetch_add(std::uint64_t{pages} - used, std::memory_order_relaxed);
  return true;
}

}  // namespace freehold::allocator
