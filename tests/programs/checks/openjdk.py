"""OpenJDK: a virtual machine that reserves, commits and protects memory of its own, with many threads."""

from harness import WORKLOADS, check, require, tail


def _compile(trial):
    outcome = trial.plain.run(["javac", "-d", trial.shared_directory(), WORKLOADS / "Workers.java"],
                              cwd=trial.shared_directory(), timeout=300)
    require(outcome.status == 0, f"javac: {tail(outcome)}")
    return trial.shared_directory()


def _run(trial, *options, threads=200):
    trial.compare(["java", "-Xmx192m", *options, "-cp", _compile(trial), "Workers",
                   str(threads * (5 if trial.long else 1))], files=["mapped.bin"], witnesses=["java"], timeout=300)


@check
def collectors(trial):
    """Pools of 200 threads, short-lived ones that overflow their stacks, garbage, direct and mapped buffers."""
    for collector in ("UseG1GC", "UseSerialGC", "UseParallelGC"):
        _run(trial, f"-XX:+{collector}")


@check
def concurrent_collectors(trial):
    """Collectors that move objects while the program runs: multiply mapped and protected heaps."""
    for collector in ("UseZGC", "UseShenandoahGC"):
        _run(trial, f"-XX:+{collector}", threads=50)


@check
def options_for_memory(trial):
    """A heap that is populated at once, huge pages by advice, small code caches, native memory tracking."""
    _run(trial, "-XX:+AlwaysPreTouch", "-XX:+UseTransparentHugePages", "-XX:ReservedCodeCacheSize=16m",
         "-XX:NativeMemoryTracking=summary", threads=50)


@check
def source_file(trial):
    """java as compiler and program in one."""
    trial.compare(["java", "-Xmx192m", WORKLOADS / "Workers.java", "20"], witnesses=["java"], timeout=300)
