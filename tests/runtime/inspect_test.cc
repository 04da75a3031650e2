// `freehold stat` and maps, and what all commands that look have in common, against programs that run under the shim, and against those that do not.
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "runtime/version.h"
#include "tests/runtime/inspected.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;
using ::testing::StartsWith;
using nlohmann::json;

const char* const kCommands[] = {"stat", "maps", "top", "report"};

// The command with what it needs to be quick, and to write to standard output.
std::vector<std::string> Quick(const std::string& command, const std::string& pid) {
  if (command == "top") return {command, pid, "--once", "--interval=0.1"};
  if (command == "report") return {command, pid, "-o", "/dev/stdout", "--seconds=0.1"};
  return {command, pid};
}

class InspectTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { process_ = new Inspected("hold"); }
  static void TearDownTestSuite() { delete std::exchange(process_, nullptr); }
  static Inspected* process_;
};
Inspected* InspectTest::process_ = nullptr;

// ---- stat ----

TEST_F(InspectTest, StatPrintsText) {
  const std::vector<std::string> lines = Lines(OutputOf({"stat", process_->pid()}));
  EXPECT_THAT(lines[0], MatchesRegex(absl::StrCat("inspected \\(", process_->pid(), "\\), Freehold ", runtime::kVersion,
                                                  ", adaptive range locks, up [0-9]+ s")));
  for (std::size_t i = 1; i < lines.size(); ++i) {
    EXPECT_THAT(lines[i], MatchesRegex("[a-z_]+ +[0-9.]+( [KMGT]?i?B)? +[A-Z].*"));
  }
}

TEST_F(InspectTest, StatPrintsJson) {
  const json root = json::parse(OutputOf({"stat", process_->pid(), "--json"}));
  EXPECT_EQ(root["pid"], std::stoi(process_->pid()));
  EXPECT_EQ(root["name"], "inspected");
  EXPECT_EQ(root["release"], runtime::kVersion);
  EXPECT_EQ(root["lock_policy"], "adaptive");
  EXPECT_GE(root["uptime_seconds"].get<double>(), 0);
  EXPECT_GE(root["metrics"]["heap_large_bytes"].get<std::uint64_t>(), 3u << 20);
  EXPECT_LT(root["metrics"]["heap_large_bytes"].get<std::uint64_t>(), 40u << 20);
  EXPECT_GE(root["metrics"]["kernel_mmap_total"].get<std::uint64_t>(), 1u);
  EXPECT_FALSE(root.contains("range_lock_ns"));
  ASSERT_GE(root["regions"].size(), 3u);
  std::set<std::string> zones;
  for (const auto& [name, value] : root["regions"][0]["metrics"].items()) {
    std::uint64_t sum = 0;
    for (const json& region : root["regions"]) sum += region["metrics"][name].get<std::uint64_t>();
    EXPECT_EQ(sum, root["metrics"][name].get<std::uint64_t>()) << name;
  }
  for (const json& region : root["regions"]) zones.insert(region["zone"].get<std::string>());
  EXPECT_EQ(zones, (std::set<std::string>{"dense", "mapping", "plain"}));
}

// Every line of Prometheus's text format: what is described, once, before its samples.
void CheckPrometheus(const std::string& text, const std::string& name_label) {
  static const std::regex kHelp("# HELP (freehold_[a-z_]+) .+");
  static const std::regex kType("# TYPE (freehold_[a-z_]+) (counter|gauge|summary)");
  static const std::regex kSample(
      R"re((freehold_[a-z_]+)\{pid="([0-9]+)",name="((?:[^"\\\n]|\\["\\n])*)"((?:,[a-z]+="[^"\\]*")*)\} [0-9]+(\.[0-9]+)?)re");
  std::map<std::string, std::string> types;
  std::string family;
  std::set<std::string> samples;
  for (const std::string& line : Lines(text)) {
    std::smatch match;
    if (std::regex_match(line, match, kHelp)) {
      family = match[1];
      EXPECT_EQ(types.count(family), 0u) << line;
    } else if (std::regex_match(line, match, kType)) {
      EXPECT_EQ(match[1], family) << line;
      types[family] = match[2];
      EXPECT_EQ(types[family] == "counter", absl::EndsWith(family, "_total")) << line;
    } else {
      ASSERT_TRUE(std::regex_match(line, match, kSample)) << line;
      EXPECT_EQ(match[3], name_label);
      EXPECT_TRUE(match[1] == family || (types[family] == "summary" && match[1] == family + "_count")) << line;
      EXPECT_TRUE(samples.insert(line.substr(0, line.find('}'))).second) << line;
    }
  }
  EXPECT_GE(types.size(), 30u);
}

