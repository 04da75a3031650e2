// `bazel run //:install`: what it puts where, that programs can be built with it, and what it refuses.
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "runtime/config.h"
#include "runtime/message.h"
#include "runtime/version.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::StartsWith;

namespace fs = std::filesystem;

std::string ReadFile(const fs::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

class Directory {
 public:
  Directory() {
    char name[] = "/tmp/freehold-install-test-XXXXXX";
    if (mkdtemp(name) == nullptr) std::abort();
    path_ = name;
  }
  ~Directory() { fs::remove_all(path_); }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

Outcome Install(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), BuiltFile("runtime/install/install"));
  return RunProgram({.argv = std::move(arguments)});
}

Outcome Shell(const std::string& command) { return RunProgram({.argv = {"sh", "-c", command}}); }

// Every file with its content; a link with where it leads.
std::set<std::pair<std::string, std::string>> FilesIn(const fs::path& directory) {
  std::set<std::pair<std::string, std::string>> files;
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    if (entry.is_directory()) continue;
    files.emplace(entry.path().lexically_relative(directory),
                  entry.is_symlink() ? "-> " + fs::read_symlink(entry.path()).string() : ReadFile(entry.path()));
  }
  return files;
}

std::set<std::string> NamesIn(const fs::path& directory) {
  std::set<std::string> names;
  for (const auto& [name, content] : FilesIn(directory)) names.insert(name);
  return names;
}

// One installation for all tests that look at it.
class InstallTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = new Directory;
    prefix_ = directory_->path() / "opt" / "freehold";
    const Outcome outcome = Install({"--prefix=" + prefix_.string()});
    ASSERT_EQ(outcome.status, 0) << outcome.err;
    EXPECT_EQ(outcome.out,
              std::string("install: Freehold ") + runtime::kVersion + " is in " + prefix_.string() + "\n");
  }
  static void TearDownTestSuite() { delete directory_; }

  // Compiles `source` with what pkg-config says of `package`, and runs it.
  static Outcome CompileAndRun(const std::string& compiler, const std::string& source, const std::string& package,
                               const std::string& more = "") {
    const fs::path file = directory_->path() / (compiler.starts_with("gcc") ? "program.c" : "program.cc");
    const std::string program = directory_->path() / "program";
    std::ofstream(file) << source;
    const Outcome compiled =
        Shell("PKG_CONFIG_PATH=" + (prefix_ / "lib/pkgconfig").string() + "; export PKG_CONFIG_PATH; " + compiler +
              " -Wall -Wextra -Werror -o " + program + " " + file.string() + " $(pkg-config --cflags --libs " +
              package + ") " + more);
    EXPECT_EQ(compiled.status, 0) << compiled.err;
    EXPECT_EQ(compiled.err, "");
    return RunProgram({.argv = {program},
                       .environment = {{"LD_LIBRARY_PATH", prefix_ / "lib"}, {"FREEHOLD_RESERVE", "1G"}}});
  }

  static Directory* directory_;
  static fs::path prefix_;
};

Directory* InstallTest::directory_ = nullptr;
fs::path InstallTest::prefix_;

constexpr char kCProgram[] = R"(
#include <freehold.h>
#include <stdio.h>
#include <stdlib.h>
int main(void) {
  freehold_space* space = freehold_process_space();
  freehold_map_options options = {.size = sizeof(options), .populate = 1};
  void* memory = NULL;
  void* object = malloc(100000);
  if (space == NULL || !freehold_space_contains(space, object)) return 1;
  if (freehold_map(space, 1 << 20, &options, &memory) != 0) return 2;
  ((char*)memory)[5] = 'x';
  if (freehold_unmap(space, memory, 1 << 20) != 0) return 3;
  free(object);
  puts(freehold_version());
  return 0;
})";

constexpr char kCxxProgram[] = R"(
#include <cstdio>
#include <memory>
#include <string>
#include "freehold.h"
int main() {
  const auto object = std::make_unique<std::string>(5000, 'x');
  if (!freehold_space_contains(freehold_process_space(), object.get())) return 1;
  std::puts(freehold_version());
})";

// What README.md shows, and a pager.
constexpr char kCxxApiProgram[] = R"(
#include <cstdio>
#include "vm/address_space.h"
#include "vm/fault.h"
#include "vm/os/linux_kernel.h"
#include "vm/os/userfault.h"
#include "vm/pagers/zero_pager.h"
#include "vm/pin.h"
#include "runtime/config.h"

