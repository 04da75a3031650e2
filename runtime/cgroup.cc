#include "runtime/cgroup.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "vm/os/raw_syscall.h"

namespace freehold::runtime {
namespace {

using vm::Bytes;

// Version 1 says "none" by the largest multiple of a page that a signed word holds.
constexpr std::uint64_t kLeastUnlimited = std::uint64_t{1} << 62;

class File {
 public:
  explicit File(const char* path)
      : descriptor_(vm::os::RawSyscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC)) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (ok()) vm::os::RawSyscall(SYS_close, descriptor_);
  }

  bool ok() const { return !vm::os::SyscallFailed(descriptor_); }
  // At most `size` bytes, fewer at the end only; 0 also on errors.
  std::size_t Read(char* to, std::size_t size) {
    std::size_t done = 0;
    while (ok() && done < size) {
      const long count = vm::os::RawSyscall(SYS_read, descriptor_, to + done, size - done);
      if (count == -EINTR) continue;
      if (count <= 0) break;
      done += static_cast<std::size_t>(count);
    }
    return done;
  }

 private:
  const long descriptor_;
};

// A path that is put together from parts; empty if it would be too long.
class Path {
 public:
  Path& Append(std::string_view part) {
    if (part.size() >= sizeof(text_) - size_) fits_ = false;
    if (!fits_) return *this;
    std::memcpy(text_ + size_, part.data(), part.size());
    size_ += part.size();
    text_[size_] = '\0';
    return *this;
  }
  void Shorten(std::size_t size) {
    size_ = size;
    text_[size_] = '\0';
  }
  std::size_t size() const { return size_; }
  bool fits() const { return fits_; }
  const char* text() const { return text_; }
  // Where the last "/" after `from` is; `from` if there is none.
  std::size_t LastSlash(std::size_t from) const {
    std::size_t at = size_;
    while (at > from && text_[at] != '/') --at;
    return at;
  }

 private:
  char text_[1024] = {};
  std::size_t size_ = 0;
  bool fits_ = true;
};

// The number at the start of the file; none for "max", and where there is no such file.
Bytes ReadLimit(const char* path) {
  File file(path);
  char text[32];
  const std::size_t size = file.Read(text, sizeof(text));
  std::uint64_t value = 0;
  std::size_t digits = 0;
  for (; digits < size && text[digits] >= '0' && text[digits] <= '9'; ++digits) {
    if (__builtin_mul_overflow(value, std::uint64_t{10}, &value)) return kNoCgroupLimit;
    if (__builtin_add_overflow(value, static_cast<std::uint64_t>(text[digits] - '0'), &value)) return kNoCgroupLimit;
  }
  return digits == 0 || value >= kLeastUnlimited ? kNoCgroupLimit : Bytes{value};
}

struct Interface {
  const char* mount;  // below the root
  const char* max;
  const char* high;  // may be null
};
constexpr Interface kVersion2 = {"", "/memory.max", "/memory.high"};
constexpr Interface kVersion1 = {"/memory", "/memory.limit_in_bytes", nullptr};

// The limits of `group` and of every group above it.
void AddLimits(const char* root, const Interface& interface, std::string_view group, CgroupLimits& limits) {
  Path path;
  path.Append(root).Append(interface.mount);
  const std::size_t top = path.size();
  path.Append(group);
  while (path.fits()) {
    // "/" ends at its slash already.
    const std::size_t directory =
        path.size() > top && path.text()[path.size() - 1] == '/' ? path.size() - 1 : path.size();
    path.Shorten(directory);
    limits.max = std::min(limits.max, ReadLimit(path.Append(interface.max).text()));
    path.Shorten(directory);
    if (interface.high != nullptr) {
      limits.high = std::min(limits.high, ReadLimit(path.Append(interface.high).text()));
      path.Shorten(directory);
    }
    if (directory <= top) return;
    path.Shorten(path.LastSlash(top));
  }
}

// Whether the list "cpu,memory" has "memory".
bool HasMemory(std::string_view controllers) {
  constexpr std::string_view kMemory = "memory";
  while (!controllers.empty()) {
    const std::size_t comma = std::min(controllers.find(','), controllers.size());
    if (std::string_view(controllers.data(), comma) == kMemory) return true;
    controllers.remove_prefix(std::min(comma + 1, controllers.size()));
  }
  return false;
}

// "0::/user.slice" of version 2, "4:memory:/user.slice" of version 1.
void AddLine(const char* root, std::string_view line, CgroupLimits& limits) {
  const std::size_t first = line.find(':');
  if (first == std::string_view::npos) return;
  line.remove_prefix(first + 1);
  const std::size_t second = line.find(':');
  if (second == std::string_view::npos) return;
  const std::string_view controllers(line.data(), second);
  line.remove_prefix(second + 1);
  if (controllers.empty()) AddLimits(root, kVersion2, line, limits);
  if (HasMemory(controllers)) AddLimits(root, kVersion1, line, limits);
}

}  // namespace

CgroupLimits ReadCgroupLimits(const CgroupPaths& paths) {
  CgroupLimits limits;
  File membership(paths.membership);
  // One line at a time; of one that is longer than any path we could open, nothing.
  char line[1024];
  std::size_t size = 0;
  bool fits = true;
  char chunk[256];
  while (const std::size_t count = membership.Read(chunk, sizeof(chunk))) {
    for (std::size_t i = 0; i < count; ++i) {
      if (chunk[i] == '\n') {
        if (fits) AddLine(paths.root, {line, size}, limits);
        size = 0;
        fits = true;
      } else if (size < sizeof(line)) {
        line[size++] = chunk[i];
      } else {
        fits = false;
      }
    }
  }
  return limits;
}

Bytes SoftLimitFor(const CgroupLimits& limits) {
  const Bytes least = std::min(limits.max, limits.high);
  return least == kNoCgroupLimit ? Bytes{0} : Bytes{std::max<std::size_t>(least.value / 8 * 7, 1)};
}

Bytes HardLimitFor(const CgroupLimits& limits) {
  return limits.max == kNoCgroupLimit ? Bytes{0} : Bytes{std::max<std::size_t>(limits.max.value / 16 * 15, 1)};
}

}  // namespace freehold::runtime
