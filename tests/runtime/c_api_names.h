// What freehold.h declares, read from the header itself.
#ifndef FREEHOLD_TESTS_RUNTIME_C_API_NAMES_H_
#define FREEHOLD_TESTS_RUNTIME_C_API_NAMES_H_

#include <fstream>
#include <iterator>
#include <regex>
#include <set>
#include <string>

#include "tests/runtime/subprocess.h"

namespace freehold::testing {

// A declaration begins at the start of a line, and what it returns is a word or two.
inline std::set<std::string> CApiFunctions() {
  std::ifstream file(BuiltFile("runtime/freehold.h"));
  const std::string header{std::istreambuf_iterator<char>(file), {}};
  static const std::regex kDeclaration("\n[a-z_]+[a-z_ *]* \\*?(freehold_[a-z_]+)\\(");
  std::set<std::string> names;
  for (std::sregex_iterator match(header.begin(), header.end(), kDeclaration), end; match != end; ++match) {
    names.insert((*match)[1]);
  }
  return names;
}

}  // namespace freehold::testing

#endif  // FREEHOLD_TESTS_RUNTIME_C_API_NAMES_H_
