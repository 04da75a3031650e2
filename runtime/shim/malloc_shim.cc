// malloc and its family, as C, POSIX and glibc's manual pages define them. Where they leave a
// choice, it is glibc's: realloc(p, 0) frees; memalign takes any alignment and rounds it up; errno
// is ENOMEM whenever there is no memory, and untouched by everything that succeeds and by every
// free.
#include <malloc.h>

#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "absl/base/attributes.h"
#include "absl/base/optimization.h"
#include "runtime/shim/allocate.h"
#include "runtime/shim/export.h"
#include "vm/units.h"

namespace freehold::runtime::shim {
namespace {

ABSL_ATTRIBUTE_NOINLINE ABSL_ATTRIBUTE_COLD void* Fail(int error) {
  errno = error;
  return nullptr;
}

inline void* OrNoMemory(void* p) {
  if (ABSL_PREDICT_TRUE(p != nullptr)) return p;
  return Fail(ENOMEM);
}

ABSL_ATTRIBUTE_NOINLINE void* MallocSlow(std::size_t size) {
  // That of malloc, which jumped here.
  return OrNoMemory(Allocate(size, __builtin_return_address(0)));
}

// Not std::has_single_bit, which counts bits by a call into libgcc.
constexpr bool IsPowerOfTwo(std::size_t n) { return n != 0 && (n & (n - 1)) == 0; }

// The largest power of two that fits into size_t.
constexpr std::size_t kMaxAlignment = SIZE_MAX / 2 + 1;

}  // namespace
}  // namespace freehold::runtime::shim

namespace shim = freehold::runtime::shim;

extern "C" {

FREEHOLD_EXPORT void* malloc(std::size_t size) noexcept {
  void* p = shim::TryAllocate(size);
  return ABSL_PREDICT_TRUE(p != nullptr) ? p : shim::MallocSlow(size);
}

FREEHOLD_EXPORT void* calloc(std::size_t count, std::size_t size) noexcept {
  std::size_t bytes = 0;
  if (ABSL_PREDICT_FALSE(__builtin_mul_overflow(count, size, &bytes))) return shim::Fail(ENOMEM);
  return shim::OrNoMemory(shim::AllocateZeroed(bytes));
}

FREEHOLD_EXPORT void free(void* p) noexcept { shim::Free(p); }

FREEHOLD_EXPORT void* realloc(void* p, std::size_t size) noexcept {
  if (ABSL_PREDICT_FALSE(size == 0 && p != nullptr)) {
    shim::Free(p);
    return nullptr;
  }
  return shim::OrNoMemory(shim::Reallocate(p, size));
}

FREEHOLD_EXPORT void* reallocarray(void* p, std::size_t count, std::size_t size) noexcept {
  std::size_t bytes = 0;
  if (ABSL_PREDICT_FALSE(__builtin_mul_overflow(count, size, &bytes))) return shim::Fail(ENOMEM);
  return realloc(p, bytes);
}

// C23.
FREEHOLD_EXPORT void free_sized(void* p, std::size_t size) noexcept { shim::FreeSized(p, size); }
FREEHOLD_EXPORT void free_aligned_sized(void* p, std::size_t, std::size_t size) noexcept {
  shim::FreeSized(p, size);
}

// C17, and glibc since 2.38, refuse an alignment that is not a power of two. The size may be any.
FREEHOLD_EXPORT void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  if (ABSL_PREDICT_FALSE(!shim::IsPowerOfTwo(alignment))) return shim::Fail(EINVAL);
  return shim::OrNoMemory(shim::AllocateAligned(alignment, size));
}

FREEHOLD_EXPORT void* memalign(std::size_t alignment, std::size_t size) noexcept {
  if (ABSL_PREDICT_FALSE(alignment > shim::kMaxAlignment)) return shim::Fail(EINVAL);
  return shim::OrNoMemory(shim::AllocateAligned(std::bit_ceil(alignment), size));
}

// Says what went wrong by its result; errno stays as it is.
FREEHOLD_EXPORT int posix_memalign(void** result, std::size_t alignment,
                                   std::size_t size) noexcept {
  if (ABSL_PREDICT_FALSE(!shim::IsPowerOfTwo(alignment) || alignment < sizeof(void*)))
    return EINVAL;
  const int before = errno;
  void* p = shim::AllocateAligned(alignment, size);
  if (ABSL_PREDICT_FALSE(p == nullptr)) {
    errno = before;
    return ENOMEM;
  }
  *result = p;
  return 0;
}

FREEHOLD_EXPORT void* valloc(std::size_t size) noexcept {
  return shim::OrNoMemory(shim::AllocateAligned(freehold::vm::kPageSize, size));
}

// Whole pages.
FREEHOLD_EXPORT void* pvalloc(std::size_t size) noexcept {
  constexpr std::size_t kMask = freehold::vm::kPageSize - 1;
  if (ABSL_PREDICT_FALSE(size > SIZE_MAX - kMask)) return shim::Fail(ENOMEM);
  return valloc((size + kMask) & ~kMask);
}

FREEHOLD_EXPORT std::size_t malloc_usable_size(void* p) noexcept { return shim::UsableSize(p); }

// Gone from libc's headers since 2.26, but old programs ask for it.
FREEHOLD_ALIAS(free) void cfree(void* p) noexcept;

// The names by which programs reach glibc's malloc behind a replacement: with Freehold they must
// not, since what they get is freed by free.
FREEHOLD_ALIAS(malloc) void* __libc_malloc(std::size_t size) noexcept;
FREEHOLD_ALIAS(calloc) void* __libc_calloc(std::size_t count, std::size_t size) noexcept;
FREEHOLD_ALIAS(realloc) void* __libc_realloc(void* p, std::size_t size) noexcept;
FREEHOLD_ALIAS(free) void __libc_free(void* p) noexcept;
FREEHOLD_ALIAS(memalign) void* __libc_memalign(std::size_t alignment, std::size_t size) noexcept;
FREEHOLD_ALIAS(valloc) void* __libc_valloc(std::size_t size) noexcept;
FREEHOLD_ALIAS(pvalloc) void* __libc_pvalloc(std::size_t size) noexcept;
FREEHOLD_ALIAS(posix_memalign)
int __posix_memalign(void** result, std::size_t alignment, std::size_t size) noexcept;

}  // extern "C"
