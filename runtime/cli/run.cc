#include "runtime/cli/run.h"

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "runtime/cli/program_file.h"
#include "runtime/config.h"
#include "runtime/message.h"

extern char** environ;

namespace freehold::cli {
namespace {

using runtime::Config;
using runtime::Message;
using runtime::Option;
using runtime::OptionType;
using runtime::Problem;
using runtime::Spelling;

// As env(1), nohup(1) and shells use them.
constexpr int kUsageError = 2;
constexpr int kCannotRun = 125;
constexpr int kNotExecutable = 126;
constexpr int kNotFound = 127;

constexpr char kLibraryName[] = "libfreehold.so";
constexpr char kLibraryVariable[] = "FREEHOLD_LIBRARY";
constexpr char kMallocVariable[] = "FREEHOLD_MALLOC";
constexpr char kMimallocVariable[] = "FREEHOLD_MIMALLOC";

constexpr char kHelpHead[] = R"(Usage: freehold run [OPTIONS] [--] PROGRAM [ARGUMENTS]

Runs PROGRAM, unmodified, with the malloc and the mmap of libfreehold.so: the library is put in front of
LD_PRELOAD and the options become environment variables, so that the program's children run on
Freehold too. Process id, streams, signals and exit status are the program's. Without effect on
statically linked programs and on those that run with more privileges than their caller.

Options, each with its variable and default:
)";

constexpr char kHelpTail[] = R"(
Exit status: the program's; 127 if there is no such program, 126 if it cannot be executed, 125 if
libfreehold.so or libmimalloc.so is missing, 2 for wrong arguments.
)";

struct Setting {
  std::string variable;
  std::string value;
};

struct CommandLine {
  bool help = false;
  std::vector<Setting> settings;
  char** program = nullptr;  // the program's argument vector; never empty
};

void Print(absl::string_view text) {
  std::fputs(absl::StrCat("freehold: ", text, "\n").c_str(), stderr);
}

int Usage(absl::string_view problem) {
  Print(absl::StrCat(problem, "; see `freehold run --help`"));
  return kUsageError;
}

template <typename Append, typename... Arguments>
std::string TextOf(Append append, const Arguments&... arguments) {
  Message message;
  append(arguments..., message);
  return std::string(message.text());
}

std::string VariableOf(const Option& option) { return TextOf(runtime::AppendVariable, option); }

std::string FlagSynopsis(const Option& option) {
  const std::string flag = absl::StrCat("--", std::string(option.name));
  const std::string value(runtime::ValueName(option));
  if (option.type == OptionType::kSwitch) return absl::StrCat(flag, "[=", value, "]");
  return absl::StrCat(flag, "=", value);
}

int PrintHelp() {
  std::fputs(kHelpHead, stdout);
  for (const Option& option : runtime::Options()) {
    const std::string value = TextOf(runtime::AppendValue, option, Config{});
    std::printf("  %s\n      %s\n      %s%s%s; %s\n", FlagSynopsis(option).c_str(),
                std::string(option.help).c_str(), VariableOf(option).c_str(),
                value.empty() ? "" : "=", value.c_str(),
                TextOf(runtime::AppendAcceptedForm, option).c_str());
  }
  std::fputs(kHelpTail, stdout);
  return 0;
}

// One argument "--name" or "--name=value". Returns the problem with it, or nothing.
std::optional<std::string> ParseFlag(absl::string_view argument, CommandLine& line) {
  const absl::string_view flag = argument.substr(2);
  const std::size_t equals = flag.find('=');
  const std::string name(flag.substr(0, equals));
  const Option* option = runtime::FindOption(name);
  std::string value;
  if (equals != flag.npos) {
    value = std::string(flag.substr(equals + 1));
  } else if (option != nullptr && option->type == OptionType::kSwitch) {
    value = "on";
  } else if (option != nullptr) {
    return absl::StrCat(argument, " needs a value: ", FlagSynopsis(*option));
  }
  std::optional<std::string> wrong;
  Config ignored;
  runtime::SetOption(name, value, ignored, [&](const Problem& problem) {
    wrong = TextOf(runtime::AppendProblem, problem, Spelling::kFlag);
  });
  if (!wrong) line.settings.push_back({VariableOf(*option), std::move(value)});
  return wrong;
}

// Returns the problem with the arguments, or nothing.
std::optional<std::string> ParseArguments(int count, char** arguments, CommandLine& line) {
  for (int i = 0; i < count; ++i) {
    const absl::string_view argument = arguments[i];
    if (argument == "--help" || argument == "-h") {
      line.help = true;
      return std::nullopt;
    }
    if (argument == "--" || !absl::StartsWith(argument, "-")) {
      line.program = arguments + i + (argument == "--" ? 1 : 0);
      break;
    }
    if (!absl::StartsWith(argument, "--")) return absl::StrCat("unknown option ", argument);
    if (auto wrong = ParseFlag(argument, line)) return wrong;
  }
  if (line.program == nullptr || *line.program == nullptr) return "no program given";
  return std::nullopt;
}

// Reports the variables of the environment that mean nothing and removes them.
void CleanEnvironment() {
  std::vector<std::string> wrong;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    Config ignored;
    runtime::ApplyVariable(*variable, ignored, [&](const Problem& problem) {
      Print(TextOf(runtime::AppendProblem, problem, Spelling::kVariable));
      wrong.emplace_back(*variable, std::strcspn(*variable, "="));
    });
  }
  for (const std::string& name : wrong) unsetenv(name.c_str());
}

