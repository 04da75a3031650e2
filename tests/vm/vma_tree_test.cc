// The tree of extents, without a region around it: the harness below does what Region does with it.
#include "vm/vma_tree.h"

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/vm/space_fixture.h"

namespace freehold::vm {
namespace {

using test::kSanitized;
using Node = VmaTree::Node;

// A generation that spells out everything that a lookup copies, so that a torn copy shows.
std::uint64_t Spell(RegionPage first, RegionPage count, VmaState state, os::Protection protection) {
  return std::uint64_t{first} << 36 | std::uint64_t{count} << 8 | std::uint64_t{static_cast<std::uint8_t>(state)} << 4 |
         static_cast<std::uint8_t>(protection);
}

// A tree of `pages` pages, its nodes and its extents.
class Harness {
 public:
  explicit Harness(RegionPage pages) : pages_(pages) {
    AddNodes();
    Vma* all = NewVma();
    Set(all, 0, pages, VmaState::kFree);
    tree.Init(all);
  }

  // Cuts the extent of `page` there; true when it was not a border already.
  //   before   |      vma      |
  //                   page
  //   after    | vma  |  upper |
  bool Split(RegionPage page) {
    AddNodes();
    const VmaTree::Path path = tree.Find(page);
    Vma* vma = path.vma();
    if (vma->first_page() == page) return false;
    const RegionPage end = vma->end_page();
    const VmaState state = vma->state.load();
    Vma* upper = NewVma();
    Set(upper, page, end - page, state);
    Set(vma, vma->first_page(), page - vma->first_page(), state);
    tree.RefreshGap(path);
    tree.InsertAfter(path, upper);
    return true;
  }

  // Lets the extent of `page` swallow its right neighbour; false if there is none.
  bool Merge(RegionPage page) {
    VmaTree::Path path = tree.Find(page);
    Vma* vma = path.vma();
    VmaTree::Path next_path = path;
    if (!tree.Next(next_path)) return false;
    Vma* next = next_path.vma();
    Set(vma, vma->first_page(), vma->page_count() + next->page_count(), vma->state.load());
    tree.Erase(next_path);
    spare_.push_back(next);
    tree.RefreshGap(tree.Find(page));
    return true;
  }

  // Makes [first, end) an extent of its own, in `state`.
  Vma* Carve(RegionPage first, RegionPage end, VmaState state) {
    Split(first);
    if (end < pages_) Split(end);
    while (At(first)->end_page() < end) Merge(first);
    SetState(first, state);
    return At(first);
  }

  void SetState(RegionPage page, VmaState state) {
    const VmaTree::Path path = tree.Find(page);
    Set(path.vma(), path.vma()->first_page(), path.vma()->page_count(), state);
    tree.RefreshGap(path);
  }

  Vma* At(RegionPage page) const { return tree.Find(page).vma(); }

  // The extents in order, a character a page: '.' free, 'm' mapped, '|' between extents.
  std::string Draw() const {
    std::string line;
    VmaTree::Path path = tree.Find(0);
    do {
      const Vma* vma = path.vma();
      if (!line.empty()) line += '|';
      line.append(vma->page_count(), vma->Is(VmaState::kFree) ? '.' : 'm');
    } while (tree.Next(path));
    return line;
  }

  // Where a gap search lands: the first page of the extent; nothing if there is none.
  std::optional<RegionPage> Gap(RegionPage count, std::uint64_t alignment = 1,
                                std::uint64_t origin = 0) const {
    VmaTree::Path path;
    if (!tree.FindGap(count, alignment, origin, path)) return std::nullopt;
    return path.vma()->first_page();
  }

  void Check() const { tree.CheckInvariants(pages_); }
  std::size_t nodes() const { return nodes_.size(); }
  std::deque<Node>& all_nodes() { return nodes_; }

  VmaTree tree;

