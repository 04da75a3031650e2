// Allocation-free results. Errors are values; nothing below the public C++ layer throws, logs or allocates.
#ifndef FREEHOLD_VM_RESULT_H_
#define FREEHOLD_VM_RESULT_H_

#include <cerrno>
#include <cstdint>
#include <utility>

#include "absl/base/attributes.h"

namespace freehold::vm {

enum class ErrorCode : std::uint8_t {
  kOk = 0,
  kUnaligned,           // an address or offset is not a multiple of the page size
  kEmpty,               // a length of zero
  kOverflow,            // address + length wraps, or the length cannot be represented
  kOutsideReservation,  // the range is not inside this address space, or crosses a zone's region
  kDenied,              // more access than the backing of a mapping allows
  kPinned,              // a pin keeps what would have to go
  kOverlap,             // a fixed mapping meets an existing one and may not replace it
  kNoRoom,              // no free range is large enough
  kNotMapped,           // part of the range is not mapped, and the verb needs all of it
  kNoMetadata,          // the metadata arena is exhausted
  kDeadline,            // the deadline passed before the lock or the work was done
  kCancelled,           // the caller asked for it
  kReplaced,            // the VMA was replaced or unmapped while the verb ran without locks
  kThrew,               // a user's pager left by an exception
  kUnsupported,         // this kernel or this configuration cannot do it
  kSystem,              // a system call failed: see sys_errno
};

// What went wrong. `sys_errno` is the kernel's errno for kSystem and 0 otherwise.
struct [[nodiscard]] Error {
  ErrorCode code = ErrorCode::kOk;
  int sys_errno = 0;

  constexpr bool ok() const { return code == ErrorCode::kOk; }
  static constexpr Error Ok() { return {}; }
  static constexpr Error System(int err) { return {ErrorCode::kSystem, err}; }
  friend constexpr bool operator==(Error, Error) = default;
};

// The errno that mmap(2) and friends would give for this error; 0 for kOk.
constexpr int ToErrno(Error error) {
  switch (error.code) {
    case ErrorCode::kOk: return 0;
    case ErrorCode::kUnaligned:
    case ErrorCode::kEmpty:
    case ErrorCode::kOverflow: return EINVAL;
    case ErrorCode::kOutsideReservation:
    case ErrorCode::kNoRoom:
    case ErrorCode::kNotMapped:
    case ErrorCode::kNoMetadata: return ENOMEM;
    case ErrorCode::kDenied: return EACCES;
    case ErrorCode::kPinned: return EBUSY;
    case ErrorCode::kOverlap: return EEXIST;
    case ErrorCode::kDeadline: return ETIMEDOUT;
    case ErrorCode::kCancelled: return ECANCELED;
    case ErrorCode::kReplaced: return ENOMEM;
    case ErrorCode::kThrew: return EIO;
    case ErrorCode::kUnsupported: return EOPNOTSUPP;
    case ErrorCode::kSystem: return error.sys_errno;
  }
  return EINVAL;
}

constexpr const char* ToString(ErrorCode code) {
  switch (code) {
    case ErrorCode::kOk: return "ok";
    case ErrorCode::kUnaligned: return "not page-aligned";
    case ErrorCode::kEmpty: return "empty range";
    case ErrorCode::kOverflow: return "range wraps or is too large";
    case ErrorCode::kOutsideReservation: return "outside the reservation";
    case ErrorCode::kDenied: return "more access than the backing allows";
    case ErrorCode::kPinned: return "pinned";
    case ErrorCode::kOverlap: return "overlaps an existing mapping";
    case ErrorCode::kNoRoom: return "no room in the address space";
    case ErrorCode::kNotMapped: return "not mapped";
    case ErrorCode::kNoMetadata: return "metadata arena exhausted";
    case ErrorCode::kDeadline: return "deadline exceeded";
    case ErrorCode::kCancelled: return "cancelled";
    case ErrorCode::kReplaced: return "mapping was replaced meanwhile";
    case ErrorCode::kThrew: return "a pager threw";
    case ErrorCode::kUnsupported: return "not supported here";
    case ErrorCode::kSystem: return "system call failed";
  }
  return "unknown error";
}

// A value or an error. T must be trivially copyable or at least cheap to move; no allocation ever.
template <typename T>
class [[nodiscard]] Result {
 public:
  constexpr Result(T value) : value_(std::move(value)) {}  // NOLINT: implicit, like absl::StatusOr
  constexpr Result(Error error) : error_(error) {}          // NOLINT: REQUIRES: !error.ok()
  constexpr Result(ErrorCode code) : error_{code} {}        // NOLINT: REQUIRES: code != kOk

  constexpr bool ok() const { return error_.ok(); }
  constexpr Error error() const { return error_; }
  // REQUIRES: ok().
  constexpr T& operator*() { return value_; }
  constexpr const T& operator*() const { return value_; }
  constexpr T* operator->() { return &value_; }
  constexpr const T* operator->() const { return &value_; }

 private:
  T value_{};
  Error error_{};
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_RESULT_H_
