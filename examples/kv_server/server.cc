#include "examples/kv_server/server.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <optional>
#include <string_view>
#include <system_error>
#include <vector>

namespace freehold::examples {
namespace {

constexpr std::size_t kMaxLineBytes = 512;
// How often what the space has free is looked at.
constexpr int kTickMilliseconds = 250;

std::string Problem(const std::string& what) { return what + ": " + std::strerror(errno); }

// Closes in its destructor.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  const int fd_;
};

bool WriteAll(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = write(fd, text.data(), text.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    text.remove_prefix(static_cast<std::size_t>(count));
  }
  return true;
}

bool SendAll(int socket, std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = send(socket, text.data(), text.size(), MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    text.remove_prefix(static_cast<std::size_t>(count));
  }
  return true;
}

// What a connection sends, line by line and value by value.
class Reader {
 public:
  explicit Reader(int socket) : socket_(socket) {}

  // Without its newline. Nothing at the end of the connection, or of patience with the line's length.
  std::optional<std::string> Line() {
    std::size_t end;
    while ((end = buffer_.find('\n')) == buffer_.npos) {
      if (buffer_.size() > kMaxLineBytes || !Fill()) return std::nullopt;
    }
    std::string line = buffer_.substr(0, end);
    buffer_.erase(0, end + 1);
    if (!line.empty() && line.back() == '\r') line.pop_back();
    return line;
  }

  // `size` bytes, and a newline that is dropped.
  std::optional<std::string> Value(std::size_t size) {
    while (buffer_.size() < size + 1) {
      if (!Fill()) return std::nullopt;
    }
    if (buffer_[size] != '\n') return std::nullopt;
    std::string value = buffer_.substr(0, size);
    buffer_.erase(0, size + 1);
    return value;
  }

 private:
  bool Fill() {
    char chunk[16384];
    for (;;) {
      const ssize_t count = recv(socket_, chunk, sizeof(chunk), 0);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) return false;
      buffer_.append(chunk, static_cast<std::size_t>(count));
      return true;
    }
  }

  const int socket_;
  std::string buffer_;
};

std::vector<std::string> Words(const std::string& line) {
  std::vector<std::string> words;
  for (std::size_t at = 0; at < line.size();) {
    const std::size_t end = std::min(line.find(' ', at), line.size());
    if (end > at) words.push_back(line.substr(at, end - at));
    at = end + 1;
  }
  return words;
}

std::optional<std::size_t> Number(const std::string& text) {
  std::size_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}

}  // namespace

Server::~Server() {
  if (listener_ >= 0) close(listener_);
  if (stop_event_ >= 0) close(stop_event_);
}

