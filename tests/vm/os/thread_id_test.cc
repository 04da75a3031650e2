#include "vm/os/thread_id.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <thread>

#include "gtest/gtest.h"
#include "tests/vm/os/syscall_filter.h"

namespace freehold::vm::os {
namespace {

std::uint32_t GetTid() { return static_cast<std::uint32_t>(::syscall(SYS_gettid)); }

TEST(ThreadIdTest, IsTheKernelsAndEachThreadsOwn) {
  EXPECT_EQ(CurrentThreadId(), GetTid());
  EXPECT_EQ(CurrentThreadId(), GetTid());
  std::uint32_t other = 0;
  std::thread([&] {
    other = CurrentThreadId();
    EXPECT_EQ(other, GetTid());
  }).join();
  EXPECT_NE(other, 0u);
  EXPECT_NE(other, CurrentThreadId());
}

TEST(ThreadIdTest, TheChildOfAForkFindsItsOwn) {
  const std::uint32_t parent = CurrentThreadId();
  EXPECT_TRUE(PassesInChild([parent] {
    ForgetThreadIdAfterFork();
    CHILD_CHECK(CurrentThreadId() == GetTid());
    CHILD_CHECK(CurrentThreadId() != parent);
  }));
  EXPECT_EQ(CurrentThreadId(), parent);
}

TEST(ThreadIdTest, AsksTheKernelOnce) {
  EXPECT_TRUE(PassesInChild([] {
    ForgetThreadIdAfterFork();
    const std::uint32_t id = CurrentThreadId();
    KillOnSyscall({.number = SYS_gettid});
    CHILD_CHECK(CurrentThreadId() == id);
  }));
}

TEST(ThreadIdTest, GivingTheCpuAwayComesBackAndKeepsErrno) {
  errno = 4711;
  ForgetThreadIdAfterFork();
  EXPECT_EQ(CurrentThreadId(), GetTid());
  YieldCpu();
  CpuRelax();
  EXPECT_EQ(errno, 4711);
}

}  // namespace
}  // namespace freehold::vm::os
