"""What docs/MODELS.md tells: how far tiny models on each backend are from the library's own."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from batches import Batch
from cpu_kernels import open_cpu_session
from families import FAMILIES, ONE_ROPE, ROPES, VOCAB, ropes_of, tiny_model
from oracle import open_session, oracle_logits
from test_onnx import export
from test_onnx import open_session as open_graph
from torch import Tensor

from moac.checkpoint.families import family_of, model_spec
from moac.export.target import graph_obstacle
from moac.packaging.kernels import kernel_obstacle
from moac.show.options import told_options
from moac_runtime.backends.cpu.library import runnable_sets
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule
from moac_runtime.package.spec import ModelSpec

LENGTH, CHUNK = 144, 48
BACKENDS = ("torch", "cpu", "onnx")
CASES = (
    *((family, "default") for family in FAMILIES),
    *(("llama", rope) for rope in ROPES if rope != "default"),
    ("phi3", "longrope"),
)
"""A model of every family, and one of every kind of RoPE."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One tiny model. `errors`: by backend the largest difference of float32 logits, or why it
    does not serve the model; `steps`: between prefill and decode; `drops`: between the plan and
    the dense model, past the spans; `cuda`: why it does not serve it, None where it does."""

    family: str
    rope: str
    options: list[str]
    errors: dict[str, float | str]
    steps: float
    drops: float
    cuda: str | None


def name_of(family: str) -> str:
    """What people call it: the beginning of what its file says of itself."""
    module = import_module(family_of(family).spec.__module__)
    return " ".join(str(module.__doc__).split()).split(":")[0]


def measure(family: str, rope: str) -> Measured:
    """Against the library's attention with nothing dropped, and under the masks of a plan."""
    assert rope in (ropes_of(family) if family in ONE_ROPE else ("default",))
    model: Any = tiny_model(family, rope=rope)
    spec, generator = model_spec(model.config), torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=generator).tolist()
    plans = _plan(spec, DENSE), _plan(spec, Rule(0, 0.25))
    model.set_attn_implementation("eager")
    dense = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    wanted = dense, oracle_logits(model, tokens, plans[1], LENGTH)
    errors: dict[str, float | str] = {}
    steps = 0.0
    for backend in BACKENDS:
        if backend == "onnx" and (reason := graph_obstacle(spec)) is not None:
            errors[backend] = reason
            continue
        found = [_logits(backend, model, plan, tokens) for plan in plans]
        errors[backend] = max(
            _distance(logits, expected)
            for pair, expected in zip(found, wanted, strict=True)
            for logits in pair
        )
        steps = max(steps, *(_distance(*pair) for pair in found))
    drops = _distance(wanted[1][LENGTH // 2 :], dense[LENGTH // 2 :])
    cuda = kernel_obstacle(spec, "float32")
    return Measured(family, rope, told_options(spec), errors, steps, drops, cuda)


def _plan(spec: ModelSpec, first: Rule) -> Plan:
    """One head of every layer under a rule, the others whole."""
    rules = ((first, *(DENSE,) * (spec.num_kv_heads - 1)),) * spec.num_layers
    return Plan(rules, sink=4, block=4, min_span=8, windows=spec.windows)


def _logits(backend: str, model: Any, plan: Plan, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """The logits of all tokens, by prefill in chunks and by decode steps."""
    with tempfile.TemporaryDirectory() as folder:
        graph = export(model, plan, Path(folder)) if backend == "onnx" else None

        def opened() -> Batch:
            if graph is not None:
                return open_graph(graph, capacity=LENGTH, chunk=CHUNK)
            if backend == "torch":
                return open_session(model, plan, capacity=LENGTH, chunk=CHUNK)
            return open_cpu_session(
                model,
                plan,
                instruction_set=runnable_sets(["cpu"])[0],
                capacity=LENGTH,
                chunk=CHUNK,
            )

        return opened().each([tokens])[0], opened().by_decode([tokens])[0]


def _distance(found: Any, wanted: Any) -> float:
    return float((torch.as_tensor(found) - torch.as_tensor(wanted)).abs().max())
