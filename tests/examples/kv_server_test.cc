// The key-value server: its protocol, snapshots taken while others write, and the program itself.
#include "examples/kv_server/server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "examples/kv_server/table.h"
#include "gtest/gtest.h"
#include "tests/runtime/subprocess.h"
#include "tests/vm/space_fixture.h"
#include "vm/os/linux_kernel.h"

namespace freehold::examples {
namespace {

using namespace vm::test;  // NOLINT: the fixture's words

class Client {
 public:
  explicit Client(std::uint16_t port) : socket_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(port);
    const timeval patience = {60, 0};
    setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    if (connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
      ADD_FAILURE() << "cannot connect";
    }
  }
  ~Client() { close(socket_); }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  void Send(const std::string& text) {
    EXPECT_EQ(send(socket_, text.data(), text.size(), MSG_NOSIGNAL), static_cast<ssize_t>(text.size()));
  }
  // "" at the end of the connection.
  std::string Line() {
    std::size_t end;
    while ((end = buffer_.find('\n')) == buffer_.npos) {
      if (!Fill()) return "";
    }
    return Take(end + 1);
  }
  std::string Ask(const std::string& request) {
    Send(request + "\n");
    std::string answer = Line();
    if (answer.rfind("VALUE ", 0) != 0) return answer;
    const std::size_t size = std::stoul(answer.substr(6)) + 1;
    while (buffer_.size() < size && Fill()) {
    }
    return answer + Take(size);
  }
  std::string Set(const std::string& key, const std::string& value) {
    return Ask("SET " + key + " " + std::to_string(value.size()) + "\n" + value);
  }

 private:
  bool Fill() {
    char chunk[4096];
    const ssize_t count = recv(socket_, chunk, sizeof(chunk), 0);
    if (count > 0) buffer_.append(chunk, static_cast<std::size_t>(count));
    return count > 0;
  }
  std::string Take(std::size_t size) {
    std::string taken = buffer_.substr(0, size);
    buffer_.erase(0, size);
    return taken;
  }

  const int socket_;
  std::string buffer_;
};

class KvServerTest : public ::testing::Test {
 protected:
  KvServerTest() {
    char name[] = "/tmp/freehold-kv-test-XXXXXX";
    if (mkdtemp(name) == nullptr) std::abort();
    directory_ = name;
    file_ = directory_ + "/table";
  }
  ~KvServerTest() override {
    Stop();
    std::filesystem::remove_all(directory_);
  }

  void Start() {
    server_ = std::make_unique<Server>(*space_, file_);
    ASSERT_EQ(server_->Load(), "");
    ASSERT_EQ(server_->Listen(0), "");
    thread_ = std::thread([this] { server_->Run(); });
  }
  void Stop() {
    if (!thread_.joinable()) return;
    server_->Stop();
    thread_.join();
    server_.reset();
  }
  Client Connect() { return Client(server_->port()); }

