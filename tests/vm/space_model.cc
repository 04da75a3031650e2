#include "tests/vm/space_model.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>
#include <utility>

namespace freehold::vm::test {
namespace {

using os::MemoryLock;
using os::Protection;

constexpr unsigned Bit(Invalidation what) { return 1u << static_cast<unsigned>(what); }

volatile std::uint64_t* WordsOf(PageNumber page) { return reinterpret_cast<volatile std::uint64_t*>(page.address()); }

std::string Text(Error error) {
  return std::string(ToString(error.code)) +
         (error.sys_errno != 0 ? " (errno " + std::to_string(error.sys_errno) + ")" : "");
}

}  // namespace

std::string Hex(PageRange range) {
  char text[64];
  std::snprintf(text, sizeof text, "[%#zx, %#zx)", range.first.value, range.end.value);
  return text;
}

// ---- Notifiers ----

Listener::Listener(AddressSpace& space, const std::set<std::size_t>* mapped)
    : space_(space),
      alone_(mapped != nullptr),
      pages_(alone_ ? *mapped : std::set<std::size_t>()),
      registration_(space, space.reservation(), *this) {}

void Listener::Expect(bool condition, const char* what, PageRange range) {
  if (!condition && failure_.empty()) failure_ = std::string(what) + " of " + Hex(range);
}

void Listener::OnMap(PageRange range) {
  const std::lock_guard lock(mutex_);
  announced_.erase(announced_.lower_bound(range.first.value), announced_.lower_bound(range.end.value));
  if (!alone_) return;
  for (std::size_t page = range.first.value; page < range.end.value; ++page) {
    Expect(pages_.insert(page).second, "OnMap of what is mapped", range);
  }
}

// Until this returns, it is as it was. It may be the target of a Remap that is refused, of which nobody was told.
void Listener::OnInvalidate(PageRange range, Invalidation what) {
  const bool mapped = space_.Lookup(range.first).ok();
  const std::lock_guard lock(mutex_);
  Expect(mapped, "OnInvalidate of what is not mapped", range);
  for (std::size_t page = range.first.value; page < range.end.value; ++page) announced_[page] |= Bit(what);
}

// What it knows to be mapped goes after that was announced.
void Listener::OnClose(PageRange range) {
  const std::lock_guard lock(mutex_);
  constexpr unsigned kEnds = Bit(Invalidation::kUnmap) | Bit(Invalidation::kReplace) | Bit(Invalidation::kMove);
  for (auto page = pages_.lower_bound(range.first.value); page != pages_.end() && *page < range.end.value; ++page) {
    Expect((announced_[*page] & kEnds) != 0, "OnClose without OnInvalidate", range);
  }
  announced_.erase(announced_.lower_bound(range.first.value), announced_.lower_bound(range.end.value));
  pages_.erase(pages_.lower_bound(range.first.value), pages_.lower_bound(range.end.value));
}

std::string Listener::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

bool Listener::Knows(std::size_t page) const {
  const std::lock_guard lock(mutex_);
  return pages_.count(page) == 1;
}

bool Listener::WasAnnounced(std::size_t page, Invalidation what) const {
  const std::lock_guard lock(mutex_);
  const auto found = announced_.find(page);
  return found != announced_.end() && (found->second & Bit(what)) != 0;
}

// Of unmaps that wait for a pin, OnClose comes later.
void Listener::ForgetAnnounced() {
  constexpr unsigned kChanges = Bit(Invalidation::kProtect) | Bit(Invalidation::kDiscard);
  const std::lock_guard lock(mutex_);
  for (auto& [page, what] : announced_) what &= ~kChanges;
}

std::set<std::size_t> Listener::pages() const {
  const std::lock_guard lock(mutex_);
  return pages_;
}

bool SharedPages::IsOpen(PageRange range) const {
  return std::any_of(open.begin(), open.end(), [&](PageRange part) { return part.Overlaps(range); });
}

// ---- The model ----

SpaceModel::SpaceModel(AddressSpace& space, os::FakeKernel& kernel)
    : space_(space), kernel_(&kernel), shared_(nullptr), owner_(1) {
  MakeWindows();
}

SpaceModel::SpaceModel(AddressSpace& space, const SharedPages& shared, unsigned owner)
    : space_(space), kernel_(nullptr), shared_(&shared), owner_(owner), faults_(shared.faults) {
  MakeWindows();
}

SpaceModel::~SpaceModel() {
  if (alone()) return;
  for (std::size_t i = 0; i < kPins; ++i) SetPin(i, nullptr);
  Listen(false);
  for (const auto& [number, page] : pages_) (void)space_.Unmap({{number}, {number + 1}});
  // Pagers that are called no more.
  CheckReleased();
}

void SpaceModel::MakeWindows() {
  // In address order: two regions of plain memory, one dense, one for mappings (see SmallOptions).
  all_ = space_.reservation();
  region_pages_ = all_.count().value / 4;
  for (const std::size_t first : {std::size_t{0}, region_pages_ - kWindowPages / 2, 2 * region_pages_,
                                  3 * region_pages_}) {
    windows_.push_back(PageRange::Of(all_.first + vm::Pages{first}, {kWindowPages}));
  }
  backings_.push_back(std::make_unique<FilePages>(Protection::kReadWrite));
  backings_.push_back(std::make_unique<FilePages>(Protection::kRead));
}

PageRange SpaceModel::RegionOf(PageNumber page) const {
  const std::size_t index = (page - all_.first).value / region_pages_;
  return PageRange::Of(all_.first + vm::Pages{index * region_pages_}, {region_pages_});
}

SpaceModel::Page* SpaceModel::Find(PageNumber page) {
  const auto found = pages_.find(page.value);
  return found == pages_.end() ? nullptr : &found->second;
}

bool SpaceModel::IsMapped(PageRange range) {
  const auto from = pages_.lower_bound(range.first.value);
  const auto to = pages_.lower_bound(range.end.value);
  return static_cast<std::size_t>(std::distance(from, to)) == range.count().value;
}

bool SpaceModel::IsFree(PageRange range) {
  return pages_.lower_bound(range.first.value) == pages_.lower_bound(range.end.value);
}

bool SpaceModel::Continues(std::size_t number, const Page& page, std::size_t next_number, const Page& next) {
  return next_number == number + 1 && next.generation == page.generation && next.protection == page.protection &&
         next.lock == page.lock && next.backing == page.backing &&
         (page.backing == nullptr || next.source_page == page.source_page + 1);
}

PageRange SpaceModel::VmaOf(PageNumber page) {
  const PageRange region = RegionOf(page);
  auto first = pages_.find(page.value);
  auto last = first;
  while (first != pages_.begin() && region.Contains(PageNumber{first->first - 1})) {
    const auto before = std::prev(first);
    if (!Continues(before->first, before->second, first->first, first->second)) break;
    first = before;
  }
  for (auto next = std::next(last); next != pages_.end() && region.Contains(PageNumber{next->first}) &&
                                    Continues(last->first, last->second, next->first, next->second);
       ++next) {
    last = next;
  }
  return {{first->first}, {last->first + 1}};
}

void SpaceModel::Erase(PageRange range) {
  const auto from = pages_.lower_bound(range.first.value);
  const auto to = pages_.lower_bound(range.end.value);
  if (PinnedIn(range) == Pinned::kYes) {
    for (auto at = from; at != to; ++at) {
      perhaps_deferred_.insert(at->first);
      if (PinnedIn({{at->first}, {at->first + 1}}) == Pinned::kYes) deferred_.insert(*at);
    }
  }
  for (auto at = from; at != to; ++at) {
    // What a failure has kept from being written back waits for the pin.
    if (!had_failures_ || PinnedIn(range) == Pinned::kNo) CheckWrittenBack({at->first}, at->second);
    kernel_differs_.erase(at->first);
  }
  pages_.erase(from, to);
}

void SpaceModel::Put(PageNumber page, const Page& mapped) {
  if (const Page* old = Find(page); old != nullptr) CheckWrittenBack(page, *old);
  pages_[page.value] = mapped;
  kernel_differs_.erase(page.value);
  perhaps_deferred_.erase(page.value);
  deferred_.erase(page.value);
}

void SpaceModel::SetPin(std::size_t index, std::unique_ptr<Pin> pin) {
  pins_[index % kPins] = std::move(pin);
  std::erase_if(deferred_, [&](const auto& page) {
    return std::none_of(pins_.begin(), pins_.end(), [&](const std::unique_ptr<Pin>& other) {
      return other != nullptr && other->range().Contains(PageNumber{page.first});
    });
  });
  const bool none = std::all_of(pins_.begin(), pins_.end(), [](const auto& other) { return other == nullptr; });
  if (none && !had_failures_) perhaps_deferred_.clear();
}

SpaceModel::Pinned SpaceModel::PinnedIn(PageRange range) const {
  for (const std::unique_ptr<Pin>& pin : pins_) {
    if (pin != nullptr && pin->range().Overlaps(range)) return Pinned::kYes;
  }
  const auto perhaps = perhaps_deferred_.lower_bound(range.first.value);
  return perhaps != perhaps_deferred_.end() && *perhaps < range.end.value ? Pinned::kMaybe : Pinned::kNo;
}

void SpaceModel::ForgetDeferred() {
  if (std::all_of(pins_.begin(), pins_.end(), [](const auto& pin) { return pin == nullptr; })) {
    perhaps_deferred_.clear();
  }
}

bool SpaceModel::Page::MayHold(std::uint64_t word) const {
  if (Is(Source::Kind::kBacking)) return word == source->StampOf(source_page);
  const bool shows_file = Is(Source::Kind::kFile) && copied != Copied::kYes;
  if (shows_file && word == source->StampOf(source_page)) return true;
  return !(shows_file && copied == Copied::kNo) && (!known || word == stamp);
}

void SpaceModel::SetDropped(PageRange range) {
  for (auto at = pages_.lower_bound(range.first.value); at != pages_.end() && at->first < range.end.value; ++at) {
    Page& page = at->second;
    page.known = true;
    page.copied = Copied::kNo;
    if (page.anonymous()) page.stamp = 0;
  }
}

void SpaceModel::SetUnknown(PageRange range) {
  for (auto at = pages_.lower_bound(range.first.value); at != pages_.end() && at->first < range.end.value; ++at) {
    Page& page = at->second;
    if (page.anonymous()) page.known = false;
    if (page.copied == Copied::kYes) page.copied = Copied::kPerhaps;
  }
}

void SpaceModel::SetPopulated(PageRange range, bool all) {
  for (auto at = pages_.lower_bound(range.first.value); at != pages_.end() && at->first < range.end.value; ++at) {
    Page& page = at->second;
    if (!page.IsPrivate() || !Writable(page.protection) || page.copied == Copied::kYes || !page.Exists()) continue;
    const std::uint64_t now = page.source->StampOf(page.source_page);
    // A copy made now differs from one that was perhaps made before.
    if (page.copied == Copied::kPerhaps && page.stamp != now) page.known = false;
    page.stamp = now;
    page.copied = all ? Copied::kYes : Copied::kPerhaps;
  }
}

void SpaceModel::SetLost(PageRange range) {
  for (auto at = pages_.lower_bound(range.first.value); at != pages_.end() && at->first < range.end.value; ++at) {
    Page& page = at->second;
    if (page.anonymous()) page.known = false;
    page.lost = page.Is(Source::Kind::kFile);
    // It was written back, if the pager took it.
    if (page.Is(Source::Kind::kPager) && static_cast<const StampedPager*>(page.source)->refusing()) page.known = false;
  }
}

void SpaceModel::UnmapLost(PageRange range) {
  for (PageNumber number = range.first; number < range.end; number = number + vm::Pages{1}) {
    const Page* page = Find(number);
    if (page == nullptr || !page->lost) continue;
    const PageRange one = PageRange::Of(number, {1});
    if (Expect("Unmap", space_.Unmap(one), ErrorCode::kOk)) Erase(one);
  }
}

void SpaceModel::Write(PageRange range) {
  for (auto at = pages_.lower_bound(range.first.value); at != pages_.end() && at->first < range.end.value; ++at) {
    Page& page = at->second;
    if (!Writable(page.protection) || !page.Exists()) continue;
    const std::uint64_t stamp = NewStamp();
    volatile std::uint64_t* words = WordsOf({at->first});
    for (std::size_t i = 0; i < kWordsPerPage; i += kWordStep) words[i] = stamp;
    const bool shared_file = page.Is(Source::Kind::kFile) && !page.IsPrivate();
    if (page.Is(Source::Kind::kBacking) || shared_file) {
      page.source->SetStamp(page.source_page, stamp);
    } else {
      page.known = true;
      page.stamp = stamp;
      page.copied = page.IsPrivate() ? Copied::kYes : Copied::kNo;
    }
    if (shared_file && !static_cast<const StampedFile*>(page.source)->Holds(page.source_page, stamp)) {
      Fail("what was written to page " + Hex({{at->first}, {at->first + 1}}) + " is not in the file");
    }
  }
}

// ---- Files ----

StampedFile& SpaceModel::file(std::size_t index) {
  if (index == kFiles - 1 && shared_ != nullptr) return *shared_->file;
  std::unique_ptr<StampedFile>& file = files_[index];
  if (file == nullptr) {
    file = std::make_unique<StampedFile>(
        index == kFiles - 1 ? StampedFile::Place::kDisk : StampedFile::Place::kMemory,
        index == 1 ? StampedFile::Access::kReadOnly : StampedFile::Access::kReadWrite);
  }
  return *file;
}

SpaceModel::Extends SpaceModel::ExtendsInPlace(const Page& page) const {
  const auto found = extends_.find(page.backing);
  return found == extends_.end() ? Extends::kYes : found->second;
}

void SpaceModel::StartMapping(Backing* backing, bool extends) {
  extends_[backing] = extends ? Extends::kYes : Extends::kNo;
}

void SpaceModel::NoteLocked(PageRange range, bool done) {
  for (auto at = pages_.lower_bound(range.first.value); at != pages_.end() && at->first < range.end.value; ++at) {
    if (!at->second.Is(Source::Kind::kFile)) continue;
    Extends& extends = extends_[at->second.backing];
    if (extends == Extends::kYes || done) extends = done ? Extends::kNo : Extends::kMaybe;
  }
}

void SpaceModel::NoteWritable(PageRange range, bool done) {
  for (auto at = pages_.lower_bound(range.first.value); at != pages_.end() && at->first < range.end.value; ++at) {
    if (!at->second.IsPrivate() || Writable(at->second.protection)) continue;
    Extends& extends = extends_[at->second.backing];
    if (extends == Extends::kYes || done) extends = done ? Extends::kNo : Extends::kMaybe;
  }
}

// Copies go with the pages of which they are.
void SpaceModel::ResizeFile(StampedFile& file, std::uint64_t size) {
  file.Resize(size);
  for (Pages* pages : {&pages_, &deferred_}) {
    for (auto& [number, page] : *pages) {
      if (page.source != &file || page.source_page < size) continue;
      page.copied = Copied::kNo;
      page.known = true;
    }
  }
}

void SpaceModel::WriteFile(StampedFile& file, std::uint64_t page) {
  if (file.Exists(page)) file.Write(page, NewStamp());
}

// ---- Pagers ----

FaultService* SpaceModel::faults() {
  if (alone() && own_faults_ == nullptr) {
    userfault_ = std::make_unique<FailingUserfault>();
    own_faults_ = std::make_unique<FaultService>(space_, *userfault_);
    if (Expect("Start", own_faults_->Start(), ErrorCode::kOk) && own_faults_->available()) faults_ = own_faults_.get();
  }
  return faults_;
}

StampedPager& SpaceModel::NewPager(std::size_t capacity) {
  const std::uint64_t stamp = kFileStamp | owner_ << 48 | (pagers_.size() + 1) << 16;
  pagers_.push_back(std::make_unique<StampedPager>(capacity, stamp, StampedPager::Users::kOne));
  return *pagers_.back();
}

void SpaceModel::SetInvalidated(PageRange range, bool all) {
  for (auto at = pages_.lower_bound(range.first.value); at != pages_.end() && at->first < range.end.value; ++at) {
    Page& page = at->second;
    if (!page.Is(Source::Kind::kPager)) continue;
    page.known = all;
    page.stamp = page.source->StampOf(page.source_page);
  }
}

void SpaceModel::CheckWrittenBack(PageNumber number, const Page& page) {
  if (!page.Is(Source::Kind::kPager) || !page.known || !page.Exists()) return;
  if (static_cast<const StampedPager*>(page.source)->refusing()) return;
  if (page.source->StampOf(page.source_page) == page.stamp) return;
  Fail("page " + Hex(PageRange::Of(number, {1})) + " was not written back");
}

void SpaceModel::MayBeDeferred(PageRange range) {
  for (std::size_t page = range.first.value; page < range.end.value; ++page) perhaps_deferred_.insert(page);
}

// ---- Notifiers ----

void SpaceModel::Listen(bool on) {
  listener_.reset();
  if (!on) return;
  std::set<std::size_t> mapped;
  for (const auto& page : pages_) mapped.insert(page.first);
  listener_ = std::make_unique<Listener>(space_, alone() ? &mapped : nullptr);
}

void SpaceModel::BeginAnnouncements() {
  if (listener_ != nullptr) listener_->ForgetAnnounced();
}

void SpaceModel::ExpectAnnounced(PageRange range, Invalidation what) {
  if (listener_ == nullptr) return;
  for (auto at = pages_.lower_bound(range.first.value); at != pages_.end() && at->first < range.end.value; ++at) {
    if (listener_->WasAnnounced(at->first, what)) continue;
    return Fail("OnInvalidate was not called for page " + Hex({{at->first}, {at->first + 1}}));
  }
}

// It was told of what is mapped, and of what went, unless that is pinned.
void SpaceModel::CheckListener() {
  if (listener_ == nullptr) return;
  Expect(listener_->failure().empty(), listener_->failure());
  if (!alone()) return;
  for (const auto& [number, page] : pages_) {
    if (!listener_->Knows(number)) return Fail("OnMap was not called for page " + Hex({{number}, {number + 1}}));
  }
  for (const std::size_t number : listener_->pages()) {
    const PageRange page = {{number}, {number + 1}};
    if (Find(page.first) == nullptr && PinnedIn(page) == Pinned::kNo) {
      return Fail("OnClose was not called for page " + Hex(page));
    }
  }
}

// ---- Failures ----

void SpaceModel::Arm(std::size_t nth_call, int sys_errno, Failing what) {
  if (kernel_ == nullptr) return;
  armed_ = what;
  armed_call_ = nth_call;
  armed_errno_ = sys_errno;
}

std::size_t SpaceModel::InjectedFailures() const {
  return kernel_->InjectedFailures() + (userfault_ != nullptr ? userfault_->failures() : 0);
}

Error SpaceModel::Call(const std::function<Error()>& verb, const std::function<void()>& tolerate) {
  if (armed_call_ == 0) return verb();
  const std::size_t before = InjectedFailures();
  if (armed_ == Failing::kKernel) {
    kernel_->FailNthOfAny(armed_call_, armed_errno_);
  } else if (faults() != nullptr) {
    userfault_->FailNth(armed_call_, armed_errno_);
  }
  armed_call_ = 0;
  const Error error = verb();
  kernel_->StopFailing();
  if (userfault_ != nullptr) userfault_->FailNth(0, 0);
  const bool failed = InjectedFailures() != before;
  had_failures_ = had_failures_ || failed;
  // A verb that has done its work may have been refused the way back to what the kernel had before.
  look_for_differences_ = look_for_differences_ || (failed && error.ok());
  if (error.ok() || !failed) return error;
  if (tolerate) tolerate();
  CheckInvariants(Depth::kContent);
  if (!ok()) failure_ = "after a failed call: " + failure_;
  return verb();
}

// ---- Verdicts ----

void SpaceModel::Fail(const std::string& what) {
  if (ok()) failure_ = what;
}

bool SpaceModel::Expect(bool condition, const std::string& what) {
  if (!condition) Fail(what);
  return condition;
}

bool SpaceModel::Expect(const char* verb, Error got, Error want) {
  if (got == want) return true;
  return Expect(false, std::string(verb) + ": got '" + Text(got) + "', expected '" + Text(want) + "'");
}

bool SpaceModel::Expect(const char* verb, Error got, ErrorCode want) {
  if (got.code == want) return true;
  return Expect(false, std::string(verb) + ": got '" + Text(got) + "', expected '" + ToString(want) + "'");
}

void SpaceModel::CheckAttributes(const VmaInfo& vma, PageNumber number, const Page& page) {
  const auto expect = [&](bool condition, const char* what) {
    if (!condition) Fail("page " + Hex(PageRange::Of(number, {1})) + what);
  };
  expect(vma.range.Contains(number), ": lookup gave another range");
  expect(vma.protection == page.protection, ": wrong protection");
  expect(vma.lock == page.lock, ": wrong lock");
  expect(vma.generation == page.generation, ": wrong generation");
  expect(vma.backing == page.backing, ": wrong backing");
  if (page.backing != nullptr) {
    expect(vma.backing_page + (number - vma.range.first).value == page.source_page, ": wrong backing page");
  }
}

void SpaceModel::CheckPage(PageNumber number, const Page& page, Depth depth) {
  const Result<VmaInfo> vma = space_.Lookup(number);
  if (!vma.ok()) return Fail("page " + Hex(PageRange::Of(number, {1})) + " should be mapped");
  CheckAttributes(*vma, number, page);
  if (ok() && depth == Depth::kContent) CheckContent(number, page);
}

void SpaceModel::CheckContent(PageNumber number, const Page& page) {
  if (!Readable(page.protection) || !page.Exists()) return;
  const volatile std::uint64_t* words = WordsOf(number);
  for (std::size_t i = 0; i < kWordsPerPage; i += kWordStep) {
    const std::uint64_t word = words[i];
    if (page.MayHold(word)) continue;
    char text[80];
    std::snprintf(text, sizeof text, ": word %zu is %#zx, expected ", i, static_cast<std::size_t>(word));
    return Fail("page " + Hex(PageRange::Of(number, {1})) + text + Expected(page));
  }
}

// What the page should hold, for messages.
std::string SpaceModel::Expected(const Page& page) {
  char text[160];
  const auto own = static_cast<std::size_t>(page.stamp);
  if (page.anonymous()) {
    std::snprintf(text, sizeof text, "%#zx", own);
    return text;
  }
  static constexpr const char* kKinds[] = {"a backing", "a file", "a pager"};
  static constexpr const char* kCopies[] = {"", ", perhaps a copy", ", a copy"};
  std::snprintf(text, sizeof text, "%#zx (page %zu of %s%s) or %#zx",
                static_cast<std::size_t>(page.source->StampOf(page.source_page)),
                static_cast<std::size_t>(page.source_page), kKinds[static_cast<int>(page.source->kind())],
                kCopies[static_cast<int>(page.copied)], own);
  return text;
}

// The walk over all VMAs finds the same pages, cut in the same way, with the same attributes.
void SpaceModel::CheckVmas() {
  std::vector<VmaInfo> vmas;
  space_.ForEachVma(
      [](void* context, const VmaInfo& vma) { static_cast<std::vector<VmaInfo>*>(context)->push_back(vma); }, &vmas);
  auto next = pages_.begin();
  for (const VmaInfo& vma : vmas) {
    if (next == pages_.end()) return Fail("a VMA too many: " + Hex(vma.range));
    const PageRange wanted = VmaOf({next->first});
    if (vma.range != wanted) return Fail("VMA " + Hex(vma.range) + " should be " + Hex(wanted));
    CheckAttributes(vma, vma.range.first, next->second);
    CheckPage(wanted.end - vm::Pages{1}, *Find(wanted.end - vm::Pages{1}), Depth::kAttributes);
    if (Find(wanted.end) == nullptr && space_.Lookup(wanted.end).ok()) {
      Fail("the page after " + Hex(wanted) + " should not be mapped");
    }
    next = pages_.lower_bound(wanted.end.value);
  }
  Expect(next == pages_.end(), "a VMA is missing");
  const AddressSpaceStats stats = space_.Stats();
  Expect(stats.vmas == vmas.size(), "Stats: wrong number of VMAs");
  Expect(stats.mapped == vm::Pages{pages_.size()}.bytes(), "Stats: wrong number of mapped pages");
  if (!perhaps_deferred_.empty()) return;
  std::map<const Backing*, std::size_t> uses;
  for (const std::unique_ptr<FilePages>& backing : backings_) uses[backing.get()] = 0;
  for (const auto& [number, page] : pages_) {
    if (page.backing != nullptr) ++uses[page.backing];
  }
  for (const auto& [backing, count] : uses) {
    Expect(backing->pages() == count, "wrong number of pages of a backing");
  }
}

bool SpaceModel::KernelDiffers(PageNumber number, const Page& page) const {
  const os::PageState state = kernel_->At(number);
  return state.protection != page.protection || state.locked != (page.lock != MemoryLock::kNone);
}

bool SpaceModel::KernelMayDiffer(PageRange range) const {
  const auto differs = kernel_differs_.lower_bound(range.first.value);
  return look_for_differences_ || (differs != kernel_differs_.end() && *differs < range.end.value);
}

// The kernel sees what the VMAs say.
void SpaceModel::CheckKernel() {
  const bool collect = std::exchange(look_for_differences_, false);
  for (const auto& [number, page] : pages_) {
    if (!KernelDiffers({number}, page) || kernel_differs_.count(number) != 0) continue;
    if (collect) {
      kernel_differs_.insert(number);
      continue;
    }
    return Fail("page " + Hex({{number}, {number + 1}}) + ": the kernel has another " +
                (kernel_->At({number}).protection == page.protection ? "lock" : "protection"));
  }
}

void SpaceModel::CheckInvariants(Depth depth) {
  if (alone()) CheckVmas();
  if (alone() && (look_for_differences_ || depth == Depth::kContent)) CheckKernel();
  if (!ok() || (alone() && depth == Depth::kAttributes)) return;
  for (const auto& [number, page] : pages_) {
    CheckPage({number}, page, depth);
    if (!ok()) return;
  }
  for (const auto& [number, page] : deferred_) CheckContent({number}, page);
  for (const std::unique_ptr<StampedPager>& pager : pagers_) Expect(pager->failure().empty(), pager->failure());
  CheckListener();
  if (alone()) space_.CheckInvariants();
}

// Every pager was told of the end of its mapping, or is as soon as nobody looks at that any more.
void SpaceModel::CheckReleased() {
  const auto is_mapped = [](const std::unique_ptr<StampedPager>& pager) {
    return pager->mapped() && !pager->released();
  };
  for (int attempt = 0; attempt < 5000 && std::any_of(pagers_.begin(), pagers_.end(), is_mapped); ++attempt) {
    space_.Tick();
    if (attempt > 10) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  Expect(std::none_of(pagers_.begin(), pagers_.end(), is_mapped), "a pager was not released");
}

void SpaceModel::Finish() {
  armed_call_ = 0;
  if (ok()) CheckInvariants(Depth::kContent);
  for (std::size_t i = 0; i < kPins; ++i) SetPin(i, nullptr);
  Listen(false);
  if (!ok()) return;
  space_.Tick();
  ForgetDeferred();
  if (!alone()) {
    while (ok() && !pages_.empty()) {
      const PageRange vma = VmaOf({pages_.begin()->first});
      Expect("Unmap", space_.Unmap(vma), ErrorCode::kOk);
      Erase(vma);
    }
    CheckReleased();
    return;
  }
  Expect("UnlockAll", space_.UnlockAll(), ErrorCode::kOk);
  Expect("Unmap", space_.Unmap(all_), ErrorCode::kOk);
  Erase(all_);
  CheckReleased();
  CheckInvariants(Depth::kContent);
  // What the kernel refused to unlock stays locked while it waits for re-use.
  (void)space_.Purge(PurgeScope::kAll);
  Expect(kernel_->LockedPages() == vm::Pages{0}, "something stayed locked");
  for (const PageRange window : windows_) {
    for (const PageRange part : {window.Intersect(RegionOf(window.first)),
                                 PageRange{RegionOf(window.first).end, window.end}}) {
      if (part.empty() || !ok()) continue;
      const Result<PageRange> mapped =
          space_.Map(part.count(), {.placement = Placement::kFixed, .address = part.address()});
      if (!Expect("Map of everything", mapped.error(), ErrorCode::kOk)) return;
      const Result<VmaInfo> vma = space_.Lookup(part.first);
      for (PageNumber page = part.first; page < part.end; page = page + vm::Pages{1}) {
        Put(page, {.generation = vma.ok() ? vma->generation : 0});
      }
    }
  }
  CheckInvariants(Depth::kContent);
  for (const PageRange window : windows_) {
    for (std::size_t page = 0; ok() && page < kWindowPages; page += 16) {
      Write(PageRange::Of(window.first + vm::Pages{page}, {1}));
    }
  }
  CheckInvariants(Depth::kContent);
  Expect("Unmap", space_.Unmap(all_), ErrorCode::kOk);
  pages_.clear();
}

}  // namespace freehold::vm::test
