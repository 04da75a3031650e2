// AddressSpace::Create: layout, sizes from tiny to large, halving, limits of the process, and what it costs the
// kernel in VMAs.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/address_space.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"

namespace freehold::vm {
namespace {

using namespace test;  // NOLINT: the fixture's words
using os::FakeKernel;
using os::LinuxKernel;
using os::Protection;

// Every verb once, on a space of any size.
void Exercise(AddressSpace& space) {
  const PageRange range = MustMap(space, 16);
  Fill(range, 0xaa);
  ASSERT_TRUE(space.Protect(Part(range, 4, 4), Protection::kRead).ok());
  ASSERT_TRUE(space.Unmap(Part(range, 8, 4)).ok());
  EXPECT_EQ(Draw(space, range), "AAAAaaaa....AAAA");
  EXPECT_EQ(*space.Populate(Part(range, 0, 4)), Pages{4});
  MustMap(space, 16, At(range.first, Placement::kReplace));
  EXPECT_TRUE(IsZero(range));
  const PageRange other = MustMap(space, 4, {.protection = Protection::kRead});
  EXPECT_TRUE(IsZero(other));
  ASSERT_TRUE(space.Unmap(other).ok());
  ASSERT_TRUE(space.Unmap(range).ok());
  (void)space.Purge(PurgeScope::kAll);
  space.CheckInvariants();
}

class CreateTest : public PolicyTest {
 protected:
  AddressSpaceOptions Sized(Bytes reserve, Bytes min_reserve = MiB(16)) const {
    AddressSpaceOptions options = Options();
    options.reserve = reserve;
    options.min_reserve = min_reserve;
    return options;
  }
  Error CreateError(const AddressSpaceOptions& options) {
    const Result<AddressSpace*> space = AddressSpace::Create(kernel_, options);
    EXPECT_FALSE(space.ok());
    if (space.ok()) AddressSpace::Destroy(*space);
    EXPECT_EQ(kernel_.ReservedPages(), Pages{0}) << "nothing stays behind";
    return space.error();
  }

