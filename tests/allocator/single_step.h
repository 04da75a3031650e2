// What another thread finds, or the child of a fork, when one thread stops between two instructions: runs code one
// instruction at a time, and a look at it in between. By the processor's trap flag, so on x86-64 alone; and not under a
// sanitizer, whose run time would be stopped too, at places where it cannot be entered again.
#ifndef FREEHOLD_TESTS_ALLOCATOR_SINGLE_STEP_H_
#define FREEHOLD_TESTS_ALLOCATOR_SINGLE_STEP_H_

#if defined(__x86_64__) && !defined(FREEHOLD_ASAN) && !defined(FREEHOLD_TSAN)
#define FREEHOLD_SINGLE_STEP 1

#include <signal.h>
#include <ucontext.h>
#include <x86intrin.h>

#include <cerrno>
#include <cstddef>

namespace freehold::allocator {

// Thread safety: thread-compatible, one at a time in the process.
class SingleStep {
 public:
  // Calls `work`, and after each of its instructions `look`, on the same thread in a signal handler, until that
  // returns false. Returns how many times it was called. `look` may do whatever the stopped code allows another thread
  // to do; what needs a lock that `work` holds waits forever.
  template <typename Work, typename Look>
  static std::size_t Run(Work work, Look look) {
    std::size_t looks = 0;
    auto count_and_look = [&] {
      ++looks;
      return look();
    };
    SingleStep stepper;
    stepper.context_ = &count_and_look;
    stepper.look_ = [](void* context) { return (*static_cast<decltype(count_and_look)*>(context))(); };
    current_ = &stepper;
    struct sigaction action = {};
    action.sa_sigaction = OnTrap;
    action.sa_flags = SA_SIGINFO;
    struct sigaction before;
    sigaction(SIGTRAP, &action, &before);
    __writeeflags(__readeflags() | kTrapFlag);
    work();
    __writeeflags(__readeflags() & ~kTrapFlag);
    sigaction(SIGTRAP, &before, nullptr);
    current_ = nullptr;
    return looks;
  }

  // For `look`: the instruction that `work` stopped before.
  static const unsigned char* Instruction() { return current_->instruction_; }

 private:
  static constexpr unsigned long long kTrapFlag = 0x100;

  // The kernel clears the flag for the handler, and its return sets it again.
  static void OnTrap(int, siginfo_t*, void* context) {
    const int error = errno;
    current_->instruction_ = reinterpret_cast<const unsigned char*>(
        static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
    if (!current_->look_(current_->context_)) {
      static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] &= ~static_cast<greg_t>(kTrapFlag);
    }
    errno = error;
  }

  static inline SingleStep* current_ = nullptr;
  void* context_ = nullptr;
  const unsigned char* instruction_ = nullptr;
  bool (*look_)(void* context) = nullptr;
};

}  // namespace freehold::allocator

#endif  // FREEHOLD_SINGLE_STEP

#endif  // FREEHOLD_TESTS_ALLOCATOR_SINGLE_STEP_H_
