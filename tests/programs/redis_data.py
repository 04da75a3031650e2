"""A known data set for redis with every type and encoding, and ways to read back all that a server
holds in a form that does not depend on hash order."""

import itertools
import random

from harness import require
from servers import ReplyError

# Replies to these are in hash order, and redis seeds its hash function anew in every process.
UNORDERED = {"KEYS", "SMEMBERS", "SUNION", "SINTER", "HKEYS"}


def dataset_commands(size):
    """Commands that write the data set; `size` 1 is some 60 MB. Each owns the keys that it names."""
    rng = random.Random(11)

    def text(low, high):
        return rng.randbytes(rng.randrange(low, high) // 2 + 1).hex()

    for i in range(30_000 * size):
        yield "SET", f"string:{i}", text(1, 60) if i % 10 else text(60, 6000)
    for i in range(30 * size):
        yield "SET", f"large:{i}", text(200_000, 800_000)
    for i in range(1000 * size):
        yield "SET", f"number:{i}", str(rng.randrange(-1 << 40, 1 << 40))
        yield "SET", f"expiring:{i}", text(1, 100), "PXAT", 4_000_000_000_000 + i
    for i in range(300 * size):
        length = rng.choice([3, 60, 900])
        yield "RPUSH", f"list:{i}", *(text(1, 200) for _ in range(length))
        yield "HSET", f"hash:{i}", *(word for field in range(length)
                                     for word in (f"field{field}", text(1, 100)))
        yield "SADD", f"set:{i}", *(text(8, 40) for _ in range(length))
        yield "SADD", f"integers:{i}", *(rng.randrange(1 << 33) for _ in range(length))
        yield "ZADD", f"zset:{i}", *(word for member in range(length)
                                     for word in (repr(rng.random() * 1e6), f"member{member}"))
    for i in range(20 * size):
        for entry in range(400):
            yield "XADD", f"stream:{i}", f"{1000 + entry}-{i}", "a", text(1, 60), "b", entry
        yield "XGROUP", "CREATE", f"stream:{i}", "group", 0
        yield "XREADGROUP", "GROUP", "group", "reader", "COUNT", 50, "STREAMS", f"stream:{i}", ">"
        yield "XACK", f"stream:{i}", "group", *(f"{1000 + entry}-{i}" for entry in range(0, 50, 3))
        yield "XDEL", f"stream:{i}", f"1100-{i}", f"1101-{i}"
    for i in range(20 * size):
        yield "PFADD", f"hyperloglog:{i}", *(text(8, 12) for _ in range(800))
        yield "SETBIT", f"bitmap:{i}", rng.randrange(2_000_000), 1
        yield "GEOADD", f"geo:{i}", *(word for place in range(50) for word in (
            f"{rng.uniform(-180, 180):.6f}", f"{rng.uniform(-85, 85):.6f}", f"place{place}"))


def write_dataset(client, size):
    commands = list(dataset_commands(size))
    for command, reply in zip(commands, client.pipeline(commands)):
        require(not isinstance(reply, ReplyError), f"{command[:2]}: {reply}")


READ_WHOLE = {
    b"string": lambda key: ("GET", key), b"list": lambda key: ("LRANGE", key, 0, -1),
    b"hash": lambda key: ("HGETALL", key), b"set": lambda key: ("SMEMBERS", key),
    b"zset": lambda key: ("ZRANGE", key, 0, -1, "WITHSCORES"),
    b"stream": lambda key: ("XRANGE", key, "-", "+")}


def contents(client):
    """Everything in the selected database: key to (type, value, expiry, groups of a stream)."""
    keys = sorted(client("KEYS", "*"))
    types = client.pipeline([("TYPE", key) for key in keys])
    values = client.pipeline([READ_WHOLE[kind](key) for key, kind in zip(keys, types)], batch=100)
    expiries = client.pipeline([("PEXPIRETIME", key) for key in keys])
    return {key: (kind, _ordered(kind, value), expiry, _groups(client, key) if kind == b"stream" else None)
            for key, kind, value, expiry in zip(keys, types, values, expiries)}


def _ordered(kind, value):
    if kind == b"set":
        return sorted(value)
    if kind == b"hash":
        return sorted(zip(value[::2], value[1::2]))
    return value


def _groups(client, key):
    # A pending entry's reply ends in its idle time and delivery count; the idle time is the clock's.
    pending = client("XPENDING", key, "group", "-", "+", 1000)
    return [(entry, consumer, delivered) for entry, consumer, _, delivered in pending]


SCRIPT = """
local sum = 0
for i = 1, tonumber(ARGV[1]) do
  local key = KEYS[1] .. (i % 50)
  redis.call('RPUSH', key, string.rep('v', i % 300))
  sum = sum + redis.call('LLEN', key)
end
local parts = {}
for i = 1, 20000 do parts[i] = tostring(i * 7 % 1013) end
return {sum, #table.concat(parts, ','), cjson.encode({a = {1, 2, 3}}), cmsgpack.pack({1, 'x'})}
"""


def reply_commands():
    """Commands over every type whose replies a plain server and one under the shim must agree on. Most
    find a key of their type, some find another's and fail."""
    rng = random.Random(23)
    identifiers = itertools.count(1)  # Of stream entries; redis would make them from the time.
    kind = "string"

    def key():
        owner = kind if kind != "any" and rng.random() < 0.97 else rng.choice(list(makers))
        return f"{owner}{rng.randrange(25)}"

    def blob():
        return bytes([97 + rng.randrange(26)]) * rng.choice([0, 1, 20, 43, 44, 45, 64, 500, 5000, 40_000])

    def pairs(low, high, make):
        """Words in pairs, up to `high` of them."""
        return [word for i in range(rng.randrange(low, high)) for word in make(i)]

    makers = {
        "string": [
            lambda: ("SET", key(), blob()), lambda: ("GET", key()), lambda: ("APPEND", key(), blob()),
            lambda: ("SETRANGE", key(), rng.randrange(100_000), blob()), lambda: ("STRLEN", key()),
            lambda: ("GETRANGE", key(), rng.randrange(50), rng.randrange(5000)),
            lambda: ("GETDEL", key()), lambda: ("MSET", key(), blob(), key(), blob()),
            lambda: ("MGET", key(), key(), key()), lambda: ("LCS", key(), key(), "LEN")],
        "number": [
            lambda: ("SET", key(), rng.randrange(1000)), lambda: ("INCRBY", key(), rng.randrange(99)),
            lambda: ("INCRBYFLOAT", key(), "1.25"), lambda: ("DECR", key()), lambda: ("GET", key())],
        "list": [
            lambda: ("LPUSH", key(), blob(), blob()), lambda: ("LPOP", key(), 3), lambda: ("RPOP", key()),
            lambda: ("RPUSH", key(), *range(rng.randrange(1, 200))), lambda: ("LRANGE", key(), 0, 20),
            lambda: ("LTRIM", key(), 2, 400), lambda: ("LINSERT", key(), "BEFORE", "5", blob()),
            lambda: ("LREM", key(), 2, "7"), lambda: ("LMOVE", key(), key(), "LEFT", "RIGHT"),
            lambda: ("SORT", key(), "ALPHA", "LIMIT", 0, 9)],
        "hash": [
            lambda: ("HSET", key(), *pairs(1, 150, lambda field: (f"f{field}", blob()[:90]))),
            lambda: ("HGET", key(), f"f{rng.randrange(90)}"), lambda: ("HDEL", key(), "f1", "f2", "f88"),
            lambda: ("HINCRBY", key(), "n", 7), lambda: ("HKEYS", key()), lambda: ("HLEN", key())],
        "set": [
            lambda: ("SADD", key(), *(rng.randrange(600) for _ in range(rng.randrange(1, 300)))),
            lambda: ("SADD", key(), *(f"m{rng.randrange(400)}" for _ in range(90))),
            lambda: ("SREM", key(), *range(0, 300, 7)), lambda: ("SMEMBERS", key()),
            lambda: ("SINTER", key(), key()), lambda: ("SUNION", key(), key()),
            lambda: ("SDIFFSTORE", key(), key(), key()), lambda: ("SCARD", key())],
        "zset": [
            lambda: ("ZADD", key(), *pairs(1, 200, lambda member: (rng.randrange(1000), f"m{member}"))),
            lambda: ("ZRANGEBYSCORE", key(), 100, 300, "WITHSCORES"), lambda: ("ZRANK", key(), "m5"),
            lambda: ("ZREMRANGEBYRANK", key(), 0, 5), lambda: ("ZPOPMIN", key(), 2),
            lambda: ("ZUNIONSTORE", key(), 2, key(), key()), lambda: ("ZINCRBY", key(), 3, "m1"),
            lambda: ("GEOADD", key(), "13.36", "38.11", "a", "15.08", "37.50", "b")],
        "bitmap": [
            lambda: ("SETBIT", key(), rng.randrange(100_000), 1), lambda: ("BITCOUNT", key()),
            lambda: ("BITOP", "XOR", key(), key(), key())],
        "hyperloglog": [lambda: ("PFADD", key(), *range(rng.randrange(50))), lambda: ("PFCOUNT", key())],
        "stream": [
            lambda: ("XADD", key(), f"{next(identifiers)}-1", "f", blob()), lambda: ("XLEN", key()),
            lambda: ("XRANGE", key(), "-", "+", "COUNT", 3), lambda: ("XTRIM", key(), "MAXLEN", 20)],
        "any": [
            lambda: ("DEL", key(), key()), lambda: ("UNLINK", key()), lambda: ("RENAME", key(), key()),
            lambda: ("COPY", key(), key(), "REPLACE"), lambda: ("OBJECT", "ENCODING", key()),
            lambda: ("TYPE", key()), lambda: ("EXISTS", key()), lambda: ("KEYS", "*1*"),
            lambda: ("DBSIZE",), lambda: ("PERSIST", key()), lambda: ("EXPIREAT", key(), 4_000_000_000),
            lambda: ("EVAL", SCRIPT, 1, "scripted", 200)],
    }
    # Quadratic in the lengths of its arguments, and a script of a few milliseconds: rarely.
    rare = {"LCS": 0.02, "EVAL": 0.1}
    for _ in range(40_000):
        kind = rng.choice(list(makers))
        command = rng.choice(makers[kind])()
        if rng.random() < rare.get(command[0], 1):
            yield command


def comparable(command, reply):
    """A reply without the hash order, which differs between any two servers."""
    return sorted(reply) if command[0] in UNORDERED and isinstance(reply, list) else reply
