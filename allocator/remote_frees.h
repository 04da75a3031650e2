// Objects of other threads' spans that a thread freed, on their way home.
//
// They travel in stages, so that neither the sender's atomic operations nor anybody's cache misses grow with the
// number of objects. An object first waits for its cache line, which is likely to be in the other core's cache.
// Objects of one span are linked to a chain; a chain is a message, kept in its own first object; messages for one
// owner are linked to a list, which the owner receives by one compare-and-swap. The owner hangs a chain into the
// span's free list by its two ends, without looking at what is in between.
//
//     first object                  last object
//     | link | tag | second | ends | ... | link | tag |        ends: number of the last object, and how many
//        `-> next message in the list       `-> none
//
// Objects of 16 bytes have no room for that: each is a message of its own.
//
// Thread safety: thread-compatible; one thread's.
// Allocation:    none.
#ifndef FREEHOLD_ALLOCATOR_REMOTE_FREES_H_
#define FREEHOLD_ALLOCATOR_REMOTE_FREES_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/base/optimization.h"
#include "allocator/span.h"
#include "vm/units.h"

namespace freehold::allocator {

class ObjectHeap;

// Free objects of one span, linked from first to last.
struct ObjectChain {
  FreeObject* first = nullptr;
  FreeObject* last = nullptr;
  std::uint32_t count = 0;
};

// Turns a chain of `span`'s objects into a message, and back.
void MakeMessage(const LinkCode& code, const Span* span, const ObjectChain& chain);
// A count of 0 if the message was overwritten. The last object's link is undefined.
ObjectChain OpenMessage(const LinkCode& code, const Span* span, FreeObject* message);

class RemoteFrees {
 public:
  // `batch`: what is gathered for one owner before it is handed over.
  RemoteFrees(const ObjectHeap& heap, const LinkCode& code, vm::Bytes batch)
      : heap_(heap), code_(code), batch_bytes_(batch.value) {}
  RemoteFrees(const RemoteFrees&) = delete;
  RemoteFrees& operator=(const RemoteFrees&) = delete;

  // Takes `object` of `span` to free it. Whether it was free before shows a few calls later. May hand over what
  // was gathered: REQUIRES that no cache is locked.
  void Add(Span* span, FreeObject* object) {
    __builtin_prefetch(object, 1);
    arrivals_[arrival_count_] = {span, object};
    if (ABSL_PREDICT_FALSE(++arrival_count_ == kArrivals)) LinkArrivals();
  }
  // Marks everything that came as free. REQUIRES: as Add.
  void LinkArrivals();
  // Hands over everything. REQUIRES: as Add.
  void HandOverAll();
  // In the child of a fork: drops everything.
  void Forget();

 private:
  // Enough for the spans that a thread frees objects of at one time. A collision costs a shorter chain, or an
  // earlier hand-over.
  static constexpr std::size_t kArrivals = 16;
  static constexpr std::size_t kChains = 32;
  static constexpr std::size_t kBatches = 32;

  struct Arrival {
    Span* span = nullptr;
    FreeObject* object = nullptr;
  };
  struct PendingChain {
    Span* span = nullptr;
    ObjectChain chain;
    std::uint32_t room = 0;  // objects until it is complete
  };
  struct Batch {
    ThreadCache* owner = nullptr;
    FreeObject* first = nullptr;  // message; null: empty
    FreeObject* last = nullptr;
    std::size_t bytes = 0;
  };

  void Link(Span* span, FreeObject* object);
  void Complete(PendingChain& pending);
  void AddMessage(ThreadCache* owner, FreeObject* message, std::size_t bytes);
  void HandOver(Batch& batch);

  const ObjectHeap& heap_;
  const LinkCode code_;
  const std::size_t batch_bytes_;
  std::array<Arrival, kArrivals> arrivals_;
  std::size_t arrival_count_ = 0;
  std::array<PendingChain, kChains> chains_;
  std::array<Batch, kBatches> batches_;
};

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_REMOTE_FREES_H_
