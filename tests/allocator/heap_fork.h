// fork as the process runtime does it, for a heap of a test.
#ifndef FREEHOLD_TESTS_ALLOCATOR_HEAP_FORK_H_
#define FREEHOLD_TESTS_ALLOCATOR_HEAP_FORK_H_

#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <string>

#include "gtest/gtest.h"
#include "tests/allocator/heap_fixture.h"
#include "tests/allocator/heap_model.h"

namespace freehold::allocator {

// What the process runtime does around fork(). `child` runs in the child, whose exit status is 0 if it returns an empty
// string.
inline void PrepareFork(TestHeap& heap, ThreadCache* own) {
  heap->PrepareFork(own);
  heap.space().PrepareFork();
}
inline void ParentAfterFork(TestHeap& heap, ThreadCache* own) {
  heap.space().ParentAfterFork();
  heap->ParentAfterFork(own);
}
template <typename Child>
pid_t Fork(TestHeap& heap, ThreadCache* own, Child child) {
  const pid_t pid = fork();
  if (pid == 0) {
    heap.space().ChildAfterFork();
    heap->ChildAfterFork(own);
    const std::string error = child();
    if (!error.empty()) std::fprintf(stderr, "in the child: %s\n", error.c_str());
    _exit(error.empty() ? 0 : 1);
  }
  return pid;
}
inline void ExpectSuccess(pid_t pid) {
  ASSERT_GT(pid, 0);
  int status = -1;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  ASSERT_EQ(status, 0);
}

template <typename Child>
void ForkAndRun(TestHeap& heap, ThreadCache* own, Child child) {
  PrepareFork(heap, own);
  const pid_t pid = Fork(heap, own, child);
  ParentAfterFork(heap, own);
  ExpectSuccess(pid);
}

// For a child: a model of its own goes on with the heap.
inline std::string RunModel(ObjectHeap& heap, std::uint64_t seed) {
  ModelExchange mine;
  HeapModel model(heap, mine);
  std::string error = model.Run(seed, 2000);
  if (error.empty()) error = model.Finish();
  heap.CheckInvariants();
  return error;
}

}  // namespace freehold::allocator

#endif  // FREEHOLD_TESTS_ALLOCATOR_HEAP_FORK_H_
