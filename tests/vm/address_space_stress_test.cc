// Threads use every verb at the same time, on memory of their own and on memory that they fight for. Each stamps
// what it owns; nobody else's stamp may appear there, and what is new must be zero. Run under TSan above all.
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/address_space.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"

namespace freehold::vm {
namespace {

using namespace test;  // NOLINT: the fixture's words
using os::FakeKernel;
using os::LinuxKernel;
using os::Protection;

constexpr int kThreads = 4;
constexpr auto kDuration = std::chrono::milliseconds(kSanitized ? 1000 : 800);

using Random = std::mt19937;

// Gives the CPU away before some kernel calls, where verbs hold ranges and no tree lock: that is where others
// must be able to get in between without harm.
void Jitter(HookedKernel& kernel) {
  kernel.SetHook([](Operation, absl::Span<const PageRange>) {
    thread_local Random random(static_cast<unsigned>(gettid()));
    switch (random() % 8) {
      case 0: std::this_thread::sleep_for(std::chrono::microseconds(random() % 200)); break;
      case 1:
      case 2: std::this_thread::yield(); break;
      default: break;
    }
  });
}

class StressTest : public PolicyTest {
 protected:
  static AddressSpaceOptions StressOptions() {
    AddressSpaceOptions options = Options();
    options.reserve = MiB(128);
    options.regions_per_zone = 2;
    options.free_resident_limit = MiB(2);
    options.decay = Milliseconds(5);
    return options;
  }

