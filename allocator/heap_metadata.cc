#include "allocator/heap_metadata.h"

#include <algorithm>

#include "vm/os/check.h"
#include "vm/os/kernel.h"

namespace freehold::allocator {
namespace {

constexpr std::size_t RoundUp(std::size_t n, std::size_t multiple) {
  return (n + multiple - 1) & ~(multiple - 1);
}

// A power of two of parts of 2^shift bytes that is no less than the parts which `space` touches, so that each of
// them has a record of its own.
std::size_t PartsOf(const vm::AddressSpace& space, unsigned shift) {
  const std::uintptr_t first = AddressOf(space.reservation().address()) >> shift;
  const std::uintptr_t last = (AddressOf(space.reservation().end.address()) - 1) >> shift;
  return std::bit_ceil(last - first + 1);
}

}  // namespace

// The reservation, each section from a multiple of kStep on:
//
//   | Commitments, their bits | header | caches | chunk records | spans |
vm::Result<HeapMetadata> HeapMetadata::Create(vm::AddressSpace& space, const Layout& layout) {
  const std::size_t span_count = PartsOf(space, kUnitShift);
  const std::size_t chunk_count = PartsOf(space, kChunkShift);
  const std::size_t body = RoundUp(layout.header_bytes, kStep) + RoundUp(layout.cache_bytes, kStep) +
                           RoundUp(chunk_count * sizeof(ChunkRecord), kStep) +
                           RoundUp(span_count * sizeof(Span), kStep);
  // Enough bits for the body and, generously, for themselves.
  const std::size_t words = body / kStep / kWordBits + 2;
  const std::size_t prefix = RoundUp(sizeof(Commitments) + words * sizeof(std::uint64_t), kStep);

  vm::os::Kernel& kernel = space.kernel();
  const vm::Pages size = vm::PagesFor({prefix + body});
  const vm::Result<vm::PageRange> reserved = kernel.Reserve(size, vm::PagesFor({kStep}));
  if (!reserved.ok()) return reserved.error();

  HeapMetadata metadata;
  metadata.kernel_ = &kernel;
  metadata.reservation_ = *reserved;
  std::byte* section = reserved->address();
  metadata.commitments_ = reinterpret_cast<Commitments*>(section);
  metadata.header_ = section += prefix;
  metadata.caches_ = section += RoundUp(layout.header_bytes, kStep);
  section += RoundUp(layout.cache_bytes, kStep);
  metadata.chunks_ = ChunkTable(section, chunk_count);
  section += RoundUp(chunk_count * sizeof(ChunkRecord), kStep);
  metadata.spans_ = SpanTable(section, span_count);
  metadata.span_section_ = section;

  const std::size_t writable = prefix + RoundUp(layout.header_bytes, kStep);
  const vm::PageRange first = vm::PageRange::FromBytes(reserved->address(), {writable});
  kernel.AdviseCoreDumps(*reserved, vm::os::CoreDumps::kOmit);
  kernel.AdviseCoreDumps(first, vm::os::CoreDumps::kInclude);
  vm::Error error = kernel.Protect(*reserved, vm::os::Protection::kRead);
  if (error.ok()) error = kernel.Protect(first, vm::os::Protection::kReadWrite);
  if (!error.ok()) {
    metadata.Release();
    return error;
  }
  metadata.commitments_->steps.store(writable / kStep, std::memory_order_relaxed);
  return metadata;
}

void HeapMetadata::Release() const {
  // A copy, since this object may lie in what it gives back.
  const vm::PageRange reservation = reservation_;
  const vm::Error error = kernel_->Release(reservation);
  FREEHOLD_CHECK(error.ok());
}

vm::Error HeapMetadata::Commit(const void* first, std::size_t bytes) const {
  const std::size_t begin = static_cast<const std::byte*>(first) - reservation_.address();
  const std::size_t end_step = (begin + bytes + kStep - 1) / kStep;
  for (std::size_t step = begin / kStep; step < end_step; ++step) {
    const std::uint64_t word = commitments_->done[step / kWordBits].load(std::memory_order_acquire);
    if ((word >> step % kWordBits & 1) != 0) continue;
    const std::size_t ahead = std::min(end_step + kStepsAhead, step_count());
    if (CommitSteps(step, ahead).ok()) return vm::Error::Ok();
    // Strict overcommit may refuse the large step and grant the small one.
    return CommitSteps(step, end_step);
  }
  return vm::Error::Ok();
}

vm::Error HeapMetadata::CommitSteps(std::size_t first, std::size_t end) const {
  const vm::PageRange range =
      vm::PageRange::FromBytes(reservation_.address() + first * kStep, {(end - first) * kStep});
  kernel_->AdviseCoreDumps(range, vm::os::CoreDumps::kInclude);
  if (const vm::Error error = kernel_->Protect(range, vm::os::Protection::kReadWrite); !error.ok()) {
    return error;
  }
  for (std::size_t step = first; step < end; ++step) {
    const std::uint64_t bit = std::uint64_t{1} << step % kWordBits;
    // Pairs with the acquire in Commit: who sees the bit may write.
    const std::uint64_t before =
        commitments_->done[step / kWordBits].fetch_or(bit, std::memory_order_release);
    if ((before & bit) == 0) commitments_->steps.fetch_add(1, std::memory_order_relaxed);
  }
  return vm::Error::Ok();
}

void HeapMetadata::ForEachWritableSpan(void (*visit)(void* context, Span* span), void* context) const {
  const std::size_t first = static_cast<std::size_t>(span_section_ - reservation_.address()) / kStep;
  const std::size_t end = reservation_.bytes().value / kStep;
  for (std::size_t word = first / kWordBits; word * kWordBits < end; ++word) {
    std::uint64_t done = commitments_->done[word].load(std::memory_order_acquire);
    for (; done != 0; done &= done - 1) {
      const std::size_t step = word * kWordBits + static_cast<std::size_t>(std::countr_zero(done));
      if (step < first || step >= end) continue;
      auto* span = reinterpret_cast<Span*>(reservation_.address() + step * kStep);
      for (std::size_t i = 0; i < kStep / sizeof(Span); ++i) visit(context, span + i);
    }
  }
}

void HeapMetadata::Locate(HeapLocation& location) const {
  location.records = AddressOf(reservation_.address());
  location.step_bytes = kStep;
  location.writable = AddressOf(commitments_->done);
  location.first_step = static_cast<std::size_t>(span_section_ - reservation_.address()) / kStep;
  location.end_step = step_count();
}

vm::Bytes HeapMetadata::committed() const {
  return {commitments_->steps.load(std::memory_order_relaxed) * kStep};
}

}  // namespace freehold::allocator
