#include "tests/vm/space_model.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace freehold::vm::test {
namespace {

using os::MemoryLock;
using os::Protection;

constexpr std::size_t kWordsPerPage = kPageSize / sizeof(std::uint64_t);
// Of these words of a page, all are written and checked.
constexpr std::size_t kWordStep = 73;

volatile std::uint64_t* WordsOf(PageNumber page) { return reinterpret_cast<volatile std::uint64_t*>(page.address()); }

int AccessOf(Protection protection) {
  const auto bits = static_cast<unsigned>(protection);
  return ((bits & 1) != 0 ? PROT_READ : 0) | ((bits & 2) != 0 ? PROT_WRITE : 0) | ((bits & 4) != 0 ? PROT_EXEC : 0);
}

[[noreturn]] void Die(const char* what) {
  std::perror(what);
  std::abort();
}

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

// ---- Files ----

FilePages::FilePages(Protection max_protection) : Backing(max_protection), stamps(kPages) {
  file_ = memfd_create("model", MFD_CLOEXEC);
  if (file_ < 0 || ftruncate(file_, kPages * kPageSize) != 0) Die("memfd");
  // Every fourth page has content from the start.
  std::array<std::uint64_t, kWordsPerPage> content;
  for (std::uint64_t page = 0; page < kPages; page += 4) {
    stamps[page] = kFileStamp | page;
    content.fill(stamps[page]);
    if (pwrite(file_, content.data(), kPageSize, static_cast<off_t>(page * kPageSize)) != kPageSize) Die("pwrite");
  }
}

FilePages::~FilePages() { close(file_); }

// What a FakeKernel knows of the range is what Protect tells it.
Error FilePages::Install(os::Kernel& kernel, PageRange range, std::uint64_t page, Protection protection, bool) {
  if (const Error error = kernel.Protect(range, protection); !error.ok()) return error;
  const void* mapped = mmap(range.address(), range.bytes().value, AccessOf(protection), MAP_SHARED | MAP_FIXED, file_,
                            static_cast<off_t>(page * kPageSize));
  return mapped == MAP_FAILED ? Error::System(errno) : Error::Ok();
}

void FilePages::Flush(os::Kernel&, PageRange, std::uint64_t) {}

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
  if (!alone_) return;
  for (std::size_t page = range.first.value; page < range.end.value; ++page) {
    Expect(pages_.insert(page).second, "OnMap of what is mapped", range);
  }
}

// Until this returns, it is as it was. It may be the target of a Remap that is refused, of which nobody was told.
void Listener::OnInvalidate(PageRange range, Invalidation) {
  const bool mapped = space_.Lookup(range.first).ok();
  const std::lock_guard lock(mutex_);
  Expect(mapped, "OnInvalidate of what is not mapped", range);
}

