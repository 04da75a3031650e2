#include "tests/vm/space_operations.h"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <functional>
#include <numeric>
#include <random>
#include <string_view>
#include <type_traits>
#include <utility>

#include "vm/os/fake_kernel.h"
#include "vm/transaction.h"

// Of the sanitizers' run time, if there is one.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace freehold::vm::test {
namespace {

using os::MemoryLock;
using os::Protection;

Protection ProtectionOf(std::uint8_t choice) {
  static constexpr Protection kChoices[] = {Protection::kReadWrite, Protection::kRead,     Protection::kNone,
                                            Protection::kReadWrite, Protection::kReadExec, Protection::kReadWriteExec,
                                            Protection::kReadWrite, Protection::kReadWrite};
  return kChoices[choice % 8];
}

template <typename Visit>
void ForEachPage(PageRange range, const Visit& visit) {
  for (PageNumber page = range.first; page < range.end; page = page + Pages{1}) visit(page);
}

// Calls `change` for the part of `range` in each region until one is refused.
template <typename Change>
Error ByRegion(SpaceModel& model, PageRange range, const Change& change) {
  for (PageNumber page = range.first; page < range.end;) {
    const PageRange part = range.Intersect(model.RegionOf(page));
    if (const Error error = change(part); !error.ok()) return error;
    page = part.end;
  }
  return Error::Ok();
}

// What comes of a mapping that was made at `range`: nothing to us if it came among shared pages. True if it is ours.
bool Keep(SpaceModel& model, PageRange range) {
  if (model.alone() || !model.shared()->IsOpen(range)) return true;
  model.Expect("Unmap", model.space().Unmap(range), ErrorCode::kOk);
  return false;
}

// Of backings, files and pagers: 0 is none, and so is what is above them.
FilePages* BackingOf(SpaceModel& model, std::uint8_t number) {
  return number >= 1 && number <= SpaceModel::kBackings ? &model.backing(number - 1) : nullptr;
}

bool IsFixed(Placement placement) { return placement == Placement::kFixed || placement == Placement::kReplace; }

// A mapping to be made.
struct NewMapping {
  const char* verb;
  PageRange range;
  Placement placement;
  std::size_t alignment = 1;
  bool in_mapping_zone = true;         // where a hint is followed
  ErrorCode refusal = ErrorCode::kOk;  // due wherever it goes
  SpaceModel::Page page;               // the first, but for what a lookup says
  std::function<Result<PageRange>()> map;
};

// What the space may say, if the mapping's range and what is there are all that matters.
ErrorCode RefusalOf(SpaceModel& model, const NewMapping& wanted, SpaceModel::Pinned pinned) {
  if (wanted.refusal != ErrorCode::kOk) return wanted.refusal;
  if (!IsFixed(wanted.placement)) return ErrorCode::kOk;
  if (!model.InOneRegion(wanted.range)) return ErrorCode::kOutsideReservation;
  if (wanted.placement == Placement::kFixed && !model.IsFree(wanted.range)) return ErrorCode::kOverlap;
  return pinned == SpaceModel::Pinned::kYes ? ErrorCode::kPinned : ErrorCode::kOk;
}

// Whether anonymous memory that is to replace `range`, and is refused, may have taken content away: of a backing there,
// or of what lies beside one. In free memory there may be what a window, or a failure, has left.
bool MayLose(SpaceModel& model, PageRange range) {
  const bool leftovers = model.had_failures() || model.windows().back().Overlaps(range);
  bool backed = leftovers && !model.IsMapped(range);
  ForEachPage(range, [&](PageNumber page) {
    const SpaceModel::Page* old = model.Find(page);
    backed = backed || (old != nullptr && !old->anonymous());
  });
  return backed;
}

// Where it is now; nothing if it was refused, as it should be, or went where it is nobody's.
PageRange Make(SpaceModel& model, const NewMapping& wanted) {
  using Pinned = SpaceModel::Pinned;
  const PageRange range = wanted.range;
  const bool fixed = IsFixed(wanted.placement);
  const bool locks = wanted.page.lock != MemoryLock::kNone;
  const Pinned pinned = fixed ? model.PinnedIn(range) : Pinned::kNo;
  const ErrorCode want = RefusalOf(model, wanted, pinned);
  const bool loses = wanted.placement == Placement::kReplace && (!wanted.page.anonymous() || MayLose(model, range));
  Result<PageRange> mapped = ErrorCode::kNoRoom;
  const auto tolerate = [&] {
    if (loses) model.SetLost(range);
  };
  const Error error = model.Call(
      [&] {
        mapped = wanted.map();
        return mapped.error();
      },
      tolerate);
  if (error.code == ErrorCode::kSystem) tolerate();
  if (!error.ok()) model.UnmapLost(range);
  if (locks && want == ErrorCode::kOk && IsLockLimit(error)) return {};
  // Both may be true of the range.
  if (error.code == ErrorCode::kPinned && want == ErrorCode::kOverlap && pinned == Pinned::kYes) return {};
  if (error.code == ErrorCode::kPinned && wanted.refusal == ErrorCode::kOk && pinned == Pinned::kMaybe) return {};
  const bool taken = !model.alone() && wanted.placement == Placement::kFixed && wanted.refusal == ErrorCode::kOk &&
                     (error.code == ErrorCode::kOverlap || error.code == ErrorCode::kPinned);
  if (taken && want != ErrorCode::kOutsideReservation) return {};
  if (!model.Expect(wanted.verb, error, want) || !error.ok()) return {};

  const std::string verb = wanted.verb;
  if (wanted.placement == Placement::kHint && model.alone()) {
    const bool fits = wanted.in_mapping_zone == model.windows().back().Contains(range.first) &&
                      model.InOneRegion(range) && model.IsFree(range) && model.PinnedIn(range) == Pinned::kNo;
    model.Expect(!fits || *mapped == range, verb + ": the hint was not followed");
  }
  model.Expect(!fixed || *mapped == range, verb + ": not at the fixed range");
  model.Expect(mapped->count() == range.count(), verb + ": wrong size");
  model.Expect(mapped->first.value % wanted.alignment == 0, verb + ": not aligned");
  if (!Keep(model, *mapped)) return {};
  model.Expect(wanted.placement == Placement::kReplace || model.IsFree(*mapped), verb + ": handed out mapped pages");
  model.Expect(model.PinnedIn(*mapped) != Pinned::kYes, verb + ": handed out pinned pages");
  const Result<VmaInfo> vma = model.space().Lookup(mapped->first);
  if (!model.Expect("Lookup", vma.error(), ErrorCode::kOk)) return {};
  model.Expect(model.IsNew(vma->generation), verb + ": a generation that was there before");
  model.Expect((vma->backing == nullptr) == wanted.page.anonymous(), verb + ": a backing, or none");
  SpaceModel::Page page = wanted.page;
  page.generation = vma->generation;
  page.backing = vma->backing;
  ForEachPage(*mapped, [&](PageNumber number) {
    if (page.Is(Source::Kind::kPager)) page.stamp = page.source->StampOf(page.source_page);
    model.Put(number, page);
    if (!page.anonymous()) ++page.source_page;
  });
  return *mapped;
}

// Maps `range.count()` pages of `file`, as `options` say.
PageRange MakeFile(SpaceModel& model, const StampedFile& file, const FileMapOptions& options, PageRange range) {
  const bool is_private = options.sharing == os::Sharing::kPrivate;
  NewMapping wanted = {.verb = "MapFile", .range = range, .placement = options.placement, .page = {}, .map = {}};
  wanted.page = {.protection = options.protection,
                 .lock = options.lock != MemoryLock::kNone ? options.lock : model.future_lock,
                 .source = const_cast<StampedFile*>(&file),
                 .source_page = options.offset.value / kPageSize,
                 .max_protection = is_private || file.may_write() ? Protection::kReadWriteExec : Protection::kReadExec,
                 .sharing = options.sharing};
  if (!wanted.page.Allows(options.protection)) wanted.refusal = ErrorCode::kDenied;
  wanted.map = [&] { return model.space().MapFile(range.count(), options); };
  const PageRange mapped = Make(model, wanted);
  if (mapped.empty()) return mapped;
  model.StartMapping(model.Find(mapped.first)->backing,
                     !(is_private && Writable(options.protection)) && wanted.page.lock == MemoryLock::kNone);
  if (options.populate || wanted.page.lock == MemoryLock::kLocked) model.SetPopulated(mapped, /*all=*/false);
  return mapped;
}

// The kernel reads and writes for us: it is refused where we would be killed.
bool Transfer(bool write, PageNumber page, std::uint64_t& word) {
  iovec here = {&word, sizeof word};
  iovec there = {page.address(), sizeof word};
  const ssize_t done =
      write ? process_vm_writev(getpid(), &here, 1, &there, 1, 0) : process_vm_readv(getpid(), &here, 1, &there, 1, 0);
  return done == sizeof word;
}

}  // namespace

// ---- Span ----

std::size_t Span::Count() const {
  if (size < 96) return 1 + size % 8;
  if (size < 240) return 1 + size % 48;
  return 65 + 4 * (size - std::size_t{240});  // more than FreeRanges::kExactPages
}

