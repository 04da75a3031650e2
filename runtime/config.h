// The settings of the process runtime. One table (`Options()`) drives the environment variables
// that the runtime reads, the flags of `freehold run` and the fields of `Config`; help texts and
// error messages come from it too.
//
// The runtime reads its settings inside the process's first malloc, which may come from the dynamic
// linker, before libc is initialized. So nothing here allocates, calls libc beyond string
// functions, or has a constructor.
//
// Thread safety: everything is a value or a constant.
#ifndef FREEHOLD_RUNTIME_CONFIG_H_
#define FREEHOLD_RUNTIME_CONFIG_H_

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "runtime/message.h"
#include "vm/sync/range_lock.h"
#include "vm/units.h"

namespace freehold::runtime {

// A limit that the runtime derives at its start (cgroup.h).
inline constexpr vm::Bytes kCgroupLimit = {SIZE_MAX};

enum class MallocChoice : std::uint8_t { kFreehold, kLibc, kMimalloc };
// A path, or the beginning of one, as it was written.
class PathText {
 public:
  static constexpr std::size_t kMaxLength = 255;

  constexpr PathText() = default;
  // REQUIRES: at most kMaxLength letters.
  constexpr PathText(std::string_view text) {  // NOLINT: a path is text
    for (std::size_t i = 0; i < text.size(); ++i) text_[i] = text[i];
  }
  constexpr std::string_view text() const { return text_; }
  constexpr bool empty() const { return text_[0] == '\0'; }
  friend bool operator==(const PathText&, const PathText&) = default;

 private:
  char text_[kMaxLength + 1] = {};
};

enum class StacksChoice : std::uint8_t { kFreehold, kLibc };

struct Config {
  // Address space to reserve. Halved until the kernel grants it; capped by RLIMIT_AS (runtime.h).
  vm::Bytes reserve = vm::TiB(16);
  // kLibc: every call goes to libc's own malloc. kMimalloc: the same, behind a libmimalloc.so that is preloaded in
  // front of this library, as `freehold run` does, and is then not called.
  MallocChoice malloc = MallocChoice::kFreehold;
  // Whether the mmap family is served too (preloaded only). Without it, and with another malloc, nothing is reserved.
  bool mmap = true;
  // Where the stacks of new threads come from (thread_stacks.h). kLibc where neither malloc nor mmap has a space.
  StacksChoice stacks = StacksChoice::kFreehold;
  // Say which thread overflowed its stack (stack_overflow.h).
  bool overflow_report = true;
  // See vm::AddressSpaceOptions for these five.
  vm::sync::LockPolicy lock_policy = vm::sync::LockPolicy::kAdaptive;
  bool strict_unmap = false;
  vm::Bytes free_resident_limit = vm::MiB(256);
  vm::Bytes window_limit = vm::MiB(256);
  vm::Nanoseconds decay = vm::Milliseconds(1000);
  // See ProcessMemoryLimit: 0 for none, kCgroupLimit for what the process's control groups leave.
  vm::Bytes soft_limit = {0};
  vm::Bytes hard_limit = {0};
  // See allocator::ObjectHeapOptions::huge_pages.
  bool heap_huge_pages = false;
  // See HardeningOptions for these three.
  bool zero_on_free = false;
  bool random_placement = false;
  vm::Bytes quarantine = {0};
  // See allocator::GuardOptions for these two: the interval, and the slots.
  vm::Bytes guard_pages = {0};
  std::uint32_t guard_slots = 1024;
  // Whether a thread may be started that gives freed memory back while the program idles
  // (keeper.h).
  bool keeper = true;
  // Lets `freehold stat`, maps, top and report look inside (telemetry.h).
  bool telemetry = true;
  // See vm::AddressSpaceOptions: how long range locks are waited for and held, for those.
  bool record_range_locks = false;
  // The heap profile (heap_profile_file.h): PREFIX.<process>.<number>.heap; empty: none is written at the end. A sample
  // every so many bytes; 0: as one of the others asks for a profile. The signal that asks for one; 0: none. Whether what
  // is allocated is reported when the process exits.
  PathText heap_profile = {};
  vm::Bytes heap_profile_interval = {0};
  std::uint8_t heap_profile_signal = 0;
  bool leak_report = false;
  // Print malloc_stats() to standard error when the process exits.
  bool stats_at_exit = false;
  // Print what the runtime decided at its start.
  bool verbose = false;

