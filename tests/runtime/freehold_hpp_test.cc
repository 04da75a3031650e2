#include "runtime/freehold.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <list>
#include <map>
#include <new>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "gtest/gtest.h"

namespace freehold {
namespace {

std::uint64_t Allocated(const Heap& heap) {
  freehold_heap_trim(heap.get(), nullptr);
  freehold_heap_statistics statistics = {};
  statistics.size = sizeof(statistics);
  EXPECT_EQ(freehold_heap_get_statistics(heap.get(), &statistics), 0);
  return statistics.allocated;
}

TEST(HeapTest, OwnsAHeap) {
  Heap heap;
  ASSERT_NE(heap.get(), nullptr);
  freehold_heap* const handle = heap.get();
  Heap moved = std::move(heap);
  EXPECT_EQ(moved.get(), handle);
  EXPECT_EQ(heap.get(), nullptr);
  Heap other;
  other = std::move(moved);
  EXPECT_EQ(other.get(), handle);
  EXPECT_NE(freehold_heap_allocate(other.get(), 10), nullptr);
}

TEST(HeapTest, ThrowsWhereNoneCanBeMade) {
  freehold_space_options options = {};
  options.size = sizeof(options);
  options.reserve = std::size_t{64} << 20;
  freehold_space* space = nullptr;
  ASSERT_EQ(freehold_space_create(&options, &space), 0);
  EXPECT_NO_THROW(Heap heap(space));
  const pid_t child = fork();
  if (child == 0) {
    try {
      Heap heap(space);
    } catch (const std::bad_alloc&) {
      _exit(7);
    }
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 7) << "of a space that is the parent's";
  EXPECT_EQ(freehold_space_destroy(space), 0);
}

TEST(HeapResourceTest, ServesContainers) {
  Heap heap;
  HeapResource resource(heap);
  {
    std::pmr::vector<std::pmr::string> strings(&resource);
    std::pmr::unordered_map<int, std::pmr::string> map(&resource);
    std::pmr::list<std::uint64_t> list(&resource);
    for (int i = 0; i < 10000; ++i) {
      strings.emplace_back(std::string(static_cast<std::size_t>(i % 300), 'x'));
      map[i] = strings.back();
      list.push_back(static_cast<std::uint64_t>(i));
    }
    EXPECT_GT(Allocated(heap), 3000000u);
    for (int i = 0; i < 10000; ++i) ASSERT_EQ(map[i].size(), static_cast<std::size_t>(i % 300));
  }
  EXPECT_EQ(Allocated(heap), 0u);
}

TEST(HeapResourceTest, Alignments) {
  Heap heap;
  HeapResource resource(heap);
  for (std::size_t alignment = 1; alignment <= 1 << 16; alignment *= 2) {
    for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{100}, std::size_t{300000}}) {
      void* p = resource.allocate(bytes, alignment);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(p) % alignment, 0u);
      std::memset(p, 1, bytes);
      resource.deallocate(p, bytes, alignment);
    }
  }
  EXPECT_EQ(Allocated(heap), 0u);
}

TEST(HeapResourceTest, IsEqualToThoseOfItsHeap) {
  Heap heap;
  Heap other;
  EXPECT_TRUE(HeapResource(heap) == HeapResource(heap.get()));
  EXPECT_FALSE(HeapResource(heap) == HeapResource(other));
  EXPECT_FALSE(HeapResource(heap) == *std::pmr::new_delete_resource());
}

TEST(HeapResourceTest, ThrowsWithoutMemory) {
  Heap heap;
  HeapResource resource(heap);
  EXPECT_THROW(static_cast<void>(resource.allocate(PTRDIFF_MAX)), std::bad_alloc);
  EXPECT_THROW(static_cast<void>(resource.allocate(PTRDIFF_MAX, 64)), std::bad_alloc);
}

