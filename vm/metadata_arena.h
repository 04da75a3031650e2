// Memory for the address space's own metadata: grows in large steps inside a reservation of its own, never
// shrinks, and never touches malloc. Objects that come from it are type-stable: their owners recycle them
// through free lists of one type, so that a lock-free reader that holds a stale pointer still reads an object
// of that type.
#ifndef FREEHOLD_VM_METADATA_ARENA_H_
#define FREEHOLD_VM_METADATA_ARENA_H_

#include <atomic>
#include <cstddef>
#include <new>

#include "vm/os/kernel.h"
#include "vm/page_range.h"
#include "vm/result.h"
#include "vm/units.h"

namespace freehold::vm {

// Thread safety: thread-safe and lock-free; may make a system call, so no short lock may be held.
class MetadataArena {
 public:
  // Reserves `size` and places the arena itself at its start. From the third megabyte on it asks for huge pages:
  // lookups among many VMAs would miss the TLB for each record. Errors: kSystem.
  static Result<MetadataArena*> Create(os::Kernel& kernel, Pages size);
  // Releases everything that was ever allocated. REQUIRES: nothing of it is used any more.
  static void Destroy(MetadataArena* arena);

  // `size` bytes of zeroes aligned to `alignment` (a power of two, at most a page); null when the arena is
  // exhausted or the kernel refuses to commit more.
  void* Allocate(Bytes size, std::size_t alignment);

  // `count` value-initialised objects in a row, the first aligned to `alignment`.
  template <typename T>
  T* New(std::size_t count = 1, std::size_t alignment = alignof(T)) {
    void* memory = Allocate({sizeof(T) * count}, alignment);
    if (memory == nullptr) return nullptr;
    T* objects = static_cast<T*>(memory);
    for (std::size_t i = 0; i < count; ++i) new (objects + i) T();
    return objects;
  }

  Bytes used() const { return {next_.load(std::memory_order_relaxed)}; }
  // Where used() is kept, for a Metric.
  const void* used_location() const { return &next_; }
  Bytes committed() const { return {committed_.load(std::memory_order_relaxed)}; }

 private:
  MetadataArena(os::Kernel& kernel, PageRange range, std::size_t committed)
      : kernel_(kernel), range_(range), committed_(committed) {}

  bool CommitTo(std::size_t end);

  os::Kernel& kernel_;
  const PageRange range_;
  std::atomic<std::size_t> next_{sizeof(MetadataArena)};  // offset of the first unused byte
  std::atomic<std::size_t> committed_;                    // bytes that are readable and writable
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_METADATA_ARENA_H_
