#include "runtime/config.h"

#include <fcntl.h>
#include <sys/auxv.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include "vm/os/raw_syscall.h"

namespace freehold::runtime {
namespace {

using vm::sync::LockPolicy;

constexpr std::string_view kPrefix = "FREEHOLD_";
// No name in the table is longer; of longer ones that are not in it, the beginning is compared.
constexpr std::size_t kMaxName = 31;

constexpr std::string_view kMallocChoices[] = {"freehold", "libc", "mimalloc"};
constexpr std::string_view kStacksChoices[] = {"freehold", "libc"};
constexpr std::string_view kLockPolicies[] = {"coarse", "tree", "adaptive"};
static_assert(static_cast<int>(MallocChoice::kLibc) == 1 && static_cast<int>(MallocChoice::kMimalloc) == 2 &&
              static_cast<int>(StacksChoice::kLibc) == 1 &&
              static_cast<int>(LockPolicy::kCoarse) == 0 &&
              static_cast<int>(LockPolicy::kTree) == 1 &&
              static_cast<int>(LockPolicy::kAdaptive) == 2);

constexpr std::uint64_t kMillisecond = vm::Milliseconds(1).value;

// Field access for the table: the member pointer is a template argument, so that a row needs one
// name.
template <auto field>
void Store(Config& config, std::uint64_t value) {
  using Field = std::remove_reference_t<decltype(config.*field)>;
  if constexpr (std::is_same_v<Field, vm::Bytes>) {
    config.*field = vm::Bytes{value};
  } else if constexpr (std::is_same_v<Field, vm::Nanoseconds>) {
    config.*field = vm::Milliseconds(value);
  } else {
    config.*field = static_cast<Field>(value);
  }
}

template <auto field>
std::uint64_t Load(const Config& config) {
  using Field = std::remove_cvref_t<decltype(config.*field)>;
  if constexpr (std::is_same_v<Field, vm::Bytes>) {
    return (config.*field).value;
  } else if constexpr (std::is_same_v<Field, vm::Nanoseconds>) {
    return (config.*field).value / kMillisecond;
  } else {
    return static_cast<std::uint64_t>(config.*field);
  }
}

constexpr Option kOptions[] = {
    {.name = "malloc",
     .type = OptionType::kChoice,
     .help = "who serves malloc and operator new; mimalloc gets its memory from mmap, so from Freehold",
     .choices = kMallocChoices,
     .store = Store<&Config::malloc>,
     .load = Load<&Config::malloc>},
    {.name = "mmap",
     .type = OptionType::kSwitch,
     .help = "serve mmap, munmap, mprotect and their family; off: they are the kernel's",
     .store = Store<&Config::mmap>,
     .load = Load<&Config::mmap>},
    {.name = "stacks",
     .type = OptionType::kChoice,
     .help = "where the stacks of new threads come from",
     .choices = kStacksChoices,
     .store = Store<&Config::stacks>,
     .load = Load<&Config::stacks>},
    {.name = "overflow-report",
     .type = OptionType::kSwitch,
     .help = "say which thread overflowed its stack, unless the program handles SIGSEGV itself",
     .store = Store<&Config::overflow_report>,
     .load = Load<&Config::overflow_report>},
    {.name = "reserve",
     .type = OptionType::kBytes,
     .help = "address space to reserve; costs no memory; halved until the system grants it",
     .least = vm::MiB(64).value,
     .most = vm::TiB(64).value,
     .store = Store<&Config::reserve>,
     .load = Load<&Config::reserve>},
    {.name = "decay-ms",
     .type = OptionType::kMilliseconds,
     .help = "how long freed memory stays resident for re-use before it goes back to the system",
     .least = 0,
     .most = 3'600'000,
     .store = Store<&Config::decay>,
     .load = Load<&Config::decay>},
    {.name = "free-resident-limit",
     .type = OptionType::kBytes,
     .help = "freed memory that stays resident at most, per region of the address space",
     .least = 0,
     .most = vm::TiB(64).value,
     .store = Store<&Config::free_resident_limit>,
     .load = Load<&Config::free_resident_limit>},
    {.name = "window-limit",
     .type = OptionType::kBytes,
     .help = "parts of files, mapped by mmap to be read, that stay mapped for re-use at most, per region; 0: files are "
             "the kernel's",
     .least = 0,
     .most = vm::TiB(64).value,
     .store = Store<&Config::window_limit>,
     .load = Load<&Config::window_limit>},
    {.name = "soft-limit",
     .type = OptionType::kBytes,
     .help = "memory above which what is free goes back to the system at once; 0: none; cgroup: seven eighths of the "
             "control group's memory.high or memory.max",
     .least = 0,
     .most = vm::TiB(64).value,
     .word = "cgroup",
     .store = Store<&Config::soft_limit>,
     .load = Load<&Config::soft_limit>},
    {.name = "hard-limit",
     .type = OptionType::kBytes,
     .help = "memory above which malloc and mmap fail with ENOMEM; 0: none; cgroup: fifteen sixteenths of the control "
             "group's memory.max",
     .least = 0,
     .most = vm::TiB(64).value,
     .word = "cgroup",
     .store = Store<&Config::hard_limit>,
     .load = Load<&Config::hard_limit>},
    {.name = "heap-huge-pages",
     .type = OptionType::kSwitch,
     .help = "make huge pages of the parts of malloc's memory that stay in use as a whole, 2 MiB at a time (Linux 6.1)",
     .store = Store<&Config::heap_huge_pages>,
     .load = Load<&Config::heap_huge_pages>},
    {.name = "zero-on-free",
     .type = OptionType::kSwitch,
     .help = "zero what is freed to malloc; slower",
     .store = Store<&Config::zero_on_free>,
     .load = Load<&Config::zero_on_free>},
    {.name = "random-placement",
     .type = OptionType::kSwitch,
     .help = "hand out malloc's objects in no order; slower",
     .store = Store<&Config::random_placement>,
     .load = Load<&Config::random_placement>},
    {.name = "quarantine",
     .type = OptionType::kBytes,
     .help = "freed objects that each thread holds back from re-use at most, and in which writes are found; slower; 0: "
             "none",
     .least = 0,
     .most = vm::GiB(1).value,
     .store = Store<&Config::quarantine>,
     .load = Load<&Config::quarantine>},
    {.name = "guard-pages",
     .type = OptionType::kBytes,
     .help = "put an object of malloc between inaccessible pages every so many bytes on average, and report accesses "
             "beyond it or after its free; 1: every object, while there are slots; 0: none",
     .least = 0,
     .most = vm::TiB(1).value,
     .store = Store<&Config::guard_pages>,
     .load = Load<&Config::guard_pages>},
    {.name = "guard-slots",
     .type = OptionType::kNumber,
     .help = "objects between inaccessible pages at most, those included that were freed and still trap",
     .least = 1,
     .most = 16384,
     .store = Store<&Config::guard_slots>,
     .load = Load<&Config::guard_slots>},
    {.name = "keeper",
     .type = OptionType::kSwitch,
     .help = "a thread that gives freed memory back while the program idles; off: only the "
             "program's own "
             "allocations do",
     .store = Store<&Config::keeper>,
     .load = Load<&Config::keeper>},
    {.name = "lock-policy",
     .type = OptionType::kChoice,
     .help = "range locks of the address space; coarse is the kernel's model, for comparison",
     .choices = kLockPolicies,
     .store = Store<&Config::lock_policy>,
     .load = Load<&Config::lock_policy>},
    {.name = "strict-unmap",
     .type = OptionType::kSwitch,
     .help = "unmapped memory traps at once instead of staying resident; for debugging, slow",
     .store = Store<&Config::strict_unmap>,
     .load = Load<&Config::strict_unmap>},
    {.name = "telemetry",
     .type = OptionType::kSwitch,
     .help = "let `freehold stat`, maps, top and report look inside; costs one mapping of 16 KiB",
     .store = Store<&Config::telemetry>,
     .load = Load<&Config::telemetry>},
    {.name = "record-range-locks",
     .type = OptionType::kSwitch,
     .help = "time every wait for and hold of a range lock, for `freehold stat` and report; slows them",
     .store = Store<&Config::record_range_locks>,
     .load = Load<&Config::record_range_locks>},
    {.name = "heap-profile",
     .type = OptionType::kPath,
     .help = "sample allocations, and write the heap profile to PATH.<process>.<number>.heap when the process exits",
     .path = &Config::heap_profile},
    {.name = "heap-profile-interval",
     .type = OptionType::kBytes,
     .help = "a sample every so many bytes on average; 1: every object; 0: 512K, if another option asks for samples",
     .least = 0,
     .most = vm::TiB(1).value,
     .store = Store<&Config::heap_profile_interval>,
     .load = Load<&Config::heap_profile_interval>},
    {.name = "heap-profile-signal",
     .type = OptionType::kNumber,
     .help = "sample allocations, and write the heap profile whenever this signal comes; 0: none",
     .least = 0,
     .most = 64,
     .store = Store<&Config::heap_profile_signal>,
     .load = Load<&Config::heap_profile_signal>},
    {.name = "leak-report",
     .type = OptionType::kSwitch,
     .help = "sample allocations, and print what is still allocated, and by whom, when the process exits",
     .store = Store<&Config::leak_report>,
     .load = Load<&Config::leak_report>},
    {.name = "stats-at-exit",
     .type = OptionType::kSwitch,
     .help = "print malloc_stats() when the process exits",
     .store = Store<&Config::stats_at_exit>,
     .load = Load<&Config::stats_at_exit>},
    {.name = "verbose",
     .type = OptionType::kSwitch,
     .help = "print what the runtime decided at its start",
     .store = Store<&Config::verbose>,
     .load = Load<&Config::verbose>},
    {.name = "mimalloc",
     .type = OptionType::kPath,
     .help = "the libmimalloc.so to preload for --malloc=mimalloc, instead of the system's"},
    {.name = "library",
     .type = OptionType::kPath,
     .help = "the libfreehold.so to preload, instead of the one that belongs to this program"},
};

static_assert(std::all_of(std::begin(kOptions), std::end(kOptions),
                          [](const Option& option) { return option.name.size() <= kMaxName; }));

constexpr char Lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }
constexpr char Canonical(char c) { return c == '_' ? '-' : Lower(c); }

bool EqualNames(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](char x, char y) { return Canonical(x) == Canonical(y); });
}

