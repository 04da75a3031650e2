// Heap profiles of whole programs: as files, by name, on signals, from children; read by google-pprof too.
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int kObjects = 20000;

std::string Content(const std::filesystem::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

class HeapProfileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = ::testing::TempDir() + "/heap_profile.XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  ~HeapProfileTest() override { std::filesystem::remove_all(directory_); }

  using Environment = std::vector<std::pair<std::string, std::string>>;
  Environment Prefix() const { return {{"FREEHOLD_HEAP_PROFILE", directory_ / "profile"}}; }
  Environment PrefixAndSignal() const {
    Environment environment = Prefix();
    environment.emplace_back("FREEHOLD_HEAP_PROFILE_SIGNAL", "12");
    return environment;
  }

  static std::string Program() { return BuiltFile("tests/runtime/programs/heap_profile"); }
  Outcome Run(std::vector<std::string> arguments, const Environment& environment) {
    arguments.insert(arguments.begin(), Program());
    return RunProgram(UnderShim({.argv = arguments, .environment = environment}));
  }
  std::vector<std::filesystem::path> Files() const {
    std::set<std::filesystem::path> files;
    for (const auto& entry : std::filesystem::directory_iterator(directory_)) files.insert(entry.path());
    return {files.begin(), files.end()};
  }

  std::filesystem::path directory_;
};

// A profile, checked line by line.
struct Profile {
  struct Site {
    std::uint64_t live, live_bytes, allocated, allocated_bytes;
    std::size_t depth;
  };
  std::uint64_t interval = 0;
  std::vector<Site> sites;

  // The estimate for objects of one size, as pprof makes it.
  double Objects(std::size_t size, bool live) const {
    double objects = 0;
    for (const Site& site : sites) {
      if (site.allocated_bytes / site.allocated != size) continue;
      const double chance = interval == 1 ? 1 : 1 - std::exp(-static_cast<double>(size) / static_cast<double>(interval));
      objects += static_cast<double>(live ? site.live : site.allocated) / chance;
    }
    return objects;
  }
};
Profile Parse(const std::string& text) {
  static const std::regex kHead(R"(heap profile: (\d+): (\d+) \[(\d+): (\d+)\] @ heap_v2/(\d+))");
  static const std::regex kSite(R"((\d+): (\d+) \[(\d+): (\d+)\] @(( 0x[0-9a-f]+)*))");
  Profile profile;
  std::istringstream lines(text);
  std::string line;
  std::smatch head;
  std::getline(lines, line);
  EXPECT_TRUE(std::regex_match(line, head, kHead)) << line;
  if (head.empty()) return profile;
  std::uint64_t total[5];
  for (int i = 0; i < 5; ++i) total[i] = std::stoull(head[i + 1]);
  profile.interval = total[4];
  std::uint64_t sums[4] = {};
  while (std::getline(lines, line) && !line.empty()) {
    std::smatch match;
    EXPECT_TRUE(std::regex_match(line, match, kSite)) << line;
    if (match.empty()) break;
    std::uint64_t numbers[4];
    for (int i = 0; i < 4; ++i) sums[i] += numbers[i] = std::stoull(match[i + 1]);
    const std::string frames = match[5];
    profile.sites.push_back({numbers[0], numbers[1], numbers[2], numbers[3],
                             static_cast<std::size_t>(std::count(frames.begin(), frames.end(), 'x'))});
    EXPECT_GT(profile.sites.back().allocated, 0u);
    EXPECT_GT(profile.sites.back().depth, 0u);
  }
  for (int i = 0; i < 4; ++i) EXPECT_EQ(sums[i], total[i]);
  std::getline(lines, line);
  EXPECT_EQ(line, "MAPPED_LIBRARIES:");
  std::getline(lines, line);
  EXPECT_TRUE(std::regex_search(line, std::regex("^[0-9a-f]+-[0-9a-f]+ [-r][-w]"))) << line;
  return profile;
}

TEST_F(HeapProfileTest, NothingByDefault) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome outcome = Run({"api", directory_ / "api"}, {});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(outcome.out, "95 95 95 95 22\n");  // EOPNOTSUPP, EINVAL
  EXPECT_EQ(outcome.err, "");
}

TEST_F(HeapProfileTest, WrittenWhenTheProcessExits) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome outcome = Run({"leak"}, Prefix());
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(outcome.err, "");
  ASSERT_EQ(Files().size(), 1u);
  EXPECT_TRUE(std::regex_match(Files()[0].filename().string(), std::regex(R"(profile\.\d+\.1\.heap)"))) << Files()[0];
  const Profile profile = Parse(Content(Files()[0]));
  EXPECT_EQ(profile.interval, 512u << 10);
  // 40 samples are expected of the small ones: within five deviations.
  EXPECT_NEAR(profile.Objects(1024, true), kObjects, kObjects * 5 / std::sqrt(40));
  EXPECT_NEAR(profile.Objects(2048, false), kObjects, kObjects * 5 / std::sqrt(80));
  EXPECT_EQ(profile.Objects(2048, true), 0);
  EXPECT_NEAR(profile.Objects(3 << 20, true), 10, 1.1);
}

