#include "runtime/config.h"

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "gtest/gtest.h"

namespace freehold::runtime {
namespace {

using Kind = Problem::Kind;

struct Seen {
  Kind kind;
  std::string name;
  std::string value;
  std::string option;
  friend bool operator==(const Seen&, const Seen&) = default;
};

std::ostream& operator<<(std::ostream& out, const Seen& seen) {
  return out << (seen.kind == Kind::kBadValue ? "bad value " : "unknown ") << seen.name << "="
             << seen.value << " (" << seen.option << ")";
}

class Problems {
 public:
  void operator()(const Problem& problem) const {
    seen_.push_back({problem.kind, std::string(problem.name), std::string(problem.value),
                     std::string(problem.option->name)});
  }
  const std::vector<Seen>& seen() const { return seen_; }

 private:
  mutable std::vector<Seen> seen_;  // A sink is called through a reference to const.
};

Config Apply(std::initializer_list<const char*> variables, Problems& problems) {
  std::vector<const char*> block(variables);
  block.push_back(nullptr);
  Config config;
  ApplyEnvironment(block.data(), config, problems);
  return config;
}

// Applies one variable and expects it to be understood.
Config Good(const char* variable) {
  Problems problems;
  const Config config = Apply({variable}, problems);
  EXPECT_TRUE(problems.seen().empty()) << variable;
  return config;
}

// Applies one variable and expects its value to be refused and to change nothing.
void ExpectBad(const char* variable) {
  Problems problems;
  EXPECT_EQ(Apply({variable}, problems), Config{}) << variable;
  ASSERT_EQ(problems.seen().size(), 1u) << variable;
  EXPECT_EQ(problems.seen()[0].kind, Kind::kBadValue) << variable;
}

std::string Text(const Problem& problem, Spelling spelling) {
  Message message;
  AppendProblem(problem, spelling, message);
  return std::string(message.text());
}

TEST(ConfigTest, EmptyEnvironmentGivesDefaults) {
  Problems problems;
  EXPECT_EQ(Apply({}, problems), Config{});
  EXPECT_EQ(Apply({"PATH=/bin", "FREEHOLD=1", "FREEHOLDER_RESERVE=1", "NOT_FREEHOLD_KEEPER=off"},
                  problems),
            Config{});
  EXPECT_TRUE(problems.seen().empty());
}

TEST(ConfigTest, Sizes) {
  EXPECT_EQ(Good("FREEHOLD_RESERVE=1T").reserve, vm::TiB(1));
  EXPECT_EQ(Good("FREEHOLD_RESERVE=2t").reserve, vm::TiB(2));
  EXPECT_EQ(Good("FREEHOLD_RESERVE=65536M").reserve, vm::GiB(64));
  EXPECT_EQ(Good("FREEHOLD_RESERVE=64GiB").reserve, vm::GiB(64));
  EXPECT_EQ(Good("FREEHOLD_RESERVE=131072K").reserve, vm::MiB(128));
  EXPECT_EQ(Good("FREEHOLD_RESERVE=134217728").reserve, vm::MiB(128));
  EXPECT_EQ(Good("FREEHOLD_FREE_RESIDENT_LIMIT=0").free_resident_limit, vm::Bytes{0});
  EXPECT_EQ(Good("FREEHOLD_WINDOW_LIMIT=0").window_limit, vm::Bytes{0});
  EXPECT_EQ(Good("FREEHOLD_WINDOW_LIMIT=64M").window_limit, vm::MiB(64));
  for (const char* bad :
       {"FREEHOLD_RESERVE=", "FREEHOLD_RESERVE=G", "FREEHOLD_RESERVE=-1G", "FREEHOLD_RESERVE=1P",
        "FREEHOLD_RESERVE=1.5T", "FREEHOLD_RESERVE=1 T", "FREEHOLD_RESERVE=1TB",
        "FREEHOLD_RESERVE=1TiBs", "FREEHOLD_RESERVE=63M", "FREEHOLD_RESERVE=65T",
        "FREEHOLD_RESERVE=18446744073709551616", "FREEHOLD_RESERVE=18446744073709551615T"}) {
    ExpectBad(bad);
  }
}

TEST(ConfigTest, Limits) {
  EXPECT_EQ(Good("FREEHOLD_SOFT_LIMIT=512M").soft_limit, vm::MiB(512));
  EXPECT_EQ(Good("FREEHOLD_HARD_LIMIT=0").hard_limit, vm::Bytes{0});
  EXPECT_EQ(Good("FREEHOLD_SOFT_LIMIT=cgroup").soft_limit, kCgroupLimit);
  EXPECT_EQ(Good("FREEHOLD_HARD_LIMIT=CGroup").hard_limit, kCgroupLimit);
  ExpectBad("FREEHOLD_SOFT_LIMIT=auto");
  ExpectBad("FREEHOLD_SOFT_LIMIT=");
  ExpectBad("FREEHOLD_SOFT_LIMIT=18446744073709551615");
  ExpectBad("FREEHOLD_RESERVE=cgroup");

  const Option& option = *FindOption("soft-limit");
  Message value;
  AppendValue(option, Good("FREEHOLD_SOFT_LIMIT=cgroup"), value);
  EXPECT_EQ(value.text(), "cgroup");
  Message form;
  AppendAcceptedForm(option, form);
  EXPECT_EQ(form.text(), "a size such as 64M or 16T, from 0 to 64T, or cgroup");
}

TEST(ConfigTest, Switches) {
  for (const char* off : {"FREEHOLD_KEEPER=0", "FREEHOLD_KEEPER=off", "FREEHOLD_KEEPER=False",
                          "FREEHOLD_KEEPER=no"}) {
    EXPECT_FALSE(Good(off).keeper) << off;
  }
  for (const char* on : {"FREEHOLD_STRICT_UNMAP=1", "FREEHOLD_STRICT_UNMAP=ON",
                         "FREEHOLD_STRICT_UNMAP=true", "FREEHOLD_STRICT_UNMAP=yes"}) {
    EXPECT_TRUE(Good(on).strict_unmap) << on;
  }
  EXPECT_TRUE(Config().mmap);
  EXPECT_FALSE(Good("FREEHOLD_MMAP=off").mmap);
  ExpectBad("FREEHOLD_MMAP=libc");
  ExpectBad("FREEHOLD_KEEPER=");
  ExpectBad("FREEHOLD_KEEPER=2");
  ExpectBad("FREEHOLD_KEEPER=offf");
}

TEST(ConfigTest, Numbers) {
  EXPECT_EQ(Good("FREEHOLD_HEAP_PROFILE_SIGNAL=0").heap_profile_signal, 0);
  EXPECT_EQ(Good("FREEHOLD_HEAP_PROFILE_SIGNAL=64").heap_profile_signal, 64);
  for (const char* bad : {"FREEHOLD_HEAP_PROFILE_SIGNAL=", "FREEHOLD_HEAP_PROFILE_SIGNAL=65",
                          "FREEHOLD_HEAP_PROFILE_SIGNAL=12x", "FREEHOLD_HEAP_PROFILE_SIGNAL=USR2"}) {
    ExpectBad(bad);
  }
}

TEST(ConfigTest, Paths) {
  EXPECT_TRUE(Config().heap_profile.empty());
  EXPECT_EQ(Good("FREEHOLD_HEAP_PROFILE=/tmp/a b").heap_profile.text(), "/tmp/a b");
  const std::string longest(PathText::kMaxLength, 'x');
  EXPECT_EQ(Good(("FREEHOLD_HEAP_PROFILE=" + longest).c_str()).heap_profile.text(), longest);
  ExpectBad(("FREEHOLD_HEAP_PROFILE=" + longest + "x").c_str());
  ExpectBad("FREEHOLD_HEAP_PROFILE=");
}

TEST(ConfigTest, Times) {
  EXPECT_EQ(Good("FREEHOLD_DECAY_MS=0").decay, vm::Nanoseconds{0});
  EXPECT_EQ(Good("FREEHOLD_DECAY_MS=250").decay, vm::Milliseconds(250));
  EXPECT_EQ(Good("FREEHOLD_DECAY_MS=250ms").decay, vm::Milliseconds(250));
  EXPECT_EQ(Good("FREEHOLD_DECAY_MS=3s").decay, vm::Milliseconds(3000));
  ExpectBad("FREEHOLD_DECAY_MS=3m");
  ExpectBad("FREEHOLD_DECAY_MS=soon");
  ExpectBad("FREEHOLD_DECAY_MS=3600001");
}

TEST(ConfigTest, Choices) {
  EXPECT_EQ(Good("FREEHOLD_MALLOC=libc").malloc, MallocChoice::kLibc);
  EXPECT_EQ(Good("FREEHOLD_MALLOC=Freehold").malloc, MallocChoice::kFreehold);
  EXPECT_EQ(Good("FREEHOLD_MALLOC=mimalloc").malloc, MallocChoice::kMimalloc);
  EXPECT_EQ(Good("FREEHOLD_LOCK_POLICY=coarse").lock_policy, vm::sync::LockPolicy::kCoarse);
  EXPECT_EQ(Good("FREEHOLD_LOCK_POLICY=tree").lock_policy, vm::sync::LockPolicy::kTree);
  EXPECT_EQ(Good("FREEHOLD_LOCK_POLICY=adaptive").lock_policy, vm::sync::LockPolicy::kAdaptive);
  ExpectBad("FREEHOLD_MALLOC=glibc");
  ExpectBad("FREEHOLD_LOCK_POLICY=");
}

TEST(ConfigTest, TheLastOfSeveralCountsAndProblemsDoNotStopTheRest) {
  Problems problems;
  const Config config = Apply({"FREEHOLD_DECAY_MS=1", "FREEHOLD_DECAY=2", "FREEHOLD_KEEPER=maybe",
                               "FREEHOLD_DECAY_MS=3", "FREEHOLD_VERBOSE=1"},
                              problems);
  EXPECT_EQ(config.decay, vm::Milliseconds(3));
  EXPECT_TRUE(config.verbose);
  EXPECT_TRUE(config.keeper);
  EXPECT_EQ(problems.seen(), (std::vector<Seen>{{Kind::kUnknownName, "DECAY", "2", "decay-ms"},
                                                {Kind::kBadValue, "keeper", "maybe", "keeper"}}));
}

TEST(ConfigTest, UnknownNamesComeWithTheMostSimilarOne) {
  const std::pair<const char*, const char*> cases[] = {{"RESERV", "reserve"},
                                                       {"KEEPERS", "keeper"},
                                                       {"STRICTUNMAP", "strict-unmap"},
                                                       {"STATS_AT", "stats-at-exit"},
                                                       {"LOCK_POLICIES", "lock-policy"},
                                                       {"MALOC", "malloc"},
                                                       {"FREE_LIMIT", "free-resident-limit"},
                                                       {"LIBRARIES", "library"}};
  for (const auto& [name, similar] : cases) {
    Problems problems;
    Apply({("FREEHOLD_" + std::string(name) + "=1").c_str()}, problems);
    ASSERT_EQ(problems.seen().size(), 1u);
    EXPECT_EQ(problems.seen()[0].option, similar) << name;
  }
  Problems problems;
  Apply({("FREEHOLD_" + std::string(10'000, 'X') + "=1").c_str(), "FREEHOLD_=", "FREEHOLD_Ü=ü"},
        problems);
  EXPECT_EQ(problems.seen().size(), 3u);
}

TEST(ConfigTest, ProblemsAreSpelledAsTheUserDid) {
  const Option* decay = FindOption("decay-ms");
  ASSERT_NE(decay, nullptr);
  const Problem unknown = {Kind::kUnknownName, "DECAY", "1", decay};
  EXPECT_EQ(Text(unknown, Spelling::kVariable),
            "unknown variable FREEHOLD_DECAY is ignored; did you mean FREEHOLD_DECAY_MS?");
  const Problem unknown_flag = {Kind::kUnknownName, "decay", "1", decay};
  EXPECT_EQ(Text(unknown_flag, Spelling::kFlag),
            "unknown option --decay; did you mean --decay-ms?");
  const Problem bad = {Kind::kBadValue, "decay-ms", "soon", decay};
  EXPECT_EQ(Text(bad, Spelling::kVariable),
            "FREEHOLD_DECAY_MS=soon is not a time such as 250 (milliseconds) or 3s, from 0 to "
            "3600000; it is "
            "ignored");
  EXPECT_EQ(Text(bad, Spelling::kFlag),
            "--decay-ms=soon is not a time such as 250 (milliseconds) or 3s, from 0 to 3600000");
}

TEST(ConfigTest, LongValuesDoNotOverflowTheMessage) {
  const std::string value(100'000, 'x');
  const Problem bad = {Kind::kBadValue, "keeper", value, FindOption("keeper")};
  EXPECT_LT(Text(bad, Spelling::kVariable).size(), 3000u);
}

// Every row of the table: findable in both spellings, with a default that it accepts itself, and
// with names that the others do not have.
TEST(ConfigTest, TheTableIsConsistent) {
  std::set<std::string> names;
  for (const Option& option : Options()) {
    SCOPED_TRACE(option.name);
    EXPECT_TRUE(names.insert(std::string(option.name)).second);
    EXPECT_FALSE(option.help.empty());
    EXPECT_FALSE(ValueName(option).empty());
    EXPECT_EQ(FindOption(option.name), &option);
    Message variable;
    AppendVariable(option, variable);
    EXPECT_EQ(FindOption(variable.text().substr(std::string_view("FREEHOLD_").size())), &option);
    Message form;
    AppendAcceptedForm(option, form);
    EXPECT_FALSE(form.text().empty());
    EXPECT_EQ(option.store == nullptr, option.load == nullptr);
    EXPECT_TRUE(option.path == nullptr || option.store == nullptr);
    if (option.store == nullptr) continue;
    Message value;
    AppendValue(option, Config{}, value);
    Config config;
    Problems problems;
    EXPECT_TRUE(SetOption(option.name, value.text(), config, problems)) << value.text();
    EXPECT_EQ(config, Config{});
  }
}

// Each option changes the field it should, and no other.
TEST(ConfigTest, EveryOptionReachesItsField) {
  Config expected;
  expected.malloc = MallocChoice::kLibc;
  expected.reserve = vm::GiB(1);
  expected.decay = vm::Milliseconds(7);
  expected.free_resident_limit = vm::MiB(5);
  expected.keeper = false;
  expected.lock_policy = vm::sync::LockPolicy::kCoarse;
  expected.strict_unmap = true;
  expected.heap_profile = PathText("/x/profile");
  expected.heap_profile_interval = vm::KiB(64);
  expected.heap_profile_signal = 12;
  expected.leak_report = true;
  expected.heap_huge_pages = true;
  expected.stats_at_exit = true;
  expected.verbose = true;
  Problems problems;
  EXPECT_EQ(
      Apply({"FREEHOLD_MALLOC=libc", "FREEHOLD_RESERVE=1G", "FREEHOLD_DECAY_MS=7",
             "FREEHOLD_FREE_RESIDENT_LIMIT=5M", "FREEHOLD_KEEPER=off",
             "FREEHOLD_LOCK_POLICY=coarse", "FREEHOLD_STRICT_UNMAP=on", "FREEHOLD_STATS_AT_EXIT=on",
             "FREEHOLD_HEAP_PROFILE=/x/profile", "FREEHOLD_HEAP_PROFILE_INTERVAL=64K",
             "FREEHOLD_HEAP_PROFILE_SIGNAL=12", "FREEHOLD_LEAK_REPORT=on", "FREEHOLD_HEAP_HUGE_PAGES=on",
             "FREEHOLD_VERBOSE=on", "FREEHOLD_LIBRARY=/x/libfreehold.so"},
            problems),
      expected);
  EXPECT_TRUE(problems.seen().empty());
}

class EnvironmentFileTest : public ::testing::Test {
 protected:
  std::string Write(std::string_view content) {
    const std::string path = ::testing::TempDir() + "environ";
    std::ofstream(path, std::ios::binary) << content;
    return path;
  }
};

TEST_F(EnvironmentFileTest, ReadsVariablesWhereverTheReadsSplitThem) {
  for (std::size_t padding = 480; padding < 520; ++padding) {
    std::string content = "A=" + std::string(padding, 'x');
    content += '\0';
    content += "FREEHOLD_DECAY_MS=77";
    content += '\0';
    content += "FREEHOLD_NO=1";
    content += '\0';
    Config config;
    Problems problems;
    ASSERT_TRUE(ApplyEnvironmentFile(Write(content).c_str(), config, problems));
    EXPECT_EQ(config.decay, vm::Milliseconds(77)) << padding;
    EXPECT_EQ(problems.seen().size(), 1u);
  }
}

TEST_F(EnvironmentFileTest, ToleratesWhatIsNoEnvironment) {
  for (std::string_view content :
       {std::string_view(""), std::string_view("\0\0\0", 3), std::string_view("FREEHOLD_"),
        std::string_view("FREEHOLD_KEEPER"), std::string_view("=\0=\0", 4)}) {
    Config config;
    Problems problems;
    EXPECT_TRUE(ApplyEnvironmentFile(Write(content).c_str(), config, problems));
    EXPECT_EQ(config, Config{});
    EXPECT_TRUE(problems.seen().empty());
  }
  Config config;
  Problems problems;
  EXPECT_FALSE(ApplyEnvironmentFile("/no/such/file", config, problems));
}

TEST_F(EnvironmentFileTest, AVariableTooLongToBeValidIsReportedByItsBeginning) {
  Config config;
  Problems problems;
  const std::string content = "FREEHOLD_RESERVE=" + std::string(100'000, '1') +
                              std::string(1, '\0') + "FREEHOLD_DECAY_MS=5";
  ASSERT_TRUE(ApplyEnvironmentFile(Write(content).c_str(), config, problems));
  ASSERT_EQ(problems.seen().size(), 1u);
  EXPECT_EQ(problems.seen()[0].kind, Kind::kBadValue);
  EXPECT_EQ(config.decay, vm::Milliseconds(5));
}

TEST(MessageTest, Numbers) {
  Message message;
  message.AppendNumber(0).Append(' ').AppendNumber(UINT64_MAX).Append(' ').AppendHex(0xdeadbeef);
  EXPECT_EQ(message.text(), "0 18446744073709551615 0xdeadbeef");
  message.Clear();
  for (std::size_t bytes : {std::size_t{0}, std::size_t{100}, std::size_t{4096},
                            vm::MiB(1536).value, vm::TiB(16).value, vm::TiB(2048).value}) {
    message.AppendBytes({bytes}).Append(' ');
  }
  EXPECT_EQ(message.text(), "0 100 4K 1536M 16T 2048T ");
}

}  // namespace
}  // namespace freehold::runtime
