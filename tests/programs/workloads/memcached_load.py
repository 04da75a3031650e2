"""Load for memcached over its text protocol. Every client owns its keys and knows what each must hold,
so every reply is checked. Usage: memcached_load.py PORT CLIENTS OPERATIONS; prints what it did."""

import collections
import random
import socket
import sys
import threading

SIZES = [0, 1, 10, 50, 100, 500, 1000, 4000, 10_000, 50_000]


class Wrong(Exception):
    """A reply that does not agree with what was stored."""


class Client:
    """One connection and the content that its keys must have: key to value, in `stored`."""

    def __init__(self, port, number, operations):
        self._port = port
        self._number = number
        self._operations = operations
        self._random = random.Random(number)
        self._stored = {}
        self.done = collections.Counter()
        self.error = None
        self._connect()

    def run(self):
        steps = {self._set: 30, self._get: 30, self._get_many: 5, self._delete: 8, self._incr: 10,
                 self._append: 6, self._add_or_replace: 5, self._cas: 4, self._touch: 1}
        chosen = self._random.choices(list(steps), list(steps.values()), k=self._operations)
        try:
            for count, step in enumerate(chosen, 1):
                step()
                self.done[step.__name__.strip("_")] += 1
                if count % 2000 == 0:
                    self._reconnect()
            self._verify_all()
        except (Wrong, OSError, ValueError) as error:
            self.error = f"client {self._number}: {type(error).__name__}: {error}"

    def _connect(self):
        self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=60)
        self._replies = self._socket.makefile("rb", buffering=1 << 16)

    def _reconnect(self):
        self._replies.close()
        self._socket.close()
        self._connect()

    def _key(self):
        return f"client-{self._number}-{self._random.randrange(1500)}"

    def _value(self):
        size = self._random.choice(SIZES)
        if self._random.random() < 0.003:
            size = self._random.randrange(500_000, 3_000_000)
        return self._random.randbytes(size % 4096) + bytes([size % 251]) * (size - size % 4096)

    def _ask(self, line, data=None):
        self._socket.sendall(line.encode() + b"\r\n" + (b"" if data is None else data + b"\r\n"))
        return self._replies.readline().rstrip(b"\r\n")

    def _expect(self, what, expected, actual):
        if expected != actual:
            raise Wrong(f"{what}: expected {expected[:80]!r}, got {actual[:80]!r}")

    def _read_values(self, first_line):
        """The values of a get or gets reply: key to (data, cas)."""
        values = {}
        line = first_line
        while line != b"END":
            word, key, _, size, *cas = line.split()
            if word != b"VALUE":
                raise Wrong(f"get: {line!r}")
            values[key.decode()] = (self._replies.read(int(size) + 2)[:-2], cas)
            line = self._replies.readline().rstrip(b"\r\n")
        return values

    def _check_values(self, keys, values):
        for key in keys:
            stored = self._stored.get(key)
            found = values[key][0] if key in values else None
            if stored != found:
                raise Wrong(f"{key}: stored {_describe(stored)}, found {_describe(found)}")

    def _set(self):
        key, value = self._key(), self._value()
        self._expect("set", b"STORED", self._ask(f"set {key} 0 0 {len(value)}", value))
        self._stored[key] = value

    def _get(self):
        self._check([self._key()])

    def _get_many(self):
        self._check(list({self._key() for _ in range(20)}))

    def _check(self, keys):
        self._check_values(keys, self._read_values(self._ask(f"get {' '.join(keys)}")))

    def _delete(self):
        key = self._key()
        expected = b"DELETED" if self._stored.pop(key, None) is not None else b"NOT_FOUND"
        self._expect("delete", expected, self._ask(f"delete {key}"))

    def _incr(self):
        key = f"counter-{self._number}-{self._random.randrange(20)}"
        if key not in self._stored:
            self._expect("set", b"STORED", self._ask(f"set {key} 0 0 1", b"5"))
            self._stored[key] = b"5"
        step = self._random.randrange(1000)
        command, change = self._random.choice([("incr", step), ("decr", -step)])
        number = max(0, int(self._stored[key]) + change)
        self._expect(command, b"%d" % number, self._ask(f"{command} {key} {step}"))
        # memcached keeps the length of a number that shrinks, and pads it with spaces.
        self._stored[key] = (b"%d" % number).ljust(len(self._stored[key]))

    def _append(self):
        key, more = self._key(), self._random.randbytes(self._random.randrange(3000))
        command = self._random.choice(["append", "prepend"])
        old = self._stored.get(key)
        possible = old is not None and len(old) < 3_000_000
        if old is not None and not possible:
            return
        self._expect(command, b"STORED" if possible else b"NOT_STORED",
                     self._ask(f"{command} {key} 0 0 {len(more)}", more))
        if possible:
            self._stored[key] = old + more if command == "append" else more + old

    def _add_or_replace(self):
        key, value = self._key(), self._value()
        command = self._random.choice(["add", "replace"])
        stores = (key in self._stored) == (command == "replace")
        self._expect(command, b"STORED" if stores else b"NOT_STORED",
                     self._ask(f"{command} {key} 0 0 {len(value)}", value))
        if stores:
            self._stored[key] = value

    def _cas(self):
        key, value = self._key(), self._value()
        values = self._read_values(self._ask(f"gets {key}"))
        self._check_values([key], values)
        if key not in values:
            return
        unique = int(values[key][1][0])
        self._expect("cas", b"EXISTS", self._ask(f"cas {key} 0 0 1 {unique + (1 << 40)}", b"x"))
        self._expect("cas", b"STORED", self._ask(f"cas {key} 0 0 {len(value)} {unique}", value))
        self._stored[key] = value

    def _touch(self):
        key = self._key()
        expected = b"TOUCHED" if key in self._stored else b"NOT_FOUND"
        self._expect("touch", expected, self._ask(f"touch {key} 100000"))

    def _verify_all(self):
        keys = sorted(self._stored)
        for start in range(0, len(keys), 50):
            self._check(keys[start:start + 50])
        self.done["kept keys"] = len(keys)
        self.done["kept bytes"] = sum(map(len, self._stored.values()))


def _describe(value):
    return "nothing" if value is None else f"{len(value)} bytes {value[:20]!r}"


def main():
    port, clients, operations = map(int, sys.argv[1:])
    loads = [Client(port, number, operations) for number in range(clients)]
    threads = [threading.Thread(target=load.run) for load in loads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [load.error for load in loads if load.error]
    for name, count in sorted(sum((load.done for load in loads), collections.Counter()).items()):
        print(name, count)
    for error in errors:
        print("wrong:", error)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
