// `freehold top`, as a stream of screens and on a terminal.
#include <poll.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <utmp.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/runtime/inspected.h"
#include "tests/runtime/subprocess.h"

namespace freehold::testing {
namespace {

using ::testing::AllOf;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr char kEnter[] = "\033[?1049h";
constexpr char kLeave[] = "\033[?25h\033[?1049l";

// ---- no terminal ----

TEST(TopTest, PrintsAScreenForEachInterval) {
  const Inspected busy("churn-until-end");
  const std::string text = OutputOf({"top", busy.pid(), "--count=3", "--interval", "0.2"});
  std::size_t screens = 0;
  for (std::size_t at = 0; (at = text.find("inspected (" + busy.pid() + "), Freehold", at)) != std::string::npos; ++at)
    ++screens;
  EXPECT_EQ(screens, 3u);
  EXPECT_THAT(text, AllOf(HasSubstr("memory   resident "), HasSubstr("largest gap"), HasSubstr("calls/s  "),
                          HasSubstr("maps "), HasSubstr("not recorded: FREEHOLD_RECORD_RANGE_LOCKS=1"),
                          HasSubstr("\nwaiting  0 threads\n"), Not(HasSubstr("\033"))));
}

TEST(TopTest, PrintsTimesOfRangeLocks) {
  const Inspected busy("churn-until-end", {{"LD_PRELOAD", ShimLibrary()}, {"FREEHOLD_RECORD_RANGE_LOCKS", "1"}});
  const std::string text = OutputOf({"top", busy.pid(), "--once", "--interval=0.3"});
  EXPECT_THAT(text, AllOf(HasSubstr("wait p99"), HasSubstr("\nunmap  ")));
}

TEST(TopTest, AnIdleProcess) {
  const Inspected idle("hold");
  const std::string text = OutputOf({"top", idle.pid(), "--once", "--interval=0.2"});
  EXPECT_THAT(text, HasSubstr("kernel/s none\n"));
}

TEST(TopTest, SaysThatTheProcessHasEnded) {
  Inspected ending("hold");
  const pid_t ender = fork();
  if (ender == 0) {
    usleep(300'000);
    ending.Kill();
    _exit(0);
  }
  const Outcome outcome = Freehold({"top", ending.pid(), "--interval=0.1"});
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.err, "");
  EXPECT_THAT(outcome.out, EndsWith("inspected (" + ending.pid() + ") has ended\n"));
  waitpid(ender, nullptr, 0);
  ending.KillAndWait();
}

TEST(TopTest, WrongValues) {
  for (const std::string value : {"0", "0.05", "3601", "x", "nan", ""}) {
    ExpectFailure({"top", "1", "--interval=" + value}, 2, "--interval=" + value + " is not 0.1 to 3600 seconds");
  }
  for (const std::string value : {"0", "-1", "x", ""}) {
    ExpectFailure({"top", "1", "--count=" + value}, 2, "--count=" + value + " is not a number of screens");
  }
  ExpectFailure({"top", "1", "--count"}, 2, "--count needs a value; see `freehold top --help`");
}

// ---- on a terminal ----

class TopOnTerminal {
 public:
  explicit TopOnTerminal(const std::string& pid) {
    winsize size = {.ws_row = 6, .ws_col = 30, .ws_xpixel = 0, .ws_ypixel = 0};
    const std::string cli = Cli();
    EXPECT_EQ(openpty(&terminal_, &other_, nullptr, nullptr, &size), 0);
    EXPECT_EQ(tcgetattr(other_, &before_), 0);
    child_ = fork();
    if (child_ == 0) {
      login_tty(other_);
      execl(cli.c_str(), "freehold", "top", pid.c_str(), "--interval=0.1", nullptr);
      _exit(124);
    }
  }
  ~TopOnTerminal() {
    if (child_ > 0) {
      kill(child_, SIGKILL);
      waitpid(child_, nullptr, 0);
    }
    close(terminal_);
    close(other_);
  }
  TopOnTerminal(const TopOnTerminal&) = delete;
  TopOnTerminal& operator=(const TopOnTerminal&) = delete;

