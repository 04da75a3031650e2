"""perl: hashes, regular expressions, sorting, forks."""

from harness import WORKLOADS, check


@check
def mix(trial):
    """A script of all of them."""
    for _ in range(5 if trial.long else 1):
        trial.compare(["perl", WORKLOADS / "perl_mix.pl"], witnesses=["perl"])


@check
def exit_under_load(trial):
    """Global destruction of a deep structure at exit, and its absence under POSIX::_exit."""
    build = "my $l; $l = [$l, $_, 'x' x ($_ % 40)] for 1 .. 300_000; print $l->[1], qq(\\n);"
    trial.compare(["perl", "-e", build])
    trial.compare(["perl", "-MPOSIX", "-e", f"$| = 1; {build} POSIX::_exit(9)"], status=9)
