// What a program sees of POSIX threads: attributes, ends, joins, detachments, errors. Prints it, so that a run under
// the shim can be compared with a plain one, line by line: no addresses, ids or times.
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <thread>
#include <vector>

#include "tests/runtime/programs/require.h"

namespace {

using Body = void* (*)(void*);

// What pthread_getattr_np says about the calling thread, as text.
std::string Describe() {
  pthread_attr_t attributes;
  REQUIRE(pthread_getattr_np(pthread_self(), &attributes) == 0);
  void* low = nullptr;
  std::size_t size = 0, plain_size = 0, guard = 0;
  int detached = 0, inherit = 0, policy = 0, scope = 0;
  REQUIRE(pthread_attr_getstack(&attributes, &low, &size) == 0);
  REQUIRE(pthread_attr_getstacksize(&attributes, &plain_size) == 0);
  REQUIRE(pthread_attr_getguardsize(&attributes, &guard) == 0);
  REQUIRE(pthread_attr_getdetachstate(&attributes, &detached) == 0);
  REQUIRE(pthread_attr_getinheritsched(&attributes, &inherit) == 0);
  REQUIRE(pthread_attr_getschedpolicy(&attributes, &policy) == 0);
  REQUIRE(pthread_attr_getscope(&attributes, &scope) == 0);
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  REQUIRE(pthread_attr_getaffinity_np(&attributes, sizeof(cpus), &cpus) == 0);
  REQUIRE(pthread_attr_destroy(&attributes) == 0);
  const auto here = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
  const auto first = reinterpret_cast<std::uintptr_t>(low);
  const bool inside = first <= here && here < first + size;
  char text[300];
  std::snprintf(text, sizeof(text),
                "size %zu %zu guard %zu detached %d inherit %d policy %d scope %d cpus %d inside %d page-aligned %d",
                size, plain_size, guard, detached, inherit, policy, scope, CPU_COUNT(&cpus), inside, first % 4096 == 0);
  return text;
}

void* DescribeThread(void* out) {
  *static_cast<std::string*>(out) = Describe();
  return nullptr;
}

// Creates with `attributes`, joins, and prints.
void Show(const char* what, const pthread_attr_t* attributes) {
  std::string text;
  pthread_t thread;
  const int error = pthread_create(&thread, attributes, DescribeThread, &text);
  if (error == 0) REQUIRE(pthread_join(thread, nullptr) == 0);
  std::printf("%s: error %d %s\n", what, error, text.c_str());
}

class Attributes {
 public:
  Attributes() { REQUIRE(pthread_attr_init(&attributes_) == 0); }
  ~Attributes() { REQUIRE(pthread_attr_destroy(&attributes_) == 0); }
  Attributes(const Attributes&) = delete;
  Attributes& operator=(const Attributes&) = delete;
  pthread_attr_t* operator&() { return &attributes_; }

