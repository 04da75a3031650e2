// The operators in a library that a C program loads, with libstdc++ coming along only then; see
// operators.h.
#include "tests/runtime/programs/operators.h"

extern "C" void CheckOperators() { operators::CheckAll(); }
