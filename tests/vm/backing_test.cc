// Mappings with a backing, by one whose page n is full of the byte n: what verbs make of them.
#include "vm/backing.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"

namespace freehold::vm::test {
namespace {

using os::Protection;

constexpr std::size_t kPages = 64;

// A memory file of kPages pages, mapped shared.
class NumberedPages final : public Backing {
 public:
  explicit NumberedPages(Protection max_protection = Protection::kReadWrite) : Backing(max_protection) {
    file_ = memfd_create("numbered", MFD_CLOEXEC);
    for (std::size_t page = 0; page < kPages; ++page) {
      const std::string content(kPageSize, static_cast<char>(page));
      if (pwrite(file_, content.data(), kPageSize, static_cast<off_t>(page * kPageSize)) != kPageSize) {
        throw std::runtime_error("pwrite");
      }
    }
  }
  ~NumberedPages() { close(file_); }

  Error Install(os::Kernel&, PageRange range, std::uint64_t page, Protection protection, bool occupied) override {
    installs.push_back({range, page});
    saw_occupied = saw_occupied || occupied;
    if (refuse) return Error::System(ENODEV);
    const int access = ((protection == Protection::kRead || protection == Protection::kReadWrite) ? PROT_READ : 0) |
                       (protection == Protection::kReadWrite ? PROT_WRITE : 0);
    void* mapped = mmap(range.address(), range.bytes().value, access, MAP_SHARED | MAP_FIXED, file_,
                        static_cast<off_t>(page * kPageSize));
    return mapped == MAP_FAILED ? Error::System(errno) : Error::Ok();
  }
  void Flush(os::Kernel&, PageRange range, std::uint64_t page) override { flushes.push_back({range, page}); }

  using Call = std::pair<PageRange, std::uint64_t>;
  std::vector<Call> installs;
  std::vector<Call> flushes;
  int unused = 0;
  bool refuse = false;
  bool saw_occupied = false;

 private:
  void OnUnused() override { ++unused; }

  int file_;
};

MapOptions With(Backing& backing, std::uint64_t page, Protection protection = Protection::kReadWrite) {
  MapOptions options;
  options.backing = &backing;
  options.backing_page = page;
  options.protection = protection;
  return options;
}

MapOptions WithAt(Backing& backing, std::uint64_t page, PageNumber at, Placement placement = Placement::kReplace) {
  MapOptions options = With(backing, page);
  options.placement = placement;
  options.address = at.address();
  return options;
}

// Whether `range` shows the backing's pages from `page` on.
bool Shows(PageRange range, std::uint64_t page) {
  for (std::size_t i = 0; i < range.count().value; ++i) {
    if (!IsFilledWith(Part(range, i, 1), static_cast<int>(page + i))) return false;
  }
  return true;
}

class BackingTest : public testing::Test {
 protected:
  // What is mapped in `range`: the backing's page that each VMA starts with, "-" for anonymous ones.
  std::string Draw(PageRange range) {
    std::string drawn;
    for (const VmaInfo& vma : Vmas(*space_)) {
      if (!range.Overlaps(vma.range)) continue;
      drawn += "[" + std::to_string((vma.range.first - range.first).value) + "," +
               std::to_string((vma.range.end - range.first).value) + ":" +
               (vma.backing == nullptr ? std::string("-") : std::to_string(vma.backing_page)) + "]";
    }
    return drawn;
  }

