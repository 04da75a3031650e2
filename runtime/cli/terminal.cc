#include "runtime/cli/terminal.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"

namespace freehold::cli {
namespace {

constexpr char kCtrlC = 3;

sigset_t HandledSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH}) sigaddset(&signals, signal);
  return signals;
}

bool Write(absl::string_view text) {
  return std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
}

}  // namespace

Terminal::Terminal() : is_screen_(isatty(STDOUT_FILENO) != 0) {
  // Read by Wait, so that none comes while the terminal is not as it was.
  const sigset_t signals = HandledSignals();
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  signals_ = signalfd(-1, &signals, SFD_CLOEXEC);
  if (!is_screen_) return;
  if (tcgetattr(STDIN_FILENO, &keys_before_) == 0) {
    termios keys = keys_before_;
    // Neither lines nor echo, and Ctrl-C and Ctrl-Z are keys.
    keys.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO | ISIG);
    has_keys_ = tcsetattr(STDIN_FILENO, TCSANOW, &keys) == 0;
  }
  Write("\033[?1049h\033[?25l");  // the other screen, without a cursor
}

Terminal::~Terminal() {
  if (is_screen_) Write("\033[?25h\033[?1049l");
  if (has_keys_) tcsetattr(STDIN_FILENO, TCSANOW, &keys_before_);
  close(signals_);
  const sigset_t signals = HandledSignals();
  sigprocmask(SIG_UNBLOCK, &signals, nullptr);
}

bool Terminal::Show(absl::string_view lines) {
  if (!is_screen_) return Write(std::string(lines) + "\n");
  winsize size = {};
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_row == 0) {
    size.ws_row = 24;
    size.ws_col = 80;
  }
  std::string screen = "\033[H";
  std::size_t row = 0;
  for (const absl::string_view line : absl::StrSplit(lines, '\n')) {
    if (row == size.ws_row) break;
    if (row++ != 0) screen += "\n";
    absl::StrAppend(&screen, line.substr(0, size.ws_col), "\033[K");
  }
  return Write(screen + "\033[J");
}

Terminal::Event Terminal::Wait(absl::Duration timeout) {
  const absl::Time end = absl::Now() + timeout;
  for (;;) {
    const auto left = std::max<std::int64_t>(0, absl::ToInt64Milliseconds(end - absl::Now()));
    pollfd sources[] = {{signals_, POLLIN, 0}, {has_keys_ ? STDIN_FILENO : -1, POLLIN, 0}};
    const int ready = poll(sources, std::size(sources), static_cast<int>(std::min<std::int64_t>(left, 1'000'000'000)));
    if (ready == 0) return Event::kTimeout;
    signalfd_siginfo signal;
    if (sources[0].revents != 0 && read(signals_, &signal, sizeof(signal)) == sizeof(signal)) {
      return signal.ssi_signo == SIGWINCH ? Event::kResize : Event::kQuit;
    }
    char key = 0;
    // Without its other end, no key will come.
    if (sources[1].revents != 0 && read(STDIN_FILENO, &key, 1) <= 0) has_keys_ = false;
    if (key == 'q' || key == 'Q' || key == kCtrlC) return Event::kQuit;
  }
}

}  // namespace freehold::cli
