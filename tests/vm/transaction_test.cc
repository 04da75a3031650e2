// Transactions: all steps or none, together for lookups and snapshots.
#include "vm/transaction.h"

#include <atomic>
#include <cerrno>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/backing.h"
#include "vm/notifier.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"
#include "vm/pin.h"
#include "vm/sync/range_lock.h"

namespace freehold::vm::test {
namespace {

using os::Protection;

// Anonymous memory by another name.
class PlainBacking final : public Backing {
 public:
  explicit PlainBacking(Protection most = Protection::kReadWrite) : Backing(most) {}
  Error Install(os::Kernel& kernel, PageRange range, std::uint64_t, Protection protection, bool) override {
    return kernel.Protect(range, protection);
  }
  void Flush(os::Kernel&, PageRange, std::uint64_t) override {}
  int unused = 0;

 private:
  void OnUnused() override { ++unused; }
};

bool Same(const VmaInfo& a, const VmaInfo& b) {
  return a.range == b.range && a.protection == b.protection && a.lock == b.lock && a.generation == b.generation &&
         a.backing == b.backing;
}

bool Same(const std::vector<VmaInfo>& a, const std::vector<VmaInfo>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!Same(a[i], b[i])) return false;
  }
  return true;
}

class TransactionTest : public testing::TestWithParam<sync::LockPolicy> {
 protected:
  os::FakeKernel kernel_;
  TestSpace space_{kernel_, SmallOptions(GetParam())};
  const PageRange plain_ = Part(ZoneRange(*space_, Zone::kPlain), 100, 100);
  const PageRange dense_ = Part(ZoneRange(*space_, Zone::kDense), 100, 100);
  const PageRange mapping_ = Part(ZoneRange(*space_, Zone::kMapping), 100, 100);
};

FREEHOLD_INSTANTIATE_POLICIES(TransactionTest);

TEST_P(TransactionTest, MakesAllStepsInAnyOrder) {
  MustMapAt(*space_, Part(plain_, 0, 10));
  Fill(Part(plain_, 0, 10), 7);
  MustMapAt(*space_, Part(mapping_, 0, 4), Protection::kRead);
  PlainBacking backing;
  Transaction transaction(*space_);
  transaction.Unmap(Part(mapping_, 1, 2));
  MapOptions with;
  with.backing = &backing;
  with.backing_page = 5;
  with.protection = Protection::kRead;
  transaction.Map(Part(mapping_, 10, 2), with);
  transaction.Map(Part(dense_, 0, 3));
  transaction.Map(Part(plain_, 2, 2), {.placement = Placement::kReplace});
  transaction.Protect(Part(plain_, 6, 2), Protection::kRead);
  MapOptions populated;
  populated.populate = true;
  transaction.Map(Part(plain_, 20, 2), populated);
  ASSERT_TRUE(transaction.Commit().ok());
  EXPECT_FALSE(space_->Lookup(mapping_.first + Pages{1}).ok());
  EXPECT_TRUE(space_->Lookup(mapping_.first + Pages{3}).ok());
  EXPECT_EQ(space_->Lookup(mapping_.first + Pages{11})->backing, &backing);
  EXPECT_EQ(space_->Lookup(mapping_.first + Pages{10})->backing_page, 5u);
  EXPECT_EQ(backing.pages(), 2u);
  EXPECT_EQ(space_->Lookup(dense_.first)->range, Part(dense_, 0, 3));
  EXPECT_TRUE(IsZero(Part(plain_, 2, 2)));
  EXPECT_TRUE(IsFilledWith(Part(plain_, 0, 2), 7));
  EXPECT_TRUE(IsFilledWith(Part(plain_, 4, 6), 7));
  EXPECT_EQ(space_->Lookup(plain_.first + Pages{7})->protection, Protection::kRead);
  EXPECT_EQ(kernel_.CountResident(Part(plain_, 20, 2))->value, 2u);
  Fill(Part(plain_, 2, 4), 1);
  Fill(Part(dense_, 0, 3), 1);
  // What was unmapped serves again; the transaction too, which is empty now.
  MustMapAt(*space_, Part(mapping_, 1, 2));
  EXPECT_EQ(transaction.Commit().code, ErrorCode::kEmpty);
  transaction.Unmap(mapping_);
  ASSERT_TRUE(transaction.Commit().ok());
  EXPECT_EQ(backing.unused, 1);
}

