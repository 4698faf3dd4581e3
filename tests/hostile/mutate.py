"""Hostile inputs made from valid ones, so that they get deep before anything refuses them.

Every function takes a `random.Random`; hypothesis and atheris bring ones whose choices are theirs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

NUMBERS = (0, -1, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64)
NUMBERS += (-(2**31), -(2**63), 10**20, 10**39)
FLOATS = (0.5, -0.0, -1.5, 1e-320, 1e38, 1e39, 1e308)
TEXTS = ("", " ", "a", "\0", "a\nb", "../x", "/etc/passwd", "weights/..", "é" * 70, "\x1b[31m")
TEXTS += ("float32", "bfloat16", "default", "dynamic", "longrope", "NaN", "1", "__class__", "{}")


class Raw(str):
    """JSON text that stands as it is."""


class Pairs(list[Any]):
    """An object as a list of key and value, in which a key may stand twice."""


RAWS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 50, "1" * 5000, "0.1e-400", "01"),
    *(
        '"\\ud800"',
        '"\\udc00x"',
        "[" * 100 + "]" * 100,
        "[" * 100_000,
        '{"a":' * 70 + "1" + "}" * 70,
    ),
    *(
        '{"a":1,"a":2}',
        "'a'",
        "[1,]",
        "\ufeff1",
        "// x\n1",
        '"\t"',
        "0x10",
        "[" + "0," * 9999 + "0]",
    ),
)


def read(text: str) -> Any:
    """A JSON text as what `write` takes."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))


def write(value: Any) -> str:
    """JSON text, whatever is wrong with it."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{write(key)}:{write(one)}" for key, one in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(write, value)) + "]"
    return json.dumps(value)


def hostile_json(rng: Random, text: str, *, most: int = 3) -> str:
    """A valid JSON text with some places changed."""
    document = read(text)
    for _ in range(rng.randint(1, most)):
        document = _changed(rng, document)
    return write(document)


def hostile_bytes(rng: Random, data: bytes) -> bytes:
    """Bytes flipped, cut out, doubled or put in."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, max(0, len(found) - 1))
        kind = rng.randint(0, 4)
        if kind == 0 and found:
            found[at] ^= 1 << rng.randint(0, 7)
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            del found[at : at + rng.randint(1, 64)]
        elif kind == 3:
            found[at:at] = found[at : at + rng.randint(1, 64)]
        else:
            found[at:at] = rng.choice((b"\0", b"\xff" * 8, b'"', b"{", b"\xed\xa0\x80", b"\n"))
    return bytes(found)


def _changed(rng: Random, document: Any) -> Any:
    """One place, found by going down from the top, so that long lists draw no more than others."""
    if not isinstance(document, list) or not document or rng.random() < 0.05:
        return _instead(rng, document)
    index = rng.randint(0, len(document) - 1)
    if rng.random() < 0.3:
        return rng.choice(_IN_LISTS)(rng, document, index)
    if isinstance(document, Pairs):
        document[index][1] = _changed(rng, document[index][1])
    else:
        document[index] = _changed(rng, document[index])
    return document


def _instead(rng: Random, value: Any) -> Any:
    """Something else in place of a value."""
    near: list[Any] = []
    if isinstance(value, int | float) and not isinstance(value, bool):
        near = [value + 1, value - 1, -value, value * 2, value * 1000, float(value), str(value)]
    if isinstance(value, str) and not isinstance(value, Raw):
        near = [value + "x", value[:-1], value.upper(), value * 3, f"../{value}", f"/{value}"]
    if near and rng.random() < 0.5:
        return rng.choice(near)
    others: Sequence[Any] = rng.choice(
        (NUMBERS, FLOATS, TEXTS, [Raw(raw) for raw in RAWS], _PLAIN)
    )
    return copy.deepcopy(rng.choice(others))  # what is changed next must be no part of these


_PLAIN = (None, True, False, [], Pairs(), [[]], [None], [Pairs()], Pairs([["a", 1]]))


def _drop(rng: Random, document: list[Any], index: int) -> Any:
    del document[index]
    return document


def _twice(rng: Random, document: list[Any], index: int) -> Any:
    document.insert(rng.randint(0, len(document)), copy.deepcopy(document[index]))
    return document


def _many(rng: Random, document: list[Any], index: int) -> Any:
    if isinstance(document, Pairs):
        document += [[f"{document[index][0]}{n}", document[index][1]] for n in range(50)]
    else:
        document[index:index] = [document[index]] * rng.choice((2, 50, 1000))
    return document


def _renamed(rng: Random, document: list[Any], index: int) -> Any:
    if isinstance(document, Pairs):
        document[index] = [rng.choice((*TEXTS, document[0][0])), document[index][1]]
    return document


def _moved(rng: Random, document: list[Any], index: int) -> Any:
    other = rng.randint(0, len(document) - 1)
    if isinstance(document, Pairs):
        document[index] = [document[index][0], document[other][1]]
    else:
        document[index] = document[other]
    return document


_IN_LISTS: Sequence[Callable[[Random, list[Any], int], Any]] = (
    *(_drop, _twice, _many, _renamed, _moved),
)
