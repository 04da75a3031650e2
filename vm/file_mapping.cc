// MapFile: identify the file, take a window of it that waits in a region, or else map it as any backing.
//
// A window is taken, and left to wait, under the tree lock alone, like cached memory of the heap zones. Whoever holds
// its range, and has seen the tree since, must not find it come or go: neither happens then.
#include "vm/file_mapping.h"

#include <sys/sysmacros.h>

#include <algorithm>
#include <cerrno>

#include "vm/address_space.h"
#include "vm/metadata_arena.h"
#include "vm/os/check.h"
#include "vm/region.h"

namespace freehold::vm {
namespace {

using os::Protection;

constexpr std::size_t kBackingsPerRefill = 16;

}  // namespace

// ---- FileBacking ----

FileBacking::FileBacking(FileBackingPool& pool, bool may_write)
    : Backing(may_write ? Protection::kReadWriteExec : Protection::kReadExec), pool_(pool) {}

void FileBacking::Begin(const FileKey& key, int descriptor, bool keepable) {
  key_ = key;
  keepable_ = keepable;
  changed_.store(false, std::memory_order_relaxed);
  extends_.store(true, std::memory_order_relaxed);
  if (Has(key.protection, Protection::kWrite)) NoteCopies();
  descriptor_.store(descriptor, std::memory_order_relaxed);
}

void FileBacking::Note(FileChange change) {
  changed_.store(true, std::memory_order_relaxed);
  if (change == FileChange::kWritable) NoteCopies();
  if (change == FileChange::kLocked) extends_.store(false, std::memory_order_relaxed);
}

void FileBacking::NoteCopies() {
  if (key_.sharing == os::Sharing::kPrivate) extends_.store(false, std::memory_order_relaxed);
}

Error FileBacking::Install(os::Kernel& kernel, PageRange range, std::uint64_t page, Protection protection,
                           bool occupied) {
  const int descriptor = descriptor_.load(std::memory_order_relaxed);
  if (descriptor < 0) {
    // A mapping that grows, into free memory. With locks or content of its own it has to move.
    if (!extends_.load(std::memory_order_relaxed)) return {ErrorCode::kNoRoom};
    return kernel.ExtendFile(range);
  }
  const os::FileView view = {
      .descriptor = descriptor, .page = page, .protection = protection, .sharing = key_.sharing};
  return occupied ? kernel.ReplaceByFile(range, view) : kernel.MapFile(range, view);
}

// Copies what may be written privately, as Linux's MAP_POPULATE does, and dirties nothing.
Error FileBacking::Populate(os::Kernel& kernel, PageRange range, Protection protection) {
  if (!Has(protection, Protection::kRead)) return {ErrorCode::kUnsupported};
  const bool copies = key_.sharing == os::Sharing::kPrivate && Has(protection, Protection::kWrite);
  return kernel.FaultIn(range, copies ? os::Access::kWrite : os::Access::kRead);
}

Error FileBacking::Sync(os::Kernel& kernel, PageRange range, os::SyncOptions options) {
  return kernel.Sync(range, options);
}

BackingDescription FileBacking::Describe() const {
  return {.shared = key_.sharing == os::Sharing::kShared,
          .device_major = gnu_dev_major(key_.device),
          .device_minor = gnu_dev_minor(key_.device),
          .inode = key_.inode,
          .name = {}};
}

void FileBacking::OnUnused() { pool_.ReturnLater(this); }

// ---- FileBackingPool ----

FileBacking* FileBackingPool::Take(bool may_write) {
  if (FileBacking* file = TakeFree(may_write)) return file;
  // Some may be free by now.
  epochs_.Poll();
  if (FileBacking* file = TakeFree(may_write)) return file;
  void* memory = arena_.Allocate({kBackingsPerRefill * sizeof(FileBacking)}, alignof(FileBacking));
  if (memory == nullptr) return nullptr;
  auto* files = static_cast<FileBacking*>(memory);
  for (std::size_t i = 0; i < kBackingsPerRefill; ++i) new (files + i) FileBacking(*this, may_write);
  for (std::size_t i = 1; i < kBackingsPerRefill; ++i) Return(files + i);
  return files;
}

FileBacking* FileBackingPool::TakeFree(bool may_write) {
  sync::SpinLockHolder holder(lock_);
  FileBacking* file = free_[may_write];
  if (file != nullptr) free_[may_write] = file->next_free_;
  return file;
}

void FileBackingPool::ReturnLater(FileBacking* file) {
  epochs_.Defer(file, [](sync::DeferredCallback* node) {
    auto* unused = static_cast<FileBacking*>(node);
    unused->pool_.Return(unused);
  });
}

void FileBackingPool::Return(FileBacking* file) {
  const bool may_write = file->Allows(Protection::kWrite);
  sync::SpinLockHolder holder(lock_);
  file->next_free_ = free_[may_write];
  free_[may_write] = file;
}

// ---- WindowCache ----

std::size_t WindowCache::BucketOf(const FileKey& key) {
  std::uint64_t hash = key.inode + (key.device << 40);
  for (const std::uint64_t part : {key.page, std::uint64_t{key.count}}) {
    hash = (hash ^ hash >> 29) * 0x9e3779b97f4a7c15 + part;
  }
  return (hash * 0x9e3779b97f4a7c15) >> 32 & (kBuckets - 1);
}

void WindowCache::Insert(FileBacking* file, Vma* vma, std::uint32_t freed_at) {
  FileBacking*& bucket = buckets_[BucketOf(file->key_)];
  file->vma_ = vma;
  file->freed_at_ = freed_at;
  file->next_in_bucket_ = bucket;
  bucket = file;
  file->newer_ = nullptr;
  file->older_ = newest_;
  (newest_ != nullptr ? newest_->newer_ : oldest_) = file;
  newest_ = file;
  size_.store(size() + 1, std::memory_order_relaxed);
  pages_ += vma->page_count();
}

FileBacking* WindowCache::Remove(Vma* vma) {
  auto* file = static_cast<FileBacking*>(vma->attributes().backing);
  FREEHOLD_DCHECK(file->vma_ == vma);
  FileBacking** link = &buckets_[BucketOf(file->key_)];
  while (*link != file) link = &(*link)->next_in_bucket_;
  *link = file->next_in_bucket_;
  (file->newer_ != nullptr ? file->newer_->older_ : newest_) = file->older_;
  (file->older_ != nullptr ? file->older_->newer_ : oldest_) = file->newer_;
  file->vma_ = nullptr;
  size_.store(size() - 1, std::memory_order_relaxed);
  pages_ -= vma->page_count();
  return file;
}

std::uint32_t WindowCache::FreedAt(const Vma* window) {
  return static_cast<const FileBacking*>(window->attributes().backing)->freed_at_;
}

void WindowCache::CheckInvariants() const {
  std::size_t size = 0;
  std::size_t pages = 0;
  for (const FileBacking* file = newest_; file != nullptr; file = file->older_) {
    const Vma* vma = file->vma_;
    FREEHOLD_CHECK(vma->Is(VmaState::kWindow) && vma->foreign && !vma->locked());
    FREEHOLD_CHECK(vma->attributes().backing == file);
    FREEHOLD_CHECK(vma->page_count() == file->key_.count && file->pages() == file->key_.count);
    FREEHOLD_CHECK(file->is_keepable());
    FREEHOLD_CHECK(Find(file->key_, [](const Vma&) { return true; }) != nullptr);
    ++size;
    pages += vma->page_count();
  }
  FREEHOLD_CHECK(size == this->size() && pages == pages_);
}

// ---- AddressSpace ----

Result<PageRange> AddressSpace::MapFile(Pages count, const FileMapOptions& options) {
  if (count.value == 0) return ErrorCode::kEmpty;
  if ((options.offset.value & (kPageSize - 1)) != 0) return ErrorCode::kUnaligned;
  if (count >= reservation_.count()) return ErrorCode::kNoRoom;
  const Result<os::FileInfo> info = kernel_->IdentifyFile(options.descriptor);
  if (!info.ok()) return info.error();
  if (!info->readable) return info->writable ? Error{ErrorCode::kDenied} : Error::System(EBADF);
  const FileKey key = {.device = info->device,
                       .inode = info->inode,
                       .page = options.offset.value >> kPageShift,
                       .count = static_cast<RegionPage>(count.value),
                       .protection = options.protection,
                       .sharing = options.sharing,
                       .may_write = options.sharing == os::Sharing::kShared && info->writable};
  if (info->regular && options.placement == Placement::kAnywhere && LockOf(options.lock) == os::MemoryLock::kNone) {
    const Result<PageRange> window = TakeWindow(key);
    if (window.ok()) {
      if (!notifiers_.empty()) notifiers_.Map(*window);
      if (options.populate) PopulateMapped(*window);
      return window;
    }
  }
  return MapFileAnew(*info, key, options);
}

// In the region of this CPU, or where else there are windows.
Result<PageRange> AddressSpace::TakeWindow(const FileKey& key) {
  const absl::Span<Region* const> regions = RegionsOf(Zone::kMapping);
  const std::size_t own = kernel_->CurrentCpu() & (regions.size() - 1);
  for (std::size_t i = 0; i < regions.size(); ++i) {
    Region* region = regions[(own + i) & (regions.size() - 1)];
    if (!region->has_windows()) continue;
    const Result<PageRange> window = region->TakeWindow(key);
    if (window.ok()) return window;
  }
  return ErrorCode::kNoRoom;
}

Result<PageRange> AddressSpace::MapFileAnew(const os::FileInfo& info, const FileKey& key,
                                            const FileMapOptions& options) {
  os::FileTraits traits;
  if (info.regular) {
    const Result<os::FileTraits> inspected = kernel_->InspectFile(options.descriptor);
    if (!inspected.ok()) return inspected.error();
    traits = *inspected;
  }
  if (traits.huge_pages) return ErrorCode::kUnsupported;
  const bool is_shared = key.sharing == os::Sharing::kShared;
  // Not code, which debuggers write to; and a seal would be refused while a window is there that may write.
  const bool keepable = traits.lasting_identity && !Has(key.protection, Protection::kExec) &&
                        (is_shared ? !(key.may_write && traits.sealable) : !Has(key.protection, Protection::kWrite)) &&
                        Pages{key.count}.bytes() <= options_.window_limit && !options_.strict_unmap;
  FileBacking* file = file_backings_->Take(key.may_write || !is_shared);
  if (file == nullptr) return ErrorCode::kNoMetadata;
  file->Begin(key, options.descriptor, keepable);
  const os::MemoryLock lock = LockOf(options.lock);
  if (lock != os::MemoryLock::kNone) file->Note(FileChange::kLocked);
  // While this call needs it, whatever others make of the mapping.
  file->AddPages(1);
  MapOptions map;
  map.placement = options.placement;
  map.address = options.address;
  map.protection = options.protection;
  map.populate = options.populate;
  map.lock = lock;
  // Free memory with whatever content: a file takes its place.
  map.content = Content::kAnything;
  map.backing = file;
  map.backing_page = key.page;
  const Result<PageRange> mapped = Map({key.count}, map);
  file->ForgetDescriptor();
  file->DropPages(1);
  return mapped;
}

Error AddressSpace::Sync(PageRange range, os::SyncOptions options) {
  if (const Error error = CheckRange(range); !error.ok()) return error;
  bool hole = false;
  for (PageNumber page = range.first; page < range.end;) {
    // Keeps the backing there, not the mapping: to store what came in its place does no harm.
    const sync::EpochDomain::ReadGuard reader(epochs_);
    VmaState state;
    const VmaInfo extent = RegionOf(page)->LookupExtent(page, state);
    const PageRange part = {page, std::min(range.end, extent.range.end)};
    if (state != VmaState::kMapped) {
      hole = true;
    } else if (extent.backing != nullptr) {
      if (const Error error = extent.backing->Sync(*kernel_, part, options); !error.ok()) return error;
    }
    page = part.end;
  }
  return hole ? Error{ErrorCode::kNotMapped} : Error::Ok();
}

// The rest of MoveHeld, from where the source is isolated. Pages are the kernel's to move, never copied.
Error AddressSpace::MoveFileHeld(const VmaInfo& vma, PageRange range, PageRange target, const RemapOptions& options,
                                 const Region::Guard& source_guard, const Region::Guard& target_guard) {
  Region* from = RegionOf(range.first);
  Region* to = RegionOf(target.first);
  NoteChange(vma.backing, FileChange::kAttributes);
  const PageRange head = PageRange::Of(range.first, std::min(range.count(), target.count()));
  const PageRange new_head = PageRange::Of(target.first, head.count());
  const bool locked = vma.lock != os::MemoryLock::kNone;
  const auto move_back = [&] {
    if (locked) (void)kernel_->UnlockMemory(target);
    (void)kernel_->MoveFile(new_head, head);
  };
  // A move would take the locks of all of the kernel VMA away. Locked twice, they would count twice.
  Error error;
  if (locked) error = kernel_->UnlockMemory(range);
  if (error.ok()) error = kernel_->MoveFile(head, target);
  if (error.ok() && locked) {
    error = kernel_->LockMemory(target);
    if (error.ok() && options.keep_source) error = kernel_->LockMemory(range);
    if (!error.ok()) move_back();
  }
  if (error.ok()) {
    kernel_moves_.fetch_add(1, std::memory_order_relaxed);
    vma.backing->AddPages(target.count().value);
    to->ShowBacking(target, vma, vma.backing_page + (range.first - vma.range.first).value, target_guard);
    if (!options.keep_source) {
      error = from->UnmapIsolated(range, source_guard);
      if (error.ok()) {
        to->Adopt(target, vma.generation, target_guard);
        return error;
      }
      // Mapped as it was, and joined again.
      move_back();
      if (locked) (void)kernel_->LockMemory(range);
      return error;
    }
  } else if (locked) {
    (void)kernel_->LockMemory(range);
  }
  from->Join(range, source_guard);
  return error;
}

void Region::ShowBacking(PageRange part, const VmaInfo& vma, std::uint64_t backing_page, const Guard& guard) {
  FREEHOLD_DCHECK(guard.Covers(part, Mode::kExclusive));
  sync::SpinLockHolder holder(tree_lock_);
  Vma* target = tree_.Find(ToRegion(part.first)).vma();
  target->foreign = true;
  changes_.Add(1);
  VmaWriter writer(*target);
  writer.SetProtection(vma.protection);
  writer.SetLock(vma.lock);
  writer.SetBacking(vma.backing, static_cast<std::int64_t>(backing_page) - target->first_page());
}

// ---- Region: windows ----

Result<PageRange> Region::TakeWindow(const FileKey& key) {
  // Under the lock that everybody takes, wait for it; elsewhere a range that somebody holds is left alone.
  const bool coarse = range_lock_.policy() == sync::LockPolicy::kCoarse;
  if (coarse) {
    const Guard guard(range_lock_, range_, Mode::kExclusive, sync::Operation::kMap);
    sync::SpinLockHolder holder(tree_lock_);
    return TakeWindowLocked(windows_->Find(key, [](const Vma&) { return true; }));
  }
  sync::SpinLockHolder holder(tree_lock_);
  return TakeWindowLocked(
      windows_->Find(key, [this](const Vma& vma) { return !range_lock_.MayBeHeld(RangeOf(vma)); }));
}

Result<PageRange> Region::TakeWindowLocked(Vma* window) {
  if (window == nullptr) return ErrorCode::kNoRoom;
  windows_->Remove(window);
  VmaAttributes attributes = window->attributes();
  attributes.generation = NextGenerationLocked();
  PublishLocked(window, window->page_count(), attributes);
  window_hits_.Add(1);
  return RangeOf(*window);
}

bool Region::RetireWindowLocked(Vma* vma) {
  const VmaAttributes attributes = vma->attributes();
  FileBacking* file = attributes.backing != nullptr ? attributes.backing->AsFile() : nullptr;
  if (file == nullptr || !file->is_keepable() || file->key().count != vma->page_count() || vma->locked() ||
      vma->unrestored) {
    return false;
  }
  changes_.Add(1);
  mapped_pages_.Subtract(vma->page_count());
  vmas_.Subtract(1);
  SetStateLocked(vma, VmaState::kWindow);
  windows_->Insert(file, vma, shared_.clock->load(std::memory_order_relaxed));
  return true;
}

bool Region::OverWindowLimit() const {
  return windows_ != nullptr && (windows_->size() > WindowCache::kMaxWindows ||
                                 Pages{windows_->pages()}.bytes() > shared_.options->window_limit);
}

// What others want to have the pages of for something else: free memory, in which the kernel has a file still.
void Region::AbandonWindowLocked(Vma* window) {
  const std::uint32_t freed_at = WindowCache::FreedAt(window);
  ReleaseWindowLocked(window);
  window->knowledge = Knowledge::kUnknown;
  SetStateLocked(window, VmaState::kCached);
  free_.Push(window, freed_at);
}

void Region::ReleaseWindowLocked(Vma* window) {
  FileBacking* file = windows_->Remove(window);
  VmaWriter(*window).SetBacking(nullptr, 0);
  // That a FileBacking becomes unused takes no lock and no system call.
  file->DropPages(window->page_count());
}

Pages Region::PurgeWindows(std::uint32_t until, Pages keep) {
  Pages purged;
  while (has_windows()) {
    PurgeList list;
    for (bool more = true; more && list.size < kPurgeBatch;) {
      sync::SpinLockHolder holder(tree_lock_);
      more = CollectWindowsLocked(until, keep, list);
    }
    if (list.size == 0) break;
    ResetWindows(list);
    const Pages cleaned = FinishPurging(list, /*discarded=*/true, /*keep=*/false);
    // What the kernel refuses is free memory now, for others to try.
    if (cleaned.value == 0) break;
    purged += cleaned;
  }
  return purged;
}

// The oldest first; false when there are no more.
bool Region::CollectWindowsLocked(std::uint32_t until, Pages keep, PurgeList& list) {
  const std::size_t kept_windows = keep.value == 0 ? 0 : WindowCache::kMaxWindows / 4 * 3;
  for (int visits = 0; visits < kExtentsPerHold && list.size < kPurgeBatch; ++visits) {
    Vma* window = windows_->Oldest();
    if (window == nullptr || WindowCache::FreedAt(window) > until) return false;
    if (windows_->pages() <= keep.value && windows_->size() <= kept_windows) return false;
    ReleaseWindowLocked(window);
    window->knowledge = Knowledge::kUnknown;
    AddToPurgeLocked(window, list);
  }
  return true;
}

// Neighbours by one call.
void Region::ResetWindows(PurgeList& list) {
  std::sort(list.vmas, list.vmas + list.size,
            [](const Vma* a, const Vma* b) { return a->first_page() < b->first_page(); });
  for (std::size_t begin = 0, end; begin < list.size; begin = end) {
    PageRange run = RangeOf(*list.vmas[begin]);
    for (end = begin + 1; end < list.size && RangeOf(*list.vmas[end]).first == run.end; ++end) {
      run.end = RangeOf(*list.vmas[end]).end;
    }
    if (!shared_.kernel->Reset(run).ok()) continue;
    for (std::size_t i = begin; i < end; ++i) {
      list.vmas[i]->foreign = false;
      list.vmas[i]->kernel_vma = false;
    }
  }
}

}  // namespace freehold::vm
