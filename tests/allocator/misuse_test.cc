// Every wrong free stops the program with one line that names the address and what it is.
#include "allocator/misuse.h"

#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"

namespace freehold::allocator {
namespace {

class MisuseTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(heap_.ok() && cache_.get() != nullptr); }
  static void* At(void* p, std::ptrdiff_t offset) { return static_cast<char*>(p) + offset; }
  // Runs `work` on a thread with a cache of its own.
  template <typename Work>
  void OnOtherThread(Work work) {
    std::thread([&] {
      AttachedThread other(*heap_);
      work(*other);
    }).join();
  }

  TestHeap heap_;
  AttachedThread cache_{*heap_};
};
using MisuseDeathTest = MisuseTest;

constexpr std::size_t kSizes[] = {1, 16, 48, 100, 1000, 5000, 9000, 131072};
constexpr std::size_t kLargeSizes[] = {200000, 1 << 20, 3 << 20};

TEST_F(MisuseDeathTest, DoubleFree) {
  for (const std::size_t size : kSizes) {
    void* p = cache_->Allocate(size);
    cache_->Free(p);
    EXPECT_DEATH(cache_->Free(p), "^freehold: free\\(0x[0-9a-f]+\\): double free of a [0-9]+-byte object\n");
  }
}

TEST_F(MisuseDeathTest, DoubleFreeWithOthersInBetween) {
  void* p[30];
  for (void*& object : p) object = cache_->Allocate(48);
  for (void* object : p) cache_->Free(object);
  EXPECT_DEATH(cache_->Free(p[15]), "double free of a 48-byte object");
}

// Frees of a class that is only freed to are finished a few frees later.
TEST_F(MisuseDeathTest, DoubleFreeInABurst) {
  std::vector<void*> p;
  for (int i = 0; i < 1000; ++i) p.push_back(cache_->Allocate(48));
  for (int i = 0; i < 500; ++i) cache_->Free(p[i]);
  for (const int i : {0, 100, 483, 484, 499}) {
    const auto free_others_too = [&] {
      cache_->Free(p[i]);
      for (int k = 500; k < 516; ++k) cache_->Free(p[k]);
    };
    EXPECT_DEATH(free_others_too(), "double free of a 48-byte object") << i;
    const auto trim = [&] {
      cache_->Free(p[i]);
      heap_->Trim(cache_.get());
    };
    EXPECT_DEATH(trim(), "double free of a 48-byte object") << i;
    if (i >= 484) continue;  // to others these are still allocated
    EXPECT_DEATH(OnOtherThread([&](ThreadCache& other) { other.Free(p[i]); }), "double free of a 48-byte object") << i;
  }
}

TEST_F(MisuseDeathTest, DoubleFreeOfWhatIsAtHand) {
  std::vector<void*> p;
  for (int i = 0; i < 36; ++i) {
    p.push_back(cache_->Allocate(5000));
    cache_->Allocate(5000);  // its span stays
  }
  int freed = 0;
  for (const int count : {3, 12}) {  // at hand, and in a span's list
    while (freed < count) cache_->Free(p[freed++]);
    for (const int i : {0, 1, count - 1}) {
      const auto free_and_trim = [&] {
        cache_->Free(p[i]);
        heap_->Trim(cache_.get());
      };
      EXPECT_DEATH(free_and_trim(), "double free of a 5120-byte object") << i;
      EXPECT_DEATH(OnOtherThread([&](ThreadCache& other) { other.Free(p[i]); }), "double free of a 5120-byte object")
          << i;
    }
  }
}

TEST_F(MisuseDeathTest, WriteToWhatIsAtHand) {
  void* p = cache_->Allocate(5000);
  const auto write_after_free = [&] {
    cache_->Free(p);
    static_cast<std::uint64_t*>(p)[1] = 0;
    cache_->Allocate(5000);
  };
  EXPECT_DEATH(write_after_free(), "free object of 5120 bytes at 0x[0-9a-f]+ was written to after it was freed");
}

TEST_F(MisuseDeathTest, DoubleFreeOfLargeObjects) {
  for (const std::size_t size : kLargeSizes) {
    void* p = cache_->Allocate(size);
    cache_->Free(p);
    EXPECT_DEATH(cache_->Free(p), "free\\(0x[0-9a-f]+\\): not an object: freed before, or never allocated");
  }
}

