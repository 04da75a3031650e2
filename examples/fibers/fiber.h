// Fibers: functions that take turns on one thread, each on a stack of its own from a StackPool.
//
// Thread safety: none; a Scheduler and its fibers belong to the thread that calls Run().
#ifndef FREEHOLD_EXAMPLES_FIBERS_FIBER_H_
#define FREEHOLD_EXAMPLES_FIBERS_FIBER_H_

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>

#include "runtime/stack_pool.h"
#include "vm/result.h"
#include "vm/units.h"

namespace freehold::examples {

class Scheduler {
 public:
  // Stacks are of `stack_size` bytes, in whole pages. `pool` outlives the scheduler.
  Scheduler(runtime::StackPool& pool, vm::Bytes stack_size) : pool_(pool), stack_size_(stack_size) {}
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Adds a fiber, which gets its first turn in Run(). Also from a fiber. Errors: those of StackPool::Acquire.
  vm::Error Spawn(std::function<void()> body);

  // Runs all fibers in turns until the last has returned. Exceptions must not leave a fiber.
  void Run();

  // Lets the others have a turn. REQUIRES: called by a fiber.
  void Yield();

  std::uint64_t switches() const { return switches_; }

 private:
  struct Fiber {
    ucontext_t context;
    runtime::StackSlot* stack = nullptr;
    std::function<void()> body;
    bool done = false;
  };

  static void Main(unsigned high, unsigned low);

  runtime::StackPool& pool_;
  const vm::Bytes stack_size_;
  ucontext_t own_;  // of Run()
  std::deque<std::unique_ptr<Fiber>> ready_;
  Fiber* current_ = nullptr;
  std::uint64_t switches_ = 0;
};

}  // namespace freehold::examples

#endif  // FREEHOLD_EXAMPLES_FIBERS_FIBER_H_
