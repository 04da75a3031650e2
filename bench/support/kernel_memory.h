// The plain system calls as baselines, and what a benchmark asks the kernel about memory. A call
// that fails ends the program with its name and reason: a benchmark has nothing to fall back to.
#ifndef FREEHOLD_BENCH_SUPPORT_KERNEL_MEMORY_H_
#define FREEHOLD_BENCH_SUPPORT_KERNEL_MEMORY_H_

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#ifndef MADV_POPULATE_WRITE  // since Linux 5.14; absent from older headers
#define MADV_POPULATE_WRITE 23
#endif

namespace freehold::bench {

inline constexpr std::size_t kBytesPerPage = 4096;

// Prints "<what>: <reason of errno>" and ends the program with status 1.
[[noreturn]] void DieOfErrno(const char* what);

// Private anonymous memory, readable and writable. `extra_flags` is or'ed in: MAP_POPULATE.
inline std::byte* KernelMap(std::size_t bytes, int extra_flags = 0) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | extra_flags, -1, 0);
  if (memory == MAP_FAILED) DieOfErrno("mmap");
  return static_cast<std::byte*>(memory);
}

inline void KernelUnmap(void* memory, std::size_t bytes) {
  if (munmap(memory, bytes) != 0) DieOfErrno("munmap");
}

inline void KernelAdvise(void* memory, std::size_t bytes, int advice) {
  if (madvise(memory, bytes, advice) != 0) DieOfErrno("madvise");
}

inline void KernelProtect(void* memory, std::size_t bytes, int protection) {
  if (mprotect(memory, bytes, protection) != 0) DieOfErrno("mprotect");
}

// Puts the pages at `from` in the place of what is mapped at `to`. The source is unmapped then, or stays
// mapped and is empty.
enum class MoveSource : bool { kUnmapped, kKeptEmpty };
inline void KernelMove(void* from, void* to, std::size_t bytes, MoveSource source) {
  constexpr int kMremapDontunmap = 4;  // since Linux 5.7; absent from older headers
  const int keep = source == MoveSource::kKeptEmpty ? kMremapDontunmap : 0;
  if (mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | keep, to) == MAP_FAILED) DieOfErrno("mremap");
}

// Writes one byte in each of the first `pages` pages.
inline void TouchPages(std::byte* memory, std::size_t pages) {
  auto* bytes = reinterpret_cast<volatile char*>(memory);
  for (std::size_t page = 0; page < pages; ++page) bytes[page * kBytesPerPage] = 1;
}

// While in scope the process gets no transparent huge page, whatever the system's setting and its
// own advice. Cases for 4 KiB pages run under it, so that baseline and product see the same page
// size everywhere.
class ScopedNoHugePages {
 public:
  ScopedNoHugePages();
  ~ScopedNoHugePages();
  ScopedNoHugePages(const ScopedNoHugePages&) = delete;
  ScopedNoHugePages& operator=(const ScopedNoHugePages&) = delete;
};

// Whether this kernel has MADV_POPULATE_WRITE.
bool HasPopulateWrite();

// Whether advice can get huge pages on this system ("always" or "madvise").
bool HasHugePagesByAdvice();

// What this process may still allocate without swapping: the smaller of the machine's MemAvailable
// and what the control group leaves.
std::size_t AvailableMemory();

// How many pages of a page-aligned range are resident; 0 when part of it is not mapped.
std::size_t ResidentPages(std::byte* memory, std::size_t bytes);

// The resident set of this process: now, and its largest so far.
std::size_t ResidentMemory();
std::size_t PeakResidentMemory();

// Page faults of this process so far that needed no file to be read.
std::uint64_t MinorFaults();

}  // namespace freehold::bench

#endif  // FREEHOLD_BENCH_SUPPORT_KERNEL_MEMORY_H_