  // Runs `body(thread, random)` again and again in kThreads threads, for a while or until something is wrong.
  void Run(unsigned seed, const std::function<void(int thread, Random& random)>& body) {
    std::printf("seed %u\n", seed);
    const auto end = std::chrono::steady_clock::now() + kDuration;
    std::vector<std::thread> threads;
    std::atomic<std::uint64_t> rounds{0};
    for (int thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&, thread] {
        Random random(seed * 1000 + static_cast<unsigned>(thread));
        while (!testing::Test::HasFailure() && std::chrono::steady_clock::now() < end) {
          body(thread, random);
          rounds.fetch_add(1, std::memory_order_relaxed);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_GT(rounds.load(), 10u);
    space_->CheckInvariants();
  }

  void SetUp() override { Jitter(kernel_); }

  LinuxKernel linux_;
  HookedKernel kernel_{linux_};
  TestSpace space_{kernel_, StressOptions()};
};

// One word a page says who owns it.
std::uint64_t* Word(PageRange range, std::size_t page) {
  return reinterpret_cast<std::uint64_t*>(Part(range, page, 1).address());
}
void Stamp(PageRange range, std::uint64_t owner) {
  for (std::size_t page = 0; page < range.count().value; ++page) *Word(range, page) = owner + page;
}
bool HasStamp(PageRange range, std::uint64_t owner) {
  for (std::size_t page = 0; page < range.count().value; ++page) {
    if (*Word(range, page) != owner + page) return false;
  }
  return true;
}
bool IsUnstamped(PageRange range) {
  for (std::size_t page = 0; page < range.count().value; ++page) {
    if (*Word(range, page) != 0) return false;
  }
  return true;
}

// A mapping of one thread's own, and what its pages hold.
struct Owned {
  PageRange range;
  std::uint64_t stamp;
};

// Memory that Map gave out is nobody else's until it is unmapped, whatever others do elsewhere.
TEST_P(StressTest, OwnMemoryStaysOwn) {
  std::vector<Owned> owned[kThreads];
  std::atomic<std::uint64_t> next_stamp{1};
  Run(1, [&](int thread, Random& random) {
    std::vector<Owned>& mine = owned[thread];
    if (mine.size() < 5 || (mine.size() < 60 && random() % 2 == 0)) {
      MapOptions options;
      std::size_t pages = 1 + random() % 24;
      switch (random() % 8) {
        case 0: options.populate = true; break;
        case 1: options.alignment = {16}; break;
        case 2: options.protection = Protection::kReadWriteExec; break;
        case 3: options.content = Content::kAnything; break;
        case 4: pages = 512 + random() % 100; options.huge_pages = os::HugePages::kPrefer; break;
        default: break;
      }
      const Result<PageRange> range = space_->Map({pages}, options);
      if (!range.ok()) {
        ASSERT_EQ(range.error().code, ErrorCode::kNoRoom);
        if (mine.empty()) return;
      } else {
        ASSERT_EQ(range->count(), Pages{pages});
        ASSERT_TRUE(options.content == Content::kAnything || IsUnstamped(*range));
        const std::uint64_t stamp = next_stamp.fetch_add(1) << 16;
        Stamp(*range, stamp);
        mine.push_back({*range, stamp});
        return;
      }
    }
    std::swap(mine[random() % mine.size()], mine.back());
    Owned& one = mine.back();
    ASSERT_TRUE(HasStamp(one.range, one.stamp));
    switch (random() % 11) {
      case 10: {  // Longer, shorter, elsewhere, or as it is.
        const std::size_t before = one.range.count().value;
        const std::size_t after = 1 + random() % (2 * before);
        const Result<PageRange> remapped = space_->Remap(one.range, {after}, {.may_move = random() % 2 == 0});
        // What was mapped in parts is no longer one VMA for sure: protected, locked or replaced in part.
        if (!remapped.ok()) {
          ASSERT_TRUE(remapped.error().code == ErrorCode::kNoRoom || remapped.error().code == ErrorCode::kNotMapped ||
                      remapped.error().code == ErrorCode::kSystem);
          ASSERT_TRUE(HasStamp(one.range, one.stamp));
          return;
        }
        ASSERT_TRUE(HasStamp(Part(*remapped, 0, std::min(before, after)), one.stamp));
        if (after > before) {
          ASSERT_TRUE(IsUnstamped(Part(*remapped, before, after - before)));
        }
        one.range = *remapped;
        Stamp(one.range, one.stamp);
        return;
      }
      case 9: {  // Locked and unlocked, in parts. There may be a limit.
        const Error error = space_->LockMemory(Part(one.range, 0, 1 + one.range.count().value / 2));
        ASSERT_TRUE(error.ok() || error.code == ErrorCode::kSystem);
        if (random() % 2 == 0) {
          ASSERT_TRUE(space_->UnlockMemory(one.range).ok());
        }
        ASSERT_TRUE(HasStamp(one.range, one.stamp));
        return;
      }
      case 8: {  // The first page is dropped, the others stay.
        ASSERT_TRUE(space_->UnlockMemory(one.range).ok());
        ASSERT_TRUE(space_->Advise(Part(one.range, 0, 1), Advice::kDontNeed).ok());
        ASSERT_EQ(*Word(one.range, 0), 0u);
        *Word(one.range, 0) = one.stamp;
        std::vector<std::uint8_t> resident(one.range.count().value);
        ASSERT_TRUE(space_->Residency(one.range, absl::MakeSpan(resident)).ok());
        ASSERT_TRUE(space_->Advise(one.range, random() % 2 == 0 ? Advice::kCold : Advice::kWillNeed).ok());
        return;
      }
      case 0: {  // The middle turns read-only and back.
        const PageRange middle = Part(one.range, one.range.count().value / 3, 1 + one.range.count().value / 3);
        ASSERT_TRUE(space_->Protect(middle, Protection::kRead).ok());
        ASSERT_TRUE(HasStamp(one.range, one.stamp));
        const Protection back = space_->Lookup(one.range.first)->zone == Zone::kMapping
                                    ? Protection::kReadWriteExec
                                    : Protection::kReadWrite;
        ASSERT_TRUE(space_->Protect(middle, back).ok());
        return;
      }
      case 1:
        ASSERT_TRUE(space_->Populate(one.range).ok());
        ASSERT_TRUE(HasStamp(one.range, one.stamp));
        return;
      case 2: {
        const PageRange part = Part(one.range, 0, 1);
        ASSERT_TRUE(space_->Discard({&part, 1}).ok());
        ASSERT_EQ(*Word(one.range, 0), 0u);
        *Word(one.range, 0) = one.stamp;
        return;
      }
      case 3: {  // Replaced by itself: zero again.
        MustMap(*space_, one.range.count().value, At(one.range.first, Placement::kReplace));
        ASSERT_TRUE(IsUnstamped(one.range));
        Stamp(one.range, one.stamp);
        return;
      }
      case 4: {
        const Result<VmaInfo> vma = space_->Lookup(one.range.first);
        ASSERT_TRUE(vma.ok());
        ASSERT_TRUE(vma->range.Contains(one.range.first));
        return;
      }
      case 5:
        random() % 4 == 0 ? (void)space_->Purge(PurgeScope::kAll) : space_->Tick();
        return;
      default: break;
    }
    // The front stays, or nothing does.
    const std::size_t keep = random() % 2 == 0 ? one.range.count().value / 2 : 0;
    ASSERT_TRUE(space_->Unmap({one.range.first + Pages{keep}, one.range.end}).ok());
    one.range.end = one.range.first + Pages{keep};
    if (keep == 0) mine.pop_back();
  });
  for (const std::vector<Owned>& mine : owned) {
    for (const Owned& one : mine) {
      EXPECT_TRUE(HasStamp(one.range, one.stamp));
      EXPECT_TRUE(space_->Unmap(one.range).ok());
    }
  }
  EXPECT_TRUE(Vmas(*space_).empty());
  space_->CheckInvariants();
}

// Threads map and unmap anywhere in the same few pages. Nobody touches memory here, since nobody owns any; the
// kernel's and the space's idea of it must agree in the end.
TEST_P(StressTest, SharedRangesStayConsistent) {
  constexpr std::size_t kPages = 256;
  Run(2, [&](int, Random& random) {
    const bool heap = random() % 3 != 0;
    const PageRange all = Part(ZoneRange(*space_, heap ? Zone::kPlain : Zone::kMapping), 0, kPages);
    const std::size_t first = random() % kPages;
    const PageRange range = Part(all, first, 1 + random() % std::min<std::size_t>(kPages - first, 40));
    Error error;
    switch (random() % 13) {
      case 12: {
        RemapOptions options;
        if (random() % 2 == 0) {
          options.placement = Placement::kFixed;
          options.address = Part(all, random() % kPages, 1).address();
        }
        error = space_->Remap(range, {1 + random() % 12}, options).error();
        if (error.code == ErrorCode::kNoRoom) error = Error::Ok();
        break;
      }
      case 11:
        error = random() % 3 != 0 ? space_->LockMemory(range, os::MemoryLock::kOnFault) : space_->UnlockMemory(range);
        break;
      case 10: error = space_->Advise(range, static_cast<Advice>(random() % 7)); break;
      case 0:
      case 1: error = space_->Unmap(range); break;
      case 2: error = space_->Map(range.count(), At(range.first)).error(); break;
      case 3: error = space_->Map(range.count(), At(range.first, Placement::kReplace)).error(); break;
      case 4:
        error = space_->Map(range.count(), At(range.first, Placement::kReplace, Protection::kRead)).error();
        break;
      case 5:
        error = space_->Protect(range, random() % 2 == 0 ? Protection::kReadWrite : Protection::kRead);
        break;
      case 6: error = space_->Populate(range).error(); break;
      case 7: error = space_->Discard({&range, 1}); break;
      case 8: {
        const Result<VmaInfo> vma = space_->Lookup(range.first);
        ASSERT_TRUE(!vma.ok() || vma->range.Contains(range.first));
        error = vma.error();
        break;
      }
      default: {
        // Anywhere, in competition with the fixed ones: this memory is its own for as long as nobody unmaps it.
        MapOptions options;
        if (!heap) options.protection = Protection::kRead;
        const Result<PageRange> mapped = space_->Map({1 + random() % 8}, options);
        if (mapped.ok() && random() % 2 == 0) error = space_->Unmap(*mapped);
        if (random() % 16 == 0) (void)space_->Purge(PurgeScope::kAll);
        break;
      }
    }
    switch (error.code) {
      case ErrorCode::kOk:
      case ErrorCode::kOverlap:
      case ErrorCode::kNotMapped:
      case ErrorCode::kReplaced:
      case ErrorCode::kUnsupported:
      case ErrorCode::kSystem: break;  // locked memory has limits
      default: FAIL() << testing::PrintToString(error);
    }
  });
  // Everything that says it is writable is, and zero or not, it is one mapping's.
  for (const VmaInfo& vma : Vmas(*space_)) {
    if (vma.protection == Protection::kReadWrite) Fill(vma.range, 0xaa);
  }
  ASSERT_TRUE(space_->Unmap(space_->reservation()).ok());
  EXPECT_TRUE(Vmas(*space_).empty());
  EXPECT_EQ(space_->Stats().mapped, Bytes{0});
  const PageRange all = Part(space_->reservation(), 0, kPages);
  MustMapAt(*space_, all);
  EXPECT_TRUE(IsZero(all));
}

// Fixed maps that succeed are exclusive: between them and the unmap, the pages are that thread's alone, although
// all threads try the same few addresses.
TEST_P(StressTest, FixedMapsAreExclusive) {
  constexpr std::size_t kPages = 64;
  const PageRange all = Part(space_->reservation(), 0, kPages);
  std::atomic<std::uint64_t> next_stamp{1};
  std::atomic<std::uint64_t> won{0};
  Run(3, [&](int, Random& random) {
    const std::size_t first = random() % kPages;
    const PageRange range = Part(all, first, 1 + random() % std::min<std::size_t>(kPages - first, 12));
    const Result<PageRange> mapped = random() % 4 == 0 ? space_->Map(range.count())
                                                       : space_->Map(range.count(), At(range.first));
    if (!mapped.ok()) {
      ASSERT_EQ(mapped.error().code, ErrorCode::kOverlap);
      return;
    }
    won.fetch_add(1, std::memory_order_relaxed);
    ASSERT_TRUE(IsUnstamped(*mapped));
    const std::uint64_t stamp = next_stamp.fetch_add(1) << 16;
    Stamp(*mapped, stamp);
    if (random() % 8 == 0) std::this_thread::yield();
    if (random() % 16 == 0) (void)space_->Purge(PurgeScope::kAll);
    ASSERT_TRUE(HasStamp(*mapped, stamp));
    if (random() % 4 == 0 && mapped->count() > Pages{1}) {
      ASSERT_TRUE(space_->Unmap(Part(*mapped, 0, 1)).ok());
      const PageRange rest = {mapped->first + Pages{1}, mapped->end};
      ASSERT_TRUE(HasStamp(rest, stamp + 1));
      ASSERT_TRUE(space_->Unmap(rest).ok());
    } else {
      ASSERT_TRUE(space_->Unmap(*mapped).ok());
    }
  });
  EXPECT_GT(won.load(), 50u);
  EXPECT_TRUE(Vmas(*space_).empty());
}

// One region with almost no room: every map takes from caches, purges, and merges, at the same time.
TEST_P(StressTest, TightRoom) {
  constexpr std::size_t kPages = MiB(4).value / kPageSize;
  AddressSpaceOptions options = Options();
  options.reserve = MiB(16);
  options.free_resident_limit = KiB(64);
  options.decay = Milliseconds(1);
  TestSpace tiny(kernel_, options);
  std::atomic<std::uint64_t> no_room{0};
  Run(4, [&](int thread, Random& random) {
    std::vector<Owned> mine;
    for (std::uint64_t i = 0; i < 12; ++i) {
      const Result<PageRange> range = tiny->Map({1 + random() % (kPages / 12)}, {.alignment = {1u << random() % 4}});
      if (!range.ok()) {
        ASSERT_EQ(range.error().code, ErrorCode::kNoRoom);
        no_room.fetch_add(1, std::memory_order_relaxed);
        break;
      }
      ASSERT_TRUE(IsUnstamped(*range));
      const std::uint64_t stamp = (static_cast<std::uint64_t>(thread + 1) << 32) + (i << 16);
      Stamp(*range, stamp);
      mine.push_back({*range, stamp});
    }
    for (const Owned& one : mine) {
      ASSERT_TRUE(HasStamp(one.range, one.stamp));
      ASSERT_TRUE(tiny->Unmap(one.range).ok());
    }
    if (random() % 8 == 0) tiny->Tick();
  });
  EXPECT_TRUE(Vmas(*tiny).empty());
  // All of it merges again.
  (void)tiny->Purge(PurgeScope::kAll);
  EXPECT_TRUE(IsZero(MustMap(*tiny, kPages)));
  EXPECT_TRUE(IsZero(MustMap(*tiny, kPages)));
}

// Visitors and statistics beside everything else.
TEST_P(StressTest, ReadersBesideWriters) {
  std::vector<PageRange> owned[kThreads];
  Run(5, [&](int thread, Random& random) {
    if (thread == 0) {
      PageNumber last = space_->reservation().first;
      for (const VmaInfo& vma : Vmas(*space_)) {
        ASSERT_LT(vma.range.first, vma.range.end);
        ASSERT_LE(last, vma.range.first) << "ascending";
        last = vma.range.first;
      }
      const AddressSpaceStats stats = space_->Stats();
      ASSERT_LE(stats.mapped, stats.reserved);
      return;
    }
    std::vector<PageRange>& mine = owned[thread];
    if (mine.size() < 100 && random() % 2 == 0) {
      const Result<PageRange> range = space_->Map({1 + random() % 4});
      ASSERT_TRUE(range.ok());
      mine.push_back(*range);
    } else if (!mine.empty()) {
      std::swap(mine[random() % mine.size()], mine.back());
      for (PageNumber page = mine.back().first; page < mine.back().end; page = page + Pages{1}) {
        const Result<VmaInfo> vma = space_->Lookup(page);
        ASSERT_TRUE(vma.ok());
        ASSERT_EQ(vma->range, mine.back());
      }
      ASSERT_TRUE(space_->Unmap(mine.back()).ok());
      mine.pop_back();
    }
  });
}

// What is mapped all the time is found all the time, while it is split, merged and replaced: a lookup finds the
// mapping that was there or a newer one, and its range holds the page.
TEST_P(StressTest, LookupsNeverMissWhatIsMapped) {
  constexpr std::size_t kPages = 160;
  const PageRange all = Part(space_->reservation(), 0, kPages);
  MustMapAt(*space_, all);
  std::vector<std::uint64_t> newest[kThreads];
  for (std::vector<std::uint64_t>& one : newest) one.resize(kPages);
  Run(7, [&](int thread, Random& random) {
    const std::size_t first = random() % kPages;
    if (thread < 2) {
      const Result<VmaInfo> vma = space_->Lookup(Part(all, first, 1).first);
      ASSERT_TRUE(vma.ok());
      ASSERT_TRUE(vma->range.Contains(Part(all, first, 1).first));
      ASSERT_TRUE(all.Contains(vma->range));
      ASSERT_GE(vma->generation, newest[thread][first]) << "an old mapping after a new one";
      newest[thread][first] = vma->generation;
      return;
    }
    // Single pages most of the time, so that whole runs of VMAs are there to be replaced and protected.
    const std::size_t most = random() % 8 == 0 ? kPages - first : std::min<std::size_t>(kPages - first, 2);
    const PageRange range = Part(all, first, 1 + random() % most);
    if (random() % 2 == 0) {
      MapOptions options = At(range.first, Placement::kReplace);
      options.content = Content::kAnything;
      ASSERT_TRUE(space_->Map(range.count(), options).ok());
    } else {
      ASSERT_TRUE(
          space_->Protect(range, random() % 2 == 0 ? Protection::kReadWrite : Protection::kRead).ok());
    }
  });
  EXPECT_EQ(space_->Stats().mapped, all.bytes());
  ASSERT_TRUE(space_->Unmap(all).ok());
}

// An unmap of many VMAs takes several holds of the tree lock. What others map in between, in the pages that it has
// let go, is theirs.
TEST_P(StressTest, LongUnmapsSpareWhatComesAfterThem) {
  constexpr std::size_t kVmas = 60;
  constexpr std::size_t kVmaPages = 70;  // large enough to merge when cached
  std::atomic<std::uint64_t> next_stamp{1};
  Run(8, [&](int thread, Random& random) {
    if (thread < 2) {
      const Result<PageRange> row = space_->Map({kVmas * kVmaPages});
      if (!row.ok()) return;
      for (std::size_t i = 0; i < kVmas; ++i) {
        MapOptions options = At(Part(*row, i * kVmaPages, 1).first, Placement::kReplace);
        options.content = Content::kAnything;
        const std::size_t pages = random() % 2 == 0 ? kVmaPages : 1;
        ASSERT_TRUE(space_->Map({pages}, options).ok());
      }
      ASSERT_TRUE(space_->Unmap(*row).ok());
      return;
    }
    Owned mine[8];
    for (Owned& one : mine) {
      const Result<PageRange> range = space_->Map({1 + random() % 100}, {.content = Content::kAnything});
      if (!range.ok()) continue;
      one = {*range, next_stamp.fetch_add(1) << 16};
      Stamp(one.range, one.stamp);
    }
    for (const Owned& one : mine) {
      if (one.range.empty()) continue;
      for (PageNumber page = one.range.first; page < one.range.end; page = page + Pages{1}) {
        const Result<VmaInfo> vma = space_->Lookup(page);
        ASSERT_TRUE(vma.ok());
        ASSERT_EQ(vma->range, one.range);
      }
      ASSERT_TRUE(HasStamp(one.range, one.stamp));
      ASSERT_TRUE(space_->Unmap(one.range).ok());
    }
  });
  EXPECT_TRUE(Vmas(*space_).empty());
}

// The kernel refuses now and then, while threads are in the middle of things: who is told so finds the memory as
// it was, and everyone else notices nothing.
TEST_P(StressTest, OwnMemoryStaysOwnWhileCallsFail) {
  FakeKernel fake({.log_calls = false});
  HookedKernel hooked(fake);
  Jitter(hooked);
  AddressSpaceOptions options = StressOptions();
  options.reserve = MiB(32);
  TestSpace space(hooked, options);
  std::vector<Owned> owned[kThreads];
  std::atomic<std::uint64_t> next_stamp{1};
  std::atomic<std::uint64_t> failures{0};
  const auto is_expected = [&](Error error) {
    if (!error.ok()) failures.fetch_add(1, std::memory_order_relaxed);
    return error.ok() || error == Error::System(ENOMEM) || error.code == ErrorCode::kNoMetadata;
  };
  Run(6, [&](int thread, Random& random) {
    if (random() % 4 == 0) fake.FailNthOfAny(1 + random() % 6, ENOMEM);
    std::vector<Owned>& mine = owned[thread];
    if (mine.size() < 10) {
      MapOptions map_options;
      if (random() % 4 == 0) map_options.protection = Protection::kReadWriteExec;
      const Result<PageRange> range = space->Map({1 + random() % 24}, map_options);
      ASSERT_TRUE(is_expected(range.error()));
      if (!range.ok()) return;
      ASSERT_TRUE(IsUnstamped(*range));
      mine.push_back({*range, next_stamp.fetch_add(1) << 16});
      Stamp(*range, mine.back().stamp);
      return;
    }
    std::swap(mine[random() % mine.size()], mine.back());
    Owned& one = mine.back();
    ASSERT_TRUE(HasStamp(one.range, one.stamp));
    const Protection own = space->Lookup(one.range.first)->protection;
    switch (random() % 6) {
      case 5: {
        // Elsewhere than in a heap zone the way back makes calls too, which others may have ordered to fail.
        if (own != Protection::kReadWrite) break;
        const std::size_t before = one.range.count().value;
        const Result<PageRange> remapped = space->Remap(one.range, {before + random() % 4}, {.may_move = true});
        if (!remapped.ok()) {
          ASSERT_TRUE(is_expected(remapped.error()) || remapped.error().code == ErrorCode::kNotMapped ||
                      remapped.error().code == ErrorCode::kNoRoom);
          break;
        }
        ASSERT_TRUE(HasStamp(Part(*remapped, 0, before), one.stamp));
        one.range = *remapped;
        Stamp(one.range, one.stamp);
        break;
      }
      case 4: {
        const PageRange part = Part(one.range, 0, 1 + one.range.count().value / 2);
        ASSERT_TRUE(is_expected(space->LockMemory(part)));
        if (random() % 2 == 0) {
          ASSERT_TRUE(is_expected(space->UnlockMemory(part)));
        }
        break;
      }
      case 0: {
        const PageRange part = Part(one.range, one.range.count().value / 2, 1);
        if (!is_expected(space->Protect(part, Protection::kRead))) FAIL();
        ASSERT_TRUE(HasStamp(one.range, one.stamp));
        Error error;
        while (!(error = space->Protect(part, own)).ok()) ASSERT_TRUE(is_expected(error));
        break;
      }
      case 1: {
        const Result<PageRange> replaced =
            space->Map(one.range.count(), At(one.range.first, Placement::kReplace, own));
        ASSERT_TRUE(is_expected(replaced.error()));
        if (!replaced.ok()) break;
        ASSERT_TRUE(IsUnstamped(one.range));
        Stamp(one.range, one.stamp);
        break;
      }
      case 2: (void)space->Purge(PurgeScope::kAll); break;
      default: {
        const std::size_t keep = random() % 2 == 0 ? one.range.count().value / 2 : 0;
        const Error error = space->Unmap({one.range.first + Pages{keep}, one.range.end});
        ASSERT_TRUE(is_expected(error));
        if (!error.ok()) break;
        one.range.end = one.range.first + Pages{keep};
        if (keep == 0) mine.pop_back();
        return;
      }
    }
    ASSERT_TRUE(HasStamp(one.range, one.stamp));
  });
  fake.StopFailing();
  EXPECT_GT(fake.InjectedFailures(), 10u);
  EXPECT_GT(failures.load(), 0u);
  space->CheckInvariants();
  for (const std::vector<Owned>& mine : owned) {
    for (const Owned& one : mine) {
      EXPECT_TRUE(HasStamp(one.range, one.stamp));
      EXPECT_TRUE(space->Unmap(one.range).ok());
    }
  }
  EXPECT_TRUE(Vmas(*space).empty());
  (void)space->Purge(PurgeScope::kAll);
  EXPECT_EQ(fake.LockedPages(), Pages{0});
}

FREEHOLD_INSTANTIATE_POLICIES(StressTest);

}  // namespace
}  // namespace freehold::vm