TEST_P(TransactionTest, RefusesAsAWhole) {
  MustMapAt(*space_, Part(plain_, 0, 4));
  PlainBacking readable(Protection::kRead);
  PlainBacking backing;
  MapOptions with;
  with.backing = &backing;
  MapOptions denied;
  denied.backing = &readable;
  const PageRange border = PageRange::Of(ZoneRange(*space_, Zone::kDense).end - Pages{1}, {2});
  for (std::size_t i = 0; i < 17; ++i) MustMapAt(*space_, Part(dense_, 2 * i, 1));
  struct Case {
    const char* name;
    std::function<void(Transaction&)> add;
    ErrorCode code;
  };
  const std::vector<Case> cases = {
      {"overlap with a mapping", [&](auto& t) { t.Map(Part(plain_, 3, 4)); }, ErrorCode::kOverlap},
      {"overlap of steps", [&](auto& t) { t.Unmap(Part(plain_, 2, 9)), t.Map(Part(plain_, 10, 2)); }, ErrorCode::kOverlap},
      {"hole", [&](auto& t) { t.Protect(Part(plain_, 2, 4), Protection::kRead); }, ErrorCode::kNotMapped},
      {"empty range", [&](auto& t) { t.Unmap(Part(plain_, 2, 0)); }, ErrorCode::kEmpty},
      {"wraps", [&](auto& t) { t.Unmap({plain_.end, plain_.first}); }, ErrorCode::kOverflow},
      {"outside", [&](auto& t) { t.Unmap(PageRange::Of(space_->reservation().end, {1})); },
       ErrorCode::kOutsideReservation},
      {"across regions", [&](auto& t) { t.Map(border); }, ErrorCode::kOutsideReservation},
      {"denied", [&](auto& t) { t.Map(Part(mapping_, 0, 2), denied); }, ErrorCode::kDenied},
      {"backing over a mapping", [&](auto& t) {
         MapOptions over = with;
         over.placement = Placement::kReplace;
         t.Map(Part(plain_, 1, 2), over);
       }, ErrorCode::kUnsupported},
      {"too many extents", [&](auto& t) { t.Unmap(Part(dense_, 0, 40)); }, ErrorCode::kUnsupported},
      {"too many extents", [&](auto& t) { t.Map(Part(dense_, 0, 40), {.placement = Placement::kReplace}); },
       ErrorCode::kUnsupported},
      {"too many steps", [&](auto& t) {
         for (std::size_t i = 0; i <= Transaction::kMaxSteps; ++i) t.Map(Part(mapping_, 40 + i, 1));
       }, ErrorCode::kUnsupported},
  };
  const std::vector<VmaInfo> before = Vmas(*space_);
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    Transaction transaction(*space_);
    transaction.Map(Part(plain_, 60, 2));
    transaction.Unmap(Part(plain_, 0, 1));
    c.add(transaction);
    // And one that would be prepared after it.
    transaction.Map(Part(mapping_, 90, 2), with);
    EXPECT_EQ(transaction.Commit().code, c.code);
    EXPECT_TRUE(Same(Vmas(*space_), before));
    EXPECT_EQ(backing.pages(), 0u);
    space_->CheckInvariants();
  }
}

