"""The onnx target of one compile: what it needs, what it writes, what error it is owed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moac.checkpoint import Checkpoint
from moac.packaging.golden import reference_logits
from moac.request import CompileRequest
from moac_runtime.errors import UsageError
from moac_runtime.host.extras import missing
from moac_runtime.package.activations import ACTIVATIONS
from moac_runtime.package.golden import GoldenPrompt
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec


def require_onnx(spec: ModelSpec) -> None:
    """Raise UsageError where compiling for onnx lacks a library, or the graph an option."""
    for name in ("onnx", "onnx_ir", "onnxruntime"):
        if find_spec(name) is None:
            raise UsageError(f"the target onnx needs {missing(name)}")
    if (reason := graph_obstacle(spec)) is not None:
        raise UsageError(f"{reason}; leave onnx out of --target")


def graph_obstacle(spec: ModelSpec) -> str | None:
    """Why the graph does not compute a model, None where it does."""
    if any(layer.experts is not None for layer in spec.kinds):
        return "the ONNX graph has no mixture of experts: no operator reads the chosen ones alone"
    if any(layer.sink_logits for layer in spec.kinds):
        return "the ONNX graph has no learned logit in attention's softmax"
    if any(
        x.mlp_limit is not None or x.activation_slope != 1 or x.up_plus_one for x in spec.kinds
    ):
        return "the ONNX graph has no limit, slope or 1 + up in MLPs"
    known = {name for name, one in ACTIVATIONS.items() if one.onnx is not None}
    unknown = next((x.activation for x in spec.kinds if x.activation not in known), None)
    return None if unknown is None else f"the ONNX graph has no activation {unknown!r}"


def emit_onnx(
    staging: Path,
    checkpoint: Checkpoint,
    request: CompileRequest,
    plan: Plan,
    head_order: Sequence[Sequence[int]],
    prompts: Sequence[GoldenPrompt],
) -> dict[str, float]:
    """Write the graph over the weights in `staging`; return the logit error its numbers may show.

    The float32 graph's own limit stands in the package already, so nothing is returned for it.
    """
    from moac.export.write import write_onnx

    package = request.dtype or checkpoint.dtype
    narrow = request.weights != "full"
    half = package == "float16" and not narrow
    dtype = request.onnx_dtype or ("float16" if half else "float32")
    write_onnx(
        staging,
        spec=checkpoint.spec_in(package),
        plan=plan,
        head_order=head_order,
        dtype=dtype,
        capacity=request.capacity or checkpoint.spec.context,
        weights="packed" if narrow else request.onnx_weights,
    )
    if narrow:  # whose limit golden logits have already
        return {}
    if request.onnx_weights == "shared" and dtype == "float32":
        return {}
    rounded = checkpoint.load_model(package).float()
    if request.onnx_weights == "int8":
        round_to_int8(rounded)
    if dtype == "float16":
        rounded = rounded.half()
    errors = [
        (reference_logits(rounded, plan, p.tokens.tolist(), p.positions.tolist()) - p.logits)
        .abs()
        .max()
        for p in prompts
    ]
    name = dtype if request.onnx_weights == "shared" else request.onnx_weights
    return {name: 2 * float(max(errors))}


@torch.no_grad()
def round_to_int8(model: PreTrainedModel) -> None:
    """Round the linear weights of `model` as the int8 graph stores them, in place."""
    from moac.export.write import INT8_BLOCK

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            width = module.in_features
            padded = torch.nn.functional.pad(module.weight, (0, -width % INT8_BLOCK))
            blocks = padded.unflatten(1, (-1, INT8_BLOCK))
            scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
            rounded = ((blocks / scale).round() * scale).flatten(1)[:, :width]
            # a new tensor: the tied embedding table keeps its own
            module.weight = torch.nn.Parameter(rounded)
