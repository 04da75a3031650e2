// Overflows the stack of a thread, or dies of SIGSEGV in another way.
//
//     stack_overflow plain          by recursion, in a thread called "digger" with a stack of 256 KiB
//     stack_overflow null           no overflow
//     stack_overflow sent           no fault
//     stack_overflow main           in the main thread
//     stack_overflow handled        with a handler of the program's own, installed before; the thread has no signal stack
//     stack_overflow handled-late   with a handler and a signal stack, installed by the running thread
//     stack_overflow inspected      is there a handler before the first thread? an alternate stack in main?
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "tests/runtime/programs/require.h"

namespace {

__attribute__((noinline)) int Dig(int depth) {
  volatile char memory[1000];
  memory[0] = static_cast<char>(depth);
  return depth < 0 ? 0 : Dig(depth + 1) + memory[0];
}

void OnSignal(int, siginfo_t*, void*) {
  static constexpr char kText[] = "the program's own handler\n";
  (void)!write(1, kText, sizeof(kText) - 1);
  _exit(42);
}

void InstallHandler() {
  static char memory[64 << 10];
  stack_t stack = {};
  stack.ss_sp = memory;
  stack.ss_size = sizeof(memory);
  REQUIRE(sigaltstack(&stack, nullptr) == 0);
  struct sigaction action = {};
  action.sa_sigaction = OnSignal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  REQUIRE(sigaction(SIGSEGV, &action, nullptr) == 0);
}

void* Run(void* mode) {
  const std::string how = static_cast<const char*>(mode);
  pthread_setname_np(pthread_self(), "digger");
  if (how == "null") *static_cast<volatile char*>(nullptr) = 1;
  if (how == "sent") raise(SIGSEGV);
  if (how == "handled-late") InstallHandler();
  if (how == "inspected") return nullptr;
  return reinterpret_cast<void*>(static_cast<long>(Dig(0)));
}

void Inspect() {
  struct sigaction action;
  REQUIRE(sigaction(SIGSEGV, nullptr, &action) == 0);
  REQUIRE((action.sa_flags & SA_SIGINFO) == 0 && action.sa_handler == SIG_DFL);
  stack_t stack;
  REQUIRE(sigaltstack(nullptr, &stack) == 0 && stack.ss_flags == SS_DISABLE);
}

}  // namespace

int main(int argc, char** argv) {
  REQUIRE(argc == 2);
  const rlimit no_core = {0, 0};
  REQUIRE(setrlimit(RLIMIT_CORE, &no_core) == 0);
  const std::string how = argv[1];
  if (how == "main") return Dig(0);
  if (how == "handled") InstallHandler();
  if (how == "inspected") Inspect();
  pthread_attr_t attributes;
  REQUIRE(pthread_getattr_np(pthread_self(), &attributes) == 0);
  REQUIRE(pthread_attr_destroy(&attributes) == 0);
  if (how == "inspected") Inspect();  // asking for attributes changes nothing
  REQUIRE(pthread_attr_init(&attributes) == 0);
  REQUIRE(pthread_attr_setstacksize(&attributes, 256 << 10) == 0);
  pthread_t thread;
  REQUIRE(pthread_create(&thread, &attributes, Run, argv[1]) == 0);
  REQUIRE(pthread_join(thread, nullptr) == 0);
  return 0;
}
