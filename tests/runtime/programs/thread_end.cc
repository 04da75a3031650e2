// Allocates and frees in every destructor that a thread runs at its end: of thread-local objects,
// and of thread-specific data in all of its rounds, set before and after the runtime's own; in
// threads that are joined, detached and cancelled.
#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "tests/runtime/programs/require.h"

namespace {

constexpr int kKeys = 60;  // more than fit into the thread's own descriptor
constexpr int kThreads = 400;

pthread_key_t keys[kKeys];
std::atomic<int> destructor_calls{0};
std::atomic<int> objects_destroyed{0};
std::atomic<int> detached_done{0};

// A piece of data of a thread, kept through all rounds.
struct Data {
  pthread_key_t key;
  int round;
  char* text;
};

void DestroyData(void* value) {
  auto* data = static_cast<Data*>(value);
  destructor_calls.fetch_add(1, std::memory_order_relaxed);
  data->text = static_cast<char*>(
      std::realloc(data->text, 100 + static_cast<std::size_t>(data->round) * 5000));
  REQUIRE(data->text != nullptr && data->text[0] == 'x');
  std::free(std::malloc(200'000));
  if (++data->round < PTHREAD_DESTRUCTOR_ITERATIONS) {
    REQUIRE(pthread_setspecific(data->key, data) == 0);
    return;
  }
  std::free(data->text);
  std::free(data);
}

void SetData(pthread_key_t key) {
  auto* data = static_cast<Data*>(std::malloc(sizeof(Data)));
  *data = {key, 0, static_cast<char*>(std::malloc(20))};
  data->text[0] = 'x';
  REQUIRE(pthread_setspecific(key, data) == 0);
}

struct Local {
  std::vector<std::string> strings;
  ~Local() {
    strings.emplace_back("a string that is long enough to be allocated");
    objects_destroyed.fetch_add(1, std::memory_order_relaxed);
  }
};
thread_local Local local;

void Use() {
  local.strings.emplace_back("another string that is long enough to be allocated");
  for (pthread_key_t key : keys) SetData(key);
}

void* JoinedThread(void*) {
  Use();
  return std::malloc(300);
}

void* DetachedThread(void*) {
  Use();
  detached_done.fetch_add(1);
  return nullptr;
}

void* CancelledThread(void*) {
  Use();
  for (;;) {
    std::free(std::malloc(50));
    pthread_testcancel();
  }
}

pthread_key_t late_key;

void AllocateLate(void*) { std::free(std::malloc(777)); }

void* LateAllocator(void*) {
  static char token;
  REQUIRE(pthread_setspecific(late_key, &token) == 0);
  return nullptr;
}

}  // namespace

int main() {
  for (pthread_key_t& key : keys) REQUIRE(pthread_key_create(&key, DestroyData) == 0);
  REQUIRE(pthread_key_create(&late_key, AllocateLate) == 0);
  for (int i = 0; i < kThreads; ++i) {
    pthread_t thread;
    void* block = nullptr;
    REQUIRE(pthread_create(&thread, nullptr, JoinedThread, nullptr) == 0);
    REQUIRE(pthread_join(thread, &block) == 0);
    std::free(block);
    REQUIRE(pthread_create(&thread, nullptr, LateAllocator, nullptr) == 0);
    REQUIRE(pthread_join(thread, nullptr) == 0);
    if (i % 10 != 0) continue;
    REQUIRE(pthread_create(&thread, nullptr, CancelledThread, nullptr) == 0);
    REQUIRE(pthread_cancel(thread) == 0);
    REQUIRE(pthread_join(thread, nullptr) == 0);
    REQUIRE(pthread_create(&thread, nullptr, DetachedThread, nullptr) == 0);
    REQUIRE(pthread_detach(thread) == 0);
  }
  while (detached_done.load() < kThreads / 10) usleep(1000);
  usleep(50'000);  // the destructors of the last detached thread
  REQUIRE(objects_destroyed.load() >= kThreads);
  REQUIRE(destructor_calls.load() >= kThreads * kKeys * PTHREAD_DESTRUCTOR_ITERATIONS);
  puts("ok");
  return 0;
}
