"""LMDB: one file mapped by a writer and by readers in threads and processes, of more address space than memory."""

import os

from harness import WORKLOADS, check, require, require_same, tail

# Debian's, whose modules it finds.
PYTHON = "/usr/bin/python3"


def _load(trial, launcher, writemap):
    rounds = 2000 if trial.long else 120
    outcome = trial.run(launcher, [PYTHON, WORKLOADS / "lmdb_load.py", str(rounds), writemap],
                        witnesses=["python3"], timeout=300)
    require(outcome.status == 0 and outcome.stderr == b"", f"{launcher.name}: {tail(outcome)}")
    tools = trial.run(launcher, ["sh", "-ec", "mdb_stat -n -a -e data.mdb | grep -E 'Entries|readers|Map size'; "
                                 "mdb_copy -n -c data.mdb copy.mdb; mdb_dump -n -a copy.mdb | cksum; "
                                 "mdb_dump -n -s values data.mdb | mdb_load -n -s values loaded.mdb; "
                                 "mdb_dump -n -s values loaded.mdb | cksum"])
    require(tools.status == 0, f"{launcher.name}: {tail(tools)}")
    for name in os.listdir(trial.directory(launcher)):
        (trial.directory(launcher) / name).unlink()
    return outcome.stdout, tools.stdout


@check
def read_only_map(trial):
    """The map is read only, the writer uses pwrite: content, and what LMDB's own tools say of it."""
    require_same("content", *(_load(trial, launcher, "0") for launcher in trial.launchers))


@check
def writable_map(trial):
    """The writer writes by the map, and syncs by msync."""
    require_same("content", *(_load(trial, launcher, "1") for launcher in trial.launchers))