 private:
  void AddNodes() {
    while (tree.NeedsNodes()) tree.AddNode(&nodes_.emplace_back());
  }
  Vma* NewVma() {
    if (spare_.empty()) return &vmas_.emplace_back();
    Vma* vma = spare_.back();
    spare_.pop_back();
    return vma;
  }
  static void Set(Vma* vma, RegionPage first, RegionPage count, VmaState state) {
    const os::Protection protection =
        (first + count) % 3 == 0 ? os::Protection::kRead : os::Protection::kReadWrite;
    VmaWriter writer(*vma);
    writer.SetRange(first, count);
    writer.SetState(state);
    writer.SetProtection(protection);
    writer.SetGeneration(Spell(first, count, state, protection));
  }

  const RegionPage pages_;
  std::deque<Node> nodes_;
  std::deque<Vma> vmas_;
  std::vector<Vma*> spare_;
};

// ---- Splitting and merging ----

TEST(VmaTreeTest, StartsAsOneFreeExtent) {
  Harness h(24);
  EXPECT_EQ(h.Draw(), "........................");
  EXPECT_EQ(h.tree.size(), 1u);
  EXPECT_EQ(h.tree.LargestGap(), 24u);
  h.Check();
}

TEST(VmaTreeTest, SplitsAtAPage) {
  Harness h(24);
  h.Split(10);
  EXPECT_EQ(h.Draw(), "..........|..............");
  h.Split(1);
  EXPECT_EQ(h.Draw(), ".|.........|..............");
  h.Split(23);
  EXPECT_EQ(h.Draw(), ".|.........|.............|.");
  EXPECT_FALSE(h.Split(10)) << "a border already";
  EXPECT_EQ(h.tree.size(), 4u);
  h.Check();
}

TEST(VmaTreeTest, MergesWithTheRightNeighbour) {
  Harness h(24);
  h.Split(8);
  h.Split(16);
  EXPECT_EQ(h.Draw(), "........|........|........");
  h.Merge(8);
  EXPECT_EQ(h.Draw(), "........|................");
  h.Merge(3);
  EXPECT_EQ(h.Draw(), "........................");
  EXPECT_FALSE(h.Merge(0));
  h.Check();
}

TEST(VmaTreeTest, FindsTheExtentOfEveryPage) {
  Harness h(24);
  h.Carve(4, 9, VmaState::kMapped);
  EXPECT_EQ(h.Draw(), "....|mmmmm|...............");
  for (RegionPage page = 0; page < 24; ++page) {
    const RegionPage first = page < 4 ? 0 : page < 9 ? 4 : 9;
    EXPECT_EQ(h.At(page)->first_page(), first) << page;
    VmaTree::View view;
    ASSERT_TRUE(h.tree.Lookup(page, view)) << page;
    EXPECT_EQ(view.first, first) << page;
    EXPECT_EQ(view.state, first == 4 ? VmaState::kMapped : VmaState::kFree) << page;
    EXPECT_EQ(view.vma, h.At(page));
  }
}

TEST(VmaTreeTest, StepsToBothNeighboursAndStopsAtTheEnds) {
  Harness h(1000);
  for (RegionPage page = 1; page < 1000; ++page) h.Split(page);
  VmaTree::Path path = h.tree.Find(0);
  EXPECT_FALSE(h.tree.Previous(path));
  path = h.tree.Find(0);
  for (RegionPage page = 1; page < 1000; ++page) {
    ASSERT_TRUE(h.tree.Next(path));
    ASSERT_EQ(path.vma()->first_page(), page);
  }
  EXPECT_FALSE(h.tree.Next(path));
  path = h.tree.Find(999);
  for (RegionPage page = 999; page-- > 0;) {
    ASSERT_TRUE(h.tree.Previous(path));
    ASSERT_EQ(path.vma()->first_page(), page);
  }
}

// ---- Gaps ----

TEST(VmaTreeGapTest, IsTheLowestThatIsLongEnough) {
  Harness h(24);
  h.Carve(2, 5, VmaState::kMapped);
  h.Carve(9, 10, VmaState::kMapped);
  h.Carve(18, 20, VmaState::kMapped);
  EXPECT_EQ(h.Draw(), "..|mmm|....|m|........|mm|....");
  EXPECT_EQ(h.Gap(1), 0u);
  EXPECT_EQ(h.Gap(2), 0u);
  EXPECT_EQ(h.Gap(3), 5u);
  EXPECT_EQ(h.Gap(4), 5u);
  EXPECT_EQ(h.Gap(5), 10u);
  EXPECT_EQ(h.Gap(8), 10u);
  EXPECT_EQ(h.Gap(9), std::nullopt);
  EXPECT_EQ(h.tree.LargestGap(), 8u);
}

TEST(VmaTreeGapTest, FollowsStates) {
  Harness h(24);
  h.Carve(0, 24, VmaState::kMapped);
  EXPECT_EQ(h.Gap(1), std::nullopt);
  for (const VmaState state : {VmaState::kCached, VmaState::kPending, VmaState::kDetached, VmaState::kPurging}) {
    h.Carve(6, 12, state);
    EXPECT_EQ(h.Gap(1), std::nullopt) << static_cast<int>(state);
  }
  h.SetState(6, VmaState::kFree);
  EXPECT_EQ(h.Draw(), "mmmmmm|......|mmmmmmmmmmmm");
  EXPECT_EQ(h.Gap(6), 6u);
  EXPECT_EQ(h.Gap(7), std::nullopt);
  h.Check();
}

// Gaps that are long enough but start at the wrong page do not count, wherever they lie.
TEST(VmaTreeGapTest, MindsAlignment) {
  Harness h(32);
  h.Carve(0, 32, VmaState::kMapped);
  h.Carve(1, 6, VmaState::kFree);
  h.Carve(9, 14, VmaState::kFree);
  h.Carve(17, 22, VmaState::kFree);
  EXPECT_EQ(h.Draw(), "m|.....|mmm|.....|mmm|.....|mmmmmmmmmm");
  EXPECT_EQ(h.Gap(2, 4), 1u) << "4 and 5";
  EXPECT_EQ(h.Gap(3, 4), std::nullopt) << "from 4, 12 and 20 on, only two fit";
  EXPECT_EQ(h.Gap(2, 8), std::nullopt) << "8, 16 and 24 are taken";
  h.Carve(14, 22, VmaState::kFree);
  EXPECT_EQ(h.Draw(), "m|.....|mmm|.....|........|mmmmmmmmmm");
  EXPECT_EQ(h.Gap(2, 8), 14u) << "16 and 17";
  h.Check();
}

TEST(VmaTreeGapTest, CountsAlignmentFromTheOrigin) {
  Harness h(32);
  // Page 0 of the region is page 5 of the address space, so pages 3, 11, 19 and 27 are multiples of 8.
  h.Carve(0, 32, VmaState::kMapped);
  h.Carve(3, 6, VmaState::kFree);
  EXPECT_EQ(h.Draw(), "mmm|...|mmmmmmmmmmmmmmmmmmmmmmmmmm");
  EXPECT_EQ(h.Gap(3, 8, 5), 3u) << "the whole gap, exactly";
  EXPECT_EQ(h.Gap(3, 8, 4), std::nullopt);
  EXPECT_EQ(h.Gap(2, 8, 4), 3u) << "4 and 5";
  EXPECT_EQ(h.Gap(1, 8, 3), 3u) << "5";
  EXPECT_EQ(h.Gap(1, 8, 6), std::nullopt);
}

TEST(VmaTreeGapTest, FindsTheOneAlignedGapAmongThousands) {
  constexpr RegionPage kPages = 64 * 1024;
  Harness h(kPages);
  h.Carve(0, kPages, VmaState::kMapped);
  // Gaps of 4 at 16k + 1: 13 short of a multiple of 16. One at a multiple of 16, near the end.
  for (RegionPage page = 1; page + 16 < kPages; page += 16) h.Carve(page, page + 4, VmaState::kFree);
  EXPECT_EQ(h.Gap(4, 16), std::nullopt);
  h.Carve(kPages - 160, kPages - 156, VmaState::kFree);
  ASSERT_TRUE(h.Gap(4, 16).has_value());
  EXPECT_EQ(*h.Gap(4, 16), kPages - 160);
  EXPECT_EQ(h.Gap(4, 16, 15), 1u) << "with that origin, all of them are aligned";
  h.Check();
}

TEST(VmaTreeGapTest, SurvivesExtremeRequests) {
  Harness h(24);
  EXPECT_EQ(h.Gap(24, std::uint64_t{1} << 40, 0), 0u);
  EXPECT_EQ(h.Gap(1, std::uint64_t{1} << 40, 1), std::nullopt);
  EXPECT_EQ(h.Gap(UINT32_MAX, 1, 0), std::nullopt);
  EXPECT_EQ(h.Gap(UINT32_MAX, UINT32_MAX / 2 + 1, 0), std::nullopt);
  EXPECT_EQ(h.Gap(1, std::uint64_t{1} << 63, 5), std::nullopt);
}

// ---- Deep trees ----

TEST(VmaTreeDeepTest, GrowsDeepAndBack) {
  constexpr RegionPage kPages = kSanitized ? 40'000 : 200'000;
  Harness h(kPages);
  // From the back: every split is in the first leaf.
  for (RegionPage page = kPages - 2; page > 0; page -= 2) h.Split(page);
  ASSERT_EQ(h.tree.size(), kPages / 2);
  h.Check();
  for (RegionPage page = 0; page < kPages; page += 997) {
    EXPECT_EQ(h.At(page)->first_page(), page / 2 * 2);
  }
  const std::size_t nodes = h.nodes();
  while (h.tree.size() > 1) h.Merge(0);
  h.Check();
  EXPECT_EQ(h.tree.LargestGap(), kPages);
  // Nodes come back: the second time, from the front, needs at most what half-full nodes cost more.
  for (RegionPage page = 2; page < kPages; page += 2) h.Split(page);
  ASSERT_EQ(h.tree.size(), kPages / 2);
  h.Check();
  EXPECT_LE(h.nodes(), nodes * 2);
}

TEST(VmaTreeDeepTest, EmptiesFromAnywhere) {
  constexpr RegionPage kPages = kSanitized ? 5000 : 20'000;
  for (const RegionPage start : {RegionPage{0}, kPages / 3, kPages - 2}) {
    Harness h(kPages);
    for (RegionPage page = 1; page < kPages; ++page) h.Split(page);
    // Outwards from `start`, so that whole leaves vanish on both sides.
    for (RegionPage page = start; h.tree.size() > 1;) {
      if (!h.Merge(page)) page = h.At(page)->first_page() - 1;
      if (h.tree.size() % 1024 == 0) h.Check();
    }
    h.Check();
    EXPECT_EQ(h.tree.size(), 1u);
  }
}

// The same splits and merges on a map of borders.
TEST(VmaTreeDeepTest, AgreesWithAMapOfBorders) {
  constexpr RegionPage kPages = 4096;
  for (const unsigned seed : {1u, 2u, 3u}) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    Harness h(kPages);
    std::map<RegionPage, VmaState> model = {{0, VmaState::kFree}};
    for (int step = 0; step < 20'000; ++step) {
      // Long runs of the same operation fill and empty the tree.
      const bool growing = (step / 2500) % 2 == 0;
      const auto page = static_cast<RegionPage>(random() % kPages);
      const auto own = std::prev(model.upper_bound(page));
      if (random() % 8 == 0) {
        const VmaState state = random() % 2 == 0 ? VmaState::kFree : VmaState::kMapped;
        h.SetState(page, state);
        own->second = state;
      } else if (random() % 4 == 0 ? !growing : growing) {
        ASSERT_EQ(h.Split(page), own->first != page) << "step " << step << ", page " << page;
        model.emplace(page, own->second);
      } else {
        const auto next = std::next(own);
        ASSERT_EQ(h.Merge(page), next != model.end()) << "step " << step << ", page " << page;
        if (next != model.end()) model.erase(next);
      }
      if (step % 500 != 0) continue;
      h.Check();
      ASSERT_EQ(h.tree.size(), model.size());
      RegionPage largest = 0;
      for (auto it = model.begin(); it != model.end(); ++it) {
        const RegionPage end = std::next(it) == model.end() ? kPages : std::next(it)->first;
        ASSERT_EQ(h.At(it->first)->first_page(), it->first);
        ASSERT_EQ(h.At(it->first)->end_page(), end);
        ASSERT_TRUE(h.At(it->first)->Is(it->second));
        if (it->second == VmaState::kFree) largest = std::max(largest, end - it->first);
      }
      ASSERT_EQ(h.tree.LargestGap(), largest);
    }
  }
}

// Whatever NeedsNodes asks for is enough for one insertion, also when it splits every level.
TEST(VmaTreeDeepTest, AsksForEnoughNodes) {
  constexpr RegionPage kPages = 40'000;
  Harness h(kPages);
  // Always into the same leaf: each level fills up and splits in turn. Harness adds nodes only on demand,
  // and the tree stops the program when it runs out.
  for (RegionPage page = 1; page < kPages; ++page) h.Split(page);
  EXPECT_EQ(h.tree.size(), kPages);
  h.Check();
}

// ---- Lookups beside a writer ----

class VmaTreeConcurrencyTest : public testing::Test {
 protected:
  static constexpr RegionPage kPages = 3000;

