#include "tests/vm/space_operations.h"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
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
  const bool fixed = placement == Placement::kFixed || placement == Placement::kReplace;
  FilePages* const backing = file >= 1 && file <= SpaceModel::kFiles ? &model.file(file - 1) : nullptr;
  MapOptions options;
  options.placement = placement;
  options.address = range.address();
  if (placement == Placement::kAnywhere) options.alignment = {std::size_t{1} << alignment};
  options.protection = ProtectionOf(protection);
  options.content = content;
  options.huge_pages = huge_pages ? os::HugePages::kPrefer : os::HugePages::kAvoid;
  options.populate = populate;
  options.lock = lock;
  options.backing = backing;
  options.backing_page = file_page;

  using Pinned = SpaceModel::Pinned;
  const Pinned pinned = fixed ? model.PinnedIn(range) : Pinned::kNo;
  ErrorCode want = ErrorCode::kOk;
  if (fixed && !model.InOneRegion(range)) want = ErrorCode::kOutsideReservation;
  if (want == ErrorCode::kOk && pinned == Pinned::kYes) want = ErrorCode::kPinned;
  if (want != ErrorCode::kOutsideReservation && placement == Placement::kFixed && !model.IsFree(range)) {
    want = ErrorCode::kOverlap;
  }
  if (backing != nullptr && !backing->Allows(options.protection)) want = ErrorCode::kDenied;
  const MemoryLock locked = lock != MemoryLock::kNone ? lock : model.future_lock;
  Result<PageRange> mapped = ErrorCode::kNoRoom;
  // What a backing takes the place of, or what takes the place of a backing, has lost its content when a later step
  // is refused. Earlier failures may have left a backing in free memory.
  bool replaces_backing = backing != nullptr || (model.had_failures() && !model.IsMapped(range));
  ForEachPage(range, [&](PageNumber page) {
    const SpaceModel::Page* old = model.Find(page);
    replaces_backing = replaces_backing || (old != nullptr && old->file != nullptr);
  });
  const auto tolerate = [&] {
    if (placement == Placement::kReplace && replaces_backing) model.SetUnknown(range);
  };
  const Error error = model.Call(
      [&] {
        mapped = model.space().Map(range.count(), options);
        return mapped.error();
      },
      tolerate);
  if (!error.ok()) tolerate();
  if (locked != MemoryLock::kNone && want == ErrorCode::kOk && IsLockLimit(error)) return;
  // Both may be true of the range.
  if (error.code == ErrorCode::kPinned && want == ErrorCode::kOverlap && pinned == Pinned::kYes) return;
  if (error.code == ErrorCode::kPinned && want != ErrorCode::kDenied && pinned == Pinned::kMaybe) return;
  const bool taken = !model.alone() && placement == Placement::kFixed &&
                     (error.code == ErrorCode::kOverlap || error.code == ErrorCode::kPinned);
  if (taken && want != ErrorCode::kDenied && want != ErrorCode::kOutsideReservation) return;
  if (!model.Expect("Map", error, want) || !error.ok()) return;

  if (placement == Placement::kHint && model.alone()) {
    const bool mapping = options.protection != Protection::kReadWrite || backing != nullptr;
    const bool fits = mapping == model.windows().back().Contains(range.first) && model.InOneRegion(range) &&
                      model.IsFree(range) && model.PinnedIn(range) == Pinned::kNo;
    model.Expect(!fits || *mapped == range, "Map: the hint was not followed");
  }
  model.Expect(!fixed || *mapped == range, "Map: not at the fixed range");
  model.Expect(mapped->count() == range.count(), "Map: wrong size");
  model.Expect(mapped->first.value % options.alignment.value == 0, "Map: not aligned");
  if (!Keep(model, *mapped)) return;
  model.Expect(placement == Placement::kReplace || model.IsFree(*mapped), "Map: handed out mapped pages");
  model.Expect(model.PinnedIn(*mapped) != Pinned::kYes, "Map: handed out pinned pages");
  const Result<VmaInfo> vma = model.space().Lookup(mapped->first);
  if (!model.Expect("Lookup", vma.error(), ErrorCode::kOk)) return;
  model.Expect(model.IsNew(vma->generation), "Map: a generation that was there before");
  ForEachPage(*mapped, [&](PageNumber page) {
    model.Put(page, {.protection = options.protection,
                     .lock = locked,
                     .generation = vma->generation,
                     .file = backing,
                     .file_page = backing == nullptr ? 0 : file_page + (page - mapped->first).value,
                     .known = content == Content::kZeroed});
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
  const auto verb = [&] { return model.space().Protect(range, wanted); };
  const Error error = model.InOneRegion(range) ? model.Call(verb) : verb();
  const Error want = ByRegion(model, range, [&](PageRange part) {
    for (PageNumber page = part.first; page < part.end; page = page + Pages{1}) {
      const SpaceModel::Page* known = model.Find(page);
      if (known == nullptr) return Error{ErrorCode::kNotMapped};
      if (known->file != nullptr && !known->file->Allows(wanted)) return Error{ErrorCode::kDenied};
    }
    ForEachPage(part, [&](PageNumber page) { model.Find(page)->protection = wanted; });
    return Error::Ok();
  });
  model.Expect("Protect", error, want);
}

// ---- Content ----

void Advise::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  if (range.empty()) return;
  const bool hint = advice == Advice::kWillNeed || advice == Advice::kHugePages || advice == Advice::kNoHugePages;
  // It ends at the first VMA that the kernel refuses: locked, or a file's that cannot be freed.
  PageNumber end = range.first;
  bool hole = false;
  for (; end < range.end; end = end + Pages{1}) {
    const SpaceModel::Page* page = model.Find(end);
    hole = hole || page == nullptr;
    if (page == nullptr || hint) continue;
    if (page->lock != MemoryLock::kNone || (page->file != nullptr && advice == Advice::kFree)) break;
  }
  const PageRange advised = {range.first, end};
  const bool drops = advice == Advice::kDontNeed || advice == Advice::kFree;
  const Error error = model.Call([&] { return model.space().Advise(range, advice); },
                                 [&] {
                                   if (drops) model.SetUnknown(advised);
                                 });
  model.Expect("Advise", error, end < range.end ? Error::System(EINVAL)
                                : hole          ? Error{ErrorCode::kNotMapped}
                                                : Error::Ok());
  if (advice == Advice::kDontNeed) model.SetZero(advised);
  if (advice == Advice::kFree) model.SetUnknown(advised);
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
    } else if (!model.IsMapped(range)) {
      want = ErrorCode::kNotMapped;
    }
  }
  const Error error = model.Call([&] { return model.space().Discard(ranges); },
                                 [&] {
                                   if (want != ErrorCode::kOk) return;
                                   for (const PageRange range : ranges) model.SetUnknown(range);
                                 });
  if (!model.Expect("Discard", error, want) || !error.ok()) return;
  for (const PageRange range : ranges) model.SetZero(range);
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

