#include "vm/os/check.h"

#include <string>

#include "gtest/gtest.h"

namespace freehold::vm {
namespace {

TEST(CheckTest, PassesSilently) {
  int evaluated = 0;
  FREEHOLD_CHECK(++evaluated == 1);
  EXPECT_EQ(evaluated, 1);
}

TEST(CheckDeathTest, NamesFileLineAndCondition) {
  EXPECT_DEATH(FREEHOLD_CHECK(2 + 2 == 5),
               "freehold: tests/vm/os/check_test.cc:[0-9]+: check failed: 2 \\+ 2 == 5\n");
}

TEST(CheckDeathTest, PrintsValuesInHexadecimal) {
  const CheckValue values[] = {{"first", 0x7f0012345000}, {"end", 0}, {"all", ~std::uint64_t{0}}};
  EXPECT_DEATH(
      CheckFailed("file.cc", 42, "overlap", values, 3),
      "freehold: file.cc:42: overlap first=0x7f0012345000 end=0x0 all=0xffffffffffffffff\n");
}

TEST(CheckDeathTest, CutsOffWhatDoesNotFit) {
  const std::string longer_than_a_line(2000, 'x');
  EXPECT_DEATH(CheckFailed("file.cc", 1, longer_than_a_line.c_str()),
               "freehold: file.cc:1: x{400,500}\n");
}

TEST(CheckDeathTest, DebugChecksAreOnInDebugBuildsOnly) {
  int evaluated = 0;
  FREEHOLD_DCHECK(++evaluated == 1);
  EXPECT_EQ(evaluated, kFreeholdDebugChecks ? 1 : 0);
  if (kFreeholdDebugChecks) {
    EXPECT_DEATH(FREEHOLD_DCHECK(evaluated == 7), "check failed: evaluated == 7");
  } else {
    FREEHOLD_DCHECK(evaluated == 7);
  }
}

}  // namespace
}  // namespace freehold::vm
