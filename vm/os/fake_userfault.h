// A Userfault for tests, without userfaultfd(2): the test raises faults and sees what becomes of them, and calls can
// be made to fail. Content is real: Copy writes into the memory of the range.
#ifndef FREEHOLD_VM_OS_FAKE_USERFAULT_H_
#define FREEHOLD_VM_OS_FAKE_USERFAULT_H_

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>

#include "vm/os/userfault.h"

namespace freehold::vm::os {

// Stops the program on: a call before Open; Copy or WriteProtect with tracking of a range registered without.
//
// Thread safety: thread-safe.
// Allocation:    from malloc.
class FakeUserfault final : public Userfault {
 public:
  enum class Operation : std::uint8_t { kOpen, kRegister, kCopy, kWriteProtect, kPoison, kWake };
  static constexpr std::size_t kOperations = 6;

  // What became of a page.
  enum class PageStatus : std::uint8_t { kUnregistered, kMissing, kProtected, kWritable, kPoisoned };

  explicit FakeUserfault(UserfaultAbilities abilities = LinuxUserfault::kAllAbilities) : abilities_(abilities) {}

  Error Open() override;
  UserfaultAbilities abilities() const override { return abilities_; }
  Error Register(PageRange range, WriteTracking tracking) override;
  bool Wait(FaultEvent& event) override;
  void Stop() override;
  Result<Pages> Copy(PageRange range, const std::byte* from, WriteTracking tracking) override;
  Error WriteProtect(PageRange range, bool protect) override;
  Error Poison(PageNumber page) override;
  Error Wake(PageRange range) override;

  // A thread faults; it sleeps until something wakes it.
  void Raise(FaultEvent event);
  // Waits until the next Wake, Copy, Poison or WriteProtect has woken the thread that sleeps because of `page`; false
  // after ten seconds.
  bool AwaitWoken(PageNumber page);
  // What the kernel does when memory is unmapped, and when content is dropped.
  void Forget(PageRange range);
  void Drop(PageRange range);

  PageStatus At(PageNumber page) const;
  std::size_t CallCount(Operation operation) const;
  // Of the calls of `operation`, the next `after` do what they should, then `times` fail with `error` and
  // change nothing.
  void FailNext(Operation operation, std::size_t times, Error error, std::size_t after = 0);

 private:
  struct PageState {
    WriteTracking tracking;
    PageStatus status;
  };

  // The error that this call must return, if any.
  Error CountLocked(Operation operation);
  void WakeLocked(PageRange range);

  const UserfaultAbilities abilities_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
  bool stopped_ = false;
  std::deque<FaultEvent> events_;
  std::map<std::size_t, PageState> pages_;       // registered ones
  std::map<std::size_t, std::size_t> sleepers_;  // threads by page
  std::array<std::size_t, kOperations> calls_ = {};
  std::array<std::size_t, kOperations> successes_ = {};  // still to come before these:
  std::array<std::size_t, kOperations> failures_ = {};   // still to come
  std::array<Error, kOperations> errors_ = {};
};

}  // namespace freehold::vm::os

#endif  // FREEHOLD_VM_OS_FAKE_USERFAULT_H_
