// freehold.h, by a program in C99 that uses all of it (programs/c_api.c): with the library linked, preloaded, and
// built in.
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "runtime/version.h"
#include "tests/runtime/c_api_names.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::StartsWith;

using Variables = std::vector<std::pair<std::string, std::string>>;

Outcome RunVariant(const std::string& name, const std::string& kind, Variables environment = {}) {
  if (kind == "process" || kind == "beside") environment.emplace_back("FREEHOLD_RESERVE", "1G");
  return RunProgram({.argv = {BuiltFile("tests/runtime/programs/" + name), kind},
                     .environment = std::move(environment)});
}

void ExpectPassed(const Outcome& outcome, const std::string& last_case) {
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.err, "");
  EXPECT_THAT(outcome.out, StartsWith(std::string("version ") + runtime::kVersion + "\n"));
  EXPECT_THAT(outcome.out, EndsWith("\n" + last_case + "\n"));
}

// Where the dynamic linker finds libfreehold.so by its soname.
Variables LibraryPath() {
  const std::string library = BuiltFile("runtime/shim/libfreehold.so.0");
  return {{"LD_LIBRARY_PATH", library.substr(0, library.rfind('/'))}};
}

TEST(CApiTest, BuiltIn) {
  ExpectPassed(RunVariant("c_api_beside_malloc", "own"), "own_in_child");
}

TEST(CApiTest, BuiltInBesideAnothersMalloc) {
  ExpectPassed(RunVariant("c_api_beside_malloc", "beside"), "of_the_process");
}

TEST(CApiTest, BuiltInWithMalloc) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  ExpectPassed(RunVariant("c_api_linked", "process"), "process_in_child");
}

TEST(CApiTest, BuiltInWhereLibcServes) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  ExpectPassed(RunVariant("c_api_linked", "libc", {{"FREEHOLD_MALLOC", "libc"}}), "without_process_space");
}

TEST(CApiTest, WithTheLibrary) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  ExpectPassed(RunVariant("c_api", "process", LibraryPath()), "process_in_child");
}

TEST(CApiTest, WithTheLibraryWhereLibcServesMalloc) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  Variables environment = LibraryPath();
  environment.emplace_back("FREEHOLD_MALLOC", "libc");
  environment.emplace_back("FREEHOLD_RESERVE", "1G");
  ExpectPassed(RunVariant("c_api", "mmap", environment), "without_heap");
}

// One library serves a program that is linked with it and runs under it.
TEST(CApiTest, WithTheLibraryUnderFreeholdRun) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  Variables environment = LibraryPath();
  environment.emplace_back("FREEHOLD_RESERVE", "1G");
  const std::string program = BuiltFile("tests/runtime/programs/c_api");
  ExpectPassed(
      RunProgram(UnderShim({.argv = {program, "process"}, .environment = environment})),
      "process_in_child");
}

TEST(CApiTest, TheProgramUsesAll) {
  std::ifstream file(BuiltFile("tests/runtime/programs/c_api.c"));
  const std::string source{std::istreambuf_iterator<char>(file), {}};
  const std::set<std::string> functions = CApiFunctions();
  EXPECT_GT(functions.size(), 20u);
  for (const std::string& function : functions) EXPECT_THAT(source, HasSubstr(function + "(")) << function;
}

}  // namespace
}  // namespace freehold::testing
