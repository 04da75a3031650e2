// Demand paging by the kernel's userfaultfd: contents, write-back, eviction, failures, read-ahead, races with verbs,
// fork and the service's end. Skipped where this process may not use userfaultfd; fault_fake_test.cc needs none.
#include <fcntl.h>

#include <memory>
#include <optional>

#include "tests/vm/pager_fixture.h"
#include "vm/notifier.h"
#include "vm/os/linux_kernel.h"
#include "vm/os/userfault.h"
#include "vm/pin.h"
#include "vm/transaction.h"

namespace freehold::vm {
namespace {

using namespace test;  // NOLINT: the fixture's words
using os::LinuxKernel;
using os::LinuxUserfault;
using os::Protection;
using os::UserfaultAbilities;

constexpr UserfaultAbilities kAll = LinuxUserfault::kAllAbilities;

class FaultTest : public PolicyTest {
 protected:
  void SetUp() override {
    Restart({});
    if (!service_->available()) GTEST_SKIP() << "userfaultfd is not permitted here";
  }

  void Restart(const FaultOptions& options, UserfaultAbilities permitted = kAll) {
    service_.reset();
    userfault_.emplace(permitted);
    service_ = std::make_unique<FaultService>(*space_, *userfault_, options);
    ASSERT_TRUE(service_->Start().ok());
  }

  PageRange MustMapPager(Pager& pager, std::size_t pages, const PagerMapOptions& options = {}, std::uint64_t page = 0) {
    const Result<PageRange> range = service_->MapPager(pager, page, {pages}, options);
    if (!range.ok()) throw std::runtime_error(std::string("MapPager: ") + ToString(range.error().code));
    return *range;
  }

  // One more, that lives as long as the service.
  TestPager& MakePager(std::uint64_t seed) {
    more_pagers_.push_back(std::make_unique<TestPager>(seed));
    return *more_pagers_.back();
  }

