// The runtime from the first instruction of a process to its last, in threads being born and dying,
// and when the program frees what it must not.
#include <csignal>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;

class ProcessLifeTest : public ::testing::Test {
 protected:
  void SetUp() override { FREEHOLD_SKIP_WITH_SANITIZER(); }

  static std::string Program(const std::string& name) {
    return BuiltFile("tests/runtime/programs/" + name);
  }

  static Outcome Preloaded(const std::string& program, std::vector<std::string> arguments = {},
                           Environment environment = {}) {
    return RunProgram(UnderShim(TestProgram(program, std::move(arguments), std::move(environment))));
  }

  static void ExpectOk(const Outcome& outcome) {
    EXPECT_EQ(outcome.status, 0);
    EXPECT_EQ(outcome.out, "ok\n");
    EXPECT_EQ(outcome.err, "");
  }
};

TEST_F(ProcessLifeTest, BeforeMain) {
  ExpectOk(Preloaded("startup_order", {Program("libstartup_plugin.so")}));
}

TEST_F(ProcessLifeTest, AfterMain) {
  const Outcome plain = RunProgram({.argv = {Program("process_end")}});
  const Outcome shim = Preloaded("process_end");
  EXPECT_EQ(shim.status, 7);
  EXPECT_EQ(shim.out, plain.out);
  EXPECT_EQ(shim.err, "");
}

TEST_F(ProcessLifeTest, LinkedBeforeAndAfterMain) {
  const Outcome plain = RunProgram({.argv = {Program("process_end")}});
  const Outcome linked = RunProgram({.argv = {Program("process_end_linked")}});
  EXPECT_EQ(linked.status, 7);
  EXPECT_EQ(linked.out, plain.out);
}

TEST_F(ProcessLifeTest, ThreadsThatEnd) { ExpectOk(Preloaded("thread_end")); }

TEST_F(ProcessLifeTest, ThreadsThatEndWithLibcsMalloc) {
  ExpectOk(Preloaded("thread_end", {}, {{"FREEHOLD_MALLOC", "libc"}}));
}

TEST_F(ProcessLifeTest, ThousandsOfThreadsLeaveNothingBehind) {
  const Outcome outcome = Preloaded("thread_churn");
  EXPECT_EQ(outcome.status, 0) << outcome.err << outcome.out;
  EXPECT_THAT(outcome.out, HasSubstr("ok\n"));
}

TEST_F(ProcessLifeTest, Signals) { ExpectOk(Preloaded("signals")); }

TEST_F(ProcessLifeTest, ExitStatusAndSignalsAreThePrograms) {
  for (int status : {0, 1, 42, 255}) {
    const Outcome outcome =
        RunProgram(UnderShim({.argv = {"/bin/sh", "-c", "exit " + std::to_string(status)}}));
    EXPECT_EQ(outcome.status, status);
  }
  EXPECT_EQ(RunProgram(UnderShim({.argv = {"/bin/sh", "-c", "kill -SEGV $$"}})).status, -SIGSEGV);
}

// With a reservation that valgrind would refuse, and with one that it would grant.
TEST_F(ProcessLifeTest, StepsAsideUnderValgrind) {
  for (const char* reserve : {"16T", "1G"}) {
    const std::vector<std::string> program = {"valgrind", "-q", "/bin/echo", "ok"};
    ExpectOk(RunProgram(UnderShim({.argv = program, .environment = {{"FREEHOLD_RESERVE", reserve}}})));
    const Outcome verbose = RunProgram(
        UnderShim({.argv = program, .environment = {{"FREEHOLD_RESERVE", reserve}, {"FREEHOLD_VERBOSE", "1"}}}));
    EXPECT_THAT(verbose.err, HasSubstr(": runs under valgrind, which Freehold leaves all memory to\n"));
  }
}

TEST_F(ProcessLifeTest, ProgramsOptionsAreOverriddenByTheEnvironment) {
  const Outcome defaults = RunProgram({.argv = {Program("program_config")}});
  EXPECT_EQ(defaults.status, 0) << defaults.err;
  EXPECT_EQ(defaults.out, "decay-ms 123 reserve 128G\n");
  const Outcome overridden = RunProgram(
      {.argv = {Program("program_config")}, .environment = {{"FREEHOLD_DECAY_MS", "77"}}});
  EXPECT_EQ(overridden.out, "decay-ms 77 reserve 128G\n");
}

TEST_F(ProcessLifeTest, AllocatesWhileLibcsFunctionsAreLookedUp) {
  const Outcome outcome = RunProgram(
      {.argv = {Program("report"), "stats"},
       .environment = {{"LD_PRELOAD", Program("liballocating_dlsym.so") + ":" + ShimLibrary()},
                       {"FREEHOLD_MALLOC", "libc"}}});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_THAT(outcome.err, HasSubstr("Arena 0:"));  // glibc's words
}

// ---- settings ----

TEST_F(ProcessLifeTest, UnknownVariablesAndBadValuesAreReportedOnce) {
  const Outcome outcome = RunProgram(
      UnderShim({.argv = {"/bin/true"},
                 .environment = {{"FREEHOLD_KEEPRE", "0"}, {"FREEHOLD_DECAY_MS", "soon"}}}));
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.err,
            "freehold: unknown variable FREEHOLD_KEEPRE is ignored; did you mean FREEHOLD_KEEPER?\n"
            "freehold: FREEHOLD_DECAY_MS=soon is not a time such as 250 (milliseconds) or 3s, from "
            "0 to 3600000; "
            "it is ignored\n");
}

