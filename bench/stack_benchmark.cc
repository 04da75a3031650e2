// Threads on stacks of a StackPool (`freehold`: what the shim makes of pthread_create and pthread_join, called directly)
// against libc's own stacks (`glibc`).
//
//   thread_create/IMPL/default      a thread that does nothing, with default attributes: created and joined
//   thread_create/kernel/default    the floor: clone with libc's flags and a stack that is there, exit, and a wait for
//                                   the end. No thread could cost less
//   thread_create/IMPL/deep_1MiB    the same, a thread that goes 1 MiB deep: memory comes, and goes back
//   thread_create/IMPL/16MiB        sixteen threads with stacks of 16 MiB: all are created, then all are joined, so
//   thread_create/IMPL/64MiB        that sixteen stacks live at once, which is more than the 40 MiB that libc keeps
//   thread_create/IMPL/10000_live   ten thousand threads with default attributes, all of which run until the last has
//                                   been created; kernel_vmas_added says how many kernel VMAs there are more then
//   fiber_stack/IMPL/256KiB         no thread: a stack for a fiber, its top page written, and back. `kernel`: mmap, a
//                                   guard by mprotect, munmap
//
// What is measured. Wall-clock time, an item being a thread (or a stack). Nothing is pinned: where the new thread runs is
// the scheduler's choice, as in a program. The pool is one for the whole process, as in a program, and reports overflows,
// as the shim does by default: each thread has an alternate signal stack.
#include <benchmark/benchmark.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bench/support/kernel_memory.h"
#include "bench/support/runner.h"
#include "runtime/thread_stacks.h"
#include "vm/address_space.h"
#include "vm/os/linux_kernel.h"

namespace freehold::bench {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kLiveStacks = 16;

using Body = void* (*)(void*);

void Check(int error, const char* call) {
  if (error == 0) [[likely]]
    return;
  errno = error;
  DieOfErrno(call);
}

class GlibcThreads {
 public:
  static constexpr const char* kName = "glibc";
  pthread_t Create(const pthread_attr_t* attributes, Body body, void* argument) {
    pthread_t thread;
    Check(pthread_create(&thread, attributes, body, argument), "pthread_create");
    return thread;
  }
  void Join(pthread_t thread) { Check(pthread_join(thread, nullptr), "pthread_join"); }
};

vm::AddressSpace& Space() {
  static constinit vm::os::LinuxKernel kernel;
  static vm::AddressSpace& space = *[] {
    const vm::Result<vm::AddressSpace*> created = vm::AddressSpace::Create(kernel, {});
    if (!created.ok()) DieOfErrno("AddressSpace::Create");
    return *created;
  }();
  return space;
}

class FreeholdThreads {
 public:
  static constexpr const char* kName = "freehold";
  FreeholdThreads() {
    stacks_.UseLibc({.create = pthread_create,
                     .join = pthread_join,
                     .tryjoin_np = pthread_tryjoin_np,
                     .timedjoin_np = pthread_timedjoin_np,
                     .clockjoin_np = pthread_clockjoin_np,
                     .detach = pthread_detach,
                     .getattr_np = pthread_getattr_np});
    if (!stacks_.Start(Space(), runtime::ThreadStacks::Overflows::kReported).ok()) DieOfErrno("ThreadStacks::Start");
  }
  pthread_t Create(const pthread_attr_t* attributes, Body body, void* argument) {
    pthread_t thread;
    Check(stacks_.Create(&thread, attributes, body, argument), "ThreadStacks::Create");
    return thread;
  }
  void Join(pthread_t thread) { Check(stacks_.Join(thread, nullptr), "ThreadStacks::Join"); }

 private:
  static constinit inline runtime::ThreadStacks stacks_;
};

void* Nothing(void* argument) { return argument; }

void* GoDeep(void* argument) {
  auto* memory = static_cast<volatile char*>(__builtin_alloca(kMiB));
  for (std::size_t i = 0; i < kMiB; i += kBytesPerPage) memory[i] = 1;
  return argument;
}

template <typename Threads>
void CreateAndJoin(benchmark::State& state, Body body) {
  Threads threads;
  for (auto _ : state) threads.Join(threads.Create(nullptr, body, nullptr));
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}

// Without thread-local storage of its own: it touches none.
int ExitAtOnce(void*) { return 0; }

void CloneAndWait(benchmark::State& state) {
  constexpr std::size_t kStack = 64 * 1024;
  constexpr int kFlags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM |
                         CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID;
  std::byte* stack = KernelMap(kStack);
  std::atomic<pid_t> id{0};
  static_assert(sizeof(id) == sizeof(pid_t));
  for (auto _ : state) {
    auto* word = reinterpret_cast<pid_t*>(&id);
    if (clone(ExitAtOnce, stack + kStack, kFlags, nullptr, word, nullptr, word) < 0) DieOfErrno("clone");
    // The kernel clears it when the thread is gone.
    for (pid_t seen; (seen = id.load(std::memory_order_acquire)) != 0;) {
      syscall(SYS_futex, word, FUTEX_WAIT, seen, nullptr, nullptr, 0);
    }
  }
  KernelUnmap(stack, kStack);
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}

template <typename Threads>
void CreateAndJoinLarge(benchmark::State& state, std::size_t stack_bytes) {
  Threads threads;
  pthread_attr_t attributes;
  Check(pthread_attr_init(&attributes), "pthread_attr_init");
  Check(pthread_attr_setstacksize(&attributes, stack_bytes), "pthread_attr_setstacksize");
  pthread_t live[kLiveStacks];
  for (auto _ : state) {
    for (pthread_t& thread : live) thread = threads.Create(&attributes, Nothing, nullptr);
    for (const pthread_t thread : live) threads.Join(thread);
  }
  pthread_attr_destroy(&attributes);
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations() * kLiveStacks));
}

