// Demand paging without the kernel's part in it: faults are raised by the test, and the userfaultfd, or the kernel, can
// be made to fail. And what happens where this process may not use userfaultfd.
#include <memory>
#include <optional>

#include "tests/vm/pager_fixture.h"
#include "vm/os/fake_userfault.h"
#include "vm/os/linux_kernel.h"
#include "vm/page_bitmap.h"

namespace freehold::vm {
namespace {

using namespace test;  // NOLINT: the fixture's words
using os::FakeKernel;
using os::FakeUserfault;
using os::Protection;
using Call = FakeUserfault::Operation;
using Status = FakeUserfault::PageStatus;

class FakeFaultTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(service_.Start().ok()); }

  PageRange MustMapPager(std::size_t pages, const PagerMapOptions& options = {}) {
    const Result<PageRange> range = service_.MapPager(pager_, 0, {pages}, options);
    if (!range.ok()) throw std::runtime_error(std::string("MapPager: ") + ToString(range.error().code));
    return *range;
  }
  // A thread faults, and is woken.
  void Fault(PageNumber page, bool write = false, bool write_protected = false) {
    userfault_.Raise({.page = page, .write = write, .write_protected = write_protected});
    ASSERT_TRUE(userfault_.AwaitWoken(page));
  }

  FakeKernel kernel_;
  TestSpace space_{kernel_, SmallOptions()};
  FakeUserfault userfault_;
  TestPager pager_;
  FaultService service_{*space_, userfault_};
};

TEST_F(FakeFaultTest, AFaultIsFilled) {
  const PageRange range = MustMapPager(64);
  Fault(PageAt(range, 20));
  for (std::size_t page = 0; page < 64; ++page) {
    // The others follow while the thread wakes up.
    const Status expected = page / 16 == 1 ? Status::kProtected : Status::kMissing;
    EXPECT_TRUE(Eventually([&] { return userfault_.At(PageAt(range, page)) == expected; })) << page;
  }
  EXPECT_EQ(ReadWord(PageAt(range, 20)), WordOf(20, 0));
}

TEST_F(FakeFaultTest, AWriteIsFilledWritable) {
  const PageRange range = MustMapPager(16);
  Fault(PageAt(range, 3), /*write=*/true);
  EXPECT_EQ(userfault_.At(PageAt(range, 3)), Status::kWritable);
  EXPECT_TRUE(Eventually([&] { return userfault_.At(PageAt(range, 2)) == Status::kProtected; }));
  Fault(PageAt(range, 2), /*write=*/true, /*write_protected=*/true);
  EXPECT_EQ(userfault_.At(PageAt(range, 2)), Status::kWritable);
  ASSERT_TRUE(service_.Writeback(range).ok());
  EXPECT_EQ(pager_.stored_pages(), (std::set<std::uint64_t>{2, 3}));
  EXPECT_EQ(userfault_.At(PageAt(range, 2)), Status::kProtected) << "from now on a write tells again";
}

TEST_F(FakeFaultTest, StaleEventsOnlyWake) {
  const PageRange plain = MustMap(*space_, 4);
  Fault(plain.first);
  const PageRange range = MustMapPager(4);
  ASSERT_TRUE(space_->Unmap(range).ok());
  userfault_.Forget(range);
  Fault(range.first);
  Fault(range.first, true, true);
  EXPECT_EQ(userfault_.CallCount(Call::kCopy), 0u);
  EXPECT_TRUE(pager_.reads().empty());
}

TEST_F(FakeFaultTest, AWriteToAnEvictedPageIsTriedAgain) {
  const PageRange range = MustMapPager(16);
  Fault(PageAt(range, 1));
  ASSERT_TRUE(service_.Evict(range).ok());
  userfault_.Drop(range);
  Fault(PageAt(range, 1), true, true);
  EXPECT_EQ(userfault_.CallCount(Call::kWriteProtect), 0u) << "nothing was written, and nothing is there";
  ASSERT_TRUE(service_.Writeback(range).ok());
  EXPECT_TRUE(pager_.writes().empty());
}