TEST_F(ProcessLifeTest, VerboseSaysWhatWasDecided) {
  const Outcome outcome = RunProgram(
      UnderShim({.argv = {"/bin/true"},
                 .environment = {{"FREEHOLD_VERBOSE", "1"}, {"FREEHOLD_RESERVE", "128G"}}}));
  EXPECT_EQ(outcome.status, 0);
  EXPECT_THAT(outcome.err, HasSubstr(": reserved 128G at 0x"));
  EXPECT_THAT(outcome.err, HasSubstr("decay-ms 1000"));
}

TEST_F(ProcessLifeTest, StatsAtExit) {
  const Outcome outcome = RunProgram(
      UnderShim({.argv = {"/bin/true"}, .environment = {{"FREEHOLD_STATS_AT_EXIT", "1"}}}));
  EXPECT_EQ(outcome.status, 0);
  EXPECT_THAT(outcome.err, HasSubstr("Freehold\nallocated bytes"));
}

// ---- reports ----

TEST_F(ProcessLifeTest, ReportsFollowTheLoad) {
  const Outcome outcome = Preloaded("report", {"none"});
  std::size_t arena = 0, uordblks = 0, fordblks = 0, hblks = 0, hblkhd = 0;
  ASSERT_EQ(std::sscanf(outcome.err.c_str(),
                        "mallinfo2: arena %zu uordblks %zu fordblks %zu hblks %zu hblkhd %zu",
                        &arena, &uordblks, &fordblks, &hblks, &hblkhd),
            5)
      << outcome.err;
  EXPECT_GE(uordblks, 1'000'000u);  // 1000 objects of 1000 bytes
  EXPECT_LT(uordblks, 1'500'000u);
  EXPECT_EQ(arena, uordblks + fordblks);
  EXPECT_EQ(hblks, 1u);
  EXPECT_GE(hblkhd, 10u << 20);
  EXPECT_LT(hblkhd, 12u << 20);
}

TEST_F(ProcessLifeTest, ReportInXml) {
  const Outcome outcome = Preloaded("report", {"xml"});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_THAT(outcome.out, HasSubstr("<malloc version=\"1\">\n<heap nr=\"0\">\n<sizes>\n"));
  // 1000 objects of 1000 bytes; what the thread has at hand beside them counts as held.
  std::size_t count = 0;
  const std::size_t found = outcome.out.find("<size from=\"1024\" to=\"1024\"");
  ASSERT_NE(found, std::string::npos) << outcome.out;
  ASSERT_EQ(std::sscanf(outcome.out.c_str() + found, "<size from=\"1024\" to=\"1024\" total=\"%*u\" count=\"%zu\"", &count), 1);
  EXPECT_GE(count, 1000u);
  EXPECT_LE(count, 1016u);
  EXPECT_THAT(outcome.out, HasSubstr("total=\"" + std::to_string(count * 1024) + "\" count="));
  EXPECT_THAT(outcome.out, HasSubstr("<total type=\"mmap\" count=\"1\""));
  const Outcome parsed = RunProgram(
      {.argv = {"python3", "-c",
                "import sys, xml.etree.ElementTree as e; print(e.fromstring(sys.argv[1]).tag)",
                outcome.out}});
  EXPECT_EQ(parsed.out, "malloc\n") << parsed.err;
}

TEST_F(ProcessLifeTest, ReportInWords) {
  const Outcome outcome = Preloaded("report", {"stats"});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_THAT(outcome.err, HasSubstr("Freehold\nallocated bytes"));
  EXPECT_THAT(outcome.err, HasSubstr("large objects          = 1\n"));
}

// ---- wrong frees ----

struct WrongFree {
  const char* kind;
  const char* message;  // a regular expression
};

class WrongFreeTest : public ProcessLifeTest, public ::testing::WithParamInterface<WrongFree> {};

TEST_P(WrongFreeTest, StopsTheProgramWithAMessage) {
  const Outcome outcome = Preloaded("wrong_free", {GetParam().kind});
  EXPECT_EQ(outcome.status, -SIGABRT);
  EXPECT_EQ(outcome.out, "");
  EXPECT_THAT(outcome.err, MatchesRegex(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, WrongFreeTest,
    ::testing::Values(
        WrongFree{"double", "freehold: free\\(0x[0-9a-f]+\\): double free of a 112-byte object\n"},
        WrongFree{
            "double-large",
            "freehold: free\\(0x[0-9a-f]+\\): not an object: freed before, or never allocated\n"},
        WrongFree{"stack", "freehold: free\\(0x[0-9a-f]+\\): not from this heap\n"},
        WrongFree{"inside",
                  "freehold: free\\(0x[0-9a-f]+\\): interior pointer .16 bytes into a 112-byte "
                  "object.*\n"},
        WrongFree{"inside-large",
                  "freehold: free\\(0x[0-9a-f]+\\): interior pointer .4096 bytes into .*\n"},
        WrongFree{"mapped", "freehold: free\\(0x[0-9a-f]+\\): not an object: .*\n"},
        WrongFree{"realloc-foreign", "freehold: realloc\\(0x[0-9a-f]+\\): not from this heap\n"},
        WrongFree{"number", "freehold: free\\(0x1000\\): not from this heap\n"}),
    [](const auto& info) {
      std::string name = info.param.kind;
      for (char& c : name) {
        if (c == '-') c = '_';
      }
      return name;
    });

}  // namespace
}  // namespace freehold::testing
