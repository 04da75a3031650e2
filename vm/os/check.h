// Broken invariants stop the program with a message; nothing here allocates or takes a lock.
//
// FREEHOLD_CHECK is always on and belongs off the hot path; FREEHOLD_DCHECK is on in the dbg, asan
// and tsan configurations, which define FREEHOLD_DEBUG_CHECKS.
#ifndef FREEHOLD_VM_OS_CHECK_H_
#define FREEHOLD_VM_OS_CHECK_H_

#include <cstddef>
#include <cstdint>

namespace freehold::vm {

// One labelled number of a failure message, printed in hexadecimal.
struct CheckValue {
  const char* name;
  std::uint64_t value;
};

// Prints "freehold: FILE:LINE: MESSAGE name=0x.. name=0x.." to standard error and aborts.
// Async-signal-safe.
[[noreturn]] void CheckFailed(const char* file, int line, const char* message,
                              const CheckValue* values = nullptr, std::size_t count = 0);

// Prints "freehold: MESSAGE name=0x.." to standard error and goes on: for what nobody can return as an error.
// Async-signal-safe.
void Report(const char* message, const CheckValue* values = nullptr, std::size_t count = 0);

}  // namespace freehold::vm

#define FREEHOLD_CHECK(condition) \
  (static_cast<bool>(condition)   \
       ? static_cast<void>(0)     \
       : ::freehold::vm::CheckFailed(__FILE__, __LINE__, "check failed: " #condition))

#if defined(FREEHOLD_DEBUG_CHECKS)
inline constexpr bool kFreeholdDebugChecks = true;
#define FREEHOLD_DCHECK(condition) FREEHOLD_CHECK(condition)
#else
inline constexpr bool kFreeholdDebugChecks = false;
#define FREEHOLD_DCHECK(condition) static_cast<void>(sizeof(static_cast<bool>(condition)))
#endif

#endif  // FREEHOLD_VM_OS_CHECK_H_