TEST_F(FakeFaultTest, PagesThatCameOtherwiseAreKept) {
  const PageRange range = MustMapPager(16);
  alignas(kPageSize) static const std::byte other[kPageSize] = {};
  ASSERT_TRUE(userfault_.Copy(Part(range, 5, 1), other, os::WriteTracking::kOff).ok());
  Fault(PageAt(range, 5));
  EXPECT_EQ(ReadWord(PageAt(range, 5)), 0u);
  EXPECT_TRUE(Eventually([&] { return userfault_.At(PageAt(range, 15)) == Status::kProtected; }));
  EXPECT_EQ(ReadWord(PageAt(range, 15)), WordOf(15, 0));
}

TEST_F(FakeFaultTest, RefusedCopiesAreSigbusOrTriedAgain) {
  const PageRange range = MustMapPager(4096);  // far enough apart that no fault joins another
  testing::internal::CaptureStderr();
  // Once: the page alone is tried.
  userfault_.FailNext(Call::kCopy, 1, Error::System(ENOMEM));
  Fault(PageAt(range, 3));
  EXPECT_EQ(userfault_.At(PageAt(range, 3)), Status::kProtected);
  EXPECT_EQ(userfault_.At(PageAt(range, 2)), Status::kMissing);
  // Twice: no content.
  userfault_.FailNext(Call::kCopy, 2, Error::System(ENOMEM));
  Fault(PageAt(range, 1000));
  EXPECT_EQ(userfault_.At(PageAt(range, 1000)), Status::kPoisoned);
  // A write: what could not be copied does not count as written to.
  userfault_.FailNext(Call::kCopy, 2, Error::System(ENOMEM));
  Fault(PageAt(range, 2000), /*write=*/true);
  EXPECT_EQ(userfault_.At(PageAt(range, 2000)), Status::kPoisoned);
  // Nor can it be poisoned: the thread tries again.
  userfault_.FailNext(Call::kCopy, 2, Error::System(ENOMEM));
  userfault_.FailNext(Call::kPoison, 1, Error::System(ENOMEM));
  Fault(PageAt(range, 3000));
  EXPECT_EQ(userfault_.At(PageAt(range, 3000)), Status::kMissing);
  Fault(PageAt(range, 3500));
  EXPECT_EQ(userfault_.At(PageAt(range, 3500)), Status::kProtected) << "others go on";
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("errno=0xc"), std::string::npos) << said;
  ASSERT_TRUE(service_.Writeback(range).ok());
  EXPECT_TRUE(pager_.writes().empty());
}

TEST_F(FakeFaultTest, WhatWasOnlyReadAheadMayBeRefused) {
  const PageRange range = MustMapPager(64);
  // The touched page comes first, then those behind it and those before it.
  userfault_.FailNext(Call::kCopy, 2, Error::System(ENOMEM), /*after=*/1);
  Fault(PageAt(range, 20));
  EXPECT_EQ(userfault_.At(PageAt(range, 20)), Status::kProtected);
  ASSERT_TRUE(Eventually([&] { return userfault_.CallCount(Call::kCopy) == 3; }));
  for (const std::size_t page : {16, 19, 21, 31}) EXPECT_EQ(userfault_.At(PageAt(range, page)), Status::kMissing);
  // It is read when somebody touches it: who comes while the first read ends is woken by that, and tries again.
  for (const std::size_t page : {21, 16}) {
    EXPECT_TRUE(Eventually([&] {
      Fault(PageAt(range, page));
      return userfault_.At(PageAt(range, page)) == Status::kProtected;
    }));
    EXPECT_EQ(ReadWord(PageAt(range, page)), WordOf(page, 0));
  }
  EXPECT_EQ(service_.Stats().failures, 0u);
}

TEST_F(FakeFaultTest, ARefusedPermissionToWriteIsTriedAgain) {
  const PageRange range = MustMapPager(4);
  Fault(range.first);
  userfault_.FailNext(Call::kWriteProtect, 1, Error::System(ENOMEM));
  Fault(range.first, true, true);
  EXPECT_EQ(userfault_.At(range.first), Status::kProtected);
  Fault(range.first, true, true);
  EXPECT_EQ(userfault_.At(range.first), Status::kWritable);
}

