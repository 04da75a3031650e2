// Every kernel call of every verb fails once, and then all of a kind fail. Either the verb reports it and left
// the space as it was, or the failure was harmless; the same verb then succeeds.
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/address_space.h"
#include "vm/os/fake_kernel.h"

namespace freehold::vm {
namespace {

using namespace test;  // NOLINT: the fixture's words
using os::FakeKernel;
using os::Protection;

// Verbs tell no errnos apart, so each call fails with one of them; it has to be passed on.
int ErrnoOf(std::size_t call) {
  constexpr int kErrnos[] = {ENOMEM, EINVAL, EAGAIN};
  return kErrnos[call % 3];
}

// Content comes and goes by pages: the start of each tells. The sanitizers take long to look at all of it.
constexpr std::size_t kHeadBytes = 64;

std::string Heads(PageRange range) {
  std::string heads;
  for (PageNumber page = range.first; page < range.end; page = page + Pages{1}) {
    heads.append(reinterpret_cast<const char*>(page.address()), kHeadBytes);
  }
  return heads;
}

bool HeadsAreZero(PageRange range) { return Heads(range).find_first_not_of('\0') == std::string::npos; }

void FillHeads(PageRange range, int value) {
  for (PageNumber page = range.first; page < range.end; page = page + Pages{1}) {
    std::memset(page.address(), value, kHeadBytes);
  }
}

bool Readable(Protection protection) { return protection != Protection::kNone && protection != Protection::kExec; }

// All that a user of the space can see.
struct Snapshot {
  struct Mapping {
    VmaInfo vma;
    std::string content;
  };
  std::vector<Mapping> mappings;
  Bytes mapped;
  std::uint64_t vmas = 0;

  static Snapshot Of(const AddressSpace& space) {
    Snapshot snapshot;
    for (const VmaInfo& vma : Vmas(space)) {
      snapshot.mappings.push_back({vma, Readable(vma.protection) ? Heads(vma.range) : std::string()});
    }
    snapshot.mapped = space.Stats().mapped;
    snapshot.vmas = space.Stats().vmas;
    return snapshot;
  }
};

enum class Compare { kAll, kNotContent };

void ExpectSame(const Snapshot& before, const Snapshot& after, Compare compare = Compare::kAll) {
  EXPECT_EQ(after.mapped, before.mapped);
  EXPECT_EQ(after.vmas, before.vmas);
  ASSERT_EQ(after.mappings.size(), before.mappings.size());
  for (std::size_t i = 0; i < before.mappings.size(); ++i) {
    const VmaInfo& a = after.mappings[i].vma;
    const VmaInfo& b = before.mappings[i].vma;
    SCOPED_TRACE("VMA " + std::to_string(i) + " " + testing::PrintToString(b.range));
    EXPECT_EQ(a.range, b.range);
    EXPECT_EQ(a.protection, b.protection);
    EXPECT_EQ(a.lock, b.lock);
    EXPECT_EQ(a.zone, b.zone);
    EXPECT_EQ(a.generation, b.generation);
    if (compare == Compare::kAll) {
      EXPECT_TRUE(after.mappings[i].content == before.mappings[i].content) << "content changed";
    }
  }
}

// A space of 16 MiB (four regions of 4 MiB) on a kernel of its own, with a scene of mappings in each zone:
//
//   plain, from page 0   AAAAAAAA BBBB....cccc DDDD cached (dirty) EEEEEEEE
//   mapping zone         a: read-only, b: no access, c: read-write-exec
class Scene {
 public:
  explicit Scene(AddressSpaceOptions options) {
    options.reserve = MiB(16);
    const Result<AddressSpace*> created = AddressSpace::Create(kernel, options);
    if (!created.ok()) throw std::runtime_error("Create");
    space_ = *created;
    MustMapAt(*space_, P(0, 8));
    MustMapAt(*space_, P(8, 4));
    MustMapAt(*space_, P(16, 4));
    MustMapAt(*space_, P(20, 4));
    MustMapAt(*space_, P(24, 8));
    MustMapAt(*space_, P(32, 8));
    MustMapAt(*space_, P(100, 90));
    for (const PageRange range : {P(0, 12), P(16, 24), P(100, 90)}) FillHeads(range, 0xaa);
    if (!space_->Protect(P(16, 4), Protection::kRead).ok()) throw std::runtime_error("Protect");
    if (!space_->Unmap(P(24, 8)).ok()) throw std::runtime_error("Unmap");
    MustMapAt(*space_, M(0, 4), Protection::kRead);
    MustMapAt(*space_, M(4, 4), Protection::kNone);
    MustMapAt(*space_, M(8, 8), Protection::kReadWriteExec);
    FillHeads(M(8, 8), 0xaa);
    kernel.ClearCalls();
  }
  ~Scene() { AddressSpace::Destroy(space_); }
  Scene(const Scene&) = delete;
  Scene& operator=(const Scene&) = delete;

