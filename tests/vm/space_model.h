// A naive map of pages beside an AddressSpace: what the operations of space_operations.h are checked against.
//
// A model either has the space to itself, and then knows all of it, on a FakeKernel whose calls can be made to fail;
// or it is one of several, each used by a thread of its own. Then it knows the pages that it mapped, which nobody else
// touches, and what is beside them may be anybody's. In the arenas (SharedPages) all of them work on the same pages.
#ifndef FREEHOLD_TESTS_VM_SPACE_MODEL_H_
#define FREEHOLD_TESTS_VM_SPACE_MODEL_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "vm/address_space.h"
#include "vm/backing.h"
#include "vm/notifier.h"
#include "vm/os/fake_kernel.h"
#include "vm/pin.h"

namespace freehold::vm::test {

// In the first byte of what a page of a file holds before anybody writes to it; what models write has 0 there.
inline constexpr std::uint64_t kFileStamp = std::uint64_t{'F'} << 56;

// A memory file, mapped shared. What its pages hold is known: a stamp each.
class FilePages final : public Backing {
 public:
  static constexpr std::uint64_t kPages = 512;

  explicit FilePages(os::Protection max_protection);
  ~FilePages();

  Error Install(os::Kernel& kernel, PageRange range, std::uint64_t page, os::Protection protection,
                bool occupied) override;
  void Flush(os::Kernel& kernel, PageRange range, std::uint64_t page) override;

  std::vector<std::uint64_t> stamps;

 private:
  void OnUnused() override {}

  int file_;
};

// Pages that every model works on at once, without knowing what is there.
struct SharedPages {
  std::vector<PageRange> mapped;  // always mapped, but how changes: lookups never miss
  std::vector<PageRange> open;    // come and go
  FilePages* file = nullptr;      // for `mapped`

  // Whether any of `range` is in `open`.
  bool IsOpen(PageRange range) const;
};

// Hears of everything that happens in a space, and checks that it is told in order.
class Listener final : public Notifier {
 public:
  // `mapped`: what is mapped now; null: unknown, since others map too.
  Listener(AddressSpace& space, const std::set<std::size_t>* mapped);

  void OnMap(PageRange range) override;
  void OnInvalidate(PageRange range, Invalidation what) override;
  void OnClose(PageRange range) override;

  std::string failure() const;  // "" if there was none
  bool Knows(std::size_t page) const;
  std::set<std::size_t> pages() const;

 private:
  void Expect(bool condition, const char* what, PageRange range);

  AddressSpace& space_;
  const bool alone_;
  mutable std::mutex mutex_;
  std::set<std::size_t> pages_;  // mapped, or unmapped and pinned
  std::string failure_;
  NotifierRegistration registration_;  // the last: from here on it is called
};

class SpaceModel {
 public:
  struct Page {
    os::Protection protection = os::Protection::kReadWrite;
    os::MemoryLock lock = os::MemoryLock::kNone;
    std::uint64_t generation = 0;
    FilePages* file = nullptr;  // null: anonymous
    std::uint64_t file_page = 0;
    bool known = true;          // whether it must hold `stamp`; anonymous memory only
    std::uint64_t stamp = 0;
  };
  using Pages = std::map<std::size_t, Page>;  // by page number

  static constexpr std::size_t kFiles = 2;        // of a model: read-write, read-only
  static constexpr std::size_t kMaxPages = 1000;  // more are not mapped
  static constexpr std::size_t kWindowPages = 512;

  // Alone on `space`, whose kernel is `kernel`.
  SpaceModel(AddressSpace& space, os::FakeKernel& kernel);
  // One of several; `owner`, from 1 on, is in everything it writes.
  SpaceModel(AddressSpace& space, const SharedPages& shared, unsigned owner);

  // ---- The space ----
  AddressSpace& space() { return space_; }
  os::FakeKernel* fake_kernel() { return kernel_; }
  bool alone() const { return shared_ == nullptr; }
  const SharedPages* shared() const { return shared_; }
  // Where operations at fixed addresses go: at the start of each zone, and over the border of two regions.
  const std::vector<PageRange>& windows() const { return windows_; }
  PageRange RegionOf(PageNumber page) const;
  bool InOneRegion(PageRange range) const { return RegionOf(range.first).Contains(range); }

