// A sequence counter: readers that write nothing find out whether a writer was at work while they
// read.
//
//   struct Bounds { SeqCount seq; SeqField<size_t> low, high; };
//
//   writer, under its lock:                    reader, anywhere:
//     SeqCount::WriteScope scope(b.seq);         bool ok = b.seq.Read(kAttempts, [&] {
//     b.low.Store(low);                            low = b.low.Load();
//     b.high.Store(high);                          high = b.high.Load();
//                                                });
//
// The counter protects no lifetimes: what a pointer read inside leads to must be kept alive by
// other means (epoch.h), and values read inside may be inconsistent until Read has returned true.
//
// Thread safety: one writer at a time, by the caller's lock; any number of readers,
// async-signal-safe.
// Waiting:       writers never wait. Readers retry a bounded number of times; what comes after is
//                theirs, since the writer may have lost its CPU, or be the very thread that a
//                signal interrupted.
// Allocation:    none.
//
// Why it is correct without fences, which ThreadSanitizer does not see. Fields are stored by
// release and loaded by acquire. If a reader's load returns a writer's value, then the writer's odd
// count, stored before it, happens before the reader's second look at the counter, which by
// coherence is no older and so differs from the first look. If every load returns a value no newer
// than the first look, the values are those of one completed write: its even count, stored last by
// release, was what the first look acquired.
#ifndef FREEHOLD_VM_SYNC_SEQ_COUNT_H_
#define FREEHOLD_VM_SYNC_SEQ_COUNT_H_

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "vm/os/thread_id.h"

namespace freehold::vm::sync {

// A field that a SeqCount protects.
template <typename T>
class SeqField {
 public:
  static_assert(std::is_trivially_copyable_v<T> && std::atomic<T>::is_always_lock_free);

  constexpr SeqField() = default;
  explicit constexpr SeqField(T value) : value_(value) {}

  T Load() const { return value_.load(std::memory_order_acquire); }        // pairs with Store
  void Store(T value) { value_.store(value, std::memory_order_release); }  // pairs with Load

 private:
  std::atomic<T> value_{};
};

class SeqCount {
 public:
  constexpr SeqCount() = default;
  SeqCount(const SeqCount&) = delete;
  SeqCount& operator=(const SeqCount&) = delete;

  // A write section while in scope. REQUIRES: no other writer of this counter meanwhile.
  class [[nodiscard]] WriteScope {
   public:
    explicit WriteScope(SeqCount& seq) : seq_(seq) {
      // Ordered before the fields by their release stores.
      seq_.count_.store(seq_.count_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    }
    WriteScope(const WriteScope&) = delete;
    WriteScope& operator=(const WriteScope&) = delete;
    // Pairs with the acquire in Begin.
    ~WriteScope() {
      seq_.count_.store(seq_.count_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    }

   private:
    SeqCount& seq_;
  };

  // The parts of Read, for readers with their own loop. Begin's value goes to Validate, which says
  // whether everything loaded in between belongs to one completed write. An odd value never
  // validates.
  std::uint32_t Begin() const { return count_.load(std::memory_order_acquire); }
  bool Validate(std::uint32_t begin) const {
    // Ordered after the fields by their acquire loads.
    return (begin & 1) == 0 && count_.load(std::memory_order_relaxed) == begin;
  }

  // Runs `read` until it was not disturbed, at most `attempts` times; returns whether that was
  // achieved.
  template <typename Function>
  bool Read(int attempts, Function&& read) const {
    for (; attempts > 0; --attempts) {
      const std::uint32_t begin = Begin();
      if ((begin & 1) == 0) {
        read();
        if (Validate(begin)) return true;
      }
      os::CpuRelax();
    }
    return false;
  }

  // Changes with every write section: a generation. Odd while one is open.
  std::uint32_t value() const { return count_.load(std::memory_order_acquire); }

  // In the child of a fork, under the writers' lock: closes a write section of a thread that is
  // gone. What it protects may be half written and has to be rebuilt first.
  void ReinitAfterFork() {
    const std::uint32_t count = count_.load(std::memory_order_relaxed);
    count_.store(count + (count & 1), std::memory_order_release);
  }

 private:
  std::atomic<std::uint32_t> count_{0};
};

}  // namespace freehold::vm::sync

#endif  // FREEHOLD_VM_SYNC_SEQ_COUNT_H_
