"""Threads, subprocesses and multiprocessing with fork, also fork while other threads allocate."""

import concurrent.futures
import hashlib
import multiprocessing
import multiprocessing.managers
import os
import queue
import random
import subprocess
import sys
import threading
import zlib


def digest(seed):
    rng = random.Random(seed)
    parts = [rng.randbytes(rng.randrange(1, 5000)) for _ in range(120)]
    rng.shuffle(parts)
    return hashlib.sha256(zlib.compress(b"".join(parts))).hexdigest()[:16]


def threads():
    results = {}

    def work(first):
        for seed in range(first, first + 25):
            results[seed] = digest(seed)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(0, 200, 25)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print("threads", hashlib.sha256(repr(sorted(results.items())).encode()).hexdigest())


def many_short_threads():
    total = []
    for _ in range(1500):
        thread = threading.Thread(target=lambda: total.append(len(bytes(100_000))))
        thread.start()
        thread.join()
    print("short threads", sum(total))


def handed_over():
    """Objects allocated by one thread and freed by another."""
    channel = queue.Queue(maxsize=50)

    def produce(seed):
        rng = random.Random(seed)
        for _ in range(3000):
            channel.put(rng.randbytes(rng.randrange(3000)))
        channel.put(None)

    producers = [threading.Thread(target=produce, args=(seed,)) for seed in range(3)]
    for producer in producers:
        producer.start()
    total, ended = 0, 0
    while ended < len(producers):
        item = channel.get()
        if item is None:
            ended += 1
        else:
            total += zlib.crc32(item)
    print("handed over", total)


def subprocesses():
    def word_count(i):
        data = (f"line {i}\n" * 3000).encode()
        return int(subprocess.run(["wc", "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        print("subprocesses", sum(pool.map(word_count, range(60))))
    nested = subprocess.run([sys.executable, "-c", "import sys; print(sum(map(len, sys.stdin)))"],
                            input=b"x\n" * 100_000, stdout=subprocess.PIPE, check=True)
    print("nested", nested.stdout)


def forked_pool():
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        print("pool", hashlib.sha256("".join(pool.map(digest, range(200))).encode()).hexdigest())
    # On loopback: the path of a socket file may be too long in a deep temporary directory.
    with multiprocessing.managers.SyncManager(("127.0.0.1", 0), ctx=context) as manager:
        shared = manager.dict()
        workers = [context.Process(target=shared.__setitem__, args=(i, digest(i))) for i in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print("manager", sorted(shared.items()))


def forks_under_load():
    """Forks while other threads allocate: the child inherits whatever state they were in."""
    stop = threading.Event()

    def churn(seed):
        rng = random.Random(seed)
        kept = []
        while not stop.is_set():
            kept.append(rng.randbytes(rng.randrange(1, 200_000)))
            if len(kept) > 50:
                kept.clear()

    churners = [threading.Thread(target=churn, args=(seed,)) for seed in range(3)]
    for churner in churners:
        churner.start()
    statuses = []
    for i in range(100):
        child = os.fork()
        if child == 0:
            blocks = [bytes(1 << (j % 18)) for j in range(200)]
            grandchild = os.fork() if i % 10 == 0 else 0
            if grandchild:
                os.waitpid(grandchild, 0)
            os._exit(len(blocks) % 128)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    stop.set()
    for churner in churners:
        churner.join()
    print("forks", statuses)


if __name__ == "__main__":
    for step in (threads, many_short_threads, handed_over, subprocesses, forked_pool, forks_under_load):
        step()
        sys.stdout.flush()
