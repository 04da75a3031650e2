// The program that file_mapping_benchmark runs under the shim and plain: maps a window of a cached file by a read-only
// descriptor, reads from each of its pages, and unmaps it, over and over. What serves that is the system's business.
//
//   file_window_program WINDOWS KIB
//
// Prints the nanoseconds that each of WINDOWS windows of KIB KiB took.
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr std::size_t kPage = 4096;

void Check(bool holds, const char* what) {
  if (holds) return;
  std::perror(what);
  std::exit(1);
}

double NowNs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) * 1e9 + static_cast<double>(now.tv_nsec);
}

// In the page cache; gone when it is closed.
int ReadOnlyFile(std::size_t bytes) {
  char name[] = "/tmp/file_window_XXXXXX";
  const int writer = mkstemp(name);
  Check(writer >= 0, "mkstemp");
  const std::vector<char> content(bytes, 'x');
  Check(write(writer, content.data(), bytes) == static_cast<ssize_t>(bytes), "write");
  close(writer);
  const int reader = open(name, O_RDONLY);
  Check(reader >= 0, "open");
  unlink(name);
  return reader;
}

void Window(int file, std::size_t bytes) {
  void* mapped = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file, 0);
  Check(mapped != MAP_FAILED, "mmap");
  const auto* memory = static_cast<const volatile char*>(mapped);
  for (std::size_t at = 0; at < bytes; at += kPage) Check(memory[at] == 'x', "content");
  Check(munmap(mapped, bytes) == 0, "munmap");
}

}  // namespace

int main(int argc, char** argv) {
  const std::size_t windows = argc == 3 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const std::size_t bytes = argc == 3 ? std::strtoull(argv[2], nullptr, 10) << 10 : 0;
  if (windows == 0 || bytes == 0) {
    std::fprintf(stderr, "usage: file_window_program WINDOWS KIB\n");
    return 2;
  }
  const int file = ReadOnlyFile(bytes);
  for (std::size_t i = 0; i < windows / 10 + 1; ++i) Window(file, bytes);
  const double begin = NowNs();
  for (std::size_t i = 0; i < windows; ++i) Window(file, bytes);
  std::printf("%.1f\n", (NowNs() - begin) / static_cast<double>(windows));
  return 0;
}
