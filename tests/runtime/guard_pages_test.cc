// Objects of malloc between guard pages: what a program that misuses one says before it dies, and that nothing else
// makes it say anything.
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
using ::testing::HasSubstr;
using ::testing::Not;

using Variables = std::vector<std::pair<std::string, std::string>>;

const Variables kEvery = {{"FREEHOLD_GUARD_PAGES", "1"}};

class GuardPagesTest : public ::testing::Test {
 protected:
  void SetUp() override { FREEHOLD_SKIP_WITH_SANITIZER(); }

  static Outcome Run(std::vector<std::string> argv, const Variables& environment = kEvery) {
    argv[0] = BuiltFile("tests/runtime/programs/" + argv[0]);
    return RunProgram(UnderShim({.argv = std::move(argv), .environment = environment}));
  }
  static Outcome Misuse(const std::string& what, const Variables& environment = kEvery) {
    return Run({"guard_pages", what}, environment);
  }
};

// By a function's name, which programs show to the dynamic linker only if they are linked so; else by the file's.
constexpr char kStack[] = "(    0x[0-9a-f]+ [^\n]*\n)+";
std::string Report(const std::string& first, bool accessed, bool freed) {
  std::string report = "^freehold: " + first + "\n";
  if (accessed) report += std::string("freehold: accessed at\n") + kStack;
  report += std::string("freehold: allocated by thread [0-9]+ at\n") + kStack;
  if (freed) report += std::string("freehold: freed by thread [0-9]+ at\n") + kStack;
  return report + "$";
}

TEST_F(GuardPagesTest, AccessesThatTrap) {
  // The object begins or ends its page.
  const Outcome after = Misuse("after");
  EXPECT_EQ(after.status, -SIGSEGV);
  EXPECT_THAT(after.err, ContainsRegex(Report("heap overflow: thread [0-9]+ \"guard_pages\" accessed 0x[0-9a-f]+, 4066 "
                                              "bytes after the 30-byte object at 0x[0-9a-f]+",
                                              true, false)));
  const Outcome before = Misuse("before");
  EXPECT_EQ(before.status, -SIGSEGV);
  EXPECT_THAT(before.err, ContainsRegex(Report("heap underflow: thread [0-9]+ \"guard_pages\" accessed 0x[0-9a-f]+, "
                                               "4096 bytes before the 30-byte object at 0x[0-9a-f]+",
                                               true, false)));
  const Outcome freed = Misuse("freed");
  EXPECT_EQ(freed.status, -SIGSEGV);
  EXPECT_THAT(freed.err, ContainsRegex(Report("use after free: thread [0-9]+ \"worker\" accessed 0x[0-9a-f]+, 8 bytes "
                                              "into the freed 30-byte object at 0x[0-9a-f]+",
                                              true, true)));
}

// What is said to have allocated and freed is the program, from its own functions on.
TEST_F(GuardPagesTest, StacksBeginInTheProgram) {
  for (const char* what : {"freed", "twice"}) {
    const Outcome outcome = Misuse(what);
    for (const char* event : {"allocated", "freed"}) {
      EXPECT_THAT(outcome.err, ContainsRegex(std::string(event) +
                                             " by thread [0-9]+ at\n    0x[0-9a-f]+ [^\n]*guard_pages\\+0x"));
    }
    // The thread that accessed it began in the library: a frame, where the compiler made no jump of its call.
    EXPECT_THAT(outcome.err, Not(ContainsRegex("at\n    0x[0-9a-f]+ [^\n]*libfreehold")));
    const std::size_t past = outcome.err.find("allocated by");
    ASSERT_NE(past, std::string::npos);
    EXPECT_THAT(outcome.err.substr(past), Not(HasSubstr("libfreehold")));
  }
}