PageRange Span::Window(SpaceModel& model) const {
  const PageRange window = model.windows()[where % model.windows().size()];
  const PageRange range = PageRange::Of(window.first + Pages{page % SpaceModel::kWindowPages}, {Count()});
  return range.Intersect(window);
}

PageRange Span::Range(SpaceModel& model) const {
  if (model.alone() && where < kMapped) return Window(model);
  auto& pages = model.pages();
  if (pages.empty()) return model.alone() ? Window(model) : PageRange{};
  const PageNumber first = {std::next(pages.begin(), static_cast<std::ptrdiff_t>(page % pages.size()))->first};
  if (where == kVma) return model.VmaOf(first);
  PageRange range = PageRange::Of(first, {Count()}).Intersect(model.RegionOf(first));
  if (model.alone()) return range;
  const PageRange wanted = range;
  range.end = range.first;
  while (range.end < wanted.end && model.Find(range.end) != nullptr) range.end = range.end + Pages{1};
  return range;
}

// ---- Map ----

void Map::Perform(SpaceModel& model) const {
  PageRange range = span.Window(model);
  if (!model.alone() && placement == Placement::kReplace) range = span.Range(model);
  if (range.empty() || !model.HasRoomFor(range.count().value)) return;
  FilePages* const shown = BackingOf(model, backing);
  MapOptions options;
  options.placement = placement;
  options.address = range.address();
  if (placement == Placement::kAnywhere) options.alignment = {std::size_t{1} << alignment};
  options.protection = ProtectionOf(protection);
  options.content = content;
  options.huge_pages = huge_pages ? os::HugePages::kPrefer : os::HugePages::kAvoid;
  options.populate = populate;
  options.lock = lock;
  options.backing = shown;
  options.backing_page = backing_page;
  NewMapping wanted = {.verb = "Map", .range = range, .placement = placement, .page = {}, .map = {}};
  wanted.alignment = options.alignment.value;
  wanted.in_mapping_zone = options.protection != Protection::kReadWrite || shown != nullptr;
  wanted.page = {.protection = options.protection,
                 .lock = lock != MemoryLock::kNone ? lock : model.future_lock,
                 .source = shown,
                 .known = content == Content::kZeroed};
  if (shown != nullptr) {
    wanted.page.source_page = backing_page;
    wanted.page.max_protection = shown->max_protection();
    if (!wanted.page.Allows(options.protection)) wanted.refusal = ErrorCode::kDenied;
  }
  wanted.map = [&] { return model.space().Map(range.count(), options); };
  (void)Make(model, wanted);
}

// ---- Files ----

void MapFile::Perform(SpaceModel& model) const {
  PageRange range = span.Window(model);
  if (!model.alone() && placement == Placement::kReplace) range = span.Range(model);
  const std::uint64_t first = page % StampedFile::kMaxPages;
  range.end = std::min(range.end, range.first + Pages{StampedFile::kMaxPages - first});
  if (range.empty() || !model.HasRoomFor(range.count().value)) return;
  (void)MakeFile(model, model.file(file % SpaceModel::kFiles),
                 {.descriptor = model.file(file % SpaceModel::kFiles).descriptor(),
                  .offset = Pages{first}.bytes(),
                  .sharing = sharing,
                  .protection = ProtectionOf(protection),
                  .placement = placement,
                  .address = range.address(),
                  .populate = populate,
                  .lock = lock},
                 range);
}

void Reopen::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  if (range.empty()) return;
  const SpaceModel::Page* found = model.Find(range.first);
  if (found == nullptr || !found->Is(Source::Kind::kFile)) return;
  const SpaceModel::Page page = *found;
  const PageRange vma = model.VmaOf(range.first);
  const std::uint64_t first = page.source_page - (range.first - vma.first).value;
  const Error error = model.Call([&] { return model.space().Unmap(vma); });
  if (!model.Expect("Unmap", error, ErrorCode::kOk)) return;
  model.Erase(vma);
  auto& file = *static_cast<StampedFile*>(page.source);
  (void)MakeFile(model, file,
                 {.descriptor = file.descriptor(),
                  .offset = Pages{first}.bytes(),
                  .sharing = page.sharing,
                  .protection = page.protection},
                 vma);
}

void ResizeFile::Perform(SpaceModel& model) const {
  StampedFile& resized = model.file(file % SpaceModel::kFiles);
  if (!model.IsShared(resized)) model.ResizeFile(resized, pages % (StampedFile::kMaxPages + 1));
}

void WriteFile::Perform(SpaceModel& model) const {
  StampedFile& written = model.file(file % SpaceModel::kFiles);
  if (model.IsShared(written)) return;
  for (std::uint64_t i = 0; i < 1 + count % 8u; ++i) model.WriteFile(written, (page + i) % StampedFile::kMaxPages);
}

void Sync::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  if (range.empty()) return;
  // Disks take their time.
  const os::SyncOptions options = {.wait = choice % 16 == 0, .invalidate = choice / 16 % 4 == 0};
  Error want;
  bool hole = false;
  ForEachPage(range, [&](PageNumber number) {
    const SpaceModel::Page* known = model.Find(number);
    hole = hole || known == nullptr;
    const bool locked_file =
        known != nullptr && known->Is(Source::Kind::kFile) && known->lock != MemoryLock::kNone;
    if (locked_file && options.invalidate) want = Error::System(EBUSY);
  });
  if (want.ok() && hole) want = {ErrorCode::kNotMapped};
  const Error error = model.Call([&] { return model.space().Sync(range, options); });
  if (error == Error::System(EBUSY) && model.KernelMayDiffer(range)) return;
  model.Expect("Sync", error, want);
}

// ---- Pagers ----

void MapPager::Perform(SpaceModel& model) const {
  FaultService* const faults = model.faults();
  if (faults == nullptr) return;
  Span at = span;
  // Elsewhere they are refused.
  if (page_limit % 16 != 0) at.where = static_cast<std::uint8_t>(model.windows().size() - 1);
  PageRange range = at.Window(model);
  if (!model.alone() && placement == Placement::kReplace) range = span.Range(model);
  if (range.empty() || !model.HasRoomFor(range.count().value)) return;
  static constexpr Protection kLimits[] = {Protection::kReadWrite, Protection::kReadWriteExec, Protection::kReadWrite,
                                           Protection::kRead};
  PagerMapOptions options;
  options.placement = placement;
  options.address = range.address();
  options.protection = ProtectionOf(protection);
  options.max_protection = kLimits[limit % 4];
  options.capacity = range.count() + Pages{page_limit % std::size_t{32}};
  StampedPager& pager = model.NewPager(options.capacity.value);
  NewMapping wanted = {.verb = "MapPager", .range = range, .placement = placement, .page = {}, .map = {}};
  wanted.page = {.protection = options.protection,
                 .lock = model.future_lock,
                 .source = &pager,
                 .max_protection = options.max_protection};
  if (placement != Placement::kAnywhere && range.first < model.RegionOf(model.windows().back().first).first) {
    wanted.refusal = ErrorCode::kOutsideReservation;
  } else if (!wanted.page.Allows(options.protection)) {
    wanted.refusal = ErrorCode::kDenied;
  }
  // It is told of the end whatever has become of the mapping by now.
  Result<PageRange> mapped = ErrorCode::kNoRoom;
  wanted.map = [&] {
    mapped = faults->MapPager(pager, StampedPager::kFirst, range.count(), options);
    return mapped;
  };
  (void)Make(model, wanted);
  if (mapped.ok()) pager.SetMapped();
}

void HandBack::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  FaultService* const faults = model.faults();
  if (range.empty() || faults == nullptr) return;
  // The first error counts, but all of the range is worked on.
  Error want;
  bool perhaps_refused = false;
  ForEachPage(range, [&](PageNumber number) {
    const SpaceModel::Page* page = model.Find(number);
    Error refusal;
    if (page == nullptr) {
      refusal = {ErrorCode::kNotMapped};
    } else if (page->Is(Source::Kind::kPager) && verb != Verb::kInvalidate &&
               static_cast<StampedPager*>(page->source)->refusing()) {
      perhaps_refused = true;
      const bool written = page->Exists() && page->stamp != page->source->StampOf(page->source_page);
      if (written) refusal = Error::System(ENOSPC);
    }
    if (want.ok()) want = refusal;
  });
  model.BeginAnnouncements();
  const Error error = model.Call(
      [&] {
        switch (verb) {
          case Verb::kWriteback: return faults->Writeback(range);
          case Verb::kEvict: return faults->Evict(range);
          case Verb::kInvalidate: return faults->Invalidate(range);
        }
        return Error::Ok();
      },
      [&] {
        if (verb == Verb::kInvalidate) model.SetInvalidated(range, /*all=*/false);
      });
  ForEachPage(range, [&](PageNumber number) {
    const SpaceModel::Page* page = model.Find(number);
    const bool dropped = verb != Verb::kWriteback && page != nullptr && page->Is(Source::Kind::kPager);
    if (dropped) model.ExpectAnnounced(PageRange::Of(number, {1}), Invalidation::kDiscard);
  });
  // What is lost because of a refusal is no longer what the pager has.
  if (!perhaps_refused) model.Expect("Writeback, Evict or Invalidate", error, want);
  if (perhaps_refused && !want.ok()) model.Expect(!error.ok(), "a refused write-back was not reported");
  if (verb == Verb::kInvalidate) return model.SetInvalidated(range, /*all=*/true);
  ForEachPage(range, [&](PageNumber number) {
    if (const SpaceModel::Page* page = model.Find(number)) model.CheckWrittenBack(number, *page);
  });
}

