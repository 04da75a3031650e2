"""What programs in Python do to an allocator. Usage: objects.py containers|integers|json|text SCALE."""

import json
import re
import sys


def turns(number, scale):
    return range(max(1, int(number * scale)))


def containers(scale):
    """Dictionaries, lists, tuples and strings that come and go."""
    kept = {}
    for turn in turns(6, scale):
        table = {f"key-{turn}-{i}": [i, str(i), (i, turn)] for i in range(20_000)}
        kept[turn % 4] = {key: value for key, value in table.items() if value[0] % 3}
        rows = [list(range(i % 60)) for i in range(20_000)]
        rows.sort(key=len)
        text = ",".join(str(row) for row in rows[::7])
        kept[turn % 4]["text"] = text.split("], [")
    return sum(map(len, kept.values()))


def integers(scale):
    """Numbers of up to some kilobytes: each step makes new ones."""
    total, value = 0, 1
    for turn in turns(320, scale):
        value = 3 ** (4000 + turn)
        for i in range(2_000):
            value = value + (value >> 7) + i
            total ^= (value * (i | 1)) & 0xFFFFFFFF
        total ^= len(str(value))
    return total


def json_documents(scale):
    """Documents that are written, read and compared."""
    total = 0
    for turn in turns(10, scale):
        document = {"rows": [{"id": i, "name": f"name-{i % 977}", "text": "ab" * (i % 60),
                              "values": [i / 7, None, i % 2 == 0, {"turn": turn}]} for i in range(12_000)]}
        text = json.dumps(document)
        assert json.loads(text) == document
        total += len(text)
    return total


def text(scale):
    """Expressions, splits and joins over lines of a log."""
    line = re.compile(r"(\w+)=(\"[^\"]*\"|\S+)")
    total = 0
    for turn in turns(9, scale):
        log = "\n".join(f'time={i}.{turn} level=info path="/a/{i % 701}/b" took={i % 97}us user=u{i % 503}'
                        for i in range(15_000))
        records = [dict(line.findall(each)) for each in log.split("\n")]
        paths = [re.sub(r"\d+", "N", record["path"]) for record in records]
        total += len(set(paths)) + len("\n".join(record["user"].upper() for record in records))
    return total


if __name__ == "__main__":
    cases = {"containers": containers, "integers": integers, "json": json_documents, "text": text}
    print(cases[sys.argv[1]](float(sys.argv[2])))
