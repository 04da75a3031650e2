// The life of a fault:
//
//   a thread touches a page that is not there, and sleeps; the kernel makes an event of it
//   Wait             one of the waiting threads takes it; if that was the last one, another is woken or started
//   HandleFault      lookup without a lock, in a read section; the mapping's backing is pinned
//   Admit            + lock_  somebody reads this page already: he will wake the thread
//                             the mapping has its share of threads: tried again when one of them is done
//                             the window to read is chosen, and claimed                               - lock_
//   Fill, chunk by chunk
//                    + the pager's pages, shared                      keeps write-back, eviction, invalidation away
//                      Pager::Read into the thread's own memory       no lock that anyone else needs
//                      + the range, shared                            keeps the mapping as it is
//                        still the same mapping?                      no: the thread tries again, and faults anew
//                        UFFDIO_COPY                                  atomic; of the touched page first, which wakes
//                                                                     the thread, then of the others
//                      - range
//                    - pages
//   Leave            those who joined or were put off are woken, and fault again if need be
//
// Why no content lands in a foreign mapping: between the check of the generation and the copy the range is held, and
// whoever unmaps or replaces it holds it exclusively at that time. Why none is stale: whoever makes content older (a
// write-back with eviction, an invalidation) holds the pager's pages exclusively, so he comes before the read, or after
// the copy and drops what it brought.
#include "vm/fault.h"

#include <csignal>
#include <cstring>
#include <new>
#include <utility>

#include "vm/os/check.h"
#include "vm/os/thread_id.h"
#include "vm/region.h"

namespace freehold::vm {

namespace {

// For a pager's code as well.
constexpr std::size_t kStackSize = MiB(1).value;

void Count(std::atomic<std::uint64_t>& counter, std::uint64_t n = 1) {
  counter.fetch_add(n, std::memory_order_relaxed);
}

}  // namespace

FaultService::FaultService(AddressSpace& space, os::Userfault& userfault, const FaultOptions& options)
    : space_(space), kernel_(space.kernel()), userfault_(userfault), options_(options) {
  FREEHOLD_CHECK(options.min_threads > 0 && options.min_threads <= options.max_threads);
  FREEHOLD_CHECK(options.max_threads <= kMaxThreads && options.threads_per_mapping > 0);
  FREEHOLD_CHECK(options.max_read_ahead >= kClusterPages);
  space_.SetFaultHooks(this);
}

FaultService::~FaultService() {
  UnmapAll();
  space_.SetFaultHooks(nullptr);
  // Its threads are the parent's, and so is what they left behind.
  if (dead_.load(std::memory_order_relaxed)) return;
  Handler* parked;
  {
    sync::SpinLockHolder holder(lock_);
    stopping_ = true;
    parked = parked_;
    parked_ = nullptr;
  }
  if (available_) userfault_.Stop();
  // From here on nobody begins to start a thread; who has begun is one.
  while (IsSpawning()) os::YieldCpu();
  while (parked != nullptr) {
    Handler* next = parked->next_parked;
    parked->parker.Unpark();
    parked = next;
  }
  for (Handler& handler : handlers_) {
    if (!handler.used) continue;
    pthread_join(handler.thread, nullptr);
    FreePiece(handler.piece);
  }
  Piece* pieces;
  {
    sync::SpinLockHolder holder(lock_);
    pieces = std::exchange(free_pieces_, nullptr);
  }
  while (pieces != nullptr) {
    Piece* next = pieces->next;
    (void)kernel_.Release(PageRange(pieces->memory));
    pieces = next;
  }
  // No thread can pin a backing any more; what is deferred drops the last references.
  space_.epochs().Barrier();
  FREEHOLD_CHECK(backings_.load(std::memory_order_acquire) == 0);
}

Error FaultService::Start() {
  if (const Error error = userfault_.Open(); !error.ok()) {
    return error.code == ErrorCode::kUnsupported ? Error::Ok() : error;
  }
  available_ = true;
  for (unsigned i = 0; i < options_.min_threads; ++i) {
    Handler* handler;
    {
      sync::SpinLockHolder holder(lock_);
      handler = TakeSlotLocked();
    }
    if (const Error error = Spawn(*handler); !error.ok()) return error;
  }
  return Error::Ok();
}

// ---- Threads ----

// A place among the waiting is kept for the thread.
Error FaultService::Spawn(Handler& handler) {
  const Result<Piece*> piece = NewPiece();
  Error error = piece.error();
  if (error.ok()) {
    handler.service = this;
    handler.piece = *piece;
    pthread_attr_t attributes;
    sigset_t all;
    sigset_t old;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, kStackSize);
    // Signals are for the program's own threads.
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    const int refused = pthread_create(&handler.thread, &attributes, &RunHandler, &handler);
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
    pthread_attr_destroy(&attributes);
    if (refused != 0) {
      FreePiece(*piece);
      error = Error::System(refused);
    }
  }
  sync::SpinLockHolder holder(lock_);
  --spawning_;
  if (error.ok()) return error;
  handler.used = false;
  --waiting_;
  --threads_;
  return error;
}