namespace vm = freehold::vm;

extern constinit const freehold::runtime::Config freehold::runtime::program_config = {.reserve = vm::GiB(1)};

int main() {
  static constinit vm::os::LinuxKernel kernel;
  const vm::Result<vm::AddressSpace*> space =
      vm::AddressSpace::Create(kernel, {.reserve = vm::GiB(1), .min_reserve = vm::MiB(64)});
  if (!space.ok()) return 1;
  const auto buffer = (*space)->Map(vm::PagesFor(vm::MiB(4)), {.populate = true});
  if (!buffer.ok()) return 2;
  buffer->address()[0] = std::byte{1};
  {
    const vm::Pin pin(**space, *buffer);
    if (!pin.ok()) return 3;
  }
  if (!(*space)->Unmap(*buffer).ok()) return 4;
  {
    vm::ZeroPager zeroes;
    vm::os::LinuxUserfault userfault;
    vm::FaultService faults(**space, userfault);
    if (!faults.Start().ok()) return 5;
    const auto paged = faults.MapPager(zeroes, 0, {16}, {.when_unavailable = vm::WhenUnavailable::kPopulate});
    if (!paged.ok() || paged->address()[100] != std::byte{0}) return 6;
  }
  vm::AddressSpace::Destroy(*space);
  std::puts("fine");
})";

constexpr char kHeapsProgram[] = R"(
#include <freehold.hpp>
#include <cstdio>
#include <numeric>
#include <vector>
int main() {
  freehold::Heap heap;
  freehold::HeapResource resource(heap);
  std::pmr::vector<int> numbers(&resource);
  std::vector<int, freehold::HeapAllocator<int>> copy{freehold::HeapAllocator<int>(heap)};
  for (int i = 0; i < 1000; ++i) numbers.push_back(i);
  copy.assign(numbers.begin(), numbers.end());
  std::printf("%zu %d\n", copy.size(), std::accumulate(copy.begin(), copy.end(), 0));
})";

TEST_F(InstallTest, Files) {
  const std::string version = runtime::kVersion;
  std::set<std::string> expected = {
      "bin/freehold",
      "include/freehold/freehold.h",
      "include/freehold/freehold.hpp",
      "lib/libfreehold.a",
      "lib/libfreehold.so",
      "lib/libfreehold.so.0",
      "lib/libfreehold.so." + version,
      "lib/pkgconfig/freehold-static.pc",
      "lib/pkgconfig/freehold.pc",
      "share/man/man1/freehold.1",
  };
  std::set<std::string> headers;
  for (const std::string& name : NamesIn(prefix_)) {
    if (name.starts_with("include/freehold/") && !name.starts_with("include/freehold/freehold.h")) {
      headers.insert(name);
    } else {
      EXPECT_EQ(expected.erase(name), 1u) << name;
    }
  }
  EXPECT_THAT(expected, ::testing::IsEmpty());
  EXPECT_TRUE(headers.contains("include/freehold/vm/address_space.h"));
  EXPECT_FALSE(headers.contains("include/freehold/vm/os/fake_kernel.h"));
  EXPECT_EQ(fs::read_symlink(prefix_ / "lib/libfreehold.so"), "libfreehold.so.0");
  EXPECT_EQ(fs::canonical(prefix_ / "lib/libfreehold.so"), fs::canonical(prefix_) / ("lib/libfreehold.so." + version));
}

TEST_F(InstallTest, TheCommandFindsItsLibrary) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const std::string command = prefix_ / "bin/freehold";
  EXPECT_EQ(RunProgram({.argv = {command, "run", "--", "/bin/true"}}).status, 0);
  EXPECT_THAT(RunProgram({.argv = {command, "run", "cat", "/proc/self/maps"}}).out,
              HasSubstr((prefix_ / "lib/libfreehold.so.").string()));
}

TEST_F(InstallTest, ProgramsInC) {
  const std::pair<std::string, std::string> ways[] = {
      {"freehold", ""}, {"--static freehold", "-static"}, {"freehold-static", ""}, {"freehold-static", "-static"}};
  for (const auto& [package, more] : ways) {
    const Outcome outcome = CompileAndRun("gcc-12", kCProgram, package, more);
    EXPECT_EQ(outcome.status, 0) << package << more << outcome.err;
    EXPECT_EQ(outcome.out, std::string(runtime::kVersion) + "\n") << package << more;
  }
}

