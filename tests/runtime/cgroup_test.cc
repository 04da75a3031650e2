// Control groups by their files, in a directory of the test's.
#include "runtime/cgroup.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "gtest/gtest.h"

namespace freehold::runtime {
namespace {

using vm::MiB;

class CgroupTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::path(::testing::TempDir()) / "cgroupXXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    root_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& file, const std::string& text) {
    const std::filesystem::path path = root_ / file;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }
  CgroupLimits Read(const std::string& membership) {
    Write("membership", membership);
    const std::string file = (root_ / "membership").string();
    const std::string root = root_.string();
    return ReadCgroupLimits({.membership = file.c_str(), .root = root.c_str()});
  }

  std::filesystem::path root_;
};

void ExpectLimits(const CgroupLimits& limits, vm::Bytes max, vm::Bytes high) {
  EXPECT_EQ(limits.max, max);
  EXPECT_EQ(limits.high, high);
}

TEST_F(CgroupTest, NothingLimitsWhereNothingIsToBeRead) {
  ExpectLimits(ReadCgroupLimits({.membership = "/nowhere/cgroup", .root = "/nowhere"}), kNoCgroupLimit, kNoCgroupLimit);
  ExpectLimits(Read(""), kNoCgroupLimit, kNoCgroupLimit);
  ExpectLimits(Read("0::/a/b\n"), kNoCgroupLimit, kNoCgroupLimit);
  for (const char* nonsense : {"0\n", "0:\n", ":::\n", "\n\n", "0:memory\n"}) {
    ExpectLimits(Read(nonsense), kNoCgroupLimit, kNoCgroupLimit);
  }
}

TEST_F(CgroupTest, Version2) {
  Write("a/b/memory.max", "268435456\n");
  Write("a/b/memory.high", "134217728\n");
  ExpectLimits(Read("0::/a/b\n"), MiB(256), MiB(128));
  Write("a/b/memory.high", "max\n");
  ExpectLimits(Read("0::/a/b\n"), MiB(256), kNoCgroupLimit);
  Write("a/b/memory.max", "max\n");
  ExpectLimits(Read("0::/a/b\n"), kNoCgroupLimit, kNoCgroupLimit);
}

TEST_F(CgroupTest, TheTightestAncestorCounts) {
  Write("a/b/memory.max", "max\n");
  Write("a/memory.max", "67108864\n");
  Write("memory.max", "1073741824\n");
  Write("a/b/memory.high", "1073741824\n");
  Write("memory.high", "536870912\n");
  ExpectLimits(Read("0::/a/b\n"), MiB(64), MiB(512));
}

// As a container sees it that has no namespace of control groups of its own.
TEST_F(CgroupTest, APathThatIsNotThereMeansTheRoot) {
  Write("memory.max", "67108864\n");
  ExpectLimits(Read("0::/system.slice/docker-0123.scope\n"), MiB(64), kNoCgroupLimit);
  ExpectLimits(Read("0::/\n"), MiB(64), kNoCgroupLimit);
}

TEST_F(CgroupTest, Version1) {
  Write("memory/jobs/7/memory.limit_in_bytes", "67108864\n");
  Write("memory/jobs/memory.limit_in_bytes", "33554432\n");
  Write("memory/memory.limit_in_bytes", "9223372036854771712\n");
  // Of version 2, which has no memory controller then, and of others.
  Write("memory.max", "1000\n");
  const std::string lines = "12:cpu,cpuacct:/elsewhere\n4:hugetlb,memory:/jobs/7\n1:name=systemd:/memory\n";
  ExpectLimits(Read(lines), MiB(32), kNoCgroupLimit);
  ExpectLimits(Read("4:memory:/other\n"), kNoCgroupLimit, kNoCgroupLimit);
  ExpectLimits(Read("4:memory2,nomemory:/jobs/7\n"), kNoCgroupLimit, kNoCgroupLimit);
}

TEST_F(CgroupTest, LongLinesAndPaths) {
  Write("memory.max", "67108864\n");
  // Too long to be opened: as if it were not there. The line after it counts.
  ExpectLimits(Read("0::/" + std::string(5000, 'x') + "\n"), kNoCgroupLimit, kNoCgroupLimit);
  ExpectLimits(Read("3:cpu:/" + std::string(5000, 'x') + "\n0::/\n"), MiB(64), kNoCgroupLimit);
  // In parts that do not end where the reader's buffer does.
  std::string many;
  for (int i = 0; i < 100; ++i) many += std::to_string(i + 1) + ":cpu:/group/number/" + std::to_string(i) + "\n";
  ExpectLimits(Read(many + "0::/\n"), MiB(64), kNoCgroupLimit);
}

TEST_F(CgroupTest, NumbersThatAreNone) {
  for (const char* text : {"", "\n", "-1\n", "99999999999999999999999\n", "18446744073709551615\n"}) {
    Write("memory.max", text);
    ExpectLimits(Read("0::/\n"), kNoCgroupLimit, kNoCgroupLimit);
  }
}

TEST_F(CgroupTest, WhatFreeholdMakesOfThem) {
  EXPECT_EQ(SoftLimitFor({}), vm::Bytes{0});
  EXPECT_EQ(HardLimitFor({}), vm::Bytes{0});
  EXPECT_EQ(SoftLimitFor({.max = MiB(64)}), MiB(56));
  EXPECT_EQ(HardLimitFor({.max = MiB(64)}), MiB(60));
  EXPECT_EQ(SoftLimitFor({.max = MiB(64), .high = MiB(32)}), MiB(28));
  EXPECT_EQ(HardLimitFor({.high = MiB(32)}), vm::Bytes{0});
  EXPECT_EQ(SoftLimitFor({.high = MiB(32)}), MiB(28));
  // A group that may have nothing: limits, not none.
  EXPECT_EQ(SoftLimitFor({.max = {0}}), vm::Bytes{1});
  EXPECT_EQ(HardLimitFor({.max = {0}}), vm::Bytes{1});
}

// Whatever it is, reading the real thing ends.
TEST_F(CgroupTest, OfThisProcess) {
  const CgroupLimits limits = ReadCgroupLimits();
  EXPECT_GT(limits.max, MiB(1));
}

}  // namespace
}  // namespace freehold::runtime