bool EqualIgnoringCase(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](char x, char y) { return Lower(x) == Lower(y); });
}

// At most the first `count` letters. Unlike substr(), which starts_with() calls, it cannot throw:
// so it needs nothing of libstdc++.
std::string_view First(std::string_view text, std::size_t count) {
  return {text.data(), std::min(text.size(), count)};
}

// What it costs to turn what somebody wrote into `name`: people abbreviate more often than they
// mistype, so a missing letter costs less than a wrong one.
std::size_t Dissimilarity(std::string_view written, std::string_view name) {
  constexpr std::size_t kMissing = 1;
  constexpr std::size_t kWrong = 3;
  written = First(written, kMaxName);
  std::size_t row[kMaxName + 1];
  for (std::size_t j = 0; j <= name.size(); ++j) row[j] = j * kMissing;
  for (std::size_t i = 1; i <= written.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i * kWrong;
    for (std::size_t j = 1; j <= name.size(); ++j) {
      const std::size_t replaced =
          diagonal + (Canonical(written[i - 1]) != Canonical(name[j - 1]) ? kWrong : 0);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + kWrong, row[j - 1] + kMissing});
    }
  }
  return row[name.size()];
}

const Option* MostSimilar(std::string_view name) {
  return std::min_element(std::begin(kOptions), std::end(kOptions),
                          [&](const Option& a, const Option& b) {
                            return Dissimilarity(name, a.name) < Dissimilarity(name, b.name);
                          });
}

