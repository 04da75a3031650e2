"""LMDB under a writer and readers, all of which map the same file. Usage: lmdb_load.py ROUNDS WRITEMAP

The writer keeps every committed version such that all values of a table add up to a number that is stored beside
them; readers check that in snapshots, from threads and from processes."""

import contextlib
import hashlib
import multiprocessing
import random
import sys
import threading
import time

import lmdb

KEYS = 3000
READERS = 3


def open_environment(writemap):
    # More address space than memory: it stays sparse.
    return lmdb.open("data.mdb", map_size=8 << 30, subdir=False, max_dbs=4, max_readers=64, sync=False,
                     writemap=writemap)


@contextlib.contextmanager
def aborted(environment):
    """A writing transaction that comes to nothing."""
    transaction = environment.begin(write=True, buffers=True)
    try:
        yield transaction
    finally:
        transaction.abort()


def write(environment, tables, rounds):
    rng = random.Random(5)
    for number in range(rounds):
        with aborted(environment) if number % 17 == 16 else environment.begin(write=True, buffers=True) as transaction:
            total = int(bytes(transaction.get(b"total", b"0")))
            for _ in range(200):
                key = b"%06d" % rng.randrange(KEYS)
                old = transaction.get(key, db=tables[0])
                if old is not None:
                    total -= int(bytes(old).partition(b" ")[0])
                if rng.random() < 0.2:
                    transaction.delete(key, db=tables[0])
                else:
                    amount = rng.randrange(1_000_000)
                    total += amount
                    transaction.put(key, b"%d " % amount + b"x" * rng.randrange(4000), db=tables[0])
            transaction.put(b"total", b"%d" % total)
            transaction.put(b"%08d" % number, b"%d" % total, db=tables[1])


def check_snapshots(environment, tables, stop, least):
    checked = 0
    while checked < least or not stop.is_set():
        with environment.begin(buffers=True) as transaction:
            total = int(bytes(transaction.get(b"total", b"0")))
            found = sum(int(bytes(value[:20]).partition(b" ")[0]) for _, value in transaction.cursor(tables[0]))
        if found != total:
            sys.exit(f"a snapshot adds up to {found}, not {total}")
        checked += 1
        time.sleep(0.01)  # The writer needs a CPU too.


def read_in_process(writemap, stop):
    environment = open_environment(writemap)
    tables = [environment.open_db(name, create=False) for name in (b"values", b"history")]
    threads = [threading.Thread(target=check_snapshots, args=(environment, tables, stop, 3)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main():
    rounds, writemap = int(sys.argv[1]), sys.argv[2] == "1"
    environment = open_environment(writemap)
    for name in (b"values", b"history"):
        environment.open_db(name)
    environment.close()
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    readers = [context.Process(target=read_in_process, args=(writemap, stop)) for _ in range(READERS)]
    for reader in readers:
        reader.start()
    environment = open_environment(writemap)
    tables = [environment.open_db(name) for name in (b"values", b"history")]
    own = threading.Thread(target=check_snapshots, args=(environment, tables, stop, 3))
    own.start()
    try:
        write(environment, tables, rounds)
    finally:
        stop.set()
        own.join()
    for reader in readers:
        reader.join()
        if reader.exitcode != 0:
            sys.exit(f"a reader ended with {reader.exitcode}")
    digest = hashlib.sha256()
    with environment.begin() as transaction:
        for table in tables:
            for key, value in transaction.cursor(table):
                digest.update(key + b"=" + value + b"\n")
    environment.sync(True)
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