FaultService::Handler* FaultService::TakeSlotLocked() {
  if (threads_ == options_.max_threads) return nullptr;
  Handler* handler = handlers_;
  while (handler->used) ++handler;
  handler->used = true;
  ++threads_;
  ++waiting_;
  ++spawning_;
  return handler;
}

bool FaultService::IsSpawning() const {
  sync::SpinLockHolder holder(lock_);
  return spawning_ > 0;
}

void* FaultService::RunHandler(void* handler) {
  Handler& self = *static_cast<Handler*>(handler);
  FaultService& service = *self.service;
  os::FaultEvent event;
  while (service.userfault_.Wait(event)) {
    service.KeepSomebodyWaiting();
    service.HandleFault(self, event);
    if (!service.AwaitTurn(self)) break;
  }
  return nullptr;
}

// The calling thread waits no more. Its place goes to a parked thread, or a new one, if it was the last.
void FaultService::KeepSomebodyWaiting() {
  Handler* parked = nullptr;
  Handler* fresh = nullptr;
  {
    sync::SpinLockHolder holder(lock_);
    if (--waiting_ > 0 || stopping_) return;
    parked = parked_;
    if (parked != nullptr) {
      parked_ = parked->next_parked;
      ++waiting_;
    } else {
      fresh = TakeSlotLocked();
    }
  }
  if (parked != nullptr) parked->parker.Unpark();
  // Refused, faults wait for a thread that is busy.
  if (fresh != nullptr) (void)Spawn(*fresh);
}

bool FaultService::AwaitTurn(Handler& self) {
  {
    sync::SpinLockHolder holder(lock_);
    if (stopping_) return false;
    if (waiting_ < kWaiting) {
      ++waiting_;
      return true;
    }
    self.next_parked = parked_;
    parked_ = &self;
  }
  self.parker.Park();
  self.parker.Reset();
  return true;
}

// ---- Faults ----

sync::RangeLock& FaultService::RangeLockOf(PageNumber page) const { return space_.RegionOf(page)->range_lock(); }

void FaultService::HandleFault(Handler& self, const os::FaultEvent& event) {
  Count(faults_);
  PageRange found;
  const Result<Target> target = FindTarget(PageRange::Of(event.page, {1}), found, VmaState::kDeferred);
  if (!target.ok()) {
    // Unmapped meanwhile, or about to be. Who tries again finds out, or comes back here until the kernel knows.
    Wake(PageRange::Of(event.page, {1}));
    return;
  }
  if (event.write_protected) {
    AllowWrite(*target, event.page);
  } else if (Target window = *target; Admit(self, window, event.page)) {
    HandleMissing(self, window, event);
    Leave(self, window);
  }
  target->backing->Unpin();
}

