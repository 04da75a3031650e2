// A program for the heap profile, by its first argument:
//   leak     allocates by Small (holds), Brief (frees), Large (holds), and ends
//   signal   the same, raises SIGUSR2 in between, and once more before it ends
//   handled  handles SIGUSR2 itself
//   fork     a child allocates too; it prints the child's process id
//   threads  four threads allocate and free by turns while profiles are written by signals
//   api      writes the profile by the C API, to the file that the second argument names
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "tests/runtime/programs/require.h"

constexpr int kObjects = 20000;

// Something is left to do after the call, or it would be a jump, and the caller in no stack.
static void* Returned(void* p) {
  asm volatile("" : "+r"(p));
  return p;
}
// Not static and not inlined: stacks show them by name.
__attribute__((noinline)) void* Small() { return Returned(std::malloc(1000)); }
__attribute__((noinline)) void* Brief() { return Returned(std::calloc(1, 2000)); }
__attribute__((noinline)) void* Large() { return Returned(new char[3 << 20]); }

static void* held[kObjects + 10];

static void Allocate() {
  for (int i = 0; i < kObjects; ++i) {
    held[i] = Small();
    void* p = Brief();
    REQUIRE(held[i] != nullptr && p != nullptr);
    std::free(p);
  }
  for (int i = 0; i < 10; ++i) held[kObjects + i] = Large();
}

static std::atomic<bool> done;
static void* Churn(void*) {
  std::vector<void*> objects(1000);
  for (unsigned i = 0; !done; ++i) {
    void*& object = objects[i * 7919 % objects.size()];
    std::free(object);
    object = i % 5 == 0 ? Large() : Small();
    REQUIRE(object != nullptr);
  }
  for (void* p : objects) std::free(p);
  return nullptr;
}

int main(int count, char** arguments) {
  REQUIRE(count >= 2);
  const char* what = arguments[1];
  if (std::strcmp(what, "leak") == 0) {
    Allocate();
  } else if (std::strcmp(what, "signal") == 0) {
    Allocate();
    const int error = errno = 55;
    raise(SIGUSR2);
    REQUIRE(errno == error);
    for (int i = 0; i < kObjects; ++i) std::free(held[i]);
    raise(SIGUSR2);
  } else if (std::strcmp(what, "handled") == 0) {
    static volatile sig_atomic_t seen = 0;
    signal(SIGUSR2, [](int) { seen = 1; });
    Allocate();
    raise(SIGUSR2);
    REQUIRE(seen == 1);
  } else if (std::strcmp(what, "fork") == 0) {
    for (int i = 0; i < kObjects; ++i) held[i] = Small();
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      for (int i = 0; i < kObjects; ++i) std::free(held[i]);
      held[0] = Large();
      raise(SIGUSR2);
      return 0;
    }
    int status = -1;
    REQUIRE(waitpid(child, &status, 0) == child && status == 0);
    std::printf("%d\n", child);
  } else if (std::strcmp(what, "threads") == 0) {
    pthread_t threads[4];
    for (pthread_t& thread : threads) REQUIRE(pthread_create(&thread, nullptr, Churn, nullptr) == 0);
    const std::string prefix = std::string(getenv("FREEHOLD_HEAP_PROFILE")) + "." + std::to_string(getpid()) + ".";
    for (int i = 0; i < 20; ++i) {
      REQUIRE(pthread_kill(threads[i % 4], SIGUSR2) == 0);
      // A signal that comes while the same one waits would be lost.
      const std::string file = prefix + std::to_string(i + 1) + ".heap";
      for (int wait = 0; access(file.c_str(), F_OK) != 0; ++wait) {
        REQUIRE(wait < 10'000);
        usleep(1000);
      }
    }
    done = true;
    for (pthread_t thread : threads) REQUIRE(pthread_join(thread, nullptr) == 0);
  } else if (std::strcmp(what, "api") == 0) {
    REQUIRE(count == 3);
    Allocate();
    using Write = int (*)(int);
    using Save = int (*)(const char*);
    const auto write = reinterpret_cast<Write>(dlsym(RTLD_DEFAULT, "freehold_heap_profile_write"));
    const auto save = reinterpret_cast<Save>(dlsym(RTLD_DEFAULT, "freehold_heap_profile_save"));
    REQUIRE(write != nullptr && save != nullptr);
    const int file = open(arguments[2], O_WRONLY | O_CREAT | O_TRUNC, 0600);
    REQUIRE(file >= 0);
    std::printf("%d %d %d %d %d\n", write(file), save((std::string(arguments[2]) + "2").c_str()), write(-1),
                save("/nonexistent/profile"), save(nullptr));
  } else {
    return 2;
  }
  return 0;
}
