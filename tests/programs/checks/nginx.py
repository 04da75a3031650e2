"""nginx: a master and workers, every reply compared; reloads under wrk."""

import http.client
import os
import signal
import time

from generated import text_lines
from harness import check, descendants, require, require_same, require_same_mapping
from servers import NginxServer, wrk

SIZES = {"empty": 0, "small": 300, "medium": 60_000, "large": 3_000_000}
REQUESTS = [
    (method, prefix + name, headers)
    for prefix in ("/", "/proxied/") for name in (*(f"{size}.txt" for size in SIZES), "missing")
    for method, headers in (("GET", {}), ("HEAD", {}), ("GET", {"Accept-Encoding": "gzip"}),
                            ("GET", {"Range": "bytes=100-199,-50"}), ("DELETE", {}))
] + [("GET", "/" + "x" * 20_000, {}), ("GET", "/ok", {"X": "y" * 6000}), ("GET", "/..", {})]
# What tells of this run and not of the request.
VARYING_HEADERS = {"date", "location"}


def _make_files(trial):
    root = trial.shared_directory()
    for name, size in SIZES.items():
        (root / f"{name}.txt").write_bytes(text_lines(size, seed=size))
    return root


def _reply(connection, method, path, headers, body=None):
    connection.request(method, path, body=body, headers=headers)
    reply = connection.getresponse()
    # The parts of a multipart reply are separated by a number that differs in each process.
    content = b"".join(line for line in reply.read().split(b"\r\n") if not line.startswith(b"--0000"))
    kept = sorted((name.lower(), value) for name, value in reply.getheaders()
                  if name.lower() not in VARYING_HEADERS and "boundary=" not in value)
    return reply.status, kept, content


def _replies(server):
    replies = {}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for number, (method, path, headers) in enumerate(REQUESTS):
        replies[f"{number} {method} {path[:30]} {str(headers)[:40]}"] = _reply(connection, method, path, headers)
    for size in (0, 1000, 100_000, 5_000_000):
        replies[f"POST {size}"] = _reply(connection, "POST", "/echo", {}, body=b"z" * size)
    connection.close()
    return replies


@check
def replies(trial):
    """Files of all sizes, heads, ranges, compression, errors, uploads, through a proxy: equal replies."""
    root = _make_files(trial)

    def outcome(launcher):
        with NginxServer(launcher, trial.directory(launcher), root) as server:
            found = _replies(server)
            processes = launcher.require_mapped_below(server.pid)
            require(processes == 3, f"nginx has {processes} processes, not a master and two workers")
            return found, server.stop()

    (plain, plain_status), (shim, shim_status) = map(outcome, trial.launchers)
    require_same_mapping("reply", plain, shim)
    require_same("exit status", plain_status, shim_status)
    require({200, 206, 404, 405, 414} <= {status for status, *_ in plain.values()},
            "the requests no longer exercise nginx")


def _reload(server, times):
    """Reloads the configuration: new workers are forked, the old ones end when their requests are done."""
    for _ in range(times):
        before = set(descendants(server.pid))
        os.kill(server.pid, signal.SIGHUP)
        deadline = time.monotonic() + 30
        while len(before & set(descendants(server.pid))) > 1:
            require(time.monotonic() < deadline, "old workers do not end")
            time.sleep(0.02)


@check
def reloads_under_load(trial):
    """wrk over 64 connections, itself on Freehold too; then reloads between loads; no request fails."""
    root = _make_files(trial)
    for launcher in trial.launchers:
        directory = trial.directory(launcher)
        with NginxServer(launcher, directory, root) as server:
            for path in ("/small.txt", "/large.txt", "/proxied/medium.txt"):
                result = wrk(launcher, directory, server.port, path, seconds=5 if trial.long else 1,
                             connections=64)
                require(result["errors"] == 0 and result["requests"] > 0, f"{launcher.name}: {path}: {result}")
                _reload(server, 3)
                launcher.require_mapped_below(server.pid)
            require_same(f"{launcher.name}: exit status", 0, server.stop())