bool FaultService::Admit(Handler& self, Target& target, PageNumber page) {
  PagerBacking& backing = *target.backing;
  const std::uint64_t max = options_.max_read_ahead.value;
  const std::uint64_t wanted = target.PagesOf(PageRange::Of(page, {1})).first;
  // Around the page, of what is not in memory and nobody reads.
  PageRange free = target.RangeOf(backing.AbsentAround(wanted, target.PagesOf(target.vma), max));
  // It came between the event and now, most likely; a read of the page alone finds out.
  const bool came = backing.present().Test(wanted);
  sync::SpinLockHolder holder(lock_);
  for (unsigned i = 0; i < options_.max_threads; ++i) {
    Handler& other = handlers_[i];
    // The same addresses may belong to another mapping by now.
    if (other.backing != &backing) continue;
    if (other.filling.Contains(page)) {
      other.wakes = true;
      Count(joined_);
      return false;
    }
    // Windows do not overlap.
    if (!other.filling.Overlaps(free)) continue;
    if (other.filling.first < page) free.first = other.filling.end;
    if (other.filling.first > page) free.end = other.filling.first;
  }
  if (backing.fills == options_.threads_per_mapping) {
    const PageRange one = PageRange::Of(page, {1});
    backing.postponed = backing.postponed.empty() ? one
                                                  : PageRange{std::min(backing.postponed.first, one.first),
                                                              std::max(backing.postponed.end, one.end)};
    Count(postponed_);
    return false;
  }
  target.range = came ? PageRange::Of(page, {1})
                      : target.RangeOf(backing.ChooseWindow(wanted, target.PagesOf(free), max));
  ++backing.fills;
  self.backing = &backing;
  self.filling = target.range;
  self.wakes = false;
  return true;
}

void FaultService::Leave(Handler& self, const Target& target) {
  PageRange filled;
  PageRange postponed;
  {
    sync::SpinLockHolder holder(lock_);
    if (self.wakes) filled = self.filling;
    self.backing = nullptr;
    self.filling = {};
    --target.backing->fills;
    std::swap(postponed, target.backing->postponed);
  }
  if (!filled.empty()) Wake(filled);
  if (!postponed.empty()) Wake(postponed);
}

void FaultService::HandleMissing(Handler& self, const Target& target, const os::FaultEvent& event) {
  const PageRange window = target.range;
  PageNumber at = window.first;
  bool alone = false;
  while (at < window.end) {
    const PageRange chunk = {at, std::min(window.end, at + (alone ? Pages{1} : kChunkPages))};
    const Result<Pages> filled = Fill(target, chunk, &event, *self.piece);
    if (filled.ok()) {
      at = at + *filled;
      // The content ends, or what was not touched is not at hand.
      if (at > event.page && (alone || *filled < chunk.count())) return;
      continue;
    }
    // What was touched is there.
    if (at > event.page) return;
    if (filled.error().code == ErrorCode::kReplaced) {
      Wake(PageRange::Of(event.page, {1}));
      return;
    }
    if (alone) {
      Fail(target, event.page, filled.error());
      return;
    }
    // A neighbour may be to blame: the page alone.
    at = event.page;
    alone = true;
  }
}

Result<Pages> FaultService::Fill(const Target& target, PageRange chunk, const os::FaultEvent* event, Piece& piece) {
  const PageSpan pages = target.PagesOf(chunk);
  const Guard reading(target.backing->pages_lock(), PagerBacking::LockRange(pages), Mode::kShared,
                      sync::Operation::kFault);
  const Result<Pages> read = target.backing->Read(pages.first, {piece.bytes(), chunk.bytes().value});
  if (!read.ok()) return read;
  const PageRange part = PageRange::Of(chunk.first, *read);
  const Guard guard(RangeLockOf(part.first), part, Mode::kShared, sync::Operation::kFault);
  if (!IsStill(target, part, guard)) return ErrorCode::kReplaced;
  if (const Error error = Put(target, part, piece.bytes(), event); !error.ok()) return error;
  return *read;
}

