// The `freehold` command: `freehold run` becomes the program, and says what is wrong when it
// cannot.
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "runtime/config.h"
#include "runtime/version.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

using Variables = std::vector<std::pair<std::string, std::string>>;

class CliTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/freehold-cli-test-XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    directory_ = name;
  }
  void TearDown() override { RunProgram({.argv = {"rm", "-rf", directory_}}); }

  static Outcome Freehold(std::vector<std::string> arguments, Variables environment = {}) {
    arguments.insert(arguments.begin(), Cli());
    return RunProgram({.argv = arguments, .environment = std::move(environment)});
  }
  static Outcome FreeholdRun(std::vector<std::string> arguments, Variables environment = {}) {
    arguments.insert(arguments.begin(), "run");
    return Freehold(std::move(arguments), std::move(environment));
  }

  // Makes a file in the test's directory and returns its path.
  std::string File(const std::string& name, const std::string& content, mode_t mode) const {
    const std::string path = directory_ + "/" + name;
    std::ofstream(path) << content;
    chmod(path.c_str(), mode);
    return path;
  }
  void Copy(const std::string& from, const std::string& to) const {
    ASSERT_EQ(RunProgram({.argv = {"cp", from, directory_ + "/" + to}}).status, 0);
  }

  std::string directory_;
};

TEST_F(CliTest, Help) {
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"--help"}, {"-h"}, {"help"}}) {
    const Outcome outcome = Freehold(arguments);
    EXPECT_EQ(outcome.status, 0);
    EXPECT_THAT(outcome.out, StartsWith("Usage: freehold COMMAND"));
    EXPECT_EQ(outcome.err, "");
  }
}

TEST_F(CliTest, HelpOfRunNamesEveryOption) {
  const Outcome outcome = FreeholdRun({"--help"});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_THAT(outcome.out, StartsWith("Usage: freehold run"));
  for (const runtime::Option& option : runtime::Options()) {
    EXPECT_THAT(outcome.out, HasSubstr("--" + std::string(option.name)));
    runtime::Message variable;
    runtime::AppendVariable(option, variable);
    EXPECT_THAT(outcome.out, HasSubstr(std::string(variable.text())));
  }
}

TEST_F(CliTest, Version) {
  const Outcome outcome = Freehold({"--version"});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.out, std::string("freehold ") + runtime::kVersion + "\n");
}

TEST_F(CliTest, WrongCommands) {
  EXPECT_EQ(Freehold({}).status, 2);
  const Outcome outcome = Freehold({"fly"});
  EXPECT_EQ(outcome.status, 2);
  EXPECT_EQ(outcome.err, "freehold: unknown command 'fly'; see `freehold --help`\n");
}

TEST_F(CliTest, WrongOptions) {
  const std::pair<std::vector<std::string>, std::string> cases[] = {
      {{}, "no program given"},
      {{"--"}, "no program given"},
      {{"--decay=5", "true"}, "unknown option --decay; did you mean --decay-ms?"},
      {{"--decay-ms", "true"}, "--decay-ms needs a value: --decay-ms=MS"},
      {{"--keeper=perhaps", "true"}, "--keeper=perhaps is not on or off"},
      {{"--malloc=best", "true"}, "--malloc=best is not freehold or libc or mimalloc"},
      {{"--library=", "true"}, "--library= is not a path"},
      {{"-k", "true"}, "unknown option -k"},
  };
  for (const auto& [arguments, message] : cases) {
    const Outcome outcome = FreeholdRun(arguments);
    EXPECT_EQ(outcome.status, 2) << message;
    EXPECT_EQ(outcome.err, "freehold: " + message + "; see `freehold run --help`\n");
  }
}

TEST_F(CliTest, OptionsBecomeVariables) {
  const Outcome outcome =
      FreeholdRun({"--decay-ms=250", "--verbose", "--keeper=off", "--strict-unmap", "--", "sh",
                   "-c", "env | grep ^FREEHOLD_ | sort"},
                  {{"FREEHOLD_DECAY_MS", "7"}, {"FREEHOLD_RESERVE", "1T"}});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(
      outcome.out,
      "FREEHOLD_DECAY_MS=250\nFREEHOLD_KEEPER=off\nFREEHOLD_RESERVE=1T\nFREEHOLD_STRICT_UNMAP=on\n"
      "FREEHOLD_VERBOSE=on\n");
}