 private:
  pthread_attr_t attributes_;
};

void ShapesOfStacks() {
  Show("default", nullptr);
  {
    Attributes attributes;
    Show("initialized", &attributes);
  }
  for (const std::size_t size : {std::size_t{32'768}, std::size_t{65'536}, std::size_t{100'000},
                                 std::size_t{131'072}, std::size_t{1} << 20, (std::size_t{8} << 20) + 4096,
                                 std::size_t{64} << 20, std::size_t{1} << 33, std::size_t{1} << 46, SIZE_MAX - 100}) {
    Attributes attributes;
    std::printf("setstacksize %zu: %d\n", size, pthread_attr_setstacksize(&attributes, size));
    Show("  with it", &attributes);
  }
  {
    Attributes attributes;
    std::printf("setstacksize 1: %d\n", pthread_attr_setstacksize(&attributes, 1));
  }
  for (const std::size_t guard : {std::size_t{0}, std::size_t{1}, std::size_t{4096}, std::size_t{10'000},
                                  std::size_t{1} << 20, std::size_t{1} << 30, SIZE_MAX - 5000, SIZE_MAX}) {
    Attributes attributes;
    std::printf("setguardsize %zu: %d\n", guard, pthread_attr_setguardsize(&attributes, guard));
    Show("  with it", &attributes);
  }
  {
    Attributes attributes;
    const std::size_t size = 256 << 10;
    void* low = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(pthread_attr_setstack(&attributes, low, size) == 0);
    Show("given stack", &attributes);
    std::memset(low, 1, size);  // its memory is the program's, before and after
    Show("given stack again", &attributes);
    REQUIRE(munmap(low, size) == 0);
  }
  pthread_attr_t before;
  REQUIRE(pthread_getattr_default_np(&before) == 0);
  {
    Attributes attributes;
    REQUIRE(pthread_attr_setstacksize(&attributes, 3 << 20) == 0);
    REQUIRE(pthread_attr_setguardsize(&attributes, 20'000) == 0);
    REQUIRE(pthread_setattr_default_np(&attributes) == 0);
    Show("other default", nullptr);
    Attributes plain;
    Show("initialized with other default", &plain);
  }
  REQUIRE(pthread_setattr_default_np(&before) == 0);
  pthread_attr_destroy(&before);
  Show("default again", nullptr);
}

void OtherAttributes() {
  {
    Attributes attributes;
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    cpu_set_t allowed;
    REQUIRE(sched_getaffinity(0, sizeof(allowed), &allowed) == 0);
    for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&cpus) == 0; ++cpu) {
      if (CPU_ISSET(cpu, &allowed)) CPU_SET(cpu, &cpus);
    }
    REQUIRE(pthread_attr_setaffinity_np(&attributes, sizeof(cpus), &cpus) == 0);
    Show("one cpu", &attributes);
    cpu_set_t none;
    CPU_ZERO(&none);
    REQUIRE(pthread_attr_setaffinity_np(&attributes, sizeof(none), &none) == 0);
    for (int i = 0; i < 20; ++i) Show("no cpu", &attributes);
  }
  {
    Attributes attributes;
    REQUIRE(pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED) == 0);
    REQUIRE(pthread_attr_setschedpolicy(&attributes, SCHED_RR) == 0);
    const sched_param priority = {.sched_priority = 1};
    REQUIRE(pthread_attr_setschedparam(&attributes, &priority) == 0);
    Show("real time, where that is allowed", &attributes);
  }
  {
    Attributes attributes;
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR2);
    REQUIRE(pthread_attr_setsigmask_np(&attributes, &mask) == 0);
    pthread_t thread;
    const Body body = [](void*) -> void* {
      sigset_t now;
      pthread_sigmask(SIG_SETMASK, nullptr, &now);
      return reinterpret_cast<void*>(static_cast<std::intptr_t>(sigismember(&now, SIGUSR2) * 2 +
                                                                sigismember(&now, SIGUSR1)));
    };
    REQUIRE(pthread_create(&thread, &attributes, body, nullptr) == 0);
    void* result = nullptr;
    REQUIRE(pthread_join(thread, &result) == 0);
    std::printf("signal mask %d\n", static_cast<int>(reinterpret_cast<std::intptr_t>(result)));
  }
}

// ---- Ends ----

std::atomic<int> ended{0};

struct CountsItsEnd {
  bool used = false;
  ~CountsItsEnd() { ended.fetch_add(used ? 1 : 1000); }
};
thread_local CountsItsEnd counts_its_end;

void CountUp(void*) { ended.fetch_add(10); }

void* Leave(void* how) {
  // Before anything that would need a destructor.
  if (reinterpret_cast<std::intptr_t>(how) == 4) syscall(SYS_exit, 0);
  counts_its_end.used = true;
  void* result = reinterpret_cast<void*>(0x77);
  pthread_cleanup_push(CountUp, nullptr);
  switch (reinterpret_cast<std::intptr_t>(how)) {
    case 1: pthread_exit(reinterpret_cast<void*>(0x88));
    case 2:
      for (;;) {
        usleep(100);
        pthread_testcancel();
      }
    case 3:
      pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, nullptr);
      for (;;) {
        asm volatile("");
      }
  }
  pthread_cleanup_pop(0);
  return result;
}

void WaysToEnd() {
  for (std::intptr_t how = 0; how <= 4; ++how) {
    for (int i = 0; i < 20; ++i) {
      ended.store(0);
      pthread_t thread;
      REQUIRE(pthread_create(&thread, nullptr, Leave, reinterpret_cast<void*>(how)) == 0);
      if (how == 2 || how == 3) REQUIRE(pthread_cancel(thread) == 0);
      void* result = nullptr;
      REQUIRE(pthread_join(thread, &result) == 0);
      if (how == 4) continue;  // no destructors, and no result
      // A thread that was cancelled at once never came to its first line.
      const bool early = (how == 2 || how == 3) && ended.load() == 0;
      REQUIRE(early || ended.load() == (how == 0 ? 1 : 11));
      REQUIRE(how > 1 || result == reinterpret_cast<void*>(how == 0 ? 0x77 : 0x88));
      REQUIRE(how < 2 || result == PTHREAD_CANCELED);
    }
    std::printf("way to end %d\n", static_cast<int>(how));
  }
}

void Joins() {
  static sem_t go;
  REQUIRE(sem_init(&go, 0, 0) == 0);
  const Body wait = [](void* value) -> void* {
    while (sem_wait(&go) != 0) {
    }
    return value;
  };
  int value = 0;
  pthread_t thread;
  void* result = nullptr;
  const timespec past = {1, 0};
  REQUIRE(pthread_create(&thread, nullptr, wait, &value) == 0);
  std::printf("tryjoin of a running thread: %d\n", pthread_tryjoin_np(thread, &result));
  std::printf("timedjoin of a running thread: %d\n", pthread_timedjoin_np(thread, &result, &past));
  std::printf("clockjoin of a running thread: %d\n", pthread_clockjoin_np(thread, &result, CLOCK_MONOTONIC, &past));
  std::printf("clockjoin with no clock: %d\n", pthread_clockjoin_np(thread, &result, 77, &past));
  std::printf("join of itself: %d\n", pthread_join(pthread_self(), &result));
  sem_post(&go);
  timespec soon;
  clock_gettime(CLOCK_REALTIME, &soon);
  soon.tv_sec += 60;
  std::printf("timedjoin: %d", pthread_timedjoin_np(thread, &result, &soon));
  std::printf(" %d\n", result == &value);

  REQUIRE(pthread_create(&thread, nullptr, wait, &value) == 0);
  sem_post(&go);
  clock_gettime(CLOCK_MONOTONIC, &soon);
  soon.tv_sec += 60;
  result = nullptr;
  std::printf("clockjoin: %d", pthread_clockjoin_np(thread, &result, CLOCK_MONOTONIC, &soon));
  std::printf(" %d\n", result == &value);

  REQUIRE(pthread_create(&thread, nullptr, wait, &value) == 0);
  sem_post(&go);
  result = nullptr;
  int error = EBUSY;
  while (error == EBUSY) error = pthread_tryjoin_np(thread, &result);
  std::printf("tryjoin: %d %d\n", error, result == &value);

  REQUIRE(pthread_create(&thread, nullptr, wait, &value) == 0);
  std::printf("detach: %d\n", pthread_detach(thread));
  std::printf("detach again: %d\n", pthread_detach(thread));
  std::printf("join of a detached thread: %d\n", pthread_join(thread, nullptr));
  sem_post(&go);

  Attributes attributes;
  REQUIRE(pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED) == 0);
  REQUIRE(pthread_create(&thread, &attributes, wait, nullptr) == 0);
  std::printf("detach of one made detached: %d\n", pthread_detach(thread));
  sem_post(&go);
}

