// Links the runtime, with defaults of its own; prints two of the settings that hold.
#include <cstdio>

#include "runtime/config.h"
#include "runtime/message.h"
#include "runtime/runtime.h"

using freehold::runtime::Config;

extern constinit const Config freehold::runtime::program_config = {
    .reserve = freehold::vm::GiB(128),
    .decay = freehold::vm::Milliseconds(123),
};

int main() {
  const Config& config = freehold::runtime::process_runtime.config();
  freehold::runtime::Message message;
  message.Append("decay-ms ").AppendNumber(config.decay.value / 1'000'000);
  message.Append(" reserve ").AppendBytes(config.reserve).Append('\n');
  std::fwrite(message.text().data(), 1, message.text().size(), stdout);
  return 0;
}
