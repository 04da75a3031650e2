// fork(2): the child of a program with many threads has a runtime that works.
#ifndef FREEHOLD_RUNTIME_FORK_H_
#define FREEHOLD_RUNTIME_FORK_H_

namespace freehold::runtime {

// Registers handlers that quiesce the heap and the space before a fork and release them in parent
// and child. Prepare handlers run in reverse order of their registration and the others in order,
// so that the first ones registered let every other handler allocate: to be called once, before the
// program can register its own.
//
// vfork, posix_spawn and _Fork run no handlers: their children may not allocate until they exec.
void RegisterForkHandlers();

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_FORK_H_
