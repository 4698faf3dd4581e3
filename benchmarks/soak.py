"""A server under requests of all kinds for long: no wrong answer, no byte kept, no memory grown.

    python benchmarks/soak.py out/ --requests 2000

asks a served package for known answers, one in ten of them badly formed and one in five left
before its end, from many clients at once. Known are the answers to the same requests one at a
time, so a float32 package, or --dtype float32, is to be asked. Ends with 3 where a check fails.
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
from served import CHAT, Server, ask, served

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


@dataclass
class Soak:
    """What was seen so far; `memory`: bytes in use, once in a while."""

    counts: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def main(argv: list[str] | None = None) -> int:
    """Run the soak; its exit code is that of a moac command."""
    return ended(_main, argv)


def _main(arguments: list[str]) -> int:
    options = _options(arguments)
    with served(options.package, *options.serve) as server:
        found = _soaked(server, options)
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


def _known(server: Server, draw: random.Random) -> list[tuple[dict[str, Any], str]]:
    """Requests of many kinds and the answers they get one at a time."""
    found = []
    for number in range(24):
        words = " ".join(draw.choices(_WORDS, k=draw.choice((3, 20, 80))))
        system = [{"role": "system", "content": "You answer briefly. " * 6}]
        body: dict[str, Any] = {
            "messages": [*system * (number % 2), {"role": "user", "content": words}],
            "max_tokens": draw.randrange(4, 40),
            "temperature": draw.choice((0, 0, 1.0)),
            "seed": number,
        }
        found.append((body, ask(server, CHAT, body).text))
    return found


def _one(
    server: Server, draw: random.Random, known: list[tuple[dict[str, Any], str]], found: Soak
) -> None:
    """One request of a kind that is drawn."""
    kind = draw.choices(("whole", "left", "malformed"), (7, 2, 1))[0]
    body, wanted = draw.choice(known)
    if kind == "malformed":
        status = _malformed(server, draw)
        right, told = 400 <= status < 500, f"malformed: {status}"
    elif kind == "left":
        _leave(server, body, draw)
        right, told = True, ""
    else:
        reply = ask(server, CHAT, body)
        right = reply.status == 200 and reply.text == wanted
        told = f"{reply.status}: {reply.text!r}, expected {wanted!r}"
    with found.lock:
        found.counts[kind] += 1
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