TEST_F(MisuseDeathTest, DoubleFreeFromAnotherThread) {
  void* p = cache_->Allocate(64);
  cache_->Free(p);
  EXPECT_DEATH(OnOtherThread([&](ThreadCache& other) { other.Free(p); }), "double free of a 64-byte object");
  EXPECT_DEATH(std::thread([&] { heap_->Free(p); }).join(), "double free of a 64-byte object");
}

TEST_F(MisuseDeathTest, DoubleFreeOfWhatAnotherThreadFreed) {
  void* p = cache_->Allocate(64);
  OnOtherThread([&](ThreadCache& other) { other.Free(p); });
  EXPECT_DEATH(cache_->Free(p), "double free of a 64-byte object");
}

TEST_F(MisuseDeathTest, InteriorPointer) {
  void* p = cache_->Allocate(64);
  EXPECT_DEATH(cache_->Free(At(p, 16)),
               "free\\(0x[0-9a-f]+\\): interior pointer \\(16 bytes into a 64-byte object at 0x[0-9a-f]+\\)");
  for (const std::size_t size : kSizes) {
    void* object = cache_->Allocate(size);
    EXPECT_DEATH(cache_->Free(At(object, 1)), "interior pointer \\(1 bytes into");
    EXPECT_DEATH(OnOtherThread([&](ThreadCache& other) { other.Free(At(object, 8)); }),
                 "interior pointer \\(8 bytes into");
  }
}

TEST_F(MisuseDeathTest, InteriorPointerOfLargeObjects) {
  for (const std::size_t size : kLargeSizes) {
    void* p = cache_->Allocate(size);
    EXPECT_DEATH(cache_->Free(At(p, 16)), "interior pointer \\(16 bytes into a [0-9]+-byte object");
    EXPECT_DEATH(cache_->Free(At(p, 150000)), "interior pointer \\(150000 bytes into a [0-9]+-byte object");
  }
}

TEST_F(MisuseDeathTest, ForeignPointer) {
  int local = 0;
  EXPECT_DEATH(cache_->Free(&local), "free\\(0x[0-9a-f]+\\): not from this heap");
  EXPECT_DEATH(cache_->Free(reinterpret_cast<void*>(std::uintptr_t{1})), "not from this heap");
  EXPECT_DEATH(cache_->Free(reinterpret_cast<void*>(~std::uintptr_t{7})), "not from this heap");
  EXPECT_DEATH(cache_->Free(reinterpret_cast<void*>(0xdeadbeefdeadbee0)), "not from this heap");
  EXPECT_DEATH(heap_->Free(&local), "not from this heap");
}

// Addresses whose records are the ones of this thread's own spans: the table is looked up modulo its size.
TEST_F(MisuseDeathTest, ForeignPointerWithTheRecordOfAnObject) {
  void* p = cache_->Allocate(64);
  for (const unsigned log2 : {36, 40, 44, 46}) {
    const std::uintptr_t alias = AddressOf(p) ^ std::uintptr_t{1} << log2;
    EXPECT_DEATH(cache_->Free(reinterpret_cast<void*>(alias)), "not from this heap");
    EXPECT_DEATH(heap_->UsableSize(reinterpret_cast<void*>(alias)), "malloc_usable_size.*not from this heap");
  }
}

TEST_F(MisuseDeathTest, MemoryOfTheSpaceThatIsNoObject) {
  const auto mapping = heap_.space().Map({4});
  ASSERT_TRUE(mapping.ok());
  EXPECT_DEATH(cache_->Free(mapping->address()), "not an object");
  EXPECT_DEATH(cache_->Free(heap_.space().reservation().address()), "not an object");
  EXPECT_DEATH(cache_->Free((heap_.space().reservation().end - vm::Pages{1}).address()), "not an object");
}

TEST_F(MisuseDeathTest, ObjectThatWasNeverMade) {
  void* p = cache_->Allocate(64);
  EXPECT_DEATH(cache_->Free(At(p, 32768)), "not an object");
  EXPECT_DEATH(cache_->Reallocate(At(p, 32768), 10), "realloc\\(0x[0-9a-f]+\\): not an object");
}

