// How much memory may be in use: asked by whoever is about to take memory that is not resident yet. The runtime has the
// process's (runtime/memory_limit.h); a heap without one takes what its space gives.
//
// Memory is admitted before it is taken, and settled once it shows in the counters of whoever took it: between the two
// it counts although it may not be there, so that threads that ask at the same time cannot exceed a limit together.
#ifndef FREEHOLD_ALLOCATOR_MEMORY_LIMIT_H_
#define FREEHOLD_ALLOCATOR_MEMORY_LIMIT_H_

#include <atomic>
#include <optional>

#include "absl/base/optimization.h"
#include "vm/units.h"

namespace freehold::allocator {

// Thread safety: thread-safe.
class MemoryLimit {
 public:
  // Whether there is a limit. While there is none, nothing needs to be admitted.
  bool is_set() const { return is_set_.load(std::memory_order_relaxed); }
  // Whether `bytes` more may be taken; Settle follows if so. May be called under a heap's cache lock:
  // does not call back.
  virtual bool Admit(vm::Bytes bytes) = 0;
  virtual void Settle(vm::Bytes bytes) = 0;

  // Somebody took so much that free memory should go back. Relieve is for a caller that holds no lock.
  bool wants_relief() const { return wants_relief_.load(std::memory_order_relaxed); }
  virtual void Relieve() = 0;
  // `bytes` are not to be had: because of the limit, or otherwise. Gives free memory back, asks the program to free
  // some, and returns whether it is worth another try, the `attempt`-th of which was the last. Calls the program, which
  // may allocate and free. REQUIRES: the caller holds no lock, and expects everything to have changed afterwards.
  virtual bool MakeRoom(vm::Bytes bytes, unsigned attempt) = 0;

 protected:
  constexpr MemoryLimit() = default;
  ~MemoryLimit() = default;

  std::atomic<bool> is_set_{false};
  std::atomic<bool> wants_relief_{false};
};

// Admits while in scope.
class [[nodiscard]] Admission {
 public:
  // Null: no limit.
  Admission(MemoryLimit* limit, vm::Bytes bytes)
      : limit_(limit != nullptr && ABSL_PREDICT_FALSE(limit->is_set()) ? limit : nullptr), bytes_(bytes) {
    if (ABSL_PREDICT_TRUE(limit_ == nullptr) || limit_->Admit(bytes)) return;
    limit_ = nullptr;
    granted_ = false;
  }
  Admission(const Admission&) = delete;
  Admission& operator=(const Admission&) = delete;
  ~Admission() {
    if (ABSL_PREDICT_FALSE(limit_ != nullptr)) limit_->Settle(bytes_);
  }

  bool granted() const { return granted_; }

 private:
  MemoryLimit* limit_;
  const vm::Bytes bytes_;
  bool granted_ = true;
};

// Calls `call()` once `limit` has room for `bytes` more, whatever it takes; nothing if it gets none. For a caller that
// holds no lock. `limit` may be null.
template <typename Call>
auto WithinLimit(MemoryLimit* limit, vm::Bytes bytes, const Call& call) -> std::optional<decltype(call())> {
  if (ABSL_PREDICT_TRUE(limit == nullptr || !limit->is_set())) return call();
  const auto try_once = [&]() -> std::optional<decltype(call())> {
    const Admission admission(limit, bytes);
    if (!admission.granted()) return std::nullopt;
    return call();
  };
  for (unsigned attempt = 0;; ++attempt) {
    if (const auto result = try_once()) {
      if (limit->wants_relief()) limit->Relieve();
      return result;
    }
    if (!limit->MakeRoom(bytes, attempt)) return std::nullopt;
  }
}

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_MEMORY_LIMIT_H_
