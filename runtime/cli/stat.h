// `freehold stat`: the counters of a running process.
#ifndef FREEHOLD_RUNTIME_CLI_STAT_H_
#define FREEHOLD_RUNTIME_CLI_STAT_H_

namespace freehold::cli {

// Runs the command with the arguments that follow "stat". Returns its exit status: 0; 1 if the process cannot be looked
// at, with a line that says why; 2 for wrong arguments.
int Stat(int count, char** arguments);

}  // namespace freehold::cli

#endif  // FREEHOLD_RUNTIME_CLI_STAT_H_
