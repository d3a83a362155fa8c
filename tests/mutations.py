"""Random bytes, and files with random damage: what tests/fuzz.py feeds to everything that reads."""

from __future__ import annotations

import random
from pathlib import Path

TROUBLE = [  # what parsers and terminals stumble over
    *(b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\x1b]52;c;eA==\x07", b"\x9b2J", b"\xc2\x9b"),
    *("\u202e", "\u200d", "\u0301" * 50, "👩‍👩‍👧", "\ufeff", "é"),
    *(b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"[" * 300, b"{" * 300, b'{"a":' * 300),
    *(b"&a [*a, *a]", b"!!python/object/apply:os.system ['true']", b"<<: *x", b"- " * 99, b"? ", b"%YAML 9"),
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"-1", b"0", b"true", b"null", b"1e-3", b"\\ud800", b'"'),
    *(
        b"__import__('os')",
        b"../../../etc/passwd",
        b"${oc.env:HOME}",
        b"\x80\x04\x95",
        b"PK\x03\x04",
        b"\x1f\x8b",
    ),
]
TROUBLES = [piece.encode() if isinstance(piece, str) else piece for piece in TROUBLE]


def some_bytes(rng: random.Random) -> bytes:
    """Short random bytes, of any values or of troublesome pieces."""
    if rng.random() < 0.5:
        return rng.randbytes(int(rng.expovariate(1 / 40)))
    return b"".join(rng.choice(TROUBLES) for _ in range(rng.randrange(8)))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The same with one to four stretches changed, dropped, doubled, swapped or replaced by trouble."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        if rng.random() < 0.5:  # where the structure is
            at = min(at, rng.randrange(600))
        to = at + int(rng.expovariate(1 / 8))
        match rng.randrange(6):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                del out[at:to]
            case 2:
                out[at:at] = out[at:to]
            case 3:
                out[at:to] = some_bytes(rng)
            case 4:
                out[at:at] = rng.choice(TROUBLES)
            case _:
                del out[at:]
    return bytes(out)


class Damaged:
    """Within this context a file holds other bytes. Gives whether they differ."""

    def __init__(self, path: Path, good: bytes, data: bytes) -> None:
        self.path, self.good, self.data = path, good, data

    def __enter__(self) -> bool:
        self.path.write_bytes(self.data)
        return self.data != self.good

    def __exit__(self, *exception: object) -> None:
        self.path.write_bytes(self.good)
