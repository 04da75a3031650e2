// Programs whose address space, or the machine's memory, is limited.
#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

using ::testing::HasSubstr;

constexpr rlim_t kMiB = 1 << 20;

class LimitsTest : public ::testing::Test {
 protected:
  void SetUp() override { FREEHOLD_SKIP_WITH_SANITIZER(); }

  static Outcome Exhaust(rlim_t limit, const std::string& size) {
    Launch launch = UnderShim(TestProgram("exhaust", {size}));
    launch.address_space_limit = limit;
    return RunProgram(launch);
  }
};

// The program gets a good part of what it may have, is told ENOMEM at the end, and can go on.
TEST_F(LimitsTest, WorksUnderAnAddressSpaceLimit) {
  for (const rlim_t limit : {4096 * kMiB, 2048 * kMiB, 512 * kMiB, 200 * kMiB}) {
    for (const char* size : {"1000", "100000", "5000000"}) {
      const Outcome outcome = Exhaust(limit, size);
      EXPECT_EQ(outcome.status, 0) << limit << " " << size << outcome.err;
      EXPECT_EQ(outcome.err, "");
      EXPECT_GE(std::atol(outcome.out.c_str()), static_cast<long>(limit / kMiB / 6))
          << limit << " " << size;
    }
  }
}

TEST_F(LimitsTest, FallsBackToLibcWhereThereIsNoRoom) {
  const Outcome outcome = Exhaust(50 * kMiB, "1000");
  EXPECT_EQ(outcome.status, 0);
  EXPECT_THAT(outcome.err, HasSubstr("freehold: cannot reserve address space: "));
  EXPECT_THAT(
      outcome.err,
      HasSubstr("the process may have 50M in all (ulimit -v); libc serves malloc instead\n"));
  EXPECT_EQ(outcome.err.find('\n'), outcome.err.size() - 1) << "one line";
  EXPECT_GE(std::atol(outcome.out.c_str()), 30);
}

TEST_F(LimitsTest, RealProgramsUnderAnAddressSpaceLimit) {
  for (const rlim_t limit : {2048 * kMiB, 512 * kMiB}) {
    const std::string out = ExpectQuiet(
        UnderShim({.argv = {"python3", "-c",
                            "import threading\n"
                            "data = [str(i) * 10 for i in range(100000)]\n"
                            "threads = [threading.Thread(target=lambda: [bytearray(1000) for _ in "
                            "range(1000)]) for _ in range(8)]\n"
                            "[t.start() for t in threads]; [t.join() for t in threads]\n"
                            "print(len(data))"},
                   .address_space_limit = limit}));
    EXPECT_EQ(out, "100000\n");
  }
}

TEST_F(LimitsTest, TheReservationCanBeChosen) {
  for (const char* reserve : {"64M", "256M", "1G", "64G", "1T"}) {
    const Outcome outcome = RunProgram(
        UnderShim({.argv = {"/bin/sh", "-c", "echo hello | sort"},
                   .environment = {{"FREEHOLD_RESERVE", reserve}, {"FREEHOLD_VERBOSE", "1"}}}));
    EXPECT_EQ(outcome.out, "hello\n");
    EXPECT_THAT(outcome.err, HasSubstr(std::string(": reserved ") + reserve + " at 0x"));
  }
}

TEST_F(LimitsTest, MlockallMakesPresentWhatTheProgramHas) {
  const Launch launch = TestProgram("lock_all");
  const Outcome plain = RunProgram(launch);
  if (plain.out.rfind("refused", 0) == 0) GTEST_SKIP() << "mlockall was " << plain.out;
  EXPECT_EQ(plain.out, "ok\n") << plain.err;
  EXPECT_EQ(ExpectQuiet(UnderShim(launch)), "ok\n");
}