TEST_F(InstallTest, ProgramsInCxx) {
  const std::pair<std::string, std::string> ways[] = {
      {"freehold", ""}, {"--static freehold", "-static"}, {"freehold-static", ""}};
  for (const auto& [package, more] : ways) {
    const Outcome outcome = CompileAndRun("g++-12 -std=c++20", kCxxProgram, package, more);
    EXPECT_EQ(outcome.status, 0) << package << more << outcome.err;
    EXPECT_EQ(outcome.out, std::string(runtime::kVersion) + "\n") << package << more;
  }
}

TEST_F(InstallTest, HeapsInCxx17) {
  const std::pair<std::string, std::string> ways[] = {{"g++-12 -std=c++17", "freehold"},
                                                      {"clang++-14 -std=c++20", "freehold"},
                                                      {"g++-12 -std=c++17", "freehold-static"}};
  for (const auto& [compiler, package] : ways) {
    const Outcome outcome = CompileAndRun(compiler + " -Wall -Wextra -pedantic -Werror", kHeapsProgram, package);
    EXPECT_EQ(outcome.status, 0) << compiler << package << outcome.err;
    EXPECT_EQ(outcome.out, "1000 499500\n") << compiler << package;
  }
}

TEST_F(InstallTest, TheApiOfCxx) {
  const Outcome outcome = CompileAndRun("g++-12 -std=c++20", kCxxApiProgram, "freehold-static");
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(outcome.out, "fine\n");
}

// As C99 and as C++, with nothing included before.
TEST_F(InstallTest, HeadersStandAlone) {
  std::string all;
  for (const std::string& name : NamesIn(prefix_ / "include/freehold")) all += "#include \"" + name + "\"\n";
  const Outcome cxx = CompileAndRun("g++-12 -std=c++20", all + "int main() {}\n", "freehold-static");
  EXPECT_EQ(cxx.status, 0);
  const Outcome c = CompileAndRun("gcc-12 -std=c99 -pedantic",
                                  "#include \"freehold.h\"\nint main(void) { return 0; }\n", "freehold");
  EXPECT_EQ(c.status, 0);
}

TEST_F(InstallTest, Again) {
  const auto before = FilesIn(prefix_);
  std::ofstream(prefix_ / "lib/other") << "somebody else's";
  const Outcome outcome = Install({"--prefix", prefix_});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(ReadFile(prefix_ / "lib/other"), "somebody else's");
  fs::remove(prefix_ / "lib/other");
  EXPECT_EQ(FilesIn(prefix_), before);
}

TEST_F(InstallTest, BelowAnotherDirectory) {
  const Directory package;
  const Outcome outcome = Install({"--prefix=/usr", "--destdir=" + package.path().string()});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(NamesIn(package.path() / "usr"), NamesIn(prefix_));
  EXPECT_THAT(ReadFile(package.path() / "usr/lib/pkgconfig/freehold.pc"), StartsWith("prefix=/usr\n"));
}

TEST_F(InstallTest, RelativeToWhereItWasGiven) {
  const Directory here;
  const Outcome outcome = RunProgram({.argv = {BuiltFile("runtime/install/install"), "--prefix=a/../b"},
                                      .environment = {{"BUILD_WORKING_DIRECTORY", here.path()}}});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_TRUE(fs::exists(here.path() / "b/bin/freehold"));
  EXPECT_FALSE(fs::exists(here.path() / "a"));
}

TEST_F(InstallTest, WrongArguments) {
  const std::pair<std::vector<std::string>, std::string> cases[] = {
      {{}, "no --prefix=DIR given"},
      {{"--prefix="}, "no --prefix=DIR given"},
      {{"--prefix"}, "--prefix needs a directory"},
      {{"--perfix=/x"}, "unknown argument '--perfix=/x'"},
      {{"/x"}, "unknown argument '/x'"},
      {{"--prefix=/tmp/a b"}, "--prefix=/tmp/a b has a space or a colon"},
      {{"--prefix=/tmp/a:b"}, "--prefix=/tmp/a:b has a space or a colon"},
  };
  for (const auto& [arguments, message] : cases) {
    const Outcome outcome = Install(arguments);
    EXPECT_EQ(outcome.status, 2) << message;
    EXPECT_EQ(outcome.err, "install: " + message + "; see `bazel run //:install -- --help`\n");
  }
  const Outcome help = Install({"--help"});
  EXPECT_EQ(help.status, 0);
  EXPECT_THAT(help.out, HasSubstr("--destdir=DIR"));
}

