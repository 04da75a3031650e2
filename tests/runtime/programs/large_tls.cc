// Threads of a program with a megabyte of thread-local data, part of it aligned to pages, and of a library that is
// loaded when threads run already.
//
//     large_tls LIBRARY
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "tests/runtime/programs/require.h"

namespace {

thread_local char large[1 << 20];
alignas(4096) thread_local int aligned = 5;

std::atomic<int (*)()> count_in_library{nullptr};

void* Use(void*) {
  REQUIRE(aligned == 5 && reinterpret_cast<std::uintptr_t>(&aligned) % 4096 == 0);
  for (std::size_t i = 0; i < sizeof(large); i += 1000) {
    REQUIRE(large[i] == 0);
    large[i] = 1;
  }
  while (count_in_library.load() == nullptr) usleep(100);
  for (int i = 1; i < 100; ++i) REQUIRE(count_in_library.load()() == i);
  return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  REQUIRE(argc == 2);
  for (const std::size_t size : {std::size_t{64} << 10, std::size_t{512} << 10, std::size_t{4} << 20}) {
    pthread_attr_t attributes;
    REQUIRE(pthread_attr_init(&attributes) == 0);
    REQUIRE(pthread_attr_setstacksize(&attributes, size) == 0);
    std::vector<pthread_t> threads(8);
    for (int round = 0; round < 3; ++round) {
      count_in_library.store(nullptr);
      int error = 0;
      for (pthread_t& thread : threads) error = pthread_create(&thread, &attributes, Use, nullptr);
      std::printf("stack of %zu: %d\n", size, error);
      void* library = dlopen(argv[1], RTLD_NOW);
      REQUIRE(library != nullptr);
      count_in_library.store(reinterpret_cast<int (*)()>(dlsym(library, "CountCalls")));
      REQUIRE(count_in_library.load() != nullptr);
      for (pthread_t thread : threads) {
        if (error == 0) REQUIRE(pthread_join(thread, nullptr) == 0);
      }
      REQUIRE(dlclose(library) == 0);
    }
  }
  return 0;
}
