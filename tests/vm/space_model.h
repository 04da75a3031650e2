// A naive map of pages beside an AddressSpace: what the operations of space_operations.h are checked against.
//
// A model either has the space to itself, and then knows all of it, on a FakeKernel whose calls can be made to fail;
// or it is one of several, each used by a thread of its own. Then it knows the pages that it mapped, which nobody else
// touches, and what is beside them may be anybody's. In the arenas (SharedPages) all of them work on the same pages.
//
// A page is anonymous or shows a Source (space_sources.h). Its content is its own (anonymous memory, a pager's page,
// a copy in a private file mapping) or what the source holds. What would be a SIGBUS is never touched: pages beyond
// the end of a file, and those that a pager was told to fail; the kernel is asked to touch them instead (Probe).
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

#include "tests/vm/space_sources.h"
#include "vm/address_space.h"
#include "vm/backing.h"
#include "vm/fault.h"
#include "vm/notifier.h"
#include "vm/os/fake_kernel.h"
#include "vm/pin.h"

namespace freehold::vm::test {

// Pages that every model works on at once, without knowing what is there.
struct SharedPages {
  std::vector<PageRange> mapped;  // always mapped, but how changes: lookups never miss
  std::vector<PageRange> open;    // come and go
  FilePages* backing = nullptr;   // for `mapped`
  StampedFile* file = nullptr;    // for all, and for the models' own pages: it never changes
  StampedPager* pager = nullptr;  // for pages of the mapping zone
  FaultService* faults = nullptr;

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
  // Whether it was told of `page` that this would happen, since it was last mapped or ForgetAnnounced was called.
  bool WasAnnounced(std::size_t page, Invalidation what) const;
  void ForgetAnnounced();
  std::set<std::size_t> pages() const;

 private:
  void Expect(bool condition, const char* what, PageRange range);

  AddressSpace& space_;
  const bool alone_;
  mutable std::mutex mutex_;
  std::set<std::size_t> pages_;  // mapped, or unmapped and pinned
  std::map<std::size_t, unsigned> announced_;  // bits of Invalidation
  std::string failure_;
  NotifierRegistration registration_;  // the last: from here on it is called
};

class SpaceModel {
 public:
  // Of a private file mapping's page: whether it is a copy by now. Who populates a mapping may make copies, and nobody
  // says how far that went.
  enum class Copied : std::uint8_t { kNo, kPerhaps, kYes };
  struct Page {
    os::Protection protection = os::Protection::kReadWrite;
    os::MemoryLock lock = os::MemoryLock::kNone;
    std::uint64_t generation = 0;
    Source* source = nullptr;  // null: anonymous
    std::uint64_t source_page = 0;
    Backing* backing = nullptr;  // what lookups say
    os::Protection max_protection = os::Protection::kReadWriteExec;
    os::Sharing sharing = os::Sharing::kShared;
    Copied copied = Copied::kNo;
    bool known = true;  // whether it must hold `stamp`, if the content is its own
    std::uint64_t stamp = 0;
    bool lost = false;  // see SetLost

    bool anonymous() const { return source == nullptr; }
    bool Is(Source::Kind kind) const { return source != nullptr && source->kind() == kind; }
    bool Allows(os::Protection wanted) const {
      return (static_cast<unsigned>(wanted) & ~static_cast<unsigned>(max_protection)) == 0;
    }
    // Whether it is there to be touched: else that is a SIGBUS.
    bool Exists() const { return !lost && (source == nullptr || source->Exists(source_page)); }
    bool IsPrivate() const { return Is(Source::Kind::kFile) && sharing == os::Sharing::kPrivate; }
    bool MayHold(std::uint64_t word) const;
  };
  using Pages = std::map<std::size_t, Page>;  // by page number

  static constexpr std::size_t kBackings = 2;     // of a model: read-write, read-only
  static constexpr std::size_t kFiles = 3;        // opened for both, for reading, in memory; on disk, or all models'
  static constexpr std::size_t kMaxPages = 1000;  // more are not mapped
  static constexpr std::size_t kWindowPages = 512;

