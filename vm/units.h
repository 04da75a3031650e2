// Units of the address space as types: bytes, pages, page numbers and nanoseconds do not mix by accident.
//
// Bytes become pages once, at the edge of the API (`PagesFor`, `PageRange::FromBytes`); everything inside
// counts in pages. All types are trivially copyable values of one machine word.
#ifndef FREEHOLD_VM_UNITS_H_
#define FREEHOLD_VM_UNITS_H_

#include <compare>
#include <cstddef>
#include <cstdint>

namespace freehold::vm {

inline constexpr unsigned kPageShift = 12;
inline constexpr std::size_t kPageSize = std::size_t{1} << kPageShift;
inline constexpr unsigned kHugePageShift = 21;
inline constexpr std::size_t kHugePageSize = std::size_t{1} << kHugePageShift;
inline constexpr std::size_t kPagesPerHugePage = kHugePageSize / kPageSize;
inline constexpr std::size_t kCacheLineSize = 64;

// A count of bytes.
struct Bytes {
  std::size_t value = 0;
  friend constexpr auto operator<=>(Bytes, Bytes) = default;
  friend constexpr Bytes operator+(Bytes a, Bytes b) { return {a.value + b.value}; }
  friend constexpr Bytes operator-(Bytes a, Bytes b) { return {a.value - b.value}; }
};

constexpr Bytes KiB(std::size_t n) { return {n << 10}; }
constexpr Bytes MiB(std::size_t n) { return {n << 20}; }
constexpr Bytes GiB(std::size_t n) { return {n << 30}; }
constexpr Bytes TiB(std::size_t n) { return {n << 40}; }

// A count of 4 KiB pages.
struct Pages {
  std::size_t value = 0;
  constexpr Bytes bytes() const { return {value << kPageShift}; }
  friend constexpr auto operator<=>(Pages, Pages) = default;
  friend constexpr Pages operator+(Pages a, Pages b) { return {a.value + b.value}; }
  friend constexpr Pages operator-(Pages a, Pages b) { return {a.value - b.value}; }
  constexpr Pages& operator+=(Pages b) { value += b.value; return *this; }
  constexpr Pages& operator-=(Pages b) { value -= b.value; return *this; }
};

// The pages that `bytes` fill, rounded up. REQUIRES: bytes <= SIZE_MAX - kPageSize + 1.
constexpr Pages PagesFor(Bytes bytes) { return {(bytes.value + kPageSize - 1) >> kPageShift}; }

// The number of a page: its address divided by the page size. Not a count.
struct PageNumber {
  std::size_t value = 0;
  static PageNumber Of(const void* address) {
    return {reinterpret_cast<std::uintptr_t>(address) >> kPageShift};
  }
  std::byte* address() const { return reinterpret_cast<std::byte*>(value << kPageShift); }
  friend constexpr auto operator<=>(PageNumber, PageNumber) = default;
  friend constexpr PageNumber operator+(PageNumber a, Pages b) { return {a.value + b.value}; }
  friend constexpr PageNumber operator-(PageNumber a, Pages b) { return {a.value - b.value}; }
  friend constexpr Pages operator-(PageNumber a, PageNumber b) { return {a.value - b.value}; }
};

// A point in, or a length of, CLOCK_MONOTONIC time.
struct Nanoseconds {
  std::uint64_t value = 0;
  friend constexpr auto operator<=>(Nanoseconds, Nanoseconds) = default;
  friend constexpr Nanoseconds operator+(Nanoseconds a, Nanoseconds b) { return {a.value + b.value}; }
  friend constexpr Nanoseconds operator-(Nanoseconds a, Nanoseconds b) { return {a.value - b.value}; }
};

constexpr Nanoseconds Microseconds(std::uint64_t n) { return {n * 1000}; }
constexpr Nanoseconds Milliseconds(std::uint64_t n) { return {n * 1000 * 1000}; }

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_UNITS_H_
