#include "allocator/misuse.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace freehold::allocator {
namespace {

class Line {
 public:
  Line& operator<<(const char* text) {
    while (*text != '\0' && size_ < sizeof(text_) - 1) text_[size_++] = *text++;
    return *this;
  }
  Line& operator<<(std::size_t number) { return Number(number, 10); }
  Line& operator<<(const void* address) {
    *this << "0x";
    return Number(reinterpret_cast<std::uintptr_t>(address), 16);
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
  Line& Number(std::uint64_t number, unsigned base) {
    char digits[21] = {};
    char* first = digits + sizeof(digits) - 1;
    do {
      *--first = "0123456789abcdef"[number % base];
      number /= base;
    } while (number != 0);
    return *this << static_cast<const char*>(first);
  }

  char text_[256];
  std::size_t size_ = 0;
};

std::size_t Distance(const void* from, const void* to) {
  return static_cast<std::size_t>(static_cast<const char*>(to) - static_cast<const char*>(from));
}

}  // namespace

void StopProgram(const MisuseReport& report) {
  Line line;
  line << "freehold: ";
  if (report.what == Misuse::kCorrupted) {
    line << "free object of " << report.object_size << " bytes at " << report.object
         << " was written to after it was freed";
  } else {
    line << report.call << "(" << report.address << "): ";
  }
  switch (report.what) {
    case Misuse::kForeign: line << "not from this heap"; break;
    case Misuse::kNoObject: line << "not an object: freed before, or never allocated"; break;
    case Misuse::kInterior:
      line << "interior pointer (" << Distance(report.object, report.address) << " bytes into a "
           << report.object_size << "-byte object at " << report.object << ")";
      break;
    case Misuse::kDoubleFree: line << "double free of a " << report.object_size << "-byte object"; break;
    case Misuse::kSizeMismatch:
      line << "size " << report.size << " given for a " << report.object_size << "-byte object";
      break;
    case Misuse::kStray:
      if (report.written < report.object) {
        line << Distance(report.written, report.object) << " bytes before";
      } else {
        line << Distance(report.object, report.written) - report.object_size << " bytes after";
      }
      line << " the " << report.object_size << "-byte object was written to";
      break;
    case Misuse::kCorrupted: break;
  }
  line.Write();
  if (report.explain != nullptr) report.explain(report.context);
  std::abort();
}

}  // namespace freehold::allocator