  AddressSpace* operator->() const { return space_; }
  AddressSpace& space() const { return *space_; }
  // Pages of the first plain region, of the mapping zone.
  PageRange P(std::size_t first, std::size_t count) const { return Part(space_->reservation(), first, count); }
  PageRange M(std::size_t first, std::size_t count) const {
    return Part(ZoneRange(*space_, Zone::kMapping), first, count);
  }

  // Each mapped page has the protection and the lock that its VMA says, in the kernel too.
  void CheckProtections() const {
    for (const VmaInfo& vma : Vmas(*space_)) {
      for (PageNumber page = vma.range.first; page < vma.range.end; page = page + Pages{1}) {
        ASSERT_EQ(kernel.At(page).protection, vma.protection)
            << "page " << (page - space_->reservation().first).value;
        ASSERT_EQ(kernel.At(page).locked, vma.lock != os::MemoryLock::kNone)
            << "page " << (page - space_->reservation().first).value;
      }
    }
  }

  // Nothing old shows in what is mapped from here on: all pages that the scene and the verbs used are given
  // out again.
  void CheckFreeMemory() {
    ASSERT_TRUE(space_->Unmap(space_->reservation()).ok());
    (void)space_->Purge(PurgeScope::kAll);
    ASSERT_EQ(kernel.LockedPages(), Pages{0});
    // Nothing writes into the dense zone.
    for (const PageRange used : {P(0, 40), P(40, 160), M(0, 40)}) {
      MustMapAt(*space_, used, used == M(0, 40) ? Protection::kReadWriteExec : Protection::kReadWrite);
      ASSERT_TRUE(HeadsAreZero(used)) << testing::PrintToString(used);
    }
    FillHeads(P(0, 40), 0xbb);
    FillHeads(M(0, 40), 0xbb);
    space_->CheckInvariants();
  }

  FakeKernel kernel;

