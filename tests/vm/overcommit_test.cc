// A space under each of the kernel's ways to account for memory, vm.overcommit_memory 0, 1 and 2. Changing that
// takes privileges and is the whole machine's: for the moment of a child's run only, and then put back.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <functional>
#include <string>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/address_space.h"
#include "vm/os/check.h"
#include "vm/os/linux_kernel.h"

namespace freehold::vm {
namespace {

using namespace test;  // NOLINT: the fixture's words
using os::LinuxKernel;

constexpr const char* kSysctl = "/proc/sys/vm/overcommit_memory";

int ReadMode() {
  int mode = -1;
  std::ifstream(kSysctl) >> mode;
  return mode;
}

bool WriteMode(int mode) {
  std::ofstream file(kSysctl);
  file << mode << std::flush;
  return file.good() && ReadMode() == mode;
}

// Kibibytes that /proc/meminfo gives for `name`; 0 where it does not.
std::size_t MemInfo(const std::string& name) {
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    std::size_t value = 0;
    if (line.starts_with(name) && std::sscanf(line.c_str() + name.size(), ": %zu", &value) == 1) return value;
  }
  return 0;
}

// Whether others would hardly notice strict accounting: much less is committed than may be.
bool StrictModeIsHarmless() { return MemInfo("Committed_AS") * 2 < MemInfo("CommitLimit"); }

class OvercommitTest : public PolicyTest {
 protected:
  void TearDown() override { RestoreMode(); }

  // Runs `body` in a child while the mode is `mode`.
  void RunUnder(int mode, const std::function<void()>& body) {
    if (ReadMode() != mode) {
      if (mode == 2 && !StrictModeIsHarmless()) GTEST_SKIP() << "too much is committed on this machine";
      old_mode_ = ReadMode();
      if (!WriteMode(mode)) {
        old_mode_ = -1;
        GTEST_SKIP() << kSysctl << " cannot be changed here";
      }
    }
    const pid_t child = fork();
    if (child == 0) {
      alarm(10);
      body();
      _exit(0);
    }
    int status = -1;
    const pid_t waited = waitpid(child, &status, 0);
    RestoreMode();
    ASSERT_EQ(waited, child);
    ASSERT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
    ASSERT_EQ(WEXITSTATUS(status), 0);
  }

  // A space much larger than memory, used a little.
  void UseLargeSpace() {
    LinuxKernel kernel;
    AddressSpaceOptions options = Options();
    options.reserve = TiB(1);
    const Result<AddressSpace*> created = AddressSpace::Create(kernel, options);
    FREEHOLD_CHECK(created.ok());
    AddressSpace& space = **created;
    FREEHOLD_CHECK(space.reservation().bytes() == TiB(1));
    for (int round = 0; round < 3; ++round) {
      const Result<PageRange> plain = space.Map({1000}, {.populate = true});
      const Result<PageRange> dense = space.Map({1024}, {.huge_pages = os::HugePages::kPrefer});
      const Result<PageRange> read_only = space.Map({10}, {.protection = os::Protection::kRead});
      FREEHOLD_CHECK(plain.ok() && dense.ok() && read_only.ok());
      FREEHOLD_CHECK(IsZero(*plain) && IsZero(*dense) && IsZero(*read_only));
      Fill(*plain, 0xaa);
      FREEHOLD_CHECK(space.Unmap(*plain).ok() && space.Unmap(*dense).ok() && space.Unmap(*read_only).ok());
      (void)space.Purge(PurgeScope::kAll);
    }
    space.CheckInvariants();
    AddressSpace::Destroy(&space);
  }

  void RestoreMode() {
    EXPECT_TRUE(old_mode_ < 0 || WriteMode(old_mode_));
    old_mode_ = -1;
  }

  int old_mode_ = -1;  // to be put back; negative: nothing to do
};

TEST_P(OvercommitTest, Heuristic) {
  RunUnder(0, [this] { UseLargeSpace(); });
}

TEST_P(OvercommitTest, Always) {
  RunUnder(1, [this] { UseLargeSpace(); });
}

TEST_P(OvercommitTest, Strict) {
  RunUnder(2, [this] { UseLargeSpace(); });
}

// More than the machine may commit is refused, and what fits still serves.
TEST_P(OvercommitTest, StrictRefusesTooMuch) {
  RunUnder(2, [] {
    LinuxKernel kernel;
    AddressSpaceOptions options = Options();
    options.reserve = TiB(1);
    const Result<AddressSpace*> created = AddressSpace::Create(kernel, options);
    FREEHOLD_CHECK(created.ok());
    AddressSpace& space = **created;
    const Pages all = {TiB(1).value / 4 / kPageSize};
    FREEHOLD_CHECK(space.Map(all).error() == Error::System(ENOMEM));
    FREEHOLD_CHECK(space.Stats().mapped == Bytes{0});
    const Result<PageRange> range = space.Map({16});
    FREEHOLD_CHECK(range.ok() && IsZero(*range));
    Fill(*range, 0xaa);
    space.CheckInvariants();
    AddressSpace::Destroy(&space);
  });
}

FREEHOLD_INSTANTIATE_POLICIES(OvercommitTest);

}  // namespace
}  // namespace freehold::vm
