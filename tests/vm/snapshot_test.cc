// Snapshots and the maps text, alone and while others change the space.
#include <atomic>
#include <fstream>
#include <regex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/backing.h"
#include "vm/os/linux_kernel.h"

namespace freehold::vm::test {
namespace {

using os::Protection;

std::vector<VmaInfo> TakeSnapshot(const AddressSpace& space, bool* instant = nullptr) {
  std::vector<VmaInfo> vmas(4096);
  const SnapshotResult result = space.Snapshot(absl::MakeSpan(vmas));
  if (result.vmas > vmas.size()) throw std::runtime_error("more VMAs than expected");
  vmas.resize(result.vmas);
  if (instant != nullptr) *instant = result.instant;
  return vmas;
}

std::string Maps(AddressSpace& space) {
  std::string text;
  space.WriteMaps([](void* to, std::string_view line) { *static_cast<std::string*>(to) += line; }, &text);
  return text;
}

class SnapshotTest : public testing::Test {
 protected:
  os::LinuxKernel kernel_;
  TestSpace space_{kernel_};
};

TEST_F(SnapshotTest, IsEverythingInOrder) {
  const PageRange plain = MustMap(*space_, 3);
  MapOptions options;
  options.protection = Protection::kRead;
  const PageRange mapping = MustMap(*space_, 5, options);
  ASSERT_TRUE(space_->Protect(Part(mapping, 2, 1), Protection::kNone).ok());
  bool instant = false;
  const std::vector<VmaInfo> vmas = TakeSnapshot(*space_, &instant);
  EXPECT_TRUE(instant);
  ASSERT_EQ(vmas.size(), 4u);
  EXPECT_EQ(vmas[0].range, plain);
  EXPECT_EQ(vmas[1].range, Part(mapping, 0, 2));
  EXPECT_EQ(vmas[2].protection, Protection::kNone);
  EXPECT_EQ(vmas[3].range, Part(mapping, 3, 2));
  EXPECT_EQ(vmas[3].zone, Zone::kMapping);
}

TEST_F(SnapshotTest, TellsHowMuchRoomItTakes) {
  MapOptions options;
  options.protection = Protection::kRead;
  for (int i = 0; i < 5; ++i) MustMap(*space_, 1, options);
  VmaInfo two[2];
  EXPECT_EQ(space_->Snapshot(absl::MakeSpan(two)).vmas, 5u);
  EXPECT_TRUE(two[1].range.first > two[0].range.first);
  EXPECT_EQ(space_->Snapshot({}).vmas, 5u);
}

// Every change that a lookup can see makes the copies of one attempt differ from one instant.
TEST_F(SnapshotTest, EveryVisibleChangeIsCounted) {
  // Between the copies of two regions, a verb of each kind. The first VMA is in the first region, so that the space
  // changes during its visit.
  const PageRange first = MustMap(*space_, 1);
  MapOptions options;
  options.protection = Protection::kRead;
  const PageRange range = MustMap(*space_, 40, options);
  struct Change {
    const char* name;
    std::function<void()> make;
  };
  PageRange extra;
  const std::vector<Change> changes = {
      {"map", [&] { extra = MustMap(*space_, 2); }},
      {"protect", [&] { ASSERT_TRUE(space_->Protect(extra, Protection::kRead).ok()); }},
      {"lock", [&] { ASSERT_TRUE(space_->LockMemory(extra, os::MemoryLock::kOnFault).ok()); }},
      {"unlock", [&] { ASSERT_TRUE(space_->UnlockMemory(extra).ok()); }},
      {"unmap", [&] { ASSERT_TRUE(space_->Unmap(extra).ok()); }},
      {"replace", [&] { MustMap(*space_, 40, At(range.first, Placement::kReplace, Protection::kNone)); }},
      {"unmap part", [&] { ASSERT_TRUE(space_->Unmap(Part(range, 2, 2)).ok()); }},
      {"fixed", [&] { MustMapAt(*space_, Part(range, 2, 2)); }},
      {"grow", [&] { ASSERT_TRUE(space_->Remap(first, {2}).ok()); }},
  };
  for (const Change& change : changes) {
    SCOPED_TRACE(change.name);
    const std::uint64_t before = space_->Changes();
    change.make();
    EXPECT_NE(space_->Changes(), before);
  }
  const std::uint64_t before = space_->Changes();
  (void)space_->Lookup(first.first);
  ASSERT_TRUE(space_->Populate(first).ok());
  ASSERT_TRUE(space_->Advise(first, Advice::kDontNeed).ok());
  EXPECT_EQ(space_->Changes(), before);
}

// Two mappings in two regions, of which at every instant exactly one exists, or both while one takes over.
TEST_F(SnapshotTest, InstantMeansOneInstant) {
  const PageRange a = Part(ZoneRange(*space_, Zone::kPlain), 100, 1);
  const PageRange b = Part(ZoneRange(*space_, Zone::kMapping), 100, 1);
  MustMapAt(*space_, a);
  std::atomic<bool> stop{false};
  std::thread mover([&] {
    while (!stop.load()) {
      MustMapAt(*space_, b, Protection::kRead);
      ASSERT_TRUE(space_->Unmap(a).ok());
      MustMapAt(*space_, a);
      ASSERT_TRUE(space_->Unmap(b).ok());
      std::this_thread::yield();
    }
  });
  int instants = 0;
  const int rounds = kSanitized ? 2000 : 20000;
  for (int i = 0; i < rounds || instants < 100; ++i) {
    bool instant = false;
    const std::vector<VmaInfo> vmas = TakeSnapshot(*space_, &instant);
    ASSERT_LE(vmas.size(), 2u);
    if (!instant) continue;
    ++instants;
    EXPECT_GE(vmas.size(), 1u);
  }
  stop.store(true);
  mover.join();
}

class NamedBacking final : public Backing {
 public:
  NamedBacking() : Backing(Protection::kReadWrite) {}
  Error Install(os::Kernel& kernel, PageRange range, std::uint64_t, Protection protection, bool) override {
    return kernel.Protect(range, protection);
  }
  void Flush(os::Kernel&, PageRange, std::uint64_t) override {}
  BackingDescription Describe() const override {
    return {.shared = true, .device_major = 8, .device_minor = 0x11, .inode = 12345, .name = "/srv/data"};
  }