  LinuxKernel kernel_;
  TestSpace space_{kernel_, Options()};
  std::optional<LinuxUserfault> userfault_;
  TestPager pager_;
  std::vector<std::unique_ptr<TestPager>> more_pagers_;
  Gate gate_;  // outlives the threads that pass it
  TrapScope traps_;
  std::unique_ptr<FaultService> service_;
};
FREEHOLD_INSTANTIATE_POLICIES(FaultTest);

// ---- Content ----

TEST_P(FaultTest, ReadsWhatThePagerSays) {
  const PageRange range = MustMapPager(pager_, 200, {}, 1000);
  for (std::size_t page : {0u, 199u, 17u, 100u, 16u}) EXPECT_EQ(ReadWord(PageAt(range, page)), WordOf(1000 + page, 0));
  for (std::size_t page = 0; page < 200; ++page) {
    const auto* words = reinterpret_cast<const std::uint64_t*>(PageAt(range, page).address());
    EXPECT_EQ(words[0], WordOf(1000 + page, 0));
    EXPECT_EQ(words[511], WordOf(1000 + page, 0));
  }
  EXPECT_TRUE(Eventually([&] { return service_->Stats().pages_read == 200; }));
  EXPECT_EQ(service_->Stats().failures, 0u);
}

TEST_P(FaultTest, KernelFaultsComeToo) {
  if (!userfault_->abilities().kernel_faults) GTEST_SKIP() << "faults of the kernel are not permitted here";
  const PageRange range = MustMapPager(pager_, 4);
  int pipe_fds[2];
  ASSERT_EQ(pipe(pipe_fds), 0);
  EXPECT_EQ(write(pipe_fds[1], PageAt(range, 2).address(), 8), 8);
  std::uint64_t word = 0;
  EXPECT_EQ(read(pipe_fds[0], &word, 8), 8);
  EXPECT_EQ(word, WordOf(2, 0));
  close(pipe_fds[0]);
  close(pipe_fds[1]);
}

TEST_P(FaultTest, UserModeOnlyServesThreads) {
  Restart({}, {.write_protect = true, .poison = true, .kernel_faults = false});
  ASSERT_TRUE(service_->available());
  EXPECT_FALSE(userfault_->abilities().kernel_faults);
  const PageRange range = MustMapPager(pager_, 4);
  EXPECT_EQ(ReadWord(PageAt(range, 3)), WordOf(3, 0));
  WriteWord(PageAt(range, 3), 5);
  EXPECT_TRUE(service_->Writeback(range).ok());
  EXPECT_EQ(pager_.StoredWord(3), 5u);
}

TEST_P(FaultTest, TwoMappingsOfAPagerAreTwoCopies) {
  const PageRange a = MustMapPager(pager_, 8);
  const PageRange b = MustMapPager(pager_, 8, {}, 4);
  WriteWord(PageAt(a, 4), 1);
  EXPECT_EQ(ReadWord(PageAt(b, 0)), WordOf(4, 0));
  EXPECT_EQ(ReadWord(PageAt(a, 4)), 1u);
}

TEST_P(FaultTest, ReadOnlyMappings) {
  const PageRange range =
      MustMapPager(pager_, 4, {.protection = Protection::kRead, .max_protection = Protection::kRead});
  EXPECT_EQ(ReadWord(PageAt(range, 1)), WordOf(1, 0));
  EXPECT_EQ(TryWrite(PageAt(range, 1), 3).signal, SIGSEGV);
  EXPECT_EQ(space_->Protect(range, Protection::kReadWrite).code, ErrorCode::kDenied);
  EXPECT_TRUE(service_->Writeback(range).ok());
  EXPECT_TRUE(pager_.writes().empty());
}

TEST_P(FaultTest, RefusesWhatCannotBeMapped) {
  EXPECT_EQ(service_->MapPager(pager_, 0, {0}).error().code, ErrorCode::kEmpty);
  EXPECT_EQ(service_->MapPager(pager_, 0, {kSmallRegionPages * 100}).error().code, ErrorCode::kNoRoom);
  EXPECT_EQ(service_->MapPager(pager_, 0, {kSmallRegionPages + 1}).error().code, ErrorCode::kNoRoom);
  const PagerMapOptions heap = {.placement = Placement::kFixed,
                                .address = ZoneRange(*space_, Zone::kPlain).address()};
  EXPECT_EQ(service_->MapPager(pager_, 0, {1}, heap).error().code, ErrorCode::kOutsideReservation);
  const PagerMapOptions denied = {.protection = Protection::kReadWrite, .max_protection = Protection::kRead};
  EXPECT_EQ(service_->MapPager(pager_, 0, {1}, denied).error().code, ErrorCode::kDenied);
  EXPECT_TRUE(pager_.released().empty()) << "only mappings that were made are released";
  EXPECT_EQ(space_->Stats().mapped.value, 0u);
}

// ---- Write-back, eviction, invalidation ----

TEST_P(FaultTest, WritesBackWhatWasWrittenTo) {
  const PageRange range = MustMapPager(pager_, 64);
  for (std::size_t page = 0; page < 64; ++page) EXPECT_EQ(ReadWord(PageAt(range, page)), WordOf(page, 0));
  WriteWord(PageAt(range, 3), 33);
  WriteWord(PageAt(range, 4), 44);
  WriteWord(PageAt(range, 40), 55);
  ASSERT_TRUE(service_->Writeback(range).ok());
  const bool tracks = userfault_->abilities().write_protect;
  if (tracks) {
    EXPECT_EQ(pager_.stored_pages(), (std::set<std::uint64_t>{3, 4, 40}));
  }
  EXPECT_EQ(pager_.StoredWord(3), 33u);
  EXPECT_EQ(pager_.StoredWord(40), 55u);
  pager_.ClearStored();
  ASSERT_TRUE(service_->Writeback(range).ok());
  if (tracks) {
    EXPECT_TRUE(pager_.writes().empty()) << "nothing was written since";
  }
  WriteWord(PageAt(range, 4), 45);
  ASSERT_TRUE(service_->Writeback(Part(range, 0, 8)).ok());
  EXPECT_EQ(pager_.StoredWord(4), 45u);
  EXPECT_TRUE(space_->Unmap(range).ok());
}

TEST_P(FaultTest, APageThatIsWrittenFirstCountsAsWrittenTo) {
  const PageRange range = MustMapPager(pager_, 16);
  WriteWord(PageAt(range, 7), 70);
  const auto* words = reinterpret_cast<const std::uint64_t*>(PageAt(range, 7).address());
  EXPECT_EQ(words[1], WordOf(7, 0)) << "the rest of the page is the pager's";
  if (userfault_->abilities().write_protect) {
    EXPECT_EQ(service_->Stats().faults, 1u) << "one fault both reads the page and makes it writable";
  }
  // Its neighbours may be a moment later, and then this is a fault too.
  EXPECT_EQ(ReadWord(PageAt(range, 8)), WordOf(8, 0));
  ASSERT_TRUE(service_->Writeback(range).ok());
  EXPECT_EQ(pager_.StoredWord(7), 70u);
  if (userfault_->abilities().write_protect) {
    EXPECT_EQ(pager_.stored_pages(), (std::set<std::uint64_t>{7}));
  }
}

TEST_P(FaultTest, WithoutWriteProtectionEveryPageInMemoryCountsAsWrittenTo) {
  Restart({}, {.write_protect = false, .poison = true, .kernel_faults = true});
  const PageRange range = MustMapPager(pager_, 64);
  WriteWord(PageAt(range, 20), 1);
  ASSERT_TRUE(service_->Writeback(range).ok());
  std::set<std::uint64_t> cluster;
  for (std::uint64_t page = 16; page < 32; ++page) cluster.insert(page);
  EXPECT_EQ(pager_.stored_pages(), cluster);
  EXPECT_EQ(pager_.StoredWord(20), 1u);
  EXPECT_EQ(pager_.StoredWord(21), WordOf(21, 0));
  pager_.ClearStored();
  WriteWord(PageAt(range, 20), 2);
  ASSERT_TRUE(service_->Evict(range).ok());
  EXPECT_EQ(ReadWord(PageAt(range, 20)), 2u);
  ASSERT_TRUE(space_->Unmap(range).ok());
}

TEST_P(FaultTest, EvictedPagesComeBack) {
  const PageRange range = MustMapPager(pager_, 32);
  for (std::size_t page = 0; page < 32; ++page) WriteWord(PageAt(range, page), page);
  ASSERT_TRUE(service_->Evict(Part(range, 8, 16)).ok());
  std::uint8_t resident[32];
  ASSERT_TRUE(space_->Residency(range, resident).ok());
  for (std::size_t page = 0; page < 32; ++page) EXPECT_EQ(resident[page] != 0, page < 8 || page >= 24) << page;
  for (std::size_t page = 0; page < 32; ++page) EXPECT_EQ(ReadWord(PageAt(range, page)), page);
  EXPECT_EQ(pager_.stored_pages().size(), 16u);
}

TEST_P(FaultTest, InvalidatedPagesAreReadAnew) {
  const PageRange range = MustMapPager(pager_, 32);
  for (std::size_t page = 0; page < 32; ++page) WriteWord(PageAt(range, page), 9);
  pager_.SetSeed(77);
  ASSERT_TRUE(service_->Invalidate(Part(range, 0, 16)).ok());
  for (std::size_t page = 0; page < 32; ++page) {
    EXPECT_EQ(ReadWord(PageAt(range, page)), page < 16 ? WordOf(page, 77) : 9u);
  }
  EXPECT_TRUE(pager_.writes().empty());
}

TEST_P(FaultTest, UnmapWritesBackAndReleases) {
  const PageRange range = MustMapPager(pager_, 16, {}, 5);
  WriteWord(PageAt(range, 2), 22);
  WriteWord(PageAt(range, 12), 23);
  ASSERT_TRUE(space_->Unmap(Part(range, 0, 8)).ok());
  EXPECT_EQ(pager_.StoredWord(7), 22u);
  EXPECT_EQ(pager_.stored_pages().count(17), 0u);
  EXPECT_TRUE(pager_.released().empty());
  EXPECT_EQ(ReadWord(PageAt(range, 12)), 23u);
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(pager_.StoredWord(17), 23u);
  EXPECT_TRUE(Eventually([&] {
    space_->epochs().Poll();
    return pager_.released().size() == 1;
  }));
  EXPECT_EQ(pager_.released()[0].page, 5u);
  EXPECT_EQ(pager_.released()[0].pages, 16u);
}

TEST_P(FaultTest, ReplacingWritesBack) {
  const PageRange range = MustMapPager(pager_, 16);
  WriteWord(PageAt(range, 5), 50);
  WriteWord(PageAt(range, 9), 90);
  MustMap(*space_, 8, At(range.first, Placement::kReplace));
  EXPECT_EQ(pager_.StoredWord(5), 50u);
  EXPECT_TRUE(IsZero(Part(range, 0, 8)));
  EXPECT_EQ(ReadWord(PageAt(range, 9)), 90u);
  TestPager& other = MakePager(3);
  const Result<PageRange> replaced = service_->MapPager(
      other, 100, {16}, {.placement = Placement::kReplace, .address = range.address()});
  ASSERT_TRUE(replaced.ok());
  EXPECT_EQ(pager_.StoredWord(9), 90u);
  for (std::size_t page = 0; page < 16; ++page) EXPECT_EQ(ReadWord(PageAt(range, page)), WordOf(100 + page, 3));
}

TEST_P(FaultTest, WritesBackWhatCannotBeRead) {
  const PageRange range = MustMapPager(pager_, 8);
  WriteWord(PageAt(range, 1), 11);
  WriteWord(PageAt(range, 6), 66);
  ASSERT_TRUE(space_->Protect(range, Protection::kNone).ok());
  ASSERT_TRUE(service_->Writeback(Part(range, 0, 4)).ok());
  EXPECT_EQ(pager_.StoredWord(1), 11u);
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(pager_.StoredWord(6), 66u);
}

TEST_P(FaultTest, WritingDuringAWriteBackCounts) {
  const PageRange range = MustMapPager(pager_, 4);
  WriteWord(PageAt(range, 0), 1);
  pager_.SetWriteHook([this](std::uint64_t) { gate_.Pass(); });
  std::thread writer([&] { EXPECT_TRUE(service_->Writeback(range).ok()); });
  ASSERT_TRUE(gate_.AwaitArrival());
  WriteWord(PageAt(range, 0), 2);  // waits for no pager
  gate_.Open();
  writer.join();
  EXPECT_EQ(pager_.StoredWord(0), 1u);
  ASSERT_TRUE(service_->Writeback(range).ok());
  EXPECT_EQ(pager_.StoredWord(0), 2u);
}

TEST_P(FaultTest, RefusedWriteBackIsTriedAgain) {
  const PageRange range = MustMapPager(pager_, 600);
  WriteWord(PageAt(range, 0), 1);
  WriteWord(PageAt(range, 599), 2);
  pager_.SetRefusesWrites(true);
  EXPECT_EQ(service_->Writeback(range), Error::System(ENOSPC));
  EXPECT_EQ(pager_.writes().size(), 2u) << "it goes on after an error";
  EXPECT_EQ(service_->Evict(range), Error::System(ENOSPC));
  EXPECT_EQ(ReadWord(PageAt(range, 0)), 1u);
  EXPECT_EQ(ReadWord(PageAt(range, 599)), 2u);
  pager_.SetRefusesWrites(false);
  pager_.SetThrows(true);
  EXPECT_EQ(service_->Writeback(range).code, ErrorCode::kThrew);
  pager_.SetThrows(false);
  EXPECT_TRUE(service_->Writeback(range).ok());
  EXPECT_EQ(pager_.StoredWord(0), 1u);
  EXPECT_EQ(pager_.StoredWord(599), 2u);
  EXPECT_EQ(service_->Stats().pages_lost, 0u);
}

TEST_P(FaultTest, UnmapSaysWhatIsLost) {
  const PageRange range = MustMapPager(pager_, 8);
  WriteWord(PageAt(range, 3), 1);
  WriteWord(PageAt(range, 4), 1);
  pager_.SetRefusesWrites(true);
  testing::internal::CaptureStderr();
  EXPECT_TRUE(space_->Unmap(range).ok());
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("did not take back"), std::string::npos) << said;
  EXPECT_NE(said.find("pager_page=0x3 pages=0x2"), std::string::npos) << said;
  EXPECT_EQ(service_->Stats().pages_lost, 2u);
}

TEST_P(FaultTest, VerbsSayWhatTheyCannotDo) {
  const PageRange range = MustMapPager(pager_, 8);
  const PageRange plain = MustMap(*space_, 4);
  EXPECT_EQ(service_->Writeback({range.first, range.first}).code, ErrorCode::kEmpty);
  EXPECT_EQ(service_->Evict(PageRange::Of(range.end, {1})).code, ErrorCode::kNotMapped);
  EXPECT_EQ(service_->Invalidate({PageNumber{1}, PageNumber{2}}).code, ErrorCode::kOutsideReservation);
  EXPECT_TRUE(service_->Writeback(plain).ok()) << "no pager's: passed over";
  EXPECT_EQ(space_->Discard({&range, 1}).code, ErrorCode::kUnsupported);
  EXPECT_EQ(space_->Advise(range, Advice::kDontNeed).code, ErrorCode::kUnsupported);
  EXPECT_EQ(space_->Advise(range, Advice::kFree).code, ErrorCode::kUnsupported);
  EXPECT_TRUE(space_->Advise(range, Advice::kCold).ok());
}

// ---- Other verbs ----

TEST_P(FaultTest, Populate) {
  const PageRange range = MustMapPager(pager_, 1200);
  WriteWord(PageAt(range, 600), 6);
  ASSERT_TRUE(space_->Populate(range).ok());
  EXPECT_TRUE(Eventually([&] { return service_->Stats().pages_read == 1200; }));
  EXPECT_EQ(service_->Stats().faults, 1u);
  for (std::size_t page = 0; page < 1200; ++page) {
    EXPECT_EQ(ReadWord(PageAt(range, page)), page == 600 ? 6 : WordOf(page, 0));
  }
  EXPECT_EQ(service_->Stats().faults, 1u) << "all was present";
  pager_.FailPage(2);
  ASSERT_TRUE(service_->Invalidate(Part(range, 0, 8)).ok());
  EXPECT_EQ(space_->Populate(range).error(), Error::System(EIO));
  EXPECT_EQ(TryRead(PageAt(range, 2)).signal, SIGBUS);
  EXPECT_TRUE(space_->Advise(range, Advice::kWillNeed).ok());
}

TEST_P(FaultTest, LockedMemoryIsMadePresentAndEvicted) {
  const PageRange range = MustMapPager(pager_, 8);
  ASSERT_TRUE(space_->LockMemory(range).ok());
  EXPECT_EQ(service_->Stats().pages_read, 8u);
  EXPECT_EQ(service_->Stats().faults, 0u);
  WriteWord(PageAt(range, 2), 2);
  ASSERT_TRUE(service_->Evict(range).ok());
  EXPECT_EQ(ReadWord(PageAt(range, 2)), 2u);
  EXPECT_EQ(ReadWord(PageAt(range, 3)), WordOf(3, 0));
}

TEST_P(FaultTest, ProtectKeepsContent) {
  const PageRange range = MustMapPager(pager_, 16);
  WriteWord(PageAt(range, 4), 4);
  ASSERT_TRUE(space_->Protect(Part(range, 2, 8), Protection::kRead).ok());
  EXPECT_EQ(ReadWord(PageAt(range, 4)), 4u);
  EXPECT_EQ(ReadWord(PageAt(range, 9)), WordOf(9, 0));
  EXPECT_EQ(TryWrite(PageAt(range, 4), 5).signal, SIGSEGV);
  ASSERT_TRUE(space_->Protect(range, Protection::kReadWrite).ok());
  WriteWord(PageAt(range, 5), 5);
  ASSERT_TRUE(service_->Writeback(range).ok());
  EXPECT_EQ(pager_.StoredWord(4), 4u);
  EXPECT_EQ(pager_.StoredWord(5), 5u);
}

TEST_P(FaultTest, RemapShrinksAndGrowsInPlace) {
  const PageRange range = MustMapPager(pager_, 8, {.capacity = {16}});
  WriteWord(PageAt(range, 7), 7);
  ASSERT_TRUE(space_->Remap(range, {4}).ok());
  EXPECT_EQ(pager_.StoredWord(7), 7u);
  EXPECT_EQ(TryRead(PageAt(range, 7)).signal, SIGSEGV);
  ASSERT_TRUE(space_->Remap(Part(range, 0, 4), {16}).ok());
  EXPECT_EQ(ReadWord(PageAt(range, 7)), 7u);
  EXPECT_EQ(ReadWord(PageAt(range, 15)), WordOf(15, 0));
  EXPECT_EQ(space_->Remap(PageRange::Of(range.first, {16}), {17}).error().code, ErrorCode::kNoRoom);
  EXPECT_EQ(space_->Remap(PageRange::Of(range.first, {16}), {17}, {.may_move = true}).error().code,
            ErrorCode::kUnsupported);
  EXPECT_EQ(ReadWord(PageAt(range, 15)), WordOf(15, 0));
  EXPECT_EQ(TryRead(PageAt(range, 16)).signal, SIGSEGV);
}

TEST_P(FaultTest, APagerMayUseTheSpace) {
  // Under the coarse policy nobody maps while a range is held: the pager's code runs under none.
  pager_.SetReadHook([&](std::uint64_t) {
    const PageRange own = MustMap(*space_, 64, {.protection = Protection::kRead});
    EXPECT_TRUE(space_->Unmap(own).ok());
  });
  pager_.SetWriteHook([&](std::uint64_t) {
    const PageRange own = MustMap(*space_, 4);
    EXPECT_TRUE(IsZero(own));
    EXPECT_TRUE(space_->Unmap(own).ok());
  });
  const PageRange range = MustMapPager(pager_, 64);
  for (std::size_t page = 0; page < 64; page += 20) WriteWord(PageAt(range, page), page);
  EXPECT_TRUE(service_->Evict(Part(range, 0, 32)).ok());
  EXPECT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(pager_.StoredWord(60), 60u);
}

TEST_P(FaultTest, PinnedPagesAreWrittenBackWhenTheyGo) {
  const PageRange range = MustMapPager(pager_, 8);
  WriteWord(PageAt(range, 3), 3);
  {
    const Pin pin(*space_, range);
    ASSERT_TRUE(pin.ok());
    ASSERT_TRUE(space_->Unmap(range).ok());
    EXPECT_EQ(pager_.StoredWord(3), 3u) << "before it is out of reach";
    WriteWord(PageAt(range, 3), 4);  // as a device may
    EXPECT_EQ(ReadWord(PageAt(range, 3)), 4u);
    EXPECT_TRUE(pager_.released().empty());
  }
  EXPECT_EQ(pager_.StoredWord(3), 4u);
  EXPECT_TRUE(Eventually([&] {
    space_->epochs().Poll();
    return pager_.released().size() == 1;
  }));
}

TEST_P(FaultTest, TransactionsWriteBack) {
  const PageRange range = MustMapPager(pager_, 8);
  const PageRange other = MustMapPager(pager_, 8, {}, 100);
  WriteWord(PageAt(range, 3), 3);
  WriteWord(PageAt(other, 3), 4);
  Transaction both(*space_);
  both.Unmap(range);
  both.Unmap(Part(other, 0, 4));
  ASSERT_TRUE(both.Commit().ok());
  EXPECT_EQ(pager_.StoredWord(3), 3u);
  EXPECT_EQ(pager_.StoredWord(103), 4u);
  EXPECT_EQ(ReadWord(PageAt(other, 4)), WordOf(104, 0));
}

TEST_P(FaultTest, NotifiersHearOfEviction) {
  struct Listener final : Notifier {
    void OnInvalidate(PageRange range, Invalidation what) override {
      if (what == Invalidation::kDiscard) discarded.push_back(range);
    }
    std::vector<PageRange> discarded;
  };
  const PageRange range = MustMapPager(pager_, 8);
  Listener listener;
  const NotifierRegistration registration(*space_, range, listener);
  ASSERT_TRUE(service_->Evict(Part(range, 2, 4)).ok());
  ASSERT_EQ(listener.discarded.size(), 1u);
  EXPECT_EQ(listener.discarded[0], Part(range, 2, 4));
}

// ---- Failures ----

TEST_P(FaultTest, AFailingPagerIsSigbusWithAMessage) {
  for (const bool poison : {true, false}) {
    Restart({}, {.write_protect = true, .poison = poison, .kernel_faults = true});
    const PageRange range = MustMapPager(pager_, 32, {}, 100);
    pager_.FailPage(103);
    testing::internal::CaptureStderr();
    EXPECT_EQ(TryRead(PageAt(range, 3)).signal, SIGBUS);
    const std::string said = testing::internal::GetCapturedStderr();
    EXPECT_NE(said.find("a pager could not read a page"), std::string::npos) << said;
    EXPECT_NE(said.find("pager_page=0x67 errno=0x5"), std::string::npos) << said;
    EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1);
    EXPECT_EQ(TryRead(PageAt(range, 3)).signal, SIGBUS);
    EXPECT_EQ(TryWrite(PageAt(range, 3), 1).signal, SIGBUS);
    EXPECT_EQ(service_->Stats().failures, 1u) << "asked once";
    for (std::size_t page : {0u, 2u, 4u, 31u}) EXPECT_EQ(ReadWord(PageAt(range, page)), WordOf(100 + page, 0));
    WriteWord(PageAt(range, 4), 44);
    // Tried again when it was evicted.
    pager_.FailPage(103, false);
    EXPECT_TRUE(service_->Evict(range).ok());
    EXPECT_EQ(ReadWord(PageAt(range, 3)), WordOf(103, 0));
    EXPECT_EQ(ReadWord(PageAt(range, 4)), 44u);
    WriteWord(PageAt(range, 3), 33);
    EXPECT_TRUE(space_->Unmap(range).ok());
    EXPECT_EQ(pager_.StoredWord(103), 33u);
    pager_.ClearStored();
  }
}

