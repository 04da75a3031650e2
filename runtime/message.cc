#include "runtime/message.h"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "vm/os/raw_syscall.h"

namespace freehold::runtime {
namespace {

// By one system call, so that lines of several processes do not mix. What a full, non-blocking or
// closed stream does not take is dropped: a message is not worth waiting for.
void WriteToStderr(const iovec* parts, int count) {
  while (vm::os::RawSyscall(SYS_writev, STDERR_FILENO, parts, count) == -EINTR) {
  }
}

}  // namespace

Message& Message::Append(std::string_view text) {
  const std::size_t count = std::min(text.size(), kCapacity - size_);
  std::memcpy(text_ + size_, text.data(), count);
  size_ += count;
  return *this;
}

Message& Message::AppendDigits(std::uint64_t value, unsigned base) {
  char digits[20];
  std::size_t first = sizeof(digits);
  do {
    digits[--first] = "0123456789abcdef"[value % base];
    value /= base;
  } while (value != 0);
  return Append({digits + first, sizeof(digits) - first});
}

Message& Message::AppendNumber(std::uint64_t value) { return AppendDigits(value, 10); }

Message& Message::AppendHex(std::uint64_t value) {
  Append("0x");
  return AppendDigits(value, 16);
}

Message& Message::AppendBytes(vm::Bytes bytes) {
  constexpr std::string_view kUnits = "KMGT";
  std::uint64_t value = bytes.value;
  std::size_t unit = 0;
  while (unit < kUnits.size() && value != 0 && value % 1024 == 0) {
    value /= 1024;
    ++unit;
  }
  AppendNumber(value);
  return unit == 0 ? *this : Append(kUnits[unit - 1]);
}

void Message::Report() const {
  static constexpr char kPrefix[] = "freehold: ";
  static constexpr char kNewline[] = "\n";
  const iovec parts[] = {{const_cast<char*>(kPrefix), sizeof(kPrefix) - 1},
                         {const_cast<char*>(text_), size_},
                         {const_cast<char*>(kNewline), 1}};
  WriteToStderr(parts, 3);
}

void Message::Write() const {
  const iovec part = {const_cast<char*>(text_), size_};
  WriteToStderr(&part, 1);
}

}  // namespace freehold::runtime
