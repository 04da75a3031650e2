// Random verbs against a naive map of pages, invariants after every step. A failure prints the seed and the
// operations; a list that once failed is kept below as a test of its own.
#include <chrono>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_model.h"
#include "vm/os/linux_kernel.h"

namespace freehold::vm {
namespace {

using Kind = SpaceOperation::Kind;

struct Variant {
  const char* name;
  AddressSpaceOptions options;
};

AddressSpaceOptions Small() {
  AddressSpaceOptions options;
  options.reserve = MiB(256);
  options.min_reserve = MiB(64);
  options.regions_per_zone = 1;
  return options;
}

std::vector<Variant> Variants() {
  std::vector<Variant> variants = {{"Adaptive", Small()}, {"Coarse", Small()}, {"Strict", Small()},
                                   {"TightFreeLimit", Small()}, {"Tree", Small()}};
  variants[1].options.lock_policy = sync::LockPolicy::kCoarse;
  variants[2].options.strict_unmap = true;
  variants[3].options.free_resident_limit = KiB(256);
  variants[4].options.lock_policy = sync::LockPolicy::kTree;
  return variants;
}

std::vector<SpaceOperation> RandomOperations(std::uint64_t seed, std::size_t count) {
  std::mt19937_64 random(seed);
  std::vector<SpaceOperation> operations;
  // Maps and unmaps most of all; sizes from a few favourites too, so that bins come to be used.
  const std::discrete_distribution<int> kinds({20, 6, 6, 24, 8, 4, 4, 16, 4, 1, 1, 5, 2, 4, 2, 1, 1, 10});
  auto pick = kinds;
  const std::uint8_t favourite = static_cast<std::uint8_t>(random() % 20);
  for (std::size_t i = 0; i < count; ++i) {
    SpaceOperation operation;
    operation.kind = static_cast<Kind>(pick(random));
    operation.page = static_cast<std::uint16_t>(random() % (3 * 160));
    const std::uint64_t size = random() % 16;
    operation.count = size < 8 ? favourite : static_cast<std::uint8_t>(size < 14 ? random() % 48 : 192 + random() % 64);
    operation.choice = static_cast<std::uint8_t>(random());
    operations.push_back(operation);
  }
  return operations;
}

class AddressSpaceModelTest : public testing::TestWithParam<Variant> {};

TEST_P(AddressSpaceModelTest, RandomVerbsMatchThePageMap) {
  // FREEHOLD_MODEL_SECONDS makes a soak of it; FREEHOLD_MODEL_SEED repeats one run.
  const char* seconds = std::getenv("FREEHOLD_MODEL_SECONDS");
  const char* only = std::getenv("FREEHOLD_MODEL_SEED");
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::seconds(seconds != nullptr ? std::atoi(seconds) : 3);
  std::uint64_t seed = only != nullptr ? std::strtoull(only, nullptr, 10) : 1;
  do {
    const std::string failure = RunSpaceOperations(RandomOperations(seed, 600), GetParam().options, 1);
    ASSERT_TRUE(failure.empty()) << failure << "repeat with FREEHOLD_MODEL_SEED=" << seed;
    ++seed;
  } while (only == nullptr && std::chrono::steady_clock::now() < end);
}

INSTANTIATE_TEST_SUITE_P(All, AddressSpaceModelTest, testing::ValuesIn(Variants()),
                         [](const auto& info) { return std::string(info.param.name); });

// Found by the model: old content kept behind kNone in the mapping zone came back as clean memory.
TEST(SpaceModelTest, ContentBehindNoAccessIsResetOnUnmap) {
  const std::vector<SpaceOperation> operations = {
      {Kind::kMapFixed, 2, 8, 0}, {Kind::kWrite, 2, 8, 152},       {Kind::kMapReplace, 2, 8, 7},
      {Kind::kUnmap, 2, 8, 0},    {Kind::kMapAnywhere, 2, 8, 2},
  };
  const std::string failure = RunSpaceOperations(operations, Small(), 1);
  EXPECT_TRUE(failure.empty()) << failure;
}

// The checker itself: a space that somebody changes behind the model's back must be found out.
TEST(SpaceModelTest, FindsAPageThatChangedBehindItsBack) {
  os::LinuxKernel kernel;
  const Result<AddressSpace*> space = AddressSpace::Create(kernel, Small());
  ASSERT_TRUE(space.ok());
  {
    SpaceModel model(**space);
    ASSERT_TRUE(model.Perform({Kind::kMapFixed, 0, 8, 0}));
    ASSERT_TRUE(model.Perform({Kind::kWrite, 0, 8, 7}));
    ASSERT_TRUE(model.CheckAll()) << model.failure();
    *(*space)->reservation().address() = std::byte{8};
    EXPECT_FALSE(model.CheckAll());
    *(*space)->reservation().address() = std::byte{7};
    ASSERT_TRUE(model.CheckAll());
    ASSERT_TRUE((*space)->Unmap(PageRange::Of((*space)->reservation().first, {1})).ok());
    EXPECT_FALSE(model.CheckAll());
  }
  AddressSpace::Destroy(*space);
}

}  // namespace
}  // namespace freehold::vm