std::string Server::Load() {
  const Descriptor file(open(file_.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0) return errno == ENOENT ? "" : Problem(file_);
  struct stat facts;
  if (fstat(file.get(), &facts) != 0) return Problem(file_);
  if (facts.st_size == 0) return "";
  const std::size_t size = static_cast<std::size_t>(facts.st_size);
  const vm::Result<vm::PageRange> mapped =
      space_.MapFile(vm::PagesFor({size}), {.descriptor = file.get(), .offset = {}, .populate = true});
  if (!mapped.ok()) return file_ + ": " + std::strerror(vm::ToErrno(mapped.error()));
  const bool good = table_.Add({reinterpret_cast<const char*>(mapped->address()), size});
  (void)space_.Unmap(*mapped);
  return good ? "" : file_ + ": not a saved table";
}

std::string Server::Listen(std::uint16_t port) {
  stop_event_ = eventfd(0, EFD_CLOEXEC);
  listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (stop_event_ < 0 || listener_ < 0) return Problem("socket");
  const int one = 1;
  setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  socklen_t size = sizeof(address);
  if (bind(listener_, reinterpret_cast<sockaddr*>(&address), size) != 0 || listen(listener_, 128) != 0 ||
      getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    return Problem("port " + std::to_string(port));
  }
  port_ = ntohs(address.sin_port);
  return "";
}

void Server::Run() {
  for (;;) {
    pollfd waiting[] = {{listener_, POLLIN, 0}, {stop_event_, POLLIN, 0}};
    if (poll(waiting, 2, kTickMilliseconds) < 0 && errno != EINTR) break;
    if (waiting[1].revents != 0) break;
    if (waiting[0].revents != 0) Accept();
    Reap(false);
    space_.Tick();
  }
  {
    const std::lock_guard lock(connections_mutex_);
    for (const Connection& connection : connections_) {
      if (!connection.done) shutdown(connection.socket, SHUT_RDWR);
    }
  }
  Reap(true);
}

void Server::Stop() {
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(stop_event_, &one, sizeof(one));
}

void Server::Accept() {
  const int socket = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
  if (socket < 0) return;
  const int one = 1;
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  const std::lock_guard lock(connections_mutex_);
  Connection& connection = connections_.emplace_back();
  connection.socket = socket;
  try {
    connection.thread = std::thread([this, &connection] {
      Serve(connection);
      const std::lock_guard done_lock(connections_mutex_);
      close(connection.socket);
      connection.done = true;
    });
  } catch (const std::system_error&) {  // too many threads
    SendAll(socket, "ERROR too many connections\n");
    close(socket);
    connections_.pop_back();
  }
}

void Server::Reap(bool all) {
  std::list<Connection> ended;
  {
    const std::lock_guard lock(connections_mutex_);
    for (auto at = connections_.begin(); at != connections_.end();) {
      const auto next = std::next(at);
      if (all || at->done) ended.splice(ended.end(), connections_, at);
      at = next;
    }
  }
  for (Connection& connection : ended) connection.thread.join();
}

void Server::Serve(Connection& connection) {
  const int socket = connection.socket;
  Reader reader(socket);
  while (const std::optional<std::string> line = reader.Line()) {
    const std::vector<std::string> words = Words(*line);
    const std::string command = words.empty() ? "" : words[0];
    const bool key = words.size() >= 2 && words[1].size() <= kMaxKeyBytes;
    std::string answer;
    if (command == "SET" && words.size() == 3) {
      // What follows is a value, whether it is wanted or not.
      const std::optional<std::size_t> size = Number(words[2]);
      if (!size || *size > kMaxValueBytes || !key) {
        SendAll(socket, "ERROR wrong key or size\n");
        return;
      }
      std::optional<std::string> value = reader.Value(*size);
      if (!value) return;
      table_.Set(words[1], std::move(*value));
      answer = "OK\n";
    } else if (command == "GET" && words.size() == 2 && key) {
      const std::optional<std::string> value = table_.Get(words[1]);
      answer = value ? "VALUE " + std::to_string(value->size()) + "\n" + *value + "\n" : "NOT_FOUND\n";
    } else if (command == "DEL" && words.size() == 2 && key) {
      answer = table_.Delete(words[1]) ? "OK\n" : "NOT_FOUND\n";
    } else if (command == "COUNT" && words.size() == 1) {
      answer = "COUNT " + std::to_string(table_.entries()) + "\n";
    } else if (command == "SAVE" && words.size() == 1) {
      answer = Save();
    } else if (command == "QUIT" && words.size() == 1) {
      return;
    } else {
      answer = "ERROR wrong command\n";
    }
    if (!SendAll(socket, answer)) return;
  }
}

std::string Server::Save() {
  if (file_.empty()) return "ERROR no file to save to\n";
  std::optional<Snapshot> snapshot;
  if (const vm::Error error = table_.Copy(space_, snapshot); !error.ok()) {
    return std::string("ERROR ") + vm::ToString(error.code) + "\n";
  }
  // The table goes on changing. The file is the old one until the new one is complete.
  const std::lock_guard lock(save_mutex_);
  const std::string unfinished = file_ + ".new";
  const auto failed = [&] {
    const std::string answer = "ERROR " + Problem(unfinished) + "\n";
    unlink(unfinished.c_str());
    return answer;
  };
  {
    const Descriptor file(open(unfinished.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    if (file.get() < 0 || !WriteAll(file.get(), snapshot->text()) || fsync(file.get()) != 0) return failed();
  }
  if (rename(unfinished.c_str(), file_.c_str()) != 0) return failed();
  return "SAVED " + std::to_string(snapshot->entries()) + " " + std::to_string(snapshot->text().size()) + "\n";
}

}  // namespace freehold::examples
