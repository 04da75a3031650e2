// Joins the runtime to the process's own start and end.
#ifndef FREEHOLD_RUNTIME_SHIM_STARTUP_H_
#define FREEHOLD_RUNTIME_SHIM_STARTUP_H_

namespace freehold::runtime::shim {

// To be called before any constructor of the program or of a library, with the environment of the
// process: starts the runtime, if no allocation has yet, and registers its fork handlers before
// anybody else's.
void OnProcessStart(const char* const* environment);

}  // namespace freehold::runtime::shim

#endif  // FREEHOLD_RUNTIME_SHIM_STARTUP_H_
