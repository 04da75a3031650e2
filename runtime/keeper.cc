#include "runtime/keeper.h"

#include <gnu/libc-version.h>
#include <link.h>
#include <sys/auxv.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>

#include "runtime/runtime.h"
#include "runtime/thread.h"
#include "vm/os/futex.h"
#include "vm/os/raw_syscall.h"
#include "vm/sync/clock.h"

namespace freehold::runtime {
namespace {

using vm::Bytes;
using vm::Nanoseconds;

// What the keeper's own calls need; libc puts the thread-local storage of all libraries on top of
// it.
constexpr std::size_t kStackBytes = vm::KiB(128).value;
// Nudges look at the clock, and at how large the process is, this often at most.
constexpr Nanoseconds kLookInterval = vm::Milliseconds(10);

Nanoseconds Now() { return process_runtime.kernel().Now(); }

// The thread that is being created takes over the mask: it must not run the program's signal
// handlers.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  BlockedSignals(const BlockedSignals&) = delete;
  BlockedSignals& operator=(const BlockedSignals&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

constinit Keeper process_keeper;

bool Keeper::Change(State from, State to) {
  // Acquire and release: what the other side wrote before its own change is seen after this one.
  return state_.compare_exchange_strong(from, to, std::memory_order_acq_rel);
}

bool Keeper::Due(std::atomic<std::uint64_t>& last, Nanoseconds interval) {
  const std::uint64_t now = vm::sync::CoarseNow().value;
  std::uint64_t before = last.load(std::memory_order_relaxed);
  return now >= before + interval.value &&
         last.compare_exchange_strong(before, now, std::memory_order_relaxed);
}

void Keeper::Wake() {
  if (Change(State::kIdle, State::kTicking)) vm::os::FutexWake(word(), 1);
}

void Keeper::LookWithoutThread(const void* caller) {
  if (!Due(last_look_, kLookInterval)) return;
  const vm::AddressSpaceStats stats = process_runtime.space().Stats();
  // Address space that is set aside, for stacks or by the program, makes no process large.
  if (stats.mapped_ordinary + stats.free_resident < kLargeProcess) return;
  // The last thread to end may free once more: a keeper that starts then would keep the process from ending.
  if (caller != nullptr && AnyThreadAttached() && MayStartFor(caller)) return Start();
  // As often as there is something to tick for; and this caller may not be the last.
  nudges_wanted_.store(1, std::memory_order_relaxed);
  if (Due(last_tick_, kTick)) Tick();
}

bool Keeper::MayStartFor(const void* caller) const {
  return process_runtime.config().keeper && !cannot_start_.load(std::memory_order_relaxed) &&
         libc_[0].end != 0 && !libc_[0].Contains(caller) && !libc_[1].Contains(caller) &&
         vm::os::RawSyscall(SYS_getpid) == process_id_;
}

void Keeper::Start() {
  if (!Change(State::kAbsent, State::kStarting)) return;
  const int before = errno;
  const bool created = CreateThread();
  errno = before;  // the caller is free()
  if (created) {
    // Whoever comes first, this thread or the new one: Stop() must not find it starting when this
    // thread ends.
    Change(State::kStarting, State::kTicking);
    return;
  }
  cannot_start_.store(true, std::memory_order_relaxed);
  state_.store(State::kAbsent, std::memory_order_release);
}

bool Keeper::CreateThread() {
  if (stack_.empty()) {
    const Bytes size = {kStackBytes + static_cast<std::size_t>(sysconf(_SC_THREAD_STACK_MIN))};
    const vm::Result<vm::PageRange> stack = process_runtime.space().Map(vm::PagesFor(size));
    if (!stack.ok()) return false;
    stack_ = *stack;
  }
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return false;
  const BlockedSignals blocked;
  bool created = pthread_attr_setstack(&attributes, stack_.address(), stack_.bytes().value) == 0 &&
                 pthread_create(&thread_, &attributes, ThreadMain, this) == 0;
  if (!created) {
    // Refused too when thread-local storage fills our stack: libc knows how much a thread needs.
    created = pthread_create(&thread_, nullptr, ThreadMain, this) == 0;
  }
  pthread_attr_destroy(&attributes);
  return created;
}

void* Keeper::ThreadMain(void* keeper) {
  NeverAttachThisThread();
  pthread_setname_np(pthread_self(), "freehold-keeper");
  static_cast<Keeper*>(keeper)->Run();
  return nullptr;
}

Bytes Keeper::Decayable() {
  const vm::AddressSpaceStats space = process_runtime.space().Stats();
  const Bytes mapped = space.free_resident + space.window_bytes;
  return process_runtime.limit().FreeDirty() + mapped;
}

void Keeper::Tick() {
  process_runtime.limit().Tick();
  process_runtime.space().Tick();
}

void Keeper::Run() {
  // Memory that stays the same amount for so long does not decay: the kernel refuses to take it.
  const std::uint64_t patience = 10 + 3 * process_runtime.config().decay.value / kTick.value;
  Change(State::kStarting, State::kTicking);
  Bytes left = {0};
  for (std::uint64_t quiet_ticks = 0;;) {
    nudges_wanted_.store(0, std::memory_order_relaxed);
    SleepOneTick();
    if (state_.load(std::memory_order_acquire) == State::kStopping) return;
    Tick();
    const Bytes before = left;
    left = Decayable();
    quiet_ticks = left == before ? quiet_ticks + 1 : 0;
    if (left.value != 0 && quiet_ticks < patience) continue;
    SleepWhileIdle(left);
    quiet_ticks = 0;
  }
}

void Keeper::SleepOneTick() {
  const Nanoseconds end = Now() + kTick;
  while (state_.load(std::memory_order_acquire) == State::kTicking) {
    const auto result =
        vm::os::FutexWait(word(), static_cast<std::uint32_t>(State::kTicking), &end);
    if (result == vm::os::FutexResult::kTimeout) return;
  }
}

void Keeper::SleepWhileIdle(Bytes left) {
  if (!Change(State::kTicking, State::kIdle)) return;
  // A free that comes after this store nudges. One that came before it, and after the last look, is
  // seen by this look: hence the total order.
  nudges_wanted_.store(1, std::memory_order_seq_cst);
  if (Decayable() > left && Change(State::kIdle, State::kTicking)) return;
  while (state_.load(std::memory_order_acquire) == State::kIdle) {
    vm::os::FutexWait(word(), static_cast<std::uint32_t>(State::kIdle));
  }
}

void Keeper::Stop() {
  if (!Change(State::kTicking, State::kStopping) && !Change(State::kIdle, State::kStopping)) return;
  vm::os::FutexWake(word(), 1);
  pthread_join(thread_, nullptr);
  nudges_wanted_.store(1, std::memory_order_relaxed);
  state_.store(State::kAbsent, std::memory_order_release);
}

void Keeper::ChildAfterFork() {
  // The parent's stack for the keeper is free here, unless another thread was about to make it.
  if (state_.load(std::memory_order_relaxed) == State::kStarting) stack_ = {};
  process_id_ = static_cast<int>(vm::os::RawSyscall(SYS_getpid));
  nudges_wanted_.store(1, std::memory_order_relaxed);
  state_.store(State::kAbsent, std::memory_order_relaxed);
}

void Keeper::PrepareToStart() {
  process_id_ = static_cast<int>(vm::os::RawSyscall(SYS_getpid));
  struct Search {
    std::uintptr_t libc;
    std::uintptr_t own;
    std::uintptr_t linker;
    CodeRange* found;
  } search = {reinterpret_cast<std::uintptr_t>(&gnu_get_libc_version),
              reinterpret_cast<std::uintptr_t>(&ThreadMain), getauxval(AT_BASE), libc_};
  const auto visit = [](dl_phdr_info* object, std::size_t, void* context) {
    const auto& search = *static_cast<const Search*>(context);
    CodeRange range = {UINTPTR_MAX, 0};
    for (unsigned i = 0; i < object->dlpi_phnum; ++i) {
      const ElfW(Phdr)& segment = object->dlpi_phdr[i];
      if (segment.p_type != PT_LOAD) continue;
      const std::uintptr_t first = object->dlpi_addr + segment.p_vaddr;
      range.first = std::min(range.first, first);
      range.end = std::max(range.end, first + segment.p_memsz);
    }
    const auto contains = [&](std::uintptr_t address) {
      return range.first <= address && address < range.end;
    };
    // Linked statically, the program is libc: who calls cannot be told apart, and no thread is
    // started.
    if (contains(search.libc) && !contains(search.own)) search.found[0] = range;
    if (search.linker != 0 && contains(search.linker)) search.found[1] = range;
    return 0;
  };
  dl_iterate_phdr(visit, &search);
}

}  // namespace freehold::runtime
