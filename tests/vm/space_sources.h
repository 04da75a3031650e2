// What the mappings of a SpaceModel show that are not anonymous memory: backings of the test's own, files and pagers,
// whose pages hold a stamp each.
#ifndef FREEHOLD_TESTS_VM_SPACE_SOURCES_H_
#define FREEHOLD_TESTS_VM_SPACE_SOURCES_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "vm/backing.h"
#include "vm/os/kernel.h"
#include "vm/os/userfault.h"
#include "vm/pager.h"
#include "vm/page_range.h"

namespace freehold::vm::test {

// In the first byte of what a page of a source holds before anybody writes to it; what models write has 0 there.
inline constexpr std::uint64_t kFileStamp = std::uint64_t{'F'} << 56;

// Of these words of a page, all are written and checked.
inline constexpr std::size_t kWordsPerPage = kPageSize / sizeof(std::uint64_t);
inline constexpr std::size_t kWordStep = 73;

class Source {
 public:
  enum class Kind : std::uint8_t { kBacking, kFile, kPager };

  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;
  virtual ~Source() = default;

  Kind kind() const { return kind_; }
  // Whether an access to the page is no SIGBUS.
  virtual bool Exists(std::uint64_t page) const = 0;
  // What the page holds: of a pager, for who reads it now.
  virtual std::uint64_t StampOf(std::uint64_t page) const = 0;
  // Somebody has written to it, through a mapping that shows it.
  virtual void SetStamp(std::uint64_t page, std::uint64_t stamp) = 0;
  // "", or what it has seen go wrong.
  virtual std::string failure() const { return {}; }

 protected:
  explicit Source(Kind kind) : kind_(kind) {}

 private:
  const Kind kind_;
};

// A memory file that a Backing of the test's own maps, shared.
class FilePages final : public Backing, public Source {
 public:
  static constexpr std::uint64_t kPages = 512;

  explicit FilePages(os::Protection max_protection);
  ~FilePages() override;

  Error Install(os::Kernel& kernel, PageRange range, std::uint64_t page, os::Protection protection,
                bool occupied) override;
  void Flush(os::Kernel& kernel, PageRange range, std::uint64_t page) override;
  Error Populate(os::Kernel& kernel, PageRange range, os::Protection protection) override;

  bool Exists(std::uint64_t) const override { return true; }
  std::uint64_t StampOf(std::uint64_t page) const override { return stamps_[page]; }
  void SetStamp(std::uint64_t page, std::uint64_t stamp) override { stamps_[page] = stamp; }

 private:
  void OnUnused() override {}

  std::vector<std::uint64_t> stamps_;
  int file_;
};

// A file for AddressSpace::MapFile, that grows and shrinks.
class StampedFile final : public Source {
 public:
  static constexpr std::uint64_t kMaxPages = 96;

  enum class Place : bool { kMemory, kDisk };
  enum class Access : bool { kReadOnly, kReadWrite };  // of the descriptor that is mapped

  StampedFile(Place place, Access access);
  ~StampedFile() override;

  int descriptor() const { return mapped_; }
  bool may_write() const { return access_ == Access::kReadWrite; }
  std::uint64_t size() const { return size_; }

  // The file's own system calls. What a shared mapping wrote must be what Read finds.
  void Resize(std::uint64_t pages);
  void Write(std::uint64_t page, std::uint64_t stamp);
  bool Holds(std::uint64_t page, std::uint64_t stamp) const;

  bool Exists(std::uint64_t page) const override { return page < size_; }
  std::uint64_t StampOf(std::uint64_t page) const override { return stamps_[page]; }
  void SetStamp(std::uint64_t page, std::uint64_t stamp) override { stamps_[page] = stamp; }

 private:
  const Access access_;
  std::uint64_t size_ = 0;
  std::vector<std::uint64_t> stamps_;
  int file_ = -1;
  int mapped_ = -1;
};

// A pager whose pages that are mapped are counted from kFirst.
//
// Thread safety: thread-safe; its calls come from threads that handle faults.
class StampedPager final : public Pager, public Source {
 public:
  // One mapping, which one thread writes to; or any number, which anybody writes to.
  enum class Users : bool { kOne, kMany };
  // Where the pager's pages that are mapped begin.
  static constexpr std::uint64_t kFirst = 5;

  // Its pages hold `stamp` and their numbers.
  StampedPager(std::size_t capacity, std::uint64_t stamp, Users users);

  Result<Pages> Read(std::uint64_t page, absl::Span<std::byte> into) override;
  Error Writeback(std::uint64_t page, absl::Span<const std::byte> from) override;
  void Release(std::uint64_t page, Pages count) override;

  // Reads of the page fail, or do again what they did.
  void SetFailing(std::uint64_t page, bool fails);
  // Write-back fails.
  void SetRefusing(bool refuses);
  bool refusing() const;
  std::size_t capacity() const { return stamps_.size(); }
  // That it is mapped, by the only one who does so.
  void SetMapped() { mapped_ = true; }
  bool mapped() const { return mapped_; }
  bool released() const;

  bool Exists(std::uint64_t page) const override;
  std::uint64_t StampOf(std::uint64_t page) const override;
  void SetStamp(std::uint64_t page, std::uint64_t stamp) override;
  std::string failure() const override;

 private:
  bool IsMine(std::uint64_t page, std::size_t count) const {
    return page >= kFirst && page + count <= kFirst + stamps_.size() && count > 0;
  }
  Result<Pages> ReadNow(std::uint64_t page, std::size_t count, absl::Span<std::byte> into);
  void FailLocked(const char* what, std::uint64_t page, std::size_t count);

  const Users users_;
  bool mapped_ = false;
  std::atomic<unsigned> slow_{0};  // reads: every fourth takes longer
  mutable std::mutex mutex_;
  std::vector<std::uint64_t> stamps_;
  std::set<std::uint64_t> failing_;
  bool refusing_ = false;
  bool released_ = false;
  std::string failure_;
};

// The real one, of which calls that verbs make can be made to fail.
//
// Thread safety: thread-safe.
class FailingUserfault final : public os::Userfault {
 public:
  // The nth call of Register, or of WriteProtect that protects, fails from now on; 0: none does.
  void FailNth(std::size_t nth, int sys_errno);
  std::size_t failures() const { return failures_.load(std::memory_order_relaxed); }

  Error Open() override { return real_.Open(); }
  os::UserfaultAbilities abilities() const override { return real_.abilities(); }
  Error Register(PageRange range, os::WriteTracking tracking) override;
  bool Wait(os::FaultEvent& event) override { return real_.Wait(event); }
  void Stop() override { real_.Stop(); }
  Result<Pages> Copy(PageRange range, const std::byte* from, os::WriteTracking tracking) override {
    return real_.Copy(range, from, tracking);
  }
  Error WriteProtect(PageRange range, bool protect) override;
  Error Poison(PageNumber page) override { return real_.Poison(page); }
  Error Wake(PageRange range) override { return real_.Wake(range); }

 private:
  bool Strikes();

  os::LinuxUserfault real_;
  std::atomic<std::size_t> remaining_{0};
  std::atomic<std::size_t> failures_{0};
  std::atomic<int> errno_{0};
};

}  // namespace freehold::vm::test

#endif  // FREEHOLD_TESTS_VM_SPACE_SOURCES_H_
