"""A server under requests of all kinds for long: no wrong answer, no byte kept, no memory grown.

    python benchmarks/soak.py out/ --requests 2000

asks a served package for known answers, one in ten of them badly formed and one in five left
before its end, from many clients at once. Known are the answers to the same requests one at a
time, so a float32 package, or --dtype float32, is to be asked. A greedy answer must be the known
one. A sampled one may differ where the drawn number falls, within the error that the package
allows float32, between two tokens; those are counted as "rounded". Ends with 3 where a check
fails.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asked import ended
from near import Near
from served import CHAT, Server, ask, served

from moac_runtime.engine.model import load
from moac_runtime.package.integrity import MANIFEST
from moac_runtime.package.manifest import read_json

_MALFORMED: list[tuple[bytes, str]] = [
    (b"{", "application/json"),
    (b"[]", "application/json"),
    (b"{}", "text/plain"),
    (b'{"messages": []}', "application/json"),
    (b'{"messages": [{"role": "user"}]}', "application/json"),
    (b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"5": 1}}',
     "application/json"),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}', "application/json"),
    (b'{"model": "none", "messages": [{"role": "user", "content": "x"}]}', "application/json"),
]  # fmt: skip
_WORDS = ("a", "fox", "saw", "the", "red", "hen", "run")
_WARM = 0.25  # of the requests, after which memory must not grow
_GROWTH = 0.05


_SAMPLED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclass(frozen=True, slots=True)
class Known:
    """A request and the answer that it gets one at a time."""

    body: dict[str, Any]
    answer: str

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn."""
        return self.body["temperature"] > 0


@dataclass
class Soak:
    """What was seen so far.

    `memory`: bytes in use, once in a while. `differing`: sampled answers that are not the known
    ones.
    """

    counts: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    differing: list[tuple[Known, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def main(argv: list[str] | None = None) -> int:
    """Run the soak; its exit code is that of a moac command."""
    return ended(_main, argv)


def _main(arguments: list[str]) -> int:
    options = _options(arguments)
    with served(options.package, *options.serve) as server:
        found = _soaked(server, options)
        _judge(found, options)
        checks = _checks(server, found)
    checks["no traceback in the log"] = not any("Traceback" in line for line in server.said)
    result = {"counts": dict(found.counts), "memory": found.memory, "checks": checks}
    print(json.dumps({**result, "wrong": found.wrong[:5]}, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(checks.values()) else 3


def _options(arguments: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("package", help="the package directory")
    add("--requests", type=int, default=2000, metavar="N", help="in all (2000)")
    add("--clients", type=int, default=8, metavar="N", help="at once (8)")
    add("--seed", type=int, default=0, metavar="N", help="of what is asked (0)")
    add("--out", type=Path, metavar="FILE", help="JSON (none)")
    add("--serve", nargs=argparse.REMAINDER, default=["--dtype", "float32"], metavar="WORDS",
        help="for moac serve (--dtype float32)")  # fmt: skip
    return made.parse_args(arguments)


def _soaked(server: Server, options: argparse.Namespace) -> Soak:
    draw = random.Random(options.seed)
    known = _known(server, draw)
    found, left = Soak(), iter(range(options.requests))
    every = max(options.requests // 40, 1)

    def client(seed: int) -> None:
        own = random.Random(seed)
        while True:
            with found.lock:
                number = next(left, None)
                if number is not None and number % every == 0:
                    found.memory.append(server.resident_bytes())
            if number is None:
                return
            _one(server, own, known, found)

    clients = [
        threading.Thread(target=client, args=(options.seed + place,))
        for place in range(options.clients)
    ]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    found.memory.append(server.resident_bytes())
    return found


def _judge(found: Soak, options: argparse.Namespace) -> None:
    """Tell sampled answers that rounding allows from wrong ones."""
    if not found.differing:
        return
    manifest = read_json(Path(options.package, MANIFEST), MANIFEST)
    near = Near(
        load(options.package, dtype="float32"), manifest["verification"]["limits"]["float32"]
    )
    verdicts: dict[tuple[int, str], bool] = {}
    for known, answer in found.differing:
        key = known.body["seed"], answer
        if key not in verdicts:
            verdicts[key] = near.allows(known.body, answer)
        if verdicts[key]:
            found.counts["rounded"] += 1
        else:
            found.wrong.append(f"200: {answer!r}, expected {known.answer!r}, sampled")


def _known(server: Server, draw: random.Random) -> list[Known]:
    """Requests of many kinds and the answers they get one at a time."""
    found = []
    for number in range(24):
        words = " ".join(draw.choices(_WORDS, k=draw.choice((3, 20, 80))))
        system = [{"role": "system", "content": "You answer briefly. " * 6}]
        body: dict[str, Any] = {
            "messages": [*system * (number % 2), {"role": "user", "content": words}],
            "max_tokens": draw.randrange(4, 40),
            **draw.choice(({"temperature": 0}, {"temperature": 0}, _SAMPLED)),
            "seed": number,
        }
        found.append(Known(body, ask(server, CHAT, body).text))
    return found


def _one(server: Server, draw: random.Random, known: list[Known], found: Soak) -> None:
    """One request of a kind that is drawn."""
    kind = draw.choices(("whole", "left", "malformed"), (7, 2, 1))[0]
    asked = draw.choice(known)
    if kind == "malformed":
        status = _malformed(server, draw)
        right, told = 400 <= status < 500, f"malformed: {status}"
    elif kind == "left":
        _leave(server, asked.body, draw)
        right, told = True, ""
    else:
        reply = ask(server, CHAT, asked.body)
        differs = reply.text != asked.answer
        right = reply.status == 200 and (asked.sampled or not differs)
        told = f"{reply.status}: {reply.text!r}, expected {asked.answer!r}"
    with found.lock:
        found.counts[kind] += 1
        if kind == "whole" and right and differs:
            found.differing.append((asked, reply.text))
        if not right:
            found.wrong.append(told)


def _malformed(server: Server, draw: random.Random) -> int:
    data, kind = draw.choice(_MALFORMED)
    connection = server.connect()
    connection.request("POST", CHAT, data, {"Content-Type": kind})
    reply = connection.getresponse()
    reply.read()
    connection.close()
    return reply.status


def _leave(server: Server, body: dict[str, Any], draw: random.Random) -> None:
    """Go away before the answer is there, while it streams or before it does."""
    asked = {**body, "stream": draw.random() < 0.5, "max_tokens": 200}
    connection = server.connect()
    connection.request("POST", CHAT, json.dumps(asked), {"Content-Type": "application/json"})
    if asked["stream"]:
        connection.getresponse().read(draw.randrange(1, 400))
    else:
        time.sleep(draw.random() * 0.05)
    connection.close()


def _checks(server: Server, found: Soak) -> dict[str, bool]:
    end = time.monotonic() + 20
    while server.metric("moac_kv_bytes") and time.monotonic() < end:
        time.sleep(0.05)
    warm = found.memory[int(_WARM * len(found.memory)) :]
    return {
        "no wrong answer": not found.wrong,
        "KV bytes back to zero": server.metric("moac_kv_bytes") == 0,
        "no sequence left": server.metric("moac_sequences_running") == 0,
        "no sequence failed": server.metric("moac_sequences_failed_total") == 0,
        "memory flat after warm-up": max(warm) <= (1 + _GROWTH) * warm[0],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
