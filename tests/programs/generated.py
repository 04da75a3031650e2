"""Input data, the same on every run."""

import random


def text_lines(size, seed):
    """Lines of words and numbers, `size` bytes; compressible, but not trivially."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 11)))
             for _ in range(5000)]
    lines = []
    length = 0
    while length < size:
        block = " ".join(rng.choices(words, k=2000)).split(" ")
        for start in range(0, 2000, 8):
            line = f"{rng.randrange(1 << 30):09d} {' '.join(block[start:start + rng.randrange(1, 9)])}\n"
            lines.append(line)
            length += len(line)
    return "".join(lines).encode()[:size]
