#include "vm/os/check.h"

#include <unistd.h>

#include <cstdlib>

namespace freehold::vm {
namespace {

// A message assembled on the stack: the failing thread may hold any lock, malloc's included.
class Line {
 public:
  void Append(const char* text) {
    while (*text != '\0' && size_ < sizeof(text_) - 1) text_[size_++] = *text++;
  }
  void Append(const CheckValue* values, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      Append(" ");
      Append(values[i].name);
      Append("=0x");
      AppendNumber(values[i].value, 16);
    }
  }
  void AppendNumber(std::uint64_t value, unsigned base) {
    char digits[20];
    std::size_t count = 0;
    do {
      digits[count++] = "0123456789abcdef"[value % base];
      value /= base;
    } while (value != 0);
    while (count > 0 && size_ < sizeof(text_) - 1) text_[size_++] = digits[--count];
  }
  void Write() {
    text_[size_++] = '\n';
    for (std::size_t done = 0; done < size_;) {
      const ssize_t wrote = ::write(STDERR_FILENO, text_ + done, size_ - done);
      if (wrote <= 0) return;
      done += static_cast<std::size_t>(wrote);
    }
  }

 private:
  char text_[512];
  std::size_t size_ = 0;
};

}  // namespace

void CheckFailed(const char* file, int line, const char* message, const CheckValue* values,
                 std::size_t count) {
  Line out;
  out.Append("freehold: ");
  out.Append(file);
  out.Append(":");
  out.AppendNumber(static_cast<std::uint64_t>(line), 10);
  out.Append(": ");
  out.Append(message);
  out.Append(values, count);
  out.Write();
  std::abort();
}

void Report(const char* message, const CheckValue* values, std::size_t count) {
  Line out;
  out.Append("freehold: ");
  out.Append(message);
  out.Append(values, count);
  out.Write();
}

}  // namespace freehold::vm
