// The file behind a program's name, and what keeps the dynamic linker from preloading a library
// into it.
#ifndef FREEHOLD_RUNTIME_CLI_PROGRAM_FILE_H_
#define FREEHOLD_RUNTIME_CLI_PROGRAM_FILE_H_

#include <optional>
#include <string>

namespace freehold::cli {

struct ProgramLookup {
  std::string path;  // what exec should be given; empty when there is no executable file
  int error = 0;     // ENOENT, or EACCES if files of that name exist but none may be executed
};

// Finds `name` as execvp(3) does: in the directories of $PATH unless it contains a slash.
ProgramLookup FindProgram(const std::string& name);

// Why LD_PRELOAD has no effect on the program in the file `path`, as the end of a sentence ("is
// statically linked"); nothing when it has, or when the file cannot be read. Follows "#!" lines to
// the interpreter.
std::optional<std::string> WhyNotPreloadable(const std::string& path);

}  // namespace freehold::cli

#endif  // FREEHOLD_RUNTIME_CLI_PROGRAM_FILE_H_
