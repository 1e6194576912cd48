"""Damage as others do it: changed copies of good files, from a seed."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
EXTREMES = (
    (
        "-1 0 1 255 65536 2147483647 2147483648 4294967296 -9223372036854775808 9223372036854775807 "
        "18446744073709551616 1000000000000 1e308 1e999 -1e999 NaN Infinity 0.5 1e-320 00 0x10 "
        + "9" * 40
        + " "
        + "9" * 5000
    )
    .encode()
    .split()
)
TOKENS = (
    b"../", b"/etc/passwd", b"\0", b"\n", b"\r", b'"', b"<script>", b"{}", b"[]", b"null", b"true", b"\xff",
    b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b",", b" ", b"[" * 3000, b"x" * 300, b"=", b"\x1b[2J", b"e", b"%s",
    b"\xe2\x80\xae",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 1e308, float("inf"), float("nan"), 0.5, "", "\0", "../x",
    "a\nb", "\ud800", "\udce9", "<b>", "x" * 5000, [], [[]], [None], {}, {"": {}}, {"a": [1]}, [1, "a"], -0.0,
)  # fmt: skip


class Mutator:
    """Changes bytes in one to three ways; the same seed changes them alike."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.ways = (self.flip, self.insert, self.delete, self.truncate, self.splice, self.number, self.swap)

    def __call__(self, data: bytes, others: Sequence[bytes]) -> bytes:
        """Return a changed copy of `data`; parts of `others` go into it."""
        for _ in range(self.draw.choice((1, 1, 1, 2, 3))):
            data = self.draw.choice(self.ways)(data, others)
        return data

    def flip(self, data: bytes, _: Sequence[bytes]) -> bytes:
        if not data:
            return b"\x01"
        changed = bytearray(data)
        for _ in range(self.draw.choice((1, 1, 2, 8))):
            changed[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        return bytes(changed)

    def insert(self, data: bytes, _: Sequence[bytes]) -> bytes:
        place = self.draw.randint(0, len(data))
        return data[:place] + self.draw.choice((*TOKENS, self.draw.randbytes(4))) + data[place:]

    def delete(self, data: bytes, _: Sequence[bytes]) -> bytes:
        start = self.draw.randint(0, len(data))
        return data[:start] + data[start + self.draw.choice((1, 1, 2, 7, 64, 512)) :]

    def truncate(self, data: bytes, _: Sequence[bytes]) -> bytes:
        return data[: self.draw.randint(0, len(data))]

    def splice(self, data: bytes, others: Sequence[bytes]) -> bytes:
        other = self.draw.choice((data, *others))
        start, place = self.draw.randint(0, len(other)), self.draw.randint(0, len(data))
        part = other[start : start + self.draw.choice((1, 8, 64, 512, 4096))]
        return data[:place] + part + data[place + self.draw.choice((0, len(part))) :]

    def number(self, data: bytes, _: Sequence[bytes]) -> bytes:
        found = list(NUMBER.finditer(data[:20_000]))
        if not found:
            return self.flip(data, ())
        match = self.draw.choice(found)
        return data[: match.start()] + self.draw.choice(EXTREMES) + data[match.end() :]

    def swap(self, data: bytes, others: Sequence[bytes]) -> bytes:
        """Replace a value of a JSON text, or of a line `key = value` or `a,b`, by another."""
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError):
            return self._swap_lines(data, others)
        return json.dumps(self.swap_value(tree)).encode()

    def swap_value(self, tree: Any) -> Any:
        """Replace, drop or double one value somewhere in JSON."""
        places = list(_places(tree))
        if not places:
            return self.draw.choice(VALUES)
        holder, key = self.draw.choice(places)
        way = self.draw.randrange(4)
        if way == 0:
            other, their = self.draw.choice(places)
            holder[key] = json.loads(json.dumps(other[their]))
        elif way == 1 and isinstance(holder, dict):
            holder[self.draw.choice(("", "\0", "../x", f"{key}x", "n"))] = holder.pop(key)
        elif way == 1:
            holder.pop(key)
        else:
            holder[key] = self.draw.choice(VALUES)
        return tree

    def _swap_lines(self, data: bytes, others: Sequence[bytes]) -> bytes:
        lines = self.draw.choice((data, data, *others)).split(b"\n") if others else data.split(b"\n")
        i, j = self.draw.randrange(len(lines)), self.draw.randrange(len(lines))
        mark = b"=" if b"=" in lines[i] else b","
        key, found, _ = lines[i].partition(mark)
        value = lines[j].rpartition(mark)[2]
        lines[i] = key + found + self.draw.choice((value, b" " + json.dumps(self.draw.choice(VALUES)).encode(), b""))
        return b"\n".join(lines)


def _places(tree: Any):
    """Yield every (list or dict, key) below a JSON value."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = range(len(node)) if isinstance(node, list) else list(node) if isinstance(node, dict) else ()
        for key in keys:
            yield node, key
            waiting.append(node[key])
