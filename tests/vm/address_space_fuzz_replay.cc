// Performs what the fuzzer found, or a corpus: prints the operations of each file, then what came of them.
//
//   address_space_fuzz_replay FILE...
//   address_space_fuzz_replay --shrink FILE   leaves out what is not needed for a failure, also if that is a crash
//   address_space_fuzz_replay --seed N        writes what the model test performs with that seed to standard output
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "tests/vm/space_operations.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace freehold::vm::test {
namespace {

std::vector<std::uint8_t> ToBytes(std::uint8_t variant, const std::vector<SpaceOperation>& operations) {
  std::vector<std::uint8_t> bytes = Encode(operations);
  bytes.insert(bytes.begin(), variant);
  return bytes;
}

// In a process of its own, which may end as it likes.
bool Fails(const std::vector<std::uint8_t>& bytes) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(0);
    alarm(10);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    _exit(0);
  }
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && status != 0;
}

void Shrink(std::uint8_t variant, std::vector<SpaceOperation>& operations) {
  for (std::size_t piece = std::max<std::size_t>(operations.size() / 2, 1); piece > 0; piece /= 2) {
    for (std::size_t at = 0; at + piece <= operations.size();) {
      std::vector<SpaceOperation> fewer = operations;
      const auto first = fewer.begin() + static_cast<std::ptrdiff_t>(at);
      fewer.erase(first, first + static_cast<std::ptrdiff_t>(piece));
      if (Fails(ToBytes(variant, fewer))) {
        operations = std::move(fewer);
      } else {
        at += piece;
      }
    }
  }
}

int WriteSeed(std::uint64_t seed) {
  const std::vector<std::uint8_t> bytes =
      ToBytes(static_cast<std::uint8_t>(seed % Variants().size()), RandomOperations(seed, kModelBytes));
  return std::fwrite(bytes.data(), 1, bytes.size(), stdout) == bytes.size() ? 0 : 1;
}

int Replay(const char* path, bool shrink) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> text{std::istreambuf_iterator<char>(file), {}};
  if (!file) {
    std::perror(path);
    return 1;
  }
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(text.data());
  std::vector<SpaceOperation> operations;
  if (!text.empty()) operations = Decode({bytes + 1, text.size() - 1});
  if (shrink && !text.empty() && Fails(ToBytes(bytes[0], operations))) Shrink(bytes[0], operations);
  std::printf("%s: %zu operations\n", path, operations.size());
  for (const SpaceOperation& operation : operations) std::printf("  %s,\n", ToString(operation).c_str());
  std::fflush(stdout);
  const std::vector<std::uint8_t> performed = ToBytes(text.empty() ? 0 : bytes[0], operations);
  LLVMFuzzerTestOneInput(performed.data(), text.empty() ? 0 : performed.size());
  return 0;
}

}  // namespace
}  // namespace freehold::vm::test

int main(int argc, char** argv) {
  using namespace freehold::vm::test;  // NOLINT
  const std::string_view option = argc > 1 ? argv[1] : "";
  if (option == "--seed" && argc == 3) return WriteSeed(std::strtoull(argv[2], nullptr, 10));
  const bool shrink = option == "--shrink";
  const int first = shrink ? 2 : 1;
  if (argc <= first) {
    std::fprintf(stderr, "usage: %s [--shrink] FILE... | --seed N\n", argv[0]);
    return 2;
  }
  for (int i = first; i < argc; ++i) {
    if (Replay(argv[i], shrink) != 0) return 1;
  }
  std::puts("fine");
  return 0;
}
