// One line for standard error, assembled on the stack: usable inside malloc, before libc is
// initialized and after the last destructor.
//
// Thread safety: thread-compatible. Async-signal-safe; errno is kept.
// Allocation:    none. What does not fit is cut off.
#ifndef FREEHOLD_RUNTIME_MESSAGE_H_
#define FREEHOLD_RUNTIME_MESSAGE_H_

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "vm/units.h"

namespace freehold::runtime {

class Message {
 public:
  Message& Append(std::string_view text);
  Message& Append(char letter) { return Append(std::string_view(&letter, 1)); }
  Message& AppendNumber(std::uint64_t value);
  Message& AppendHex(std::uint64_t value);  // "0x..."
  // The largest unit that divides: "16T", "1536M", "100".
  Message& AppendBytes(vm::Bytes bytes);

  std::string_view text() const { return {text_, size_}; }
  void Clear() { size_ = 0; }

  // Writes "freehold: TEXT\n" to standard error by one system call, so that lines of several
  // processes do not mix.
  void Report() const;
  // Writes the text as it is.
  void Write() const;

 private:
  Message& AppendDigits(std::uint64_t value, unsigned base);

  static constexpr std::size_t kCapacity = 2000;
  std::size_t size_ = 0;
  char text_[kCapacity];
};

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_MESSAGE_H_
