"""g++: what it compiles under the shim is what it compiles without, to the byte."""

import shutil

from harness import WORKLOADS, check

SOURCE = "standard_library.cc"


def _copy_source(trial):
    # Both runs name the source by the same relative path, which the object file contains.
    for launcher in trial.launchers:
        shutil.copy(WORKLOADS / SOURCE, trial.directory(launcher))


@check
def object_file(trial):
    """A file that includes much of the standard library, -O2, and the program made from it."""
    _copy_source(trial)
    trial.compare(["g++", "-std=c++20", "-O2", "-pthread", "-c", SOURCE, "-o", "library.o"],
                  files=["library.o"], witnesses=["cc1plus", "as"], timeout=300)
    trial.compare(["g++", "-pthread", "library.o", "-o", "library"], files=["library"])
    trial.compare(["./library"])


@check
def diagnostics(trial):
    """An error deep inside a template, with every note of its instantiation."""
    text = "#include <map>\n#include <mutex>\nstd::map<std::mutex, int> m; auto& x = m[{}];\n"
    for launcher in trial.launchers:
        (trial.directory(launcher) / "wrong.cc").write_text(text)
    trial.compare(["g++", "-std=c++20", "-c", "wrong.cc"], status=1, witnesses=["cc1plus"])


@check
def side_by_side(trial):
    """Two compilers of C at a time, with debug information, into an archive."""
    for launcher in trial.launchers:
        for number in range(8):
            functions = [f"static int f{i}(int x) {{ return x * {i + number} + {i}; }}" for i in range(300)]
            calls = "+".join(f"f{i}(x)" for i in range(300))
            (trial.directory(launcher) / f"f{number}.c").write_text("\n".join(
                ["#include <stdio.h>", *functions, f"int g{number}(int x) {{ return {calls}; }}", ""]))
    # Debug information names the directory, and the two runs' directories differ.
    trial.compare(["sh", "-ec", 'ls f*.c | xargs -P 2 -n 1 gcc -O2 -g "-fdebug-prefix-map=$PWD=." -c; '
                   "ar crD all.a f*.o"], files=["all.a"])