void OrderPager::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  FaultService* const faults = model.faults();
  if (range.empty() || faults == nullptr) return;
  ForEachPage(range, [&](PageNumber number) {
    SpaceModel::Page* page = model.Find(number);
    if (page == nullptr || !page->Is(Source::Kind::kPager)) return;
    auto& pager = *static_cast<StampedPager*>(page->source);
    const PageRange one = PageRange::Of(number, {1});
    switch (order) {
      case Order::kFail:
      case Order::kFailAndTouch: {
        pager.SetFailing(page->source_page, true);
        model.Expect("Invalidate", faults->Invalidate(one), ErrorCode::kOk);
        std::uint64_t word;
        // Each makes a line on standard error.
        if (order == Order::kFailAndTouch && number == range.first && Readable(page->protection)) {
          model.Expect(!Transfer(false, number, word), "what a pager cannot read was read");
        }
        break;
      }
      case Order::kMend:
        if (page->Exists()) return;
        pager.SetFailing(page->source_page, false);
        model.Expect("Evict", faults->Evict(one), ErrorCode::kOk);
        break;
      case Order::kChange:
        pager.SetStamp(page->source_page, kFileStamp | model.NewStamp());
        model.Expect("Invalidate", faults->Invalidate(one), ErrorCode::kOk);
        break;
      case Order::kRefuse: return pager.SetRefusing(true);
      case Order::kAccept: return pager.SetRefusing(false);
    }
    model.SetInvalidated(one, /*all=*/true);
  });
}

// ---- Unmap, Protect ----

void Unmap::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  if (range.empty()) return;
  // By region, so that a failure leaves nothing half done.
  (void)ByRegion(model, range, [&](PageRange part) {
    const Error error = model.Call([&] { return model.space().Unmap(part); });
    if (model.Expect("Unmap", error, ErrorCode::kOk)) model.Erase(part);
    return Error::Ok();
  });
}

void Protect::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  if (range.empty()) return;
  const Protection wanted = ProtectionOf(protection);
  model.BeginAnnouncements();
  const auto verb = [&] { return model.space().Protect(range, wanted); };
  const Error error = model.InOneRegion(range) ? model.Call(verb) : verb();
  const Error want = ByRegion(model, range, [&](PageRange part) {
    for (PageNumber page = part.first; page < part.end; page = page + Pages{1}) {
      const SpaceModel::Page* known = model.Find(page);
      if (known == nullptr) return Error{ErrorCode::kNotMapped};
      if (!known->Allows(wanted)) return Error{ErrorCode::kDenied};
    }
    if (Writable(wanted)) model.NoteWritable(part, /*done=*/error.ok());
    ForEachPage(part, [&](PageNumber page) {
      SpaceModel::Page& known = *model.Find(page);
      if (known.protection != wanted) model.ExpectAnnounced(PageRange::Of(page, {1}), Invalidation::kProtect);
      known.protection = wanted;
    });
    return Error::Ok();
  });
  model.Expect("Protect", error, want);
}

// ---- Content ----

void Advise::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  if (range.empty()) return;
  const bool hint = advice == Advice::kWillNeed || advice == Advice::kHugePages || advice == Advice::kNoHugePages;
  const bool drops = advice == Advice::kDontNeed || advice == Advice::kFree;
  // It ends at the first VMA that is refused: locked, a file's that cannot be freed, or a pager's.
  PageNumber end = range.first;
  bool hole = false;
  Error refusal;
  for (; end < range.end; end = end + Pages{1}) {
    const SpaceModel::Page* page = model.Find(end);
    hole = hole || page == nullptr;
    if (page == nullptr || hint) continue;
    if (page->lock != MemoryLock::kNone) {
      refusal = Error::System(EINVAL);
    } else if (drops && page->Is(Source::Kind::kPager)) {
      refusal = {ErrorCode::kUnsupported};
    } else if (advice == Advice::kFree && !page->anonymous()) {
      refusal = Error::System(EINVAL);
    }
    if (!refusal.ok()) break;
  }
  if (refusal.ok() && hole) refusal = {ErrorCode::kNotMapped};
  const PageRange advised = {range.first, end};
  model.BeginAnnouncements();
  const Error error = model.Call([&] { return model.space().Advise(range, advice); },
                                 [&] {
                                   if (drops) model.SetUnknown(advised);
                                 });
  model.Expect("Advise", error, refusal);
  if (drops) model.ExpectAnnounced(advised, Invalidation::kDiscard);
  if (advice == Advice::kDontNeed) model.SetDropped(advised);
  if (advice == Advice::kFree) model.SetUnknown(advised);
  if (advice == Advice::kWillNeed) model.SetPopulated(range, /*all=*/false);
}

void Discard::Perform(SpaceModel& model) const {
  std::vector<PageRange> ranges;
  ErrorCode want = ErrorCode::kOk;
  for (const Span& span : {first, second}) {
    const PageRange range = span.Range(model);
    if (range.empty()) return;
    ranges.push_back(range);
    if (want != ErrorCode::kOk) continue;
    if (!model.InOneRegion(range)) {
      want = ErrorCode::kOutsideReservation;
      continue;
    }
    ForEachPage(range, [&](PageNumber number) {
      const SpaceModel::Page* page = model.Find(number);
      if (want != ErrorCode::kOk || (page != nullptr && !page->Is(Source::Kind::kPager))) return;
      want = page == nullptr ? ErrorCode::kNotMapped : ErrorCode::kUnsupported;
    });
  }
  model.BeginAnnouncements();
  const Error error = model.Call([&] { return model.space().Discard(ranges); },
                                 [&] {
                                   if (want != ErrorCode::kOk) return;
                                   for (const PageRange range : ranges) model.SetUnknown(range);
                                 });
  if (!model.Expect("Discard", error, want) || !error.ok()) return;
  for (const PageRange range : ranges) {
    model.ExpectAnnounced(range, Invalidation::kDiscard);
    model.SetDropped(range);
  }
}

void Write::Perform(SpaceModel& model) const { model.Write(span.Range(model)); }

void Lookup::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  ForEachPage(range, [&](PageNumber number) {
    const SpaceModel::Page* page = model.Find(number);
    if (page != nullptr) return model.CheckPage(number, *page, SpaceModel::Depth::kContent);
    model.Expect("Lookup", model.space().Lookup(number).error(), ErrorCode::kNotMapped);
  });
}

void Probe::Perform(SpaceModel& model) const {
  PageRange range = span.Range(model);
  range.end = std::min(range.end, range.first + Pages{8});
  ForEachPage(range, [&](PageNumber number) {
    const SpaceModel::Page* page = model.Find(number);
    if (page == nullptr || page->lost || model.KernelMayDiffer(PageRange::Of(number, {1}))) return;
    // Where the kernel's own faults do not come to the service, it is refused what a program is not.
    if (page->Is(Source::Kind::kPager) && page->Exists()) return;
    std::uint64_t word = 0;
    const bool read = Transfer(false, number, word);
    const std::string name = "page " + Hex(PageRange::Of(number, {1}));
    model.Expect(read == (Readable(page->protection) && page->Exists()), name + ": wrong access");
    model.Expect(!read || page->MayHold(word), name + ": wrong content for the kernel");
    if (Writable(page->protection) && page->Exists()) return;
    model.Expect(!Transfer(true, number, word), name + ": can be written to");
  });
}

void Residency::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  if (range.empty()) return;
  std::vector<std::uint8_t> resident(range.count().value, 2);
  const Error error = model.Call([&] { return model.space().Residency(range, absl::MakeSpan(resident)); });
  const bool mapped = model.IsMapped(range);
  if (!model.Expect("Residency", error, mapped ? ErrorCode::kOk : ErrorCode::kNotMapped) || !mapped) return;
  model.Expect(*std::max_element(resident.begin(), resident.end()) <= 1, "Residency: neither 0 nor 1");
}

namespace {

// What Populate says of the first of the mapped pages in `range` that it cannot make present.
Error PopulateEnds(SpaceModel& model, PageRange range) {
  for (PageNumber number = range.first; number < range.end; number = number + Pages{1}) {
    const SpaceModel::Page& page = *model.Find(number);
    if (page.Is(Source::Kind::kBacking) && !Writable(page.protection)) return {ErrorCode::kUnsupported};
    if (page.Is(Source::Kind::kFile) && !Readable(page.protection)) return {ErrorCode::kUnsupported};
    if (page.Is(Source::Kind::kFile) && !page.Exists()) return Error::System(EFAULT);
    if (page.Is(Source::Kind::kPager) && !page.Exists()) return Error::System(EIO);
  }
  return Error::Ok();
}

}  // namespace

