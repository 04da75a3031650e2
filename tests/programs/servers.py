"""Servers under test: started on a free loopback port, reached by minimal clients, always ended."""

import contextlib
import csv
import json
import os
import pathlib
import signal
import socket
import subprocess
import time

from harness import WORKLOADS, Failure, end_session, require, resident_bytes, tail


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server process that listens on `port`. Subclasses say how it is asked for its process id."""

    START_TIMEOUT_S = 30
    STOP_TIMEOUT_S = 30

    def __init__(self, launcher, directory, command, before=()):
        """`command` makes the argument list from a port."""
        self.port = free_port()
        self._launcher = launcher
        self._log = open(directory / "server.log", "ab")
        self._process = launcher.start(command(self.port), cwd=directory, before=before,
                                       stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        try:
            self._wait_until_it_listens(directory)
            self.pid = self.read_pid()
            launcher.require_mapped(self.pid)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        end_session(self._process)
        self._log.close()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def resident_bytes(self):
        return resident_bytes(self.pid)

    STOP_SIGNAL = signal.SIGTERM

    def stop(self):
        """Ends the server by a signal, as an operator would. Returns its exit status."""
        os.kill(self.pid, self.STOP_SIGNAL)
        try:
            return self._process.wait(self.STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise Failure(f"{self._launcher.name}: the server does not end") from error

    def read_pid(self):
        raise NotImplementedError

    def read_pid_file(self, path):
        """The process id in the first line of a file that the server writes once it listens."""
        deadline = time.monotonic() + self.START_TIMEOUT_S
        while True:
            with contextlib.suppress(FileNotFoundError, IndexError):
                return int(path.read_text().split()[0])
            require(time.monotonic() < deadline, f"the server writes no {path.name}")
            time.sleep(0.02)

    def _wait_until_it_listens(self, directory):
        deadline = time.monotonic() + self.START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(ConnectionError), self.connect():
                return
            time.sleep(0.02)
        log = (directory / "server.log").read_text(errors="replace")
        raise Failure(f"{self._launcher.name}: the server did not start: {log[-500:]!r}")


class ReplyError(str):
    """An error reply; compares by its text."""


class RedisConnection:
    """A RESP client: one command or a pipeline of them at a time, replies as Python values."""

    def __init__(self, sock):
        self._socket = sock
        self._file = sock.makefile("rb", buffering=1 << 16)

    def __call__(self, *words):
        return self.pipeline([words])[0]

    def pipeline(self, commands, batch=500):
        replies = []
        for start in range(0, len(commands), batch):
            part = commands[start:start + batch]
            self._socket.sendall(b"".join(map(_encode, part)))
            replies.extend(self._read() for _ in part)
        return replies

    def checked(self, *words):
        """One command whose reply must not be an error."""
        reply = self(*words)
        require(not isinstance(reply, ReplyError), f"redis: {words[0]}: {reply}")
        return reply

    def close(self):
        self._file.close()
        self._socket.close()

    def _read(self):
        line = self._file.readline()
        require(line.endswith(b"\r\n"), "redis closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"+":
            return rest
        if kind == b"-":
            return ReplyError(rest.decode())
        if kind == b":":
            return int(rest)
        if kind == b"$":
            if rest == b"-1":
                return None
            return self._file.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return None if rest == b"-1" else [self._read() for _ in range(int(rest))]
        raise Failure(f"redis: unknown reply {line!r}")


def _encode(words):
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%s\r\n" % (len(data), data))
    return b"".join(parts)


class RedisServer(Server):
    """redis-server in `directory`, which holds its dump and its append-only file."""

    def __init__(self, launcher, directory, *options, before=()):
        fixed = ["--bind", "127.0.0.1", "--protected-mode", "no", "--daemonize", "no", "--save", "",
                 "--enable-debug-command", "local"]
        super().__init__(launcher, directory,
                         lambda port: ["redis-server", "--port", str(port), *fixed, *options], before)

    def client(self):
        return RedisConnection(self.connect())

    def read_pid(self):
        self._wait_until_loaded()
        return int(self.info()["process_id"])

    def info(self):
        client = self.client()
        try:
            text = client.checked("INFO").decode()
        finally:
            client.close()
        return dict(line.split(":", 1) for line in text.split("\r\n") if ":" in line)

    def _wait_until_loaded(self):
        deadline = time.monotonic() + self.START_TIMEOUT_S
        while self.info()["loading"] != "0":
            require(time.monotonic() < deadline, "redis still loads its data")
            time.sleep(0.05)


def benchmark_rates(launcher, directory, server, *options, before=()):
    """Runs redis-benchmark against a server; requests per second by test."""
    outcome = launcher.run(["redis-benchmark", "-p", str(server.port), "--csv", *options], cwd=directory,
                           before=before, timeout=600)
    require(outcome.status == 0 and b"rror" not in outcome.stdout + outcome.stderr,
            f"redis-benchmark: {tail(outcome)}")
    rows = csv.DictReader(outcome.stdout.decode().splitlines())
    return {row["test"]: float(row["rps"]) for row in rows}


class MemcachedServer(Server):
    """memcached with room for everything the load stores."""

    def __init__(self, launcher, directory, threads=4, before=()):
        super().__init__(launcher, directory, lambda port: [
            "memcached", "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-u", "root", "-m", "1024",
            "-I", "4m", "-t", str(threads)], before)

    def read_pid(self):
        return int(self.stats()["pid"])

    def stats(self):
        with self.connect() as sock, sock.makefile("rb") as replies:
            sock.sendall(b"stats\r\n")
            words = (line.split() for line in iter(replies.readline, b"END\r\n"))
            return {name.decode(): value.decode() for _, name, value in words}


class NginxServer(Server):
    """nginx with a master and worker processes that serves the files below `root`: as they are, compressed
    where asked for, and below /proxied/ through itself as an upstream server."""

    CONFIGURATION = """
