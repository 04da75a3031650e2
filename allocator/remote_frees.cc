#include "allocator/remote_frees.h"

#include <utility>

#include "allocator/object_heap.h"
#include "allocator/size_class.h"
#include "allocator/thread_cache.h"

namespace freehold::allocator {
namespace {

// A message's first object.
struct MessageObject : FreeObject {
  std::uint64_t second;  // as a link
  std::uint64_t ends;    // mixed with the tag, like links
};

constexpr bool HasRoom(const SizeClassInfo& info) { return info.size >= sizeof(MessageObject); }

}  // namespace

void MakeMessage(const LinkCode& code, const Span* span, const ObjectChain& chain) {
  const SizeClassInfo& info = kSizeClasses[span->size_class];
  if (!HasRoom(info)) return;
  auto* message = static_cast<MessageObject*>(chain.first);
  const std::uint64_t last = (AddressOf(chain.last) - span->start) / kMinAlignment;
  message->second = message->link;
  message->ends = code.Tag(message) ^ (last << 32 | chain.count);
}

ObjectChain OpenMessage(const LinkCode& code, const Span* span, FreeObject* message) {
  const SizeClassInfo& info = kSizeClasses[span->size_class];
  if (!HasRoom(info)) return {.first = message, .last = message, .count = 1};
  auto* first = static_cast<MessageObject*>(message);
  const std::uint64_t ends = code.Tag(first) ^ first->ends;
  const std::uint64_t last = span->start + (ends >> 32) * kMinAlignment;
  const auto count = static_cast<std::uint32_t>(ends);
  const bool is_whole = last - span->start < info.units * kUnitSize && count <= info.capacity;
  if (!is_whole || (count == 1) != (last == AddressOf(first))) return {};
  first->link = first->second;
  return {.first = first, .last = reinterpret_cast<FreeObject*>(last), .count = count};
}

void RemoteFrees::LinkArrivals() {
  const std::size_t count = std::exchange(arrival_count_, 0);
  for (std::size_t i = 0; i < count; ++i) Link(arrivals_[i].span, arrivals_[i].object);
}

void RemoteFrees::Link(Span* span, FreeObject* object) {
  if (ABSL_PREDICT_FALSE(code_.IsTagged(object))) heap_.StopOnDoubleFree("free", object, span);
  PendingChain& pending = chains_[AddressOf(span) / sizeof(Span) % kChains];
  ObjectChain& chain = pending.chain;
  if (ABSL_PREDICT_FALSE(pending.span != span)) {
    if (chain.count != 0) Complete(pending);
    pending.span = span;
  }
  if (chain.count == 0) {
    const SizeClassInfo& info = kSizeClasses[span->size_class];
    pending.room = HasRoom(info) ? info.carve : 1;
    chain.first = code_.end();
    chain.last = object;
  }
  code_.Link(object, chain.first);
  chain.first = object;
  ++chain.count;
  if (chain.count == pending.room) Complete(pending);
}

void RemoteFrees::Complete(PendingChain& pending) {
  const Span* span = pending.span;
  const ObjectChain chain = pending.chain;
  pending.chain.count = 0;
  MakeMessage(code_, span, chain);
  AddMessage(span->owner.load(std::memory_order_relaxed), chain.first,
             std::size_t{chain.count} * kSizeClasses[span->size_class].size);
}

void RemoteFrees::AddMessage(ThreadCache* owner, FreeObject* message, std::size_t bytes) {
  Batch& batch = batches_[owner->id() % kBatches];
  if (batch.owner != owner) {
    if (batch.first != nullptr) HandOver(batch);
    batch.owner = owner;
  }
  if (batch.first == nullptr) {
    batch.last = message;
  } else {
    code_.Link(message, batch.first);
  }
  batch.first = message;
  batch.bytes += bytes;
  if (batch.bytes >= batch_bytes_) HandOver(batch);
}

void RemoteFrees::HandOver(Batch& batch) {
  FreeObject* first = batch.first;
  batch.first = nullptr;
  batch.bytes = 0;
  batch.owner->Receive(first, batch.last);
}

void RemoteFrees::HandOverAll() {
  LinkArrivals();
  for (PendingChain& pending : chains_) {
    if (pending.chain.count != 0) Complete(pending);
  }
  for (Batch& batch : batches_) {
    if (batch.first != nullptr) HandOver(batch);
  }
}

void RemoteFrees::Forget() {
  arrival_count_ = 0;
  chains_.fill({});
  batches_.fill({});
}

}  // namespace freehold::allocator
