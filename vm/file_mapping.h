// File mappings as the address space keeps them: a backing for each, and the windows of a region that nobody uses
// but the kernel still has.
//
// A mapping that nothing was done to but reading and writing shared memory is worth the same to whoever asks for it
// next: such a window stays in the kernel when it is unmapped, and the next MapFile of the same part of the same file
// gets it without a system call. AddressSpace::MapFile says what that keeps alive; vm/README.md tells its life.
#ifndef FREEHOLD_VM_FILE_MAPPING_H_
#define FREEHOLD_VM_FILE_MAPPING_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "vm/backing.h"
#include "vm/os/kernel.h"
#include "vm/page_range.h"
#include "vm/result.h"
#include "vm/sync/epoch.h"
#include "vm/sync/spin_lock.h"
#include "vm/vma.h"

namespace freehold::vm {

class FileBackingPool;
class MetadataArena;

// What makes two file mappings the same but for their address.
struct FileKey {
  std::uint64_t device = 0;
  std::uint64_t inode = 0;
  std::uint64_t page = 0;  // of the file
  RegionPage count = 0;
  os::Protection protection = os::Protection::kRead;
  os::Sharing sharing = os::Sharing::kPrivate;
  bool may_write = false;  // shared, by a descriptor that may write

  friend bool operator==(const FileKey&, const FileKey&) = default;
};

// What may have been done to a mapping.
enum class FileChange : std::uint8_t {
  kAttributes,  // its protection, its place, its size
  kWritable,    // its protection, and pages may be copies of its own if it is private
  kLocked,
};

// One file mapping and its parts. Comes from a pool, and goes back to it when no reader can look at it any more.
class FileBacking final : public Backing, private sync::DeferredCallback {
 public:
  FileBacking(FileBackingPool& pool, bool may_write);

  // A new life. REQUIRES: from the pool; `key.may_write`, or its being private, as the pool was asked for.
  void Begin(const FileKey& key, int descriptor, bool keepable);
  // The descriptor is the caller's again: from now on the mapping grows by what the kernel has of it.
  void ForgetDescriptor() { descriptor_.store(-1, std::memory_order_relaxed); }

  Error Install(os::Kernel& kernel, PageRange range, std::uint64_t page, os::Protection protection,
                bool occupied) override;
  void Flush(os::Kernel&, PageRange, std::uint64_t) override {}
  Error Populate(os::Kernel& kernel, PageRange range, os::Protection protection) override;
  Error Sync(os::Kernel& kernel, PageRange range, os::SyncOptions options) override;
  FileBacking* AsFile() override { return this; }
  BackingDescription Describe() const override;

  const FileKey& key() const { return key_; }
  // A part of it is held exclusively.
  void Note(FileChange change);
  // Whether the mapping, if it is all there and not locked, may wait for another user.
  bool is_keepable() const { return keepable_ && !changed_.load(std::memory_order_relaxed); }

 private:
  friend class FileBackingPool;
  friend class WindowCache;

  // Lock-free: a window may go while a tree lock is held.
  void OnUnused() override;
  void NoteCopies();

  FileBackingPool& pool_;
  FileKey key_;
  bool keepable_ = false;
  std::atomic<bool> changed_{false};
  std::atomic<bool> extends_{true};       // no page is locked or a copy
  std::atomic<int> descriptor_{-1};       // while MapFile runs, else -1

  // Of a window: guarded by the tree lock of its region.
  Vma* vma_ = nullptr;
  std::uint32_t freed_at_ = 0;
  FileBacking* next_in_bucket_ = nullptr;
  FileBacking* newer_ = nullptr;
  FileBacking* older_ = nullptr;

  FileBacking* next_free_ = nullptr;  // in the pool
};

// Of any backing, or none.
inline void NoteChange(Backing* backing, FileChange change) {
  FileBacking* file = backing != nullptr ? backing->AsFile() : nullptr;
  if (file != nullptr) file->Note(change);
}

// Thread safety: thread-safe.
class FileBackingPool {
 public:
  FileBackingPool(MetadataArena& arena, sync::EpochDomain& epochs) : arena_(arena), epochs_(epochs) {}

  // Null when the arena is exhausted. What mappings may be is constant for each backing, so there are two kinds.
  FileBacking* Take(bool may_write);
  // Free again when those who look at it have left.
  void ReturnLater(FileBacking* file);

  void PrepareFork() ABSL_NO_THREAD_SAFETY_ANALYSIS { lock_.LockForFork(); }
  void AfterFork() ABSL_NO_THREAD_SAFETY_ANALYSIS { lock_.UnlockAfterFork(); }

 private:
  FileBacking* TakeFree(bool may_write);
  void Return(FileBacking* file);

  MetadataArena& arena_;
  sync::EpochDomain& epochs_;
  sync::SpinLock lock_{sync::LockRank::kFreeList};
  FileBacking* free_[2] ABSL_GUARDED_BY(lock_) = {};
};

// The windows of a region: extents in VmaState::kWindow, found by what they show, and in the order of their unmap.
//
// Thread safety: REQUIRES the region's tree lock, but for size().
// Invariants:    W1. A window is a whole mapping, unlocked, unchanged, of one extent; nobody uses it.
//                W2. Its pages stay counted in its FileBacking.
class WindowCache {
 public:
  // More are not worth a system call each to the kernel, whose VMAs they are.
  static constexpr std::size_t kMaxWindows = 256;

  void Insert(FileBacking* file, Vma* vma, std::uint32_t freed_at);
  // Returns its backing.
  FileBacking* Remove(Vma* vma);
  // The newest window `key` for which `usable(vma)`, among a few; or null.
  template <typename Usable>
  Vma* Find(const FileKey& key, Usable usable) const;
  // Null when there is none.
  Vma* Oldest() const { return oldest_ != nullptr ? oldest_->vma_ : nullptr; }
  static std::uint32_t FreedAt(const Vma* window);

  std::size_t size() const { return size_.load(std::memory_order_relaxed); }
  std::size_t pages() const { return pages_; }
  void CheckInvariants() const;

 private:
  static constexpr std::size_t kBuckets = 256;
  static constexpr int kSearchLimit = 8;
  static std::size_t BucketOf(const FileKey& key);

  FileBacking* buckets_[kBuckets] = {};  // newest first
  FileBacking* newest_ = nullptr;
  FileBacking* oldest_ = nullptr;
  std::atomic<std::size_t> size_{0};
  std::size_t pages_ = 0;
};

template <typename Usable>
Vma* WindowCache::Find(const FileKey& key, Usable usable) const {
  FileBacking* file = buckets_[BucketOf(key)];
  for (int i = 0; file != nullptr && i < kSearchLimit; ++i, file = file->next_in_bucket_) {
    if (file->key_ == key && usable(*file->vma_)) return file->vma_;
  }
  return nullptr;
}

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_FILE_MAPPING_H_
