"""One line on standard error for each request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from moac_runtime.engine.chosen import ChosenSampling
from moac_runtime.engine.turn import Turn

LOG = logging.getLogger("moac.serve")


def note(request: Request, turns: Mapping[int, Turn], sampling: ChosenSampling) -> None:
    """What the line of this request tells beyond its status: of the choices that have ended."""
    first = next(iter(turns.values()))
    request.scope["moac.note"] = {
        "prompt": first.prompt_tokens,
        "reused": first.reused_tokens,
        "answer": sum(turn.answer_tokens for turn in turns.values()),
        "capacity": first.capacity,
        "finish": ",".join(turn.finish_reason for turn in turns.values()),
        "queued_s": f"{first.queued_s:.3f}",
        "first_s": f"{first.first_token_s or 0:.3f}",
        "sampling": f'"{sampling.told() or "as asked"}"',
    }


def write_line(scope: Mapping[str, Any], *, name: str, status: int, seconds: float) -> None:
    """Write the line of a request that has been replied to; `name`: the request's id."""
    told = {
        "status": status,
        "seconds": f"{seconds:.3f}",
        **scope.get("moac.note", {}),
        "id": name,
    }
    words = " ".join(f"{key}={value}" for key, value in told.items())
    LOG.info("%s %s %s", scope["method"], scope["path"], words)
