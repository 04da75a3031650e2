// The keeper: a thread that gives freed memory back to the kernel while the program idles, and the
// ticks that do it where there is no such thread.
//
// The shim nudges after some of the program's calls: allocations of large objects, and frees in
// proportion to their size. The keeper starts at the first nudge in a process that has grown to
// kLargeProcess, then ticks the heap and the space every kTick while anything there can decay, and
// sleeps without waking up once nothing can, until a nudge wakes it. Small processes never get a
// second thread. In a large process that has no keeper, nudges tick.
//
//   kAbsent -- Nudge --> kStarting --> kTicking <-- keeper, Nudge --> kIdle
//      ^                                  '------ Stop -----------------'
//      '----------------- kStopping <-----'
//
// The thread is libc's, so that setuid() and the like reach it; it blocks all signals that libc
// lets it block, runs on a small stack of its own from the address space, and is called
// "freehold-keeper".
//
// Thread safety: thread-safe.
// Lock order:    nothing may be held that malloc takes.
// Waiting:       Stop() waits for the end of a tick.
// Allocation:    libc allocates what a thread needs when it creates one.
// Invariants:    K1. While nudges_wanted_ is zero the process was small at the last look, or the
//                    thread is there and not idle: it alone clears the flag, and sets it again
//                    before it sleeps.
#ifndef FREEHOLD_RUNTIME_KEEPER_H_
#define FREEHOLD_RUNTIME_KEEPER_H_

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "vm/page_range.h"
#include "vm/units.h"

namespace freehold::runtime {

class Keeper {
 public:
  static constexpr vm::Nanoseconds kTick = vm::Milliseconds(100);
  // Mapped memory, and freed memory that is still resident, below which no thread is worth it.
  static constexpr vm::Bytes kLargeProcess = vm::MiB(16);

  constexpr Keeper() = default;
  Keeper(const Keeper&) = delete;
  Keeper& operator=(const Keeper&) = delete;

  // Whether every free that may be a large object's is to nudge: false in small processes, and
  // while the keeper ticks anyway. One load.
  bool WantsNudges() const { return nudges_wanted_.load(std::memory_order_relaxed) != 0; }
  // Says that memory came free. `caller` is the code that called the shim: a thread is not created
  // on behalf of libc, which may hold locks that creating one takes. REQUIRES: Freehold serves;
  // this thread is not inside a call into heap or space.
  void Nudge(const void* caller) {
    const State state = state_.load(std::memory_order_relaxed);
    if (state == State::kIdle) Wake();
    if (state == State::kAbsent) LookWithoutThread(caller);
  }
  // The same, for a process that grew: there is nothing to wake up for.
  void NudgeOnGrowth(const void* caller) {
    if (state_.load(std::memory_order_relaxed) == State::kAbsent) LookWithoutThread(caller);
  }

  // The same, for memory that the program unmapped. Without the right to start a thread, since the caller may be
  // somebody else's malloc, which the start of a thread would call; `may_start`: it is not.
  void NudgeOnUnmap(const void* caller, bool may_start) {
    const State state = state_.load(std::memory_order_relaxed);
    if (state == State::kIdle) Wake();
    if (state == State::kAbsent) LookWithoutThread(may_start ? caller : nullptr);
  }

  // Finds out where libc lies. Once, at start, outside of malloc; without it no thread is ever
  // created.
  void PrepareToStart();
  // Ends the thread if there is one, and waits for its end.
  void Stop();
  // In the child of a fork, which does not have the thread.
  void ChildAfterFork();

 private:
  enum class State : std::uint32_t { kAbsent, kStarting, kTicking, kIdle, kStopping };

  struct CodeRange {
    std::uintptr_t first = 0;
    std::uintptr_t end = 0;
    bool Contains(const void* address) const {
      const auto value = reinterpret_cast<std::uintptr_t>(address);
      return first <= value && value < end;
    }
  };

  static void* ThreadMain(void* keeper);
  void Run();
  // What could still be given back: free memory that may be resident.
  static vm::Bytes Decayable();
  static void Tick();

  // Sleeps until the next tick, or Stop().
  void SleepOneTick();
  // Sleeps until a nudge or Stop(), unless more memory than `left` came free meanwhile.
  void SleepWhileIdle(vm::Bytes left);

  bool MayStartFor(const void* caller) const;
  void Wake();
  // `caller`: null if no thread may be started.
  void LookWithoutThread(const void* caller);
  void Start();
  bool CreateThread();
  bool Due(std::atomic<std::uint64_t>& last, vm::Nanoseconds interval);
  bool Change(State from, State to);
  std::atomic<std::uint32_t>* word() {
    return reinterpret_cast<std::atomic<std::uint32_t>*>(&state_);
  }

  // 0 or 1; written by the keeper, and where there is none; K1.
  std::atomic<std::uint32_t> nudges_wanted_{0};
  std::atomic<State> state_{State::kAbsent};  // a futex: the keeper sleeps on it
  std::atomic<bool> cannot_start_{false};     // the system refused a thread
  // CLOCK_MONOTONIC_COARSE in nanoseconds, written by the thread that won the turn.
  std::atomic<std::uint64_t> last_look_{0};
  std::atomic<std::uint64_t> last_tick_{0};
  // Written by the one thread that starts the keeper.
  pthread_t thread_ = {};
  vm::PageRange stack_ = {};
  // Written by PrepareToStart. [0]: libc; [1]: the dynamic linker.
  CodeRange libc_[2];
  // Whose keeper this is: in the child of vfork, and of a fork without handlers, it is somebody
  // else's. Written by PrepareToStart, and in the child of a fork.
  int process_id_ = 0;
};

// This process's.
extern constinit Keeper process_keeper;

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_KEEPER_H_
