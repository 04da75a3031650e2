// Load for a key-value server, in a closed loop over several connections, that checks every reply and times it.
//
//   kv_load redis|memcached PORT CONNECTIONS SECONDS
//
// Half of the requests store 100 to 2000 bytes under one of 100 000 keys, half read one; redis also gets lists and
// hashes. Prints one line of JSON: requests, seconds, latencies in microseconds.
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { kKeys = 100000, kMaxValue = 2000, kBuffer = 8192, kMaxConnections = 1024, kParts = 64, kBuckets = 64 * kParts };

typedef struct {
  int socket;
  int key;
  uint64_t sent_ns;
  size_t filled;
  char reply[kBuffer];
} Connection;

static int is_redis;
static Connection connections[kMaxConnections];
static uint64_t counts[kBuckets], total, worst_ns;
static uint64_t random_state = 88172645463325252ULL;

static void Fail(const char* what, const char* detail) {
  fprintf(stderr, "kv_load: %s: %.200s\n", what, detail);
  exit(1);
}

static uint64_t Random(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

static uint64_t NowNs(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

// A 64th of a power of two each; up to kParts, a nanosecond each.
static size_t Bucket(uint64_t ns) {
  if (ns < kParts) return ns;
  const size_t power = 63 - (size_t)__builtin_clzll(ns);
  return (power - 5) * kParts + ((ns >> (power - 6)) & (kParts - 1));
}

static uint64_t LastNs(size_t bucket) {
  if (bucket < kParts) return bucket;
  return ((uint64_t)(kParts + 1 + bucket % kParts) << (bucket / kParts - 1)) - 1;
}

static double QuantileUs(double share) {
  uint64_t left = (uint64_t)((double)total * (1 - share));
  for (size_t bucket = kBuckets; bucket-- > 0;) {
    if (counts[bucket] > left) return (double)LastNs(bucket) / 1000;
    left -= counts[bucket];
  }
  return 0;
}

static char Fill(int key) { return (char)('a' + key % 26); }

static size_t RedisRequest(char* out, int key, unsigned kind, size_t size, const char* value) {
  char name[32];
  const int length = snprintf(name, sizeof(name), "%s%d", kind < 80 ? "key" : kind < 90 ? "hash" : "list", kind < 80 ? key : key % 1000);
  if (kind < 40) return (size_t)sprintf(out, "*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n", length, name);
  if (kind < 80) return (size_t)sprintf(out, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%zu\r\n%s\r\n", length, name, size, value);
  if (kind < 90) {
    return (size_t)sprintf(out, "*4\r\n$4\r\nHSET\r\n$%d\r\n%s\r\n$2\r\n%02d\r\n$%zu\r\n%s\r\n", length, name, key % 100, size,
                           value);
  }
  if (kind < 95) return (size_t)sprintf(out, "*3\r\n$5\r\nLPUSH\r\n$%d\r\n%s\r\n$%zu\r\n%s\r\n", length, name, size, value);
  return (size_t)sprintf(out, "*2\r\n$4\r\nLPOP\r\n$%d\r\n%s\r\n", length, name);
}

static size_t MemcachedRequest(char* out, int key, unsigned kind, size_t size, const char* value) {
  if (kind < 50) return (size_t)sprintf(out, "get key%d\r\n", key);
  return (size_t)sprintf(out, "set key%d 0 0 %zu\r\n%s\r\n", key, size, value);
}

static void Send(Connection* connection) {
  char value[kMaxValue + 1], request[kBuffer];
  const int key = (int)(Random() % kKeys);
  const size_t size = 100 + Random() % (kMaxValue - 100);
  memset(value, Fill(key), size);
  value[size] = '\0';
  const unsigned kind = (unsigned)(Random() % 100);
  const size_t length = (is_redis ? RedisRequest : MemcachedRequest)(request, key, kind, size, value);
  // Lists hold values of all keys.
  connection->key = is_redis && kind >= 90 ? -1 : key;
  connection->filled = 0;
  connection->sent_ns = NowNs();
  if (send(connection->socket, request, length, MSG_NOSIGNAL) != (ssize_t)length) Fail("send", strerror(errno));
}

static void CheckValue(const Connection* connection, const char* value, size_t size) {
  const char expected = connection->key < 0 ? value[0] : Fill(connection->key);
  if (size < 100 || value[0] != expected || value[size / 2] != expected || value[size - 1] != expected) {
    Fail("wrong value", connection->reply);
  }
}

// Whether the reply is there as a whole. Ends the program if it is wrong.
static int IsComplete(Connection* connection) {
  connection->reply[connection->filled] = '\0';
  const char* end = strstr(connection->reply, "\r\n");
  if (end == NULL) return 0;
  const char* body = end + 2;
  const char* reply = connection->reply;
  if (is_redis) {
    if (reply[0] == '+' || reply[0] == ':' || strncmp(reply, "$-1\r\n", 5) == 0) return 1;
    if (reply[0] != '$') Fail("wrong reply", reply);
    const size_t size = strtoul(reply + 1, NULL, 10);
    if (connection->filled < (size_t)(body - reply) + size + 2) return 0;
    CheckValue(connection, body, size);
    return 1;
  }
  if (strncmp(reply, "STORED\r\n", 8) == 0 || strncmp(reply, "END\r\n", 5) == 0) return 1;
  size_t size;
  if (sscanf(reply, "VALUE key%*d 0 %zu", &size) != 1) Fail("wrong reply", reply);
  if (connection->filled < (size_t)(body - reply) + size + 7) return 0;
  CheckValue(connection, body, size);
  return 1;
}

static void Receive(Connection* connection, int counted) {
  const ssize_t got =
      recv(connection->socket, connection->reply + connection->filled, kBuffer - 1 - connection->filled, 0);
  if (got <= 0) Fail("recv", got == 0 ? "the server closed the connection" : strerror(errno));
  connection->filled += (size_t)got;
  if (!IsComplete(connection)) return;
  const uint64_t took = NowNs() - connection->sent_ns;
  if (counted) {
    ++counts[Bucket(took)];
    ++total;
    if (took > worst_ns) worst_ns = took;
  }
  Send(connection);
}

static void Connect(Connection* connection, int port, int epoll) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
  connection->socket = socket(AF_INET, SOCK_STREAM, 0);
  const int on = 1;
  setsockopt(connection->socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  if (connect(connection->socket, (struct sockaddr*)&address, sizeof(address)) != 0) Fail("connect", strerror(errno));
  struct epoll_event event = {.events = EPOLLIN, .data = {.ptr = connection}};
  if (epoll_ctl(epoll, EPOLL_CTL_ADD, connection->socket, &event) != 0) Fail("epoll_ctl", strerror(errno));
}

int main(int argc, char** argv) {
  if (argc != 5) Fail("usage", "kv_load redis|memcached PORT CONNECTIONS SECONDS");
  is_redis = strcmp(argv[1], "redis") == 0;
  const int count = atoi(argv[3]);
  if (count < 1 || count > kMaxConnections) Fail("usage", "1 to 1024 connections");
  const int epoll = epoll_create1(0);
  for (int i = 0; i < count; ++i) Connect(&connections[i], atoi(argv[2]), epoll);
  // The first second, in which keys are new and caches cold, does not count.
  const uint64_t begin = NowNs() + 1000000000, end = begin + (uint64_t)(atof(argv[4]) * 1e9);
  for (int i = 0; i < count; ++i) Send(&connections[i]);
  for (uint64_t now = NowNs(); now < end; now = NowNs()) {
    struct epoll_event events[64];
    const int ready = epoll_wait(epoll, events, 64, 1000);
    for (int i = 0; i < ready; ++i) Receive(events[i].data.ptr, now >= begin);
  }
  printf("{\"requests\": %llu, \"seconds\": %.6f, \"p50\": %.3f, \"p99\": %.3f, \"p99.9\": %.3f, \"max\": %.3f}\n",
         (unsigned long long)total, (double)(NowNs() - begin) / 1e9, QuantileUs(0.5), QuantileUs(0.99), QuantileUs(0.999),
         (double)worst_ns / 1000);
  return 0;
}
