"""What a server does of a package: many clients, second turns, chats under a limit of KV bytes.

    python benchmarks/serving.py out/ --also quarter/ --kv-limit 512MiB
    python benchmarks/serving.py out/ --against http://127.0.0.1:8080

asks for `--clients` answers one at a time and all at once; for the second turns of eight chats in
turn, and new chats behind their system messages; and how many chats of `--chat-tokens` have rows
at once under `--kv-limit`, for the package and each of `--also`. `--against` asks another
OpenAI-compatible server the first of these, with the same token ids.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asked import ended
from served import CHAT, TEXT, Reply, Server, ask, ask_all, served
from told import origin

from moac_runtime.package.artifact import open_artifact

_CHATS = 8
_WORDS = re.findall(r"\w+", "the river runs past a mill and seven grey stones to the old harbour")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; its exit code is that of a moac command."""
    return ended(_main, argv)


def _main(arguments: list[str]) -> int:
    options = _options(arguments)
    result: dict[str, Any] = {**origin(), "arguments": arguments, "clients": {}, "limit": {}}
    prompts = _prompts(options)
    with served(options.package, *options.serve) as server:
        result["clients"][options.package] = _clients(server, prompts, options)
        result["turns"] = _turns(server, options)
    if options.against is not None:
        other = Server(options.against.rstrip("/"))
        result["clients"][options.against] = _clients(other, prompts, options)
    for package in (options.package, *options.also):
        limit = ["--max-kv-bytes", options.kv_limit, "--no-kept-caches"]
        with served(package, *limit, *options.serve) as server:
            result["limit"][package] = _under_limit(server, options)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("package", help="the package directory")
    add("--also", nargs="*", default=[], metavar="PACKAGE", help="others under the limit")
    add("--against", metavar="URL", help="another server to ask the same")
    add("--clients", type=int, default=16, metavar="N", help="at once (16)")
    add("--shortest", type=int, default=50, metavar="N", help="prompt, in tokens (50)")
    add("--longest", type=int, default=2000, metavar="N", help="prompt, in tokens (2000)")
    add("--new-tokens", type=int, default=64, metavar="N", help="of each answer (64)")
    add("--chat-tokens", type=int, default=3000, metavar="N", help="of a chat's prompt (3000)")
    add("--chats", type=int, default=40, metavar="N", help="that ask under the limit (40)")
    add("--kv-limit", default="512MiB", metavar="SIZE", help="of KV bytes (512MiB)")
    add("--seed", type=int, default=0, metavar="N", help="of the prompts (0)")
    add("--out", type=Path, metavar="FILE", help="JSON (none)")
    add("--serve", nargs=argparse.REMAINDER, default=[], metavar="WORDS", help="for moac serve")
    return made.parse_args(arguments)


# ---- many clients


