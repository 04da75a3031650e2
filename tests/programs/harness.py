"""What every program check shares: launching a program plain and under the shim, comparing the two,
and the evidence that the shim's library really was in the process."""

import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

PROGRAMS_DIR = pathlib.Path(__file__).resolve().parent
WORKLOADS = PROGRAMS_DIR / "workloads"

# The distribution's programs, whatever the caller's PATH puts in front of them.
PATH = ":".join(["/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                 os.environ.get("PATH", os.defpath)])
PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable

# Every binding of these must lead to the library, or part of the program allocates elsewhere.
ALLOCATION_SYMBOLS = ("malloc", "calloc", "realloc", "free")
BINDING = re.compile(r"binding file (\S+) \[\d+\] to (\S+) \[\d+\]: normal symbol `(\w+)'")


class Failure(Exception):
    """A check does not hold; the text is the reason."""


def require(condition, reason):
    if not condition:
        raise Failure(reason)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished program leaves behind. A negative status is the signal that ended it."""
    status: int
    stdout: bytes
    stderr: bytes


def first_difference(what, plain, shim):
    """Names the first line in which two outputs differ; None where they are equal."""
    if plain == shim:
        return None
    plain_lines, shim_lines = plain.split(b"\n"), shim.split(b"\n")
    for number, (ours, theirs) in enumerate(zip(plain_lines, shim_lines), 1):
        if ours != theirs:
            return f"{what} line {number}: plain {ours[:200]!r}, shim {theirs[:200]!r}"
    return f"{what}: plain has {len(plain_lines)} lines, shim {len(shim_lines)}"


def require_same(what, plain, shim):
    """Fails unless two values, of any type with ==, are equal."""
    if plain == shim:
        return
    if isinstance(plain, bytes) and isinstance(shim, bytes):
        raise Failure(first_difference(what, plain, shim))
    raise Failure(f"{what}: plain {_shorten(plain)}, shim {_shorten(shim)}")


def require_same_mapping(what, plain, shim):
    """require_same for dictionaries; names the first key that differs."""
    for key in sorted(plain.keys() | shim.keys()):
        require_same(f"{what} {key!r}", plain.get(key), shim.get(key))


def _shorten(value):
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def add_runner_arguments(parser):
    """The options that name the runner, for launchers_from()."""
    parser.add_argument("--runner", help="words in front of each command ($FREEHOLD_CLI run --)")
    parser.add_argument("--library", default="libfreehold.so",
                        help="what the runner's library is called in /proc/PID/maps (%(default)s)")


def launchers_from(parser, arguments):
    """The plain launcher and the one under the shim. Ends the program where no runner is given."""
    if arguments.runner:
        runner = shlex.split(arguments.runner)
    elif "FREEHOLD_CLI" in os.environ:
        runner = [os.environ["FREEHOLD_CLI"], "run", "--"]
    else:
        parser.error("give --runner, or set FREEHOLD_CLI to the freehold program")
    if "/" in runner[0]:
        runner[0] = os.path.abspath(runner[0])  # Programs start in other directories.
    options = {name: value for name, value in os.environ.items()
               if name.startswith("FREEHOLD_") and name != "FREEHOLD_CLI"}
    return Launcher("plain", [], None, {}), Launcher("shim", runner, arguments.library, options)


def clean_up_when_terminated():
    """Makes SIGTERM, which ends a test that takes too long, an exit that ends servers and removes files."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def maps_of(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def resident_bytes(pid):
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def descendants(pid):
    """A process and all below it; some of them may be gone by the time they are looked at."""
    yield pid
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in pathlib.Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                yield from descendants(int(child))


class Witness(threading.Thread):
    """Watches a process and its descendants until the library has been seen in a process of every
    wanted command name. It only ever sees processes that live for tens of milliseconds."""

    TICK_S = 0.005

    def __init__(self, pid, library, wanted):
        super().__init__(daemon=True)
        self._pid = pid
        self._library = library
        self._missing = set(wanted)
        self._over = threading.Event()
        self.start()

    def run(self):
        while self._missing and not self._over.wait(self.TICK_S):
            for pid in descendants(self._pid):
                with contextlib.suppress(OSError):
                    name = pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
                    if name in self._missing and self._library in maps_of(pid):
                        self._missing.discard(name)

    def missing(self):
        self._over.set()
        self.join()
        return sorted(self._missing)


class Launcher:
    """Starts programs behind a prefix of words: none for the plain run, the runner for the other.
    With a library, runs can be asked to prove that it was mapped."""

    def __init__(self, name, prefix, library, extra_env):
        self.name = name
        self.library = library
        self._prefix = prefix
        self._extra_env = extra_env

    def start(self, argv, *, cwd, env=None, before=(), **popen_options):
        """Starts a program in a session of its own. `before` goes in front of the runner."""
        try:
            return subprocess.Popen(
                [*before, *self._prefix, *map(str, argv)], cwd=cwd,
                env=self._environment(cwd, env or {}), start_new_session=True, **popen_options)
        except OSError as error:
            raise Failure(f"cannot start {error.filename}: {error.strerror}") from error

    def run(self, argv, *, cwd, stdin=b"", env=None, before=(), timeout=300, witnesses=()):
        """Runs a program to its end; `witnesses` are the command names in which the library must be
        seen."""
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with self.start(argv, cwd=cwd, env=env, before=before, **streams) as process:
            witness = Witness(process.pid, self.library, witnesses if self.library else ())
            try:
                stdout, stderr = process.communicate(stdin, timeout=timeout)
            except subprocess.TimeoutExpired as error:
                raise Failure(f"{self.name}: {argv[0]} still runs after {timeout} s") from error
            finally:
                end_session(process)
        outcome = Outcome(process.returncode, stdout, stderr)
        unseen = witness.missing()
        require(not unseen, f"{self.library} was not seen in {', '.join(unseen)}: {tail(outcome)}")
        return outcome

    def require_mapped(self, pid):
        """Fails where this launcher has a library and the process does not map it."""
        if self.library:
            require(self.library in maps_of(pid), f"{self.library} is not mapped in process {pid}")

    def require_mapped_below(self, pid):
        """The same for a process and all its descendants that do not end meanwhile; returns how many there are."""
        maps = {each: maps_of(each) for each in descendants(pid)}
        alive = [each for each, mapped in maps.items() if mapped]
        require(pid in alive, f"process {pid} has ended")
        for each in alive:
            require(not self.library or self.library in maps[each], f"{self.library} is not mapped in process {each}")
        return len(alive)

    def _environment(self, cwd, env):
        fixed = {"PATH": PATH, "HOME": str(cwd), "TMPDIR": str(cwd), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
        return {**fixed, **self._extra_env, **env}


def tail(outcome):
    """The end of what a program said, for a failure's reason."""
    said = (outcome.stderr or outcome.stdout).decode(errors="replace").strip()
    return f"status {outcome.status}, {said[-300:]!r}"


def end_session(process):
    """Ends what is left of a started process and of the session it leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Trial:
    """One check's surroundings: both launchers, a scratch directory for each, the chosen length."""

    def __init__(self, plain, shim, scratch, long):
        self.plain = plain
        self.shim = shim
        self.launchers = (plain, shim)
        self.long = long
        self._scratch = scratch

    def directory(self, launcher):
        path = self._scratch / launcher.name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def shared_directory(self):
        """For input that both runs read."""
        path = self._scratch / "input"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def run(self, launcher, argv, **options):
        return launcher.run(argv, cwd=self.directory(launcher), **options)

    def compare(self, argv, *, status=0, files=(), **options):
        """Runs a program plain and under the shim. Requires the given status, and equal streams and
        files (names below the working directory). Programs see relative paths only, so that nothing
        they print depends on which of the two directories they ran in."""
        plain, shim = (self.run(launcher, argv, **options) for launcher in self.launchers)
        require(plain.status == status, f"plain: {tail(plain)}, expected status {status}")
        require(shim.status == status, f"shim: {tail(shim)}, expected status {status}")
        require_same("stdout", plain.stdout, shim.stdout)
        require_same("stderr", plain.stderr, shim.stderr)
        for name in files:
            require_same(name, *((self.directory(launcher) / name).read_bytes()
                                 for launcher in self.launchers))
        return plain


def compile_c(launcher, directory, name, *options):
    """Compiles workloads/NAME.c and returns the path of the program."""
    program = directory / name
    outcome = launcher.run(["cc", "-g", "-pthread", *options, "-o", program, WORKLOADS / f"{name}.c"],
                           cwd=directory)
    require(outcome.status == 0, f"cc: {tail(outcome)}")
    return program


def compile_workload(trial, name, *options):
    """The same, without the shim, for a program that both runs use."""
    return compile_c(trial.plain, trial.shared_directory(), name, *options)


def require_effective(launcher, scratch):
    """Fails unless the runner puts its library into a program and the program's children, and the
    dynamic linker resolves the malloc family to it: otherwise every comparison would pass vacuously."""
    scratch.mkdir(parents=True, exist_ok=True)
    maps_commands = (["cat", "/proc/self/maps"], ["sh", "-c", "cat /proc/self/maps; exit 0"])
    for argv in maps_commands:
        outcome = launcher.run(argv, cwd=scratch)
        require(outcome.status == 0, f"runner: {argv[0]}: {tail(outcome)}")
        require(launcher.library.encode() in outcome.stdout,
                f"runner: {launcher.library} is not mapped under `{' '.join(argv)}`")
    # The dynamic linker reports each binding that it makes in this process.
    report = {"LD_DEBUG": "bindings", "LD_BIND_NOW": "1", "LD_DEBUG_OUTPUT": str(scratch / "bindings")}
    outcome = launcher.run(["sort", "--version"], cwd=scratch, env=report)
    require(outcome.status == 0, f"runner: sort: {tail(outcome)}")
    reported = "".join(file.read_text() for file in scratch.glob("bindings.*"))
    # A runner that is itself dynamically linked reports first, in the same file: the last one counts.
    bindings = {(os.path.basename(user), symbol): provider
                for user, provider, symbol in BINDING.findall(reported)}
    for user in ("sort", "libc.so.6"):
        for symbol in ALLOCATION_SYMBOLS:
            provider = bindings.get((user, symbol), "nowhere")
            require(launcher.library in provider, f"runner: {symbol} of {user} comes from {provider}")


_checks = {}


def check(function):
    """Registers a check as MODULE.FUNCTION. It takes a Trial and raises Failure."""
    program = function.__module__.rpartition(".")[2]
    _checks[f"{program}.{function.__name__}"] = function
    return function


def registered_checks():
    return dict(_checks)


def run_checks(names, plain, shim, scratch, *, long, keep):
    """Runs checks one after the other, prints a line for each, returns how many passed and failed."""
    try:
        require_effective(shim, scratch / "effective")
        ineffective = None
    except Failure as failure:
        ineffective = failure
    counts = {True: 0, False: 0}
    for name in names:
        counts[_run_check(name, Trial(plain, shim, scratch / name, long), ineffective)] += 1
        if not keep:
            shutil.rmtree(scratch / name, ignore_errors=True)
    return counts[True], counts[False]


def _run_check(name, trial, ineffective):
    started = time.monotonic()
    try:
        if ineffective:
            raise ineffective
        _checks[name](trial)
    except Failure as failure:
        print(f"FAIL {name}: {failure}", flush=True)
        return False
    except Exception as error:  # A defect of the check itself, or a server that went away.
        print(f"FAIL {name}: {type(error).__name__}: {error}", flush=True)
        sys.excepthook(*sys.exc_info())
        return False
    print(f"PASS {name} ({time.monotonic() - started:.1f} s)", flush=True)
    return True