  // Alone on `space`, whose kernel is `kernel`.
  SpaceModel(AddressSpace& space, os::FakeKernel& kernel);
  // One of several; `owner`, from 1 on, is in everything it writes.
  SpaceModel(AddressSpace& space, const SharedPages& shared, unsigned owner);
  // What Finish did not come to, of one of several; one alone leaves it to whoever has the space.
  ~SpaceModel();

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
  std::uint64_t NewStamp() { return owner_ << 48 | ++last_stamp_; }
  // What is theirs has gone from the mapped pages of `range`, or may have.
  void SetDropped(PageRange range);
  void SetUnknown(PageRange range);
  // The pages of `range` were made present, or may have been.
  void SetPopulated(PageRange range, bool all);
  // What a refused replacement may have taken away: content, and of files what shows them. Of the latter nothing is
  // checked until UnmapLost unmaps them.
  void SetLost(PageRange range);
  void UnmapLost(PageRange range);
  void Write(PageRange range);  // to what may be written
  FilePages& backing(std::size_t index) { return *backings_[index]; }
  StampedFile& file(std::size_t index);
  bool IsShared(const StampedFile& file) const { return shared_ != nullptr && &file == shared_->file; }
  // Whether the last part of a mapping of `backing` can be made longer in place: a file's of which nothing was a copy
  // or locked. kMaybe: it may have been.
  enum class Extends : std::uint8_t { kYes, kMaybe, kNo };
  Extends ExtendsInPlace(const Page& page) const;
  void StartMapping(Backing* backing, bool extends);
  // What was done, or tried, to the file mappings in `range`: they were locked, or made writable.
  void NoteLocked(PageRange range, bool done);
  void NoteWritable(PageRange range, bool done);
  void ResizeFile(StampedFile& file, std::uint64_t pages);
  void WriteFile(StampedFile& file, std::uint64_t page);

  // ---- Pagers ----
  // Null where this process may not use userfaultfd.
  FaultService* faults();
  // One more, for a mapping that may have `capacity` pages.
  StampedPager& NewPager(std::size_t capacity);
  // The pages of `range` show what their pagers have, or may show it.
  void SetInvalidated(PageRange range, bool all);
  // The pager has what was written to the page.
  void CheckWrittenBack(PageNumber number, const Page& page);

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
  // A verb begins that changes protection or content; and the listener was told so of `range`, which is mapped.
  void BeginAnnouncements();
  void ExpectAnnounced(PageRange range, Invalidation what);

  // ---- Failures ----
  // The nth call of the kernel, or of userfaultfd, that the next verb makes fails. Nothing but alone.
  enum class Failing : bool { kKernel, kUserfault };
  void Arm(std::size_t nth_call, int sys_errno, Failing what = Failing::kKernel);
  bool had_failures() const { return had_failures_; }
  // Whether a failure may have left the kernel with another protection or lock in `range`.
  bool KernelMayDiffer(PageRange range) const;
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
  static std::string Expected(const Page& page);
  void CheckAttributes(const VmaInfo& vma, PageNumber number, const Page& page);
  void CheckVmas();
  void CheckListener();
  std::size_t InjectedFailures() const;
  bool KernelDiffers(PageNumber number, const Page& page) const;
  void CheckKernel();
  void CheckReleased();
  void MakeWindows();

  AddressSpace& space_;
  os::FakeKernel* const kernel_;
  const SharedPages* const shared_;
  const std::uint64_t owner_;
  std::vector<PageRange> windows_;
  PageRange all_;
  std::size_t region_pages_ = 0;
  Pages pages_;
  std::vector<std::unique_ptr<FilePages>> backings_;
  std::array<std::unique_ptr<StampedFile>, kFiles> files_;
  std::map<const Backing*, Extends> extends_;
  std::vector<std::unique_ptr<StampedPager>> pagers_;
  std::unique_ptr<FailingUserfault> userfault_;
  std::unique_ptr<FaultService> own_faults_;
  FaultService* faults_ = nullptr;
  std::array<std::unique_ptr<Pin>, kPins> pins_;
  Pages deferred_;                         // unmapped and pinned: must keep content
  std::set<std::size_t> perhaps_deferred_;  // see Pinned::kMaybe
  std::set<std::uint64_t> generations_;
  std::unique_ptr<Listener> listener_;
  std::uint64_t last_stamp_ = 0;
  std::size_t armed_call_ = 0;
  int armed_errno_ = 0;
  Failing armed_ = Failing::kKernel;
  bool had_failures_ = false;
  // A verb that has done its work was refused a call: perhaps the way back to what the kernel had before. Where that
  // has left another protection or lock, it stays until the page is mapped anew.
  bool look_for_differences_ = false;
  std::set<std::size_t> kernel_differs_;
  std::string failure_;
};

std::string Hex(PageRange range);
inline bool Readable(os::Protection p) { return (static_cast<unsigned>(p) & 1) != 0; }
inline bool Writable(os::Protection p) { return (static_cast<unsigned>(p) & 2) != 0; }
// Whether locks are refused here, for want of privilege or by a limit.
inline bool IsLockLimit(Error error) { return error == Error::System(ENOMEM) || error == Error::System(EPERM); }

}  // namespace freehold::vm::test

#endif  // FREEHOLD_TESTS_VM_SPACE_MODEL_H_