TEST_P(FaultTest, AThrowingPagerIsSigbusWithAMessage) {
  const PageRange range = MustMapPager(pager_, 32);
  pager_.SetThrows(true);
  testing::internal::CaptureStderr();
  EXPECT_EQ(TryRead(PageAt(range, 3)).signal, SIGBUS);
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("a pager threw"), std::string::npos) << said;
  pager_.SetThrows(false);
  EXPECT_EQ(ReadWord(PageAt(range, 4)), WordOf(4, 0));
}

TEST_P(FaultTest, BeyondTheEndIsSigbus) {
  const PageRange range = MustMapPager(pager_, 64);
  pager_.SetEnd(21);
  EXPECT_EQ(ReadWord(PageAt(range, 20)), WordOf(20, 0));
  testing::internal::CaptureStderr();
  EXPECT_EQ(TryRead(PageAt(range, 21)).signal, SIGBUS);
  EXPECT_EQ(TryRead(PageAt(range, 63)).signal, SIGBUS);
  (void)testing::internal::GetCapturedStderr();
  pager_.SetEnd(64);
  ASSERT_TRUE(service_->Invalidate(range).ok());
  EXPECT_EQ(ReadWord(PageAt(range, 63)), WordOf(63, 0));
}

// ---- Read-ahead ----

