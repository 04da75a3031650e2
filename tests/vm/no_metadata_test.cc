// The metadata arena is exhausted: whoever needs an extent more says so and has changed nothing, and succeeds once there
// is memory again; whoever needs none goes on.
#include <cstdint>
#include <functional>
#include <utility>
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

class NoMetadataTest : public PolicyTest {
 protected:
  PageRange P(std::size_t first, std::size_t count) const { return Part(space_->reservation(), first, count); }

  // What lookups find, and how much there is. (Drawing it at every step takes the sanitizers long.)
  struct Seen {
    std::vector<std::pair<std::uint64_t, os::MemoryLock>> pages;  // generation and lock; 0 where nothing is mapped
    std::uint64_t vmas;
    Bytes mapped;
    friend bool operator==(const Seen&, const Seen&) = default;
  };
  Seen Look(PageRange range) const {
    const AddressSpaceStats stats = space_->Stats();
    Seen seen = {.pages = {}, .vmas = stats.vmas, .mapped = stats.mapped};
    for (PageNumber page = range.first; page < range.end; page = page + Pages{1}) {
      const Result<VmaInfo> vma = space_->Lookup(page);
      seen.pages.emplace_back(vma.ok() ? vma->generation : 0, vma.ok() ? vma->lock : os::MemoryLock::kNone);
    }
    return seen;
  }

  // Calls `verb(i)` for i = 0, 1, ... while the kernel gives no more memory for metadata, until that is
  // missed. The verb that misses it must leave all as it was, and succeed once there is some.
  void ExpectNoMetadata(const std::function<Error(std::size_t i)>& verb) {
    kernel_.FailProtectBeyond(kernel_.CommittedPages().bytes());
    for (std::size_t i = 0;; ++i) {
      const Seen before = Look(P(2 * i, 8));
      const Error error = verb(i);
      if (error.ok()) continue;
      EXPECT_EQ(error.code, ErrorCode::kNoMetadata) << i;
      EXPECT_GT(i, 10u);
      EXPECT_TRUE(Look(P(2 * i, 8)) == before) << Draw(*space_, P(2 * i, 8));
      space_->CheckInvariants();
      EXPECT_EQ(verb(i).code, ErrorCode::kNoMetadata) << "again";
      kernel_.StopFailing();
      EXPECT_EQ(verb(i), Error::Ok());
      return;
    }
  }

  // Uses the metadata up that there is, by cutting what is mapped from page `first` on; the kernel gives no more.
  void UseUp(std::size_t first) {
    kernel_.FailProtectBeyond(kernel_.CommittedPages().bytes());
    Error error;
    for (std::size_t page = first + 1; error.ok(); page += 2) error = space_->Unmap(P(page, 1));
    ASSERT_EQ(error.code, ErrorCode::kNoMetadata);
  }

  // `verb` wants for metadata, has changed nothing, and succeeds once there is some.
  void ExpectNoMetadataLeft(const std::function<Error()>& verb) {
    const Seen before = Look(P(0, 16));
    EXPECT_EQ(verb().code, ErrorCode::kNoMetadata);
    EXPECT_TRUE(Look(P(0, 16)) == before) << Draw(*space_, P(0, 16));
    space_->CheckInvariants();
    kernel_.StopFailing();
    EXPECT_EQ(verb(), Error::Ok());
  }

  FakeKernel kernel_;
  TestSpace space_{kernel_, Options()};
};

TEST_P(NoMetadataTest, ForAFixedMap) {
  MustMap(*space_, kSmallRegionPages);  // all of it committed
  ASSERT_TRUE(space_->Unmap(P(0, kSmallRegionPages)).ok());
  (void)space_->Purge(PurgeScope::kAll);
  ExpectNoMetadata([&](std::size_t i) { return space_->Map({1}, At(P(2 * i, 1).first)).error(); });
}

TEST_P(NoMetadataTest, ForAReplacement) {
  MustMap(*space_, kSmallRegionPages);
  ExpectNoMetadata(
      [&](std::size_t i) { return space_->Map({1}, At(P(2 * i + 1, 1).first, Placement::kReplace)).error(); });
}

TEST_P(NoMetadataTest, ForAMapAnywhere) {
  MustMap(*space_, kSmallRegionPages);
  ASSERT_TRUE(space_->Unmap(P(0, kSmallRegionPages)).ok());
  (void)space_->Purge(PurgeScope::kAll);
  ExpectNoMetadata([&](std::size_t) { return space_->Map({1}).error(); });
}

TEST_P(NoMetadataTest, ForAPartialUnmap) {
  MustMap(*space_, kSmallRegionPages);
  ExpectNoMetadata([&](std::size_t i) { return space_->Unmap(P(2 * i + 1, 1)); });
}

TEST_P(NoMetadataTest, ForAPartialProtect) {
  MustMap(*space_, kSmallRegionPages);
  ExpectNoMetadata([&](std::size_t i) { return space_->Protect(P(2 * i + 1, 1), Protection::kRead); });
}

TEST_P(NoMetadataTest, ForAPartialLock) {
  MustMap(*space_, kSmallRegionPages);
  ExpectNoMetadata([&](std::size_t i) { return space_->LockMemory(P(2 * i + 1, 1), os::MemoryLock::kOnFault); });
}