// The page that a thread waits for comes first: its copy lets the thread go on, and while that wakes up, the others
// follow. If it wants to write, the page goes in writable, and counts as written to. The others were only read ahead:
// one that is refused is read again when somebody touches it.
Error FaultService::Put(const Target& target, PageRange part, const std::byte* from, const os::FaultEvent* event) {
  PagerBacking& backing = *target.backing;
  if (backing.filling() == PagerBacking::Filling::kAtMap) {
    const PageSpan pages = target.PagesOf(part);
    std::memcpy(part.address(), from, part.bytes().value);
    backing.present().Set(pages.first, pages.end);
    Count(pages_read_, pages.count());
    return Error::Ok();
  }
  const os::WriteTracking tracking = backing.tracks_writes() ? os::WriteTracking::kOn : os::WriteTracking::kOff;
  if (event == nullptr || !part.Contains(event->page)) return CopyIn(target, part, from, tracking);
  const PageRange page = PageRange::Of(event->page, {1});
  const PageRange before = {part.first, page.first};
  const PageRange after = {page.end, part.end};
  // All of them now: the thread that the first copy wakes may ask for a write-back at once, which waits for the others.
  const PageSpan pages = target.PagesOf(part);
  backing.present().Set(pages.first, pages.end);
  const bool dirties = event->write && backing.tracks_writes();
  const PageSpan dirty = target.PagesOf(page);
  if (dirties) backing.dirty().Set(dirty.first, dirty.end);
  const Error error = CopyIn(target, page, from + before.bytes().value, dirties ? os::WriteTracking::kOff : tracking);
  if (!error.ok()) {
    if (dirties) backing.dirty().Clear(dirty.first, dirty.end);
    backing.present().Clear(pages.first, pages.end);
    return error;
  }
  if (!after.empty()) (void)CopyIn(target, after, from + (page.end - part.first).bytes().value, tracking);
  if (!before.empty()) (void)CopyIn(target, before, from, tracking);
  return error;
}

Error FaultService::CopyIn(const Target& target, PageRange part, const std::byte* from, os::WriteTracking tracking) {
  PageBitmap& present = target.backing->present();
  const PageSpan pages = target.PagesOf(part);
  // Before the copy: a thread that it wakes may ask for a write-back at once.
  present.Set(pages.first, pages.end);
  for (Pages done; done < part.count();) {
    const PageRange rest = {part.first + done, part.end};
    const Result<Pages> copied = userfault_.Copy(rest, from + done.bytes().value, tracking);
    if (copied.ok()) {
      done += *copied;
      Count(pages_read_, copied->value);
    } else if (copied.error() == Error::System(EEXIST)) {
      // It came otherwise; the copy woke nobody.
      Wake(PageRange::Of(rest.first, {1}));
      done += Pages{1};
    } else {
      present.Clear(pages.first + done.value, pages.end);
      return copied.error();
    }
  }
  return Error::Ok();
}

// With Collect, which holds the range exclusively, in one order or the other: a page that counts as not written to is
// write-protected.
void FaultService::AllowWrite(const Target& target, PageNumber page) {
  const PageRange part = PageRange::Of(page, {1});
  const Guard guard(RangeLockOf(page), part, Mode::kShared, sync::Operation::kFault);
  const PageSpan pages = target.PagesOf(part);
  // Evicted meanwhile, it is a page like any other that is not there.
  if (IsStill(target, part, guard) && target.backing->present().Test(pages.first)) {
    target.backing->dirty().Set(pages.first, pages.end);
    if (userfault_.WriteProtect(part, false).ok()) return;
  }
  Wake(part);
}

void FaultService::Fail(const Target& target, PageNumber page, Error error) {
  const PageRange part = PageRange::Of(page, {1});
  const Guard guard(RangeLockOf(page), part, Mode::kShared, sync::Operation::kFault);
  if (!IsStill(target, part, guard)) return Wake(part);
  const CheckValue values[] = {{"address", reinterpret_cast<std::uintptr_t>(page.address())},
                               {"pages", 1},
                               {"pager_page", target.backing->pager_page(target.PagesOf(part).first)},
                               {"errno", static_cast<std::uint64_t>(ToErrno(error))}};
  Report(error.code == ErrorCode::kThrew ? "a pager threw, and who touches the page gets SIGBUS:"
                                         : "a pager could not read a page, and who touches it gets SIGBUS:",
         values, 4);
  Count(failures_);
  target.backing->SetPoisoned();
  // Refused, the thread tries again, and so do we.
  if (!userfault_.Poison(page).ok()) Wake(part);
}

bool FaultService::IsStill(const Target& target, PageRange part, const Guard& guard) const {
  for (PageNumber page = part.first; page < part.end;) {
    VmaState state;
    const VmaInfo vma = space_.RegionOf(page)->LookupHeld(page, state, guard);
    if (state != VmaState::kMapped && state != VmaState::kDeferred) return false;
    if (vma.generation != target.generation || vma.backing != target.backing) return false;
    page = vma.range.end;
  }
  return true;
}

}  // namespace freehold::vm
