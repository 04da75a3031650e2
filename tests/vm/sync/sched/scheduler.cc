#include "tests/vm/sync/sched/scheduler.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>

#include "vm/os/check.h"

namespace freehold::sched {
namespace {

using vm::os::FutexResult;
using vm::sync::SyncPoint;

// Which worker runs on this real thread, and whether its sync points count at the moment.
struct Current {
  void* worker = nullptr;
  bool controlled = false;
};
thread_local Current current;

const char* ToString(SyncPoint point) {
  switch (point) {
    case SyncPoint::kAcquire: return "acquire";
    case SyncPoint::kAcquired: return "acquired";
    case SyncPoint::kRelease: return "release";
    case SyncPoint::kWake: return "signal";
  }
  return "?";
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Outcome& outcome) {
  return out << (outcome.deadlock ? "deadlock; " : "") << outcome.failure << "\n"
             << outcome.schedule;
}

Scheduler::Scheduler(Options options) : options_(options) {
  for (std::size_t i = 0; i < options_.threads; ++i) {
    Worker& worker = *workers_.emplace_back(std::make_unique<Worker>());
    worker.index = i;
    worker.scheduler = this;
    worker.thread = std::thread([this, &worker] { RunWorker(worker); });
  }
  vm::sync::SetScheduleHooks(&kHooks);
}

Scheduler::~Scheduler() {
  for (const auto& worker : workers_) {
    worker->body = nullptr;
    worker->go.release();
    worker->thread.join();
  }
  vm::sync::SetScheduleHooks(nullptr);
}

Outcome Scheduler::Run(const std::vector<Body>& bodies, Chooser& chooser, const Body& after_step) {
  FREEHOLD_CHECK(bodies.size() <= workers_.size());
  chooser_ = &chooser;
  after_step_ = after_step ? &after_step : nullptr;
  outcome_ = {};
  trace_.clear();
  spurious_wakes_left_ = options_.spurious_wakes;
  stopping_ = false;
  for (std::size_t i = 0; i < bodies.size(); ++i) {
    workers_[i]->body = &bodies[i];
    workers_[i]->state = State::kReady;
    workers_[i]->short_locks.clear();
  }
  SwitchFrom(nullptr);
  finished_.acquire();
  outcome_.schedule = DescribeSchedule();
  return outcome_;
}

void Scheduler::Fail(const std::string& what) {
  if (outcome_.failure.empty()) outcome_.failure = what;
}

std::size_t Scheduler::CurrentThread() { return static_cast<Worker*>(current.worker)->index; }

bool Scheduler::IsWaiting(std::size_t thread) const {
  return workers_[thread]->state == State::kWaiting;
}

void Scheduler::RunWorker(Worker& worker) {
  current.worker = &worker;
  while (true) {
    worker.go.acquire();
    if (worker.body == nullptr) return;
    current.controlled = true;
    try {
      if (!stopping_) (*worker.body)();
    } catch (const Deadlocked&) {
    }
    current.controlled = false;
    worker.state = State::kDone;
    SwitchFrom(&worker);
  }
}

bool Scheduler::Controls() { return current.controlled; }

// Everything that one thread does between two sync points is one step.
void Scheduler::Step(const char* what) {
  if (stopping_ || observing_) return;
  Worker& self = *static_cast<Worker*>(current.worker);
  trace_.emplace_back(self.index, what);
  if (trace_.size() > options_.max_steps) {
    std::cerr << "the run does not end\n" << DescribeSchedule() << std::endl;
    std::abort();
  }
  if (after_step_ != nullptr && !AnyShortLockHeld()) {
    observing_ = true;
    (*after_step_)();
    observing_ = false;
  }
  SwitchFrom(&self);
}

// Lets the next thread run and, unless that is `self` or `self` is done, returns when `self` is
// chosen again.
void Scheduler::SwitchFrom(Worker* self) {
  Worker* const next = PickNext(self);
  if (next == self) return;
  const bool returns = self != nullptr && self->state != State::kDone;
  (next != nullptr ? next->go : finished_).release();
  if (!returns) return;
  self->go.acquire();
}

Scheduler::Worker* Scheduler::PickNext(Worker* self) {
  std::vector<Option> options;
  const bool can_continue = self != nullptr && self->state == State::kReady;
  if (can_continue) options.push_back({self, {}});
  for (const auto& worker : workers_) {
    if (worker->state == State::kReady && worker.get() != self)
      options.push_back({worker.get(), {}});
  }
  if (stopping_) return options.empty() ? nullptr : options.front().worker;
  for (const auto& worker : workers_) {
    if (worker->state == State::kWaiting && worker->has_deadline) {
      options.push_back({worker.get(), FutexResult::kTimeout});
    }
  }
  if (options.empty()) {
    const bool done = std::all_of(workers_.begin(), workers_.end(),
                                  [](const auto& worker) { return worker->state == State::kDone; });
    if (done) return nullptr;
    StopOnDeadlock();
    return PickNext(self);
  }
  if (spurious_wakes_left_ > 0) {
    for (const auto& worker : workers_) {
      if (worker->state == State::kWaiting)
        options.push_back({worker.get(), FutexResult::kInterrupted});
    }
  }
  const std::size_t chosen =
      options.size() == 1 ? 0 : chooser_->Choose(options.size(), can_continue);
  const Option& option = options[chosen];
  if (option.worker->state == State::kWaiting) {
    option.worker->state = State::kReady;
    option.worker->wait_result = option.wait_result;
    if (option.wait_result == FutexResult::kInterrupted) --spurious_wakes_left_;
    trace_.emplace_back(option.worker->index, option.wait_result == FutexResult::kTimeout
                                                  ? "times out"
                                                  : "wakes for nothing");
  }
  return option.worker;
}

void Scheduler::StopOnDeadlock() {
  outcome_.deadlock = true;
  if (!options_.unwind_deadlocks) {
    std::cerr << "deadlock\n" << DescribeSchedule() << std::endl;
    std::abort();
  }
  stopping_ = true;
  for (const auto& worker : workers_) {
    if (worker->state == State::kWaiting) worker->state = State::kReady;
  }
}

bool Scheduler::AnyShortLockHeld() const {
  return std::any_of(workers_.begin(), workers_.end(),
                     [](const auto& worker) { return !worker->short_locks.empty(); });
}

void Scheduler::Reach(SyncPoint point, const void* object) {
  Worker& self = *static_cast<Worker*>(current.worker);
  if (self.scheduler->observing_) return;
  std::vector<const void*>& held = self.short_locks;
  if (point == SyncPoint::kAcquired) held.push_back(object);
  if (held.empty() || self.scheduler->options_.inside_short_locks) {
    self.scheduler->Step(ToString(point));
  }
  if (point == SyncPoint::kRelease)
    held.erase(std::remove(held.begin(), held.end(), object), held.end());
}

FutexResult Scheduler::Wait(std::atomic<std::uint32_t>* word, std::uint32_t expected,
                            const vm::Nanoseconds* deadline) {
  Worker& self = *static_cast<Worker*>(current.worker);
  Scheduler& scheduler = *self.scheduler;
  FREEHOLD_CHECK(!scheduler.observing_);
  scheduler.Step("waits");
  if (word->load(std::memory_order_relaxed) != expected) return FutexResult::kChanged;
  ++scheduler.outcome_.waits;
  self.state = State::kWaiting;
  self.word = word;
  self.has_deadline = deadline != nullptr;
  self.waiting_since = scheduler.trace_.size();
  if (!scheduler.stopping_) scheduler.SwitchFrom(&self);
  if (scheduler.stopping_) throw Deadlocked();
  return self.wait_result;
}

void Scheduler::Wake(std::atomic<std::uint32_t>* word, int count) {
  Scheduler& scheduler = *static_cast<Worker*>(current.worker)->scheduler;
  scheduler.Step("wakes");
  for (; count > 0; --count) {
    Worker* oldest = nullptr;
    for (const auto& worker : scheduler.workers_) {
      if (worker->state != State::kWaiting || worker->word != word) continue;
      if (oldest == nullptr || worker->waiting_since < oldest->waiting_since) oldest = worker.get();
    }
    if (oldest == nullptr) return;
    oldest->state = State::kReady;
    oldest->wait_result = FutexResult::kWoken;
  }
}

std::string Scheduler::DescribeSchedule() const {
  std::string text = chooser_->Describe() + "\n";
  for (const auto& [thread, what] : trace_) {
    text += "  " + std::string(thread * 12, ' ') + std::to_string(thread) + " " + what + "\n";
  }
  return text;
}

}  // namespace freehold::sched
