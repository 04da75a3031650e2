// The program's pre-initialization array runs before the constructors of all libraries. Only
// programs have one: linking the runtime into a shared library fails here.
#include "runtime/shim/startup.h"

namespace {

void Start(int, char**, char** environment) {
  freehold::runtime::shim::OnProcessStart(environment);
}

using Initializer = void (*)(int, char**, char**);
__attribute__((section(".preinit_array"), used)) constinit Initializer initializer = Start;

}  // namespace
