#include "runtime/statistics.h"

#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "runtime/runtime.h"
#include "runtime/thread.h"

namespace freehold::runtime {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using Kind = vm::Metric::Kind;

const Statistic kExamples[] = {
    {.name = "plain_total", .help = "A counter.", .kind = Kind::kCounter, .value = 7},
    {.name = "by_size", .help = "Several.", .value = 1, .label = "size", .label_value = 16},
    {.name = "by_size", .help = "Several.", .value = 2, .label = "size", .label_value = 32},
    {.name = "by_cache", .help = "One.", .value = 0, .label = "cache", .label_value = 0},
    {.name = "last_bytes", .help = "A gauge.", .value = UINT64_MAX},
};

std::string Written(StatisticsFormat format, std::size_t count = std::size(kExamples)) {
  std::string text;
  auto append = [&](std::string_view line) { text += line; };
  StatisticsWriter writer(format, append);
  for (std::size_t i = 0; i < count; ++i) writer.Write(kExamples[i]);
  writer.Finish();
  return text;
}

TEST(StatisticsWriterTest, Text) {
  EXPECT_EQ(Written(StatisticsFormat::kText),
            "plain_total 7\nby_size[size 16] 1\nby_size[size 32] 2\nby_cache[cache 0] 0\n"
            "last_bytes 18446744073709551615\n");
}

TEST(StatisticsWriterTest, Json) {
  const auto all = nlohmann::json::parse(Written(StatisticsFormat::kJson));
  EXPECT_EQ(all, (nlohmann::json{{"plain_total", 7},
                                 {"by_size", {{"16", 1}, {"32", 2}}},
                                 {"by_cache", {{"0", 0}}},
                                 {"last_bytes", UINT64_MAX}}));
  // However it ends.
  for (std::size_t count = 0; count < std::size(kExamples); ++count) {
    EXPECT_TRUE(nlohmann::json::accept(Written(StatisticsFormat::kJson, count))) << count;
  }
}

TEST(StatisticsWriterTest, Prometheus) {
  EXPECT_EQ(Written(StatisticsFormat::kPrometheus),
            "# HELP freehold_plain_total A counter.\n# TYPE freehold_plain_total counter\nfreehold_plain_total 7\n"
            "# HELP freehold_by_size Several.\n# TYPE freehold_by_size gauge\n"
            "freehold_by_size{size=\"16\"} 1\nfreehold_by_size{size=\"32\"} 2\n"
            "# HELP freehold_by_cache One.\n# TYPE freehold_by_cache gauge\nfreehold_by_cache{cache=\"0\"} 0\n"
            "# HELP freehold_last_bytes A gauge.\n# TYPE freehold_last_bytes gauge\n"
            "freehold_last_bytes 18446744073709551615\n");
}

TEST(ResidenceTest, SumsMappingsInTheRange) {
  const std::string path = ::testing::TempDir() + "smaps";
  std::ofstream(path) << "00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/dbus\n"
                      << "Size:                328 kB\nRss:                 100 kB\n"
                      << "AnonHugePages:      2048 kB\nVmFlags: rd ex mr\n"
                      << "10000000-10400000 rw-p 00000000 00:00 0 " << std::string(3000, 'x') << "\n"
                      << "Rss:                4100 kB\nAnonHugePages:      4096 kB\n"
                      << "1f000000-1f200000 rw-p 00000000 00:00 0\nRss: 2048 kB\nAnonHugePages:      2048 kB\n"
                      << "20000000-20200000 rw-p 00000000 00:00 0\nRss: 2060 kB\nAnonHugePages:      2048 kB\n";
  const Residence some = ReadResidence(path.c_str(), 0x10000000, 0x20000000);
  EXPECT_EQ(some.huge_bytes, 6144u << 10);
  EXPECT_EQ(some.bytes, 6148u << 10);
  const Residence all = ReadResidence(path.c_str(), 0, UINTPTR_MAX);
  EXPECT_EQ(all.huge_bytes, 10240u << 10);
  EXPECT_EQ(all.bytes, (100u + 4100 + 2048 + 2060) << 10);
  const Residence none = ReadResidence("/nonexistent/smaps", 0, UINTPTR_MAX);
  EXPECT_EQ(none.bytes, 0u);
  EXPECT_EQ(none.huge_bytes, 0u);
  std::remove(path.c_str());
}

class ProcessStatisticsTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_EQ(process_runtime.EnsureStarted(), Server::kFreehold); }

  using Values = std::map<std::pair<std::string, std::uint64_t>, std::uint64_t>;
  static Values Read(const StatisticsOptions& options = {}) {
    Values values;
    std::set<std::string> ended;
    std::string current;
    ForEachStatistic(options, [&](const Statistic& statistic) {
      const std::string name(statistic.name);
      EXPECT_TRUE(values.emplace(std::pair(name, statistic.label_value), statistic.value).second)
          << name << " twice for " << statistic.label_value;
      // As Prometheus wants it.
      if (name != current) {
        EXPECT_TRUE(ended.insert(name).second) << name << " is scattered";
        current = name;
      }
      EXPECT_FALSE(statistic.help.empty()) << name;
      EXPECT_EQ(statistic.kind == Kind::kCounter, name.size() > 6 && name.substr(name.size() - 6) == "_total") << name;
    });
    return values;
  }
};

