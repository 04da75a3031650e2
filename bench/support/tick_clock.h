// The cheapest clock that two points of one thread can be timed with: the processor's counter where
// it runs at a constant rate, CLOCK_MONOTONIC elsewhere.
//
// Thread safety: thread-safe.
// Waiting:       the first NanosecondsPerTick() calibrates for some ten milliseconds; Now()
//                never waits.
#ifndef FREEHOLD_BENCH_SUPPORT_TICK_CLOCK_H_
#define FREEHOLD_BENCH_SUPPORT_TICK_CLOCK_H_

#include <time.h>

#include <cstdint>

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace freehold::bench {

// CLOCK_MONOTONIC in nanoseconds.
inline std::uint64_t MonotonicNanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 +
         static_cast<std::uint64_t>(now.tv_nsec);
}

class TickClock {
 public:
  // A point in time, in ticks of unknown length. Not ordered against surrounding memory accesses:
  // the error of a few nanoseconds is below what is measured with it.
  static std::uint64_t Now() {
#if defined(__x86_64__)
    if (counter_is_constant_) return __rdtsc();
    return MonotonicNanoseconds();
#elif defined(__aarch64__)
    std::uint64_t ticks;
    asm volatile("mrs %0, cntvct_el0" : "=r"(ticks));
    return ticks;
#else
    return MonotonicNanoseconds();
#endif
  }

  // The length of a tick, measured once against CLOCK_MONOTONIC.
  static double NanosecondsPerTick();

  static double ToNanoseconds(std::uint64_t ticks) {
    return static_cast<double>(ticks) * NanosecondsPerTick();
  }

 private:
  static const bool counter_is_constant_;
};

}  // namespace freehold::bench

#endif  // FREEHOLD_BENCH_SUPPORT_TICK_CLOCK_H_
