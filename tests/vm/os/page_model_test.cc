#include "vm/os/page_model.h"

#include <array>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace freehold::vm::os {
namespace {

constexpr PageRange Range(std::size_t first, std::size_t end) {
  return {PageNumber{first}, PageNumber{end}};
}

void MakeWritable(PageState& page) { page.protection = Protection::kReadWrite; }
bool IsWritable(const PageState& page) { return page.protection == Protection::kReadWrite; }
bool IsResident(const PageState& page) { return page.resident; }

TEST(PageModelTest, KnowsReservations) {
  PageModel model;
  model.Reserve(Range(10, 20));
  model.Reserve(Range(20, 30));
  EXPECT_TRUE(model.IsReserved(Range(10, 20)));
  EXPECT_TRUE(model.IsReserved(Range(12, 13)));
  EXPECT_FALSE(model.IsReserved(Range(9, 11)));
  EXPECT_FALSE(model.IsReserved(Range(29, 31)));
  EXPECT_FALSE(model.IsReserved(Range(15, 25))) << "two reservations that happen to touch";
  EXPECT_FALSE(model.IsReserved(Range(12, 12)));
  EXPECT_EQ(model.At(PageNumber{10}).reservation, 1u);
  EXPECT_EQ(model.At(PageNumber{20}).reservation, 2u);
  EXPECT_EQ(model.At(PageNumber{30}).reservation, 0u);
}

TEST(PageModelTest, ReleaseMakesHoles) {
  //   10        14   16        20
  //   |---------|    |---------|
  PageModel model;
  model.Reserve(Range(10, 20));
  model.Release(Range(14, 16));
  model.CheckInvariants();
  EXPECT_TRUE(model.IsReserved(Range(10, 14)));
  EXPECT_TRUE(model.IsReserved(Range(16, 20)));
  EXPECT_FALSE(model.IsReserved(Range(10, 20)));
  EXPECT_FALSE(model.IsReserved(Range(13, 15)));
  EXPECT_EQ(model.CountIf([](const PageState&) { return true; }), Pages{8});
}

TEST(PageModelTest, UpdateSplitsAndMerges) {
  //   before  |none............................|
  //   after   |none......|rw........|none......|    and back
  PageModel model;
  model.Reserve(Range(0, 30));
  model.Update(Range(10, 20), MakeWritable);
  model.CheckInvariants();
  EXPECT_EQ(model.KernelVmaCount(false), 3u);
  EXPECT_EQ(model.CountIf(IsWritable), Pages{10});
  EXPECT_EQ(model.CountIf(Range(5, 12), IsWritable), Pages{2});
  EXPECT_EQ(model.CountIf(Range(15, 100), IsWritable), Pages{5});
  model.Update(Range(10, 20), [](PageState& page) { page.protection = Protection::kNone; });
  model.CheckInvariants();
  EXPECT_EQ(model.KernelVmaCount(false), 1u);
}

TEST(PageModelTest, PresenceAndGuardsMakeNoVmas) {
  PageModel model;
  model.Reserve(Range(0, 30));
  model.Update(Range(5, 6), [](PageState& page) { page.resident = true; });
  model.Update(Range(7, 8), [](PageState& page) { page.guard = true; });
  EXPECT_EQ(model.KernelVmaCount(false), 1u);
  EXPECT_EQ(model.CountIf(IsResident), Pages{1});
}

TEST(PageModelTest, VmasMergeAcrossReservationsButNotAcrossHolesOrAdvice) {
  PageModel model;
  model.Reserve(Range(0, 10));
  model.Reserve(Range(10, 20));
  EXPECT_EQ(model.KernelVmaCount(false), 1u);
  model.Reserve(Range(21, 30));
  EXPECT_EQ(model.KernelVmaCount(false), 2u);
  model.Update(Range(0, 5), [](PageState& page) { page.advice = PageState::Advice::kPreferHuge; });
  EXPECT_EQ(model.KernelVmaCount(false), 3u);
  model.Update(Range(21, 22), [](PageState& page) { page.committed = true; });
  EXPECT_EQ(model.KernelVmaCount(false), 3u);
  EXPECT_EQ(model.KernelVmaCount(true), 4u);
}

TEST(PageModelDeathTest, RefusesWhatCannotBe) {
  PageModel model;
  model.Reserve(Range(0, 10));
  EXPECT_DEATH(model.Reserve(Range(9, 12)), "check failed");
  EXPECT_DEATH(model.Release(Range(9, 12)), "check failed");
  EXPECT_DEATH(model.Update(Range(9, 12), MakeWritable), "check failed");
}

TEST(PageModelDeathTest, TheInvariantCheckFailsWhenItMust) {
  PageModel model;
  model.Reserve(Range(0, 10));
  model.Update(Range(3, 4), [](PageState& page) { page.reservation = 0; });
  EXPECT_DEATH(model.CheckInvariants(), "check failed: segment.second.state.reservation != 0");
}

// ---- Against one state a page ----

constexpr std::size_t kPages = 64;
using NaiveModel = std::array<PageState, kPages>;

std::size_t CountNaively(const NaiveModel& naive, PageRange range,
                         bool (*predicate)(const PageState&)) {
  std::size_t count = 0;
  for (std::size_t i = range.first.value; i < range.end.value; ++i) {
    count += naive[i].reservation != 0 && predicate(naive[i]);
  }
  return count;
}

bool IsReservedNaively(const NaiveModel& naive, PageRange range) {
  for (std::size_t i = range.first.value; i < range.end.value; ++i) {
    if (naive[i].reservation != naive[range.first.value].reservation) return false;
  }
  return !range.empty() && naive[range.first.value].reservation != 0;
}

std::size_t CountVmasNaively(const NaiveModel& naive) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < kPages; ++i) {
    const bool continues = i > 0 && naive[i - 1].reservation != 0 &&
                           naive[i - 1].protection == naive[i].protection &&
                           naive[i - 1].advice == naive[i].advice;
    count += naive[i].reservation != 0 && !continues;
  }
  return count;
}

