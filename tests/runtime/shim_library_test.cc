// The library as a file: what it shows to programs, and what it needs.
#include <set>
#include <sstream>
#include <string>

#include "gtest/gtest.h"
#include "tests/runtime/c_api_names.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

std::string Output(std::vector<std::string> command) {
  const Outcome outcome = RunProgram({.argv = std::move(command)});
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  return outcome.out;
}

// The last words of the lines that contain `mark`.
std::set<std::string> LastWords(const std::string& text, const std::string& mark) {
  std::set<std::string> words;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.find(mark) == std::string::npos) continue;
    words.insert(line.substr(line.rfind(' ') + 1));
  }
  return words;
}

TEST(ShimLibraryTest, NeedsLibcOnly) {
  FREEHOLD_SKIP_WITH_SANITIZER();
  const std::set<std::string> needed =
      LastWords(Output({"readelf", "-d", ShimLibrary()}), "(NEEDED)");
  for (const std::string& library : needed) {
    EXPECT_TRUE(library == "[libc.so.6]" || library == "[ld-linux-x86-64.so.2]" ||
                library == "[ld-linux-aarch64.so.1]")
        << library;
  }
}

TEST(ShimLibraryTest, ShowsWhatItReplacesAndTheCApiOnly) {
  std::set<std::string> expected = {
      "malloc", "calloc", "realloc", "reallocarray", "free", "free_sized", "free_aligned_sized",
      "cfree", "aligned_alloc", "memalign", "posix_memalign", "valloc", "pvalloc",
      "malloc_usable_size", "malloc_trim", "mallinfo", "mallinfo2", "malloc_info", "malloc_stats",
      "mallopt", "__libc_malloc", "__libc_calloc", "__libc_realloc", "__libc_free",
      "__libc_memalign", "__libc_valloc", "__libc_pvalloc", "__posix_memalign",
      "pthread_create", "pthread_join", "pthread_tryjoin_np", "pthread_timedjoin_np",
      "pthread_clockjoin_np", "pthread_detach", "pthread_getattr_np",
      "sigaction", "signal", "__sysv_signal",
      "mmap", "mmap64", "munmap", "mprotect", "pkey_mprotect", "mremap", "madvise", "posix_madvise", "mlock", "mlock2", "munlock",
      "mlockall", "munlockall", "msync", "mincore",
      // operator new and new[]: plain, nothrow, aligned, both
      "_Znwm", "_Znam", "_ZnwmRKSt9nothrow_t", "_ZnamRKSt9nothrow_t", "_ZnwmSt11align_val_t",
      "_ZnamSt11align_val_t", "_ZnwmSt11align_val_tRKSt9nothrow_t",
      "_ZnamSt11align_val_tRKSt9nothrow_t",
      // operator delete and delete[]: plain, nothrow, sized, aligned, sized and aligned, aligned
      // and nothrow
      "_ZdlPv", "_ZdaPv", "_ZdlPvRKSt9nothrow_t", "_ZdaPvRKSt9nothrow_t", "_ZdlPvm", "_ZdaPvm",
      "_ZdlPvSt11align_val_t", "_ZdaPvSt11align_val_t", "_ZdlPvmSt11align_val_t",
      "_ZdaPvmSt11align_val_t", "_ZdlPvSt11align_val_tRKSt9nothrow_t",
      "_ZdaPvSt11align_val_tRKSt9nothrow_t"};
  expected.merge(CApiFunctions());
  EXPECT_EQ(LastWords(Output({"nm", "-D", "--defined-only", ShimLibrary()}), " "), expected);
}

// So that its constructor runs first, and its code is never unloaded under a thread's end.
TEST(ShimLibraryTest, IsInitializedFirstAndStays) {
  const std::string dynamic = Output({"readelf", "-d", ShimLibrary()});
  EXPECT_NE(dynamic.find("INITFIRST"), std::string::npos);
  EXPECT_NE(dynamic.find("NODELETE"), std::string::npos);
  EXPECT_NE(dynamic.find("STATIC_TLS"), std::string::npos);
}

}  // namespace
}  // namespace freehold::testing