  // Looks up random pages and verifies that each view is one that existed.
  void Read(Harness& h, unsigned seed) {
    std::mt19937 random(seed);
    while (!stop_.load(std::memory_order_relaxed)) {
      const auto page = static_cast<RegionPage>(random() % kPages);
      VmaTree::View view;
      if (!h.tree.Lookup(page, view)) {
        const std::lock_guard lock(writer_);
        if (!h.tree.Lookup(page, view)) Fail("a lookup failed beside no writer", page, view);
        failed_.fetch_add(1, std::memory_order_relaxed);
      }
      if (view.first > page || page >= view.first + view.count) Fail("not the extent of the page", page, view);
      if (view.attributes.generation != Spell(view.first, view.count, view.state, view.attributes.protection)) {
        Fail("a state that never was", page, view);
      }
      lookups_.fetch_add(1, std::memory_order_relaxed);
    }
  }

  void Fail(const char* what, RegionPage page, const VmaTree::View& view) {
    if (stop_.exchange(true)) return;
    ADD_FAILURE() << what << ": page " << page << ", got [" << view.first << ", +" << view.count << ") state "
                  << static_cast<int>(view.state) << " generation " << std::hex << view.attributes.generation;
  }

  void RunReaders(Harness& h, int readers, const std::function<void()>& write) {
    std::vector<std::thread> threads;
    for (int i = 0; i < readers; ++i) threads.emplace_back([this, &h, i] { Read(h, 100 + i); });
    while (lookups_.load(std::memory_order_relaxed) < 1000) std::this_thread::yield();
    write();
    stop_.store(true);
    for (std::thread& thread : threads) thread.join();
  }

