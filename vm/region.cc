#include "vm/region.h"

#include <algorithm>
#include <bit>

#include "vm/os/check.h"

namespace freehold::vm {
namespace {

// Extents and nodes fetched from the arena at a time: a page of each, so that prefetchers, which stop at its end, do
// not take lines away from another region's threads.
constexpr std::size_t kRefillVmas = kPageSize / sizeof(Vma);
constexpr std::size_t kRefillNodes = kPageSize / sizeof(VmaTree::Node);

// The kernel is asked to commit whole chunks, and remembers them as one bit each.
constexpr std::size_t kCommitChunkPages = MiB(4).value / kPageSize;
// How far ahead of need, in chunks: at least, and at most.
constexpr std::size_t kCommitAheadMin = 16;
constexpr std::size_t kCommitAheadMax = 256;

}  // namespace

Region::Region(const Shared& shared, Zone zone, PageRange range, sync::RangeLock& range_lock)
    : shared_(shared),
      zone_(zone),
      range_(range),
      range_lock_(range_lock),
      maps_clean_(zone != Zone::kMapping && !shared.options->strict_unmap &&
                  range_lock.policy() != sync::LockPolicy::kCoarse),
      // Regions of one space are neighbours of one size: up to kMaxRegions of them differ in this.
      last_generation_(range.first.value / range.count().value % kMaxRegions) {}

Error Region::Init() {
  chunk_shift_ = static_cast<unsigned>(std::countr_zero(std::min(kCommitChunkPages, range_.count().value)));
  const std::size_t chunks = range_.count().value >> chunk_shift_;
  // Not constructed one by one: 64 KiB that come as zeroes, of which few are ever written.
  committed_ = static_cast<std::uint64_t*>(
      shared_.arena->Allocate({(chunks + 63) / 64 * sizeof(std::uint64_t)}, alignof(std::uint64_t)));
  if (committed_ == nullptr) return {ErrorCode::kNoMetadata};
  if (!is_heap()) {
    windows_ = shared_.arena->New<WindowCache>();
    if (windows_ == nullptr) return {ErrorCode::kNoMetadata};
  }
  if (shared_.options->record_tree_lock_holds) {
    auto* recorder = shared_.arena->New<sync::TimeRecorder>();
    if (recorder == nullptr) return {ErrorCode::kNoMetadata};
    tree_lock_.InstallRecorder(recorder);
  }
  if (const Error error = Refill(); !error.ok()) return error;
  sync::SpinLockHolder holder(tree_lock_);
  Vma* all = TakeVmaLocked();
  VmaWriter(*all).SetRange(0, static_cast<RegionPage>(range_.count().value));
  tree_.Init(all);
  return Error::Ok();
}

Error Region::Refill() {
  bool needs_vmas = true;
  bool needs_nodes = true;
  {
    sync::SpinLockHolder holder(tree_lock_);
    needs_vmas = !HasVmasLocked();
    needs_nodes = tree_.NeedsNodes();
  }
  // What one of the two gets is kept when there is nothing left for the other.
  Vma* vmas = needs_vmas ? shared_.arena->New<Vma>(kRefillVmas, kPageSize) : nullptr;
  VmaTree::Node* nodes = needs_nodes ? shared_.arena->New<VmaTree::Node>(kRefillNodes, kPageSize) : nullptr;
  sync::SpinLockHolder holder(tree_lock_);
  for (std::size_t i = 0; vmas != nullptr && i < kRefillVmas; ++i) ReturnVmaLocked(&vmas[i]);
  for (std::size_t i = 0; nodes != nullptr && i < kRefillNodes; ++i) tree_.AddNode(&nodes[i]);
  const bool more = (vmas != nullptr || !needs_vmas) && (nodes != nullptr || !needs_nodes);
  return more || HasMetadataLocked() ? Error::Ok() : Error{ErrorCode::kNoMetadata};
}

Vma* Region::TakeVmaLocked() {
  FREEHOLD_CHECK(spare_vmas_ != nullptr);
  Vma* vma = spare_vmas_;
  spare_vmas_ = vma->older;
  --spare_vma_count_;
  vma->older = nullptr;
  return vma;
}

void Region::ReturnVmaLocked(Vma* vma) {
  // Whatever is kMapped is in the tree: see published_.
  if (!vma->Is(VmaState::kFree)) VmaWriter(*vma).SetState(VmaState::kFree);
  vma->busy = false;
  vma->newer = nullptr;
  vma->older = spare_vmas_;
  spare_vmas_ = vma;
  ++spare_vma_count_;
}

//   before   |        vma        |
//                   page
//   after    |  vma  |   upper   |
Vma* Region::SplitLocked(Vma* vma, RegionPage page) {
  FREEHOLD_DCHECK(vma->first_page() < page && page < vma->end_page());
  const bool cached = vma->Is(VmaState::kCached);
  if (cached) free_.Remove(vma);
  Vma* upper = TakeVmaLocked();
  {
    VmaWriter writer(*upper);
    writer.SetRange(page, vma->end_page() - page);
    writer.SetState(vma->state.load(std::memory_order_relaxed));
    writer.SetAttributes(vma->attributes());
  }
  upper->knowledge = vma->knowledge;
  upper->kernel_vma = vma->kernel_vma;
  upper->foreign = vma->foreign;
  upper->unrestored = vma->unrestored;
  upper->busy = vma->busy;
  const VmaTree::Path path = tree_.Find(vma->first_page());
  VmaWriter(*vma).SetRange(vma->first_page(), page - vma->first_page());
  tree_.RefreshGap(path);
  tree_.InsertAfter(path, upper);
  if (cached) {
    free_.Push(vma, vma->freed_at);
    free_.Push(upper, vma->freed_at);
  }
  if (vma->Is(VmaState::kMapped)) vmas_.Add(1);
  return upper;
}

void Region::IsolateLocked(RegionPage first, RegionPage end) {
  Vma* vma = tree_.Find(first).vma();
  if (vma->first_page() < first) SplitLocked(vma, first);
  vma = tree_.Find(end - 1).vma();
  if (end < vma->end_page()) SplitLocked(vma, end);
}

// The left extent grows before the right one goes, so that a lookup finds each page in one of the two.
void Region::AbsorbNextLocked(Vma* vma) {
  const Vma* next = NextLocked(vma);
  FREEHOLD_CHECK(next != nullptr);
  VmaWriter(*vma).SetRange(vma->first_page(), vma->page_count() + next->page_count());
  DropNextLocked(vma);
  tree_.RefreshGap(tree_.Find(vma->first_page()));
}

void Region::DropNextLocked(Vma* vma) {
  VmaTree::Path path = tree_.Find(vma->first_page());
  FREEHOLD_CHECK(tree_.Next(path));
  Vma* next = path.vma();
  if (next->Is(VmaState::kMapped)) vmas_.Subtract(1);
  tree_.Erase(path);
  ReturnVmaLocked(next);
}

Vma* Region::NextLocked(const Vma* vma) const {
  VmaTree::Path path = tree_.Find(vma->first_page());
  return tree_.Next(path) ? path.vma() : nullptr;
}

void Region::SetBusyLocked(RegionPage first, RegionPage end, bool busy) {
  for (const RegionPage page : {first, end - 1}) tree_.Find(page).vma()->busy = busy;
}

Error Region::MakeBusy(RegionPage first, RegionPage end) {
  for (;;) {
    Warm(range_.first + Pages{first});
    {
      sync::SpinLockHolder holder(tree_lock_);
      if (HasMetadataLocked()) {
        IsolateLocked(first, end);
        SetBusyLocked(first, end, true);
        return Error::Ok();
      }
    }
    if (const Error error = Refill(); !error.ok()) return error;
  }
}

void Region::EndBusy(RegionPage first, RegionPage end) {
  sync::SpinLockHolder holder(tree_lock_);
  SetBusyLocked(first, end, false);
  for (const RegionPage border : {first, end}) MergeMappedLocked(border, border);
}

void Region::MergeMappedLocked(RegionPage first, RegionPage end) {
  Vma* vma = tree_.Find(first == 0 ? 0 : first - 1).vma();
  while (vma->first_page() < end) {
    Vma* next = NextLocked(vma);
    if (next == nullptr) return;
    const bool same = !vma->busy && !next->busy && vma->Is(VmaState::kMapped) && next->Is(VmaState::kMapped) &&
                      vma->attributes() == next->attributes();
    if (!same) {
      vma = next;
      continue;
    }
    if (vma->knowledge != next->knowledge) vma->knowledge = Knowledge::kUnknown;
    // What one of them needs when it is unmapped does no harm to the other.
    vma->kernel_vma = vma->kernel_vma || next->kernel_vma;
    vma->foreign = vma->foreign || next->foreign;
    vma->unrestored = vma->unrestored || next->unrestored;
    AbsorbNextLocked(vma);
  }
}

// Large extents serve many sizes: without merging, each use would cut them smaller until none was large. Small ones beside
// them are what was left of such a cut, most of all, and would keep the parts from coming together again.
Vma* Region::MergeCachedLocked(Vma* vma) {
  const auto merges = [&](const Vma* neighbour) {
    return neighbour != nullptr && neighbour->Is(VmaState::kCached) && neighbour->knowledge != Knowledge::kClean &&
           vma->knowledge != Knowledge::kClean && neighbour->is_zones_own() && vma->is_zones_own();
  };
  const auto absorb = [&](Vma* left, Vma* cached) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    free_.Remove(cached);
    if (left->knowledge != NextLocked(left)->knowledge) left->knowledge = Knowledge::kUnknown;
    AbsorbNextLocked(left);
    return left;
  };
  if (Vma* next = NextLocked(vma); merges(next)) absorb(vma, next);
  VmaTree::Path path = tree_.Find(vma->first_page());
  if (tree_.Previous(path) && merges(path.vma())) vma = absorb(path.vma(), path.vma());
  return vma;
}

