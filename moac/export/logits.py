"""What the packaged graph computes, for verification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moac_runtime.backends.onnx.session import OnnxGraph, OnnxSession
from moac_runtime.package.span import DENSE, head_span

if TYPE_CHECKING:
    from numpy.typing import NDArray


def graph_logits(
    graph: OnnxGraph,
    tokens: Sequence[int],
    positions: Sequence[int],
    *,
    decoded: int = 0,
    dense: bool = False,
) -> NDArray[Any]:
    """The graph's logits `[len(positions), V]`; the last `decoded` tokens go one by one.

    `dense`: with every cache as large as the session, so that nothing is dropped.
    """
    layout, capacity = graph.layout, len(tokens)
    spans = [
        head_span(DENSE, capacity, sink=layout.sink, block=1, min_span=1, window=kind.window)
        for kind in layout.spans
    ]
    session = OnnxSession(graph, batch=1, capacity=capacity, spans=spans if dense else None)
    split = capacity - decoded
    parts = session.extend_at([tokens[:split]], [[p for p in positions if p < split]])
    for place in range(split, capacity):
        logits = session.decode([tokens[place]])
        parts.extend([logits] if place in positions else [])
    return np.concatenate(parts)
