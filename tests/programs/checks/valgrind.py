"""valgrind, for which the shim steps aside by itself: its tools report what they report without Freehold."""

import re

from harness import check, compile_workload, require, require_same, tail

RESERVATIONS = ("16T", "1G")  # One that valgrind refuses and one that it would grant.


def _report(trial, launcher, argv, witness, reserve):
    """What valgrind and the program say; without process ids and addresses, which differ from run to run."""
    outcome = trial.run(launcher, argv, witnesses=[witness], timeout=120, env={"FREEHOLD_RESERVE": reserve})
    report = re.sub(rb"==\d+==|0x[0-9A-Fa-f]+|process \d+", b"", outcome.stderr)
    return outcome.status, outcome.stdout, report


def _compare(trial, tool, options, program):
    plain = None
    for reserve in RESERVATIONS:
        argv = ["valgrind", f"--tool={tool}", *options, *program]
        witness = f"{tool}-amd64-linux"[:15]
        plain = plain or _report(trial, trial.plain, argv, witness, reserve)
        shim = _report(trial, trial.shim, argv, witness, reserve)
        for what, ours, theirs in zip(("status", "stdout", "report"), plain, shim):
            require_same(f"{tool}, {reserve}: {what}", ours, theirs)
    return plain


@check
def memcheck(trial):
    """Uninitialised values, freed memory, a double free and a leak: found as without Freehold."""
    program = compile_workload(trial, "leaks", "-O0")
    status, _, report = _compare(trial, "memcheck", ["-q", "--leak-check=full", "--error-exitcode=9"], [program])
    require(status == 9, f"memcheck ended with {status}")
    for found in (b"uninitialised", b"Invalid write", b"Invalid free", b"definitely lost"):
        require(found in report, f"memcheck no longer reports {found}: {report[-500:]!r}")


@check
def other_tools(trial):
    """helgrind finds a race; callgrind, massif and cachegrind, which replace less, run a program."""
    program = compile_workload(trial, "leaks", "-O0")
    status, _, report = _compare(trial, "helgrind", ["-q", "--error-exitcode=9"], [program, "thread"])
    require(status == 9 and b"data race" in report, f"helgrind: {status} {report[-300:]!r}")
    for tool in ("callgrind", "massif"):
        _compare(trial, tool, ["-q", f"--{tool}-out-file=/dev/null"], [program, "thread"])


@check
def children(trial):
    """A shell under valgrind, whose children run on Freehold unless valgrind follows them."""
    script = ["sh", "-c", "grep -c libfreehold /proc/self/maps | tr 1-9 1; echo end"]
    for options in (["-q"], ["-q", "--trace-children=yes"]):
        outcome = trial.run(trial.shim, ["valgrind", *options, *script], timeout=120)
        require_same(f"{options}", (0, b"1\nend\n", b""), (outcome.status, outcome.stdout, outcome.stderr))


@check
def says_so_when_asked(trial):
    """With --verbose there is a line about it."""
    outcome = trial.run(trial.shim, ["valgrind", "-q", "true"], env={"FREEHOLD_VERBOSE": "1"}, timeout=120)
    require(outcome.status == 0, tail(outcome))
    require(b"runs under valgrind, which Freehold leaves all memory to\n" in outcome.stderr, tail(outcome))
