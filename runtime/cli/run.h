// `freehold run`: starts a program with the malloc of libfreehold.so.
#ifndef FREEHOLD_RUNTIME_CLI_RUN_H_
#define FREEHOLD_RUNTIME_CLI_RUN_H_

namespace freehold::cli {

// Runs the command with the arguments that follow "run"; `arguments[count]` is null. Puts
// libfreehold.so in front of LD_PRELOAD, turns options into FREEHOLD_* variables and becomes the
// program by exec: its process id, streams, signals and exit status are this process's. So it
// returns only for --help (0) and on errors, like a shell: 127 if there is no such program, 126 if
// it cannot be executed, 2 for wrong arguments, 125 if libfreehold.so is missing.
//
// FREEHOLD_* variables of the environment that mean nothing are reported here, once, and taken out
// of the program's environment, so that its children do not report them again.
int Run(int count, char** arguments);

}  // namespace freehold::cli

#endif  // FREEHOLD_RUNTIME_CLI_RUN_H_
