// The operators in a C++ program; see operators.h.
#include "tests/runtime/programs/operators.h"

int main() {
  operators::CheckAll();
  return 0;
}
