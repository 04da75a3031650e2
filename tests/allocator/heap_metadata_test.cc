#include "allocator/heap_metadata.h"

#include "gtest/gtest.h"
#include "vm/address_space.h"
#include "vm/os/fake_kernel.h"

namespace freehold::allocator {
namespace {

using Operation = vm::os::FakeKernel::Operation;

class HeapMetadataTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto space =
        vm::AddressSpace::Create(kernel_, {.reserve = vm::GiB(4), .min_reserve = vm::MiB(64)});
    ASSERT_TRUE(space.ok());
    space_ = *space;
    const auto metadata = HeapMetadata::Create(*space_, {.header_bytes = 5000, .cache_bytes = 1 << 20});
    ASSERT_TRUE(metadata.ok());
    metadata_ = *metadata;
  }
  void TearDown() override {
    metadata_.Release();
    vm::AddressSpace::Destroy(space_);
  }
  std::uintptr_t First() const { return AddressOf(space_->reservation().address()); }
  std::uintptr_t End() const { return AddressOf(space_->reservation().end.address()); }

  vm::os::FakeKernel kernel_;
  vm::AddressSpace* space_ = nullptr;
  HeapMetadata metadata_;
};

TEST_F(HeapMetadataTest, EveryUnitHasARecordOfItsOwnThatReadsAsNoSpan) {
  const Span* previous = nullptr;
  for (std::uintptr_t unit = First(); unit < End(); unit += kUnitSize) {
    const Span* span = metadata_.spans().At(unit);
    ASSERT_EQ(span, metadata_.spans().At(unit + kUnitSize - 1));
    ASSERT_NE(span, previous);
    ASSERT_EQ(metadata_.spans().Named(metadata_.spans().NameOf(span)), span);
    ASSERT_NE(metadata_.spans().NameOf(span), 0u);
    previous = span;
  }
  EXPECT_NE(metadata_.spans().At(First()), metadata_.spans().At(End() - 1));
  EXPECT_EQ(metadata_.spans().At(First())->kind.load(), SpanKind::kNone);
  EXPECT_EQ(metadata_.spans().At(End() - 1)->owner.load(), nullptr);
}

TEST_F(HeapMetadataTest, AnyAddressCanBeLookedUp) {
  for (const std::uintptr_t address : {std::uintptr_t{0}, ~std::uintptr_t{0}, std::uintptr_t{1} << 47}) {
    EXPECT_EQ(metadata_.spans().At(address)->kind.load(), SpanKind::kNone);
  }
}

TEST_F(HeapMetadataTest, CommitMakesRecordsWritableInSteps) {
  const vm::Bytes before = metadata_.committed();
  Span* span = metadata_.spans().At(First() + vm::GiB(1).value);
  ASSERT_TRUE(metadata_.Commit(span, sizeof(Span)).ok());
  span->units = 17;
  EXPECT_GT(metadata_.committed(), before);
  const std::size_t calls = kernel_.CallCount(Operation::kProtect);
  const vm::Bytes after = metadata_.committed();
  ASSERT_TRUE(metadata_.Commit(span + 1, sizeof(Span)).ok());
  EXPECT_EQ(kernel_.CallCount(Operation::kProtect), calls);
  EXPECT_EQ(metadata_.committed(), after);
}

// The kernel counts committed memory and refuses the large step: the small one serves.
TEST_F(HeapMetadataTest, CommitsWhatIsNeededIfNoMoreIsGranted) {
  Span* span = metadata_.spans().At(First() + vm::GiB(2).value);
  const vm::Bytes before = metadata_.committed();
  kernel_.FailProtectBeyond(kernel_.CommittedPages().bytes() + vm::KiB(64));
  EXPECT_TRUE(metadata_.Commit(span, sizeof(Span)).ok());
  EXPECT_EQ(metadata_.committed(), before + vm::KiB(64));
  EXPECT_FALSE(metadata_.Commit(span + vm::KiB(64).value / sizeof(Span), sizeof(Span)).ok());
}

TEST_F(HeapMetadataTest, CommitsNothingBeyondItsEnd) {
  Span* last = metadata_.spans().At(End() - 1);
  EXPECT_TRUE(metadata_.Commit(last, sizeof(Span)).ok());
  last->units = 17;
}

TEST_F(HeapMetadataTest, FailedCommitCanBeRepeated) {
  Span* span = metadata_.spans().At(First() + vm::GiB(2).value);
  kernel_.FailAlways(Operation::kProtect, ENOMEM);
  EXPECT_FALSE(metadata_.Commit(span, sizeof(Span)).ok());
  kernel_.StopFailing();
  EXPECT_TRUE(metadata_.Commit(span, sizeof(Span)).ok());
  span->units = 17;
}

TEST_F(HeapMetadataTest, FailedCreationLeavesNothingReserved) {
  const vm::Pages before = kernel_.ReservedPages();
  for (const Operation operation : {Operation::kReserve, Operation::kProtect}) {
    kernel_.FailNth(operation, 1, ENOMEM);
    EXPECT_FALSE(HeapMetadata::Create(*space_, {.header_bytes = 1, .cache_bytes = 1}).ok());
    EXPECT_EQ(kernel_.ReservedPages(), before);
  }
}

}  // namespace
}  // namespace freehold::allocator
