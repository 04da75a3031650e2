#!/usr/bin/env python3
"""The program checks themselves: they pass with an allocator known to be good (mimalloc), and fail with
every kind of runner that must not pass."""

import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True  # The sources may lie in a read-only or a build tree.

import harness

RUN = harness.PROGRAMS_DIR / "run"
GOOD = "env LD_PRELOAD=libmimalloc.so.2"


def run(runner, only, library="libmimalloc"):
    done = subprocess.run([RUN, "--runner", runner, "--library", library, "--only", only],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


class RunTest(unittest.TestCase):
    def assert_fails(self, reason, runner, only="perl.exit_under_load", library="libmimalloc"):
        status, output = run(runner, only, library)
        self.assertEqual(status, 1, output)
        self.assertRegex(output, rf"FAIL {only}: .*{reason}")
        self.assertIn("0 passed, 1 failed", output)

    def test_a_good_allocator_passes(self):
        status, output = run(GOOD, "perl.exit_under_load,invocation,shell.background_jobs")
        self.assertEqual(status, 0, output)
        self.assertRegex(output, r"\n\d+ passed, 0 failed\n$")

    def test_a_library_that_is_not_there_fails(self):
        self.assert_fails("is not mapped", "env LD_PRELOAD=/nonexistent/libfreehold.so",
                          library="libfreehold.so")

    def test_a_runner_without_a_library_fails(self):
        self.assert_fails("is not mapped", "env")

    def test_a_library_that_children_do_not_inherit_fails(self):
        loader = "/lib64/ld-linux-x86-64.so.2 --preload libmimalloc.so.2"
        self.assert_fails("is not mapped under `sh", f"sh -c '{loader} $(command -v $0) \"$@\"'")

    def test_a_library_that_does_not_serve_malloc_fails(self):
        self.assert_fails("malloc of sort comes from .*libc", "env LD_PRELOAD=libm.so.6", library="libm.so")

    def test_a_runner_that_is_missing_fails(self):
        self.assert_fails("cannot start", "/nonexistent/freehold run --")

    def test_another_status_fails(self):
        self.assert_fails("status 5, .* expected status 0",
                          GOOD + " sh -c '[ \"$1\" != printf ] || exit 5; exec \"$@\"' sh", only="invocation.arguments")

    def test_more_output_fails(self):
        for stream, redirect in (("stdout", ""), ("stderr", ">&2")):
            self.assert_fails(stream, GOOD + f" sh -c 'echo more {redirect}; exec \"$@\"' sh")

    def test_another_file_fails(self):
        self.assert_fails("tables.db line 1", GOOD + " sh -c '\"$@\"; s=$?; [ ! -f tables.db ] || "
                          "echo more > tables.db; exit $s' sh", only="sqlite.file")

    def test_a_signal_reported_as_a_status_fails(self):
        self.assert_fails("expected status -", GOOD + " sh -c '\"$@\"; exit $?' sh",
                          only="invocation.fatal_signals")

    def test_a_descriptor_that_leaks_fails(self):
        self.assert_fails("stdout line", GOOD + " sh -c 'exec 7</dev/null; exec \"$@\"' sh",
                          only="invocation.inheritance")

    def test_a_server_that_answers_differently_fails(self):
        other = GOOD + " sh -c '[ \"$1\" = redis-server ] && exec \"$@\" --set-max-intset-entries 0; " \
                       "exec \"$@\"' sh"
        self.assert_fails("command ", other, only="redis.commands")

    def test_unknown_names_are_refused(self):
        self.assertEqual(run(GOOD, "perl,nosuch")[0], 2)


class ThroughputTest(unittest.TestCase):
    def test_prints_ratios(self):
        for server in ("redis", "memcached", "nginx"):
            done = subprocess.run([harness.PROGRAMS_DIR / "throughput", "--server", server, "--runner", GOOD, "--library",
                                   "libmimalloc", "--runs", "1", "--seconds", "1", "--json"],
                                  stdout=subprocess.PIPE, check=True)
            result = json.loads(done.stdout)
            self.assertEqual([len(result["runs"][name]) for name in ("plain", "shim")], [1, 1])
            for figure in ("throughput", "p50_us", "p99.9_us", "server_cpu_us", "rss"):
                self.assertGreater(result["summary"][figure]["ratio"], 0, figure)

    def test_goals_that_are_missed_fail(self):
        # A server that gets a third of the CPU.
        slow = GOOD + " sh -c '[ \"$1\" = memcached ] && { sh -c \"while :; do :; done\" & sh -c \"while :; do :; done\" & }; exec \"$@\"' sh"
        done = subprocess.run([harness.PROGRAMS_DIR / "throughput", "--server", "memcached", "--runner", slow, "--library",
                               "libmimalloc", "--runs", "1", "--seconds", "1", "--check"], stdout=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn(">= 0.97", done.stdout)

    def test_a_library_that_is_not_there_fails(self):
        done = subprocess.run([harness.PROGRAMS_DIR / "throughput", "--server", "redis", "--runner", "env"],
                              stderr=subprocess.PIPE, text=True)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("is not mapped", done.stderr)


class WitnessTest(unittest.TestCase):
    def launch(self, library, argv, witnesses):
        launcher = harness.Launcher("shim", ["env", "LD_PRELOAD=libmimalloc.so.2"], library, {})
        with tempfile.TemporaryDirectory() as directory:
            return launcher.run(argv, cwd=pathlib.Path(directory), witnesses=witnesses)

    def test_sees_the_library_in_a_child(self):
        self.launch("libmimalloc", ["sh", "-c", "sleep 0.5; exit 0"], ["sh", "sleep"])

    def test_misses_a_library_that_is_not_there(self):
        with self.assertRaisesRegex(harness.Failure, "libother was not seen in sleep"):
            self.launch("libother", ["sleep", "0.2"], ["sleep"])

    def test_misses_a_child_that_did_not_inherit_it(self):
        with self.assertRaisesRegex(harness.Failure, "was not seen in sleep"):
            self.launch("libmimalloc", ["sh", "-c", "env -u LD_PRELOAD sleep 0.2; exit 0"], ["sh", "sleep"])

    def test_a_program_that_hangs_is_ended(self):
        launcher = harness.Launcher("shim", [], None, {})
        with self.assertRaisesRegex(harness.Failure, "sleep still runs after 0.2 s"):
            launcher.run(["sleep", "30"], cwd=pathlib.Path("/"), timeout=0.2)


if __name__ == "__main__":
    unittest.main()