 private:
  AddressSpace* space_;
};

struct Verb {
  const char* name;
  std::function<Error(Scene&)> perform;
  // Prepares what the scene lacks; may be null.
  std::function<void(Scene&)> prepare = nullptr;
  // A failed discard may have dropped content.
  Compare compare = Compare::kAll;
  // Where not even the way back can unmap, a target that was mapped stays.
  bool needs_unmap = false;
};

Error MapIn(Scene& scene, std::size_t pages, const MapOptions& options) {
  const Result<PageRange> range = scene->Map({pages}, options);
  if (!range.ok()) return range.error();
  EXPECT_EQ(Draw(scene.space(), *range).find('.'), std::string::npos);
  const bool zeroed = options.content == Content::kZeroed && Readable(options.protection);
  EXPECT_TRUE(!zeroed || HeadsAreZero(*range));
  return Error::Ok();
}

Error MapInAt(Scene& scene, PageRange range, Placement placement, Protection protection = Protection::kReadWrite) {
  return MapIn(scene, range.count().value, At(range.first, placement, protection));
}

// Part of the heap, of both protections, and of the mapping zone is locked.
void LockSome(Scene& scene) {
  for (const PageRange range : {scene.P(2, 4), scene.P(18, 4), scene.P(110, 10), scene.M(2, 8)}) {
    ASSERT_EQ(scene->LockMemory(range, os::MemoryLock::kOnFault), Error::Ok());
  }
}

std::vector<Verb> Verbs() {
  return {
      // ---- Map ----
      {"map anywhere, cached and dirty", [](Scene& s) { return MapIn(s, 8, {}); }},
      {"map anywhere, clean", [](Scene& s) { return MapIn(s, 40, {}); }},
      {"map anywhere, first of its region",
       [](Scene& s) { return MapIn(s, 512, {.huge_pages = os::HugePages::kPrefer}); }},
      {"map anywhere, populated", [](Scene& s) { return MapIn(s, 20, {.populate = true}); }},
      {"map anywhere, dense and populated", [](Scene& s) { return MapIn(s, 512, {.populate = true}); }},
      {"map anywhere, aligned", [](Scene& s) { return MapIn(s, 8, {.alignment = {128}}); }},
      {"map read-only", [](Scene& s) { return MapIn(s, 6, {.protection = Protection::kRead}); }},
      {"map without access", [](Scene& s) { return MapIn(s, 6, {.protection = Protection::kNone}); }},
      {"map read-write-exec", [](Scene& s) { return MapIn(s, 6, {.protection = Protection::kReadWriteExec}); }},
      {"map when room is short",
       [](Scene& s) { return MapIn(s, s->reservation().count().value / 4, {}); },
       [](Scene& s) {
         // Both plain regions in cached extents of odd sizes.
         ASSERT_TRUE(s->Unmap(Part(s->reservation(), 0, s->reservation().count().value / 2)).ok());
         for (std::size_t i = 0; s->Map({i % 7 + 1}).ok();) ++i;
         ASSERT_TRUE(s->Unmap(Part(s->reservation(), 0, s->reservation().count().value / 2)).ok());
       }},
      {"map fixed, fresh", [](Scene& s) { return MapInAt(s, s.P(50, 10), Placement::kFixed); }},
      {"map fixed, over a cached extent", [](Scene& s) { return MapInAt(s, s.P(24, 8), Placement::kFixed); }},
      {"map fixed, over part of a cached extent", [](Scene& s) { return MapInAt(s, s.P(26, 3), Placement::kFixed); }},
      {"map fixed, read-only in the heap",
       [](Scene& s) { return MapInAt(s, s.P(25, 3), Placement::kFixed, Protection::kRead); }},
      {"map fixed, first of its region",
       [](Scene& s) { return MapInAt(s, Part(ZoneRange(s.space(), Zone::kDense), 5, 10), Placement::kFixed); }},
      {"map fixed, in the mapping zone",
       [](Scene& s) { return MapInAt(s, s.M(30, 4), Placement::kFixed, Protection::kRead); }},
      {"map fixed, read-write in the mapping zone",
       [](Scene& s) { return MapInAt(s, s.M(30, 4), Placement::kFixed); }},
      {"replace the middle of one", [](Scene& s) { return MapInAt(s, s.P(2, 4), Placement::kReplace); }},
      {"replace mappings, holes and cached", [](Scene& s) { return MapInAt(s, s.P(4, 32), Placement::kReplace); }},
      {"replace by read-only", [](Scene& s) { return MapInAt(s, s.P(4, 32), Placement::kReplace, Protection::kRead); }},
      {"replace by no access", [](Scene& s) { return MapInAt(s, s.P(4, 32), Placement::kReplace, Protection::kNone); }},
      {"replace much", [](Scene& s) { return MapInAt(s, s.P(110, 70), Placement::kReplace); }},
      {"replace in the mapping zone",
       [](Scene& s) { return MapInAt(s, s.M(2, 10), Placement::kReplace, Protection::kReadExec); }},
      {"replace by read-write in the mapping zone",
       [](Scene& s) { return MapInAt(s, s.M(2, 10), Placement::kReplace); }},
      {"replace by no access in the mapping zone",
       [](Scene& s) { return MapInAt(s, s.M(2, 10), Placement::kReplace, Protection::kNone); }},
      {"replace without zeroing",
       [](Scene& s) {
         MapOptions options = At(s.P(4, 1).first, Placement::kReplace);
         options.content = Content::kAnything;
         return MapIn(s, 32, options);
       }},
      // ---- Unmap ----
      {"unmap one", [](Scene& s) { return s->Unmap(s.P(0, 8)); }},
      {"unmap the middle", [](Scene& s) { return s->Unmap(s.P(2, 3)); }},
      {"unmap mappings and holes", [](Scene& s) { return s->Unmap(s.P(5, 31)); }},
      {"unmap a protected one", [](Scene& s) { return s->Unmap(s.P(16, 4)); }},
      {"unmap part of a protected one", [](Scene& s) { return s->Unmap(s.P(17, 2)); }},
      {"unmap in the mapping zone", [](Scene& s) { return s->Unmap(s.M(8, 8)); }},
      {"unmap part in the mapping zone", [](Scene& s) { return s->Unmap(s.M(10, 2)); }},
      {"unmap no access in the mapping zone", [](Scene& s) { return s->Unmap(s.M(5, 2)); }},
      {"unmap several in the mapping zone", [](Scene& s) { return s->Unmap(s.M(2, 8)); }},
      // ---- Protect ----
      {"protect one", [](Scene& s) { return s->Protect(s.P(0, 8), Protection::kRead); }},
      {"protect the middle", [](Scene& s) { return s->Protect(s.P(3, 2), Protection::kNone); }},
      {"protect several", [](Scene& s) { return s->Protect(s.P(5, 6), Protection::kReadExec); }},
      {"protect back", [](Scene& s) { return s->Protect(s.P(16, 4), Protection::kReadWrite); }},
      {"protect some alike and some not", [](Scene& s) { return s->Protect(s.P(17, 5), Protection::kRead); }},
      {"protect in the mapping zone", [](Scene& s) { return s->Protect(s.M(2, 10), Protection::kRead); }},
      {"protect by no access in the mapping zone", [](Scene& s) { return s->Protect(s.M(2, 10), Protection::kNone); }},
      // ---- The rest ----
      {"populate", [](Scene& s) { return s->Populate(s.P(100, 90)).error(); }},
      {"discard one",
       [](Scene& s) {
         const PageRange range = s.P(2, 4);
         return s->Discard({&range, 1});
       },
       nullptr, Compare::kNotContent},
      {"discard several",
       [](Scene& s) {
         const PageRange ranges[] = {s.P(2, 4), s.P(8, 2), s.P(110, 50)};
         return s->Discard(ranges);
       },
       nullptr, Compare::kNotContent},
      // ---- Locked memory ----
      {"lock one", [](Scene& s) { return s->LockMemory(s.P(0, 8)); }},
      {"lock parts of several", [](Scene& s) { return s->LockMemory(s.P(5, 6), os::MemoryLock::kOnFault); }},
      {"lock some alike and some not", [](Scene& s) { return s->LockMemory(s.P(0, 12)); }, LockSome},
      {"lock in the mapping zone", [](Scene& s) { return s->LockMemory(s.M(2, 10)); }},
      {"unlock the middle", [](Scene& s) { return s->UnlockMemory(s.P(3, 2)); }, LockSome},
      {"unlock in the mapping zone", [](Scene& s) { return s->UnlockMemory(s.M(0, 8)); }, LockSome},
      {"map locked", [](Scene& s) { return MapIn(s, 8, {.lock = os::MemoryLock::kLocked}); }},
      {"map locked, clean", [](Scene& s) { return MapIn(s, 40, {.lock = os::MemoryLock::kOnFault}); }},
      {"map read-only and locked",
       [](Scene& s) {
         return MapIn(s, 6, {.protection = Protection::kRead, .lock = os::MemoryLock::kOnFault});
       }},
      {"map without access and locked",
       [](Scene& s) {
         return MapIn(s, 6, {.protection = Protection::kNone, .lock = os::MemoryLock::kLocked});
       }},
      {"map fixed and locked",
       [](Scene& s) {
         MapOptions options = At(s.P(24, 1).first);
         options.lock = os::MemoryLock::kLocked;
         return MapIn(s, 6, options);
       }},
      {"replace locked ones", [](Scene& s) { return MapInAt(s, s.P(0, 24), Placement::kReplace); }, LockSome},
      {"replace locked ones by locked",
       [](Scene& s) {
         MapOptions options = At(s.P(0, 1).first, Placement::kReplace, Protection::kRead);
         options.lock = os::MemoryLock::kLocked;
         return MapIn(s, 24, options);
       },
       LockSome},
      {"replace locked ones in the mapping zone",
       [](Scene& s) { return MapInAt(s, s.M(0, 12), Placement::kReplace, Protection::kRead); }, LockSome},
      {"protect locked ones", [](Scene& s) { return s->Protect(s.P(0, 8), Protection::kRead); }, LockSome},
      {"unmap locked ones", [](Scene& s) { return s->Unmap(s.P(0, 40)); }, LockSome},
      {"unmap part of a locked one", [](Scene& s) { return s->Unmap(s.P(3, 1)); }, LockSome},
      {"unmap locked ones in the mapping zone", [](Scene& s) { return s->Unmap(s.M(0, 8)); }, LockSome},
      // ---- Remap ----
      {"remap: shrink", [](Scene& s) { return s->Remap(s.P(0, 8), {3}).error(); }},
      {"remap: grow into a cached extent",
       [](Scene& s) { return s->Remap(s.P(20, 4), {10}).error(); }},
      {"remap: grow into free pages", [](Scene& s) { return s->Remap(s.P(100, 90), {180}).error(); }},
      {"remap: grow a read-only one",
       [](Scene& s) { return s->Remap(s.P(16, 4), {8}).error(); },
       [](Scene& s) { ASSERT_TRUE(s->Unmap(s.P(20, 4)).ok()); }},
      {"remap: grow a locked one", [](Scene& s) { return s->Remap(s.P(110, 10), {12}).error(); },
       [](Scene& s) {
         LockSome(s);
         ASSERT_TRUE(s->Unmap(s.P(120, 10)).ok());
       }},
      {"remap: grow in the mapping zone", [](Scene& s) { return s->Remap(s.M(8, 8), {20}).error(); }},
      {"remap: move by copying", [](Scene& s) { return s->Remap(s.P(0, 8), {20}, {.may_move = true}).error(); }},
      {"remap: move a part", [](Scene& s) { return s->Remap(s.P(2, 3), {20}, {.may_move = true}).error(); }},
      {"remap: move by the kernel",
       [](Scene& s) { return s->Remap(s.P(110, 70), {140}, {.may_move = true}).error(); }},
      {"remap: move a read-only one",
       [](Scene& s) { return s->Remap(s.P(16, 4), {20}, {.may_move = true}).error(); }},
      {"remap: move a locked one", [](Scene& s) { return s->Remap(s.P(2, 4), {20}, {.may_move = true}).error(); },
       LockSome},
      {"remap: move a locked read-only one",
       [](Scene& s) { return s->Remap(s.P(18, 2), {20}, {.may_move = true}).error(); }, LockSome},
      {"remap: move in the mapping zone", [](Scene& s) { return s->Remap(s.M(8, 6), {20}, {.may_move = true}).error(); }, nullptr, Compare::kAll, true},
      {"remap: move no access", [](Scene& s) { return s->Remap(s.M(4, 4), {20}, {.may_move = true}).error(); }, nullptr, Compare::kAll, true},
      {"remap: move locked no access",
       [](Scene& s) { return s->Remap(s.M(4, 4), {20}, {.may_move = true}).error(); }, LockSome, Compare::kAll, true},
      {"remap: move to a fixed place",
       [](Scene& s) {
         return s->Remap(s.P(0, 8), {8}, {.placement = Placement::kFixed, .address = s.P(44, 1).address()}).error();
       }},
      {"remap: move from the mapping zone to the heap",
       [](Scene& s) {
         return s->Remap(s.M(8, 8), {8}, {.placement = Placement::kFixed, .address = s.P(24, 1).address()}).error();
       },
       nullptr, Compare::kAll, true},
      {"remap: move, and keep the source",
       [](Scene& s) { return s->Remap(s.P(0, 8), {8}, {.may_move = true, .keep_source = true}).error(); }, nullptr,
       Compare::kNotContent},
      // ---- Advise and Residency ----
      {"advise: not needed", [](Scene& s) { return s->Advise(s.P(0, 24), Advice::kDontNeed); },
       [](Scene& s) { MustMapAt(s.space(), s.P(12, 4)); }, Compare::kNotContent},
      {"advise: not needed in the mapping zone", [](Scene& s) { return s->Advise(s.M(2, 10), Advice::kDontNeed); },
       nullptr, Compare::kNotContent},
      {"advise: free", [](Scene& s) { return s->Advise(s.P(2, 8), Advice::kFree); }, nullptr, Compare::kNotContent},
      {"advise: cold", [](Scene& s) { return s->Advise(s.P(2, 8), Advice::kCold); }},
      {"advise: page out", [](Scene& s) { return s->Advise(s.P(2, 8), Advice::kPageOut); }},
      {"advise: will need", [](Scene& s) { return s->Advise(s.P(100, 90), Advice::kWillNeed); }},
      {"residency",
       [](Scene& s) {
         std::vector<std::uint8_t> resident(8);
         return s->Residency(s.P(2, 8), absl::MakeSpan(resident));
       }},
  };
}

struct Config {
  const char* name;
  sync::LockPolicy policy;
  bool strict_unmap;
};

class FailureTest : public testing::TestWithParam<Config> {
 protected:
  static AddressSpaceOptions Options() {
    AddressSpaceOptions options = SmallOptions(GetParam().policy);
    options.strict_unmap = GetParam().strict_unmap;
    return options;
  }

