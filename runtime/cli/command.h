// What the commands that look at a process have in common: their arguments and their errors.
#ifndef FREEHOLD_RUNTIME_CLI_COMMAND_H_
#define FREEHOLD_RUNTIME_CLI_COMMAND_H_

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "runtime/cli/process_view.h"

namespace freehold::cli {

// As env(1), nohup(1) and shells use them.
inline constexpr int kFailed = 1;
inline constexpr int kUsageError = 2;

struct Command {
  absl::string_view name;  // "stat"
  absl::string_view help;  // all of --help
  absl::Span<const absl::string_view> switches;        // "--json"
  absl::Span<const absl::string_view> with_value = {};  // "-o": the next argument, or what follows "="
};

struct CommandLine {
  pid_t pid = 0;
  std::vector<absl::string_view> switches;  // those given
  std::vector<std::pair<absl::string_view, std::string>> values;

  // Whether it was given, as a switch or with a value.
  bool Has(absl::string_view name) const;
  // What was given for it last; empty if nothing was.
  std::string ValueOf(absl::string_view name) const;
};

// Reads PID and options in any order. Where the command has nothing more to do, with --help or a mistake, that was
// printed and `status` is its exit status.
bool ParseCommandLine(const Command& command, int count, char** arguments, CommandLine& line, int& status);

// Prints "freehold: WHAT" to standard error.
void PrintError(absl::string_view what);
// The same for an error; returns kFailed.
int Fail(const absl::Status& status);

absl::string_view NameOf(vm::Zone zone);

// Without control characters, which would reach the terminal.
std::string Printable(std::string text);

// "12.3 MiB".
std::string HumanBytes(std::uint64_t bytes);

}  // namespace freehold::cli

#endif  // FREEHOLD_RUNTIME_CLI_COMMAND_H_
