"""What a program is given and what it gives back: status, signals, streams, descriptors, limits."""

import os
import signal
import subprocess

from harness import PYTHON, Failure, check, end_session, require, require_same, tail

TOO_MUCH = """
for size in (1 << 37, 1 << 46, 1 << 62, (1 << 63) - 64):
    try:
        bytearray(size)
        print(size, "allocated")
    except MemoryError:
        print(size, "MemoryError")
print(len(bytearray(1 << 20)))
"""


@check
def exit_status(trial):
    """Exit statuses pass through."""
    for status in (0, 1, 7, 126, 127, 255):
        trial.compare(["sh", "-c", f"exit {status}"], status=status)
    trial.compare(["false"], status=1)


@check
def fatal_signals(trial):
    """A program that a signal ends is seen to end by that signal."""
    for fatal in (signal.SIGSEGV, signal.SIGTERM, signal.SIGABRT, signal.SIGKILL, signal.SIGPIPE):
        trial.compare(["sh", "-c", f"ulimit -c 0; kill -{fatal.value} $$"], status=-fatal)


@check
def delivered_signals(trial):
    """Signals sent to the started process reach the program, which may handle them."""
    handling = 'trap "echo handled; exit 3" TERM; echo ready; while :; do sleep 0.05; done'
    default = "echo ready; exec sleep 60"
    for launcher in trial.launchers:
        require_same(f"{launcher.name}: handled", (3, b"handled\n"), _terminate(trial, launcher, handling))
        require_same(f"{launcher.name}: default", (-signal.SIGTERM, b""),
                     _terminate(trial, launcher, default))


def _terminate(trial, launcher, script):
    """Sends SIGTERM to a script once it says ready. Returns its status and what else it says."""
    process = launcher.start(["sh", "-c", script], cwd=trial.directory(launcher),
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        require(process.stdout.readline() == b"ready\n", f"{launcher.name}: the script did not start")
        process.terminate()
        said, _ = process.communicate(timeout=20)
        return process.returncode, said
    except subprocess.TimeoutExpired as error:
        raise Failure(f"{launcher.name}: SIGTERM did not end the program") from error
    finally:
        end_session(process)


@check
def streams(trial):
    """Standard streams pass through, also binary, large, closed and in both directions at once."""
    trial.compare(["cat"], stdin=bytes(range(256)) * 40_000)
    trial.compare(["sh", "-c", "echo to stdout; echo to stderr >&2; cat; cat missing"], stdin=b"in\n",
                  status=1)
    trial.compare(["sh", "-c", "cat <&-"], status=1)
    trial.compare(["bash", "-c", "exec >&- 2>&-; ls; exit 5"], status=5)


@check
def arguments(trial):
    """Arguments arrive unchanged: empty, with spaces and newlines, like options, very many."""
    trial.compare(["printf", "<%s>\\n", "", "a b", "new\nline", "--", "--help", "-x", "$HOME", "\xff"])
    trial.compare(["printf", "%s\n", *map(str, range(20_000))])


@check
def environment(trial):
    """The program sees its caller's environment, and nothing more than the runner's own variables."""
    def visible(launcher):
        outcome = trial.run(launcher, ["env", "-0"], env={"KEPT": "as it\nwas"})
        require(outcome.status == 0, f"env: {tail(outcome)}")
        # HOME and TMPDIR are the two different working directories.
        runners_own = (b"FREEHOLD_", b"LD_PRELOAD=", b"HOME=", b"TMPDIR=")
        return sorted(variable for variable in outcome.stdout.split(b"\0")
                      if not variable.startswith(runners_own))

    require_same("environment", *map(visible, trial.launchers))


@check
def inheritance(trial):
    """Open descriptors, signal dispositions and masks, limits and umask are the caller's."""
    trial.compare(["ls", "-1", "/proc/self/fd"])
    trial.compare(["grep", "-E", "^(Sig(Blk|Ign|Cgt)|Seccomp|NoNewPrivs|Umask|Groups|Cap)",
                   "/proc/self/status"])
    trial.compare(["cat", "/proc/self/limits"])
    trial.compare(["sh", "-c", "trap '' INT USR1; umask 027; exec grep -E '^(SigIgn|Umask)' "
                   "/proc/self/status"])


@check
def missing_program(trial):
    """A program that is not there, or may not run, gives a message and the shell's status."""
    directory = trial.directory(trial.shim)
    not_executable = directory / "not-executable"
    not_executable.write_text("data\n")
    for name, status in (("no-such-program", 127), (str(directory / "no-such-program"), 127),
                         ("./not-executable", 126)):
        outcome = trial.run(trial.shim, [name])
        require(outcome.status == status, f"{name}: {tail(outcome)}, expected status {status}")
        require(outcome.stdout == b"", f"{name}: wrote to stdout: {tail(outcome)}")
        require(os.path.basename(name).encode() in outcome.stderr,
                f"{name}: the message does not name it: {tail(outcome)}")


@check
def address_space_limit(trial):
    """Programs run under a generous `ulimit -v`; under a tight one they run too, or are told why not."""
    hash_of_strings = 'my %h = map { $_ => "x" x ($_ % 500) } 1 .. 50_000; print scalar(%h), "\\n"'

    def limited(gibibytes):
        return ["sh", "-c", f"ulimit -v {gibibytes << 20}; exec perl -e '{hash_of_strings}'"]

    plain = trial.compare(limited(80))
    tight = trial.run(trial.shim, limited(1))
    require(tight == plain or (tight.status != 0 and tight.stderr), f"1 GiB: {tail(tight)}")


@check
def stack_overflow(trial):
    """A program that overflows its stack dies by SIGSEGV, as it would without the shim."""
    trial.compare(["bash", "-c", "ulimit -c 0; ulimit -s 1024; f() { f; }; f"], status=-signal.SIGSEGV)


@check
def out_of_memory(trial):
    """An allocation that cannot succeed fails in the program's own way, and the program goes on."""
    # The limit keeps a shim that hands out more than there is from taking the machine down with it.
    trial.compare(["sh", "-c", f"ulimit -v {80 << 20}; exec {PYTHON} -c '{TOO_MUCH}'"])
