// Allocates and frees wherever a process runs code at its end: atexit handlers, destructors of
// static objects, of thread-local objects, of libraries; and prints what ran.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/runtime/programs/require.h"

namespace {

void Work() {
  std::vector<std::string> strings;
  for (int i = 0; i < 500; ++i) strings.emplace_back(static_cast<std::size_t>(i), 'x');
  void* large = std::malloc(3 << 20);
  REQUIRE(large != nullptr);
  std::memset(large, 1, 3 << 20);
  std::free(large);
}

struct Static {
  ~Static() {
    Work();
    dprintf(1, "static object\n");
  }
  std::unique_ptr<int> member = std::make_unique<int>(1);
};

struct Local {
  ~Local() {
    Work();
    dprintf(1, "thread-local object\n");
  }
  std::unique_ptr<int> member = std::make_unique<int>(1);
};

Static static_object;
thread_local Local local_object;

__attribute__((destructor(101))) void LastDestructor() {
  Work();
  dprintf(1, "destructor\n");
}

}  // namespace

int main() {
  std::atexit([] {
    Work();
    dprintf(1, "atexit\n");
  });
  *local_object.member = 2;
  std::thread([] { *local_object.member = 3; }).join();
  return 7;
}
