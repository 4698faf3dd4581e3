"""Backends whose caches are in the package's dtype alone refuse plans that give heads widths."""

from __future__ import annotations

from moac_runtime.errors import MoacError
from moac_runtime.package.plan import Plan


def refuse_widths(plan: Plan, backend: str) -> None:
    """Raise MoacError where a KV head of `plan` holds its keys and values in 8 or 4 bits."""
    if plan.rounds:
        raise MoacError(
            f"the plan holds keys and values in 8 or 4 bits, which the backend {backend} does not "
            "serve yet; run with --backend cpu or torch, or compile it again with --kv-bits full"
        )