TEST_F(InspectTest, StatPrintsForPrometheus) {
  CheckPrometheus(OutputOf({"stat", "--prometheus", process_->pid()}), "inspected");
}

// ---- stat --heap ----

TEST_F(InspectTest, StatPrintsTheHeapAsTables) {
  const std::vector<std::string> lines = Lines(OutputOf({"stat", "--heap", process_->pid()}));
  const auto has = [&](const std::string& pattern) {
    const auto count = std::count_if(lines.begin(), lines.end(), [&](const std::string& line) {
      return std::regex_match(line, std::regex(pattern));
    });
    EXPECT_EQ(count, 1) << pattern;
  };
  has("heap_allocated_bytes +[34]\\.[0-9] MiB   In objects that the program holds\\.");
  has("heap_fragmented_bytes +.*");
  has("[0-9.]+ % of the active memory is in no object");
  has(" +size +objects +free_objects +spans +object_bytes +span_bytes");
  has(" +cache +thread +spans +span_bytes +object_bytes +at_hand_bytes +attached");
  // The main thread's.
  has(" +0 +" + process_->pid() + " +[0-9]+ +[0-9.]+ [KM]iB +[0-9.]+ [KM]iB +[0-9.]+ [KM]?i?B +1");
  EXPECT_THAT(OutputOf({"stat", process_->pid()}), Not(HasSubstr("span_bytes")));
}

TEST_F(InspectTest, StatPrintsTheHeapInEveryFormat) {
  const json root = json::parse(OutputOf({"stat", process_->pid(), "--json", "--heap", "--huge-pages"}));
  const json& statistics = root["statistics"];
  EXPECT_EQ(statistics["heap_cache_thread"], (json{{"0", std::stoi(process_->pid())}}));
  EXPECT_EQ(statistics["heap_cache_attached"], (json{{"0", 1}}));
  EXPECT_GE(statistics["heap_allocated_bytes"].get<std::uint64_t>(), 3u << 20);
  EXPECT_EQ(statistics["heap_active_bytes"].get<std::uint64_t>(),
            statistics["heap_allocated_bytes"].get<std::uint64_t>() +
                statistics["heap_fragmented_bytes"].get<std::uint64_t>());
  EXPECT_GE(statistics["vm_resident_bytes"].get<std::uint64_t>(), 3u << 20);
  EXPECT_LE(statistics["vm_huge_page_bytes"].get<std::uint64_t>(), statistics["vm_resident_bytes"].get<std::uint64_t>());
  std::uint64_t spans = 0;
  for (const auto& [size, count] : statistics["heap_class_spans"].items()) {
    spans += count.get<std::uint64_t>();
    EXPECT_GE(statistics["heap_class_span_bytes"][size].get<std::uint64_t>(),
              statistics["heap_class_object_bytes"][size].get<std::uint64_t>())
        << size;
  }
  EXPECT_GE(spans, 1u);
  EXPECT_EQ(statistics["heap_cache_spans"]["0"].get<std::uint64_t>(), spans);
  EXPECT_FALSE(json::parse(OutputOf({"stat", process_->pid(), "--json"})).contains("statistics"));

  const std::string prometheus = OutputOf({"stat", "--prometheus", "--heap", "--huge-pages", process_->pid()});
  CheckPrometheus(prometheus, "inspected");
  EXPECT_THAT(prometheus, HasSubstr("freehold_heap_cache_thread{pid=\"" + process_->pid() +
                                    "\",name=\"inspected\",cache=\"0\"} " + process_->pid() + "\n"));
  EXPECT_THAT(prometheus, HasSubstr(",size=\""));
  EXPECT_THAT(prometheus, HasSubstr("freehold_vm_huge_page_bytes{"));
}

