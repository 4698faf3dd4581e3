"""Random layers and small models on the device, against the oracle and the torch backend."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch

from moac.bench.ours import random_weights
from moac.checkpoint.families import model_spec, parse_config
from moac.packaging.fuse import head_order
from moac.packaging.kernels import require_kernels
from moac.pipeline.verify import FLOAT32_LIMIT
from moac_kernels.shape import KernelShape
from moac_runtime.backends.cuda.binaries import Form
from moac_runtime.backends.cuda.decoder import CudaDecoder
from moac_runtime.backends.cuda.session import CudaSession
from moac_runtime.backends.session import Feed
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.session import TorchSession
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, HeadSpan, Rule
from moac_runtime.package.spec import ModelSpec
from on_gpu.layer import Layer
from on_gpu.setting import Setting, attempted
from on_gpu.workshop import Workshop

_SMALLEST = KernelShape(
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    hidden_size=128,
    intermediate_size=128,
    norm_eps=1e-5,
    activation="silu",
    windowed=False,
    dtype="float16",
    plan="",
)
# KV heads, group, head dim, dtype, own window, cap on scores, learned logits in the softmax
_OTHERS = (
    (8, 4, 128, "bfloat16", False, None, False),
    (3, 3, 64, "bfloat16", False, None, False),
    (4, 1, 128, "float16", True, None, True),
    (2, 8, 96, "bfloat16", True, None, False),
    (2, 2, 80, "float16", False, None, False),
    (1, 16, 256, "bfloat16", False, None, False),
    (4, 2, 256, "bfloat16", True, 2.0, False),
    (8, 8, 64, "bfloat16", True, None, True),
)
LAYER_KERNELS = ("decode", "combine", "prefill", "prefill_past", "rope_decode", "kv_write")

_LONGEST = {False: 1500, True: 40}  # tokens of a row; in a rehearsal


def case_shapes(setting: Setting) -> list[KernelShape]:
    """The shapes that random layers have, no more than cases; the first is the smallest."""
    if setting.interpret:
        return [replace(_SMALLEST, head_dim=16)]
    others = [
        replace(
            _SMALLEST,
            num_heads=kv_heads * group,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            windowed=windowed,
            score_cap=cap,
            sink_logits=sinks,
        )
        for kv_heads, group, head_dim, dtype, windowed, cap, sinks in _OTHERS
    ]
    return [_SMALLEST, *others][: setting.cases]


def random_layers(setting: Setting, workshop: Workshop) -> Iterator[dict[str, Any]]:
    """`cases` random layers in each form of the kernels; a row a form."""
    shapes, here = case_shapes(setting), workshop.forms()
    for form in here if setting.interpret else get_args(Form):
        what = f"{setting.cases} random layers, {form}"
        if form in here:
            yield attempted(what, partial(_form_row, setting, workshop, shapes, form))
        else:
            yield {"what": what, "left_out": "this host can launch none"}


def _form_row(
    setting: Setting, workshop: Workshop, shapes: Sequence[KernelShape], form: Form
) -> dict[str, Any]:
    worst = [
        _play(setting, workshop, shapes[case % len(shapes)], form, random.Random(case))
        for case in range(setting.cases)
    ]
    failed = sum(not share <= 1 for share in worst)
    return {"worst_error_of_limit": max(worst), "failed": failed}


def _play(
    setting: Setting, workshop: Workshop, shape: KernelShape, form: Form, dice: random.Random
) -> float:
    longest = _LONGEST[setting.interpret]
    heads = _random_heads(shape, longest, dice)
    layer = Layer(
        workshop.load(shape, form),
        workshop.tables(shape),
        shape,
        heads,
        dice.randint(1, 4),
        setting.device,
    )
    torch.manual_seed(dice.randrange(2**31))
    for _ in range(dice.randint(1, 3)):
        room = [(longest - 10 - length) // 2 for length in layer.lengths()]
        counts = [dice.randint(0, most) for most in room]
        layer.prefill(counts if any(counts) else [1] * len(counts))
        for _ in range(dice.randint(0, 3)):
            layer.decode(dice.randint(0, 64))
    return layer.worst


def _random_heads(shape: KernelShape, longest: int, dice: random.Random) -> list[HeadSpan]:
    """Dense, or sinks and a ring, under an own window where the shape has one."""
    window = dice.randint(longest // 3, longest) if shape.windowed else None
    most = longest if window is None else window
    heads = []
    for _ in range(shape.num_kv_heads):
        sink = dice.randint(0, most // 4)
        size = most if dice.random() < 0.25 else dice.randint(sink + 1, most)
        heads.append(HeadSpan(size, 0 if size == most else sink, window))
    return heads


_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 48},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": 0},
    "granite": {"residual_multiplier": 0.7, "attention_multiplier": 0.4, "logits_scaling": 2.0},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 48,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "olmo2": {},
    "phi3": {"partial_rotary_factor": 0.75, "pad_token_id": 0},
    "cohere2": {"sliding_window": 48, "logit_scale": 0.5, "layer_norm_eps": 1e-5},
    "stablelm": {"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
}


def family_specs(setting: Setting) -> dict[str, ModelSpec]:
    """A small model of every family served."""
    common = {
        "vocab_size": 320,
        "hidden_size": setting.hidden,
        "intermediate_size": setting.hidden + 32,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return {
        name: model_spec(parse_config({"model_type": name, **common, **own}, f"a small {name}"))
        for name, own in _FAMILIES.items()
    }


def small_plan(spec: ModelSpec) -> Plan:
    """At 96 tokens: dense heads beside spans of 24 and 48."""
    rules = ((DENSE, Rule(0, 0.25)), (Rule(0, 0.5), Rule(0, 0.25)))
    layers = tuple(rules[layer % 2] for layer in range(spec.num_layers))
    return Plan(layers, sink=4, block=8, min_span=8, windows=spec.windows)


def families(setting: Setting, workshop: Workshop) -> Iterator[dict[str, Any]]:
    """Whole models in float32 against the torch backend on the CPU; a row a family."""
    for name, spec in family_specs(setting).items():
        compared = partial(_family_row, setting, workshop, spec)
        yield attempted(f"small {name}, prefill and decode", compared)


def _family_row(setting: Setting, workshop: Workshop, spec: ModelSpec) -> dict[str, Any]:
    worst = _compare(setting, workshop, spec)
    return {
        "worst_error_of_limit": worst / FLOAT32_LIMIT,
        "failed": int(not worst <= FLOAT32_LIMIT),
    }


def _compare(setting: Setting, workshop: Workshop, spec: ModelSpec) -> float:
    """The largest difference of logits: ragged prefill in chunks, decode, a row that leaves."""
    plan, cpu = small_plan(spec), torch.device("cpu")
    shape = require_kernels(spec, None, "float32")
    weights = random_weights(spec, dtype=torch.float32, device="cpu", seed=0)
    decoder = CudaDecoder(
        spec, weights, workshop.load(shape), dtype=torch.float32, device=setting.device
    )
    order, tables = head_order(plan), workshop.tables(shape)
    sessions: list[Any] = [
        CudaSession(decoder, plan, order, tables, chunk=40),
        TorchSession(Decoder(spec, weights, device=cpu), plan, order),
    ]
    for session in sessions:
        for _ in range(2):
            session.admit(96)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, spec.vocab_size, (2, 96), generator=generator).tolist()
    worst = 0.0

    def compare(*feeds: Feed) -> None:
        nonlocal worst
        found, wanted = (session.step(feeds).cpu() for session in sessions)
        worst = max(worst, float((found - wanted).abs().nan_to_num(torch.inf).max()))

    compare(Feed(0, rows[0][:60]), Feed(1, rows[1][:13]))
    for step in range(4):
        compare(Feed(0, [rows[0][60 + step]]), Feed(1, [rows[1][13 + step]]))
    for session in sessions:
        session.release(0)
    for step in range(4):
        compare(Feed(1, [rows[1][17 + step]]))
    return worst
