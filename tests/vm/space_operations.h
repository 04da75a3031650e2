// Verbs on an AddressSpace, with their arguments, as small structs: what a seeded test, threads and a fuzzer perform
// on a SpaceModel. All fields are small numbers of which every value means something, so that any bytes are a list of
// operations.
//
// An operation is added by writing its struct, with Perform and Visit, and naming it in `SpaceOperation` and in kWeights.
#ifndef FREEHOLD_TESTS_VM_SPACE_OPERATIONS_H_
#define FREEHOLD_TESTS_VM_SPACE_OPERATIONS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "absl/types/span.h"
#include "tests/vm/space_model.h"
#include "vm/address_space.h"

namespace freehold::vm::test {

// Some pages.
struct Span {
  // A window of the model, or kMapped and above.
  std::uint8_t where = 0;
  std::uint16_t page = 0;  // of the window; among the mapped pages, in order
  std::uint8_t size = 0;   // see Count

  static constexpr std::uint8_t kMapped = 4;  // from a mapped page on
  static constexpr std::uint8_t kVma = 5;     // all of its VMA
  static constexpr std::uint8_t kPlaces = 6;

  std::size_t Count() const;
  // In a window, whatever is there.
  PageRange Window(SpaceModel& model) const;
  // Somewhere; the model is not alone: in pages of ours. Empty if there are none.
  PageRange Range(SpaceModel& model) const;

  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("where", where, kPlaces);
    visit("page", page);
    visit("size", size);
  }
};

struct Map {
  Span span = {};
  Placement placement = Placement::kAnywhere;
  std::uint8_t protection = 0;  // see ProtectionOf
  Content content = Content::kZeroed;
  bool populate = false;
  bool huge_pages = false;
  std::uint8_t alignment = 0;  // log2; anywhere only
  os::MemoryLock lock = os::MemoryLock::kNone;
  std::uint8_t backing = 0;  // 0 and above kBackings: none
  std::uint8_t backing_page = 0;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
    visit("placement", placement, 4);
    visit("protection", protection, 8);
    visit("content", content, 2);
    visit("populate", populate);
    visit("huge_pages", huge_pages);
    visit("alignment", alignment, 7);
    visit("lock", lock, 3);
    visit("backing", backing, 8);
    visit("backing_page", backing_page);
  }
};

struct Unmap {
  Span span = {};

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
  }
};

struct Protect {
  Span span = {};
  std::uint8_t protection = 0;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
    visit("protection", protection, 8);
  }
};

struct Advise {
  Span span = {};
  Advice advice = Advice::kDontNeed;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
    visit("advice", advice, 7);
  }
};

struct Discard {
  Span first = {};
  Span second = {};

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("first", first);
    visit("second", second);
  }
};

struct Write {
  Span span = {};

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
  }
};

struct Lookup {
  Span span = {};

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
  }
};

struct Residency {
  Span span = {};

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
  }
};

struct Populate {
  enum class Stop : std::uint8_t { kNever, kCancelled, kDeadline };
  Span span = {};
  Stop stop = Stop::kNever;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
    visit("stop", stop, 3);
  }
};

struct LockMemory {
  Span span = {};
  os::MemoryLock lock = os::MemoryLock::kNone;  // which unlocks

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
    visit("lock", lock, 3);
  }
};

// LockAll and UnlockAll. Only alone: it is about everybody's pages.
struct LockAll {
  os::MemoryLock lock = os::MemoryLock::kNone;  // which unlocks
  bool current = false;
  bool future = false;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("lock", lock, 3);
    visit("current", current);
    visit("future", future);
  }
};

struct Remap {
  Span span = {};
  std::uint8_t size = 0;  // as Span's
  bool same_size = false;
  Placement placement = Placement::kAnywhere;
  Span target = {};
  bool may_move = false;
  bool keep_source = false;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
    visit("size", size);
    visit("same_size", same_size);
    visit("placement", placement, 4);
    visit("target", target);
    visit("may_move", may_move);
    visit("keep_source", keep_source);
  }
};

struct Purge {
  PurgeScope scope = PurgeScope::kDecayed;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("scope", scope, 2);
  }
};

struct Tick {
  std::uint8_t later = 0;  // by sixteenths of a second

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("later", later);
  }
};

// Calls with arguments that no space accepts.
struct Misuse {
  std::uint8_t call = 0;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("call", call);
  }
};

// Pins pages with one of the model's pins; or takes that pin away.
struct PinPages {
  Span span = {};
  std::uint8_t pin = 0;
  bool release = false;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
    visit("pin", pin, SpaceModel::kPins);
    visit("release", release);
  }
};

// Snapshot and WriteMaps.
struct TakeSnapshot {
  std::uint8_t room = 0;  // for VMAs; 255: for all of them

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("room", room);
  }
};

// A notifier of the whole space comes, or goes.
struct Listen {
  bool on = false;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("on", on);
  }
};

// A step of a transaction.
struct Step {
  enum class Verb : std::uint8_t { kNone, kMap, kUnmap, kProtect };
  Verb verb = Verb::kNone;
  Span span = {};
  std::uint8_t protection = 0;
  bool replace = false;
  os::MemoryLock lock = os::MemoryLock::kNone;
  std::uint8_t backing = 0;  // as Map's
  std::uint8_t backing_page = 0;

  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("verb", verb, 4);
    visit("span", span);
    visit("protection", protection, 8);
    visit("replace", replace);
    visit("lock", lock, 3);
    visit("backing", backing, 16);
    visit("backing_page", backing_page);
  }
};

struct Transact {
  Step first = {};
  Step second = {};
  Step third = {};

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("first", first);
    visit("second", second);
    visit("third", third);
  }
};

