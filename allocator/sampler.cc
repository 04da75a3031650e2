#include "allocator/sampler.h"

#include <algorithm>
#include <bit>

namespace freehold::allocator {
namespace {

// The generator of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
std::uint64_t Next(std::uint64_t& state) {
  std::uint64_t n = state += 0x9e3779b97f4a7c15;
  n = (n ^ (n >> 30)) * 0xbf58476d1ce4e5b9;
  n = (n ^ (n >> 27)) * 0x94d049bb133111eb;
  return n ^ (n >> 31);
}

// -ln(n / 2^64), for n > 0, to about twelve digits; libm is no part of what the shared library may need.
double MinusLog(std::uint64_t n) {
  constexpr double kLn2 = 0.6931471805599453;
  const int shift = std::countl_zero(n);
  // n / 2^64 = x / 2^shift with x in [1/2, 1), so ln(x) = 2 artanh(z) with -1/3 <= z < 0.
  const double x = static_cast<double>(n << shift) * 0x1p-64;
  const double z = (x - 1) / (x + 1);
  const double square = z * z;
  double sum = 0;
  for (int power = 23; power >= 1; power -= 2) sum = sum * square + 1.0 / power;
  return shift * kLn2 - 2 * z * sum;
}

// More bytes than anybody allocates.
constexpr double kNever = 1e30;

}  // namespace

Sampler::Sampler(const Intervals& intervals, std::uint64_t seed)
    : random_(seed), large_distance_(Distance(static_cast<double>(intervals.profile.value))) {
  profile_.interval = static_cast<double>(intervals.profile.value);
  guard_.interval = static_cast<double>(intervals.guard.value);
  for (Process* process : {&profile_, &guard_}) {
    for (unsigned i = 0; i < kSizeClassCount; ++i) {
      process->until[i] = ObjectsBeforeSample(*process, static_cast<SizeClass>(i));
    }
  }
}

double Sampler::Distance(double interval) {
  if (interval < 1) return kNever;
  // Every byte is a sample, without exception.
  if (interval <= 1) return 0;
  return MinusLog(Next(random_) | 1) * interval;
}

// The sample is the object in which the distance ends; so the chance that the next object is one is
// 1 - exp(-size / interval), which is what readers of profiles scale by.
std::uint32_t Sampler::ObjectsBeforeSample(const Process& process, SizeClass size_class) {
  return static_cast<std::uint32_t>(std::min(Distance(process.interval) / kSizeClasses[size_class].size, kMaxObjects));
}

bool Sampler::Count(Process& process, SizeClass size_class) {
  std::uint32_t& until = process.until[size_class];
  if (until != 0) {
    --until;
    return false;
  }
  until = ObjectsBeforeSample(process, size_class);
  // Where there is none, the distance ends too, once in kMaxObjects.
  return process.interval >= 1;
}

Sampler::Due Sampler::Count(SizeClass size_class) {
  return {.profile = Count(profile_, size_class), .guard = Count(guard_, size_class)};
}

std::uint32_t Sampler::CountUpTo(SizeClass size_class, std::uint32_t most) {
  std::uint32_t& until_profile = profile_.until[size_class];
  std::uint32_t& until_guard = guard_.until[size_class];
  const std::uint32_t count = std::min({most, until_profile, until_guard});
  until_profile -= count;
  until_guard -= count;
  return count;
}

bool Sampler::CountLarge(vm::Bytes bytes) {
  large_distance_ -= static_cast<double>(bytes.value);
  if (large_distance_ >= 0) return false;
  large_distance_ = Distance(profile_.interval);
  return profile_.interval >= 1;
}

}  // namespace freehold::allocator
