#include "vm/pager_backing.h"

#include <algorithm>
#include <cerrno>
#include <new>

#include "vm/fault.h"
#include "vm/os/check.h"

namespace freehold::vm {
namespace {

constexpr std::uint64_t kCluster = kClusterPages.value;

// A user's code may throw, and nothing above these frames expects it.
template <typename Call>
auto CatchAll(Call call) -> decltype(call()) {
  try {
    return call();
  } catch (...) {
    return Error{ErrorCode::kThrew};
  }
}

}  // namespace

Bytes PagerBacking::HeaderSize() { return PagesFor({sizeof(PagerBacking)}).bytes(); }

//   | PagerBacking | present | dirty |       memory of its own, of which only what is used becomes resident
Result<PagerBacking*> PagerBacking::Create(FaultService& service, Pager& pager, std::uint64_t pager_page,
                                           Pages capacity, const Options& options) {
  const Bytes bitmap = PageBitmap::SizeFor(capacity);
  const Pages pages = PagesFor(HeaderSize() + bitmap + bitmap);
  const Result<PageRange> memory = service.kernel_.Reserve(pages, {1});
  if (!memory.ok()) return memory.error();
  if (const Error error = service.kernel_.Protect(*memory, os::Protection::kReadWrite); !error.ok()) {
    (void)service.kernel_.Release(*memory);
    return error;
  }
  service.backings_.fetch_add(1, std::memory_order_acquire);
  return new (memory->address()) PagerBacking(service, pager, pager_page, capacity, options, *memory);
}

PagerBacking::PagerBacking(FaultService& service, Pager& pager, std::uint64_t pager_page, Pages capacity,
                           const Options& options, PageRange memory)
    : Backing(options.max_protection, Paging::kOnDemand),
      service_(service),
      pager_(pager),
      pager_page_(pager_page),
      capacity_(capacity),
      options_(options),
      memory_(memory),
      present_(memory.address() + HeaderSize().value),
      dirty_(memory.address() + HeaderSize().value + PageBitmap::SizeFor(capacity).value) {
  deferred_.backing = this;
}

void PagerBacking::Unpin() {
  if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) Destroy();
}

void PagerBacking::Destroy() {
  if (announced_.load(std::memory_order_relaxed)) {
    (void)CatchAll([&]() -> Error {
      pager_.Release(pager_page_, capacity_);
      return Error::Ok();
    });
  }
  os::Kernel& kernel = service_.kernel_;
  std::atomic<std::uint64_t>& backings = service_.backings_;
  const PageRange memory = memory_;
  this->~PagerBacking();
  // Release: pairs with the acquires of the service's end, and of who gets the same memory in Create.
  backings.fetch_sub(1, std::memory_order_release);
  (void)kernel.Release(memory);
}

// Those that came by a lookup before may still pin it.
void PagerBacking::OnUnused() {
  if (service_.dead_.load(std::memory_order_relaxed)) return;
  service_.space_.epochs().Defer(&deferred_, [](sync::DeferredCallback* node) {
    static_cast<Deferred*>(node)->backing->Unpin();
  });
}

Error PagerBacking::Install(os::Kernel& kernel, PageRange range, std::uint64_t page, os::Protection protection,
                            bool /*occupied*/) {
  if (service_.dead_.load(std::memory_order_relaxed)) return {ErrorCode::kUnsupported};
  if (page + range.count().value > capacity_.value) return {ErrorCode::kNoRoom};
  // Filled once: MapPager's first mapping, which is all of it.
  if (filling() == Filling::kAtMap && announced_.load(std::memory_order_relaxed)) return {ErrorCode::kUnsupported};
  present_.Clear(page, page + range.count().value);
  dirty_.Clear(page, page + range.count().value);
  if (const Error error = kernel.Reset(range); !error.ok()) return error;
  // Before anybody can touch it: the kernel would make a page of zeroes.
  if (filling() == Filling::kOnFault) {
    const os::WriteTracking tracking = tracks_writes() ? os::WriteTracking::kOn : os::WriteTracking::kOff;
    if (const Error error = service_.userfault_.Register(range, tracking); !error.ok()) return error;
  }
  const os::Protection access = filling() == Filling::kAtMap ? os::Protection::kReadWrite : protection;
  return access == os::Protection::kNone ? Error::Ok() : kernel.Protect(range, access);
}

// Under the range: the pager is not called here, since its code may want the space. What is found is copied, and handed
// over at the verb's end (FaultService::AfterDrop). It is little: BeforeDrop has written back what there was.
void PagerBacking::Flush(os::Kernel& /*kernel*/, PageRange range, std::uint64_t page) {
  if (service_.dead_.load(std::memory_order_relaxed)) return;
  service_.SaveDirty(*this, range, {page, page + range.count().value});
}

Result<Pages> PagerBacking::Read(std::uint64_t page, absl::Span<std::byte> into) {
  const Result<Pages> read =
      CatchAll([&]() -> Result<Pages> { return pager_.Read(pager_page_ + page, into); });
  if (!read.ok()) return read;
  const Pages asked = {into.size() / kPageSize};
  if (read->value == 0) return Error::System(EIO);
  return Pages{std::min(read->value, asked.value)};
}

Error PagerBacking::Writeback(std::uint64_t page, absl::Span<const std::byte> from) {
  return CatchAll([&]() -> Error { return pager_.Writeback(pager_page_ + page, from); });
}

PageSpan PagerBacking::NextDirty(std::uint64_t first, std::uint64_t end) const {
  if (!Has(max_protection(), os::Protection::kWrite)) return {end, end};
  const PageBitmap& written = tracks_writes() ? dirty_ : present_;
  std::uint64_t from = written.FindSet(first, end);
  while (from < end && !present_.Test(from)) from = written.FindSet(from + 1, end);
  if (from == end) return {end, end};
  // Never nothing, though bits change meanwhile: that would look like the end.
  return {from, std::min(written.FindClear(from + 1, end), present_.FindClear(from + 1, end))};
}

PageSpan PagerBacking::AbsentAround(std::uint64_t page, PageSpan bounds, std::uint64_t max_pages) const {
  PageSpan absent = {page, present_.FindSet(page + 1, std::min(bounds.end, page + max_pages))};
  const std::uint64_t lowest = std::max(bounds.first, page / kCluster * kCluster);
  while (absent.first > lowest && !present_.Test(absent.first - 1)) --absent.first;
  return absent;
}

PageSpan PagerBacking::ChooseWindow(std::uint64_t page, PageSpan bounds, std::uint64_t max_pages) {
  Stream* stream = &streams_[0];
  bool forward = false;
  for (Stream& candidate : streams_) {
    // A little further than where it ended: it may have skipped what was in memory.
    forward = candidate.next <= page && page < candidate.next + candidate.length;
    if (forward || candidate.used < stream->used) stream = &candidate;
    if (forward) break;
  }
  PageSpan window;
  if (forward) {
    stream->length = std::min(stream->length * 2, max_pages);
    window.first = page;
  } else {
    stream->length = kCluster;
    window.first = page / kCluster * kCluster;
  }
  window.end = std::min(window.first + stream->length, bounds.end);
  window.first = std::max(window.first, bounds.first);
  stream->next = window.end;
  stream->used = ++uses_;
  return window;
}

}  // namespace freehold::vm
