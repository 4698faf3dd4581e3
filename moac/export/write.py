"""Write the ONNX target into a staged package: `model.onnx` and `onnx.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import helper

from moac.export.graph import build_graph
from moac.export.weights import shared_weights
from moac.packaging.writer import write_json
from moac_runtime.onnx_layout import ONNX_LAYOUT, ONNX_MODEL, OPSET, OnnxLayout, cache_layouts
from moac_runtime.plan import Plan
from moac_runtime.spec import ModelSpec

# The first that opset 21 asks for, so that older runtimes read the file.
_IR_VERSION = 10


def write_onnx(
    staging: Path,
    *,
    spec: ModelSpec,
    plan: Plan,
    head_order: Sequence[Sequence[int]],
    dtype: str,
    capacity: int,
    weights: str,
) -> None:
    """Write the graph over the weights that stand in `staging` already, checked.

    Raises UsageError for an activation without a graph, OSError.
    """
    spans, caches = cache_layouts(plan, head_order)
    layout = OnnxLayout(
        dtype=dtype,
        weights=weights,
        sink=plan.sink,
        block=plan.block,
        min_span=plan.min_span,
        capacity=capacity,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        spans=spans,
        caches=caches,
    )
    graph = build_graph(spec, layout, shared_weights(staging, dtype))
    model = helper.make_model(
        graph,
        producer_name="moac",
        ir_version=_IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    onnx.save_model(model, staging / ONNX_MODEL)
    onnx.checker.check_model(staging / ONNX_MODEL, full_check=True)
    write_json(staging / ONNX_LAYOUT, layout.to_json())
