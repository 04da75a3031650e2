// The `freehold` command: `freehold run` starts a program on Freehold, the others look inside one that runs.
#include <cstdio>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "runtime/cli/maps.h"
#include "runtime/cli/run.h"
#include "runtime/cli/stat.h"
#include "runtime/version.h"

namespace {

constexpr int kUsageError = 2;

constexpr char kHelp[] = R"(Usage: freehold COMMAND [ARGUMENTS]

Commands:
  run [OPTIONS] [--] PROGRAM [ARGUMENTS]   run a program on Freehold's memory
  stat PID [--json | --prometheus]         print the counters of a running process
  maps PID [--kernel]                      print what it has mapped

  --help      print this; `freehold COMMAND --help` says more about a command
  --version   print the version
)";

int Usage(absl::string_view problem) {
  std::fputs(absl::StrCat("freehold: ", problem, "; see `freehold --help`\n").c_str(), stderr);
  return kUsageError;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<absl::string_view> arguments(argv + 1, argv + argc);
  if (arguments.empty()) return Usage("no command given");
  const absl::string_view command = arguments[0];
  if (command == "run") return freehold::cli::Run(argc - 2, argv + 2);
  if (command == "stat") return freehold::cli::Stat(argc - 2, argv + 2);
  if (command == "maps") return freehold::cli::Maps(argc - 2, argv + 2);
  if (command == "--help" || command == "-h" || command == "help") {
    std::fputs(kHelp, stdout);
    return 0;
  }
  if (command == "--version") {
    std::puts(absl::StrCat("freehold ", freehold::runtime::kVersion).c_str());
    return 0;
  }
  return Usage(absl::StrCat("unknown command '", command, "'"));
}
