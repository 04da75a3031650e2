// Runs programs for the tests of the runtime: plain, under the preloaded shim, and through
// `freehold run`.
#ifndef FREEHOLD_TESTS_RUNTIME_SUBPROCESS_H_
#define FREEHOLD_TESTS_RUNTIME_SUBPROCESS_H_

#include <sys/resource.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace freehold::testing {

// What a finished program left behind.
struct Outcome {
  int status = 0;  // exit status, or minus the signal that ended it
  std::string out;
  std::string err;
};

using Environment = std::vector<std::pair<std::string, std::string>>;

struct Launch {
  std::vector<std::string> argv;
  // Added to the test's environment, from which FREEHOLD_* and LD_PRELOAD are removed.
  Environment environment = {};
  std::optional<rlim_t> address_space_limit = {};  // RLIMIT_AS
  int timeout_seconds = 120;
};

// Runs `launch` to its end and collects its output. A program that does not end in time is killed,
// which its status (-SIGKILL) shows.
Outcome RunProgram(const Launch& launch);

// The same program with libfreehold.so preloaded.
Launch UnderShim(Launch launch);

// One of tests/runtime/programs, by its name.
Launch TestProgram(const std::string& name, std::vector<std::string> arguments = {}, Environment environment = {});

// Runs `launch`, which is expected to succeed without a word on standard error; returns what it wrote to standard
// output.
std::string ExpectQuiet(const Launch& launch);

// Skips a test that preloads where that cannot work; visibly.
#define FREEHOLD_SKIP_WITH_SANITIZER()           \
  if (::freehold::testing::BuiltWithSanitizer()) \
  GTEST_SKIP() << "a sanitizer brings a malloc of its own"

// Files of the build, by their paths in the workspace: "tests/runtime/conformance".
std::string BuiltFile(const std::string& path);

// The libraries and programs under test.
std::string ShimLibrary();
std::string Cli();

// Whether the tests and their programs are built with a sanitizer.
constexpr bool BuiltWithSanitizer() {
#if defined(FREEHOLD_ASAN) || defined(FREEHOLD_TSAN)
  return true;
#else
  return false;
#endif
}

}  // namespace freehold::testing

#endif  // FREEHOLD_TESTS_RUNTIME_SUBPROCESS_H_
