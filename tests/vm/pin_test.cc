// Pins: what is pinned is not handed to anybody before the last pin goes.
#include "vm/pin.h"


#include <cerrno>
#include <cstdlib>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/os/check.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"
#include "vm/sync/range_lock.h"

namespace freehold::vm::test {
namespace {

using os::Protection;

class PinTest : public testing::TestWithParam<sync::LockPolicy> {
 protected:
  // Whether a fixed map finds the page free; it is mapped then.
  Error TryMapAt(PageRange range) { return space_->Map(range.count(), At(range.first)).error(); }

  os::FakeKernel kernel_;
  TestSpace space_{kernel_, SmallOptions(GetParam())};
};

FREEHOLD_INSTANTIATE_POLICIES(PinTest);

TEST_P(PinTest, RefusesWhatCannotBePinned) {
  const PageRange range = MustMap(*space_, 4);
  EXPECT_EQ(Pin(*space_, {range.first, range.first}).error().code, ErrorCode::kEmpty);
  EXPECT_EQ(Pin(*space_, {range.end, range.first}).error().code, ErrorCode::kOverflow);
  const PageNumber end = space_->reservation().end;
  EXPECT_EQ(Pin(*space_, PageRange::Of(end, {1})).error().code, ErrorCode::kOutsideReservation);
  EXPECT_EQ(Pin(*space_, Part(space_->reservation(), 0, kSmallRegionPages + 1)).error().code,
            ErrorCode::kOutsideReservation);
  EXPECT_EQ(Pin(*space_, Part(range, 0, 5)).error().code, ErrorCode::kNotMapped);
  ASSERT_TRUE(space_->Unmap(Part(range, 1, 1)).ok());
  EXPECT_EQ(Pin(*space_, range).error().code, ErrorCode::kNotMapped);
  EXPECT_TRUE(Pin(*space_, Part(range, 2, 2)).ok());
  EXPECT_EQ(space_->Stats().deferred_unmaps, 0u);
}

TEST_P(PinTest, UnmapWaitsForTheLastPin) {
  const PageRange range = MustMap(*space_, 4);
  Fill(range, 7);
  std::optional<Pin> first(std::in_place, *space_, Part(range, 0, 2));
  std::optional<Pin> second(std::in_place, *space_, Part(range, 1, 3));
  ASSERT_TRUE(first->ok());
  ASSERT_TRUE(second->ok());
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(space_->Lookup(range.first).error().code, ErrorCode::kNotMapped);
  EXPECT_EQ(space_->Stats().mapped, Bytes{0});
  EXPECT_EQ(space_->Stats().deferred_unmaps, 1u);
  // Nobody gets it, by any way of mapping, and it cannot be pinned once more.
  for (int i = 0; i < 100; ++i) {
    MapOptions options;
    options.content = Content::kAnything;
    EXPECT_FALSE(MustMap(*space_, 4, options).Overlaps(range));
  }
  EXPECT_EQ(TryMapAt(range).code, ErrorCode::kPinned);
  EXPECT_EQ(space_->Map({2}, At(range.first, Placement::kReplace)).error().code, ErrorCode::kPinned);
  EXPECT_EQ(Pin(*space_, range).error().code, ErrorCode::kNotMapped);
  EXPECT_TRUE(IsFilledWith(range, 7));
  first.reset();
  EXPECT_EQ(TryMapAt(Part(range, 0, 1)).code, ErrorCode::kPinned);  // its extent is pinned, if not the page
  EXPECT_TRUE(IsFilledWith(range, 7));
  second.reset();
  EXPECT_EQ(space_->Stats().deferred_unmaps, 0u);
  ASSERT_TRUE(TryMapAt(range).ok());
  EXPECT_TRUE(IsZero(range));
}

//   mapped    |    a    |    b    |
//   pinned        ^^
//   unmapped         ^^^^^^^^^^
TEST_P(PinTest, OnlyWhatIsPinnedWaits) {
  const PageRange range = MustMap(*space_, 8);
  const Pin pin(*space_, Part(range, 1, 2));
  ASSERT_TRUE(pin.ok());
  ASSERT_TRUE(space_->Unmap(Part(range, 3, 4)).ok());
  EXPECT_EQ(space_->Stats().deferred_unmaps, 0u);
  EXPECT_TRUE(TryMapAt(Part(range, 3, 4)).ok());
  ASSERT_TRUE(space_->Unmap(Part(range, 2, 2)).ok());
  // Both parts that this unmap cut wait, until nothing of each is pinned.
  EXPECT_EQ(TryMapAt(Part(range, 2, 1)).code, ErrorCode::kPinned);
}

TEST_P(PinTest, WhateverTheKernelHasToDoIsDoneLater) {
  struct Case {
    const char* name;
    Protection protection;
  };
  for (const Case& c : {Case{"heap, protected", Protection::kReadWrite}, Case{"mapping", Protection::kRead},
                        Case{"mapping, no access", Protection::kNone}}) {
    SCOPED_TRACE(c.name);
    MapOptions options;
    options.protection = c.protection;
    const PageRange range = MustMap(*space_, 4, options);
    if (c.protection == Protection::kReadWrite) {
      Fill(range, 9);
      ASSERT_TRUE(space_->Protect(Part(range, 1, 2), Protection::kRead).ok());
    }
    {
      const Pin pin(*space_, range);
      ASSERT_TRUE(pin.ok());
      ASSERT_TRUE(space_->Unmap(range).ok());
      EXPECT_TRUE(c.protection != Protection::kReadWrite || IsFilledWith(range, 9));
      EXPECT_NE(space_->Stats().deferred_unmaps, 0u);
    }
    EXPECT_EQ(space_->Stats().deferred_unmaps, 0u);
    ASSERT_TRUE(TryMapAt(range).ok());
    EXPECT_TRUE(IsZero(range));
    Fill(range, 1);
    ASSERT_TRUE(space_->Unmap(range).ok());
  }
}

// The kernel refuses to take the mapping away when the pin goes: the next Tick tries again.
TEST_P(PinTest, RefusedWhenThePinGoes) {
  MapOptions options;
  options.protection = Protection::kRead;
  const PageRange range = MustMap(*space_, 4, options);
  {
    const Pin pin(*space_, range);
    ASSERT_TRUE(pin.ok());
    ASSERT_TRUE(space_->Unmap(range).ok());
    kernel_.FailNth(Operation::kReset, 1, ENOMEM);
  }
  EXPECT_EQ(space_->Stats().deferred_unmaps, 1u);
  EXPECT_EQ(TryMapAt(range).code, ErrorCode::kPinned);
  kernel_.FailNth(Operation::kReset, 1, ENOMEM);
  space_->Tick();
  EXPECT_EQ(space_->Stats().deferred_unmaps, 1u);
  space_->Tick();
  EXPECT_EQ(space_->Stats().deferred_unmaps, 0u);
  EXPECT_TRUE(TryMapAt(range).ok());
}

TEST_P(PinTest, ReplaceAndMoveAreRefusedAndNothingChanges) {
  const PageRange range = MustMap(*space_, 6);
  Fill(range, 5);
  {
    const Pin pin(*space_, Part(range, 2, 1));
    ASSERT_TRUE(pin.ok());
    EXPECT_EQ(space_->Map({6}, At(range.first, Placement::kReplace)).error().code, ErrorCode::kPinned);
    RemapOptions move;
    move.placement = Placement::kFixed;
    move.address = (range.first + Pages{1000}).address();
    EXPECT_EQ(space_->Remap(range, {6}, move).error().code, ErrorCode::kPinned);
    EXPECT_EQ(Vmas(*space_).size(), 1u);
    EXPECT_TRUE(IsFilledWith(range, 5));
    // Beside it, and everything that keeps the pages, is fine.
    EXPECT_TRUE(space_->Map({2}, At(range.first, Placement::kReplace)).ok());
    EXPECT_TRUE(space_->Protect(Part(range, 2, 4), Protection::kRead).ok());
    EXPECT_TRUE(space_->Remap(Part(range, 2, 4), {8}).ok());
  }
  EXPECT_TRUE(space_->Map({6}, At(range.first, Placement::kReplace)).ok());
}

TEST_P(PinTest, ManyExtentsWaitAndGoTogether) {
  const PageRange all = Part(ZoneRange(*space_, Zone::kMapping), 0, 60);
  for (std::size_t i = 0; i < 60; ++i) {
    MustMapAt(*space_, Part(all, i, 1), i % 2 == 0 ? Protection::kRead : Protection::kReadWrite);
  }
  {
    const Pin pin(*space_, all);
    ASSERT_TRUE(pin.ok());
    ASSERT_TRUE(space_->Unmap(all).ok());
    EXPECT_EQ(space_->Stats().deferred_unmaps, 60u);
  }
  EXPECT_EQ(space_->Stats().deferred_unmaps, 0u);
  EXPECT_TRUE(TryMapAt(all).ok());
}

TEST_P(PinTest, AnotherThreadMayEndIt) {
  const PageRange range = MustMap(*space_, 4);
  auto pin = std::make_unique<Pin>(*space_, range);
  ASSERT_TRUE(pin->ok());
  ASSERT_TRUE(space_->Unmap(range).ok());
  std::thread([&] { pin.reset(); }).join();
  EXPECT_TRUE(TryMapAt(range).ok());
}

TEST_P(PinTest, TheChildOfAForkHasNone) {
  const PageRange waiting = MustMap(*space_, 4);
  const PageRange range = MustMap(*space_, 4);
  std::optional<Pin> first(std::in_place, *space_, waiting);
  std::optional<Pin> second(std::in_place, *space_, range);
  ASSERT_TRUE(first->ok() && second->ok());
  ASSERT_TRUE(space_->Unmap(waiting).ok());
  Fork(*space_, [&] {
    FREEHOLD_CHECK(space_->Unmap(range).ok() && TryMapAt(range).ok());
    space_->Tick();
    FREEHOLD_CHECK(space_->Stats().deferred_unmaps == 0 && TryMapAt(waiting).ok());
    const Pin pin(*space_, range);
    first.reset();
    second.reset();
    FREEHOLD_CHECK(pin.ok() && space_->Unmap(range).ok() && space_->Stats().deferred_unmaps == 1);
  });
  EXPECT_EQ(space_->Stats().deferred_unmaps, 1u);
  first.reset();
  EXPECT_EQ(space_->Stats().deferred_unmaps, 0u);
}

// Owners map, fill, unmap; "devices" pin what they see and check that nobody else's content appears under the pin.
TEST_P(PinTest, NobodyWritesUnderAPin) {
  constexpr int kRounds = kSanitized ? 500 : 3000;
  constexpr std::size_t kPages = 4;
  std::atomic<std::uint64_t> shown{0};  // the address of a buffer whose first word was written
  std::atomic<std::uint64_t> shown_generation{0};
  std::atomic<bool> stop{false};
  std::atomic<int> pinned{0};
  std::thread device([&] {
    while (!stop.load()) {
      const std::uint64_t address = shown.load(std::memory_order_acquire);
      if (address == 0) continue;
      const PageRange range = PageRange::Of(PageNumber::Of(reinterpret_cast<void*>(address)), {kPages});
      const Pin pin(*space_, range);
      // Another mapping may have come to the address since, and its owner writes to it.
      const Result<VmaInfo> vma = space_->Lookup(range.first);
      if (!pin.ok() || !vma.ok() || vma->generation != shown_generation.load(std::memory_order_acquire)) continue;
      const auto* word = reinterpret_cast<std::atomic<std::uint64_t>*>(address);
      const std::uint64_t stamp = word->load(std::memory_order_relaxed);
      for (int i = 0; i < 20; ++i) {
        std::this_thread::yield();
        ASSERT_EQ(word->load(std::memory_order_relaxed), stamp);
      }
      pinned.fetch_add(1);
    }
  });
  std::thread other([&] {  // takes what is free, and writes all over it
    while (!stop.load()) {
      MapOptions options;
      options.content = Content::kAnything;
      const Result<PageRange> range = space_->Map({kPages}, options);
      if (!range.ok()) continue;
      reinterpret_cast<std::atomic<std::uint64_t>*>(range->address())->store(1, std::memory_order_relaxed);
      ASSERT_TRUE(space_->Unmap(*range).ok());
    }
  });
  for (int round = 1; round <= kRounds || pinned.load() < 20; ++round) {
    MapOptions options;
    options.content = Content::kAnything;
    const PageRange range = MustMap(*space_, kPages, options);
    reinterpret_cast<std::atomic<std::uint64_t>*>(range.address())->store(1000 + round, std::memory_order_relaxed);
    shown_generation.store(space_->Lookup(range.first)->generation, std::memory_order_release);
    shown.store(reinterpret_cast<std::uint64_t>(range.address()), std::memory_order_release);
    for (int i = 0; i < round % 8; ++i) std::this_thread::yield();
    shown.store(0, std::memory_order_release);
    ASSERT_TRUE(space_->Unmap(range).ok());
  }
  stop.store(true);
  device.join();
  other.join();
  EXPECT_EQ(space_->Stats().deferred_unmaps, 0u);
}

}  // namespace
}  // namespace freehold::vm::test
