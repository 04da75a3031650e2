"""perf: profiles of a program on Freehold, and perf itself on it."""

import subprocess

from harness import check, compile_workload, end_session, require, tail

# Software clock: hardware counters are missing in many virtual machines.
RECORD = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "499", "-g"]


def _report(trial, launcher, *options):
    outcome = trial.run(launcher, ["perf", "report", "-i", "perf.data", "--stdio", "--no-children", *options],
                        timeout=120)
    require(outcome.status == 0, f"{launcher.name}: {tail(outcome)}")
    return outcome.stdout.decode()


@check
def record_and_report(trial):
    """A profile of a command: perf and the command on Freehold. Symbols and call chains are found."""
    program = compile_workload(trial, "debugged", "-fno-omit-frame-pointer")
    for launcher in trial.launchers:
        outcome = trial.run(launcher, [*RECORD, "-o", "perf.data", "--", "sh", "-c", f"sleep 1 | {program}"],
                            witnesses=["perf", "debugged"], timeout=120)
        require(outcome.status == 0 and outcome.stdout == b"ready\ndone\n", f"{launcher.name}: {tail(outcome)}")
        report = _report(trial, launcher, "--sort", "symbol,dso")
        for symbol in ("leaf", "worker"):
            require(symbol in report, f"{launcher.name}: no {symbol} in the profile: {report[:1000]}")
        if launcher.library:
            require(launcher.library in report, f"{launcher.library} is not in the profile: {report[:1000]}")


@check
def attached(trial):
    """A profile of a running process."""
    program = compile_workload(trial, "debugged", "-fno-omit-frame-pointer")
    for launcher in trial.launchers:
        process = launcher.start([program], cwd=trial.directory(launcher), stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE)
        try:
            require(process.stdout.readline() == b"ready\n", f"{launcher.name}: the program did not start")
            outcome = trial.run(launcher, [*RECORD, "-o", "perf.data", "-p", str(process.pid), "--", "sleep", "1"],
                                timeout=120)
            require(outcome.status == 0, f"{launcher.name}: {tail(outcome)}")
            said, _ = process.communicate(b"\n", timeout=60)
            require(process.returncode == 0 and said == b"done\n", f"{launcher.name}: {process.returncode} {said}")
        finally:
            end_session(process)
        require("leaf" in _report(trial, launcher, "--sort", "symbol"), f"{launcher.name}: no symbols")