  FakeKernel kernel_;
};

TEST_P(CreateTest, WorksAtEverySize) {
  for (const std::size_t mebibytes : {16, 32, 64, 128, 512, 1024, 65'536}) {
    SCOPED_TRACE(std::to_string(mebibytes) + " MiB");
    for (const unsigned regions : {0u, 1u, 2u, 16u, 1000u}) {
      AddressSpaceOptions options = Sized(MiB(mebibytes));
      options.regions_per_zone = regions;
      {
        TestSpace space(kernel_, options);
        EXPECT_EQ(space->reservation().bytes(), MiB(mebibytes));
        EXPECT_EQ(space->reservation().first.value % kPagesPerHugePage, 0u);
        EXPECT_EQ(space->Stats().reserved, MiB(mebibytes));
        Exercise(*space);
      }
      ASSERT_EQ(kernel_.ReservedPages(), Pages{0}) << "Destroy gives everything back";
    }
  }
}

TEST_P(CreateTest, RoundsDownToAPowerOfTwo) {
  TestSpace space(kernel_, Sized(MiB(200)));
  EXPECT_EQ(space->reservation().bytes(), MiB(128));
}

TEST_P(CreateTest, RefusesTooLittle) {
  EXPECT_EQ(CreateError(Sized({0})).code, ErrorCode::kEmpty);
  EXPECT_EQ(CreateError(Sized(MiB(8), MiB(1))).code, ErrorCode::kNoRoom);
  EXPECT_EQ(CreateError(Sized({1}, {1})).code, ErrorCode::kNoRoom);
  EXPECT_EQ(CreateError(Sized(MiB(64), MiB(128))).code, ErrorCode::kNoRoom);
}

TEST_P(CreateTest, HalvesUntilTheKernelGrants) {
  kernel_.FailNth(Operation::kReserve, 1, ENOMEM);
  kernel_.FailNth(Operation::kReserve, 2, ENOMEM);
  TestSpace space(kernel_, Sized(MiB(512)));
  EXPECT_EQ(space->reservation().bytes(), MiB(128));
  Exercise(*space);
}

TEST_P(CreateTest, StopsHalvingAtTheMinimum) {
  kernel_.FailAlways(Operation::kReserve, ENOMEM);
  EXPECT_EQ(CreateError(Sized(GiB(1), MiB(128))), Error::System(ENOMEM));
  EXPECT_EQ(kernel_.CallCount(Operation::kReserve), 4u) << "1024, 512, 256, 128";
}

TEST_P(CreateTest, SpacesAreIndependent) {
  TestSpace a(kernel_, Sized(MiB(64)));
  TestSpace b(kernel_, Sized(MiB(64)));
  EXPECT_FALSE(a->reservation().Overlaps(b->reservation()));
  const PageRange in_a = MustMap(*a, 4);
  EXPECT_TRUE(a->Contains(in_a.address()));
  EXPECT_FALSE(b->Contains(in_a.address()));
  EXPECT_EQ(b->Unmap(in_a).code, ErrorCode::kOutsideReservation);
  EXPECT_EQ(b->Lookup(in_a.first).error().code, ErrorCode::kOutsideReservation);
}

TEST_P(CreateTest, ContainsItsReservation) {
  TestSpace space(kernel_, Sized(MiB(64)));
  const PageRange all = space->reservation();
  EXPECT_TRUE(space->Contains(all.address()));
  EXPECT_TRUE(space->Contains(all.address() + all.bytes().value - 1));
  EXPECT_FALSE(space->Contains(all.address() + all.bytes().value));
  EXPECT_FALSE(space->Contains(all.address() - 1));
  EXPECT_EQ(&space->kernel(), static_cast<os::Kernel*>(&kernel_));
}

// Nothing is committed before it is needed, and the kernel sees few VMAs.
TEST_P(CreateTest, CostsNoMemoryAndFewKernelVmas) {
  TestSpace space(kernel_, Sized(GiB(64)));
  EXPECT_LE(kernel_.CommittedPages().bytes(), MiB(2)) << "metadata";
  EXPECT_EQ(kernel_.ResidentPages(space->reservation()), Pages{0});
  EXPECT_LE(kernel_.KernelVmaCount(), 6u);
}

TEST_P(CreateTest, CoreDumpsOmitWhatIsOnlyReserved) {
  TestSpace space(kernel_, Sized(GiB(64)));
  // The pages of reservation and metadata that they include.
  const auto included = [&] {
    return kernel_.ReservedPages() - kernel_.CountIf([](const os::PageState& page) { return page.undumped; });
  };
  EXPECT_LE(included().bytes(), MiB(2)) << "metadata";
  MustMap(*space, 1);
  EXPECT_LE(included().bytes(), MiB(2 + 68));
  const PageRange mapped = MustMap(*space, 1, {.protection = os::Protection::kRead});
  EXPECT_FALSE(kernel_.At(mapped.first).undumped);
  EXPECT_LE(included().bytes(), MiB(2 + 68 + 64));
  // Whatever is beyond what was included before.
  const PageRange large = MustMap(*space, PagesFor(MiB(200)).value, {.protection = os::Protection::kNone});
  EXPECT_FALSE(kernel_.At(large.end - Pages{1}).undumped);
  EXPECT_LE(included().bytes(), MiB(2 + 68 + 64 + 256));
  kernel_.ClearCalls();
  ASSERT_TRUE(space->Unmap(large).ok());
  MustMap(*space, large.count().value, {.protection = os::Protection::kNone});
  EXPECT_EQ(kernel_.CallCount(), 0u) << "what was included stays so";
}

FREEHOLD_INSTANTIATE_POLICIES(CreateTest);

// ---- Kernel VMAs, as the kernel counts them ----

// Lines of /proc/self/maps that lie in `range`.
std::size_t KernelVmas(PageRange range) {
  std::ifstream maps("/proc/self/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    std::uintptr_t first = 0, end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx", &first, &end) != 2) continue;
    if (range.Overlaps({{first >> kPageShift}, {end >> kPageShift}})) ++count;
  }
  return count;
}

class KernelVmaTest : public PolicyTest {};

// DESIGN §3: O(zones), never O(allocations).
TEST_P(KernelVmaTest, ManyMappingsAddNone) {
  constexpr int kMappings = kSanitized ? 5000 : 50'000;
  LinuxKernel kernel;
  AddressSpaceOptions options = Options();
  options.reserve = GiB(4);
  TestSpace space(kernel, options);
  std::mt19937 random(1);
  std::vector<PageRange> ranges;
  std::size_t most = 0;
  for (int i = 0; i < kMappings; ++i) {
    const PageRange range = MustMap(*space, 1 + random() % 4);
    // A page of some is touched, all of it of some others.
    if (i % 16 == 0) Fill(Part(range, 0, 1), 1);
    ranges.push_back(range);
    if (i % (kMappings / 10) == 0) most = std::max(most, KernelVmas(space->reservation()));
  }
  std::shuffle(ranges.begin(), ranges.end(), random);
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    ASSERT_TRUE(space->Unmap(ranges[i]).ok());
    if (i % (kMappings / 10) == 0) most = std::max(most, KernelVmas(space->reservation()));
  }
  (void)space->Purge(PurgeScope::kAll);
  most = std::max(most, KernelVmas(space->reservation()));
  EXPECT_LE(most, 3 * kZoneCount);
}