  std::mutex writer_;
  std::atomic<bool> stop_{false};
  std::atomic<std::uint64_t> lookups_{0};
  std::atomic<std::uint64_t> failed_{0};
};

TEST_F(VmaTreeConcurrencyTest, LookupsSeeStatesThatExisted) {
  constexpr unsigned kSeed = 7;
  constexpr int kSteps = kSanitized ? 30'000 : 150'000;
  std::printf("seed %u\n", kSeed);
  Harness h(kPages);
  RunReaders(h, 2, [&] {
    std::mt19937 random(kSeed);
    for (int step = 0; step < kSteps && !stop_.load(std::memory_order_relaxed); ++step) {
      const std::lock_guard lock(writer_);
      const auto page = static_cast<RegionPage>(random() % kPages);
      // Rises to about two thirds of all pages being borders and falls again: nodes split, merge, and go
      // through the pool while readers stand on them.
      const bool growing = (step / 5000) % 2 == 0;
      switch (random() % 4) {
        case 0: h.SetState(page, random() % 2 == 0 ? VmaState::kFree : VmaState::kMapped); break;
        case 1: growing ? h.Merge(page) : h.Split(page); break;
        default: growing ? h.Split(page) : h.Merge(page); break;
      }
    }
  });
  h.Check();
  // Nearly all lookups need no lock.
  EXPECT_LT(failed_.load() * 10, lookups_.load());
}

// One hot leaf that fills, splits, empties and merges all the time: nodes and extents change their place at
// every step.
TEST_F(VmaTreeConcurrencyTest, LookupsSurviveRecycling) {
  constexpr int kRounds = kSanitized ? 12 : 60;
  Harness h(kPages);
  std::size_t nodes_after_first = 0;
  RunReaders(h, 2, [&] {
    for (int round = 0; round < kRounds && !stop_.load(std::memory_order_relaxed); ++round) {
      for (RegionPage page = 1; page < kPages; page += 7) {
        const std::lock_guard lock(writer_);
        h.Split(page);
      }
      for (RegionPage page = 0; h.tree.size() > 1; page = (page + 1231) % kPages) {
        const std::lock_guard lock(writer_);
        h.Merge(page);
      }
      if (round == 0) nodes_after_first = h.nodes();
    }
  });
  h.Check();
  EXPECT_LE(h.nodes(), nodes_after_first + VmaTree::kMaxDepth) << "nodes are not used again";
}

// ---- The checker fails when it must ----

using VmaTreeDeathTest = testing::Test;

Harness* Grown() {
  auto* h = new Harness(4096);
  for (RegionPage page = 4; page < 4096; page += 4) h->Split(page);
  h->Check();
  return h;
}

TEST(VmaTreeDeathTest, CheckerFindsAnExtentThatDoesNotTile) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Harness* h = Grown();
  VmaWriter(*h->At(400)).SetRange(400, 3);
  EXPECT_DEATH(h->Check(), "check failed");
  VmaWriter(*h->At(400)).SetRange(400, 4);
  h->Check();
  VmaWriter(*h->At(400)).SetRange(401, 3);
  EXPECT_DEATH(h->Check(), "check failed");
  delete h;
}

