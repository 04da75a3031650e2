// libc's own malloc, behind the symbols that the shim replaces: for FREEHOLD_MALLOC=libc, and for a
// process in which Freehold could not reserve address space.
#ifndef FREEHOLD_RUNTIME_SHIM_LIBC_MALLOC_H_
#define FREEHOLD_RUNTIME_SHIM_LIBC_MALLOC_H_

#include <malloc.h>

#include <atomic>
#include <cstddef>
#include <cstdio>

namespace freehold::runtime::shim {

// The functions that the dynamic linker would have bound to without the shim.
//
// Thread safety: thread-safe.
// Allocation:    looking the functions up may allocate, inside the dynamic linker, of the very
// malloc that is
//                being looked up; such calls are served from a small buffer (Bootstrap...).
class LibcMalloc {
 public:
  void* (*malloc)(std::size_t) = nullptr;
  void* (*calloc)(std::size_t, std::size_t) = nullptr;
  void* (*realloc)(void*, std::size_t) = nullptr;
  void* (*memalign)(std::size_t, std::size_t) = nullptr;
  void (*free)(void*) = nullptr;
  std::size_t (*malloc_usable_size)(void*) = nullptr;
  int (*malloc_trim)(std::size_t) = nullptr;
  struct mallinfo (*mallinfo)() = nullptr;
  struct mallinfo2 (*mallinfo2)() = nullptr;  // null before glibc 2.33
  int (*malloc_info)(int, FILE*) = nullptr;
  void (*malloc_stats)() = nullptr;
  int (*mallopt)(int, int) = nullptr;

  // Null while this thread, or another one, is looking the functions up: then allocate from the
  // buffer. Stops the program if there is no libc but this one (statically linked programs).
  static const LibcMalloc* Get();

  // Zeroed memory while Get() returns null; never given back. Stops the program when it is used up.
  static void* BootstrapAllocate(std::size_t alignment, std::size_t size);
  static bool IsBootstrap(const void* p);
  // The bytes at `p` that may be read. REQUIRES: IsBootstrap(p).
  static std::size_t BootstrapReadable(const void* p);

 private:
  bool LookUp();

  enum class State : int { kUnknown, kLookingUp, kKnown };
  std::atomic<State> state_{State::kUnknown};

  static LibcMalloc instance_;
};

}  // namespace freehold::runtime::shim

#endif  // FREEHOLD_RUNTIME_SHIM_LIBC_MALLOC_H_
