#include "vm/os/fake_kernel.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <iterator>
#include <utility>

#include "vm/os/check.h"
#include "vm/sync/lock_rank.h"

namespace freehold::vm::os {
namespace {

thread_local unsigned current_cpu = 0;

bool CanFail(FakeKernel::Operation operation) {
  return operation != FakeKernel::Operation::kTouchForWrite && operation != FakeKernel::Operation::kAdviseCoreDumps &&
         operation != FakeKernel::Operation::kZero &&
         operation != FakeKernel::Operation::kCopy;
}

Features Common(Features a, Features b) {
  return {.guard_regions = a.guard_regions && b.guard_regions,
          .vectored_discard = a.vectored_discard && b.vectored_discard,
          .userfaultfd = a.userfaultfd && b.userfaultfd,
          .huge_pages = a.huge_pages && b.huge_pages,
          .membarrier = a.membarrier && b.membarrier};
}

[[noreturn]] void Misuse(FakeKernel::Operation operation, const char* what, PageRange range) {
  const std::string message = std::string("fake kernel: ") + ToString(operation) + ": " + what;
  const CheckValue values[] = {{"first", range.first.value << kPageShift},
                               {"end", range.end.value << kPageShift}};
  CheckFailed(__FILE__, __LINE__, message.c_str(), values, 2);
}

}  // namespace

FakeKernel::FakeKernel(Options options)
    : cpu_count_(options.cpu_count),
      log_calls_(options.log_calls),
      features_(Common(options.features, real_.features())),
      now_(real_.Now()) {}

FakeKernel::~FakeKernel() {
  const Lock lock(mutex_);
  model_.ForEachSegment([this](PageRange range) { (void)real_.Release(range); });
}

// ---- Kernel ----

Features FakeKernel::features() const {
  const Lock lock(mutex_);
  return features_;
}

template <typename Perform>
Error FakeKernel::Run(Call call, Perform perform) {
  sync::CheckNoShortLockHeld(ToString(call.operation));
  const Lock lock(mutex_);
  for (const PageRange range : call.ranges) RequireReservedLocked(call.operation, range);
  call.result = InjectedErrorLocked(call.operation);
  if (call.result.ok()) call.result = perform();
  const Error result = call.result;
  LogLocked(std::move(call));
  return result;
}

Result<PageRange> FakeKernel::Reserve(Pages size, Pages alignment) {
  sync::CheckNoShortLockHeld("Reserve");
  FREEHOLD_CHECK(size.value > 0);
  FREEHOLD_CHECK(alignment.value > 0 && (alignment.value & (alignment.value - 1)) == 0);
  const Lock lock(mutex_);
  const Error injected = InjectedErrorLocked(Operation::kReserve);
  const Result<PageRange> result = injected.ok() ? real_.Reserve(size, alignment) : injected;
  Call call{.operation = Operation::kReserve, .ranges = {}, .result = result.error()};
  if (result.ok()) {
    model_.Reserve(*result);
    call.ranges.push_back(*result);
  }
  LogLocked(std::move(call));
  return result;
}

Error FakeKernel::Release(PageRange range) {
  return Run({.operation = Operation::kRelease, .ranges = {range}, .result = {}}, [&]() -> Error {
    mutex_.AssertHeld();
    const Error error = real_.Release(range);
    if (error.ok()) model_.Release(range);
    return error;
  });
}

Error FakeKernel::Protect(PageRange range, Protection protection) {
  return Run(
      {.operation = Operation::kProtect, .ranges = {range}, .result = {}, .protection = protection},
      [&]() -> Error {
        mutex_.AssertHeld();
        return ProtectLocked(range, protection);
      });
}

Error FakeKernel::ProtectLocked(PageRange range, Protection protection) {
  const bool commits = Has(protection, Protection::kWrite);
  if (commits && model_.CountIf(range, [](const PageState& page) { return page.undumped; }) != Pages{0}) {
    Misuse(Operation::kProtect, "core dumps omit it", range);
  }
  if (commits && commit_limit_.has_value()) {
    const auto committed = [](const PageState& page) { return page.committed; };
    const Pages added = range.count() - model_.CountIf(range, committed);
    if (added > Pages{0} && model_.CountIf(committed) + added > *commit_limit_) {
      ++injected_;
      return Error::System(ENOMEM);
    }
  }
  const Error error = real_.Protect(range, protection);
  if (!error.ok()) return error;
  model_.Update(range, [&](PageState& page) {
    page.protection = protection;
    page.committed = page.committed || commits;
  });
  return error;
}

Error FakeKernel::Reset(PageRange range) {
  return Run({.operation = Operation::kReset, .ranges = {range}, .result = {}}, [&]() -> Error {
    mutex_.AssertHeld();
    const Error error = real_.Reset(range);
    if (error.ok()) ResetModelLocked(range);
    return error;
  });
}

void FakeKernel::ResetModelLocked(PageRange range) {
  model_.Update(range, [](PageState& page) { page = PageState{.reservation = page.reservation}; });
}

Error FakeKernel::Move(PageRange from, PageRange to) {
  sync::CheckNoShortLockHeld("Move");
  const Lock lock(mutex_);
  RequireReservedLocked(Operation::kMove, from);
  RequireReservedLocked(Operation::kMove, to);
  const auto locked = [](const PageState& page) { return page.locked; };
  if (model_.CountIf(from, locked) != Pages{0}) Misuse(Operation::kMove, "locked pages", from);
  const Error injected = InjectedErrorLocked(Operation::kMove);
  Error result = injected.ok() ? real_.Move(from, to) : real_.Reset(to);
  if (!injected.ok()) result = injected;
  MoveModelLocked(from, to, result.ok());
  LogLocked({.operation = Operation::kMove, .ranges = {from, to}, .result = result});
  return result;
}

void FakeKernel::MoveModelLocked(PageRange from, PageRange to, bool moved) {
  ResetModelLocked(to);
  if (!moved) return;
  const std::uint32_t move = ++moves_;
  for (std::size_t i = 0; i < from.count().value; ++i) {
    const PageState source = model_.At(from.first + Pages{i});
    model_.Update(PageRange::Of(to.first + Pages{i}, {1}), [&](PageState& page) {
      const std::uint32_t reservation = page.reservation;
      page = source;
      page.reservation = reservation;
      page.moved = move;
    });
  }
  model_.Update(from, [](PageState& page) { page.resident = false; });
}

Error FakeKernel::LockMemory(PageRange range) {
  return Run({.operation = Operation::kLockMemory, .ranges = {range}, .result = {}}, [&]() -> Error {
    mutex_.AssertHeld();
    return SetMemoryLockLocked(range, true);
  });
}

Error FakeKernel::UnlockMemory(PageRange range) {
  return Run({.operation = Operation::kUnlockMemory, .ranges = {range}, .result = {}},
             [&]() -> Error {
               mutex_.AssertHeld();
               return SetMemoryLockLocked(range, false);
             });
}

Error FakeKernel::SetMemoryLockLocked(PageRange range, bool locked) {
  const auto is_locked = [](const PageState& page) { return page.locked; };
  if (locked && lock_limit_.has_value() &&
      model_.CountIf(is_locked) + range.count() - model_.CountIf(range, is_locked) > *lock_limit_) {
    ++injected_;
    return Error::System(ENOMEM);
  }
  const Error error = locked ? real_.LockMemory(range) : real_.UnlockMemory(range);
  if (error.ok()) model_.Update(range, [&](PageState& page) { page.locked = locked; });
  return error;
}

Error FakeKernel::Discard(absl::Span<const PageRange> ranges) {
  sync::CheckNoShortLockHeld("Discard");
  const Lock lock(mutex_);
  for (const PageRange range : ranges) RequireReservedLocked(Operation::kDiscard, range);
  Error result = InjectedErrorLocked(Operation::kDiscard);
  if (result.ok()) {
    result = DiscardLocked(ranges);
  } else if (const Error half = DiscardLocked({ranges.data(), ranges.size() / 2}); !half.ok()) {
    result = half;
  }
  LogLocked({.operation = Operation::kDiscard,
             .ranges = {ranges.begin(), ranges.end()},
             .result = result});
  return result;
}

Error FakeKernel::DiscardLocked(absl::Span<const PageRange> ranges) {
  if (features_.vectored_discard) {
    if (const Error error = real_.Discard(ranges); !error.ok()) return error;
  } else {
    for (const PageRange& range : ranges) {
      if (const Error error = real_.Discard({&range, 1}); !error.ok()) return error;
    }
  }
  for (const PageRange range : ranges) {
    model_.Update(range, [](PageState& page) { page.resident = false; });
  }
  return Error::Ok();
}

Error FakeKernel::AdviseHugePages(PageRange range, HugePages advice) {
  return Run({.operation = Operation::kAdviseHugePages,
              .ranges = {range},
              .result = {},
              .huge_pages = advice},
             [&]() -> Error {
               mutex_.AssertHeld();
               const Error error = real_.AdviseHugePages(range, advice);
               if (!error.ok()) return error;
               model_.Update(range, [&](PageState& page) {
                 page.advice = advice == HugePages::kPrefer ? PageState::Advice::kPreferHuge
                                                            : PageState::Advice::kAvoidHuge;
               });
               return error;
             });
}

void FakeKernel::AdviseCoreDumps(PageRange range, CoreDumps advice) {
  (void)Run({.operation = Operation::kAdviseCoreDumps, .ranges = {range}, .result = {}, .core_dumps = advice},
            [&]() -> Error {
              mutex_.AssertHeld();
              real_.AdviseCoreDumps(range, advice);
              model_.Update(range, [&](PageState& page) { page.undumped = advice == CoreDumps::kOmit; });
              return Error::Ok();
            });
}

// Leaves the model alone: pages stay resident until memory is short.
Error FakeKernel::AdviseReclaim(PageRange range, ReclaimHint hint) {
  return Run({.operation = Operation::kAdviseReclaim,
              .ranges = {range},
              .result = {},
              .reclaim = hint},
             [&] { return real_.AdviseReclaim(range, hint); });
}

// Leaves the model alone: it knows no other attributes of pages.
Error FakeKernel::Advise(PageRange range, int advice) {
  return Run({.operation = Operation::kAdvise, .ranges = {range}, .result = {}, .advice = advice},
             [&] { return real_.Advise(range, advice); });
}

Error FakeKernel::InstallGuard(PageRange range) {
  return Run({.operation = Operation::kInstallGuard, .ranges = {range}, .result = {}},
             [&]() -> Error {
               mutex_.AssertHeld();
               return SetGuardLocked(Operation::kInstallGuard, range);
             });
}

Error FakeKernel::RemoveGuard(PageRange range) {
  return Run({.operation = Operation::kRemoveGuard, .ranges = {range}, .result = {}},
             [&]() -> Error {
               mutex_.AssertHeld();
               return SetGuardLocked(Operation::kRemoveGuard, range);
             });
}

Error FakeKernel::SetGuardLocked(Operation operation, PageRange range) {
  if (!features_.guard_regions) return {ErrorCode::kUnsupported};
  const bool install = operation == Operation::kInstallGuard;
  const Error error = install ? real_.InstallGuard(range) : real_.RemoveGuard(range);
  if (!error.ok()) return error;
  model_.Update(range, [&](PageState& page) {
    page.guard = install;
    page.resident = page.resident && !install;
  });
  return error;
}

Result<Pages> FakeKernel::CountResident(PageRange range) {
  Result<Pages> result = Pages{0};
  const Error error = Run({.operation = Operation::kCountResident, .ranges = {range}, .result = {}},
                          [&]() -> Error {
                            result = real_.CountResident(range);
                            return result.error();
                          });
  if (!error.ok()) return error;
  return result;
}

Error FakeKernel::QueryResident(PageRange range, absl::Span<std::uint8_t> resident) {
  return Run({.operation = Operation::kQueryResident, .ranges = {range}, .result = {}},
             [&] { return real_.QueryResident(range, resident); });
}

void FakeKernel::TouchForWrite(PageRange range) {
  if (range.count().value > kPagesPerHugePage) {
    Misuse(Operation::kTouchForWrite, "more than a huge page's worth", range);
  }
  RecordTouch(Operation::kTouchForWrite, range);
  real_.TouchForWrite(range);
}

void FakeKernel::Zero(PageRange range) {
  RecordTouch(Operation::kZero, range);
  real_.Zero(range);
}

void FakeKernel::Copy(PageRange from, PageRange to) {
  sync::CheckNoShortLockHeld(ToString(Operation::kCopy));
  {
    const Lock lock(mutex_);
    RequireReservedLocked(Operation::kCopy, from);
    RequireReservedLocked(Operation::kCopy, to);
    RequireWritableLocked(Operation::kCopy, to);
    model_.Update(to, [](PageState& page) { page.resident = true; });
    LogLocked({.operation = Operation::kCopy, .ranges = {from, to}, .result = {}});
  }
  real_.Copy(from, to);
}

Result<FileInfo> FakeKernel::IdentifyFile(int descriptor) {
  Result<FileInfo> result = FileInfo{};
  const Error error = Run({.operation = Operation::kIdentifyFile, .ranges = {}, .result = {}}, [&] {
    result = real_.IdentifyFile(descriptor);
    return result.error();
  });
  if (!error.ok()) return error;
  return result;
}

Result<FileTraits> FakeKernel::InspectFile(int descriptor) {
  Result<FileTraits> result = FileTraits{};
  const Error error = Run({.operation = Operation::kInspectFile, .ranges = {}, .result = {}}, [&] {
    result = real_.InspectFile(descriptor);
    return result.error();
  });
  if (!error.ok()) return error;
  return result;
}

Error FakeKernel::MapFile(PageRange range, const FileView& view) {
  sync::CheckNoShortLockHeld("MapFile");
  const Lock lock(mutex_);
  RequireReservedLocked(Operation::kMapFile, range);
  const Error injected = InjectedErrorLocked(Operation::kMapFile);
  Error result = injected.ok() ? real_.MapFile(range, view) : real_.Reset(range);
  if (!injected.ok()) result = injected;
  if (result.ok()) {
    ShowFileLocked(range, view.protection, ++files_);
  } else {
    ResetModelLocked(range);
  }
  LogLocked({.operation = Operation::kMapFile, .ranges = {range}, .result = result, .view = view});
  return result;
}

Error FakeKernel::ReplaceByFile(PageRange range, const FileView& view) {
  return Run({.operation = Operation::kReplaceByFile, .ranges = {range}, .result = {}, .view = view},
             [&]() -> Error {
               mutex_.AssertHeld();
               const Error error = real_.ReplaceByFile(range, view);
               if (error.ok()) ShowFileLocked(range, view.protection, ++files_);
               return error;
             });
}

Error FakeKernel::ExtendFile(PageRange range) {
  sync::CheckNoShortLockHeld("ExtendFile");
  const Lock lock(mutex_);
  RequireReservedLocked(Operation::kExtendFile, range);
  const PageRange last = PageRange::Of(range.first - Pages{1}, Pages{1});
  RequireFileLocked(Operation::kExtendFile, last);
  if (model_.At(last.first).locked) Misuse(Operation::kExtendFile, "locked pages", last);
  const Error injected = InjectedErrorLocked(Operation::kExtendFile);
  Error result = injected.ok() ? real_.ExtendFile(range) : real_.Reset(range);
  if (!injected.ok()) result = injected;
  if (result.ok()) {
    ShowFileLocked(range, model_.At(last.first).protection, model_.At(last.first).file);
  } else {
    ResetModelLocked(range);
  }
  LogLocked({.operation = Operation::kExtendFile, .ranges = {range}, .result = result});
  return result;
}

Error FakeKernel::MoveFile(PageRange from, PageRange to) {
  sync::CheckNoShortLockHeld("MoveFile");
  const Lock lock(mutex_);
  RequireReservedLocked(Operation::kMoveFile, from);
  RequireReservedLocked(Operation::kMoveFile, to);
  RequireFileLocked(Operation::kMoveFile, from);
  const auto locked = [](const PageState& page) { return page.locked; };
  if (model_.CountIf(from, locked) != Pages{0}) Misuse(Operation::kMoveFile, "locked pages", from);
  const Error injected = InjectedErrorLocked(Operation::kMoveFile);
  Error result = injected.ok() ? real_.MoveFile(from, to) : real_.Reset(to);
  if (!injected.ok()) result = injected;
  if (result.ok()) {
    ShowFileLocked(to, model_.At(from.first).protection, ++files_);
    model_.Update(from, [](PageState& page) { page.resident = false; });
  } else {
    ResetModelLocked(to);
  }
  LogLocked({.operation = Operation::kMoveFile, .ranges = {from, to}, .result = result});
  return result;
}

void FakeKernel::ShowFileLocked(PageRange range, Protection protection, std::uint32_t file) {
  model_.Update(range, [&](PageState& page) {
    page = PageState{.reservation = page.reservation, .protection = protection, .file = file};
  });
}

Error FakeKernel::Sync(PageRange range, SyncOptions options) {
  return Run({.operation = Operation::kSync, .ranges = {range}, .result = {}},
             [&] { return real_.Sync(range, options); });
}

// The faults are outside of the lock, as in RecordTouch.
Error FakeKernel::FaultIn(PageRange range, Access access) {
  sync::CheckNoShortLockHeld("FaultIn");
  Error result;
  {
    const Lock lock(mutex_);
    RequireReservedLocked(Operation::kFaultIn, range);
    result = InjectedErrorLocked(Operation::kFaultIn);
  }
  if (result.ok()) result = real_.FaultIn(range, access);
  const Lock lock(mutex_);
  if (result.ok()) model_.Update(range, [](PageState& page) { page.resident = true; });
  LogLocked({.operation = Operation::kFaultIn, .ranges = {range}, .result = result, .access = access});
  return result;
}

// The access itself follows outside of the lock: it may be a fault that another thread serves,
// which calls this Kernel to do so.
void FakeKernel::RecordTouch(Operation operation, PageRange range) {
  sync::CheckNoShortLockHeld(ToString(operation));
  const Lock lock(mutex_);
  RequireReservedLocked(operation, range);
  RequireWritableLocked(operation, range);
  model_.Update(range, [](PageState& page) { page.resident = true; });
  LogLocked({.operation = operation, .ranges = {range}, .result = {}});
}

Nanoseconds FakeKernel::Now() {
  const Lock lock(mutex_);
  return now_;
}

unsigned FakeKernel::CurrentCpu() { return current_cpu; }

unsigned FakeKernel::CpuCount() { return cpu_count_; }

// ---- Checks, failures, log ----

void FakeKernel::RequireReservedLocked(Operation operation, PageRange range) const {
  if (range.empty()) Misuse(operation, "empty range", range);
  if (!model_.IsReserved(range)) Misuse(operation, "not inside one reservation", range);
}

void FakeKernel::RequireWritableLocked(Operation operation, PageRange range) const {
  const auto guarded = [](const PageState& page) { return page.guard; };
  const auto file = [](const PageState& page) { return page.file != 0; };
  const auto writable = [](const PageState& page) {
    return Has(page.protection, Protection::kWrite);
  };
  if (model_.CountIf(range, guarded) != Pages{0}) Misuse(operation, "guarded pages", range);
  if (model_.CountIf(range, file) != Pages{0}) Misuse(operation, "pages of a file", range);
  if (model_.CountIf(range, writable) != range.count()) {
    Misuse(operation, "pages not writable", range);
  }
}

void FakeKernel::RequireFileLocked(Operation operation, PageRange range) const {
  const auto file = [](const PageState& page) { return page.file != 0; };
  if (model_.CountIf(range, file) != range.count()) Misuse(operation, "pages of no file", range);
}

Error FakeKernel::InjectedErrorLocked(Operation operation) {
  Error error = Error::Ok();
  if (!CanFail(operation)) return error;
  for (auto failure = failures_.begin(); failure != failures_.end();) {
    const bool meant = !failure->operation.has_value() || failure->operation == operation;
    if (meant && failure->remaining > 0) --failure->remaining;
    const bool strikes = meant && failure->remaining == 0;
    if (strikes && error.ok()) error = Error::System(failure->sys_errno);
    failure = strikes && !failure->always ? failures_.erase(failure) : std::next(failure);
  }
  if (!error.ok()) ++injected_;
  return error;
}

void FakeKernel::FailNth(Operation operation, std::size_t n, int sys_errno) {
  FREEHOLD_CHECK(n > 0 && CanFail(operation));
  const Lock lock(mutex_);
  failures_.push_back(
      {.operation = operation, .remaining = n, .always = false, .sys_errno = sys_errno});
}

void FakeKernel::FailNthOfAny(std::size_t n, int sys_errno) {
  FREEHOLD_CHECK(n > 0);
  const Lock lock(mutex_);
  failures_.push_back(
      {.operation = std::nullopt, .remaining = n, .always = false, .sys_errno = sys_errno});
}

void FakeKernel::FailAlways(Operation operation, int sys_errno) {
  FREEHOLD_CHECK(CanFail(operation));
  const Lock lock(mutex_);
  failures_.push_back(
      {.operation = operation, .remaining = 1, .always = true, .sys_errno = sys_errno});
}

void FakeKernel::FailProtectBeyond(Bytes limit) {
  const Lock lock(mutex_);
  commit_limit_ = Pages{limit.value >> kPageShift};
}

void FakeKernel::FailLockBeyond(Bytes limit) {
  const Lock lock(mutex_);
  lock_limit_ = Pages{limit.value >> kPageShift};
}

void FakeKernel::StopFailing() {
  const Lock lock(mutex_);
  failures_.clear();
  lock_limit_.reset();
  commit_limit_.reset();
}

std::size_t FakeKernel::InjectedFailures() const {
  const Lock lock(mutex_);
  return injected_;
}

void FakeKernel::SetFeatures(Features features) {
  const Lock lock(mutex_);
  features_ = Common(features, real_.features());
}

void FakeKernel::AdvanceTime(Nanoseconds by) {
  const Lock lock(mutex_);
  now_ = now_ + by;
}

void FakeKernel::SetCpu(unsigned cpu) { current_cpu = cpu; }

void FakeKernel::LogLocked(Call call) {
  ++counts_[static_cast<std::size_t>(call.operation)];
  if (log_calls_) calls_.push_back(std::move(call));
}

// ---- Observation ----

std::vector<FakeKernel::Call> FakeKernel::Calls() const {
  const Lock lock(mutex_);
  return calls_;
}

void FakeKernel::ClearCalls() {
  const Lock lock(mutex_);
  calls_.clear();
  counts_.fill(0);
}

std::size_t FakeKernel::CallCount(Operation operation) const {
  const Lock lock(mutex_);
  return counts_[static_cast<std::size_t>(operation)];
}

std::size_t FakeKernel::CallCount() const {
  const Lock lock(mutex_);
  std::size_t total = 0;
  for (const std::size_t count : counts_) total += count;
  return total;
}

PageState FakeKernel::At(PageNumber page) const {
  const Lock lock(mutex_);
  return model_.At(page);
}

Pages FakeKernel::ReservedPages() const {
  const Lock lock(mutex_);
  return model_.CountIf([](const PageState&) { return true; });
}

Pages FakeKernel::CommittedPages() const {
  const Lock lock(mutex_);
  return model_.CountIf([](const PageState& page) { return page.committed; });
}

Pages FakeKernel::CountIf(const std::function<bool(const PageState&)>& predicate) const {
  const Lock lock(mutex_);
  return model_.CountIf(predicate);
}

Pages FakeKernel::ResidentPages(PageRange range) const {
  const Lock lock(mutex_);
  return model_.CountIf(range, [](const PageState& page) { return page.resident; });
}

Pages FakeKernel::GuardPages(PageRange range) const {
  const Lock lock(mutex_);
  return model_.CountIf(range, [](const PageState& page) { return page.guard; });
}

Pages FakeKernel::LockedPages() const {
  const Lock lock(mutex_);
  return model_.CountIf([](const PageState& page) { return page.locked; });
}

Pages FakeKernel::FilePages(PageRange range) const {
  const Lock lock(mutex_);
  return model_.CountIf(range, [](const PageState& page) { return page.file != 0; });
}

std::size_t FakeKernel::KernelVmaCount() const {
  const Lock lock(mutex_);
  return model_.KernelVmaCount(/*accounted=*/commit_limit_.has_value());
}

const char* ToString(FakeKernel::Operation operation) {
  switch (operation) {
    case FakeKernel::Operation::kReserve:
      return "Reserve";
    case FakeKernel::Operation::kRelease:
      return "Release";
    case FakeKernel::Operation::kProtect:
      return "Protect";
    case FakeKernel::Operation::kReset:
      return "Reset";
    case FakeKernel::Operation::kMove:
      return "Move";
    case FakeKernel::Operation::kLockMemory:
      return "LockMemory";
    case FakeKernel::Operation::kUnlockMemory:
      return "UnlockMemory";
    case FakeKernel::Operation::kDiscard:
      return "Discard";
    case FakeKernel::Operation::kAdviseHugePages:
      return "AdviseHugePages";
    case FakeKernel::Operation::kAdviseCoreDumps:
      return "AdviseCoreDumps";
    case FakeKernel::Operation::kAdviseReclaim:
      return "AdviseReclaim";
    case FakeKernel::Operation::kAdvise:
      return "Advise";
    case FakeKernel::Operation::kInstallGuard:
      return "InstallGuard";
    case FakeKernel::Operation::kRemoveGuard:
      return "RemoveGuard";
    case FakeKernel::Operation::kCountResident:
      return "CountResident";
    case FakeKernel::Operation::kQueryResident:
      return "QueryResident";
    case FakeKernel::Operation::kIdentifyFile:
      return "IdentifyFile";
    case FakeKernel::Operation::kInspectFile:
      return "InspectFile";
    case FakeKernel::Operation::kMapFile:
      return "MapFile";
    case FakeKernel::Operation::kReplaceByFile:
      return "ReplaceByFile";
    case FakeKernel::Operation::kExtendFile:
      return "ExtendFile";
    case FakeKernel::Operation::kMoveFile:
      return "MoveFile";
    case FakeKernel::Operation::kSync:
      return "Sync";
    case FakeKernel::Operation::kFaultIn:
      return "FaultIn";
    case FakeKernel::Operation::kTouchForWrite:
      return "TouchForWrite";
    case FakeKernel::Operation::kZero:
      return "Zero";
    case FakeKernel::Operation::kCopy:
      return "Copy";
  }
  return "unknown operation";
}

std::string ToString(const FakeKernel::Call& call) {
  std::string text = ToString(call.operation);
  for (const PageRange range : call.ranges) {
    char part[64];
    std::snprintf(part, sizeof(part), " [%#zx,%#zx)", range.first.value << kPageShift,
                  range.end.value << kPageShift);
    text += part;
  }
  text += std::string(" = ") + ToString(call.result.code);
  if (call.result.sys_errno != 0) text += " (errno " + std::to_string(call.result.sys_errno) + ")";
  return text;
}

}  // namespace freehold::vm::os
