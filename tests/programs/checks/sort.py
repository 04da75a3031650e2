"""sort with two threads, in memory and with temporary files."""

import generated
from harness import check


@check
def two_threads(trial):
    """A sizable file by several keys, in memory, through temporary files, and unique lines only."""
    (trial.shared_directory() / "lines").write_bytes(
        generated.text_lines(200 << 20 if trial.long else 40 << 20, seed=9))
    for options in (["-S", "400M"], ["-S", "16M", "--compress-program=gzip"], ["-S", "400M", "-k2,2", "-s"],
                    ["-S", "100M", "-rnu"]):
        trial.compare(["sort", "--parallel=2", *options, "-o", "sorted", "../input/lines"],
                      files=["sorted"], witnesses=["sort"], timeout=600)
