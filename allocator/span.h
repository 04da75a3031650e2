// Spans: runs of units with one use, and the free objects in them.
//
// A span's record lies outside of its memory, in the table that leads from an address to it (span_table.h).
// A span of objects is cut into objects of one size class, from its start upwards as they are needed; objects
// that come free form a list through the objects themselves:
//
//     start                                         limit (carved)              capacity
//       | object | free | object | free | free | object |   never handed out   |  rest  |
//                   ^------------'  ^-----'   `-- end
//                                   `-- free
//
// A free object's first word is the link, encoded so that neither a program that writes to freed memory nor
// one that reads it learns or chooses an address: the distance to the next free object (the exclusive or of
// both addresses), mixed with the heap's secret. Its second word is the tag, its address mixed with the secret:
// the mark by which a double free is known. Both are cheap to check, and an object handed out loses its tag.
//
// Thread safety: thread-compatible; who may touch what is H1 in object_heap.h. `owner` and `kind` are read by
//                everybody.
#ifndef FREEHOLD_ALLOCATOR_SPAN_H_
#define FREEHOLD_ALLOCATOR_SPAN_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/base/optimization.h"
#include "allocator/size_class.h"
#include "vm/units.h"

#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(FREEHOLD_TSAN)
#define FREEHOLD_WORKS_IN_MEMORY
#endif

namespace freehold::allocator {

class ThreadCache;
struct AllocationSite;

// What an object is while it is free.
struct FreeObject {
  std::uint64_t link;
  std::uint64_t tag;
};
static_assert(sizeof(FreeObject) <= kMinAlignment);

// Of a program; kernels give none above without being asked to.
#if defined(__x86_64__)
inline constexpr std::uint64_t kAddresses = std::uint64_t{1} << 47;
#else
inline constexpr std::uint64_t kAddresses = std::uint64_t{1} << 52;
#endif

inline std::uintptr_t AddressOf(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }

// Encodes the links and tags of a heap. A value: secret and end of a heap never change.
class LinkCode {
 public:
  LinkCode() = default;
  // `end`: terminates every list; an object that is never handed out, with a link of zero.
  LinkCode(std::uint64_t secret, FreeObject* end) : secret_(secret | kTopBit), end_(end) {}

  FreeObject* end() const { return end_; }
  std::uint64_t Tag(const void* p) const { return AddressOf(p) ^ secret_; }
  bool IsTagged(const void* p) const { return static_cast<const FreeObject*>(p)->tag == Tag(p); }
  // The same, computed now and not once it is needed, which the compiler would mix into a link in two steps, one after
  // the other behind the load of it: the next allocation waits for that.
  std::uint64_t TagAhead(const void* p) const {
    std::uint64_t tag = Tag(p);
    asm("" : "+r"(tag));
    return tag;
  }
  // Mixes `tag`, of `p`, into what should be the tag: nothing is left then. False if it was another word; so nobody makes
  // an object of what is none.
  bool TakeTag(FreeObject* p, std::uint64_t tag) const {
#if defined(FREEHOLD_WORKS_IN_MEMORY)
    // One instruction to take it away and to compare.
    bool other;
    asm("xorq %2, %0" : "+m"(p->tag), "=@ccnz"(other) : "r"(tag));
    return !other;
#else
    return (p->tag ^= tag) == 0;
#endif
  }
  // The object that follows `p`, whose tag is `tag`; beyond kAddresses if `p` is end().
  FreeObject* Next(const FreeObject* p, std::uint64_t tag) const { return reinterpret_cast<FreeObject*>(tag ^ p->link); }
  FreeObject* Next(const FreeObject* p) const { return Next(p, TagAhead(p)); }
  // Makes `p` a free object that `next` follows.
  void Link(FreeObject* p, const FreeObject* next) const {
    const std::uint64_t tag = Tag(p);
    p->link = AddressOf(next) ^ tag;
    p->tag = tag;
  }

 private:
  static constexpr std::uint64_t kTopBit = std::uint64_t{1} << 63;

  std::uint64_t secret_ = kTopBit;
  FreeObject* end_ = nullptr;
};

// A counter with one writer, at any time readable by others. Not an atomic read-modify-write.
class OwnerCounter {
 public:
  void Set(std::uint32_t value) { value_.store(value, std::memory_order_relaxed); }
  std::uint32_t Get() const { return value_.load(std::memory_order_relaxed); }
  void Add(std::uint32_t n) { Set(Get() + n); }
  void Subtract(std::uint32_t n) { Set(Get() - n); }
  // Takes one; whether none is left, as a signed number.
  bool CountDown() {
#if defined(FREEHOLD_WORKS_IN_MEMORY)
    // One instruction, which a compiler would not make of a relaxed load and a relaxed store.
    bool none;
    asm volatile("subl $1, %0" : "+m"(value_), "=@ccle"(none));
    return none;
#else
    Set(Get() - 1);
    return static_cast<std::int32_t>(Get()) <= 0;
#endif
  }
  void CountUp() {
#if defined(FREEHOLD_WORKS_IN_MEMORY)
    asm volatile("addl $1, %0" : "+m"(value_));
#else
    Add(1);
#endif
  }