TEST_F(FakeFaultTest, VerbsWhoseCallsFailChangeNothing) {
  const PageRange range = MustMapPager(16);
  Fault(PageAt(range, 2), /*write=*/true);
  WriteWord(PageAt(range, 2), 22);
  for (const auto operation : {FakeKernel::Operation::kReserve, FakeKernel::Operation::kProtect}) {
    kernel_.FailNth(operation, 1, ENOMEM);
    EXPECT_EQ(service_.Writeback(range), Error::System(ENOMEM)) << "no room to copy to";
  }
  userfault_.FailNext(Call::kWriteProtect, 1, Error::System(ENOMEM));
  EXPECT_EQ(service_.Writeback(range), Error::System(ENOMEM));
  userfault_.FailNext(Call::kWriteProtect, 1, Error::System(ENOMEM));
  EXPECT_EQ(service_.Evict(range), Error::System(ENOMEM));
  kernel_.FailNth(FakeKernel::Operation::kDiscard, 1, ENOMEM);
  EXPECT_EQ(service_.Evict(range), Error::System(ENOMEM));
  kernel_.FailNth(FakeKernel::Operation::kDiscard, 1, ENOMEM);
  EXPECT_EQ(service_.Invalidate(range), Error::System(ENOMEM));
  EXPECT_TRUE(pager_.writes().empty());
  EXPECT_EQ(ReadWord(PageAt(range, 2)), 22u);
  ASSERT_TRUE(service_.Writeback(range).ok());
  EXPECT_EQ(pager_.StoredWord(2), 22u);
}

TEST_F(FakeFaultTest, AFailedUnmapKeepsTheMappingAndWhatWasWritten) {
  const PageRange range = MustMapPager(16);
  Fault(PageAt(range, 2), /*write=*/true);
  WriteWord(PageAt(range, 2), 22);
  kernel_.FailNth(FakeKernel::Operation::kReset, 1, ENOMEM);
  EXPECT_EQ(space_->Unmap(range), Error::System(ENOMEM));
  EXPECT_EQ(ReadWord(PageAt(range, 2)), 22u);
  EXPECT_EQ(pager_.StoredWord(2), 22u);
  Fault(PageAt(range, 2), true, true);
  WriteWord(PageAt(range, 2), 23);
  // The first write-back is refused, that of what the unmap has saved is not.
  int calls = 0;
  pager_.SetRefusesWrites(true);
  pager_.SetWriteHook([&](std::uint64_t) { pager_.SetRefusesWrites(calls++ == 0); });
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(calls, 2);
  EXPECT_EQ(pager_.StoredWord(2), 23u);
  EXPECT_EQ(service_.Stats().pages_lost, 0u);
}

TEST_F(FakeFaultTest, AnUnmapThatCannotSaveSaysSo) {
  const PageRange range = MustMapPager(1200);
  for (const std::size_t page : {2u, 600u, 1199u}) Fault(PageAt(range, page), /*write=*/true);
  pager_.SetRefusesWrites(true);
  // The first write-back has room, which is kept for the first that is saved; another cannot be saved for want of
  // room, and the third cannot be protected.
  pager_.SetWriteHook([&](std::uint64_t page) {
    if (page != 1199) return;
    kernel_.FailNth(FakeKernel::Operation::kReserve, 1, ENOMEM);
    userfault_.FailNext(Call::kWriteProtect, 1, Error::System(ENOMEM));
  });
  testing::internal::CaptureStderr();
  EXPECT_TRUE(space_->Unmap(range).ok());
  EXPECT_NE(testing::internal::GetCapturedStderr().find("did not take back"), std::string::npos);
  EXPECT_EQ(service_.Stats().pages_lost, 3u);
}

TEST_F(FakeFaultTest, MapPagerFailsAsAWhole) {
  for (int n = 1; n < 20; ++n) {
    kernel_.FailNthOfAny(static_cast<std::size_t>(n), ENOMEM);
    const std::size_t before = kernel_.InjectedFailures();
    const Result<PageRange> range = service_.MapPager(pager_, 0, {16});
    const bool reached = kernel_.InjectedFailures() > before;
    kernel_.StopFailing();
    if (!reached) {
      ASSERT_TRUE(range.ok());
      EXPECT_GT(n, 3) << "memory for the mapping, and its place";
      break;
    }
    ASSERT_EQ(range.error(), Error::System(ENOMEM));
    EXPECT_EQ(space_->Stats().mapped.value, 0u);
  }
  userfault_.FailNext(Call::kRegister, 1, Error::System(EINVAL));
  EXPECT_EQ(service_.MapPager(pager_, 0, {16}).error(), Error::System(EINVAL));
  EXPECT_TRUE(pager_.released().empty());
}

