"""RocksDB's tools: db_bench with many threads, ldb and sst_dump over what it wrote."""

import re

from harness import check, require, require_same, tail

# Small buffers and files, so that flushes and compactions run beside the load.
COMMON = ["--db=db", "--seed=42", "--write_buffer_size=262144", "--target_file_size_base=262144",
          "--max_bytes_for_level_base=1048576", "--max_background_jobs=4", "--value_size=200"]


def _bench(trial, launcher, *options):
    """Runs db_bench; what each of its benchmarks counted."""
    outcome = trial.run(launcher, ["db_bench", *COMMON, *options], witnesses=["db_bench"], timeout=600)
    require(outcome.status == 0 and b"rror" not in outcome.stderr, f"{launcher.name}: {tail(outcome)}")
    lines = re.findall(rb"^(\w+) +: .*?(\d+) operations.*?(\(\d+ of \d+ found\))?$", outcome.stdout, re.MULTILINE)
    require(lines, f"{launcher.name}: db_bench reports nothing: {tail(outcome)}")
    return lines


def _tool(trial, launcher, argv):
    outcome = trial.run(launcher, argv, timeout=300)
    require(outcome.status == 0, f"{launcher.name}: {argv[0]}: {tail(outcome)}")
    return outcome.stdout


@check
def one_writer(trial):
    """The same operations by one thread: the same content, read by ldb and checked by sst_dump."""
    keys = 300_000 if trial.long else 30_000

    def outcome(launcher):
        counts = _bench(trial, launcher, "--benchmarks=fillrandom,readrandom,deleterandom,readmissing,compact",
                        f"--num={keys}", "--threads=1", "--compression_type=zstd")
        content = _tool(trial, launcher, ["ldb", "--db=db", "scan", "--hex"])
        require(b"OK" in _tool(trial, launcher, ["ldb", "--db=db", "checkconsistency"]),
                f"{launcher.name}: inconsistent")
        checked = _tool(trial, launcher, ["sst_dump", "--file=db", "--command=verify"])
        require(b"orrupt" not in checked, f"{launcher.name}: {checked[-300:]!r}")
        return counts, content

    (plain_counts, plain), (shim_counts, shim) = map(outcome, trial.launchers)
    require_same("counts", plain_counts, shim_counts)
    require_same("content", plain, shim)
    # Of the keys, chosen with replacement twice, a share of (1 - 1/e)/e is written and not deleted.
    require(plain.count(b"\n") > keys / 5, "the load wrote next to nothing")


@check
def many_threads(trial):
    """Eight threads write, overwrite, read and iterate at once, by read and by mmap; the files are sound."""
    operations = 100_000 if trial.long else 6000
    benchmarks = "fillrandom,overwrite,readwhilewriting,seekrandomwhilewriting,mixgraph,updaterandom,readseq"
    for launcher in trial.launchers:
        for access in ("--mmap_read=0", "--mmap_read=1"):
            _bench(trial, launcher, f"--benchmarks={benchmarks}", f"--num={operations}", "--threads=8", access,
                   "--compression_type=none", "--cache_size=1048576")
            for command in ("verify", "check"):
                said = _tool(trial, launcher, ["sst_dump", "--file=db", f"--command={command}"])
                require(b"orrupt" not in said, f"{launcher.name}: {said[-300:]!r}")
