// pthread_create and what goes with it: libc's functions, with stacks of Freehold's (runtime/thread_stacks.h).
//
// libc has two versions of each of these symbols; both name the same function, and a reference to either binds here.
// Threads that libc makes for itself (thrd_create, timers, asynchronous I/O) keep libc's stacks; joined or detached by
// the functions here, they pass through.
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>

#include "absl/base/optimization.h"
#include "runtime/message.h"
#include "runtime/runtime.h"
#include "runtime/shim/export.h"
#include "runtime/thread.h"
#include "runtime/thread_stacks.h"

namespace freehold::runtime::shim {
namespace {

// Whether process_thread_stacks is as it will be. Release, by the threads that create the first threads.
constinit std::atomic<bool> decided{false};

template <typename Function>
void Find(const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

LibcThreads FindLibc() {
  LibcThreads libc;
  Find("pthread_create", libc.create);
  Find("pthread_join", libc.join);
  Find("pthread_tryjoin_np", libc.tryjoin_np);
  Find("pthread_timedjoin_np", libc.timedjoin_np);
  Find("pthread_clockjoin_np", libc.clockjoin_np);
  Find("pthread_detach", libc.detach);
  Find("pthread_getattr_np", libc.getattr_np);
  if (libc.create == nullptr || libc.join == nullptr || libc.detach == nullptr) {
    Message().Append("there are no threads of libc to put on stacks: the program is linked statically").Report();
    std::abort();
  }
  return libc;
}

// Whether some part of the program wants stacks that it can execute: nested functions of C do. libc makes its own
// stacks so, and not those that it is given.
bool WantsExecutableStacks() {
  const auto visit = [](dl_phdr_info* object, std::size_t, void*) {
    for (unsigned i = 0; i < object->dlpi_phnum; ++i) {
      const ElfW(Phdr)& segment = object->dlpi_phdr[i];
      if (segment.p_type == PT_GNU_STACK && (segment.p_flags & PF_X) != 0) return 1;
    }
    return 0;
  };
  return dl_iterate_phdr(visit, nullptr) != 0;
}

// Which does not create threads.
ThreadStacks& Threads() {
  if (ABSL_PREDICT_FALSE(!process_thread_stacks.knows_libc())) process_thread_stacks.UseLibc(FindLibc());
  return process_thread_stacks;
}

// Threads that come here together do the same.
void Decide() {
  (void)process_runtime.EnsureStarted();
  const Config& config = process_runtime.config();
  if (process_runtime.has_space() && config.stacks == StacksChoice::kFreehold && !WantsExecutableStacks()) {
    const auto overflows =
        config.overflow_report ? ThreadStacks::Overflows::kReported : ThreadStacks::Overflows::kSilent;
    const vm::Error error = process_thread_stacks.Start(process_runtime.space(), overflows, AttachThisThreadNoMore);
    if (!error.ok() && config.verbose) {
      Message().Append("no pool for stacks: ").Append(vm::ToString(error.code)).Append("; libc has its own").Report();
    }
  }
  decided.store(true, std::memory_order_release);
}

// From here on a program has threads, and maybe a handler for overflows: others are left as they are.
ThreadStacks& ThreadsForCreate() {
  ThreadStacks& threads = Threads();
  if (ABSL_PREDICT_FALSE(!decided.load(std::memory_order_acquire))) Decide();
  return threads;
}

}  // namespace
}  // namespace freehold::runtime::shim

using freehold::runtime::shim::Threads;
using freehold::runtime::shim::ThreadsForCreate;

extern "C" {

FREEHOLD_EXPORT int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                                   void* argument) noexcept {
  return ThreadsForCreate().Create(thread, attributes, start, argument);
}

FREEHOLD_EXPORT int pthread_join(pthread_t thread, void** result) { return Threads().Join(thread, result); }

FREEHOLD_EXPORT int pthread_tryjoin_np(pthread_t thread, void** result) noexcept {
  return Threads().TryJoin(thread, result);
}

FREEHOLD_EXPORT int pthread_timedjoin_np(pthread_t thread, void** result, const timespec* deadline) {
  return Threads().TimedJoin(thread, result, deadline);
}

FREEHOLD_EXPORT int pthread_clockjoin_np(pthread_t thread, void** result, clockid_t clock, const timespec* deadline) {
  return Threads().ClockJoin(thread, result, clock, deadline);
}

FREEHOLD_EXPORT int pthread_detach(pthread_t thread) noexcept { return Threads().Detach(thread); }

FREEHOLD_EXPORT int pthread_getattr_np(pthread_t thread, pthread_attr_t* attributes) noexcept {
  return Threads().GetAttributes(thread, attributes);
}

}  // extern "C"
