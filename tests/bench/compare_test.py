#!/usr/bin/env python3
"""Tests of bench/compare, as its users see it: files in, text and exit status out."""

import json
import os
import subprocess
import tempfile
import unittest
import xml.etree.ElementTree

COMPARE = os.path.join("bench", "compare")  # tests run in the root of the source tree


def run_of(name, **fields):
    """One benchmark entry as Google Benchmark writes it."""
    return {"name": name, "run_name": name, "run_type": "iteration", "iterations": 1, "real_time": 1.0,
            "cpu_time": 1.0, "time_unit": "ns", **fields}


def p2_runs(freehold=100e6, kernel=2e6):
    """P2's case at one thread: 50 times the kernel unless told otherwise."""
    return [run_of("map_unmap/freehold/64KiB/threads:1", items_per_second=freehold),
            run_of("map_unmap/kernel/64KiB/threads:1", items_per_second=kernel)]


class CompareTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def write(self, runs, name="result.json", context=None):
        with open(self.path(name), "w", encoding="utf-8") as file:
            json.dump({"context": context or {}, "benchmarks": runs}, file)
        return self.path(name)

    def compare(self, *arguments, **environment):
        return subprocess.run([COMPARE, *arguments], capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment})

    def rows(self, runs, target=None):
        """What --json says about `runs`."""
        result = self.compare(self.write(runs), "--json")
        self.assertEqual(result.returncode, 0, result.stderr)
        return [row for row in json.loads(result.stdout) if target in (None, row["target"])]

    def measured(self, runs, target):
        return [row for row in self.rows(runs, target) if row["value"] is not None]

    # ---- Values. ----

    def test_ratio_of_product_to_baseline(self):
        (row,) = self.measured(p2_runs(freehold=100e6, kernel=2e6), "P2")
        self.assertEqual(row["case"], "map_unmap/freehold/64KiB/threads:1 vs kernel")
        self.assertEqual(row["value"], 50)
        self.assertEqual(row["goal"], 30)
        self.assertIs(row["holds"], True)

    def test_ratio_below_the_goal_does_not_hold(self):
        (row,) = self.measured(p2_runs(freehold=58e6, kernel=2e6), "P2")
        self.assertEqual(row["value"], 29)
        self.assertIs(row["holds"], False)

    def test_goal_itself_holds(self):
        (row,) = self.measured(p2_runs(freehold=60e6, kernel=2e6), "P2")
        self.assertIs(row["holds"], True)

    def test_scaling_compares_thread_counts(self):
        rows = self.measured([run_of("map_unmap/freehold/64KiB/threads:1", items_per_second=10e6),
                              run_of("map_unmap/freehold/64KiB/threads:2", items_per_second=17e6)], "P2")
        (row,) = rows
        self.assertEqual(row["case"], "map_unmap/freehold/64KiB/threads:2 vs threads:1")
        self.assertEqual(row["value"], 1.7)
        self.assertIs(row["holds"], False)

    def test_time_counts_where_no_rate_is_reported(self):
        runs = [run_of("file_window/freehold/64KiB/threads:1", real_time=1.0, time_unit="us"),
                run_of("file_window/kernel/64KiB/threads:1", real_time=9000.0, time_unit="ns")]
        (row,) = self.measured(runs, "P9")
        self.assertAlmostEqual(row["value"], 9)

    def test_times_and_their_baselines(self):
        def disjoint(implementation, threads, rate):
            return run_of(f"disjoint/{implementation}/own_granule/threads:{threads}", items_per_second=rate)
        rows = self.measured([run_of("pair_exclusive/freehold/threads:1", real_time=14.0),
                              run_of("pair_shared/freehold/threads:1", real_time=16.0),
                              disjoint("freehold", 1, 70e6), disjoint("freehold", 2, 140e6),
                              disjoint("tree", 2, 20e6), disjoint("coarse", 2, 35e6)], "P5")
        self.assertEqual([(row["value"], row["holds"]) for row in rows],
                         [(14.0, True), (16.0, False), (2.0, True), (7.0, True), (4.0, False)])

    def test_counters_with_upper_and_lower_goals(self):
        rows = self.measured([run_of("populate_stall/freehold/populate/threads:2", calls_per_second=400e3,
                                     p999_us=61.0, worst_us=30e3, a_seconds=1.0),
                              run_of("populate_stall/kernel/populate/threads:2", a_seconds=2.0)], "P1")
        verdicts = {row["case"].split(": ")[1]: (row["value"], row["holds"]) for row in rows}
        self.assertEqual(verdicts, {"calls_per_second": (400e3, True), "p999_us": (61.0, False),
                                    "worst_us": (30e3, True), "a_seconds vs kernel": (0.5, True)})

    def test_holds_of_large_ranges_may_be_a_bucket_longer(self):
        rows = self.measured([run_of(f"tree_lock_hold/freehold/unmap_{size}/threads:1", p50_ns=p50, p99_ns=p99)
                              for size, p50, p99 in (("4KiB", 100.0, 1000.0), ("4GiB", 125.0, 1500.0))], "P6")
        self.assertEqual([(row["case"].split("threads:1: ")[1], row["value"], row["holds"]) for row in rows],
                         [("p50_ns vs unmap_4KiB", 1.25, True), ("p99_ns vs unmap_4KiB", 1.5, False)])

    def test_lookups_have_a_ratio_and_a_time(self):
        rows = self.measured([run_of("vma_lookup/freehold/100000/threads:2", items_per_second=10e6, lookup_ns=101.0),
                              run_of("vma_lookup/btree_shared_mutex/100000/threads:2", items_per_second=1e6)], "P4")
        self.assertEqual([(row["value"], row["holds"]) for row in rows], [(10, True), (101.0, False)])

    def test_what_others_do_stands_beside(self):
        runs = p2_runs() + [run_of(f"map_unmap/{name}/64KiB/threads:1", items_per_second=rate)
                            for name, rate in (("coarse", 4e6), ("tree", 512.0))]
        (row,) = self.measured(runs, "P2")
        self.assertEqual(row["beside"], {"freehold": 100e6, "coarse": 4e6, "tree": 512.0, "kernel": 2e6})
        lines = self.compare(self.write(runs)).stdout.splitlines()
        (line,) = [line for line in lines if "/*/" in line]
        self.assertRegex(line, r"map_unmap/\*/64KiB/threads:1 +freehold 100 M/s  coarse 4.00 M/s  tree 512 /s  "
                               r"kernel 2.00 M/s$")

    def test_only_what_was_measured_stands_beside(self):
        runs = [run_of("disjoint/freehold/own_granule/threads:2", items_per_second=3e9),
                run_of("disjoint/coarse/own_granule/threads:2", items_per_second=9e3),
                run_of("pair_shared/freehold/threads:1", real_time=5.0)]
        lines = self.compare(self.write(runs)).stdout.splitlines()
        beside = [line.split("threads:")[1].split(maxsplit=1)[1] for line in lines if "/*/" in line]
        self.assertEqual(beside, ["freehold 200 M/s", "freehold 3.00 G/s  coarse 9.00 k/s"])

    def test_star_covers_every_variant(self):
        variants = ("populate", "populate_huge")
        rows = self.measured([run_of(f"populate_stall/freehold/{variant}/threads:2", worst_us=1.0)
                              for variant in variants], "P1")
        self.assertEqual([row["case"] for row in rows],
                         [f"populate_stall/freehold/{variant}/threads:2: worst_us" for variant in variants])

    def test_goal_of_zero(self):
        for writes, holds in ((0, True), (1, False)):
            (row,) = self.measured([run_of("steady_state/freehold/threads:2", mmap_lock_writes=writes)], "P7")
            self.assertIs(row["holds"], holds)

    def test_malloc_cases_against_every_peer_and_their_mean(self):
        runs = []
        for case, rates in (("small_fifo/{}/threads:1", (100.0, 100.0, 50.0)),
                            ("burst/{}/lifo/threads:2", (100.0, 400.0, 100.0))):
            for implementation, rate in zip(("freehold", "mimalloc", "glibc"), rates):
                runs.append(run_of(case.format(implementation), items_per_second=rate))
        values = {row["case"]: (row["value"], row["holds"]) for row in self.measured(runs, "P10")}
        self.assertEqual(values["small_fifo/freehold/threads:1 vs mimalloc"], (1.0, True))
        self.assertEqual(values["burst/freehold/lifo/threads:2 vs mimalloc"], (0.25, False))
        self.assertEqual(values["small_fifo/freehold/threads:1 vs glibc"], (2.0, True))
        self.assertAlmostEqual(values["all cases vs mimalloc"][0], 0.5)
        self.assertAlmostEqual(values["all cases vs glibc"][0], 2 ** 0.5)
        self.assertIs(values["all cases vs glibc"][1], True)
        self.assertNotIn("all cases vs jemalloc", values)

    def peak_rows(self, peaks, context):
        """P10's rows about memory, of one case that had these peaks."""
        runs = [run_of(f"strings/{name}/threads:1", items_per_second=1.0, peak_rss_mib=peak)
                for name, peak in peaks.items()]
        result = self.compare(self.write(runs, context=context), "--json")
        self.assertEqual(result.returncode, 0, result.stderr)
        return [(row["value"], row["holds"]) for row in json.loads(result.stdout)
                if row["case"] == "strings/freehold/threads:1: peak_rss_mib vs the median peer"]

    def test_memory_is_compared_with_the_median_peer(self):
        peers = {"mimalloc": 90.0, "glibc": 8.0, "jemalloc": 10.0, "tcmalloc": 12.0}  # the median: 11
        isolated = {"isolated": "true"}
        self.assertEqual(self.peak_rows({"freehold": 11.0, **peers}, isolated), [(1.0, True)])
        self.assertEqual(self.peak_rows({"freehold": 22.0, **peers}, isolated), [(2.0, False)])
        self.assertEqual(self.peak_rows({"freehold": 4.0, "glibc": 8.0}, isolated), [(0.5, True)])

    def test_memory_of_a_process_with_other_cases_is_not_compared(self):
        self.assertEqual(self.peak_rows({"freehold": 1.0, "glibc": 8.0}, {}), [])

    # ---- Samples. ----

    def test_median_of_repetitions_and_files(self):
        first = self.write(p2_runs(freehold=60e6) + p2_runs(freehold=1e6), "first.json")
        second = self.write(p2_runs(freehold=80e6), "second.json")
        result = self.compare(first, second, "--json")
        (row,) = [row for row in json.loads(result.stdout) if row["value"] is not None]
        self.assertEqual(row["value"], 30)
        self.assertEqual(row["samples"], 3)

    def test_aggregates_are_not_samples(self):
        runs = p2_runs()
        for run in p2_runs(freehold=1.0):
            runs.append({**run, "run_type": "aggregate", "aggregate_name": "stddev"})
        (row,) = self.measured(runs, "P2")
        self.assertEqual((row["value"], row["samples"]), (50, 1))

    def test_reported_medians_stand_in_for_missing_repetitions(self):
        runs = [{**run, "run_type": "aggregate", "aggregate_name": "median"} for run in p2_runs()]
        (row,) = self.measured(runs, "P2")
        self.assertEqual(row["value"], 50)

    def test_parts_that_the_library_adds_to_names_are_ignored(self):
        runs = [run_of("map_unmap/freehold/64KiB/iterations:1/repeats:3/real_time/threads:1",
                       items_per_second=60e6),
                run_of("map_unmap/kernel/64KiB/min_time:0.500/manual_time/threads:1",
                       items_per_second=2e6)]
        (row,) = self.measured(runs, "P2")
        self.assertEqual(row["value"], 30)

    def test_failed_case_is_a_warning_and_not_a_sample(self):
        failed = run_of("map_unmap/freehold/64KiB/threads:1", error_occurred=True, error_message="broke")
        result = self.compare(self.write([*p2_runs(), failed]), "--json")
        self.assertIn("map_unmap/freehold/64KiB/threads:1: broke", result.stderr)
        (row,) = [row for row in json.loads(result.stdout) if row["value"] is not None]
        self.assertEqual(row["samples"], 1)

    def test_smoke_results_are_called_meaningless(self):
        result = self.compare(self.write(p2_runs(), context={"smoke": "true"}))
        self.assertEqual(result.returncode, 0)
        self.assertIn("mean nothing", result.stderr)

    # ---- Output. ----

    def test_every_target_is_listed(self):
        rows = self.rows(p2_runs())
        targets = list(dict.fromkeys(row["target"] for row in rows))
        self.assertEqual(targets, [f"P{number}" for number in range(1, 13)])
        for row in rows:
            self.assertEqual(row["holds"] is None, row["value"] is None, row)

    def test_table(self):
        result = self.compare(self.write(p2_runs(freehold=30e6)))
        self.assertEqual(result.returncode, 0, result.stderr)
        lines = result.stdout.splitlines()
        (line,) = [line for line in lines if "vs kernel" in line and "threads:1" in line]
        self.assertRegex(line, r"map_unmap/freehold/64KiB/threads:1 vs kernel +15.0 x +>= 30 x +NO +█{5} {5}│")
        (below_p9,) = [below for above, below in zip(lines, lines[1:]) if above.startswith("P9 ")]
        self.assertEqual(below_p9.strip(), "not measured")
        self.assertIn("0 of 1 goals hold; not measured: P1, P3,", lines[-1])

    def test_value_just_below_the_goal_is_not_rounded_onto_it(self):
        runs = [run_of("small_fifo/freehold/threads:1", items_per_second=968.0),
                run_of("small_fifo/glibc/threads:1", items_per_second=1000.0)]
        self.assertRegex(self.compare(self.write(runs)).stdout, r"vs glibc +0\.968 x +>= 0\.97 x +NO")

    def test_bar_is_full_at_twice_the_goal(self):
        result = self.compare(self.write(p2_runs(freehold=1e12)))
        self.assertRegex(result.stdout, r"yes +█{20}\n")

    def test_no_color_into_a_pipe(self):
        self.assertNotIn("\x1b", self.compare(self.write(p2_runs())).stdout)

    def test_color_on_a_terminal_unless_refused(self):
        path = self.write(p2_runs())
        self.assertIn("\x1b[32m", self.on_terminal(path))
        self.assertNotIn("\x1b", self.on_terminal(path, NO_COLOR="1"))

    def on_terminal(self, path, **environment):
        """What compare writes to a terminal."""
        ours, theirs = os.openpty()
        settings = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        settings.update(TERM="xterm", PYTHONIOENCODING="utf-8", **environment)
        with subprocess.Popen([COMPARE, path], stdout=theirs, env=settings):
            os.close(theirs)
            output = b""
            while True:
                try:
                    piece = os.read(ours, 65536)
                except OSError:  # EIO: the other end is closed
                    break
                if not piece:
                    break
                output += piece
        os.close(ours)
        return output.decode("utf-8")

    def test_plain_characters_where_blocks_cannot_be_encoded(self):
        result = self.compare(self.write(p2_runs(freehold=30e6)), PYTHONIOENCODING="ascii")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertRegex(result.stdout, r"NO +##### {5}\|")

    def test_svg(self):
        result = self.compare(self.write(p2_runs()), "--svg", self.path("chart.svg"))
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("P2", result.stdout)
        text = "".join(xml.etree.ElementTree.parse(self.path("chart.svg")).getroot().itertext())
        self.assertIn("map_unmap/freehold/64KiB/threads:1 vs kernel", text)
        self.assertIn("50.0 x  (goal >= 30 x)", text)

    # ---- Errors: one line, exit status 2. ----

    def assert_refused(self, result, *parts):
        self.assertEqual(result.returncode, 2)
        self.assertEqual(result.stdout, "")
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
        for part in parts:
            self.assertIn(part, result.stderr)

    def test_missing_file(self):
        self.assert_refused(self.compare(self.path("absent.json")), "absent.json", "No such file")

    def test_not_json(self):
        with open(self.path("text.json"), "w", encoding="utf-8") as file:
            file.write("Benchmark  Time\n")
        self.assert_refused(self.compare(self.path("text.json")), "text.json", "not JSON")

    def test_other_json(self):
        with open(self.path("list.json"), "w", encoding="utf-8") as file:
            file.write("[1, 2]")
        self.assert_refused(self.compare(self.path("list.json")), "list.json", "not a result of Google")

    def test_no_known_case(self):
        self.assert_refused(self.compare(self.write([run_of("sort/std/threads:1")])), "no case that a target")

    def test_baseline_alone_is_no_known_case(self):
        self.assert_refused(self.compare(self.write(p2_runs()[1:])), "no case that a target")

    def test_svg_that_cannot_be_written(self):
        result = self.compare(self.write(p2_runs()), "--svg", self.path("no/chart.svg"))
        self.assert_refused(result, "chart.svg", "No such file")

    def test_no_arguments(self):
        result = self.compare()
        self.assertEqual(result.returncode, 2)
        self.assertIn("usage: bench/compare", result.stderr)


if __name__ == "__main__":
    unittest.main()
