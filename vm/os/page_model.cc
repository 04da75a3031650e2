#include "vm/os/page_model.h"

#include <algorithm>
#include <iterator>
#include <limits>

#include "vm/os/check.h"

namespace freehold::vm::os {

PageModel::Segments::const_iterator PageModel::Find(PageNumber page) const {
  auto it = segments_.upper_bound(page);
  if (it == segments_.begin()) return segments_.end();
  --it;
  return page < it->second.end ? it : segments_.end();
}

PageState PageModel::At(PageNumber page) const {
  const auto it = Find(page);
  return it == segments_.end() ? PageState{} : it->second.state;
}

void PageModel::SplitAt(PageNumber page) {
  const auto found = Find(page);
  if (found == segments_.end() || found->first == page) return;
  const Segment rest = found->second;
  segments_[found->first].end = page;
  segments_[page] = rest;
}

void PageModel::MergeAround(PageRange range) {
  auto it = segments_.lower_bound(range.first);
  if (it != segments_.begin()) --it;
  while (it != segments_.end() && it->first < range.end) {
    const auto next = std::next(it);
    if (next != segments_.end() && it->second.end == next->first &&
        it->second.state == next->second.state) {
      it->second.end = next->second.end;
      segments_.erase(next);
    } else {
      it = next;
    }
  }
}

void PageModel::Reserve(PageRange range) {
  FREEHOLD_CHECK(!range.empty());
  FREEHOLD_CHECK(CountIf(range, [](const PageState&) { return true; }) == Pages{0});
  segments_[range.first] = {range.end, PageState{.reservation = ++last_reservation_}};
}

void PageModel::Release(PageRange range) {
  FREEHOLD_CHECK(IsReserved(range));
  SplitAt(range.first);
  SplitAt(range.end);
  segments_.erase(segments_.lower_bound(range.first), segments_.lower_bound(range.end));
}

void PageModel::Update(PageRange range, const std::function<void(PageState&)>& change) {
  FREEHOLD_CHECK(IsReserved(range));
  SplitAt(range.first);
  SplitAt(range.end);
  const auto end = segments_.lower_bound(range.end);
  for (auto it = segments_.lower_bound(range.first); it != end; ++it) change(it->second.state);
  MergeAround(range);
}

bool PageModel::IsReserved(PageRange range) const {
  if (range.empty()) return false;
  auto it = Find(range.first);
  if (it == segments_.end()) return false;
  const std::uint32_t reservation = it->second.state.reservation;
  PageNumber reached = it->first;
  for (; it != segments_.end() && it->first == reached; ++it) {
    if (it->second.state.reservation != reservation) return false;
    reached = it->second.end;
    if (range.end <= reached) return true;
  }
  return false;
}

Pages PageModel::CountIf(PageRange range,
                         const std::function<bool(const PageState&)>& predicate) const {
  Pages count;
  auto it = segments_.upper_bound(range.first);
  if (it != segments_.begin()) --it;
  for (; it != segments_.end() && it->first < range.end; ++it) {
    const PageRange common = range.Intersect({it->first, it->second.end});
    if (!common.empty() && predicate(it->second.state)) count += common.count();
  }
  return count;
}

Pages PageModel::CountIf(const std::function<bool(const PageState&)>& predicate) const {
  return CountIf({PageNumber{0}, PageNumber{std::numeric_limits<std::size_t>::max()}}, predicate);
}

void PageModel::ForEachSegment(const std::function<void(PageRange)>& visit) const {
  for (const auto& [first, segment] : segments_) visit({first, segment.end});
}

std::size_t PageModel::KernelVmaCount(bool accounted) const {
  std::size_t count = 0;
  const Segments::value_type* before = nullptr;
  for (const auto& segment : segments_) {
    const PageState& state = segment.second.state;
    const bool merges = before != nullptr && before->second.end == segment.first &&
                        before->second.state.protection == state.protection &&
                        before->second.state.advice == state.advice &&
                        before->second.state.undumped == state.undumped &&
                        before->second.state.locked == state.locked &&
                        before->second.state.moved == state.moved &&
                        before->second.state.file == state.file &&
                        (!accounted || before->second.state.committed == state.committed);
    if (!merges) ++count;
    before = &segment;
  }
  return count;
}

void PageModel::CheckInvariants() const {
  const Segments::value_type* before = nullptr;
  for (const auto& segment : segments_) {
    FREEHOLD_CHECK(segment.first < segment.second.end);
    FREEHOLD_CHECK(segment.second.state.reservation != 0);
    if (before != nullptr) {
      FREEHOLD_CHECK(before->second.end <= segment.first);
      FREEHOLD_CHECK(before->second.end != segment.first ||
                     before->second.state != segment.second.state);
    }
    before = &segment;
  }
}

}  // namespace freehold::vm::os