TEST_F(GuardPagesTest, WrongFrees) {
  const std::pair<const char*, std::string> cases[] = {
      {"twice", Report("free.0x[0-9a-f]+.: double free of a 30-byte object", false, true)},
      {"inside", Report("free.0x[0-9a-f]+.: interior pointer .8 bytes into a 30-byte object at 0x[0-9a-f]+.", false, false)},
      {"stray", Report("free.0x[0-9a-f]+.: 0 bytes after the 30-byte object was written to", false, false)},
      {"wrong-size", "^freehold: free.0x[0-9a-f]+.: size 31 given for a 30-byte object\n$"},
  };
  for (const auto& [what, report] : cases) {
    const Outcome outcome = Misuse(what);
    EXPECT_EQ(outcome.status, -SIGABRT) << what;
    EXPECT_THAT(outcome.err, ContainsRegex(report)) << what;
  }
}

// Without the setting the same programs say nothing of the kind.
TEST_F(GuardPagesTest, OffByDefault) {
  for (const char* what : {"after", "before", "stray"}) {
    const Outcome outcome = Misuse(what, {});
    EXPECT_EQ(outcome.status, 0) << what;
    EXPECT_EQ(outcome.err, "") << what;
  }
}

// ---- The program's own disposition ----

TEST_F(GuardPagesTest, AProgramsOwnHandlerComesNext) {
  for (const char* what : {"handled", "handled-signal"}) {
    const Outcome outcome = Misuse(what);
    EXPECT_EQ(outcome.status, 42) << what;
    EXPECT_EQ(outcome.out, "handled\n") << what;
    EXPECT_THAT(outcome.err, ContainsRegex(Report("use after free: [^\n]*", true, true))) << what;
  }
  // With nothing to report, and without guard pages.
  for (const Variables& environment : {kEvery, Variables{}}) {
    const Outcome other = Misuse("other", environment);
    EXPECT_EQ(other.status, -SIGSEGV);
    EXPECT_EQ(other.err, "");
    const Outcome sent = Misuse("sent", environment);
    EXPECT_EQ(sent.status, -SIGSEGV);
    EXPECT_EQ(sent.err, "");
  }
}

TEST_F(GuardPagesTest, AHandlerThatIsResetIsCalledOnce) {
  const Outcome outcome = Misuse("handled-once");
  EXPECT_EQ(outcome.status, -SIGSEGV);
  EXPECT_EQ(outcome.out, "once\n");
  // The second trap of one access is no news.
  EXPECT_THAT(outcome.err, ContainsRegex(Report("use after free: [^\n]*", true, true)));
}

TEST_F(GuardPagesTest, AHandlerMayJumpOut) {
  const Outcome outcome = Misuse("recovered");
  EXPECT_EQ(outcome.status, -SIGSEGV);
  EXPECT_EQ(outcome.out, "recovered\n");
  EXPECT_THAT(outcome.err, ContainsRegex("0 bytes into the freed(.|\n)*1 bytes into the freed"));
}

TEST_F(GuardPagesTest, WhatIsIgnoredTrapsAllTheSame) {
  const Outcome outcome = Misuse("ignored");
  EXPECT_EQ(outcome.status, -SIGSEGV);
  EXPECT_EQ(outcome.out, "alive\n");
  EXPECT_THAT(outcome.err, ContainsRegex(Report("use after free: [^\n]*", true, true)));
}

// Two reports by one handler.
TEST_F(GuardPagesTest, StackOverflowsAreReportedBesides) {
  const Outcome outcome = Run({"stack_overflow", "plain"});
  EXPECT_EQ(outcome.status, -SIGSEGV);
  EXPECT_THAT(outcome.err, ContainsRegex("^freehold: thread [0-9]+ \"digger\" overflowed its stack [^\n]*\n$"));
  const Outcome handled = Run({"stack_overflow", "handled-late"});
  EXPECT_EQ(handled.status, 42);
}

// ---- Everything else ----

TEST_F(GuardPagesTest, TheChildOfAForkReportsToo) {
  const Outcome outcome = Misuse("fork");
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_THAT(outcome.err, ContainsRegex(Report("use after free: [^\n]*", true, true)));
}

TEST_F(GuardPagesTest, TheKernelsAccessesFail) {
  const Outcome outcome = Misuse("system-call");
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(outcome.err, "");
}

