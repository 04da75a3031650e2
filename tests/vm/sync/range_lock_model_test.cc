// RangeLock against a list: actors, each a thread, lock and unlock at random, one operation at a
// time. After each, exactly those requests are granted that the list says: FIFO among those that
// overlap and conflict.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "vm/os/thread_id.h"
#include "vm/page_range.h"
#include "vm/sync/range_lock.h"

namespace freehold::vm::sync {
namespace {

constexpr PageRange kAll{{0}, {~std::size_t{0} >> kPageShift}};
constexpr std::size_t kActors = 7;
constexpr std::size_t kPagesOfModel = 24;

enum class Verb : std::uint8_t { kAcquire, kTry, kExpire, kDowngrade, kRelease };

// One operation by one actor.
struct Step {
  std::size_t actor;
  Verb verb;
  PageRange range;
  LockMode mode;

  friend std::ostream& operator<<(std::ostream& out, const Step& step) {
    static constexpr const char* kNames[] = {"acquire", "try", "expire", "downgrade", "release"};
    return out << "  {" << step.actor << ", " << kNames[static_cast<int>(step.verb)] << ", ["
               << step.range.first.value << "," << step.range.end.value << ") "
               << (step.mode == LockMode::kExclusive ? "X" : "S") << "}\n";
  }
};

// The list of requests, oldest first.
class Model {
 public:
  explicit Model(bool precise) : precise_(precise) {}

  void Acquire(const Step& step) { requests_.push_back({step.actor, step.range, step.mode}); }
  void Downgrade(std::size_t actor) { Find(actor)->mode = LockMode::kShared; }
  void Release(std::size_t actor) { requests_.erase(Find(actor)); }

  // Whether a request made now would be granted at once.
  bool WouldGrant(PageRange range, LockMode mode) const {
    return CountBlockers({kActors, range, mode}, requests_.size()) == 0;
  }
  bool IsRequesting(std::size_t actor) const {
    for (const Request& request : requests_) {
      if (request.actor == actor) return true;
    }
    return false;
  }
  bool IsGranted(std::size_t actor) const {
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      if (requests_[i].actor == actor) return CountBlockers(requests_[i], i) == 0;
    }
    return false;
  }
  std::size_t CountWaiting() const {
    std::size_t count = 0;
    for (std::size_t i = 0; i < requests_.size(); ++i) count += CountBlockers(requests_[i], i) != 0;
    return count;
  }

 private:
  struct Request {
    std::size_t actor;
    PageRange range;
    LockMode mode;
  };

  // Conflicting, overlapping ones among the first `older` requests.
  std::size_t CountBlockers(const Request& request, std::size_t older) const {
    std::size_t count = 0;
    for (std::size_t i = 0; i < older; ++i) {
      const bool overlaps = !precise_ || requests_[i].range.Overlaps(request.range);
      count += overlaps && Conflict(requests_[i].mode, request.mode);
    }
    return count;
  }
  std::vector<Request>::iterator Find(std::size_t actor) {
    auto it = requests_.begin();
    while (it->actor != actor) ++it;
    return it;
  }

  const bool precise_;
  std::vector<Request> requests_;
};

// A thread that performs steps handed to it.
class Actor {
 public:
  explicit Actor(RangeLock& lock) : lock_(lock), thread_([this] { Run(); }) {}
  ~Actor() {
    stop_.store(true);
    thread_.join();
  }

  void Start(const Step& step) {
    step_ = step;
    done_.store(false);
    started_.fetch_add(1);
  }
  // The last step is over; for kAcquire: granted.
  bool done() const { return done_.load(); }
  bool held() const { return held_.load(); }

 private:
  void Run() {
    for (int seen = 0; !stop_.load(); std::this_thread::yield()) {
      if (started_.load() == seen) continue;
      ++seen;
      Perform();
      held_.store(guard_ != nullptr);
      done_.store(true);
    }
  }
  void Perform() {
    using Guard = RangeLock::Guard;
    const auto [actor, verb, range, mode] = step_;
    switch (verb) {
      case Verb::kAcquire: guard_.reset(new Guard(lock_, range, mode, Operation::kTest)); break;
      case Verb::kTry:
        guard_.reset(new Guard(Guard::Try(lock_, range, mode, Operation::kTest)));
        break;
      case Verb::kExpire:
        guard_.reset(new Guard(Guard::Until(lock_, range, mode, Operation::kTest, Nanoseconds{1})));
        break;
      case Verb::kDowngrade: guard_->Downgrade(); break;
      case Verb::kRelease: guard_.reset(); break;
    }
    if (guard_ != nullptr && !guard_->held()) guard_.reset();
  }

