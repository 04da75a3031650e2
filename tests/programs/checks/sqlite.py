"""sqlite3: the same script and the same database file, byte for byte."""

from harness import WORKLOADS, check, require


def _script(rows, journal):
    text = (WORKLOADS / "tables.sql").read_text()
    return text.replace("@ROWS@", str(rows)).replace("@JOURNAL@", journal).encode()


@check
def file(trial):
    """200 000 rows in a file: indexes, joins, aggregates, VACUUM, integrity check; equal files."""
    rows = 2_000_000 if trial.long else 200_000
    outcome = trial.compare(["sqlite3", "tables.db"], stdin=_script(rows, "DELETE"), files=["tables.db"],
                            witnesses=["sqlite3"], timeout=600)
    require(b"\nok\n" in outcome.stdout, "the script's integrity check did not run")


@check
def memory(trial):
    """The same in memory, where every page of the database comes from malloc."""
    outcome = trial.compare(["sqlite3", ":memory:"], stdin=_script(200_000, "MEMORY"),
                            witnesses=["sqlite3"], timeout=600)
    require(b"\nok\n" in outcome.stdout, "the script's integrity check did not run")


@check
def write_ahead_log(trial):
    """The same with a write-ahead log: the shared index file is a shared mapping."""
    trial.compare(["sqlite3", "wal.db"], stdin=_script(50_000, "WAL"), witnesses=["sqlite3"],
                  timeout=600)


@check
def dump_and_restore(trial):
    """A dump, read back by a second process, dumps the same."""
    trial.compare(["sh", "-ec", "sqlite3 a.db > first; sqlite3 a.db .dump > a.sql; "
                   "sqlite3 b.db < a.sql; sqlite3 b.db .dump > b.sql; cmp a.sql b.sql; cksum a.sql"],
                  stdin=_script(50_000, "DELETE"), files=["first", "a.sql"], witnesses=["sqlite3"])
