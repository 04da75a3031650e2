// The server's table: keys and values in shards, each under its own mutex, and a copy of all of them at one moment.
//
// The copy goes into a buffer of an address space that was populated before. So the table stands still for as long as
// it takes to copy memory, and not while the kernel finds a page for every 4 KiB of it; and mapping and populating
// gigabytes holds up nobody, since no lock of the process is held meanwhile.
//
// Thread safety: thread-safe.
// Errors:        values.
#ifndef FREEHOLD_EXAMPLES_KV_SERVER_TABLE_H_
#define FREEHOLD_EXAMPLES_KV_SERVER_TABLE_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>

#include "vm/address_space.h"
#include "vm/page_range.h"
#include "vm/result.h"

namespace freehold::examples {

// A copy of the table in memory of `space`, which it gives back at its end: for every entry the line
// "KEY BYTES\n", then the value, then "\n".
class Snapshot {
 public:
  Snapshot(vm::AddressSpace& space, vm::PageRange buffer) : space_(space), buffer_(buffer) {}
  ~Snapshot();
  Snapshot(const Snapshot&) = delete;
  Snapshot& operator=(const Snapshot&) = delete;

  std::string_view text() const { return {reinterpret_cast<const char*>(buffer_.address()), bytes_}; }
  std::size_t entries() const { return entries_; }

 private:
  friend class Table;

  std::size_t room() const { return buffer_.bytes().value - bytes_; }
  void Append(std::string_view text);

  vm::AddressSpace& space_;
  const vm::PageRange buffer_;
  std::size_t bytes_ = 0;
  std::size_t entries_ = 0;
};

class Table {
 public:
  std::optional<std::string> Get(const std::string& key) const;
  void Set(const std::string& key, std::string value);
  // Whether it was there.
  bool Delete(const std::string& key);
  std::size_t entries() const;

  // Copies all entries into `snapshot`, as they are at one moment. Errors: as vm::AddressSpace::Map.
  vm::Error Copy(vm::AddressSpace& space, std::optional<Snapshot>& snapshot) const;

  // Adds the entries that `text`, a snapshot's, holds. False if it is none; then some may have been added.
  bool Add(std::string_view text);

 private:
  static constexpr std::size_t kShards = 32;

  struct alignas(64) Shard {
    mutable std::mutex mutex;
    std::unordered_map<std::string, std::string> entries;
  };

  Shard& ShardOf(const std::string& key) { return shards_[std::hash<std::string>()(key) % kShards]; }
  const Shard& ShardOf(const std::string& key) const { return shards_[std::hash<std::string>()(key) % kShards]; }
  // True if everything fitted. All shards are locked.
  bool CopyLocked(Snapshot& snapshot) const;

  std::array<Shard, kShards> shards_;
  // That a snapshot would take. Changed under a shard's mutex; relaxed.
  std::atomic<std::size_t> bytes_{0};
};

}  // namespace freehold::examples

#endif  // FREEHOLD_EXAMPLES_KV_SERVER_TABLE_H_
