// The sizes that small and medium objects come in.
//
// Up to 128 bytes the sizes are the multiples of 16; above, eight to a doubling, up to 128 KiB. So a request of
// more than 128 bytes wastes less than 12.5 %, every size is a multiple of 16, and every power of two is a
// size. Objects of a class lie at multiples of its size from the start of a span, and spans start at multiples
// of kUnitSize: an object is aligned to every power of two up to kUnitSize that divides its size.
//
// Units: bytes, but for counts of units.
#ifndef FREEHOLD_ALLOCATOR_SIZE_CLASS_H_
#define FREEHOLD_ALLOCATOR_SIZE_CLASS_H_

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace freehold::allocator {

// Spans consist of units: the grain of the table that finds an object's span.
inline constexpr unsigned kUnitShift = 16;
inline constexpr std::size_t kUnitSize = std::size_t{1} << kUnitShift;

inline constexpr std::size_t kMinAlignment = 16;
// Requests up to this size find their class in a table indexed by size.
inline constexpr std::size_t kMaxDirectSize = std::size_t{16} << 10;
// Larger ones are large objects, which are ranges of pages.
inline constexpr std::size_t kMaxClassSize = std::size_t{128} << 10;

using SizeClass = std::uint8_t;

namespace internal {
inline constexpr std::size_t kLinearLimit = 128;
inline constexpr unsigned kLinearClasses = kLinearLimit / kMinAlignment;
inline constexpr unsigned kStepsLog2 = 3;  // steps a doubling
inline constexpr unsigned kLinearLog2 = std::bit_width(kLinearLimit) - 1;
}  // namespace internal

inline constexpr unsigned kSizeClassCount =
    internal::kLinearClasses +
    ((std::bit_width(kMaxClassSize) - 1 - internal::kLinearLog2) << internal::kStepsLog2);

// The class of the smallest objects that hold `size` bytes. REQUIRES: size <= kMaxClassSize.
constexpr SizeClass ClassOf(std::size_t size) {
  if (size <= internal::kLinearLimit) {
    return static_cast<SizeClass>(size == 0 ? 0 : (size - 1) / kMinAlignment);
  }
  const std::size_t last = size - 1;
  const unsigned log2 = static_cast<unsigned>(std::bit_width(last)) - 1;
  const std::size_t step = (last >> (log2 - internal::kStepsLog2)) & ((1u << internal::kStepsLog2) - 1);
  return static_cast<SizeClass>(internal::kLinearClasses +
                                ((log2 - internal::kLinearLog2) << internal::kStepsLog2) + step);
}

// What is known of a class at compile time.
struct SizeClassInfo {
  std::uint32_t size = 0;          // of an object
  std::uint32_t units = 0;         // of a span
  std::uint32_t capacity = 0;      // objects in a span
  std::uint32_t wake = 0;          // objects that must come free before a full span is allocated from again
  std::uint32_t carve = 0;         // the least objects made at a time; 4 KiB, so that none is touched long before use
  // floor(2^64 / size) + 1: with n = object number * size, n * reciprocal mod 2^64 = object number * excess,
  // which is small; every other n that is a distance between two user addresses gives 2^46 or more.
  std::uint64_t reciprocal = 0;
  std::uint64_t excess = 0;        // size * reciprocal - 2^64, at least 1 and at most `size`
};

namespace internal {

constexpr std::uint32_t SizeOfClass(unsigned size_class) {
  if (size_class < kLinearClasses) return (size_class + 1) * static_cast<std::uint32_t>(kMinAlignment);
  const unsigned above = size_class - kLinearClasses;
  const unsigned steps = 1u << kStepsLog2;
  return (steps + 1 + above % steps) << (kLinearLog2 - kStepsLog2 + above / steps);
}

// Large enough that a span's bookkeeping is shared by several objects, small enough that classes which are
// seldom used cost little address space.
constexpr std::uint32_t UnitsOfSpan(std::uint32_t object_size) {
  if (object_size <= kUnitSize / 4) return 1;
  return object_size <= kUnitSize / 2 ? 4 : 8;
}

constexpr std::array<SizeClassInfo, kSizeClassCount> MakeSizeClasses() {
  constexpr std::uint32_t kCarveBytes = 4096;
  std::array<SizeClassInfo, kSizeClassCount> classes;
  for (unsigned i = 0; i < kSizeClassCount; ++i) {
    SizeClassInfo& info = classes[i];
    info.size = SizeOfClass(i);
    info.units = UnitsOfSpan(info.size);
    info.capacity = info.units * static_cast<std::uint32_t>(kUnitSize) / info.size;
    info.wake = info.capacity < 8 ? 1 : info.capacity / 8;
    info.carve = info.size * 2 > kCarveBytes ? 1 : kCarveBytes / info.size;
    info.reciprocal = ~std::uint64_t{0} / info.size + 1;
    if (info.size * info.reciprocal == 0) ++info.reciprocal;  // a power of two
    info.excess = info.size * info.reciprocal;
  }
  return classes;
}

}  // namespace internal

inline constexpr std::array<SizeClassInfo, kSizeClassCount> kSizeClasses = internal::MakeSizeClasses();
inline constexpr std::size_t kMaxSpanUnits = 8;

// SizeClassInfo::size alone: few cache lines, for who asks for many classes' in turn.
inline constexpr std::array<std::uint32_t, kSizeClassCount> kClassSizes = [] {
  std::array<std::uint32_t, kSizeClassCount> sizes;
  for (unsigned i = 0; i < kSizeClassCount; ++i) sizes[i] = kSizeClasses[i].size;
  return sizes;
}();

// The class of the smallest objects that hold `size` bytes at multiples of `alignment`. REQUIRES: alignment
// is a power of two, at most kUnitSize; size rounded up to a multiple of it is at most kMaxClassSize.
constexpr SizeClass AlignedClassOf(std::size_t alignment, std::size_t size) {
  SizeClass size_class = ClassOf(size < alignment ? alignment : size);
  while ((kSizeClasses[size_class].size & (alignment - 1)) != 0) ++size_class;
  return size_class;
}

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_SIZE_CLASS_H_
