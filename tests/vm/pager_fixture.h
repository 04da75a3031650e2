// What the tests of demand paging share: a pager that computes its content, remembers what it is given and can be held
// up, refused or made to throw; and accesses that tell which signal they got.
#ifndef FREEHOLD_TESTS_VM_PAGER_FIXTURE_H_
#define FREEHOLD_TESTS_VM_PAGER_FIXTURE_H_

#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/fault.h"
#include "vm/pager.h"

namespace freehold::vm::test {

// The word that TestPager shows all over `page` until somebody writes something else.
inline std::uint64_t WordOf(std::uint64_t page, std::uint64_t seed) {
  return (page + 1) * 0x9e3779b97f4a7c15 + seed;
}

// Thread safety: thread-safe.
class TestPager final : public Pager {
 public:
  struct Call {
    std::uint64_t page;
    std::size_t pages;
  };

  explicit TestPager(std::uint64_t seed = 0) : seed_(seed) {}

  Result<Pages> Read(std::uint64_t page, absl::Span<std::byte> into) override {
    const std::size_t pages = into.size() / kPageSize;
    std::function<void(std::uint64_t)> hook;
    std::uint64_t end;
    {
      const std::lock_guard lock(mutex_);
      reads_.push_back({page, pages});
      hook = read_hook_;
    }
    if (hook) hook(page);
    const std::lock_guard lock(mutex_);
    end = end_;
    std::size_t filled = 0;
    for (; filled < pages && page + filled < end; ++filled) {
      if (failing_.count(page + filled) != 0) break;
      FillPage(page + filled, into.data() + filled * kPageSize);
    }
    if (throws_) throw std::runtime_error("test");
    if (filled == 0) return Error::System(EIO);
    // A pager that fails half-way may say so, or say nothing of the rest.
    if (filled < pages && failing_.count(page + filled) != 0) return Error::System(EIO);
    return Pages{filled};
  }

  Error Writeback(std::uint64_t page, absl::Span<const std::byte> from) override {
    std::function<void(std::uint64_t)> hook;
    {
      const std::lock_guard lock(mutex_);
      writes_.push_back({page, from.size() / kPageSize});
      hook = write_hook_;
    }
    if (hook) hook(page);
    const std::lock_guard lock(mutex_);
    if (throws_) throw 1;
    if (refuses_writes_) return Error::System(ENOSPC);
    for (std::size_t i = 0; i < from.size() / kPageSize; ++i) {
      std::vector<std::byte>& stored = stored_[page + i];
      stored.assign(from.data() + i * kPageSize, from.data() + (i + 1) * kPageSize);
    }
    return Error::Ok();
  }

  void Release(std::uint64_t page, Pages count) override {
    const std::lock_guard lock(mutex_);
    released_.push_back({page, count.value});
  }

  // ---- Orders ----
  void SetReadHook(std::function<void(std::uint64_t page)> hook) {
    const std::lock_guard lock(mutex_);
    read_hook_ = std::move(hook);
  }
  void SetWriteHook(std::function<void(std::uint64_t page)> hook) {
    const std::lock_guard lock(mutex_);
    write_hook_ = std::move(hook);
  }
  void FailPage(std::uint64_t page, bool fails = true) {
    const std::lock_guard lock(mutex_);
    if (fails) {
      failing_.insert(page);
    } else {
      failing_.erase(page);
    }
  }
  void SetEnd(std::uint64_t end) {
    const std::lock_guard lock(mutex_);
    end_ = end;
  }
  void SetThrows(bool throws) {
    const std::lock_guard lock(mutex_);
    throws_ = throws;
  }
  void SetRefusesWrites(bool refuses) {
    const std::lock_guard lock(mutex_);
    refuses_writes_ = refuses;
  }
  void SetSeed(std::uint64_t seed) {
    const std::lock_guard lock(mutex_);
    seed_ = seed;
  }

