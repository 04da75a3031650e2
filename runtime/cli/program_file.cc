#include "runtime/cli/program_file.h"

#include <elf.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace freehold::cli {
namespace {

using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

// As the kernel: the interpreter of a script may be a script, up to four times.
constexpr int kMaxInterpreters = 4;
constexpr char kDefaultPath[] = "/bin:/usr/bin";

bool IsRegularFile(const std::string& path) {
  struct stat status;
  return stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

ProgramLookup CheckFile(const std::string& path) {
  if (!IsRegularFile(path)) return {"", access(path.c_str(), F_OK) == 0 ? EACCES : ENOENT};
  if (access(path.c_str(), X_OK) != 0) return {"", EACCES};
  return {path};
}

// Whether executing the file gives the process privileges that its caller lacks: then the dynamic
// linker runs in secure mode, where it ignores LD_PRELOAD paths.
bool GainsPrivileges(const std::string& path) {
  struct stat status;
  if (stat(path.c_str(), &status) != 0) return false;
  if ((status.st_mode & S_ISUID) != 0 && status.st_uid != getuid()) return true;
  if ((status.st_mode & S_ISGID) != 0 && status.st_gid != getgid()) return true;
  return getuid() != 0 && getxattr(path.c_str(), "security.capability", nullptr, 0) > 0;
}

template <typename Header>
bool ReadAt(std::FILE* file, long offset, Header& header) {
  return std::fseek(file, offset, SEEK_SET) == 0 &&
         std::fread(&header, sizeof(header), 1, file) == 1;
}

// Whether the ELF file asks for a dynamic linker.
bool HasInterpreter(std::FILE* file, const Elf64_Ehdr& header) {
  for (unsigned i = 0; i < header.e_phnum; ++i) {
    Elf64_Phdr segment;
    if (!ReadAt(file, static_cast<long>(header.e_phoff + i * header.e_phentsize), segment))
      return true;
    if (segment.p_type == PT_INTERP) return true;
  }
  return false;
}

// The interpreter of the "#!" line; empty when the file is no script.
std::string ScriptInterpreter(std::FILE* file) {
  char line[256] = {};
  std::rewind(file);
  if (std::fgets(line, sizeof(line), file) == nullptr || std::strncmp(line, "#!", 2) != 0)
    return "";
  const std::vector<std::string> words =
      absl::StrSplit(line + 2, absl::ByAnyChar(" \t\n"), absl::SkipEmpty());
  return words.empty() ? "" : words[0];
}

std::optional<std::string> WhyNotPreloadable(const std::string& path, int interpreters) {
  if (GainsPrivileges(path))
    return "runs with more privileges than its caller (setuid, setgid or capabilities)";
  const File file(std::fopen(path.c_str(), "rbe"), &std::fclose);
  if (file == nullptr) return std::nullopt;
  Elf64_Ehdr header;
  if (!ReadAt(file.get(), 0, header) || std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) {
    const std::string interpreter = ScriptInterpreter(file.get());
    if (interpreter.empty() || interpreters == 0) return std::nullopt;
    return WhyNotPreloadable(interpreter, interpreters - 1);
  }
  if (header.e_ident[EI_CLASS] != ELFCLASS64) return "is not a 64-bit program";
  if (!HasInterpreter(file.get(), header)) return "is statically linked";
  return std::nullopt;
}

}  // namespace

ProgramLookup FindProgram(const std::string& name) {
  if (name.find('/') != std::string::npos) return CheckFile(name);
  const char* path = std::getenv("PATH");
  ProgramLookup result = {"", ENOENT};
  if (name.empty()) return result;
  for (const absl::string_view directory :
       absl::StrSplit(path != nullptr ? path : kDefaultPath, ':')) {
    // An empty element is the current directory.
    ProgramLookup found = CheckFile(absl::StrCat(directory.empty() ? "." : directory, "/", name));
    if (!found.path.empty()) return found;
    if (found.error == EACCES) result.error = EACCES;
  }
  return result;
}

std::optional<std::string> WhyNotPreloadable(const std::string& path) {
  return WhyNotPreloadable(path, kMaxInterpreters);
}

}  // namespace freehold::cli
