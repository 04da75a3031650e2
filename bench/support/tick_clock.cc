#include "bench/support/tick_clock.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace freehold::bench {
namespace {

// Whether the time-stamp counter ticks at one rate in all frequency and sleep states (CPUID
// 8000_0007h, EDX bit 8).
bool CounterIsConstant() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(0x80000007, &eax, &ebx, &ecx, &edx) == 0) return false;
  return (edx & (1u << 8)) != 0;
#else
  return true;
#endif
}

double Calibrate() {
  constexpr std::uint64_t kLength = 40'000'000;
  const std::uint64_t start = MonotonicNanoseconds();
  const std::uint64_t first_tick = TickClock::Now();
  while (MonotonicNanoseconds() - start < kLength) {
  }
  const std::uint64_t last_tick = TickClock::Now();
  const std::uint64_t end = MonotonicNanoseconds();
  return static_cast<double>(end - start) / static_cast<double>(last_tick - first_tick);
}

}  // namespace

const bool TickClock::counter_is_constant_ = CounterIsConstant();

double TickClock::NanosecondsPerTick() {
  static const double nanoseconds_per_tick = Calibrate();
  return nanoseconds_per_tick;
}

}  // namespace freehold::bench
