// Who runs next: the decisions of one schedule, made by enumeration, by a seed, or by a list.
#ifndef FREEHOLD_TESTS_VM_SYNC_SCHED_CHOOSER_H_
#define FREEHOLD_TESTS_VM_SYNC_SCHED_CHOOSER_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace freehold::sched {

class Chooser {
 public:
  virtual ~Chooser() = default;

  // Picks one of `options` (two or more). Where `can_continue`, option 0 lets the running thread go
  // on, and any other choice preempts it.
  virtual std::size_t Choose(std::size_t options, bool can_continue) = 0;

  // How to get this schedule again.
  virtual std::string Describe() const = 0;
};

// Every schedule with at most `max_preemptions` preemptions, one after the other:
//
//   Exhaustive schedules;
//   do { scheduler.Run(..., schedules); } while (schedules.Next());
//
// Waiting is no preemption: without a limit this is every schedule there is. REQUIRES: what runs
// depends on nothing but the schedule.
class Exhaustive final : public Chooser {
 public:
  static constexpr int kUnlimited = std::numeric_limits<int>::max();

  explicit Exhaustive(int max_preemptions = kUnlimited) : max_preemptions_(max_preemptions) {}

  std::size_t Choose(std::size_t options, bool can_continue) override;
  std::string Describe() const override;
  // Goes to the next schedule; false once all were run.
  bool Next();
  std::size_t schedules() const { return schedules_; }

 private:
  struct Decision {
    std::size_t chosen;
    std::size_t options;
  };

  const int max_preemptions_;
  int preemptions_ = 0;
  std::size_t position_ = 0;
  std::size_t schedules_ = 1;
  std::vector<Decision> trail_;
};

// A random walk; preempts with probability 1/`one_in`.
class Seeded final : public Chooser {
 public:
  explicit Seeded(std::uint64_t seed, unsigned one_in = 3)
      : seed_(seed), one_in_(one_in), random_(seed) {}

  std::size_t Choose(std::size_t options, bool can_continue) override;
  std::string Describe() const override { return "seed " + std::to_string(seed_); }

 private:
  const std::uint64_t seed_;
  const unsigned one_in_;
  std::mt19937_64 random_;
};

// Lets the running thread go on except where it asks not to.
class PreemptOnRequest final : public Chooser {
 public:
  std::size_t Choose(std::size_t, bool can_continue) override {
    return can_continue && std::exchange(requested_, false) ? 1 : 0;
  }
  std::string Describe() const override { return "preemption on request"; }
  // At the next choice, lets the first of the other threads that can run do so.
  void Request() { requested_ = true; }

 private:
  bool requested_ = false;
};

}  // namespace freehold::sched

#endif  // FREEHOLD_TESTS_VM_SYNC_SCHED_CHOOSER_H_
