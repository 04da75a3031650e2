// The pager example: a table computed on demand, what there is without userfaultfd, and the program itself.
#include <fcntl.h>
#include <sys/syscall.h>

#include <cerrno>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "examples/pager/step_table.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"
#include "tests/vm/os/syscall_filter.h"
#include "tests/vm/space_fixture.h"
#include "vm/os/fake_userfault.h"
#include "vm/os/linux_kernel.h"
#include "vm/os/userfault.h"

namespace freehold::examples {
namespace {

using namespace vm::test;  // NOLINT: the fixture's words
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr vm::Pages kPages = {8192};

class PagerExampleTest : public ::testing::Test {
 protected:
  vm::os::LinuxKernel kernel_;
  TestSpace space_{kernel_};
};

TEST_F(PagerExampleTest, ComputesWhatIsLookedAt) {
  vm::os::LinuxUserfault userfault;
  StepTable table(*space_, userfault);
  ASSERT_TRUE(table.Start(kPages).ok());
  if (!table.on_demand()) GTEST_SKIP() << "userfaultfd is not permitted here";
  EXPECT_EQ(table.pages(), kPages);
  EXPECT_EQ(table.pages_computed(), 0u);
  EXPECT_EQ(table.StepsOf(27), 111u);
  const std::uint64_t few = table.pages_computed();
  EXPECT_GE(few, 1u);
  EXPECT_LE(few, 64u);
  EXPECT_EQ(table.StepsOf(1), 0u);
  EXPECT_EQ(table.pages_computed(), few);
  EXPECT_EQ(table.StepsOf(8'400'511), 685u);
  EXPECT_LE(table.pages_computed(), few + 64);
  EXPECT_EQ(table.StepsOf(0), std::nullopt);
  EXPECT_EQ(table.StepsOf(kPages.value * StepPager::kNumbersPerPage), std::nullopt);
}

TEST_F(PagerExampleTest, ManyThreadsLook) {
  vm::os::LinuxUserfault userfault;
  StepTable table(*space_, userfault);
  ASSERT_TRUE(table.Start(kPages).ok());
  if (!table.on_demand()) GTEST_SKIP() << "userfaultfd is not permitted here";
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      // Powers of two, each with what is beside it.
      for (unsigned power = 1; power < 24; ++power) {
        EXPECT_EQ(table.StepsOf(std::uint64_t{1} << ((power + thread * 5) % 23 + 1)), (power + thread * 5) % 23 + 1);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(PagerExampleTest, ComputesBeforehandWithoutUserfaultfd) {
  vm::os::FakeUserfault userfault;
  userfault.FailNext(vm::os::FakeUserfault::Operation::kOpen, 1, {vm::ErrorCode::kUnsupported});
  StepTable table(*space_, userfault);
  ASSERT_TRUE(table.Start(kPages).ok());
  EXPECT_FALSE(table.on_demand());
  EXPECT_EQ(table.pages(), StepTable::kFallbackPages);
  EXPECT_EQ(table.pages_computed(), StepTable::kFallbackPages.value);
  EXPECT_EQ(table.StepsOf(27), 111u);
  EXPECT_EQ(table.StepsOf(8'400'511), std::nullopt);
}

// ---- the program ----

testing::Outcome RunPager(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), testing::BuiltFile("examples/pager/pager"));
  return testing::RunProgram({.argv = std::move(arguments)});
}

TEST_F(PagerExampleTest, TheProgram) {
  const testing::Outcome outcome = RunPager({"27", "0", "2000000000"});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_THAT(outcome.out, StartsWith("27: 111 steps\n0: not in the table\n2000000000: "));
  EXPECT_THAT(outcome.out, HasSubstr("\ncomputed "));
}

TEST_F(PagerExampleTest, TheProgramWithoutUserfaultfd) {
  EXPECT_TRUE(vm::os::PassesInChild([] {
    vm::os::RefuseSyscall({SYS_userfaultfd}, EPERM);
    // The other way to one.
    vm::os::RefuseSyscall({SYS_openat, vm::os::SyscallMatch::Argument{2, O_RDWR | O_CLOEXEC}}, EACCES);
    const testing::Outcome outcome = RunPager({"27", "2000000000"});
    CHILD_CHECK(outcome.status == 0);
    CHILD_CHECK(outcome.out.find("27: 111 steps\n2000000000: not in the table\n") == 0);
    CHILD_CHECK(outcome.err.find("pager: userfaultfd is not permitted here") == 0);
  }));
}

TEST_F(PagerExampleTest, TheProgramsArguments) {
  EXPECT_EQ(RunPager({}).status, 2);
  const testing::Outcome outcome = RunPager({"1", "12x"});
  EXPECT_EQ(outcome.status, 2);
  EXPECT_EQ(outcome.err, "pager: 12x is no number\n");
}

}  // namespace
}  // namespace freehold::examples
