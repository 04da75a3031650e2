"""node: V8 reserves address space of its own beside the shim's."""

from harness import WORKLOADS, check


@check
def mix(trial):
    """Workers, buffers, JSON, zlib, child processes, an HTTP server and its clients on loopback."""
    for _ in range(5 if trial.long else 1):
        trial.compare(["node", WORKLOADS / "node_mix.mjs"], witnesses=["node"], timeout=300)


@check
def small_heap(trial):
    """Garbage collection under pressure, and a heap that runs out by design."""
    grow = "let kept = []; for (let i = 0; i < 3e5; i++) { kept.push({ i, s: 'x'.repeat(i % 90) }); " \
           "if (kept.length > 1e4) kept = kept.slice(5e3); } console.log(kept.length);"
    trial.compare(["node", "--max-old-space-size=32", "-e", grow])
    trial.compare(["node", "-e", "process.exitCode = 4; Promise.resolve().then(() => console.log(1))"],
                  status=4)
