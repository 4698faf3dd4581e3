"""Influence of every candidate span of every KV head, sample by sample (MoA, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moac.calibration.samples import CalibrationSample
from moac.checkpoint.key_order import key_orders
from moac.planning.problem import HeadLayout
from moac.profiling.attention import TILE_ELEMENTS, InfluenceRecorder
from moac.profiling.hooks import INFLUENCE, attention
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec

RUNNING_TEXT = "text"
ACTIVATION_BYTES_LIMIT = 2 << 30
_TILE_COPIES = 8  # float32: scores, weights, flows, what is made of them
_LOGIT_COPIES = 4  # float32: themselves, chances, what the loss keeps, their gradient


def sample_influence(
    model: PreTrainedModel,
    spec: ModelSpec,
    sample: CalibrationSample,
    layout: HeadLayout,
    plan: Plan | None = None,
    *,
    widths: Sequence[int] = (),
) -> Tensor:
    """First-order change of one sample's loss, `[layers, kv_heads, spans]` float32.

    Entry `s` is that of a span of `s * block` tokens, up to the sample's planned length; spans at
    or under the sink are infinite. Measured around the dense model, or around `plan`: there a
    span's entry is what it loses against a head that sees everything, all other heads at their
    spans of the plan.

    With `widths` the table is `[1 + widths, layers, kv_heads, spans]`: after the spans' own
    influence that of holding the keys and values of a span in so many bits.
    """
    held = None
    if plan is not None:
        # A head without a sink drops nothing but what the checkpoint's own window drops.
        full = sample.length + layout.sink
        spans = plan.spans(sample.length)
        held = [[head.size if head.sink else full for head in layer] for layer in spans]
    recorder = InfluenceRecorder(
        layout.sink, layout.block, layout.windows, held, widths, key_orders(spec)
    )
    with attention(model, INFLUENCE), _recomputing(model, spec, sample):
        ids = torch.tensor([sample.token_ids], device=model.device)
        # The weights stay without gradients: only activations carry them.
        inputs = model.get_input_embeddings()(ids).requires_grad_(True)
        logits = _answer_logits(model, sample, inputs_embeds=inputs, moac_recorder=recorder)
        _profiled_loss(sample, logits).backward()
    table = torch.stack([recorder.tables[i].float().cpu() for i in range(spec.num_layers)])
    missing = -(-sample.length // layout.block) + 1 - table.shape[-1]
    padded: Tensor = F.pad(table, (0, missing))  # past the sample's own end nothing is masked
    if not widths:
        return padded
    rounding = torch.stack([recorder.rounding[i].float().cpu() for i in range(spec.num_layers)], 1)
    # past the sample's own end nothing more is held
    wider = rounding[..., -1:].expand(*rounding.shape[:-1], missing)
    return torch.cat([padded[None], torch.cat([rounding, wider], dim=-1)])


def _profiled_loss(sample: CalibrationSample, logits: Tensor) -> Tensor:
    """The scalar whose gradient tells what a span is worth, from answer logits `[A, V]`.

    Running text: the log-likelihood of tokens drawn from the model's own prediction, whose
    squared gradient is the Fisher information, the curvature of the divergence from the dense
    model. Answers: the log-odds against the dense model's own tokens, whose gradient does not
    fade where the model is sure (at probability .99 the likelihood's has lost 99 %). Their mean;
    of a planted value their soft maximum, since one wrong token makes it wrong.
    """
    if sample.domain == RUNNING_TEXT:
        chances = logits.detach().softmax(-1).cpu()
        drawn = torch.multinomial(chances, 1, generator=_generator(sample)).to(logits.device)
        surprise: Tensor = F.cross_entropy(logits, drawn[:, 0], reduction="sum")
        return surprise / math.sqrt(len(drawn))
    answer = _answers(sample, logits.device)[:, None]
    others = logits.scatter(1, answer, float("-inf")).logsumexp(-1)
    odds: Tensor = others - logits.gather(1, answer)[:, 0]
    return odds.logsumexp(0) if sample.values else odds.mean()


def _generator(sample: CalibrationSample) -> torch.Generator:
    """Seeded by the sample, so that a profile is the same however often it is made."""
    generator = torch.Generator()
    return generator.manual_seed(sum(sample.token_ids))


def _answer_logits(model: PreTrainedModel, sample: CalibrationSample, **inputs: object) -> Tensor:
    """Float32 logits `[A, V]` that predict each answer token; none are made for the others."""
    positions = torch.cat([torch.arange(*span) for span in sample.decisive]).to(model.device)
    logits: Tensor = model(**inputs, logits_to_keep=positions - 1, use_cache=False).logits
    return logits[0].float()


def _answers(sample: CalibrationSample, device: torch.device) -> Tensor:
    tokens = [token for span in sample.decisive for token in sample.token_ids[slice(*span)]]
    return torch.tensor(tokens, device=device)


@contextmanager
def _recomputing(
    model: PreTrainedModel, spec: ModelSpec, sample: CalibrationSample
) -> Iterator[None]:
    """Make activations of the first layers anew, as many as would pass the limit."""
    itemsize = torch.finfo(model.dtype).bits // 8
    scored = sum(end - start for start, end in sample.decisive)
    count = recomputed_layers(spec, len(sample.token_ids), scored, itemsize)
    if not count:
        yield
        return
    # transformers renamed the pair in 5.2x and warns about the old names.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    for layer in layers[count:]:
        layer.gradient_checkpointing = False
    model.train()  # transformers recomputes in training mode alone
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.eval()  # which a config may ask for, of training
    try:
        yield
    finally:
        model.eval()
        getattr(model, f"{name}_checkpointing_disable")()


def backward_bytes(
    spec: ModelSpec, length: int, scored: int, itemsize: int, *, layers: int | None = None
) -> int:
    """Bytes, about, that a backward pass keeps of `length` tokens, `scored` of them with a loss.

    `layers`: whose activations are kept, None is all of them.
    """
    widths = 8 * spec.hidden_size + 4 * max(spec.mlp_widths)
    activations = length * widths * (layers or spec.num_layers) * itemsize
    return activations + scored * spec.vocab_size * 4 * _LOGIT_COPIES


def recomputed_layers(spec: ModelSpec, length: int, scored: int, itemsize: int) -> int:
    """How many layers are made anew on the way back, so that what is kept fits the limit."""
    whole = backward_bytes(spec, length, scored, itemsize)
    layer = backward_bytes(spec, length, 0, itemsize, layers=1)
    inputs = length * spec.hidden_size * itemsize  # stay, of a layer that is made anew
    excess = whole - ACTIVATION_BYTES_LIMIT
    return max(0, min(spec.num_layers, math.ceil(excess / (layer - inputs))))


def tile_bytes(spec: ModelSpec, length: int, block: int) -> int:
    """Bytes, about, of one tile of attention's backward pass over `length` keys."""
    return max(TILE_ELEMENTS, spec.num_heads * length * block) * 4 * _TILE_COPIES