TEST_F(HeapProfileTest, EveryObject) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  Environment environment = Prefix();
  environment.emplace_back("FREEHOLD_HEAP_PROFILE_INTERVAL", "1");
  const Outcome outcome = Run({"leak"}, environment);
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  const Profile profile = Parse(Content(Files().at(0)));
  EXPECT_EQ(profile.interval, 1u);
  EXPECT_GE(profile.Objects(1024, true), kObjects);
  EXPECT_LE(profile.Objects(1024, true), kObjects + 10);
  EXPECT_GE(profile.Objects(2048, false), kObjects);
  EXPECT_EQ(profile.Objects(3 << 20, true), 10);
}

TEST_F(HeapProfileTest, OnSignals) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome outcome = Run({"signal"}, PrefixAndSignal());
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  ASSERT_EQ(Files().size(), 3u);
  const Profile before = Parse(Content(Files()[0]));
  const Profile after = Parse(Content(Files()[1]));
  EXPECT_GT(before.Objects(1024, true), kObjects / 5);
  EXPECT_EQ(after.Objects(1024, true), 0);
  EXPECT_EQ(after.Objects(1024, false), before.Objects(1024, false));
}

TEST_F(HeapProfileTest, SignalWithoutPrefixWritesToTheCurrentDirectory) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome outcome = RunProgram(UnderShim({.argv = {"/bin/sh", "-c", "cd $0 && exec $1 signal", directory_, Program()},
                                                .environment = {{"FREEHOLD_HEAP_PROFILE_SIGNAL", "12"}}}));
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  ASSERT_EQ(Files().size(), 2u);
  EXPECT_THAT(Files()[0].filename().string(), ContainsRegex("^freehold\\.[0-9]+\\.1\\.heap$"));
}

TEST_F(HeapProfileTest, ProgramsThatHandleTheSignalGoFirst) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome outcome = Run({"handled"}, PrefixAndSignal());
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(Files().size(), 1u);  // at the end
}

TEST_F(HeapProfileTest, SignalThatCannotBeHandled) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome outcome = Run({"leak"}, {{"FREEHOLD_HEAP_PROFILE_SIGNAL", "9"}});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.err, "freehold: signal 9 cannot ask for heap profiles\n");
}

TEST_F(HeapProfileTest, ChildrenHaveFilesOfTheirOwn) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome outcome = Run({"fork"}, PrefixAndSignal());
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  const std::string child = outcome.out.substr(0, outcome.out.find('\n'));
  ASSERT_EQ(Files().size(), 3u);
  const Profile of_child = Parse(Content(directory_ / ("profile." + child + ".1.heap")));
  EXPECT_EQ(of_child.Objects(1024, true), 0);
  EXPECT_GT(of_child.Objects(1024, false), kObjects / 5);
  for (const auto& file : Files()) {
    if (file.string().find("." + child + ".") != std::string::npos) continue;
    EXPECT_GT(Parse(Content(file)).Objects(1024, true), kObjects / 5);
  }
}

TEST_F(HeapProfileTest, WhileThreadsAllocate) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  for (const char* interval : {"1000", "1M"}) {
    Environment environment = PrefixAndSignal();
    environment.emplace_back("FREEHOLD_HEAP_PROFILE_INTERVAL", interval);
    const Outcome outcome = Run({"threads"}, environment);
    ASSERT_EQ(outcome.status, 0) << outcome.err;
  }
  EXPECT_EQ(Files().size(), 42u);
  for (const auto& file : Files()) {
    // Sums are of another moment than sites.
    EXPECT_THAT(Content(file), AllOf(HasSubstr("heap profile: "), HasSubstr("MAPPED_LIBRARIES:\n")));
    if (file.string().find(".21.") == std::string::npos) continue;
    const Profile last = Parse(Content(file));
    EXPECT_EQ(last.Objects(1024, true), 0);
    EXPECT_EQ(last.Objects(3 << 20, true), 0);
  }
}

TEST_F(HeapProfileTest, ByTheCApi) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome outcome = Run({"api", directory_ / "api"}, {{"FREEHOLD_HEAP_PROFILE_INTERVAL", "64K"}});
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(outcome.out, "0 0 9 2 22\n");  // EBADF, ENOENT, EINVAL
  ASSERT_EQ(Files().size(), 2u);
  for (const auto& file : Files()) EXPECT_GT(Parse(Content(file)).Objects(1024, true), kObjects / 2) << file;
}