  // ---- Observation ----
  std::vector<Call> reads() const { return Copy(reads_); }
  std::vector<Call> writes() const { return Copy(writes_); }
  std::vector<Call> released() const { return Copy(released_); }
  std::set<std::uint64_t> stored_pages() const {
    const std::lock_guard lock(mutex_);
    std::set<std::uint64_t> pages;
    for (const auto& [page, content] : stored_) pages.insert(page);
    return pages;
  }
  std::uint64_t StoredWord(std::uint64_t page) const {
    const std::lock_guard lock(mutex_);
    std::uint64_t word;
    std::memcpy(&word, stored_.at(page).data(), sizeof(word));
    return word;
  }
  void ClearStored() {
    const std::lock_guard lock(mutex_);
    stored_.clear();
    writes_.clear();
  }

 private:
  void FillPage(std::uint64_t page, std::byte* into) const {
    const auto found = stored_.find(page);
    if (found != stored_.end()) {
      std::memcpy(into, found->second.data(), kPageSize);
      return;
    }
    const std::uint64_t word = WordOf(page, seed_);
    for (std::size_t i = 0; i < kPageSize; i += sizeof(word)) std::memcpy(into + i, &word, sizeof(word));
  }
  std::vector<Call> Copy(const std::vector<Call>& calls) const {
    const std::lock_guard lock(mutex_);
    return calls;
  }

  mutable std::mutex mutex_;
  std::uint64_t seed_;
  std::uint64_t end_ = UINT64_MAX;
  bool throws_ = false;
  bool refuses_writes_ = false;
  std::set<std::uint64_t> failing_;
  std::function<void(std::uint64_t)> read_hook_;
  std::function<void(std::uint64_t)> write_hook_;
  std::map<std::uint64_t, std::vector<std::byte>> stored_;
  std::vector<Call> reads_;
  std::vector<Call> writes_;
  std::vector<Call> released_;
};

// ---- Accesses that may trap ----

// Volatile: read by a handler, between two instructions.
inline thread_local sigjmp_buf* volatile trap_return = nullptr;

inline void ReturnFromTrap(int signal, siginfo_t*, void*) {
  if (trap_return == nullptr) _exit(128 + signal);
  siglongjmp(*trap_return, signal);
}

// Catches SIGSEGV and SIGBUS while in scope.
class TrapScope {
 public:
  TrapScope() {
    struct sigaction action = {};
    action.sa_sigaction = &ReturnFromTrap;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
  }
  ~TrapScope() {
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
  }
  TrapScope(const TrapScope&) = delete;
  TrapScope& operator=(const TrapScope&) = delete;

 private:
  struct sigaction old_segv_;
  struct sigaction old_bus_;
};

// What an access came to: 0, or the signal. REQUIRES: a TrapScope.
struct Access {
  int signal = 0;
  std::uint64_t word = 0;
};

template <typename Touch>
__attribute__((noinline, no_sanitize("thread"))) Access TryAccess(Touch touch) {
  sigjmp_buf here;
  sigjmp_buf* const before = trap_return;
  volatile std::uint64_t word = 0;
  if (const int signal = sigsetjmp(here, 1); signal != 0) {
    trap_return = before;
    return {.signal = signal};
  }
  trap_return = &here;
  word = touch();
  trap_return = before;
  return {.word = word};
}

// Atomic, since several threads may use one page.
inline std::uint64_t ReadWord(PageNumber page) {
  return reinterpret_cast<std::atomic<std::uint64_t>*>(page.address())->load(std::memory_order_relaxed);
}
inline void WriteWord(PageNumber page, std::uint64_t word) {
  reinterpret_cast<std::atomic<std::uint64_t>*>(page.address())->store(word, std::memory_order_relaxed);
}

inline Access TryRead(PageNumber page) {
  return TryAccess([page] { return ReadWord(page); });
}

inline Access TryWrite(PageNumber page, std::uint64_t word) {
  return TryAccess([page, word] {
    WriteWord(page, word);
    return word;
  });
}

inline PageNumber PageAt(PageRange range, std::size_t page) { return range.first + Pages{page}; }

}  // namespace freehold::vm::test

#endif  // FREEHOLD_TESTS_VM_PAGER_FIXTURE_H_