TEST_P(FaultTest, AForwardReaderGetsEverMore) {
  const PageRange range = MustMapPager(pager_, 4096);
  for (std::size_t page = 0; page < 4096; ++page) ASSERT_EQ(ReadWord(PageAt(range, page)), WordOf(page, 0));
  std::size_t pages = 0;
  std::size_t reads = 0;
  for (const TestPager::Call& call : pager_.reads()) {
    if (call.pages == 1) continue;  // it came while its fault was on its way
    EXPECT_EQ(call.page, pages) << "in order, each once";
    pages += call.pages;
    ++reads;
  }
  EXPECT_EQ(pages, 4096u);
  // Windows of 16, 32, ... 512, read by chunks of 64.
  EXPECT_LE(reads, 4096u / 64 + 8);
}

TEST_P(FaultTest, ReadAheadHasABound) {
  Restart({.max_read_ahead = {32}});
  const PageRange range = MustMapPager(pager_, 320);
  for (std::size_t page = 0; page < 320; ++page) ASSERT_EQ(ReadWord(PageAt(range, page)), WordOf(page, 0));
  for (const TestPager::Call& call : pager_.reads()) EXPECT_LE(call.pages, 32u);
}

TEST_P(FaultTest, ScatteredReadersGetClusters) {
  const PageRange range = MustMapPager(pager_, 4096);
  for (const std::size_t page : {2000u, 100u, 3000u, 1000u, 4095u}) ReadWord(PageAt(range, page));
  for (const TestPager::Call& call : pager_.reads()) {
    EXPECT_EQ(call.page % 16, 0u);
    EXPECT_EQ(call.pages, 16u);
  }
  EXPECT_EQ(pager_.reads().size(), 5u);
}