 private:
  std::atomic<std::uint32_t> value_{0};
};

// What a free object is linked into: how a `Span` begins, and ThreadCache's objects at hand.
struct [[gnu::may_alias]] FreeList {
  FreeObject* free;      // never null: LinkCode::end() when there is none
  OwnerCounter credits;  // frees until an event
};

// What begins at, or covers, a unit.
enum class SpanKind : std::uint8_t {
  kNone = 0,  // no span
  kInterior,  // a unit of a span that begins `units` units before
  kObjects,   // objects of one size class
  kSuspect,   // the same, but it came through a fork: its free list must be rebuilt from tags before use
  kRun,       // one large object, in units of a chunk
  kMapped,    // one large object, with a mapping of its own
  kGuarded,   // a slot of GuardedObjects, which knows what is there
};

// Where a span of objects is in its owner's lists.
enum class SpanState : std::uint8_t {
  kCurrent,    // its class is allocated from it
  kAvailable,  // in its class's list: it has free objects, or some yet to be carved
  kFull,       // in no list, until `wake` of its objects came free
};

// The record of a unit. For the first unit of a span it describes the span.
struct alignas(vm::kCacheLineSize) Span {
  // kObjects: a FreeList, and the owner's.
  union {
    FreeObject* free = nullptr;
    AllocationSite* site;        // kRun, kMapped: if the object is a sample of the heap profile; else null
  };
  OwnerCounter credits;        // see ThreadCache::HandleEvent
  OwnerCounter carved;         // objects made

  // Of what is read without a lock or by others than the owner; each field stands for itself, and whoever
  // holds an object of the span may read the constant ones, since the object was handed to it.
  std::atomic<ThreadCache*> owner{nullptr};  // whose thread may use the free list; null: no span of objects

  // kObjects: constant while the span lasts.
  std::uintptr_t start = 0;      // of every kind of span
  std::uint64_t reciprocal = 0;  // SizeClassInfo::reciprocal
  // carved * SizeClassInfo::excess, and 0 unless kObjects: nothing else is an object to the fast path. The owner's; read
  // by everybody.
  std::atomic<std::uint64_t> limit{0};

  union {
    struct {
      std::uint32_t next;  // in a SpanList: names
      std::uint32_t previous;
    };
    struct {
      std::uint32_t used_pages;  // kRun, kMapped: of the object
      union {
        std::uint32_t mapped_pages;   // kMapped: of the mapping
        std::uint32_t counted_pages;  // kRun: of the object, when it was counted last
      };
    };
  };
  std::uint16_t units = 0;    // of the span, but for kMapped
  std::uint16_t at_hand = 0;  // kObjects: where a cache has the class's objects at hand, see ThreadCache::AtHandAt
  SizeClass size_class = 0;
  std::atomic<SpanKind> kind{SpanKind::kNone};
  SpanState state = SpanState::kCurrent;
  bool clean = false;  // what is not carved reads as zero

  // Release: see ObjectHeap::IsObject.
  void SetLimit(std::uint64_t value) { limit.store(value, std::memory_order_release); }
  // Whether `p` is the start of an object that was made: of all that were when the caller was given `p`.
  bool HasObjectAt(const void* p) const {
    const std::uint64_t scaled = (AddressOf(p) - start) * reciprocal;
#if defined(FREEHOLD_WORKS_IN_MEMORY)
    bool below;
    asm("cmpq %2, %1" : "=@ccb"(below) : "r"(scaled), "m"(limit));
    return below;
#else
    return scaled < limit.load(std::memory_order_relaxed);
#endif
  }
};
static_assert(sizeof(Span) == vm::kCacheLineSize);
static_assert(offsetof(Span, free) == offsetof(FreeList, free) && offsetof(Span, credits) == offsetof(FreeList, credits));

inline bool IsLarge(SpanKind kind) { return kind == SpanKind::kRun || kind == SpanKind::kMapped; }
inline bool IsLarge(const Span* span) { return IsLarge(span->kind.load(std::memory_order_relaxed)); }

}  // namespace freehold::allocator

#endif  // FREEHOLD_ALLOCATOR_SPAN_H_