 private:
  void OnUnused() override {}
};

// Lines that the kernel's readers understand: the same pattern fits those of the kernel.
TEST_F(SnapshotTest, MapsTextReadsAsTheKernels) {
  NamedBacking backing;
  MustMap(*space_, 2);
  MapOptions options;
  options.protection = Protection::kReadExec;
  MustMap(*space_, 1, options);
  MapOptions file;
  file.backing = &backing;
  file.backing_page = 3;
  const PageRange mapped = MustMap(*space_, 2, file);
  const std::string text = Maps(*space_);
  const std::regex line(R"(^[0-9a-f]{8,}-[0-9a-f]{8,} [r-][w-][x-][sp] [0-9a-f]{8,} [0-9a-f]{2,}:[0-9a-f]{2,} \d+ +(\S.*)?$)");
  std::size_t lines = 0;
  for (std::size_t at = 0; at < text.size(); ++lines) {
    const std::size_t end = text.find('\n', at);
    ASSERT_NE(end, std::string::npos);
    EXPECT_TRUE(std::regex_match(text.substr(at, end - at), line)) << text.substr(at, end - at);
    at = end + 1;
  }
  EXPECT_EQ(lines, 3u);
  EXPECT_NE(text.find(" rw-p 00000000 00:00 0"), std::string::npos);
  EXPECT_NE(text.find("[freehold:plain]\n"), std::string::npos);
  EXPECT_NE(text.find(" r-xp 00000000 00:00 0"), std::string::npos);
  EXPECT_NE(text.find(" rw-s 00003000 08:11 12345"), std::string::npos) << text;
  EXPECT_EQ(text.find("/srv/data") - text.rfind('\n', text.find("/srv/data")) - 1, 73u);
  std::ifstream kernels("/proc/self/maps");
  for (std::string each; std::getline(kernels, each);) EXPECT_TRUE(std::regex_match(each, line)) << each;
  ASSERT_TRUE(space_->Unmap(mapped).ok());
}

TEST_F(SnapshotTest, LongNamesAreCut) {
  class LongName final : public Backing {
   public:
    LongName() : Backing(Protection::kReadWrite) {}
    Error Install(os::Kernel& kernel, PageRange range, std::uint64_t, Protection protection, bool) override {
      return kernel.Protect(range, protection);
    }
    void Flush(os::Kernel&, PageRange, std::uint64_t) override {}
    BackingDescription Describe() const override { return {.name = name}; }
    std::string name = std::string(5000, 'x');

   private:
    void OnUnused() override {}
  } backing;
  MapOptions file;
  file.backing = &backing;
  const PageRange mapped = MustMap(*space_, 1, file);
  const std::string text = Maps(*space_);
  EXPECT_LT(text.size(), 300u);
  EXPECT_EQ(text.back(), '\n');
  EXPECT_EQ(text.find('\n'), text.size() - 1);
  ASSERT_TRUE(space_->Unmap(mapped).ok());
}

}  // namespace
}  // namespace freehold::vm::test
