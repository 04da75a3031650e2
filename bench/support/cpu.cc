#include "bench/support/cpu.h"

#include <vector>

namespace freehold::bench {
namespace {

// The processors the process was started on, in order. Asked for once, before any thread is pinned.
const std::vector<int>& AllowedCpus() {
  static const std::vector<int> cpus = [] {
    std::vector<int> result;
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
      for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &allowed)) result.push_back(cpu);
      }
    }
    if (result.empty()) result.push_back(0);
    return result;
  }();
  return cpus;
}

}  // namespace

int AllowedCpuCount() { return static_cast<int>(AllowedCpus().size()); }

ScopedPin::ScopedPin(int thread_index) {
  const std::vector<int>& cpus = AllowedCpus();
  CPU_ZERO(&previous_);
  sched_getaffinity(0, sizeof(previous_), &previous_);
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpus[static_cast<std::size_t>(thread_index) % cpus.size()], &one);
  sched_setaffinity(0, sizeof(one), &one);
}

ScopedPin::~ScopedPin() { sched_setaffinity(0, sizeof(previous_), &previous_); }

}  // namespace freehold::bench
