// The arena of the space's own metadata: alignment, zeroes, growth, exhaustion, refusals, threads.
#include "vm/metadata_arena.h"

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/os/fake_kernel.h"

namespace freehold::vm {
namespace {

using os::FakeKernel;
using test::kSanitized;
using test::Operation;

class MetadataArenaTest : public testing::Test {
 protected:
  // An arena of `size`, destroyed at the end.
  MetadataArena& Create(Bytes size) {
    const Result<MetadataArena*> arena = MetadataArena::Create(kernel_, PagesFor(size));
    EXPECT_TRUE(arena.ok());
    arena_ = *arena;
    return *arena_;
  }
  void TearDown() override {
    if (arena_ != nullptr) MetadataArena::Destroy(arena_);
    EXPECT_EQ(kernel_.ReservedPages(), Pages{0});
  }

  FakeKernel kernel_;
  MetadataArena* arena_ = nullptr;
};

TEST_F(MetadataArenaTest, GivesZeroesAlignedAndApart) {
  MetadataArena& arena = Create(MiB(4));
  constexpr unsigned kSeed = 3;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937 random(kSeed);
  std::byte* last_end = nullptr;
  for (int i = 0; i < 1000; ++i) {
    const std::size_t size = 1 + random() % 2000;
    const std::size_t alignment = std::size_t{1} << random() % 13;
    auto* memory = static_cast<std::byte*>(arena.Allocate({size}, alignment));
    ASSERT_NE(memory, nullptr);
    ASSERT_EQ(reinterpret_cast<std::uintptr_t>(memory) % alignment, 0u);
    ASSERT_GE(memory, last_end) << "never twice";
    last_end = memory + size;
    for (std::size_t at = 0; at < size; ++at) ASSERT_EQ(memory[at], std::byte{0});
    std::memset(memory, 0xff, size);
  }
}

TEST_F(MetadataArenaTest, MakesObjects) {
  struct Thing {
    int a = 5;
    char* b = nullptr;
    alignas(64) char c = 'x';
  };
  MetadataArena& arena = Create(MiB(1));
  arena.Allocate({1}, 1);
  Thing* things = arena.New<Thing>(10);
  ASSERT_NE(things, nullptr);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(things) % 64, 0u);
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(things[i].a, 5);
    EXPECT_EQ(things[i].c, 'x');
  }
}

// Two steps of a mebibyte, then of a huge page.
TEST_F(MetadataArenaTest, CommitsInSteps) {
  MetadataArena& arena = Create(MiB(16));
  EXPECT_EQ(arena.committed(), MiB(1));
  EXPECT_EQ(kernel_.CommittedPages().bytes(), MiB(1));
  kernel_.ClearCalls();
  for (int i = 0; i < 64; ++i) ASSERT_NE(arena.Allocate(KiB(64), 8), nullptr);
  EXPECT_EQ(arena.committed(), MiB(6)) << "4 MiB and what the arena itself takes";
  EXPECT_EQ(kernel_.CommittedPages().bytes(), MiB(6));
  EXPECT_EQ(kernel_.CallCount(Operation::kProtect), 3u) << "one a step";
  EXPECT_EQ(kernel_.CallCount(Operation::kAdviseCoreDumps), 3u);
  EXPECT_EQ(kernel_.CallCount(), 6u);
  // One allocation across several steps.
  ASSERT_NE(arena.Allocate(MiB(3), 8), nullptr);
  EXPECT_EQ(arena.committed(), MiB(8));
  EXPECT_EQ(kernel_.CallCount(Operation::kProtect), 4u);
  EXPECT_EQ(arena.used().value >> 20, 7u);
}

TEST_F(MetadataArenaTest, EndsWithNullAndNotBefore) {
  MetadataArena& arena = Create(MiB(2));
  EXPECT_EQ(arena.Allocate(MiB(2), 8), nullptr) << "the arena itself lies in there";
  std::size_t got = 0;
  while (arena.Allocate(KiB(4), 1) != nullptr) ++got;
  EXPECT_EQ(got, 511u);
  // What is left after that still serves.
  EXPECT_NE(arena.Allocate({1000}, 1), nullptr);
  EXPECT_EQ(arena.Allocate(KiB(4), 1), nullptr);
  EXPECT_EQ(arena.committed(), MiB(2));
}