// Whichever system call fails, all is as it was.
TEST_P(TransactionTest, EveryFailureOfTheKernelLeavesAllAsItWas) {
  const auto set_up = [&] {
    ASSERT_TRUE(space_->Unmap(space_->reservation()).ok());
    MustMapAt(*space_, Part(plain_, 0, 10));
    Fill(Part(plain_, 0, 10), 7);
    ASSERT_TRUE(space_->Protect(Part(plain_, 8, 2), Protection::kRead).ok());
    MustMapAt(*space_, Part(mapping_, 0, 6), Protection::kRead);
    MustMapAt(*space_, Part(mapping_, 6, 2), Protection::kReadWrite);
    Fill(Part(mapping_, 6, 2), 9);
  };
  int refused = 0;
  for (std::size_t n = 1;; ++n) {
    SCOPED_TRACE(n);
    set_up();
    const std::vector<VmaInfo> before = Vmas(*space_);
    Transaction transaction(*space_);
    transaction.Protect(Part(plain_, 1, 3), Protection::kRead);
    MapOptions locked;
    locked.lock = os::MemoryLock::kOnFault;
    transaction.Map(Part(plain_, 20, 2), locked);
    MapOptions read_only;
    read_only.protection = Protection::kRead;
    transaction.Map(Part(plain_, 30, 2), read_only);
    transaction.Unmap(Part(plain_, 9, 1));
    transaction.Unmap(Part(mapping_, 2, 2));
    transaction.Protect(Part(mapping_, 4, 1), Protection::kReadWrite);
    MapOptions replace;
    replace.placement = Placement::kReplace;
    transaction.Map(Part(mapping_, 7, 2), replace);
    const std::size_t injected = kernel_.InjectedFailures();
    kernel_.FailNthOfAny(n, ENOMEM);
    const Error error = transaction.Commit();
    const bool failed = kernel_.InjectedFailures() != injected;
    kernel_.StopFailing();
    if (error.ok()) {
      EXPECT_TRUE(space_->Lookup(plain_.first + Pages{20}).ok());
      EXPECT_TRUE(IsZero(Part(mapping_, 7, 1)));
      space_->Tick();
      if (!failed) break;
      continue;
    }
    ++refused;
    EXPECT_EQ(error, Error::System(ENOMEM));
    EXPECT_TRUE(Same(Vmas(*space_), before));
    EXPECT_TRUE(IsFilledWith(Part(plain_, 0, 10), 7));
    EXPECT_TRUE(IsFilledWith(Part(mapping_, 6, 2), 9));
    EXPECT_TRUE(IsZero(Part(mapping_, 0, 6)));
    Fill(Part(plain_, 0, 8), 7);  // still writable
    space_->CheckInvariants();
    // Free pages are free, zero and writable.
    MustMapAt(*space_, Part(plain_, 20, 12));
    EXPECT_TRUE(IsZero(Part(plain_, 20, 12)));
    Fill(Part(plain_, 20, 12), 1);
  }
  EXPECT_GE(refused, 5);
}

TEST_P(TransactionTest, AnUnmapThatTheKernelRefusesIsFinishedLater) {
  MustMapAt(*space_, Part(mapping_, 0, 2), Protection::kRead);
  Transaction transaction(*space_);
  transaction.Unmap(Part(mapping_, 0, 2));
  kernel_.FailNth(Operation::kReset, 1, ENOMEM);
  ASSERT_TRUE(transaction.Commit().ok());
  EXPECT_EQ(space_->Stats().deferred_unmaps, 1u);
  EXPECT_FALSE(space_->Lookup(mapping_.first).ok());
  space_->Tick();
  EXPECT_EQ(space_->Stats().deferred_unmaps, 0u);
  MustMapAt(*space_, Part(mapping_, 0, 2));
}

TEST_P(TransactionTest, PinsAreRespected) {
  MustMapAt(*space_, Part(plain_, 0, 8));
  Fill(Part(plain_, 0, 8), 7);
  std::optional<Pin> pin(std::in_place, *space_, Part(plain_, 2, 2));
  Transaction transaction(*space_);
  transaction.Unmap(Part(plain_, 6, 2));
  transaction.Map(Part(plain_, 0, 4), {.placement = Placement::kReplace});
  EXPECT_EQ(transaction.Commit().code, ErrorCode::kPinned);
  EXPECT_TRUE(IsFilledWith(Part(plain_, 0, 8), 7));
  transaction.Unmap(Part(plain_, 0, 4));
  ASSERT_TRUE(transaction.Commit().ok());
  EXPECT_TRUE(IsFilledWith(Part(plain_, 0, 4), 7));
  EXPECT_EQ(space_->Map({4}, At(plain_.first)).error().code, ErrorCode::kPinned);
  pin.reset();
  MustMapAt(*space_, Part(plain_, 0, 4));
}

TEST_P(TransactionTest, NotifiersHearOfEachStep) {
  class Recorder final : public Notifier {
   public:
    void OnMap(PageRange range) override { heard += " map" + std::to_string(range.count().value); }
    void OnInvalidate(PageRange range, Invalidation what) override {
      heard += " invalidate" + std::to_string(static_cast<int>(what)) + "/" + std::to_string(range.count().value);
    }
    void OnClose(PageRange range) override { heard += " close" + std::to_string(range.count().value); }
    std::string heard;
  } recorder;
  MustMapAt(*space_, Part(plain_, 0, 10));
  const NotifierRegistration registration(*space_, plain_, recorder);
  Transaction transaction(*space_);
  transaction.Unmap(Part(plain_, 0, 1));
  transaction.Map(Part(plain_, 1, 2), {.placement = Placement::kReplace});
  transaction.Protect(Part(plain_, 3, 3), Protection::kRead);
  transaction.Map(Part(plain_, 20, 4));
  ASSERT_TRUE(transaction.Commit().ok());
  EXPECT_EQ(recorder.heard, " invalidate0/1 invalidate1/2 invalidate3/3 close1 close2 map2 map4");
}

