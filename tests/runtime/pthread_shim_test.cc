// The pthread shim under real programs: each is run plain too, and libc is the reference.
#include <csignal>
#include <cstdio>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;


class PthreadShimTest : public ::testing::Test {
 protected:
  void SetUp() override { FREEHOLD_SKIP_WITH_SANITIZER(); }

  static void ExpectSame(const Launch& launch) {
    const Outcome plain = RunProgram(launch);
    const Outcome shim = RunProgram(UnderShim(launch));
    EXPECT_EQ(plain.status, 0) << plain.err;
    EXPECT_EQ(shim.status, plain.status);
    EXPECT_EQ(shim.out, plain.out);
    EXPECT_EQ(shim.err, plain.err);
  }
};

// ---- As libc ----

TEST_F(PthreadShimTest, ThreadsAreAsLibcs) { ExpectSame(TestProgram("thread_conformance")); }

TEST_F(PthreadShimTest, ThreadsAreAsLibcsWithoutReports) {
  ExpectSame(TestProgram("thread_conformance", {}, {{"FREEHOLD_OVERFLOW_REPORT", "off"}}));
}

TEST_F(PthreadShimTest, SwitchedOff) {
  ExpectSame(TestProgram("thread_conformance", {}, {{"FREEHOLD_STACKS", "libc"}}));
  ExpectSame(TestProgram("thread_conformance", {}, {{"FREEHOLD_MALLOC", "libc"}}));
}

// The pool is soon full, and libc finds stacks elsewhere, or not.
TEST_F(PthreadShimTest, LittleAddressSpace) {
  ExpectSame(TestProgram("thread_conformance", {}, {{"FREEHOLD_RESERVE", "256M"}}));
}

// libc frees after a thread's last destructor.
TEST_F(PthreadShimTest, DetachedThreadsLeaveNothingBehindInMalloc) { ExpectSame(TestProgram("detached_idle")); }

TEST_F(PthreadShimTest, MuchThreadLocalStorage) {
  ExpectSame(TestProgram("large_tls", {BuiltFile("tests/runtime/programs/libtls_plugin.so")}));
}

TEST_F(PthreadShimTest, StacksThatAreExecuted) { ExpectSame(TestProgram("executable_stack")); }

// ---- Kernel VMAs and memory ----

struct Counts {
  int vmas = -1;
  long resident = -1;
  long after = -1;
};

Counts Read(const Outcome& outcome) {
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  Counts counts;
  EXPECT_EQ(std::sscanf(outcome.out.c_str(), "vmas %d resident %ld after %ld", &counts.vmas, &counts.resident,
                        &counts.after),
            3)
      << outcome.out;
  return counts;
}

TEST_F(PthreadShimTest, TenThousandThreadsAddAFewKernelVmas) {
  const Counts counts = Read(RunProgram(UnderShim(TestProgram("many_threads", {"10000"}))));
  EXPECT_LT(counts.vmas, 50);
  EXPECT_GT(counts.resident, 10'000 * 256 / 1024);  // they have been that deep
  // Of the free stacks some stay resident, and the pages that keep the kernel's records.
  EXPECT_LT(counts.after, counts.resident / 5);
}

TEST_F(PthreadShimTest, WithoutTheShimThereAreTwoEach) {
  const Counts counts =
      Read(RunProgram(UnderShim(TestProgram("many_threads", {"1000"}, {{"FREEHOLD_STACKS", "libc"}}))));
  EXPECT_GT(counts.vmas, 1900);
}

// ---- Overflow ----

TEST_F(PthreadShimTest, AnOverflowIsReported) {
  const Outcome outcome = RunProgram(UnderShim(TestProgram("stack_overflow", {"plain"})));
  EXPECT_EQ(outcome.status, -SIGSEGV);
  EXPECT_THAT(outcome.err,
              MatchesRegex("freehold: thread [0-9]+ \"digger\" overflowed its stack \\[0x[0-9a-f]+, 0x[0-9a-f]+\\) of "
                           "256K: access to 0x[0-9a-f]+, [0-9]+ bytes below it\n"));
}

TEST_F(PthreadShimTest, OtherFaultsAreNotReported) {
  for (const char* how : {"null", "sent", "main"}) {
    const Outcome outcome = RunProgram(UnderShim(TestProgram("stack_overflow", {how})));
    EXPECT_EQ(outcome.status, -SIGSEGV) << how;
    EXPECT_EQ(outcome.err, "") << how;
  }
}

TEST_F(PthreadShimTest, ReportsAreSwitchedOff) {
  const Outcome outcome =
      RunProgram(UnderShim(TestProgram("stack_overflow", {"plain"}, {{"FREEHOLD_OVERFLOW_REPORT", "off"}})));
  EXPECT_EQ(outcome.status, -SIGSEGV);
  EXPECT_EQ(outcome.err, "");
}

TEST_F(PthreadShimTest, AProgramsOwnHandlerIsLeftAlone) {
  for (const char* how : {"handled", "handled-late"}) {
    const Outcome outcome = RunProgram(UnderShim(TestProgram("stack_overflow", {how})));
    EXPECT_EQ(outcome.status, how == std::string("handled") ? -SIGSEGV : 42) << how;
    EXPECT_EQ(outcome.err, "") << how;
  }
}

TEST_F(PthreadShimTest, NothingIsInstalledBeforeTheFirstThread) {
  ExpectSame(TestProgram("stack_overflow", {"inspected"}));
}

// ---- Real programs ----

TEST_F(PthreadShimTest, PythonsThreadsAndFaultHandler) {
  ExpectSame({.argv = {"python3", "-c",
                       "import threading, concurrent.futures as f, faulthandler\n"
                       "faulthandler.enable()\n"
                       "threading.stack_size(1 << 20)\n"
                       "with f.ThreadPoolExecutor(50) as pool: print(sum(pool.map(lambda x: x * x, range(5000))))\n"}});
}

}  // namespace
}  // namespace freehold::testing