void Listener::OnClose(PageRange range) {
  const std::lock_guard lock(mutex_);
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
    : space_(space), kernel_(nullptr), shared_(&shared), owner_(owner) {
  MakeWindows();
}

void SpaceModel::MakeWindows() {
  // In address order: two regions of plain memory, one dense, one for mappings (see SmallOptions).
  all_ = space_.reservation();
  region_pages_ = all_.count().value / 4;
  for (const std::size_t first : {std::size_t{0}, region_pages_ - kWindowPages / 2, 2 * region_pages_,
                                  3 * region_pages_}) {
    windows_.push_back(PageRange::Of(all_.first + vm::Pages{first}, {kWindowPages}));
  }
  files_.push_back(std::make_unique<FilePages>(Protection::kReadWrite));
  files_.push_back(std::make_unique<FilePages>(Protection::kRead));
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
         next.lock == page.lock && next.file == page.file &&
         (page.file == nullptr || next.file_page == page.file_page + 1);
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
  pages_.erase(from, to);
}

void SpaceModel::Put(PageNumber page, const Page& mapped) {
  pages_[page.value] = mapped;
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

void SpaceModel::SetZero(PageRange range) {
  for (auto at = pages_.lower_bound(range.first.value); at != pages_.end() && at->first < range.end.value; ++at) {
    at->second.known = true;
    at->second.stamp = 0;
  }
}

void SpaceModel::SetUnknown(PageRange range) {
  for (auto at = pages_.lower_bound(range.first.value); at != pages_.end() && at->first < range.end.value; ++at) {
    at->second.known = false;
  }
}

void SpaceModel::Write(PageRange range) {
  for (auto at = pages_.lower_bound(range.first.value); at != pages_.end() && at->first < range.end.value; ++at) {
    Page& page = at->second;
    if (!Writable(page.protection)) continue;
    const std::uint64_t stamp = owner_ << 48 | ++last_stamp_;
    volatile std::uint64_t* words = WordsOf({at->first});
    for (std::size_t i = 0; i < kWordsPerPage; i += kWordStep) words[i] = stamp;
    page.known = true;
    page.stamp = stamp;
    if (page.file != nullptr) page.file->stamps[page.file_page] = stamp;
  }
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

void SpaceModel::Arm(std::size_t nth_call, int sys_errno) {
  if (kernel_ == nullptr) return;
  armed_call_ = nth_call;
  armed_errno_ = sys_errno;
}

Error SpaceModel::Call(const std::function<Error()>& verb, const std::function<void()>& tolerate) {
  if (armed_call_ == 0) return verb();
  const std::size_t before = kernel_->InjectedFailures();
  kernel_->FailNthOfAny(armed_call_, armed_errno_);
  armed_call_ = 0;
  const Error error = verb();
  kernel_->StopFailing();
  const bool failed = kernel_->InjectedFailures() != before;
  had_failures_ = had_failures_ || failed;
  // A verb that has done its work may have been refused the way back to what the kernel had before.
  kernel_may_differ_ = kernel_may_differ_ || (failed && error.ok());
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
  return Expect(got == want, std::string(verb) + ": got '" + Text(got) + "', expected '" + Text(want) + "'");
}

bool SpaceModel::Expect(const char* verb, Error got, ErrorCode want) {
  return Expect(got.code == want,
                std::string(verb) + ": got '" + Text(got) + "', expected '" + ToString(want) + "'");
}

void SpaceModel::CheckAttributes(const VmaInfo& vma, PageNumber number, const Page& page) {
  const auto expect = [&](bool condition, const char* what) {
    if (!condition) Fail("page " + Hex(PageRange::Of(number, {1})) + what);
  };
  expect(vma.range.Contains(number), ": lookup gave another range");
  expect(vma.protection == page.protection, ": wrong protection");
  expect(vma.lock == page.lock, ": wrong lock");
  expect(vma.generation == page.generation, ": wrong generation");
  expect(vma.backing == page.file, ": wrong backing");
  if (page.file != nullptr) {
    expect(vma.backing_page + (number - vma.range.first).value == page.file_page, ": wrong backing page");
  }
}

void SpaceModel::CheckPage(PageNumber number, const Page& page, Depth depth) {
  const Result<VmaInfo> vma = space_.Lookup(number);
  if (!vma.ok()) return Fail("page " + Hex(PageRange::Of(number, {1})) + " should be mapped");
  CheckAttributes(*vma, number, page);
  if (ok() && depth == Depth::kContent) CheckContent(number, page);
}

void SpaceModel::CheckContent(PageNumber number, const Page& page) {
  if (!Readable(page.protection)) return;
  if (page.file == nullptr && !page.known) return;
  const std::uint64_t stamp = page.file == nullptr ? page.stamp : page.file->stamps[page.file_page];
  const volatile std::uint64_t* words = WordsOf(number);
  for (std::size_t i = 0; i < kWordsPerPage; i += kWordStep) {
    const std::uint64_t word = words[i];
    if (word == stamp) continue;
    char text[80];
    std::snprintf(text, sizeof text, ": word %zu is %#zx, expected %#zx", i, static_cast<std::size_t>(word),
                  static_cast<std::size_t>(stamp));
    return Fail("page " + Hex(PageRange::Of(number, {1})) + text);
  }
}

// The walk over all VMAs finds the same pages, cut in the same way, with the same attributes.
void SpaceModel::CheckVmas() {
  std::vector<VmaInfo> vmas;
  space_.ForEachVma(
      [](void* context, const VmaInfo& vma) { static_cast<std::vector<VmaInfo>*>(context)->push_back(vma); }, &vmas);
  auto next = pages_.begin();
  for (const VmaInfo& vma : vmas) {
    if (!Expect(next != pages_.end(), "a VMA too many: " + Hex(vma.range))) return;
    const PageRange wanted = VmaOf({next->first});
    if (!Expect(vma.range == wanted, "VMA " + Hex(vma.range) + " should be " + Hex(wanted))) return;
    CheckAttributes(vma, vma.range.first, next->second);
    CheckPage(wanted.end - vm::Pages{1}, *Find(wanted.end - vm::Pages{1}), Depth::kAttributes);
    Expect(IsMapped({wanted.end, wanted.end + vm::Pages{1}}) || !space_.Lookup(wanted.end).ok(),
           "the page after " + Hex(wanted) + " should not be mapped");
    next = pages_.lower_bound(wanted.end.value);
  }
  Expect(next == pages_.end(), "a VMA is missing");
  const AddressSpaceStats stats = space_.Stats();
  Expect(stats.vmas == vmas.size(), "Stats: wrong number of VMAs");
  Expect(stats.mapped == vm::Pages{pages_.size()}.bytes(), "Stats: wrong number of mapped pages");
  if (!perhaps_deferred_.empty()) return;
  for (const std::unique_ptr<FilePages>& file : files_) {
    const auto uses = [&](const auto& page) { return page.second.file == file.get(); };
    Expect(file->pages() == static_cast<std::size_t>(std::count_if(pages_.begin(), pages_.end(), uses)),
           "wrong number of pages of a backing");
  }
}

// The kernel sees what the VMAs say.
void SpaceModel::CheckKernel() {
  if (kernel_may_differ_) return;
  for (const auto& [number, page] : pages_) {
    const os::PageState state = kernel_->At({number});
    if (state.protection == page.protection && state.locked == (page.lock != MemoryLock::kNone)) continue;
    return Fail("page " + Hex({{number}, {number + 1}}) + ": the kernel has another " +
                (state.protection == page.protection ? "lock" : "protection"));
  }
}

void SpaceModel::CheckInvariants(Depth depth) {
  if (alone()) CheckVmas();
  if (!ok() || (alone() && depth == Depth::kAttributes)) return;
  for (const auto& [number, page] : pages_) {
    CheckPage({number}, page, depth);
    if (!ok()) return;
  }
  for (const auto& [number, page] : deferred_) CheckContent({number}, page);
  CheckListener();
  if (!alone()) return;
  CheckKernel();
  space_.CheckInvariants();
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
    return;
  }
  Expect("UnlockAll", space_.UnlockAll(), ErrorCode::kOk);
  Expect("Unmap", space_.Unmap(all_), ErrorCode::kOk);
  pages_.clear();
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
