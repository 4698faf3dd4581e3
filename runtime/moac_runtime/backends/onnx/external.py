"""Which files an ONNX graph takes its weights from, told before anything opens them.

onnxruntime opens such a file by its name. The graph is a protobuf message, of which this reads the
fields that lead to a tensor's `external_data`; all others are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator

# By message: the fields that hold messages of these kinds (onnx.proto).
_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        **{5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
        **{22: "sparse", 23: "sparse"},
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # of an entry
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_DEEPEST = 64  # messages in each other; graphs in graphs are few


def external_files(model: bytes) -> set[str]:
    """The `location` of every tensor that is stored apart.

    Raises ValueError where these bytes are no such message.
    """
    return set(_locations(memoryview(model), "model", 0))


def _locations(message: memoryview, kind: str, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        raise ValueError("graphs lie in each other too deep")
    for number, value in _parts(message):
        inner = _FIELDS[kind].get(number)
        if inner == "entry":
            entry = dict(_parts(value))
            if bytes(entry.get(_KEY, b"")) == b"location":
                yield bytes(entry.get(_VALUE, b"")).decode("utf-8")
        elif inner is not None:
            yield from _locations(value, inner, depth + 1)


def _parts(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of every field that has a length; the last of a number counts."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == _VARINT:
            _, place = _varint(message, place)
            continue
        if kind == _LENGTH:
            size, place = _varint(message, place)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field has the wire type {kind}")
        if place + size > len(message):
            raise ValueError("a field reaches past its message")
        if kind == _LENGTH:
            yield tag >> 3, message[place : place + size]
        place += size


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            break
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number does not end")
