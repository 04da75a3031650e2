"""Loads for `throughput`: each starts a server under a launcher, loads it and counts."""

import contextlib
import json
import os
import pathlib

from generated import text_lines
from harness import compile_c, descendants, require, tail
from servers import MemcachedServer, NginxServer, PostgresServer, RedisServer, wrk


def pinning():
    """Words that pin the server and those that pin its load; none where there is one CPU only."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        return [], []
    return ["taskset", "-c", str(cpus[0])], ["taskset", "-c", str(cpus[1])]


def cpu_seconds(pid):
    """Of a process, its children that ended and all processes below it."""
    ticks = 0
    for each in descendants(pid):
        with contextlib.suppress(OSError):  # Its parent counts it, once it is gone.
            fields = pathlib.Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def proportional_bytes(pid):
    """Resident bytes of a process and all below it; what several share counts in parts."""
    kibibytes = 0
    for each in descendants(pid):
        with contextlib.suppress(OSError):  # Gone meanwhile.
            lines = pathlib.Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
            kibibytes += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kibibytes << 10


class Load:
    """One kind of server and its load. Subclasses start the server and load it."""

    def __init__(self, plain, scratch):
        """`plain` starts the load."""
        self.plain = plain
        self.scratch = scratch
        self.server_pin, self.load_pin = pinning()

    def measure(self, launcher, directory, seconds):
        """One run: requests per second, latencies, server CPU time a request, resident bytes."""
        with self.server(launcher, directory) as server:
            launcher.require_mapped(server.pid)
            before = cpu_seconds(server.pid)
            found = self.run(server, directory, seconds)
            cpu = cpu_seconds(server.pid) - before
            requests = found["requests"]
            require(requests > 0, "the load made no request")
            return {"throughput": requests / found["seconds"], "p50_us": found["p50"], "p99_us": found["p99"],
                    "p99.9_us": found["p99.9"], "max_us": found["max"],
                    "server_cpu_us": cpu / found.get("all", requests) * 1e6,
                    "rss": proportional_bytes(server.pid)}

    def server(self, launcher, directory):
        raise NotImplementedError

    def run(self, server, directory, seconds):
        raise NotImplementedError


class KeyValueLoad(Load):
    """workloads/kv_load.c, whose first second does not count."""

    def __init__(self, plain, scratch):
        super().__init__(plain, scratch)
        self._program = compile_c(plain, scratch, "kv_load", "-O2")

    def run(self, server, directory, seconds):
        outcome = self.plain.run([self._program, self.PROTOCOL, str(server.port), str(self.CONNECTIONS), str(seconds)],
                                 cwd=directory, before=self.load_pin, timeout=seconds + 60)
        require(outcome.status == 0, f"kv_load: {tail(outcome)}")
        found = json.loads(outcome.stdout)
        # The server worked in the first second, too.
        return {**found, "all": found["requests"] * (seconds + 1) / seconds}


class RedisLoad(KeyValueLoad):
    PROTOCOL, CONNECTIONS = "redis", 50

    def server(self, launcher, directory):
        return RedisServer(launcher, directory, before=self.server_pin)


class MemcachedLoad(KeyValueLoad):
    PROTOCOL, CONNECTIONS = "memcached", 50

    def server(self, launcher, directory):
        # One, as it has one CPU: the tail of several would be what the scheduler does with them.
        return MemcachedServer(launcher, directory, threads=1, before=self.server_pin)


class NginxLoad(Load):
    CONNECTIONS = 32

    def __init__(self, plain, scratch):
        super().__init__(plain, scratch)
        self._root = scratch / "root"
        self._root.mkdir()
        (self._root / "file.txt").write_bytes(text_lines(20 << 10, seed=1))

    def server(self, launcher, directory):
        return NginxServer(launcher, directory, self._root, workers=1, before=self.server_pin)

    def run(self, server, directory, seconds):
        path = "/proxied/file.txt"
        warming = wrk(self.plain, directory, server.port, path, seconds=1, before=self.load_pin)
        found = wrk(self.plain, directory, server.port, path, seconds=seconds, connections=self.CONNECTIONS,
                    before=self.load_pin)
        require(found["errors"] == 0, f"wrk: {found}")
        return {**found, "all": found["requests"] + warming["requests"]}


class PostgresLoad(Load):
    CLIENTS = 4

    def server(self, launcher, directory):
        server = PostgresServer(launcher, directory, "-c", "shared_buffers=64MB", "-c", "checkpoint_timeout=1h",
                                "-c", "autovacuum=off", before=self.server_pin)
        try:
            server.pgbench(self.plain, "-i", "-s", "5", "-q")
        except BaseException:
            server.close()
            raise
        return server

    def run(self, server, directory, seconds):
        load = ["-c", str(self.CLIENTS), "-j", "1", "-b", "tpcb-like", "--random-seed=1"]
        server.pgbench(self.plain, *load, "-T", "1", before=self.load_pin)
        server.pgbench(self.plain, *load, "-T", str(seconds), "--log", "--log-prefix=transactions", before=self.load_pin)
        # client, transaction, microseconds, script, seconds and microseconds of its end
        rows = [line.split() for log in directory.glob("transactions.*") for line in log.read_text().splitlines()]
        times = sorted(int(row[2]) for row in rows)
        require(times, "pgbench logged nothing")
        at = lambda share: times[min(len(times) - 1, int(len(times) * share))]
        return {"requests": len(times), "seconds": seconds, "p50": at(0.5), "p99": at(0.99), "p99.9": at(0.999),
                "max": times[-1]}


LOADS = {"redis": RedisLoad, "memcached": MemcachedLoad, "nginx": NginxLoad, "postgresql": PostgresLoad}
