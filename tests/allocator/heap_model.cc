#include "tests/allocator/heap_model.h"

#include <algorithm>
#include <utility>

#include "tests/allocator/heap_fixture.h"

namespace freehold::allocator {
namespace {

const char* ToString(ModelOperation::Kind kind) {
  using enum ModelOperation::Kind;
  switch (kind) {
    case kAllocate: return "Allocate";
    case kAllocateZeroed: return "AllocateZeroed";
    case kAllocateAligned: return "AllocateAligned";
    case kReallocate: return "Reallocate";
    case kGrow: return "Grow";
    case kFree: return "Free";
    case kFreeSized: return "FreeSized";
    case kFreeUncached: return "FreeUncached";
    case kExchange: return "Exchange";
    case kReattach: return "Reattach";
    case kTrim: return "Trim";
    case kTick: return "Tick";
  }
  return "?";
}

// Mostly small, as in programs; now and then of every kind that the heap treats in its own way.
std::size_t RandomSize(std::mt19937_64& random) {
  const unsigned choice = random() % 1000;
  if (choice < 800) return random() % 512;
  if (choice < 930) return random() % 8192;
  if (choice < 985) return random() % kMaxClassSize;
  if (choice < 998) return random() % (std::size_t{1} << 20);
  return random() % (std::size_t{5} << 20);
}

constexpr std::size_t kLargestGrown = std::size_t{2} << 20;

// All of a small object, both ends of a large one: the model is not to spend its time in memset.
constexpr std::size_t kChecked = 512;

void FillEnds(const ModelObject& object) {
  const std::size_t part = std::min(object.size, kChecked);
  Fill(object.p, part, object.seed);
  Fill(static_cast<char*>(object.p) + object.size - part, part, object.seed + 1);
}

bool HasEnds(const ModelObject& object, std::size_t size) {
  const std::size_t part = std::min(size, std::min(object.size, kChecked));
  if (object.size <= kChecked) return HasContent(object.p, part, object.seed + 1);
  if (!HasContent(object.p, std::min(part, object.size - kChecked), object.seed)) return false;
  return size < object.size || HasContent(static_cast<char*>(object.p) + object.size - part, part, object.seed + 1);
}

}  // namespace

ModelOperation ModelOperation::Random(std::mt19937_64& random, std::size_t slots) {
  using enum Kind;
  static constexpr std::pair<unsigned, Kind> kTable[] = {
      {300, kAllocate},    {360, kAllocateZeroed}, {400, kAllocateAligned}, {440, kReallocate}, {480, kGrow},
      {800, kFree},        {850, kFreeSized},      {870, kFreeUncached},    {990, kExchange},
      {994, kReattach},    {995, kTrim},           {1000, kTick},
  };
  const unsigned choice = random() % 1000;
  const Kind kind =
      std::find_if(std::begin(kTable), std::end(kTable), [&](auto& row) { return choice < row.first; })->second;
  return {.kind = kind,
          .slot = random() % slots,
          .size = RandomSize(random),
          .alignment = std::size_t{1} << random() % (random() % 20 == 0 ? 22 : 13)};
}

std::string ModelOperation::ToString() const {
  return std::string(allocator::ToString(kind)) + " slot " + std::to_string(slot) + " size " +
         std::to_string(size) + " alignment " + std::to_string(alignment);
}

ModelObject ModelExchange::Swap(std::size_t index, const ModelObject& object) {
  Place& place = places_[index % places_.size()];
  const std::lock_guard<std::mutex> lock(place.mutex);
  return std::exchange(place.object, object);
}

std::vector<ModelObject> ModelExchange::TakeAll() {
  std::vector<ModelObject> objects;
  for (std::size_t i = 0; i < places_.size(); ++i) {
    const ModelObject object = Swap(i, {});
    if (object.p != nullptr) objects.push_back(object);
  }
  return objects;
}

HeapModel::HeapModel(ObjectHeap& heap, ModelExchange& exchange, bool may_fail)
    : heap_(heap), exchange_(exchange), may_fail_(may_fail), cache_(heap.AttachThread()) {}

HeapModel::~HeapModel() {
  if (cache_ != nullptr) heap_.DetachThread(cache_);
}

std::string HeapModel::Check(const ModelObject& object) const {
  if (object.p == nullptr) return {};
  if (heap_.UsableSize(object.p) < object.size) return "usable size is too small";
  if (!HasEnds(object, object.size)) return "content is damaged";
  return {};
}

std::string HeapModel::Put(ModelObject& slot, void* p, const ModelOperation& operation) {
  if (p == nullptr) return may_fail_ ? "" : "out of memory";
  if (!IsAligned(p, kMinAlignment)) return "not aligned";
  slot = {.p = p, .size = operation.size, .seed = next_seed_ += 12345};
  FillEnds(slot);
  return {};
}

std::string HeapModel::Grow(ModelObject& slot, std::size_t steps) {
  if (slot.p == nullptr) return {};
  for (std::size_t step = 0; step < steps && slot.size < kLargestGrown; ++step) {
    const std::size_t size = slot.size + slot.size / 4 + 64;
    void* p = cache_->Reallocate(slot.p, size);
    if (p == nullptr) return may_fail_ ? "" : "out of memory";
    slot.p = p;
    if (!HasEnds(slot, slot.size)) return "content was lost";
    if (std::string error = Put(slot, p, {.size = size}); !error.empty()) return error;
  }
  return {};
}

std::string HeapModel::Perform(const ModelOperation& operation) {
  using enum ModelOperation::Kind;
  ModelObject& slot = slots_[operation.slot];
  if (cache_ == nullptr) cache_ = heap_.AttachThread();
  if (cache_ == nullptr) return may_fail_ ? "" : "no cache";
  if (std::string error = Check(slot); !error.empty()) return error;
  const bool replaces = operation.kind <= kAllocateAligned;
  if (replaces && slot.p != nullptr) cache_->Free(std::exchange(slot.p, nullptr));
  switch (operation.kind) {
    case kAllocate:
      return Put(slot, cache_->Allocate(operation.size), operation);
    case kAllocateZeroed: {
      void* p = cache_->AllocateZeroed(operation.size);
      if (p != nullptr && !IsZero(p, operation.size)) return "not zero";
      return Put(slot, p, operation);
    }
    case kAllocateAligned: {
      void* p = cache_->AllocateAligned(operation.alignment, operation.size);
      if (!IsAligned(p, operation.alignment)) return "not aligned";
      return Put(slot, p, operation);
    }
    case kReallocate: {
      void* p = cache_->Reallocate(slot.p, operation.size);
      if (p == nullptr) return may_fail_ ? "" : "out of memory";
      const ModelObject moved = {.p = p, .size = slot.size, .seed = slot.seed};
      if (slot.p != nullptr && !HasEnds(moved, operation.size)) return "content was lost";
      return Put(slot, p, operation);
    }
    case kGrow:
      return Grow(slot, operation.size % 16);
    case kFree:
      cache_->Free(std::exchange(slot.p, nullptr));
      return {};
    case kFreeSized:
      cache_->FreeSized(std::exchange(slot.p, nullptr), slot.size);
      return {};
    case kFreeUncached:
      heap_.Free(std::exchange(slot.p, nullptr));
      return {};
    case kExchange:
      slot = exchange_.Swap(operation.size, slot);
      return {};
    case kReattach:
      heap_.DetachThread(cache_);
      cache_ = heap_.AttachThread();
      return {};
    case kTrim:
      heap_.Trim(cache_);
      return {};
    case kTick:
      heap_.Tick(heap_.space().kernel().Now());
      return {};
  }
  return "unknown operation";
}

std::string HeapModel::Run(std::uint64_t seed, int count) {
  std::mt19937_64 random(seed);
  std::array<ModelOperation, 50> last;
  for (int i = 0; i < count; ++i) {
    ModelOperation& operation = last[i % last.size()] = ModelOperation::Random(random, kSlots);
    const std::string error = Perform(operation);
    if (error.empty()) continue;
    std::string message = error + "; seed " + std::to_string(seed) + ", operation " + std::to_string(i) + ":\n";
    for (int k = std::max<int>(0, i + 1 - last.size()); k <= i; ++k) {
      message += "  " + last[k % last.size()].ToString() + "\n";
    }
    return message;
  }
  return {};
}

std::string HeapModel::Finish() {
  for (ModelObject& object : slots_) {
    if (std::string error = Check(object); !error.empty()) return error;
    if (cache_ == nullptr) {
      heap_.Free(object.p);
    } else {
      cache_->Free(object.p);
    }
    object.p = nullptr;
  }
  return {};
}

}  // namespace freehold::allocator
