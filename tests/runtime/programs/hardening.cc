// What malloc's hardening does, seen from a program that looks at what it freed: `hardening zero|hold|random|none`, each
// with its setting; `write|double` does what must stop it.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "tests/runtime/programs/require.h"

namespace {

// Volatile: the compiler must not know that nobody may look there.
bool IsZeroBehind32(const void* freed, std::size_t size) {
  const auto* bytes = static_cast<const volatile unsigned char*>(freed);
  for (std::size_t i = 32; i < size; ++i) {
    if (bytes[i] != 0) return false;
  }
  return true;
}

// Objects of this size that stay in memory when they are free.
constexpr std::size_t kSizes[] = {48, 100, 1000, 20000, 200000};

bool FreesAreZeroed() {
  bool zeroed = true;
  for (const std::size_t size : kSizes) {
    void* neighbour = malloc(size);
    void* p = malloc(size);
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(p);
    memset(p, 0xab, size);
    free(p);
    zeroed = zeroed && IsZeroBehind32(reinterpret_cast<void*>(address), size);
    free(neighbour);
  }
  // By realloc, which moves, and another thread.
  void* p = memset(malloc(100), 0xab, 100);
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(p);
  void* moved = realloc(p, 5000);
  REQUIRE(static_cast<unsigned char*>(moved)[99] == 0xab);
  zeroed = zeroed && IsZeroBehind32(reinterpret_cast<void*>(address), 100);
  memset(moved, 0xcd, 5000);
  const std::uintptr_t second = reinterpret_cast<std::uintptr_t>(moved);
  std::thread([&] { free(moved); }).join();
  return zeroed && IsZeroBehind32(reinterpret_cast<void*>(second), 5000);
}

// How many of the next mallocs it takes until an object comes back; `most` if it does not.
int MallocsUntilReuse(std::size_t size, int most) {
  void* p = malloc(size);
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(p);
  free(p);
  std::vector<void*> objects;
  objects.reserve(static_cast<std::size_t>(most));
  int count = 0;
  while (count < most) {
    objects.push_back(malloc(size));
    if (reinterpret_cast<std::uintptr_t>(objects.back()) == address) break;
    ++count;
  }
  for (void* object : objects) free(object);
  return count;
}

// Of 1000 objects, how many follow the one before at the same distance as most do.
int InOrder() {
  std::vector<std::uintptr_t> addresses;
  for (int i = 0; i < 1000; ++i) addresses.push_back(reinterpret_cast<std::uintptr_t>(malloc(48)));
  int in_order = 0;
  for (std::size_t i = 1; i < addresses.size(); ++i) in_order += addresses[i] - addresses[i - 1] == 48;
  REQUIRE(std::set<std::uintptr_t>(addresses.begin(), addresses.end()).size() == 1000);
  for (const std::uintptr_t address : addresses) free(reinterpret_cast<void*>(address));
  return in_order;
}

// With anything on, malloc is still malloc.
void Use() {
  std::vector<std::thread> threads;
  for (int id = 0; id < 3; ++id) {
    threads.emplace_back([id] {
      std::vector<unsigned char*> objects(200);
      unsigned random = static_cast<unsigned>(id) + 1;
      for (int i = 0; i < 20000; ++i) {
        random = random * 1664525 + 1013904223;
        unsigned char*& object = objects[random >> 8 & 127];
        if (object != nullptr) REQUIRE(*object == (random >> 8 & 127));
        free(object);
        const std::size_t size = (random >> 16) % (i % 50 == 0 ? 100000 : 500) + 1;
        object = static_cast<unsigned char*>(i % 2 == 0 ? malloc(size) : calloc(1, size));
        if (i % 2 != 0) {
          for (std::size_t j = 0; j < size; ++j) REQUIRE(object[j] == 0);
        }
        *object = static_cast<unsigned char>(random >> 8 & 127);
      }
      for (unsigned char* object : objects) free(object);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (std::size_t alignment = 16; alignment <= 65536; alignment *= 2) {
    for (int i = 0; i < 40; ++i) {
      void* p = aligned_alloc(alignment, 300);
      REQUIRE(reinterpret_cast<std::uintptr_t>(p) % alignment == 0);
      free(p);
    }
  }
}

void FreeMany(std::size_t size) {
  for (int i = 0; i < 20000; ++i) free(malloc(size));
}

}  // namespace

int main(int argc, char** argv) {
  REQUIRE(argc == 2);
  const std::string what = argv[1];
  if (what == "write" || what == "double") {
    auto* p = static_cast<volatile unsigned char*>(malloc(200));
    free(const_cast<unsigned char*>(p));
    if (what == "write") {
      p[150] = 1;
      FreeMany(200);
    } else {
      FreeMany(48);
      free(const_cast<unsigned char*>(p));
    }
    return 0;
  }
  REQUIRE(FreesAreZeroed() == (what == "zero"));
  REQUIRE((MallocsUntilReuse(200, 100) == 100) == (what == "hold"));
  const int in_order = InOrder();
  REQUIRE(what == "random" ? in_order < 300 : in_order > 800);
  Use();
  return 0;
}
