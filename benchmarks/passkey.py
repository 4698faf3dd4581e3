"""Pass keys through the packaged runtime: the package's plan, a uniform plan, and dense.

    python benchmarks/passkey.py out/ --source .cache/smollm2-135m-instruct --cases 40

Held-out haystacks, wordings and seeds. The last 50 prompt tokens go through decode steps. A pass
key counts as found when it is the first integer of the greedy answer; "outside" are the pass keys
that lie wholly beyond the uniform plan's window, seen from the end of the prompt.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moac.calibration.passkey import PASSKEY_ANSWER_TOKENS, PasskeyCase, passkey_case
from moac.checkpoint import open_checkpoint
from moac.evaluation.sessions import SESSION_BACKENDS, EvalSession, open_sessions
from moac.inspection import planned_lengths
from moac.planning import matching_uniform
from moac.verify import undropping
from moac_runtime.artifact import load_plan_record, open_artifact
from moac_runtime.plan import Plan

_STEPPED = 50
_NEEDLE_TOKENS = 40  # no wording's needle is longer


@dataclass(frozen=True, slots=True)
class Row:
    """One length and method: pass keys found of all, and of those outside the uniform window."""

    length: int
    method: str
    density: float
    found: int
    cases: int
    found_outside: int
    outside: int
    seconds: float


def answers(
    session: EvalSession, cases: Sequence[PasskeyCase], eos: frozenset[int]
) -> list[list[int]]:
    """Greedy answers to one batch of cases."""
    session.extend([list(case.token_ids[:-_STEPPED]) for case in cases])
    for step in range(-_STEPPED, 0):
        logits = session.decode([case.token_ids[step] for case in cases])
    replies: list[list[int]] = [[] for _ in cases]
    going = set(range(len(cases)))
    for _ in range(PASSKEY_ANSWER_TOKENS):
        tokens = logits.argmax(-1)
        for row in list(going):
            token = int(tokens[row])
            replies[row].append(token)
            if token in eos:
                going.discard(row)
        if not going:
            break
        logits = session.decode(tokens)
    return replies


def outside(case: PasskeyCase, plan: Plan, length: int) -> bool:
    """Whether the needle lies wholly beyond the window of `plan`, all of whose heads are equal."""
    head = plan.head(0, 0, length)
    oldest_seen = len(case.token_ids) - (head.size - head.sink)
    return head.sink <= case.needle_start <= oldest_seen - _NEEDLE_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--source", required=True, help="the checkpoint, for its tokenizer")
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--backend", choices=SESSION_BACKENDS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    artifact = open_artifact(options.package)
    sessions = open_sessions(artifact, options.backend)
    checkpoint = open_checkpoint(options.source)
    tokenizer, eos = checkpoint.load_tokenizer(), frozenset(checkpoint.eos_token_ids)
    planned = planned_lengths(load_plan_record(artifact))
    plans = {
        "dense": undropping(artifact),
        "moac": artifact.plan,
        "uniform": matching_uniform(artifact.plan, lengths=planned),
    }
    rows: list[Row] = []
    for length in map(int, options.lengths.split(",")):
        cases = [
            passkey_case(
                tokenizer,
                length - PASSKEY_ANSWER_TOKENS,
                (i + 0.5) / options.cases,
                options.seed + i,
                haystack="filler" if i % 4 == 3 else "text",
            )
            for i in range(options.cases)
        ]
        far = [outside(case, plans["uniform"], length) for case in cases]
        for method, plan in plans.items():
            started = time.perf_counter()
            hits = []
            for first in range(0, len(cases), options.batch):
                batch = cases[first : first + options.batch]
                replies = answers(sessions.open(plan, len(batch), length), batch, eos)
                for case, reply in zip(batch, replies, strict=True):
                    number = re.search(r"\d+", tokenizer.decode(reply))
                    hits.append(number is not None and number[0] == case.answer)
            row = Row(
                length,
                method,
                plan.density(length),
                sum(hits),
                len(cases),
                sum(hit for hit, beyond in zip(hits, far, strict=True) if beyond),
                sum(far),
                time.perf_counter() - started,
            )
            rows.append(row)
            print(
                f"{length:>6}  {method:<8} density {row.density:.3f}  "
                f"found {row.found}/{row.cases}  "
                f"outside {row.found_outside}/{row.outside}  {row.seconds:.0f} s",
                flush=True,
            )
    if options.json:
        record: dict[str, Any] = {
            "command": f"python benchmarks/passkey.py out/ --cases {options.cases}",
            "backend": sessions.backend,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
            "versions": {name: version(name) for name in ("moac", "torch")},
            "package": {"fingerprint": artifact.provenance["fingerprint"]},
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