TEST_P(FaultTest, NeighboursInMemoryAreNotReadAgain) {
  const PageRange range = MustMapPager(pager_, 64);
  ReadWord(PageAt(range, 16));
  ASSERT_TRUE(service_->Invalidate(Part(range, 20, 3)).ok());
  ReadWord(PageAt(range, 21));
  const std::vector<TestPager::Call> reads = pager_.reads();
  ASSERT_EQ(reads.size(), 2u);
  EXPECT_EQ(reads[1].page, 20u);
  EXPECT_EQ(reads[1].pages, 3u);
}

// ---- Threads ----

TEST_P(FaultTest, ABlockedPagerStallsOnlyItsRange) {
  constexpr std::size_t kBlocked = 6;
  constexpr std::size_t kReaders = 6;  // each, more than threads_per_mapping
  std::vector<TestPager*> pagers;
  std::vector<PageRange> ranges;
  for (std::size_t i = 0; i < kBlocked; ++i) {
    pagers.push_back(&MakePager(i));
    pagers.back()->SetReadHook([this](std::uint64_t) { gate_.Pass(); });
    ranges.push_back(MustMapPager(*pagers.back(), 1024));
  }
  const PageRange free = MustMapPager(pager_, 1024);
  std::vector<std::unique_ptr<WatchedThread>> readers;
  for (std::size_t i = 0; i < kBlocked; ++i) {
    for (std::size_t r = 0; r < kReaders; ++r) {
      readers.push_back(std::make_unique<WatchedThread>([&, i, r] {
        EXPECT_EQ(ReadWord(PageAt(ranges[i], r * 100)), WordOf(r * 100, i));
      }));
    }
  }
  for (const auto& reader : readers) ASSERT_TRUE(reader->AwaitSleep());
  for (std::size_t page = 0; page < 1024; ++page) ASSERT_EQ(ReadWord(PageAt(free, page)), WordOf(page, 0));
  EXPECT_TRUE(space_->Unmap(free).ok());
  EXPECT_TRUE(Eventually([&] { return service_->Stats().postponed >= kBlocked; }));
  for (const auto& reader : readers) EXPECT_FALSE(reader->done());
  gate_.Open();
  for (const auto& reader : readers) reader->Join();
  // The blocked ones, and some more that wait, or see that a fault has to be postponed.
  EXPECT_LT(service_->Stats().threads, FaultOptions().max_threads);
}

