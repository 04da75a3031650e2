// The library is linked with -z initfirst: the dynamic linker runs its constructor before those of
// all other libraries, libc's included, which by then is relocated and knows its threads.
#include "runtime/shim/startup.h"

namespace {

__attribute__((constructor)) void Start(int, char**, char** environment) {
  freehold::runtime::shim::OnProcessStart(environment);
}

}  // namespace
