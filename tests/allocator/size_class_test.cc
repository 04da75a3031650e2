#include "allocator/size_class.h"

#include "gtest/gtest.h"

namespace freehold::allocator {
namespace {

TEST(SizeClassTest, SizesAscend) {
  for (unsigned i = 1; i < kSizeClassCount; ++i) {
    EXPECT_LT(kSizeClasses[i - 1].size, kSizeClasses[i].size);
  }
  EXPECT_EQ(kSizeClasses[kSizeClassCount - 1].size, kMaxClassSize);
}

TEST(SizeClassTest, EverySizeGetsTheSmallestClassThatHoldsIt) {
  for (std::size_t size = 0; size <= kMaxClassSize; ++size) {
    const SizeClass size_class = ClassOf(size);
    ASSERT_LT(size_class, kSizeClassCount);
    ASSERT_GE(kSizeClasses[size_class].size, size);
    if (size_class > 0) {
      ASSERT_LT(kSizeClasses[size_class - 1].size, size);
    }
  }
}

TEST(SizeClassTest, WasteAbove128BytesIsAtMostAnEighth) {
  for (std::size_t size = 129; size <= kMaxClassSize; ++size) {
    const std::size_t given = kSizeClasses[ClassOf(size)].size;
    ASSERT_LE((given - size) * 8, given) << size;
  }
}

TEST(SizeClassTest, EverySizeIsAMultipleOfTheMinimumAlignment) {
  for (const SizeClassInfo& info : kSizeClasses) EXPECT_EQ(info.size % kMinAlignment, 0u);
}

TEST(SizeClassTest, EveryPowerOfTwoIsASize) {
  for (std::size_t size = kMinAlignment; size <= kMaxClassSize; size *= 2) {
    EXPECT_EQ(kSizeClasses[ClassOf(size)].size, size);
  }
}

TEST(SizeClassTest, AlignedClassHoldsTheSizeAtMultiplesOfTheAlignment) {
  for (std::size_t alignment = 1; alignment <= kUnitSize; alignment *= 2) {
    for (std::size_t size = 0; size <= kMaxClassSize; size += 37) {
      const SizeClassInfo& info = kSizeClasses[AlignedClassOf(alignment, size)];
      ASSERT_GE(info.size, size);
      ASSERT_EQ(info.size % alignment, 0u) << alignment << " " << size;
    }
  }
}

TEST(SizeClassTest, SpansHoldSeveralObjectsAndFitAChunk) {
  for (const SizeClassInfo& info : kSizeClasses) {
    EXPECT_GE(info.capacity, 4u);
    EXPECT_LE(info.capacity * info.size, info.units * kUnitSize);
    EXPECT_LE(info.units, kMaxSpanUnits);
    EXPECT_GE(info.wake, 1u);
    EXPECT_LT(info.wake, info.capacity);
    EXPECT_GE(info.carve, 1u);
  }
}

// The one comparison that tells starts of objects from everything else: with `limit` for n objects, exactly
// the offsets 0, size, 2 * size, ... (n - 1) * size pass.
TEST(SizeClassTest, ReciprocalTellsStartsOfObjects) {
  for (const SizeClassInfo& info : kSizeClasses) {
    for (const std::uint32_t made : {0u, 1u, info.capacity / 2, info.capacity}) {
      const std::uint64_t limit = made * info.excess;
      for (std::uint64_t offset = 0; offset < info.units * kUnitSize; ++offset) {
        const bool is_start = offset % info.size == 0 && offset / info.size < made;
        ASSERT_EQ(offset * info.reciprocal < limit, is_start) << info.size << " " << offset;
      }
    }
  }
}

TEST(SizeClassTest, ReciprocalRefusesAddressesOutsideOfTheSpan) {
  for (const SizeClassInfo& info : kSizeClasses) {
    const std::uint64_t limit = info.capacity * info.excess;
    for (unsigned log2 = 20; log2 < 47; ++log2) {
      for (const std::uint64_t near : {std::uint64_t{0}, std::uint64_t{16}, std::uint64_t{info.size}}) {
        const std::uint64_t offset = (std::uint64_t{1} << log2) + near;
        EXPECT_GE(offset * info.reciprocal, limit) << info.size << " " << offset;
        EXPECT_GE((0 - offset) * info.reciprocal, limit) << info.size << " -" << offset;
        const std::uint64_t multiple = offset / info.size * info.size;
        EXPECT_GE(multiple * info.reciprocal, limit) << info.size << " " << multiple;
        EXPECT_GE((0 - multiple) * info.reciprocal, limit) << info.size << " -" << multiple;
      }
    }
  }
}

}  // namespace
}  // namespace freehold::allocator
