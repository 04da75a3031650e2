// Children: of fork in a program whose threads are in malloc, of vfork, of posix_spawn.
#include <string>

#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

class ForkTest : public ::testing::Test {
 protected:
  void SetUp() override { FREEHOLD_SKIP_WITH_SANITIZER(); }

  static Launch Program(const std::string& name, std::vector<std::string> arguments = {}) {
    arguments.insert(arguments.begin(), BuiltFile("tests/runtime/programs/" + name));
    return {.argv = arguments, .timeout_seconds = 250};
  }

  static void ExpectOk(const Launch& launch) {
    const Outcome outcome = RunProgram(launch);
    EXPECT_EQ(outcome.status, 0);
    EXPECT_EQ(outcome.out, "ok\n");
    EXPECT_EQ(outcome.err, "");
  }
};

TEST_F(ForkTest, WhileOtherThreadsAllocate) { ExpectOk(UnderShim(Program("fork_storm", {"400"}))); }

TEST_F(ForkTest, WhileOtherThreadsAllocateUnderCoarseLocks) {
  Launch launch = UnderShim(Program("fork_storm", {"100"}));
  launch.environment.emplace_back("FREEHOLD_LOCK_POLICY", "coarse");
  ExpectOk(launch);
}

// With memory going back to the kernel all the time: the keeper is in the middle of that when a
// fork comes.
TEST_F(ForkTest, WhileTheKeeperWorks) {
  Launch launch = UnderShim(Program("fork_storm", {"150"}));
  launch.environment.emplace_back("FREEHOLD_DECAY_MS", "0");
  ExpectOk(launch);
}

TEST_F(ForkTest, WhileOtherThreadsAllocateLinked) {
  ExpectOk(Program("fork_storm_linked", {"150"}));
}

TEST_F(ForkTest, SpawnedPrograms) { ExpectOk(UnderShim(Program("spawn"))); }

}  // namespace
}  // namespace freehold::testing
