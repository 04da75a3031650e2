"""memcached: many connections that verify every value they read."""

from harness import PYTHON, WORKLOADS, check, require, require_same, require_same_mapping, tail
from servers import MemcachedServer

# Counters that depend on the requests alone. The others count time, system calls and processes; the
# bytes read and written contain cas numbers, whose lengths depend on how the clients interleave.
COMPARED_COUNTERS = (
    "cmd_get", "cmd_set", "cmd_touch", "get_hits", "get_misses", "delete_hits", "delete_misses",
    "incr_hits", "incr_misses", "decr_hits", "decr_misses", "cas_hits", "cas_misses", "cas_badval",
    "touch_hits", "touch_misses", "curr_items", "total_items", "bytes", "evictions", "threads", "version")


def _serve(trial, launcher, clients, operations):
    """Runs the load against a server; returns what the load did, the counters, the exit status."""
    with MemcachedServer(launcher, trial.directory(launcher)) as server:
        load = trial.run(trial.plain, [PYTHON, WORKLOADS / "memcached_load.py", str(server.port),
                                       str(clients), str(operations)], timeout=600)
        require(load.status == 0, f"{launcher.name}: {tail(load)}")
        stats = server.stats()
        return load.stdout, {name: stats[name] for name in COMPARED_COUNTERS}, server.stop()


@check
def load(trial):
    """set, get, delete, incr, append, cas of values up to 3 MB over 8 connections that come and go."""
    operations = 60_000 if trial.long else 6000
    plain, shim = (_serve(trial, launcher, 8, operations) for launcher in trial.launchers)
    require_same("load", plain[0], shim[0])
    require_same_mapping("counter", plain[1], shim[1])
    require_same("exit status", plain[2], shim[2])
    require(plain[1]["evictions"] == "0", "the load does not fit the server")


@check
def many_connections(trial):
    """200 connections at a time, few requests on each."""
    plain, shim = (_serve(trial, launcher, 200, 60) for launcher in trial.launchers)
    require_same("load", plain[0], shim[0])