TEST_F(InspectTest, StatOfTheHeapOfAChildAndOfNone) {
  const Inspected parent("fork");
  const json child = json::parse(OutputOf({"stat", "--json", "--heap", parent.line()}))["statistics"];
  EXPECT_GE(child["heap_allocated_bytes"].get<std::uint64_t>(), 41u << 20);
  EXPECT_EQ(child["heap_cache_thread"], (json{{"0", std::stoi(parent.line())}}));
  const json own = json::parse(OutputOf({"stat", "--json", "--heap", parent.pid()}))["statistics"];
  EXPECT_LT(own["heap_allocated_bytes"].get<std::uint64_t>(), 40u << 20);
  EXPECT_EQ(own["heap_cache_thread"], (json{{"0", std::stoi(parent.pid())}}));

  const Inspected without("hold", {{"LD_PRELOAD", ShimLibrary()}, {"FREEHOLD_MALLOC", "libc"}});
  ExpectFailure({"stat", "--heap", without.pid()}, 1,
                "process " + without.pid() + " (inspected) has no heap of Freehold's");
  EXPECT_THAT(OutputOf({"stat", "--huge-pages", without.pid()}), HasSubstr("% of what is resident is in huge pages"));
}

TEST_F(InspectTest, TheHeapOfAProcessThatChangesIt) {
  Inspected churning("churn-until-end");
  for (int i = 0; i < 20; ++i) {
    const json statistics =
        json::parse(OutputOf({"stat", "--json", "--heap", churning.pid()}))["statistics"];
    EXPECT_GE(statistics["heap_cache_thread"].size(), 2u);
    EXPECT_GT(statistics["heap_active_bytes"].get<std::uint64_t>(), 0u);
  }
  churning.End();
}

TEST_F(InspectTest, TimesOfRangeLocks) {
  const Inspected recording("hold", {{"LD_PRELOAD", ShimLibrary()}, {"FREEHOLD_RECORD_RANGE_LOCKS", "1"}});
  const std::string text = OutputOf({"stat", recording.pid()});
  EXPECT_THAT(text, HasSubstr("waited ns p50/p99/max"));
  const json root = json::parse(OutputOf({"stat", recording.pid(), "--json"}));
  ASSERT_TRUE(root["range_lock_ns"].contains("map")) << root;
  EXPECT_GE(root["range_lock_ns"]["map"]["waited"]["count"].get<int>(), 1);
  EXPECT_GE(root["range_lock_ns"]["map"]["held"]["max"].get<int>(), 1);
  const std::string prometheus = OutputOf({"stat", "--prometheus", recording.pid()});
  CheckPrometheus(prometheus, "inspected");
  EXPECT_THAT(prometheus, HasSubstr("operation=\"map\",quantile=\"0.99\"} "));
}

TEST_F(InspectTest, NamesAreNotTrusted) {
  const Inspected named("name");
  EXPECT_THAT(OutputOf({"stat", named.pid()}), StartsWith("?[31m\"\\?{} ("));
  EXPECT_THAT(OutputOf({"maps", named.pid()}), HasSubstr("\n?[31m\"\\?{} ("));
  EXPECT_EQ(json::parse(OutputOf({"stat", "--json", named.pid()}))["name"], "?[31m\"\\?{}");
  CheckPrometheus(OutputOf({"stat", "--prometheus", named.pid()}), "?[31m\\\"\\\\?{}");
}