TEST(VmaTreeDeathTest, CheckerFindsAnotherSizeOfTheRegion) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Harness* h = Grown();
  EXPECT_DEATH(h->tree.CheckInvariants(4095), "check failed");
  delete h;
}

TEST(VmaTreeDeathTest, CheckerFindsAStaleGap) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Harness* h = Grown();
  VmaWriter(*h->At(400)).SetState(VmaState::kMapped);
  EXPECT_DEATH(h->Check(), "check failed");
  delete h;
}

// Nodes of the tree, by height; those in the pool have no entries.
std::vector<Node*> NodesAt(Harness& h, int height) {
  std::vector<Node*> found;
  for (Node& node : h.all_nodes()) {
    if (node.count.load() > 0 && node.height.load() == height) found.push_back(&node);
  }
  return found;
}

TEST(VmaTreeDeathTest, CheckerFindsACorruptLeaf) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Harness* h = Grown();
  Node* leaf = NodesAt(*h, 0).at(3);
  leaf->key[1].store(leaf->key[1].load() + 1);
  EXPECT_DEATH(h->Check(), "check failed");
  leaf->key[1].store(leaf->key[1].load() - 1);
  h->Check();
  leaf->count.store(static_cast<std::uint8_t>(leaf->count.load() - 1));
  EXPECT_DEATH(h->Check(), "check failed");
  delete h;
}

TEST(VmaTreeDeathTest, CheckerFindsACorruptInnerNode) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Harness* h = Grown();
  Node* inner = NodesAt(*h, 1).at(0);
  inner->gap[2].store(inner->gap[2].load() + 1);
  EXPECT_DEATH(h->Check(), "check failed");
  inner->gap[2].store(inner->gap[2].load() - 1);
  h->Check();
  // A separator above the first key below it.
  inner->key[2].store(inner->key[2].load() + 1);
  EXPECT_DEATH(h->Check(), "check failed");
  delete h;
}

// T1, the other half: a separator at or below a key to its left sends lookups of that key to the wrong node.
TEST(VmaTreeDeathTest, CheckerFindsASeparatorThatIsTooLow) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Harness* h = Grown();
  Node* inner = NodesAt(*h, 1).at(0);
  const Node* left = static_cast<const Node*>(inner->entry[1].load());
  inner->key[2].store(left->key[left->count.load() - 1].load());
  EXPECT_DEATH(h->Check(), "check failed");
  delete h;
}

}  // namespace
}  // namespace freehold::vm
