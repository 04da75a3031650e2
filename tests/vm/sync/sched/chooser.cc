#include "tests/vm/sync/sched/chooser.h"

#include "vm/os/check.h"

namespace freehold::sched {

std::size_t Exhaustive::Choose(std::size_t options, bool can_continue) {
  if (can_continue && preemptions_ == max_preemptions_) return 0;
  if (position_ == trail_.size()) trail_.push_back({.chosen = 0, .options = options});
  const Decision& decision = trail_[position_++];
  FREEHOLD_CHECK(decision.options == options);  // else something besides the schedule decides
  if (can_continue && decision.chosen != 0) ++preemptions_;
  return decision.chosen;
}

std::string Exhaustive::Describe() const {
  std::string text = "choices";
  for (std::size_t i = 0; i < position_; ++i) text += " " + std::to_string(trail_[i].chosen);
  return text;
}

bool Exhaustive::Next() {
  position_ = 0;
  preemptions_ = 0;
  while (!trail_.empty() && ++trail_.back().chosen == trail_.back().options) trail_.pop_back();
  if (trail_.empty()) return false;
  ++schedules_;
  return true;
}

std::size_t Seeded::Choose(std::size_t options, bool can_continue) {
  if (!can_continue) return random_() % options;
  return random_() % one_in_ == 0 ? 1 + random_() % (options - 1) : 0;
}

}  // namespace freehold::sched
