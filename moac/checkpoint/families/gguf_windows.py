"""The sliding windows that a GGUF file tells of, as llama.cpp has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moac.checkpoint.gguf_fields import Fields

WINDOW = "attention.sliding_window"
PERIOD = "attention.sliding_window_pattern"


def gguf_windows(
    fields: Fields, architecture: str, layers: int, *, period: int, window: int = 0
) -> dict[str, Any]:
    """The window in tokens, and the layers under it: all but the last of every period.

    `period`, `window`: what llama.cpp takes a file for that does not say; no window is 0.
    """
    window = fields.whole(f"{architecture}.{WINDOW}", window)
    name = f"{architecture}.{PERIOD}"
    period = fields.whole(name, period)
    if period < 1:
        raise fields.wrong(name, "a positive number")
    local = [bool(window and (index + 1) % period) for index in range(layers)]
    types = ["sliding_attention" if own else "full_attention" for own in local]
    return {"layer_types": types, **({"sliding_window": window} if window else {})}