daemon off;
worker_processes {workers};
pid nginx.pid;
error_log stderr warn;
{user}
events {{ worker_connections 512; }}
http {{
  include /etc/nginx/mime.types;
  access_log access.log;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  server_tokens off;
  keepalive_requests 1000000;
  gzip_types text/plain application/octet-stream;
  gzip_min_length 100;
  open_file_cache max=100;
  server {{
    listen 127.0.0.1:{port} backlog=511;
    root "{root}";
    gzip on;
    location /proxied/ {{ proxy_pass http://127.0.0.1:{port}/; proxy_buffers 16 4k; }}
    location /echo {{ client_max_body_size 8m; client_body_buffer_size 16k; proxy_pass http://127.0.0.1:{port}/ok; }}
    location /ok {{ return 200 "ok\n"; }}
  }}
}}
"""

    def __init__(self, launcher, directory, root, workers=2, before=()):
        def command(port):
            user = "user root;" if os.geteuid() == 0 else ""
            text = self.CONFIGURATION.format(port=port, root=root, workers=workers, user=user)
            (directory / "nginx.conf").write_text(text)
            return ["nginx", "-e", "stderr", "-p", directory, "-c", "nginx.conf"]

        self._pid_file = directory / "nginx.pid"
        self._pid_file.unlink(missing_ok=True)
        super().__init__(launcher, directory, command, before)

    def read_pid(self):
        return self.read_pid_file(self._pid_file)


def wrk(launcher, directory, port, path, *, seconds, connections=32, before=()):
    """Loads an HTTP server; what workloads/wrk_report.lua prints."""
    outcome = launcher.run(
        ["wrk", "-t", "1", "-c", str(connections), "-d", f"{seconds}s", "-s", WORKLOADS / "wrk_report.lua",
         f"http://127.0.0.1:{port}{path}"], cwd=directory, before=before, timeout=seconds + 60)
    require(outcome.status == 0, f"wrk: {tail(outcome)}")
    return json.loads(outcome.stdout.decode().strip().rpartition("\n")[2])


def postgres_program(name):
    """The path of a program of the newest PostgreSQL; Debian keeps them out of PATH."""
    found = sorted(pathlib.Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    require(found, f"{name} is not installed")
    return found[-1]


class PostgresServer(Server):
    """PostgreSQL with a database of its own in `directory`, which is made if it is not there.

    The server refuses to run as root. As root it gets a user namespace without a map, in which it is
    nobody, owns what root owns and may do no more."""

    UNPRIVILEGED = ["unshare", "--user"] if os.geteuid() == 0 else []
    STOP_SIGNAL = signal.SIGINT  # In good order; SIGTERM would wait for clients.

    def __init__(self, launcher, directory, *settings, before=()):
        self._directory = directory
        self._data = directory / "data"
        self._before = [*before, *self.UNPRIVILEGED]
        if not self._data.exists():
            outcome = launcher.run(
                [postgres_program("initdb"), "-D", "data", "-U", "postgres", "--auth=trust", "--no-sync",
                 "--locale=C.UTF-8", "--encoding=UTF8"], cwd=directory, before=self._before)
            require(outcome.status == 0, f"initdb: {tail(outcome)}")
        fixed = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
        super().__init__(launcher, directory, lambda port: [
            postgres_program("postgres"), "-D", "data", "-p", str(port), *fixed, *settings], self._before)

    def read_pid(self):
        pid = self.read_pid_file(self._data / "postmaster.pid")
        self._wait_until_ready()
        return pid

    def psql(self, launcher, *arguments, stdin=b""):
        """psql's output as it is, without headings and alignment. Launched plain or not, as any client."""
        outcome = launcher.run([postgres_program("psql"), *self.address(), "-XAtq", "-v", "ON_ERROR_STOP=1",
                                *arguments], cwd=self._directory, stdin=stdin)
        require(outcome.status == 0, f"psql: {tail(outcome)}")
        return outcome.stdout

    def pgbench(self, launcher, *arguments, before=()):
        outcome = launcher.run([postgres_program("pgbench"), *self.address(), *arguments],
                               cwd=self._directory, before=before, timeout=600)
        require(outcome.status == 0, f"pgbench: {tail(outcome)}")
        return outcome.stdout.decode()

    def address(self):
        return ["-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-d", "postgres"]

    def _wait_until_ready(self):
        ready = [postgres_program("pg_isready"), "-q", *self.address()]
        deadline = time.monotonic() + self.START_TIMEOUT_S
        while subprocess.run(ready).returncode != 0:
            require(time.monotonic() < deadline and self._process.poll() is None, "postgres is not ready")
            time.sleep(0.05)
