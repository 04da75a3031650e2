#include "runtime/thread.h"

#include <pthread.h>

#include <atomic>
#include <cstdint>

#include "runtime/hardening.h"
#include "runtime/keeper.h"
#include "runtime/message.h"
#include "runtime/runtime.h"

namespace freehold::runtime {

namespace internal {
constinit thread_local allocator::ThreadCache* thread_cache = nullptr;
constinit thread_local allocator::ThreadCache* fast_cache = nullptr;
}  // namespace internal

namespace {

using allocator::ThreadCache;
using internal::fast_cache;
using internal::thread_cache;

// True from the detachment on.
constinit thread_local bool thread_ended __attribute__((tls_model("initial-exec"))) = false;

// Of a thread that was never attached. More than libc frees for a thread at its end, stacks of others that leave its
// cache included, unless those are tiny.
constexpr std::uint32_t kFreesUntilAttached = 64;
constinit thread_local std::uint32_t frees_without_cache __attribute__((tls_model("initial-exec"))) = 0;

// Threads that are attached. Written by every thread that attaches or detaches; relaxed, a count.
constinit std::atomic<std::uint32_t> attached_threads{0};

// Its destructor detaches. A thread's value is the number of the next round of destructors that it
// goes through. Written before the first thread is attached.
constinit pthread_key_t exit_key = 0;
constinit bool has_exit_key = false;

// Destructors of thread-specific data run in rounds, since they may set data again; ours, whose key
// is among the first, would be the first in each round. In the second round the others have had
// their turn, and a thread that allocates for the first time in a destructor is still seen twice.
constexpr std::uintptr_t kDetachRound = 2;
static_assert(kDetachRound < PTHREAD_DESTRUCTOR_ITERATIONS);

void DetachThread() {
  ThreadCache* cache = thread_cache;
  thread_ended = true;
  if (cache != nullptr) ReleaseHardening(*cache);
  thread_cache = nullptr;
  fast_cache = nullptr;
  if (cache == nullptr) return;
  process_runtime.heap().DetachThread(cache);
  // Without a thread that allocates there is nothing to keep; and when main left by pthread_exit,
  // the process ends with its last thread, which must not be the keeper.
  if (attached_threads.fetch_sub(1, std::memory_order_relaxed) == 1) process_keeper.Stop();
}

void OnThreadExit(void* value) {
  const auto round = reinterpret_cast<std::uintptr_t>(value);
  if (round < kDetachRound &&
      pthread_setspecific(exit_key, reinterpret_cast<void*>(round + 1)) == 0)
    return;
  DetachThread();
}

// Returns whether the thread has a cache now.
bool AttachThread() {
  ThreadCache* cache = process_runtime.heap().AttachThread();
  if (cache == nullptr) return false;
  attached_threads.fetch_add(1, std::memory_order_relaxed);
  // Before pthread_setspecific, which allocates for all but the first few keys.
  thread_cache = cache;
  if (!IsHardened()) fast_cache = cache;
  if (has_exit_key && pthread_setspecific(exit_key, reinterpret_cast<void*>(1)) == 0) return true;
  // Its end would go unnoticed.
  DetachThread();
  return false;
}

}  // namespace

CacheLease::CacheLease(Use use) {
  if (thread_cache != nullptr) {
    cache_ = thread_cache;
    return;
  }
  const bool may_attach = use == Use::kAny || ++frees_without_cache > kFreesUntilAttached;
  if (may_attach && !thread_ended && AttachThread()) {
    cache_ = thread_cache;
    return;
  }
  cache_ = process_runtime.heap().AttachThread();
  borrowed_ = true;
}

CacheLease::~CacheLease() {
  if (borrowed_ && cache_ != nullptr) process_runtime.heap().DetachThread(cache_);
}

void NeverAttachThisThread() { thread_ended = true; }

void AttachThisThreadNoMore() {
  if (thread_cache == nullptr) thread_ended = true;
}

bool AnyThreadAttached() { return attached_threads.load(std::memory_order_relaxed) != 0; }

void WatchThreadExits() {
  has_exit_key = pthread_key_create(&exit_key, OnThreadExit) == 0;
  if (!has_exit_key)
    Message().Append("no key for thread-specific data is left; malloc will be slow").Report();
}

void ForgetOtherThreads() {
  attached_threads.store(thread_cache != nullptr ? 1 : 0, std::memory_order_relaxed);
}

}  // namespace freehold::runtime
