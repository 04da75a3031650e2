#include "runtime/cli/heap_view.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "allocator/size_class.h"
#include "allocator/span.h"

namespace freehold::cli {
namespace {

using allocator::CacheStats;
using allocator::HeapLocation;
using allocator::kSizeClassCount;
using allocator::kSizeClasses;
using allocator::SizeClassStats;
using allocator::Span;
using allocator::SpanKind;
using allocator::SpanState;

constexpr std::uint64_t kWordBits = 64;
// More than any heap has: what a page that was overwritten might say.
constexpr std::uint64_t kMaxSteps = std::uint64_t{1} << 22;
constexpr std::uint64_t kMaxStepBytes = std::uint64_t{1} << 20;
constexpr std::uint32_t kMaxCaches = std::uint32_t{1} << 20;
constexpr std::uint64_t kMaxCacheBytes = std::uint64_t{1} << 20;
// Steps that are read at a time.
constexpr std::size_t kStepsAtOnce = 16;

bool IsSound(const HeapLocation& location) {
  const auto within = [&](std::uint64_t offset, std::uint64_t bytes) {
    return offset <= kMaxCacheBytes && bytes <= kMaxCacheBytes && offset + bytes <= location.cache_bytes;
  };
  return location.cache_bytes != 0 && location.cache_bytes <= kMaxCacheBytes && within(location.detached, 1) &&
         within(location.thread, sizeof(std::uint32_t)) && within(location.at_hand, location.at_hand_bytes * kSizeClassCount) &&
         location.at_hand_bytes >= sizeof(std::uint32_t) && location.at_hand_bytes <= kMaxCacheBytes &&
         location.at_hand_room <= location.at_hand_bytes - sizeof(std::uint16_t) &&
         location.at_hand_credits <= location.at_hand_bytes - sizeof(std::uint32_t) && location.step_bytes <= kMaxStepBytes &&
         location.step_bytes != 0 && location.step_bytes % sizeof(Span) == 0 && location.first_step <= location.end_step &&
         location.end_step <= kMaxSteps;
}

class HeapReader {
 public:
  HeapReader(const ProcessView& process, const HeapLocation& location) : process_(process), location_(location) {
    for (unsigned i = 0; i < kSizeClassCount; ++i) classes_[i].object_size = kSizeClasses[i].size;
  }

  // Caches first: spans of one that comes later are left out.
  absl::Status Run() {
    if (const absl::Status status = ReadCaches(); !status.ok()) return status;
    return ReadSpans();
  }

  HeapView Take() {
    HeapView view;
    for (const SizeClassStats& stats : classes_) {
      if (stats.spans != 0) view.classes.push_back(stats);
    }
    view.caches = std::move(caches_);
    return view;
  }

 private:
  absl::Status ReadCaches() {
    std::uint32_t count = 0;
    if (const absl::Status status = process_.Read(location_.cache_count, &count, sizeof(count)); !status.ok()) {
      return status;
    }
    if (count > kMaxCaches) return absl::DataLossError("the heap's number of threads cannot be");
    struct Bytes {
      std::uint8_t detached = 0;
      std::uint32_t thread = 0;
      std::vector<std::byte> at_hand;
    };
    std::vector<Bytes> caches(count);
    std::vector<ProcessView::Piece> pieces;
    for (std::uint32_t id = 0; id < count; ++id) {
      Bytes& cache = caches[id];
      cache.at_hand.resize(location_.at_hand_bytes * kSizeClassCount);
      const std::uint64_t address = location_.caches + id * location_.cache_bytes;
      pieces.push_back({address + location_.detached, &cache.detached, sizeof(cache.detached)});
      pieces.push_back({address + location_.thread, &cache.thread, sizeof(cache.thread)});
      pieces.push_back({address + location_.at_hand, cache.at_hand.data(), cache.at_hand.size()});
    }
    if (const absl::Status status = process_.ReadEach(pieces); !status.ok()) return status;
    for (std::uint32_t id = 0; id < count; ++id) {
      CacheStats stats = {.id = id, .attached = caches[id].detached == 0, .thread = caches[id].thread};
      for (unsigned i = 0; i < kSizeClassCount; ++i) {
        const std::byte* of_class = caches[id].at_hand.data() + i * location_.at_hand_bytes;
        std::uint16_t room;
        std::uint32_t credits;
        std::memcpy(&room, of_class + location_.at_hand_room, sizeof(room));
        std::memcpy(&credits, of_class + location_.at_hand_credits, sizeof(credits));
        // They may be of different moments; and a class without room has none.
        if (credits <= room) stats.at_hand.value += std::size_t{room + 1 - credits} * kSizeClasses[i].size;
      }
      caches_.push_back(stats);
    }
    return absl::OkStatus();
  }