  // ---- What should be ----
  Pages& pages() { return pages_; }
  Page* Find(PageNumber page);
  bool IsMapped(PageRange range);  // all of it
  bool IsFree(PageRange range);    // none of it is ours
  // The VMA that holds `page`, which is mapped: pages that differ in nothing but content.
  PageRange VmaOf(PageNumber page);
  // Unmaps: what is pinned lives on.
  void Erase(PageRange range);
  void Put(PageNumber page, const Page& mapped);
  // The anonymous pages of `range` that are mapped hold zeroes, or nothing known.
  void SetZero(PageRange range);
  void SetUnknown(PageRange range);
  void Write(PageRange range);  // to what may be written
  FilePages& file(std::size_t index) { return *files_[index]; }
  os::MemoryLock future_lock = os::MemoryLock::kNone;
  // Whether that many more pages may be mapped.
  bool HasRoomFor(std::size_t count) const { return pages_.size() + count <= kMaxPages; }
  // A generation that no mapping had before.
  bool IsNew(std::uint64_t generation) { return generations_.insert(generation).second; }

  // ---- Pins ----
  static constexpr std::size_t kPins = 4;
  // Null takes the pin away.
  void SetPin(std::size_t index, std::unique_ptr<Pin> pin);
  // Whether something in `range` may not be replaced. kMaybe: it was unmapped together with something pinned, or its
  // kernel did not let it go.
  enum class Pinned : std::uint8_t { kNo, kMaybe, kYes };
  Pinned PinnedIn(PageRange range) const;
  void ForgetDeferred();  // a Tick has tried again
  // What the kernel did not drop of `range`, which is unmapped, a Tick drops.
  void MayBeDeferred(PageRange range);

  // ---- Notifiers ----
  void Listen(bool on);

  // ---- Failures ----
  void Arm(std::size_t nth_call, int sys_errno);
  bool had_failures() const { return had_failures_; }
  // Calls `verb`. If a failure is armed and strikes, the space must be as it was, once `tolerate` has changed the
  // model by what the verb is allowed to leave behind, and the verb is called again.
  Error Call(const std::function<Error()>& verb, const std::function<void()>& tolerate = nullptr);

  // ---- Verdicts ----
  void Fail(const std::string& what);  // the first counts
  bool ok() const { return failure_.empty(); }
  const std::string& failure() const { return failure_; }
  bool Expect(bool condition, const std::string& what);
  bool Expect(const char* verb, Error got, Error want);
  bool Expect(const char* verb, Error got, ErrorCode want);

  // kAttributes: VMA by VMA. kContent: page by page, the kernel's side and the space's own invariants too.
  enum class Depth : std::uint8_t { kAttributes, kContent };
  // Everything that this model knows.
  void CheckInvariants(Depth depth);
  void CheckPage(PageNumber number, const Page& page, Depth depth);
  void CheckContent(PageNumber number, const Page& page);
  // Unmaps everything; alone, checks that nothing old shows in memory that is mapped again.
  void Finish();

 private:
  static bool Continues(std::size_t number, const Page& page, std::size_t next_number, const Page& next);
  void CheckAttributes(const VmaInfo& vma, PageNumber number, const Page& page);
  void CheckVmas();
  void CheckListener();
  void CheckKernel();
  void MakeWindows();

  AddressSpace& space_;
  os::FakeKernel* const kernel_;
  const SharedPages* const shared_;
  const std::uint64_t owner_;
  std::vector<PageRange> windows_;
  PageRange all_;
  std::size_t region_pages_ = 0;
  Pages pages_;
  std::vector<std::unique_ptr<FilePages>> files_;
  std::array<std::unique_ptr<Pin>, kPins> pins_;
  Pages deferred_;                         // unmapped and pinned: must keep content
  std::set<std::size_t> perhaps_deferred_;  // see Pinned::kMaybe
  std::set<std::uint64_t> generations_;
  std::unique_ptr<Listener> listener_;
  std::uint64_t last_stamp_ = 0;
  std::size_t armed_call_ = 0;
  int armed_errno_ = 0;
  bool had_failures_ = false;
  bool kernel_may_differ_ = false;
  std::string failure_;
};

std::string Hex(PageRange range);
inline bool Readable(os::Protection p) { return (static_cast<unsigned>(p) & 1) != 0; }
inline bool Writable(os::Protection p) { return (static_cast<unsigned>(p) & 2) != 0; }
// Whether locks are refused here, for want of privilege or by a limit.
inline bool IsLockLimit(Error error) { return error == Error::System(ENOMEM) || error == Error::System(EPERM); }

}  // namespace freehold::vm::test

#endif  // FREEHOLD_TESTS_VM_SPACE_MODEL_H_
