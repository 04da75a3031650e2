// The mmap family against its manual pages: programs that print what it does, run plain and with the shim. The kernel
// is the reference.
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

const char kCases[] = "tests/runtime/programs/mapping_cases";
const char kSequence[] = "tests/runtime/programs/mapping_sequence";

Outcome RunPlain(std::vector<std::string> argv) {
  argv[0] = BuiltFile(argv[0]);
  return RunProgram({.argv = argv});
}

Outcome RunUnderShim(std::vector<std::string> argv, const Environment& environment) {
  argv[0] = BuiltFile(argv[0]);
  return RunProgram(UnderShim({.argv = argv, .environment = environment}));
}

// Names the first line that differs. What the kernel does is the same for all settings: it is asked once.
void ExpectSame(const std::vector<std::string>& argv, const Environment& environment) {
  static std::map<std::vector<std::string>, Outcome> plain_outcomes;
  const auto [at, first] = plain_outcomes.try_emplace(argv);
  if (first) at->second = RunPlain(argv);
  const Outcome& plain = at->second;
  ASSERT_EQ(plain.status, 0) << plain.err;
  const Outcome shim = RunUnderShim(argv, environment);
  EXPECT_EQ(shim.status, 0) << shim.err;
  EXPECT_EQ(shim.err, "");
  EXPECT_EQ(shim.out, plain.out);
}

class MmapConformanceTest : public ::testing::TestWithParam<Environment> {};

TEST_P(MmapConformanceTest, EveryCaseIsAsTheKernels) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  ExpectSame({kCases}, GetParam());
}

// A seed that differs: `mapping_sequence SEED 1 OPERATIONS verbose` shows where.
TEST_P(MmapConformanceTest, RandomCallsAreAsTheKernels) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  ExpectSame({kSequence, "1", "30", "200"}, GetParam());
}

INSTANTIATE_TEST_SUITE_P(Settings, MmapConformanceTest,
                         ::testing::Values(Environment{}, Environment{{"FREEHOLD_LOCK_POLICY", "coarse"}},
                                           Environment{{"FREEHOLD_LOCK_POLICY", "tree"}},
                                           Environment{{"FREEHOLD_STRICT_UNMAP", "1"}},
                                           Environment{{"FREEHOLD_MALLOC", "libc"}},
                                           Environment{{"FREEHOLD_WINDOW_LIMIT", "0"}},
                                           Environment{{"FREEHOLD_DECAY_MS", "0"}},
                                           // A region holds little then.
                                           Environment{{"FREEHOLD_RESERVE", "256M"}},
                                           Environment{{"FREEHOLD_MMAP", "off"}}));

// Without it, everything above would hold for a shim that does nothing.
TEST(MmapShimTest, ServesFromTheReservation) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const std::vector<std::string> argv = {"tests/runtime/programs/mapping_place"};
  for (const std::string malloc : {"freehold", "libc"}) {
    const Outcome on = RunUnderShim(argv, {{"FREEHOLD_MALLOC", malloc}});
    EXPECT_EQ(on.status, 0) << on.err;
    const std::string heap = malloc == "freehold" ? "inside" : "outside";
    EXPECT_EQ(on.out,
              "malloc: " + heap + "\n"
              "large malloc: " + heap + "\n"
              "anonymous: inside\n"
              "no access: inside\n"
              "code: inside\n"
              "populated: inside\n"
              "a file to read: inside\n"
              "the same again: same place\n"
              "a file to write: outside\n"
              "shared: outside\n"
              "low: outside\n");
    const Outcome off = RunUnderShim(argv, {{"FREEHOLD_MALLOC", malloc}, {"FREEHOLD_MMAP", "off"}});
    EXPECT_EQ(off.status, 0) << off.err;
    EXPECT_EQ(off.out.find("inside", off.out.find("anonymous")), std::string::npos) << off.out;
  }
}

bool HasMimalloc() {
  return RunProgram({.argv = {Cli(), "run", "--malloc=mimalloc", "--", "/bin/true"}}).status == 0;
}

TEST(MmapShimTest, MimallocGetsItsMemoryFromIt) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  if (!HasMimalloc()) GTEST_SKIP() << "no libmimalloc.so here";
  const std::string program = BuiltFile("tests/runtime/programs/mapping_place");
  const Outcome on = RunProgram({.argv = {Cli(), "run", "--malloc=mimalloc", "--", program}});
  EXPECT_EQ(on.status, 0) << on.err;
  EXPECT_EQ(on.out.substr(0, on.out.find("anonymous")), "malloc: inside\nlarge malloc: inside\n");
  const Outcome off = RunProgram({.argv = {Cli(), "run", "--malloc=mimalloc", "--mmap=off", "--", program}});
  EXPECT_EQ(off.out.substr(0, off.out.find("anonymous")), "malloc: outside\nlarge malloc: outside\n");
  // Its objects, and random calls beside them.
  const std::vector<std::string> sequence = {BuiltFile(kSequence), "1", "9", "200"};
  std::vector<std::string> argv = {Cli(), "run", "--malloc=mimalloc", "--"};
  argv.insert(argv.end(), sequence.begin(), sequence.end());
  EXPECT_EQ(RunProgram({.argv = argv}).out, RunProgram({.argv = sequence}).out);
}

TEST(MmapShimTest, AMissingMimallocIsNamed) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome chosen =
      RunProgram({.argv = {Cli(), "run", "--malloc=mimalloc", "--mimalloc=/no/such.so", "--", "/bin/true"}});
  EXPECT_EQ(chosen.status, 125);
  EXPECT_EQ(chosen.err, "freehold: /no/such.so: No such file or directory\n");
  const Outcome preloaded = RunProgram(UnderShim({.argv = {"/bin/true"}, .environment = {{"FREEHOLD_MALLOC", "mimalloc"}}}));
  EXPECT_EQ(preloaded.status, 0);
  EXPECT_EQ(preloaded.err, "freehold: libmimalloc.so is not preloaded; libc serves malloc instead\n");
}

}  // namespace
}  // namespace freehold::testing
