// What a program does wrong with an object between guard pages, and what it may do: `guard_pages WHAT`. Volatile
// everywhere: the compiler must not know what lies where.
//
//     after, before     reads beyond the object's pages
//     freed             writes to a freed object, in a thread called "worker"
//     twice, inside, stray, wrong-size    frees that must not be
//     handled           the same as freed, with a handler of the program's own that leaves by _exit(42)
//     handled-signal    by signal(); handled-once: by a handler that is reset, and traps again
//     recovered         a handler that jumps out; then another access, and then the end
//     ignored           the same as freed, with SIGSEGV ignored
//     other             a fault that has nothing to do with it; sent: no fault at all
//     fork              the child's accesses are reported, with what the parent did before
//     system-call       read(2) into a freed object fails, and nothing else happens
//     fine              everything that is right, by many threads
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "tests/runtime/programs/require.h"

namespace {

using Bytes = volatile unsigned char*;

__attribute__((noinline)) Bytes AllocateHere(std::size_t size) {
  Bytes p = static_cast<Bytes>(malloc(size));
  REQUIRE(p != nullptr);
  return p;
}
__attribute__((noinline)) void FreeHere(Bytes p) {
  free(const_cast<unsigned char*>(p));
  asm volatile("");  // no jump into free
}

Bytes Freed() {
  Bytes p = AllocateHere(30);
  FreeHere(p);
  return p;
}

void WriteToFreed() {
  Bytes p = Freed();
  std::thread([p] {
    pthread_setname_np(pthread_self(), "worker");
    p[8] = 1;
  }).join();
}

void Say(const char* text) { (void)!write(1, text, strlen(text)); }

void OnFault(int, siginfo_t* info, void*) {
  Say(info->si_addr != nullptr ? "handled\n" : "no address\n");
  _exit(42);
}
void OnFaultPlain(int) {
  Say("handled\n");
  _exit(42);
}
void OnFaultOnce(int) { Say("once\n"); }

sigjmp_buf out;
void OnFaultJump(int) { siglongjmp(out, 1); }

void Install(struct sigaction action, int flags) {
  struct sigaction before = {};
  action.sa_flags = flags;
  sigaddset(&action.sa_mask, SIGUSR1);
  REQUIRE(sigaction(SIGSEGV, &action, &before) == 0);
  REQUIRE((before.sa_flags & SA_SIGINFO) == 0 && before.sa_handler == SIG_DFL);
  // The program sees what it asked for.
  REQUIRE(sigaction(SIGSEGV, nullptr, &before) == 0);
  REQUIRE(before.sa_handler == action.sa_handler && (before.sa_flags & flags) == flags);
  REQUIRE(sigismember(&before.sa_mask, SIGUSR1) == 1);
}

struct sigaction Plain(void (*handler)(int)) {
  struct sigaction action = {};
  action.sa_handler = handler;
  return action;
}

void Recover() {
  Install(Plain(OnFaultJump), SA_NODEFER);
  Bytes p = Freed();
  if (sigsetjmp(out, 1) == 0) {
    p[0] = 1;
    REQUIRE(false);
  }
  Say("recovered\n");
  REQUIRE(signal(SIGSEGV, SIG_DFL) == OnFaultJump);
  p[1] = 1;
}

void InChild() {
  Bytes live = AllocateHere(100);
  live[99] = 9;
  Bytes freed = Freed();
  const pid_t child = fork();
  if (child == 0) {
    REQUIRE(live[99] == 9);
    FreeHere(live);
    FreeHere(AllocateHere(100));
    freed[0] = 1;
    _exit(0);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
  REQUIRE(live[99] == 9);
  FreeHere(live);
}

// As in tests/runtime/programs/hardening.cc, with everything looked at.
void BeFine() {
  std::vector<std::thread> threads;
  for (unsigned id = 0; id < 4; ++id) {
    threads.emplace_back([id] {
      struct Object {
        unsigned char* p = nullptr;
        std::size_t size = 0;
      };
      std::vector<Object> objects(200);
      unsigned random = id + 1;
      for (int i = 0; i < 50000; ++i) {
        random = random * 1664525 + 1013904223;
        const auto fill = static_cast<unsigned char>(random >> 8 & 127);
        Object& object = objects[fill];
        if (object.p != nullptr) {
          REQUIRE(malloc_usable_size(object.p) >= object.size);
          REQUIRE(object.p[0] == fill && object.p[object.size - 1] == fill);
        }
        const std::size_t size = (random >> 16) % (i % 20 == 0 ? 50000 : 500) + 1;
        switch (i % 4) {
          case 0:
            free(object.p);
            object.p = static_cast<unsigned char*>(malloc(size));
            break;
          case 1:
            free(object.p);
            object.p = static_cast<unsigned char*>(calloc(1, size));
            for (std::size_t j = 0; j < size; ++j) REQUIRE(object.p[j] == 0);
            break;
          case 2:
            free(object.p);
            object.p = static_cast<unsigned char*>(aligned_alloc(std::size_t{16} << i % 9, size));
            REQUIRE(reinterpret_cast<std::uintptr_t>(object.p) % (std::size_t{16} << i % 9) == 0);
            break;
          case 3:
            object.p = static_cast<unsigned char*>(realloc(object.p, size));
            break;
        }
        REQUIRE(object.p != nullptr);
        object.size = size;
        memset(object.p, fill, size);
      }
      for (const Object& object : objects) free(object.p);
      for (int i = 0; i < 1000; ++i) delete new std::string(100, 'x');
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  REQUIRE(argc == 2);
  const rlimit no_core = {0, 0};
  REQUIRE(setrlimit(RLIMIT_CORE, &no_core) == 0);
  const std::string what = argv[1];
  Bytes p = AllocateHere(30);
  REQUIRE(malloc_usable_size(const_cast<unsigned char*>(p)) >= 30);
  if (what == "after") static_cast<void>(p[4096]);
  if (what == "before") static_cast<void>(p[-4096]);
  if (what == "freed") WriteToFreed();
  if (what == "twice") FreeHere(p), FreeHere(p);
  if (what == "inside") FreeHere(p + 8);
  if (what == "stray") p[30] = 0, FreeHere(p);
  if (what == "wrong-size") ::operator delete(const_cast<unsigned char*>(p), std::size_t{31});
  if (what == "handled") {
    struct sigaction action = {};
    action.sa_sigaction = OnFault;
    Install(action, SA_SIGINFO);
    WriteToFreed();
  }
  if (what == "handled-signal") {
    REQUIRE(signal(SIGSEGV, OnFaultPlain) == SIG_DFL);
    REQUIRE(signal(SIGUSR1, OnFaultPlain) == SIG_DFL);  // which is libc's
    REQUIRE(signal(SIGUSR1, SIG_DFL) == OnFaultPlain);
    REQUIRE(signal(65, SIG_DFL) == SIG_ERR);
    WriteToFreed();
  }
  if (what == "handled-once") {
    Install(Plain(OnFaultOnce), static_cast<int>(SA_RESETHAND));
    WriteToFreed();
  }
  if (what == "recovered") Recover();
  if (what == "ignored") {
    REQUIRE(signal(SIGSEGV, SIG_IGN) == SIG_DFL);
    raise(SIGSEGV);
    Say("alive\n");
    WriteToFreed();
  }
  if (what == "other") {
    volatile std::uintptr_t nowhere = 8;
    *reinterpret_cast<Bytes>(nowhere) = 1;
  }
  if (what == "sent") raise(SIGSEGV);
  if (what == "fork") InChild();
  if (what == "system-call") {
    Bytes freed = Freed();
    const int zero = open("/dev/zero", O_RDONLY);
    REQUIRE(read(zero, const_cast<unsigned char*>(freed), 30) == -1 && errno == EFAULT);
  }
  if (what == "fine") BeFine();
  return 0;
}