TEST_F(GuardPagesTest, NothingIsReportedWithoutAReason) {
  const Variables settings[] = {
      kEvery,
      {{"FREEHOLD_GUARD_PAGES", "1"}, {"FREEHOLD_GUARD_SLOTS", "1"}},
      {{"FREEHOLD_GUARD_PAGES", "4K"}, {"FREEHOLD_GUARD_SLOTS", "16384"}},
      {{"FREEHOLD_GUARD_PAGES", "1K"}, {"FREEHOLD_QUARANTINE", "256K"}, {"FREEHOLD_ZERO_ON_FREE", "1"}},
      {{"FREEHOLD_GUARD_PAGES", "1K"}, {"FREEHOLD_RANDOM_PLACEMENT", "1"}},
      {{"FREEHOLD_GUARD_PAGES", "1"}, {"FREEHOLD_RANDOM_PLACEMENT", "1"}, {"FREEHOLD_QUARANTINE", "1M"}},
      {{"FREEHOLD_GUARD_PAGES", "1K"}, {"FREEHOLD_HEAP_PROFILE_INTERVAL", "2K"}},
  };
  for (const Variables& environment : settings) {
    const Outcome outcome = Misuse("fine", environment);
    EXPECT_EQ(outcome.status, 0) << ::testing::PrintToString(environment) << outcome.err;
    EXPECT_EQ(outcome.err, "") << ::testing::PrintToString(environment);
  }
}

TEST_F(GuardPagesTest, Programs) {
  for (const char* program : {"conformance", "operators", "thread_churn", "fork_storm", "thread_end"}) {
    const Outcome plain = Run({program}, {});
    for (const char* interval : {"1", "8K"}) {
      const Outcome guarded = Run({program}, {{"FREEHOLD_GUARD_PAGES", interval}});
      EXPECT_EQ(guarded.status, plain.status) << program << ": " << guarded.err;
      EXPECT_EQ(guarded.err, plain.err) << program;
    }
  }
  const Outcome python = RunProgram(
      UnderShim({.argv = {"python3", "-c",
                          "import faulthandler, threading, os\n"
                          "faulthandler.enable()\n"
                          "data = [str(i) * 10 for i in range(100000)]\n"
                          "threads = [threading.Thread(target=lambda: [bytearray(1000) for _ in range(1000)]) for _ in "
                          "range(8)]\n"
                          "[t.start() for t in threads]; [t.join() for t in threads]\n"
                          "pid = os.fork()\n"
                          "if pid == 0: data = [d * 2 for d in data]; os._exit(0)\n"
                          "print(len(data), os.waitpid(pid, 0)[1])"},
                 .environment = {{"FREEHOLD_GUARD_PAGES", "4K"}}}));
  EXPECT_EQ(python.status, 0);
  EXPECT_EQ(python.out, "100000 0\n");
  EXPECT_EQ(python.err, "");
}

// A leak report lists guarded objects like others.
TEST_F(GuardPagesTest, BesideALeakReport) {
  const Outcome outcome =
      Misuse("system-call", {{"FREEHOLD_GUARD_PAGES", "1"}, {"FREEHOLD_LEAK_REPORT", "1"}, {"FREEHOLD_HEAP_PROFILE_INTERVAL", "1"}});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_THAT(outcome.err, ContainsRegex("32 bytes in 1 object of 32, allocated at\n    0x[0-9a-f]+ [^\n]*guard_pages"));
}

TEST_F(GuardPagesTest, WhereThereAreNoneALineSaysWhy) {
  const Outcome libc = Misuse("fine", {{"FREEHOLD_GUARD_PAGES", "1"}, {"FREEHOLD_MALLOC", "libc"}});
  EXPECT_EQ(libc.status, 0);
  EXPECT_EQ(libc.err, "freehold: no guard pages: malloc is not Freehold's\n");
  const Outcome small = Misuse(
      "fine", {{"FREEHOLD_GUARD_PAGES", "1"}, {"FREEHOLD_GUARD_SLOTS", "16384"}, {"FREEHOLD_RESERVE", "64M"}});
  EXPECT_EQ(small.status, 0);
  EXPECT_EQ(small.err, "freehold: no guard pages: no memory for them\n");
}

}  // namespace
}  // namespace freehold::testing