TEST_P(NoMetadataTest, ForAPartialUnlock) {
  MustMap(*space_, kSmallRegionPages);
  ASSERT_TRUE(space_->LockMemory(P(0, kSmallRegionPages), os::MemoryLock::kOnFault).ok());
  ExpectNoMetadata([&](std::size_t i) { return space_->UnlockMemory(P(2 * i + 1, 1)); });
}

TEST_P(NoMetadataTest, ForTheTargetOfAMove) {
  MustMap(*space_, kSmallRegionPages);
  UseUp(20);
  ExpectNoMetadataLeft([&] { return space_->Remap(P(2, 3), {4}, {.may_move = true}).error(); });
}

// The target, in a region that has metadata, is mapped, and goes again.
TEST_P(NoMetadataTest, ForTheSourceOfAMove) {
  MustMap(*space_, kSmallRegionPages);
  const PageRange target = P(kSmallRegionPages + 8, 3);
  MustMapAt(*space_, target);
  ASSERT_TRUE(space_->Unmap(target).ok());
  UseUp(20);
  ExpectNoMetadataLeft([&] {
    return space_->Remap(P(2, 3), {3}, {.placement = Placement::kFixed, .address = target.address()}).error();
  });
  EXPECT_EQ(Draw(*space_, P(0, 8)), "AA...AAA");
  EXPECT_EQ(Draw(*space_, target), "AAA");
}

TEST_P(NoMetadataTest, ForAMappingThatGrows) {
  MustMap(*space_, kSmallRegionPages);
  ASSERT_TRUE(space_->Unmap(P(8, 4)).ok());
  UseUp(20);
  ExpectNoMetadataLeft([&] { return space_->Remap(P(0, 8), {10}).error(); });
  EXPECT_EQ(Draw(*space_, P(0, 16)), "AAAAAAAAAA..AAAA");
}

TEST_P(NoMetadataTest, ForAMappingThatShrinks) {
  MustMap(*space_, kSmallRegionPages);
  UseUp(20);
  ExpectNoMetadataLeft([&] { return space_->Remap(P(0, 8), {3}).error(); });
}

TEST_P(NoMetadataTest, ForALockOfAll) {
  MustMap(*space_, kSmallRegionPages);
  UseUp(20);
  ExpectNoMetadataLeft([&] {
    const Error error = space_->LockAll({.current = true, .future = true, .lock = os::MemoryLock::kOnFault});
    EXPECT_TRUE(error.ok() || kernel_.LockedPages() == Pages{0});
    return error;
  });
  EXPECT_EQ(kernel_.LockedPages().bytes(), space_->Stats().mapped);
}

TEST_P(NoMetadataTest, ForAnUnlockOfAll) {
  MustMap(*space_, kSmallRegionPages);
  ASSERT_TRUE(space_->LockAll({.current = true, .future = true, .lock = os::MemoryLock::kOnFault}).ok());
  UseUp(20);
  ExpectNoMetadataLeft([&] {
    const Error error = space_->UnlockAll();
    EXPECT_TRUE(error.ok() || kernel_.LockedPages().bytes() == space_->Stats().mapped);
    return error;
  });
  EXPECT_EQ(kernel_.LockedPages(), Pages{0});
  MustMap(*space_, 1);
  EXPECT_EQ(kernel_.LockedPages(), Pages{0}) << "nor are future mappings locked";
}

// They change no VMA.
TEST_P(NoMetadataTest, AdviceAndResidencyNeedNone) {
  MustMap(*space_, kSmallRegionPages);
  Fill(P(0, 8), 0xaa);
  UseUp(20);
  for (const Advice advice : {Advice::kHugePages, Advice::kNoHugePages, Advice::kCold, Advice::kPageOut, Advice::kFree,
                              Advice::kDontNeed, Advice::kWillNeed}) {
    EXPECT_EQ(space_->Advise(P(2, 5), advice), Error::Ok());
  }
  std::vector<std::uint8_t> resident(16);
  EXPECT_EQ(space_->Residency(P(0, 16), absl::MakeSpan(resident)), Error::Ok());
  EXPECT_EQ(resident, (std::vector<std::uint8_t>{1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0}));
}

// There never is more. What is there goes on working, and room that is given back serves again.
TEST_P(NoMetadataTest, ForGood) {
  MustMap(*space_, kSmallRegionPages);
  ASSERT_TRUE(space_->Unmap(P(0, kSmallRegionPages)).ok());
  (void)space_->Purge(PurgeScope::kAll);
  kernel_.FailProtectBeyond(kernel_.CommittedPages().bytes());
  std::vector<PageRange> mapped;
  Error error;
  for (std::size_t page = 0; error.ok() && page < kSmallRegionPages; page += 2) {
    const Result<PageRange> range = space_->Map({1}, At(P(page, 1).first));
    if (range.ok()) mapped.push_back(*range);
    error = range.error();
  }
  EXPECT_EQ(error.code, ErrorCode::kNoMetadata);
  EXPECT_GT(mapped.size(), 1'000u);
  space_->CheckInvariants();
  const PageRange last = mapped.back();
  ASSERT_TRUE(space_->Lookup(last.first).ok());
  // Whole mappings can be unmapped without metadata.
  for (const PageRange range : mapped) ASSERT_EQ(space_->Unmap(range), Error::Ok());
  (void)space_->Purge(PurgeScope::kAll);
  EXPECT_TRUE(Vmas(*space_).empty());
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(IsZero(MustMap(*space_, 3)));
}

FREEHOLD_INSTANTIATE_POLICIES(NoMetadataTest);

}  // namespace
}  // namespace freehold::vm
