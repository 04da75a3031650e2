// Makes random calls of the mmap family, from a seed: in several threads, each on an arena of its own, and in children.
// Prints what each call said and what the arena was like afterwards, or a sum of that: to be compared between the
// kernel's own and the shim.
//
//   mapping_sequence FIRST_SEED SEEDS OPERATIONS [verbose]
#include <fcntl.h>
#include <pthread.h>
#include <sys/wait.h>

#include <cstdarg>
#include <cstdlib>

#include "tests/runtime/programs/mapping_probe.h"

namespace {

constexpr size_t kArena = 48;  // pages
constexpr int kAnonymous = MAP_PRIVATE | MAP_ANONYMOUS;
constexpr int kReadWrite = PROT_READ | PROT_WRITE;
constexpr int kDontunmap = 4;
bool verbose = false;

// Deterministic on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435769u + 88172645463325252u) {}
  size_t Below(size_t n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<size_t>((state_ >> 20) % n);
  }

 private:
  uint64_t state_;
};

// An arena, what calls do to it, and what of it the calls themselves need to know: mremap and some advice ask for one
// mapping, and which neighbours are one to Linux depends on their history.
class Sequence {
 public:
  explicit Sequence(uint64_t seed) : random_(seed) {
    char path[] = "/tmp/freehold-sequence-XXXXXX";
    file_ = mkstemp(path);
    REQUIRE(file_ >= 0);
    unlink(path);
    char page[kPage];
    for (size_t i = 0; i < kArena; ++i) {
      memset(page, static_cast<int>(0x80 + i), sizeof(page));
      REQUIRE(write(file_, page, sizeof(page)) == static_cast<ssize_t>(sizeof(page)));
    }
    Open();
  }
  ~Sequence() {
    REQUIRE(munmap(arena_ - kArena * kPage, 3 * kArena * kPage) == 0);
    close(file_);
  }
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  uint64_t Run(size_t operations) {
    for (size_t i = 0; i < operations; ++i) {
      Step();
      NoteState();
    }
    return sum_;
  }

 private:
  struct Range {
    size_t first;
    size_t count;
  };

  // Between pages that stay, so that nothing grows beyond it.
  void Open() {
    void* all = mmap(nullptr, 3 * kArena * kPage, PROT_NONE, kAnonymous, -1, 0);
    REQUIRE(all != MAP_FAILED);
    arena_ = At(all, kArena);
    Claim({0, kArena}, PROT_NONE, false);
  }

  void Say(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    if (verbose) printf("%s\n", text);
    for (const char* p = text; *p != '\0'; ++p) sum_ = (sum_ ^ static_cast<unsigned char>(*p)) * 1099511628211u;
  }

  void SayResult(const char* what, Range range, int argument, bool ok) {
    Say("%s [%zu, +%zu) %d: %s", what, range.first, range.count, argument, ok ? "ok" : ErrorName(errno));
  }

  void NoteState() {
    char line[kArena * 6 + 1] = "";
    for (size_t i = 0, used = 0; i < kArena; ++i) {
      char page[16];
      DescribePage(probe_, At(arena_, i), page, sizeof(page));
      used += static_cast<size_t>(snprintf(line + used, sizeof(line) - used, " %s", page));
    }
    for (const char* p = line; *p != '\0'; ++p) sum_ = (sum_ ^ static_cast<unsigned char>(*p)) * 1099511628211u;
    if (verbose) printf("   %s\n", line);
  }

  Range AnyRange() {
    const size_t first = random_.Below(kArena);
    return {first, 1 + random_.Below(random_.Below(4) == 0 ? kArena - first : (kArena - first) / 4 + 1)};
  }

  void Claim(Range range, int protection, bool file) {
    ++last_id_;
    for (size_t i = range.first; i < range.first + range.count; ++i) pages_[i] = {last_id_, protection, file};
  }
  void Drop(Range range) {
    for (size_t i = range.first; i < range.first + range.count; ++i) pages_[i] = {};
  }

  // What was changed by one call is one mapping no more with what was not, even if another call makes it equal again.
  void SetApart(size_t page) {
    if (pages_[page].id != 0) pages_[page].id = last_id_ * 1000 + pages_[page].id % 1000;
  }

  // A part of one mapping that is one to everybody.
  bool OneMapping(Range& range) {
    range.first = random_.Below(kArena);
    if (pages_[range.first].id == 0) return false;
    range.count = 1;
    const size_t wanted = 1 + random_.Below(10);
    while (range.count < wanted && range.first + range.count < kArena &&
           pages_[range.first + range.count] == pages_[range.first]) {
      ++range.count;
    }
    return true;
  }

  int AnyProtection() {
    constexpr int kProtections[] = {PROT_NONE, PROT_READ, kReadWrite, kReadWrite, kReadWrite, PROT_READ | PROT_EXEC};
    return kProtections[random_.Below(6)];
  }

