"""PostgreSQL's server, as an unprivileged user: pgbench, queries over all kinds of plans, a crash."""

import os
import signal

from harness import WORKLOADS, check, require, require_same
from servers import PostgresServer

CLIENTS, TRANSACTIONS = 8, 150
# Each transaction adds one random amount to an account, a teller and a branch, and notes it.
SUMS = "select sum(abalance) from pgbench_accounts; select sum(tbalance) from pgbench_tellers; " \
       "select sum(bbalance) from pgbench_branches; select sum(delta), count(*) from pgbench_history;"


def _benchmark(trial, launcher, server):
    """TPC-B of a known seed by several clients, pgbench on Freehold too; returns the sums left behind."""
    server.pgbench(launcher, "-i", "-s", "2", "-q")
    transactions = TRANSACTIONS * (20 if trial.long else 1)
    said = server.pgbench(launcher, "-c", str(CLIENTS), "-j", "4", "-t", str(transactions),
                          "--random-seed=7", "-b", "tpcb-like")
    expected = f"{CLIENTS * transactions}/{CLIENTS * transactions}"
    require(expected in said and "failed transactions: 0 " in said, f"{launcher.name}: {said}")
    return server.psql(trial.plain, "-c", SUMS)


@check
def benchmark_and_crash(trial):
    """pgbench with 8 clients; the database is killed, recovers, and reads the same."""
    def outcome(launcher):
        directory = trial.directory(launcher)
        with PostgresServer(launcher, directory) as server:
            sums = _benchmark(trial, launcher, server)
            launcher.require_mapped_below(server.pid)
            os.kill(server.pid, signal.SIGKILL)
        with PostgresServer(launcher, directory) as server:
            require_same(f"{launcher.name}: sums after the crash", sums, server.psql(trial.plain, "-c", SUMS))
            require_same(f"{launcher.name}: exit status", 0, server.stop())
        return sums

    plain, shim = map(outcome, trial.launchers)
    require_same("sums", plain, shim)
    lines = plain.decode().split()
    require(len(set(line.partition("|")[0] for line in lines)) == 1, f"the sums do not agree: {lines}")


@check
def queries(trial):
    """Sorts, joins, aggregates and windows: in memory and spilled, in parallel, compiled; an index build."""
    script = (WORKLOADS / "queries.sql").read_bytes()

    def outcome(launcher):
        with PostgresServer(launcher, trial.directory(launcher)) as server:
            answers = server.psql(launcher, stdin=script)
            require_same(f"{launcher.name}: exit status", 0, server.stop())
            return answers

    plain, shim = map(outcome, trial.launchers)
    require_same("answers", plain, shim)
    for proof in (b"Workers Launched: 2", b"JIT:", b"external merge"):
        require(proof in plain, f"the queries no longer exercise PostgreSQL: no {proof}")
