#include "runtime/shim/libc_malloc.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>

#include "runtime/message.h"

namespace freehold::runtime::shim {
namespace {

// What dlsym() of an old libc needs for its error buffer, several times over.
constexpr std::size_t kBootstrapSize = 4096;
constexpr std::size_t kBootstrapAlignment = 64;
alignas(kBootstrapAlignment) constinit char bootstrap[kBootstrapSize] = {};
constinit std::atomic<std::size_t> bootstrap_used{0};

[[noreturn]] void Stop(const char* why) {
  Message().Append(why).Report();
  std::abort();
}

template <typename Function>
bool Find(const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
  return function != nullptr;
}

}  // namespace

constinit LibcMalloc LibcMalloc::instance_ = {};

const LibcMalloc* LibcMalloc::Get() {
  // Acquire pairs with the release below.
  if (instance_.state_.load(std::memory_order_acquire) == State::kKnown) return &instance_;
  State state = State::kUnknown;
  if (!instance_.state_.compare_exchange_strong(state, State::kLookingUp,
                                                std::memory_order_acquire)) {
    return state == State::kKnown ? &instance_ : nullptr;
  }
  if (!instance_.LookUp())
    Stop("there is no malloc of libc to fall back on: the program is linked statically");
  instance_.state_.store(State::kKnown, std::memory_order_release);
  return &instance_;
}

bool LibcMalloc::LookUp() {
  Find("mallinfo2", mallinfo2);
  return Find("malloc", malloc) && Find("calloc", calloc) && Find("realloc", realloc) &&
         Find("memalign", memalign) && Find("free", free) &&
         Find("malloc_usable_size", malloc_usable_size) && Find("malloc_trim", malloc_trim) &&
         Find("mallinfo", mallinfo) && Find("malloc_info", malloc_info) &&
         Find("malloc_stats", malloc_stats) && Find("mallopt", mallopt);
}

void* LibcMalloc::BootstrapAllocate(std::size_t alignment, std::size_t size) {
  std::size_t used = bootstrap_used.load(std::memory_order_relaxed);
  for (;;) {
    const std::size_t start = (used + alignment - 1) & ~(alignment - 1);
    if (alignment > kBootstrapAlignment || start > kBootstrapSize ||
        size > kBootstrapSize - start) {
      Stop("the dynamic linker needs more memory than expected to find libc's malloc");
    }
    if (bootstrap_used.compare_exchange_weak(used, start + size, std::memory_order_relaxed)) {
      return bootstrap + start;
    }
  }
}

bool LibcMalloc::IsBootstrap(const void* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  const auto start = reinterpret_cast<std::uintptr_t>(bootstrap);
  return start <= address && address < start + kBootstrapSize;
}

std::size_t LibcMalloc::BootstrapReadable(const void* p) {
  return static_cast<std::size_t>(bootstrap + kBootstrapSize - static_cast<const char*>(p));
}

}  // namespace freehold::runtime::shim
