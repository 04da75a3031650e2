// ProcessMappings on a small address space of its own, beside the program's: what it serves and what it passes on,
// ranges that cross borders, errors, and threads. That the results are the kernel's is mmap_conformance_test's to say.
#include "runtime/process_mappings.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"

namespace freehold::runtime {
namespace {

using namespace vm::test;  // NOLINT: the fixture's words
using vm::kPageSize;
using vm::PageRange;
using vm::Pages;
using vm::Zone;
using vm::os::FakeKernel;
using Operation = FakeKernel::Operation;

constexpr int kAnonymous = MAP_PRIVATE | MAP_ANONYMOUS;
constexpr int kReadWrite = PROT_READ | PROT_WRITE;

template <typename Kernel>
class Mappings {
 public:
  explicit Mappings(const ProcessMappingsOptions& options = {}) { mappings_.Init(*space_, options); }

  ProcessMappings* operator->() { return &mappings_; }
  Kernel& kernel() { return kernel_; }
  vm::AddressSpace& space() { return *space_; }
  PageRange P(std::size_t first, std::size_t count) { return Part(space_->reservation(), first, count); }

  bool Inside(long address) { return space_->Contains(reinterpret_cast<void*>(address)); }
  long MapPages(std::size_t pages, int protection = kReadWrite, int flags = 0, void* at = nullptr) {
    return mappings_.Map(at, pages * kPageSize, protection, kAnonymous | flags, -1, 0);
  }
  long MapAt(PageRange range, int flags = MAP_FIXED, int protection = kReadWrite) {
    return MapPages(range.count().value, protection, flags, range.address());
  }
  long Unmap(PageRange range) { return mappings_.Unmap(range.address(), range.bytes().value); }
  bool IsMapped(PageRange range) {
    std::vector<unsigned char> resident(range.count().value);
    return mappings_.Residency(range.address(), range.bytes().value, resident.data()) == 0;
  }

 private:
  Kernel kernel_;
  TestSpace space_{kernel_};
  ProcessMappings mappings_;
};

using OnLinux = Mappings<vm::os::LinuxKernel>;
using OnFake = Mappings<FakeKernel>;

// Where nothing is mapped, and the kernel maps things.
char* FreeAddress(std::size_t pages) {
  void* p = mmap(nullptr, pages * kPageSize, PROT_NONE, kAnonymous, -1, 0);
  EXPECT_EQ(munmap(p, pages * kPageSize), 0);
  return static_cast<char*>(p);
}

char* Bytes(long address) { return reinterpret_cast<char*>(address); }

class TemporaryFile {
 public:
  explicit TemporaryFile(std::size_t pages, int mode = O_RDWR) {
    char path[] = "/tmp/freehold-mappings-XXXXXX";
    const int writer = mkstemp(path);
    for (std::size_t i = 0; i < pages; ++i) {
      const std::vector<char> page(kPageSize, static_cast<char>('a' + i));
      EXPECT_EQ(write(writer, page.data(), kPageSize), static_cast<ssize_t>(kPageSize));
    }
    descriptor_ = open(path, mode);
    unlink(path);
    close(writer);
  }
  ~TemporaryFile() { close(descriptor_); }
  int descriptor() const { return descriptor_; }

