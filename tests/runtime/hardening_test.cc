// malloc with what only settings turn on: zeroed frees, quarantine, random placement.
#include <csignal>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

using ::testing::ContainsRegex;

const Environment kZero = {{"FREEHOLD_ZERO_ON_FREE", "1"}};
const Environment kHold = {{"FREEHOLD_QUARANTINE", "1M"}};
const Environment kRandom = {{"FREEHOLD_RANDOM_PLACEMENT", "1"}};
const Environment kAll = {
    {"FREEHOLD_ZERO_ON_FREE", "1"}, {"FREEHOLD_QUARANTINE", "256K"}, {"FREEHOLD_RANDOM_PLACEMENT", "1"}};

class HardeningTest : public ::testing::Test {
 protected:
  void SetUp() override { FREEHOLD_SKIP_WITH_SANITIZER(); }

  static Launch Hardening(const std::string& what, const Environment& environment) {
    return UnderShim(TestProgram("hardening", {what}, environment));
  }
};

// Each does what it says, and without it nothing does.
TEST_F(HardeningTest, EachAlone) {
  ExpectQuiet(Hardening("none", {}));
  ExpectQuiet(Hardening("zero", kZero));
  ExpectQuiet(Hardening("hold", kHold));
  ExpectQuiet(Hardening("random", kRandom));
}

TEST_F(HardeningTest, WritesAfterFreeAreFound) {
  for (const Environment& environment : {kHold, kAll}) {
    const Outcome outcome = RunProgram(Hardening("write", environment));
    EXPECT_EQ(outcome.status, -SIGABRT);
    EXPECT_THAT(outcome.err, ContainsRegex("^freehold: free object of 208 bytes at 0x[0-9a-f]+ was written to after it "
                                           "was freed\n$"));
  }
}

TEST_F(HardeningTest, DoubleFreesAreFound) {
  for (const Environment& environment : {Environment{}, kZero, kHold, kRandom, kAll}) {
    const Outcome outcome = RunProgram(Hardening("double", environment));
    EXPECT_EQ(outcome.status, -SIGABRT);
    EXPECT_THAT(outcome.err, ContainsRegex("^freehold: free.0x[0-9a-f]+.: double free of a 208-byte object\n$"));
  }
}

// Programs that say nothing on standard error when all is well.
TEST_F(HardeningTest, ProgramsWithAllOfIt) {
  for (const char* program : {"conformance", "operators", "thread_churn", "fork_storm", "thread_end"}) {
    ExpectQuiet(UnderShim(TestProgram(program, {}, kAll)));
  }
  for (const Environment& environment : {kAll, kZero, kHold, kRandom}) {
    const std::string out = ExpectQuiet(
        UnderShim({.argv = {"python3", "-c",
                            "import threading, os\n"
                            "data = [str(i) * 10 for i in range(100000)]\n"
                            "threads = [threading.Thread(target=lambda: [bytearray(1000) for _ in range(1000)]) "
                            "for _ in range(8)]\n"
                            "[t.start() for t in threads]; [t.join() for t in threads]\n"
                            "pid = os.fork()\n"
                            "if pid == 0: data = [d * 2 for d in data]; os._exit(0)\n"
                            "print(len(data), os.waitpid(pid, 0)[1])"},
                   .environment = environment}));
    EXPECT_EQ(out, "100000 0\n");
  }
}

}  // namespace
}  // namespace freehold::testing
