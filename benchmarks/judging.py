"""Plans of one length judged on cases that no plan was made from, as a markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moac.calibration import plain_text_windows
from moac.checkpoint import Checkpoint
from moac.evaluation.case import Case
from moac.evaluation.passkey import passkey
from moac.evaluation.runner import Runner
from moac.evaluation.sessions import open_sessions
from moac.evaluation.wordings import WORDINGS
from moac_runtime.package.artifact import Artifact
from moac_runtime.package.plan import Plan

SEED, TEXT_SEED = 77, 78


def passkeys(tokenizer: Any, length: int, count: int) -> list[Case]:
    """`count` cases, the unseen wordings and calibration's in turn."""
    return [
        passkey(tokenizer, length, SEED, i // 2, (i + 0.5) / count, WORDINGS[i % 2])
        for i in range(count)
    ]


def show(
    artifact: Artifact,
    checkpoint: Checkpoint,
    plans: Mapping[str, Plan],
    *,
    length: int,
    cases: int,
    texts: int,
) -> None:
    """Pass keys found, the mean loss of their values, and text's loss beside the first plan's.

    `plans`: the uniform one first. `cases`, `texts`: how many, by other seeds than moac eval's.
    """
    runner, tokenizer = Runner(open_sessions(artifact)), checkpoint.load_tokenizer()
    eos = frozenset(checkpoint.eos_token_ids)
    asked = passkeys(tokenizer, length, cases)
    windows = plain_text_windows(tokenizer, length, texts, TEXT_SEED)
    print("| plan | density | pass keys found | loss of their values | text loss | to uniform's |")
    print("|---|---|---|---|---|---|")
    uniforms: Sequence[float] = ()
    for name, plan in plans.items():
        hits, losses, nats = 0.0, [], []
        for first in range(0, cases, 8):
            batch = asked[first : first + 8]
            replies = runner.replies(plan, batch, capacity=length, eos=eos)
            for case, reply in zip(batch, replies, strict=True):
                hits += case.score(tokenizer.decode(list(reply.tokens), skip_special_tokens=True))
                losses.append(reply.nll)
        for first in range(0, texts, 8):
            nats += [t.whole for t in runner.text_losses(plan, windows[first : first + 8])]
        uniforms = uniforms or nats
        apart = np.subtract(nats, uniforms)
        print(
            f"| {name} | {plan.density(length):.3f} | {hits:.0f}/{cases} | {np.mean(losses):.3f} "
            f"| {np.mean(nats):.4f} | {apart.mean():+.4f} ± "
            f"{1.96 * apart.std(ddof=1) / texts**0.5:.4f} |",
            flush=True,
        )