  RangeLock& lock_;
  Step step_{};
  std::unique_ptr<RangeLock::Guard> guard_;
  std::atomic<int> started_{0};
  std::atomic<bool> done_{true};
  std::atomic<bool> held_{false};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

class RangeLockModelTest : public ::testing::TestWithParam<LockPolicy> {
 protected:
  // `scale`: how many pages a page of the model stands for.
  void Run(std::uint64_t seed, int steps, std::size_t scale) {
    RangeLock lock(GetParam());
    Model model(GetParam() != LockPolicy::kCoarse);
    std::vector<std::unique_ptr<Actor>> actors;
    for (std::size_t i = 0; i < kActors; ++i) actors.push_back(std::make_unique<Actor>(lock));
    std::mt19937_64 random(seed);
    std::ostringstream log;
    log << "seed " << seed << ", scale " << scale << "\n";
    for (int i = 0; i < steps; ++i) {
      const Step step = Choose(random, model, scale);
      log << step;
      Perform(step, model, actors);
      ASSERT_TRUE(Matches(model, lock, actors)) << log.str();
      lock.CheckInvariants();
    }
    // Whoever is granted lets go, until nobody is left.
    for (std::size_t i = 0; i < kActors * kActors; ++i) {
      const std::size_t actor = i % kActors;
      if (!model.IsGranted(actor)) continue;
      Perform({actor, Verb::kRelease, {}, {}}, model, actors);
      ASSERT_TRUE(Matches(model, lock, actors)) << log.str();
    }
    EXPECT_EQ(lock.Holders(kAll).total, 0u);
  }

 private:
  static Step Choose(std::mt19937_64& random, const Model& model, std::size_t scale) {
    while (true) {
      Step step{};
      step.actor = random() % kActors;
      const std::size_t first = random() % kPagesOfModel;
      const std::size_t count = random() % 8 == 0 ? kPagesOfModel : 1 + random() % 6;
      step.range = {{first * scale}, {(first + count) * scale}};
      // A short one among the long ones.
      if (random() % 2 == 0) step.range = PageRange::Of(step.range.first, {count});
      step.mode = random() % 2 == 0 ? LockMode::kShared : LockMode::kExclusive;
      if (!model.IsRequesting(step.actor)) {
        const std::uint64_t kind = random() % 6;
        step.verb = kind == 0 ? Verb::kTry : kind == 1 ? Verb::kExpire : Verb::kAcquire;
        return step;
      }
      if (model.IsGranted(step.actor)) {
        step.verb = random() % 4 == 0 ? Verb::kDowngrade : Verb::kRelease;
        return step;
      }
    }
  }

  void Perform(const Step& step, Model& model, const std::vector<std::unique_ptr<Actor>>& actors) {
    Actor& actor = *actors[step.actor];
    Step performed = step;
    switch (step.verb) {
      case Verb::kAcquire: model.Acquire(step); break;
      case Verb::kTry:
      case Verb::kExpire:
        if (model.WouldGrant(step.range, step.mode)) model.Acquire(step);
        break;
      case Verb::kDowngrade:
        if (modes_[step.actor] == LockMode::kShared) performed.verb = Verb::kRelease;
        performed.verb == Verb::kRelease ? model.Release(step.actor) : model.Downgrade(step.actor);
        modes_[step.actor] = LockMode::kShared;
        break;
      case Verb::kRelease: model.Release(step.actor); break;
    }
    if (step.verb <= Verb::kExpire) modes_[step.actor] = step.mode;
    actor.Start(performed);
  }

  // Waits until the lock has come to rest where the model is: nobody more and nobody less is
  // granted.
  static bool Matches(const Model& model, const RangeLock& lock,
                      const std::vector<std::unique_ptr<Actor>>& actors) {
    for (std::size_t i = 0; i < kActors; ++i) {
      const bool waits = model.IsRequesting(i) && !model.IsGranted(i);
      while (!waits && !actors[i]->done()) std::this_thread::yield();
      if (actors[i]->held() != model.IsGranted(i)) return false;
    }
    while (true) {
      std::size_t waiting = 0;
      for (const HolderInfo& info : lock.Holders(kAll))
        waiting += info.state == HolderInfo::State::kWaiting;
      if (waiting > model.CountWaiting()) return false;
      if (waiting == model.CountWaiting()) break;
      std::this_thread::yield();
    }
    for (std::size_t i = 0; i < kActors; ++i) {
      if (actors[i]->held() != model.IsGranted(i)) return false;
    }
    return true;
  }

  std::vector<LockMode> modes_ = std::vector<LockMode>(kActors);
};

INSTANTIATE_TEST_SUITE_P(Policies, RangeLockModelTest,
                         ::testing::Values(LockPolicy::kCoarse, LockPolicy::kTree,
                                           LockPolicy::kAdaptive),
                         [](const auto& info) { return ToString(info.param); });

TEST_P(RangeLockModelTest, RandomSteps) {
  for (std::uint64_t seed = 0; seed < 4; ++seed) Run(seed, 250, 1);
}

// For kAdaptive: ranges within one granule, across several, and long ones.
TEST_P(RangeLockModelTest, RandomStepsAcrossGranules) {
  for (const std::size_t scale : {100, 400, 3'000}) {
    for (std::uint64_t seed = 0; seed < 3; ++seed) Run(seed, 250, scale);
  }
}

}  // namespace
}  // namespace freehold::vm::sync