// The heap's end is the end of what is in it: nothing has to be given back one by one.
TEST(HeapResourceTest, WithoutDestructors) {
  Heap heap;
  HeapResource resource(heap);
  for (int i = 0; i < 1000; ++i) {
    auto* leaked = new (resource.allocate(sizeof(std::pmr::vector<int>))) std::pmr::vector<int>(&resource);
    leaked->resize(1000);
  }
  EXPECT_GE(Allocated(heap), 4000000u);
}

TEST(HeapAllocatorTest, ServesContainers) {
  Heap heap;
  {
    const HeapAllocator<int> allocator(heap);
    std::vector<int, HeapAllocator<int>> vector(allocator);
    std::map<int, int, std::less<>, HeapAllocator<std::pair<const int, int>>> map(allocator);
    using String = std::basic_string<char, std::char_traits<char>, HeapAllocator<char>>;
    String text(allocator);
    for (int i = 0; i < 50000; ++i) {
      vector.push_back(i);
      map[i] = i;
      text += "word ";
    }
    for (int i = 0; i < 50000; ++i) ASSERT_EQ(vector[static_cast<std::size_t>(i)], map[i]);
    EXPECT_EQ(text.size(), 250000u);
    EXPECT_GT(Allocated(heap), 2000000u);
  }
  EXPECT_EQ(Allocated(heap), 0u);
}

TEST(HeapAllocatorTest, GoesWithWhatIsMoved) {
  Heap heap;
  Heap other;
  using Vector = std::vector<int, HeapAllocator<int>>;
  Vector a(1000, 1, HeapAllocator<int>(heap));
  Vector b(10, 2, HeapAllocator<int>(other));
  const int* const data = a.data();
  b = std::move(a);
  EXPECT_EQ(b.data(), data);
  EXPECT_EQ(b.get_allocator(), HeapAllocator<char>(heap));
  EXPECT_NE(b.get_allocator(), HeapAllocator<int>(other));
  Vector c(HeapAllocator<int>{other});
  c = b;
  EXPECT_EQ(c.get_allocator().heap(), other.get());
  EXPECT_EQ(c, b);
}

TEST(HeapAllocatorTest, SizesAndRoom) {
  Heap heap;
  HeapAllocator<std::uint64_t> allocator(heap);
  const auto result = allocator.allocate_at_least(1000);
  EXPECT_GE(result.count, 1000u);
  EXPECT_EQ(result.count * 8, freehold_heap_usable_size(heap.get(), result.ptr));
  allocator.deallocate(result.ptr, result.count);
  std::uint64_t* large = allocator.allocate(1 << 18);
  large[0] = 5;
  const bool expanded = allocator.try_expand(large, 1 << 19);
  const std::size_t count = expanded ? 1 << 19 : 1 << 18;
  EXPECT_EQ(freehold_heap_usable_size(heap.get(), large), count * 8);
  EXPECT_EQ(large[0], 5u);
  EXPECT_FALSE(allocator.try_expand(large, PTRDIFF_MAX));
  allocator.deallocate(large, count);
  EXPECT_THROW(static_cast<void>(allocator.allocate(PTRDIFF_MAX)), std::bad_array_new_length);
  EXPECT_THROW(static_cast<void>(allocator.allocate_at_least(PTRDIFF_MAX / 8)), std::bad_alloc);
  struct alignas(256) Wide {
    char bytes[256];
  };
  HeapAllocator<Wide> wide(allocator);
  Wide* p = wide.allocate(3);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(p) % 256, 0u);
  wide.deallocate(p, 3);
  EXPECT_EQ(Allocated(heap), 0u);
}

TEST(HeapAllocatorTest, Threads) {
  Heap heap;
  std::vector<std::thread> threads;
  std::vector<std::vector<int, HeapAllocator<int>>> made(4, std::vector<int, HeapAllocator<int>>(HeapAllocator<int>(heap)));
  for (std::size_t i = 0; i < made.size(); ++i) {
    threads.emplace_back([&, i] {
      for (int j = 0; j < 10000; ++j) made[i].push_back(j);
    });
  }
  for (std::thread& thread : threads) thread.join();
  made.clear();
  EXPECT_EQ(Allocated(heap), 0u);
}

}  // namespace
}  // namespace freehold
