// Every symbol of the shim against its manual page: programs that check and print what malloc's
// family does, run plain and with the shim, preloaded and linked. Plain libc is the reference.
#include <string>

#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

const char kConformance[] = "tests/runtime/programs/conformance";

Outcome RunBuilt(const std::string& program, std::vector<std::string> arguments = {}) {
  arguments.insert(arguments.begin(), BuiltFile(program));
  return RunProgram({.argv = arguments});
}

Outcome RunUnderShim(const std::string& program, std::vector<std::string> arguments = {},
                     std::vector<std::pair<std::string, std::string>> environment = {}) {
  arguments.insert(arguments.begin(), BuiltFile(program));
  return RunProgram(UnderShim({.argv = arguments, .environment = environment}));
}

void ExpectGood(const Outcome& outcome) {
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.err, "");
  EXPECT_EQ(outcome.out.find("WRONG"), std::string::npos) << outcome.out;
}

TEST(MallocConformanceTest, PreloadedIsAsLibc) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome plain = RunBuilt(kConformance);
  const Outcome shim = RunUnderShim(kConformance);
  ExpectGood(plain);
  ExpectGood(shim);
  EXPECT_EQ(shim.out, plain.out);
}

TEST(MallocConformanceTest, LinkedIsAsLibc) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome plain = RunBuilt(kConformance);
  const Outcome linked = RunBuilt("tests/runtime/programs/conformance_linked");
  ExpectGood(linked);
  EXPECT_EQ(linked.out, plain.out);
}

TEST(MallocConformanceTest, StaticallyLinkedIsAsLibc) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome plain = RunBuilt(kConformance);
  const Outcome linked = RunBuilt("tests/runtime/programs/conformance_static");
  ExpectGood(linked);
  EXPECT_EQ(linked.out, plain.out);
}

TEST(MallocConformanceTest, SwitchedOffIsLibc) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome plain = RunBuilt(kConformance);
  const Outcome off = RunUnderShim(kConformance, {}, {{"FREEHOLD_MALLOC", "libc"}});
  ExpectGood(off);
  EXPECT_EQ(off.out, plain.out);
}

TEST(MallocConformanceTest, StrictUnmapAndCoarseLocksChangeNothing) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome plain = RunBuilt(kConformance);
  const Outcome shim = RunUnderShim(
      kConformance, {}, {{"FREEHOLD_STRICT_UNMAP", "1"}, {"FREEHOLD_LOCK_POLICY", "coarse"}});
  ExpectGood(shim);
  EXPECT_EQ(shim.out, plain.out);
}

TEST(MallocConformanceTest, WhatLibcLacks) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome shim = RunProgram({.argv = {BuiltFile("tests/runtime/programs/beyond_libc")}});
  ExpectGood(shim);
  EXPECT_EQ(shim.out, "ok\n");
}

TEST(OperatorsTest, PreloadedIsAsLibstdcxx) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome plain = RunBuilt("tests/runtime/programs/operators");
  const Outcome shim = RunUnderShim("tests/runtime/programs/operators");
  ExpectGood(plain);
  ExpectGood(shim);
  EXPECT_EQ(shim.out, plain.out);
}

TEST(OperatorsTest, LinkedIsAsLibstdcxx) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome linked = RunBuilt("tests/runtime/programs/operators_linked");
  ExpectGood(linked);
  EXPECT_NE(linked.out.find("handler: done"), std::string::npos);
}

TEST(OperatorsTest, SwitchedOffIsLibstdcxx) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome off =
      RunUnderShim("tests/runtime/programs/operators", {}, {{"FREEHOLD_MALLOC", "libc"}});
  ExpectGood(off);
  EXPECT_NE(off.out.find("handler: done"), std::string::npos);
}

// libstdc++ comes into the process after the shim, with a scope of its own: bad_alloc is still the
// one that its users catch.
TEST(OperatorsTest, InALibraryThatACProgramLoads) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome shim = RunUnderShim("tests/runtime/programs/loads_plugin",
                                    {BuiltFile("tests/runtime/programs/liboperators_plugin.so")});
  ExpectGood(shim);
  EXPECT_NE(shim.out.find("handler: done"), std::string::npos);
}

}  // namespace
}  // namespace freehold::testing
