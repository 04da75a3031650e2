"""gdb, attached to a running program with threads, and itself on Freehold."""

import pathlib
import re
import signal
import subprocess
import time

from harness import check, compile_workload, end_session, require, require_same, tail

COMMANDS = [
    "info threads",
    "thread apply all bt 3",
    "break leaf",
    "continue",
    "bt",
    "print number >= 0",
    "set scheduler-locking on",
    "next",
    "next",
    "print size >= 1",
    "delete",
    "watch -l turns[0]",
    "detach",
]


class _Running:
    """The debugged program, ready."""

    def __init__(self, trial, launcher, program, before=()):
        self.process = launcher.start([program], cwd=trial.directory(launcher), before=before, stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def __enter__(self):
        require(self.process.stdout.readline() == b"ready\n", "the program did not start")
        return self

    def __exit__(self, *_):
        end_session(self.process)

    def finish(self):
        said, _ = self.process.communicate(b"\n", timeout=60)
        return self.process.returncode, said


def _debug(trial, debugger, program_launcher, program):
    """Attaches, looks around, detaches; returns what gdb said and how the program ended."""
    with _Running(trial, program_launcher, program) as running:
        program_launcher.require_mapped(running.process.pid)
        argv = ["gdb", "-q", "-nx", "-batch", "-p", str(running.process.pid)]
        for command in COMMANDS:
            argv += ["-ex", command]
        outcome = trial.run(debugger, argv, timeout=120, witnesses=["gdb"])
        require(outcome.status == 0, f"{debugger.name}: {tail(outcome)}")
        return outcome.stdout.decode(), running.finish()


@check
def attach(trial):
    """Threads, backtraces, a breakpoint, variables, a watchpoint, detach; the program goes on and ends well."""
    program = compile_workload(trial, "debugged", "-O0")
    for launcher in trial.launchers:
        # The debugger plain and the program on Freehold; then both.
        for debugger in {trial.plain, launcher}:
            said, end = _debug(trial, debugger, launcher, program)
            require_same(f"{launcher.name}: the program's end", (0, b"done\n"), end)
            threads = re.findall(r"^[* ] +\d+ +Thread 0x[0-9a-f]+ \(LWP \d+\)", said, re.MULTILINE)
            require(len(threads) == 5, f"{launcher.name}: gdb sees {len(threads)} threads: {said}")
            for expected in (r"hit Breakpoint 1, .*leaf \(number=", r"in worker \(argument=", r"\$1 = 1\n", r"\$2 = 1\n",
                             r"Hardware watchpoint 2: -location turns\[0\]", r"detached\]"):
                require(re.search(expected, said), f"{launcher.name}: no {expected!r} in {said}")


@check
def core(trial):
    """The image that the kernel writes of a program that dies: small, and full of backtraces."""
    pattern = pathlib.Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if not re.fullmatch(r"core(\.%p)?", pattern):
        return  # Images go to a program or to another place: there is none to be looked at.
    program = compile_workload(trial, "debugged", "-O0")
    for launcher in trial.launchers:
        directory = trial.directory(launcher)
        # A limit, so that an image of the whole reservation fills no disk.
        with _Running(trial, launcher, program, before=["sh", "-c", 'ulimit -c 1000000; exec "$@"', "sh"]) as running:
            time.sleep(0.5)  # For all threads to be at work.
            running.process.send_signal(signal.SIGABRT)
            require_same(f"{launcher.name}: status", -signal.SIGABRT, running.process.wait(60))
        file, = directory.glob("core*")
        used = file.stat().st_blocks * 512
        require(used < 64 << 20, f"{launcher.name}: the image takes {used} bytes on disk")
        said = trial.run(trial.plain, ["gdb", "-q", "-nx", "-batch", "-ex", "thread apply all bt", program, file])
        found = said.stdout.count(b"worker (argument=")
        require(found == 4, f"{launcher.name}: {found} backtraces: {tail(said)} {said.stdout[-500:]!r}")
        file.unlink()


@check
def gcore(trial):
    """The image that gdb writes of a running program: without what is only reserved, with what is in use.

    Not with the stacks of threads: gdb gives up a kernel VMA where it cannot read a page, which guard regions are.
    """
    program = compile_workload(trial, "debugged", "-O0")
    for launcher in trial.launchers:
        file = trial.directory(launcher) / "image"
        with _Running(trial, launcher, program) as running:
            launcher.require_mapped(running.process.pid)
            # A limit, so that an image of the whole reservation fills no disk.
            argv = ["sh", "-c", 'ulimit -f 4000000; exec "$@"', "sh", "gdb", "-q", "-nx", "-batch",
                    "-p", str(running.process.pid), "-ex", f"generate-core-file {file}"]
            written = trial.run(trial.plain, argv, timeout=120, witnesses=["gdb"])
            require(b"Saved corefile" in written.stdout, f"{launcher.name}: {tail(written)}")
            require_same(f"{launcher.name}: the program's end", (0, b"done\n"), running.finish())
        size = file.stat().st_size
        require(size < 2 << 30, f"{launcher.name}: the image has {size} bytes")
        said = trial.run(trial.plain, ["gdb", "-q", "-nx", "-batch", "-ex", "thread apply all bt", "-ex", "print note",
                                       "-ex", "info threads", program, file])
        for expected in (rb"main \(\)", rb'"kept in the heap"', rb"\n +5 +"):
            require(re.search(expected, said.stdout), f"{launcher.name}: no {expected!r} in {said.stdout[-800:]!r}")
        file.unlink()