void Populate::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  if (range.empty()) return;
  ErrorCode want = ErrorCode::kOk;
  for (PageNumber page = range.first; page < range.end && want == ErrorCode::kOk; page = page + Pages{1}) {
    const SpaceModel::Page* known = model.Find(page);
    if (known == nullptr) {
      want = ErrorCode::kNotMapped;
    } else if (known->anonymous() && !Writable(known->protection)) {
      want = ErrorCode::kUnsupported;
    }
  }
  const Error stopped = want == ErrorCode::kOk ? PopulateEnds(model, range) : Error::Ok();
  const std::atomic<bool> cancelled = true;
  Pages progress;
  PopulateOptions options;
  options.progress = [](void* context, Pages done) { *static_cast<Pages*>(context) = done; };
  options.progress_context = &progress;
  if (stop == Stop::kCancelled) options.cancel = &cancelled;
  if (stop == Stop::kDeadline) options.deadline = {1};
  if (want == ErrorCode::kOk && stop == Stop::kCancelled) want = ErrorCode::kCancelled;
  if (want == ErrorCode::kOk && stop == Stop::kDeadline) want = ErrorCode::kDeadline;
  Result<Pages> done = ErrorCode::kNotMapped;
  const Error error = model.Call([&] {
    done = model.space().Populate(range, options);
    return done.error();
  });
  model.SetPopulated(range, error.ok());
  if (want == ErrorCode::kOk && !stopped.ok()) {
    model.Expect("Populate", error, stopped);
    return;
  }
  if (!model.Expect("Populate", error, want)) return;
  const Pages all = error.ok() ? range.count() : Pages{0};
  model.Expect(progress == all && (!error.ok() || *done == all), "Populate: wrong number of pages done");
}

// ---- Locks ----

void LockMemory::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  if (range.empty()) return;
  bool refused = false;
  const Error want = ByRegion(model, range, [&](PageRange part) {
    const Error error = model.Call([&] {
      return lock == MemoryLock::kNone ? model.space().UnlockMemory(part) : model.space().LockMemory(part, lock);
    });
    refused = lock != MemoryLock::kNone && IsLockLimit(error);
    if (lock != MemoryLock::kNone) model.NoteLocked(part, error.ok());
    if (lock == MemoryLock::kLocked && error.ok()) model.SetPopulated(part, /*all=*/false);
    if (refused) return error;
    const bool mapped = model.IsMapped(part);
    model.Expect("LockMemory", error, mapped ? ErrorCode::kOk : ErrorCode::kNotMapped);
    if (error.ok()) ForEachPage(part, [&](PageNumber page) { model.Find(page)->lock = lock; });
    return error;
  });
  if (refused || !want.ok() || lock != MemoryLock::kLocked || !model.ok()) return;
  std::vector<std::uint8_t> resident(range.count().value);
  if (!model.Expect("Residency", model.space().Residency(range, absl::MakeSpan(resident)), ErrorCode::kOk)) return;
  ForEachPage(range, [&](PageNumber page) {
    const SpaceModel::Page& now = *model.Find(page);
    // A pager that fails keeps what lies behind from being read.
    const bool expected = Writable(now.protection) && now.Exists() && !now.Is(Source::Kind::kPager);
    model.Expect(!expected || resident[(page - range.first).value] == 1, "LockMemory: a page is not resident");
  });
}

void LockAll::Perform(SpaceModel& model) const {
  if (!model.alone()) return;
  const auto set = [&](MemoryLock now) {
    for (auto& [number, page] : model.pages()) page.lock = now;
  };
  if (lock == MemoryLock::kNone) {
    // A failure may leave some locked.
    model.future_lock = MemoryLock::kNone;
    set(lock);
    model.Expect("UnlockAll", model.space().UnlockAll(), ErrorCode::kOk);
    return;
  }
  const LockAllOptions options = {.current = current, .future = future, .lock = lock};
  const auto unlock_all = [&] {
    model.future_lock = MemoryLock::kNone;
    set(MemoryLock::kNone);
    model.Expect("UnlockAll", model.space().UnlockAll(), ErrorCode::kOk);
  };
  const Error error = model.Call([&] { return model.space().LockAll(options); }, unlock_all);
  if (current) {
    model.NoteLocked(model.space().reservation(), error.ok());
    if (lock == MemoryLock::kLocked) model.SetPopulated(model.space().reservation(), /*all=*/false);
  }
  if (!current && !future) return void(model.Expect("LockAll", error, ErrorCode::kEmpty));
  if (IsLockLimit(error)) return unlock_all();
  if (!model.Expect("LockAll", error, ErrorCode::kOk)) return;
  model.future_lock = future ? lock : MemoryLock::kNone;
  if (current) set(lock);
}

// ---- Remap ----

void Remap::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  if (range.empty()) return;
  const std::size_t before = range.count().value;
  const std::size_t count = same_size ? before : Span{.size = size}.Count();
  const bool fixed = placement == Placement::kFixed || placement == Placement::kReplace;
  RemapOptions options;
  options.placement = placement;
  options.keep_source = keep_source;
  options.may_move = may_move && !fixed;
  PageRange goal = PageRange::Of(range.first, {count});
  if (fixed) {
    const PageRange at = !model.alone() && placement == Placement::kReplace ? target.Range(model)
                                                                          : target.Window(model);
    if (at.empty()) return;
    goal = PageRange::Of(at.first, {count});
    options.address = goal.address();
    // What would be replaced must be ours.
    if (!model.alone() && placement == Placement::kReplace && !model.IsMapped(goal)) return;
  }
  const SpaceModel::Page* found = model.Find(range.first);
  const SpaceModel::Page first = found == nullptr ? SpaceModel::Page{} : *found;
  const bool one_vma = found != nullptr && model.VmaOf(range.first).Contains(range);
  // Beyond the end of what it shows there is nothing to check.
  if (first.Is(Source::Kind::kBacking) && first.source_page + count > FilePages::kPages) return;
  if (first.Is(Source::Kind::kFile) && first.source_page + count > StampedFile::kMaxPages) return;
  if (!model.HasRoomFor(count)) return;

  const bool moves = fixed || options.may_move;
  const PageRange more = {range.end, std::max(range.end, goal.end)};
  ErrorCode want = ErrorCode::kOk;
  using Pinned = SpaceModel::Pinned;
  const Pinned more_pinned = model.PinnedIn(more);
  if (more_pinned == Pinned::kMaybe) return;
  bool fits = model.InOneRegion(goal) && model.IsFree(more) && more_pinned == Pinned::kNo;
  bool may_not_fit = false;
  if (first.Is(Source::Kind::kFile) && count > before) {
    using Extends = SpaceModel::Extends;
    const Extends extends = first.lock != MemoryLock::kNone ? Extends::kNo : model.ExtendsInPlace(first);
    fits = fits && extends != Extends::kNo;
    may_not_fit = fits && extends == Extends::kMaybe;
  }
  if (first.Is(Source::Kind::kPager)) {
    fits = fits && first.source_page + count <= static_cast<StampedPager*>(first.source)->capacity();
  }
  // What has another kernel VMA than anonymous memory, and no page that the kernel could move.
  const bool stays_put = first.Is(Source::Kind::kBacking) || first.Is(Source::Kind::kPager);
  const Pinned target_pinned = fixed ? model.PinnedIn(goal) : Pinned::kNo;
  const bool source_pinned = model.PinnedIn(range) == Pinned::kYes;
  if (placement == Placement::kHint || (keep_source && (!moves || count != before))) {
    want = ErrorCode::kUnsupported;
  } else if (!one_vma) {
    want = ErrorCode::kNotMapped;
  } else if (fixed || keep_source) {
    if (stays_put && !source_pinned) {
      want = ErrorCode::kUnsupported;
    } else if (stays_put) {
      want = ErrorCode::kPinned;
    } else if (fixed && goal.Overlaps(range)) {
      want = ErrorCode::kOverlap;
    } else if (fixed && (!model.space().reservation().Contains(goal) || !model.InOneRegion(goal))) {
      want = ErrorCode::kOutsideReservation;
    } else if (placement == Placement::kFixed && !model.IsFree(goal)) {
      want = ErrorCode::kOverlap;
    } else if (source_pinned || target_pinned == Pinned::kYes) {
      want = ErrorCode::kPinned;
    }
  } else if (count > before && !fits) {
    want = !options.may_move       ? ErrorCode::kNoRoom
           : source_pinned ? ErrorCode::kPinned
           : stays_put     ? ErrorCode::kUnsupported
                           : ErrorCode::kOk;
  }

  Result<PageRange> remapped = ErrorCode::kNoRoom;
  const bool replaces = placement == Placement::kReplace && target_pinned != Pinned::kYes &&
                        (want == ErrorCode::kOk || want == ErrorCode::kPinned);
  const bool loses = replaces && MayLose(model, goal);
  // What was to be replaced may be gone, all of it; or still be there, without its content.
  const auto erase_if_gone = [&] {
    if (!replaces) return;
    const auto replaced = model.pages().lower_bound(goal.first.value);
    if (replaced == model.pages().end() || !goal.Contains(PageNumber{replaced->first})) return;
    if (!model.space().Lookup({replaced->first}).ok()) model.Erase(goal);
  };
  const auto tolerate = [&] {
    erase_if_gone();
    if (loses) model.SetLost(goal);
  };
  const Error error = model.Call(
      [&] {
        remapped = model.space().Remap(range, {count}, options);
        return remapped.error();
      },
      tolerate);
  if (first.Is(Source::Kind::kFile) && first.lock != MemoryLock::kNone) model.NoteLocked(range, /*done=*/false);
  if (error.code == ErrorCode::kSystem) tolerate();
  if (error.code == ErrorCode::kPinned) erase_if_gone();
  if (!error.ok() && loses) model.UnmapLost(goal);
  if (first.lock != MemoryLock::kNone && want == ErrorCode::kOk && IsLockLimit(error)) return;
  if (may_not_fit && error.code == ErrorCode::kNoRoom) return;
  // Several refusals may be due, and others may have pinned something.
  const bool perhaps_pinned =
      source_pinned || target_pinned != Pinned::kNo || (!model.alone() && placement == Placement::kFixed);
  if (error.code == ErrorCode::kPinned && perhaps_pinned && want != ErrorCode::kNotMapped) return;
  if (!model.alone() && (want == ErrorCode::kOk || want == ErrorCode::kPinned) && !error.ok()) {
    // Somebody has the pages behind it, or the target, or unmapped the target meanwhile.
    const bool lost_race = error.code == ErrorCode::kReplaced && !fixed;
    const bool taken = placement == Placement::kFixed
                           ? error.code == ErrorCode::kOverlap || error.code == ErrorCode::kPinned
                       : count <= before ? false
                       : options.may_move ? (error.code == ErrorCode::kUnsupported && stays_put) ||
                                                (error.code == ErrorCode::kPinned && source_pinned)
                                          : error.code == ErrorCode::kNoRoom;
    if (lost_race || taken) return;
  }
  if (!model.Expect("Remap", error, want) || !error.ok()) return;

  model.Expect(remapped->count().value == count, "Remap: wrong size");
  const bool stays = !fixed && !keep_source && (count <= before || (fits && *remapped == goal));
  const bool must_stay = model.alone() && fits && !may_not_fit && !keep_source;
  model.Expect(!(fixed || stays || must_stay) || *remapped == goal, "Remap: wrong place");
  std::vector<SpaceModel::Page> pages;
  for (std::size_t i = 0; i < count; ++i) {
    SpaceModel::Page page = first;
    if (i < before) {
      page = *model.Find(range.first + Pages{i});
    } else {
      page.known = true;
      page.copied = SpaceModel::Copied::kNo;
      if (!first.anonymous()) page.source_page = first.source_page + i;
      page.stamp = first.Is(Source::Kind::kPager) ? page.source->StampOf(page.source_page) : 0;
    }
    pages.push_back(page);
  }
  if (stays) {
    model.Erase({std::min(goal.end, range.end), range.end});
  } else if (keep_source) {
    model.SetDropped(range);
  } else {
    model.Erase(range);
  }
  if (!stays && !Keep(model, *remapped)) return;
  if (keep_source) {
    const Result<VmaInfo> vma = model.space().Lookup(remapped->first);
    if (!model.Expect("Lookup", vma.error(), ErrorCode::kOk)) return;
    model.Expect(model.IsNew(vma->generation), "Remap: a generation that was there before");
    for (SpaceModel::Page& page : pages) page.generation = vma->generation;
  }
  for (std::size_t i = stays ? before : 0; i < count; ++i) model.Put(remapped->first + Pages{i}, pages[i]);
  if (first.lock == MemoryLock::kLocked) model.SetPopulated(*remapped, /*all=*/false);
}

