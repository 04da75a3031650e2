// The `freehold` command: `freehold run` starts a program on Freehold, the others look inside one that runs.
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "runtime/cli/command.h"
#include "runtime/cli/maps.h"
#include "runtime/cli/report.h"
#include "runtime/cli/run.h"
#include "runtime/cli/stat.h"
#include "runtime/cli/top.h"
#include "runtime/version.h"

namespace freehold::cli {
namespace {

constexpr char kHelp[] = R"(Usage: freehold COMMAND [ARGUMENTS]

Commands:
  run [OPTIONS] [--] PROGRAM [ARGUMENTS]   run a program on Freehold's memory
  stat PID [--heap] [--json|--prometheus]  print the counters of a running process
  maps PID [--kernel]                      print what it has mapped
  top PID [OPTIONS]                        watch what it does, and who waits for whom
  report PID -o FILE.html [--seconds=S]    watch it for a while, and write a page about it

  --help      print this; `freehold COMMAND --help` says more about a command
  --version   print the version
)";

int Usage(absl::string_view problem) {
  PrintError(absl::StrCat(problem, "; see `freehold --help`"));
  return kUsageError;
}

int Dispatch(int argc, char** argv) {
  if (argc < 2) return Usage("no command given");
  const absl::string_view command = argv[1];
  if (command == "run") return Run(argc - 2, argv + 2);
  if (command == "stat") return Stat(argc - 2, argv + 2);
  if (command == "maps") return Maps(argc - 2, argv + 2);
  if (command == "report") return Report(argc - 2, argv + 2);
  if (command == "top") return Top(argc - 2, argv + 2);
  if (command == "--help" || command == "-h" || command == "help") {
    std::fputs(kHelp, stdout);
    return 0;
  }
  if (command == "--version") {
    std::puts(absl::StrCat("freehold ", runtime::kVersion).c_str());
    return 0;
  }
  return Usage(absl::StrCat("unknown command '", command, "'"));
}

}  // namespace
}  // namespace freehold::cli

int main(int argc, char** argv) {
  const int status = freehold::cli::Dispatch(argc, argv);
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return status;
  freehold::cli::PrintError("standard output cannot be written");
  return freehold::cli::kFailed;
}
