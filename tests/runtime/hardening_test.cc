// malloc with what only settings turn on: zeroed frees, quarantine, random placement.
#include <csignal>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

using ::testing::ContainsRegex;

using Variables = std::vector<std::pair<std::string, std::string>>;

const Variables kZero = {{"FREEHOLD_ZERO_ON_FREE", "1"}};
const Variables kHold = {{"FREEHOLD_QUARANTINE", "1M"}};
const Variables kRandom = {{"FREEHOLD_RANDOM_PLACEMENT", "1"}};
const Variables kAll = {
    {"FREEHOLD_ZERO_ON_FREE", "1"}, {"FREEHOLD_QUARANTINE", "256K"}, {"FREEHOLD_RANDOM_PLACEMENT", "1"}};

class HardeningTest : public ::testing::Test {
 protected:
  void SetUp() override { FREEHOLD_SKIP_WITH_SANITIZER(); }

  static Outcome Run(std::vector<std::string> argv, const Variables& environment) {
    argv[0] = BuiltFile("tests/runtime/programs/" + argv[0]);
    return RunProgram(UnderShim({.argv = std::move(argv), .environment = environment}));
  }
  static void ExpectFine(std::vector<std::string> argv, const Variables& environment) {
    const Outcome outcome = Run(argv, environment);
    EXPECT_EQ(outcome.status, 0) << argv[0] << ": " << outcome.err;
    EXPECT_EQ(outcome.err, "") << argv[0];
  }
};

// Each does what it says, and without it nothing does.
TEST_F(HardeningTest, EachAlone) {
  ExpectFine({"hardening", "none"}, {});
  ExpectFine({"hardening", "zero"}, kZero);
  ExpectFine({"hardening", "hold"}, kHold);
  ExpectFine({"hardening", "random"}, kRandom);
}

TEST_F(HardeningTest, WritesAfterFreeAreFound) {
  for (const Variables& environment : {kHold, kAll}) {
    const Outcome outcome = Run({"hardening", "write"}, environment);
    EXPECT_EQ(outcome.status, -SIGABRT);
    EXPECT_THAT(outcome.err, ContainsRegex("^freehold: free object of 208 bytes at 0x[0-9a-f]+ was written to after it "
                                           "was freed\n$"));
  }
}

TEST_F(HardeningTest, DoubleFreesAreFound) {
  for (const Variables& environment : {Variables{}, kZero, kHold, kRandom, kAll}) {
    const Outcome outcome = Run({"hardening", "double"}, environment);
    EXPECT_EQ(outcome.status, -SIGABRT);
    EXPECT_THAT(outcome.err, ContainsRegex("^freehold: free.0x[0-9a-f]+.: double free of a 208-byte object\n$"));
  }
}

// Programs that say nothing on standard error when all is well.
TEST_F(HardeningTest, ProgramsWithAllOfIt) {
  for (const char* program : {"conformance", "operators", "thread_churn", "fork_storm", "thread_end"}) {
    ExpectFine({program}, kAll);
  }
  for (const Variables& environment : {kAll, kZero, kHold, kRandom}) {
    const Outcome python = RunProgram(
        UnderShim({.argv = {"python3", "-c",
                            "import threading, os\n"
                            "data = [str(i) * 10 for i in range(100000)]\n"
                            "threads = [threading.Thread(target=lambda: [bytearray(1000) for _ in range(1000)]) for _ in "
                            "range(8)]\n"
                            "[t.start() for t in threads]; [t.join() for t in threads]\n"
                            "pid = os.fork()\n"
                            "if pid == 0: data = [d * 2 for d in data]; os._exit(0)\n"
                            "print(len(data), os.waitpid(pid, 0)[1])"},
                   .environment = environment}));
    EXPECT_EQ(python.status, 0);
    EXPECT_EQ(python.out, "100000 0\n");
    EXPECT_EQ(python.err, "");
  }
}

}  // namespace
}  // namespace freehold::testing