TEST_F(ProcessStatisticsTest, CountObjectsBySizeAndByCache) {
  const CacheLease lease;
  allocator::ThreadCache& cache = *lease.get();
  const Values before = Read();
  std::vector<void*> objects;
  for (int i = 0; i < 20'000; ++i) objects.push_back(cache.Allocate(3000));
  Values after = Read();
  const auto at = [](const Values& values, const std::string& name, std::uint64_t label = 0) {
    const auto found = values.find({name, label});
    return found == values.end() ? 0 : found->second;
  };
  EXPECT_GE(at(after, "heap_class_objects", 3072), at(before, "heap_class_objects", 3072) + 20'000);
  EXPECT_GE(at(after, "heap_class_spans", 3072), 20'000u * 3072 / allocator::kUnitSize / 8);
  EXPECT_GE(at(after, "heap_cache_object_bytes", cache.id()),
            at(before, "heap_cache_object_bytes", cache.id()) + 20'000u * 3072);
  EXPECT_GE(at(after, "heap_cache_span_bytes", cache.id()), at(after, "heap_cache_object_bytes", cache.id()));
  EXPECT_EQ(at(after, "heap_class_object_bytes", 3072), at(after, "heap_class_objects", 3072) * 3072);
  EXPECT_EQ(at(after, "heap_class_span_bytes", 3072), at(after, "heap_class_spans", 3072) * allocator::kUnitSize);
  EXPECT_EQ(at(after, "heap_cache_thread", cache.id()), static_cast<std::uint64_t>(gettid()));
  EXPECT_EQ(at(after, "heap_cache_attached", cache.id()), 1u);
  EXPECT_GE(at(after, "heap_allocated_bytes"), 20'000u * 3072);
  EXPECT_EQ(at(after, "heap_active_bytes"), at(after, "heap_allocated_bytes") + at(after, "heap_fragmented_bytes"));
  EXPECT_GT(at(after, "vm_mapped_bytes"), 0u);
  // Every second one: half of the memory is fragmented.
  for (std::size_t i = 0; i < objects.size(); i += 2) cache.Free(objects[i]);
  const Values sparse = Read();
  EXPECT_LT(at(sparse, "heap_class_objects", 3072), at(after, "heap_class_objects", 3072) - 9'000);
  EXPECT_GT(at(sparse, "heap_fragmented_bytes"), at(after, "heap_fragmented_bytes") + 9'000u * 3072);
  // Not the first one: frees that follow a burst of frees are finished later.
  for (int i = 0; i < 200; ++i) cache.Free(cache.Allocate(3000));
  EXPECT_GE(at(Read(), "heap_cache_at_hand_bytes", cache.id()), 3072u);
  for (std::size_t i = 1; i < objects.size(); i += 2) cache.Free(objects[i]);
}

TEST_F(ProcessStatisticsTest, HugePagesWhenAskedFor) {
  EXPECT_EQ(Read().count({"vm_huge_page_bytes", 0}), 0u);
  EXPECT_EQ(Read({.huge_pages = true}).count({"vm_huge_page_bytes", 0}), 1u);
}

TEST_F(ProcessStatisticsTest, EveryFormatHasTheSameNumbers) {
  std::set<std::string> names;
  for (const auto& [key, value] : Read()) names.insert(key.first);
  std::string json;
  WriteStatistics({.format = StatisticsFormat::kJson}, [&](std::string_view part) { json += part; });
  std::set<std::string> in_json;
  const auto parsed = nlohmann::json::parse(json);
  for (const auto& [name, value] : parsed.items()) in_json.insert(name);
  EXPECT_EQ(in_json, names);
  std::string prometheus;
  WriteStatistics({.format = StatisticsFormat::kPrometheus}, [&](std::string_view part) { prometheus += part; });
  std::set<std::string> in_prometheus;
  std::istringstream lines(prometheus);
  for (std::string line; std::getline(lines, line);) {
    if (line[0] == '#') continue;
    ASSERT_THAT(line, MatchesRegex(R"re(freehold_[a-z_]+(\{[a-z]+="[0-9]+"\})? [0-9]+)re"));
    const std::size_t name = std::strlen("freehold_");
    in_prometheus.insert(line.substr(name, line.find_first_of("{ ") - name));
  }
  EXPECT_EQ(in_prometheus, names);
}

}  // namespace
}  // namespace freehold::runtime