TEST_F(InstallTest, WhereItCannotWrite) {
  const Directory place;
  std::ofstream(place.path() / "file") << "here";
  const Outcome in_file = Install({"--prefix=" + (place.path() / "file").string()});
  EXPECT_EQ(in_file.status, 1);
  EXPECT_THAT(in_file.err, EndsWith("install: cannot make the directory " + (place.path() / "file").string() + "\n"));
  EXPECT_EQ(ReadFile(place.path() / "file"), "here");

  const Outcome in_proc = Install({"--prefix=/proc/self"});
  EXPECT_EQ(in_proc.status, 1);
  EXPECT_THAT(in_proc.err, EndsWith("install: cannot write to /proc/self\n"));

  // Something in the way of one file: none is installed.
  fs::create_directories(place.path() / "prefix/lib/libfreehold.a");
  const Outcome blocked = Install({"--prefix=" + (place.path() / "prefix").string()});
  EXPECT_EQ(blocked.status, 1);
  EXPECT_THAT(blocked.err, EndsWith("/prefix/lib/libfreehold.a is a directory\n"));
  EXPECT_THAT(NamesIn(place.path() / "prefix"), ::testing::IsEmpty());
}

// ---- the manual page ----

TEST_F(InstallTest, TheManualPageRenders) {
  if (Shell("command -v man").status != 0) GTEST_SKIP() << "no man";
  const Outcome outcome = Shell("man --warnings=w -Tutf8 -l " + (prefix_ / "share/man/man1/freehold.1").string());
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.err, "");
  EXPECT_THAT(outcome.out, HasSubstr("Freehold " + std::string(runtime::kVersion)));
}

std::set<std::string> Matches(const std::string& text, const char* pattern) {
  const std::regex expression(pattern);
  std::set<std::string> found;
  for (std::sregex_iterator match(text.begin(), text.end(), expression), end; match != end; ++match) {
    found.insert((*match)[1]);
  }
  return found;
}

TEST_F(InstallTest, TheManualPageHasTheOptionsThatThereAre) {
  const std::string page =
      std::regex_replace(ReadFile(prefix_ / "share/man/man1/freehold.1"), std::regex("\\\\-"), "-");
  const std::size_t begin = page.find("\n.SH OPTIONS\n");
  ASSERT_NE(begin, page.npos);
  const std::string options = page.substr(begin, page.find("\n.SH ", begin + 1) - begin);

  std::set<std::string> entries;  // "--name VARIABLE default"
  for (std::size_t at = options.find("\n.TP\n"); at != options.npos;) {
    const std::size_t next = options.find("\n.TP\n", at + 1);
    const std::string entry = options.substr(at, next == options.npos ? next : next - at);
    std::smatch name, variable, value;
    ASSERT_TRUE(std::regex_search(entry, name, std::regex("^[^]*?\\.BI?R? (--[a-z-]+)"))) << entry;
    ASSERT_TRUE(std::regex_search(entry, variable, std::regex("\\.B (FREEHOLD_[A-Z_]+)"))) << entry;
    std::regex_search(entry, value, std::regex("Default: ([^.]+)\\."));
    entries.insert(name.str(1) + " " + variable.str(1) + " " + value.str(1));
    at = next;
  }
  std::set<std::string> expected;
  for (const runtime::Option& option : runtime::Options()) {
    runtime::Message text;
    text.Append("--").Append(option.name).Append(' ');
    runtime::AppendVariable(option, text);
    text.Append(' ');
    runtime::AppendValue(option, runtime::Config{}, text);
    expected.emplace(text.text());
  }
  EXPECT_EQ(entries, expected);
}

TEST_F(InstallTest, TheManualPageHasTheCommandsThatThereAre) {
  const std::string help = RunProgram({.argv = {Cli(), "--help"}}).out;
  EXPECT_EQ(Matches(ReadFile(prefix_ / "share/man/man1/freehold.1"), "\n\\.SS freehold ([a-z]+)"),
            Matches(help, "\n  ([a-z]+) "));
}

}  // namespace
}  // namespace freehold::testing
