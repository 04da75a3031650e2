#include "runtime/cli/command.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace freehold::cli {
namespace {

bool Contains(absl::Span<const absl::string_view> list, absl::string_view name) {
  return std::find(list.begin(), list.end(), name) != list.end();
}

}  // namespace

bool CommandLine::Has(absl::string_view name) const {
  return Contains(switches, name) ||
         std::any_of(values.begin(), values.end(), [&](const auto& value) { return value.first == name; });
}

std::string CommandLine::ValueOf(absl::string_view name) const {
  std::string value;
  for (const auto& [option, given] : values) {
    if (option == name) value = given;
  }
  return value;
}

bool ParseCommandLine(const Command& command, int count, char** arguments, CommandLine& line, int& status) {
  const auto wrong = [&](absl::string_view problem) {
    PrintError(absl::StrCat(problem, "; see `freehold ", command.name, " --help`"));
    status = kUsageError;
    return false;
  };
  for (int i = 0; i < count; ++i) {
    const absl::string_view argument = arguments[i];
    if (argument == "--help" || argument == "-h") {
      std::fputs(std::string(command.help).c_str(), stdout);
      status = 0;
      return false;
    }
    const absl::string_view name = argument.substr(0, argument.find('='));
    if (Contains(command.switches, argument)) {
      line.switches.push_back(argument);
    } else if (Contains(command.with_value, name)) {
      const bool attached = name.size() < argument.size();
      if (!attached && ++i == count) return wrong(absl::StrCat(name, " needs a value"));
      line.values.emplace_back(name, attached ? argument.substr(name.size() + 1) : arguments[i]);
    } else if (argument.size() > 1 && argument[0] == '-') {
      return wrong(absl::StrCat("unknown option '", argument, "'"));
    } else if (line.pid != 0) {
      return wrong(absl::StrCat("one process at a time, not '", argument, "' too"));
    } else if (!absl::SimpleAtoi(argument, &line.pid) || line.pid <= 0) {
      return wrong(absl::StrCat("'", argument, "' is no process id"));
    }
  }
  return line.pid != 0 || wrong("no process id given");
}

void PrintError(absl::string_view what) { std::fputs(absl::StrCat("freehold: ", what, "\n").c_str(), stderr); }

int Fail(const absl::Status& status) {
  PrintError(status.message());
  return kFailed;
}

absl::string_view NameOf(vm::Zone zone) {
  switch (zone) {
    case vm::Zone::kPlain: return "plain";
    case vm::Zone::kDense: return "dense";
    case vm::Zone::kMapping: return "mapping";
  }
  return "unknown";
}

std::string Printable(std::string text) {
  for (char& c : text) {
    if (absl::ascii_iscntrl(static_cast<unsigned char>(c))) c = '?';
  }
  return text;
}

std::string HumanBytes(std::uint64_t bytes) {
  static constexpr absl::string_view kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  std::size_t unit = 0;
  for (; value >= 1024 && unit + 1 < std::size(kUnits); ++unit) value /= 1024;
  return unit == 0 ? absl::StrCat(bytes, " B") : absl::StrFormat("%.1f %s", value, kUnits[unit]);
}

}  // namespace freehold::cli
