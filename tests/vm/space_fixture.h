// What the tests of vm/ share: spaces that check themselves at the end, pages drawn as a line of letters,
// content checks, and a kernel whose calls can be held up at a gate.
#ifndef FREEHOLD_TESTS_VM_SPACE_FIXTURE_H_
#define FREEHOLD_TESTS_VM_SPACE_FIXTURE_H_

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <ostream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "vm/address_space.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/kernel.h"
#include "vm/page_range.h"
#include "vm/result.h"
#include "vm/units.h"

namespace freehold::vm {

// For messages of failing tests; found by argument lookup.
inline void PrintTo(Error error, std::ostream* out) {
  *out << ToString(error.code);
  if (error.sys_errno != 0) *out << " (errno " << error.sys_errno << ")";
}
inline void PrintTo(ErrorCode code, std::ostream* out) { *out << ToString(code); }
inline void PrintTo(Pages pages, std::ostream* out) { *out << pages.value << " pages"; }
inline void PrintTo(Bytes bytes, std::ostream* out) { *out << bytes.value << " bytes"; }
inline void PrintTo(PageNumber page, std::ostream* out) { *out << "page 0x" << std::hex << page.value; }
inline void PrintTo(PageRange range, std::ostream* out) {
  *out << "[0x" << std::hex << range.first.value << ", 0x" << range.end.value << ")";
}

}  // namespace freehold::vm

namespace freehold::vm::test {

using Operation = os::FakeKernel::Operation;

#if defined(FREEHOLD_ASAN) || defined(FREEHOLD_TSAN)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

// ---- Ranges and content ----

// `count` pages of `range` from its page `first` on.
inline PageRange Part(PageRange range, std::size_t first, std::size_t count) {
  return PageRange::Of(range.first + Pages{first}, Pages{count});
}

inline void Fill(PageRange range, int value) { std::memset(range.address(), value, range.bytes().value); }

inline bool IsFilledWith(PageRange range, int value) {
  unsigned char expected[kPageSize];
  std::memset(expected, value, kPageSize);
  for (PageNumber page = range.first; page < range.end; page = page + Pages{1}) {
    if (std::memcmp(page.address(), expected, kPageSize) != 0) return false;
  }
  return true;
}

inline bool IsZero(PageRange range) { return IsFilledWith(range, 0); }

// ---- Spaces ----

// Four regions of 64 MiB: two plain, one dense, one for mappings.
inline AddressSpaceOptions SmallOptions(sync::LockPolicy policy = AddressSpaceOptions().lock_policy) {
  return {.reserve = MiB(256), .min_reserve = MiB(16), .lock_policy = policy, .regions_per_zone = 1};
}
inline constexpr std::size_t kSmallRegionPages = MiB(64).value / kPageSize;

// A space that goes at the end of its scope, once its invariants were checked.
class TestSpace {
 public:
  explicit TestSpace(os::Kernel& kernel, const AddressSpaceOptions& options = SmallOptions()) {
    const Result<AddressSpace*> space = AddressSpace::Create(kernel, options);
    if (!space.ok()) throw std::runtime_error(std::string("Create: ") + ToString(space.error().code));
    space_ = *space;
  }
  ~TestSpace() {
    space_->CheckInvariants();
    AddressSpace::Destroy(space_);
  }
  TestSpace(const TestSpace&) = delete;
  TestSpace& operator=(const TestSpace&) = delete;

  AddressSpace* operator->() const { return space_; }
  AddressSpace& operator*() const { return *space_; }

 private:
  AddressSpace* space_;
};

// Forks, runs `child` there with a limit of time, and waits for it to end well. REQUIRES: where there are other threads,
// no malloc or gtest in `child`, which may find their locks held; what is wrong stops it (FREEHOLD_CHECK names the line).
inline void Fork(AddressSpace& space, const std::function<void()>& child) {
  space.PrepareFork();
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(30);
    space.ChildAfterFork();
    child();
    _exit(0);
  }
  space.ParentAfterFork();
  ASSERT_GT(pid, 0);
  int status = -1;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  ASSERT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  ASSERT_EQ(WEXITSTATUS(status), 0);
}

// The part of the reservation that serves `zone`.
inline PageRange ZoneRange(const AddressSpace& space, Zone zone) {
  const PageRange all = space.reservation();
  const std::size_t quarter = all.count().value / 4;
  switch (zone) {
    case Zone::kPlain: return Part(all, 0, 2 * quarter);
    case Zone::kDense: return Part(all, 2 * quarter, quarter);
    case Zone::kMapping: return Part(all, 3 * quarter, quarter);
  }
  return {};
}

// Maps, or fails the test.
inline PageRange MustMap(AddressSpace& space, std::size_t pages, const MapOptions& options = {}) {
  const Result<PageRange> range = space.Map({pages}, options);
  if (!range.ok()) throw std::runtime_error(std::string("Map: ") + ToString(range.error().code));
  return *range;
}

inline MapOptions At(PageNumber page, Placement placement = Placement::kFixed,
                     os::Protection protection = os::Protection::kReadWrite) {
  return {.placement = placement, .address = page.address(), .protection = protection};
}

