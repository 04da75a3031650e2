// Which of a thread's allocations are samples of the heap profile, and which lie between guard pages: for each of the
// two, every byte that the thread allocates is chosen with the same probability, independently (a Poisson process), and
// an object is a sample if one of its bytes is.
//
// A size class is a process of its own: the objects until its next sample are geometrically distributed, whatever
// other classes do. So nothing has to be counted while objects are allocated. A class's objects wait in a list of
// their own, the *front*, from which allocations take them and which no free adds to; it never holds more than there
// are until the next sample of either kind, so that the slow path comes when the sample is due:
//
//     current span's free list: what came free, what was carved
//         |  as many as are free, or until the next sample
//         v
//     front ----> Allocate(); empty: the slow path, for the sample or for more
//
// Thread safety: thread-compatible; the thread's that owns the cache.
// Units:         bytes and objects, as named.
#ifndef FREEHOLD_ALLOCATOR_SAMPLER_H_
#define FREEHOLD_ALLOCATOR_SAMPLER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "allocator/size_class.h"
#include "vm/units.h"

namespace freehold::allocator {

class Sampler {
 public:
  // A sample every so many bytes on average; 0: none; 1: every object is one.
  struct Intervals {
    vm::Bytes profile = {0};
    vm::Bytes guard = {0};
  };
  Sampler(const Intervals& intervals, std::uint64_t seed);
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;

  // What an object is a sample for.
  struct Due {
    bool profile = false;
    bool guard = false;
    explicit operator bool() const { return profile || guard; }
  };
  // Counts one object of the class.
  Due Count(SizeClass size_class);
  // Counts up to `most` objects, none of which is a sample. Returns how many.
  std::uint32_t CountUpTo(SizeClass size_class, std::uint32_t most);
  // Takes back the count of `objects`, which were not allocated.
  void Uncount(SizeClass size_class, std::uint32_t objects) {
    profile_.until[size_class] += objects;
    guard_.until[size_class] += objects;
  }
  // Counts one large object; whether it is a sample of the profile.
  bool CountLarge(vm::Bytes bytes);

  // Where a sample is taken, its thread may allocate: then that is none. False: it is being taken already.
  bool Enter() { return !std::exchange(entered_, true); }
  void Leave() { entered_ = false; }

 private:
  // More than anybody waits for, and few enough that sums fit.
  static constexpr double kMaxObjects = 1 << 30;

  struct Process {
    double interval;
    std::array<std::uint32_t, kSizeClassCount> until;  // objects before the next sample, without those of the front
  };

  // Bytes until the next sample: exponentially distributed.
  double Distance(double interval);
  std::uint32_t ObjectsBeforeSample(const Process& process, SizeClass size_class);
  // Counts one object; whether it is a sample.
  bool Count(Process& process, SizeClass size_class);

  std::uint64_t random_;
  double large_distance_;  // of the profile
  bool entered_ = false;
  Process profile_;
  Process guard_;
};

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_SAMPLER_H_
