// How long does mapping wait while another thread populates? Thread A maps ranges with MAP_POPULATE; thread B maps
// 64 KiB, touches one page and unmaps, over and over, and times each turn. Plain mmap and munmap: what serves them is
// the system's business.
//
//   stall_probe [RANGES [MIB_PER_RANGE [ROUNDS]]]
//
// Prints one line: A's seconds, B's turns per second, and B's median, 99.9th percentile and worst turn in microseconds,
// of the turns that began while A was at it.
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr std::size_t kMappedByB = std::size_t{64} << 10;

std::uint64_t NowNs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
}

char* Map(std::size_t bytes, int flags) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
  if (p == MAP_FAILED) {
    std::perror("mmap");
    std::exit(1);
  }
  return static_cast<char*>(p);
}

void Unmap(char* p, std::size_t bytes) {
  if (munmap(p, bytes) == 0) return;
  std::perror("munmap");
  std::exit(1);
}

// Turns by their duration: a sixteenth of a power of two each.
class Durations {
 public:
  void Add(std::uint64_t ns) {
    ++counts_[Bucket(ns)];
    ++total_;
    worst_ = std::max(worst_, ns);
  }
  std::uint64_t total() const { return total_; }
  double worst_us() const { return static_cast<double>(worst_) / 1000; }
  double quantile_us(double share) const {
    auto left = static_cast<std::uint64_t>(static_cast<double>(total_) * (1 - share));
    for (std::size_t bucket = counts_.size(); bucket-- > 0;) {
      if (counts_[bucket] > left) return static_cast<double>(Upper(bucket)) / 1000;
      left -= counts_[bucket];
    }
    return 0;
  }

 private:
  static std::size_t Bucket(std::uint64_t ns) {
    if (ns < 16) return ns;
    const auto power = static_cast<std::size_t>(63 - __builtin_clzll(ns));
    return (power - 3) * 16 + ((ns >> (power - 4)) & 15);
  }
  static std::uint64_t Upper(std::size_t bucket) {
    return bucket < 16 ? bucket : (17 + bucket % 16) << (bucket / 16 - 1);
  }

  std::vector<std::uint64_t> counts_ = std::vector<std::uint64_t>(64 * 16);
  std::uint64_t total_ = 0;
  std::uint64_t worst_ = 0;
};

std::atomic<bool> populating{false};
std::atomic<bool> ready{false};
std::atomic<bool> finished{false};
Durations turns;

void* B(void*) {
  const auto turn = [] {
    char* p = Map(kMappedByB, 0);
    p[0] = 1;
    Unmap(p, kMappedByB);
  };
  for (int i = 0; i < 100; ++i) turn();
  ready.store(true);
  while (!finished.load()) {
    sched_yield();
    while (populating.load(std::memory_order_relaxed)) {
      const std::uint64_t start = NowNs();
      turn();
      turns.Add(NowNs() - start);
    }
  }
  return nullptr;
}

std::size_t Argument(int argc, char** argv, int index, std::size_t otherwise) {
  return argc > index ? std::strtoull(argv[index], nullptr, 10) : otherwise;
}

}  // namespace

int main(int argc, char** argv) {
  const std::size_t ranges = Argument(argc, argv, 1, 3);
  const std::size_t bytes = Argument(argc, argv, 2, 2048) << 20;
  const std::size_t rounds = Argument(argc, argv, 3, 1);
  pthread_t b;
  if (pthread_create(&b, nullptr, B, nullptr) != 0) return 1;
  while (!ready.load()) sched_yield();
  double seconds = 0;
  std::vector<char*> mapped(ranges);
  // Once more than is measured, with B at rest: the host of a virtual machine has to find memory for pages that were
  // never used before.
  for (std::size_t round = 0; round <= rounds; ++round) {
    populating.store(round > 0);
    const std::uint64_t start = NowNs();
    for (char*& range : mapped) range = Map(bytes, MAP_POPULATE);
    if (round > 0) seconds += static_cast<double>(NowNs() - start) / 1e9;
    populating.store(false);
    for (char* range : mapped) Unmap(range, bytes);
  }
  finished.store(true);
  pthread_join(b, nullptr);
  std::printf("A %.3f s, B %.0f turns/s, median %.2f us, p99.9 %.2f us, worst %.2f us\n", seconds,
              static_cast<double>(turns.total()) / seconds, turns.quantile_us(0.5), turns.quantile_us(0.999),
              turns.worst_us());
  return 0;
}
