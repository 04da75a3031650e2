// Fuzz target: the first byte chooses the space, the others are operations (space_operations.h). Run it by
//
//   bazel build --config=fuzz //tests/vm:address_space_fuzz //tests/vm:fuzz_corpus
//   bazel-bin/tests/vm/fuzz_corpus /tmp/corpus
//   bazel-bin/tests/vm/address_space_fuzz -max_len=2000 /tmp/corpus
//
// What it finds is a file; address_space_fuzz_replay --shrink prints the operations in it that are needed for the
// failure, and performs them.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "tests/vm/space_operations.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace freehold::vm::test;  // NOLINT
  if (size == 0) return 0;
  const Variant& variant = Variants()[data[0] % Variants().size()];
  const std::string failure = Run(Decode({data + 1, size - 1}), variant.options);
  if (failure.empty()) return 0;
  std::fprintf(stderr, "%s: %s\n", variant.name, failure.c_str());
  std::abort();
}