// Maps exactly `range`, or fails the test.
inline void MustMapAt(AddressSpace& space, PageRange range,
                      os::Protection protection = os::Protection::kReadWrite) {
  const PageRange mapped =
      MustMap(space, range.count().value, At(range.first, Placement::kFixed, protection));
  if (mapped != range) throw std::runtime_error("Map: not where it was told to be");
}

inline std::vector<VmaInfo> Vmas(const AddressSpace& space) {
  std::vector<VmaInfo> vmas;
  space.ForEachVma([](void* context, const VmaInfo& vma) {
    static_cast<std::vector<VmaInfo>*>(context)->push_back(vma);
  }, &vmas);
  return vmas;
}

// `range` as a line, one character a page, by lookups:
//   .   not mapped
//   A   read-write; each mapping has a letter of its own, in order of appearance
//   a   the same mapping with another protection
//   1   the same with no access: A is 1, B is 2
// VMAs of one mapping and protection are set apart by a bar: locked differently, or not merged.
inline std::string Draw(const AddressSpace& space, PageRange range) {
  std::string line;
  std::map<std::uint64_t, char> letters;
  VmaInfo last;
  for (PageNumber page = range.first; page < range.end; page = page + Pages{1}) {
    const Result<VmaInfo> vma = space.Lookup(page);
    if (!vma.ok()) {
      line += '.';
      last = {};
      continue;
    }
    if (!vma->range.Contains(page)) return line + "!lookup of another page";
    const char letter = letters.try_emplace(vma->generation, static_cast<char>('A' + letters.size()))
                            .first->second;
    if (vma->range.first == page && vma->generation == last.generation &&
        vma->protection == last.protection) {
      line += '|';
    }
    last = *vma;
    switch (vma->protection) {
      case os::Protection::kReadWrite: line += letter; break;
      case os::Protection::kNone: line += static_cast<char>(letter - 'A' + '1'); break;
      default: line += static_cast<char>(letter - 'A' + 'a'); break;
    }
  }
  return line;
}

// ---- Threads ----


// Waits until `condition` holds; false after ten seconds.
inline bool Eventually(const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

// A thread whose body can be seen to wait: the kernel says that it sleeps.
class WatchedThread {
 public:
  explicit WatchedThread(std::function<void()> body)
      : thread_([this, body = std::move(body)] {
          tid_.store(gettid(), std::memory_order_release);
          body();
          done_.store(true, std::memory_order_release);
        }) {}
  ~WatchedThread() {
    if (thread_.joinable()) thread_.join();
  }
  WatchedThread(const WatchedThread&) = delete;
  WatchedThread& operator=(const WatchedThread&) = delete;

  void Join() { thread_.join(); }
  bool done() const { return done_.load(std::memory_order_acquire); }

  // Whether it comes to sleep, several looks in a row, before it is done.
  bool AwaitSleep() {
    int looks = 0;
    return Eventually([&] {
      looks = !done() && IsAsleep() ? looks + 1 : 0;
      return looks >= 5;
    });
  }

 private:
  bool IsAsleep() const {
    const int tid = tid_.load(std::memory_order_acquire);
    if (tid == 0) return false;
    std::ifstream file("/proc/self/task/" + std::to_string(tid) + "/stat");
    std::string text;
    std::getline(file, text);
    const std::size_t name_end = text.rfind(')');
    return name_end != std::string::npos && name_end + 2 < text.size() && text[name_end + 2] == 'S';
  }

  std::atomic<int> tid_{0};
  std::atomic<bool> done_{false};
  std::thread thread_;
};

// Holds up whoever passes until it is opened.
class Gate {
 public:
  void Pass() {
    std::unique_lock lock(mutex_);
    ++arrived_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
  }
  // Waits for somebody to be held up; false after ten seconds.
  bool AwaitArrival() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(10), [this] { return arrived_ > 0; });
  }
  void Open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrived_ = 0;
  bool open_ = false;
};

// Forwards to another kernel, and calls a function before each call, in the calling thread.
class HookedKernel final : public os::Kernel {
 public:
  using Hook = std::function<void(Operation operation, absl::Span<const PageRange> ranges)>;

  explicit HookedKernel(os::Kernel& next) : next_(next) {}

  // REQUIRES: no call is under way.
  void SetHook(Hook hook) { hook_ = std::move(hook); }
  // Holds the next call of `operation` up at `gate`; later ones pass.
  void HoldNext(Operation operation, Gate& gate) {
    holds_ = true;
    SetHook([this, operation, &gate](Operation now, absl::Span<const PageRange>) {
      if (now == operation && holds_.exchange(false)) gate.Pass();
    });
  }

