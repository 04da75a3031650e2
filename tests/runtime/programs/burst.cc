// Allocates MIB, in small and in large blocks, frees it and idles; prints the resident MiB before,
// at the peak and after WAIT_MS. `burst MIB WAIT_MS [light]`; light: allocates a little now and
// then instead of idling.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tests/runtime/programs/process_facts.h"
#include "tests/runtime/programs/require.h"

namespace {

void Burst(std::size_t mib) {
  std::vector<void*> blocks;
  const auto add = [&](std::size_t size) {
    void* block = std::malloc(size);
    REQUIRE(block != nullptr);
    std::memset(block, 1, size);
    blocks.push_back(block);
  };
  for (std::size_t i = 0; i < mib << 20; i += 400) add(400);
  for (std::size_t i = 0; i < mib << 20; i += 20'000) add(20'000);
  for (std::size_t i = 0; i < mib << 20; i += 3 << 20) add(3 << 20);
  std::printf("peak %zu\n", process::ResidentMiB());
  for (void* block : blocks) std::free(block);
}

void LightWork() {
  std::vector<void*> blocks;
  for (std::size_t i = 0; i < 300; ++i) blocks.push_back(std::malloc(i * 30));
  for (void* block : blocks) std::free(block);
}

}  // namespace

int main(int argc, char** argv) {
  REQUIRE(argc >= 3);
  const std::size_t mib = static_cast<std::size_t>(std::atol(argv[1])) / 3;
  const int wait = std::atoi(argv[2]);
  std::printf("before %zu\n", process::ResidentMiB());
  Burst(mib);
  if (argc == 3) {
    usleep(static_cast<useconds_t>(wait) * 1000);
  } else {
    for (int i = 0; i < wait; i += 10) {
      LightWork();
      usleep(10'000);
    }
  }
  std::printf("after %zu\n", process::ResidentMiB());
  std::printf("threads %zu\n", process::Tasks().size());
  return 0;
}