def _prompts(options: argparse.Namespace) -> list[list[int]]:
    """Token ids, as many as lengths from the shortest to the longest are told apart."""
    draw, vocab = random.Random(options.seed), open_artifact(options.package).spec.vocab_size
    span = options.longest - options.shortest
    return [
        [draw.randrange(vocab // 2, vocab) for _ in range(options.shortest + place * span
         // max(options.clients - 1, 1))]
        for place in range(options.clients)
    ]  # fmt: skip


def _clients(
    server: Server, prompts: Sequence[list[int]], options: argparse.Namespace
) -> dict[str, Any]:
    bodies = [
        {"prompt": prompt, "max_tokens": options.new_tokens, "temperature": 0}
        for prompt in prompts
    ]
    ask(server, TEXT, {**bodies[0], "max_tokens": 2})  # what is loaded once is loaded
    alone = [ask(server, TEXT, body) for body in bodies]
    began = time.perf_counter()
    together = ask_all(server, TEXT, bodies)
    seconds = time.perf_counter() - began
    reads = [ask(server, TEXT, {**body, "max_tokens": 1}) for body in _unlike(bodies)]
    read_tokens = sum(map(len, prompts))
    made = sum(reply.answer_tokens for reply in together)
    return {
        "alone": {
            "decode_tokens_per_s": _decode_speed(alone),
            "first_s": _quantiles([reply.first_s for reply in alone]),
        },
        "together": {
            "decode_tokens_per_s": made / max(seconds, 1e-9),
            "total_tokens_per_s": (read_tokens + made) / seconds,
            "first_s": _quantiles([reply.first_s for reply in together]),
            "between_s": _quantiles([gap for reply in together for gap in reply.gaps]),
        },
        "prefill_tokens_per_s": read_tokens / sum(reply.seconds for reply in reads),
        "same_answers": sum(a.text == b.text for a, b in zip(alone, together, strict=True)),
        "requests": len(bodies),
    }


def _unlike(bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same lengths with other first tokens, so that nothing is found read."""
    return [{**body, "prompt": [*body["prompt"][1:], body["prompt"][0]]} for body in bodies]


def _decode_speed(replies: Sequence[Reply]) -> float:
    """Tokens after the first, one answer after another."""
    tokens = sum(max(reply.answer_tokens - 1, 0) for reply in replies)
    return tokens / max(sum(reply.seconds - reply.first_s for reply in replies), 1e-9)


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    return {"p50": statistics.median(ordered), "p95": ordered[int(0.95 * (len(ordered) - 1))]}


# ---- turns


def _turns(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first token: cold, of second turns in turn, behind shared system messages."""
    draw = random.Random(options.seed)
    systems = [_text(server, draw, options.chat_tokens) for _ in range(_CHATS)]
    chats = [
        [{"role": "system", "content": system}, {"role": "user", "content": "Begin."}]
        for system in systems
    ]
    cold = [_chat(server, chat) for chat in chats]
    for chat, reply in zip(chats, cold, strict=True):
        chat += [
            {"role": "assistant", "content": reply.text},
            {"role": "user", "content": "Go on."},
        ]
    second = [_chat(server, chat) for chat in chats]
    shared = [
        _chat(server, [chat[0], {"role": "user", "content": "Something else."}]) for chat in chats
    ]
    return {
        name: {
            "first_s": statistics.mean(reply.first_s for reply in replies),
            "prompt_tokens": statistics.mean(r.usage["prompt_tokens"] for r in replies),
            "cached_tokens": statistics.mean(
                r.usage["prompt_tokens_details"]["cached_tokens"] for r in replies
            ),
        }
        for name, replies in (("cold", cold), ("second_turn", second), ("shared_system", shared))
    }


def _chat(server: Server, messages: list[dict[str, str]]) -> Reply:
    return ask(server, CHAT, {"messages": messages, "max_tokens": 32, "temperature": 0})


def _text(server: Server, draw: random.Random, tokens: int) -> str:
    """Words that make a prompt of about so many tokens."""
    words = [draw.choice(_WORDS) for _ in range(200)]
    asked = {"messages": [{"role": "user", "content": " ".join(words)}], "max_tokens": 1}
    counted = ask(server, CHAT, asked).usage["prompt_tokens"]
    return " ".join(draw.choice(_WORDS) for _ in range(200 * tokens // counted))


# ---- a limit of bytes


def _under_limit(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """How many of the chats that ask at once have rows at once, and what they do together."""
    draw = random.Random(options.seed)
    bodies = [
        {
            "messages": [{"role": "user", "content": _text(server, draw, options.chat_tokens)}],
            "max_tokens": options.new_tokens,
            "temperature": 0,
        }
        for _ in range(options.chats)
    ]
    began = time.perf_counter()
    replies = ask_all(server, CHAT, bodies)
    seconds = time.perf_counter() - began
    made = sum(reply.answer_tokens for reply in replies)
    return {
        "chats": len(bodies),
        "most_at_once": server.metric("moac_sequences_peak"),
        "most_kv_bytes": server.metric("moac_kv_peak_bytes"),
        "answer_tokens_per_s": made / seconds,
        "seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