 private:
  int descriptor_;
};

// ---- What is served ----

TEST(ProcessMappingsTest, AnonymousMemoryIsServedAndTheRestIsNot) {
  OnLinux m;
  const TemporaryFile readable(4, O_RDONLY);
  const TemporaryFile writable(4);
  struct Case {
    int protection;
    int flags;
    int descriptor;
    bool inside;
  };
  const Case cases[] = {
      {kReadWrite, kAnonymous, -1, true},
      {PROT_NONE, kAnonymous, -1, true},
      {PROT_READ | PROT_EXEC, kAnonymous, -1, true},
      {kReadWrite, kAnonymous | MAP_NORESERVE | MAP_STACK, -1, true},
      {kReadWrite, kAnonymous | MAP_POPULATE, -1, true},
      {kReadWrite, kAnonymous | MAP_32BIT, -1, false},
      {kReadWrite, kAnonymous | MAP_GROWSDOWN, -1, false},
      {kReadWrite, MAP_SHARED | MAP_ANONYMOUS, -1, false},
      {PROT_READ, MAP_PRIVATE, readable.descriptor(), true},
      {PROT_READ, MAP_SHARED, readable.descriptor(), true},
      {PROT_READ | PROT_EXEC, MAP_PRIVATE, readable.descriptor(), false},
      {PROT_READ, MAP_PRIVATE, writable.descriptor(), false},
      {kReadWrite, MAP_SHARED, writable.descriptor(), false},
  };
  for (const Case& one : cases) {
    const long p = m->Map(nullptr, 4 * kPageSize, one.protection, one.flags, one.descriptor, 0);
    ASSERT_GT(p, 0) << strerror(static_cast<int>(-p));
    EXPECT_EQ(m.Inside(p), one.inside) << "protection " << one.protection << ", flags " << one.flags;
    EXPECT_EQ(m->Unmap(Bytes(p), 4 * kPageSize), 0);
  }
}

TEST(ProcessMappingsTest, WhatFitsIntoNoRegionIsTheKernels) {
  OnLinux m;
  const long p = m.MapPages(kSmallRegionPages + 1, kReadWrite, MAP_NORESERVE);
  ASSERT_GT(p, 0);
  EXPECT_FALSE(m.Inside(p));
  EXPECT_EQ(m->Unmap(Bytes(p), (kSmallRegionPages + 1) * kPageSize), 0);
}

TEST(ProcessMappingsTest, WithoutWindowsFilesAreTheKernels) {
  OnLinux m({.map_files = false});
  const TemporaryFile file(1, O_RDONLY);
  const long p = m->Map(nullptr, kPageSize, PROT_READ, MAP_PRIVATE, file.descriptor(), 0);
  ASSERT_GT(p, 0);
  EXPECT_FALSE(m.Inside(p));
  EXPECT_EQ(m->Unmap(Bytes(p), kPageSize), 0);
}

TEST(ProcessMappingsTest, AWindowIsUsedAgain) {
  OnLinux m;
  const TemporaryFile file(4, O_RDONLY);
  long first = 0;
  for (int i = 0; i < 3; ++i) {
    const long p = m->Map(nullptr, 2 * kPageSize, PROT_READ, MAP_SHARED, file.descriptor(), kPageSize);
    ASSERT_GT(p, 0);
    if (first == 0) first = p;
    EXPECT_EQ(p, first);
    EXPECT_EQ(Bytes(p)[0], 'b');
    EXPECT_EQ(m->Unmap(Bytes(p), 2 * kPageSize), 0);
  }
  EXPECT_EQ(m.space().Stats().window_hits, 2u);
}

TEST(ProcessMappingsTest, HintsAreFollowedOrServedAligned) {
  OnLinux follows;
  char* const wanted = FreeAddress(4);
  long p = follows.MapPages(4, kReadWrite, 0, wanted);
  EXPECT_EQ(p, reinterpret_cast<long>(wanted));
  EXPECT_EQ(follows->Unmap(wanted, 4 * kPageSize), 0);
  OnLinux ignores({.follow_hints = false});
  for (const std::size_t alignment : {vm::MiB(32).value, vm::MiB(2).value, vm::KiB(64).value}) {
    p = ignores.MapPages(4, kReadWrite, 0, reinterpret_cast<char*>(vm::TiB(1).value + alignment));
    ASSERT_GT(p, 0);
    EXPECT_TRUE(ignores.Inside(p));
    EXPECT_EQ(static_cast<std::size_t>(p) % alignment, 0u);
  }
  p = ignores.MapPages(4, kReadWrite, 0, ignores.P(100, 1).address());
  EXPECT_EQ(p, reinterpret_cast<long>(ignores.P(100, 1).address())) << "inside, both follow";
}

// ---- Borders ----

TEST(ProcessMappingsTest, AcrossRegions) {
  OnLinux m;
  const PageRange range = m.P(kSmallRegionPages - 4, 8);
  ASSERT_EQ(m.MapAt(range), reinterpret_cast<long>(range.address()));
  EXPECT_TRUE(IsZero(range));
  Fill(range, 0xaa);
  EXPECT_EQ(m.MapAt(range, MAP_FIXED_NOREPLACE), -EEXIST);
  EXPECT_EQ(m->Protect(range.address(), range.bytes().value, PROT_READ), 0);
  EXPECT_EQ(m->Advise(range.address(), range.bytes().value, MADV_DONTNEED), 0);
  EXPECT_TRUE(IsZero(range));
  const TemporaryFile file(8);
  EXPECT_EQ(m->Map(range.address(), range.bytes().value, PROT_READ, MAP_PRIVATE | MAP_FIXED, file.descriptor(), 0),
            reinterpret_cast<long>(range.address()));
  EXPECT_EQ(*reinterpret_cast<char*>(Part(range, 3, 1).address()), 'd');
  EXPECT_EQ(*reinterpret_cast<char*>(Part(range, 4, 1).address()), 'e');
  EXPECT_EQ(m.Unmap(range), 0);
  // Taken at its end only: nothing of it is mapped.
  const PageRange end = Part(range, 6, 2);
  ASSERT_GT(m.MapAt(end), 0);
  EXPECT_EQ(m.MapAt(range, MAP_FIXED_NOREPLACE), -EEXIST);
  EXPECT_FALSE(m.IsMapped(Part(range, 0, 1)));
  EXPECT_TRUE(m.IsMapped(end));
}

// Both ends of the reservation: memory of the kernel's beside the space's.
TEST(ProcessMappingsTest, AcrossTheEndsOfTheReservation) {
  OnLinux m;
  const PageRange all = m.space().reservation();
  const PageRange ranges[] = {{all.first - Pages{2}, all.first + Pages{2}}, {all.end - Pages{2}, all.end + Pages{2}}};
  for (const PageRange range : ranges) {
    // Where somebody else lives, there is nothing to test.
    if (m.MapAt(range, MAP_FIXED_NOREPLACE) < 0) continue;
    EXPECT_TRUE(IsZero(range));
    Fill(range, 0xaa);
    EXPECT_TRUE(m.IsMapped(range));
    EXPECT_EQ(m.MapAt(range, MAP_FIXED_NOREPLACE), -EEXIST);
    EXPECT_EQ(m->Protect(range.address(), range.bytes().value, PROT_READ), 0);
    EXPECT_EQ(m->Protect(range.address(), range.bytes().value, kReadWrite), 0);
    EXPECT_TRUE(IsFilledWith(range, 0xaa));
    EXPECT_EQ(m->Advise(range.address(), range.bytes().value, MADV_DONTNEED), 0);
    EXPECT_TRUE(IsZero(range));
    EXPECT_EQ(m->LockMemory(range.address(), range.bytes().value, 0), 0);
    EXPECT_EQ(m->UnlockMemory(range.address(), range.bytes().value), 0);
    EXPECT_EQ(m->Sync(range.address(), range.bytes().value, MS_SYNC), 0);
    EXPECT_EQ(m->Remap(range.address(), range.bytes().value, kPageSize, MREMAP_MAYMOVE, nullptr), -EFAULT);
    EXPECT_EQ(m.MapAt(range), reinterpret_cast<long>(range.address()));
    EXPECT_EQ(m.Unmap(range), 0);
    EXPECT_FALSE(m.IsMapped(Part(range, 1, 1)));
    EXPECT_FALSE(m.IsMapped(Part(range, 2, 1)));
    // Half of it is taken: the other half is not left behind.
    const PageRange half = range.Intersect(all);
    ASSERT_GT(m.MapAt(half), 0);
    EXPECT_EQ(m.MapAt(range, MAP_FIXED_NOREPLACE), -EEXIST);
    EXPECT_EQ(m.Unmap(half), 0);
    EXPECT_EQ(m->Advise(range.address(), range.bytes().value, MADV_NORMAL), -ENOMEM);
    EXPECT_EQ(m->Sync(range.address(), range.bytes().value, MS_SYNC), -ENOMEM);
  }
}

// ---- What the kernel has inside the space ----

TEST(ProcessMappingsTest, ForeignMappingsGoWithoutATrace) {
  OnLinux m;
  const TemporaryFile file(8);
  const auto kernel_vmas = [] {
    FILE* maps = fopen("/proc/self/maps", "r");
    int lines = 0;
    for (int c = 0; (c = fgetc(maps)) != EOF;) lines += c == '\n';
    fclose(maps);
    return lines;
  };
  const PageRange range = PageRange::Of(vm::PageNumber::Of(Bytes(m.MapPages(16))), {16});
  Fill(range, 0xaa);
  const int before = kernel_vmas();
  for (int i = 0; i < 100; ++i) {
    const PageRange part = Part(range, 4, 4);
    ASSERT_EQ(m->Map(part.address(), part.bytes().value, kReadWrite, MAP_SHARED | MAP_FIXED, file.descriptor(), 0),
              reinterpret_cast<long>(part.address()));
    EXPECT_EQ(*reinterpret_cast<char*>(part.address()), 'a');
    ASSERT_EQ(m.MapAt(part), reinterpret_cast<long>(part.address()));
    EXPECT_TRUE(IsZero(part));
  }
  EXPECT_TRUE(IsFilledWith(Part(range, 0, 4), 0xaa));
  EXPECT_TRUE(IsFilledWith(Part(range, 8, 8), 0xaa));
  EXPECT_LE(kernel_vmas(), before + 2);
}

TEST(ProcessMappingsTest, MoreForeignMappingsThanThereAreRecordsAreRefused) {
  OnLinux m;
  const TemporaryFile file(1);
  KernelBackingPool pool;
  std::vector<KernelBacking*> taken;
  while (KernelBacking* backing = pool.Take(m.space())) taken.push_back(backing);
  EXPECT_EQ(taken.size(), KernelBackingPool::kBackings);
  for (KernelBacking* backing : taken) backing->AddPages(1);
  for (KernelBacking* backing : taken) backing->DropPages(1);
  m.space().epochs().Barrier();
  KernelBacking* again = pool.Take(m.space());
  EXPECT_NE(again, nullptr) << "they come back";
  // Before it was given a mapping, and after that was moved, it has nothing to show.
  EXPECT_FALSE(again->has_source());
  const PageRange range = MustMap(m.space(), 1);
  EXPECT_EQ(again->Install(m.kernel(), range, 0, vm::os::Protection::kRead, true).code, vm::ErrorCode::kNoRoom);
}

TEST(ProcessMappingsTest, AFailedForeignMappingChangesNothing) {
  OnLinux m;
  const PageRange range = PageRange::Of(vm::PageNumber::Of(Bytes(m.MapPages(4))), {4});
  Fill(range, 0xaa);
  EXPECT_EQ(m->Map(range.address(), kPageSize, PROT_READ, MAP_PRIVATE | MAP_FIXED, 999, 0), -EBADF);
  const TemporaryFile file(1, O_RDONLY);
  EXPECT_EQ(m->Map(range.address(), kPageSize, kReadWrite, MAP_SHARED | MAP_FIXED, file.descriptor(), 0), -EACCES);
  EXPECT_EQ(m->Map(range.address(), kPageSize, PROT_READ, MAP_PRIVATE | MAP_FIXED_NOREPLACE, file.descriptor(), 0),
            -EEXIST);
  // Nothing can be moved there from where nothing is.
  char* const nothing = FreeAddress(1);
  EXPECT_EQ(m->Remap(nothing, kPageSize, kPageSize, MREMAP_MAYMOVE | MREMAP_FIXED, range.address()), -EFAULT);
  EXPECT_TRUE(IsFilledWith(Part(range, 1, 3), 0xaa));
  EXPECT_TRUE(m.IsMapped(range));
}

// Every record in use: what asks for one more is refused, and nothing is lost.
TEST(ProcessMappingsTest, WithoutARecordEverythingStays) {
  OnLinux m;
  const TemporaryFile file(1);
  const PageRange own = PageRange::Of(vm::PageNumber::Of(Bytes(m.MapPages(8))), {8});
  Fill(own, 0xaa);
  const auto map_file = [&](PageRange page) {
    return m->Map(page.address(), kPageSize, kReadWrite, MAP_PRIVATE | MAP_FIXED, file.descriptor(), 0);
  };
  ASSERT_GT(map_file(Part(own, 7, 1)), 0);
  std::vector<PageRange> filled;
  for (std::size_t mapped = 1; mapped < KernelBackingPool::kBackings;) {
    const PageRange some = PageRange::Of(vm::PageNumber::Of(Bytes(m.MapPages(4096))), {4096});
    filled.push_back(some);
    for (std::size_t i = 0; i < 4096 && mapped < KernelBackingPool::kBackings; ++i, ++mapped) {
      ASSERT_GT(map_file(Part(some, i, 1)), 0) << mapped;
    }
  }
  EXPECT_EQ(map_file(Part(own, 0, 1)), -ENOMEM);
  char* const source = reinterpret_cast<char*>(Part(own, 7, 1).address());
  EXPECT_EQ(m->Remap(source, kPageSize, kPageSize, MREMAP_MAYMOVE | MREMAP_FIXED, own.address()), -ENOMEM);
  EXPECT_EQ(*source, 'a');
  char* const outside = FreeAddress(1);
  ASSERT_EQ(m.MapPages(1, kReadWrite, MAP_FIXED, outside), reinterpret_cast<long>(outside));
  *outside = 'o';
  EXPECT_EQ(m->Remap(outside, kPageSize, kPageSize, MREMAP_MAYMOVE | MREMAP_FIXED, own.address()), -ENOMEM);
  EXPECT_EQ(*outside, 'o');
  EXPECT_EQ(m->Unmap(outside, kPageSize), 0);
  EXPECT_TRUE(IsFilledWith(Part(own, 0, 7), 0xaa));
  for (const PageRange some : filled) EXPECT_EQ(m.Unmap(some), 0);
  m.space().epochs().Barrier();
  EXPECT_GT(map_file(Part(own, 0, 1)), 0);
}

// A mapping of the kernel's grows and moves inside, and outside, with what it shows.
TEST(ProcessMappingsTest, ForeignMappingsMove) {
  OnLinux m;
  const TemporaryFile file(8);
  const PageRange own = PageRange::Of(vm::PageNumber::Of(Bytes(m.MapPages(16))), {16});
  const auto at = [&](std::size_t page) { return reinterpret_cast<char*>(Part(own, page, 1).address()); };
  ASSERT_GT(m->Map(at(0), 2 * kPageSize, PROT_READ, MAP_SHARED | MAP_FIXED, file.descriptor(), 0), 0);
  ASSERT_EQ(m->Remap(at(0), 2 * kPageSize, 4 * kPageSize, MREMAP_MAYMOVE | MREMAP_FIXED, at(8)),
            reinterpret_cast<long>(at(8)));
  for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(*at(8 + i), static_cast<char>('a' + i));
  EXPECT_FALSE(m.IsMapped(Part(own, 0, 1)));
  EXPECT_EQ(m->Protect(at(8), 4 * kPageSize, kReadWrite), 0);
  *at(8) = 'x';
  char byte = 0;
  EXPECT_EQ(pread(file.descriptor(), &byte, 1, 0), 1);
  EXPECT_EQ(byte, 'x');
  const long out = m->Remap(at(8), 4 * kPageSize, 6 * kPageSize, MREMAP_MAYMOVE, nullptr);
  ASSERT_GT(out, 0);
  EXPECT_FALSE(m.Inside(out));
  EXPECT_EQ(Bytes(out)[5 * kPageSize], 'f');
  EXPECT_FALSE(m.IsMapped(Part(own, 8, 1)));
  EXPECT_EQ(m->Unmap(Bytes(out), 6 * kPageSize), 0);
  // In place it cannot grow, nor where it may not move.
  ASSERT_GT(m->Map(at(0), 2 * kPageSize, PROT_READ, MAP_SHARED | MAP_FIXED, file.descriptor(), 0), 0);
  EXPECT_EQ(m->Remap(at(0), 2 * kPageSize, 3 * kPageSize, 0, nullptr), -ENOMEM);
  EXPECT_EQ(m.Unmap(own), 0);
  const long p = m.MapPages(16);
  EXPECT_TRUE(IsZero(PageRange::Of(vm::PageNumber::Of(Bytes(p)), {16})));
}

// ---- Errors ----

TEST(ProcessMappingsTest, RefusalsOfTheKernelArriveAsErrno) {
  OnFake m;
  const PageRange range = PageRange::Of(vm::PageNumber::Of(Bytes(m.MapPages(4))), {4});
  Fill(range, 0xaa);
  m.kernel().FailNth(Operation::kProtect, 1, EACCES);
  EXPECT_EQ(m->Protect(range.address(), kPageSize, PROT_READ), -EACCES);
  m.kernel().FailNth(Operation::kLockMemory, 1, EPERM);
  EXPECT_EQ(m->LockMemory(range.address(), kPageSize, 0), -EPERM);
  m.kernel().FailNth(Operation::kLockMemory, 1, ENOMEM);
  EXPECT_EQ(m.MapAt(range, MAP_FIXED | MAP_LOCKED), -EAGAIN) << "mmap's word for it";
  m.kernel().FailNth(Operation::kUnlockMemory, 1, ENOMEM);
  ASSERT_EQ(m->LockMemory(range.address(), kPageSize, MLOCK_ONFAULT), 0);
  EXPECT_EQ(m->UnlockMemory(range.address(), kPageSize), -ENOMEM);
  EXPECT_EQ(m->UnlockMemory(range.address(), kPageSize), 0);
  m.kernel().FailNth(Operation::kDiscard, 1, EINVAL);
  EXPECT_EQ(m->Advise(range.address(), kPageSize, MADV_DONTNEED), -EINVAL);
  m.kernel().FailNth(Operation::kAdvise, 1, EBADF);
  EXPECT_EQ(m->Advise(range.address(), kPageSize, MADV_DONTFORK), -EBADF);
  m.kernel().FailNth(Operation::kQueryResident, 1, EAGAIN);
  unsigned char resident[4];
  EXPECT_EQ(m->Residency(range.address(), kPageSize, resident), -EAGAIN);
  EXPECT_TRUE(IsFilledWith(range, 0xaa));
}

TEST(ProcessMappingsTest, WhatIsRefusedAnywhereIsTheKernelsToTry) {
  OnFake m;
  m.kernel().FailAlways(Operation::kProtect, ENOMEM);
  const long p = m.MapPages(4);
  ASSERT_GT(p, 0);
  EXPECT_FALSE(m.Inside(p));
  EXPECT_EQ(m->Unmap(Bytes(p), 4 * kPageSize), 0);
}

// ---- fork ----

TEST(ProcessMappingsTest, WhatAForkLeavesOutIsNoHole) {
  OnLinux m;
  const PageRange range = PageRange::Of(vm::PageNumber::Of(Bytes(m.MapPages(8))), {8});
  Fill(range, 0xaa);
  ASSERT_EQ(m->Advise(Part(range, 2, 3).address(), 3 * kPageSize, MADV_DONTFORK), 0);
  m.space().PrepareFork();
  const pid_t child = fork();
  if (child == 0) {
    m.space().ChildAfterFork();
    m->ChildAfterFork();
    // The kernel would take the hole for this.
    void* p = mmap(Part(range, 2, 1).address(), kPageSize, kReadWrite, kAnonymous, -1, 0);
    const bool closed = p != MAP_FAILED && !m.Inside(reinterpret_cast<long>(p));
    const bool rest = IsFilledWith(Part(range, 0, 2), 0xaa) && IsFilledWith(Part(range, 5, 3), 0xaa);
    const bool serves = m.Unmap(range) == 0 && m.MapPages(8) > 0;
    _exit(closed && rest && serves ? 0 : 1);
  }
  m.space().ParentAfterFork();
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(IsFilledWith(range, 0xaa));
}

// ---- Threads ----

// Each thread in its own part of one mapping, with everything that cuts and joins kernel VMAs there.
TEST(ProcessMappingsTest, ThreadsOnNeighbouringPages) {
  OnLinux m;
  constexpr std::size_t kThreads = 4;
  constexpr std::size_t kPages = 16;
  const TemporaryFile file(kPages);
  const PageRange all = PageRange::Of(vm::PageNumber::Of(Bytes(m.MapPages(kThreads * kPages))), {kThreads * kPages});
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      const PageRange own = Part(all, t * kPages, kPages);
      for (int round = 0; round < 150; ++round) {
        const PageRange part = Part(own, static_cast<std::size_t>(round) % 8, 1 + static_cast<std::size_t>(round) % 7);
        char* const p = reinterpret_cast<char*>(part.address());
        const std::size_t bytes = part.bytes().value;
        switch (round % 6) {
          case 0:
            ASSERT_GT(m->Map(p, bytes, kReadWrite, MAP_PRIVATE | MAP_FIXED, file.descriptor(), 0), 0);
            EXPECT_EQ(*p, 'a');
            break;
          case 1:
            ASSERT_GT(m.MapAt(part), 0);
            EXPECT_TRUE(IsZero(part));
            break;
          case 2:
            (void)m->Protect(p, bytes, PROT_READ);
            break;
          case 3:
            (void)m->Advise(p, bytes, MADV_DONTDUMP);
            break;
          case 4:
            EXPECT_EQ(m.Unmap(part), 0);
            break;
          case 5:
            ASSERT_GT(m.MapAt(own), 0);
            EXPECT_TRUE(IsZero(own));
            Fill(own, static_cast<int>(t) + 1);
            break;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(m.Unmap(all), 0);
  EXPECT_EQ(m.MapAt(all, MAP_FIXED_NOREPLACE), reinterpret_cast<long>(all.address()));
  EXPECT_TRUE(IsZero(all));
}

}  // namespace
}  // namespace freehold::runtime