// A joiner that is cancelled while it waits: the thread can still be joined.
void CancelledJoiner() {
  static pthread_t target;
  static std::atomic<bool> stop;
  stop.store(false);
  const Body run = [](void*) -> void* {
    while (!stop.load()) usleep(100);
    return nullptr;
  };
  const Body join = [](void*) -> void* {
    pthread_join(target, nullptr);
    return nullptr;
  };
  REQUIRE(pthread_create(&target, nullptr, run, nullptr) == 0);
  pthread_t joiner;
  REQUIRE(pthread_create(&joiner, nullptr, join, nullptr) == 0);
  usleep(10'000);
  REQUIRE(pthread_cancel(joiner) == 0);
  void* result = nullptr;
  REQUIRE(pthread_join(joiner, &result) == 0);
  stop.store(true);
  std::printf("cancelled joiner: %d, then %d\n", result == PTHREAD_CANCELED, pthread_join(target, nullptr));
}

// ---- Use ----

// Touches `bytes` of the stack below, page by page.
__attribute__((noinline)) void Dig(std::size_t bytes) {
  volatile char page[4000];
  page[0] = 1;
  if (bytes > sizeof(page) + 96) Dig(bytes - sizeof(page) - 96);
  page[1] = page[0];
}

void DeepStacks() {
  const Body dig = [](void* bytes) -> void* {
    Dig(reinterpret_cast<std::size_t>(bytes));
    return nullptr;
  };
  for (const std::size_t mib : {1, 8, 40, 100}) {
    Attributes attributes;
    REQUIRE(pthread_attr_setstacksize(&attributes, mib << 20) == 0);
    for (int i = 0; i < 5; ++i) {
      pthread_t thread;
      REQUIRE(pthread_create(&thread, &attributes, dig, reinterpret_cast<void*>((mib << 20) - (64 << 10))) == 0);
      REQUIRE(pthread_join(thread, nullptr) == 0);
    }
  }
  std::puts("deep stacks");
}

// Joined, detached while they run and after they ended, from threads that come and go themselves.
void Churn() {
  static std::atomic<int> detached_ran{0};
  static std::atomic<int> joined_ran{0};
  const auto churn = [] {
    for (int i = 0; i < 200; ++i) {
      std::thread([] { detached_ran.fetch_add(1); }).detach();
      std::vector<std::thread> batch;
      for (int k = 0; k < 5; ++k) batch.emplace_back([] { joined_ran.fetch_add(1); });
      for (std::thread& thread : batch) thread.join();
      const Body nothing = [](void*) -> void* {
        detached_ran.fetch_add(1);
        return nullptr;
      };
      pthread_t late;
      REQUIRE(pthread_create(&late, nullptr, nothing, nullptr) == 0);
      if (i % 2 == 0) usleep(50);
      REQUIRE(pthread_detach(late) == 0);
      const Body own = [](void*) -> void* {
        REQUIRE(pthread_detach(pthread_self()) == 0);
        detached_ran.fetch_add(1);
        return nullptr;
      };
      REQUIRE(pthread_create(&late, nullptr, own, nullptr) == 0);
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(churn);
  for (std::thread& thread : threads) thread.join();
  while (detached_ran.load() < 4 * 200 * 3) usleep(1000);
  std::printf("churn: %d joined, %d detached\n", joined_ran.load(), detached_ran.load());
}

int InChild(int (*body)()) {
  std::fflush(nullptr);
  const pid_t pid = fork();
  REQUIRE(pid >= 0);
  if (pid == 0) {
    alarm(60);
    _exit(body());
  }
  int status = -1;
  REQUIRE(waitpid(pid, &status, 0) == pid);
  return status;
}

void Forks() {
  std::atomic<bool> stop{false};
  std::vector<std::thread> others;
  for (int i = 0; i < 20; ++i) {
    others.emplace_back([&] {
      while (!stop.load()) usleep(1000);
    });
  }
  const auto use_threads = [] {
    std::vector<std::thread> threads;
    for (int i = 0; i < 50; ++i) threads.emplace_back([] { Dig(200 << 10); });
    for (std::thread& thread : threads) thread.join();
    const Body nothing = [](void*) -> void* { return nullptr; };
    for (int i = 0; i < 50; ++i) {
      pthread_t thread;
      REQUIRE(pthread_create(&thread, nullptr, nothing, nullptr) == 0);
      REQUIRE(pthread_detach(thread) == 0);
    }
    return 7;
  };
  std::printf("threads in the child of main: %d\n", InChild(use_threads));
  std::thread([&] { std::printf("threads in the child of a thread: %d\n", InChild(use_threads)); }).join();
  const auto fork_again = [] { return InChild([] { return 5; }) >> 8; };
  std::thread([&] { std::printf("in the child of a child: %d\n", InChild(fork_again)); }).join();
  stop.store(true);
  for (std::thread& thread : others) thread.join();
}

// Where no more threads are allowed: the error is libc's, and what was tried a thousand times costs nothing.
void TooManyThreads() {
  const auto body = [] {
    const rlimit limit = {1, 1};
    if (setrlimit(RLIMIT_NPROC, &limit) != 0 || setuid(65534) != 0) return 99;
    const Body nothing = [](void*) -> void* { return nullptr; };
    for (int i = 0; i < 2000; ++i) {
      pthread_t thread;
      const int error = pthread_create(&thread, nullptr, nothing, nullptr);
      if (error != EAGAIN) return error == 0 ? 98 : error;
    }
    return EAGAIN;
  };
  std::printf("no more threads: %d\n", InChild(body) >> 8);
}

// libc tells every thread, by signal.
void ChangesOfIdentity() {
  const auto body = [] {
    static std::atomic<bool> go{false};
    static std::atomic<unsigned> seen{0};
    const Body look = [](void*) -> void* {
      while (!go.load()) usleep(100);
      seen.fetch_add(static_cast<unsigned>(syscall(SYS_getuid)));
      return nullptr;
    };
    pthread_t threads[4];
    for (pthread_t& thread : threads) REQUIRE(pthread_create(&thread, nullptr, look, nullptr) == 0);
    if (setuid(65534) != 0) return 1;
    go.store(true);
    for (pthread_t thread : threads) REQUIRE(pthread_join(thread, nullptr) == 0);
    return seen.load() == 4 * 65534u ? 0 : 2;
  };
  std::printf("setuid reaches threads: %d\n", InChild(body) >> 8);
}

void Signals() {
  static std::atomic<int> hits{0};
  struct sigaction action = {};
  action.sa_handler = [](int) { hits.fetch_add(1); };
  REQUIRE(sigaction(SIGUSR1, &action, nullptr) == 0);
  std::atomic<bool> stop{false};
  std::thread thread([&] {
    while (!stop.load()) usleep(100);
  });
  for (int i = 1; i <= 100; ++i) {
    REQUIRE(pthread_kill(thread.native_handle(), SIGUSR1) == 0);
    while (hits.load() < i) usleep(10);
  }
  stop.store(true);
  thread.join();
  std::printf("signals: %d\n", hits.load());
}

}  // namespace

int main() {
  ShapesOfStacks();
  OtherAttributes();
  WaysToEnd();
  Joins();
  CancelledJoiner();
  DeepStacks();
  Churn();
  Forks();
  TooManyThreads();
  ChangesOfIdentity();
  Signals();
  std::fflush(stdout);
  // Threads outlive main.
  std::thread([] {
    usleep(50'000);
    std::puts("after main");
    std::fflush(stdout);
  }).detach();
  pthread_exit(nullptr);
}
