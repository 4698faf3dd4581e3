"""What weights of 8 and 4 bits and activations of 8 cost a model's loss of text.

    python benchmarks/int4.py .cache/smollm2-135m-instruct --rescale 1 --spread 0.1

The dense model in transformers, in float32, on windows of the held-out texts that come with the
project: its loss as it is and rounded as packages round it, on the same tokens, and beside that
4 bits rounded to nearest. A checkpoint that was made of a 4-bit file lies on the grid of 4 bits
already: --rescale multiplies channels by random numbers between a norm and what follows it, values
and output, up and down, where the function stays the same and the grid does not. Of Llama's family
alone. Rounding with feedback reads calibration's texts, none of which is measured on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from int8 import losses, text_windows
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from moac.calibration import calibration_windows
from moac.packaging.four_bits import Rounded
from moac.packaging.quantise import round_weights
from moac.packaging.rounding import WINDOW_TOKENS, WINDOWS, round_layers
from moac_runtime.package.weight_formats import BLOCK

ROWS = (
    ("int8", "nearest", False),
    ("int8", "nearest", True),
    ("int4", "nearest", False),
    ("int4", "feedback", False),
    ("int4", "feedback", True),
)


@contextmanager
def rounded_activations(model: nn.Module) -> Iterator[None]:
    """What linear layers are given in 8 bits, as the native kernels round it."""

    def rounded(module: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
        (x,) = given
        blocks = F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        scales = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
        whole = (blocks / scales).round() * scales
        return (whole.flatten(-2)[..., : x.shape[-1]],)

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(rounded) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def rescale(model: Any, seed: int, spread: float) -> None:
    """Multiply channels by random numbers that what follows divides by again, in place.

    `spread`: of the numbers' logarithms; 0.1 leaves a grid and makes no outlier.
    """
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> Tensor:
        return (spread * torch.randn(count, generator=generator)).exp()

    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, following in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factor = some(len(norm.weight))
            norm.weight.mul_(factor)
            for linear in following:
                linear.weight.div_(factor)
        values = some(len(attention.v_proj.weight))
        attention.v_proj.weight.mul_(values[:, None])
        heads = values.unflatten(0, (config.num_key_value_heads, -1))
        attention.o_proj.weight.div_(heads.repeat_interleave(group, 0).flatten())
        inner = some(len(mlp.up_proj.weight))
        mlp.up_proj.weight.mul_(inner[:, None])
        mlp.down_proj.weight.div_(inner)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--windows", type=int, default=3, help="windows of each text")
    parser.add_argument("--rescale", type=int, metavar="SEED", help="rescale channels at random")
    parser.add_argument("--spread", type=float, default=0.1, help="of the factors' logarithms")
    options = parser.parse_args()
    windows = text_windows(options.source, options.windows)

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.bfloat16)
        model = model.float().eval()
        if options.rescale is not None:
            rescale(model, options.rescale, options.spread)
        return model

    exact = losses(load(), windows)
    print(f"{len(windows)} windows, unrounded loss {exact.mean():.4f}")
    heads = ("weights", "rounded", "activations", "change", "95 %", "perplexity")
    print("  ".join(f"{head:>11}" for head in heads), flush=True)
    rounded: dict[str, Rounded] = {}
    for weights, how, whole in ROWS:
        model = load()
        if how == "feedback" and not rounded:
            tokenizer = AutoTokenizer.from_pretrained(options.source)
            text = calibration_windows(tokenizer, WINDOW_TOKENS, WINDOWS, 0)
            rounded = round_layers(model, text)
        round_weights(model, weights, rounded if how == "feedback" else None)
        with rounded_activations(model) if whole else nullcontext():
            change = losses(model, windows) - exact
        mean, spread = change.mean(), 1.96 * change.std() / len(change) ** 0.5
        told = (weights, how, "8 bits" if whole else "float32", f"{mean:+.4f}", f"{spread:.4f}")
        cells = (*told, f"{100 * mean.expm1():+.2f} %")
        print("  ".join(f"{cell:>11}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