TEST_P(FaultTest, FaultsOnOnePageAreReadOnce) {
  pager_.SetReadHook([this](std::uint64_t) { gate_.Pass(); });
  const PageRange range = MustMapPager(pager_, 16);
  std::vector<std::unique_ptr<WatchedThread>> readers;
  for (std::size_t i = 0; i < 8; ++i) {
    readers.push_back(std::make_unique<WatchedThread>(
        [&, i] { EXPECT_EQ(ReadWord(PageAt(range, i)), WordOf(i, 0)); }));
  }
  for (const auto& reader : readers) ASSERT_TRUE(reader->AwaitSleep());
  EXPECT_TRUE(Eventually([&] { return service_->Stats().joined == 7; }));
  gate_.Open();
  for (const auto& reader : readers) reader->Join();
  EXPECT_EQ(pager_.reads().size(), 1u);
}

TEST_P(FaultTest, WhenAllThreadsAreBusyOthersWaitAndThenGoOn) {
  Restart({.min_threads = 1, .max_threads = 1});
  pager_.SetReadHook([this](std::uint64_t) { gate_.Pass(); });
  const PageRange range = MustMapPager(pager_, 16);
  TestPager& other = MakePager(1);
  const PageRange waiting = MustMapPager(other, 16);
  WatchedThread first([&] { EXPECT_EQ(ReadWord(range.first), WordOf(0, 0)); });
  ASSERT_TRUE(gate_.AwaitArrival());
  WatchedThread second([&] { EXPECT_EQ(ReadWord(waiting.first), WordOf(0, 1)); });
  ASSERT_TRUE(second.AwaitSleep());
  EXPECT_TRUE(other.reads().empty());
  gate_.Open();
  first.Join();
  second.Join();
  EXPECT_EQ(service_->Stats().threads, 1u);
}

