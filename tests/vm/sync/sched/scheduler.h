// Runs logical threads one at a time, switching where a Chooser says, to replay interleavings of
// locks.
//
// Each logical thread is a real thread. Exactly one runs; at every sync point of vm/sync
// (sync_point.h) it asks the chooser whether to go on. Waits and wakes of futex words are modelled,
// not made: a thread that waits is not an option until woken, or at any time if it has a deadline
// (then the wait times out). Thread-local state (thread ids, lock ranks) is each thread's own, as
// always.
//
//   Scheduler scheduler({.threads = 2});
//   Exhaustive schedules;
//   do {
//     SpinLock lock(LockRank::kLeaf);
//     const Outcome outcome = scheduler.Run({[&] { ... }, [&] { ... }}, schedules);
//     ASSERT_TRUE(outcome.ok()) << outcome;
//   } while (schedules.Next());
//
// Thread safety: thread-compatible; one scheduler runs at a time in a process.
#ifndef FREEHOLD_TESTS_VM_SYNC_SCHED_SCHEDULER_H_
#define FREEHOLD_TESTS_VM_SYNC_SCHED_SCHEDULER_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#include "tests/vm/sync/sched/chooser.h"
#include "vm/os/futex.h"
#include "vm/sync/sync_point.h"
#include "vm/units.h"

namespace freehold::sched {

// How a run ended.
struct Outcome {
  bool deadlock = false;
  std::string failure;    // the first Scheduler::Fail, if any
  std::size_t waits = 0;  // that put a thread to sleep
  std::string schedule;   // how to get this run again, and who did what

  bool ok() const { return !deadlock && failure.empty(); }
  friend std::ostream& operator<<(std::ostream& out, const Outcome& outcome);
};

class Scheduler {
 public:
  struct Options {
    std::size_t threads = 2;
    // Also switch while a short lock is held. Otherwise its sections are single steps.
    bool inside_short_locks = false;
    // How many times in a run a waiting thread may wake for no reason, chosen like everything else.
    std::size_t spurious_wakes = 0;
    // A run that takes more steps does not end: it stops the program.
    std::size_t max_steps = 20'000;
    // Unwinds the threads of a deadlock by an exception, which the code under test must survive.
    // Otherwise a deadlock stops the program.
    bool unwind_deadlocks = false;
  };
  using Body = std::function<void()>;

  explicit Scheduler(Options options);
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;
  ~Scheduler();

  // Runs one body per thread to the end. `after_step` runs at every sync point while no thread
  // holds a short lock. It may use the locks under test: that is part of the step, and must not
  // have to wait.
  Outcome Run(const std::vector<Body>& bodies, Chooser& chooser, const Body& after_step = nullptr);

  // For the bodies and after_step: records that something is wrong; the run goes on.
  void Fail(const std::string& what);
  // Which logical thread this is. REQUIRES: called by one.
  static std::size_t CurrentThread();
  // Whether that thread waits, and would sleep for good if nobody woke it.
  bool IsWaiting(std::size_t thread) const;
  // A point where others may run, for code under test that has none of its own.
  void Yield(const char* what) { Step(what); }

 private:
  enum class State : std::uint8_t { kReady, kWaiting, kDone };

  struct Worker {
    std::size_t index = 0;
    Scheduler* scheduler = nullptr;
    State state = State::kDone;
    std::atomic<std::uint32_t>* word = nullptr;  // waited for
    bool has_deadline = false;
    std::uint64_t waiting_since = 0;  // in steps; wakes go to the oldest first
    vm::os::FutexResult wait_result{};
    std::vector<const void*> short_locks;
    const Body* body = nullptr;
    std::binary_semaphore go{0};
    std::thread thread;
  };
  struct Option {
    Worker* worker;
    vm::os::FutexResult wait_result;  // for one that waits
  };
  struct Deadlocked {};

  static bool Controls();
  static void Reach(vm::sync::SyncPoint point, const void* object);
  static vm::os::FutexResult Wait(std::atomic<std::uint32_t>* word, std::uint32_t expected,
                                  const vm::Nanoseconds* deadline);
  static void Wake(std::atomic<std::uint32_t>* word, int count);
  static constexpr vm::sync::ScheduleHooks kHooks{&Controls, &Reach, &Wait, &Wake};

  void RunWorker(Worker& worker);
  void Step(const char* what);
  void SwitchFrom(Worker* self);
  Worker* PickNext(Worker* self);
  void StopOnDeadlock();
  bool AnyShortLockHeld() const;
  std::string DescribeSchedule() const;

  const Options options_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::binary_semaphore finished_{0};

  // Of the current run.
  Chooser* chooser_ = nullptr;
  const Body* after_step_ = nullptr;
  Outcome outcome_;
  std::vector<std::pair<std::size_t, const char*>> trace_;
  std::size_t spurious_wakes_left_ = 0;
  bool observing_ = false;  // after_step runs
  bool stopping_ = false;   // a deadlock is unwound
};

}  // namespace freehold::sched

#endif  // FREEHOLD_TESTS_VM_SYNC_SCHED_SCHEDULER_H_