  // After a failure and its end: sound, the same verb works, and free memory is zero.
  static void ExpectRecovery(const Verb& verb, Scene& scene) {
    scene->CheckInvariants();
    EXPECT_EQ(verb.perform(scene), Error::Ok()) << "the same verb, afterwards";
    scene->CheckInvariants();
    scene.CheckProtections();
    scene.CheckFreeMemory();
  }
};

TEST_P(FailureTest, OfTheNthCallLeavesTheSpaceAsItWas) {
  std::size_t failed = 0, harmless = 0;
  for (const Verb& verb : Verbs()) {
    for (std::size_t n = 1;; ++n) {
      const int sys_errno = ErrnoOf(n);
      SCOPED_TRACE(std::string(verb.name) + ", call " + std::to_string(n) + ", errno " + std::to_string(sys_errno));
      Scene scene(Options());
      if (verb.prepare) verb.prepare(scene);
      const Snapshot before = Snapshot::Of(scene.space());
      const std::size_t injected = scene.kernel.InjectedFailures();
      scene.kernel.FailNthOfAny(n, sys_errno);
      const Error error = verb.perform(scene);
      scene.kernel.StopFailing();
      if (scene.kernel.InjectedFailures() == injected) {
        EXPECT_EQ(error, Error::Ok());
        break;  // it makes fewer calls than that
      }
      if (error.ok()) {
        ++harmless;
        scene->CheckInvariants();
        scene.CheckProtections();
        scene.CheckFreeMemory();
      } else {
        ++failed;
        EXPECT_EQ(error, Error::System(sys_errno));
        ExpectSame(before, Snapshot::Of(scene.space()), verb.compare);
        scene.CheckProtections();
        ExpectRecovery(verb, scene);
      }
      if (HasFatalFailure()) return;
    }
  }
  std::printf("%zu failures reported, %zu harmless\n", failed, harmless);
  EXPECT_GT(failed, 60u) << "the verbs make calls that can fail";
}

// Also while the verb tries to take its steps back. Protections may then be others than the VMA says.
TEST_P(FailureTest, OfEveryCallOfAKindLeavesTheSpaceSound) {
  for (const Verb& verb : Verbs()) {
    Scene undisturbed(Options());
    if (verb.prepare) verb.prepare(undisturbed);
    undisturbed.kernel.ClearCalls();
    EXPECT_EQ(verb.perform(undisturbed), Error::Ok()) << verb.name;
    for (const Operation operation :
         {Operation::kProtect, Operation::kReset, Operation::kDiscard, Operation::kCountResident,
          Operation::kInstallGuard, Operation::kRemoveGuard, Operation::kAdviseReclaim,
          Operation::kQueryResident, Operation::kLockMemory, Operation::kUnlockMemory,
          Operation::kMove}) {
      if (undisturbed.kernel.CallCount(operation) == 0) continue;
      SCOPED_TRACE(std::string(verb.name) + ", every " + ToString(operation));
      Scene scene(Options());
      if (verb.prepare) verb.prepare(scene);
      const Snapshot before = Snapshot::Of(scene.space());
      scene.kernel.FailAlways(operation, ENOMEM);
      const Error error = verb.perform(scene);
      if (!error.ok()) {
        // Room may be short as long as nothing can be purged.
        EXPECT_TRUE(error == Error::System(ENOMEM) || error.code == ErrorCode::kNoRoom)
            << testing::PrintToString(error);
        if (!(verb.needs_unmap && operation == Operation::kReset)) {
          ExpectSame(before, Snapshot::Of(scene.space()), Compare::kNotContent);
        }
      }
      // More verbs while the kernel still refuses.
      (void)scene->Map({8});
      (void)scene->Unmap(scene.P(0, 40));
      (void)scene->Purge(PurgeScope::kAll);
      scene->CheckInvariants();
      scene.kernel.StopFailing();
      scene.CheckFreeMemory();
      if (HasFatalFailure()) return;
    }
  }
}

// ---- Purges cannot fail, but they can achieve nothing ----

TEST_P(FailureTest, OfAPurgeLosesNothing) {
  for (std::size_t n = 1;; ++n) {
    const int sys_errno = ErrnoOf(n);
    SCOPED_TRACE("call " + std::to_string(n) + ", errno " + std::to_string(sys_errno));
    Scene scene(Options());
    ASSERT_TRUE(scene->Unmap(scene.P(0, 300)).ok());
    const Snapshot before = Snapshot::Of(scene.space());
    const Bytes free_resident = scene->Stats().free_resident;
    const std::size_t injected = scene.kernel.InjectedFailures();
    scene.kernel.FailNthOfAny(n, sys_errno);
    const Pages purged = scene->Purge(PurgeScope::kAll);
    scene.kernel.StopFailing();
    const bool last = scene.kernel.InjectedFailures() == injected;
    EXPECT_EQ(scene->Stats().free_resident + purged.bytes(), free_resident);
    ExpectSame(before, Snapshot::Of(scene.space()));
    scene->CheckInvariants();
    (void)scene->Purge(PurgeScope::kAll);
    EXPECT_EQ(scene->Stats().free_resident, Bytes{0});
    EXPECT_EQ(scene.kernel.ResidentPages(scene.P(0, 300)), Pages{0});
    scene.CheckFreeMemory();
    if (HasFatalFailure() || last) break;
  }
}

// ---- Create ----

TEST_P(FailureTest, OfCreateLeavesNothingReserved) {
  AddressSpaceOptions options = Options();
  options.regions_per_zone = 4;
  options.record_tree_lock_holds = options.record_range_locks = true;
  std::size_t failed = 0;
  for (std::size_t n = 1;; ++n) {
    const int sys_errno = ErrnoOf(n);
    SCOPED_TRACE("call " + std::to_string(n) + ", errno " + std::to_string(sys_errno));
    FakeKernel kernel;
    // The last size that may be tried: nothing to fall back to.
    options.min_reserve = options.reserve;
    kernel.FailNthOfAny(n, sys_errno);
    const Result<AddressSpace*> space = AddressSpace::Create(kernel, options);
    kernel.StopFailing();
    const bool last = kernel.InjectedFailures() == 0;
    if (space.ok()) {
      EXPECT_TRUE((*space)->Map({512}, {.populate = true}).ok());
      (*space)->CheckInvariants();
      AddressSpace::Destroy(*space);
    } else {
      ++failed;
      // The arena does not say what kept it from growing.
      const bool arena = space.error().code == ErrorCode::kNoMetadata;
      EXPECT_TRUE(arena || space.error() == Error::System(sys_errno)) << ToString(space.error().code);
    }
    EXPECT_EQ(kernel.ReservedPages(), Pages{0});
    if (last) break;
  }
  EXPECT_GT(failed, 0u);
}

// With something to fall back to, a smaller space comes out, and nothing of the larger one stays.
TEST_P(FailureTest, OfCreateFallsBackToASmallerSpace) {
  for (std::size_t n = 1; n <= 3; ++n) {
    FakeKernel kernel;
    kernel.FailNthOfAny(n, ENOMEM);
    const Result<AddressSpace*> space = AddressSpace::Create(kernel, Options());
    ASSERT_TRUE(space.ok()) << "call " << n;
    EXPECT_EQ((*space)->reservation().bytes(), MiB(128)) << "call " << n;
    EXPECT_LE(kernel.ReservedPages().bytes(), MiB(128 + 16));
    AddressSpace::Destroy(*space);
    EXPECT_EQ(kernel.ReservedPages(), Pages{0});
  }
}

// A kTree space fails as a kAdaptive one does: no failing call is the lock's.
constexpr Config kConfigs[] = {{"adaptive", sync::LockPolicy::kAdaptive, false},
                               {"adaptiveStrict", sync::LockPolicy::kAdaptive, true},
                               {"coarse", sync::LockPolicy::kCoarse, false},
                               {"coarseStrict", sync::LockPolicy::kCoarse, true}};
INSTANTIATE_TEST_SUITE_P(Configs, FailureTest, testing::ValuesIn(kConfigs),
                         [](const testing::TestParamInfo<Config>& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace freehold::vm