// ---- The rest ----

void Purge::Perform(SpaceModel& model) const {
  (void)model.Call([&] {
    (void)model.space().Purge(scope);
    return Error::Ok();
  });
}

void Tick::Perform(SpaceModel& model) const {
  if (model.alone()) model.fake_kernel()->AdvanceTime(Milliseconds(later * std::uint64_t{64}));
  (void)model.Call([&] {
    model.space().Tick();
    return Error::Ok();
  });
}

void PinPages::Perform(SpaceModel& model) const {
  if (release) return model.SetPin(pin, nullptr);
  const PageRange range = span.Range(model);
  if (range.empty()) return;
  auto pinned = std::make_unique<Pin>(model.space(), range);
  const bool mapped = model.IsMapped(range);
  model.Expect("Pin", pinned->error(), !model.InOneRegion(range) ? ErrorCode::kOutsideReservation
                                       : mapped                  ? ErrorCode::kOk
                                                                 : ErrorCode::kNotMapped);
  if (pinned->ok()) model.SetPin(pin, std::move(pinned));
}

void Listen::Perform(SpaceModel& model) const { model.Listen(on); }

namespace {

// A step with what it is about now.
struct PlannedStep {
  Step step;
  PageRange range;
  FilePages* backing = nullptr;
};

// Whether this step is a reason to refuse the transaction with `code`.
bool MayRefuse(SpaceModel& model, const PlannedStep& planned, ErrorCode code) {
  const PageRange range = planned.range;
  const Protection protection = ProtectionOf(planned.step.protection);
  const bool map = planned.step.verb == Step::Verb::kMap;
  const bool replace = map && planned.step.replace;
  bool backed = false;
  bool denied = planned.backing != nullptr && !planned.backing->Allows(protection);
  ForEachPage(range, [&](PageNumber page) {
    const SpaceModel::Page* old = model.Find(page);
    backed = backed || (old != nullptr && !old->anonymous());
    denied = denied || (planned.step.verb == Step::Verb::kProtect && old != nullptr && !old->Allows(protection));
  });
  switch (code) {
    case ErrorCode::kOutsideReservation: return !model.InOneRegion(range);
    case ErrorCode::kOverlap: return map && !replace && !model.IsFree(range);
    case ErrorCode::kPinned: return map && model.PinnedIn(range) != SpaceModel::Pinned::kNo;
    case ErrorCode::kNotMapped: return planned.step.verb == Step::Verb::kProtect && !model.IsMapped(range);
    case ErrorCode::kDenied: return denied;
    case ErrorCode::kUnsupported: return replace && !model.IsFree(range) && (backed || planned.backing != nullptr);
    default: return false;
  }
}

}  // namespace

void Transact::Perform(SpaceModel& model) const {
  std::vector<PlannedStep> steps;
  std::size_t pages = 0;
  for (const Step& step : {first, second, third}) {
    if (step.verb == Step::Verb::kNone) continue;
    const bool free = step.verb == Step::Verb::kMap && !step.replace;
    const PageRange range = free ? step.span.Window(model) : step.span.Range(model);
    if (range.empty()) return;
    FilePages* const backing = step.verb == Step::Verb::kMap ? BackingOf(model, step.backing) : nullptr;
    steps.push_back({step, range, backing});
    pages += range.count().value;
  }
  if (!model.HasRoomFor(pages)) return;

  // Which refusal comes first is not said, nor how many extents there are.
  std::vector<ErrorCode> refusals;
  if (steps.empty()) refusals.push_back(ErrorCode::kEmpty);
  bool perhaps_pinned = false;
  bool taken = false;
  bool locks = false;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (steps[i].range.Overlaps(steps[j].range)) refusals.push_back(ErrorCode::kOverlap);
    }
    for (const ErrorCode code : {ErrorCode::kOutsideReservation, ErrorCode::kOverlap, ErrorCode::kPinned,
                                 ErrorCode::kNotMapped, ErrorCode::kDenied, ErrorCode::kUnsupported}) {
      if (!MayRefuse(model, steps[i], code)) continue;
      const bool perhaps = code == ErrorCode::kPinned && model.PinnedIn(steps[i].range) == SpaceModel::Pinned::kMaybe;
      if (perhaps) {
        perhaps_pinned = true;
      } else {
        refusals.push_back(code);
      }
    }
    const bool map = steps[i].step.verb == Step::Verb::kMap;
    taken = taken || (!model.alone() && map && !steps[i].step.replace);
    locks = locks || (map && (steps[i].step.lock != MemoryLock::kNone || model.future_lock != MemoryLock::kNone));
  }
  const auto commit = [&] {
    Transaction transaction(model.space());
    for (const PlannedStep& planned : steps) {
      switch (planned.step.verb) {
        case Step::Verb::kMap:
          transaction.Map(planned.range, {.placement = planned.step.replace ? Placement::kReplace : Placement::kFixed,
                                          .protection = ProtectionOf(planned.step.protection),
                                          .lock = planned.step.lock,
                                          .backing = planned.backing,
                                          .backing_page = planned.step.backing_page});
          break;
        case Step::Verb::kUnmap: transaction.Unmap(planned.range); break;
        case Step::Verb::kProtect:
          transaction.Protect(planned.range, ProtectionOf(planned.step.protection));
          break;
        case Step::Verb::kNone: break;
      }
    }
    return transaction.Commit();
  };
  const auto tolerate = [&] {
    for (const PlannedStep& planned : steps) {
      if (planned.step.verb == Step::Verb::kMap && planned.step.replace) model.SetUnknown(planned.range);
    }
  };
  // What is refused anyway goes back by calls that must not fail too.
  const bool may_fail = refusals.empty() && !perhaps_pinned;
  const Error error = may_fail ? model.Call(commit, tolerate) : commit();
  for (const PlannedStep& planned : steps) {
    const bool writable = planned.step.verb == Step::Verb::kProtect && Writable(ProtectionOf(planned.step.protection));
    if (writable) model.NoteWritable(planned.range, /*done=*/error.ok());
  }
  const bool refused = std::find(refusals.begin(), refusals.end(), error.code) != refusals.end();
  if (refused || error.code == ErrorCode::kUnsupported) return;
  if (error.code == ErrorCode::kPinned && (perhaps_pinned || taken)) return;
  if (error.code == ErrorCode::kOverlap && taken) return;
  if (locks && IsLockLimit(error)) return;
  if (!model.Expect(refusals.empty(), "Transaction: should have been refused")) return;
  if (!model.Expect("Transaction", error, ErrorCode::kOk)) return;

  for (const PlannedStep& planned : steps) {
    const Protection protection = ProtectionOf(planned.step.protection);
    const PageRange range = planned.range;
    switch (planned.step.verb) {
      case Step::Verb::kMap: {
        const Result<VmaInfo> vma = model.space().Lookup(range.first);
        if (!model.Expect("Lookup", vma.error(), ErrorCode::kOk)) return;
        model.Expect(model.IsNew(vma->generation), "Transaction: a generation that was there before");
        ForEachPage(range, [&](PageNumber page) {
          SpaceModel::Page mapped = {.protection = protection,
                                     .lock = planned.step.lock != MemoryLock::kNone ? planned.step.lock
                                                                                    : model.future_lock,
                                     .generation = vma->generation,
                                     .source = planned.backing,
                                     .backing = planned.backing};
          if (planned.backing != nullptr) {
            mapped.source_page = planned.step.backing_page + (page - range.first).value;
            mapped.max_protection = planned.backing->max_protection();
          }
          model.Put(page, mapped);
        });
        break;
      }
      case Step::Verb::kUnmap:
        model.Erase(range);
        if (model.had_failures()) model.MayBeDeferred(range);
        break;
      case Step::Verb::kProtect:
        ForEachPage(range, [&](PageNumber page) { model.Find(page)->protection = protection; });
        break;
      case Step::Verb::kNone: break;
    }
  }
}

