// Threads on processors: pinning, and waiting for one another without the kernel.
#ifndef FREEHOLD_BENCH_SUPPORT_CPU_H_
#define FREEHOLD_BENCH_SUPPORT_CPU_H_

#include <sched.h>

namespace freehold::bench {

// How many processors this process may use.
int AllowedCpuCount();

// Keeps the calling thread on the `thread_index`-th processor that the process may use, counted
// modulo their number, while in scope; then lets it go where it was allowed before. Restoring
// matters: Google Benchmark runs thread 0 on the main thread, whose mask the threads of the next
// case inherit.
class ScopedPin {
 public:
  explicit ScopedPin(int thread_index);
  ~ScopedPin();
  ScopedPin(const ScopedPin&) = delete;
  ScopedPin& operator=(const ScopedPin&) = delete;

 private:
  cpu_set_t previous_;
};

// Tells the processor that the caller spins.
inline void CpuRelax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `done()`, offering the processor to others now and then: the other thread may have
// none.
template <typename Condition>
void SpinUntil(Condition done) {
  for (unsigned spins = 1; !done(); ++spins) {
    if (spins % 1024 == 0) {
      sched_yield();
    } else {
      CpuRelax();
    }
  }
}

}  // namespace freehold::bench

#endif  // FREEHOLD_BENCH_SUPPORT_CPU_H_