TEST_F(HeapProfileTest, ReportOfWhatIsAllocated) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome outcome = Run({"leak"}, {{"FREEHOLD_LEAK_REPORT", "1"},
                                         {"FREEHOLD_HEAP_PROFILE_INTERVAL", "1"},
                                         {"FREEHOLD_KEEPER", "0"}});  // which creates a thread within malloc
  ASSERT_EQ(outcome.status, 0);
  EXPECT_THAT(outcome.err, ContainsRegex("^freehold: process [0-9]+ ends with [0-9]+ bytes in [0-9]+ objects allocated\n"));
  EXPECT_THAT(outcome.err, HasSubstr("31457280 bytes in 10 objects of 3145728, allocated at\n"));
  EXPECT_THAT(outcome.err, HasSubstr("20480000 bytes in 20000 objects of 1024, allocated at\n"));
  EXPECT_THAT(outcome.err, Not(HasSubstr("objects of 2048")));
  // Largest first; and nothing of Freehold's own in stacks.
  EXPECT_LT(outcome.err.find("31457280 bytes"), outcome.err.find("20480000 bytes"));
  EXPECT_THAT(outcome.err, Not(HasSubstr("libfreehold.so")));
  EXPECT_THAT(outcome.err, HasSubstr("/heap_profile+0x"));
  EXPECT_THAT(outcome.err, HasSubstr("__libc_start_main"));
}

TEST_F(HeapProfileTest, EstimatedReport) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome outcome = Run({"leak"}, {{"FREEHOLD_LEAK_REPORT", "1"}});
  ASSERT_EQ(outcome.status, 0);
  EXPECT_THAT(outcome.err, HasSubstr(", estimated from samples every 512K\n"));
  EXPECT_THAT(outcome.err, HasSubstr(" bytes in 10 objects of 3145728, allocated at\n"));
}

TEST_F(HeapProfileTest, WhereTheFileCannotBe) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome outcome = Run({"leak"}, {{"FREEHOLD_HEAP_PROFILE", "/nonexistent/profile"}});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_THAT(outcome.err, ContainsRegex("^freehold: cannot write the heap profile "
                                         "/nonexistent/profile\\.[0-9]+\\.1\\.heap \\(errno 2\\)\n$"));
}

TEST_F(HeapProfileTest, WhereMallocIsNotFreeholds) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  Environment environment = Prefix();
  environment.emplace_back("FREEHOLD_MALLOC", "libc");
  const Outcome outcome = Run({"leak"}, environment);
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.err, "freehold: no heap profile: malloc is not Freehold's\n");
  EXPECT_TRUE(Files().empty());
}

// Under a limit on address space the profile makes do with what there is.
TEST_F(HeapProfileTest, WithLittleAddressSpace) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome outcome = RunProgram(UnderShim(
      {.argv = {Program(), "leak"}, .environment = Prefix(), .address_space_limit = rlim_t{400} << 20}));
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  ASSERT_EQ(Files().size(), 1u);
  EXPECT_GT(Parse(Content(Files()[0])).Objects(1024, true), kObjects / 5);
}

// Linked into the program, and into one that is linked statically.
TEST_F(HeapProfileTest, Linked) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  for (const char* program : {"heap_profile_linked", "heap_profile_static"}) {
    SCOPED_TRACE(program);
    Environment environment = Prefix();
    environment.emplace_back("FREEHOLD_LEAK_REPORT", "1");
    const Outcome outcome = RunProgram(
        {.argv = {BuiltFile(std::string("tests/runtime/programs/") + program), "leak"}, .environment = environment});
    ASSERT_EQ(outcome.status, 0) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(" bytes in 10 objects of 3145728, allocated at\n"));
    ASSERT_EQ(Files().size(), 1u);
    EXPECT_GT(Parse(Content(Files()[0])).Objects(1024, true), kObjects / 5);
    std::filesystem::remove(Files()[0]);
  }
}

// ---- Other people's readers ----

TEST_F(HeapProfileTest, GooglePprofReadsIt) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const Outcome outcome = Run({"leak"}, Prefix());
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  struct View {
    std::string option;
    double brief;  // the share of memory
    double small;
    double large;
  };
  const double all = kObjects * (1024.0 + 2048) + 10.0 * (3 << 20);
  const double live = kObjects * 1024.0 + 10.0 * (3 << 20);
  for (const View& view : {View{"--inuse_space", 0, kObjects * 1024 / live, 10 * (3 << 20) / live},
                           View{"--alloc_space", kObjects * 2048 / all, kObjects * 1024 / all, 10 * (3 << 20) / all}}) {
    SCOPED_TRACE(view.option);
    const Outcome read = RunProgram({.argv = {"google-pprof", "--text", view.option, Program(), Files().at(0)}});
    ASSERT_EQ(read.status, 0) << read.err;
    EXPECT_THAT(read.err, HasSubstr("Adjusting heap profiles for 1-in-524288 sampling rate"));
    // malloc and operator new are left out: the functions that call them lead.
    std::map<std::string, double> share;
    std::istringstream lines(read.out);
    for (std::string line; std::getline(lines, line);) {
      std::smatch match;
      if (std::regex_match(line, match, std::regex(R"( *[0-9.]+ +([0-9.]+)% +[0-9.]+% +[0-9.]+ +[0-9.]+% (.*))"))) {
        share[match[2]] = std::stod(match[1]) / 100;
      }
    }
    EXPECT_NEAR(share["Large"], view.large, 0.2) << read.out;
    EXPECT_NEAR(share["Small"], view.small, 0.25) << read.out;
    EXPECT_NEAR(share["Brief"], view.brief, 0.25) << read.out;
    EXPECT_EQ(share.count("operator new"), 0u) << read.out;
  }
}

}  // namespace
}  // namespace freehold::testing