void Region::FreeLocked(Vma* vma) {
  FREEHOLD_DCHECK(vma->is_zones_own());
  vma->knowledge = Knowledge::kClean;
  SetStateLocked(vma, VmaState::kFree);
  const Vma* next = NextLocked(vma);
  if (next != nullptr && next->Is(VmaState::kFree)) AbsorbNextLocked(vma);
  VmaTree::Path path = tree_.Find(vma->first_page());
  if (tree_.Previous(path) && path.vma()->Is(VmaState::kFree)) AbsorbNextLocked(path.vma());
}

void Region::GiveBackLocked(Vma* vma) {
  FREEHOLD_DCHECK(vma->Is(VmaState::kPending) || vma->Is(VmaState::kPurging));
  // Whoever had it finds out by its generation.
  VmaWriter(*vma).SetGeneration(NextGenerationLocked());
  if (!vma->is_zones_own()) {
    CacheLocked(vma, Knowledge::kUnknown);
  } else if (vma->knowledge == Knowledge::kClean) {
    FreeLocked(vma);
  } else {
    CacheLocked(vma, vma->knowledge);
  }
}

// Only chunks that are not committed yet are made writable: others may hold mappings of other protections.
// That is also why one thread at a time commits.
Error Region::Commit(PageRange range) {
  sync::SpinLockHolder holder(commit_lock_);
  if (!is_heap()) {
    IncludeInCoreDumps(ToRegion(range.end - Pages{1}) + 1);
    return Error::Ok();
  }
  const std::size_t chunks = range_.count().value >> chunk_shift_;
  const std::size_t needed = (ToRegion(range.end - Pages{1}) >> chunk_shift_) + 1;
  for (std::size_t first = ToRegion(range.first) >> chunk_shift_; first < needed; ++first) {
    if (IsChunkCommitted(first)) continue;
    std::size_t needed_end = first + 1;
    while (needed_end < needed && !IsChunkCommitted(needed_end)) ++needed_end;
    // Ahead of what is needed, as much as the space has shown to use of a region: a program in steady state, whose use
    // of addresses reaches a little higher from time to time, then does not take mmap_lock for writing each time.
    const std::size_t most = shared_.most_committed->load(std::memory_order_relaxed) >> chunk_shift_;
    const std::size_t ahead = std::clamp(most, kCommitAheadMin, kCommitAheadMax);
    std::size_t end = needed_end;
    while (end < chunks && end < needed_end + ahead && !IsChunkCommitted(end)) ++end;
    Error error = CommitChunks(first, end);
    // Strict overcommit may refuse the large step and grant the small one.
    if (!error.ok() && end > needed_end) error = CommitChunks(first, needed_end);
    if (!error.ok()) return error;
  }
  return Error::Ok();
}

