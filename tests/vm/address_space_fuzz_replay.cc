// Performs what the fuzzer found, or a corpus: prints the operations of each file, then what came of them.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "tests/vm/space_operations.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int argc, char** argv) {
  using namespace freehold::vm::test;  // NOLINT
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s FILE...\n", argv[0]);
    return 2;
  }
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::vector<char> text{std::istreambuf_iterator<char>(file), {}};
    if (!file) {
      std::perror(argv[i]);
      return 1;
    }
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(text.data());
    const std::vector<SpaceOperation> operations =
        text.empty() ? std::vector<SpaceOperation>() : Decode({bytes + 1, text.size() - 1});
    std::printf("%s: %zu operations\n", argv[i], operations.size());
    for (const SpaceOperation& operation : operations) std::printf("  %s,\n", ToString(operation).c_str());
    std::fflush(stdout);
    LLVMFuzzerTestOneInput(bytes, text.size());
  }
  std::puts("fine");
  return 0;
}
