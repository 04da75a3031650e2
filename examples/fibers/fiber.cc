#include "examples/fibers/fiber.h"

#include <utility>

namespace freehold::examples {

Scheduler::~Scheduler() {
  for (const std::unique_ptr<Fiber>& fiber : ready_) pool_.Release(fiber->stack);
}

vm::Error Scheduler::Spawn(std::function<void()> body) {
  const vm::Result<runtime::StackSlot*> stack = pool_.Acquire(stack_size_);
  if (!stack.ok()) return stack.error();
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = *stack;
  fiber->body = std::move(body);
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack->stack().address();
  fiber->context.uc_stack.ss_size = stack_size_.value;
  fiber->context.uc_link = &own_;  // where a fiber goes that returns
  // makecontext passes numbers of an int's size.
  const auto self = reinterpret_cast<std::uintptr_t>(this);
  makecontext(&fiber->context, reinterpret_cast<void (*)()>(Main), 2, static_cast<unsigned>(self >> 32),
              static_cast<unsigned>(self));
  ready_.push_back(std::move(fiber));
  return vm::Error::Ok();
}

void Scheduler::Main(unsigned high, unsigned low) {
  auto* self = reinterpret_cast<Scheduler*>(std::uintptr_t{high} << 32 | low);
  Fiber* fiber = self->current_;
  fiber->body();
  fiber->done = true;
}

void Scheduler::Run() {
  while (!ready_.empty()) {
    std::unique_ptr<Fiber> fiber = std::move(ready_.front());
    ready_.pop_front();
    current_ = fiber.get();
    ++switches_;
    swapcontext(&own_, &fiber->context);
    current_ = nullptr;
    if (fiber->done) {
      // Here nothing runs on it any more. The pool takes back what of it is resident below the top.
      pool_.Release(fiber->stack);
    } else {
      ready_.push_back(std::move(fiber));
    }
  }
}

void Scheduler::Yield() { swapcontext(&current_->context, &own_); }

}  // namespace freehold::examples