// Splits the digits off the front of `text`. False if there are none or the number is too large.
bool ConsumeNumber(std::string_view& text, std::uint64_t& number) {
  std::size_t digits = 0;
  number = 0;
  for (; digits < text.size() && text[digits] >= '0' && text[digits] <= '9'; ++digits) {
    const auto digit = static_cast<std::uint64_t>(text[digits] - '0');
    if (__builtin_mul_overflow(number, std::uint64_t{10}, &number) ||
        __builtin_add_overflow(number, digit, &number)) {
      return false;
    }
  }
  text.remove_prefix(digits);
  return digits > 0;
}

bool ParseBytes(std::string_view text, std::uint64_t& value) {
  if (!ConsumeNumber(text, value)) return false;
  if (text.empty()) return true;
  const std::size_t unit = std::string_view("kmgt").find(Lower(text[0]));
  if (unit == std::string_view::npos) return false;
  text.remove_prefix(1);
  if (!text.empty() && !EqualIgnoringCase(text, "ib")) return false;
  return !__builtin_mul_overflow(value, std::uint64_t{1} << (10 * (unit + 1)), &value);
}

bool ParseMilliseconds(std::string_view text, std::uint64_t& value) {
  if (!ConsumeNumber(text, value)) return false;
  if (text.empty() || EqualIgnoringCase(text, "ms")) return true;
  return EqualIgnoringCase(text, "s") &&
         !__builtin_mul_overflow(value, std::uint64_t{1000}, &value);
}

