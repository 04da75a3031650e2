"""Large and many objects: lists, dicts, bytes, json, sorting, zlib. Usage: python_objects.py SCALE."""

import array
import bisect
import collections
import hashlib
import io
import itertools
import json
import pickle
import random
import re
import sys
import zlib

scale = int(sys.argv[1])
rng = random.Random(1)


def show(name, value):
    data = value if isinstance(value, bytes) else repr(value).encode()
    print(name, len(data), hashlib.sha256(data).hexdigest()[:16])


numbers = [rng.randrange(1 << 40) for _ in range(100_000 * scale)]
show("sorted", sorted(numbers))
show("by key", sorted(map(str, numbers), key=lambda text: text[::-1])[:1000])

table = {f"key-{i}": [i, str(i), {"nested": i % 97}] for i in range(40_000 * scale)}
for i in range(0, 40_000 * scale, 3):
    del table[f"key-{i}"]
table.update((f"again-{i}", bytes(i % 300)) for i in range(20_000 * scale))
show("dict", [(key, value) for key, value in table.items()][:5000])

document = {"rows": [{"id": i, "text": "ä€" * (i % 9), "values": [i / 7, None, i % 2 == 0]}
                     for i in range(15_000 * scale)]}
text = json.dumps(document, indent=1)
assert json.loads(text) == document
show("json", text.encode())

buffer = bytearray()
for i in range(30_000 * scale):  # Grows step by step: realloc after realloc.
    buffer += i.to_bytes(4, "little") * (i % 13)
show("bytearray", bytes(buffer))
packed = zlib.compress(bytes(buffer), 6)
assert zlib.decompress(packed) == buffer
show("zlib", packed)
stream = io.BytesIO()
for chunk in range(200):
    stream.write(rng.randbytes(rng.randrange(30_000)))
show("BytesIO", stream.getvalue())

big = 7 ** (9000 * scale)
show("int", str(big ** 2 % 10 ** 500).encode())
show("pickle", pickle.dumps(document["rows"][:5000], protocol=4))
show("array", array.array("d", (i / 3 for i in range(300_000))).tobytes())

words = re.findall(r"[a-z]+\d?", " ".join(f"w{i % 501}x{i}" for i in range(60_000 * scale)))
show("counter", collections.Counter(words).most_common(30))
queue = collections.deque(maxlen=50_000)
for i in range(200_000 * scale):
    queue.append((i, str(i)))
show("deque", list(queue)[::100])


class Node:
    def __init__(self, value):
        self.value = value
        self.peer = None


def cycles(count):  # Reference cycles: only the collector frees them.
    total = 0
    for i in range(count):
        a, b = Node(i), Node([i] * (i % 50))
        a.peer, b.peer = b, a
        total += len(b.value)
    return total


show("cycles", cycles(80_000 * scale))
ordered = []
for value in itertools.islice(numbers, 20_000):
    bisect.insort(ordered, value)
show("insort", ordered)
blocks = [bytes([i % 256]) * (1 << 20) for i in range(64)]
for _ in range(3):  # Large blocks come and go.
    blocks = [block[: len(block) // 2] + block[: (len(block) + 1) // 2 + 1] for block in blocks]
show("blocks", [len(block) for block in blocks])