void Residency::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  if (range.empty()) return;
  std::vector<std::uint8_t> resident(range.count().value, 2);
  const Error error = model.Call([&] { return model.space().Residency(range, absl::MakeSpan(resident)); });
  const bool mapped = model.IsMapped(range);
  if (!model.Expect("Residency", error, mapped ? ErrorCode::kOk : ErrorCode::kNotMapped) || !mapped) return;
  model.Expect(*std::max_element(resident.begin(), resident.end()) <= 1, "Residency: neither 0 nor 1");
}

void Populate::Perform(SpaceModel& model) const {
  const PageRange range = span.Range(model);
  if (range.empty()) return;
  ErrorCode want = ErrorCode::kOk;
  bool writable = true;  // a file's pages are refused when their turn comes
  for (PageNumber page = range.first; page < range.end && want == ErrorCode::kOk; page = page + Pages{1}) {
    const SpaceModel::Page* known = model.Find(page);
    writable = writable && known != nullptr && Writable(known->protection);
    if (known == nullptr) {
      want = ErrorCode::kNotMapped;
    } else if (known->file == nullptr && !Writable(known->protection)) {
      want = ErrorCode::kUnsupported;
    }
  }
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
  if (want == ErrorCode::kOk && !writable && error.code == ErrorCode::kUnsupported) return;
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
    model.Expect(!Writable(model.Find(page)->protection) || resident[(page - range.first).value] == 1,
                 "LockMemory: a page is not resident");
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
  // Beyond the end of the file there is nothing to check.
  if (first.file != nullptr && first.file_page + count > FilePages::kPages) return;
  if (!model.HasRoomFor(count)) return;

  const bool moves = fixed || options.may_move;
  const PageRange more = {range.end, std::max(range.end, goal.end)};
  ErrorCode want = ErrorCode::kOk;
  using Pinned = SpaceModel::Pinned;
  const Pinned more_pinned = model.PinnedIn(more);
  if (more_pinned == Pinned::kMaybe) return;
  const bool fits = model.InOneRegion(goal) && model.IsFree(more) && more_pinned == Pinned::kNo;
  const Pinned target_pinned = fixed ? model.PinnedIn(goal) : Pinned::kNo;
  const bool source_pinned = model.PinnedIn(range) == Pinned::kYes;
  if (placement == Placement::kHint || (keep_source && (!moves || count != before))) {
    want = ErrorCode::kUnsupported;
  } else if (!one_vma) {
    want = ErrorCode::kNotMapped;
  } else if (fixed || keep_source) {
    if (first.file != nullptr) {
      want = ErrorCode::kUnsupported;
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
           : first.file != nullptr ? ErrorCode::kUnsupported
           : source_pinned         ? ErrorCode::kPinned
                                   : ErrorCode::kOk;
  }

  Result<PageRange> remapped = ErrorCode::kNoRoom;
  // What was to be replaced may be gone, all of it.
  const auto tolerate = [&] {
    if (placement != Placement::kReplace || target_pinned == Pinned::kYes) return;
    if (want != ErrorCode::kOk && want != ErrorCode::kPinned) return;
    const auto replaced = model.pages().lower_bound(goal.first.value);
    if (replaced == model.pages().end() || !goal.Contains(PageNumber{replaced->first})) return;
    if (!model.space().Lookup({replaced->first}).ok()) model.Erase(goal);
  };
  const Error error = model.Call(
      [&] {
        remapped = model.space().Remap(range, {count}, options);
        return remapped.error();
      },
      tolerate);
  if (first.lock != MemoryLock::kNone && want == ErrorCode::kOk && IsLockLimit(error)) return tolerate();
  // Several refusals may be due, and others may have pinned something.
  const bool perhaps_pinned =
      source_pinned || target_pinned != Pinned::kNo || (!model.alone() && placement == Placement::kFixed);
  if (error.code == ErrorCode::kPinned && perhaps_pinned && want != ErrorCode::kNotMapped) return tolerate();
  if (!model.alone() && (want == ErrorCode::kOk || want == ErrorCode::kPinned) && !error.ok()) {
    // Somebody has the pages behind it, or the target, or unmapped the target meanwhile.
    const bool lost_race = error.code == ErrorCode::kReplaced && !fixed;
    const bool taken = placement == Placement::kFixed
                           ? error.code == ErrorCode::kOverlap || error.code == ErrorCode::kPinned
                       : count <= before ? false
                       : options.may_move ? (error.code == ErrorCode::kUnsupported && first.file != nullptr) ||
                                                (error.code == ErrorCode::kPinned && source_pinned)
                                          : error.code == ErrorCode::kNoRoom;
    if (lost_race || taken) return;
  }
  if (!model.Expect("Remap", error, want) || !error.ok()) return;

  model.Expect(remapped->count().value == count, "Remap: wrong size");
  const bool stays = !fixed && !keep_source && (count <= before || (fits && *remapped == goal));
  model.Expect(!(fixed || stays || (model.alone() && fits && !keep_source)) || *remapped == goal,
               "Remap: wrong place");
  std::vector<SpaceModel::Page> pages;
  for (std::size_t i = 0; i < count; ++i) {
    SpaceModel::Page page = first;
    if (i < before) {
      page = *model.Find(range.first + Pages{i});
    } else {
      page.known = true;
      page.stamp = 0;
      page.file_page = first.file_page + i;
    }
    pages.push_back(page);
  }
  if (keep_source) {
    model.SetZero(range);
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
  for (std::size_t i = 0; i < count; ++i) model.Put(remapped->first + Pages{i}, pages[i]);
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
  FilePages* file = nullptr;
};

// Whether this step is a reason to refuse the transaction with `code`.
bool MayRefuse(SpaceModel& model, const PlannedStep& planned, ErrorCode code) {
  const PageRange range = planned.range;
  const Protection protection = ProtectionOf(planned.step.protection);
  const bool map = planned.step.verb == Step::Verb::kMap;
  const bool replace = map && planned.step.replace;
  bool backed = false;
  bool denied = planned.file != nullptr && !planned.file->Allows(protection);
  ForEachPage(range, [&](PageNumber page) {
    const SpaceModel::Page* old = model.Find(page);
    backed = backed || (old != nullptr && old->file != nullptr);
    denied = denied || (planned.step.verb == Step::Verb::kProtect && old != nullptr && old->file != nullptr &&
                        !old->file->Allows(protection));
  });
  switch (code) {
    case ErrorCode::kOutsideReservation: return !model.InOneRegion(range);
    case ErrorCode::kOverlap: return map && !replace && !model.IsFree(range);
    case ErrorCode::kPinned: return map && model.PinnedIn(range) != SpaceModel::Pinned::kNo;
    case ErrorCode::kNotMapped: return planned.step.verb == Step::Verb::kProtect && !model.IsMapped(range);
    case ErrorCode::kDenied: return denied;
    case ErrorCode::kUnsupported: return replace && !model.IsFree(range) && (backed || planned.file != nullptr);
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
    FilePages* const file =
        step.verb == Step::Verb::kMap && step.file >= 1 && step.file <= SpaceModel::kFiles ? &model.file(step.file - 1)
                                                                                           : nullptr;
    steps.push_back({step, range, file});
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
                                          .backing = planned.file,
                                          .backing_page = planned.step.file_page});
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
          const std::uint64_t file_page = planned.step.file_page + (page - range.first).value;
          model.Put(page, {.protection = protection,
                           .lock = planned.step.lock != MemoryLock::kNone ? planned.step.lock : model.future_lock,
                           .generation = vma->generation,
                           .file = planned.file,
                           .file_page = planned.file == nullptr ? 0 : file_page});
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
                     vma.protection == page->protection && vma.lock == page->lock && vma.backing == page->file &&
                     (page->file == nullptr || vma.backing_page == page->file_page),
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
      if (model.Find(page)->file != nullptr || model.PinnedIn(one) != SpaceModel::Pinned::kNo) return;
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
  model.Arm(nth + std::size_t{1}, kErrors[error % 3]);
}

// ---- Shared pages ----

namespace {

// Of shared pages: "A", and who wrote it.
constexpr std::uint64_t kSharedStamp = std::uint64_t{'A'} << 56;

// The kernel reads and writes for us: it is refused where we would be killed.
bool Transfer(bool write, PageNumber page, std::uint64_t& word) {
  iovec here = {&word, sizeof word};
  iovec there = {page.address(), sizeof word};
  const ssize_t done =
      write ? process_vm_writev(getpid(), &here, 1, &there, 1, 0) : process_vm_readv(getpid(), &here, 1, &there, 1, 0);
  return done == sizeof word;
}

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
    map.backing = shared.file;
    map.protection = Protection::kReadWrite;
    map.backing_page = page;
  }
  switch (verb % (open ? 16 : 12)) {
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
                  {kUnsupported, kReplaced, open ? kNotMapped : kReplaced});
      break;
    case 7:
      ExpectAnyOf(model, "Advise", space.Advise(range, static_cast<Advice>(choice % 7)),
                  {kSystem, open ? kNotMapped : kSystem});
      break;
    case 8:
      ExpectAnyOf(model, "Discard", space.Discard({&range, 1}), {open ? kNotMapped : kOk});
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
      ExpectAnyOf(model, "Unmap", space.Unmap(range), {});
      break;
    case 14:
      map.placement = Placement::kFixed;
      ExpectAnyOf(model, "Map", space.Map(range.count(), map).error(), {kOverlap, kPinned, kSystem});
      break;
    case 15: {
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
FREEHOLD_NAME(Placement);
FREEHOLD_NAME(Content);
FREEHOLD_NAME(Advice);
FREEHOLD_NAME(PurgeScope);
FREEHOLD_NAME(Populate::Stop);
template <>
constexpr const char* kName<MemoryLock> = "os::MemoryLock";
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
