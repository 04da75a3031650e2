// Freed memory goes back to the kernel, with the keeper and without it; and the keeper is no burden
// to programs that do not know of it.
#include <unistd.h>

#include <cstdio>
#include <string>
#include <utility>

#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

struct Burst {
  std::size_t before = 0;
  std::size_t peak = 0;
  std::size_t after = 0;
  std::size_t threads = 0;
};

class KeeperTest : public ::testing::Test {
 protected:
  void SetUp() override { FREEHOLD_SKIP_WITH_SANITIZER(); }

  static Launch Program(const std::string& name, std::vector<std::string> arguments) {
    return UnderShim(TestProgram(name, std::move(arguments)));
  }

  static Burst RunBurst(const Launch& launch) {
    const Outcome outcome = RunProgram(launch);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    Burst burst;
    EXPECT_EQ(std::sscanf(outcome.out.c_str(), "before %zu\npeak %zu\nafter %zu\nthreads %zu",
                          &burst.before, &burst.peak, &burst.after, &burst.threads),
              4)
        << outcome.out;
    return burst;
  }

  static void ExpectOk(const std::string& what) {
    EXPECT_EQ(ExpectQuiet(Program("keeper_life", {what})), "ok\n");
  }
};

TEST_F(KeeperTest, MemoryGoesBackWhileTheProgramIdles) {
  const Burst burst = RunBurst(Program("burst", {"600", "2000"}));
  EXPECT_GE(burst.peak, 590u);
  EXPECT_LE(burst.after, burst.before + burst.peak / 20);
  EXPECT_EQ(burst.threads, 2u);
}

TEST_F(KeeperTest, WithoutItTheProgramsOwnActivityGivesBack) {
  Launch launch = Program("burst", {"600", "2500", "light"});
  launch.environment.emplace_back("FREEHOLD_KEEPER", "0");
  const Burst burst = RunBurst(launch);
  EXPECT_LE(burst.after, burst.before + burst.peak / 20);
  EXPECT_EQ(burst.threads, 1u);
}

// Decay is the user's to choose.
TEST_F(KeeperTest, LongDecayKeepsMemory) {
  Launch launch = Program("burst", {"300", "1000"});
  launch.environment.emplace_back("FREEHOLD_DECAY_MS", "60s");
  const Burst burst = RunBurst(launch);
  EXPECT_GE(burst.after, burst.peak / 2);
}

TEST_F(KeeperTest, SmallProcessesStaySingleThreaded) { ExpectOk("small"); }
TEST_F(KeeperTest, BlocksSignals) { ExpectOk("signals"); }
TEST_F(KeeperTest, SleepsWhenIdleAndWakesForWork) { ExpectOk("idle"); }
TEST_F(KeeperTest, RestartsInTheChildOfAFork) { ExpectOk("fork"); }
TEST_F(KeeperTest, IsNotStartedInTheChildOfAVfork) { ExpectOk("vfork"); }
TEST_F(KeeperTest, DoesWithoutWhereThreadsAreRefused) { ExpectOk("refused"); }

TEST_F(KeeperTest, ChangesIdentityWithTheProgram) {
  if (getuid() != 0) GTEST_SKIP() << "only root can change its identity";
  ExpectOk("setuid");
}

TEST_F(KeeperTest, DoesNotKeepTheProcessAlive) {
  const Outcome outcome = RunProgram(Program("keeper_life", {"last-thread"}));
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.out, "last thread\n");
}

TEST_F(KeeperTest, CanBeSwitchedOff) {
  Launch launch = Program("keeper_life", {"off"});
  launch.environment.emplace_back("FREEHOLD_KEEPER", "0");
  EXPECT_EQ(RunProgram(launch).out, "ok\n");
}

}  // namespace
}  // namespace freehold::testing
