// Seeded operations on an object heap against a list of what is allocated: objects keep their content, do not
// overlap, are aligned, and are zero where that was asked for.
//
// While all is well, nothing here allocates from malloc: a fork amid threads that run a model finds no lock of malloc
// taken. AddressSanitizer's malloc of GCC 12 does not prepare for fork; its child would wait for such a lock forever.
#ifndef FREEHOLD_TESTS_ALLOCATOR_HEAP_MODEL_H_
#define FREEHOLD_TESTS_ALLOCATOR_HEAP_MODEL_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "allocator/object_heap.h"

namespace freehold::allocator {

struct ModelObject {
  void* p = nullptr;
  std::size_t size = 0;
  std::uint64_t seed = 0;
};

struct ModelOperation {
  enum class Kind : std::uint8_t {
    kAllocate,
    kAllocateZeroed,
    kAllocateAligned,
    kReallocate,
    kGrow,  // a few steps of realloc, as a list that is appended to
    kFree,
    kFreeSized,
    kFreeUncached,  // as a thread without a cache
    kExchange,      // with another thread: objects are freed where they were not allocated
    kReattach,      // the thread ends, another one begins
    kTrim,
    kTick,
  };

  Kind kind = Kind::kAllocate;
  std::size_t slot = 0;
  std::size_t size = 0;
  std::size_t alignment = 0;

  static ModelOperation Random(std::mt19937_64& random, std::size_t slots);
  std::string ToString() const;
};

// Where threads leave objects for each other.
class ModelExchange {
 public:
  // Takes what is in place `index` and leaves `object` there.
  ModelObject Swap(std::size_t index, const ModelObject& object);
  std::vector<ModelObject> TakeAll();

 private:
  struct Place {
    std::mutex mutex;
    ModelObject object;
  };
  std::array<Place, 64> places_;
};

// One thread's part.
class HeapModel {
 public:
  static constexpr std::size_t kSlots = 300;

  // `may_fail`: allocations may return null.
  HeapModel(ObjectHeap& heap, ModelExchange& exchange, bool may_fail = false);
  ~HeapModel();

  // Returns an empty string, or what went wrong.
  std::string Perform(const ModelOperation& operation);
  // Performs `count` operations. Returns what went wrong, with seed and the last operations, or nothing.
  std::string Run(std::uint64_t seed, int count);
  // Checks and frees everything.
  std::string Finish();

 private:
  std::string Grow(ModelObject& slot, std::size_t steps);
  std::string Put(ModelObject& slot, void* p, const ModelOperation& operation);
  std::string Check(const ModelObject& object) const;

  ObjectHeap& heap_;
  ModelExchange& exchange_;
  const bool may_fail_;
  ThreadCache* cache_;
  std::array<ModelObject, kSlots> slots_;
  std::uint64_t next_seed_ = 1;
};

}  // namespace freehold::allocator

#endif  // FREEHOLD_TESTS_ALLOCATOR_HEAP_MODEL_H_
