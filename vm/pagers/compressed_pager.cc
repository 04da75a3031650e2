#include "vm/pagers/compressed_pager.h"

#include <lz4.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace freehold::vm {
namespace {

constexpr int kBound = LZ4_COMPRESSBOUND(kPageSize);

bool IsZero(const std::byte* page) {
  return page[0] == std::byte{0} && std::memcmp(page, page + 1, kPageSize - 1) == 0;
}

}  // namespace

Result<Pages> CompressedPager::Read(std::uint64_t page, absl::Span<std::byte> into) {
  const Pages count = {into.size() / kPageSize};
  for (std::size_t i = 0; i < count.value; ++i) {
    std::byte* to = into.data() + i * kPageSize;
    Shard& shard = ShardOf(page + i);
    const std::lock_guard lock(shard.mutex);
    const auto found = shard.pages.find(page + i);
    if (found == shard.pages.end()) {
      std::memset(to, 0, kPageSize);
      continue;
    }
    const int size = LZ4_decompress_safe(found->second.data(), reinterpret_cast<char*>(to),
                                         static_cast<int>(found->second.size()), kPageSize);
    // Somebody wrote over it.
    if (size != static_cast<int>(kPageSize)) return Error::System(EIO);
  }
  return count;
}

Error CompressedPager::Writeback(std::uint64_t page, absl::Span<const std::byte> from) {
  for (std::size_t i = 0; i < from.size() / kPageSize; ++i) {
    const std::byte* content = from.data() + i * kPageSize;
    Shard& shard = ShardOf(page + i);
    if (IsZero(content)) {
      const std::lock_guard lock(shard.mutex);
      shard.pages.erase(page + i);
      continue;
    }
    char compressed[kBound];
    const int size = LZ4_compress_default(reinterpret_cast<const char*>(content), compressed, kPageSize, kBound);
    std::vector<char> stored(compressed, compressed + size);
    const std::lock_guard lock(shard.mutex);
    shard.pages[page + i] = std::move(stored);
  }
  return Error::Ok();
}

Bytes CompressedPager::stored() const {
  Bytes bytes;
  for (const Shard& shard : shards_) {
    const std::lock_guard lock(shard.mutex);
    for (const auto& [page, content] : shard.pages) bytes = bytes + Bytes{content.size()};
  }
  return bytes;
}

Pages CompressedPager::stored_pages() const {
  Pages pages;
  for (const Shard& shard : shards_) {
    const std::lock_guard lock(shard.mutex);
    pages += Pages{shard.pages.size()};
  }
  return pages;
}

}  // namespace freehold::vm
