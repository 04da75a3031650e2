// Includes much of the standard library and instantiates a good part of it, so that the compiler has
// plenty to allocate. The program's output is checked too.
#include <algorithm>
#include <any>
#include <array>
#include <atomic>
#include <barrier>
#include <bitset>
#include <charconv>
#include <chrono>
#include <complex>
#include <condition_variable>
#include <deque>
#include <exception>
#include <filesystem>
#include <forward_list>
#include <fstream>
#include <functional>
#include <future>
#include <iomanip>
#include <iostream>
#include <list>
#include <locale>
#include <map>
#include <memory>
#include <memory_resource>
#include <mutex>
#include <numbers>
#include <numeric>
#include <optional>
#include <queue>
#include <random>
#include <ranges>
#include <regex>
#include <semaphore>
#include <set>
#include <shared_mutex>
#include <span>
#include <sstream>
#include <stack>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <valarray>
#include <variant>
#include <vector>

namespace {

using Value = std::variant<int, double, std::string, std::vector<int>>;

std::string Describe(const Value& value) {
  return std::visit(
      [](const auto& held) -> std::string {
        using Held = std::decay_t<decltype(held)>;
        if constexpr (std::is_same_v<Held, std::string>) {
          return held;
        } else if constexpr (std::is_same_v<Held, std::vector<int>>) {
          return std::to_string(std::accumulate(held.begin(), held.end(), 0));
        } else {
          return std::to_string(held);
        }
      },
      value);
}

template <int N>
struct Fold {
  static int Of(const std::map<std::string, std::unordered_map<int, std::array<int, N>>>& tree) {
    int sum = Fold<N - 1>::Of({});
    for (const auto& [name, leaves] : tree) {
      for (const auto& [key, leaf] : leaves) sum += key + leaf[0] + static_cast<int>(name.size());
    }
    return sum;
  }
};
template <>
struct Fold<0> {
  static int Of(const std::map<std::string, std::unordered_map<int, std::array<int, 0>>>&) { return 0; }
};

int Threads() {
  std::mutex mutex;
  std::condition_variable_any changed;
  std::multimap<int, std::unique_ptr<std::string>> made;
  std::barrier start(4);
  std::counting_semaphore<4> slots(2);
  std::vector<std::jthread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      start.arrive_and_wait();
      for (int i = 0; i < 5000; ++i) {
        slots.acquire();
        auto text = std::make_unique<std::string>(static_cast<size_t>(i % 900), static_cast<char>('a' + t));
        slots.release();
        std::lock_guard lock(mutex);
        made.emplace(i, std::move(text));
        changed.notify_all();
      }
    });
  }
  threads.clear();
  size_t length = 0;
  for (const auto& [key, text] : made) length += text->size();
  return static_cast<int>(length % 1'000'003);
}

}  // namespace

int main() {
  std::vector<Value> values{1, 2.5, std::string("three"), std::vector<int>{4, 5}};
  for (const Value& value : values) std::cout << Describe(value) << '\n';

  std::mt19937_64 random(7);
  std::vector<std::uint64_t> numbers(200'000);
  std::ranges::generate(numbers, std::ref(random));
  std::stable_sort(numbers.begin(), numbers.end());
  auto every = numbers | std::views::filter([](std::uint64_t n) { return n % 3 == 0; }) |
               std::views::transform([](std::uint64_t n) { return n >> 7; }) | std::views::take(1000);
  std::uint64_t sum = 0;
  for (std::uint64_t n : every) sum += n;
  std::cout << sum << '\n';

  std::regex pattern(R"((\w+)-(\d+)(?:\.(\d+))?)");
  std::string text = "alpha-12 beta-7.5 gamma-x delta-99";
  for (std::sregex_iterator match(text.begin(), text.end(), pattern), end; match != end; ++match) {
    std::cout << (*match)[1] << '=' << (*match)[2] << '\n';
  }

  std::pmr::monotonic_buffer_resource arena;
  std::pmr::unordered_map<std::pmr::string, std::pmr::vector<int>> index(&arena);
  for (int i = 0; i < 20'000; ++i) index[std::pmr::string(std::to_string(i % 997), &arena)].push_back(i);
  std::cout << index.size() << ' ' << index.at("13").size() << '\n';

  std::ostringstream out;
  out << std::setprecision(12) << std::polar(2.0, std::numbers::pi / 5) << std::hex << 255;
  std::cout << out.str() << '\n' << Fold<6>::Of({{"x", {{1, {2}}}}}) << '\n';
  auto answer = std::async(std::launch::async, Threads);
  std::cout << answer.get() << '\n';
  try {
    throw std::filesystem::filesystem_error("thrown", "a", std::make_error_code(std::errc::io_error));
  } catch (const std::exception& error) {
    std::cout << error.what() << '\n';
  }
  std::any boxed = std::list<int>{1, 2, 3};
  std::cout << std::any_cast<std::list<int>&>(boxed).size() << std::endl;
}