TEST_F(FakeFaultTest, EvictionOfAFailedWriteBackThatCannotBePutBack) {
  const PageRange range = MustMapPager(16);
  Fault(PageAt(range, 2), /*write=*/true);
  WriteWord(PageAt(range, 2), 2);
  pager_.SetRefusesWrites(true);
  pager_.SetWriteHook([&](std::uint64_t) {
    userfault_.Drop(range);
    userfault_.FailNext(Call::kCopy, 1, Error::System(ENOMEM));
  });
  testing::internal::CaptureStderr();
  EXPECT_EQ(service_.Evict(range), Error::System(ENOSPC));
  EXPECT_NE(testing::internal::GetCapturedStderr().find("did not take back"), std::string::npos);
  EXPECT_EQ(service_.Stats().pages_lost, 1u);
}

TEST(FaultStartTest, SaysWhyItCannotStart) {
  FakeKernel kernel;
  const TestSpace space(kernel, SmallOptions());
  {
    FakeUserfault userfault;
    userfault.FailNext(Call::kOpen, 1, Error::System(EMFILE));
    FaultService service(*space, userfault);
    EXPECT_EQ(service.Start(), Error::System(EMFILE));
  }
  {
    FakeUserfault userfault;
    FaultService service(*space, userfault);
    kernel.FailNth(FakeKernel::Operation::kReserve, 2, ENOMEM);
    EXPECT_EQ(service.Start(), Error::System(ENOMEM));
    EXPECT_EQ(service.Stats().threads, 1u);
  }
}

// Refused, a new thread is not missed until all others are busy.
TEST(FaultStartTest, ServesWithTheThreadsThatItHas) {
  FakeKernel kernel;
  const TestSpace space(kernel, SmallOptions());
  FakeUserfault userfault;
  TestPager pager;
  FaultService service(*space, userfault, {.min_threads = 1, .max_threads = 2});
  ASSERT_TRUE(service.Start().ok());
  const Result<PageRange> range = service.MapPager(pager, 0, {64});
  ASSERT_TRUE(range.ok());
  kernel.FailAlways(FakeKernel::Operation::kReserve, ENOMEM);
  for (std::size_t page = 0; page < 64; page += 16) {
    userfault.Raise({.page = PageAt(*range, page)});
    EXPECT_TRUE(userfault.AwaitWoken(PageAt(*range, page)));
  }
  EXPECT_EQ(service.Stats().threads, 1u);
  kernel.StopFailing();
}

// ---- Without userfaultfd ----

class UnavailableTest : public testing::Test {
 protected:
  void SetUp() override {
    userfault_.FailNext(Call::kOpen, 1, {ErrorCode::kUnsupported});
    ASSERT_TRUE(service_.Start().ok());
    ASSERT_FALSE(service_.available());
  }

  static constexpr PagerMapOptions kPopulate = {.when_unavailable = WhenUnavailable::kPopulate};

  FakeKernel kernel_;
  TestSpace space_{kernel_, SmallOptions()};
  FakeUserfault userfault_;
  TestPager pager_;
  TrapScope traps_;
  FaultService service_{*space_, userfault_};
};