// In few steps, each of which takes mmap_lock.
void Region::IncludeInCoreDumps(RegionPage end) {
  const RegionPage before = dumped_end_.load(std::memory_order_relaxed);
  if (end <= before) return;
  const std::uint64_t step = kCommitAheadMin << chunk_shift_;
  const auto after =
      static_cast<RegionPage>(std::min<std::uint64_t>((end + step - 1) / step * step, range_.count().value));
  shared_.kernel->AdviseCoreDumps(ToAbsolute(before, after - before), os::CoreDumps::kInclude);
  dumped_end_.store(after, std::memory_order_release);
}

Error Region::CommitChunks(std::size_t first, std::size_t end) {
  const PageRange range = ToAbsolute(static_cast<RegionPage>(first << chunk_shift_),
                                     static_cast<RegionPage>((end - first) << chunk_shift_));
  shared_.kernel->AdviseCoreDumps(range, os::CoreDumps::kInclude);
  const Error error = shared_.kernel->Protect(range, os::Protection::kReadWrite);
  if (!error.ok()) return error;
  // The first fault of a kernel VMA takes mmap_lock: have it here. The page is dropped again, since what is
  // clean is not resident; a refusal costs nothing but that.
  const PageRange primed = PageRange::Of(range.first, {1});
  shared_.kernel->TouchForWrite(primed);
  (void)shared_.kernel->Discard({&primed, 1});
  for (std::size_t chunk = first; chunk < end; ++chunk) {
    // Release pairs with the acquire in IsChunkCommitted.
    CommittedWord(chunk).fetch_or(std::uint64_t{1} << (chunk % 64), std::memory_order_release);
  }
  const std::uint64_t committed =
      committed_pages_.fetch_add(range.count().value, std::memory_order_relaxed) + range.count().value;
  // Two regions at once may leave the lesser: a hint.
  if (committed > shared_.most_committed->load(std::memory_order_relaxed)) {
    shared_.most_committed->store(committed, std::memory_order_relaxed);
  }
  return Error::Ok();
}