  void Step() {
    switch (random_.Below(16)) {
      case 0: case 1: return Map(false);
      case 2: return Map(true);
      case 3: return MapFile();
      case 4: case 5: return Unmap();
      case 6: case 7: return Protect();
      case 8: case 9: return Advise();
      case 10: return Lock();
      case 11: return Sync();
      case 12: return RemapInside();
      case 13: return RemapAway();
      case 14: return Resize();
      default: return Write();
    }
  }

  void Map(bool noreplace) {
    const Range range = AnyRange();
    const int protection = AnyProtection();
    const int flags[] = {0, MAP_NORESERVE, MAP_POPULATE, MAP_STACK};
    void* p = mmap(At(arena_, range.first), range.count * kPage, protection,
                   kAnonymous | flags[random_.Below(4)] | (noreplace ? MAP_FIXED_NOREPLACE : MAP_FIXED), -1, 0);
    SayResult(noreplace ? "map noreplace" : "map", range, protection, p == At(arena_, range.first));
    if (p != MAP_FAILED) Claim(range, protection, false);
  }

  void MapFile() {
    Range range = AnyRange();
    const bool shared = random_.Below(2) == 0;
    const bool bad = random_.Below(8) == 0;
    const int protection = AnyProtection();
    void* p = mmap(At(arena_, range.first), range.count * kPage, protection, (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_FIXED,
                   bad ? 999 : file_, 0);
    SayResult(shared ? "map shared" : "map private", range, protection, p != MAP_FAILED);
    if (p != MAP_FAILED) Claim(range, protection, true);
  }

  void Unmap() {
    const Range range = AnyRange();
    SayResult("unmap", range, 0, munmap(At(arena_, range.first), range.count * kPage) == 0);
    Drop(range);
  }

  void Protect() {
    const Range range = AnyRange();
    const int protection = AnyProtection();
    const bool ok = mprotect(At(arena_, range.first), range.count * kPage, protection) == 0;
    SayResult("protect", range, protection, ok);
    // What comes before a hole has changed all the same.
    ++last_id_;
    for (size_t i = range.first; i < range.first + range.count && pages_[i].id != 0; ++i) {
      pages_[i].protection = protection;
      SetApart(i);
    }
  }

  void Advise() {
    constexpr int kAdvice[] = {MADV_DONTNEED, MADV_DONTNEED, MADV_NORMAL, MADV_WILLNEED, MADV_DONTDUMP,
                               MADV_DODUMP,   MADV_COLD,     MADV_HUGEPAGE, MADV_SEQUENTIAL};
    const Range range = AnyRange();
    const int advice = kAdvice[random_.Below(sizeof(kAdvice) / sizeof(kAdvice[0]))];
    SayResult("advise", range, advice, madvise(At(arena_, range.first), range.count * kPage, advice) == 0);
    // A mapping whose parts were advised differently is several.
    if (advice != MADV_DONTNEED && advice != MADV_COLD && advice != MADV_WILLNEED) {
      ++last_id_;
      for (size_t i = range.first; i < range.first + range.count; ++i) SetApart(i);
    }
  }

  void Lock() {
    const Range range = AnyRange();
    const bool ok = mlock(At(arena_, range.first), range.count * kPage) == 0;
    SayResult("lock", range, 0, ok);
    ++last_id_;
    for (size_t i = range.first; i < range.first + range.count; ++i) SetApart(i);
    const bool unlocked = munlock(arena_, kArena * kPage) == 0;
    SayResult("unlock", {0, kArena}, 0, unlocked);
    // Up to the first hole.
    for (size_t i = 0; i < kArena; ++i) {
      if (pages_[i].id == 0) (void)munlock(At(arena_, i + 1), i + 1 < kArena ? (kArena - i - 1) * kPage : 0);
    }
  }

  void Sync() {
    const Range range = AnyRange();
    constexpr int kFlags[] = {MS_SYNC, MS_ASYNC, MS_SYNC | MS_INVALIDATE, 0};
    const int flags = kFlags[random_.Below(4)];
    SayResult("sync", range, flags, msync(At(arena_, range.first), range.count * kPage, flags) == 0);
  }

  // To another place in the arena.
  void RemapInside() {
    Range range;
    if (!OneMapping(range)) return;
    const size_t target = random_.Below(kArena);
    const size_t count = range.count;
    if (target + count > kArena) return;
    const bool keep = random_.Below(4) == 0 && !pages_[range.first].file;
    void* p = mremap(At(arena_, range.first), count * kPage, count * kPage,
                     MREMAP_MAYMOVE | MREMAP_FIXED | (keep ? kDontunmap : 0), At(arena_, target));
    SayResult(keep ? "remap, keep" : "remap", range, static_cast<int>(target), p != MAP_FAILED);
    if (p == MAP_FAILED) return;
    const Page page = pages_[range.first];
    if (!keep) Drop(range);
    Claim({target, count}, page.protection, page.file);
    if (keep) Claim(range, page.protection, page.file);
  }

  // Out of the arena, larger there, and back.
  void RemapAway() {
    Range range;
    if (!OneMapping(range)) return;
    const Page page = pages_[range.first];
    if (page.file) return;  // which would end behind its last page
    void* p = mremap(At(arena_, range.first), range.count * kPage, (range.count + 64) * kPage, MREMAP_MAYMOVE);
    Say("remap away [%zu, +%zu)", range.first, range.count);
    Claim(range, page.protection, page.file);
    // Where it came from several mappings, Linux may refuse, and then nothing has changed; as it is at the end.
    if (p == MAP_FAILED) return;
    const bool moved = p != At(arena_, range.first);
    REQUIRE(moved);
    void* back = mremap(p, (range.count + 64) * kPage, range.count * kPage, MREMAP_MAYMOVE | MREMAP_FIXED,
                        At(arena_, range.first));
    REQUIRE(back == At(arena_, range.first));
  }

  void Resize() {
    Range range;
    if (!OneMapping(range)) return;
    const size_t count = 1 + random_.Below(range.count + 4);
    if (range.first + count >= kArena || pages_[range.first].file) return;
    if (count > range.count) {
      // What grows has to be one mapping to Linux too: a new one.
      void* fresh = mmap(At(arena_, range.first), range.count * kPage, kReadWrite, kAnonymous | MAP_FIXED, -1, 0);
      REQUIRE(fresh == At(arena_, range.first));
      Claim(range, kReadWrite, false);
    }
    void* p = mremap(At(arena_, range.first), range.count * kPage, count * kPage, 0);
    SayResult("resize", range, static_cast<int>(count), p != MAP_FAILED);
    if (p == MAP_FAILED) return;
    const Page page = pages_[range.first];
    if (count < range.count) Drop({range.first + count, range.count - count});
    if (count > range.count) Claim({range.first, count}, page.protection, page.file);
  }

  void Write() {
    const Range range = AnyRange();
    for (size_t i = range.first; i < range.first + range.count; ++i) {
      if (pages_[i].id == 0 || (pages_[i].protection & PROT_WRITE) == 0) continue;
      memset(At(arena_, i), static_cast<int>(1 + random_.Below(255)), kPage);
    }
  }

  struct Page {
    uint64_t id = 0;  // 0: not mapped
    int protection = 0;
    bool file = false;
    bool operator==(const Page&) const = default;
  };

  Random random_;
  AccessProbe probe_;
  int file_ = -1;
  char* arena_ = nullptr;
  Page pages_[kArena];
  uint64_t last_id_ = 0;
  uint64_t sum_ = 14695981039346656037u;
};

struct Task {
  uint64_t seed;
  size_t operations;
  uint64_t sum;
};

void* RunTask(void* task) {
  auto* t = static_cast<Task*>(task);
  t->sum = Sequence(t->seed).Run(t->operations);
  return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  REQUIRE(argc >= 4);
  const uint64_t first = strtoull(argv[1], nullptr, 10);
  const uint64_t seeds = strtoull(argv[2], nullptr, 10);
  const size_t operations = strtoull(argv[3], nullptr, 10);
  verbose = argc > 4;
  static char buffer[1 << 16];
  setvbuf(stdout, buffer, _IOFBF, sizeof(buffer));
  constexpr uint64_t kThreads = 3;
  for (uint64_t seed = first; seed < first + seeds; seed += kThreads) {
    Task tasks[kThreads];
    pthread_t threads[kThreads];
    for (uint64_t i = 0; i < kThreads; ++i) {
      tasks[i] = {.seed = seed + i, .operations = operations, .sum = 0};
      if (verbose) {
        printf("seed %llu\n", static_cast<unsigned long long>(seed + i));
        RunTask(&tasks[i]);
      } else {
        REQUIRE(pthread_create(&threads[i], nullptr, RunTask, &tasks[i]) == 0);
      }
    }
    // The same in a child, while the threads are at it.
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
      Task task = {.seed = seed + 1000, .operations = operations / 4, .sum = 0};
      if (!verbose) {
        RunTask(&task);
        printf("child %llu: %016llx\n", static_cast<unsigned long long>(seed), static_cast<unsigned long long>(task.sum));
        fflush(stdout);
      }
      _exit(0);
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child && status == 0);
    for (uint64_t i = 0; i < kThreads; ++i) {
      if (!verbose) REQUIRE(pthread_join(threads[i], nullptr) == 0);
      printf("seed %llu: %016llx\n", static_cast<unsigned long long>(tasks[i].seed),
             static_cast<unsigned long long>(tasks[i].sum));
    }
  }
  return 0;
}
