// What freehold.h declares, read from the header itself.
#ifndef FREEHOLD_TESTS_RUNTIME_C_API_NAMES_H_
#define FREEHOLD_TESTS_RUNTIME_C_API_NAMES_H_

#include <cstddef>
#include <fstream>
#include <set>
#include <string>

#include "tests/runtime/subprocess.h"

namespace freehold::testing {

// A declaration begins at the start of a line, where no other line has a parenthesis behind a name of ours.
inline std::set<std::string> CApiFunctions() {
  constexpr char kNameLetters[] = "abcdefghijklmnopqrstuvwxyz_";
  std::ifstream header(BuiltFile("runtime/freehold.h"));
  std::set<std::string> names;
  for (std::string line; std::getline(header, line);) {
    const std::size_t end = line.find('(');
    if (end == line.npos || line[0] < 'a' || line[0] > 'z') continue;
    const std::string before = line.substr(0, end);
    const std::size_t separator = before.find_last_not_of(kNameLetters);
    if (before.compare(separator + 1, 9, "freehold_") == 0) names.insert(before.substr(separator + 1));
  }
  return names;
}

}  // namespace freehold::testing

#endif  // FREEHOLD_TESTS_RUNTIME_C_API_NAMES_H_
