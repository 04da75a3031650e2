#include "runtime/fork.h"

#include <pthread.h>

#include "runtime/hardening.h"
#include "runtime/keeper.h"
#include "runtime/message.h"
#include "runtime/runtime.h"
#include "runtime/thread.h"
#include "runtime/thread_stacks.h"
#include "vm/os/thread_id.h"

namespace freehold::runtime {
namespace {

bool ServesMalloc() { return process_runtime.server() == Server::kFreehold; }

// In lock order: stacks, the limit, which works on heaps, and the heap, which call into the space, and then the space.
void PrepareFork() {
  if (!process_runtime.has_space()) return;
  process_thread_stacks.PrepareFork();
  if (CurrentThreadCache() != nullptr) ReleaseHeld(*CurrentThreadCache());
  process_runtime.limit().PrepareFork();
  if (ServesMalloc()) process_runtime.heap().PrepareFork(CurrentThreadCache());
  process_runtime.space().PrepareFork();
}

void ParentAfterFork() {
  if (!process_runtime.has_space()) return;
  process_runtime.space().ParentAfterFork();
  if (ServesMalloc()) process_runtime.heap().ParentAfterFork(CurrentThreadCache());
  process_runtime.limit().ParentAfterFork();
  process_thread_stacks.ParentAfterFork();
}

void ChildAfterFork() {
  if (!process_runtime.has_space()) return;
  vm::os::ForgetThreadIdAfterFork();
  process_runtime.space().ChildAfterFork();
  if (ServesMalloc()) process_runtime.heap().ChildAfterFork(CurrentThreadCache());
  process_runtime.limit().ChildAfterFork(process_runtime.limited_heap());
  if (ProcessMappings* mappings = process_runtime.mappings()) mappings->ChildAfterFork();
  process_thread_stacks.ChildAfterFork();
  ForgetOtherThreads();
  process_keeper.ChildAfterFork();
}

}  // namespace

void RegisterForkHandlers() {
  if (pthread_atfork(PrepareFork, ParentAfterFork, ChildAfterFork) != 0) {
    Message()
        .Append("cannot register fork handlers; a child of a program with threads may hang")
        .Report();
  }
}

}  // namespace freehold::runtime
