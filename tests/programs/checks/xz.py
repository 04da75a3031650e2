"""xz with two threads, both ways."""

from harness import check, require_same
import generated


@check
def two_threads(trial):
    """Compressed bytes are equal, and decompress to the input."""
    data = generated.text_lines(96 << 20 if trial.long else 12 << 20, seed=5)
    options = ["xz", "-T2", "-2", "--block-size=1MiB", "-c"]
    compressed = trial.compare(options, stdin=data, witnesses=["xz"], timeout=600).stdout
    restored = trial.compare(["xz", "-T2", "-dc"], stdin=compressed, witnesses=["xz"]).stdout
    require_same("round trip", data, restored)


@check
def large_dictionary(trial):
    """One thread with a 64 MiB dictionary: a few very large allocations."""
    data = generated.text_lines(3 << 20, seed=6)
    options = ["xz", "-T1", "--lzma2=preset=1,dict=64MiB", "-c"]
    compressed = trial.compare(options, stdin=data, witnesses=["xz"]).stdout
    require_same("round trip", data, trial.compare(["xz", "-dc"], stdin=compressed).stdout)