std::size_t KernelVmas() {
  std::ifstream maps("/proc/self/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(maps, line);) ++count;
  return count;
}

void* WaitForGo(void* go) {
  while (sem_wait(static_cast<sem_t*>(go)) != 0) {
  }
  return nullptr;
}

template <typename Threads>
void ManyLive(benchmark::State& state) {
  Threads threads;
  sem_t go;
  sem_init(&go, 0, 0);
  std::vector<pthread_t> live(Scaled(10'000, 100));
  std::size_t added = 0;
  for (auto _ : state) {
    state.PauseTiming();
    const std::size_t before = KernelVmas();
    state.ResumeTiming();
    for (pthread_t& thread : live) thread = threads.Create(nullptr, WaitForGo, &go);
    state.PauseTiming();
    added = KernelVmas() - before;
    state.ResumeTiming();
    for (std::size_t i = 0; i < live.size(); ++i) sem_post(&go);
    for (const pthread_t thread : live) threads.Join(thread);
  }
  sem_destroy(&go);
  state.counters["kernel_vmas_added"] = static_cast<double>(added);
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations() * live.size()));
}

// ---- Stacks without threads ----

constexpr std::size_t kFiberStack = 256 * 1024;

void PoolStack(benchmark::State& state) {
  static runtime::StackPool& pool = **runtime::StackPool::Create(Space());
  for (auto _ : state) {
    const vm::Result<runtime::StackSlot*> slot = pool.Acquire({kFiberStack});
    if (!slot.ok()) DieOfErrno("StackPool::Acquire");
    const_cast<volatile std::byte*>((*slot)->stack().end.address())[-1] = std::byte{1};
    pool.Release(*slot, runtime::StackPool::Residue::kNone);
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}

void KernelStack(benchmark::State& state) {
  for (auto _ : state) {
    std::byte* memory = KernelMap(kFiberStack + kBytesPerPage);
    KernelProtect(memory, kBytesPerPage, PROT_NONE);
    const_cast<volatile std::byte*>(memory)[kFiberStack + kBytesPerPage - 1] = std::byte{1};
    KernelUnmap(memory, kFiberStack + kBytesPerPage);
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}

template <typename Threads>
void RegisterThreads(const std::string& argument, const std::function<void(benchmark::State&)>& function,
                     const CaseOptions& options = {}) {
  Register(absl::StrCat("thread_create/", Threads::kName, "/", argument), function, options);
}

template <typename Threads>
void RegisterOne(const std::string& argument) {
  const CaseOptions alone = {.max_threads = 1};
  if (argument == "default") {
    RegisterThreads<Threads>(argument, [](benchmark::State& state) { CreateAndJoin<Threads>(state, Nothing); });
  } else if (argument == "deep_1MiB") {
    RegisterThreads<Threads>(argument, [](benchmark::State& state) { CreateAndJoin<Threads>(state, GoDeep); });
  } else if (argument == "10000_live") {
    RegisterThreads<Threads>(argument, ManyLive<Threads>,
                             {.max_threads = 1, .iterations = 1, .unit = benchmark::kMillisecond});
  } else {
    const std::size_t bytes = argument == "16MiB" ? 16 * kMiB : 64 * kMiB;
    RegisterThreads<Threads>(
        argument, [bytes](benchmark::State& state) { CreateAndJoinLarge<Threads>(state, bytes); }, alone);
  }
}

bool RegisterCases() {
  for (const char* argument : {"default", "deep_1MiB", "16MiB", "64MiB", "10000_live"}) {
    RegisterOne<FreeholdThreads>(argument);
    RegisterOne<GlibcThreads>(argument);
  }
  Register("thread_create/kernel/default", CloneAndWait);
  Register("fiber_stack/freehold/256KiB", PoolStack);
  Register("fiber_stack/kernel/256KiB", KernelStack);
  return true;
}

}  // namespace
}  // namespace freehold::bench

int main(int argc, char** argv) { return freehold::bench::RunBenchmarks(argc, argv, freehold::bench::RegisterCases); }
