#include "tests/vm/space_model.h"

#include <algorithm>
#include <map>

#include "vm/os/linux_kernel.h"

namespace freehold::vm {
namespace {

using os::MemoryLock;
using os::Protection;
using Kind = SpaceOperation::Kind;

bool Readable(Protection p) { return p != Protection::kNone; }
bool Writable(Protection p) { return (static_cast<unsigned>(p) & 2) != 0; }

Protection ProtectionOf(std::uint8_t choice) {
  static constexpr Protection kChoices[] = {Protection::kReadWrite, Protection::kReadWrite,
                                            Protection::kRead, Protection::kNone};
  return kChoices[choice & 3];
}

const char* NameOf(Kind kind) {
  static constexpr const char* kNames[] = {"MapAnywhere", "MapFixed", "MapReplace", "Unmap",
                                           "Protect",     "Populate", "Discard",    "Write",
                                           "Lookup",      "Purge",    "Tick",    "Advise",
                                           "Residency",   "LockMemory", "UnlockMemory", "LockAll",
                                           "UnlockAll",   "Remap"};
  return kNames[static_cast<int>(kind)];
}

std::string Hex(PageNumber page) {
  char text[32];
  std::snprintf(text, sizeof text, "%#zx", page.value);
  return text;
}

}  // namespace

std::string SpaceOperation::ToString() const {
  return std::string("{Kind::k") + NameOf(kind) + ", " + std::to_string(page) + ", " +
         std::to_string(count) + ", " + std::to_string(choice) + "}";
}

SpaceModel::SpaceModel(AddressSpace& space) : space_(space) {
  // The zones in address order: two quarters plain, one dense, one mapping (DESIGN §3).
  const PageRange all = space.reservation();
  const std::size_t quarter = all.count().value / 4;
  for (const std::size_t zone : {std::size_t{0}, std::size_t{2}, std::size_t{3}}) {
    windows_.push_back(PageRange::Of(all.first + Pages{zone * quarter}, {kWindowPages}));
    pages_.emplace_back(kWindowPages);
  }
}

bool SpaceModel::Fail(const std::string& what) {
  failure_ = what;
  return false;
}

PageRange SpaceModel::RangeOf(const SpaceOperation& operation) const {
  const std::size_t window = operation.page % windows_.size();
  const std::size_t first = operation.page / windows_.size() % kWindowPages;
  // Small ranges mostly, and some of more than FreeRanges::kExactPages.
  const std::size_t wanted =
      operation.count < 192 ? 1 + operation.count % 48 : 65 + 2 * (operation.count - std::size_t{192});
  const std::size_t count = std::min<std::size_t>(wanted, kWindowPages - first);
  return PageRange::Of(windows_[window].first + Pages{first}, {count});
}

SpaceModel::Page* SpaceModel::At(PageNumber page) {
  for (std::size_t i = 0; i < windows_.size(); ++i) {
    if (windows_[i].Contains(page)) return &pages_[i][(page - windows_[i].first).value];
  }
  return nullptr;
}

bool SpaceModel::ExpectError(const char* verb, Error got, ErrorCode want) {
  if (got.code == want) return true;
  return Fail(std::string(verb) + ": got '" + freehold::vm::ToString(got.code) + "', expected '" +
              freehold::vm::ToString(want) + "'");
}

bool SpaceModel::Map(const SpaceOperation& operation, Placement placement) {
  PageRange range = RangeOf(operation);
  MapOptions options;
  options.placement = placement;
  options.address = range.address();
  options.protection = ProtectionOf(operation.choice);
  options.content = (operation.choice & 4) != 0 ? Content::kAnything : Content::kZeroed;
  options.populate = (operation.choice & 8) != 0;
  options.huge_pages = (operation.choice & 16) != 0 ? os::HugePages::kPrefer : os::HugePages::kAvoid;
  if (placement == Placement::kAnywhere) options.alignment = {std::size_t{1} << (operation.choice >> 5)};
  if (placement != Placement::kAnywhere) options.lock = static_cast<MemoryLock>((operation.choice >> 5) % 6 % 3);
  const MemoryLock lock = options.lock != MemoryLock::kNone ? options.lock : future_lock_;
  bool overlap = false;
  if (placement != Placement::kAnywhere) {
    for (PageNumber p = range.first; p < range.end; p = p + Pages{1}) overlap |= At(p)->mapped;
  }
  const Result<PageRange> mapped = space_.Map(range.count(), options);
  if (placement == Placement::kFixed && overlap) {
    return ExpectError("MapFixed", mapped.error(), ErrorCode::kOverlap);
  }
  if (lock != MemoryLock::kNone && IsLockLimit(mapped.error())) return true;
  if (!mapped.ok()) return ExpectError("Map", mapped.error(), ErrorCode::kOk);
  if (placement != Placement::kAnywhere && !(*mapped == range)) return Fail("Map: not at the fixed range");
  if (mapped->count() != range.count()) return Fail("Map: wrong size");
  if (mapped->first.value % options.alignment.value != 0) return Fail("Map: not aligned");
  const std::uint64_t mapping = ++last_mapping_;
  const Result<VmaInfo> vma = space_.Lookup(mapped->first);
  if (!vma.ok()) return Fail("Map: not mapped afterwards");
  generations_.emplace_back(mapping, vma->generation);
  bool inside = true;
  for (PageNumber p = mapped->first; p < mapped->end; p = p + Pages{1}) {
    Page* page = At(p);
    if (page == nullptr) {
      inside = false;
      break;
    }
    if (placement == Placement::kAnywhere && page->mapped) return Fail("Map: handed out a mapped page");
    *page = {true, options.protection, lock, mapping, options.content == Content::kZeroed, 0};
  }
  // Beyond the windows the model is blind: give it back.
  if (!inside) {
    for (PageNumber p = mapped->first; p < mapped->end; p = p + Pages{1}) {
      if (Page* page = At(p)) *page = {};
    }
    if (!space_.Unmap(*mapped).ok()) return Fail("Unmap of a fresh mapping");
  }
  return true;
}

bool SpaceModel::Perform(const SpaceOperation& operation) {
  const PageRange range = RangeOf(operation);
  bool all_mapped = true;
  bool all_writable = true;
  for (PageNumber p = range.first; p < range.end; p = p + Pages{1}) {
    all_mapped &= At(p)->mapped;
    all_writable &= Writable(At(p)->protection);
  }
  switch (operation.kind) {
    case Kind::kMapAnywhere:
      return Map(operation, Placement::kAnywhere);
    case Kind::kMapFixed:
      return Map(operation, Placement::kFixed);
    case Kind::kMapReplace:
      return Map(operation, Placement::kReplace);
    case Kind::kUnmap:
      if (!ExpectError("Unmap", space_.Unmap(range), ErrorCode::kOk)) return false;
      for (PageNumber p = range.first; p < range.end; p = p + Pages{1}) *At(p) = {};
      return true;
    case Kind::kProtect: {
      const Protection protection = ProtectionOf(operation.choice);
      if (!ExpectError("Protect", space_.Protect(range, protection),
                       all_mapped ? ErrorCode::kOk : ErrorCode::kNotMapped)) {
        return false;
      }
      if (!all_mapped) return true;
      for (PageNumber p = range.first; p < range.end; p = p + Pages{1}) At(p)->protection = protection;
      return true;
    }
    case Kind::kPopulate: {
      const Result<Pages> done = space_.Populate(range);
      const ErrorCode want = !all_mapped     ? ErrorCode::kNotMapped
                             : !all_writable ? ErrorCode::kUnsupported
                                             : ErrorCode::kOk;
      // The first obstacle decides, and either may come first.
      if (!all_mapped && !all_writable && done.error().code == ErrorCode::kUnsupported) return true;
      if (!ExpectError("Populate", done.error(), want)) return false;
      return !done.ok() || *done == range.count() || Fail("Populate: wrong count");
    }
    case Kind::kDiscard:
      if (!ExpectError("Discard", space_.Discard({&range, 1}),
                       all_mapped ? ErrorCode::kOk : ErrorCode::kNotMapped)) {
        return false;
      }
      if (!all_mapped) return true;
      for (PageNumber p = range.first; p < range.end; p = p + Pages{1}) {
        At(p)->known = true;
        At(p)->value = 0;
      }
      return true;
    case Kind::kWrite:
      for (PageNumber p = range.first; p < range.end; p = p + Pages{1}) {
        Page& page = *At(p);
        if (!page.mapped || !Writable(page.protection)) continue;
        page.known = true;
        page.value = operation.choice;
        std::fill_n(reinterpret_cast<std::uint8_t*>(p.address()), kPageSize, page.value);
      }
      return true;
    case Kind::kLookup:
      return CheckPage(range.first, *At(range.first));
    case Kind::kPurge:
      (void)space_.Purge((operation.choice & 1) != 0 ? PurgeScope::kAll : PurgeScope::kDecayed);
      return true;
    case Kind::kTick:
      space_.Tick();
      return true;
    case Kind::kAdvise: {
      const auto advice = static_cast<Advice>(operation.choice % 7);
      const bool hint = advice == Advice::kWillNeed || advice == Advice::kHugePages || advice == Advice::kNoHugePages;
      // It ends at the first VMA that is locked.
      PageNumber end = range.first;
      while (end < range.end && (hint || At(end)->lock == MemoryLock::kNone)) end = end + Pages{1};
      if (!ExpectError("Advise", space_.Advise(range, advice),
                       end < range.end ? ErrorCode::kSystem : all_mapped ? ErrorCode::kOk : ErrorCode::kNotMapped)) {
        return false;
      }
      // What is mapped was advised, whatever lies between.
      for (PageNumber p = range.first; p < end; p = p + Pages{1}) {
        if (!At(p)->mapped) continue;
        if (advice == Advice::kDontNeed) {
          At(p)->known = true;
          At(p)->value = 0;
        }
        if (advice == Advice::kFree) At(p)->known = false;
      }
      return true;
    }
    case Kind::kResidency: {
      std::vector<std::uint8_t> resident(range.count().value, 2);
      if (!ExpectError("Residency", space_.Residency(range, absl::MakeSpan(resident)),
                       all_mapped ? ErrorCode::kOk : ErrorCode::kNotMapped)) {
        return false;
      }
      for (PageNumber p = range.first; all_mapped && p < range.end; p = p + Pages{1}) {
        // Content other than zeroes is somewhere, and these tests are not swapped out.
        const std::uint8_t is_resident = resident[(p - range.first).value];
        if (is_resident > 1 || (is_resident == 0 && At(p)->known && At(p)->value != 0)) {
          return Fail("Residency: page " + Hex(p) + " got " + std::to_string(is_resident));
        }
      }
      return true;
    }
    case Kind::kLockMemory:
    case Kind::kUnlockMemory: {
      const MemoryLock lock = operation.kind == Kind::kUnlockMemory ? MemoryLock::kNone
                              : (operation.choice & 1) != 0         ? MemoryLock::kLocked
                                                                    : MemoryLock::kOnFault;
      const Error error =
          lock == MemoryLock::kNone ? space_.UnlockMemory(range) : space_.LockMemory(range, lock);
      if (IsLockLimit(error)) return true;
      if (!ExpectError("LockMemory", error, all_mapped ? ErrorCode::kOk : ErrorCode::kNotMapped)) return false;
      if (all_mapped) SetLockOf(range, lock);
      return true;
    }
    case Kind::kLockAll: {
      const LockAllOptions options = {.current = (operation.choice & 1) != 0,
                                      .future = (operation.choice & 2) != 0,
                                      .lock = (operation.choice & 4) != 0 ? MemoryLock::kLocked : MemoryLock::kOnFault};
      const Error error = space_.LockAll(options);
      if (!options.current && !options.future) return ExpectError("LockAll", error, ErrorCode::kEmpty);
      if (IsLockLimit(error)) {
        // Some may be locked.
        future_lock_ = MemoryLock::kNone;
        SetLockOf(space_.reservation(), MemoryLock::kNone);
        return space_.UnlockAll().ok();
      }
      if (!ExpectError("LockAll", error, ErrorCode::kOk)) return false;
      future_lock_ = options.future ? options.lock : MemoryLock::kNone;
      if (options.current) SetLockOf(space_.reservation(), options.lock);
      return true;
    }
    case Kind::kUnlockAll:
      future_lock_ = MemoryLock::kNone;
      SetLockOf(space_.reservation(), MemoryLock::kNone);
      return ExpectError("UnlockAll", space_.UnlockAll(), ErrorCode::kOk);
    case Kind::kRemap:
      return Remap(operation);
    case Kind::kKindCount:
      break;
  }
  return Fail("no such operation");
}

// Half of the operations grow or shrink, in place or not, the others move to a fixed address.
bool SpaceModel::Remap(const SpaceOperation& operation) {
  const PageRange range = RangeOf(operation);
  const PageRange window = windows_[operation.page % windows_.size()];
  RemapOptions options;
  std::size_t count = std::min<std::size_t>(1 + operation.choice / 4, (window.end - range.first).value);
  if ((operation.choice & 1) != 0) {
    // Somewhere in a window; the next one sometimes.
    const PageRange other = windows_[(operation.page + operation.choice / 16) % windows_.size()];
    const std::size_t at = (operation.choice * 37u + operation.page) % (kWindowPages - count);
    options.placement = (operation.choice & 2) != 0 ? Placement::kReplace : Placement::kFixed;
    options.address = (other.first + Pages{at}).address();
    options.keep_source = (operation.choice & 8) != 0;
    if (options.keep_source && at + range.count().value <= kWindowPages) count = range.count().value;
  } else {
    options.may_move = (operation.choice & 2) != 0;
  }
  const Page first = *At(range.first);
  bool one_vma = first.mapped;
  for (PageNumber p = range.first; p < range.end; p = p + Pages{1}) {
    const Page& page = *At(p);
    one_vma = one_vma && page.mapped && page.mapping == first.mapping && page.protection == first.protection &&
              page.lock == first.lock;
  }
  PageRange target = PageRange::Of(range.first, {count});
  bool fits = true;
  for (PageNumber p = range.end; p < target.end; p = p + Pages{1}) fits = fits && !At(p)->mapped;
  ErrorCode want = ErrorCode::kOk;
  if (options.placement != Placement::kAnywhere) {
    target = PageRange::Of(PageNumber::Of(options.address), {count});
    bool free = true;
    for (PageNumber p = target.first; p < target.end; p = p + Pages{1}) free = free && !At(p)->mapped;
    if (target.Overlaps(range) || (!free && options.placement == Placement::kFixed)) want = ErrorCode::kOverlap;
  } else if (!fits && !options.may_move) {
    want = ErrorCode::kNoRoom;
  }
  if (!one_vma) want = ErrorCode::kNotMapped;
  if (options.keep_source && count != range.count().value) want = ErrorCode::kUnsupported;

  std::vector<Page> pages;
  for (std::size_t i = 0; i < count; ++i) {
    Page page = first;
    page.known = true;
    page.value = 0;
    if (i < range.count().value) page = *At(range.first + Pages{i});
    pages.push_back(page);
  }
  const Result<PageRange> remapped = space_.Remap(range, {count}, options);
  if (first.lock != MemoryLock::kNone && IsLockLimit(remapped.error())) return true;
  if (!ExpectError("Remap", remapped.error(), want)) return false;
  if (!remapped.ok()) return true;
  if (remapped->count().value != count) return Fail("Remap: wrong size");
  if ((options.placement != Placement::kAnywhere || fits) && !(*remapped == target)) return Fail("Remap: wrong place");
  std::uint64_t mapping = first.mapping;
  if (options.keep_source) {
    mapping = ++last_mapping_;
    const Result<VmaInfo> vma = space_.Lookup(remapped->first);
    if (!vma.ok()) return Fail("Remap: not mapped afterwards");
    generations_.emplace_back(mapping, vma->generation);
  }
  for (PageNumber p = range.first; p < range.end; p = p + Pages{1}) {
    if (options.keep_source) {
      At(p)->known = true;
      At(p)->value = 0;
    } else {
      *At(p) = {};
    }
  }
  bool inside = true;
  for (std::size_t i = 0; i < count; ++i) {
    pages[i].mapping = mapping;
    Page* page = At(remapped->first + Pages{i});
    if (page != nullptr) *page = pages[i];
    inside = inside && page != nullptr;
  }
  if (!inside) {
    for (PageNumber p = remapped->first; p < remapped->end; p = p + Pages{1}) {
      if (Page* page = At(p)) *page = {};
    }
    if (!space_.Unmap(*remapped).ok()) return Fail("Unmap of a remapped mapping");
  }
  return true;
}

bool SpaceModel::IsLockLimit(Error error) { return error == Error::System(ENOMEM) || error == Error::System(EPERM); }

void SpaceModel::SetLockOf(PageRange range, MemoryLock lock) {
  for (std::size_t window = 0; window < windows_.size(); ++window) {
    for (std::size_t i = 0; i < kWindowPages; ++i) {
      Page& page = pages_[window][i];
      if (page.mapped && range.Contains(windows_[window].first + Pages{i})) page.lock = lock;
    }
  }
}

bool SpaceModel::CheckPage(PageNumber number, const Page& page) {
  const Result<VmaInfo> vma = space_.Lookup(number);
  if (vma.ok() != page.mapped) {
    return Fail("page " + Hex(number) + (page.mapped ? " should be mapped" : " should not be mapped"));
  }
  if (!page.mapped) return true;
  if (!vma->range.Contains(number)) return Fail("page " + Hex(number) + ": lookup gave another range");
  if (vma->protection != page.protection) return Fail("page " + Hex(number) + ": wrong protection");
  if (vma->lock != page.lock) return Fail("page " + Hex(number) + ": wrong lock");
  const auto generation = std::lower_bound(generations_.begin(), generations_.end(),
                                           std::make_pair(page.mapping, std::uint64_t{0}));
  if (generation->second != vma->generation) return Fail("page " + Hex(number) + ": wrong generation");
  if (!page.known || !Readable(page.protection)) return true;
  const auto* bytes = reinterpret_cast<const volatile std::uint8_t*>(number.address());
  for (const std::size_t offset : {std::size_t{0}, kPageSize / 2, kPageSize - 1}) {
    if (bytes[offset] != page.value) {
      return Fail("page " + Hex(number) + ": holds " + std::to_string(bytes[offset]) + ", expected " +
                  std::to_string(page.value));
    }
  }
  return true;
}

bool SpaceModel::CheckAll() {
  for (std::size_t window = 0; window < windows_.size(); ++window) {
    for (std::size_t i = 0; i < kWindowPages; ++i) {
      if (!CheckPage(windows_[window].first + Pages{i}, pages_[window][i])) return false;
    }
  }
  // The walk over all VMAs sees the same pages.
  std::size_t mapped = 0;
  space_.ForEachVma(
      [](void* context, const VmaInfo& vma) { *static_cast<std::size_t*>(context) += vma.range.count().value; },
      &mapped);
  std::size_t expected = 0;
  for (const auto& window : pages_) {
    expected += static_cast<std::size_t>(
        std::count_if(window.begin(), window.end(), [](const Page& page) { return page.mapped; }));
  }
  if (mapped != expected) return Fail("ForEachVma: wrong number of pages");
  space_.CheckInvariants();
  return true;
}

namespace {

// "" or what failed, and after how many operations.
std::string RunOnce(const std::vector<SpaceOperation>& operations, const AddressSpaceOptions& options,
                    std::size_t check_every, std::size_t& performed) {
  os::LinuxKernel kernel;
  const Result<AddressSpace*> space = AddressSpace::Create(kernel, options);
  if (!space.ok()) return "cannot create a space";
  SpaceModel model(**space);
  std::string failure;
  for (performed = 0; performed < operations.size() && failure.empty(); ++performed) {
    const bool check = (performed + 1) % check_every == 0 || performed + 1 == operations.size();
    if (!model.Perform(operations[performed]) || (check && !model.CheckAll())) failure = model.failure();
  }
  AddressSpace::Destroy(*space);
  return failure;
}

// Leaves out whatever is not needed for some failure, in ever smaller pieces.
std::vector<SpaceOperation> Shrink(std::vector<SpaceOperation> operations, const AddressSpaceOptions& options) {
  std::size_t performed = 0;
  for (std::size_t piece = operations.size() / 2; piece > 0; piece /= 2) {
    for (std::size_t at = 0; at + piece <= operations.size();) {
      std::vector<SpaceOperation> fewer = operations;
      fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(at),
                  fewer.begin() + static_cast<std::ptrdiff_t>(at + piece));
      if (RunOnce(fewer, options, 1, performed).empty()) {
        at += piece;
      } else {
        operations = std::move(fewer);
      }
    }
  }
  return operations;
}

}  // namespace

std::string RunSpaceOperations(const std::vector<SpaceOperation>& operations,
                               const AddressSpaceOptions& options, std::size_t check_every) {
  std::size_t performed = 0;
  std::string failure = RunOnce(operations, options, check_every, performed);
  if (failure.empty()) return failure;
  failure += " (after operation " + std::to_string(performed) + "); enough to fail:\n";
  const std::vector<SpaceOperation> upto(operations.begin(),
                                         operations.begin() + static_cast<std::ptrdiff_t>(performed));
  for (const SpaceOperation& operation : Shrink(upto, options)) failure += "  " + operation.ToString() + ",\n";
  return failure;
}

}  // namespace freehold::vm
