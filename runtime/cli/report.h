// `freehold report`: a page of HTML about a running process, to keep and to send around.
#ifndef FREEHOLD_RUNTIME_CLI_REPORT_H_
#define FREEHOLD_RUNTIME_CLI_REPORT_H_

namespace freehold::cli {

// Runs the command with the arguments that follow "report". Returns its exit status: 0; 1 if the process cannot be looked
// at, ends meanwhile, or the file cannot be written, with a line that says why; 2 for wrong arguments.
int Report(int count, char** arguments);

}  // namespace freehold::cli

#endif  // FREEHOLD_RUNTIME_CLI_REPORT_H_
