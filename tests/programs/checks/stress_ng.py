"""stress-ng's stressors of memory, threads and forks, which check what they wrote."""

from harness import check, require, tail

# How many bogus operations take about two seconds plain; a stressor that takes much longer is cut off.
STRESSORS = {
    "vm": ("8000", ["--vm-bytes", "64m", "--vm-method", "all"]),
    "mmap": ("8", ["--mmap-bytes", "16m"]),
    "pthread": ("1500", []),
    "fork": ("1500", []),
}


def _stress(trial, name):
    operations, options = STRESSORS[name]
    for launcher in trial.launchers:
        outcome = trial.run(launcher, ["stress-ng", f"--{name}", "2", f"--{name}-ops", operations, *options,
                                       "--verify", "--timeout", "120" if trial.long else "4",
                                       "--metrics-brief", "--temp-path", "."],
                            witnesses=["stress-ng", f"stress-ng-{name}"[:15]], timeout=300)
        said = outcome.stdout + outcome.stderr
        require(outcome.status == 0 and b"successful run completed" in said, f"{launcher.name}: {tail(outcome)}")
        for word in (b"fail:", b"error:", b"stress-ng: warn"):
            require(word not in said, f"{launcher.name}: {said[-600:]!r}")


@check
def vm(trial):
    """Patterns written and read back by every method."""
    _stress(trial, "vm")


@check
def mmap(trial):
    """Mapping with all flags and protections, unmapping parts, advice, locks; contents checked."""
    _stress(trial, "mmap")


@check
def pthread(trial):
    """A thousand threads at a time, created and joined."""
    _stress(trial, "pthread")


@check
def fork(trial):
    """Children, thousands of them."""
    _stress(trial, "fork")
