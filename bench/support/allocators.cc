#include "bench/support/allocators.h"

#include <dlfcn.h>
#include <time.h>

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
bool Find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

const Allocator kGlibc = {
    .name = "glibc",
    .malloc = __libc_malloc,
    .free = __libc_free,
    .calloc = __libc_calloc,
    .realloc = __libc_realloc,
    .idle = Sleep,
};

constinit Allocator mimalloc = {};

const char* LoadMimalloc() {
  // RTLD_LOCAL: the library defines malloc too, and nobody else may be bound to that.
  void* library = dlopen(MIMALLOC_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
  Allocator found = {.name = "mimalloc",
                     .malloc = nullptr,
                     .free = nullptr,
                     .calloc = nullptr,
                     .realloc = nullptr,
                     .idle = Sleep};
  const bool complete =
      Find(library, "mi_malloc", found.malloc) && Find(library, "mi_free", found.free) &&
      Find(library, "mi_calloc", found.calloc) && Find(library, "mi_realloc", found.realloc);
  if (!complete) return dlerror();
  mimalloc = found;
  return nullptr;
}

}  // namespace freehold::bench