void Region::AddStats(AddressSpaceStats& stats) const {
  const auto pages = [](std::uint64_t n) { return Pages{n}.bytes(); };
  stats.reserved = stats.reserved + range_.bytes();
  stats.committed = stats.committed + pages(committed_pages_.load(std::memory_order_relaxed));
  stats.mapped = stats.mapped + pages(mapped_pages_.get());
  if (is_heap()) stats.mapped_ordinary = stats.mapped_ordinary + pages(mapped_pages_.get());
  stats.vmas += vmas_.get();
  stats.maps += maps_.get();
  stats.unmaps += unmaps_.get();
  stats.deferred_unmaps += deferred_extents_.get();
  stats.reuses += reuses_.get();
  stats.zeroed_pages += zeroed_pages_.get();
  stats.heap_splits += heap_splits_.get();
  stats.coarse_retries += coarse_retries_.get();
  stats.window_hits += window_hits_.get();
  sync::SpinLockHolder holder(tree_lock_);
  stats.free_resident = stats.free_resident + pages(free_.dirty_pages());
  if (windows_ == nullptr) return;
  stats.windows += windows_->size();
  stats.window_bytes = stats.window_bytes + pages(windows_->pages());
}

sync::TimeHistogram Region::TreeLockHolds() const {
  const sync::TimeRecorder* recorder = tree_lock_.recorder();
  return recorder != nullptr ? recorder->Read() : sync::TimeHistogram();
}

void Region::CheckInvariants() const {
  sync::SpinLockHolder holder(tree_lock_);
  tree_.CheckInvariants(static_cast<RegionPage>(range_.count().value));
  free_.CheckInvariants();
  std::size_t cached = 0;
  std::size_t windows = 0;
  std::uint64_t mapped = 0;
  std::uint64_t vmas = 0;
  std::uint64_t deferred = 0;
  bool previous_free = false;
  VmaTree::Path path = tree_.Find(0);
  do {
    const Vma* vma = path.vma();
    const bool free = vma->Is(VmaState::kFree);
    FREEHOLD_CHECK(!(free && previous_free));
    FREEHOLD_CHECK(!free || vma->knowledge == Knowledge::kClean);
    FREEHOLD_CHECK(!free || vma->is_zones_own());
    const bool waits = vma->Is(VmaState::kDeferred);
    FREEHOLD_CHECK(free || waits || vma->Is(VmaState::kCached) || vma->Is(VmaState::kMapped) ||
                   vma->Is(VmaState::kWindow));
    FREEHOLD_CHECK(!vma->unrestored || waits || vma->Is(VmaState::kMapped));
    if (waits) ++deferred;
    previous_free = free;
    if (vma->Is(VmaState::kCached)) ++cached;
    if (vma->Is(VmaState::kWindow)) ++windows;
    if (vma->Is(VmaState::kMapped)) {
      ++vmas;
      mapped += vma->page_count();
    }
  } while (tree_.Next(path));
  FREEHOLD_CHECK(cached == free_.extents());
  for (const Vma* vma : published_) {
    const bool mapped = vma != nullptr && vma->Is(VmaState::kMapped);
    FREEHOLD_CHECK(!mapped || tree_.Find(vma->first_page()).vma() == vma);
  }
  if (windows_ != nullptr) windows_->CheckInvariants();
  FREEHOLD_CHECK(windows == (windows_ != nullptr ? windows_->size() : 0));
  FREEHOLD_CHECK(mapped == mapped_pages_.get());
  FREEHOLD_CHECK(vmas == vmas_.get());
  FREEHOLD_CHECK(deferred == deferred_extents_.get());
}

}  // namespace freehold::vm
