// Heaps of freehold.h for programs in C++: as an object, as a std::pmr::memory_resource, and as a standard allocator.
// C++17. Uses freehold.h only, so a program and the library need not be built alike.
#ifndef FREEHOLD_RUNTIME_FREEHOLD_HPP_
#define FREEHOLD_RUNTIME_FREEHOLD_HPP_

#include <cstddef>
#include <limits>
#include <memory_resource>
#include <new>
#include <type_traits>
#include <utility>

#include "freehold.h"

namespace freehold {

// Owns a heap: its end is the end of everything in it, without a destructor being called. Thread safety: as
// freehold_heap; nobody uses the heap while it is moved from or ends.
class Heap {
 public:
  // Throws std::bad_alloc if the heap cannot be made. `space`: where its memory comes from; null: the process's.
  explicit Heap(freehold_space* space = nullptr) {
    freehold_heap_options options = {};
    options.size = sizeof(options);
    options.space = space;
    if (freehold_heap_create(&options, &heap_) != 0) throw std::bad_alloc();
  }
  Heap(Heap&& other) noexcept : heap_(std::exchange(other.heap_, nullptr)) {}
  Heap& operator=(Heap&& other) noexcept {
    std::swap(heap_, other.heap_);
    return *this;
  }
  ~Heap() {
    if (heap_ != nullptr) freehold_heap_destroy(heap_);
  }

  freehold_heap* get() const noexcept { return heap_; }

 private:
  freehold_heap* heap_ = nullptr;
};

namespace internal {

inline void* AllocateOrThrow(freehold_heap* heap, std::size_t bytes, std::size_t alignment) {
  void* object = alignment <= alignof(std::max_align_t) ? freehold_heap_allocate(heap, bytes)
                                                         : freehold_heap_allocate_aligned(heap, alignment, bytes);
  if (object == nullptr) throw std::bad_alloc();
  return object;
}

}  // namespace internal

// Resources of one heap are equal. The heap outlives them and what they allocated.
class HeapResource final : public std::pmr::memory_resource {
 public:
  explicit HeapResource(freehold_heap* heap) noexcept : heap_(heap) {}
  explicit HeapResource(const Heap& heap) noexcept : heap_(heap.get()) {}

  freehold_heap* heap() const noexcept { return heap_; }

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    return internal::AllocateOrThrow(heap_, bytes, alignment);
  }
  void do_deallocate(void* object, std::size_t bytes, std::size_t) override {
    freehold_heap_free_sized(heap_, object, bytes);
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override {
    const auto* resource = dynamic_cast<const HeapResource*>(&other);
    return resource != nullptr && resource->heap_ == heap_;
  }

  freehold_heap* heap_;
};

// For containers of the standard library. Allocators of one heap are equal; a container that is moved or swapped takes
// its allocator along, a copy has that of the original.
template <typename T>
class HeapAllocator {
 public:
  using value_type = T;
  using propagate_on_container_move_assignment = std::true_type;
  using propagate_on_container_swap = std::true_type;
  using is_always_equal = std::false_type;

  // What allocate_at_least returns; as C++23's.
  struct AllocationResult {
    T* ptr;
    std::size_t count;
  };

  explicit HeapAllocator(freehold_heap* heap) noexcept : heap_(heap) {}
  explicit HeapAllocator(const Heap& heap) noexcept : heap_(heap.get()) {}
  template <typename U>
  HeapAllocator(const HeapAllocator<U>& other) noexcept : heap_(other.heap()) {}

  [[nodiscard]] T* allocate(std::size_t count) {
    return static_cast<T*>(internal::AllocateOrThrow(heap_, BytesOf(count), alignof(T)));
  }
  // As many objects as fit into what `count` of them take anyway.
  [[nodiscard]] AllocationResult allocate_at_least(std::size_t count) {
    const std::size_t good = freehold_good_size(BytesOf(count));
    if (good == 0) throw std::bad_alloc();
    return {static_cast<T*>(internal::AllocateOrThrow(heap_, good, alignof(T))), good / sizeof(T)};
  }
  void deallocate(T* objects, std::size_t count) noexcept {
    freehold_heap_free_sized(heap_, objects, count * sizeof(T));
  }
  // Makes room for `count` objects where they are. False: it is as it was.
  bool try_expand(T* objects, std::size_t count) noexcept {
    return count <= kMaxCount && freehold_heap_try_expand(heap_, objects, count * sizeof(T)) != 0;
  }

  freehold_heap* heap() const noexcept { return heap_; }

  template <typename U>
  friend bool operator==(const HeapAllocator& a, const HeapAllocator<U>& b) noexcept {
    return a.heap() == b.heap();
  }
  template <typename U>
  friend bool operator!=(const HeapAllocator& a, const HeapAllocator<U>& b) noexcept {
    return a.heap() != b.heap();
  }

 private:
  static constexpr std::size_t kMaxCount = std::numeric_limits<std::ptrdiff_t>::max() / sizeof(T);

  static std::size_t BytesOf(std::size_t count) {
    if (count > kMaxCount) throw std::bad_array_new_length();
    return count * sizeof(T);
  }

  freehold_heap* heap_;
};

}  // namespace freehold

#endif  // FREEHOLD_RUNTIME_FREEHOLD_HPP_
