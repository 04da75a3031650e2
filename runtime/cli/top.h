// `freehold top`: what a process does with its memory right now, and who waits for whom.
#ifndef FREEHOLD_RUNTIME_CLI_TOP_H_
#define FREEHOLD_RUNTIME_CLI_TOP_H_

namespace freehold::cli {

// Runs the command with the arguments that follow "top". Returns its exit status: 0, also when the process ends while it
// is watched; 1 if it cannot be looked at, with a line that says why; 2 for wrong arguments.
int Top(int count, char** arguments);

}  // namespace freehold::cli

#endif  // FREEHOLD_RUNTIME_CLI_TOP_H_
