#include "examples/kv_server/table.h"

#include <charconv>
#include <cstring>
#include <utility>

namespace freehold::examples {
namespace {

constexpr std::size_t kMaxDigits = 20;

// "KEY BYTES\n", value, "\n".
std::size_t BytesOf(const std::string& key, const std::string& value) {
  return key.size() + 1 + std::to_string(value.size()).size() + 1 + value.size() + 1;
}

}  // namespace

Snapshot::~Snapshot() { (void)space_.Unmap(buffer_); }

void Snapshot::Append(std::string_view text) {
  std::memcpy(buffer_.address() + bytes_, text.data(), text.size());
  bytes_ += text.size();
}

std::optional<std::string> Table::Get(const std::string& key) const {
  const Shard& shard = ShardOf(key);
  const std::lock_guard lock(shard.mutex);
  const auto entry = shard.entries.find(key);
  if (entry == shard.entries.end()) return std::nullopt;
  return entry->second;
}

void Table::Set(const std::string& key, std::string value) {
  Shard& shard = ShardOf(key);
  const std::lock_guard lock(shard.mutex);
  const auto [entry, added] = shard.entries.try_emplace(key);
  if (!added) bytes_.fetch_sub(BytesOf(key, entry->second), std::memory_order_relaxed);
  bytes_.fetch_add(BytesOf(key, value), std::memory_order_relaxed);
  entry->second = std::move(value);
}

bool Table::Delete(const std::string& key) {
  Shard& shard = ShardOf(key);
  const std::lock_guard lock(shard.mutex);
  const auto entry = shard.entries.find(key);
  if (entry == shard.entries.end()) return false;
  bytes_.fetch_sub(BytesOf(key, entry->second), std::memory_order_relaxed);
  shard.entries.erase(entry);
  return true;
}

std::size_t Table::entries() const {
  std::size_t sum = 0;
  for (const Shard& shard : shards_) {
    const std::lock_guard lock(shard.mutex);
    sum += shard.entries.size();
  }
  return sum;
}

vm::Error Table::Copy(vm::AddressSpace& space, std::optional<Snapshot>& snapshot) const {
  for (;;) {
    // A little more than it takes now, since others go on adding to it. If they add more than that, there is a next
    // time, with more room.
    const std::size_t bytes = bytes_.load(std::memory_order_relaxed);
    const vm::Result<vm::PageRange> buffer =
        space.Map(vm::PagesFor({bytes + bytes / 8 + 1}),
                  {.content = vm::Content::kAnything, .huge_pages = vm::os::HugePages::kPrefer, .populate = true});
    if (!buffer.ok()) return buffer.error();
    snapshot.emplace(space, *buffer);
    std::array<std::unique_lock<std::mutex>, kShards> locks;
    for (std::size_t i = 0; i < kShards; ++i) locks[i] = std::unique_lock(shards_[i].mutex);
    if (CopyLocked(*snapshot)) return vm::Error::Ok();
  }
}

bool Table::CopyLocked(Snapshot& snapshot) const {
  for (const Shard& shard : shards_) {
    for (const auto& [key, value] : shard.entries) {
      if (BytesOf(key, value) > snapshot.room()) return false;
      char size[kMaxDigits];
      const char* end = std::to_chars(size, size + sizeof(size), value.size()).ptr;
      snapshot.Append(key);
      snapshot.Append(" ");
      snapshot.Append({size, static_cast<std::size_t>(end - size)});
      snapshot.Append("\n");
      snapshot.Append(value);
      snapshot.Append("\n");
      ++snapshot.entries_;
    }
  }
  return true;
}

bool Table::Add(std::string_view text) {
  while (!text.empty()) {
    const std::size_t line = text.find('\n');
    const std::size_t space = text.substr(0, line).find(' ');
    if (line == text.npos || space == text.npos || space == 0) return false;
    std::size_t size = 0;
    const auto [end, error] = std::from_chars(text.data() + space + 1, text.data() + line, size);
    const std::size_t left = text.size() - line - 1;
    if (error != std::errc() || end != text.data() + line) return false;
    if (size >= left || text[line + 1 + size] != '\n') return false;
    Set(std::string(text.substr(0, space)), std::string(text.substr(line + 1, size)));
    text.remove_prefix(line + 1 + size + 1);
  }
  return true;
}

}  // namespace freehold::examples
