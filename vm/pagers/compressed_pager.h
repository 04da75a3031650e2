// Pages that are compressed (LZ4) while they are not in use: what is evicted from a mapping is kept in memory, smaller,
// and what was never written reads as zero.
//
// The content lives as long as the pager, whatever is mapped of it: pages of zeroes take nothing, others at most a
// little more than a page.
//
// Thread safety: thread-safe; disjoint pages seldom wait for each other.
// Allocation:    from malloc, which may throw std::bad_alloc: then the write-back counts as refused.
#ifndef FREEHOLD_VM_PAGERS_COMPRESSED_PAGER_H_
#define FREEHOLD_VM_PAGERS_COMPRESSED_PAGER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "absl/types/span.h"
#include "vm/pager.h"
#include "vm/result.h"

namespace freehold::vm {

class CompressedPager final : public Pager {
 public:
  CompressedPager() = default;
  CompressedPager(const CompressedPager&) = delete;
  CompressedPager& operator=(const CompressedPager&) = delete;

  Result<Pages> Read(std::uint64_t page, absl::Span<std::byte> into) override;
  Error Writeback(std::uint64_t page, absl::Span<const std::byte> from) override;

  // What the pages take, compressed; and how many there are that are not zero.
  Bytes stored() const;
  Pages stored_pages() const;

 private:
  static constexpr std::size_t kShards = 64;
  // Neighbours are in one shard: a request goes through few of them.
  static constexpr std::uint64_t kPagesPerStripe = 64;
  struct Shard {
    mutable std::mutex mutex;
    std::unordered_map<std::uint64_t, std::vector<char>> pages;  // guarded by the mutex
  };

  Shard& ShardOf(std::uint64_t page) { return shards_[page / kPagesPerStripe % kShards]; }

  std::array<Shard, kShards> shards_;
};

}  // namespace freehold::vm

#endif  // FREEHOLD_VM_PAGERS_COMPRESSED_PAGER_H_