// The directory of this executable; empty when /proc is not there to tell.
std::string OwnDirectory() {
  char path[4096];
  const ssize_t size = readlink("/proc/self/exe", path, sizeof(path));
  if (size <= 0 || size == static_cast<ssize_t>(sizeof(path))) return "";
  const absl::string_view whole(path, static_cast<std::size_t>(size));
  return std::string(whole.substr(0, whole.rfind('/')));
}

std::optional<std::string> ReadableFile(const std::string& path) {
  if (access(path.c_str(), R_OK) != 0) return std::nullopt;
  char* resolved = realpath(path.c_str(), nullptr);
  std::string result = resolved != nullptr ? resolved : path;
  std::free(resolved);
  return result;
}

// The library to preload: the one that was asked for, or else the one beside this executable, in
// ../lib of an installation, or in the build tree.
std::optional<std::string> FindLibrary() {
  if (const char* chosen = std::getenv(kLibraryVariable); chosen != nullptr && *chosen != '\0') {
    auto found = ReadableFile(chosen);
    if (!found) Print(absl::StrCat(chosen, ": ", std::strerror(errno)));
    return found;
  }
  const std::string directory = OwnDirectory();
  for (const absl::string_view place : {"", "../lib/", "../shim/"}) {
    if (auto found = ReadableFile(absl::StrCat(directory, "/", place, kLibraryName))) return found;
  }
  Print(absl::StrCat("no ", kLibraryName, " in ", directory,
                     ", its ../lib or ../shim; name it with --library"));
  return std::nullopt;
}

bool WantsMimalloc() {
  const char* malloc = std::getenv(kMallocVariable);
  Config config;
  if (malloc != nullptr) runtime::SetOption("malloc", malloc, config, [](const Problem&) {});
  return config.malloc == runtime::MallocChoice::kMimalloc;
}

// The path of the library that was asked for, or of the system's, wherever the dynamic linker finds that.
std::optional<std::string> FindMimalloc() {
  if (const char* chosen = std::getenv(kMimallocVariable); chosen != nullptr && *chosen != '\0') {
    auto found = ReadableFile(chosen);
    if (!found) Print(absl::StrCat(chosen, ": ", std::strerror(errno)));
    return found;
  }
  for (const char* name : {"libmimalloc.so.2", "libmimalloc.so.3", "libmimalloc.so"}) {
    void* handle = dlopen(name, RTLD_LAZY | RTLD_LOCAL);
    link_map* map = nullptr;
    if (handle != nullptr && dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0) return ReadableFile(map->l_name);
  }
  Print("no libmimalloc.so on this system (Debian: libmimalloc2.0); name it with --mimalloc");
  return std::nullopt;
}

// Puts `libraries` in front of what LD_PRELOAD names otherwise.
void Preload(const std::vector<std::string>& libraries) {
  const char* variable = std::getenv("LD_PRELOAD");
  std::vector<std::string> names = libraries;
  for (std::string& other : std::vector<std::string>(
           absl::StrSplit(variable != nullptr ? variable : "", absl::ByAnyChar(" :"), absl::SkipEmpty()))) {
    if (std::find(libraries.begin(), libraries.end(), other) == libraries.end()) names.push_back(std::move(other));
  }
  setenv("LD_PRELOAD", absl::StrJoin(names, ":").c_str(), 1);
}

int StatusOf(int error) { return error == ENOENT ? kNotFound : kNotExecutable; }

int Fail(absl::string_view program, int error) {
  Print(absl::StrCat(program, ": ", error == ENOENT ? "program not found" : std::strerror(error)));
  return StatusOf(error);
}

int Execute(char** program) {
  const ProgramLookup lookup = FindProgram(program[0]);
  if (lookup.path.empty()) return Fail(program[0], lookup.error);
  if (const auto reason = WhyNotPreloadable(lookup.path)) {
    Print(absl::StrCat("warning: ", lookup.path, " ", *reason, ": it runs without Freehold"));
  }
  execvp(lookup.path.c_str(), program);
  return Fail(program[0], errno);
}

}  // namespace

int Run(int count, char** arguments) {
  CommandLine line;
  if (const auto wrong = ParseArguments(count, arguments, line)) return Usage(*wrong);
  if (line.help) return PrintHelp();
  CleanEnvironment();
  for (const Setting& setting : line.settings)
    setenv(setting.variable.c_str(), setting.value.c_str(), 1);
  std::vector<std::string> libraries;
  // In front: its malloc is the one that programs bind to, and its own memory comes from the shim's mmap.
  if (WantsMimalloc()) {
    const auto mimalloc = FindMimalloc();
    if (!mimalloc) return kCannotRun;
    libraries.push_back(*mimalloc);
  }
  const auto library = FindLibrary();
  if (!library) return kCannotRun;
  libraries.push_back(*library);
  for (const std::string& path : libraries) {
    if (path.find_first_of(" :") == std::string::npos) continue;
    Print(absl::StrCat(path, ": a path with a space or a colon cannot be preloaded"));
    return kCannotRun;
  }
  Preload(libraries);
  return Execute(line.program);
}

}  // namespace freehold::cli
