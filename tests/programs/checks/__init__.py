"""The checks, a module for each program. Their order is the order in which they run."""

import importlib

import harness

MODULES = ("invocation", "shell", "sqlite", "python", "perl", "git", "compiler", "xz", "sort", "node",
           "memcached", "redis", "nginx", "lmdb", "stress_ng", "valgrind", "postgresql", "rocksdb", "openjdk",
           "chromium", "gdb", "perf")

for module in MODULES:
    importlib.import_module(f"{__name__}.{module}")


def names():
    return list(harness.registered_checks())


def summary(name):
    return (harness.registered_checks()[name].__doc__ or "").split("\n")[0]