TEST_F(CliTest, TheLibraryIsPreloadedInFrontOfOthers) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  EXPECT_EQ(FreeholdRun({"sh", "-c", "echo $LD_PRELOAD"}).out, ShimLibrary() + "\n");
  EXPECT_EQ(FreeholdRun({"sh", "-c", "echo $LD_PRELOAD"}, {{"LD_PRELOAD", "libc.so.6"}}).out,
            ShimLibrary() + ":libc.so.6\n");
  // A run within a run.
  EXPECT_EQ(FreeholdRun({Cli(), "run", "sh", "-c", "echo $LD_PRELOAD"}).out, ShimLibrary() + "\n");
  EXPECT_THAT(FreeholdRun({"cat", "/proc/self/maps"}).out, HasSubstr("libfreehold.so"));
}

TEST_F(CliTest, MeaninglessVariablesAreReportedOnceForTheWholeTree) {
  const Outcome outcome = FreeholdRun({"sh", "-c", "true; sh -c 'true; sh -c true'; env"},
                                      {{"FREEHOLD_KEEPRE", "0"}, {"FREEHOLD_RESERVE", "huge"}});
  EXPECT_EQ(outcome.err,
            "freehold: unknown variable FREEHOLD_KEEPRE is ignored; did you mean FREEHOLD_KEEPER?\n"
            "freehold: FREEHOLD_RESERVE=huge is not a size such as 64M or 16T, from 64M to 64T; it "
            "is ignored\n");
  EXPECT_THAT(outcome.out, Not(HasSubstr("FREEHOLD_KEEPRE")));
}

// ---- which library ----

TEST_F(CliTest, FindsTheLibraryBesideItselfAndInAnInstallation) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  RunProgram(
      {.argv = {"mkdir", "-p", directory_ + "/bin", directory_ + "/lib", directory_ + "/flat"}});
  Copy(Cli(), "bin/freehold");
  Copy(ShimLibrary(), "lib/libfreehold.so");
  const std::vector<std::string> show = {"sh", "-c", "echo $LD_PRELOAD"};
  EXPECT_EQ(
      RunProgram({.argv = {directory_ + "/bin/freehold", "run", "sh", "-c", "echo $LD_PRELOAD"}})
          .out,
      directory_ + "/lib/libfreehold.so\n");
  Copy(Cli(), "flat/freehold");
  Copy(ShimLibrary(), "flat/libfreehold.so");
  EXPECT_EQ(
      RunProgram({.argv = {directory_ + "/flat/freehold", "run", "sh", "-c", "echo $LD_PRELOAD"}})
          .out,
      directory_ + "/flat/libfreehold.so\n");
}

TEST_F(CliTest, TheLibraryCanBeChosen) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  Copy(ShimLibrary(), "mine.so");
  const std::string mine = directory_ + "/mine.so";
  EXPECT_EQ(FreeholdRun({"--library=" + mine, "sh", "-c", "echo $LD_PRELOAD"}).out, mine + "\n");
  EXPECT_EQ(FreeholdRun({"sh", "-c", "echo $LD_PRELOAD"}, {{"FREEHOLD_LIBRARY", mine}}).out,
            mine + "\n");
}

TEST_F(CliTest, AMissingLibraryIsNamed) {
  const Outcome chosen = FreeholdRun({"--library=/no/such.so", "true"});
  EXPECT_EQ(chosen.status, 125);
  EXPECT_EQ(chosen.err, "freehold: /no/such.so: No such file or directory\n");
  Copy(Cli(), "freehold");
  const Outcome alone = RunProgram({.argv = {directory_ + "/freehold", "run", "true"}});
  EXPECT_EQ(alone.status, 125);
  EXPECT_THAT(alone.err, HasSubstr("freehold: no libfreehold.so in " + directory_));
}