// ---- maps ----

TEST_F(InspectTest, MapsPrintsATable) {
  const std::vector<std::string> lines = Lines(OutputOf({"maps", process_->pid()}));
  EXPECT_THAT(lines[0], StartsWith("ADDRESSES"));
  EXPECT_THAT(lines[1], MatchesRegex("[0-9a-f]{12}-[0-9a-f]{12} +[0-9.]+ [KMG]iB  rw- +(plain|dense|mapping) *"));
  EXPECT_EQ(lines.back(), "inspected (" + process_->pid() + ")");
}

TEST_F(InspectTest, MapsPrintsTheKernelsFormat) {
  static const std::regex kLine(
      "([0-9a-f]{8,16})-([0-9a-f]{8,16}) [r-][w-][x-][ps] [0-9a-f]{8,} [0-9a-f]+:[0-9a-f]+ [0-9]+ *(.*)");
  const std::uint64_t block = std::stoull(process_->line(), nullptr, 16);
  std::uint64_t end = 0;
  bool holds_block = false;
  std::set<std::string> names;
  for (const std::string& line : Lines(OutputOf({"maps", "--kernel", process_->pid()}))) {
    std::smatch match;
    ASSERT_TRUE(std::regex_match(line, match, kLine)) << line;
    const std::uint64_t first = std::stoull(match[1], nullptr, 16);
    EXPECT_GE(first, end) << line;
    end = std::stoull(match[2], nullptr, 16);
    EXPECT_GT(end, first) << line;
    if (first <= block && block + (3 << 20) <= end) holds_block = absl::StartsWith(match[3].str(), "[freehold:");
    names.insert(match[3]);
  }
  EXPECT_TRUE(holds_block);
  EXPECT_EQ(names.count("[stack]"), 1u);
  EXPECT_EQ(names.count(ShimLibrary()), 1u);
}

// ---- processes ----

TEST_F(InspectTest, TheChildOfAForkHasItsOwnPage) {
  const Inspected parent("fork");
  const auto large = [](const std::string& pid) {
    return json::parse(OutputOf({"stat", "--json", pid}))["metrics"]["heap_large_bytes"].get<std::uint64_t>();
  };
  EXPECT_LT(large(parent.pid()), 40u << 20);
  EXPECT_GE(large(parent.line()), 41u << 20);
  EXPECT_THAT(OutputOf({"maps", "--kernel", parent.line()}), HasSubstr("[freehold:"));
}

TEST_F(InspectTest, ProcessesThatCannotBeLookedAt) {
  const Inspected plain("hold", {});
  const Inspected silent("hold", {{"LD_PRELOAD", ShimLibrary()}, {"FREEHOLD_TELEMETRY", "0"}});
  const Inspected foreign("foreign-page", {});
  Inspected ended("churn");
  ended.Kill();
  const std::string ended_pid = ended.pid();
  siginfo_t info;
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(std::stoi(ended_pid)), &info, WEXITED | WNOWAIT), 0);
  for (const std::string command : kCommands) {
    for (const Inspected* process : {&plain, &silent}) {
      ExpectFailure(Quick(command, process->pid()), 1,
                    "process " + process->pid() + " (inspected) does not run on Freehold, or with FREEHOLD_TELEMETRY=0");
    }
    ExpectFailure(Quick(command, foreign.pid()), 1,
                  "process " + foreign.pid() +
                      " runs another release of Freehold (page version 99, here 2): use its `freehold`");
    ExpectFailure(Quick(command, ended_pid), 1, "process " + ended_pid + " has ended");
    ExpectFailure(Quick(command, "2147483647"), 1, "there is no process 2147483647");
  }
  ended.KillAndWait();
  for (const std::string command : kCommands) ExpectFailure(Quick(command, ended_pid), 1, "there is no process " + ended_pid);
}

