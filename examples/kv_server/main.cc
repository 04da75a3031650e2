// A key-value server on Freehold: malloc is its, and snapshots come from an address space of the server's own.
//
//     kv_server [--port=PORT] [--file=FILE]
//
// Loads FILE, says "listening on 127.0.0.1:PORT", and serves until SIGINT or SIGTERM. server.h has the protocol.
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "examples/kv_server/server.h"
#include "vm/address_space.h"
#include "vm/os/linux_kernel.h"

namespace vm = freehold::vm;
using freehold::examples::Server;

namespace {

Server* running = nullptr;

void StopRunning(int) {
  const int error = errno;
  running->Stop();
  errno = error;
}

int Fail(const std::string& what, int status) {
  std::fprintf(stderr, "kv_server: %s\n", what.c_str());
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  unsigned long port = 0;
  std::string file;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument.starts_with("--port=")) {
      char* end = nullptr;
      port = std::strtoul(argv[i] + 7, &end, 10);
      if (argument.size() == 7 || *end != '\0' || port > 65535) return Fail(std::string(argument) + " is no port", 2);
    } else if (argument.starts_with("--file=")) {
      file = argument.substr(7);
    } else {
      return Fail("usage: kv_server [--port=PORT] [--file=FILE]", 2);
    }
  }

  static constinit vm::os::LinuxKernel kernel;
  const vm::Result<vm::AddressSpace*> space =
      vm::AddressSpace::Create(kernel, {.reserve = vm::TiB(1), .min_reserve = vm::GiB(1)});
  if (!space.ok()) return Fail(std::string("no address space: ") + vm::ToString(space.error().code), 1);
  {
    Server server(**space, file);
    if (const std::string wrong = file.empty() ? "" : server.Load(); !wrong.empty()) return Fail(wrong, 1);
    const std::string wrong = server.Listen(static_cast<std::uint16_t>(port));
    if (!wrong.empty()) return Fail(wrong, 1);
    running = &server;
    struct sigaction action = {};
    action.sa_handler = StopRunning;
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
    std::printf("listening on 127.0.0.1:%u\n", static_cast<unsigned>(server.port()));
    std::fflush(stdout);
    server.Run();
    action.sa_handler = SIG_DFL;
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
  }
  vm::AddressSpace::Destroy(*space);
  return 0;
}