// ---- Races with verbs, step by step ----

class RaceTest : public FaultTest {
 protected:
  // A reader whose fault is in the pager, and stays there until the gate opens.
  void StartReader(std::size_t pages = 16) {
    pager_.SetReadHook([this](std::uint64_t) { gate_.Pass(); });
    range_ = MustMapPager(pager_, pages);
    reader_ = std::make_unique<WatchedThread>([this] { access_ = TryRead(PageAt(range_, 3)); });
    ASSERT_TRUE(gate_.AwaitArrival());
  }

  PageRange range_;
  Access access_;
  std::unique_ptr<WatchedThread> reader_;
};
FREEHOLD_INSTANTIATE_POLICIES(RaceTest);

TEST_P(RaceTest, UnmapDuringAFault) {
  StartReader();
  ASSERT_TRUE(space_->Unmap(range_).ok()) << "does not wait for the pager";
  reader_->Join();
  EXPECT_EQ(access_.signal, SIGSEGV) << "nor does the reader";
  gate_.Open();
  EXPECT_TRUE(Eventually([&] {
    space_->epochs().Poll();
    return pager_.released().size() == 1;
  }));
}

TEST_P(RaceTest, ReplaceDuringAFault) {
  StartReader();
  TestPager& other = MakePager(9);
  ASSERT_TRUE(service_->MapPager(other, 50, {16}, {.placement = Placement::kReplace, .address = range_.address()}).ok());
  reader_->Join();
  EXPECT_EQ(access_.signal, 0);
  EXPECT_EQ(access_.word, WordOf(53, 9)) << "the mapping that is there";
  gate_.Open();
  EXPECT_TRUE(Eventually([&] {
    space_->epochs().Poll();
    return pager_.released().size() == 1;
  }));
  for (std::size_t page = 0; page < 16; ++page) EXPECT_EQ(ReadWord(PageAt(range_, page)), WordOf(50 + page, 9));
}

TEST_P(RaceTest, ReplaceByAnonymousMemoryDuringAFault) {
  StartReader();
  MustMap(*space_, 16, At(range_.first, Placement::kReplace));
  reader_->Join();
  EXPECT_EQ(access_.signal, 0);
  EXPECT_EQ(access_.word, 0u);
  gate_.Open();
  EXPECT_TRUE(IsZero(range_));
}

TEST_P(RaceTest, InvalidateDuringAFault) {
  StartReader();
  pager_.SetReadHook({});
  WatchedThread invalidator([&] { EXPECT_TRUE(service_->Invalidate(range_).ok()); });
  ASSERT_TRUE(invalidator.AwaitSleep()) << "waits for the read under way";
  pager_.SetSeed(5);
  gate_.Open();
  invalidator.Join();
  reader_->Join();
  EXPECT_EQ(access_.signal, 0);
  for (std::size_t page = 0; page < 16; ++page) EXPECT_EQ(ReadWord(PageAt(range_, page)), WordOf(page, 5));
}

TEST_P(RaceTest, ProtectDuringAFault) {
  StartReader();
  ASSERT_TRUE(space_->Protect(Part(range_, 2, 4), Protection::kNone).ok());
  gate_.Open();
  reader_->Join();
  EXPECT_EQ(access_.signal, SIGSEGV);
  ASSERT_TRUE(space_->Protect(range_, Protection::kRead).ok());
  EXPECT_EQ(ReadWord(PageAt(range_, 3)), WordOf(3, 0));
}

TEST_P(RaceTest, PartlyUnmappedDuringAFault) {
  StartReader();
  ASSERT_TRUE(space_->Unmap(Part(range_, 8, 8)).ok());
  gate_.Open();
  reader_->Join();
  EXPECT_EQ(access_.signal, 0);
  EXPECT_EQ(access_.word, WordOf(3, 0)) << "the read was of more than is left; then of what is";
  EXPECT_EQ(TryRead(PageAt(range_, 8)).signal, SIGSEGV);
}

TEST_P(RaceTest, OtherVerbsDoNotWaitForAFault) {
  StartReader(64);
  EXPECT_TRUE(space_->Protect(range_, Protection::kRead).ok());
  EXPECT_TRUE(service_->Writeback(range_).ok());
  EXPECT_TRUE(space_->Unmap(Part(range_, 32, 32)).ok());
  EXPECT_FALSE(reader_->done());
  gate_.Open();
  reader_->Join();
  EXPECT_EQ(access_.word, WordOf(3, 0));
}

TEST_P(RaceTest, TheServiceEndsWithFaultsOutstanding) {
  StartReader();
  WatchedThread end([&] { service_.reset(); });
  reader_->Join();
  EXPECT_EQ(access_.signal, SIGSEGV);
  ASSERT_TRUE(end.AwaitSleep()) << "waits for the pager's call";
  gate_.Open();
  end.Join();
  EXPECT_EQ(pager_.released().size(), 1u);
  EXPECT_FALSE(space_->Lookup(range_.first).ok());
}

// ---- Fork ----