void TakeSnapshot::Perform(SpaceModel& model) const {
  std::vector<VmaInfo> out(room == 255 ? model.space().Stats().vmas + 100 : room);
  const std::uint64_t changes = model.space().Changes();
  const SnapshotResult result = model.space().Snapshot(absl::MakeSpan(out));
  if (out.size() > result.vmas) out.resize(result.vmas);
  for (std::size_t i = 1; i < out.size(); ++i) {
    model.Expect(out[i - 1].range.end <= out[i].range.first, "Snapshot: not in order");
  }
  // What is ours is all there, cut as it is, as far as there was room.
  auto next = model.pages().begin();
  for (const VmaInfo& vma : out) {
    const SpaceModel::Page* page = model.Find(vma.range.first);
    if (page == nullptr) {
      model.Expect(!model.alone(), "Snapshot: a VMA too many");
      continue;
    }
    model.Expect(next != model.pages().end() && next->first == vma.range.first.value, "Snapshot: a VMA is missing");
    model.Expect(vma.range == model.VmaOf(vma.range.first) && vma.generation == page->generation &&
                     vma.protection == page->protection && vma.lock == page->lock && vma.backing == page->backing &&
                     (page->backing == nullptr || vma.backing_page == page->source_page),
                 "Snapshot: wrong attributes of " + Hex(vma.range));
    next = model.pages().lower_bound(vma.range.end.value);
  }
  if (out.size() == result.vmas) model.Expect(next == model.pages().end(), "Snapshot: a VMA is missing");
  if (!model.alone()) return;
  model.Expect(result.instant && result.vmas == model.space().Stats().vmas, "Snapshot: wrong number of VMAs");
  model.Expect(model.space().Changes() == changes, "Changes: a snapshot is none");
  std::size_t lines = 0;
  model.space().WriteMaps([](void* context, std::string_view) { ++*static_cast<std::size_t*>(context); }, &lines);
  model.Expect(lines == result.vmas, "WriteMaps: wrong number of lines");
}

void Misuse::Perform(SpaceModel& model) const {
  AddressSpace& space = model.space();
  const PageRange all = space.reservation();
  const auto map = [&](std::size_t count, const MapOptions& options) { return space.Map({count}, options).error(); };
  const auto at = [&](const void* address, std::size_t count, Placement placement) {
    return map(count, {.placement = placement, .address = const_cast<void*>(address)});
  };
  // Ranges that every verb refuses, and how.
  struct BadRange {
    PageRange range;
    ErrorCode want;
  };
  const BadRange ranges[] = {{{all.first, all.first}, ErrorCode::kEmpty},
                             {{all.end, all.first}, ErrorCode::kOverflow},
                             {{all.first, all.end + Pages{1}}, ErrorCode::kOutsideReservation},
                             {{all.first - Pages{1}, all.first + Pages{1}}, ErrorCode::kOutsideReservation},
                             {{all.end, all.end + Pages{1}}, ErrorCode::kOutsideReservation},
                             {{{0}, {1}}, ErrorCode::kOutsideReservation},
                             {{{SIZE_MAX - 1}, {SIZE_MAX}}, ErrorCode::kOutsideReservation}};
  const BadRange& bad = ranges[call / 16 % std::size(ranges)];
  std::uint8_t resident[1];
  const std::atomic<bool> cancelled = true;
  switch (call % 16) {
    case 0: model.Expect("Unmap", space.Unmap(bad.range), bad.want); break;
    case 1: model.Expect("Protect", space.Protect(bad.range, Protection::kRead), bad.want); break;
    case 2: model.Expect("Advise", space.Advise(bad.range, Advice::kDontNeed), bad.want); break;
    case 3: model.Expect("Residency", space.Residency(bad.range, absl::MakeSpan(resident)), bad.want); break;
    case 4: model.Expect("Populate", space.Populate(bad.range, {.cancel = &cancelled}).error(), bad.want); break;
    case 5: model.Expect("LockMemory", space.LockMemory(bad.range), bad.want); break;
    case 6: model.Expect("UnlockMemory", space.UnlockMemory(bad.range), bad.want); break;
    case 7: model.Expect("Discard", space.Discard({&bad.range, 1}), bad.want); break;
    case 8: model.Expect("Remap", space.Remap(bad.range, {1}).error(), bad.want); break;
    case 9:
      model.Expect("Map of nothing", map(0, {}), ErrorCode::kEmpty);
      model.Expect("Remap to nothing", space.Remap({all.first, all.first + Pages{1}}, {0}).error(), ErrorCode::kEmpty);
      break;
    case 10: model.Expect("Map of too much", map(all.count().value + call, {}), ErrorCode::kNoRoom); break;
    case 11:
      for (const std::size_t alignment : {std::size_t{0}, std::size_t{3}, std::size_t{SIZE_MAX}}) {
        model.Expect("Map, alignment", map(1, {.alignment = {alignment}}), ErrorCode::kUnaligned);
      }
      break;
    case 12:
      for (const Placement placement : {Placement::kFixed, Placement::kReplace}) {
        model.Expect("Map, address", at(all.address() + 1 + call, 1, placement), ErrorCode::kUnaligned);
        model.Expect("Map outside", at(all.end.address(), 1, placement), ErrorCode::kOutsideReservation);
        model.Expect("Map over the end", at((all.end - Pages{1}).address(), 2, placement),
                     ErrorCode::kOutsideReservation);
        model.Expect("Map before", at((all.first - Pages{1}).address(), 2, placement),
                     ErrorCode::kOutsideReservation);
        model.Expect("Map at null", at(nullptr, 1, placement), ErrorCode::kOutsideReservation);
      }
      break;
    case 13:
      model.Expect("Lookup outside", space.Lookup(all.end).error(), ErrorCode::kOutsideReservation);
      model.Expect("Lookup before", space.Lookup(all.first - Pages{1}).error(), ErrorCode::kOutsideReservation);
      break;
    case 14:
      model.Expect("LockMemory of no kind", space.LockMemory({all.first, all.end}, MemoryLock::kNone),
                   ErrorCode::kEmpty);
      break;
    case 15: {
      // A mapping of our own moves nowhere that is not there.
      if (model.pages().empty()) return;
      const PageNumber page = {model.pages().begin()->first};
      const PageRange one = PageRange::Of(page, {1});
      if (!model.Find(page)->anonymous() || model.PinnedIn(one) != SpaceModel::Pinned::kNo) return;
      const auto to = [&](const void* address) {
        return space.Remap(one, {1}, {.placement = Placement::kFixed, .address = const_cast<void*>(address)}).error();
      };
      model.Expect("Remap, address", to(one.end.address() + 1), ErrorCode::kUnaligned);
      model.Expect("Remap outside", to(all.end.address()), ErrorCode::kOutsideReservation);
      model.Expect("Remap onto itself", to(one.address()), ErrorCode::kOverlap);
      break;
    }
  }
}

