// Writes a seed corpus for address_space_fuzz into a folder that is there: random operations of several lengths for
// each kind of space.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "tests/vm/space_operations.h"

int main(int argc, char** argv) {
  using namespace freehold::vm::test;  // NOLINT
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
    return 2;
  }
  constexpr std::size_t kLengths[] = {20, 60, 200, 600, 2000};
  for (std::size_t variant = 0; variant < Variants().size(); ++variant) {
    for (const std::size_t length : kLengths) {
      std::vector<std::uint8_t> bytes = Encode(RandomOperations(variant * 10000 + length, length));
      bytes.insert(bytes.begin(), static_cast<std::uint8_t>(variant));
      const std::string path = std::string(argv[1]) + "/" + Variants()[variant].name + "_" + std::to_string(length);
      std::ofstream file(path, std::ios::binary);
      file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
      if (!file.flush()) {
        std::perror(path.c_str());
        return 1;
      }
    }
  }
  return 0;
}
