// Random verbs on an AddressSpace beside a naive map of its pages: the same operations drive the model test
// and the fuzz target.
#ifndef FREEHOLD_TESTS_VM_SPACE_MODEL_H_
#define FREEHOLD_TESTS_VM_SPACE_MODEL_H_

#include <cstdint>
#include <string>
#include <vector>

#include "vm/address_space.h"

namespace freehold::vm {

// One verb with its arguments, as small numbers that a fuzzer can mutate: every value means something.
struct SpaceOperation {
  enum class Kind : std::uint8_t {
    kMapAnywhere,
    kMapFixed,
    kMapReplace,
    kUnmap,
    kProtect,
    kPopulate,
    kDiscard,
    kWrite,
    kLookup,
    kPurge,
    kTick,
    kAdvise,
    kResidency,
    kLockMemory,
    kUnlockMemory,
    kLockAll,
    kUnlockAll,
    kRemap,
    kKindCount
  };
  Kind kind;
  std::uint16_t page = 0;    // of the window, modulo its size
  std::uint8_t count = 0;    // pages, see SpaceModel
  std::uint8_t choice = 0;   // protection, content, alignment, value: bits as the verb needs them

  std::string ToString() const;
};

// What the space should look like, page by page, checked against what it does look like.
//
// The model looks at `window` pages at the start of every zone; operations at fixed addresses go there, and
// Map's own choices land there too while the space is young.
class SpaceModel {
 public:
  static constexpr std::size_t kWindowPages = 512;

  explicit SpaceModel(AddressSpace& space);

  // Performs `operation` on both; false, with a message in `failure`, when they disagree.
  bool Perform(const SpaceOperation& operation);
  // Compares every page: mapped or not, protection, mapping identity, content; then CheckInvariants.
  bool CheckAll();
  const std::string& failure() const { return failure_; }

 private:
  struct Page {
    bool mapped = false;
    os::Protection protection = os::Protection::kNone;
    os::MemoryLock lock = os::MemoryLock::kNone;
    std::uint64_t mapping = 0;   // the model's own number of the mapping
    bool known = false;          // whether `value` is what the page must hold
    std::uint8_t value = 0;
  };

  bool Fail(const std::string& what);
  PageRange RangeOf(const SpaceOperation& operation) const;
  Page* At(PageNumber page);
  bool ExpectError(const char* verb, Error got, ErrorCode want);
  bool Map(const SpaceOperation& operation, Placement placement);
  // Whether locks are refused here, for want of privilege or by a limit; then nothing changed.
  static bool IsLockLimit(Error error);
  void SetLockOf(PageRange range, os::MemoryLock lock);
  bool Remap(const SpaceOperation& operation);
  bool CheckPage(PageNumber number, const Page& page);

  AddressSpace& space_;
  std::vector<PageRange> windows_;
  std::vector<std::vector<Page>> pages_;           // of each window
  std::vector<std::pair<std::uint64_t, std::uint64_t>> generations_;  // model mapping -> generation
  std::uint64_t last_mapping_ = 0;
  os::MemoryLock future_lock_ = os::MemoryLock::kNone;
  std::string failure_;
};

// Runs `operations` on a fresh space; "" or the failure with the operations that led to it.
std::string RunSpaceOperations(const std::vector<SpaceOperation>& operations,
                               const AddressSpaceOptions& options, std::size_t check_every);

}  // namespace freehold::vm

#endif  // FREEHOLD_TESTS_VM_SPACE_MODEL_H_