bool ParseSwitch(std::string_view text, std::uint64_t& value) {
  for (std::string_view off : {"0", "off", "false", "no"}) {
    if (EqualIgnoringCase(text, off)) return value = 0, true;
  }
  for (std::string_view on : {"1", "on", "true", "yes"}) {
    if (EqualIgnoringCase(text, on)) return value = 1, true;
  }
  return false;
}

bool ParseChoice(const Option& option, std::string_view text, std::uint64_t& value) {
  for (value = 0; value < option.choices.size(); ++value) {
    if (EqualIgnoringCase(text, option.choices[value])) return true;
  }
  return false;
}

bool InRange(const Option& option, std::uint64_t value) {
  return option.least <= value && value <= option.most;
}

bool ParseValue(const Option& option, std::string_view text, std::uint64_t& value) {
  switch (option.type) {
    case OptionType::kBytes:
      if (!option.word.empty() && EqualIgnoringCase(text, option.word)) return value = kCgroupLimit.value, true;
      return ParseBytes(text, value) && InRange(option, value);
    case OptionType::kMilliseconds:
      return ParseMilliseconds(text, value) && InRange(option, value);
    case OptionType::kSwitch:
      return ParseSwitch(text, value);
    case OptionType::kChoice:
      return ParseChoice(option, text, value);
    case OptionType::kNumber:
      return ConsumeNumber(text, value) && text.empty() && InRange(option, value);
    case OptionType::kPath:
      return !text.empty() && (option.path == nullptr || text.size() <= PathText::kMaxLength);
  }
  return false;
}

void AppendName(std::string_view name, Spelling spelling, Message& message) {
  message.Append(spelling == Spelling::kFlag ? "--" : kPrefix);
  for (const char c : name) {
    const bool letter = c >= 'a' && c <= 'z';
    if (spelling == Spelling::kFlag) {
      message.Append(c);
    } else {
      message.Append(letter ? static_cast<char>(c - 'a' + 'A') : c == '-' ? '_' : c);
    }
  }
}

// Splits a file in the format of /proc/PID/environ into variables. Only the beginning of a longer
// one is kept: no valid setting is that long.
class VariableSplitter {
 public:
  VariableSplitter(Config& config, ProblemSink sink) : config_(config), sink_(sink) {}

  void Feed(std::string_view text) {
    for (const char c : text) {
      if (c == '\0') {
        Finish();
      } else if (size_ < sizeof(variable_)) {
        variable_[size_++] = c;
      }
    }
  }
  void Finish() {
    ApplyVariable({variable_, size_}, config_, sink_);
    size_ = 0;
  }

 private:
  Config& config_;
  ProblemSink sink_;
  std::size_t size_ = 0;
  char variable_[512];
};

void Report(const Problem& problem) {
  Message message;
  AppendProblem(problem, Spelling::kVariable, message);
  message.Report();
}

}  // namespace

absl::Span<const Option> Options() { return kOptions; }

const Option* FindOption(std::string_view name) {
  const auto* option = std::find_if(std::begin(kOptions), std::end(kOptions),
                                    [&](const Option& o) { return EqualNames(o.name, name); });
  return option == std::end(kOptions) ? nullptr : option;
}

void AppendVariable(const Option& option, Message& message) {
  AppendName(option.name, Spelling::kVariable, message);
}

void AppendValue(const Option& option, const Config& config, Message& message) {
  if (option.load == nullptr) return;
  const std::uint64_t value = option.load(config);
  switch (option.type) {
    case OptionType::kBytes:
      if (!option.word.empty() && value == kCgroupLimit.value) {
        message.Append(option.word);
      } else {
        message.AppendBytes(vm::Bytes{value});
      }
      return;
    case OptionType::kMilliseconds:
    case OptionType::kNumber:
      message.AppendNumber(value);
      return;
    case OptionType::kSwitch:
      message.Append(value != 0 ? "on" : "off");
      return;
    case OptionType::kChoice:
      message.Append(option.choices[value]);
      return;
    case OptionType::kPath:
      return;
  }
}

