// The fibers of the example: turns, nesting, exhaustion, and the program itself.
#include <cstdio>
#include <string>
#include <vector>

#include "examples/fibers/fiber.h"
#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/os/linux_kernel.h"

namespace freehold::examples {
namespace {

using namespace vm::test;  // NOLINT: the fixture's words
using runtime::StackPool;

class FibersTest : public ::testing::Test {
 protected:
  FibersTest() : pool_(*StackPool::Create(*space_)) {}
  ~FibersTest() override { StackPool::Destroy(pool_); }

  vm::os::LinuxKernel kernel_;
  TestSpace space_{kernel_};
  StackPool* pool_;
};

TEST_F(FibersTest, TakeTurns) {
  Scheduler scheduler(*pool_, vm::KiB(64));
  std::string trace;
  for (const char name : {'a', 'b', 'c'}) {
    ASSERT_TRUE(scheduler.Spawn([&, name] {
      for (int i = 0; i < 3; ++i) {
        trace += name;
        scheduler.Yield();
      }
    }).ok());
  }
  scheduler.Run();
  EXPECT_EQ(trace, "abcabcabc");
  EXPECT_EQ(pool_->Stats().in_use, 0u);
  EXPECT_EQ(scheduler.switches(), 12u);
}

TEST_F(FibersTest, StacksAreUsedAgain) {
  Scheduler scheduler(*pool_, vm::KiB(64));
  int runs = 0;
  std::function<void()> chain = [&] {
    volatile char deep[40'000];
    deep[0] = 1;
    deep[sizeof(deep) - 1] = 1;
    if (++runs < 1000) {
      ASSERT_TRUE(scheduler.Spawn(chain).ok());
    }
  };
  ASSERT_TRUE(scheduler.Spawn(chain).ok());
  scheduler.Run();
  EXPECT_EQ(runs, 1000);
  EXPECT_LE(pool_->Stats().slots, 3u);
}

TEST_F(FibersTest, NoMoreStacks) {
  Scheduler scheduler(*pool_, vm::MiB(2));
  int spawned = 0;
  vm::Error error;
  while ((error = scheduler.Spawn([] {})).ok()) ++spawned;
  EXPECT_EQ(error.code, vm::ErrorCode::kNoRoom);
  EXPECT_GT(spawned, 10);
  scheduler.Run();
  EXPECT_TRUE(scheduler.Spawn([] {}).ok());  // never run: its stack goes back with the scheduler
}

TEST(FibersProgramTest, TenThousand) {
  std::FILE* program = popen("examples/fibers/fibers 10000", "r");
  ASSERT_NE(program, nullptr);
  char line[300] = {};
  EXPECT_NE(std::fgets(line, sizeof(line), program), nullptr);
  EXPECT_EQ(pclose(program), 0);
  unsigned long long fibers = 0, more = 0, sum = 0, switches = 0, stacks = 0;
  int vmas = -1;
  ASSERT_EQ(std::sscanf(line, "%llu fibers, %llu more by fibers; sum %llu; %llu switches; %llu stacks in %d", &fibers,
                        &more, &sum, &switches, &stacks, &vmas),
            6)
      << line;
  EXPECT_EQ(more, 1000u);
  EXPECT_EQ(sum, 10'000u * 9'999 / 2 + 1000);
  EXPECT_GE(stacks, 10'000u);
  EXPECT_LT(stacks, 11'001u);
  EXPECT_LT(vmas, 100);  // malloc's included
}

}  // namespace
}  // namespace freehold::examples