TEST_F(LimitsTest, MlockallSaysWhyItIsRefused) {
  const Outcome outcome = RunProgram(UnderShim(
      {.argv = {"setpriv", "--bounding-set=-ipc_lock", "prlimit", "--memlock=4194304:4194304",
                BuiltFile("tests/runtime/programs/lock_all")}}));
  if (outcome.status == 127) GTEST_SKIP() << "not permitted to drop a capability: " << outcome.err;
  EXPECT_EQ(outcome.out, "refused: Cannot allocate memory\n");
  EXPECT_EQ(outcome.err, "freehold: mlockall was refused: the limit of 4M (ulimit -l) counts the address space that is "
                         "reserved; with no limit, or CAP_IPC_LOCK, it works\n");
}

TEST_F(LimitsTest, TheHardLimit) {
  for (const char* keeper : {"1", "0"}) {
    ExpectQuiet(UnderShim(
        TestProgram("memory_limit", {"64"}, {{"FREEHOLD_HARD_LIMIT", "64M"}, {"FREEHOLD_KEEPER", keeper}})));
  }
}

// Bursts of different sizes, of which one after another would fit: what each leaves behind goes while the next grows.
TEST_F(LimitsTest, TheSoftLimit) {
  const auto above = [](const char* limit) {
    const std::string out = ExpectQuiet(UnderShim(TestProgram(
        "memory_limit", {"128", "soft"}, {{"FREEHOLD_SOFT_LIMIT", limit}, {"FREEHOLD_DECAY_MS", "60s"}})));
    return std::atol(out.c_str());
  };
  EXPECT_GE(above("0"), 56);
  EXPECT_LE(above("128M"), 40);
}

TEST_F(LimitsTest, LimitsOfTheControlGroup) {
  const Outcome outcome = RunProgram(
      UnderShim({.argv = {"/bin/true"},
                 .environment = {{"FREEHOLD_SOFT_LIMIT", "cgroup"},
                                 {"FREEHOLD_HARD_LIMIT", "cgroup"},
                                 {"FREEHOLD_VERBOSE", "1"}}}));
  EXPECT_EQ(outcome.status, 0);
  // What they came to, in this group.
  EXPECT_THAT(outcome.err, ::testing::ContainsRegex(", soft-limit [0-9]+[KMGT]?, hard-limit [0-9]+[KMGT]?, "));
}

TEST_F(LimitsTest, TrimGivesEverythingBack) {
  for (const char* mmap : {"1", "0"}) {
    ExpectQuiet(UnderShim(TestProgram(
        "trim", {}, {{"FREEHOLD_KEEPER", "0"}, {"FREEHOLD_DECAY_MS", "60s"}, {"FREEHOLD_MMAP", mmap}})));
  }
}

// Sets a file under /proc/sys while in scope.
class KernelSetting {
 public:
  KernelSetting(const std::string& path, const std::string& value) : path_(path) {
    std::ifstream(path) >> before_;
    std::ofstream file(path);
    file << value << std::flush;
    set_ = file.good();
  }
  ~KernelSetting() {
    if (set_) std::ofstream(path_) << before_ << std::flush;
  }
  bool set() const { return set_; }

 private:
  std::string path_;
  std::string before_;
  bool set_ = false;
};

// The whole machine's setting: the test must run alone.
TEST_F(LimitsTest, EveryOvercommitMode) {
  for (const char* mode : {"0", "1", "2"}) {
    const KernelSetting overcommit("/proc/sys/vm/overcommit_memory", mode);
    if (!overcommit.set()) GTEST_SKIP() << "not permitted to change vm.overcommit_memory";
    SCOPED_TRACE(std::string("mode ") + mode);
    ExpectQuiet(UnderShim(TestProgram("burst", {"90", "0"})));
    const Outcome sort =
        RunProgram(UnderShim({.argv = {"/bin/sh", "-c", "seq 200000 | sort -n | tail -1"}}));
    EXPECT_EQ(sort.out, "200000\n") << sort.err;
  }
}

}  // namespace
}  // namespace freehold::testing
