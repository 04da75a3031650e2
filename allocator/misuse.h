// What the program did wrong, said in one line on standard error; then the program stops.
//
// Thread safety: thread-safe. Allocates nothing and takes no lock.
#ifndef FREEHOLD_ALLOCATOR_MISUSE_H_
#define FREEHOLD_ALLOCATOR_MISUSE_H_

#include <cstddef>
#include <cstdint>

namespace freehold::allocator {

enum class Misuse : std::uint8_t {
  kForeign,    // the address is not in the heap
  kNoObject,   // it is, but there is no object
  kInterior,   // it lies within an object
  kDoubleFree,
  kSizeMismatch,  // the object is smaller than the size that the program gave
  kCorrupted,     // a free object was written to
  kStray,         // the memory around it was written to, while it was allocated
};

struct MisuseReport {
  Misuse what;
  const char* call;     // "free", "realloc"
  const void* address;  // its argument
  const void* object = nullptr;
  std::size_t object_size = 0;
  std::size_t size = 0;           // kSizeMismatch
  const void* written = nullptr;  // kStray: the byte
  // Says more, after the line. May be null.
  void (*explain)(const void* context) = nullptr;
  const void* context = nullptr;
};

// "freehold: free(0x7f..): double free of a 48-byte object", and so on.
[[noreturn]] void StopProgram(const MisuseReport& report);

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_MISUSE_H_