// Of two sets of mappings in two regions exactly one exists at any time. The first of the one and the last of the
// other are looked at: as many steps lie between them as there can be.
TEST_P(TransactionTest, LookupsSeeAllOrNothing) {
  constexpr std::size_t kEach = Transaction::kMaxSteps / 2;
  const auto plain = [&](std::size_t i) { return Part(plain_, 2 * i, 1); };
  const auto mapping = [&](std::size_t i) { return Part(mapping_, 2 * i, 1); };
  const PageRange a = plain(0);
  const PageRange b = mapping(kEach - 1);
  for (std::size_t i = 0; i < kEach; ++i) MustMapAt(*space_, plain(i));
  std::atomic<bool> stop{false};
  std::thread swapper([&] {
    for (bool forth = true; !stop.load(); forth = !forth) {
      Transaction transaction(*space_);
      for (std::size_t i = 0; i < kEach; ++i) {
        transaction.Unmap(forth ? plain(i) : mapping(i));
        transaction.Map(forth ? mapping(i) : plain(i));
      }
      ASSERT_TRUE(transaction.Commit().ok());
      std::this_thread::yield();
    }
  });
  // A neighbour that splits and merges the trees' nodes meanwhile.
  std::thread neighbour([&] {
    while (!stop.load()) {
      for (std::size_t i = 0; i < 60; i += 2) MustMapAt(*space_, Part(plain_, 20 + i, 1));
      ASSERT_TRUE(space_->Unmap(Part(plain_, 20, 60)).ok());
    }
  });
  int checked = 0;
  const int rounds = kSanitized ? 100000 : 2000000;
  for (int i = 0; i < rounds || checked < 100; ++i) {
    // The same mapping before and after: so it was there all along.
    const Result<VmaInfo> a1 = space_->Lookup(a.first);
    const Result<VmaInfo> b1 = space_->Lookup(b.first);
    const Result<VmaInfo> a2 = space_->Lookup(a.first);
    const Result<VmaInfo> b2 = space_->Lookup(b.first);
    if (a1.ok() && a2.ok() && a1->generation == a2->generation) {
      ++checked;
      ASSERT_FALSE(b1.ok());
    }
    if (b1.ok() && b2.ok() && b1->generation == b2->generation) {
      ASSERT_FALSE(a2.ok());
    }
    if (i % 64 != 0) continue;
    VmaInfo vmas[512];
    const SnapshotResult snapshot = space_->Snapshot(absl::MakeSpan(vmas));
    if (!snapshot.instant) continue;
    int found = 0;
    for (std::size_t v = 0; v < snapshot.vmas; ++v) found += vmas[v].range == a || vmas[v].range == b ? 1 : 0;
    ASSERT_EQ(found, 1);
  }
  stop.store(true);
  swapper.join();
  neighbour.join();
}

// Threads whose transactions overlap in changing ways, across regions: no deadlock, and the sum stays.
TEST_P(TransactionTest, OverlappingTransactionsTakeTurns) {
  constexpr int kSlots = 6;
  const auto slot = [&](int i) { return Part(i % 2 == 0 ? plain_ : mapping_, static_cast<std::size_t>(i) * 4, 2); };
  for (int i = 0; i < kSlots; i += 2) MustMapAt(*space_, slot(i));
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      std::uint64_t state = static_cast<std::uint64_t>(t) + 1;
      const auto random = [&] { return state = state * 6364136223846793005u + 1442695040888963407u, state >> 33; };
      for (int i = 0; i < (kSanitized ? 300 : 3000); ++i) {
        // Moves one: fails unless the source is mapped, the target free, and nobody else moves it.
        const int from = static_cast<int>(random() % kSlots);
        const int to = static_cast<int>(random() % kSlots);
        if (from == to) continue;
        Transaction transaction(*space_);
        transaction.Protect(slot(from), Protection::kReadWrite);
        const PageRange marker = PageRange::Of(slot(from).end, {1});
        transaction.Map(marker);
        transaction.Map(slot(to));
        if (!transaction.Commit().ok()) continue;
        ASSERT_TRUE(space_->Unmap({slot(from).first, marker.end}).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::size_t mapped = 0;
  for (const VmaInfo& vma : Vmas(*space_)) mapped += vma.range.count().value;
  EXPECT_EQ(mapped, 2u * kSlots / 2);
}

}  // namespace
}  // namespace freehold::vm::test
