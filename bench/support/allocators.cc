#include "bench/support/allocators.h"

#include <dlfcn.h>
#include <time.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

// glibc's malloc by names that only glibc defines; its headers do not declare them.
extern "C" {
void* __libc_malloc(std::size_t size);
void __libc_free(void* object);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* object, std::size_t size);
}

namespace freehold::bench {
namespace {

void Sleep(double seconds) {
  timespec rest = {.tv_sec = static_cast<time_t>(seconds),
                   .tv_nsec = static_cast<long>(
                       (seconds - static_cast<double>(static_cast<time_t>(seconds))) * 1e9)};
  while (nanosleep(&rest, &rest) != 0) {
  }
}

template <typename Function>
bool Find(void* library, const std::string& prefix, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, (prefix + name).c_str()));
  return function != nullptr;
}

// `prefix`: what the library puts before the names of its functions.
const char* Load(Allocator& allocator, const char* path, const char* prefix) {
  // RTLD_LOCAL: the library defines malloc too, and nobody else may be bound to that.
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
  const bool complete = Find(library, prefix, "malloc", allocator.malloc) &&
                        Find(library, prefix, "free", allocator.free) &&
                        Find(library, prefix, "calloc", allocator.calloc) &&
                        Find(library, prefix, "realloc", allocator.realloc);
  return complete ? nullptr : dlerror();
}

constexpr Allocator ToBeLoaded(const char* name, const char* (*load)()) {
  return {.name = name,
          .load = load,
          .malloc = nullptr,
          .free = nullptr,
          .calloc = nullptr,
          .realloc = nullptr,
          .idle = Sleep};
}

}  // namespace

constinit Allocator glibc = {
    .name = "glibc",
    .load = []() -> const char* { return nullptr; },
    .malloc = __libc_malloc,
    .free = __libc_free,
    .calloc = __libc_calloc,
    .realloc = __libc_realloc,
    .idle = Sleep,
};

constinit Allocator mimalloc = ToBeLoaded("mimalloc", [] { return Load(mimalloc, MIMALLOC_LIBRARY, "mi_"); });
constinit Allocator jemalloc = ToBeLoaded("jemalloc", [] { return Load(jemalloc, JEMALLOC_LIBRARY, ""); });
constinit Allocator tcmalloc = ToBeLoaded("tcmalloc", [] { return Load(tcmalloc, TCMALLOC_LIBRARY, "tc_"); });

void MakeRoomForLibraries(char** argv) {
  constexpr const char* kVariable = "GLIBC_TUNABLES";
  constexpr const char* kTunable = "glibc.rtld.optional_static_tls";
  const char* before = std::getenv(kVariable);
  std::string tunables = before == nullptr ? "" : before;
  if (tunables.find(kTunable) != std::string::npos) return;
  if (!tunables.empty()) tunables += ":";
  tunables += std::string(kTunable) + "=16384";
  setenv(kVariable, tunables.c_str(), 1);
  execv("/proc/self/exe", argv);
}

}  // namespace freehold::bench