TEST_F(InspectTest, ProcessesOfOthersAreRefused) {
  if (getuid() != 0) GTEST_SKIP() << "only root can become another user";
  char directory[] = "/tmp/freehold-inspect-test-XXXXXX";
  ASSERT_NE(mkdtemp(directory), nullptr);
  ASSERT_EQ(chmod(directory, 0755), 0);
  const std::string copy = std::string(directory) + "/freehold";
  ASSERT_EQ(RunProgram({.argv = {"cp", Cli(), copy}}).status, 0);
  for (const std::string command : kCommands) {
    std::vector<std::string> argv = {"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", copy};
    for (const std::string& argument : Quick(command, process_->pid())) argv.push_back(argument);
    const Outcome outcome = RunProgram({.argv = argv});
    EXPECT_EQ(outcome.status, 1);
    EXPECT_EQ(outcome.out, "");
    EXPECT_EQ(outcome.err, "freehold: process " + process_->pid() +
                               " may not be looked at: it takes what a debugger may do; be its user and see "
                               "kernel.yama.ptrace_scope, or be root\n");
  }
  RunProgram({.argv = {"rm", "-r", directory}});
}

TEST_F(InspectTest, AProcessThatIsBusyOrEndsMeanwhile) {
  for (int round = 0; round < 8; ++round) {
    Inspected busy("churn");
    const std::string command = kCommands[round % std::size(kCommands)];
    EXPECT_NE(OutputOf(Quick(command, busy.pid())), "");
    const pid_t killer = fork();
    if (killer == 0) {
      usleep(static_cast<useconds_t>(1000 * round));
      busy.Kill();
      _exit(0);
    }
    for (bool ends = false; !ends;) {
      const Outcome outcome = Freehold(Quick(command, busy.pid()));
      ends = outcome.status != 0 || outcome.out == "inspected (" + busy.pid() + ") has ended\n";
      if (outcome.status == 0) continue;
      EXPECT_EQ(outcome.status, 1);
      EXPECT_THAT(outcome.err, AnyOf("freehold: process " + busy.pid() + " has ended\n",
                                     "freehold: process " + busy.pid() + " is ending, or becomes another program\n"));
    }
    waitpid(killer, nullptr, 0);
    busy.KillAndWait();
  }
}

// ---- arguments and output ----

TEST_F(InspectTest, WrongArguments) {
  for (const std::string command : kCommands) {
    const std::string see = "; see `freehold " + command + " --help`";
    ExpectFailure({command}, 2, "no process id given" + see);
    ExpectFailure({command, "init"}, 2, "'init' is no process id" + see);
    ExpectFailure({command, "0"}, 2, "'0' is no process id" + see);
    ExpectFailure({command, "12x"}, 2, "'12x' is no process id" + see);
    ExpectFailure({command, "99999999999"}, 2, "'99999999999' is no process id" + see);
    ExpectFailure({command, "-5"}, 2, "unknown option '-5'" + see);
    ExpectFailure({command, "1", "--color"}, 2, "unknown option '--color'" + see);
    ExpectFailure({command, "1", "2"}, 2, "one process at a time, not '2' too" + see);
    const std::string help = OutputOf({command, "--help"});
    EXPECT_THAT(help, StartsWith("Usage: freehold " + command + " PID"));
    EXPECT_THAT(help, HasSubstr("\nExit status: 0"));
  }
}

TEST_F(InspectTest, OutputThatCannotBeWritten) {
  for (const std::string command : kCommands) {
    if (command == "report") continue;  // report_test
    std::vector<std::string> argv = {"sh", "-c", "exec \"$0\" \"$@\" > /dev/full", Cli()};
    for (const std::string& argument : Quick(command, process_->pid())) argv.push_back(argument);
    const Outcome outcome = RunProgram({.argv = argv});
    EXPECT_EQ(outcome.status, 1);
    EXPECT_EQ(outcome.err, "freehold: standard output cannot be written\n");
  }
}

}  // namespace
}  // namespace freehold::testing