void FailCall::Perform(SpaceModel& model) const {
  static constexpr int kErrors[] = {ENOMEM, EINVAL, EAGAIN};
  // Verbs make fewer calls of userfaultfd.
  if (userfault) return model.Arm(1 + nth % std::size_t{4}, kErrors[error % 3], SpaceModel::Failing::kUserfault);
  model.Arm(nth + std::size_t{1}, kErrors[error % 3]);
}

// ---- Shared pages ----

namespace {

// Of shared pages: "A", and who wrote it.
constexpr std::uint64_t kSharedStamp = std::uint64_t{'A'} << 56;

bool IsAnyOf(Error error, std::initializer_list<ErrorCode> codes) {
  return std::find(codes.begin(), codes.end(), error.code) != codes.end();
}

void ExpectAnyOf(SpaceModel& model, const char* verb, Error error, std::initializer_list<ErrorCode> codes) {
  model.Expect(error.ok() || IsAnyOf(error, codes), std::string(verb) + " of shared pages: " + ToString(error.code) +
                                                        " (errno " + std::to_string(error.sys_errno) + ")");
}

}  // namespace

void Contend::Perform(SpaceModel& model) const {
  if (model.alone()) return;
  AddressSpace& space = model.space();
  const SharedPages& shared = *model.shared();
  const bool open = (arena & 1) != 0;
  const std::vector<PageRange>& arenas = open ? shared.open : shared.mapped;
  const PageRange all = arenas[arena / 2 % arenas.size()];
  const PageRange range =
      PageRange::Of(all.first + Pages{page % all.count().value}, {1 + size % std::size_t{40}}).Intersect(all);
  const Protection wanted = ProtectionOf(choice);
  using enum ErrorCode;
  MapOptions map = {.placement = Placement::kReplace,
                    .address = range.address(),
                    .protection = wanted,
                    .populate = (choice & 8) != 0,
                    .lock = (choice & 48) == 48 ? MemoryLock::kOnFault : MemoryLock::kNone};
  if (!open && (choice & 192) == 192) {
    map.backing = shared.backing;
    map.protection = Protection::kReadWrite;
    map.backing_page = page;
  }
  switch (verb % (open ? 20 : 16)) {
    case 0:
    case 1:
      ExpectAnyOf(model, "Map", space.Map(range.count(), map).error(), {kPinned, kSystem});
      break;
    case 2: {
      std::uint64_t word = kSharedStamp | page;
      // What comes into open pages may be somebody's own.
      if (!open) (void)Transfer(true, range.first, word);
      break;
    }
    case 3: {
      std::uint64_t word = 0;
      const bool fine = open || !Transfer(false, range.first, word) || word == 0 ||
                        word >> 56 == kSharedStamp >> 56 || word >> 56 == kFileStamp >> 56;
      model.Expect(fine, "shared pages hold foreign content " + std::to_string(word));
      break;
    }
    case 4: {
      const Result<VmaInfo> vma = space.Lookup(range.first);
      model.Expect(vma.ok() ? vma->range.Contains(range.first) : open, "Lookup of shared pages: not mapped");
      break;
    }
    case 5:
      ExpectAnyOf(model, "Protect", space.Protect(range, wanted), {open ? kNotMapped : kOk, kDenied});
      break;
    case 6:
      ExpectAnyOf(model, "Populate", space.Populate(range).error(),
                  {kUnsupported, kReplaced, kSystem, open ? kNotMapped : kReplaced});
      break;
    case 7:
      ExpectAnyOf(model, "Advise", space.Advise(range, static_cast<Advice>(choice % 7)),
                  {kSystem, kUnsupported, open ? kNotMapped : kSystem});
      break;
    case 8:
      ExpectAnyOf(model, "Discard", space.Discard({&range, 1}), {kUnsupported, open ? kNotMapped : kOk});
      break;
    case 9:
      ExpectAnyOf(model, "LockMemory", space.LockMemory(range, MemoryLock::kOnFault), {open ? kNotMapped : kOk, kSystem});
      break;
    case 10:
      ExpectAnyOf(model, "UnlockMemory", space.UnlockMemory(range), {open ? kNotMapped : kOk});
      break;
    case 11: {
      const Pin pin(space, range);
      ExpectAnyOf(model, "Pin", pin.error(), {open ? kNotMapped : kOk});
      if (pin.ok() && !open) model.Expect(space.Lookup(range.first).ok(), "Lookup of pinned pages");
      break;
    }
    case 12:
    case 13:
      ExpectAnyOf(model, "MapFile",
                  space
                      .MapFile(range.count(), {.descriptor = shared.file->descriptor(),
                                               .offset = Pages{page % std::size_t{32}}.bytes(),
                                               .sharing = static_cast<os::Sharing>(choice & 1),
                                               .protection = (choice & 3) == 0 ? Protection::kReadWrite
                                                                               : Protection::kRead,
                                               .placement = Placement::kReplace,
                                               .address = range.address(),
                                               .populate = (choice & 8) != 0})
                      .error(),
                  {kPinned, kSystem, kDenied});
      break;
    case 14:
      if (shared.faults == nullptr || range.first < model.RegionOf(model.windows().back().first).first) break;
      ExpectAnyOf(model, "MapPager",
                  shared.faults
                      ->MapPager(*shared.pager, StampedPager::kFirst, range.count(),
                                 {.placement = Placement::kReplace, .address = range.address(), .capacity = {40}})
                      .error(),
                  {kPinned, kSystem});
      break;
    case 15: {
      ExpectAnyOf(model, "Sync", space.Sync(range, {.wait = false, .invalidate = (choice & 1) != 0}),
                  {kSystem, open ? kNotMapped : kSystem});
      if (shared.faults == nullptr) break;
      const Error error = (choice & 6) == 0   ? shared.faults->Invalidate(range)
                          : (choice & 6) == 2 ? shared.faults->Evict(range)
                                              : shared.faults->Writeback(range);
      ExpectAnyOf(model, "Writeback, Evict or Invalidate", error, {kReplaced, open ? kNotMapped : kReplaced});
      break;
    }
    case 16:
    case 17:
      ExpectAnyOf(model, "Unmap", space.Unmap(range), {});
      break;
    case 18:
      map.placement = Placement::kFixed;
      ExpectAnyOf(model, "Map", space.Map(range.count(), map).error(), {kOverlap, kPinned, kSystem});
      break;
    case 19: {
      const PageRange to = PageRange::Of(all.first + Pages{choice % all.count().value}, range.count()).Intersect(all);
      ExpectAnyOf(model, "Remap",
                  space
                      .Remap(range, to.count(),
                             {.placement = size % 3 == 0   ? Placement::kFixed
                                           : size % 3 == 1 ? Placement::kReplace
                                                           : Placement::kAnywhere,
                              .address = to.address()})
                      .error(),
                  {kNotMapped, kOverlap, kPinned, kNoRoom, kReplaced, kUnsupported, kSystem});
      break;
    }
  }
}

// ---- Bytes and text ----

namespace {

template <typename T>
constexpr const char* kName = "";
#define FREEHOLD_NAME(type) \
  template <>               \
  constexpr const char* kName<type> = #type
FREEHOLD_NAME(Map);
FREEHOLD_NAME(Unmap);
FREEHOLD_NAME(Protect);
FREEHOLD_NAME(Advise);
FREEHOLD_NAME(Discard);
FREEHOLD_NAME(Write);
FREEHOLD_NAME(Lookup);
FREEHOLD_NAME(Residency);
FREEHOLD_NAME(Populate);
FREEHOLD_NAME(LockMemory);
FREEHOLD_NAME(LockAll);
FREEHOLD_NAME(Remap);
FREEHOLD_NAME(Purge);
FREEHOLD_NAME(Tick);
FREEHOLD_NAME(Misuse);
FREEHOLD_NAME(PinPages);
FREEHOLD_NAME(TakeSnapshot);
FREEHOLD_NAME(Listen);
FREEHOLD_NAME(Transact);
FREEHOLD_NAME(Step::Verb);
FREEHOLD_NAME(FailCall);
FREEHOLD_NAME(Contend);
FREEHOLD_NAME(MapFile);
FREEHOLD_NAME(Reopen);
FREEHOLD_NAME(ResizeFile);
FREEHOLD_NAME(WriteFile);
FREEHOLD_NAME(Sync);
FREEHOLD_NAME(MapPager);
FREEHOLD_NAME(HandBack);
FREEHOLD_NAME(HandBack::Verb);
FREEHOLD_NAME(OrderPager);
FREEHOLD_NAME(OrderPager::Order);
FREEHOLD_NAME(Probe);
FREEHOLD_NAME(Placement);
FREEHOLD_NAME(Content);
FREEHOLD_NAME(Advice);
FREEHOLD_NAME(PurgeScope);
FREEHOLD_NAME(Populate::Stop);
template <>
constexpr const char* kName<MemoryLock> = "os::MemoryLock";
template <>
constexpr const char* kName<os::Sharing> = "os::Sharing";
#undef FREEHOLD_NAME

constexpr int kTotalWeight = std::accumulate(std::begin(kWeights), std::end(kWeights), 0);

// The kind that a number below kTotalWeight stands for.
std::size_t KindOf(int number) {
  std::size_t kind = 0;
  while (number >= kWeights[kind]) number -= kWeights[kind++];
  return kind;
}

class Reader {
 public:
  explicit Reader(absl::Span<const std::uint8_t> bytes) : bytes_(bytes) {}