void AppendAcceptedForm(const Option& option, Message& message) {
  switch (option.type) {
    case OptionType::kBytes:
      message.Append("a size such as 64M or 16T, from ").AppendBytes({option.least});
      message.Append(" to ").AppendBytes({option.most});
      if (!option.word.empty()) message.Append(", or ").Append(option.word);
      return;
    case OptionType::kMilliseconds:
      message.Append("a time such as 250 (milliseconds) or 3s, from ").AppendNumber(option.least);
      message.Append(" to ").AppendNumber(option.most);
      return;
    case OptionType::kSwitch:
      message.Append("on or off");
      return;
    case OptionType::kChoice:
      for (std::size_t i = 0; i < option.choices.size(); ++i) {
        message.Append(i == 0 ? "" : " or ").Append(option.choices[i]);
      }
      return;
    case OptionType::kNumber:
      message.Append("a number from ").AppendNumber(option.least).Append(" to ").AppendNumber(option.most);
      return;
    case OptionType::kPath:
      message.Append("a path");
      if (option.path != nullptr) message.Append(" of at most ").AppendNumber(PathText::kMaxLength).Append(" letters");
      return;
  }
}

std::string_view ValueName(const Option& option) {
  switch (option.type) {
    case OptionType::kBytes:
      return "SIZE";
    case OptionType::kMilliseconds:
      return "MS";
    case OptionType::kSwitch:
      return "on|off";
    case OptionType::kChoice:
      return "NAME";
    case OptionType::kNumber:
      return "NUMBER";
    case OptionType::kPath:
      return "PATH";
  }
  return "VALUE";
}

void AppendProblem(const Problem& problem, Spelling spelling, Message& message) {
  if (problem.kind == Problem::Kind::kUnknownName) {
    message.Append(spelling == Spelling::kFlag ? "unknown option " : "unknown variable ");
    AppendName(problem.name, spelling, message);
    message.Append(spelling == Spelling::kFlag ? "; did you mean " : " is ignored; did you mean ");
    AppendName(problem.option->name, spelling, message);
    message.Append("?");
    return;
  }
  AppendName(problem.option->name, spelling, message);
  message.Append("=").Append(problem.value).Append(" is not ");
  AppendAcceptedForm(*problem.option, message);
  if (spelling == Spelling::kVariable) message.Append("; it is ignored");
}

bool SetOption(std::string_view name, std::string_view value, Config& config, ProblemSink sink) {
  const Option* option = FindOption(name);
  if (option == nullptr) {
    sink({Problem::Kind::kUnknownName, name, value, MostSimilar(name)});
    return false;
  }
  std::uint64_t number = 0;
  if (!ParseValue(*option, value, number)) {
    sink({Problem::Kind::kBadValue, option->name, value, option});
    return false;
  }
  if (option->store != nullptr) option->store(config, number);
  if (option->path != nullptr) config.*option->path = PathText(value);
  return true;
}

void ApplyVariable(std::string_view variable, Config& config, ProblemSink sink) {
  if (First(variable, kPrefix.size()) != kPrefix) return;
  variable.remove_prefix(kPrefix.size());
  const std::size_t equals = variable.find('=');
  if (equals == std::string_view::npos) return;
  const std::string_view name = First(variable, equals);
  variable.remove_prefix(equals + 1);
  SetOption(name, variable, config, sink);
}

void ApplyEnvironment(const char* const* environment, Config& config, ProblemSink sink) {
  for (; *environment != nullptr; ++environment) ApplyVariable(*environment, config, sink);
}

bool ApplyEnvironmentFile(const char* path, Config& config, ProblemSink sink) {
  const long fd = vm::os::RawSyscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
  if (vm::os::SyscallFailed(fd)) return false;
  VariableSplitter splitter(config, sink);
  char chunk[512];
  for (;;) {
    const long count = vm::os::RawSyscall(SYS_read, fd, chunk, sizeof(chunk));
    if (count == -EINTR) continue;
    if (count <= 0) break;
    splitter.Feed({chunk, static_cast<std::size_t>(count)});
  }
  splitter.Finish();
  vm::os::RawSyscall(SYS_close, fd);
  return true;
}

Config LoadConfig(const char* const* environment) {
  Config config = &program_config != nullptr ? program_config : Config{};
  if (getauxval(AT_SECURE) != 0) return config;
  if (environment != nullptr) {
    ApplyEnvironment(environment, config, Report);
  } else {
    ApplyEnvironmentFile("/proc/self/environ", config, Report);
  }
  return config;
}

}  // namespace freehold::runtime
