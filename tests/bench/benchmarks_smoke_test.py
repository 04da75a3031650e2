#!/usr/bin/env python3
"""Runs every case of every benchmark with hardly any work: all run, under the names tools rely on."""

import json
import os
import subprocess
import tempfile
import unittest

BENCH = "bench"  # tests run in the root of the source tree
QUICK = ("--smoke", "--threads=1,2", "--benchmark_min_time=0.001")
STALL = ("--ranges=2", "--range_mib=8", "--min_seconds=0")

SPACES = ("freehold", "coarse", "tree", "kernel")
RANGE_LOCKS = ("freehold", "tree", "coarse", "shared_mutex")
ALLOCATORS = ("freehold", "glibc", "mimalloc", "jemalloc", "tcmalloc")


def names(template, implementations, threads=(1, 2)):
    return {template.format(implementation) + f"/threads:{count}"
            for implementation in implementations for count in threads}


def stall_names():
    return set().union(
        *(names("populate_stall/{}/" + how, ("kernel",))
          for how in ("populate", "madvise", "touch", "touch_huge")),
        names("populate_stall/{}/populate", ("freehold", "coarse")),
        names("populate_stall/{}/populate_huge", ("freehold",)))


def map_names():
    cycles = [f"{operation}/{{}}/{size}"
              for operation in ("map_unmap", "map_touch4_unmap", "map_touch_all_unmap")
              for size in ("16KiB", "64KiB", "1MiB")]
    others = ["map_populate_unmap/{}/1MiB", "map_mixed/{}/live64", "populate/{}/2MiB",
              "populate/{}/64MiB", "protect/{}/4KiB", "lookup/{}/1000"]
    moves = [f"remap_move/{where}" for size in ("64KiB", "256KiB", "1MiB", "64MiB")
             for where in (f"freehold/{size}", f"kernel/{size}", f"kernel/{size}_dontunmap")]
    return set().union(*(names(template, SPACES) for template in cycles + others),
                       {f"{move}/threads:1" for move in moves})


def range_lock_names():
    any_threads = ["disjoint/{}/own_granule", "disjoint/{}/same_granule", "overlapping/{}", "mixed/{}",
                   "long_range/{}/own"]
    return set().union(*(names(template, RANGE_LOCKS) for template in any_threads),
                       *(names(template, RANGE_LOCKS, (1,))
                         for template in ("pair_exclusive/{}", "pair_shared/{}")),
                       {"pair_exclusive/freehold/recorded/threads:1"},
                       names("long_range/{}/beside", RANGE_LOCKS, (2,)))


INDEXES = ("freehold", "btree_shared_mutex", "map")


def vma_tree_names():
    sizes = (100, 10000, 1000000)
    operations = [f"{operation}/{{}}/{size}" for operation in ("vma_map", "vma_unmap", "vma_gap")
                  for size in sizes]
    return set().union(
        *(names(f"vma_lookup/{{}}/{size}", INDEXES) for size in (*sizes, 100000)),
        names("vma_lookup_churn/{}/100000", INDEXES, (2,)),
        *(names(template, INDEXES, (1,)) for template in operations))


PAGED = {"file_sequential/freehold", "cold_fault/freehold/64KiB", "cold_fault/freehold/64KiB_all",
         "fault_isolation/freehold/10ms"}


def fault_names():
    peers = {"file_sequential/pread", "file_sequential/pread_reused", "file_sequential/kernel",
             "cold_fault/pread/64KiB", "cold_fault/kernel/64KiB"}
    return {f"{name}/threads:1" for name in PAGED | peers}


def hold_names():
    verbs = [f"{verb}_{size}" for verb in ("populate", "protect", "unmap") for size in ("4KiB", "4KiB_cold", "4GiB")]
    verbs += [f"{verb}_{count}vmas" for verb in ("protect", "unmap", "replace") for count in (1, 100000)]
    return set().union(*(names(f"tree_lock_hold/{{}}/{verb}", ("freehold",), (1,)) for verb in verbs))


def file_mapping_names():
    cases = [f"file_window/{{}}/{size}" for size in ("4KiB", "64KiB", "1MiB")] + ["file_scan/{}/64KiB"]
    return set().union(*(names(template, SPACES) for template in cases),
                       names("file_window_program/{}/64KiB", ("freehold", "kernel"), (1,)))