TEST_P(FaultTest, TheChildOfAForkHasNoPagers) {
  const PageRange range = MustMapPager(pager_, 16);
  WriteWord(PageAt(range, 1), 11);
  Fork(*space_, [&] {
    FREEHOLD_CHECK(TryRead(PageAt(range, 1)).signal == SIGSEGV);
    FREEHOLD_CHECK(TryRead(PageAt(range, 2)).signal == SIGSEGV);
    FREEHOLD_CHECK(service_->Writeback(range).code == ErrorCode::kUnsupported);
    FREEHOLD_CHECK(service_->MapPager(pager_, 0, {1}).error().code == ErrorCode::kUnsupported);
    FREEHOLD_CHECK(space_->Unmap(Part(range, 0, 8)).ok());
    FREEHOLD_CHECK(space_->Map({8}, At(range.first)).ok());
    FREEHOLD_CHECK(IsZero(Part(range, 0, 8)));
    FREEHOLD_CHECK(space_->Unmap(range).ok());
    service_.reset();
    const Result<PageRange> after = space_->Map({8}, {.protection = Protection::kRead});
    FREEHOLD_CHECK(after.ok() && space_->Unmap(*after).ok());
    space_->CheckInvariants();
  });
  EXPECT_TRUE(pager_.writes().empty());
  EXPECT_EQ(ReadWord(PageAt(range, 1)), 11u);
  EXPECT_EQ(ReadWord(PageAt(range, 2)), WordOf(2, 0));
  EXPECT_TRUE(service_->Evict(range).ok());
  EXPECT_EQ(ReadWord(PageAt(range, 1)), 11u);
}

TEST_P(RaceTest, ForkDuringAFault) {
  StartReader();
  Fork(*space_, [&] {
    FREEHOLD_CHECK(TryRead(PageAt(range_, 3)).signal == SIGSEGV);
    const Result<PageRange> other = space_->Map({16});
    FREEHOLD_CHECK(other.ok() && IsZero(*other));
    service_.reset();
    FREEHOLD_CHECK(!space_->Lookup(range_.first).ok());
  });
  gate_.Open();
  reader_->Join();
  EXPECT_EQ(access_.word, WordOf(3, 0));
}

// ---- Stress ----

// Readers and writers of several mappings while they are written back, evicted, protected, unmapped and mapped again.
// A word read is always the pager's or the reader's own.
TEST_P(FaultTest, EverythingAtOnce) {
  constexpr std::size_t kMappings = 3;
  constexpr std::size_t kPages = 96;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(kSanitized ? 3 : 1);
  Restart({.max_threads = 8, .threads_per_mapping = 2});
  std::vector<TestPager*> pagers;
  std::vector<PageRange> ranges;
  for (std::size_t i = 0; i < kMappings; ++i) {
    pagers.push_back(&MakePager(i));
    ranges.push_back(MustMapPager(*pagers.back(), kPages));
  }
  std::atomic<std::uint64_t> reads{0};
  std::atomic<std::uint64_t> verbs{0};
  const auto over = [&] { return std::chrono::steady_clock::now() >= end; };
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      std::uint64_t random = t + 1;
      while (!over()) {
        random = random * 6364136223846793005 + 1442695040888963407;
        const std::size_t i = (random >> 33) % kMappings;
        const std::size_t page = (random >> 40) % kPages;
        // Even pages are read only; odd ones hold what the pager says or 1000 + page.
        if (page % 2 == 1 && (random >> 60) == 0) {
          (void)TryWrite(PageAt(ranges[i], page), 1000 + page);
          continue;
        }
        const Access access = TryRead(PageAt(ranges[i], page));
        if (access.signal != 0) {
          ASSERT_EQ(access.signal, SIGSEGV);
          continue;
        }
        const bool own = page % 2 == 1 && access.word == 1000 + page;
        ASSERT_TRUE(access.word == WordOf(page, i) || own) << i << " " << page << " " << std::hex << access.word;
        reads.fetch_add(1, std::memory_order_relaxed);
      }
    });
  }
  threads.emplace_back([&] {
    std::uint64_t random = 99;
    while (!over()) {
      random = random * 6364136223846793005 + 1442695040888963407;
      const std::size_t i = (random >> 33) % kMappings;
      const PageRange part = Part(ranges[i], (random >> 40) % (kPages / 2), 1 + (random >> 50) % (kPages / 2));
      Error error;
      switch ((random >> 60) % 8) {
        case 0: error = service_->Writeback(part); break;
        case 1: error = service_->Evict(part); break;
        case 2: error = space_->Protect(part, Protection::kRead); break;
        case 3: error = space_->Protect(part, Protection::kReadWrite); break;
        case 4: error = space_->Populate(part).error(); break;
        case 5:
          error = service_->MapPager(*pagers[i], 0, {kPages},
                                     {.placement = Placement::kReplace, .address = ranges[i].address()}).error();
          break;
        case 6:
          ASSERT_TRUE(space_->Unmap(ranges[i]).ok());
          error = service_->MapPager(*pagers[i], 0, {kPages},
                                     {.placement = Placement::kFixed, .address = ranges[i].address()}).error();
          break;
        case 7: error = service_->Evict(ranges[i]); break;
      }
      ASSERT_TRUE(error.ok() || error.code == ErrorCode::kUnsupported) << ToString(error.code) << error.sys_errno;
      verbs.fetch_add(1, std::memory_order_relaxed);
    }
  });
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(reads.load(), 0u);
  EXPECT_GT(verbs.load(), 0u);
  EXPECT_EQ(service_->Stats().pages_lost, 0u);
  EXPECT_EQ(service_->Stats().failures, 0u);
}

}  // namespace
}  // namespace freehold::vm
