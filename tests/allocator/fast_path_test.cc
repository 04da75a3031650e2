// How many instructions the fast paths take, and that none of them is atomic.
#include "tests/allocator/fast_path.h"

#include <cstddef>
#include <cstdio>
#include <vector>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"
#include "tests/allocator/single_step.h"

namespace freehold::allocator {
namespace {

#if defined(FREEHOLD_SINGLE_STEP) && !defined(FREEHOLD_DEBUG_CHECKS)

struct Steps {
  std::size_t instructions = 0;
  std::size_t atomic = 0;
};

// A lock prefix is the only way to an atomic read-modify-write but for an exchange with memory.
bool IsAtomic(const unsigned char* instruction) {
  constexpr unsigned char kLock = 0xf0;
  constexpr unsigned char kExchange[] = {0x86, 0x87};
  constexpr unsigned char kRex = 0x40;
  constexpr unsigned char kRegistersAlone = 0xc0;
  if (*instruction == 0x66) ++instruction;
  if (*instruction == kLock) return true;
  if ((*instruction & 0xf0) == kRex) ++instruction;
  const bool exchanges = *instruction == kExchange[0] || *instruction == kExchange[1];
  return exchanges && (instruction[1] & kRegistersAlone) != kRegistersAlone;
}

// Of `function`, which calls nothing: from its first instruction up to its return, which is not counted.
template <typename Work>
Steps Count(const void* function, Work work) {
  constexpr unsigned char kReturn = 0xc3;
  Steps steps;
  bool inside = false;
  (void)SingleStep::Run(work, [&] {
    const unsigned char* instruction = SingleStep::Instruction();
    if (instruction == function) inside = true;
    if (inside && *instruction == kReturn) inside = false;
    if (!inside) return true;
    ++steps.instructions;
    steps.atomic += IsAtomic(instruction) ? 1 : 0;
    return true;
  });
  return steps;
}

TEST(FastPathTest, SmallPairsTakeFewInstructions) {
  const OnOneCpu on_one_cpu;
  TestHeap heap;
  AttachedThread cache(*heap);
  for (std::size_t size = 16; size <= 256; size += 8) {
    std::vector<void*> some;
    for (int i = 0; i < 40; ++i) some.push_back(CallAllocate(*cache, size));
    for (int i = 0; i < 20; ++i) CallFree(*cache, some[i]);
    void* volatile p = nullptr;
    const Steps allocate =
        Count(reinterpret_cast<const void*>(&CallAllocate), [&] { p = CallAllocate(*cache, size); });
    const Steps free = Count(reinterpret_cast<const void*>(&CallFree), [&] { CallFree(*cache, p); });
    ASSERT_GT(allocate.instructions, 10u);
    ASSERT_GT(free.instructions, 10u);
    if (size == 64) std::printf("allocate %zu, free %zu instructions\n", allocate.instructions, free.instructions);
    EXPECT_LE(allocate.instructions + free.instructions, 43u) << size;
    EXPECT_EQ(allocate.atomic + free.atomic, 0u) << size;
    for (int i = 20; i < 40; ++i) CallFree(*cache, some[i]);
  }
}

TEST(FastPathTest, AtomicInstructionsAreKnown) {
  const auto atomic = [](auto... bytes) {
    const unsigned char instruction[] = {static_cast<unsigned char>(bytes)...};
    return IsAtomic(instruction);
  };
  EXPECT_TRUE(atomic(0xf0, 0x0f, 0xb1, 0x0a)) << "lock cmpxchg %ecx, (%rdx)";
  EXPECT_TRUE(atomic(0xf0, 0x48, 0x0f, 0xc1, 0x02)) << "lock xadd %rax, (%rdx)";
  EXPECT_TRUE(atomic(0x87, 0x02)) << "xchg %eax, (%rdx)";
  EXPECT_TRUE(atomic(0x48, 0x87, 0x02)) << "xchg %rax, (%rdx)";
  EXPECT_FALSE(atomic(0x48, 0x87, 0xc2)) << "xchg %rax, %rdx";
  EXPECT_FALSE(atomic(0x48, 0x89, 0x02)) << "mov %rax, (%rdx)";
}

#else

TEST(FastPathTest, NeedsTheTrapFlagAndNoDebugChecks) { GTEST_SKIP(); }

#endif

}  // namespace
}  // namespace freehold::allocator