  vm::os::LinuxKernel kernel_;
  TestSpace space_{kernel_};
  std::string directory_;
  std::string file_;
  std::unique_ptr<Server> server_;
  std::thread thread_;
};

TEST_F(KvServerTest, Protocol) {
  Start();
  Client client(server_->port());
  EXPECT_EQ(client.Ask("GET a"), "NOT_FOUND\n");
  EXPECT_EQ(client.Set("a", "one"), "OK\n");
  EXPECT_EQ(client.Ask("GET a"), "VALUE 3\none\n");
  EXPECT_EQ(client.Ask("GET a\r"), "VALUE 3\none\n");
  EXPECT_EQ(client.Set("a", "a\nGET b\n"), "OK\n");
  EXPECT_EQ(client.Ask("GET a"), "VALUE 8\na\nGET b\n\n");
  EXPECT_EQ(client.Set("empty", ""), "OK\n");
  EXPECT_EQ(client.Ask("GET empty"), "VALUE 0\n\n");
  const std::string large(3'000'000, 'x');
  EXPECT_EQ(client.Set("large", large), "OK\n");
  EXPECT_EQ(client.Ask("GET large"), "VALUE 3000000\n" + large + "\n");
  EXPECT_EQ(client.Ask("COUNT"), "COUNT 3\n");
  EXPECT_EQ(client.Ask("DEL large"), "OK\n");
  EXPECT_EQ(client.Ask("DEL large"), "NOT_FOUND\n");
  for (const char* wrong : {"", "HELLO", "GET", "GET a b", "DEL", "SAVE now", "SET a", "get a"}) {
    EXPECT_EQ(client.Ask(wrong), "ERROR wrong command\n") << wrong;
  }
  EXPECT_EQ(client.Ask("GET " + std::string(kMaxKeyBytes + 1, 'k')), "ERROR wrong command\n");
  client.Send("QUIT\n");
  EXPECT_EQ(client.Line(), "");
}

// Where the server cannot know what comes next, it hangs up.
TEST_F(KvServerTest, HangsUp) {
  Start();
  for (const char* wrong : {"SET a x\n", "SET a -1\n", "SET a 99999999999\n", "SET a 99999999999999999999999\n"}) {
    Client client(server_->port());
    client.Send(wrong);
    EXPECT_EQ(client.Line(), "ERROR wrong key or size\n") << wrong;
    EXPECT_EQ(client.Line(), "");
  }
  Client longer(server_->port());
  longer.Send("SET a 2\nabc\n");
  EXPECT_EQ(longer.Line(), "");
  Client endless(server_->port());
  endless.Send(std::string(5000, 'e'));
  EXPECT_EQ(endless.Line(), "");
}

TEST_F(KvServerTest, SavesAndLoads) {
  Start();
  {
    Client client(server_->port());
    EXPECT_EQ(client.Ask("SAVE"), "SAVED 0 0\n");
    client.Set("key", "line\nline");
    client.Set("empty", "");
    client.Set("large", std::string(2'000'000, 'x'));
    EXPECT_EQ(client.Ask("SAVE").rfind("SAVED 3 ", 0), 0u);
  }
  Stop();
  Start();
  Client client(server_->port());
  EXPECT_EQ(client.Ask("COUNT"), "COUNT 3\n");
  EXPECT_EQ(client.Ask("GET key"), "VALUE 9\nline\nline\n");
  EXPECT_EQ(client.Ask("GET empty"), "VALUE 0\n\n");
  EXPECT_EQ(client.Ask("GET large").size(), sizeof("VALUE 2000000\n") - 1 + 2'000'001);
}

TEST_F(KvServerTest, RefusesFilesOfOthers) {
  for (const char* text : {"no newline", "nosize\n", " 3\nabc\n", "key 3\nab", "key 3\nabc", "key 3\nabcd",
                           "key x\nabc\n", "key 3\nabc\nmore\n", "key 18446744073709551615\nabc\n"}) {
    std::ofstream(file_) << text;
    Server server(*space_, file_);
    EXPECT_EQ(server.Load(), file_ + ": not a saved table") << text;
  }
  Server directory(*space_, directory_);
  EXPECT_NE(directory.Load(), "");
}

TEST_F(KvServerTest, SaysWhyItCannotSave) {
  file_ = directory_ + "/missing/table";
  Start();
  EXPECT_EQ(Connect().Ask("SAVE"), "ERROR " + file_ + ".new: No such file or directory\n");
  Stop();
  file_ = "";
  server_ = std::make_unique<Server>(*space_, file_);
  ASSERT_EQ(server_->Listen(0), "");
  thread_ = std::thread([this] { server_->Run(); });
  EXPECT_EQ(Connect().Ask("SAVE"), "ERROR no file to save to\n");
  Server second(*space_, file_);  // the port is taken
  EXPECT_NE(second.Listen(server_->port()), "");
}

// Every writer sets "N.first" to a number and then "N.second" to the same: a snapshot of one moment finds them equal,
// or the first one ahead by one.
TEST_F(KvServerTest, ASnapshotIsOfOneMoment) {
  Start();
  constexpr int kWriters = 3;
  std::atomic<bool> stop{false};
  std::vector<std::thread> writers;
  for (int writer = 0; writer < kWriters; ++writer) {
    writers.emplace_back([&, name = std::to_string(writer)] {
      Client client(server_->port());
      const std::string padding(2000, ' ');
      for (int number = 0; !stop.load(std::memory_order_relaxed); ++number) {
        EXPECT_EQ(client.Set(name + ".first", std::to_string(number) + padding), "OK\n");
        EXPECT_EQ(client.Set(name + ".second", std::to_string(number) + padding), "OK\n");
        // The table grows while it is copied.
        EXPECT_EQ(client.Set(name + "." + std::to_string(number % 500), padding), "OK\n");
      }
    });
  }
  {
    Client client(server_->port());
    for (int save = 0; save < 20; ++save) {
      ASSERT_EQ(client.Ask("SAVE").rfind("SAVED ", 0), 0u);
      std::ostringstream text;
      text << std::ifstream(file_).rdbuf();
      Table saved;
      ASSERT_TRUE(saved.Add(text.str()));
      for (int writer = 0; writer < kWriters; ++writer) {
        const std::string name = std::to_string(writer);
        const auto first = saved.Get(name + ".first");
        const auto second = saved.Get(name + ".second");
        if (!second) continue;  // it has just begun
        const int ahead = std::stoi(*first) - std::stoi(*second);
        EXPECT_TRUE(ahead == 0 || ahead == 1) << *first << *second;
      }
    }
  }
  stop.store(true, std::memory_order_relaxed);
  for (std::thread& writer : writers) writer.join();
  Stop();
  EXPECT_EQ(space_->Stats().vmas, 0u);  // every buffer has gone back
}

TEST_F(KvServerTest, StopsWithConnectionsOpen) {
  Start();
  Client idle(server_->port());
  Client busy(server_->port());
  EXPECT_EQ(busy.Ask("COUNT"), "COUNT 0\n");
  Stop();
  EXPECT_EQ(idle.Line(), "");
}

// ---- the program ----

class Program {
 public:
  explicit Program(const std::string& file) {
    int ends[2];
    if (pipe(ends) != 0) std::abort();
    const std::string path = testing::BuiltFile("examples/kv_server/kv_server");
    const std::string argument = "--file=" + file;
    process_ = fork();
    if (process_ == 0) {
      dup2(ends[1], 1);
      close(ends[0]);
      execl(path.c_str(), path.c_str(), argument.c_str(), nullptr);
      _exit(127);
    }
    close(ends[1]);
    std::FILE* out = fdopen(ends[0], "r");
    unsigned port = 0;
    EXPECT_EQ(std::fscanf(out, "listening on 127.0.0.1:%u", &port), 1);
    std::fclose(out);
    port_ = static_cast<std::uint16_t>(port);
  }
  int Stop() {
    kill(process_, SIGTERM);
    int status = 0;
    waitpid(process_, &status, 0);
    return status;
  }
  std::uint16_t port() const { return port_; }