class PageModelSeededTest : public ::testing::TestWithParam<std::uint32_t> {};
INSTANTIATE_TEST_SUITE_P(Seeds, PageModelSeededTest, ::testing::Range(1u, 21u));

TEST_P(PageModelSeededTest, AgreesWithOneStateAPage) {
  std::mt19937 random(GetParam());
  PageModel model;
  NaiveModel naive = {};
  std::uint32_t reservations = 0;
  for (int step = 0; step < 400; ++step) {
    std::size_t a = random() % kPages;
    std::size_t b = random() % kPages + 1;
    if (a >= b) std::swap(a, b);
    const PageRange range = Range(a, b == a ? a + 1 : b);
    const bool reserved = IsReservedNaively(naive, range);
    ASSERT_EQ(model.IsReserved(range), reserved) << "step " << step;
    const auto update = [&](void (*change)(PageState&)) {
      model.Update(range, change);
      for (std::size_t i = range.first.value; i < range.end.value; ++i) change(naive[i]);
    };
    if (!reserved) {
      if (CountNaively(naive, range, [](const PageState&) { return true; }) > 0) continue;
      model.Reserve(range);
      ++reservations;
      for (std::size_t i = range.first.value; i < range.end.value; ++i)
        naive[i].reservation = reservations;
    } else {
      switch (random() % 6) {
        case 0:
          model.Release(range);
          for (std::size_t i = range.first.value; i < range.end.value; ++i) naive[i] = PageState{};
          break;
        case 1:
          update(MakeWritable);
          break;
        case 2:
          update([](PageState& page) { page.protection = Protection::kNone; });
          break;
        case 3:
          update([](PageState& page) { page.resident = true; });
          break;
        case 4:
          update([](PageState& page) { page.resident = false; });
          break;
        case 5:
          update([](PageState& page) { page.advice = PageState::Advice::kPreferHuge; });
          break;
      }
    }
    model.CheckInvariants();
    for (std::size_t i = 0; i < kPages; ++i)
      ASSERT_EQ(model.At(PageNumber{i}), naive[i]) << "step " << step;
    const std::size_t resident = CountNaively(naive, range, IsResident);
    ASSERT_EQ(model.CountIf(range, IsResident), Pages{resident}) << "step " << step;
    ASSERT_EQ(model.KernelVmaCount(false), CountVmasNaively(naive)) << "step " << step;
  }
}

}  // namespace
}  // namespace freehold::vm::os
