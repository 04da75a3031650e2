// Notifiers: who registers for a range hears what happens to it, in order, and never under a short lock.
#include "vm/notifier.h"

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"
#include "vm/os/fake_kernel.h"
#include "vm/os/linux_kernel.h"
#include "vm/pin.h"

namespace freehold::vm::test {
namespace {

using os::Protection;

// Writes down what it hears, in pages from `origin`.
class Recorder final : public Notifier {
 public:
  explicit Recorder(PageNumber origin) : origin_(origin) {}

  void OnMap(PageRange range) override { Note("map", range); }
  void OnInvalidate(PageRange range, Invalidation what) override {
    static constexpr const char* kNames[] = {"unmap", "replace", "move", "protect", "discard"};
    Note(std::string("invalidate/") + kNames[static_cast<std::size_t>(what)], range);
  }
  void OnClose(PageRange range) override { Note("close", range); }

  // What was heard since the last call.
  std::string Heard() { return std::exchange(heard_, {}); }

 private:
  void Note(const std::string& event, PageRange range) {
    if (!heard_.empty()) heard_ += " ";
    heard_ += event + "[" + std::to_string((range.first - origin_).value) + "," +
              std::to_string((range.end - origin_).value) + ")";
  }

  const PageNumber origin_;
  std::string heard_;
};

class NotifierTest : public testing::Test {
 protected:
  os::FakeKernel kernel_;
  TestSpace space_{kernel_};
  // Somewhere in the plain zone, and in the mapping zone.
  const PageRange area_ = Part(ZoneRange(*space_, Zone::kPlain), 1000, 100);
  const PageRange mapping_ = Part(ZoneRange(*space_, Zone::kMapping), 1000, 100);
};

TEST_F(NotifierTest, HearsOfEveryVerb) {
  Recorder recorder(area_.first);
  const NotifierRegistration registration(*space_, area_, recorder);
  MustMapAt(*space_, Part(area_, 0, 10));
  EXPECT_EQ(recorder.Heard(), "map[0,10)");
  ASSERT_TRUE(space_->Protect(Part(area_, 2, 2), Protection::kRead).ok());
  EXPECT_EQ(recorder.Heard(), "invalidate/protect[2,4)");
  ASSERT_TRUE(space_->Protect(Part(area_, 2, 2), Protection::kRead).ok());
  EXPECT_EQ(recorder.Heard(), "");  // changed nothing
  const PageRange discarded = Part(area_, 5, 2);
  ASSERT_TRUE(space_->Discard({&discarded, 1}).ok());
  EXPECT_EQ(recorder.Heard(), "invalidate/discard[5,7)");
  ASSERT_TRUE(space_->Advise(Part(area_, 4, 2), Advice::kDontNeed).ok());
  ASSERT_TRUE(space_->Advise(Part(area_, 4, 2), Advice::kFree).ok());
  EXPECT_EQ(recorder.Heard(), "invalidate/discard[4,6) invalidate/discard[4,6)");
  ASSERT_TRUE(space_->Populate(Part(area_, 4, 2)).ok());
  ASSERT_TRUE(space_->Advise(Part(area_, 4, 2), Advice::kCold).ok());
  EXPECT_EQ(recorder.Heard(), "");
  MustMap(*space_, 4, At(area_.first + Pages{1}, Placement::kReplace));
  EXPECT_EQ(recorder.Heard(),
            "invalidate/replace[1,2) invalidate/replace[2,4) invalidate/replace[4,5) close[1,5) map[1,5)");
  ASSERT_TRUE(space_->Remap(Part(area_, 5, 5), {8}).ok());
  EXPECT_EQ(recorder.Heard(), "map[10,13)");
  ASSERT_TRUE(space_->Remap(Part(area_, 5, 8), {5}).ok());
  EXPECT_EQ(recorder.Heard(), "invalidate/unmap[10,13) close[10,13)");
  RemapOptions move;
  move.placement = Placement::kFixed;
  move.address = (area_.first + Pages{50}).address();
  ASSERT_TRUE(space_->Remap(Part(area_, 5, 5), {5}, move).ok());
  EXPECT_EQ(recorder.Heard(), "invalidate/move[5,10) close[5,10) map[50,55)");
  ASSERT_TRUE(space_->Unmap(Part(area_, 0, 60)).ok());
  EXPECT_EQ(recorder.Heard(), "invalidate/unmap[0,1) invalidate/unmap[1,5) invalidate/unmap[50,55) close[0,60)");
}

TEST_F(NotifierTest, HearsOfItsRangeOnlyAndWhileItIsRegistered) {
  Recorder one(area_.first);
  Recorder two(area_.first);
  std::optional<NotifierRegistration> first(std::in_place, *space_, Part(area_, 2, 2), one);
  std::optional<NotifierRegistration> second(std::in_place, *space_, Part(area_, 3, 5), two);
  MustMapAt(*space_, Part(area_, 0, 4));
  EXPECT_EQ(one.Heard(), "map[2,4)");
  EXPECT_EQ(two.Heard(), "map[3,4)");
  first.reset();
  ASSERT_TRUE(space_->Unmap(area_).ok());
  EXPECT_EQ(one.Heard(), "");
  EXPECT_EQ(two.Heard(), "invalidate/unmap[3,4) close[3,8)");
  second.reset();
  EXPECT_TRUE(space_->notifiers().empty());
  MustMapAt(*space_, Part(area_, 0, 10));
  EXPECT_EQ(two.Heard(), "");
}

TEST_F(NotifierTest, WhatIsMappedAnywhereIsHeardOfToo) {
  Recorder recorder(space_->reservation().first);
  const NotifierRegistration registration(*space_, space_->reservation(), recorder);
  const PageRange range = MustMap(*space_, 4);
  const std::string where = "[" + std::to_string((range.first - space_->reservation().first).value) + "," +
                            std::to_string((range.end - space_->reservation().first).value) + ")";
  EXPECT_EQ(recorder.Heard(), "map" + where);
  ASSERT_TRUE(space_->Unmap(range).ok());
  EXPECT_EQ(recorder.Heard(), "invalidate/unmap" + where + " close" + where);
}

TEST_F(NotifierTest, ARefusedUnmapIsTakenBack) {
  Recorder recorder(mapping_.first);
  MustMapAt(*space_, Part(mapping_, 0, 4), Protection::kRead);
  const NotifierRegistration registration(*space_, mapping_, recorder);
  kernel_.FailNth(Operation::kReset, 1, ENOMEM);
  EXPECT_EQ(space_->Unmap(Part(mapping_, 0, 4)), Error::System(ENOMEM));
  EXPECT_EQ(recorder.Heard(), "invalidate/unmap[0,4) close[0,4) map[0,4)");
  kernel_.FailNth(Operation::kProtect, 1, ENOMEM);
  EXPECT_EQ(space_->Protect(Part(mapping_, 0, 4), Protection::kNone), Error::System(ENOMEM));
  EXPECT_EQ(recorder.Heard(), "invalidate/protect[0,4)");
}

TEST_F(NotifierTest, PinnedMemoryIsClosedWhenItsPinGoes) {
  Recorder recorder(area_.first);
  const NotifierRegistration registration(*space_, area_, recorder);
  MustMapAt(*space_, Part(area_, 0, 4));
  {
    const Pin pin(*space_, Part(area_, 0, 4));
    ASSERT_TRUE(space_->Unmap(Part(area_, 0, 4)).ok());
    EXPECT_EQ(recorder.Heard(), "map[0,4) invalidate/unmap[0,4)");
  }
  EXPECT_EQ(recorder.Heard(), "close[0,4)");
}

// A callback sees the memory as it was, may sleep, and holds up nobody but who wants the same pages.
TEST_F(NotifierTest, CallbacksMaySleepAndLook) {
  class Sleeper final : public Notifier {
   public:
    explicit Sleeper(AddressSpace& space) : space_(space) {}
    void OnInvalidate(PageRange range, Invalidation) override {
      EXPECT_TRUE(space_.Lookup(range.first).ok());
      EXPECT_TRUE(IsFilledWith(range, 7));
      sleeping.store(true);
      while (!wake.load()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    void OnClose(PageRange range) override {
      EXPECT_EQ(space_.Lookup(range.first).error().code, ErrorCode::kNotMapped);
      closed.store(true);
    }
    std::atomic<bool> sleeping{false};
    std::atomic<bool> wake{false};
    std::atomic<bool> closed{false};

   private:
    AddressSpace& space_;
  } sleeper(*space_);
  const PageRange range = Part(area_, 0, 4);
  MustMapAt(*space_, range);
  Fill(range, 7);
  std::optional<NotifierRegistration> registration(std::in_place, *space_, area_, sleeper);
  std::thread unmapper([&] { EXPECT_TRUE(space_->Unmap(range).ok()); });
  while (!sleeper.sleeping.load()) std::this_thread::yield();
  // Everybody else goes on, also beside it.
  MustMapAt(*space_, Part(area_, 4, 4));
  ASSERT_TRUE(space_->Unmap(MustMap(*space_, 8)).ok());
  EXPECT_FALSE(sleeper.closed.load());
  // Who unregisters waits for the callback.
  std::atomic<bool> gone{false};
  std::thread leaver([&] {
    registration.reset();
    EXPECT_TRUE(sleeper.wake.load());
    gone.store(true);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(gone.load());
  sleeper.wake.store(true);
  leaver.join();
  unmapper.join();
}

// A mirror of what is mapped, kept by callbacks: with all that four threads do, it is right whenever its pages' owner looks.
TEST_F(NotifierTest, AMirrorStaysExact) {
  class Mirror final : public Notifier {
   public:
    explicit Mirror(PageRange area) : area_(area) {}
    void OnMap(PageRange range) override { Set(range, true); }
    void OnClose(PageRange range) override { Set(range, false); }
    bool Has(std::size_t page) const { return pages_[page].load(); }

   private:
    void Set(PageRange range, bool mapped) {
      for (PageNumber page = range.first; page < range.end; page = page + Pages{1}) {
        pages_[(page - area_.first).value].store(mapped);
      }
    }
    const PageRange area_;
    std::array<std::atomic<bool>, 400> pages_{};
  };
  const PageRange all = Part(ZoneRange(*space_, Zone::kPlain), 2000, 400);
  Mirror mirror(all);
  const NotifierRegistration registration(*space_, all, mirror);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const PageRange own = Part(all, t * 100, 100);
      std::uint64_t state = t + 1;
      const auto random = [&] { return state = state * 6364136223846793005u + 1442695040888963407u, state >> 33; };
      for (int i = 0; i < (kSanitized ? 300 : 2000); ++i) {
        const PageRange range = Part(own, random() % 90, 1 + random() % 10);
        const Placement placement = random() % 2 == 0 ? Placement::kFixed : Placement::kReplace;
        if (random() % 3 == 0) {
          ASSERT_TRUE(space_->Unmap(range).ok());
        } else {
          (void)space_->Map(range.count(), At(range.first, placement));
        }
        if (random() % 8 != 0) continue;
        for (std::size_t page = 0; page < 100; ++page) {
          ASSERT_EQ(mirror.Has(t * 100 + page), space_->Lookup(own.first + Pages{page}).ok()) << page;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Registering and unregistering while verbs run.
TEST_F(NotifierTest, RegistrationsComeAndGo) {
  class Counter final : public Notifier {
   public:
    void OnMap(PageRange) override { ++events; }
    void OnInvalidate(PageRange, Invalidation) override { ++events; }
    std::atomic<int> events{0};
  };
  std::atomic<bool> stop{false};
  std::thread mapper([&] {
    while (!stop.load()) {
      MustMapAt(*space_, Part(area_, 0, 4));
      ASSERT_TRUE(space_->Unmap(Part(area_, 0, 4)).ok());
    }
  });
  int heard = 0;
  for (int i = 0; i < 200 || heard == 0; ++i) {
    auto counter = std::make_unique<Counter>();
    {
      const NotifierRegistration one(*space_, area_, *counter);
      const NotifierRegistration two(*space_, Part(area_, 0, 1), *counter);
      std::this_thread::yield();
    }
    heard += counter->events.load();
  }
  stop.store(true);
  mapper.join();
}

}  // namespace
}  // namespace freehold::vm::test
