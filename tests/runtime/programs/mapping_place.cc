// Says which mappings lie in the shim's reservation: in the one stretch of /proc/self/maps that is larger than
// anything else, whatever it consists of.
#include <fcntl.h>

#include <cinttypes>
#include <cstdlib>

#include "tests/runtime/programs/mapping_probe.h"

namespace {

struct Stretch {
  uint64_t first = 0;
  uint64_t end = 0;
};

// The largest run of kernel VMAs that touch, if it is a reservation at all.
Stretch Reservation() {
  constexpr uint64_t kLeast = uint64_t{1} << 36;
  Stretch largest;
  Stretch run;
  FILE* maps = fopen("/proc/self/maps", "r");
  REQUIRE(maps != nullptr);
  char line[512];
  while (fgets(line, sizeof(line), maps) != nullptr) {
    Stretch one;
    if (sscanf(line, "%" SCNx64 "-%" SCNx64, &one.first, &one.end) != 2) continue;
    run = one.first == run.end ? Stretch{run.first, one.end} : one;
    if (run.end - run.first > largest.end - largest.first) largest = run;
  }
  fclose(maps);
  return largest.end - largest.first >= kLeast ? largest : Stretch{};
}

Stretch reservation;

void Say(const char* what, void* p) {
  REQUIRE(p != MAP_FAILED);
  const auto address = reinterpret_cast<uint64_t>(p);
  const bool inside = reservation.first <= address && address < reservation.end;
  printf("%s: %s\n", what, inside ? "inside" : "outside");
}

}  // namespace

int main() {
  constexpr size_t kSize = 16 * kPage;
  constexpr int kAnonymous = MAP_PRIVATE | MAP_ANONYMOUS;
  const int file = open("/proc/self/exe", O_RDONLY);
  REQUIRE(file >= 0);
  const int written = memfd_create("written", 0);
  REQUIRE(written >= 0 && ftruncate(written, kSize) == 0);
  reservation = Reservation();
  Say("malloc", malloc(100));
  Say("large malloc", malloc(size_t{40} << 20));
  Say("anonymous", mmap(nullptr, kSize, PROT_READ | PROT_WRITE, kAnonymous, -1, 0));
  Say("no access", mmap(nullptr, kSize, PROT_NONE, kAnonymous, -1, 0));
  Say("code", mmap(nullptr, kSize, PROT_READ | PROT_EXEC, kAnonymous, -1, 0));
  Say("populated", mmap(nullptr, kSize, PROT_READ | PROT_WRITE, kAnonymous | MAP_POPULATE, -1, 0));
  void* window = mmap(nullptr, 4 * kPage, PROT_READ, MAP_PRIVATE, file, 0);
  Say("a file to read", window);
  REQUIRE(munmap(window, 4 * kPage) == 0);
  void* again = mmap(nullptr, 4 * kPage, PROT_READ, MAP_PRIVATE, file, 0);
  printf("the same again: %s\n", again == window ? "same place" : "another place");
  Say("a file to write", mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED, written, 0));
  Say("shared", mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  Say("low", mmap(nullptr, kSize, PROT_READ | PROT_WRITE, kAnonymous | MAP_32BIT, -1, 0));
  return 0;
}