def stack_names():
    return set().union(
        *(names(f"thread_create/{{}}/{case}", ("freehold", "glibc")) for case in ("default", "deep_1MiB")),
        *(names(f"thread_create/{{}}/{case}", ("freehold", "glibc"), (1,)) for case in ("16MiB", "64MiB", "10000_live")),
        names("thread_create/{}/default", ("kernel",)),
        names("fiber_stack/{}/256KiB", ("freehold", "kernel")))


def steady_state_names():
    return names("steady_state/{}", ("freehold", "kernel"))


def malloc_names():
    any_threads = ["small_lifo/{}/64B", "small_lifo/{}/mixed", "small_fifo/{}", "mixed_random/{}",
                   "pareto_random/{}", "random_elsewhere/{}", "generations/{}", "fragmentation/{}",
                   "vector_growth/{}", "strings/{}", "hash_map/{}/std_unordered", "hash_map/{}/absl_flat",
                   "hash_map/{}/absl_node", "burst/{}/lifo", "burst/{}/fifo", "burst/{}/random", "thread_churn/{}",
                   "successor_threads/{}", "calloc/{}/64B", "calloc/{}/4KiB", "calloc/{}/1MiB",
                   "large_buffers/{}/5-25MiB", "realloc_growth/{}/1MiB"]
    two_threads = ["producer_consumer/{}", "asymmetric/{}", "exchange/{}", "false_sharing/{}/active",
                   "false_sharing/{}/passive"]
    one_thread = ["realloc_growth/{}/1GiB", "idle_rss/{}/1GiB"]
    return set().union(*(names(template, ALLOCATORS) for template in any_threads),
                       *(names(template, ALLOCATORS, (2,)) for template in two_threads),
                       *(names(template, ALLOCATORS, (1,)) for template in one_thread))


# What a kernel or a system may lack, by how the note on standard error begins.
OPTIONAL = {
    "populate_stall/kernel/madvise": {"populate_stall/kernel/madvise"},
    "populate_stall with huge pages": {"populate_stall/kernel/touch_huge",
                                       "populate_stall/freehold/populate_huge"},
    "populate/kernel": {"populate/kernel/2MiB", "populate/kernel/64MiB"},
    "faults/freehold": PAGED,
    "lookup/kernel": {"lookup/kernel/1000"},
    "tree_lock_hold/4GiB": {f"tree_lock_hold/freehold/{verb}_4GiB"
                            for verb in ("populate", "protect", "unmap")},
}


def left_out(standard_error):
    """The cases, without thread counts, that the benchmark said it leaves out."""
    lines = [line for line in standard_error.splitlines() if line.startswith("left out: ")]
    return set().union(*(OPTIONAL[line.split(": ")[1]] for line in lines))


