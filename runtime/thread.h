// Threads and their caches: each thread that allocates has a ThreadCache of the process's heap,
// found by one load relative to the thread pointer.
//
//   born -- first malloc or free --> attached -- second round of destructors of thread-specific
//   data --> ended
//
// A thread that ended still allocates and frees: in later destructors of its thread-specific data,
// and inside libc after the last of them. It then borrows a cache for each call.
//
// Thread safety: each function concerns the calling thread.
#ifndef FREEHOLD_RUNTIME_THREAD_H_
#define FREEHOLD_RUNTIME_THREAD_H_

#include "absl/base/attributes.h"
#include "allocator/thread_cache.h"

namespace freehold::runtime {
namespace internal {

// Null unless the thread is attached. Initial-exec also in the shared library: it is loaded with
// the program.
extern constinit thread_local allocator::ThreadCache* thread_cache
    __attribute__((tls_model("initial-exec"), visibility("hidden")));
// The same for malloc's fast path; null as well where no call may take that (hardening.h).
extern constinit thread_local allocator::ThreadCache* fast_cache
    __attribute__((tls_model("initial-exec"), visibility("hidden")));

}  // namespace internal

inline allocator::ThreadCache* CurrentThreadCache() { return internal::thread_cache; }
inline allocator::ThreadCache* FastThreadCache() { return internal::fast_cache; }

// A cache for a few calls, for as long as this is in scope: the thread's; if it has none, attaches the
// thread, or borrows a cache if it ended. REQUIRES: Freehold serves malloc.
class CacheLease {
 public:
  // What the calls are for. A thread that only frees is attached when it has done so for a while: libc frees on behalf
  // of threads whose last destructor has run (AttachThisThreadNoMore), which must not be attached any more.
  enum class Use : bool { kAny, kFree };
  explicit CacheLease(Use use = Use::kAny);
  ~CacheLease();
  CacheLease(const CacheLease&) = delete;
  CacheLease& operator=(const CacheLease&) = delete;

  // Null when there is no memory for a cache.
  allocator::ThreadCache* get() const { return cache_; }
  // Whether it is the thread's own.
  bool attached() const { return !borrowed_; }

 private:
  allocator::ThreadCache* cache_;
  bool borrowed_ = false;
};

// Lets the calling thread never attach: for threads of the runtime's own, which hardly allocate.
void NeverAttachThisThread();

// The calling thread's destructors are about to be over: unless it is attached, it borrows from now on. Libc frees
// after the last destructor, too: the thread-local storage of a detached thread that has a stack of ours. Who attached
// then would never be detached.
void AttachThisThreadNoMore();

// Whether a thread is attached: the next to detach may be the last.
bool AnyThreadAttached();

// Arranges for threads to be detached when they end. Once, before the first is attached.
void WatchThreadExits();

// In the child of a fork: the calling thread is the only one.
void ForgetOtherThreads();

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_THREAD_H_