 private:
  pid_t process_;
  std::uint16_t port_ = 0;
};

TEST_F(KvServerTest, TheProgram) {
  if (testing::BuiltWithSanitizer()) GTEST_SKIP() << "a sanitizer brings a malloc of its own";
  Program first(file_);
  Client(first.port()).Set("key", "value");
  EXPECT_EQ(Client(first.port()).Ask("SAVE"), "SAVED 1 12\n");
  EXPECT_EQ(first.Stop(), 0);
  Program second(file_);
  EXPECT_EQ(Client(second.port()).Ask("GET key"), "VALUE 5\nvalue\n");
  EXPECT_EQ(second.Stop(), 0);
}

TEST_F(KvServerTest, TheProgramsArguments) {
  if (testing::BuiltWithSanitizer()) GTEST_SKIP() << "a sanitizer brings a malloc of its own";
  const std::string program = testing::BuiltFile("examples/kv_server/kv_server");
  for (const char* wrong : {"--port=", "--port=x", "--port=65536", "--prot=1"}) {
    EXPECT_EQ(testing::RunProgram({.argv = {program, wrong}}).status, 2) << wrong;
  }
  std::ofstream(file_) << "something";
  const testing::Outcome outcome = testing::RunProgram({.argv = {program, "--file=" + file_}});
  EXPECT_EQ(outcome.status, 1);
  EXPECT_EQ(outcome.err, "kv_server: " + file_ + ": not a saved table\n");
}

}  // namespace
}  // namespace freehold::examples