  bool done() const { return at_ >= bytes_.size(); }
  std::uint8_t Byte() { return done() ? 0 : bytes_[at_++]; }
  int Kind() {
    const int low = Byte();
    return (low + 256 * Byte()) % kTotalWeight;
  }

  void operator()(const char*, Span& span) { span.Visit(*this); }
  void operator()(const char*, Step& step) { step.Visit(*this); }
  void operator()(const char*, bool& value) { value = (Byte() & 1) != 0; }
  void operator()(const char*, std::uint8_t& value, unsigned limit = 256) {
    value = static_cast<std::uint8_t>(Byte() % limit);
  }
  void operator()(const char*, std::uint16_t& value) {
    const unsigned low = Byte();
    value = static_cast<std::uint16_t>(low + 256 * Byte());
  }
  template <typename Enum>
    requires std::is_enum_v<Enum>
  void operator()(const char*, Enum& value, unsigned limit) {
    value = static_cast<Enum>(Byte() % limit);
  }

 private:
  absl::Span<const std::uint8_t> bytes_;
  std::size_t at_ = 0;
};

class Writer {
 public:
  explicit Writer(std::vector<std::uint8_t>& bytes) : bytes_(bytes) {}

  void Number(unsigned value) {
    bytes_.push_back(static_cast<std::uint8_t>(value));
    bytes_.push_back(static_cast<std::uint8_t>(value >> 8));
  }
  void operator()(const char*, Span& span) { span.Visit(*this); }
  void operator()(const char*, Step& step) { step.Visit(*this); }
  void operator()(const char*, std::uint16_t& value) { Number(value); }
  template <typename T>
  void operator()(const char*, T& value, unsigned = 0) {
    bytes_.push_back(static_cast<std::uint8_t>(value));
  }

 private:
  std::vector<std::uint8_t>& bytes_;
};

class Printer {
 public:
  void operator()(const char* name, Span& span) { Group(name, span); }
  void operator()(const char* name, Step& step) { Group(name, step); }
  void operator()(const char* name, bool& value) {
    Begin(name);
    text_ += value ? "true" : "false";
  }
  void operator()(const char* name, std::uint8_t& value, unsigned = 0) { Number(name, value); }
  void operator()(const char* name, std::uint16_t& value) { Number(name, value); }
  template <typename Enum>
    requires std::is_enum_v<Enum>
  void operator()(const char* name, Enum& value, unsigned) {
    Begin(name);
    text_ += std::string(kName<Enum>) + "{" + std::to_string(static_cast<unsigned>(value)) + "}";
  }
  std::string TakeText() { return std::move(text_); }

 private:
  template <typename Fields>
  void Group(const char* name, Fields& fields) {
    Begin(name);
    text_ += "{";
    separator_ = "";
    fields.Visit(*this);
    text_ += "}";
    separator_ = ", ";
  }
  void Begin(const char* name) {
    text_ += std::string(separator_) + "." + name + " = ";
    separator_ = ", ";
  }
  void Number(const char* name, unsigned value) {
    Begin(name);
    text_ += std::to_string(value);
  }

  std::string text_;
  const char* separator_ = "";
};

template <std::size_t kind = 0>
SpaceOperation MakeOperation(std::size_t wanted) {
  if constexpr (kind + 1 < std::variant_size_v<SpaceOperation>) {
    if (kind != wanted) return MakeOperation<kind + 1>(wanted);
  }
  return SpaceOperation(std::in_place_index<kind>);
}

}  // namespace

std::vector<SpaceOperation> Decode(absl::Span<const std::uint8_t> bytes) {
  std::vector<SpaceOperation> operations;
  for (Reader reader(bytes); !reader.done();) {
    SpaceOperation operation = MakeOperation(KindOf(reader.Kind()));
    std::visit([&](auto& one) { one.Visit(reader); }, operation);
    operations.push_back(operation);
  }
  return operations;
}

std::vector<std::uint8_t> Encode(const std::vector<SpaceOperation>& operations) {
  std::vector<std::uint8_t> bytes;
  Writer writer(bytes);
  for (SpaceOperation operation : operations) {
    writer.Number(static_cast<unsigned>(std::accumulate(kWeights, kWeights + operation.index(), 0)));
    std::visit([&](auto& one) { one.Visit(writer); }, operation);
  }
  return bytes;
}

std::vector<SpaceOperation> RandomOperations(std::uint64_t seed, std::size_t bytes) {
  std::mt19937_64 random(seed);
  std::vector<std::uint8_t> numbers(bytes);
  std::generate(numbers.begin(), numbers.end(), [&] { return static_cast<std::uint8_t>(random()); });
  return Decode(numbers);
}

std::string ToString(const SpaceOperation& operation) {
  SpaceOperation copy = operation;
  return std::visit(
      [](auto& one) {
        Printer printer;
        one.Visit(printer);
        return std::string(kName<std::remove_reference_t<decltype(one)>>) + "{" + printer.TakeText() + "}";
      },
      copy);
}

// ---- Runs ----

const std::vector<Variant>& Variants() {
  static const std::vector<Variant> variants = [] {
    const AddressSpaceOptions small = {.reserve = MiB(256), .min_reserve = MiB(256), .regions_per_zone = 1};
    std::vector<Variant> list = {
        {"Adaptive", small}, {"Coarse", small}, {"Strict", small}, {"TightFreeLimit", small}, {"Tree", small}};
    list[1].options.lock_policy = sync::LockPolicy::kCoarse;
    list[2].options.strict_unmap = true;
    list[3].options.free_resident_limit = KiB(256);
    list[4].options.lock_policy = sync::LockPolicy::kTree;
    return list;
  }();
  return variants;
}

std::string Run(const std::vector<SpaceOperation>& operations, const AddressSpaceOptions& options, std::size_t* performed) {
  os::FakeKernel kernel({.log_calls = false});
  const Result<AddressSpace*> space = AddressSpace::Create(kernel, options);
  if (!space.ok()) return "cannot create a space";
  std::string failure;
  {
    SpaceModel model(**space, kernel);
    std::size_t done = 0;
    for (; done < operations.size() && model.ok(); ++done) {
      std::visit([&](const auto& operation) { operation.Perform(model); }, operations[done]);
      // Reading everything leaves no page untouched: not always.
      if (model.ok()) {
        model.CheckInvariants(done % 8 == 7 ? SpaceModel::Depth::kContent : SpaceModel::Depth::kAttributes);
      }
    }
    if (performed != nullptr) *performed = done;
    model.Finish();
    failure = model.failure();
    // The files must outlive the mappings.
    if (!failure.empty()) (void)(*space)->Unmap((*space)->reservation());
  }
  AddressSpace::Destroy(*space);
  return failure;
}

std::string RunAndShrink(const std::vector<SpaceOperation>& operations, const AddressSpaceOptions& options) {
  std::size_t performed = 0;
  std::string failure = Run(operations, options, &performed);
  if (failure.empty()) return failure;
  // Leaves out whatever is not needed for some failure, in ever smaller pieces.
  std::vector<SpaceOperation> needed(operations.begin(), operations.begin() + static_cast<std::ptrdiff_t>(performed));
  for (std::size_t piece = std::max<std::size_t>(needed.size() / 2, 1); piece > 0; piece /= 2) {
    for (std::size_t at = 0; at + piece <= needed.size();) {
      std::vector<SpaceOperation> fewer = needed;
      fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(at),
                  fewer.begin() + static_cast<std::ptrdiff_t>(at + piece));
      if (Run(fewer, options).empty()) {
        at += piece;
      } else {
        needed = std::move(fewer);
      }
    }
  }
  failure += " (after operation " + std::to_string(performed) + "); enough for '" + Run(needed, options) + "':\n";
  for (const SpaceOperation& operation : needed) failure += "  " + ToString(operation) + ",\n";
  return failure;
}

// ---- Crashes ----

namespace {

const std::string* crash_text;
const std::vector<SpaceOperation>* crash_operations;

// Not safe in a signal handler, but there is nothing left to lose.
void PrintCrash() {
  if (crash_text == nullptr) return;
  std::string text = *std::exchange(crash_text, nullptr) + "\n";
  for (const SpaceOperation& operation : *crash_operations) text += "  " + ToString(operation) + ",\n";
  if (write(STDERR_FILENO, text.data(), text.size()) < 0) return;
}

void OnSignal(int signal) {
  std::signal(signal, SIG_DFL);
  PrintCrash();
  std::raise(signal);
}

}  // namespace

void PrintOnCrash(const std::string* what, const std::vector<SpaceOperation>* operations) {
  crash_text = what;
  crash_operations = operations;
  static const bool once = [] {
    for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGALRM}) std::signal(signal, OnSignal);
    if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(PrintCrash);
    return true;
  }();
  (void)once;
}

}  // namespace freehold::vm::test