TEST_F(CliTest, APathThatCannotBePreloadedIsRefused) {
  Copy(ShimLibrary(), "with space.so");
  const Outcome outcome = FreeholdRun({"--library=" + directory_ + "/with space.so", "true"});
  EXPECT_EQ(outcome.status, 125);
  EXPECT_THAT(outcome.err, HasSubstr("a path with a space or a colon cannot be preloaded"));
}

// ---- the program ----

TEST_F(CliTest, StatusStreamsAndArgumentsAreThePrograms) {
  const Outcome outcome =
      FreeholdRun({"sh", "-c", "echo out; echo err >&2; echo \"$1\"; exit 42", "sh", "a  b"});
  EXPECT_EQ(outcome.status, 42);
  EXPECT_EQ(outcome.out, "out\na  b\n");
  EXPECT_EQ(outcome.err, "err\n");
  EXPECT_EQ(FreeholdRun({"sh", "-c", "kill -TERM $$"}).status, -SIGTERM);
  EXPECT_EQ(FreeholdRun({"--", "sh", "-c", "echo $1", "sh", "--help"}).out, "--help\n");
  EXPECT_EQ(FreeholdRun({"sh", "-c", "echo $1", "sh", "--keeper"}).out, "--keeper\n");
}

// No process stays between the caller and the program.
TEST_F(CliTest, TheProgramHasTheCommandsProcessId) {
  const Outcome outcome =
      RunProgram({.argv = {"sh", "-c", Cli() + " run sh -c 'echo $$' & echo $!; wait"}});
  const std::size_t line = outcome.out.find('\n');
  EXPECT_EQ(outcome.out.substr(0, line + 1), outcome.out.substr(line + 1));
}

TEST_F(CliTest, ProgramsThatCannotRun) {
  const Outcome missing = FreeholdRun({"no-such-program"});
  EXPECT_EQ(missing.status, 127);
  EXPECT_EQ(missing.err, "freehold: no-such-program: program not found\n");
  EXPECT_EQ(FreeholdRun({"/no/such/program"}).status, 127);
  EXPECT_EQ(FreeholdRun({""}).status, 127);
  const std::string text = File("text", "just text", 0644);
  const Outcome not_executable = FreeholdRun({text});
  EXPECT_EQ(not_executable.status, 126);
  EXPECT_EQ(not_executable.err, "freehold: " + text + ": Permission denied\n");
  EXPECT_EQ(FreeholdRun({directory_}).status, 126);
  const std::string broken = File("broken", "#!/no/such/interpreter\n", 0755);
  EXPECT_EQ(FreeholdRun({broken}).status, 127);
}

TEST_F(CliTest, ScriptsRun) {
  EXPECT_EQ(FreeholdRun({File("script", "#!/bin/sh\necho script $1\n", 0755), "x"}).out,
            "script x\n");
  // Without an interpreter line: as in a shell.
  EXPECT_EQ(FreeholdRun({File("bare", "echo bare $1\n", 0755), "x"}).out, "bare x\n");
}

TEST_F(CliTest, WarnsWherePreloadingHasNoEffect) {
  const std::string program = BuiltFile("tests/runtime/programs/static_program");
  const Outcome linked = FreeholdRun({program});
  EXPECT_EQ(linked.status, 0);
  EXPECT_EQ(linked.out, "static\n");
  EXPECT_EQ(linked.err,
            "freehold: warning: " + program + " is statically linked: it runs without Freehold\n");
  // Through a script's interpreter too.
  const Outcome script = FreeholdRun({File("script", "#!" + program + "\n", 0755)});
  EXPECT_THAT(script.err, HasSubstr("is statically linked"));
}

TEST_F(CliTest, WarnsOfProgramsThatGainPrivileges) {
  if (getuid() != 0) GTEST_SKIP() << "only root can make another user's setuid program";
  Copy("/bin/true", "setuid");
  const std::string program = directory_ + "/setuid";
  ASSERT_EQ(chown(program.c_str(), 65534, 65534), 0);
  ASSERT_EQ(chmod(program.c_str(), 04755), 0);
  const Outcome outcome = FreeholdRun({program});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_THAT(outcome.err,
              StartsWith("freehold: warning: " + program + " runs with more privileges"));
}

}  // namespace
}  // namespace freehold::testing
