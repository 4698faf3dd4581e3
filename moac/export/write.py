"""Write the ONNX target into a staged package: `model.onnx` and `onnx.json`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, helper

from moac.export.graph import build_graph
from moac.export.weights import (
    ACCURACY,
    CONTRIB,
    packed_weights,
    readable_weights,
    shared_weights,
)
from moac.packaging.writer import write_json
from moac_runtime.backends.onnx.layout import (
    ONNX_LAYOUT,
    ONNX_MODEL,
    OPSET,
    OnnxLayout,
    cache_layouts,
)
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec

# The first that opset 21 asks for, so that older runtimes read the file.
_IR_VERSION = 10

# Weights that share one scale in the int8 graph.
INT8_BLOCK = 32
ONNX_WEIGHTS = "model.onnx.data"


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

    Raises OSError.
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
    if weights == "int8":
        model = quantized(_model(build_graph(spec, layout, readable_weights(staging, dtype))))
        _save_apart(model, staging)
    elif weights == "packed":
        model = _model(build_graph(spec, layout, packed_weights(staging, dtype, spec)), CONTRIB)
        _save_apart(model, staging)
    else:
        model = _model(build_graph(spec, layout, shared_weights(staging, dtype)))
        onnx.save_model(model, staging / ONNX_MODEL)
    onnx.checker.check_model(staging / ONNX_MODEL, full_check=True)
    write_json(staging / ONNX_LAYOUT, layout.to_json())


def quantized(model: ModelProto) -> ModelProto:
    """`model` with its linear weights in 8 bits, a scale for each block, by onnxruntime."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(
        block_size=INT8_BLOCK, is_symmetric=True, bits=8, accuracy_level=ACCURACY
    )
    quantizer = MatMulNBitsQuantizer(model, bits=8, algo_config=config)
    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)  # a line a node
    quantizer.process()
    made: ModelProto = quantizer.model.model
    return made


def _model(graph: GraphProto, *domains: str) -> ModelProto:
    own = [helper.make_opsetid(domain, 1) for domain in domains]
    return helper.make_model(
        graph,
        producer_name="moac",
        ir_version=_IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET), *own],
    )


def _save_apart(model: ModelProto, staging: Path) -> None:
    """Save with the weights held by value in a file of their own; references stay as they are."""
    onnx.save_model(
        model,
        staging / ONNX_MODEL,
        save_as_external_data=True,
        location=ONNX_WEIGHTS,
        size_threshold=1024,
    )