class BenchmarksSmokeTest(unittest.TestCase):
    maxDiff = None

    def run_benchmark(self, name, expected, *flags):
        """Runs it, checks its names, and returns its JSON."""
        result = subprocess.run([os.path.join(BENCH, name), *QUICK, *flags, "--benchmark_format=json"],
                                capture_output=True, text=True, check=False)
        self.assertEqual(result.returncode, 0, result.stdout[-2000:] + result.stderr)
        document = json.loads(result.stdout)
        absent = left_out(result.stderr)
        self.assertEqual({run["name"] for run in document["benchmarks"]},
                         {case for case in expected if case.rsplit("/", 1)[0] not in absent})
        for run in document["benchmarks"]:
            self.assertGreater(run["real_time"], 0, run["name"])
        return document

    def measured_targets(self, document):
        """The targets that bench/compare finds a value for in `document`; those without a gap."""
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            result = subprocess.run([os.path.join(BENCH, "compare"), "--json", file.name],
                                    capture_output=True, text=True, check=False)
        self.assertEqual(result.returncode, 0, result.stderr)
        rows = json.loads(result.stdout)
        unmeasured = {row["target"] for row in rows if row["value"] is None}
        measured = {row["target"] for row in rows if row["value"] is not None}
        return measured, measured - unmeasured

    def test_stall_benchmark(self):
        document = self.run_benchmark("stall_benchmark", stall_names(), *STALL)
        for run in document["benchmarks"]:
            counters = {"a_seconds", "rounds"}
            if run["name"].endswith("/threads:2"):
                counters |= {"calls", "calls_per_second", "p50_us", "p99_us", "p999_us", "worst_us"}
            self.assertLessEqual(counters, set(run), run["name"])
            self.assertAlmostEqual(run["real_time"], run["a_seconds"], delta=run["a_seconds"] * 0.01)
        self.assertEqual(self.measured_targets(document), ({"P1"}, {"P1"}))

    def test_stall_benchmark_prints_its_table(self):
        result = subprocess.run([os.path.join(BENCH, "stall_benchmark"), *QUICK, *STALL,
                                 "--benchmark_filter=freehold/populate/"],
                                capture_output=True, text=True, check=True)
        (row,) = [line for line in result.stdout.splitlines() if line.startswith("freehold/populate ")]
        self.assertRegex(row, r"freehold/populate +\d+ +\d+( +[0-9.]+ (us|ms|s)){4} +[0-9.]+ +[0-9.]+")

    def test_stall_benchmark_refuses_what_does_not_fit(self):
        result = subprocess.run([os.path.join(BENCH, "stall_benchmark"), "--range_mib=1000000000"],
                                capture_output=True, text=True, check=False)
        self.assertEqual(result.returncode, 1)
        self.assertIn("choose a smaller --range_mib", result.stderr)

    def test_map_benchmark(self):
        document = self.run_benchmark("map_benchmark", map_names())
        self.assertEqual(self.measured_targets(document), ({"P2", "P3"}, {"P2", "P3"}))

    def test_range_lock_benchmark(self):
        document = self.run_benchmark("range_lock_benchmark", range_lock_names())
        for run in document["benchmarks"]:
            if run["name"].startswith(("overlapping/", "mixed/")):
                waits = {f"longest_wait_us_{thread}" for thread in range(run["threads"])}
                self.assertLessEqual(waits, set(run), run["name"])
        self.assertEqual(self.measured_targets(document), ({"P5"}, {"P5"}))

    def test_vma_tree_benchmark(self):
        document = self.run_benchmark("vma_tree_benchmark", vma_tree_names())
        self.assertEqual(self.measured_targets(document), ({"P4"}, {"P4"}))
        for run in document["benchmarks"]:
            if run["name"].startswith("vma_lookup/"):
                self.assertLessEqual({"bytes_per_vma", "lookup_ns"}, set(run), run["name"])

    def test_fault_benchmark(self):
        document = self.run_benchmark("fault_benchmark", fault_names())
        for run in document["benchmarks"]:
            if run["name"].startswith("cold_fault/"):
                self.assertLessEqual(run["p50_us"], run["p99_us"], run["name"])
            if run["name"].startswith("fault_isolation/"):
                # Too few faults for a ratio.
                self.assertGreaterEqual(run["p99_ratio"], 0)

    def test_stack_benchmark(self):
        document = self.run_benchmark("stack_benchmark", stack_names())
        self.assertEqual(self.measured_targets(document), ({"P8"}, {"P8"}))
        for run in document["benchmarks"]:
            if run["name"] == "thread_create/glibc/10000_live/threads:1":
                self.assertGreaterEqual(run["kernel_vmas_added"], 100)  # of as many threads; guards count too

    def test_file_mapping_benchmark(self):
        document = self.run_benchmark("file_mapping_benchmark", file_mapping_names())
        self.assertEqual(self.measured_targets(document), ({"P9"}, {"P9"}))

    def test_hold_benchmark(self):
        document = self.run_benchmark("hold_benchmark", hold_names())
        for run in document["benchmarks"]:
            self.assertGreater(run["holds"], 0, run["name"])
            self.assertLessEqual(run["p50_ns"], run["p99_ns"], run["name"])
            self.assertLessEqual(run["p999_ns"], run["worst_ns"], run["name"])
        result = subprocess.run([os.path.join(BENCH, "hold_benchmark"), *QUICK, "--benchmark_filter=4KiB|vmas"],
                                capture_output=True, text=True, check=True)
        headings = [line for line in result.stdout.splitlines() if line.startswith("ns, up to ")]
        self.assertEqual([heading.split()[3:] for heading in headings],
                         [["4KiB", "4KiB_cold", "4GiB"] * 3, ["1vmas", "100000vmas"] * 3])
        shares = [float(cell) for line in result.stdout.splitlines()[-1:] for cell in line.split()[1:] if cell != "-"]
        self.assertTrue(shares and all(0 <= share <= 100 for share in shares), result.stdout[-500:])
        if any("4GiB" in run["name"] for run in document["benchmarks"]):
            self.assertEqual(self.measured_targets(document), ({"P6"}, {"P6"}))

    def test_steady_state_benchmark(self):
        result = subprocess.run([os.path.join(BENCH, "steady_state_benchmark"), "--benchmark_list_tests"],
                                capture_output=True, text=True, check=False)
        if "left out: steady_state: " in result.stderr:
            self.skipTest(result.stderr)
        document = self.run_benchmark("steady_state_benchmark", steady_state_names(), "--seconds=0.1",
                                      "--quiet_seconds=0.1", "--warm_up_seconds=0.1")
        self.assertEqual(self.measured_targets(document), ({"P7"}, {"P7"}))

    def test_malloc_benchmark(self):
        document = self.run_benchmark("malloc_benchmark", malloc_names(), "--idle_seconds=0.001")
        # P10 counts memory only where every case has a process of its own.
        self.assertEqual(self.measured_targets(document), ({"P10", "P11", "P12"}, {"P11", "P12"}))
        for run in document["benchmarks"]:
            self.assertLessEqual(run["idle_rss_mib"], run["peak_rss_mib"], run["name"])
            self.assertGreaterEqual(run["page_faults"], 0, run["name"])
            if run["name"].split("/")[0] in ("generations", "successor_threads", "thread_churn"):
                self.assertGreaterEqual(run["rss_growth_kib"], 0, run["name"])

    def isolated(self, *arguments):
        return subprocess.run([os.path.join(BENCH, "isolated"), *arguments], capture_output=True, text=True, check=False)

    def test_cases_in_processes_of_their_own(self):
        result = self.isolated("--repetitions=2", os.path.join(BENCH, "malloc_benchmark"), *QUICK,
                               "--benchmark_filter=^large_buffers/.*:1|^small_fifo/freehold/")
        self.assertEqual(result.returncode, 0, result.stderr)
        document = json.loads(result.stdout)
        expected = names("large_buffers/{}/5-25MiB", ALLOCATORS, (1,)) | names("small_fifo/{}", ("freehold",))
        runs = [(run["name"], run["repetition_index"]) for run in document["benchmarks"]]
        self.assertEqual(sorted(runs), sorted((name, index) for name in expected for index in (0, 1)))
        self.assertEqual(document["context"]["isolated"], "true")
        self.assertIn("P10", self.measured_targets(document)[0])

    def test_isolation_reports_what_fails(self):
        unknown_flag = self.isolated(os.path.join(BENCH, "malloc_benchmark"), "--no_such_flag")
        self.assertEqual((unknown_flag.returncode, unknown_flag.stdout), (1, ""))
        self.assertIn("no_such_flag", unknown_flag.stderr)
        absent = self.isolated(os.path.join(BENCH, "absent"))
        self.assertEqual((absent.returncode, absent.stdout), (1, ""))
        self.assertIn("absent: No such file", absent.stderr)
        with tempfile.TemporaryDirectory() as folder:
            unwritable = self.isolated(f"--out={folder}/no/file.json", os.path.join(BENCH, "malloc_benchmark"), *QUICK,
                                       "--benchmark_filter=^small_fifo/glibc/")
        self.assertEqual(unwritable.returncode, 1)
        self.assertIn("no/file.json: No such file", unwritable.stderr)

    def test_filter_without_a_match_is_an_error(self):
        result = subprocess.run([os.path.join(BENCH, "map_benchmark"), "--benchmark_filter=absent"],
                                capture_output=True, text=True, check=False)
        self.assertEqual(result.returncode, 1)


if __name__ == "__main__":
    unittest.main()
