// `freehold report`: a page that is well-formed, whole by itself, and says what the process is like.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <regex>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/runtime/inspected.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

// What is wrong with a page, strictly: every element closed in its turn, every attribute in quotes, every special
// character escaped. "" if nothing.
std::string HtmlProblem(const std::string& html) {
  static const std::regex kTag(R"re((/?)([a-z][a-z0-9]*)((?: [a-zA-Z-]+="[^"<>]*")*)(/?))re");
  static const std::regex kText("(?:[^&<>]|&(?:amp|lt|gt|quot|#39|minus);)*");
  const std::string doctype = "<!DOCTYPE html>\n";
  if (html.rfind(doctype, 0) != 0) return "no doctype";
  std::vector<std::string> open;
  for (std::size_t at = doctype.size(); at < html.size();) {
    const std::size_t begin = html.find('<', at);
    const std::string text = html.substr(at, begin - at);
    if (!std::regex_match(text, kText)) return "text: " + text.substr(0, 200);
    if (begin == std::string::npos) break;
    const std::size_t end = html.find('>', begin);
    if (end == std::string::npos) return "a tag without an end";
    const std::string tag = html.substr(begin + 1, end - begin - 1);
    std::smatch match;
    if (!std::regex_match(tag, match, kTag)) return "tag: " + tag.substr(0, 200);
    at = end + 1;
    if (match[4] == "/" || match[2] == "meta" || match[2] == "br") continue;
    if (match[1] != "/") {
      open.push_back(match[2]);
    } else if (open.empty() || open.back() != match[2]) {
      return "closed too early: " + tag;
    } else {
      open.pop_back();
    }
  }
  return open.empty() ? "" : "not closed: " + open.back();
}

TEST(ReportCheckerTest, FindsMistakes) {
  const std::string doctype = "<!DOCTYPE html>\n";
  EXPECT_EQ(HtmlProblem(doctype + "<p class=\"a\">x &amp; y<br><i/></p>\n"), "");
  for (const char* wrong : {"<p>", "</p>", "<p><b></p></b>", "<p class=a></p>", "a & b", "<p>a > b</p>", "<p", "<P></P>"}) {
    EXPECT_NE(HtmlProblem(doctype + wrong), "") << wrong;
  }
  EXPECT_NE(HtmlProblem("<p></p>"), "");
}

class ReportTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/freehold-report-test-XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    directory_ = name;
  }
  void TearDown() override { RunProgram({.argv = {"rm", "-r", directory_}}); }

  // Writes a report and reads it.
  std::string ReportOf(const Inspected& process, const std::string& seconds) const {
    const std::string path = directory_ + "/report.html";
    EXPECT_EQ(OutputOf({"report", process.pid(), "-o", path, "--seconds=" + seconds}), "");
    std::ifstream file(path);
    const std::string html{std::istreambuf_iterator<char>(file), {}};
    EXPECT_EQ(HtmlProblem(html), "");
    EXPECT_THAT(html, AllOf(Not(HasSubstr("http:")), Not(HasSubstr("https:")), Not(HasSubstr("src=")),
                            Not(HasSubstr("href=")), Not(HasSubstr("url(")), Not(HasSubstr("@import")),
                            Not(HasSubstr("<script")), Not(ContainsRegex("[ \"-](nan|inf)[ \"]"))));
    return html;
  }

  std::string directory_;
};

TEST_F(ReportTest, SaysWhatTheProcessIsLike) {
  const Inspected process("hold");
  const std::string html = ReportOf(process, "0.2");
  EXPECT_THAT(html, AllOf(HasSubstr("<h1>inspected (" + process.pid() + ")</h1>"), HasSubstr("name=\"viewport\""),
                          HasSubstr("prefers-color-scheme: dark"), HasSubstr("<dt>Mapped</dt><dd>"),
                          HasSubstr("<td>plain 0</td>"), HasSubstr("class=\"strip\""), HasSubstr("class=\"chart\""),
                          HasSubstr("vm_maps_total"), HasSubstr("Not recorded"), HasSubstr("None at any of 61 moments")));
  // Every number that a drawing shows is in a table or a caption, and every drawing has a text.
  static const std::regex kDrawing("<svg [^>]*role=\"img\" aria-label=\"[^\"]+\">");
  const auto count = [&](const std::regex& what) {
    return std::distance(std::sregex_iterator(html.begin(), html.end(), what), std::sregex_iterator());
  };
  EXPECT_EQ(count(kDrawing), count(std::regex("<svg ")));
  EXPECT_GE(count(kDrawing), 2);
}

TEST_F(ReportTest, TimesOfRangeLocks) {
  const Inspected busy("churn-until-end", {{"LD_PRELOAD", ShimLibrary()}, {"FREEHOLD_RECORD_RANGE_LOCKS", "1"}});
  const std::string html = ReportOf(busy, "0.3");
  EXPECT_THAT(html, AllOf(HasSubstr("map, waited for: "), HasSubstr("map, held: "), HasSubstr("<td>map</td><td>held</td>")));
  // Something changed meanwhile.
  EXPECT_THAT(html, HasSubstr("<td class=\"n\">+"));
}

TEST_F(ReportTest, NamesAreEscaped) {
  const Inspected named("html-name");
  const std::string html = ReportOf(named, "0");
  EXPECT_THAT(html, HasSubstr("<h1>&lt;b&gt;&amp;&quot;&#39; ("));
}

TEST_F(ReportTest, WrongArguments) {
  ExpectFailure({"report", "1"}, 2, "no file given: -o FILE.html; see `freehold report --help`");
  ExpectFailure({"report", "1", "-o", "x", "--seconds=x"}, 2, "--seconds=x is not 0 to 3600");
  ExpectFailure({"report", "1", "-o", "x", "--seconds=-1"}, 2, "--seconds=-1 is not 0 to 3600");
  ExpectFailure({"report", "1", "-o"}, 2, "-o needs a value; see `freehold report --help`");
}

TEST_F(ReportTest, AFileThatCannotBeWritten) {
  const Inspected process("hold");
  const std::string missing = directory_ + "/no/such/report.html";
  ExpectFailure({"report", process.pid(), "-o", missing, "--seconds=0"}, 1, missing + ": No such file or directory");
  ExpectFailure({"report", process.pid(), "-o", "/dev/full", "--seconds=0"}, 1, "/dev/full: No space left on device");
}

}  // namespace
}  // namespace freehold::testing
