// Children: of fork in a program whose threads are in malloc, of vfork, of posix_spawn.
#include <string>

#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

class ForkTest : public ::testing::Test {
 protected:
  void SetUp() override { FREEHOLD_SKIP_WITH_SANITIZER(); }

  static void ExpectOk(Launch launch) {
    launch.timeout_seconds = 250;
    EXPECT_EQ(ExpectQuiet(launch), "ok\n");
  }
};

TEST_F(ForkTest, WhileOtherThreadsAllocate) { ExpectOk(UnderShim(TestProgram("fork_storm", {"400"}))); }

TEST_F(ForkTest, WhileOtherThreadsAllocateUnderCoarseLocks) {
  Launch launch = UnderShim(TestProgram("fork_storm", {"100"}));
  launch.environment.emplace_back("FREEHOLD_LOCK_POLICY", "coarse");
  ExpectOk(launch);
}

// With memory going back to the kernel all the time: the keeper is in the middle of that when a
// fork comes.
TEST_F(ForkTest, WhileTheKeeperWorks) {
  Launch launch = UnderShim(TestProgram("fork_storm", {"150"}));
  launch.environment.emplace_back("FREEHOLD_DECAY_MS", "0");
  ExpectOk(launch);
}

TEST_F(ForkTest, WhileOtherThreadsAllocateLinked) {
  ExpectOk(TestProgram("fork_storm_linked", {"150"}));
}

TEST_F(ForkTest, SpawnedPrograms) { ExpectOk(UnderShim(TestProgram("spawn"))); }

}  // namespace
}  // namespace freehold::testing