  // Reads until what came since the last call contains `text`, and returns that.
  std::string ReadUntil(const std::string& text) {
    std::string got;
    while (got.find(text) == std::string::npos) {
      pollfd source = {terminal_, POLLIN, 0};
      char chunk[4096];
      ssize_t size = 0;
      if (poll(&source, 1, 20'000) <= 0 || (size = read(terminal_, chunk, sizeof(chunk))) <= 0) {
        ADD_FAILURE() << "never came: " << text << " in " << got;
        break;
      }
      got.append(chunk, static_cast<std::size_t>(size));
    }
    return got;
  }
  void Type(const std::string& keys) const {
    EXPECT_EQ(write(terminal_, keys.data(), keys.size()), static_cast<ssize_t>(keys.size()));
  }
  void Resize(unsigned short rows, unsigned short columns) const {
    const winsize size = {.ws_row = rows, .ws_col = columns, .ws_xpixel = 0, .ws_ypixel = 0};
    EXPECT_EQ(ioctl(terminal_, TIOCSWINSZ, &size), 0);
  }
  bool EchoIsOff() const {
    termios now;
    EXPECT_EQ(tcgetattr(other_, &now), 0);
    return (now.c_lflag & (ECHO | ICANON)) == 0;
  }
  // It ends by itself with status 0, and leaves the terminal as it was.
  void ExpectEnd() {
    ReadUntil(kLeave);
    int status = -1;
    EXPECT_EQ(waitpid(child_, &status, 0), child_);
    EXPECT_EQ(status, 0);
    child_ = -1;
    termios now;
    EXPECT_EQ(tcgetattr(other_, &now), 0);
    EXPECT_EQ(now.c_lflag, before_.c_lflag);
    EXPECT_EQ(now.c_iflag, before_.c_iflag);
  }
  pid_t child() const { return child_; }

 private:
  int terminal_ = -1;
  int other_ = -1;
  pid_t child_ = -1;
  termios before_;
};

TEST(TopTest, OnATerminal) {
  const Inspected process("hold");
  TopOnTerminal top(process.pid());
  EXPECT_THAT(top.ReadUntil("memory"), StartsWith(kEnter));
  EXPECT_TRUE(top.EchoIsOff());
  // A screen: cut to the window's 30 columns and 6 rows.
  std::string screens;
  for (int i = 0; i < 3; ++i) screens += top.ReadUntil("\033[J");
  const std::size_t begin = screens.find("\033[H") + std::strlen("\033[H");
  const std::string screen = screens.substr(begin, screens.find("\033[J", begin) - begin);
  const std::vector<std::string> lines = absl::StrSplit(screen, "\r\n");
  EXPECT_EQ(lines.size(), 6u);
  for (const std::string& line : lines) {
    EXPECT_THAT(line, EndsWith("\033[K"));
    EXPECT_LE(line.size(), 30 + std::strlen("\033[K")) << line;
  }
  top.Resize(40, 200);
  top.ReadUntil("waiting  0 threads");
  top.Type("xyz");
  top.ReadUntil("waiting  0 threads");
  top.Type("q");
  top.ExpectEnd();
}

TEST(TopTest, CtrlCAndSignalsEndIt) {
  const Inspected process("hold");
  {
    TopOnTerminal top(process.pid());
    top.ReadUntil("memory");
    top.Type("\003");
    top.ExpectEnd();
  }
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    TopOnTerminal top(process.pid());
    top.ReadUntil("memory");
    EXPECT_EQ(kill(top.child(), signal), 0);
    top.ExpectEnd();
  }
}

TEST(TopTest, TheEndOfTheProcessOnATerminal) {
  Inspected process("hold");
  TopOnTerminal top(process.pid());
  top.ReadUntil("memory");
  process.KillAndWait();
  top.ExpectEnd();
}

}  // namespace
}  // namespace freehold::testing