TEST_F(UnavailableTest, FailsUnlessAskedToPopulate) {
  EXPECT_EQ(service_.MapPager(pager_, 0, {16}).error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(space_->Stats().mapped.value, 0u);
}

TEST_F(UnavailableTest, PopulatesAtMap) {
  const Result<PageRange> range = service_.MapPager(pager_, 7, {600}, kPopulate);
  ASSERT_TRUE(range.ok());
  for (std::size_t page = 0; page < 600; ++page) EXPECT_EQ(ReadWord(PageAt(*range, page)), WordOf(7 + page, 0));
  WriteWord(PageAt(*range, 5), 55);
  EXPECT_TRUE(space_->Populate(*range).ok());
  EXPECT_EQ(ReadWord(PageAt(*range, 5)), 55u);
  EXPECT_EQ(service_.Evict(*range).code, ErrorCode::kUnsupported);
  EXPECT_EQ(service_.Invalidate(*range).code, ErrorCode::kUnsupported);
  ASSERT_TRUE(service_.Writeback(Part(*range, 0, 8)).ok());
  EXPECT_EQ(pager_.stored_pages().size(), 8u) << "nobody knows which of them were written to";
  EXPECT_EQ(pager_.StoredWord(12), 55u);
  WriteWord(PageAt(*range, 599), 66);
  ASSERT_TRUE(space_->Unmap(*range).ok());
  EXPECT_EQ(pager_.StoredWord(606), 66u);
  EXPECT_EQ(pager_.released().size(), 1u);
}

TEST_F(UnavailableTest, ReadOnlyMappingsAreReadOnlyWhenFull) {
  PagerMapOptions options = kPopulate;
  options.protection = Protection::kRead;
  options.max_protection = Protection::kRead;
  const Result<PageRange> range = service_.MapPager(pager_, 0, {16}, options);
  ASSERT_TRUE(range.ok());
  EXPECT_EQ(ReadWord(PageAt(*range, 9)), WordOf(9, 0));
  EXPECT_EQ(TryWrite(PageAt(*range, 9), 1).signal, SIGSEGV);
  ASSERT_TRUE(space_->Unmap(*range).ok());
  EXPECT_TRUE(pager_.writes().empty());
}

TEST_F(UnavailableTest, APagerThatFailsIsAnErrorOfTheMap) {
  pager_.FailPage(100);
  EXPECT_EQ(service_.MapPager(pager_, 0, {128}, kPopulate).error(), Error::System(EIO));
  EXPECT_EQ(space_->Stats().mapped.value, 0u);
  pager_.FailPage(100, false);
  pager_.SetThrows(true);
  EXPECT_EQ(service_.MapPager(pager_, 0, {128}, kPopulate).error().code, ErrorCode::kThrew);
  pager_.SetThrows(false);
  EXPECT_TRUE(pager_.released().empty());
  EXPECT_TRUE(service_.MapPager(pager_, 0, {128}, kPopulate).ok());
}

TEST_F(UnavailableTest, DoesNotGrow) {
  PagerMapOptions options = kPopulate;
  options.capacity = {32};
  const Result<PageRange> range = service_.MapPager(pager_, 0, {16}, options);
  ASSERT_TRUE(range.ok());
  EXPECT_EQ(space_->Remap(*range, {20}).error().code, ErrorCode::kUnsupported);
  EXPECT_TRUE(space_->Remap(*range, {8}).ok());
  EXPECT_EQ(ReadWord(PageAt(*range, 7)), WordOf(7, 0));
}

// ---- Bits ----

TEST(PageBitmapTest, RunsAcrossWords) {
  std::uint64_t words[4] = {};
  PageBitmap bits(words);
  EXPECT_EQ(PageBitmap::SizeFor({65}).value, 16u);
  EXPECT_EQ(bits.FindSet(0, 256), 256u);
  EXPECT_EQ(bits.FindClear(0, 256), 0u);
  bits.Set(60, 200);
  EXPECT_FALSE(bits.Test(59));
  EXPECT_TRUE(bits.Test(60));
  EXPECT_TRUE(bits.Test(199));
  EXPECT_FALSE(bits.Test(200));
  EXPECT_EQ(bits.FindSet(0, 256), 60u);
  EXPECT_EQ(bits.FindSet(0, 50), 50u);
  EXPECT_EQ(bits.FindClear(60, 256), 200u);
  EXPECT_EQ(bits.FindClear(100, 150), 150u);
  bits.Clear(64, 128);
  EXPECT_EQ(bits.FindClear(60, 256), 64u);
  EXPECT_EQ(bits.FindSet(64, 256), 128u);
  bits.Set(0, 256);
  EXPECT_EQ(bits.FindClear(0, 256), 256u);
}

}  // namespace
}  // namespace freehold::vm