  absl::Status ReadSpans() {
    const std::uint64_t first_word = location_.first_step / kWordBits;
    const std::uint64_t words = (location_.end_step + kWordBits - 1) / kWordBits - first_word;
    std::vector<std::uint64_t> writable(words);
    const absl::Status status = process_.Read(location_.writable + first_word * sizeof(std::uint64_t), writable.data(),
                                              words * sizeof(std::uint64_t));
    if (!status.ok()) return status;
    std::vector<std::uint64_t> steps;
    for (std::uint64_t step = location_.first_step; step < location_.end_step; ++step) {
      if ((writable[step / kWordBits - first_word] >> step % kWordBits & 1) != 0) steps.push_back(step);
    }
    const std::size_t records = kStepsAtOnce * location_.step_bytes / sizeof(Span);
    const auto buffer = std::make_unique<Span[]>(records);
    for (std::size_t done = 0; done < steps.size(); done += kStepsAtOnce) {
      const absl::Span<const std::uint64_t> some = absl::MakeConstSpan(steps).subspan(done, kStepsAtOnce);
      if (const absl::Status read = ReadSteps(some, buffer.get()); !read.ok()) return read;
    }
    return absl::OkStatus();
  }

  absl::Status ReadSteps(absl::Span<const std::uint64_t> steps, Span* buffer) {
    const std::size_t records = location_.step_bytes / sizeof(Span);
    std::vector<ProcessView::Piece> pieces;
    for (std::size_t i = 0; i < steps.size(); ++i) {
      pieces.push_back({location_.records + steps[i] * location_.step_bytes,
                        static_cast<void*>(buffer + i * records), location_.step_bytes});
    }
    if (const absl::Status status = process_.ReadEach(pieces); !status.ok()) return status;
    for (const Span& span : absl::MakeConstSpan(buffer, steps.size() * records)) Count(span);
    return absl::OkStatus();
  }

  // As ThreadCache::AddStats counts it.
  void Count(const Span& span) {
    const SpanKind kind = span.kind.load(std::memory_order_relaxed);
    if (kind != SpanKind::kObjects && kind != SpanKind::kSuspect) return;
    const std::uint64_t owner = reinterpret_cast<std::uintptr_t>(span.owner.load(std::memory_order_relaxed));
    const std::uint64_t offset = owner - location_.caches;
    if (owner < location_.caches || offset % location_.cache_bytes != 0) return;
    const std::uint64_t id = offset / location_.cache_bytes;
    if (id >= caches_.size() || span.size_class >= kSizeClassCount) return;
    const auto& info = kSizeClasses[span.size_class];
    const std::uint32_t used = span.state == SpanState::kAvailable ? span.credits.Get() : span.carved.Get();
    const std::uint64_t held = std::min(used, info.capacity);
    SizeClassStats& of_class = classes_[span.size_class];
    ++of_class.spans;
    of_class.capacity += info.capacity;
    of_class.allocated += held;
    CacheStats& of_cache = caches_[id];
    ++of_cache.spans;
    of_cache.capacity.value += std::size_t{info.capacity} * info.size;
    of_cache.allocated.value += held * info.size;
  }

  const ProcessView& process_;
  const HeapLocation& location_;
  std::array<SizeClassStats, kSizeClassCount> classes_;
  std::vector<CacheStats> caches_;
};

}  // namespace

absl::StatusOr<HeapView> ReadHeap(const ProcessView& process, const std::vector<ProcessView::Metric>& metrics) {
  const absl::StatusOr<HeapLocation> location = process.Heap();
  if (!location.ok()) return location.status();
  if (!IsSound(*location)) {
    return absl::DataLossError(absl::StrCat("the telemetry page of process ", process.pid(), " was overwritten"));
  }
  HeapReader reader(process, *location);
  if (const absl::Status status = reader.Run(); !status.ok()) return status;
  HeapView view = reader.Take();
  const auto value_of = [&](absl::string_view name) {
    const auto found = std::find_if(metrics.begin(), metrics.end(),
                                    [&](const ProcessView::Metric& metric) { return metric.name == name; });
    return found == metrics.end() ? 0 : found->value;
  };
  view.sums.large.value = value_of("heap_large_bytes");
  view.sums.allocated = view.sums.large;
  for (const SizeClassStats& stats : view.classes) view.sums.allocated.value += stats.allocated * stats.object_size;
  view.sums.mapped.value = value_of("heap_chunk_bytes") + value_of("heap_large_mapped_bytes");
  view.sums.active.value = view.sums.mapped.value - std::min(view.sums.mapped.value, value_of("heap_free_bytes"));
  return view;
}

void ForEachHeapStatistic(const HeapView& heap, absl::FunctionRef<void(const runtime::Statistic&)> visit) {
  for (const auto& row : runtime::HeapStatistics()) {
    visit({.name = row.name, .help = row.help, .value = row.value(heap.sums)});
  }
  for (const auto& row : runtime::SizeClassStatistics()) {
    for (const SizeClassStats& stats : heap.classes) {
      visit({.name = row.name, .help = row.help, .value = row.value(stats), .label = "size", .label_value = stats.object_size});
    }
  }
  for (const auto& row : runtime::CacheStatistics()) {
    for (const CacheStats& stats : heap.caches) {
      visit({.name = row.name, .help = row.help, .value = row.value(stats), .label = "cache", .label_value = stats.id});
    }
  }
}

}  // namespace freehold::cli