// What needs kernel VMAs of its own gives them back.
TEST_P(KernelVmaTest, ProtectedMappingsGiveTheirsBack) {
  LinuxKernel kernel;
  TestSpace space(kernel, Options());
  const std::size_t before = KernelVmas(space->reservation());
  std::vector<PageRange> ranges;
  for (int i = 0; i < 200; ++i) {
    ranges.push_back(MustMap(*space, 2, {.protection = i % 2 == 0 ? Protection::kRead : Protection::kNone}));
  }
  EXPECT_GE(KernelVmas(space->reservation()), before + 100);
  for (const PageRange range : ranges) ASSERT_TRUE(space->Unmap(range).ok());
  EXPECT_LE(KernelVmas(space->reservation()), before + 1);
}

FREEHOLD_INSTANTIATE_POLICIES(KernelVmaTest);

// ---- Limits of the process ----

// Runs `body` in a child; what it expects goes to its exit status.
void InChild(const std::function<bool()>& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body() ? 0 : 1);
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

// As `ulimit -v`: this process may have `more` address space than it has.
bool LimitAddressSpace(Bytes more) {
  std::ifstream statm("/proc/self/statm");
  std::size_t pages = 0;
  statm >> pages;
  const rlim_t limit = pages * kPageSize + more.value;
  const rlimit limits = {limit, limit};
  return setrlimit(RLIMIT_AS, &limits) == 0;
}

class LimitedTest : public PolicyTest {};

TEST_P(LimitedTest, TakesHalfAndHalfAgainOfALimitedAddressSpace) {
  AddressSpaceOptions options = Options();
  options.reserve = TiB(1);
  options.min_reserve = MiB(64);
  InChild([&] {
    if (!LimitAddressSpace(MiB(700))) return false;
    LinuxKernel kernel;
    const Result<AddressSpace*> space = AddressSpace::Create(kernel, options);
    if (!space.ok()) return false;
    const bool sized = (*space)->reservation().bytes() == MiB(512);
    const Result<PageRange> range = (*space)->Map({1000}, {.populate = true});
    if (!range.ok()) return false;
    Fill(*range, 0xaa);
    const bool fine = (*space)->Unmap(*range).ok();
    (*space)->CheckInvariants();
    AddressSpace::Destroy(*space);
    return sized && fine;
  });
}

TEST_P(LimitedTest, SaysSoBelowTheMinimum) {
  AddressSpaceOptions options = Options();
  options.reserve = TiB(1);
  options.min_reserve = GiB(1);
  InChild([&] {
    if (!LimitAddressSpace(MiB(700))) return false;
    LinuxKernel kernel;
    return AddressSpace::Create(kernel, options).error() == Error::System(ENOMEM);
  });
}

// A limit in between the space and its metadata: the smaller space is taken, and nothing leaks on the way.
TEST_P(LimitedTest, MetadataCountsToo) {
  AddressSpaceOptions options = Options();
  options.reserve = GiB(1);
  options.min_reserve = MiB(64);
  InChild([&] {
    if (!LimitAddressSpace(MiB(1026))) return false;
    LinuxKernel kernel;
    const Result<AddressSpace*> space = AddressSpace::Create(kernel, options);
    return space.ok() && (*space)->reservation().bytes() == MiB(512) && (*space)->Map({4}).ok();
  });
}

FREEHOLD_INSTANTIATE_POLICIES(LimitedTest);

}  // namespace
}  // namespace freehold::vm
