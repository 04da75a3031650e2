"""python3, with its own small-object allocator and, by PYTHONMALLOC=malloc, without."""

import os

from harness import PYTHON, WORKLOADS, check

# The order of sets and of some dictionaries follows string hashes, which are random by default.
HASHES = {"PYTHONHASHSEED": "0"}
EVERYTHING_FROM_MALLOC = {**HASHES, "PYTHONMALLOC": "malloc"}


def _compare(trial, script, *arguments, env):
    trial.compare([PYTHON, "-X", "faulthandler", WORKLOADS / script, *arguments], env=env, timeout=600,
                  witnesses=[os.path.basename(PYTHON)])


@check
def objects(trial):
    """Lists, dicts, bytes, json, sorting, zlib."""
    _compare(trial, "python_objects.py", 10 if trial.long else 1, env=HASHES)


@check
def objects_from_malloc(trial):
    """The same with every single object from malloc."""
    _compare(trial, "python_objects.py", 10 if trial.long else 1, env=EVERYTHING_FROM_MALLOC)


@check
def processes(trial):
    """Threads, subprocesses, multiprocessing with fork, forks while threads allocate."""
    _compare(trial, "python_processes.py", env=HASHES)


@check
def processes_from_malloc(trial):
    """The same with every single object from malloc."""
    _compare(trial, "python_processes.py", env=EVERYTHING_FROM_MALLOC)
