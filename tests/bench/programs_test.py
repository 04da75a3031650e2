#!/usr/bin/env python3
"""Tests of bench/programs: real programs with hardly any work, and what must not pass for a result."""

import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True

PROGRAMS = os.path.join("bench", "programs")  # tests run in the root of the source tree
LIBRARY = os.path.join("runtime", "shim", "libfreehold.so")
ALLOCATORS = ["glibc", "jemalloc", "mimalloc", "tcmalloc", "freehold", "freehold_malloc"]
CASES = ["redis/strings", "redis/lists", "redis/sets_hashes", "redis/12KiB", "rocksdb/mixed", "sqlite/tables",
         *(f"{python}/{case}" for python in ("python", "python_malloc")
           for case in ("containers", "integers", "json", "text"))]


def load():
    loader = importlib.machinery.SourceFileLoader("programs", PROGRAMS)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("programs", loader))
    loader.exec_module(module)
    return module


def row(allocator, seconds, number=0, case="redis/lists", rss=10.0):
    return {"case": case, "allocator": allocator, "round": number, "seconds": seconds, "cpu_seconds": seconds,
            "peak_rss_mib": rss, "page_faults": 1}


def a_round(number, speed=1.0, **seconds):
    """Rows of one round: 3 seconds each unless told otherwise, on a machine of some speed."""
    return [row(name, seconds.get(name, 3.0) / speed, number) for name in ALLOCATORS]


class ProgramsTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def programs(self, *arguments):
        return subprocess.run([PROGRAMS, *arguments], capture_output=True, text=True, check=False)

    def write(self, rows, name="rows.json"):
        with open(self.path(name), "w", encoding="utf-8") as file:
            json.dump({"rows": rows}, file)
        return self.path(name)

    def cells(self, *files):
        """Of the first table, what each case's line says, by the heading."""
        result = self.programs("--table", *files)
        self.assertEqual(result.returncode, 0, result.stderr)
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()
                 if line.startswith("|")]
        return {line[0]: dict(zip(lines[0], line)) for line in lines[2:len(lines) // 3]}

    def fails(self, reason, *arguments):
        result = self.programs(*arguments)
        self.assertEqual((result.returncode, result.stdout), (1, ""), result.stderr)
        self.assertRegex(result.stderr, f"bench/programs: .*{reason}")
        self.assertNotIn("Traceback", result.stderr)

    # ---- Running. ----

    def test_every_case_under_every_allocator(self):
        out = self.path("out.json")
        result = self.programs("--rounds=1", "--scale=0.002", f"--library={LIBRARY}", f"--out={out}")
        self.assertEqual(result.returncode, 0, result.stderr)
        with open(out, encoding="utf-8") as file:
            rows = json.load(file)["rows"]
        cases = [case for case in CASES if f"left out: {case}: no db_bench" not in result.stderr]
        self.assertGreaterEqual(len(cases), len(CASES) - 1)
        self.assertEqual([(found["case"], found["allocator"]) for found in rows],
                         [(case, allocator) for case in cases for allocator in ALLOCATORS])
        for found in rows:
            for field in ("seconds", "cpu_seconds", "peak_rss_mib", "page_faults"):
                self.assertGreater(found[field], 0, found)
        table = self.cells(out)
        self.assertEqual(list(table), cases)

    def test_rounds_begin_with_another_allocator(self):
        out = self.path("out.json")
        result = self.programs("--rounds=2", "--scale=0.002", f"--library={LIBRARY}", f"--out={out}",
                               "--filter=^python/integers$")
        self.assertEqual(result.returncode, 0, result.stderr)
        with open(out, encoding="utf-8") as file:
            order = [found["allocator"] for found in json.load(file)["rows"]]
        self.assertEqual(order, [*ALLOCATORS, *ALLOCATORS[1:], ALLOCATORS[0]])

    def test_library_that_is_not_freehold(self):
        self.fails("freehold: malloc of .* comes from", "--rounds=1", "--scale=0.002", "--filter=^sqlite/",
                   "--library=/lib/x86_64-linux-gnu/libm.so.6")

    def test_nothing_to_run(self):
        self.fails("no such file", f"--library={self.path('absent.so')}")
        self.fails("no such case", f"--library={LIBRARY}", "--filter=absent")
        self.assertEqual(self.programs("--rounds=0").returncode, 2)
        self.assertEqual(self.programs("--scale=0").returncode, 2)

    def test_result_that_cannot_be_written(self):
        out = self.path("no/file.json")
        self.fails("no/file.json: No such file", "--table", self.write(a_round(0)), f"--out={out}")

    def test_programs_that_fail(self):
        module = load()
        allocator = module.Allocator("glibc", "libc.so.6", {})
        with self.assertRaisesRegex(module.ProgramError, "exit status 1: .*no such table"):
            absent = module.Command("sqlite3", ["-bail", ":memory:", "SELECT * FROM absent"])
            absent.measure(allocator, self.folder.name)
        with self.assertRaisesRegex(module.ProgramError, "absent-program: not found"):
            module.Command("absent-program", []).measure(allocator, self.folder.name)
        with self.assertRaisesRegex(module.ProgramError, "prints something else"):
            random = module.Command("sqlite3", [":memory:", "SELECT hex(randomblob(16))"])
            random.measure(allocator, self.folder.name)
            random.measure(allocator, self.folder.name)
        with self.assertRaisesRegex(module.ProgramError, "redis-benchmark: "):
            module.Redis(10, ["-t"]).measure(allocator, self.folder.name)

    def test_server_that_does_not_start(self):
        module = load()
        with self.assertRaisesRegex(module.ProgramError, "the server did not start: .*No such file"):
            module.Redis(10, ["-t", "set"]).measure(module.Allocator("glibc", "libc.so.6", {}), self.path("absent"))

    # ---- The table. ----

    def test_medians_and_the_best_peer(self):
        line = self.cells(self.write(a_round(0, tcmalloc=2.0, freehold=1.0, freehold_malloc=4.0)))["redis/lists"]
        self.assertEqual((line["glibc"], line["tcmalloc"], line["freehold"]), ("3.000", "2.000", "1.000"))
        self.assertEqual(line["freehold : best peer"], "2.000 (tcmalloc)")
        self.assertEqual(line["freehold_malloc : best peer"], "0.500 (tcmalloc)")

    def test_what_a_round_has_in_common_cancels(self):
        rounds = [found for number, speed in enumerate((1.0, 0.5, 0.25, 2.0))
                  for found in a_round(number, speed, mimalloc=2.7, freehold=2.0)]
        self.assertEqual(self.cells(self.write(rounds))["redis/lists"]["freehold : best peer"], "1.350 (mimalloc)")

    def test_several_files_are_rounds_of_one(self):
        one = self.write(a_round(0, freehold=1.0), "one.json")
        two = self.write(a_round(0, freehold=2.0), "two.json")
        self.assertEqual(self.cells(one, two)["redis/lists"]["freehold"], "1.500")

    def test_less_memory_is_a_smaller_ratio(self):
        rows = [row(name, 1.0, rss=30.0 if name == "freehold" else 20.0) for name in ALLOCATORS]
        result = self.programs("--table", self.write(rows))
        memory = result.stdout[result.stdout.index("Peak resident"):]
        self.assertRegex(memory, re.escape("| 30.0 | 20.0 | 1.500 (glibc) | 1.000 (glibc) |"))

    def test_no_table_of_what_is_incomplete(self):
        self.fails("redis/lists: no round with every allocator", "--table", self.write(a_round(0)[1:]))
        with open(self.path("other.json"), "w", encoding="utf-8") as file:
            file.write('{"benchmarks": []}')
        self.fails("other.json: not a result", "--table", self.path("other.json"))
        self.fails("absent.json: No such file", "--table", self.path("absent.json"))


if __name__ == "__main__":
    unittest.main()