// The nth call of the kernel, or of userfaultfd, that the next verb makes fails. Only alone.
struct FailCall {
  std::uint8_t nth = 0;
  std::uint8_t error = 0;
  bool userfault = false;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("nth", nth, 16);
    visit("error", error, 3);
    visit("userfault", userfault);
  }
};

// A verb on pages that all models share. Not alone.
struct Contend {
  std::uint8_t verb = 0;
  std::uint8_t arena = 0;
  std::uint8_t page = 0;
  std::uint8_t size = 0;
  std::uint8_t choice = 0;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("verb", verb);
    visit("arena", arena);
    visit("page", page);
    visit("size", size);
    visit("choice", choice);
  }
};

// ---- Files ----

// A part of a file of the model's.
struct MapFile {
  Span span = {};
  Placement placement = Placement::kAnywhere;
  std::uint8_t protection = 0;
  std::uint8_t file = 0;  // see SpaceModel::kFiles
  std::uint8_t page = 0;
  os::Sharing sharing = os::Sharing::kPrivate;
  bool populate = false;
  os::MemoryLock lock = os::MemoryLock::kNone;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
    visit("placement", placement, 4);
    visit("protection", protection, 8);
    visit("file", file, SpaceModel::kFiles);
    visit("page", page);
    visit("sharing", sharing, 2);
    visit("populate", populate);
    visit("lock", lock, 3);
  }
};

// Unmaps a file mapping and maps the same part of the file in the same way: a window, if it can be one.
struct Reopen {
  Span span = {};

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
  }
};

// The file itself, by its own system calls.
struct ResizeFile {
  std::uint8_t file = 0;
  std::uint8_t pages = 0;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("file", file, SpaceModel::kFiles);
    visit("pages", pages);
  }
};

struct WriteFile {
  std::uint8_t file = 0;
  std::uint8_t page = 0;
  std::uint8_t count = 0;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("file", file, SpaceModel::kFiles);
    visit("page", page);
    visit("count", count);
  }
};

struct Sync {
  Span span = {};
  std::uint8_t choice = 0;  // waits for the disk, and invalidates, now and then

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
    visit("choice", choice);
  }
};

// ---- Pagers ----

// By a pager of its own. Nothing where userfaultfd is not permitted.
struct MapPager {
  Span span = {};
  Placement placement = Placement::kAnywhere;
  std::uint8_t protection = 0;
  std::uint8_t limit = 0;       // of its protection
  std::uint8_t page_limit = 0;  // to which it may grow; every sixteenth is mapped where there may be no pagers

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
    visit("placement", placement, 4);
    visit("protection", protection, 8);
    visit("limit", limit, 4);
    visit("page_limit", page_limit);
  }
};

struct HandBack {
  enum class Verb : std::uint8_t { kWriteback, kEvict, kInvalidate };
  Span span = {};
  Verb verb = Verb::kWriteback;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
    visit("verb", verb, 3);
  }
};

// Tells the pagers of some pages how to behave.
struct OrderPager {
  enum class Order : std::uint8_t {
    kFail,          // reads of these pages
    kFailAndTouch,  // and somebody finds out
    kMend,
    kChange,        // what they hold, and says so
    kRefuse,        // write-back
    kAccept,
  };
  Span span = {};
  Order order = Order::kFail;

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
    visit("order", order, 6);
  }
};

// Whether the kernel, reading and writing for the program, finds the protection, content and end that should be.
struct Probe {
  Span span = {};

  void Perform(SpaceModel& model) const;
  template <typename Visitor>
  void Visit(Visitor& visit) {
    visit("span", span);
  }
};

using SpaceOperation =
    std::variant<Map, Unmap, Protect, Advise, Discard, Write, Lookup, Residency, Populate, LockMemory, LockAll, Remap,
                 Purge, Tick, Misuse, PinPages, TakeSnapshot, Listen, Transact, FailCall, Contend, MapFile, Reopen,
                 ResizeFile, WriteFile, Sync, MapPager, HandBack, OrderPager, Probe>;
// How often each comes among random ones.
inline constexpr int kWeights[] = {50, 40, 16, 14, 8,  40, 4,  4,  8, 14, 4,  24, 2, 4, 4,
                                   12, 4,  4,  12, 12, 40, 32, 10, 6, 8,  6, 20, 10, 6, 8};
static_assert(std::size(kWeights) == std::variant_size_v<SpaceOperation>);

// Any bytes are operations; Encode(Decode(bytes)) decodes to the same.
std::vector<SpaceOperation> Decode(absl::Span<const std::uint8_t> bytes);
std::vector<std::uint8_t> Encode(const std::vector<SpaceOperation>& operations);
std::vector<SpaceOperation> RandomOperations(std::uint64_t seed, std::size_t bytes);
// Of a run of the model test that has the space to itself.
inline constexpr std::size_t kModelBytes = 4000;
// As C++, so that it can be pasted into a test.
std::string ToString(const SpaceOperation& operation);

// The spaces that operations run on, by number, so that a fuzzer can choose.
struct Variant {
  const char* name;
  AddressSpaceOptions options;
};
const std::vector<Variant>& Variants();

// Performs `operations` on a fresh space, checking it after each; "" or what failed. `performed`: how many it took.
std::string Run(const std::vector<SpaceOperation>& operations, const AddressSpaceOptions& options,
                std::size_t* performed = nullptr);
// The same; a failure comes with the operations that are enough for it.
std::string RunAndShrink(const std::vector<SpaceOperation>& operations, const AddressSpaceOptions& options);

// From here on, a crash of this process prints `what`, and the operations, before it ends. They must outlive that.
void PrintOnCrash(const std::string* what, const std::vector<SpaceOperation>* operations);

}  // namespace freehold::vm::test

#endif  // FREEHOLD_TESTS_VM_SPACE_OPERATIONS_H_
