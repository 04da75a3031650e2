// `freehold maps`: what a running process has mapped in its address space.
#ifndef FREEHOLD_RUNTIME_CLI_MAPS_H_
#define FREEHOLD_RUNTIME_CLI_MAPS_H_

namespace freehold::cli {

// Runs the command with the arguments that follow "maps". Returns its exit status, as Stat does.
int Maps(int count, char** arguments);

}  // namespace freehold::cli

#endif  // FREEHOLD_RUNTIME_CLI_MAPS_H_