TEST_F(MisuseDeathTest, EndOfSpanIsNoObject) {
  void* p = cache_->Allocate(48);  // 1365 objects and 16 bytes
  const std::uintptr_t span = AddressOf(p) & ~(kUnitSize - 1);
  EXPECT_DEATH(OnOtherThread([&](ThreadCache& other) { other.Free(reinterpret_cast<void*>(span + 1365 * 48)); }),
               "not an object");
}

TEST_F(MisuseDeathTest, Reallocate) {
  void* p = cache_->Allocate(64);
  EXPECT_DEATH(cache_->Reallocate(At(p, 8), 10), "realloc\\(0x[0-9a-f]+\\): interior pointer");
  cache_->Free(p);
  EXPECT_DEATH(cache_->Reallocate(p, 100), "realloc\\(0x[0-9a-f]+\\): double free of a 64-byte object");
}

TEST_F(MisuseDeathTest, UsableSize) {
  void* p = cache_->Allocate(64);
  EXPECT_DEATH(heap_->UsableSize(At(p, 8)), "malloc_usable_size\\(0x[0-9a-f]+\\): interior pointer");
  cache_->Free(p);
  EXPECT_DEATH(heap_->UsableSize(p), "malloc_usable_size\\(0x[0-9a-f]+\\): double free of a 64-byte object");
  EXPECT_DEATH(heap_->UsableSize(At(p, 32768)), "malloc_usable_size\\(0x[0-9a-f]+\\): not an object");
  int local = 0;
  EXPECT_DEATH(heap_->UsableSize(&local), "not from this heap");
}

TEST_F(MisuseDeathTest, FreeSizedOfALargerSize) {
  for (const std::size_t size : {std::size_t{100}, std::size_t{5000}, std::size_t{300000}}) {
    void* p = cache_->Allocate(size);
    const std::size_t usable = heap_->UsableSize(p);
    EXPECT_DEATH(cache_->FreeSized(p, usable + 1), "size [0-9]+ given for a [0-9]+-byte object");
    EXPECT_DEATH(OnOtherThread([&](ThreadCache& other) { other.FreeSized(p, usable + 1); }),
                 "size [0-9]+ given for a [0-9]+-byte object");
  }
}

TEST_F(MisuseDeathTest, WriteAfterFreeThatDestroysTheLink) {
  void* p = cache_->Allocate(64);
  void* q = cache_->Allocate(64);
  cache_->Free(q);
  cache_->Free(p);
  const std::uint64_t link = *static_cast<std::uint64_t*>(p);
  *static_cast<std::uint64_t*>(p) = 0x4141414141414141;
  EXPECT_DEATH(
      {
        cache_->Allocate(64);
        cache_->Allocate(64);
      },
      "free object of 64 bytes at 0x[0-9a-f]+ was written to after it was freed");
  *static_cast<std::uint64_t*>(p) = 0;
  EXPECT_DEATH(cache_->Allocate(64), "was written to after it was freed");
  EXPECT_DEATH(heap_->DetachThread(cache_.get()),
               "free object of 64 bytes at 0x[0-9a-f]+ was written to after it was freed");
  *static_cast<std::uint64_t*>(p) = link;
}

TEST_F(MisuseDeathTest, WriteAfterFreeInABatch) {
  void* p[100];
  for (void*& object : p) object = cache_->Allocate(64);
  EXPECT_DEATH(
      {
        OnOtherThread([&](ThreadCache& other) {
          for (void* object : p) other.Free(object);
          static_cast<std::uint64_t*>(p[5])[0] = 0;
          static_cast<std::uint64_t*>(p[5])[1] = 0;
        });
        for (int i = 0; i < 100000; ++i) cache_->Allocate(64);
      },
      "was written to after it was freed");
}

// What a program may find in memory is no mark: only freeing makes one.
TEST_F(MisuseTest, ContentOfFreedMemoryIsNoMark) {
  for (int round = 0; round < 3; ++round) {
    std::vector<std::uint64_t*> small;
    for (int i = 0; i < 5000; ++i) small.push_back(static_cast<std::uint64_t*>(cache_->Allocate(16)));
    for (auto* p : small) cache_->Free(p);
    // The same memory in other sizes, unwritten: old marks lie where new objects begin.
    std::vector<void*> larger;
    for (int i = 0; i < 2000; ++i) larger.push_back(cache_->Allocate(32 + 16 * (i % 20)));
    for (void* p : larger) cache_->Free(p);
  }
}

}  // namespace
}  // namespace freehold::allocator