TEST_F(MetadataArenaTest, RefusesWhatCannotBe) {
  MetadataArena& arena = Create(MiB(2));
  EXPECT_EQ(arena.Allocate({SIZE_MAX}, 1), nullptr);
  EXPECT_EQ(arena.Allocate({SIZE_MAX - 100}, 64), nullptr);
  EXPECT_EQ(arena.Allocate(TiB(1), 1), nullptr);
  EXPECT_NE(arena.Allocate({100}, 64), nullptr) << "and goes on";
}

TEST_F(MetadataArenaTest, SmallerThanAStepWorks) {
  MetadataArena& arena = Create(KiB(8));
  EXPECT_EQ(arena.committed(), KiB(8));
  EXPECT_NE(arena.Allocate(KiB(4), 1), nullptr);
  EXPECT_EQ(arena.Allocate(KiB(4), 1), nullptr);
}

TEST_F(MetadataArenaTest, ARefusedStepIsNullAndLosesNothing) {
  MetadataArena& arena = Create(MiB(4));
  ASSERT_NE(arena.Allocate(KiB(1000), 8), nullptr);
  kernel_.FailNth(Operation::kProtect, 1, ENOMEM);
  EXPECT_EQ(arena.Allocate(KiB(100), 8), nullptr);
  EXPECT_EQ(arena.committed(), MiB(1));
  EXPECT_NE(arena.Allocate(KiB(4), 8), nullptr) << "what is committed still serves";
  EXPECT_NE(arena.Allocate(KiB(100), 8), nullptr) << "the kernel changed its mind";
  EXPECT_EQ(arena.committed(), MiB(2));
}

TEST_F(MetadataArenaTest, CreateThatFailsLeavesNothing) {
  kernel_.FailNth(Operation::kReserve, 1, ENOMEM);
  EXPECT_EQ(MetadataArena::Create(kernel_, {256}).error(), Error::System(ENOMEM));
  EXPECT_EQ(kernel_.ReservedPages(), Pages{0});
  kernel_.FailNth(Operation::kProtect, 1, EAGAIN);
  EXPECT_EQ(MetadataArena::Create(kernel_, {256}).error(), Error::System(EAGAIN));
  EXPECT_EQ(kernel_.ReservedPages(), Pages{0});
  Create(MiB(1));
}

// Threads allocate and stamp at the same time: every byte belongs to one of them, across commits.
TEST_F(MetadataArenaTest, ServesThreads) {
  constexpr int kThreads = 4;
  constexpr int kEach = kSanitized ? 3000 : 15'000;
  MetadataArena& arena = Create(MiB(64));
  std::vector<std::vector<std::pair<unsigned char*, std::size_t>>> got(kThreads);
  std::vector<std::thread> threads;
  for (int id = 0; id < kThreads; ++id) {
    threads.emplace_back([&, id] {
      std::mt19937 random(static_cast<unsigned>(id));
      for (int i = 0; i < kEach; ++i) {
        const std::size_t size = 1 + random() % 900;
        auto* memory = static_cast<unsigned char*>(arena.Allocate({size}, 1u << random() % 7));
        ASSERT_NE(memory, nullptr);
        for (std::size_t at = 0; at < size; ++at) ASSERT_EQ(memory[at], 0);
        std::memset(memory, id + 1, size);
        got[static_cast<std::size_t>(id)].emplace_back(memory, size);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int id = 0; id < kThreads; ++id) {
    for (const auto& [memory, size] : got[static_cast<std::size_t>(id)]) {
      for (std::size_t at = 0; at < size; ++at) ASSERT_EQ(memory[at], id + 1);
    }
  }
  EXPECT_EQ(kernel_.CommittedPages().bytes(), arena.committed());
}

}  // namespace
}  // namespace freehold::vm
