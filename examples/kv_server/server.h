// A key-value server on the loopback interface, a thread for each connection. Requests and answers are lines; values
// come behind them, as they are, with a newline at their end that does not count:
//
//     SET KEY BYTES   and the value              OK
//     GET KEY                                    VALUE BYTES and the value, or NOT_FOUND
//     DEL KEY                                    OK or NOT_FOUND
//     COUNT                                      COUNT ENTRIES
//     SAVE                                       SAVED ENTRIES BYTES
//     QUIT                                       ends the connection
//
// Whatever else comes gets "ERROR WHY", and the connection ends if what follows cannot be told from a value.
//
// Thread safety: Stop is thread-safe; the rest is for one thread.
#ifndef FREEHOLD_EXAMPLES_KV_SERVER_SERVER_H_
#define FREEHOLD_EXAMPLES_KV_SERVER_SERVER_H_

#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "examples/kv_server/table.h"
#include "vm/address_space.h"

namespace freehold::examples {

inline constexpr std::size_t kMaxKeyBytes = 250;
inline constexpr std::size_t kMaxValueBytes = 64 << 20;

class Server {
 public:
  // `space` outlives the server, and is where snapshots are made. SAVE writes to `file`; with "" it is refused.
  Server(vm::AddressSpace& space, std::string file) : space_(space), file_(std::move(file)) {}
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // Reads what was saved; a file that is not there is an empty one. Returns what is wrong, or "".
  std::string Load();
  // Listens on 127.0.0.1; port 0: any. Returns what is wrong, or "".
  std::string Listen(std::uint16_t port);
  std::uint16_t port() const { return port_; }
  // Serves until Stop. REQUIRES: Listen() returned "".
  void Run();
  // Ends Run and all connections; from a signal handler too.
  void Stop();

  const Table& table() const { return table_; }

 private:
  struct Connection {
    int socket = -1;
    bool done = false;  // guarded by connections_mutex_
    std::thread thread;
  };

  void Accept();
  void Serve(Connection& connection);
  // Joins the threads of connections that ended; or of all.
  void Reap(bool all);
  // What SAVE answers.
  std::string Save();

  vm::AddressSpace& space_;
  const std::string file_;
  Table table_;
  std::mutex save_mutex_;  // one at a time writes the file
  int listener_ = -1;
  int stop_event_ = -1;
  std::uint16_t port_ = 0;
  std::mutex connections_mutex_;
  std::list<Connection> connections_;  // guarded by connections_mutex_
};

}  // namespace freehold::examples

#endif  // FREEHOLD_EXAMPLES_KV_SERVER_SERVER_H_