  os::Features features() const override { return next_.features(); }
  Result<PageRange> Reserve(Pages size, Pages alignment) override { return next_.Reserve(size, alignment); }
  Error Release(PageRange range) override { return next_.Release(range); }
  Error Protect(PageRange range, os::Protection protection) override {
    Reach(Operation::kProtect, range);
    return next_.Protect(range, protection);
  }
  Error Reset(PageRange range) override {
    Reach(Operation::kReset, range);
    return next_.Reset(range);
  }
  Error Move(PageRange from, PageRange to) override {
    const PageRange ranges[] = {from, to};
    if (hook_) hook_(Operation::kMove, ranges);
    return next_.Move(from, to);
  }
  Error LockMemory(PageRange range) override {
    Reach(Operation::kLockMemory, range);
    return next_.LockMemory(range);
  }
  Error UnlockMemory(PageRange range) override {
    Reach(Operation::kUnlockMemory, range);
    return next_.UnlockMemory(range);
  }
  Error Discard(absl::Span<const PageRange> ranges) override {
    if (hook_) hook_(Operation::kDiscard, ranges);
    return next_.Discard(ranges);
  }
  Error AdviseHugePages(PageRange range, os::HugePages advice) override {
    return next_.AdviseHugePages(range, advice);
  }
  void AdviseCoreDumps(PageRange range, os::CoreDumps advice) override { next_.AdviseCoreDumps(range, advice); }
  Error AdviseReclaim(PageRange range, os::ReclaimHint hint) override {
    Reach(Operation::kAdviseReclaim, range);
    return next_.AdviseReclaim(range, hint);
  }
  Error Advise(PageRange range, int advice) override {
    Reach(Operation::kAdvise, range);
    return next_.Advise(range, advice);
  }
  Error InstallGuard(PageRange range) override {
    Reach(Operation::kInstallGuard, range);
    return next_.InstallGuard(range);
  }
  Error RemoveGuard(PageRange range) override {
    Reach(Operation::kRemoveGuard, range);
    return next_.RemoveGuard(range);
  }
  Result<Pages> CountResident(PageRange range) override {
    Reach(Operation::kCountResident, range);
    return next_.CountResident(range);
  }
  Error QueryResident(PageRange range, absl::Span<std::uint8_t> resident) override {
    Reach(Operation::kQueryResident, range);
    return next_.QueryResident(range, resident);
  }
  void TouchForWrite(PageRange range) override {
    Reach(Operation::kTouchForWrite, range);
    next_.TouchForWrite(range);
  }
  void Zero(PageRange range) override {
    Reach(Operation::kZero, range);
    next_.Zero(range);
  }
  void Copy(PageRange from, PageRange to) override {
    const PageRange ranges[] = {from, to};
    if (hook_) hook_(Operation::kCopy, ranges);
    next_.Copy(from, to);
  }
  Result<os::FileInfo> IdentifyFile(int descriptor) override { return next_.IdentifyFile(descriptor); }
  Result<os::FileTraits> InspectFile(int descriptor) override { return next_.InspectFile(descriptor); }
  Error MapFile(PageRange range, const os::FileView& view) override {
    Reach(Operation::kMapFile, range);
    return next_.MapFile(range, view);
  }
  Error ReplaceByFile(PageRange range, const os::FileView& view) override {
    Reach(Operation::kReplaceByFile, range);
    return next_.ReplaceByFile(range, view);
  }
  Error ExtendFile(PageRange range) override {
    Reach(Operation::kExtendFile, range);
    return next_.ExtendFile(range);
  }
  Error MoveFile(PageRange from, PageRange to) override {
    const PageRange ranges[] = {from, to};
    if (hook_) hook_(Operation::kMoveFile, ranges);
    return next_.MoveFile(from, to);
  }
  Error Sync(PageRange range, os::SyncOptions options) override {
    Reach(Operation::kSync, range);
    return next_.Sync(range, options);
  }
  Error FaultIn(PageRange range, os::Access access) override {
    Reach(Operation::kFaultIn, range);
    return next_.FaultIn(range, access);
  }
  Nanoseconds Now() override { return next_.Now(); }
  unsigned CurrentCpu() override { return next_.CurrentCpu(); }
  unsigned CpuCount() override { return next_.CpuCount(); }

 private:
  void Reach(Operation operation, PageRange range) {
    if (hook_) hook_(operation, {&range, 1});
  }

  os::Kernel& next_;
  Hook hook_;
  std::atomic<bool> holds_{false};
};

// ---- Lock policies as a test parameter ----

class PolicyTest : public ::testing::TestWithParam<sync::LockPolicy> {
 protected:
  static AddressSpaceOptions Options() { return SmallOptions(GetParam()); }
};

inline std::string PolicyName(const ::testing::TestParamInfo<sync::LockPolicy>& info) {
  return sync::ToString(info.param);
}

#define FREEHOLD_INSTANTIATE_POLICIES(suite)                                             \
  INSTANTIATE_TEST_SUITE_P(Policies, suite,                                              \
                           testing::Values(::freehold::vm::sync::LockPolicy::kAdaptive,  \
                                           ::freehold::vm::sync::LockPolicy::kTree,      \
                                           ::freehold::vm::sync::LockPolicy::kCoarse),   \
                           ::freehold::vm::test::PolicyName)

}  // namespace freehold::vm::test

#endif  // FREEHOLD_TESTS_VM_SPACE_FIXTURE_H_