  friend bool operator==(const Config&, const Config&) = default;
};

// A program that links the runtime may define this to have defaults of its own; the environment
// overrides them. It must be constant-initialized: it is read before constructors run.
//
//   extern constinit const freehold::runtime::Config freehold::runtime::program_config = {.decay =
//   ...};
extern const Config program_config __attribute__((weak));

enum class OptionType : std::uint8_t {
  kBytes,         // 4096, 64K, 1536M, 16T; also KiB, MiB, ...
  kSwitch,        // 1/0, on/off, true/false, yes/no
  kMilliseconds,  // 250, 250ms, 3s
  kChoice,        // one of `choices`
  kNumber,
  kPath,          // any text but the empty one
};

// One row of the table.
struct Option {
  std::string_view name;  // "decay-ms": the flag --decay-ms and the variable FREEHOLD_DECAY_MS
  OptionType type;
  std::string_view help;
  // The accepted values of kBytes (in bytes), kMilliseconds and kNumber, inclusive.
  std::uint64_t least = 0;
  std::uint64_t most = 0;
  // kChoice: the names of the enumeration's values 0, 1, ...
  absl::Span<const std::string_view> choices = {};
  // kBytes: a word that is accepted instead of a size, and stored as kCgroupLimit.
  std::string_view word = {};
  // Access to the field, as a number: bytes, 0 or 1, milliseconds, the enumeration's value. Null
  // for an option that `freehold run` itself reads; the runtime accepts its variable and does
  // nothing.
  void (*store)(Config& config, std::uint64_t value) = nullptr;
  std::uint64_t (*load)(const Config& config) = nullptr;
  // kPath, with PathText::kMaxLength letters at most: access to the field.
  PathText Config::*path = nullptr;
};

absl::Span<const Option> Options();

// By the name in the table; null when there is none.
const Option* FindOption(std::string_view name);

// "FREEHOLD_DECAY_MS"; "250"; "a size such as 64M or 16T, from 64M to 64T"; "SIZE".
void AppendVariable(const Option& option, Message& message);
void AppendValue(const Option& option, const Config& config, Message& message);
void AppendAcceptedForm(const Option& option, Message& message);
std::string_view ValueName(const Option& option);

// Something in flags or the environment that has no effect.
struct Problem {
  enum class Kind : std::uint8_t { kUnknownName, kBadValue };
  Kind kind;
  std::string_view name;  // as in the table, for known names
  std::string_view value;
  const Option* option;  // the one with the bad value; for an unknown name, the most similar one
};

enum class Spelling : bool { kVariable, kFlag };

// "unknown variable FREEHOLD_DECAY is ignored; did you mean FREEHOLD_DECAY_MS?";
// "FREEHOLD_DECAY_MS=soon is not a time in milliseconds ...; 1000 is used".
void AppendProblem(const Problem& problem, Spelling spelling, Message& message);

using ProblemSink = absl::FunctionRef<void(const Problem&)>;

// Sets the option `name` to `value`, or passes one problem to `sink`, changes nothing and returns
// false. `name` in either spelling, without dashes in front or "FREEHOLD_": "decay-ms", "DECAY_MS".
bool SetOption(std::string_view name, std::string_view value, Config& config, ProblemSink sink);

// Applies one "NAME=value" of an environment if its name begins with "FREEHOLD_".
void ApplyVariable(std::string_view variable, Config& config, ProblemSink sink);

// Applies an environment block: pointers to "NAME=value", the last one null.
void ApplyEnvironment(const char* const* environment, Config& config, ProblemSink sink);

// Applies what is in a file in the format of /proc/PID/environ. Returns false if it cannot be
// opened.
bool ApplyEnvironmentFile(const char* path, Config& config, ProblemSink sink);

// The settings of this process: defaults (or program_config), then the environment; problems are
// printed to standard error. `environment` is the block if the caller knows it, else null. A
// process that runs with more privilege than its caller (AT_SECURE) ignores the environment, which
// is the caller's.
Config LoadConfig(const char* const* environment);

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_CONFIG_H_