  os::LinuxKernel kernel_;
  NumberedPages backing_;
  TestSpace space_{kernel_};
};

TEST_F(BackingTest, ShowsItsContentFromThePageAskedFor) {
  const PageRange range = MustMap(*space_, 4, With(backing_, 10));
  EXPECT_TRUE(ZoneRange(*space_, Zone::kMapping).Contains(range));
  EXPECT_TRUE(Shows(range, 10));
  const Result<VmaInfo> vma = space_->Lookup(range.first);
  ASSERT_TRUE(vma.ok());
  EXPECT_EQ(vma->backing, &backing_);
  EXPECT_EQ(vma->backing_page, 10u);
  EXPECT_EQ(backing_.pages(), 4u);
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(backing_.unused, 1);
  EXPECT_EQ(backing_.flushes, (std::vector<NumberedPages::Call>{{range, 10}}));
  // The address space is anonymous memory again.
  const PageRange again = MustMap(*space_, 4, At(range.first));
  EXPECT_TRUE(IsZero(again));
}

//   before   | 10  11  12  13  14  15 |
//   unmap            ^^^^^^
//   after    | 10  11 |     | 14  15  |
TEST_F(BackingTest, PartsKeepTheirPages) {
  const PageRange range = MustMap(*space_, 6, With(backing_, 10));
  ASSERT_TRUE(space_->Unmap(Part(range, 2, 2)).ok());
  EXPECT_EQ(Draw(range), "[0,2:10][4,6:14]");
  EXPECT_TRUE(Shows(Part(range, 0, 2), 10));
  EXPECT_TRUE(Shows(Part(range, 4, 2), 14));
  EXPECT_EQ(backing_.pages(), 4u);
  EXPECT_EQ(backing_.flushes, (std::vector<NumberedPages::Call>{{Part(range, 2, 2), 12}}));
  EXPECT_EQ(backing_.unused, 0);
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(backing_.unused, 1);
}

TEST_F(BackingTest, ProtectSplitsAndMergesAgain) {
  const PageRange range = MustMap(*space_, 6, With(backing_, 10));
  ASSERT_TRUE(space_->Protect(Part(range, 2, 2), Protection::kRead).ok());
  EXPECT_EQ(Draw(range), "[0,2:10][2,4:12][4,6:14]");
  ASSERT_TRUE(space_->Protect(Part(range, 2, 2), Protection::kReadWrite).ok());
  EXPECT_EQ(Draw(range), "[0,6:10]");
  EXPECT_TRUE(Shows(range, 10));
  EXPECT_EQ(backing_.pages(), 6u);
}

// Two mappings side by side are two, even where one goes on with the other's pages.
TEST_F(BackingTest, NeighboursOfOneBackingStayTwo) {
  const PageRange range = MustMap(*space_, 6, With(backing_, 0));
  ASSERT_TRUE(space_->Map({3}, WithAt(backing_, 3, (range.first + Pages{3}))).ok());
  EXPECT_EQ(Draw(range), "[0,3:0][3,6:3]");
  EXPECT_EQ(backing_.pages(), 6u);
}

TEST_F(BackingTest, NoMoreAccessThanItAllows) {
  NumberedPages readable(Protection::kRead);
  EXPECT_EQ(space_->Map({2}, With(readable, 0)).error().code, ErrorCode::kDenied);
  EXPECT_EQ(readable.pages(), 0u);
  EXPECT_TRUE(readable.installs.empty());
  const PageRange range = MustMap(*space_, 2, With(readable, 0, Protection::kRead));
  EXPECT_EQ(space_->Protect(range, Protection::kReadWrite).code, ErrorCode::kDenied);
  EXPECT_EQ(space_->Lookup(range.first)->protection, Protection::kRead);
  EXPECT_TRUE(space_->Protect(range, Protection::kNone).ok());
  EXPECT_TRUE(space_->Protect(range, Protection::kRead).ok());
  EXPECT_TRUE(Shows(range, 0));
  ASSERT_TRUE(space_->Unmap(range).ok());
}

TEST_F(BackingTest, RefusalLeavesNothing) {
  backing_.refuse = true;
  const AddressSpaceStats before = space_->Stats();
  EXPECT_EQ(space_->Map({4}, With(backing_, 0)).error(), Error::System(ENODEV));
  EXPECT_EQ(backing_.pages(), 0u);
  EXPECT_EQ(space_->Stats().mapped, before.mapped);
  const PageNumber at = ZoneRange(*space_, Zone::kPlain).first + Pages{100};
  EXPECT_EQ(space_->Map({4}, WithAt(backing_, 0, at, Placement::kFixed)).error(), Error::System(ENODEV));
  EXPECT_EQ(backing_.unused, 2);
  EXPECT_FALSE(backing_.saw_occupied);
  backing_.refuse = false;
  // The pages that were tried serve as before.
  const PageRange range = PageRange::Of(at, {4});
  MustMapAt(*space_, range);
  EXPECT_TRUE(IsZero(range));
  Fill(range, 1);
}

TEST_F(BackingTest, RefusedReplacementLeavesWhatWasThere) {
  const PageRange range = MustMap(*space_, 4);
  Fill(range, 7);
  backing_.refuse = true;
  EXPECT_EQ(space_->Map({2}, WithAt(backing_, 0, (range.first + Pages{1}))).error(), Error::System(ENODEV));
  EXPECT_TRUE(backing_.saw_occupied);
  EXPECT_EQ(Draw(range), "[0,4:-]");
  EXPECT_TRUE(IsFilledWith(range, 7));
  EXPECT_EQ(backing_.unused, 1);
}

// In every zone: over anonymous memory, and anonymous memory over it.
TEST_F(BackingTest, TakesThePlaceOfAnonymousMemoryAndGivesItBack) {
  for (const Zone zone : {Zone::kPlain, Zone::kDense, Zone::kMapping}) {
    SCOPED_TRACE(static_cast<int>(zone));
    backing_.flushes.clear();
    backing_.unused = 0;
    const PageRange all = Part(ZoneRange(*space_, zone), 1000, 6);
    MustMapAt(*space_, all);
    Fill(all, 9);
    ASSERT_TRUE(space_->Map({2}, WithAt(backing_, 20, (all.first + Pages{2}))).ok());
    EXPECT_EQ(Draw(all), "[0,2:-][2,4:20][4,6:-]");
    EXPECT_TRUE(IsFilledWith(Part(all, 0, 2), 9));
    EXPECT_TRUE(Shows(Part(all, 2, 2), 20));
    EXPECT_TRUE(IsFilledWith(Part(all, 4, 2), 9));
    // One page of it, then the rest.
    ASSERT_TRUE(space_->Map({2}, At(all.first + Pages{1}, Placement::kReplace)).ok());
    EXPECT_EQ(Draw(all), "[0,1:-][1,3:-][3,4:21][4,6:-]");
    EXPECT_TRUE(IsZero(Part(all, 1, 2)));
    EXPECT_TRUE(Shows(Part(all, 3, 1), 21));
    EXPECT_EQ(backing_.pages(), 1u);
    EXPECT_EQ(backing_.flushes, (std::vector<NumberedPages::Call>{{Part(all, 2, 1), 20}}));
    Fill(Part(all, 1, 2), 8);
    ASSERT_TRUE(space_->Unmap(all).ok());
    EXPECT_EQ(backing_.unused, 1);
    MustMapAt(*space_, all);
    EXPECT_TRUE(IsZero(all));
    Fill(all, 5);
    ASSERT_TRUE(space_->Unmap(all).ok());
  }
  // Nothing written above went into the file.
  const PageRange whole = MustMap(*space_, kPages, With(backing_, 0));
  EXPECT_TRUE(Shows(whole, 0));
}

// More extents than one hold of the tree lock visits.
TEST_F(BackingTest, ManyPartsAreReplacedAtOnce) {
  const PageRange all = Part(ZoneRange(*space_, Zone::kMapping), 0, 50);
  MustMapAt(*space_, all, Protection::kRead);
  for (std::size_t i = 0; i < 50; i += 2) {
    ASSERT_TRUE(space_->Map({1}, WithAt(backing_, i, all.first + Pages{i})).ok());
  }
  EXPECT_EQ(backing_.pages(), 25u);
  NumberedPages other;
  ASSERT_TRUE(space_->Map({50}, WithAt(other, 3, all.first)).ok());
  EXPECT_EQ(backing_.pages(), 0u);
  EXPECT_EQ(backing_.unused, 1);
  EXPECT_EQ(other.pages(), 50u);
  EXPECT_EQ(Draw(all), "[0,50:3]");
  EXPECT_TRUE(Shows(all, 3));
  ASSERT_TRUE(space_->Unmap(all).ok());
}

TEST_F(BackingTest, GrowsWithThePagesThatFollow) {
  const PageRange range = MustMap(*space_, 2, With(backing_, 10));
  const Result<PageRange> grown = space_->Remap(range, {5});
  ASSERT_TRUE(grown.ok());
  EXPECT_EQ(grown->first, range.first);
  EXPECT_TRUE(Shows(*grown, 10));
  EXPECT_EQ(Draw(*grown), "[0,5:10]");
  EXPECT_EQ(backing_.pages(), 5u);
  const Result<PageRange> shrunk = space_->Remap(*grown, {1});
  ASSERT_TRUE(shrunk.ok());
  EXPECT_EQ(backing_.pages(), 1u);
  backing_.refuse = true;
  EXPECT_EQ(space_->Remap(*shrunk, {3}).error(), Error::System(ENODEV));
  EXPECT_EQ(backing_.pages(), 1u);
  EXPECT_TRUE(Shows(*shrunk, 10));
  EXPECT_EQ(Draw(*shrunk), "[0,1:10]");
}

// A kernel that does not take the file away: in the mapping zone the unmap fails, in others the memory is reset
// before anybody gets it.
TEST(BackingFailureTest, ResetRefused) {
  os::FakeKernel kernel;
  NumberedPages backing;
  TestSpace space(kernel);
  const PageRange mapping = MustMap(*space, 2, With(backing, 4));
  kernel.FailNth(Operation::kReset, 1, ENOMEM);
  EXPECT_EQ(space->Unmap(mapping), Error::System(ENOMEM));
  EXPECT_EQ(space->Lookup(mapping.first)->backing, &backing);
  EXPECT_EQ(backing.pages(), 2u);
  EXPECT_TRUE(Shows(mapping, 4));
  ASSERT_TRUE(space->Unmap(mapping).ok());

  for (const bool fixed : {false, true}) {
    SCOPED_TRACE(fixed);
    const PageRange plain = MustMap(*space, 2);
    ASSERT_TRUE(space->Map({2}, WithAt(backing, 8, plain.first)).ok());
    kernel.FailNth(Operation::kReset, 1, ENOMEM);
    ASSERT_TRUE(space->Unmap(plain).ok());
    EXPECT_EQ(backing.pages(), 0u);
    MapOptions anywhere;
    anywhere.content = Content::kAnything;  // or it would get memory that is known to be clean
    const PageRange again = MustMap(*space, 2, fixed ? At(plain.first) : anywhere);
    EXPECT_EQ(again, plain);
    EXPECT_TRUE(IsZero(again));
    Fill(again, 3);
    ASSERT_TRUE(space->Unmap(again).ok());
  }
  // By a purge, too.
  const PageRange plain = MustMap(*space, 2);
  ASSERT_TRUE(space->Map({2}, WithAt(backing, 8, plain.first)).ok());
  kernel.FailNth(Operation::kReset, 1, ENOMEM);
  ASSERT_TRUE(space->Unmap(plain).ok());
  (void)space->Purge(PurgeScope::kAll);
  MustMapAt(*space, plain);
  EXPECT_TRUE(IsZero(plain));
  Fill(plain, 3);
  const PageRange whole = MustMap(*space, kPages, With(backing, 0));
  EXPECT_TRUE(Shows(whole, 0));
}

TEST(BackingFailureTest, LockRefused) {
  os::FakeKernel kernel;
  NumberedPages backing;
  TestSpace space(kernel);
  MapOptions options = With(backing, 4);
  options.lock = os::MemoryLock::kOnFault;
  kernel.FailNth(Operation::kLockMemory, 1, EPERM);
  EXPECT_EQ(space->Map({2}, options).error(), Error::System(EPERM));
  EXPECT_EQ(backing.pages(), 0u);
  EXPECT_EQ(space->Stats().mapped, Bytes{0});
  // Over something: refused before anything is lost, or afterwards, which costs the content.
  const PageRange range = MustMap(*space, 2);
  Fill(range, 6);
  options.placement = Placement::kReplace;
  options.address = range.first.address();
  kernel.FailNth(Operation::kLockMemory, 1, EPERM);
  EXPECT_EQ(space->Map({2}, options).error(), Error::System(EPERM));
  EXPECT_TRUE(IsFilledWith(range, 6));
  EXPECT_EQ(backing.pages(), 0u);
}

}  // namespace
}  // namespace freehold::vm::test
