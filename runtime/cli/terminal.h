// A terminal as a full-screen program has it: a screen of its own, keys without echo. Everything is as before once it is
// destroyed. Where standard output is no terminal, it is a stream: screens follow each other.
//
// Thread safety: thread-compatible; one at a time, in a program with one thread.
#ifndef FREEHOLD_RUNTIME_CLI_TERMINAL_H_
#define FREEHOLD_RUNTIME_CLI_TERMINAL_H_

#include <termios.h>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace freehold::cli {

class Terminal {
 public:
  Terminal();
  ~Terminal();
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;

  // Replaces what the screen shows, cut to its size; on a stream, prints it. False: it cannot be written.
  bool Show(absl::string_view lines);

  enum class Event {
    kTimeout,
    kResize,  // the window has another size
    kQuit,    // 'q', Ctrl-C, or a signal that asks to end
  };
  Event Wait(absl::Duration timeout);

 private:
  bool is_screen_;
  bool has_keys_ = false;
  termios keys_before_;
  int signals_;
};

}  // namespace freehold::cli

#endif  // FREEHOLD_RUNTIME_CLI_TERMINAL_H_
